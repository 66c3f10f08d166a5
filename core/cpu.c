/* cpu.c -- which SIMD level this processor allows, and its measured ceilings.
 *
 * A level is all of its instructions or nothing: KV_AVX512 functions use AVX-512 F, BW, VL, DQ and VNNI together, so a
 * processor without VNNI counts as AVX2.  __builtin_cpu_supports also asks the operating system (XGETBV) whether it
 * saves the wide registers.  AMX stands beside the levels: its tiles serve the products of prefill alone (amx.c), and the
 * system must be asked for their state. */
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "amx.h"
#include "model.h"

enum { REQUEST_STATE = 0x1023, TILE_DATA = 18 };          /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int  level_max;                        /* written once under `once` */
static bool has_amx;
static char name[64];
static atomic_int limit = KV_SIMD_AMX;

static void detect(void)
{
    __builtin_cpu_init();
    unsigned leaf[4] = { 0 };                 /* F16C has no name in clang's __builtin_cpu_supports before 15; AVX2 implies what the system must save */
    const bool f16c = __get_cpuid(1, &leaf[0], &leaf[1], &leaf[2], &leaf[3]) && (leaf[2] & bit_F16C);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    level_max = avx512 ? KV_SIMD_AVX512 : avx2 ? KV_SIMD_AVX2 : KV_SIMD_C;

    unsigned seven[4] = { 0 }, seven1[4] = { 0 };          /* AMX_BF16 and AMX_TILE; AVX512_BF16 packs for them */
    has_amx = avx512 && __get_cpuid_count(7, 0, &seven[0], &seven[1], &seven[2], &seven[3]) && (seven[3] >> 22 & seven[3] >> 24 & 1) &&
              __get_cpuid_count(7, 1, &seven1[0], &seven1[1], &seven1[2], &seven1[3]) && (seven1[0] >> 5 & 1) &&
              syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;

    unsigned r[12] = { 0 };                   /* the brand string: CPUID 0x80000002..4 */
    if ((unsigned)__get_cpuid_max(0x80000000u, NULL) >= 0x80000004u)
        for (unsigned i = 0; i < 3; i++) __get_cpuid(0x80000002u + i, &r[4 * i], &r[4 * i + 1], &r[4 * i + 2], &r[4 * i + 3]);
    char raw[sizeof r + 1] = { 0 };
    memcpy(raw, r, sizeof r);
    size_t n = 0;
    for (const char *s = raw; *s; s++)        /* vendors pad with spaces, in front, behind and between */
        if (*s != ' ' || (n && name[n - 1] != ' ')) name[n++] = *s;
    while (n && name[n - 1] == ' ') n--;
    name[n] = 0;
    if (!n) memcpy(name, "unknown x86-64", sizeof "unknown x86-64");
}

int kv_cpu_simd_max(void)
{
    pthread_once(&once, detect);
    return level_max;
}

int kv_cpu_simd(void) { return kv_min(kv_cpu_simd_max(), atomic_load_explicit(&limit, memory_order_relaxed)); }

int kv_cpu_limit(int level)
{
    atomic_store(&limit, kv_max(KV_SIMD_C, kv_min(level, KV_SIMD_AMX)));
    return kv_cpu_simd();
}

bool kv_amx(void)
{
    pthread_once(&once, detect);
    return has_amx && atomic_load_explicit(&limit, memory_order_relaxed) >= KV_SIMD_AMX;
}

int kv_cpu_amx(void) { return kv_amx(); }

const char *kv_cpu_name(void)
{
    pthread_once(&once, detect);
    return name;
}

/* ---- ceilings: the best of repeats that together take about BENCH_SECONDS, after one warm-up that touches every page */

#define BENCH_SECONDS 0.5
enum { BENCH_MIN_REPEATS = 3 };

typedef struct { uint8_t *src, *dst; size_t n_bytes; int n_tasks; uint64_t sum[64]; } mem_job;

static uint64_t sum_c(const uint8_t *p, size_t n)
{
    uint64_t s[8] = { 0 };
    for (size_t i = 0; i < n; i += 64)
        for (int j = 0; j < 8; j++) s[j] += kv_load_u64(p + i + 8 * j);
    return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}

/* Four independent sums keep enough loads in flight; the sum exists so that the reads cannot be left out. */
KV_AVX2 static uint64_t sum_avx2(const uint8_t *p, size_t n)
{
    __m256i s[4] = { _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256() };
    size_t i = 0;
    for (; i + 128 <= n; i += 128)
        for (int j = 0; j < 4; j++) s[j] = _mm256_add_epi64(s[j], _mm256_load_si256((const __m256i *)(p + i + 32 * j)));
    uint64_t out[4];
    _mm256_storeu_si256((__m256i *)out, _mm256_add_epi64(_mm256_add_epi64(s[0], s[1]), _mm256_add_epi64(s[2], s[3])));
    return out[0] + out[1] + out[2] + out[3] + sum_c(p + i, n - i);
}

static void span(const mem_job *j, int task, size_t *from, size_t *n)
{
    const size_t lines = j->n_bytes / 64, a = lines * (size_t)task / (size_t)j->n_tasks, b = lines * ((size_t)task + 1) / (size_t)j->n_tasks;
    *from = a * 64;
    *n = (b - a) * 64;
}

