/* scalar_avx2.c -- the `scalar` codec with AVX2.
 *
 * A slot's 32 codes (8 lanes, 4 bytes each) are byte-shuffle indices: two shuffles look up the low and high bytes of 16-bit
 * centroids, two unpacks join them.  The first unpack then holds lanes 0-1 of each 128-bit half with all 4 elements, the second
 * lanes 2-3: 64-bit broadcasts of 4 weights, vpmaddwd, and one horizontal add at the very end put 8 lanes in order. */
#include <immintrin.h>
#include "scalar.h"
#include "scalar_x86.h"

#define INLINE KV_AVX2 static inline __attribute__((always_inline))

/* ---- the kernel */

INLINE __m256i load(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* Codes of a slot, one a byte; bits of the low nibble above a code are junk, the high nibble is 0. */
INLINE __m256i slot_of_plane(const int bits, const uint8_t *at, const int slot)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    if (bits != 3) return _mm256_and_si256(_mm256_srli_epi16(load(at), bits * slot), nibble);
    if (slot < 6) return _mm256_and_si256(_mm256_srli_epi16(load(at + 64 * (slot / 2)), 3 * (slot % 2)), nibble);
    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(load(at + (slot == 6 ? 0 : 128)), 6), _mm256_set1_epi8(3));
    return _mm256_or_si256(low, _mm256_and_si256(_mm256_srli_epi16(load(at + 64), slot == 6 ? 4 : 5), _mm256_set1_epi8(4)));
}

/* A byte shuffle reaches 16 centroids, and answers 0 where bit 7 of the index is set.  Beyond 4 bits the codebook's positive half
 * is looked up and the sign put on after: with j the centroid's number there, j + 0x80 - 16 (k + 1) has bit 7 clear for j in
 * tables 0..k, and the xor of what tables k answer is the centroid. */
INLINE void lookup(const int bits, const scalar_state *s, __m256i i, __m256i *a, __m256i *b)
{
    if (bits <= 4) {
        const __m256i lo = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)s->byte_lo[0])), i);
        const __m256i hi = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)s->byte_hi[0])), i);
        *a = _mm256_unpacklo_epi8(lo, hi);
        *b = _mm256_unpackhi_epi8(lo, hi);
        return;
    }
    const int half = 1 << (bits - 1), n = half / 16;
    const __m256i below = _mm256_cmpeq_epi8(_mm256_and_si256(i, _mm256_set1_epi8((char)half)), _mm256_setzero_si256());
    const __m256i j = _mm256_and_si256(_mm256_xor_si256(i, below), _mm256_set1_epi8((char)(half - 1)));
    __m256i lo = _mm256_setzero_si256(), hi = lo;
    for (int k = 0; k < n; k++) {
        const __m256i at = k == n - 1 ? j : _mm256_add_epi8(j, _mm256_set1_epi8((char)(0x80 - 16 * (k + 1))));
        lo = _mm256_xor_si256(lo, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)s->byte_lo[k])), at));
        hi = _mm256_xor_si256(hi, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)s->byte_hi[k])), at));
    }
    const __m256i sign = _mm256_or_si256(below, _mm256_set1_epi8(1));
    *a = _mm256_sign_epi16(_mm256_unpacklo_epi8(lo, hi), _mm256_unpacklo_epi8(sign, sign));
    *b = _mm256_sign_epi16(_mm256_unpackhi_epi8(lo, hi), _mm256_unpackhi_epi8(sign, sign));
}

typedef struct sums { __m256i s[SCALAR_QUERIES][2]; } sums;

/* w[query_at[q] + quad] of 4 int16 */
INLINE void add_quad(const int bits, const int g, const int quad, const uint8_t *lo, const uint8_t *hi, const scalar_state *st, const int64_t *w, const size_t *query_at, sums *s)
{
    __m256i a, b, i;
    if (bits <= 4) i = slot_of_plane(bits, lo, quad);
    else i = _mm256_or_si256(slot_of_plane(4, lo + 64 * (quad / 2), quad % 2), _mm256_slli_epi16(slot_of_plane(bits - 4, hi, quad), 4));
    lookup(bits, st, i, &a, &b);
#define QUERY(q) if (g > q) { \
        const __m256i x = _mm256_set1_epi64x(w[query_at[q] + (size_t)quad]); \
        s->s[q][0] = _mm256_add_epi32(s->s[q][0], _mm256_madd_epi16(a, x)); \
        s->s[q][1] = _mm256_add_epi32(s->s[q][1], _mm256_madd_epi16(b, x)); \
    }
    QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
}

