/* error.c -- status names, the thread-local message, aligned memory, the clock, Ctrl-C. */
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include "internal.h"
#include "kelvin_abi.h"

static _Thread_local char last_error[1024];

/* One line whatever a file or a caller called its things: control characters are shown as '?'. */
int kv_set_error(int status, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(last_error, sizeof last_error, fmt, ap);
    va_end(ap);
    for (char *c = last_error; *c; c++) if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    return status;
}

const char *kv_last_error(void) { return last_error; }

const char *kv_status_name(int status)
{
    static const char *const name[] = { "KV_OK", "KV_E_ARG", "KV_E_PARAM", "KV_E_NOMEM", "KV_E_UNSUPPORTED",
        "KV_E_UNCALIBRATED", "KV_E_CORRUPT", "KV_E_IO", "KV_E_DEVICE", "KV_E_INTERNAL" };
    return status <= 0 && status > -(int)(sizeof name / sizeof *name) ? name[-status] : "unknown status";
}

int         kv_abi_version(void) { return KV_ABI_VERSION; }
const char *kv_abi_hash(void)    { return KV_ABI_HASH; }
const char *kv_version(void)     { return "0.1"; }
const char *kv_build_flags(void) { return KV_BUILD_FLAGS; }

void *kv_alloc(size_t n_bytes)
{
    void *p = NULL;
#ifdef KV_ALLOC_EXACT
    const size_t unit = 1;
#else
    const size_t unit = 64;
#endif
    if (n_bytes > SIZE_MAX - 64 || posix_memalign(&p, 64, kv_round_up(n_bytes ? n_bytes : 1, unit)) != 0) {
        kv_set_error(KV_E_NOMEM, "out of memory: %zu bytes asked for", n_bytes);
        return NULL;
    }
    return p;
}

void *kv_zalloc(size_t n_bytes)
{
    void *p = kv_alloc(n_bytes);
    if (p) memset(p, 0, n_bytes);
    return p;
}

void *kv_alloc_array(size_t n, size_t size, bool zero)
{
    size_t total;
    if (!kv_mul(n, size, &total)) {
        kv_set_error(KV_E_NOMEM, "out of memory: %zu items of %zu bytes asked for", n, size);
        return NULL;
    }
    return zero ? kv_zalloc(total) : kv_alloc(total);
}

void kv_free(void *p) { free(p); }

double kv_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile sig_atomic_t interrupts;

static void on_interrupt(int sig)
{
    if (++interrupts > 1) {
        signal(sig, SIG_DFL);
        raise(sig);
    }
}

void kv_interrupt_enable(void)
{
    struct sigaction sa = { .sa_handler = on_interrupt };
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
}

int kv_interrupted(void)
{
    if (!interrupts) return 0;
    interrupts = 0;
    return 1;
}
