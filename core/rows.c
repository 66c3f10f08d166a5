/* rows.c -- attention pieces on plain rows: the raw codec's kernels, and what the tile path and codecs without a kernel
 * of their own end in.  The floor is the read of the rows: f16 rows of 64 are 128 bytes for 4 conversions and 4
 * multiply-adds a query. */
#include "codec.h"

static inline float element(int dtype, const uint8_t *row, int i)
{
    if (dtype == KV_F32) { float f; memcpy(&f, row + 4 * i, 4); return f; }
    const uint16_t h = kv_load_u16(row + 2 * i);
    return dtype == KV_F16 ? kv_f16_to_f32(h) : kv_bf16_to_f32(h);
}

static void dot_c(int dtype, const uint8_t *x, size_t stride, int n_rows, int dim, const float *q, int64_t q_ld, int n_q, float *scores, int64_t s_ld)
{
    for (int t = 0; t < n_rows; t++, x += stride)
        for (int g = 0; g < n_q; g++) {
            float part[8] = { 0 };
            for (int i = 0; i < dim; i++) part[i & 7] += element(dtype, x, i) * q[g * q_ld + i];
            scores[g * s_ld + t] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
        }
}

static void accumulate_c(int dtype, const uint8_t *x, size_t stride, int n_rows, int dim, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld)
{
    for (int t = 0; t < n_rows; t++, x += stride)
        for (int g = 0; g < n_q; g++)
            for (int i = 0; i < dim; i++) acc[g * a_ld + i] += p[g * p_ld + t] * element(dtype, x, i);
}

#define LEVEL_FILE "rows_level.h"
#include "levels.h"
#undef LEVEL_FILE

void kv_rows_dot(int dtype, const void *x, int64_t ld, int n_rows, int dim, const float *q, int64_t q_ld, int n_q, float *scores, int64_t s_ld)
{
    const int level = kv_cpu_simd();
    (level >= KV_SIMD_AVX512 ? dot_avx512 : level >= KV_SIMD_AVX2 ? dot_avx2 : dot_c)
        (dtype, x, (size_t)ld * (dtype == KV_F32 ? 4 : 2), n_rows, dim, q, q_ld, n_q, scores, s_ld);
}

void kv_rows_accumulate(int dtype, const void *x, int64_t ld, int n_rows, int dim, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld)
{
    const int level = kv_cpu_simd();
    (level >= KV_SIMD_AVX512 ? accumulate_avx512 : level >= KV_SIMD_AVX2 ? accumulate_avx2 : accumulate_c)
        (dtype, x, (size_t)ld * (dtype == KV_F32 ? 4 : 2), n_rows, dim, p, p_ld, n_q, acc, a_ld);
}
