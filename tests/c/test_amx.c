/* test_amx.c -- products on AMX tiles: against double, the same bits wherever a row lies, and nothing written beside the result. */
#include <math.h>
#include "amx.h"
#include "check.h"

enum { SEED = 29 };
static uint32_t state = SEED;

static float random_normal(void)
{
    float sum = 0;
    for (int i = 0; i < 6; i++) {
        state = state * 1664525u + 1013904223u;
        sum += (float)(state >> 8) / 16777216.0f - 0.5f;
    }
    return sum * 1.4142f;
}

static float *random_matrix(int rows, int k)
{
    float *x = kv_alloc_array((size_t)rows * (size_t)k, sizeof *x, false);
    for (int i = 0; i < rows * k; i++) x[i] = random_normal();
    return x;
}

static void *packed(int rows, int k)
{
    void *p = kv_alloc(kv_amx_bytes(rows, k));
    memset(p, 0xff, kv_amx_bytes(rows, k));    /* NaN, should padding be left out */
    return p;
}

static double worst;                          /* error as a share of the two rows' norms */

static void shape(int m, int n, int k)
{
    enum { MARGIN = 3 };
    const int ld = n + MARGIN;
    float *const a = random_matrix(m, k), *const b = random_matrix(n, k), *const turned = random_matrix(n, k), *const c = random_matrix(m, ld);
    float *const before = kv_alloc_array((size_t)m * (size_t)ld, sizeof *before, false), *const one = kv_alloc_array((size_t)n, sizeof *one, false);
    void *const left = packed(m, k), *const right = packed(n, k), *const right_t = packed(n, k), *const alone = packed(1, k);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < k; i++) turned[i * n + j] = b[j * k + i];
    kv_amx_pack_left(a, k, m, k, 2, left);
    kv_amx_pack_right(b, k, n, k, right);
    kv_amx_pack_right_t(turned, n, n, k, right_t);
    CHECK(memcmp(right, right_t, kv_amx_bytes(n, k)) == 0, "%d x %d: the two ways to pack the right side differ", n, k);
    for (int add = 0; add < 2; add++) {
        memcpy(before, c, sizeof *c * (size_t)m * (size_t)ld);
        kv_amx_multiply(left, k, m, right, k, n, k, add, c, ld);
        int beside = 0;
        for (int i = 0; i < m; i++)
            for (int j = 0; j < ld; j++) {
                if (j >= n) { beside += c[i * ld + j] != before[i * ld + j]; continue; }
                double sum = 0, aa = 0, bb = 0;
                for (int x = 0; x < k; x++) {
                    sum += 2.0 * a[i * k + x] * b[j * k + x];
                    aa += 4.0 * a[i * k + x] * a[i * k + x];
                    bb += (double)b[j * k + x] * b[j * k + x];
                }
                worst = fmax(worst, fabs(c[i * ld + j] - (add ? before[i * ld + j] : 0) - sum) / sqrt(aa * bb));
            }
        CHECK(beside == 0, "%d x %d x %d: %d values beside the result changed", m, n, k, beside);
    }
    int other = 0;
    kv_amx_multiply(left, k, m, right, k, n, k, false, c, ld);
    for (int i = 0; i < m; i += 1 + m / 5) {
        kv_amx_pack_left(a + i * k, k, 1, k, 2, alone);
        kv_amx_multiply(alone, k, 1, right, k, n, k, false, one, n);
        other += memcmp(one, c + i * ld, sizeof *one * (size_t)n) != 0;
    }
    CHECK(other == 0, "%d x %d x %d: %d rows alone have other bits", m, n, k, other);
    void *const all[] = { a, b, turned, c, before, one, left, right, right_t, alone };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kv_free(all[i]);
}

/* The first 64 positions of operands that were packed for more. */
static void part(void)
{
    enum { M = 40, N = 50, K = 96, SOME = 64 };
    float *const a = random_matrix(M, K), *const b = random_matrix(N, K), c[M * N], d[M * N];
    void *const left = packed(M, K), *const right = packed(N, K);
    kv_amx_pack_left(a, K, M, K, 1, left);
    kv_amx_pack_right(b, K, N, K, right);
    kv_amx_multiply(left, K, M, right, K, N, SOME, false, c, N);
    kv_amx_pack_left(a, K, M, SOME, 1, left);
    kv_amx_pack_right(b, K, N, SOME, right);
    kv_amx_multiply(left, SOME, M, right, SOME, N, SOME, false, d, N);
    CHECK(memcmp(c, d, sizeof c) == 0, "a part of longer operands gives other bits");
    void *const all[] = { a, b, left, right };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kv_free(all[i]);
}

int main(void)
{
    printf("seed %d\n", SEED);
    CHECK(kv_cpu_limit(KV_SIMD_AVX512) <= KV_SIMD_AVX512 && !kv_amx(), "the limit leaves AMX on");
    kv_cpu_limit(KV_SIMD_AMX);
    if (!kv_amx()) {
        SKIP("this processor or system has no AMX with bf16");
        return check_end();
    }
    static const int shapes[][3] = { { 1, 1, 1 }, { 1, 3, 5 }, { 16, 16, 32 }, { 32, 32, 64 }, { 33, 31, 65 }, { 37, 45, 70 }, { 64, 96, 576 }, { 5, 130, 33 }, { 100, 17, 31 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) shape(shapes[i][0], shapes[i][1], shapes[i][2]);
    part();
    CHECK(worst < 1.5e-5, "error %.2g of the rows' norms", worst);       /* 2^-17 each: 1.1e-5 where one product is all */
    printf("worst error %.2g of |row||row|\n", worst);
    return check_end();
}
