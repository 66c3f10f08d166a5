/* int_fixed.h -- int.c's two products in 16-bit fixed point, for codes of 2, 4 or 8 bits in whole blocks; int.c includes it once per
 * level, after int_level.h.
 *
 * Products are of 16-bit pairs, summed in 32-bit lanes: 16 codes a multiplication where f32 takes 4.  A lane is a row in the dot
 * product (rows' dwords are transposed, so that sums along a row stay in their lane) and a column in the accumulation (two
 * neighbouring rows make a pair).  Weights of a group or of a segment of 64 rows have as many bits as fit: at most 255 * 32767
 * * 64 in a sum.  The zero point is an integer taken off the sum, scales and minima are f32. */

#if LANES == 16
typedef __m512i L(vi);
INLINE L(vi) L(iset)(int32_t x)                    { return _mm512_set1_epi32(x); }
INLINE L(vi) L(dp)(L(vi) sum, L(vi) a, L(vi) b)    { return _mm512_dpwssd_epi32(sum, a, b); }
INLINE L(vi) L(iand)(L(vi) a, L(vi) b)             { return _mm512_and_si512(a, b); }
INLINE L(vi) L(iadd)(L(vi) a, L(vi) b)             { return _mm512_add_epi32(a, b); }
INLINE L(vi) L(srl)(L(vi) a, int n)                { return _mm512_srli_epi32(a, (unsigned)n); }
INLINE L(vi) L(pair)(L(vi) a, L(vi) b)             { return _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16)); }
INLINE L(vi) L(widen8)(bool s8, const uint8_t *p)  { const __m128i b = _mm_loadu_si128((const void *)p); return s8 ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b); }
INLINE L(vf) L(float_of)(L(vi) a)                  { return _mm512_cvtepi32_ps(a); }
INLINE L(vi) L(even_s8)(L(vi) a)                   { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
INLINE L(vi) L(odd_s8)(L(vi) a)                    { return _mm512_srai_epi16(a, 8); }
INLINE L(vf) L(abs)(L(vf) a)                       { return _mm512_abs_ps(a); }
INLINE L(vf) L(max)(L(vf) a, L(vf) b)              { return _mm512_max_ps(a, b); }
INLINE float L(most)(L(vf) a)                      { return _mm512_reduce_max_ps(a); }
INLINE void  L(store16)(int16_t *p, L(vf) a)       { _mm256_storeu_si256((void *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a))); }
INLINE L(vi) L(rows4)(const uint8_t *r0, const uint8_t *r1, const uint8_t *r2, const uint8_t *r3)
{
    const __m512i a = _mm512_inserti32x4(_mm512_castsi128_si512(_mm_loadu_si128((const void *)r0)), _mm_loadu_si128((const void *)r1), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(a, _mm_loadu_si128((const void *)r2), 2), _mm_loadu_si128((const void *)r3), 3);
}
#define UNPACK(side, width, a, b) _mm512_unpack##side##_epi##width(a, b)
#else
typedef __m256i L(vi);
INLINE L(vi) L(iset)(int32_t x)                    { return _mm256_set1_epi32(x); }
INLINE L(vi) L(dp)(L(vi) sum, L(vi) a, L(vi) b)    { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
INLINE L(vi) L(iand)(L(vi) a, L(vi) b)             { return _mm256_and_si256(a, b); }
INLINE L(vi) L(iadd)(L(vi) a, L(vi) b)             { return _mm256_add_epi32(a, b); }
INLINE L(vi) L(srl)(L(vi) a, int n)                { return _mm256_srli_epi32(a, n); }
INLINE L(vi) L(pair)(L(vi) a, L(vi) b)             { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA); }
INLINE L(vi) L(widen8)(bool s8, const uint8_t *p)  { const __m128i b = _mm_loadl_epi64((const void *)p); return s8 ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b); }
INLINE L(vf) L(float_of)(L(vi) a)                  { return _mm256_cvtepi32_ps(a); }
INLINE L(vi) L(even_s8)(L(vi) a)                   { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
INLINE L(vi) L(odd_s8)(L(vi) a)                    { return _mm256_srai_epi16(a, 8); }
INLINE L(vf) L(abs)(L(vf) a)                       { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE L(vf) L(max)(L(vf) a, L(vf) b)              { return _mm256_max_ps(a, b); }
INLINE float L(most)(L(vf) a)                      { return hmax8(a); }
INLINE void  L(store16)(int16_t *p, L(vf) a)
{
    const __m256i v = _mm256_cvtps_epi32(a);
    _mm_storeu_si128((void *)p, _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
INLINE L(vi) L(rows2)(const uint8_t *r0, const uint8_t *r1)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)r0)), _mm_loadu_si128((const void *)r1), 1);
}
#define UNPACK(side, width, a, b) _mm256_unpack##side##_epi##width(a, b)
#endif

