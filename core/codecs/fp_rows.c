/* fp_rows.c -- rows of small codes: plain C, which is the specification, and the choice of a level.
 *
 * Plain C decodes a few rows and attends to those.  So do shapes that the kernels leave out (rows that are not whole
 * registers) and rows with e4m3's NaN, which only a damaged or foreign page holds. */
#include "fp_rows.h"

#define LEVEL_FILE "codecs/fp_rows_level.h"
#include "../levels.h"
#undef LEVEL_FILE

/* The level for these rows. */
static int level_for(const fp_rows *r, const uint8_t *rows, int n_rows)
{
    const int level = kv_cpu_simd();
    const size_t n = (size_t)n_rows * r->row_bytes;
    if (level < KV_SIMD_AVX2 || r->cols % 16 || (r->group % 16 && r->group < r->cols)) return KV_SIMD_C;
    if (r->kind == FP_E4M3 && (level >= KV_SIMD_AVX512 ? has_nan_avx512 : has_nan_avx2)(rows, n)) return KV_SIMD_C;
    return level;
}

void fp_values(int kind, const uint8_t *src, int n, float *dst)
{
    const int level = kv_cpu_simd();
    int i = 0;
    if (level >= KV_SIMD_AVX2 && !(kind == FP_E4M3 && has_nan_avx2(src, (size_t)n))) i = (level >= KV_SIMD_AVX512 ? values_avx512 : values_avx2)(kind, src, n, dst);
    for (; i < n; i++) dst[i] = kind == FP_E4M3 ? fp_e4m3_to_f32(src[i]) : kind == FP_E5M2 ? fp_e5m2_to_f32(src[i]) : fp_e8m0_to_f32(src[i]);
}

float fp_row_value(const fp_rows *r, const uint8_t *row, int i)
{
    if (r->kind == FP_E4M3) return fp_e4m3_to_f32(row[i]);
    if (r->kind == FP_E5M2) return fp_e5m2_to_f32(row[i]);
    const int bit = i * r->kind, at = bit / 8, shift = bit % 8;
    const int word = row[at] | (shift + r->kind > 8 ? row[at + 1] << 8 : 0);     /* 3 bits may cross a byte */
    return r->table[word >> shift & ((1 << r->kind) - 1)];
}

void fp_rows_decode(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, float *x, int64_t ld)
{
    const int level = level_for(r, rows, n_rows);
    if (level >= KV_SIMD_AVX2) {
        (level >= KV_SIMD_AVX512 ? rows_decode_avx512 : rows_decode_avx2)(r, rows, n_rows, scale, x, ld);
        return;
    }
    for (int t = 0; t < n_rows; t++, rows += r->row_bytes, scale += r->n_groups, x += ld)
        for (int i = 0; i < r->cols; i++) x[i] = fp_row_value(r, rows, i) * scale[i / r->group];
}

enum { STRIP = 16 };                                        /* rows that plain C decodes at a time */

/* Rows t .. t+n-1 times their factors and scales. */
static void decode_strip(const fp_rows *r, const uint8_t *rows, int n, const float *scale, const float *factor, float *x)
{
    static const float one[FP_MAX_GROUPS] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    for (int t = 0; t < n; t++, x += r->cols) {
        fp_rows_decode(r, rows + (size_t)t * r->row_bytes, 1, scale ? scale + t * r->n_groups : one, x, r->cols);
        for (int i = 0; i < r->cols; i++) x[i] *= factor[t];
    }
}

void fp_rows_dot(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor, const float *q, int64_t q_ld, int n_q, float *y, int64_t y_ld)
{
    const int level = level_for(r, rows, n_rows);
    if (level >= KV_SIMD_AVX2) {
        (level >= KV_SIMD_AVX512 ? rows_dot_avx512 : rows_dot_avx2)(r, rows, n_rows, scale, factor, q, q_ld, n_q, y, y_ld);
        return;
    }
    float x[STRIP * KV_MAX_HEAD_DIM];
    for (int t = 0; t < n_rows; t += STRIP) {
        const int n = kv_min(STRIP, n_rows - t);
        decode_strip(r, rows + (size_t)t * r->row_bytes, n, scale ? scale + t * r->n_groups : NULL, factor + t, x);
        kv_rows_dot(KV_F32, x, r->cols, n, r->cols, q, q_ld, n_q, y + t, y_ld);
    }
}

void fp_rows_accumulate(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor, const float *p, int64_t p_ld, int n_q, float *acc, int64_t acc_ld)
{
    const int level = level_for(r, rows, n_rows);
    if (level >= KV_SIMD_AVX2) {
        (level >= KV_SIMD_AVX512 ? rows_accumulate_avx512 : rows_accumulate_avx2)(r, rows, n_rows, scale, factor, p, p_ld, n_q, acc, acc_ld);
        return;
    }
    float x[STRIP * KV_MAX_HEAD_DIM];
    for (int t = 0; t < n_rows; t += STRIP) {
        const int n = kv_min(STRIP, n_rows - t);
        decode_strip(r, rows + (size_t)t * r->row_bytes, n, scale ? scale + t * r->n_groups : NULL, factor + t, x);
        kv_rows_accumulate(KV_F32, x, r->cols, n, r->cols, p + t, p_ld, n_q, acc, acc_ld);
    }
}
