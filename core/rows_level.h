/* rows_level.h -- attention on rows for one SIMD level (levels.h). */
#include "lanes.h"

INLINE L(vf) L(row_load)(int dtype, const uint8_t *row, int i)
{
    return dtype == KV_F32 ? L(load)((const float *)row + i) : dtype == KV_F16 ? L(load_f16)(row + 2 * i) : L(load_bf16)(row + 2 * i);
}
INLINE L(vf) L(row_load_part)(int dtype, const uint8_t *row, int i, int n)
{
    if (dtype == KV_F32) return L(load_part)((const float *)row + i, n);
    uint16_t part[LANES] = { 0 };
    memcpy(part, row + 2 * i, (size_t)n * 2);
    return L(row_load)(dtype, (const uint8_t *)part, 0);
}

INLINE void L(dot_some)(int dtype, const uint8_t *x, size_t stride, int n_rows, int dim, const float *q, int64_t q_ld, int n_q, float *scores, int64_t s_ld)
{
    const int full = dim / LANES * LANES, rest = dim - full;
    for (int t = 0; t < n_rows; t += LANES) {
        const int n = kv_min(LANES, n_rows - t);
        L(vf) part[4][LANES];
        for (int j = 0; j < n; j++) {
            const uint8_t *row = x + (size_t)(t + j) * stride;
            L(vf) a[4] = { L(zero)(), L(zero)(), L(zero)(), L(zero)() };
            for (int i = 0; i < full; i += LANES) {
                const L(vf) v = L(row_load)(dtype, row, i);
                for (int g = 0; g < n_q; g++) a[g] = L(fma)(v, L(load)(q + g * q_ld + i), a[g]);
            }
            if (rest) {
                const L(vf) v = L(row_load_part)(dtype, row, full, rest);
                for (int g = 0; g < n_q; g++) a[g] = L(fma)(v, L(load_part)(q + g * q_ld + full, rest), a[g]);
            }
            for (int g = 0; g < n_q; g++) part[g][j] = a[g];
        }
        for (int g = 0; g < n_q; g++) {
            for (int j = n; j < LANES; j++) part[g][j] = L(zero)();
            const L(vf) s = L(hsum)(part[g]);
            if (n == LANES) L(store)(scores + g * s_ld + t, s);
            else L(store_part)(scores + g * s_ld + t, s, n);
        }
    }
}

/* width registers of columns from column i on. */
INLINE void L(accumulate_cols)(int dtype, const uint8_t *x, size_t stride, int n_rows, int i, int width, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld)
{
    L(vf) a[4][8];
    for (int g = 0; g < n_q; g++)
        for (int k = 0; k < width; k++) a[g][k] = L(load)(acc + g * a_ld + i + k * LANES);
    for (int t = 0; t < n_rows; t++, x += stride) {
        L(vf) v[8];
        for (int k = 0; k < width; k++) v[k] = L(row_load)(dtype, x, i + k * LANES);
        for (int g = 0; g < n_q; g++) {
            const L(vf) w = L(set)(p[g * p_ld + t]);
            for (int k = 0; k < width; k++) a[g][k] = L(fma)(w, v[k], a[g][k]);
        }
    }
    for (int g = 0; g < n_q; g++)
        for (int k = 0; k < width; k++) L(store)(acc + g * a_ld + i + k * LANES, a[g][k]);
}

INLINE void L(accumulate_some)(int dtype, const uint8_t *x, size_t stride, int n_rows, int dim, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld)
{
    /* As many accumulators as leave registers for the row: 8 chains hide the latency of a multiply-add. */
    const int width = LANES == 16 ? (n_q <= 2 ? 8 : 4) : n_q == 1 ? 8 : n_q == 2 ? 4 : 2;
    int i = 0;
    for (; i + width * LANES <= dim; i += width * LANES) L(accumulate_cols)(dtype, x, stride, n_rows, i, width, p, p_ld, n_q, acc, a_ld);
    if (width > 4) for (; i + 4 * LANES <= dim; i += 4 * LANES) L(accumulate_cols)(dtype, x, stride, n_rows, i, 4, p, p_ld, n_q, acc, a_ld);
    for (; i + LANES <= dim; i += LANES) L(accumulate_cols)(dtype, x, stride, n_rows, i, 1, p, p_ld, n_q, acc, a_ld);
    if (i == dim) return;
    const int rest = dim - i;
    L(vf) a[4];
    for (int g = 0; g < n_q; g++) a[g] = L(load_part)(acc + g * a_ld + i, rest);
    for (int t = 0; t < n_rows; t++) {
        const L(vf) v = L(row_load_part)(dtype, x + (size_t)t * stride, i, rest);
        for (int g = 0; g < n_q; g++) a[g] = L(fma)(L(set)(p[g * p_ld + t]), v, a[g]);
    }
    for (int g = 0; g < n_q; g++) L(store_part)(acc + g * a_ld + i, a[g], rest);
}

/* Constant dtype and query count in every copy: up to four queries share a row's loads. */
#define BY_COUNT(fn, dtype, n, ...) switch (n) { \
    case 1: L(fn)(dtype, __VA_ARGS__, 1, OUT); break; case 2: L(fn)(dtype, __VA_ARGS__, 2, OUT); break; \
    case 3: L(fn)(dtype, __VA_ARGS__, 3, OUT); break; default: L(fn)(dtype, __VA_ARGS__, 4, OUT); }
#define BY_TYPE(fn, n, ...) switch (dtype) { \
    case KV_F32: BY_COUNT(fn, KV_F32, n, __VA_ARGS__) break; case KV_F16: BY_COUNT(fn, KV_F16, n, __VA_ARGS__) break; \
    default: BY_COUNT(fn, KV_BF16, n, __VA_ARGS__) }

#define OUT scores, s_ld
TARGET static void L(dot)(int dtype, const uint8_t *x, size_t stride, int n_rows, int dim, const float *q, int64_t q_ld, int n_q, float *scores, int64_t s_ld)
{
    for (int n; n_q > 0; n_q -= n, q += n * q_ld, scores += n * s_ld) {
        n = kv_min(n_q, 4);
        BY_TYPE(dot_some, n, x, stride, n_rows, dim, q, q_ld)
    }
}
#undef OUT
#define OUT acc, a_ld
TARGET static void L(accumulate)(int dtype, const uint8_t *x, size_t stride, int n_rows, int dim, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld)
{
    for (int n; n_q > 0; n_q -= n, p += n * p_ld, acc += n * a_ld) {
        n = kv_min(n_q, 4);
        BY_TYPE(accumulate_some, n, x, stride, n_rows, dim, p, p_ld)
    }
}
#undef OUT
#undef BY_COUNT
#undef BY_TYPE
#undef INLINE
