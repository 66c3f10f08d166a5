/* backend_cpu.c -- the first implementation of the back-end table, and the specification of every op in it. */
#include <stdio.h>
#include "backend.h"
#include "device.h"

static int probe(int *n_devices, int *driver, int *runtime, char *err, size_t err_cap)
{
    (void)err_cap;
    *n_devices = 1;
    *driver = *runtime = 0;
    err[0] = 0;
    return KV_OK;
}

static int describe(int device, kv_backend_device *out, char *err, size_t err_cap)
{
    (void)device, (void)err_cap;
    err[0] = 0;
    snprintf(out->name, sizeof out->name, "%s", kv_cpu_name());
    out->sm = 0;
    out->memory_bytes = 0;
    return KV_OK;
}

static void *host_alloc(int device, size_t n_bytes, char *err, size_t err_cap)
{
    (void)device;
    void *p = kv_alloc(n_bytes);
    snprintf(err, err_cap, "%s", p ? "" : kv_last_error());
    return p;
}

static void host_release(int device, void *p)
{
    (void)device;
    kv_free(p);
}

static int copy(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t err_cap)
{
    (void)device, (void)err_cap;
    err[0] = 0;
    memcpy(dst, src, n_bytes);
    return KV_OK;
}

static int sync_nothing(int device, char *err, size_t err_cap)
{
    (void)device, (void)err_cap;
    err[0] = 0;
    return KV_OK;
}

static int hadamard(int device, float *x, const float *sign, int n_rows, int n, char *err, size_t err_cap)
{
    (void)device;
    if (sign)
        for (int64_t i = 0; i < (int64_t)n_rows * n; i++) x[i] *= sign[i % n];
    const int status = kv_hadamard(x, n_rows, n);
    snprintf(err, err_cap, "%s", status < 0 ? kv_last_error() : "");
    return status;
}

const kv_backend kv_backend_cpu = {
    .abi = KV_BACKEND_ABI, .name = "cpu", .probe = probe, .describe = describe, .alloc = host_alloc, .release = host_release,
    .upload = copy, .download = copy, .sync = sync_nothing, .hadamard = hadamard,
};
