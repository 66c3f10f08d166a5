/* scalar_avx512.c -- the `scalar` codec with AVX-512 and VNNI.
 *
 * One kernel serves keys and values: 16 lanes times a broadcast pair of 16-bit weights, summed by vpdpwssd.  A register of 16
 * words, shifted right by 16-bit lanes, is its own index: vpermw reads the low 5 bits (vpermi2w 6) and the tables repeat, so
 * a code costs one shift and one lookup for 32 elements and no mask.  Word 0 of a lane then holds byte 0 (or 1) of it, word 1
 * byte 2 (or 3): weights come in that order ("pairs" of scalar.h).
 *
 * Up to 4 bits two tiles run together, with the two pairs of a slot summed apart: vpdpwssd takes 5 cycles, and one chain per
 * query would wait for itself (a last tile alone runs twice).  Wider codes wait for their lookups anyway: more than one
 * query is four there, the last one again in place of those that are missing, which saves a third of the compiler's time. */
#include <immintrin.h>
#include <math.h>
#include "scalar.h"
#include "scalar_x86.h"

#define INLINE KV_AVX512 static inline __attribute__((always_inline))

/* ---- the kernel */

INLINE __m512i load(const uint8_t *at) { return _mm512_loadu_si512(at); }

/* Codes of a slot's pair in the low bits of 16-bit lanes; above them is junk.  at: the chunk. */
INLINE __m512i pair_of_plane(const int bits, const uint8_t *at, const int slot, const int odd)
{
    if (bits != 3) return _mm512_srli_epi16(load(at), (unsigned)(bits * slot + 8 * odd));
    if (slot < 6) return _mm512_srli_epi16(load(at + 64 * (slot / 2)), (unsigned)(3 * (slot % 2) + 8 * odd));
    const __m512i low = _mm512_srli_epi16(load(at + (slot == 6 ? 0 : 128)), (unsigned)(6 + 8 * odd));
    const __m512i high = _mm512_srli_epi16(load(at + 64), (unsigned)((slot == 6 ? 4 : 5) + 8 * odd));
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), low, high, 0xCA);       /* 0xCA: first ? second : third */
}

INLINE __m512i pair_at(const int bits, const uint8_t *lo, const uint8_t *hi, const int quad, const int odd)
{
    if (bits <= 4) return pair_of_plane(bits, lo, quad, odd);
    const __m512i low = pair_of_plane(4, lo + 64 * (quad / 2), quad % 2, odd), high = pair_of_plane(bits - 4, hi, quad, odd);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, _mm512_slli_epi16(high, 4), 0xCA);
}

typedef struct table { __m512i t[8]; } table;

INLINE table load_table(const int bits, const scalar_state *s)
{
    table r;
    for (int i = 0; i < 8; i++) r.t[i] = i == 0 || i < 1 << (bits - 5 > 0 ? bits - 5 : 0) ? _mm512_load_si512(s->fixed + 32 * i) : _mm512_setzero_si512();
    return r;
}

INLINE __m512i lookup(const int bits, const table *t, __m512i i)
{
    if (bits <= 5) return _mm512_permutexvar_epi16(i, t->t[0]);
    const __m512i a = _mm512_permutex2var_epi16(t->t[0], i, t->t[1]);
    if (bits == 6) return a;
    const __mmask32 bit6 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(0x40));
    const __m512i b = _mm512_mask_blend_epi16(bit6, a, _mm512_permutex2var_epi16(t->t[2], i, t->t[3]));
    if (bits == 7) return b;
    const __m512i c = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(t->t[4], i, t->t[5]), _mm512_permutex2var_epi16(t->t[6], i, t->t[7]));
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(i, _mm512_set1_epi16(0x80)), b, c);
}

/* Where two tiles' planes are; the second tile follows at `next` bytes, 0: it is the first again. */
typedef struct tiles { const uint8_t *lo, *hi; size_t lo_next, hi_next; } tiles;
typedef struct sums { __m512i s[2][SCALAR_QUERIES][2]; } sums;     /* [tile][query][odd pair] */

