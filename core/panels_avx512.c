/* panels_avx512.c -- panels times vector with AVX-512 VNNI (layout: panels.c).
 *
 * Six accumulators a block: low and high nibbles (the latter left in place, a code times 16) by the low and high digits
 * of the activations and by what those leave over.  The digits' sums are exact in 32 bits together: 15 * 32639 * 32 * 16 < 2^31.
 * Some 50 instructions for 512 values of Q4_1, 25 cycles for 320 bytes: a quarter of what memory takes for them. */
#include <immintrin.h>
#include "panels.h"

#define KV_INLINE static inline __attribute__((always_inline))

KV_INLINE KV_AVX512 __m512i four(const int8_t *digits)
{
    int32_t v;
    memcpy(&v, digits, 4);
    return _mm512_set1_epi32(v);
}

KV_INLINE KV_AVX512 __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }

/* Sixteen times the sums of codes times (q + fine / 256). */
KV_INLINE KV_AVX512 __m512 nibble_sums(const uint8_t *codes, const int8_t *digits, const int8_t *fine)
{
    const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8((char)0xf0), zero = _mm512_setzero_si512();
    __m512i a0 = zero, a1 = zero, a2 = zero, b0 = zero, b1 = zero, b2 = zero;
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        const __m512i x = _mm512_loadu_si512(codes + 64 * v), l = _mm512_and_si512(x, low), h = _mm512_and_si512(x, high);
        a0 = _mm512_dpbusd_epi32(a0, l, four(digits + 4 * v));
        a1 = _mm512_dpbusd_epi32(a1, l, four(digits + 32 + 4 * v));
        a2 = _mm512_dpbusd_epi32(a2, l, four(fine + 4 * v));
        b0 = _mm512_dpbusd_epi32(b0, h, four(digits + 16 + 4 * v));
        b1 = _mm512_dpbusd_epi32(b1, h, four(digits + 48 + 4 * v));
        b2 = _mm512_dpbusd_epi32(b2, h, four(fine + 16 + 4 * v));
    }
    const __m512i lows = _mm512_add_epi32(a0, _mm512_slli_epi32(a1, 8)), highs = _mm512_add_epi32(b0, _mm512_slli_epi32(b1, 8));
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(lows, 4), highs));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(a2, 4), b2)), _mm512_set1_ps(1.0f / 256), whole);
}

KV_INLINE KV_AVX512 __m512 byte_sums(const uint8_t *codes, const int8_t *digits, const int8_t *fine)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i a[2] = { zero, zero }, b[2] = { zero, zero }, c[2] = { zero, zero };
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        const __m512i x = _mm512_loadu_si512(codes + 64 * v);
        a[v % 2] = _mm512_dpbusd_epi32(a[v % 2], x, four(digits + 4 * v));
        b[v % 2] = _mm512_dpbusd_epi32(b[v % 2], x, four(digits + 32 + 4 * v));
        c[v % 2] = _mm512_dpbusd_epi32(c[v % 2], x, four(fine + 4 * v));
    }
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_add_epi32(a[0], a[1]), _mm512_slli_epi32(_mm512_add_epi32(b[0], b[1]), 8)));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(c[0], c[1])), _mm512_set1_ps(1.0f / 256), whole);
}

KV_INLINE KV_AVX512 void panels_of(int type, const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const size_t bytes = KV_PANEL_ROWS * (type == KV_W_Q4_0 ? 18 : type == KV_W_Q4_1 ? 20 : 34), head = KV_PANEL_ROWS * (type == KV_W_Q4_1 ? 4 : 2);
    const int64_t n_blocks = w->n_in / 32;
    const uint8_t *p = w->panels + (size_t)(row0 / KV_PANEL_ROWS * n_blocks) * bytes;
    const __m512 unit = _mm512_set1_ps(type == KV_W_Q8_0 ? 1 : 1.0f / 16);
    for (int64_t row = row0; row < row1; row += KV_PANEL_ROWS) {
        const int8_t *digits = kv_act_digits(a), *fine = kv_act_fine8(a);
        __m512 sum = _mm512_setzero_ps(), bias = sum;
        for (int64_t i = 0; i < n_blocks; i++, p += bytes, digits += 64, fine += 32) {
            for (size_t k = 0; k < bytes; k += 64) __builtin_prefetch(p + PANEL_AHEAD + k);
            const __m512 d = halves(p);
            const __m512 s = type == KV_W_Q8_0 ? byte_sums(p + head, digits, fine) : nibble_sums(p + head, digits, fine);
            sum = _mm512_fmadd_ps(s, _mm512_mul_ps(d, _mm512_mul_ps(unit, _mm512_set1_ps(a->scale[i]))), sum);
            bias = _mm512_fmadd_ps(type == KV_W_Q4_1 ? halves(p + 2 * KV_PANEL_ROWS) : d, _mm512_set1_ps(kv_act_sum24(a)[i]), bias);
        }
        if (type != KV_W_Q4_1) bias = _mm512_mul_ps(bias, _mm512_set1_ps(type == KV_W_Q4_0 ? -8 : -128));
        _mm512_storeu_ps(y + row, _mm512_add_ps(sum, bias));
    }
}

KV_AVX512 static void q4_0(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { panels_of(KV_W_Q4_0, w, a, r0, r1, y); }
KV_AVX512 static void q4_1(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { panels_of(KV_W_Q4_1, w, a, r0, r1, y); }
KV_AVX512 static void q8_0(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { panels_of(KV_W_Q8_0, w, a, r0, r1, y); }

void kv_panels_avx512(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    (w->type == KV_W_Q4_0 ? q4_0 : w->type == KV_W_Q4_1 ? q4_1 : q8_0)(w, a, row0, row1, y);
}
