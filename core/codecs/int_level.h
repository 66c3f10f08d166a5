/* int_level.h -- int.c's two products on codes for one SIMD level (levels.h).
 *
 * Scales leave the inner loop: a group contributes d (sum of x * code) + m (sum of x), so the loop multiplies bytes widened
 * to f32, and minima cost one multiply-add a group and 16 rows.  A tile is unpacked once for up to SHARE queries. */
#include "../lanes.h"

INLINE L(vf) L(widen)(bool has_min, const int8_t *p) { return has_min ? L(load_u8)(p) : L(load_s8)(p); }

INLINE void L(dot_tile)(bool has_min, int n_q, const int_state *s, const tile *t, int n, const float *x, int64_t x_ld,
                        const float (*x_sum)[MAX_GROUPS], float *y, int64_t y_ld)
{
    const int cols = s->cols, group = s->group;
    for (int r0 = 0; r0 < n; r0 += LANES) {
        const int m = kv_min(LANES, n - r0);
        L(vf) part[4][LANES];
        for (int r = 0; r < m; r++) {
            const int8_t *code = t->code + (r0 + r) * cols;
            L(vf) sum[4] = { L(zero)(), L(zero)(), L(zero)(), L(zero)() };
            for (int i = 0, k = 0; i < cols; k++) {
                const int end = kv_min(i + group, cols);
                L(vf) a[4] = { L(zero)(), L(zero)(), L(zero)(), L(zero)() };
                for (; i < end; i += LANES) {
                    const L(vf) v = L(widen)(has_min, code + i);
                    for (int g = 0; g < n_q; g++) a[g] = L(fma)(v, L(load)(x + g * x_ld + i), a[g]);
                }
                const L(vf) d = L(set)(t->d[k][r0 + r]);
                for (int g = 0; g < n_q; g++) sum[g] = L(fma)(a[g], d, sum[g]);
            }
            for (int g = 0; g < n_q; g++) part[g][r] = sum[g];
        }
        for (int g = 0; g < n_q; g++) {
            for (int r = m; r < LANES; r++) part[g][r] = L(zero)();
            L(vf) v = L(hsum)(part[g]);
            if (has_min)
                for (int i = 0, k = 0; i < cols; i += group, k++) v = L(fma)(L(load)(t->m[k] + r0), L(set)(x_sum[g][k]), v);
            if (m == LANES) L(store)(y + g * y_ld + r0, v);
            else L(store_part)(y + g * y_ld + r0, v, m);
        }
    }
}

/* width registers of columns from i on; weight[g][r] already holds the group's scales. */
INLINE void L(accumulate_cols)(bool has_min, int n_q, int width, const int8_t *code, int cols, int n, const float (*weight)[TILE], float *y, int64_t y_ld)
{
    L(vf) a[4][2];
    for (int g = 0; g < n_q; g++)
        for (int j = 0; j < width; j++) a[g][j] = L(load)(y + g * y_ld + j * LANES);
    for (int r = 0; r < n; r++, code += cols)
        for (int j = 0; j < width; j++) {
            const L(vf) v = L(widen)(has_min, code + j * LANES);
            for (int g = 0; g < n_q; g++) a[g][j] = L(fma)(v, L(set)(weight[g][r]), a[g][j]);
        }
    for (int g = 0; g < n_q; g++)
        for (int j = 0; j < width; j++) L(store)(y + g * y_ld + j * LANES, a[g][j]);
}

INLINE void L(accumulate_tile)(bool has_min, int n_q, const int_state *s, const tile *t, int n, const float (*w)[TILE],
                               float (*min_sum)[MAX_GROUPS][TILE], float *y, int64_t y_ld)
{
    for (int i = 0, k = 0; i < s->cols; k++) {
        const int end = kv_min(i + s->group, s->cols);
        float weight[4][TILE];
        for (int g = 0; g < n_q; g++)
            for (int r = 0; r < TILE; r += LANES) {
                const L(vf) v = L(load)(w[g] + r);
                L(store)(weight[g] + r, L(mul)(v, L(load)(t->d[k] + r)));
                if (has_min) L(store)(min_sum[g][k] + r, L(fma)(v, L(load)(t->m[k] + r), L(load)(min_sum[g][k] + r)));
            }
        for (; i + 2 * LANES <= end; i += 2 * LANES) L(accumulate_cols)(has_min, n_q, 2, t->code + i, s->cols, n, (const float (*)[TILE])weight, y + i, y_ld);
        for (; i < end; i += LANES)                  L(accumulate_cols)(has_min, n_q, 1, t->code + i, s->cols, n, (const float (*)[TILE])weight, y + i, y_ld);
    }
}

