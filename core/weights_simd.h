/* weights_simd.h -- the block types for AVX2 and wider: codes of 32 values, scales of a run of groups (see weights.h).
 *
 * `type` is a constant wherever these are called: each call becomes the code of one type. */
#ifndef KV_WEIGHTS_SIMD_H
#define KV_WEIGHTS_SIMD_H
#include <immintrin.h>
#include "weights.h"

#define KV_INLINE static inline __attribute__((always_inline))

enum {
    CHUNK = 2048,                              /* values of a row whose scales are expanded at once */
    MAX_GROUPS = CHUNK / 16,
    COMPANY = 16,                              /* rows whose scales are expanded together: 12 KB, and what is stored has settled when it is read wide */
    ROWS = 4,                                  /* rows that share the loads of activations */
};

KV_INLINE int  w_block(int type) { return type >= KV_W_Q2_K ? 256 : 32; }
KV_INLINE int  w_group(int type) { return type == KV_W_Q2_K || type == KV_W_Q3_K || type == KV_W_Q6_K ? 16 : 32; }
KV_INLINE bool w_has_min(int type) { return type == KV_W_Q4_1 || type == KV_W_Q5_1 || type == KV_W_Q2_K || type == KV_W_Q4_K || type == KV_W_Q5_K; }
/* b = -offset a for the types without a minimum of their own. */
KV_INLINE int  w_offset(int type)
{
    return type == KV_W_Q4_0 ? 8 : type == KV_W_Q5_0 ? 16 : type == KV_W_Q8_0 ? 128 : type == KV_W_Q3_K ? 4 : type == KV_W_Q6_K ? 32 : 0;
}
KV_INLINE int  w_bytes(int type)
{
    switch (type) {
    case KV_W_Q4_0: return 18;
    case KV_W_Q4_1: return 20;
    case KV_W_Q5_0: return 22;
    case KV_W_Q5_1: return 24;
    case KV_W_Q8_0: return 34;
    case KV_W_Q2_K: return 84;
    case KV_W_Q3_K: return 110;
    case KV_W_Q4_K: return 144;
    case KV_W_Q5_K: return 176;
    default:        return 210;
    }
}

#define EACH_TYPE(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K)

/* ---- codes */

KV_INLINE KV_AVX2 __m256i load256(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }

KV_INLINE KV_AVX2 __m256i low_bits(__m256i v, int shift, int mask)
{
    return _mm256_and_si256(shift ? _mm256_srli_epi16(v, shift) : v, _mm256_set1_epi8((char)mask));
}

KV_INLINE KV_AVX2 __m256i nibbles32(const uint8_t *qs)                      /* low nibbles of 16 bytes, then the high ones */
{
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)qs));
    return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
}

/* 16 in byte i where bit i of the word at p is set. */
KV_INLINE KV_AVX2 __m256i fifth_bits(const uint8_t *p)
{
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)kv_load_u32(p)), _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}

/* Bit `bit` of each byte, moved to the value `to`. */
KV_INLINE KV_AVX2 __m256i bit_plane(const uint8_t *p, int bit, int to)
{
    const __m256i one = _mm256_set1_epi8((char)(1 << bit));
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(load256(p), one), one), _mm256_set1_epi8((char)to));
}

/* The codes of 32 values: chunk j of the block at p. */
KV_INLINE KV_AVX2 __m256i codes256(int type, const uint8_t *p, int j)
{
    switch (type) {
    case KV_W_Q4_0: return nibbles32(p + 2);
    case KV_W_Q4_1: return nibbles32(p + 4);
    case KV_W_Q5_0: return _mm256_or_si256(nibbles32(p + 6), fifth_bits(p + 2));
    case KV_W_Q5_1: return _mm256_or_si256(nibbles32(p + 8), fifth_bits(p + 4));
    case KV_W_Q8_0: return _mm256_xor_si256(load256(p + 2), _mm256_set1_epi8((char)0x80));
    case KV_W_Q2_K: return low_bits(load256(p + 16 + j / 4 * 32), j % 4 * 2, 3);
    case KV_W_Q3_K: return _mm256_or_si256(low_bits(load256(p + 32 + j / 4 * 32), j % 4 * 2, 3), bit_plane(p, j, 4));
    case KV_W_Q4_K: return low_bits(load256(p + 16 + j / 2 * 32), j % 2 * 4, 15);
    case KV_W_Q5_K: return _mm256_or_si256(low_bits(load256(p + 48 + j / 2 * 32), j % 2 * 4, 15), bit_plane(p + 16, j, 16));
    default: {                                                              /* Q6_K: high bits come from bits 2 (j % 4) and up */
        const __m256i low = low_bits(load256(p + j / 4 * 64 + j % 2 * 32), j % 4 / 2 * 4, 15), raw = load256(p + 128 + j / 4 * 32);
        const int at = j % 4 * 2;
        const __m256i high = at <= 4 ? _mm256_slli_epi16(raw, 4 - at) : _mm256_srli_epi16(raw, at - 4);
        return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
    } }
}

/* ---- scales */

KV_INLINE KV_AVX2 float half_f32(const uint8_t *p) { return _cvtsh_ss(kv_load_u16(p)); }

