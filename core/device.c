/* device.c -- finds the back end of a device's name.
 *
 * A plugin is looked for beside libkelvin.so and loaded on the first request.  It has no libkelvin symbols and libkelvin_cuda.so
 * needs no driver to load: its probe says in words what is missing.  "emulated" is a device for tests: the CUDA plugin's kernels
 * built for the CPU (tests/emulate, make emulated), slow, never installed. */
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "device.h"

static struct plugin {
    const char *device, *file, *build;              /* what makes it, for the message when it is not there */
    const kv_backend *table;
    char path[PATH_MAX], reason[PATH_MAX + 512];
} plugins[] = {
    { .device = "cuda", .file = "libkelvin_cuda.so", .build = "make cuda, which needs nvcc" },
    { .device = "emulated", .file = "libkelvin_emulated.so", .build = "make emulated" },
};
static pthread_once_t plugins_once[] = { PTHREAD_ONCE_INIT, PTHREAD_ONCE_INIT };

static void load(struct plugin *p)
{
    Dl_info self;
    if (!dladdr(plugins, &self) || !self.dli_fname) {
        snprintf(p->reason, sizeof p->reason, "the folder of libkelvin.so is unknown");
        return;
    }
    const char *slash = strrchr(self.dli_fname, '/');
    const int folder = slash ? (int)(slash - self.dli_fname) : 0;
    snprintf(p->path, sizeof p->path, "%.*s/%s", folder ? folder : 1, folder ? self.dli_fname : ".", p->file);
    if (access(p->path, R_OK) != 0) {
        snprintf(p->reason, sizeof p->reason, "plugin not built (no %s beside libkelvin.so): run %s", p->file, p->build);
        p->path[0] = 0;
        return;
    }
    void *so = dlopen(p->path, RTLD_NOW | RTLD_LOCAL);
    const kv_backend *(*get)(void) = NULL;
    if (so) {
        void *symbol = dlsym(so, "kv_backend_get");
        memcpy(&get, &symbol, sizeof get);
    }
    if (!get) {
        snprintf(p->reason, sizeof p->reason, "%s does not load: %.400s", p->path, dlerror());
        return;
    }
    const kv_backend *table = get();
    if (table->abi != KV_BACKEND_ABI) {
        snprintf(p->reason, sizeof p->reason, "%s has back-end version %d, libkelvin.so needs %d: run make %s", p->file, table->abi, KV_BACKEND_ABI, p->device);
        return;
    }
    p->table = table;
}
static void load_cuda(void) { load(&plugins[0]); }
static void load_emulated(void) { load(&plugins[1]); }

/* The plugin that a device's name is about, or null. */
static const struct plugin *plugin_of(const char *device)
{
    const size_t n = strcspn(device, ":");
    for (size_t i = 0; i < sizeof plugins / sizeof *plugins; i++)
        if (strlen(plugins[i].device) == n && !strncmp(device, plugins[i].device, n)) {
            pthread_once(&plugins_once[i], i ? load_emulated : load_cuda);
            return &plugins[i];
        }
    return NULL;
}

int kv_device_open(const char *device, const kv_backend **out, int *number)
{
    RETURN_ERROR_IF(!device, KV_E_ARG, "device is NULL");
    *number = 0;
    if (!strcmp(device, "cpu")) {
        *out = &kv_backend_cpu;
        return KV_OK;
    }
    const struct plugin *p = plugin_of(device);
    RETURN_ERROR_IF(!p, KV_E_ARG, "device '%s' is not cpu, cuda or cuda:N", device);
    const char *colon = strchr(device, ':');
    if (colon) {
        char *end;
        const long n = strtol(colon + 1, &end, 10);
        RETURN_ERROR_IF(end == colon + 1 || *end || n < 0 || n > 63, KV_E_ARG, "device '%s' is not cpu, %s or %s:N with N in 0..63", device, p->device, p->device);
        *number = (int)n;
    }
    RETURN_ERROR_IF(!p->table, KV_E_DEVICE, "%s: %s", p->device, p->reason);
    int n_devices = 0, driver = 0, runtime = 0;
    char err[256];
    const int status = p->table->probe(&n_devices, &driver, &runtime, err, sizeof err);
    RETURN_ERROR_IF(status < 0, KV_E_DEVICE, "%s: %s", p->device, err);
    RETURN_ERROR_IF(*number >= n_devices, KV_E_DEVICE, "device '%s' is not there: %d %s device%s found", device, n_devices, p->device, n_devices == 1 ? "" : "s");
    *out = p->table;
    return KV_OK;
}