/* w[query_at[q] + pair] */
INLINE void add_pair(const int bits, const int g, const int two, const int quad, const int odd, const tiles *at, const table *t, const int32_t *w, const size_t *query_at, sums *s)
{
    const __m512i a = lookup(bits, t, pair_at(bits, at->lo, at->hi, quad, odd));
    const __m512i b = two ? lookup(bits, t, pair_at(bits, at->lo + at->lo_next, at->hi + at->hi_next, quad, odd)) : a;
#define QUERY(q) if (g > q) { \
        const __m512i x = _mm512_set1_epi32(w[query_at[q] + (size_t)(2 * quad + odd)]); \
        s->s[0][q][odd] = _mm512_dpwssd_epi32(s->s[0][q][odd], a, x); \
        if (two) s->s[1][q][odd] = _mm512_dpwssd_epi32(s->s[1][q][odd], b, x); \
    }
    QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
}

INLINE void add_units(const int bits, const int g, const int two, tiles at, int n_units, const table *t, const int32_t *w, const size_t *query_at, sums *s)
{
    const int quads = UNIT_QUADS(bits);
    for (int i = 0; i < 2; i++)
        for (int q = 0; q < SCALAR_QUERIES; q++) s->s[i][q][0] = s->s[i][q][1] = _mm512_setzero_si512();
    for (int u = 0; u < n_units; u++, w += 2 * quads) {
#define QUAD(k) if (k < quads) { add_pair(bits, g, two, k, 0, &at, t, w, query_at, s); add_pair(bits, g, two, k, 1, &at, t, w, query_at, s); }
        QUAD(0) QUAD(1) QUAD(2) QUAD(3) QUAD(4) QUAD(5) QUAD(6) QUAD(7)
#undef QUAD
        at.lo += bits <= 4 ? CHUNK_BYTES(bits) : 32 * quads;
        if (bits > 4) at.hi += CHUNK_BYTES(bits - 4);
    }
}

INLINE tiles tiles_at(const scalar_state *s, const uint8_t *page, int tile, int inner, int two)
{
    const scalar_plane *lo = &s->plane[0], *hi = &s->plane[s->n_planes - 1];
    const size_t lo_bytes = scalar_plane_tile(lo), hi_bytes = scalar_plane_tile(hi);
    return (tiles){ page + lo->offset + (size_t)tile * lo_bytes + (size_t)(inner / lo->chunk * lo->rows) * 64,
                    page + hi->offset + (size_t)tile * hi_bytes + (size_t)(inner / hi->chunk * hi->rows) * 64, two ? lo_bytes : 0, two ? hi_bytes : 0 };
}

INLINE __mmask16 first(int n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* ---- keys */

INLINE void dot_block(const int bits, const int g, const int n_q, const kv_codec *c, const uint8_t *page, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld)
{
    const scalar_state *st = scalar_state_of(c);
    scalar_fetch(st, page);
    const table t = load_table(bits, st);
    const int32_t *w = (const int32_t *)scalar_query_pairs((void *)prepared, scalar_padded(c));
    size_t query_at[SCALAR_QUERIES];
    for (int q = 0; q < SCALAR_QUERIES; q++) query_at[q] = (size_t)kv_min(q, n_q - 1) * (c->query_bytes / 4);
    const int n_units = (c->head_dim + 4 * UNIT_QUADS(bits) - 1) / (4 * UNIT_QUADS(bits));
    for (int tok = 0; tok < n_tokens;) {
        const int two = bits <= 4 && n_tokens - tok > SCALAR_LANES;
        sums s;
        add_units(bits, g, bits <= 4, tiles_at(st, page, tok / SCALAR_LANES, 0, two), n_units, &t, w, query_at, &s);
        for (int i = 0; i <= two; i++, tok += SCALAR_LANES) {
            const __mmask16 m = first(n_tokens - tok);
            const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, page + st->scales + 2 * (size_t)tok));
#define QUERY(q) if (g > q && n_q > q) { \
                const float unit = st->unit * *(const float *)(prepared + q * c->query_bytes); \
                const __m512 f = _mm512_cvtepi32_ps(i ? _mm512_add_epi32(s.s[1][q][0], s.s[1][q][1]) : _mm512_add_epi32(s.s[0][q][0], s.s[0][q][1])); \
                _mm512_mask_storeu_ps(scores + q * ld + tok, m, _mm512_mul_ps(_mm512_mul_ps(f, scale), _mm512_set1_ps(unit))); \
            }
            QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
        }
    }
}

