/* fp_rows_level.h -- attention on rows of small codes for one SIMD level; fp_rows.c includes it once per level with L,
 * TARGET and LANES set.  Codes become floats in a register and go straight into the products of up to four queries. */
#include "../lanes.h"

/* ---- LANES codes from column i on (a multiple of LANES).  FP_E4M3 comes as value / 256, without its NaN. */

#if LANES == 16
typedef struct L(book) { __m512 t; __m512i shift; } L(book);

INLINE L(book) L(open)(int kind, const fp_rows *r)
{
    /* Lane i of a 16-code unit reads the unit's first word, from lane 8 on its last: 32 - 8*kind bits of that come before. */
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bit = _mm512_mullo_epi32(lane, _mm512_set1_epi32(kind));
    const __m512i back = _mm512_set1_epi32(kind > 2 ? 8 * (2 * kind - 4) : 0);
    return (L(book)){ _mm512_load_ps(r->table), _mm512_mask_sub_epi32(bit, 0xFF00, bit, back) };
}

INLINE L(vf) L(codes)(int kind, const L(book) *b, const uint8_t *row, int i)
{
    if (kind > 4) {
        const __m128i x = _mm_loadu_si128((const void *)(row + i));
        if (kind == FP_E5M2) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8));
        if (kind == FP_E4M3) return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7), _mm256_set1_epi16((short)0xBF80)));
        const __m512i w = _mm512_cvtepu8_epi32(x), e = _mm512_max_epi32(_mm512_slli_epi32(w, 23), _mm512_set1_epi32(0x00400000));
        return _mm512_castsi512_ps(_mm512_mask_or_epi32(e, _mm512_cmpeq_epi32_mask(w, _mm512_set1_epi32(255)), e, _mm512_set1_epi32(0x00400000)));
    }
    const uint8_t *at = row + i / 16 * 2 * kind;
    __m512i x = _mm512_set1_epi32((int)kv_load_u32(at));
    if (kind > 2) x = _mm512_mask_set1_epi32(x, 0xFF00, (int)kv_load_u32(at + 2 * kind - 4));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(x, b->shift), b->t);          /* reads the low 4 bits */
}
#else
typedef struct L(book) { __m256 t[2]; __m256i shift; } L(book);

INLINE L(book) L(open)(int kind, const fp_rows *r)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (L(book)){ { _mm256_load_ps(r->table), _mm256_load_ps(r->table + 8) }, _mm256_mullo_epi32(lane, _mm256_set1_epi32(kind)) };
}

INLINE L(vf) L(codes)(int kind, const L(book) *b, const uint8_t *row, int i)
{
    if (kind > 4) {
        const __m128i x = _mm_loadl_epi64((const void *)(row + i));
        if (kind == FP_E5M2) return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(x), 8));
        if (kind == FP_E4M3) return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(x), 7), _mm_set1_epi16((short)0xBF80)));
        const __m256i w = _mm256_cvtepu8_epi32(x), least = _mm256_set1_epi32(0x00400000);
        const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(w, _mm256_set1_epi32(255)), least);
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_max_epi32(_mm256_slli_epi32(w, 23), least), nan));
    }
    const uint8_t *at = row + i / 8 * kind;
    const uint32_t word = kind == 2 ? kv_load_u16(at) : kind == 3 ? kv_load_u32(at - (i >> 3 & 1)) >> (i & 8) : kv_load_u32(at);   /* 6 bytes end with a word */
    const __m256i x = _mm256_srlv_epi32(_mm256_set1_epi32((int)word), b->shift);
    const __m256 low = _mm256_permutevar8x32_ps(b->t[0], x);                     /* reads the low 3 bits */
    if (kind < 4) return low;
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(b->t[1], x), _mm256_castsi256_ps(_mm256_slli_epi32(x, 28)));
}
#endif

/* Codes that FP_E4M3's conversion gets wrong; no encoder writes them. */
TARGET static bool L(has_nan)(const uint8_t *b, size_t n)
{
    uint8_t any = 0;
    for (size_t i = 0; i < n; i++) any |= (b[i] & 0x7f) == 0x7f;
    return any;
}

TARGET static int L(values)(int kind, const uint8_t *src, int n, float *dst)
{
    const L(book) none = { 0 };
    const L(vf) unit = L(set)(256);
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        L(store)(dst + i, kind == FP_E4M3 ? L(mul)(L(codes)(FP_E4M3, &none, src, i), unit) : kind == FP_E5M2 ? L(codes)(FP_E5M2, &none, src, i) : L(codes)(FP_E8M0, &none, src, i));
    return i;
}

/* ---- the three loops, with constant kind in every copy.  n_q: queries that a copy is made for, n_out of them are there: two go
 * with the copy for three, and columns besides whole tiles with that for four (a missing query is the last one again). */

