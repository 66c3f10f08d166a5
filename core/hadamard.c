/* hadamard.c -- row operations whose bits do not depend on the SIMD level: Walsh-Hadamard, sums of products.
 *
 * The transform runs butterflies (a + b, a - b) with strides 1, 2, 4, ... n/2 and multiplies by 1/sqrt(n) at the end.
 * Every output is one fixed tree of additions, so any vector width gives the same bits as long as the strides keep their
 * order; two strides may share a pass over memory (radix 4) without changing that.
 *
 * Sums keep 16 partial sums by index mod 16 (one AVX-512 register, two AVX2 registers) and fold them j += j+8, j+4, j+2,
 * j+1.  Product and sum are rounded apart. */
#include <immintrin.h>
#include <math.h>
#include "codec.h"

static void fwht_c(float *x, int n, float scale)
{
    for (int h = 1; h < n; h *= 2)
        for (int i = 0; i < n; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (int i = 0; i < n; i++) x[i] *= scale;
}

/* Strides 1, 2, 4 inside a register: the partner plus the element, whose sign turns where the stride's bit is set. */
KV_AVX2 static inline __m256 butterfly_8(__m256 v)
{
    __m256 p = _mm256_permute_ps(v, 0xB1);
    v = _mm256_blend_ps(_mm256_add_ps(v, p), _mm256_sub_ps(p, v), 0xAA);
    p = _mm256_permute_ps(v, 0x4E);
    v = _mm256_blend_ps(_mm256_add_ps(v, p), _mm256_sub_ps(p, v), 0xCC);
    p = _mm256_permute2f128_ps(v, v, 1);
    return _mm256_blend_ps(_mm256_add_ps(v, p), _mm256_sub_ps(p, v), 0xF0);
}

KV_AVX2 static void fwht_avx2(float *x, int n, float scale)   /* n >= 8 */
{
    for (int i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, butterfly_8(_mm256_loadu_ps(x + i)));
    int h = 8;
    for (; 4 * h <= n; h *= 4)
        for (int i = 0; i < n; i += 4 * h)
            for (int j = i; j < i + h; j += 8) {
                const __m256 a = _mm256_loadu_ps(x + j), b = _mm256_loadu_ps(x + j + h);
                const __m256 c = _mm256_loadu_ps(x + j + 2 * h), d = _mm256_loadu_ps(x + j + 3 * h);
                const __m256 ab = _mm256_add_ps(a, b), a_b = _mm256_sub_ps(a, b), cd = _mm256_add_ps(c, d), c_d = _mm256_sub_ps(c, d);
                _mm256_storeu_ps(x + j, _mm256_add_ps(ab, cd));
                _mm256_storeu_ps(x + j + h, _mm256_add_ps(a_b, c_d));
                _mm256_storeu_ps(x + j + 2 * h, _mm256_sub_ps(ab, cd));
                _mm256_storeu_ps(x + j + 3 * h, _mm256_sub_ps(a_b, c_d));
            }
    if (h < n)
        for (int j = 0; j < h; j += 8) {
            const __m256 a = _mm256_loadu_ps(x + j), b = _mm256_loadu_ps(x + j + h);
            _mm256_storeu_ps(x + j, _mm256_add_ps(a, b));
            _mm256_storeu_ps(x + j + h, _mm256_sub_ps(a, b));
        }
    const __m256 s = _mm256_set1_ps(scale);
    for (int i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), s));
}

KV_AVX512 static inline __m512 butterfly_16(__m512 v)
{
    __m512 p = _mm512_permute_ps(v, 0xB1);
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xAAAA, p, v);
    p = _mm512_permute_ps(v, 0x4E);
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xCCCC, p, v);
    p = _mm512_shuffle_f32x4(v, v, 0xB1);
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xF0F0, p, v);
    p = _mm512_shuffle_f32x4(v, v, 0x4E);
    return _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xFF00, p, v);
}

