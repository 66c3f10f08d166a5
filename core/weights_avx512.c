/* weights_avx512.c -- matrix times vector with AVX-512 VNNI.
 *
 * One vpdpbusd multiplies the 32 codes of a group, held twice in a register, by the low and the high digits of the
 * activations: 16 exact integers.  Conversion and one FMA with the group's scale follow: with the unpacking four instructions of
 * ports 0 and 5 per 32 values of Q4_1 and Q8_0, 2 cycles for 20 and 34 bytes: less than the memory takes.
 *
 * Nibbles need no shift: a high nibble left in place is a code times 16, a byte still, and what weighs a lane of the sum
 * (LANES below, 1/16 here, 256 for the high digits) is applied once a row. */
#include "weights_simd.h"

KV_INLINE bool in_place(int type) { return type == KV_W_Q4_0 || type == KV_W_Q4_1; }

KV_INLINE KV_AVX512 __m512i codes512(int type, const uint8_t *p, int j)
{
    if (in_place(type)) {
        const __m512i mask = _mm512_set_epi32(-0x0f0f0f10, -0x0f0f0f10, -0x0f0f0f10, -0x0f0f0f10, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f,
                                              -0x0f0f0f10, -0x0f0f0f10, -0x0f0f0f10, -0x0f0f0f10, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f);
        return _mm512_and_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)(p + (type == KV_W_Q4_0 ? 2 : 4)))), mask);
    }
    if (type == KV_W_Q8_0) return _mm512_xor_si512(_mm512_broadcast_i64x4(load256(p + 2)), _mm512_set1_epi8((char)0x80));
    if (type == KV_W_Q4_K) {
        const __m512i both = _mm512_broadcast_i64x4(load256(p + 16 + j / 2 * 32));
        return _mm512_and_si512(j % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    }
    if (type == KV_W_Q5_0 || type == KV_W_Q5_1) {
        const uint64_t fifth = kv_load_u32(p + (type == KV_W_Q5_0 ? 2 : 4));
        const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)(p + (type == KV_W_Q5_0 ? 6 : 8))));
        const __m512i low = _mm512_and_si512(_mm512_srlv_epi64(four, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0)), _mm512_set1_epi8(15));
        return _mm512_mask_add_epi8(low, fifth << 32 | fifth, low, _mm512_set1_epi8(16));
    }
    return _mm512_broadcast_i64x4(codes256(type, p, j));
}

/* ds = a times the activations' scales; returns sum of b times the activations' sums, as 16 partial sums. */
KV_INLINE KV_AVX512 __m512 fold_scales(int type, const uint8_t *p, int n32, const uint32_t *raw, const float *scale, const float *sum, float *ds)
{
    float b[MAX_GROUPS];
    if (w_block(type) == 256) scales_k_run(type, p, n32, ds, b);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < n32 * 32 / w_group(type); i += 16) {
        __m512 d, m;
        if (w_block(type) == 256) {
            d = _mm512_loadu_ps(ds + i);
            m = w_has_min(type) ? _mm512_loadu_ps(b + i) : d;
        } else if (w_has_min(type)) {
            const __m512i even_odd = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
            const __m512i both = _mm512_permutexvar_epi16(even_odd, _mm512_loadu_si512(raw + i));
            d = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
            m = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
        } else d = m = _mm512_cvtph_ps(load256((const uint8_t *)raw + 2 * i));
        total = _mm512_fmadd_ps(m, _mm512_loadu_ps(sum + i), total);
        _mm512_storeu_ps(ds + i, _mm512_mul_ps(d, _mm512_loadu_ps(scale + i)));
    }
    return w_has_min(type) ? total : _mm512_mul_ps(total, _mm512_set1_ps((float)-w_offset(type)));
}

/* acc[r] += ds times codes times digits over n32 groups, rows row_bytes apart. */
KV_INLINE KV_AVX512 void products(int type, int n_rows, const uint8_t *p, size_t row_bytes, int n32, const int8_t *digits, const float *ds, __m512 *acc)
{
    const int per_block = w_block(type) / 32;
    __m512 sum[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) sum[r] = acc[r];
    for (int i = 0; i < n32; i += per_block, p += w_bytes(type))
#pragma GCC unroll 8
        for (int j = 0; j < per_block; j++) {
            const __m512i x = _mm512_loadu_si512(digits + 64 * (i + j));
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                const __m512i v = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes512(type, p + (size_t)r * row_bytes, j), x);
                __m512 s;
                if (w_group(type) == 32) s = _mm512_set1_ps(ds[r * MAX_GROUPS + i + j]);
                else {
                    double pair;
                    memcpy(&pair, &ds[r * MAX_GROUPS + 2 * (i + j)], 8);
                    s = _mm512_permutexvar_ps(_mm512_set_epi32(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_castpd_ps(_mm512_set1_pd(pair)));
                }
                sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), s, sum[r]);
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) acc[r] = sum[r];
}

/* The sums of four registers. */
KV_INLINE KV_AVX512 __m128 sum4(const __m512 *v)
{
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])), b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const __m512 e = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 f = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
    return _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
}