/* 8 lanes: half a tile. */
INLINE void add_units(const int bits, const int g, const uint8_t *lo, const uint8_t *hi, int n_units, const scalar_state *st, const int64_t *w, const size_t *query_at, __m256i out[SCALAR_QUERIES])
{
    const int quads = UNIT_QUADS(bits);
    sums s;
    for (int q = 0; q < SCALAR_QUERIES; q++) s.s[q][0] = s.s[q][1] = _mm256_setzero_si256();
    for (int u = 0; u < n_units; u++, w += quads) {
#define QUAD(k) if (k < quads) add_quad(bits, g, k, lo, hi, st, w, query_at, &s);
        QUAD(0) QUAD(1) QUAD(2) QUAD(3) QUAD(4) QUAD(5) QUAD(6) QUAD(7)
#undef QUAD
        lo += bits <= 4 ? CHUNK_BYTES(bits) : 32 * quads;
        if (bits > 4) hi += CHUNK_BYTES(bits - 4);
    }
#define QUERY(q) if (g > q) out[q] = _mm256_hadd_epi32(s.s[q][0], s.s[q][1]);
    QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
}

INLINE const uint8_t *plane_at(const scalar_plane *p, const uint8_t *page, int lane, int inner)
{
    return page + p->offset + (size_t)(lane / SCALAR_LANES) * scalar_plane_tile(p) + (size_t)(inner / p->chunk * p->rows) * 64 + 4 * (size_t)(lane % SCALAR_LANES);
}

INLINE void store_first(float *to, __m256 v, int n)
{
    if (n >= 8) { _mm256_storeu_ps(to, v); return; }
    float all[8];
    _mm256_storeu_ps(all, v);
    memcpy(to, all, sizeof *to * (size_t)n);
}

/* ---- keys */

INLINE void dot_block(const int bits, const int g, const int n_q, const kv_codec *c, const uint8_t *page, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld)
{
    const scalar_state *st = scalar_state_of(c);
    scalar_fetch(st, page);
    const int64_t *w = (const int64_t *)scalar_query_quads((void *)prepared, scalar_padded(c));
    size_t query_at[SCALAR_QUERIES];
    for (int q = 0; q < SCALAR_QUERIES; q++) query_at[q] = (size_t)kv_min(q, n_q - 1) * (c->query_bytes / 8);
    const int n_units = (c->head_dim + 4 * UNIT_QUADS(bits) - 1) / (4 * UNIT_QUADS(bits));
    for (int tok = 0; tok < n_tokens; tok += 8) {
        __m256i s[SCALAR_QUERIES];
        add_units(bits, g, plane_at(&st->plane[0], page, tok, 0), plane_at(&st->plane[st->n_planes - 1], page, tok, 0), n_units, st, w, query_at, s);
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(page + st->scales + 2 * (size_t)tok)));
#define QUERY(q) if (g > q && n_q > q) { \
            const float unit = st->unit * *(const float *)(prepared + q * c->query_bytes); \
            store_first(scores + q * ld + tok, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s[q]), scale), _mm256_set1_ps(unit)), n_tokens - tok); \
        }
        QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
    }
}

/* ---- values */

INLINE __m128 fold_max(__m256 v) { return _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
INLINE __m128 fold_add(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

INLINE __m256i round_16(__m256 a, __m256 b)
{
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)), 0xD8);
}