KV_AVX512 static void fwht_avx512(float *x, int n, float scale)   /* n >= 16 */
{
    const __m512 s = _mm512_set1_ps(scale);
    if (n == 64) {                            /* the most common head_dim stays in registers */
        const __m512 a = butterfly_16(_mm512_loadu_ps(x)), b = butterfly_16(_mm512_loadu_ps(x + 16));
        const __m512 c = butterfly_16(_mm512_loadu_ps(x + 32)), d = butterfly_16(_mm512_loadu_ps(x + 48));
        const __m512 ab = _mm512_add_ps(a, b), a_b = _mm512_sub_ps(a, b), cd = _mm512_add_ps(c, d), c_d = _mm512_sub_ps(c, d);
        _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_add_ps(ab, cd), s));
        _mm512_storeu_ps(x + 16, _mm512_mul_ps(_mm512_add_ps(a_b, c_d), s));
        _mm512_storeu_ps(x + 32, _mm512_mul_ps(_mm512_sub_ps(ab, cd), s));
        _mm512_storeu_ps(x + 48, _mm512_mul_ps(_mm512_sub_ps(a_b, c_d), s));
        return;
    }
    for (int i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, butterfly_16(_mm512_loadu_ps(x + i)));
    int h = 16;
    for (; 4 * h <= n; h *= 4)
        for (int i = 0; i < n; i += 4 * h)
            for (int j = i; j < i + h; j += 16) {
                const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + h);
                const __m512 c = _mm512_loadu_ps(x + j + 2 * h), d = _mm512_loadu_ps(x + j + 3 * h);
                const __m512 ab = _mm512_add_ps(a, b), a_b = _mm512_sub_ps(a, b), cd = _mm512_add_ps(c, d), c_d = _mm512_sub_ps(c, d);
                _mm512_storeu_ps(x + j, _mm512_add_ps(ab, cd));
                _mm512_storeu_ps(x + j + h, _mm512_add_ps(a_b, c_d));
                _mm512_storeu_ps(x + j + 2 * h, _mm512_sub_ps(ab, cd));
                _mm512_storeu_ps(x + j + 3 * h, _mm512_sub_ps(a_b, c_d));
            }
    if (h < n)
        for (int j = 0; j < h; j += 16) {
            const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + h);
            _mm512_storeu_ps(x + j, _mm512_add_ps(a, b));
            _mm512_storeu_ps(x + j + h, _mm512_sub_ps(a, b));
        }
    for (int i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), s));
}

void kv_fwht(float *x, int n)
{
    const float scale = (float)(1.0 / sqrt((double)n));
    const int level = kv_cpu_simd();
    if (level >= KV_SIMD_AVX512 && n >= 16) fwht_avx512(x, n, scale);
    else if (level >= KV_SIMD_AVX2 && n >= 8) fwht_avx2(x, n, scale);
    else fwht_c(x, n, scale);
}

void kv_fwht_blocks(float *x, int n)
{
    for (int at = 0; at < n;) {
        const int size = 1 << (31 - __builtin_clz((unsigned)(n - at)));
        kv_fwht(x + at, size);
        at += size;
    }
}

void kv_signs(double seed, int stream, int n, float *sign)
{
    for (int i = 0; i < n; i++) {             /* 128 signs a counter, lowest bit first */
        uint32_t word[4];
        kv_rng_u32((uint32_t)seed, 0, (uint32_t)stream, (uint32_t)i / 128, word);
        sign[i] = word[i / 32 % 4] >> i % 32 & 1 ? -1.0f : 1.0f;
    }
}

int kv_hadamard(float *x, int n_rows, int n)
{
    RETURN_ERROR_IF(!x, KV_E_ARG, "kv_hadamard: x is NULL");
    RETURN_ERROR_IF(n < 1 || n > 4096 || (n & (n - 1)), KV_E_ARG, "kv_hadamard: n=%d is not a power of two in 1..4096", n);
    RETURN_ERROR_IF(n_rows < 0, KV_E_ARG, "kv_hadamard: n_rows=%d is negative", n_rows);
    for (int r = 0; r < n_rows; r++) kv_fwht(x + (size_t)r * (size_t)n, n);
    return KV_OK;
}

static float dot_c(const float *a, const float *b, int n)
{
    float sum[16] = { 0 };
    for (int i = 0; i < n; i++) sum[i & 15] += a[i] * b[i];
    for (int h = 8; h; h /= 2)
        for (int j = 0; j < h; j++) sum[j] += sum[j + h];
    return sum[0];
}

KV_AVX2 static inline float fold_8(__m256 v)   /* strides 4, 2, 1 */
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

KV_AVX2 static float dot_avx2(const float *a, const float *b, int n)   /* n a multiple of 16 */
{
    __m256 lo = _mm256_setzero_ps(), hi = lo;
    for (int i = 0; i < n; i += 16) {
        lo = _mm256_add_ps(lo, _mm256_mul_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
        hi = _mm256_add_ps(hi, _mm256_mul_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8)));
    }
    return fold_8(_mm256_add_ps(lo, hi));
}

KV_AVX512 static float dot_avx512(const float *a, const float *b, int n)
{
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        const __mmask16 m = n - i >= 16 ? 0xFFFF : (__mmask16)((1u << (n - i)) - 1);
        sum = _mm512_mask_add_ps(sum, m, sum, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, a + i), _mm512_maskz_loadu_ps(m, b + i)));
    }
    return fold_8(_mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1)));
}

float kv_dot16(const float *a, const float *b, int n)
{
    const int level = kv_cpu_simd();
    if (level >= KV_SIMD_AVX512) return dot_avx512(a, b, n);
    if (level >= KV_SIMD_AVX2 && n % 16 == 0) return dot_avx2(a, b, n);
    return dot_c(a, b, n);
}

float kv_sumsq(const float *x, int n) { return kv_dot16(x, x, n); }