static void copy_task(void *ctx, int task, int thread)
{
    (void)thread;
    const mem_job *j = ctx;
    size_t from, n;
    span(j, task, &from, &n);
    memcpy(j->dst + from, j->src + from, n);
}

static void read_task(void *ctx, int task, int thread)
{
    (void)thread;
    mem_job *j = ctx;
    size_t from, n;
    span(j, task, &from, &n);
    j->sum[task] = kv_cpu_simd() >= KV_SIMD_AVX2 ? sum_avx2(j->src + from, n) : sum_c(j->src + from, n);
}

static int bench_memory(const char *what, double mib, int threads, kv_task_fn fn, bool with_dst, double *gb_per_s)
{
    RETURN_ERROR_IF(!gb_per_s, KV_E_ARG, "%s: the result pointer is NULL", what);
    RETURN_ERROR_IF(!(mib >= 1 && mib <= 65536), KV_E_ARG, "%s: mib=%g is outside 1..65536", what, mib);
    RETURN_ERROR_IF(threads < 0 || threads > 64, KV_E_ARG, "%s: threads=%d is outside 0..64", what, threads);
    const int before = kv_threads();
    mem_job j = { .n_bytes = (size_t)mib << 20, .n_tasks = threads ? threads : before };
    int status = KV_E_NOMEM;
    j.src = kv_zalloc(j.n_bytes);
    if (!j.src) goto fail;
    if (with_dst && !(j.dst = kv_alloc(j.n_bytes))) goto fail;
    kv_set_threads(j.n_tasks);
    memset(j.src, 1, j.n_bytes);              /* untouched pages would all be the one zero page */
    double best = 1e30;
    const double start = kv_now();
    for (int r = 0; r <= BENCH_MIN_REPEATS || kv_now() - start < BENCH_SECONDS; r++) {
        const double t = kv_now();
        kv_parallel(j.n_tasks, fn, &j);
        const double dt = kv_now() - t;
        if (r > 0 && dt > 0 && dt < best) best = dt;
    }
    kv_set_threads(before);
    *gb_per_s = (double)j.n_bytes * (with_dst ? 2 : 1) / best / 1e9;
    status = KV_OK;
fail:
    kv_free(j.src);
    kv_free(j.dst);
    return status;
}

int kv_bench_memcpy(double mib, int threads, double *gb_per_s) { return bench_memory("kv_bench_memcpy", mib, threads, copy_task, true, gb_per_s); }
int kv_bench_read(double mib, int threads, double *gb_per_s) { return bench_memory("kv_bench_read", mib, threads, read_task, false, gb_per_s); }

typedef struct { int m, n, k, n_tasks; float *a, *b, *c; } gemm_job;

static void gemm_task(void *ctx, int task, int thread)
{
    (void)thread;
    const gemm_job *j = ctx;
    const int from = (int)((int64_t)j->n * task / j->n_tasks), to = (int)((int64_t)j->n * (task + 1) / j->n_tasks);
    if (to > from) kv_sgemm_nt(j->m, to - from, j->k, 1.0f, j->a, j->k, j->b + (size_t)from * (size_t)j->k, j->k, 0.0f, j->c + from, j->n);
}

int kv_bench_sgemm(int m, int n, int k, double *gflop_per_s)
{
    RETURN_ERROR_IF(!gflop_per_s, KV_E_ARG, "kv_bench_sgemm: the result pointer is NULL");
    RETURN_ERROR_IF(m < 1 || n < 1 || k < 1 || m > 65536 || n > 65536 || k > 65536, KV_E_ARG,
                    "kv_bench_sgemm: %d x %d x %d is outside 1..65536 in a dimension", m, n, k);
    gemm_job j = { .m = m, .n = n, .k = k, .n_tasks = kv_threads() };
    const size_t na = (size_t)m * (size_t)k, nb = (size_t)n * (size_t)k, nc = (size_t)m * (size_t)n;
    int status = KV_E_NOMEM;
    j.a = kv_alloc_array(na, sizeof(float), false);
    j.b = kv_alloc_array(nb, sizeof(float), false);
    j.c = kv_alloc_array(nc, sizeof(float), false);
    if (!j.a || !j.b || !j.c) goto fail;
    for (size_t i = 0; i < na; i++) j.a[i] = (float)(i % 17) * 0.125f - 1.0f;
    for (size_t i = 0; i < nb; i++) j.b[i] = (float)(i % 13) * 0.125f - 0.75f;
    double best = 1e30;
    const double start = kv_now();
    for (int r = 0; r <= BENCH_MIN_REPEATS || kv_now() - start < BENCH_SECONDS; r++) {
        const double t = kv_now();
        kv_parallel(j.n_tasks, gemm_task, &j);
        const double dt = kv_now() - t;
        if (r > 0 && dt > 0 && dt < best) best = dt;
    }
    *gflop_per_s = 2.0 * m * n * k / best / 1e9;
    status = KV_OK;
fail:
    kv_free(j.a);
    kv_free(j.b);
    kv_free(j.c);
    return status;
}
