/* int_simd.h -- int.c's blocks in AVX2 (also what the AVX-512 level uses): 32 codes are one register.  Same bytes and
 * values as the plain C there: the same f32 steps in the same order, none fused. */
#include <immintrin.h>

#define INLINE2 KV_AVX2 static inline __attribute__((always_inline))

INLINE2 __m256i unpack32(const uint8_t *src, int bits)
{
    if (bits == 8) return _mm256_loadu_si256((const void *)src);
    __m256i v = _mm256_setzero_si256();
    if (bits & 1) {
        const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201), byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i on = _mm256_shuffle_epi8(_mm256_set1_epi32((int)kv_load_u32(src)), byte);
        v = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(on, bit), bit), _mm256_set1_epi8((char)(1 << (bits & 6))));
        src += 4;
    }
    if (bits & 2) {
        const int64_t x = (int64_t)kv_load_u64(src);
        const __m256i two = _mm256_and_si256(_mm256_srlv_epi64(_mm256_set1_epi64x(x), _mm256_setr_epi64x(0, 2, 4, 6)), _mm256_set1_epi8(3));
        v = _mm256_or_si256(v, bits & 4 ? _mm256_slli_epi16(two, 4) : two);
        src += 8;
    }
    if (bits & 4) {
        const __m128i x = _mm_loadu_si128((const void *)src);
        v = _mm256_or_si256(v, _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(x, 4), x), _mm256_set1_epi8(15)));
    }
    return v;
}

INLINE2 void pack32(uint8_t *dst, __m256i v, int bits)
{
    if (bits == 8) { _mm256_storeu_si256((void *)dst, v); return; }
    if (bits & 1) {
        const uint32_t x = (uint32_t)_mm256_movemask_epi8(_mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - (bits & 6))));
        memcpy(dst, &x, 4);
        dst += 4;
    }
    if (bits & 2) {
        const __m256i two = _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(bits & 4)), _mm256_set1_epi8(3));
        const uint64_t x = (uint64_t)_mm256_extract_epi64(two, 0) | (uint64_t)_mm256_extract_epi64(two, 1) << 2 |
                           (uint64_t)_mm256_extract_epi64(two, 2) << 4 | (uint64_t)_mm256_extract_epi64(two, 3) << 6;
        memcpy(dst, &x, 8);
        dst += 8;
    }
    if (bits & 4) {
        const __m256i four = _mm256_and_si256(v, _mm256_set1_epi8(15));
        _mm_storeu_si128((void *)dst, _mm_or_si128(_mm256_castsi256_si128(four), _mm_slli_epi16(_mm256_extracti128_si256(four, 1), 4)));
    }
}

INLINE2 __m256i code8(const int mode, const int bits, __m256 mul, __m256 off, __m256 x)
{
    const float levels = (float)((1 << bits) - 1), zero = (float)(1 << (bits - 1));
    const __m256 none = _mm256_setzero_ps(), top = _mm256_set1_ps(levels);
    switch (mode) {
    case AFFINE:
        return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(_mm256_sub_ps(x, off), mul), none), top));
    case SYMMETRIC:
        x = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, mul), _mm256_set1_ps(1 - zero)), _mm256_set1_ps(zero - 1));
        return _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32((int)zero));
    case GGML_0:
        if (bits == 8) {       /* halves away from zero: the largest float below 0.5, with the sign, then towards zero */
            x = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, mul), _mm256_set1_ps(-127)), _mm256_set1_ps(127));
            const __m256 half = _mm256_or_ps(_mm256_and_ps(_mm256_set1_ps(-0.0f), x), _mm256_set1_ps(0x1.fffffep-2f));
            return _mm256_and_si256(_mm256_cvttps_epi32(_mm256_add_ps(x, half)), _mm256_set1_epi32(255));
        }
        x = _mm256_add_ps(_mm256_mul_ps(x, mul), _mm256_set1_ps(zero + 0.5f));
        return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(x, none), top));
    default:
        x = _mm256_add_ps(_mm256_mul_ps(_mm256_sub_ps(x, off), mul), _mm256_set1_ps(0.5f));
        return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(x, none), top));
    }
}

INLINE2 float hmax8(__m256 v)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

INLINE2 uint8_t *encode_group_of(const int mode, const int bits, const bool has_min, const int_state *s, const float *x, int n, uint8_t *dst)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float lo = 0, hi = 0, extreme = 0;
    if (has_min || (mode == GGML_0 && bits < 8)) {
        __m256 least = _mm256_loadu_ps(x), most = least;
        for (int i = 8; i < n; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            least = _mm256_min_ps(least, v);
            most = _mm256_max_ps(most, v);
        }
        lo = -hmax8(_mm256_xor_ps(least, sign));
        hi = hmax8(most);
        extreme = hi > -lo ? hi : lo;
        for (int i = 0; !has_min && hi == -lo; i++)            /* as large on either side: the first of them */
            if (x[i] == hi || x[i] == lo) { extreme = x[i] + 0.0f; break; }      /* -0 becomes 0 */
    } else {
        __m256 most = _mm256_setzero_ps();
        for (int i = 0; i < n; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
        extreme = hmax8(most);
    }
    const group_scale g = scale_of(s, lo, hi, extreme);
    dst = store_scale(s, &g, dst);
    const __m256 mul = _mm256_set1_ps(g.mul), off = _mm256_set1_ps(g.off);
    for (int i = 0; i < n; i += BLOCK, dst += s->block_bytes) {
        const __m256i a = code8(mode, bits, mul, off, _mm256_loadu_ps(x + i)),      b = code8(mode, bits, mul, off, _mm256_loadu_ps(x + i + 8));
        const __m256i c = code8(mode, bits, mul, off, _mm256_loadu_ps(x + i + 16)), d = code8(mode, bits, mul, off, _mm256_loadu_ps(x + i + 24));
        const __m256i v = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
        pack32(dst, _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)), bits);
    }
    return dst;
}

