/* vecmath.c -- vecmath_level.h at three levels, and the choice between them. */
#include <immintrin.h>
#include "vecmath.h"

#define LEVEL_C
#define LEVEL_FILE "vecmath_level.h"
#include "levels.h"
#undef LEVEL_FILE
#undef LEVEL_C

#define AT_LEVEL(name, ...) (kv_cpu_simd() >= KV_SIMD_AVX512 ? name##_avx512(__VA_ARGS__) : kv_cpu_simd() >= KV_SIMD_AVX2 ? name##_avx2(__VA_ARGS__) : name##_c(__VA_ARGS__))

float    kv_vec_max(const float *x, int n) { return AT_LEVEL(max, x, n); }
float    kv_vec_exp_sum(float *x, int n, float shift) { return AT_LEVEL(exp_sum, x, n, shift); }
void     kv_vec_scale_cap(float *x, int n, float scale, float cap) { AT_LEVEL(scale_cap, x, n, scale, cap); }
float    kv_vec_sum(const float *x, int n) { return AT_LEVEL(sum, x, n); }
float    kv_vec_dot(const float *a, const float *b, int n) { return AT_LEVEL(dot, a, b, n); }
void     kv_vec_axpy(float w, const float *x, float *y, int n) { AT_LEVEL(axpy, w, x, y, n); }
void     kv_vec_scale(float w, float *x, int n) { AT_LEVEL(scale_cap, x, n, w, 0); }
uint32_t kv_vec_abs_bits(const float *x, int64_t n) { return AT_LEVEL(abs_bits, x, n); }
void kv_vec_rows_dot(const float *q, int n_q, const float *rows, int n_rows, int d, float *scores, int64_t ld)
{
    AT_LEVEL(rows_dot, q, n_q, rows, n_rows, d, scores, ld);
}
void kv_vec_rows_accumulate(const float *p, int64_t ld, int n_q, const float *rows, int n_rows, int d, float *acc)
{
    AT_LEVEL(rows_accumulate, p, ld, n_q, rows, n_rows, d, acc);
}

KV_AVX2 static int64_t load_f16_avx2(const uint16_t *src, float *dst, int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
    return i;
}

KV_AVX2 static int64_t store_f16_avx2(const float *src, uint16_t *dst, int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i *)(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    return i;
}

void kv_vec_load(int dtype, const void *src, float *dst, int64_t n)
{
    const uint16_t *h = src;
    int64_t i = 0;
    if (dtype == KV_F32) memcpy(dst, src, sizeof(float) * (size_t)n);
    else if (dtype == KV_BF16) for (; i < n; i++) dst[i] = kv_bf16_to_f32(h[i]);
    else {
        if (kv_cpu_simd() >= KV_SIMD_AVX2) i = load_f16_avx2(h, dst, n);
        for (; i < n; i++) dst[i] = kv_f16_to_f32(h[i]);
    }
}

void kv_vec_store(int dtype, const float *src, void *dst, int64_t n)
{
    uint16_t *h = dst;
    int64_t i = 0;
    if (dtype == KV_F32) memcpy(dst, src, sizeof(float) * (size_t)n);
    else if (dtype == KV_BF16) for (; i < n; i++) h[i] = kv_f32_to_bf16(src[i]);
    else {
        if (kv_cpu_simd() >= KV_SIMD_AVX2) i = store_f16_avx2(src, h, n);
        for (; i < n; i++) h[i] = kv_f32_to_f16(src[i]);
    }
}

void kv_vec_round(int dtype, const float *src, float *dst, int64_t n)
{
    uint16_t block[256];
    if (dtype == KV_F32) {
        if (src != dst) memcpy(dst, src, sizeof(float) * (size_t)n);
        return;
    }
    for (int64_t i = 0; i < n; i += 256) {
        const int64_t m = kv_min64(256, n - i);
        kv_vec_store(dtype, src + i, block, m);
        kv_vec_load(dtype, block, dst + i, m);
    }
}
