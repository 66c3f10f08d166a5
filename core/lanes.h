/* lanes.h -- the few vector operations that attention kernels need, for one SIMD level.  Included once per level with
 * L(name): the level's names, TARGET: the function attribute, LANES: 8 (AVX2) or 16 (AVX-512).
 *
 * The point is L(hsum): LANES registers, one per token, become one register of their sums, so that a dot product costs
 * two shuffles a token and query instead of a horizontal sum. */
#include <immintrin.h>

#define INLINE TARGET static inline __attribute__((always_inline))

#if LANES == 16
typedef __m512 L(vf);
INLINE L(vf) L(zero)(void)                         { return _mm512_setzero_ps(); }
INLINE L(vf) L(set)(float x)                       { return _mm512_set1_ps(x); }
INLINE L(vf) L(add)(L(vf) a, L(vf) b)              { return _mm512_add_ps(a, b); }
INLINE L(vf) L(mul)(L(vf) a, L(vf) b)              { return _mm512_mul_ps(a, b); }
INLINE L(vf) L(fma)(L(vf) a, L(vf) b, L(vf) c)     { return _mm512_fmadd_ps(a, b, c); }
INLINE L(vf) L(load)(const float *p)               { return _mm512_loadu_ps(p); }
INLINE void  L(store)(float *p, L(vf) v)           { _mm512_storeu_ps(p, v); }
INLINE L(vf) L(load_part)(const float *p, int n)   { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void  L(store_part)(float *p, L(vf) v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
INLINE L(vf) L(load_f16)(const void *p)            { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE L(vf) L(load_bf16)(const void *p)           { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16)); }
INLINE L(vf) L(load_s8)(const int8_t *p)           { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
INLINE L(vf) L(load_u8)(const int8_t *p)           { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p))); }

INLINE L(vf) L(hsum)(const L(vf) v[16])
{
    __m512 a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}
#else
typedef __m256 L(vf);
INLINE L(vf) L(zero)(void)                         { return _mm256_setzero_ps(); }
INLINE L(vf) L(set)(float x)                       { return _mm256_set1_ps(x); }
INLINE L(vf) L(add)(L(vf) a, L(vf) b)              { return _mm256_add_ps(a, b); }
INLINE L(vf) L(mul)(L(vf) a, L(vf) b)              { return _mm256_mul_ps(a, b); }
INLINE L(vf) L(fma)(L(vf) a, L(vf) b, L(vf) c)     { return _mm256_fmadd_ps(a, b, c); }
INLINE L(vf) L(load)(const float *p)               { return _mm256_loadu_ps(p); }
INLINE void  L(store)(float *p, L(vf) v)           { _mm256_storeu_ps(p, v); }
INLINE __m256i L(first)(int n)                     { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
INLINE L(vf) L(load_part)(const float *p, int n)   { return _mm256_maskload_ps(p, L(first)(n)); }
INLINE void  L(store_part)(float *p, L(vf) v, int n) { _mm256_maskstore_ps(p, L(first)(n), v); }
INLINE L(vf) L(load_f16)(const void *p)            { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE L(vf) L(load_bf16)(const void *p)           { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16)); }
INLINE L(vf) L(load_s8)(const int8_t *p)           { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))); }
INLINE L(vf) L(load_u8)(const int8_t *p)           { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p))); }

INLINE L(vf) L(hsum)(const L(vf) v[8])
{
    __m256 a[4], b[2];
    for (int i = 0; i < 4; i++) a[i] = _mm256_add_ps(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 2; i++) {
        const __m256d x = _mm256_castps_pd(a[2 * i]), y = _mm256_castps_pd(a[2 * i + 1]);
        b[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
}
#endif