/* n is a multiple of 32.  A copy for each kind that is common, and for each mode. */
KV_AVX2 static uint8_t *encode_group_avx2(const int_state *s, const float *x, int n, uint8_t *dst)
{
    switch (s->mode) {
    case AFFINE:    return encode_group_of(AFFINE, s->bits, true, s, x, n, dst);
    case SYMMETRIC: return encode_group_of(SYMMETRIC, s->bits, false, s, x, n, dst);
    case GGML_0:    return s->bits == 8 ? encode_group_of(GGML_0, 8, false, s, x, n, dst) : s->bits == 4 ? encode_group_of(GGML_0, 4, false, s, x, n, dst)
                                                                                          : encode_group_of(GGML_0, s->bits, false, s, x, n, dst);
    default:        return encode_group_of(s->mode, s->bits, true, s, x, n, dst);
    }
}

/* n is a multiple of 32. */
KV_AVX2 static const uint8_t *decode_group_avx2(const int_state *s, const uint8_t *src, int n, float *x)
{
    const __m256 d = _mm256_set1_ps(kv_f16_to_f32(kv_load_u16(src))), m = _mm256_set1_ps(s->has_min ? kv_f16_to_f32(kv_load_u16(src + 2)) : 0);
    const __m256i zero = _mm256_set1_epi8((char)s->zero);
    src += s->has_min ? 4 : 2;
    for (int i = 0; i < n; i += BLOCK, src += s->block_bytes) {
        int8_t code[BLOCK];
        _mm256_storeu_si256((void *)code, _mm256_sub_epi8(unpack32(src, s->bits), zero));
        for (int j = 0; j < BLOCK; j += 8) {
            const __m128i byte = _mm_loadl_epi64((const void *)(code + j));
            if (s->has_min) _mm256_storeu_ps(x + i + j, _mm256_add_ps(_mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(byte))), m));
            else            _mm256_storeu_ps(x + i + j, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(byte))));
        }
    }
    return src;
}

/* Rows of a matrix as bytes, zero point removed, beside their scales: what the kernels of int_level.h run on. */
typedef struct tile {
    _Alignas(64) int8_t code[TILE * KV_MAX_PAGE];          /* [row][cols] */
    _Alignas(64) float  d[MAX_GROUPS][TILE], m[MAX_GROUPS][TILE];
} tile;

INLINE2 void load_tile_of(int bits, bool has_min, const int_state *s, const uint8_t *rows, int n, tile *t)
{
    const __m256i zero = _mm256_set1_epi8((char)s->zero);
    const int cols = s->cols, group = s->group;
    const size_t row_bytes = s->row_bytes, block_bytes = bits == 8 ? 32 : (size_t)bits * 4;
    for (int r = 0; r < n; r++, rows += row_bytes) {
        const uint8_t *src = rows;
        int8_t *code = t->code + r * cols;
        for (int i = 0, k = 0; i < cols; k++) {
            const int end = kv_min(i + group, cols);
            t->d[k][r] = _cvtsh_ss(kv_load_u16(src));
            if (has_min) t->m[k][r] = _cvtsh_ss(kv_load_u16(src + 2));
            src += has_min ? 4 : 2;
            for (; i + BLOCK <= end; i += BLOCK, src += block_bytes)
                _mm256_storeu_si256((void *)(code + i), _mm256_sub_epi8(unpack32(src, bits), zero));
            if (i < end) {
                unpack(src, (uint8_t *)code + i, end - i, bits);
                src += codes_bytes(bits, end - i);
                for (; i < end; i++) code[i] = (int8_t)(code[i] - s->zero);
            }
        }
    }
    for (int k = 0; k * group < cols; k++)
        for (int r = n; r < TILE; r++) t->d[k][r] = t->m[k][r] = 0;
}

/* A copy for each width: planes and masks are constants there; loading tiles was 40 % of attention without. */
KV_AVX2 static void load_tile(const int_state *s, const uint8_t *rows, int n, tile *t)
{
#define WIDTH(b) case b: if (s->has_min) load_tile_of(b, true, s, rows, n, t); else load_tile_of(b, false, s, rows, n, t); break;
    switch (s->bits) { WIDTH(1) WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8) default: break; }
#undef WIDTH
}

/* dst[j][i] = src[i][j] for 8 x 8. */
KV_AVX2 static void transpose8(const float *src, int64_t src_ld, float *dst, int64_t dst_ld)
{
    __m256 r[8], a[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + i * src_ld);
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        r[4 * i]     = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + i * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(dst + (i + 4) * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