/* The a (and b of types with a minimum) of the groups of one K block: 8 or 16 of each. */
KV_INLINE KV_AVX2 void scales_k(int type, const uint8_t *p, float *a, float *b)
{
    uint32_t sc[4], m[4] = { 0 };
    float d, dmin = 0;
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
    if (type == KV_W_Q2_K) {
        for (int i = 0; i < 4; i++) {
            const uint32_t v = kv_load_u32(p + 4 * i);
            sc[i] = v & four;
            m[i] = v >> 4 & four;
        }
        d = half_f32(p + 80);
        dmin = half_f32(p + 82);
    } else if (type == KV_W_Q3_K) {
        const uint32_t v0 = kv_load_u32(p + 96), v1 = kv_load_u32(p + 100), v2 = kv_load_u32(p + 104);
        sc[0] = (v0 & four) | (v2 & two) << 4;
        sc[1] = (v1 & four) | (v2 >> 2 & two) << 4;
        sc[2] = (v0 >> 4 & four) | (v2 >> 4 & two) << 4;
        sc[3] = (v1 >> 4 & four) | (v2 >> 6 & two) << 4;
        d = half_f32(p + 108);
    } else if (type == KV_W_Q6_K) {
        memcpy(sc, p + 192, 16);
        d = half_f32(p + 208);
    } else {
        const uint32_t v0 = kv_load_u32(p + 4), v1 = kv_load_u32(p + 8), v2 = kv_load_u32(p + 12);
        sc[0] = v0 & six;
        sc[1] = (v2 & four) | (v0 >> 6 & two) << 4;
        m[0] = v1 & six;
        m[1] = (v2 >> 4 & four) | (v1 >> 6 & two) << 4;
        d = half_f32(p);
        dmin = half_f32(p + 2);
    }
    for (int i = 0; i < 256 / w_group(type) / 8; i++) {
        long long s8, m8;
        memcpy(&s8, sc + 2 * i, 8);
        memcpy(&m8, m + 2 * i, 8);
        __m256i s = type == KV_W_Q6_K ? _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(s8)) : _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(s8));
        if (type == KV_W_Q3_K) s = _mm256_sub_epi32(s, _mm256_set1_epi32(32));
        _mm256_storeu_ps(a + 8 * i, _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtepi32_ps(s)));
        if (w_has_min(type))
            _mm256_storeu_ps(b + 8 * i, _mm256_mul_ps(_mm256_set1_ps(-dmin), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(m8)))));
    }
}

/* a and b of the blocks of n32 chunks; zeros up to a multiple of 16 groups. */
KV_INLINE KV_AVX2 void scales_k_run(int type, const uint8_t *p, int n32, float *a, float *b)
{
    const int per = 256 / w_group(type), n = n32 / 8 * per;
    for (int i = 0; i < n; i += per, p += w_bytes(type)) scales_k(type, p, a + i, b + i);
    if (n % 16) {
        _mm256_storeu_ps(a + n, _mm256_setzero_ps());
        if (w_has_min(type)) _mm256_storeu_ps(b + n, _mm256_setzero_ps());
    }
}

/* What the scales of n blocks of 32 come from: d and m of each, or d alone as u16; zeros up to a multiple of 16. */
KV_INLINE void collect32(int type, const uint8_t *p, int n, uint32_t *raw)
{
    uint16_t *const raw16 = (uint16_t *)(void *)raw;
    const int padded = (n + 15) / 16 * 16;
    for (int i = 0; i < n; i++, p += w_bytes(type)) {
        if (w_has_min(type)) memcpy(raw + i, p, 4);
        else memcpy(raw16 + i, p, 2);
    }
    for (int i = n; i < padded; i++) {
        if (w_has_min(type)) raw[i] = 0;
        else raw16[i] = 0;
    }
}

/* Eight of them as f32, from the i-th on; m is b too where the type has no minimum. */
KV_INLINE KV_AVX2 void halves8(int type, const uint32_t *raw, int i, __m256 *d, __m256 *m)
{
    if (!w_has_min(type)) {
        *d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)(const void *)raw + i)));
        *m = _mm256_mul_ps(*d, _mm256_set1_ps((float)-w_offset(type)));
        return;
    }
    const __m256i v = load256((const uint8_t *)(raw + i));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(v, 16)), 0xd8);
    *d = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
    *m = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
}

/* a and b of n32 chunks of 32 values from the block at p on, for dequantizing. */
KV_INLINE KV_AVX2 void scales(int type, const uint8_t *p, int n32, float *a, float *b)
{
    if (w_block(type) == 256) {
        scales_k_run(type, p, n32, a, b);
        if (!w_has_min(type)) for (int i = 0; i < n32 * 32 / w_group(type); i++) b[i] = (float)-w_offset(type) * a[i];
        return;
    }
    uint32_t raw[CHUNK / 32];
    collect32(type, p, n32, raw);
    for (int i = 0; i < n32; i += 8) {
        __m256 d, m;
        halves8(type, raw, i, &d, &m);
        _mm256_storeu_ps(a + i, d);
        _mm256_storeu_ps(b + i, m);
    }
}
#endif