/* ---- values */

INLINE __m128 fold_max(__m512 v)
{
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

INLINE __m128 fold_add(__m512 v)
{
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

/* Fixed-point weights of up to 64 tokens, in pair order, and what one of them is worth: 0 when nothing weighs.  Maxima and
 * sums of the queries are folded together: one by one they cost half as much as the page's codes. */
INLINE void weigh(const int g, const int n_q, const float *p, int64_t ld, int n, const __m512 scale[4], int32_t (*w)[SCALAR_SEGMENT / 2], float *unit)
{
    __m512 v[SCALAR_QUERIES][4];
    __m128 tops[SCALAR_QUERIES], totals[SCALAR_QUERIES];
#define QUERY(q) if (g > q) { \
        for (int i = 0; i < 4; i++) v[q][i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(first(n - 16 * i), p + kv_min(q, n_q - 1) * ld + 16 * i), scale[i]); \
        tops[q] = fold_max(_mm512_max_ps(_mm512_max_ps(v[q][0], v[q][1]), _mm512_max_ps(v[q][2], v[q][3]))); \
        totals[q] = fold_add(_mm512_add_ps(_mm512_add_ps(v[q][0], v[q][1]), _mm512_add_ps(v[q][2], v[q][3]))); \
    } else { \
        tops[q] = totals[q] = _mm_setzero_ps(); \
    }
    QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
    const scalar_units u = scalar_units_of(tops, totals);
    _mm_storeu_ps(unit, u.unit);
    float per[SCALAR_QUERIES];
    _mm_storeu_ps(per, u.per);
    for (int q = 0; q < g; q++)
        for (int i = 0; i < 4; i++) {
            const __m512i k = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_permute_ps(v[q][i], 0xD8), _mm512_set1_ps(per[q])));
            _mm256_store_si256((__m256i *)(w[q] + 8 * i), _mm512_cvtsepi32_epi16(k));
        }
}

INLINE void accumulate_block(const int bits, const int g, const int n_q, const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, float *acc)
{
    const scalar_state *st = scalar_state_of(c);
    scalar_fetch(st, page);
    const table t = load_table(bits, st);
    static const size_t query_at[SCALAR_QUERIES] = { 0, SCALAR_SEGMENT / 2, 2 * SCALAR_SEGMENT / 2, 3 * SCALAR_SEGMENT / 2 };
    for (int tok = 0; tok < n_tokens; tok += SCALAR_SEGMENT) {
        const int n = n_tokens - tok < SCALAR_SEGMENT ? n_tokens - tok : SCALAR_SEGMENT;
        const int n_units = (n + 4 * UNIT_QUADS(bits) - 1) / (4 * UNIT_QUADS(bits));
        _Alignas(64) int32_t w[SCALAR_QUERIES][SCALAR_SEGMENT / 2];
        float unit[SCALAR_QUERIES];
        __m512 scale[4];
        for (int i = 0; i < 4; i++) scale[i] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n - 16 * i), page + st->scales + 2 * (size_t)(tok + 16 * i)));
        weigh(g, n_q, p + tok, ld, n, scale, w, unit);
        scalar_settle(w);
        for (int tile = 0; tile < st->n_tiles;) {
            const int two = bits <= 4 && st->n_tiles - tile > 1;
            sums s;
            add_units(bits, g, bits <= 4, tiles_at(st, page, tile, tok, two), n_units, &t, w[0], query_at, &s);
            for (int i = 0; i <= two; i++, tile++) {
#define QUERY(q) if (g > q && n_q > q) { \
                    float *to = acc + q * c->space_dim + tile * SCALAR_LANES; \
                    const __m512 f = _mm512_cvtepi32_ps(i ? _mm512_add_epi32(s.s[1][q][0], s.s[1][q][1]) : _mm512_add_epi32(s.s[0][q][0], s.s[0][q][1])); \
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(f, _mm512_set1_ps(st->unit * unit[q]), _mm512_loadu_ps(to))); \
                }
                QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
            }
        }
    }
}

