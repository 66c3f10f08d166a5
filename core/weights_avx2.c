/* weights_avx2.c -- dequantizing and matrix times vector with AVX2 and FMA.
 *
 * Products: codes u8 times activation digits i8 by vpmaddubsw (at most 2 x 63 x 128: no saturation), widened by
 * vpmaddwd with 1 for the low digit and 256 for the high one: an exact integer per 4 values.  Q8_0's codes are too wide for
 * that; they go signed and widened against the i16 activations.  Then one FMA with the scales per 32 values. */
#include "weights_simd.h"

/* ---- dequantize */

KV_INLINE KV_AVX2 void rows_of(int type, const kv_weight *w, int64_t row0, int64_t n_rows, float *dst)
{
    float a[MAX_GROUPS], b[MAX_GROUPS];
    const int halves = 32 / w_group(type), per_block = w_block(type) / 32;
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t at = 0; at < w->n_in; at += CHUNK, dst += CHUNK) {
            const uint8_t *p = w->data + (size_t)(row0 + r) * w->row_bytes + (size_t)(at / w_block(type)) * (size_t)w_bytes(type);
            const int n32 = (int)kv_min64(w->n_in - at, CHUNK) / 32;
            scales(type, p, n32, a, b);
            for (int i = 0; i < n32; i += per_block, p += w_bytes(type))
#pragma GCC unroll 8
                for (int j = 0; j < per_block; j++) {
                    const __m256i u = codes256(type, p, j);
                    const __m128i u16[2] = { _mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1) };
#pragma GCC unroll 4
                    for (int h = 0; h < 4; h++) {
                        const int g = (i + j) * halves + (halves == 2 ? h / 2 : 0);
                        const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(h % 2 ? _mm_srli_si128(u16[h / 2], 8) : u16[h / 2]));
                        _mm256_storeu_ps(dst + 32 * (i + j) + 8 * h, _mm256_fmadd_ps(v, _mm256_set1_ps(a[g]), _mm256_set1_ps(b[g])));
                    }
                }
            if (w->n_in - at < CHUNK) dst += w->n_in - at - CHUNK;
        }
}

/* 8 values of the float types as f32. */
KV_INLINE KV_AVX2 __m256 floats8(int type, const uint8_t *p)
{
    if (type == KV_W_F32) return _mm256_loadu_ps((const float *)(const void *)p);
    const __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return type == KV_W_F16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

KV_INLINE float float1(int type, const uint8_t *p)
{
    return type == KV_W_F32 ? kv_bits_f32(kv_load_u32(p)) : type == KV_W_F16 ? kv_f16_to_f32(kv_load_u16(p)) : kv_bf16_to_f32(kv_load_u16(p));
}

KV_INLINE KV_AVX2 void rows_of_floats(int type, const kv_weight *w, int64_t row0, int64_t n_rows, float *dst)
{
    const int size = type == KV_W_F32 ? 4 : 2;
    for (int64_t r = 0; r < n_rows; r++, dst += w->n_in) {
        const uint8_t *const p = w->data + (size_t)(row0 + r) * w->row_bytes;
        int64_t i = 0;
        for (; i + 8 <= w->n_in; i += 8) _mm256_storeu_ps(dst + i, floats8(type, p + i * size));
        for (; i < w->n_in; i++) dst[i] = float1(type, p + i * size);
    }
}

#define ROWS_FN(T) KV_AVX2 static void rows_##T(const kv_weight *w, int64_t r, int64_t n, float *dst) { rows_of(KV_W_##T, w, r, n, dst); }
EACH_TYPE(ROWS_FN)
#define FLOAT_ROWS_FN(T) KV_AVX2 static void rows_##T(const kv_weight *w, int64_t r, int64_t n, float *dst) { rows_of_floats(KV_W_##T, w, r, n, dst); }
FLOAT_ROWS_FN(F32) FLOAT_ROWS_FN(F16) FLOAT_ROWS_FN(BF16)

#define ROWS_CASE(T) case KV_W_##T: rows_##T(w, row0, n_rows, dst); return;
void kv_weight_rows_avx2(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst)
{
    switch (w->type) { EACH_TYPE(ROWS_CASE) ROWS_CASE(F32) ROWS_CASE(F16) ROWS_CASE(BF16) }
}

/* ---- matrix times vector */

KV_INLINE KV_AVX2 float sum8(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* ds = a times the activations' scales; returns sum of b times the activations' sums, as 8 partial sums. */
KV_INLINE KV_AVX2 __m256 fold_scales(int type, const uint8_t *p, int n32, const uint32_t *raw, const float *scale, const float *sum, float *ds)
{
    float b[MAX_GROUPS];
    if (w_block(type) == 256) scales_k_run(type, p, n32, ds, b);
    __m256 total = _mm256_setzero_ps();
    for (int i = 0; i < n32 * 32 / w_group(type); i += 8) {
        __m256 d, m;
        if (w_block(type) == 32) halves8(type, raw, i, &d, &m);
        else {
            d = _mm256_loadu_ps(ds + i);
            m = w_has_min(type) ? _mm256_loadu_ps(b + i) : _mm256_mul_ps(d, _mm256_set1_ps((float)-w_offset(type)));
        }
        if (type != KV_W_Q8_0) total = _mm256_fmadd_ps(m, _mm256_loadu_ps(sum + i), total);
        _mm256_storeu_ps(ds + i, _mm256_mul_ps(d, _mm256_loadu_ps(scale + i)));
    }
    return total;
}

/* acc[r] += ds times codes times activations over n32 groups, rows row_bytes apart. */
KV_INLINE KV_AVX2 void products(int type, int n_rows, const uint8_t *p, size_t row_bytes, int n32, const int8_t *digits, const int16_t *q, const float *ds, __m256 *acc)
{
    const int per_block = w_block(type) / 32;
    __m256 sum[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) sum[r] = acc[r];
    for (int i = 0; i < n32; i += per_block, p += w_bytes(type))
#pragma GCC unroll 8
        for (int j = 0; j < per_block; j++) {
            const uint8_t *const x = type == KV_W_Q8_0 ? (const uint8_t *)(q + 32 * i) : (const uint8_t *)digits + 64 * (i + j);
            const __m256i x0 = load256(x), x1 = load256(x + 32);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                const uint8_t *const block = p + (size_t)r * row_bytes;
                __m256i v0, v1;
                if (type == KV_W_Q8_0) {
                    v0 = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(block + 2))), x0);
                    v1 = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(block + 18))), x1);
                } else {
                    const __m256i u = codes256(type, block, j);
                    v0 = _mm256_madd_epi16(_mm256_maddubs_epi16(u, x0), _mm256_set1_epi16(1));
                    v1 = _mm256_madd_epi16(_mm256_maddubs_epi16(u, x1), _mm256_set1_epi16(256));
                }
                __m256 s;
                if (w_group(type) == 32) s = _mm256_set1_ps(ds[r * MAX_GROUPS + i + j]);
                else {
                    double pair;
                    memcpy(&pair, &ds[r * MAX_GROUPS + 2 * (i + j)], 8);
                    s = _mm256_permutevar8x32_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)), _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
                }
                sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(v0, v1)), s, sum[r]);
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) acc[r] = sum[r];
}