int kv_device_query(const char *device, kv_device_info *out)
{
    static _Thread_local char name[160], reason[1100];
    RETURN_ERROR_IF(!out, KV_E_ARG, "kv_device_query: NULL argument");
    *out = (kv_device_info){ .name = "", .reason = "", .plugin = "" };
    const kv_backend *b;
    int number;
    const int status = kv_device_open(device, &b, &number);
    if (status == KV_E_ARG) return status;
    const struct plugin *p = plugin_of(device);
    if (p) out->plugin = p->path;
    if (status < 0) {
        snprintf(reason, sizeof reason, "%s", kv_last_error());
        out->reason = reason;
        return KV_OK;
    }
    char err[256];
    kv_backend_device d = { .sm = 0 };
    FORWARD_IF_ERROR(b->probe(&out->n_devices, &out->driver, &out->runtime, err, sizeof err));
    RETURN_ERROR_IF(b->describe(number, &d, err, sizeof err) < 0, KV_E_DEVICE, "%s: %s", b->name, err);
    snprintf(name, sizeof name, "%s", d.name);
    out->name = name;
    out->available = 1;
    out->sm = d.sm;
    out->abi = b->abi;
    out->memory_bytes = d.memory_bytes;
    return KV_OK;
}

int kv_device_hadamard(const char *device, float *x, const float *sign, int n_rows, int n)
{
    RETURN_ERROR_IF(!x, KV_E_ARG, "kv_device_hadamard: NULL argument");
    RETURN_ERROR_IF(n_rows < 1 || n_rows > 1 << 24, KV_E_ARG, "hadamard: n_rows=%d is outside 1..%d", n_rows, 1 << 24);
    RETURN_ERROR_IF(n < 1 || n > 4096 || (n & (n - 1)), KV_E_ARG, "hadamard: n=%d is not a power of two in 1..4096", n);
    const kv_backend *b;
    int dev, status = KV_OK;
    FORWARD_IF_ERROR(kv_device_open(device, &b, &dev));
    const size_t bytes = (size_t)n_rows * (size_t)n * sizeof(float);
    char err[256] = "";
    void *dx = b->alloc(dev, bytes, err, sizeof err), *ds = NULL;
    if (!dx || (sign && !(ds = b->alloc(dev, (size_t)n * sizeof(float), err, sizeof err)))) status = KV_E_NOMEM;
    if (status == KV_OK) status = b->upload(dev, dx, x, bytes, err, sizeof err);
    if (status == KV_OK && sign) status = b->upload(dev, ds, sign, (size_t)n * sizeof(float), err, sizeof err);
    if (status == KV_OK) status = b->hadamard(dev, dx, ds, n_rows, n, err, sizeof err);
    if (status == KV_OK) status = b->sync(dev, err, sizeof err);
    if (status == KV_OK) status = b->download(dev, x, dx, bytes, err, sizeof err);
    if (dx) b->release(dev, dx);
    if (ds) b->release(dev, ds);
    return status < 0 ? kv_set_error(status, "%s: %s", b->name, err) : KV_OK;
}

int kv_device_bench(const char *device, const char *cases, int repeats, char *json, int json_cap)
{
    RETURN_ERROR_IF(!cases || !json || json_cap < 1, KV_E_ARG, "kv_device_bench: NULL argument or no room");
    RETURN_ERROR_IF(repeats < 1 || repeats > 10000, KV_E_ARG, "bench: repeats=%d is outside 1..10000", repeats);
    const kv_backend *b;
    int number;
    char err[256] = "";
    FORWARD_IF_ERROR(kv_device_open(device, &b, &number));
    RETURN_ERROR_IF(!b->bench, KV_E_UNSUPPORTED, "device '%s' has no measurements: cuda has", device);
    const int status = b->bench(number, cases, repeats, json, (size_t)json_cap, err, sizeof err);
    return status < 0 ? kv_set_error(status, "%s: bench: %s", b->name, err) : KV_OK;
}