/* ---- one function per code width and number of queries */

SCALAR_DEFINE_ALL(KV_AVX512)

/* ---- encoding: the bits of plain C */

KV_AVX512 static void scale_row(const float *x, const float *sign, float by, float *out, int n)
{
    const __m512 k = _mm512_set1_ps(by);
    for (int i = 0; i < n; i += 16) {
        const __mmask16 m = first(n - i);
        const __m512 f = sign ? _mm512_mul_ps(_mm512_maskz_loadu_ps(m, sign + i), k) : k;
        _mm512_mask_storeu_ps(out + i, m, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), f));
    }
}

KV_AVX512 static void dense(const float *mat, const float *x, float *out, int n)
{
    for (int i = 0; i < n; i += 16) {
        const __mmask16 m = first(n - i);
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < n; j++) sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_set1_ps(x[j]), _mm512_maskz_loadu_ps(m, mat + (size_t)j * (size_t)n + i)));
        _mm512_mask_storeu_ps(out + i, m, sum);
    }
}

KV_AVX512 static void index_row(const scalar_state *s, const float *y, uint8_t *code, int n)
{
    const __m512 low = _mm512_load_ps(s->bound);
    for (int i = 0; i < n; i += 16) {
        const __mmask16 m = first(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(m, y + i);
        __m512i at = _mm512_setzero_si512();
        for (int step = s->levels / 2; step; step /= 2) {
            const __m512i probe = _mm512_add_epi32(at, _mm512_set1_epi32(step - 1));
            const __m512 b = s->levels <= 16 ? _mm512_permutexvar_ps(probe, low) : _mm512_i32gather_ps(probe, s->bound, 4);
            at = _mm512_mask_add_epi32(at, _mm512_cmp_ps_mask(v, b, _CMP_GT_OQ), at, _mm512_set1_epi32(step));
        }
        _mm_storeu_si128((__m128i *)(code + i), _mm512_maskz_cvtepi32_epi8(m, at));
    }
}

KV_AVX512 static void put_value(const scalar_state *s, uint8_t *page, int token, const uint8_t *code)
{
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *p = &s->plane[k];
        const scalar_field *field = scalar_fields[p->bits - 1][token % p->chunk / 4];
        for (int f = 0; f < 2 && field[f].width; f++) {
            const __m128i shift = _mm_cvtsi32_si128(field[f].shift + token % 4 * 8), from = _mm_cvtsi32_si128(field[f].from + 4 * k);
            const __m512i mask = _mm512_sll_epi32(_mm512_set1_epi32((1 << field[f].width) - 1), shift);
            uint8_t *at = page + p->offset + (size_t)(token / p->chunk * p->rows + field[f].row) * 64;
            for (int tile = 0; tile < s->n_tiles; tile++, at += scalar_plane_tile(p)) {
                const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(code + tile * SCALAR_LANES)));
                const __m512i bits = _mm512_sll_epi32(_mm512_srl_epi32(wide, from), shift);
                _mm512_storeu_si512(at, _mm512_ternarylogic_epi32(mask, bits, load(at), 0xCA));
            }
        }
    }
}

const scalar_level scalar_avx512 = { scale_row, dense, index_row, put_value, scalar_prepare_avx2, dot, accumulate };