KV_INLINE KV_AVX2 void matvec_of(int type, const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const int group = w_group(type);
    const float *const scale = group == 16 ? kv_act_scale16(a) : a->scale, *const sum = group == 16 ? kv_act_sum16(a) : a->sum;
    for (int64_t row = row0; row < row1; row += COMPANY) {
        const int n_rows = (int)kv_min64(row1 - row, COMPANY);
        __m256 acc[COMPANY], bias[COMPANY];
        float ds[COMPANY][MAX_GROUPS];
        uint32_t raw[COMPANY][CHUNK / 32];
        for (int r = 0; r < n_rows; r++) acc[r] = bias[r] = _mm256_setzero_ps();
        for (int64_t at = 0; at < w->n_in; at += CHUNK) {
            const uint8_t *const p = w->data + (size_t)row * w->row_bytes + (size_t)(at / w_block(type)) * (size_t)w_bytes(type);
            const int n32 = (int)kv_min64(w->n_in - at, CHUNK) / 32;
            if (w_block(type) == 32) for (int r = 0; r < n_rows; r++) collect32(type, p + (size_t)r * w->row_bytes, n32, raw[r]);
            for (int r = 0; r < n_rows; r++)
                bias[r] = _mm256_add_ps(bias[r], fold_scales(type, p + (size_t)r * w->row_bytes, n32, raw[r], scale + at / group, sum + at / group, ds[r]));
            int r = 0;
            for (; r + ROWS <= n_rows; r += ROWS) products(type, ROWS, p + (size_t)r * w->row_bytes, w->row_bytes, n32, kv_act_digits(a) + 2 * at, a->q + at, ds[r], acc + r);
            for (; r < n_rows; r++) products(type, 1, p + (size_t)r * w->row_bytes, w->row_bytes, n32, kv_act_digits(a) + 2 * at, a->q + at, ds[r], acc + r);
        }
        for (int r = 0; r < n_rows; r++) y[row + r] = sum8(_mm256_add_ps(acc[r], bias[r]));
    }
}

KV_INLINE KV_AVX2 void matvec_of_floats(int type, const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const int size = type == KV_W_F32 ? 4 : 2;
    for (int64_t r = row0; r < row1; r++) {
        const uint8_t *const p = w->data + (size_t)r * w->row_bytes;
        __m256 acc[4];
        for (int j = 0; j < 4; j++) acc[j] = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 32 <= w->n_in; i += 32)
            for (int j = 0; j < 4; j++) acc[j] = _mm256_fmadd_ps(floats8(type, p + (i + 8 * j) * size), _mm256_loadu_ps(a->x + i + 8 * j), acc[j]);
        float tail = 0;
        for (; i < w->n_in; i++) tail += float1(type, p + i * size) * a->x[i];
        y[r] = sum8(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]))) + tail;
    }
}

