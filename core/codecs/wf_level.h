/* wf_level.h -- transforms and scales of the `wf` codec for one SIMD level; wf_avx2.c and wf_avx512.c include it with L, TARGET
 * and LANES set. */
#include "scalar_x86.h"
#include "wf.h"
#include "../lanes.h"

/* width registers of outputs from i on, for g rows of x at x_ld: sums by multiply and add where exact, else fused. */
INLINE void L(dense_some)(const int width, const int g, const int exact, const float *m, size_t ld, const float *x, int64_t x_ld, int n_in, L(vf) sum[4][4])
{
    for (int q = 0; q < g; q++)
        for (int k = 0; k < width; k++) sum[q][k] = L(zero)();
    for (int j = 0; j < n_in; j++, m += ld) {
        L(vf) row[4];
        for (int k = 0; k < width; k++) row[k] = L(load)(m + k * LANES);
        for (int q = 0; q < g; q++) {
            const L(vf) a = L(set)(x[q * x_ld + j]);
            for (int k = 0; k < width; k++) sum[q][k] = exact ? L(add)(sum[q][k], L(mul)(a, row[k])) : L(fma)(a, row[k], sum[q][k]);
        }
    }
}

TARGET static void L(dense)(const float *m, size_t ld, const float *x, float *out, int n_in, int n_out)
{
    L(vf) sum[4][4];
    int i = 0;
    for (; i + 4 * LANES <= n_out; i += 4 * LANES) {
        L(dense_some)(4, 1, 1, m + i, ld, x, 0, n_in, sum);
        for (int k = 0; k < 4; k++) L(store)(out + i + k * LANES, sum[0][k]);
    }
    for (; i < n_out; i += LANES) {
        L(dense_some)(1, 1, 1, m + i, ld, x, 0, n_in, sum);
        L(store)(out + i, sum[0][0]);
    }
}

/* g queries share the matrix: 12 or 16 sums with AVX-512's 32 registers, 8 with AVX2's 16. */
INLINE void L(query_some)(const int g, const kv_codec *c, const float *q, int64_t ld, uint8_t *prepared)
{
    const wf_state *s = wf_state_of(c);
    const int width = LANES == 16 && s->padded % 64 == 0 ? 4 : 2;
    for (int i = 0; i < s->padded; i += width * LANES) {
        L(vf) sum[4][4];
        if (width == 4) L(dense_some)(4, g, 0, s->synthesis + i, (size_t)s->padded, q, ld, c->head_dim, sum);
        else L(dense_some)(2, g, 0, s->synthesis + i, (size_t)s->padded, q, ld, c->head_dim, sum);
        for (int k = 0; k < g; k++)
            for (int r = 0; r < width; r++)
                L(store)(scalar_query_f32(prepared + (size_t)k * c->query_bytes) + i + r * LANES, L(mul)(sum[k][r], L(load)(s->unit + i + r * LANES)));
    }
    for (int k = 0; k < g; k++) scalar_prepare_avx2(prepared + (size_t)k * c->query_bytes, s->padded);
}

TARGET static void L(query)(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    for (int n; n_q > 0; n_q -= n, q += n * ld, prepared = (uint8_t *)prepared + (size_t)n * c->query_bytes) {
        n = kv_min(n_q, SCALAR_QUERIES);
        switch (n) {
        case 1:  L(query_some)(1, c, q, ld, prepared); break;
        case 2:  L(query_some)(2, c, q, ld, prepared); break;
        case 3:  L(query_some)(3, c, q, ld, prepared); break;
        default: L(query_some)(4, c, q, ld, prepared);
        }
    }
}

INLINE void L(fetch)(const wf_state *s, const uint8_t *page)
{
    for (size_t at = 0; at < s->scales + 64 && at < 4096; at += 64) __builtin_prefetch(page + at);   /* see scalar_fetch */
}

/* Keys: dot_block of the level, by number of queries. */
INLINE void L(dot_block)(const int g, const kv_codec *c, const uint8_t *page, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld);

TARGET static void L(dot)(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    L(fetch)(wf_state_of(c), page);
    for (int q = 0; q < n_q; q += SCALAR_QUERIES) {
        const uint8_t *from = (const uint8_t *)prepared + (size_t)q * c->query_bytes;
        switch (kv_min(n_q - q, SCALAR_QUERIES)) {
        case 1:  L(dot_block)(1, c, page, n_tokens, from, scores + q * ld, ld); break;
        case 2:  L(dot_block)(2, c, page, n_tokens, from, scores + q * ld, ld); break;
        case 3:  L(dot_block)(3, c, page, n_tokens, from, scores + q * ld, ld); break;
        default: L(dot_block)(4, c, page, n_tokens, from, scores + q * ld, ld);
        }
    }
}

/* Values, in f32: 16 components' codes of a token look up centroids. */
INLINE L(vf) L(centroids)(const wf_codebook *b, const uint8_t *at, const wf_slot f, const int byte);

INLINE void L(accumulate_some)(const int g, const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, float *acc)
{
    const wf_state *s = wf_state_of(c);
    float w[SCALAR_QUERIES][SCALAR_SEGMENT], scale[SCALAR_SEGMENT];
    for (int tok = 0; tok < n_tokens; tok += SCALAR_SEGMENT) {
        const int n = kv_min(n_tokens - tok, SCALAR_SEGMENT);
        wf_load_scales(s, page, tok, n, scale);
        for (int q = 0; q < g; q++)
            for (int t = 0; t < n; t++) w[q][t] = p[q * ld + tok + t] * scale[t];
        for (int i = 0; i < s->n; i += LANES) {
            const int width = s->width[i / SCALAR_LANES];
            const wf_codebook *b = &s->tables->book[width];
            const uint8_t *tile = page + s->tile[i / SCALAR_LANES] + 4 * (i % SCALAR_LANES);
            L(vf) sum[SCALAR_QUERIES];
            for (int q = 0; q < g; q++) sum[q] = L(load)(acc + q * c->space_dim + i);
            for (int t = 0; t < n; t++) {
                const int bit = (tok + t) / 4 * width;
                const wf_slot f = { .offset = (uint32_t)(bit / 8) * 64, .shift = (uint8_t)(bit % 8), .width = (uint8_t)width, .low = (uint8_t)kv_min(width, 8 - bit % 8) };
                const L(vf) v = L(centroids)(b, tile, f, t % 4 * 8);
                for (int q = 0; q < g; q++) sum[q] = L(fma)(L(set)(w[q][t]), v, sum[q]);
            }
            for (int q = 0; q < g; q++) L(store)(acc + q * c->space_dim + i, sum[q]);
        }
    }
}

TARGET static void L(accumulate)(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    L(fetch)(wf_state_of(c), page);
    for (int q = 0; q < n_q; q += SCALAR_QUERIES) {
        float *to = acc + (size_t)q * (size_t)c->space_dim;
        switch (kv_min(n_q - q, SCALAR_QUERIES)) {
        case 1:  L(accumulate_some)(1, c, page, n_tokens, p + q * ld, ld, to); break;
        case 2:  L(accumulate_some)(2, c, page, n_tokens, p + q * ld, ld, to); break;
        case 3:  L(accumulate_some)(3, c, page, n_tokens, p + q * ld, ld, to); break;
        default: L(accumulate_some)(4, c, page, n_tokens, p + q * ld, ld, to);
        }
    }
}
