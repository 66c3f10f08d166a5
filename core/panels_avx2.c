/* panels_avx2.c -- panels times vector with AVX2 (layout: panels.c).
 *
 * Nibbles: vpmaddubsw by the low and the high digits and by what those leave over; a 16-bit lane takes all 32 values of a block, 16 products of at most
 * 15 * 128 each, so it cannot overflow and is widened once a block.  Bytes: widened to words and multiplied by the 16-bit
 * activations themselves and by what these leave over; a row then lies in a pair of 32-bit lanes, whose sum is left to the end. */
#include <immintrin.h>
#include "panels.h"

#define KV_INLINE static inline __attribute__((always_inline))

enum { NIBBLE_VECTORS = 4, BYTE_VECTORS = 8 };

KV_INLINE KV_AVX2 __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

KV_INLINE KV_AVX2 __m256i four(const int8_t *digits)
{
    int32_t v;
    memcpy(&v, digits, 4);
    return _mm256_set1_epi32(v);
}

KV_INLINE KV_AVX2 __m256i quad(const int16_t *words)
{
    long long v;
    memcpy(&v, words, 8);
    return _mm256_set1_epi64x(v);
}

KV_INLINE KV_AVX2 __m256 halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }

/* q + fine / 256 */
KV_INLINE KV_AVX2 __m256 with_fine(__m256i q, __m256i fine) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(fine), _mm256_set1_ps(1.0f / 256), _mm256_cvtepi32_ps(q)); }

KV_INLINE void fetch(const uint8_t *p, size_t bytes)
{
    for (size_t k = 0; k < bytes; k += 64) __builtin_prefetch(p + PANEL_AHEAD + k);
}

KV_INLINE KV_AVX2 void nibbles_of(int type, const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const size_t head = KV_PANEL_ROWS * (type == KV_W_Q4_1 ? 4 : 2), bytes = head + KV_PANEL_ROWS * 16;
    const int64_t n_blocks = w->n_in / 32;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t *p = w->panels + (size_t)(row0 / KV_PANEL_ROWS * n_blocks) * bytes;
    for (int64_t row = row0; row < row1; row += KV_PANEL_ROWS) {
        __m256 sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() }, bias[2] = { sum[0], sum[0] };
        for (int64_t i = 0; i < n_blocks; i++, p += bytes) {
            const int8_t *const digits[] = { kv_act_digits(a) + 64 * i, kv_act_digits(a) + 64 * i + 32, kv_act_fine8(a) + 32 * i };
            fetch(p, bytes);
            __m256i s[2][3];                                   /* [half][digit] */
            for (int h = 0; h < 2; h++) s[h][0] = s[h][1] = s[h][2] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int v = 0; v < NIBBLE_VECTORS; v++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m256i x = load(p + head + 64 * v + 32 * h), l = _mm256_and_si256(x, low), u = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
#pragma GCC unroll 3
                    for (int k = 0; k < 3; k++) {
                        s[h][k] = _mm256_add_epi16(s[h][k], _mm256_maddubs_epi16(l, four(digits[k] + 4 * v)));
                        s[h][k] = _mm256_add_epi16(s[h][k], _mm256_maddubs_epi16(u, four(digits[k] + 16 + 4 * v)));
                    }
                }
            const __m256 scale = _mm256_set1_ps(a->scale[i]), total = _mm256_set1_ps(kv_act_sum24(a)[i]);
            for (int h = 0; h < 2; h++) {
                const __m256i q = _mm256_add_epi32(_mm256_madd_epi16(s[h][0], ones), _mm256_slli_epi32(_mm256_madd_epi16(s[h][1], ones), 8));
                const __m256 d = halves(p + 16 * h), whole = with_fine(q, _mm256_madd_epi16(s[h][2], ones));
                sum[h] = _mm256_fmadd_ps(whole, _mm256_mul_ps(d, scale), sum[h]);
                bias[h] = _mm256_fmadd_ps(type == KV_W_Q4_1 ? halves(p + 2 * KV_PANEL_ROWS + 16 * h) : d, total, bias[h]);
            }
        }
        for (int h = 0; h < 2; h++) {
            if (type == KV_W_Q4_0) bias[h] = _mm256_mul_ps(bias[h], _mm256_set1_ps(-8));
            _mm256_storeu_ps(y + row + 8 * h, _mm256_add_ps(sum[h], bias[h]));
        }
    }
}

