/* internal.h -- what every core file shares: errors, checked sizes, aligned memory, threads, SIMD levels.
 *
 * Core files include this, never each other's .c.  Nothing here is visible outside libkelvin.so. */
#ifndef KV_INTERNAL_H
#define KV_INTERNAL_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include "kelvin.h"

/* ---- errors (error.c) */
int  kv_set_error(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));   /* returns status */
#define RETURN_ERROR_IF(cond, status, ...) do { if (cond) return kv_set_error(status, __VA_ARGS__); } while (0)
#define FORWARD_IF_ERROR(expr) do { int status_ = (expr); if (status_ < 0) return status_; } while (0)
/* The same with a `status` variable and a cleanup label. */
#define FAIL_IF(cond, code, ...) do { if (cond) { status = kv_set_error(code, __VA_ARGS__); goto fail; } } while (0)
#define FAIL_IF_ERROR(expr) do { status = (expr); if (status < 0) goto fail; } while (0)

/* ---- sizes: false on overflow */
static inline bool kv_mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool kv_add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }
static inline int64_t kv_min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t kv_max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int kv_min(int a, int b) { return a < b ? a : b; }
static inline int kv_max(int a, int b) { return a > b ? a : b; }
static inline size_t kv_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* ---- memory (error.c): 64-byte aligned; NULL sets KV_E_NOMEM's message; kv_free(NULL) is fine */
void *kv_alloc(size_t n_bytes);            /* contents undefined */
void *kv_zalloc(size_t n_bytes);
void *kv_alloc_array(size_t n, size_t size, bool zero);   /* overflow-checked */
void  kv_free(void *p);

/* ---- threads (threads.c): one pool, static or dynamic over tasks; nested calls run inline */
typedef void (*kv_task_fn)(void *ctx, int task, int thread);       /* thread: 0..kv_threads()-1, for scratch */
void  kv_parallel(int n_tasks, kv_task_fn fn, void *ctx);          /* dynamic: next free thread takes the next task */

/* ---- SIMD: a function with one of these targets is called only when kv_cpu_simd() allows it */
#define KV_AVX2   __attribute__((target("avx2,fma,f16c,bmi2")))
#define KV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")))

/* ---- half floats: IEEE round to nearest even, NaN kept (bits.h has the inline code) */
#include "bits.h"
#endif