/* f16 scales and minima of n rows (at most FIXED_ROWS) by group, zeros after them up to a multiple of 32. */
TARGET static __attribute__((noinline)) void L(load_scales)(const int_state *s, const uint8_t *rows, int n, float (*d)[FIXED_ROWS], float (*m)[FIXED_ROWS])
{
    const int n32 = (n + 31) / 32 * 32;
    for (int k = 0; k * s->group < s->cols; k++) {
        uint32_t both[FIXED_ROWS];                                       /* m in the upper half where there is one; else junk */
        uint16_t half[2][FIXED_ROWS];
        const uint8_t *at = rows + (size_t)k * s->group_bytes;
        for (int r = 0; r < n; r++, at += s->row_bytes) both[r] = kv_load_u32(at);
        memset(both + n, 0, (size_t)(n32 - n) * sizeof *both);
        for (int r = 0; r < n32; r++) {
            half[0][r] = (uint16_t)both[r];
            half[1][r] = (uint16_t)(both[r] >> 16);
        }
        for (int r = 0; r < n32; r += LANES) {
            L(store)(d[k] + r, L(load_f16)(half[0] + r));
            if (s->has_min) L(store)(m[k] + r, L(load_f16)(half[1] + r));
        }
    }
}

/* ---- dot products: x as fixed_row() made it */

/* Four dwords of LANES rows, from `at` bytes into each on: one dword a register, one row a lane. */
INLINE void L(transposed)(const uint8_t *const row[LANES], size_t at, L(vi) out[4])
{
    L(vi) z[4], t[4];
    for (int j = 0; j < 4; j++) {
#define ROW(i) (row[(i) * 4 + j] + at)
#if LANES == 16
        z[j] = L(rows4)(ROW(0), ROW(1), ROW(2), ROW(3));
#else
        z[j] = L(rows2)(ROW(0), ROW(1));
#endif
#undef ROW
    }
    t[0] = UNPACK(lo, 32, z[0], z[1]);
    t[1] = UNPACK(hi, 32, z[0], z[1]);
    t[2] = UNPACK(lo, 32, z[2], z[3]);
    t[3] = UNPACK(hi, 32, z[2], z[3]);
    out[0] = UNPACK(lo, 64, t[0], t[2]);
    out[1] = UNPACK(hi, 64, t[0], t[2]);
    out[2] = UNPACK(lo, 64, t[1], t[3]);
    out[3] = UNPACK(hi, 64, t[1], t[3]);
}

