/* backend.h -- what a device plugin exports: one versioned table.  Plain C, no CUDA types, no libkelvin symbols. */
#ifndef KV_BACKEND_H
#define KV_BACKEND_H
#include <stddef.h>
#include <stdint.h>

enum { KV_BACKEND_ABI = 1 };

typedef struct kv_backend_device { char name[128]; int sm; double memory_bytes; } kv_backend_device;

typedef struct kv_backend {
    int         abi;                       /* KV_BACKEND_ABI of the build; first, so that any version can be refused */
    const char *name;                      /* "cpu", "cuda" */
    /* Fills err (always terminated) and returns a negative KV_E_* when the device cannot be used. */
    int  (*probe)(int *n_devices, int *driver, int *runtime, char *err, size_t err_cap);
    int  (*describe)(int device, kv_backend_device *out, char *err, size_t err_cap);
    void *(*alloc)(int device, size_t n_bytes, char *err, size_t err_cap);
    void (*release)(int device, void *p);
    int  (*upload)(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t err_cap);
    int  (*download)(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t err_cap);
    int  (*sync)(int device, char *err, size_t err_cap);
    /* x [n_rows][n] on the device, in place: x = FWHT(sign * x) / sqrt(n); sign on the device or NULL. */
    int  (*hadamard)(int device, float *x, const float *sign, int n_rows, int n, char *err, size_t err_cap);
} kv_backend;

/* A plugin exports: const kv_backend *kv_backend_get(void); */
#endif
