/* wf_avx2.c -- the `wf` codec with AVX2.
 *
 * A unit's 32 codes (8 lanes, 4 bytes each) are byte-shuffle indices, as in scalar_avx2.c: two shuffles look up the low and high
 * bytes of 16-bit centroids, two unpacks join them, vpmaddwd meets 4 weights, and one horizontal add at the very end puts 8 lanes
 * in order. */
#define L(name) name##_avx2
#define TARGET KV_AVX2
#define LANES 8
#include "wf_level.h"

INLINE __m256i word(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)at); }
INLINE __m256i byte_mask(int width) { return _mm256_set1_epi8((char)((1 << width) - 1)); }

/* Codes of a unit, one a byte. */
INLINE __m256i four_of(const uint8_t *at, const wf_slot *f)
{
    const __m256i low = _mm256_and_si256(_mm256_srl_epi16(word(at), _mm_cvtsi32_si128(f->shift)), byte_mask(f->low));
    if (f->low == f->width) return low;
    return _mm256_or_si256(low, _mm256_sll_epi16(_mm256_and_si256(word(at + 64), byte_mask(f->width - f->low)), _mm_cvtsi32_si128(f->low)));
}

/* A byte shuffle reaches 16 centroids.  Beyond 4 bits every 16 of them take their turn: code - 16k, plus 0x70 with
 * saturation, keeps bit 7 clear for this table's codes alone, and the shuffle answers 0 to the others. */
INLINE void lookup(const wf_codebook *b, int width, __m256i i, __m256i *x, __m256i *y)
{
    __m256i lo, hi;
    if (width <= 4) {
        lo = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)b->byte_lo[0])), i);
        hi = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)b->byte_hi[0])), i);
    } else {
        lo = hi = _mm256_setzero_si256();
        for (int k = 0; k < 1 << (width - 4); k++) {
            const __m256i at = _mm256_adds_epu8(_mm256_sub_epi8(i, _mm256_set1_epi8((char)(16 * k))), _mm256_set1_epi8(0x70));
            lo = _mm256_or_si256(lo, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)b->byte_lo[k])), at));
            hi = _mm256_or_si256(hi, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)b->byte_hi[k])), at));
        }
    }
    *x = _mm256_unpacklo_epi8(lo, hi);
    *y = _mm256_unpackhi_epi8(lo, hi);
}

INLINE __m256 scales(const wf_state *s, const uint8_t *page, int tok)
{
    if (s->scale_mode == WF_SCALE_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(page + s->scales + 2 * (size_t)tok)));
    return _mm256_i32gather_ps(s->tables->scale, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(page + s->scales + tok))), 4);
}

INLINE void dot_block_avx2(const int g, const kv_codec *c, const uint8_t *page, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld)
{
    const wf_state *st = wf_state_of(c);
    const size_t w_ld = c->query_bytes / 8;
    for (int tok = 0; tok < n_tokens; tok += 8) {
        const uint8_t *at = page + (size_t)(tok / SCALAR_LANES) * st->tile_bytes + 4 * (size_t)(tok % SCALAR_LANES);
        const int64_t *w = (const int64_t *)scalar_query_quads((void *)prepared, st->padded);
        __m256i sum[SCALAR_QUERIES][2];
        for (int q = 0; q < g; q++) sum[q][0] = sum[q][1] = _mm256_setzero_si256();
        for (int k = 0; k < st->n / 4; k++, w++) {
            const wf_slot *f = &st->slot[k];
            __m256i x, y;
            lookup(&st->tables->book[f->width], f->width, four_of(at + f->offset, f), &x, &y);
            for (int q = 0; q < g; q++) {
                const __m256i weight = _mm256_set1_epi64x(w[(size_t)q * w_ld]);
                sum[q][0] = _mm256_add_epi32(sum[q][0], _mm256_madd_epi16(x, weight));
                sum[q][1] = _mm256_add_epi32(sum[q][1], _mm256_madd_epi16(y, weight));
            }
        }
        const __m256 scale = scales(st, page, tok);
        for (int q = 0; q < g; q++) {
            const __m256 unit = _mm256_set1_ps(*(const float *)(prepared + (size_t)q * c->query_bytes));
            const __m256 s = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_hadd_epi32(sum[q][0], sum[q][1])), scale), unit);
            if (n_tokens - tok >= 8) _mm256_storeu_ps(scores + q * ld + tok, s);
            else store_part_avx2(scores + q * ld + tok, s, n_tokens - tok);
        }
    }
}

INLINE __m256 centroids_avx2(const wf_codebook *b, const uint8_t *at, const wf_slot f, const int byte)
{
    __m256i i = _mm256_srl_epi32(word(at + f.offset), _mm_cvtsi32_si128(f.shift + byte));
    if (f.low < f.width) {
        const __m256i high = _mm256_sll_epi32(_mm256_srl_epi32(word(at + f.offset + 64), _mm_cvtsi32_si128(byte)), _mm_cvtsi32_si128(f.low));
        i = _mm256_or_si256(_mm256_and_si256(i, _mm256_set1_epi32((1 << f.low) - 1)), high);
    }
    if (f.width <= 3) return _mm256_permutevar8x32_ps(_mm256_load_ps(b->centroid), i);
    return _mm256_i32gather_ps(b->centroid, _mm256_and_si256(i, _mm256_set1_epi32(255)), 4);
}

const wf_level wf_avx2 = { dense_avx2, query_avx2, dot_avx2, accumulate_avx2 };