/* Ask for rows that come next while these are in work: memory and arithmetic then overlap. */
KV_INLINE void fetch_rows(const kv_weight *w, int64_t row, int64_t end)
{
    const uint8_t *const to = w->data + (size_t)end * w->row_bytes;
    for (const uint8_t *p = w->data + (size_t)row * w->row_bytes; p < to; p += 64) __builtin_prefetch(p);
}

KV_INLINE KV_AVX512 void matvec_of(int type, const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const int group = w_group(type);
    const float *const scale = group == 16 ? kv_act_scale16(a) : a->scale, *const sum = group == 16 ? kv_act_sum16(a) : a->sum;
    const float second = in_place(type) ? 1.0f / 16 : 1;
    const __m512 lanes = _mm512_set_ps(256 * second, 256 * second, 256 * second, 256 * second, 256, 256, 256, 256, second, second, second, second, 1, 1, 1, 1);
    for (int64_t row = row0; row < row1; row += COMPANY) {
        const int n_rows = (int)kv_min64(row1 - row, COMPANY);
        __m512 acc[COMPANY], bias[COMPANY];
        float ds[COMPANY][MAX_GROUPS];
        uint32_t raw[COMPANY][CHUNK / 32];
        for (int r = 0; r < COMPANY; r++) acc[r] = bias[r] = _mm512_setzero_ps();
        for (int64_t at = 0; at < w->n_in; at += CHUNK) {
            const uint8_t *const p = w->data + (size_t)row * w->row_bytes + (size_t)(at / w_block(type)) * (size_t)w_bytes(type);
            const int n32 = (int)kv_min64(w->n_in - at, CHUNK) / 32;
            if (w_block(type) == 32) for (int r = 0; r < n_rows; r++) collect32(type, p + (size_t)r * w->row_bytes, n32, raw[r]);
            for (int r = 0; r < n_rows; r++)
                bias[r] = _mm512_add_ps(bias[r], fold_scales(type, p + (size_t)r * w->row_bytes, n32, raw[r], scale + at / group, sum + at / group, ds[r]));
            const int8_t *const digits = kv_act_digits(a) + 2 * at;
            int r = 0;
            for (; r + ROWS <= n_rows; r += ROWS) {
                if (at == 0) fetch_rows(w, row + COMPANY + r, kv_min64(row + COMPANY + r + ROWS, w->n_out));
                products(type, ROWS, p + (size_t)r * w->row_bytes, w->row_bytes, n32, digits, ds[r], acc + r);
            }
            for (; r < n_rows; r++) products(type, 1, p + (size_t)r * w->row_bytes, w->row_bytes, n32, digits, ds[r], acc + r);
        }
        for (int r = 0; r < n_rows; r += 4) {
            for (int k = r; k < r + 4; k++) acc[k] = _mm512_fmadd_ps(acc[k], lanes, bias[k]);
            _mm_mask_storeu_ps(y + row + r, (__mmask8)((1u << kv_min(n_rows - r, 4)) - 1), sum4(acc + r));
        }
    }
}

/* Up to 16 values of the float types as f32; what the mask leaves out is 0 and not read. */
KV_INLINE KV_AVX512 __m512 floats16(int type, const uint8_t *p, __mmask16 there)
{
    if (type == KV_W_F32) return _mm512_maskz_loadu_ps(there, p);
    const __m256i h = _mm256_maskz_loadu_epi16(there, p);
    return type == KV_W_F16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

KV_INLINE KV_AVX512 void matvec_of_floats(int type, const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const int size = type == KV_W_F32 ? 4 : 2;
    for (int64_t r = row0; r < row1; r++) {
        const uint8_t *const p = w->data + (size_t)r * w->row_bytes;
        __m512 acc[4];
        for (int j = 0; j < 4; j++) acc[j] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 64 <= w->n_in; i += 64)
            for (int j = 0; j < 4; j++) acc[j] = _mm512_fmadd_ps(floats16(type, p + (i + 16 * j) * size, 0xffff), _mm512_loadu_ps(a->x + i + 16 * j), acc[j]);
        for (; i < w->n_in; i += 16) {
            const __mmask16 there = w->n_in - i >= 16 ? 0xffff : (__mmask16)((1u << (w->n_in - i)) - 1);
            acc[0] = _mm512_fmadd_ps(floats16(type, p + i * size, there), _mm512_loadu_ps(a->x + i), acc[0]);
        }
        y[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
    }
}

#define MATVEC_FN(T) KV_AVX512 static void matvec_##T(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { matvec_of(KV_W_##T, w, a, r0, r1, y); }
EACH_TYPE(MATVEC_FN)
#define FLOAT_MATVEC_FN(T) KV_AVX512 static void matvec_##T(const kv_weight *w, const kv_act *a, int64_t r0, int64_t r1, float *y) { matvec_of_floats(KV_W_##T, w, a, r0, r1, y); }
FLOAT_MATVEC_FN(F32) FLOAT_MATVEC_FN(F16) FLOAT_MATVEC_FN(BF16)

#define MATVEC_CASE(T) case KV_W_##T: matvec_##T(w, a, row0, row1, y); return;
void kv_matvec_avx512(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    switch (w->type) { EACH_TYPE(MATVEC_CASE) MATVEC_CASE(F32) MATVEC_CASE(F16) MATVEC_CASE(BF16) }
}