#define AT(g) ((g) < n_out ? (g) : n_out - 1)

INLINE void L(decode_rows)(int kind, const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, float *x, int64_t ld)
{
    const L(book) b = L(open)(kind, r);
    for (int t = 0; t < n_rows; t++, rows += r->row_bytes, scale += r->n_groups, x += ld)
        for (int i = 0, k = 0; i < r->cols; k++) {
            const L(vf) s = L(set)(scale[k]);
            for (const int end = kv_min(i + r->group, r->cols); i < end; i += LANES) {
                const L(vf) v = L(codes)(kind, &b, rows, i);
                L(store)(x + i, L(mul)(kind == FP_E4M3 ? L(mul)(v, L(set)(256)) : v, s));
            }
        }
}

INLINE void L(dot_rows)(int kind, bool scaled, int n_q, int n_out, const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor,
                        const float *q, int64_t q_ld, float *y, int64_t y_ld)
{
    const L(book) b = L(open)(kind, r);
    for (int t = 0; t < n_rows; t += LANES) {
        const int n = kv_min(LANES, n_rows - t);
        L(vf) part[4][LANES];
        for (int j = 0; j < n; j++, rows += r->row_bytes) {
            L(vf) a[4] = { L(zero)(), L(zero)(), L(zero)(), L(zero)() };
            for (int i = 0, k = 0; i < r->cols; k++) {
                const L(vf) s = scaled ? L(set)(scale[(t + j) * r->n_groups + k]) : L(zero)();
                for (const int end = scaled ? kv_min(i + r->group, r->cols) : r->cols; i < end; i += LANES) {
                    const L(vf) c = L(codes)(kind, &b, rows, i), v = scaled ? L(mul)(c, s) : c;
                    for (int g = 0; g < n_q; g++) a[g] = L(fma)(v, L(load)(q + AT(g) * q_ld + i), a[g]);
                }
            }
            for (int g = 0; g < n_q; g++) part[g][j] = a[g];
        }
        const L(vf) own = n == LANES ? L(load)(factor + t) : L(load_part)(factor + t, n), f = kind == FP_E4M3 ? L(mul)(own, L(set)(256)) : own;
        for (int g = 0; g < n_q; g++) {
            if (g >= n_out) break;
            for (int j = n; j < LANES; j++) part[g][j] = L(zero)();
            const L(vf) s = L(mul)(L(hsum)(part[g]), f);
            if (n == LANES) L(store)(y + g * y_ld + t, s);
            else L(store_part)(y + g * y_ld + t, s, n);
        }
    }
}

/* width registers of columns from i on; w[g][t] holds the row's factor. */
INLINE void L(accumulate_cols)(int kind, bool scaled, int n_q, int n_out, int width, const fp_rows *r, const uint8_t *rows, int n_rows, int i, const float *scale,
                               const float (*w)[FP_TILE], float *acc, int64_t acc_ld)
{
    const L(book) b = L(open)(kind, r);
    L(vf) a[4][4];
    for (int g = 0; g < n_q; g++)
        for (int k = 0; k < width; k++) a[g][k] = L(load)(acc + AT(g) * acc_ld + i + k * LANES);
    int group[4];
    for (int k = 0; k < width; k++) group[k] = scaled ? (i + k * LANES) / r->group : 0;
    for (int t = 0; t < n_rows; t++, rows += r->row_bytes) {
        L(vf) v[4];
        for (int k = 0; k < width; k++) {
            v[k] = L(codes)(kind, &b, rows, i + k * LANES);
            if (scaled) v[k] = L(mul)(v[k], L(set)(scale[t * r->n_groups + group[k]]));
        }
        for (int g = 0; g < n_q; g++) {
            const L(vf) p = L(set)(w[AT(g)][t]);
            for (int k = 0; k < width; k++) a[g][k] = L(fma)(p, v[k], a[g][k]);
        }
    }
    for (int g = 0; g < n_q; g++)            /* a constant count and a condition: sums stay in registers */
        for (int k = 0; k < width && g < n_out; k++) L(store)(acc + g * acc_ld + i + k * LANES, a[g][k]);
}

#define REST(kind, scaled, name) \
    TARGET static __attribute__((noinline)) void L(rest_##name)(int n_out, const fp_rows *r, const uint8_t *rows, int n_rows, int i, const float *scale, \
                                                                const float (*w)[FP_TILE], float *acc, int64_t acc_ld) \
    { \
        for (; i < r->cols; i += LANES) L(accumulate_cols)(kind, scaled, 4, n_out, 1, r, rows, n_rows, i, scale, w, acc, acc_ld); \
    }
REST(2, false, 2) REST(3, false, 3) REST(4, false, 4) REST(4, true, 4s) REST(FP_E4M3, false, e4m3) REST(FP_E4M3, true, e4m3s) REST(FP_E5M2, false, e5m2) REST(FP_E5M2, true, e5m2s)
#undef REST

