/* pca_level.h -- pca.c's loops for one SIMD level (levels.h).  Every level gives the bits of the plain C there: the same f32
 * steps in the same order, none fused. */
#include "../lanes.h"

/* y[k] += sum_i x[i] m[i][k], i ascending; ld is a multiple of 16, y has room for ld floats. */
TARGET static void L(times)(const float *x, int n, const float *m, size_t ld, float *y)
{
    size_t k = 0;
    for (; k + 4 * LANES <= ld; k += 4 * LANES) {
        L(vf) sum[4];
        for (int j = 0; j < 4; j++) sum[j] = L(load)(y + k + (size_t)j * LANES);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < 4; j++) sum[j] = L(add)(sum[j], L(mul)(L(set)(x[i]), L(load)(m + (size_t)i * ld + k + (size_t)j * LANES)));
        for (int j = 0; j < 4; j++) L(store)(y + k + (size_t)j * LANES, sum[j]);
    }
    for (; k < ld; k += LANES) {
        L(vf) sum = L(load)(y + k);
        for (int i = 0; i < n; i++) sum = L(add)(sum, L(mul)(L(set)(x[i]), L(load)(m + (size_t)i * ld + k)));
        L(store)(y + k, sum);
    }
}

/* The codes of LANES components from `g` on.  Eight of at most 8 bits lie within 16 bytes. */
INLINE L(vf) L(codes)(const pca_eight *g, const uint8_t *row)
{
#if LANES == 16
    const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(row + g[0].at))), b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(row + g[1].at)));
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1),
                                              _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const void *)g[0].shuffle)), _mm256_load_si256((const void *)g[1].shuffle), 1));
    const __m512i shift = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const void *)g[0].shift)), _mm256_load_si256((const void *)g[1].shift), 1);
    const __m512i mask = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const void *)g[0].mask)), _mm256_load_si256((const void *)g[1].mask), 1);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(bytes, shift), mask));
#else
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(row + g->at))), _mm256_load_si256((const void *)g->shuffle));
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(bytes, _mm256_load_si256((const void *)g->shift)), _mm256_load_si256((const void *)g->mask)));
#endif
}

/* Coefficients of n rows, s->padded floats apart, in each 1 behind the last and then 0.  Reads 16 bytes past a row's codes. */
TARGET static void L(rows)(const pca_state *s, const uint8_t *row, int n, float *z)
{
    const kvtc_plan *p = &s->plan;
    _Alignas(64) float low[MAX_PADDED], step[MAX_PADDED];
    const L(vf) zero = L(zero)();
    if (!p->fixed) for (int k = 0; k < s->padded; k += LANES) {
        L(store)(low + k, zero);
        L(store)(step + k, zero);
    }
    for (int t = 0; t < n; t++, row += p->row_bytes, z += s->padded) {
        if (p->fixed) {
            for (int k = 0; k < s->padded; k += LANES)
                L(store)(z + k, L(mul)(L(add)(L(codes)(s->eight + k / 8, row), L(load)(s->low + k)), L(load)(s->step + k)));
        } else {
            const uint8_t *header = row;
            for (int i = 0; i < p->n_blocks; i++) {
                const kvtc_block b = p->block[i];
                if (b.type == KVTC_NONE) continue;
                const float shift = _cvtsh_ss(kv_load_u16(header)), scale = _cvtsh_ss(kv_load_u16(header + 2));
                header += 4;
                for (int k = b.start; k < b.start + b.size; k++) {
                    low[k] = shift;
                    step[k] = scale;
                }
            }
            for (int k = 0; k < s->padded; k += LANES)
                L(store)(z + k, L(add)(L(load)(low + k), L(mul)(L(codes)(s->eight + k / 8, row), L(load)(step + k))));
        }
        z[p->rank] = 1;
    }
}
#undef INLINE
