/* wf_avx512.c -- the `wf` codec with AVX-512 and VNNI.
 *
 * As in scalar_avx512.c a register of 16 words, shifted right by 16-bit lanes, is its own index: vpermw reads the low 5 bits, and
 * tables repeat, so bits above a code need no mask.  Which table, which row and which shift are data of a slot, so one loop serves
 * any mix of widths; only codes that go on in the next row, and codes of 6 to 8 bits, take more than a shift and a lookup. */
#define L(name) name##_avx512
#define TARGET KV_AVX512
#define LANES 16
#include "wf_level.h"

INLINE __m512i word(const uint8_t *at) { return _mm512_loadu_si512(at); }

/* Codes of components 0 and 2 (odd: 1 and 3) of a unit in the low bits of 16-bit lanes; above them is junk. */
INLINE __m512i pair_of(const uint8_t *at, const wf_slot *f, const int odd)
{
    const __m512i low = _mm512_srlv_epi16(word(at), _mm512_set1_epi32((int)(odd ? f->odd : f->even)));
    if (f->low == f->width) return low;
    const __m512i next = odd ? _mm512_srli_epi16(word(at + 64), 8) : word(at + 64);
    const __m512i high = _mm512_sllv_epi16(next, _mm512_set1_epi16(f->low));
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16((int16_t)((1 << f->low) - 1)), low, high, 0xCA);       /* 0xCA: first ? second : third */
}

INLINE __m512i table(const wf_codebook *b, int i) { return _mm512_load_si512(b->fixed + 32 * i); }

INLINE __m512i lookup(const wf_codebook *b, int width, __m512i i)
{
    if (width <= 5) return _mm512_permutexvar_epi16(i, table(b, 0));
    const __m512i x = _mm512_permutex2var_epi16(table(b, 0), i, table(b, 1));
    if (width == 6) return x;
    const __mmask32 bit6 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(0x40));
    const __m512i y = _mm512_mask_blend_epi16(bit6, x, _mm512_permutex2var_epi16(table(b, 2), i, table(b, 3)));
    if (width == 7) return y;
    const __m512i z = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(table(b, 4), i, table(b, 5)), _mm512_permutex2var_epi16(table(b, 6), i, table(b, 7)));
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(i, _mm512_set1_epi16(0x80)), y, z);
}

INLINE __mmask16 first(int n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

INLINE __m512 scales(const wf_state *s, const uint8_t *page, int tok, __mmask16 m)
{
    if (s->scale_mode == WF_SCALE_F16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, page + s->scales + 2 * (size_t)tok));
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, page + s->scales + tok)), s->tables->scale, 4);
}

/* Two tiles at a time, the two pairs of a unit summed apart: vpdpwssd takes 5 cycles, and one chain a query would wait for itself. */
INLINE void dot_tiles(const int g, const int two, const kv_codec *c, const uint8_t *page, int tok, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld)
{
    const wf_state *st = wf_state_of(c);
    const uint8_t *at = page + (size_t)(tok / SCALAR_LANES) * st->tile_bytes;
    const int32_t *w = (const int32_t *)scalar_query_pairs((void *)prepared, st->padded);
    const size_t w_ld = c->query_bytes / 4;
    __m512i sum[2][SCALAR_QUERIES][2];
    for (int i = 0; i <= two; i++)
        for (int q = 0; q < g; q++) sum[i][q][0] = sum[i][q][1] = _mm512_setzero_si512();
    for (int k = 0; k < st->n / 4; k++, w += 2) {
        const wf_slot *f = &st->slot[k];
        const wf_codebook *b = &st->tables->book[f->width];
        for (int odd = 0; odd < 2; odd++)
            for (int i = 0; i <= two; i++) {
                const __m512i x = lookup(b, f->width, pair_of(at + f->offset + (i ? st->tile_bytes : 0), f, odd));
                for (int q = 0; q < g; q++) sum[i][q][odd] = _mm512_dpwssd_epi32(sum[i][q][odd], x, _mm512_set1_epi32(w[(size_t)q * w_ld + (size_t)odd]));
            }
    }
    for (int i = 0; i <= two; i++, tok += SCALAR_LANES) {
        const __mmask16 m = first(n_tokens - tok);
        const __m512 scale = scales(st, page, tok, m);
        for (int q = 0; q < g; q++) {
            const __m512 unit = _mm512_set1_ps(*(const float *)(prepared + (size_t)q * c->query_bytes));
            _mm512_mask_storeu_ps(scores + q * ld + tok, m, _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum[i][q][0], sum[i][q][1])), scale), unit));
        }
    }
}

INLINE void dot_block_avx512(const int g, const kv_codec *c, const uint8_t *page, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld)
{
    int tok = 0;
    for (; n_tokens - tok > SCALAR_LANES; tok += 2 * SCALAR_LANES) dot_tiles(g, 1, c, page, tok, n_tokens, prepared, scores, ld);
    if (tok < n_tokens) dot_tiles(g, 0, c, page, tok, n_tokens, prepared, scores, ld);
}

INLINE __m512 centroids_avx512(const wf_codebook *b, const uint8_t *at, const wf_slot f, const int byte)
{
    __m512i i = _mm512_srl_epi32(word(at + f.offset), _mm_cvtsi32_si128(f.shift + byte));
    if (f.low < f.width) {
        const __m512i high = _mm512_sll_epi32(_mm512_srl_epi32(word(at + f.offset + 64), _mm_cvtsi32_si128(byte)), _mm_cvtsi32_si128(f.low));
        i = _mm512_ternarylogic_epi32(_mm512_set1_epi32((1 << f.low) - 1), i, high, 0xCA);
    }
    if (f.width <= 4) return _mm512_permutexvar_ps(i, _mm512_load_ps(b->centroid));
    if (f.width == 5) return _mm512_permutex2var_ps(_mm512_load_ps(b->centroid), i, _mm512_load_ps(b->centroid + 16));
    return _mm512_i32gather_ps(_mm512_and_si512(i, _mm512_set1_epi32(255)), b->centroid, 4);
}

const wf_level wf_avx512 = { dense_avx512, query_avx512, dot_avx512, accumulate_avx512 };