/* One block: its 16 pairs of codes in fixed_row()'s order times the queries' pairs. */
INLINE void L(dot_block)(const int bits, const bool s8, const int n_q, const uint8_t *const row[LANES], size_t from, const uint8_t *x, size_t x_ld, L(vi) sum[4][2])
{
    const int n_dwords = bits, per = 16 / n_dwords;                      /* pairs a dword */
    for (int j = 0; j < n_dwords; j += 4) {
        L(vi) t[4];
        if (bits == 2) {                                                 /* 8 bytes a row: two dwords, and no read past them */
            uint8_t copy[LANES][16];
            const uint8_t *near[LANES];
            for (int r = 0; r < LANES; r++) near[r] = memcpy(copy[r], row[r] + from, 8);
            L(transposed)(near, 0, t);
        } else L(transposed)(row, from + 4 * (size_t)j, t);
#pragma GCC unroll 4
        for (int i = 0; i < (n_dwords < 4 ? n_dwords : 4); i++)
#pragma GCC unroll 8
            for (int k = 0; k < per; k++) {
                const int shift = k / 2 * bits + k % 2 * 8, at = ((j + i) * per + k) * 4;
                const L(vi) codes = s8 ? k ? L(odd_s8)(t[i]) : L(even_s8)(t[i]) : L(iand)(L(srl)(t[i], shift), L(iset)(((1 << bits) - 1) * 0x10001));
#pragma GCC unroll 4
                for (int q = 0; q < n_q; q++) {
                    int32_t w;
                    memcpy(&w, x + q * x_ld + at, 4);
                    sum[q][k % 2] = L(dp)(sum[q][k % 2], codes, L(iset)(w));
                }
            }
    }
}

INLINE void L(fixed_dot_of)(const int bits, const bool s8, const int n_q, const int_state *s, const uint8_t *rows, int n_rows, const uint8_t *x, size_t x_ld, float *y, int64_t y_ld)
{
    const fixed_layout f = fixed_layout_of(s->cols, s->group);
    float d[MAX_GROUPS][FIXED_ROWS], m[MAX_GROUPS][FIXED_ROWS];
    for (int r = 0; r < n_rows; r += LANES, rows += LANES * s->row_bytes) {
        const int n = kv_min(LANES, n_rows - r);
        const uint8_t *row[LANES];                                       /* past the end the last one again */
        for (int i = 0; i < LANES; i++) row[i] = rows + (size_t)kv_min(i, n - 1) * s->row_bytes;
        if (r % FIXED_ROWS == 0) L(load_scales)(s, rows, kv_min(FIXED_ROWS, n_rows - r), d, m);
        L(vf) total[4] = { L(zero)(), L(zero)(), L(zero)(), L(zero)() };
        for (int k = 0, i = 0; i < s->cols; k++) {
            size_t block = (size_t)k * s->group_bytes + (s->has_min ? 4 : 2);
            L(vi) sum[4][2];                                             /* two chains: a product takes 5 cycles */
            for (int q = 0; q < n_q; q++) {
                sum[q][0] = L(iset)(-s->zero * ((const int32_t *)(x + q * x_ld + f.whole))[k]);
                sum[q][1] = L(iset)(0);
            }
            for (const int end = kv_min(i + s->group, s->cols); i < end; i += BLOCK, block += s->block_bytes)
                L(dot_block)(bits, s8, n_q, row, block, x + 2 * i, x_ld, sum);
            const L(vf) dk = L(load)(d[k] + r % FIXED_ROWS);
            for (int q = 0; q < n_q; q++) {
                const L(vf) unit = L(set)(((const float *)(x + q * x_ld + f.unit))[k]);
                total[q] = L(fma)(L(mul)(L(float_of)(L(iadd)(sum[q][0], sum[q][1])), unit), dk, total[q]);
                if (s->has_min) total[q] = L(fma)(L(load)(m[k] + r % FIXED_ROWS), L(set)(((const float *)(x + q * x_ld + f.sum))[k]), total[q]);
            }
        }
        for (int q = 0; q < n_q; q++) {
            if (n == LANES) L(store)(y + q * y_ld + r, total[q]);
            else L(store_part)(y + q * y_ld + r, total[q], n);
        }
    }
}

/* ---- accumulation */