KV_AVX2 static void q4_0(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { nibbles_of(KV_W_Q4_0, w, a, r0, r1, y); }
KV_AVX2 static void q4_1(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { nibbles_of(KV_W_Q4_1, w, a, r0, r1, y); }

KV_AVX2 static void q8_0(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const size_t head = KV_PANEL_ROWS * 2, bytes = head + KV_PANEL_ROWS * 32;
    const int64_t n_blocks = w->n_in / 32;
    const __m256i zero = _mm256_setzero_si256(), twice[2] = { _mm256_set_epi32(5, 5, 4, 4, 1, 1, 0, 0), _mm256_set_epi32(7, 7, 6, 6, 3, 3, 2, 2) };
    const uint8_t *p = w->panels + (size_t)(row0 / KV_PANEL_ROWS * n_blocks) * bytes;
    for (int64_t row = row0; row < row1; row += KV_PANEL_ROWS) {
        __m256 sum[2][2], bias[2];                             /* sum[h][0]: rows 0 1 4 5 of a half, [1]: rows 2 3 6 7, in pairs */
        for (int h = 0; h < 2; h++) sum[h][0] = sum[h][1] = bias[h] = _mm256_setzero_ps();
        for (int64_t i = 0; i < n_blocks; i++, p += bytes) {
            const int16_t *const q = a->q + 32 * i, *const fine = kv_act_fine16(a) + 32 * i;
            fetch(p, bytes);
            __m256i s[2][2] = { { zero, zero }, { zero, zero } }, f[2][2] = { { zero, zero }, { zero, zero } };
#pragma GCC unroll 8
            for (int v = 0; v < BYTE_VECTORS; v++) {
                const __m256i x = quad(q + 4 * v), y4 = quad(fine + 4 * v);
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m256i c = load(p + head + 64 * v + 32 * h);
                    const __m256i c0 = _mm256_unpacklo_epi8(c, zero), c1 = _mm256_unpackhi_epi8(c, zero);
                    s[h][0] = _mm256_add_epi32(s[h][0], _mm256_madd_epi16(c0, x));
                    s[h][1] = _mm256_add_epi32(s[h][1], _mm256_madd_epi16(c1, x));
                    f[h][0] = _mm256_add_epi32(f[h][0], _mm256_madd_epi16(c0, y4));
                    f[h][1] = _mm256_add_epi32(f[h][1], _mm256_madd_epi16(c1, y4));
                }
            }
            const __m256 scale = _mm256_set1_ps(a->scale[i]), total = _mm256_set1_ps(kv_act_sum24(a)[i]);
            for (int h = 0; h < 2; h++) {
                const __m256 d = halves(p + 16 * h), ds = _mm256_mul_ps(d, scale);
                for (int k = 0; k < 2; k++) sum[h][k] = _mm256_fmadd_ps(with_fine(s[h][k], f[h][k]), _mm256_permutevar8x32_ps(ds, twice[k]), sum[h][k]);
                bias[h] = _mm256_fmadd_ps(d, total, bias[h]);
            }
        }
        for (int h = 0; h < 2; h++)                            /* hadd of {0 0 1 1 4 4 5 5} and {2 2 3 3 6 6 7 7}: 0 1 2 3 4 5 6 7 */
            _mm256_storeu_ps(y + row + 8 * h, _mm256_fmadd_ps(bias[h], _mm256_set1_ps(-128), _mm256_hadd_ps(sum[h][0], sum[h][1])));
    }
}

void kv_panels_avx2(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    (w->type == KV_W_Q4_0 ? q4_0 : w->type == KV_W_Q4_1 ? q4_1 : q8_0)(w, a, row0, row1, y);
}