/* Constant kind of code and query count in every copy. */
#define BY_COUNT(fn, min, n, ...) switch (n) { \
    case 1: L(fn)(min, 1, __VA_ARGS__); break; case 2: L(fn)(min, 2, __VA_ARGS__); break; \
    case 3: L(fn)(min, 3, __VA_ARGS__); break; default: L(fn)(min, 4, __VA_ARGS__); }
#define BY_KIND(fn, n, ...) if (s->has_min) { BY_COUNT(fn, true, n, __VA_ARGS__) } else { BY_COUNT(fn, false, n, __VA_ARGS__) }

TARGET static void L(mat_dot)(const int_state *s, const uint8_t *rows, int n_rows, const float *x, int64_t x_ld, int n_q, float *y, int64_t y_ld)
{
    tile t;
    float x_sum[SHARE][MAX_GROUPS];
    if (s->has_min)
        for (int g = 0; g < n_q; g++)
            for (int i = 0, k = 0; i < s->cols; k++) {
                L(vf) part[LANES] = { L(zero)() };
                for (const int end = kv_min(i + s->group, s->cols); i < end; i += LANES) part[0] = L(add)(part[0], L(load)(x + g * x_ld + i));
                float sum[LANES];
                for (int r = 1; r < LANES; r++) part[r] = L(zero)();
                L(store)(sum, L(hsum)(part));
                x_sum[g][k] = sum[0];
            }
    for (int r = 0; r < n_rows; r += TILE) {
        const int n = kv_min(TILE, n_rows - r);
        load_tile(s, rows + (size_t)r * s->row_bytes, n, &t);
        for (int g = 0; g < n_q; g += 4)
            BY_KIND(dot_tile, kv_min(4, n_q - g), s, &t, n, x + g * x_ld, x_ld, (const float (*)[MAX_GROUPS])(x_sum + g), y + g * y_ld + r, y_ld)
    }
}

TARGET static void L(mat_accumulate)(const int_state *s, const uint8_t *rows, int n_rows, const float *w, int64_t w_ld, int n_q, float *y, int64_t y_ld)
{
    tile t;
    float min_sum[SHARE][MAX_GROUPS][TILE], weight[SHARE][TILE];
    const int n_groups = (s->cols + s->group - 1) / s->group;
    if (s->has_min)
        for (int g = 0; g < n_q; g++) memset(min_sum[g], 0, (size_t)n_groups * sizeof min_sum[0][0]);
    for (int r = 0; r < n_rows; r += TILE) {
        const int n = kv_min(TILE, n_rows - r);
        load_tile(s, rows + (size_t)r * s->row_bytes, n, &t);
        for (int g = 0; g < n_q; g++)
            for (int i = 0; i < TILE; i++) weight[g][i] = i < n ? w[g * w_ld + r + i] : 0;
        for (int g = 0; g < n_q; g += 4)
            BY_KIND(accumulate_tile, kv_min(4, n_q - g), s, &t, n, (const float (*)[TILE])(weight + g), min_sum + g, y + g * y_ld, y_ld)
    }
    if (!s->has_min) return;
    for (int g = 0; g < n_q; g++)
        for (int k = 0; k < n_groups; k++) {
            float sum = 0;
            for (int r = 0; r < TILE; r++) sum += min_sum[g][k][r];
            for (int i = k * s->group; i < kv_min((k + 1) * s->group, s->cols); i += LANES)
                L(store)(y + g * y_ld + i, L(add)(L(load)(y + g * y_ld + i), L(set)(sum)));
        }
}
#undef BY_COUNT
#undef BY_KIND

#include "int_fixed.h"