/* Pairs of codes of two rows, in two registers of columns: col[0] on, and col[1] on.  AVX2 takes a block's 32 columns in two units. */
INLINE void L(two)(const int bits, const bool s8, const uint8_t *a, const uint8_t *b, const int unit, L(vi) out[2])
{
    const L(vi) mask = L(iset)(((1 << bits) - 1) * 0x10001);
    if (bits == 8) {
        for (int j = 0; j < 2; j++) out[j] = L(pair)(L(widen8)(s8, a + 2 * LANES * unit + LANES * j), L(widen8)(s8, b + 2 * LANES * unit + LANES * j));
    } else if (bits == 4) {
        const L(vi) x = L(pair)(L(widen8)(false, a + LANES * unit), L(widen8)(false, b + LANES * unit));
        out[0] = L(iand)(x, mask);
        out[1] = L(iand)(L(srl)(x, 4), mask);
    } else {
#if LANES == 16
        const __m512i wa = _mm512_cvtepu8_epi32(_mm_set1_epi64x((int64_t)kv_load_u64(a))), wb = _mm512_cvtepu8_epi32(_mm_set1_epi64x((int64_t)kv_load_u64(b)));
        const L(vi) x = _mm512_srlv_epi32(L(pair)(wa, wb), _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2));
        out[0] = L(iand)(x, mask);
        out[1] = L(iand)(L(srl)(x, 4), mask);
#else
        const L(vi) x = L(pair)(L(widen8)(false, a), L(widen8)(false, b));
        out[0] = L(iand)(L(srl)(x, 4 * unit), mask);
        out[1] = L(iand)(L(srl)(x, 4 * unit + 2), mask);
#endif
    }
}

/* Weights of up to FIXED_ROWS rows times their scales as int16; what one is worth, and their sum.  n is a multiple of 32. */
TARGET static __attribute__((noinline)) void L(weigh)(const float *w, const float *d, int n, int16_t *out, float *unit, int32_t *whole)
{
    float v[FIXED_ROWS];
    int32_t part[LANES];
    L(vf) top = L(zero)();
    for (int r = 0; r < n; r += LANES) {
        const L(vf) x = L(mul)(L(load)(w + r), L(load)(d + r));
        top = L(max)(top, L(abs)(x));
        L(store)(v + r, x);
    }
    const float most = L(most)(top);
    const bool usable = most >= 0x1p-100f && most < 0x1p100f;
    const L(vf) per = L(set)(usable ? 32767 / most : 0);
    *unit = usable ? most / 32767 : most >= 0x1p100f ? NAN : 0;
    for (int r = 0; r < n; r += LANES) L(store16)(out + r, L(mul)(L(load)(v + r), per));
    L(vi) sum = L(iset)(0);
    for (int r = 0; r < n; r += 2 * LANES) {
        L(vi) x;
        memcpy(&x, out + r, sizeof x);
        sum = L(dp)(sum, x, L(iset)(0x10001));
    }
    memcpy(part, &sum, sizeof sum);
    *whole = 0;
    for (int i = 0; i < LANES; i++) *whole += part[i];
}

TARGET static __attribute__((noinline)) float L(sum_of_products)(const float *a, const float *b, int n)
{
    float part[LANES], sum = 0;
    L(vf) v = L(zero)();
    for (int r = 0; r < n; r += LANES) v = L(fma)(L(load)(a + r), L(load)(b + r), v);
    L(store)(part, v);
    for (int i = 0; i < LANES; i++) sum += part[i];
    return sum;
}