/* Fixed-point weights of up to 64 tokens and what one of them is worth: 0 when nothing weighs. */
INLINE void weigh(const int g, const int n_q, const float *p, int64_t ld, int n, const float *scale, int16_t (*w)[SCALAR_SEGMENT], float *unit)
{
    _Alignas(32) float v[SCALAR_QUERIES][SCALAR_SEGMENT], per[SCALAR_QUERIES];
    __m128 tops[SCALAR_QUERIES], totals[SCALAR_QUERIES];
    for (int q = 0; q < SCALAR_QUERIES; q++) {
        __m256 top = _mm256_setzero_ps(), sum = top;
        const float *from = p + kv_min(q, n_q - 1) * ld;
        if (q < g && n < SCALAR_SEGMENT) {
            memset(v[q], 0, sizeof v[q]);
            memcpy(v[q], from, sizeof *from * (size_t)n);
            from = v[q];
        }
        for (int i = 0; q < g && i < SCALAR_SEGMENT; i += 8) {
            const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_load_ps(scale + i));
            top = _mm256_max_ps(top, x);
            sum = _mm256_add_ps(sum, x);
            _mm256_store_ps(v[q] + i, x);
        }
        tops[q] = fold_max(top);
        totals[q] = fold_add(sum);
    }
    const scalar_units u = scalar_units_of(tops, totals);
    _mm_storeu_ps(unit, u.unit);
    _mm_storeu_ps(per, u.per);
    for (int q = 0; q < g; q++)
        for (int i = 0; i < SCALAR_SEGMENT; i += 16) {
            const __m256 k = _mm256_set1_ps(per[q]);
            _mm256_store_si256((__m256i *)(w[q] + i), round_16(_mm256_mul_ps(_mm256_load_ps(v[q] + i), k), _mm256_mul_ps(_mm256_load_ps(v[q] + i + 8), k)));
        }
}

INLINE void accumulate_block(const int bits, const int g, const int n_q, const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, float *acc)
{
    const scalar_state *st = scalar_state_of(c);
    scalar_fetch(st, page);
    static const size_t query_at[SCALAR_QUERIES] = { 0, SCALAR_SEGMENT / 4, 2 * SCALAR_SEGMENT / 4, 3 * SCALAR_SEGMENT / 4 };
    for (int tok = 0; tok < n_tokens; tok += SCALAR_SEGMENT) {
        const int n = n_tokens - tok < SCALAR_SEGMENT ? n_tokens - tok : SCALAR_SEGMENT;
        const int n_units = (n + 4 * UNIT_QUADS(bits) - 1) / (4 * UNIT_QUADS(bits));
        _Alignas(32) int16_t w[SCALAR_QUERIES][SCALAR_SEGMENT];
        _Alignas(32) float scale[SCALAR_SEGMENT];
        uint16_t half[SCALAR_SEGMENT] = { 0 };
        float unit[SCALAR_QUERIES];
        memcpy(half, page + st->scales + 2 * (size_t)tok, 2 * (size_t)n);
        for (int i = 0; i < SCALAR_SEGMENT; i += 8) _mm256_store_ps(scale + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
        weigh(g, n_q, p + tok, ld, n, scale, w, unit);
        scalar_settle(w);
        for (int dim = 0; dim < st->n_tiles * SCALAR_LANES; dim += 8) {
            __m256i s[SCALAR_QUERIES];
            add_units(bits, g, plane_at(&st->plane[0], page, dim, tok), plane_at(&st->plane[st->n_planes - 1], page, dim, tok), n_units, st, (const int64_t *)w[0], query_at, s);
#define QUERY(q) if (g > q && n_q > q) { \
                float *to = acc + q * c->space_dim + dim; \
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[q]), _mm256_set1_ps(st->unit * unit[q]), _mm256_loadu_ps(to))); \
            }
            QUERY(0) QUERY(1) QUERY(2) QUERY(3)
#undef QUERY
        }
    }
}

/* ---- one function per code width and number of queries */

SCALAR_DEFINE_ALL(KV_AVX2)

/* ---- queries */