#define MATVEC_FN(T) KV_AVX2 static void matvec_##T(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { matvec_of(KV_W_##T, w, a, r0, r1, y); }
EACH_TYPE(MATVEC_FN)
#define FLOAT_MATVEC_FN(T) KV_AVX2 static void matvec_##T(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { matvec_of_floats(KV_W_##T, w, a, r0, r1, y); }
FLOAT_MATVEC_FN(F32) FLOAT_MATVEC_FN(F16) FLOAT_MATVEC_FN(BF16)

#define MATVEC_CASE(T) case KV_W_##T: matvec_##T(w, a, row0, row1, y); return;
void kv_matvec_avx2(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    switch (w->type) { EACH_TYPE(MATVEC_CASE) MATVEC_CASE(F32) MATVEC_CASE(F16) MATVEC_CASE(BF16) }
}

/* ---- activations */

KV_INLINE KV_AVX2 int sum_words(__m256i words)
{
    const __m256i s = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

KV_AVX2 void kv_act_quantize_avx2(kv_act *a, int64_t n)
{
    float *const scale16 = kv_act_scale16(a), *const sum16 = kv_act_sum16(a);
    for (int64_t g = 0; g < n / 32; g++) {
        __m256 x[4];
        __m256i top = _mm256_setzero_si256();
        for (int j = 0; j < 4; j++) {
            x[j] = _mm256_loadu_ps(a->x + 32 * g + 8 * j);
            top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(x[j]), _mm256_set1_epi32(0x7fffffff)));
        }
        __m128i m = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
        const float amax = _mm_cvtss_f32(_mm_castsi128_ps(m)), inv = kv_act_inverse(amax), scale = amax / KV_ACT_MAX;
        __m256i q[4], half[2], fine[4];
        for (int j = 0; j < 4; j++) {
            const __m256 exact = inv > 0 ? _mm256_mul_ps(x[j], _mm256_set1_ps(inv)) : _mm256_setzero_ps();
            q[j] = _mm256_cvtps_epi32(exact);
            const __m256 left = _mm256_mul_ps(_mm256_sub_ps(exact, _mm256_cvtepi32_ps(q[j])), _mm256_set1_ps(256));
            fine[j] = _mm256_min_epi32(_mm256_cvtps_epi32(left), _mm256_set1_epi32(127));
        }
        for (int h = 0; h < 2; h++) {
            half[h] = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[2 * h], q[2 * h + 1]), 0xd8);
            scale16[2 * g + h] = scale;
            sum16[2 * g + h] = scale * (float)sum_words(half[h]);
            _mm256_storeu_si256((__m256i *)(void *)(a->q + 32 * g + 16 * h), half[h]);
        }
        a->scale[g] = scale;
        a->sum[g] = sum16[2 * g] + sum16[2 * g + 1];
        const __m256i fine0 = _mm256_permute4x64_epi64(_mm256_packs_epi32(fine[0], fine[1]), 0xd8), fine1 = _mm256_permute4x64_epi64(_mm256_packs_epi32(fine[2], fine[3]), 0xd8);
        _mm256_storeu_si256((__m256i *)(void *)(kv_act_fine16(a) + 32 * g), fine0);
        _mm256_storeu_si256((__m256i *)(void *)(kv_act_fine16(a) + 32 * g + 16), fine1);
        _mm256_storeu_si256((__m256i *)(void *)(kv_act_fine8(a) + 32 * g), _mm256_permute4x64_epi64(_mm256_packs_epi16(fine0, fine1), 0xd8));
        kv_act_sum24(a)[g] = a->sum[g] + scale * ((float)sum_words(_mm256_add_epi16(fine0, fine1)) * (1.0f / 256));
        const __m256i low0 = _mm256_srai_epi16(_mm256_slli_epi16(half[0], 8), 8), low1 = _mm256_srai_epi16(_mm256_slli_epi16(half[1], 8), 8);
        const __m256i high0 = _mm256_srai_epi16(_mm256_add_epi16(half[0], _mm256_set1_epi16(128)), 8), high1 = _mm256_srai_epi16(_mm256_add_epi16(half[1], _mm256_set1_epi16(128)), 8);
        uint8_t *const digits = (uint8_t *)a->extra + 64 * g;
        _mm256_storeu_si256((__m256i *)(void *)digits, _mm256_permute4x64_epi64(_mm256_packs_epi16(low0, low1), 0xd8));
        _mm256_storeu_si256((__m256i *)(void *)(digits + 32), _mm256_permute4x64_epi64(_mm256_packs_epi16(high0, high1), 0xd8));
    }
}