INLINE void L(fixed_accumulate_of)(const int bits, const bool s8, const int n_q, const int_state *s, const uint8_t *rows, int n_rows, const float *w, int64_t w_ld, float *y, int64_t y_ld)
{
    float d[MAX_GROUPS][FIXED_ROWS], m[MAX_GROUPS][FIXED_ROWS], weight[4][FIXED_ROWS];
    for (int r0 = 0; r0 < n_rows; r0 += FIXED_ROWS, rows += FIXED_ROWS * s->row_bytes) {
        const int n = kv_min(FIXED_ROWS, n_rows - r0), n32 = (n + 31) / 32 * 32;
        L(load_scales)(s, rows, n, d, m);
        for (int q = 0; q < n_q; q++) {
            memcpy(weight[q], w + q * w_ld + r0, (size_t)n * sizeof(float));
            memset(weight[q] + n, 0, (size_t)(n32 - n) * sizeof(float));
        }
        for (int k = 0, i = 0; i < s->cols; k++) {
            int16_t fixed[4][FIXED_ROWS];
            float unit[4], low[4] = { 0 };
            int32_t whole[4];
            for (int q = 0; q < n_q; q++) {
                L(weigh)(weight[q], d[k], n32, fixed[q], &unit[q], &whole[q]);
                if (s->has_min) low[q] = L(sum_of_products)(weight[q], m[k], n32);
            }
            __asm__ volatile("" : : "r"(fixed) : "memory");              /* or the compiler makes and spills a broadcast of each weight */
            const uint8_t *block = rows + (size_t)k * s->group_bytes + (s->has_min ? 4 : 2);
            for (const int end = kv_min(i + s->group, s->cols); i < end; i += BLOCK, block += s->block_bytes)
                for (int u = 0; u < 16 / LANES; u++) {
                    L(vi) sum[4][2];
                    for (int q = 0; q < n_q; q++) sum[q][0] = sum[q][1] = L(iset)(-s->zero * whole[q]);
                    for (int r = 0; r < n; r += 2) {
                        const uint8_t *a = block + (size_t)r * s->row_bytes;
                        L(vi) codes[2];
                        L(two)(bits, s8, a, r + 1 < n ? a + s->row_bytes : a, u, codes);
#pragma GCC unroll 4
                        for (int q = 0; q < n_q; q++) {
                            int32_t pair;
                            memcpy(&pair, fixed[q] + r, 4);
                            sum[q][0] = L(dp)(sum[q][0], codes[0], L(iset)(pair));
                            sum[q][1] = L(dp)(sum[q][1], codes[1], L(iset)(pair));
                        }
                    }
                    for (int q = 0; q < n_q; q++)
                        for (int j = 0; j < 2; j++) {
                            float *to = y + q * y_ld + i + (LANES == 16 ? 16 * j : bits == 4 ? 8 * u + 16 * j : 16 * u + 8 * j);
                            L(store)(to, L(add)(L(fma)(L(float_of)(sum[q][j]), L(set)(unit[q]), L(load)(to)), L(set)(low[q])));
                        }
                }
        }
    }
}

/* ---- a copy for each kind of code and number of queries: loops over them are gone there */

#define BY_COUNT(fn, bits, s8, ...) switch (n_q) { \
    case 1: L(fn)(bits, s8, 1, __VA_ARGS__); break; case 2: L(fn)(bits, s8, 2, __VA_ARGS__); break; \
    case 3: L(fn)(bits, s8, 3, __VA_ARGS__); break; default: L(fn)(bits, s8, 4, __VA_ARGS__); } break;
#define BY_KIND(fn, ...) switch (s->s8 ? 1 : s->bits) { \
    case 1: BY_COUNT(fn, 8, true, __VA_ARGS__) case 2: BY_COUNT(fn, 2, false, __VA_ARGS__) \
    case 4: BY_COUNT(fn, 4, false, __VA_ARGS__) default: BY_COUNT(fn, 8, false, __VA_ARGS__) }

/* At most 4 queries. */
TARGET static void L(fixed_dot)(const int_state *s, const uint8_t *rows, int n_rows, const uint8_t *x, size_t x_ld, int n_q, float *y, int64_t y_ld)
{
    BY_KIND(fixed_dot_of, s, rows, n_rows, x, x_ld, y, y_ld)
}

TARGET static void L(fixed_accumulate)(const int_state *s, const uint8_t *rows, int n_rows, const float *w, int64_t w_ld, int n_q, float *y, int64_t y_ld)
{
    BY_KIND(fixed_accumulate_of, s, rows, n_rows, w, w_ld, y, y_ld)
}
#undef BY_COUNT
#undef BY_KIND
#undef UNPACK
#undef INLINE