KV_AVX2 void scalar_prepare_avx2(void *q, int padded)
{
    const float *row = scalar_query_f32(q);
    int16_t *quads = scalar_query_quads(q, padded), *pairs = scalar_query_pairs(q, padded);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 top = _mm256_setzero_ps(), sum = top;
    for (int i = 0; i < padded; i += 8) {
        const __m256 x = _mm256_andnot_ps(sign, _mm256_load_ps(row + i));
        top = _mm256_max_ps(top, x);
        sum = _mm256_add_ps(sum, x);
    }
    const __m128 zero = _mm_setzero_ps(), tops[SCALAR_QUERIES] = { fold_max(top), zero, zero, zero }, totals[SCALAR_QUERIES] = { fold_add(sum), zero, zero, zero };
    const scalar_units u = scalar_units_of(tops, totals);
    const __m256 per = _mm256_broadcastss_ps(u.per);
    for (int i = 0; i < padded; i += 16) {
        const __m256i k = round_16(_mm256_mul_ps(_mm256_load_ps(row + i), per), _mm256_mul_ps(_mm256_load_ps(row + i + 8), per));
        _mm256_store_si256((__m256i *)(quads + i), k);
        _mm256_store_si256((__m256i *)(pairs + i), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(k, 0xD8), 0xD8));
    }
    _mm_store_ss(q, u.unit);
}

/* ---- encoding: the bits of plain C */

KV_AVX2 static void scale_row(const float *x, const float *sign, float by, float *out, int n)
{
    const __m256 k = _mm256_set1_ps(by);
    int i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), sign ? _mm256_mul_ps(_mm256_loadu_ps(sign + i), k) : k));
    scalar_c.scale_row(x + i, sign ? sign + i : NULL, by, out + i, n - i);
}

KV_AVX2 static void dense(const float *m, const float *x, float *out, int n)
{
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int j = 0; j < n; j++) sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(x[j]), _mm256_loadu_ps(m + (size_t)j * (size_t)n + i)));
        _mm256_storeu_ps(out + i, sum);
    }
    for (; i < n; i++) {
        out[i] = 0;
        for (int j = 0; j < n; j++) out[i] += x[j] * m[(size_t)j * (size_t)n + (size_t)i];
    }
}

KV_AVX2 static void index_row(const scalar_state *s, const float *y, uint8_t *code, int n)
{
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_loadu_ps(y + i);
        __m256i at = _mm256_setzero_si256();
        if (s->bits <= 4) {                   /* counting 15 boundaries costs less than 4 gathers */
            for (int k = 0; k < s->levels - 1; k++) at = _mm256_sub_epi32(at, _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_set1_ps(s->bound[k]), _CMP_GT_OQ)));
        } else {
            for (int step = s->levels / 2; step; step /= 2) {
                const __m256 b = _mm256_i32gather_ps(s->bound, _mm256_add_epi32(at, _mm256_set1_epi32(step - 1)), 4);
                at = _mm256_add_epi32(at, _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(v, b, _CMP_GT_OQ)), _mm256_set1_epi32(step)));
            }
        }
        const __m256i bytes = _mm256_shuffle_epi8(at, low_bytes);
        _mm_storel_epi64((__m128i *)(code + i), _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
    }
    scalar_c.index(s, y + i, code + i, n - i);
}

KV_AVX2 static void put_value(const scalar_state *s, uint8_t *page, int token, const uint8_t *code)
{
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *p = &s->plane[k];
        const scalar_field *field = scalar_fields[p->bits - 1][token % p->chunk / 4];
        for (int f = 0; f < 2 && field[f].width; f++) {
            const __m128i shift = _mm_cvtsi32_si128(field[f].shift + token % 4 * 8), from = _mm_cvtsi32_si128(field[f].from + 4 * k);
            const __m256i mask = _mm256_sll_epi32(_mm256_set1_epi32((1 << field[f].width) - 1), shift);
            uint8_t *at = page + p->offset + (size_t)(token / p->chunk * p->rows + field[f].row) * 64;
            for (int tile = 0; tile < s->n_tiles; tile++, at += scalar_plane_tile(p))
                for (int h = 0; h < 2; h++) {
                    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(code + tile * SCALAR_LANES + 8 * h)));
                    const __m256i bits = _mm256_and_si256(_mm256_sll_epi32(_mm256_srl_epi32(wide, from), shift), mask);
                    _mm256_storeu_si256((__m256i *)(at + 32 * h), _mm256_or_si256(bits, _mm256_andnot_si256(mask, load(at + 32 * h))));
                }
        }
    }
}

const scalar_level scalar_avx2 = { scale_row, dense, index_row, put_value, scalar_prepare_avx2, dot, accumulate };