INLINE void L(rest)(int kind, bool scaled, int n_out, const fp_rows *r, const uint8_t *rows, int n_rows, int i, const float *scale, const float (*w)[FP_TILE], float *acc, int64_t acc_ld)
{
    (kind == 2 ? L(rest_2) : kind == 3 ? L(rest_3) : kind == 4 ? scaled ? L(rest_4s) : L(rest_4) : kind == FP_E4M3 ? scaled ? L(rest_e4m3s) : L(rest_e4m3) : scaled ? L(rest_e5m2s) : L(rest_e5m2))
        (n_out, r, rows, n_rows, i, scale, w, acc, acc_ld);
}

INLINE void L(accumulate_rows)(int kind, bool scaled, int n_q, int n_out, const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor,
                               const float *p, int64_t p_ld, float *acc, int64_t acc_ld)
{
    /* As many accumulators as leave registers for the row's codes, its scale and the table. */
    const int width = LANES == 16 ? 4 : n_q == 1 ? 4 : 2;
    for (int t = 0; t < n_rows; t += FP_TILE) {
        const int n = kv_min(FP_TILE, n_rows - t);
        float w[4][FP_TILE];
        for (int g = 0; g < n_out; g++)
            for (int j = 0; j < n; j++) w[g][j] = p[g * p_ld + t + j] * (kind == FP_E4M3 ? factor[t + j] * 256 : factor[t + j]);
        const float *s = scale ? scale + t * r->n_groups : NULL;
        int i = 0;
        for (; i + width * LANES <= r->cols; i += width * LANES)
            L(accumulate_cols)(kind, scaled, n_q, n_out, width, r, rows + (size_t)t * r->row_bytes, n, i, s, (const float (*)[FP_TILE])w, acc, acc_ld);
        if (i < r->cols) L(rest)(kind, scaled, n_out, r, rows + (size_t)t * r->row_bytes, n, i, s, (const float (*)[FP_TILE])w, acc, acc_ld);
    }
}
#undef AT

#define BY_COUNT(fn, kind, scaled, n, ...) switch (n) { \
    case 1: L(fn)(kind, scaled, 1, 1, __VA_ARGS__); break; case 2: case 3: L(fn)(kind, scaled, 3, n, __VA_ARGS__); break; \
    default: L(fn)(kind, scaled, 4, 4, __VA_ARGS__); }
#define BY_SCALE(fn, kind, n, ...) if (scale) { BY_COUNT(fn, kind, true, n, __VA_ARGS__) } else { BY_COUNT(fn, kind, false, n, __VA_ARGS__) }
/* Indices of 2 and 3 bits have no scales (nuq). */
#define BY_KIND(fn, n, ...) switch (r->kind) { \
    case 2: BY_COUNT(fn, 2, false, n, __VA_ARGS__) break; case 3: BY_COUNT(fn, 3, false, n, __VA_ARGS__) break; \
    case 4: BY_SCALE(fn, 4, n, __VA_ARGS__) break; case FP_E4M3: BY_SCALE(fn, FP_E4M3, n, __VA_ARGS__) break; \
    default: BY_SCALE(fn, FP_E5M2, n, __VA_ARGS__) }

TARGET static void L(rows_decode)(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, float *x, int64_t ld)
{
    switch (r->kind) {
    case 2: L(decode_rows)(2, r, rows, n_rows, scale, x, ld); break;
    case 3: L(decode_rows)(3, r, rows, n_rows, scale, x, ld); break;
    case 4: L(decode_rows)(4, r, rows, n_rows, scale, x, ld); break;
    case FP_E4M3: L(decode_rows)(FP_E4M3, r, rows, n_rows, scale, x, ld); break;
    default: L(decode_rows)(FP_E5M2, r, rows, n_rows, scale, x, ld);
    }
}

TARGET static void L(rows_dot)(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor, const float *q, int64_t q_ld, int n_q, float *y, int64_t y_ld)
{
    for (int n; n_q > 0; n_q -= n, q += n * q_ld, y += n * y_ld) {
        n = kv_min(n_q, 4);
        BY_KIND(dot_rows, n, r, rows, n_rows, scale, factor, q, q_ld, y, y_ld)
    }
}

TARGET static void L(rows_accumulate)(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor, const float *p, int64_t p_ld, int n_q, float *acc, int64_t acc_ld)
{
    for (int n; n_q > 0; n_q -= n, p += n * p_ld, acc += n * acc_ld) {
        n = kv_min(n_q, 4);
        BY_KIND(accumulate_rows, n, r, rows, n_rows, scale, factor, p, p_ld, acc, acc_ld)
    }
}
#undef BY_COUNT
#undef BY_SCALE
#undef BY_KIND
#undef INLINE
