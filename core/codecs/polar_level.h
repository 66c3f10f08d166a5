/* polar_level.h -- the loops of polar.h for one SIMD level; polar_stages.c includes it once per level with L(name),
 * TARGET and LANES set.  Element by element, one rounding a step, none fused: every level gives the same bits.
 * Loops run past n to whole registers: rows are padded. */
typedef float   L(vf) __attribute__((vector_size(LANES * 4)));
typedef int32_t L(vi) __attribute__((vector_size(LANES * 4)));
typedef uint32_t L(vu) __attribute__((vector_size(LANES * 4)));
#define VF L(vf)
#define VI L(vi)
#define VU L(vu)

TARGET static inline VF L(load)(const float *p) { VF v; memcpy(&v, p, sizeof v); return v; }
TARGET static inline VI L(load_int)(const int32_t *p) { VI v; memcpy(&v, p, sizeof v); return v; }
TARGET static inline void L(store)(float *p, VF v) { memcpy(p, &v, sizeof v); }
TARGET static inline void L(store_int)(int32_t *p, VI v) { memcpy(p, &v, sizeof v); }
TARGET static inline VF L(pick)(VI mask, VF a, VF b) { return (VF)((mask & (VI)a) | (~mask & (VI)b)); }
TARGET static inline VF L(set)(float x) { return x - (VF){ 0 }; }
/* Half to even, |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits. */
TARGET static inline VI L(round)(VF x) { return (VI)(x + 12582912.0f) - 0x4b400000; }
TARGET static inline VF L(root)(VF x)
{
#if LANES == 16
    return (VF)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8
    return (VF)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

/* Angle over 2 pi in [-0.5, 0.5], within 1e-7: an odd polynomial of min/max (minimax for atan(z) / 2 pi on [0, 1]), then
 * the octant. */
TARGET static inline VF L(turn)(VF x, VF y)
{
    const VF ax = (VF)((VI)x & 0x7fffffff), ay = (VF)((VI)y & 0x7fffffff);
    const VI steep = ay > ax;
    const VF big = L(pick)(steep, ay, ax), small = L(pick)(steep, ax, ay);
    const VF z = small / L(pick)(big > 0.0f, big, L(set)(1)), s = z * z;
    VF p = s * 0.0010841303737834096f + -0.005348277278244495f;
    p = p * s + 0.012672500684857368f;
    p = p * s + -0.021061517298221588f;
    p = p * s + 0.03152511641383171f;
    p = p * s + -0.0530262365937233f;
    p = (p * s + 0.15915432572364807f) * z;
    p = L(pick)(steep, 0.25f - p, p);
    p = L(pick)(x < 0.0f, 0.5f - p, p);
    return (VF)((VI)p | ((VI)y & INT32_MIN));
}

TARGET static void L(split)(const float *y, int n, int base, float *r, int32_t *index)
{
    float a[POLAR_ROW / 2 + LANES], b[POLAR_ROW / 2 + LANES];
    memset(a + n, 0, LANES * sizeof *a);
    memset(b + n, 0, LANES * sizeof *b);
    for (int i = 0; i < n; i++) a[i] = y[2 * i];
    for (int i = 0; i < n; i++) b[i] = y[2 * i + 1];
    for (int i = 0; i < n; i += LANES) {
        const VF u = L(load)(a + i), v = L(load)(b + i);
        const VI k = L(round)(L(turn)(u, v) * (float)base);
        L(store_int)(index + i, k + ((k < 0) & base));
        L(store)(r + i, L(root)(u * u + v * v));
    }
}

TARGET static void L(scale_row)(const float *x, const float *sign, float by, float *out, int n)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) L(store)(out + i, L(load)(x + i) * (sign ? L(load)(sign + i) * by : L(set)(by)));
    for (; i < n; i++) out[i] = x[i] * (sign ? sign[i] * by : by);
}

/* Exponent and mantissa m in [1/sqrt 2, sqrt 2); with t = (m - 1)/(m + 1), log2 m = 2/ln 2 (t + t^3/3 + t^5/5 + ...). */
TARGET static void L(log2)(float *x, int n)
{
    for (int i = 0; i < n; i += LANES) {
        const VI bits = (VI)L(load)(x + i), up = (bits & 0x7fffff) > 0x3504f3;
        const VI e = (bits >> 23) - 127 - up;
        const VF m = (VF)((bits & 0x7fffff) | (0x3f800000 + (up & -0x800000))), t = (m - 1.0f) / (m + 1.0f), s = t * t;
        VF p = s * 0.41219858f + 0.57707802f;
        p = p * s + 0.96179669f;
        p = p * s + 2.88539008f;
        L(store)(x + i, p * t + __builtin_convertvector(e, VF));
    }
}

/* 2^round(x) by the exponent, the rest in [-0.5, 0.5] by Taylor's series of 2^f: within 6e-8. */
TARGET static inline VF L(power)(VF in)
{
    const VF v = L(pick)(in > 126.0f, L(set)(126), L(pick)(in < -126.0f, L(set)(-126), in));
    const VI e = L(round)(v);
    const VF f = v - __builtin_convertvector(e, VF);
    VF p = f * 1.52527338e-5f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    return (VF)(((VI)p + (e << 23)) & (in >= -126.0f));
}
TARGET static void L(exp2)(float *x, int n)
{
    for (int i = 0; i < n; i += LANES) L(store)(x + i, L(power)(L(load)(x + i)));
}

TARGET static void L(steps)(const float *x, int n, float lo, float per, int top, int32_t *code)
{
    for (int i = 0; i < n; i += LANES) {
        const VF v = (L(load)(x + i) - lo) * per;
        const VF c = L(pick)(v > (float)top, L(set)((float)top), L(pick)(v > 0.0f, v, L(set)(0)));
        L(store_int)(code + i, L(round)(c));
    }
}

TARGET static void L(signs)(const uint8_t *bits, int n, float x, float *out)
{
#if LANES == 4
    for (int i = 0; i < n; i++) out[i] = bits[i / 8] >> i % 8 & 1 ? x : -x;
#else
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int i = 0; i < n; i += 8) {
        const __m256i off = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), each), _mm256_setzero_si256());
        _mm256_storeu_ps(out + i, _mm256_xor_ps(_mm256_set1_ps(x), _mm256_castsi256_ps(_mm256_slli_epi32(off, 31))));
    }
#endif
}

TARGET static void L(unpack)(const polar_field *f, const uint8_t *src, int32_t *index)
{
    const int w = f->width, mask = (1 << w) - 1, n = f->fields;
    int32_t field[POLAR_ROW];
    int32_t *out = f->digits == 1 ? index : field;
#if LANES == 4
    for (int j = 0; j < n; j++) out[j] = (int32_t)(kv_load_u32(src + j * w / 8) >> j * w % 8) & mask;
#else
    const __m256i shuffle = _mm256_load_si256((const __m256i *)f->shuffle), shift = _mm256_load_si256((const __m256i *)f->shift), low = _mm256_set1_epi32(mask);
    for (int j = 0; j < n; j += 8, src += w) {
        const __m256i two = _mm256_loadu2_m128i((const __m128i *)(src + w / 2), (const __m128i *)src);
        _mm256_storeu_si256((__m256i *)(out + j), _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(two, shuffle), shift), low));
    }
#endif
    if (f->digits > 1) {
        memset(field + n, 0, LANES * sizeof *field);
        for (int k = 0; k < f->digits; k++)
            for (int j = 0; j < n; j += LANES) {
                const VU v = (VU)L(load_int)(field + j) * (uint32_t)f->base;
                L(store_int)(index + k * n + j, (VI)(v >> w));
                L(store_int)(field + j, (VI)v & mask);
            }
    }
    memset(index + f->count, 0, 8 * sizeof *index);
}

TARGET static void L(expand)(const float *r, const int32_t *index, const float *table, int size, int n, float *out)
{
#if LANES == 16
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __mmask16 second = size > 8 ? 0xffff : 0;
    const __m512 t0 = _mm512_maskz_loadu_ps((__mmask16)((1u << 2 * kv_min(size, 8)) - 1), table), t1 = _mm512_maskz_loadu_ps(second, table + (size > 8 ? 16 : 0));
    for (int i = 0; i < n; i += 8) {
        const __m256i eight = _mm256_loadu_si256((const __m256i *)(index + i));
        __m512 at;
        if (size == 2 || size == 4 || size == 8 || size == 16) {         /* two registers hold them all */
            const __m512i pos = _mm512_or_si512(_mm512_slli_epi32(_mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(eight)), 1), _mm512_set1_epi64(0x100000000));
            at = _mm512_permutex2var_ps(t0, pos, t1);
        } else at = _mm512_castpd_ps(_mm512_i32gather_pd(eight, table, 8));
        _mm512_storeu_ps(out + 2 * i, _mm512_mul_ps(_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(r + i))), at));
    }
#elif LANES == 8
    (void)size;
    for (int i = 0; i < n; i += 4) {
        const __m256 at = _mm256_castpd_ps(_mm256_i32gather_pd((const double *)table, _mm_loadu_si128((const __m128i *)(index + i)), 8));
        const __m128 four = _mm_loadu_ps(r + i);
        const __m256 twice = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_unpacklo_ps(four, four)), _mm_unpackhi_ps(four, four), 1);
        _mm256_storeu_ps(out + 2 * i, _mm256_mul_ps(twice, at));
    }
#else
    (void)size;
    for (int i = 0; i < n; i++) {
        out[2 * i] = r[i] * table[2 * index[i]];
        out[2 * i + 1] = r[i] * table[2 * index[i] + 1];
    }
#endif
}

/* out = by * table[index] */
TARGET static void L(levels)(const float *table, const int32_t *index, int n, float by, float *out)
{
    int i = 0;
#if LANES == 16
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_set1_ps(by), _mm512_i32gather_ps(_mm512_loadu_si512(index + i), table, 4)));
#elif LANES == 8
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_set1_ps(by), _mm256_i32gather_ps(table, _mm256_loadu_si256((const void *)(index + i)), 4)));
#endif
    for (; i < n; i++) out[i] = by * table[index[i]];
}

/* Radii of a row; r has room for whole registers. */
TARGET static inline void L(radii)(const polar_norms *s, const uint8_t *row, const uint8_t *side, float *r)
{
    const int n = s->count;
    int32_t code[POLAR_ROW];
    if (s->mode == POLAR_F32) { memcpy(r, row, (size_t)n * 4); return; }
    if (s->mode == POLAR_F16) { kv_vec_load(KV_F16, row, r, n); return; }
    const float lo = kv_f16_to_f32(kv_load_u16(side));        /* lloyd: the scale */
    if (s->bits) L(unpack)(&s->field, row, code);
    else memset(code, 0, (size_t)n * sizeof *code);
    if (s->mode == POLAR_LLOYD) {
        L(levels)(s->table, code, n, lo, r);
        return;
    }
    const float step = kv_f16_to_f32(kv_load_u16(side + 2));
    for (int i = 0; i < n; i += LANES) {
        const VF v = lo + __builtin_convertvector(L(load_int)(code + i), VF) * step;
        L(store)(r + i, s->mode == POLAR_LOG ? L(power)(v) : v);
    }
}

#if LANES > 4
/* LANES fields of one index each, from a multiple of 8 on; reads 16 bytes and half a field's width past them. */
TARGET static inline VI L(fields)(const polar_field *f, const uint8_t *src)
{
    const int w = f->width;
    const __m256i shuffle = _mm256_load_si256((const __m256i *)f->shuffle), shift = _mm256_load_si256((const __m256i *)f->shift);
    const __m256i a = _mm256_loadu2_m128i((const __m128i *)(src + w / 2), (const __m128i *)src);
#if LANES == 16
    const __m256i b = _mm256_loadu2_m128i((const __m128i *)(src + w + w / 2), (const __m128i *)(src + w));
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1), _mm512_broadcast_i64x4(shuffle));
    return (VI)_mm512_srlv_epi32(bytes, _mm512_broadcast_i64x4(shift)) & ((1 << w) - 1);
#else
    return (VI)_mm256_srlv_epi32(_mm256_shuffle_epi8(a, shuffle), shift) & ((1 << w) - 1);
#endif
}

TARGET static inline VF L(radius)(int mode, VI code, float lo, float step)
{
    const VF v = lo + __builtin_convertvector(code, VF) * step;
    return mode == POLAR_LOG ? L(power)(v) : v;
}

TARGET static inline VF L(lookup)(const float *table, VI index)
{
#if LANES == 16
    return (VF)_mm512_i32gather_ps((__m512i)index, table, 4);
#else
    return (VF)_mm256_i32gather_ps(table, (__m256i)index, 4);
#endif
}

/* Pairs of one level whose fields hold one index each, in whole registers: nothing goes through memory between the bits and the
 * row.  By way of arrays every load waits for stores of another width: 270 cycles a row of 64 against 100. */
TARGET static inline __attribute__((always_inline)) void L(pairs)(const int mode, const polar_form *f, const uint8_t *page, int tok0, int n, float *out, int ld)
{
    const polar_norms *const s = &f->norms;
    const polar_field *const angle = &f->field[0];
    const float *const table = f->table[0];
    for (int t = tok0; t < tok0 + n; t++, out += ld) {
        const uint8_t *src = page + (size_t)t * (size_t)f->angle_bytes, *row = page + f->norm_at + (size_t)t * (size_t)s->bytes;
        const uint8_t *side = page + f->side_at + (size_t)t * (size_t)s->side_bytes;
        const float lo = mode >= POLAR_LIN ? _cvtsh_ss(kv_load_u16(side)) : 0, step = mode == POLAR_LIN || mode == POLAR_LOG ? _cvtsh_ss(kv_load_u16(side + 2)) : 0;
#if LANES == 16
        const bool few = s->bits <= 4;                         /* all that a row's radii can be fits a register */
        VF all = { 0 };
        if (mode == POLAR_LLOYD && few) all = lo * L(load)(s->table);
        if (mode == POLAR_LOG && few) all = L(radius)(mode, (VI){ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }, lo, step);
#endif
        for (int i = 0; i < angle->count; i += LANES, src += LANES / 8 * angle->width) {
            VF r;
            if (mode == POLAR_F32) r = L(load)((const float *)(const void *)row + i);
#if LANES == 16
            else if (mode == POLAR_F16) r = (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)(row + 2 * i)));
#else
            else if (mode == POLAR_F16) r = (VF)_mm256_cvtph_ps(_mm_loadu_si128((const void *)(row + 2 * i)));
#endif
            else {
                const VI code = s->bits ? L(fields)(&s->field, row) : (VI){ 0 };
                row += LANES / 8 * s->field.width;
#if LANES == 16
                if (mode != POLAR_LIN && few) r = (VF)_mm512_permutexvar_ps((__m512i)code, (__m512)all);
                else
#endif
                r = mode == POLAR_LLOYD ? lo * L(lookup)(s->table, code) : L(radius)(mode, code, lo, step);
            }
            const VI at = L(fields)(angle, src);
#if LANES == 16
            const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            const __m512 a = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_castsi512_si256((__m512i)at), table, 8));
            const __m512 b = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_extracti64x4_epi64((__m512i)at, 1), table, 8));
            _mm512_storeu_ps(out + 2 * i, _mm512_mul_ps(_mm512_permutexvar_ps(low, (__m512)r), a));
            _mm512_storeu_ps(out + 2 * i + 16, _mm512_mul_ps(_mm512_permutexvar_ps(high, (__m512)r), b));
#else
            const __m256i low = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
            const __m256 a = _mm256_castpd_ps(_mm256_i32gather_pd((const double *)(const void *)table, _mm256_castsi256_si128((__m256i)at), 8));
            const __m256 b = _mm256_castpd_ps(_mm256_i32gather_pd((const double *)(const void *)table, _mm256_extracti128_si256((__m256i)at, 1), 8));
            _mm256_storeu_ps(out + 2 * i, _mm256_mul_ps(_mm256_permutevar8x32_ps((__m256)r, low), a));
            _mm256_storeu_ps(out + 2 * i + 8, _mm256_mul_ps(_mm256_permutevar8x32_ps((__m256)r, high), b));
#endif
        }
    }
}
#endif

/* Several rows go through each step together, so that stores are done before loads of another width want them. */
TARGET static void L(rows)(const polar_form *f, const uint8_t *page, int tok0, int n, float *out, int ld)
{
    const polar_norms *const s = &f->norms;
#if LANES > 4
    if (f->levels == 1 && f->field[0].digits == 1 && f->field[0].count % LANES == 0) {
        switch (s->mode) {
        case POLAR_F32: L(pairs)(POLAR_F32, f, page, tok0, n, out, ld); return;
        case POLAR_F16: L(pairs)(POLAR_F16, f, page, tok0, n, out, ld); return;
        case POLAR_LIN: L(pairs)(POLAR_LIN, f, page, tok0, n, out, ld); return;
        case POLAR_LOG: L(pairs)(POLAR_LOG, f, page, tok0, n, out, ld); return;
        default:        L(pairs)(POLAR_LLOYD, f, page, tok0, n, out, ld); return;
        }
    }
#endif
    enum { GROUP = 8, MAX_STRIDE = KV_MAX_HEAD_DIM / 2 + 2 * POLAR_PAD };
    const int stride = (int)kv_round_up((size_t)f->field[0].count, 16) + POLAR_PAD;
    for (int g, t = tok0; n > 0; n -= g, t += g, out += (ptrdiff_t)g * ld) {
        float a[GROUP * MAX_STRIDE], b[GROUP * MAX_STRIDE], *r = a, *next = b;
        int32_t index[GROUP * MAX_STRIDE];
        g = kv_min(n, GROUP);
        for (int i = 0; i < g; i++)
            L(radii)(s, page + f->norm_at + (size_t)(t + i) * (size_t)s->bytes, page + f->side_at + (size_t)(t + i) * (size_t)s->side_bytes, r + i * stride);
        for (int l = f->levels - 1; l >= 0; l--) {
            const polar_field *const field = &f->field[l];
            for (int i = 0; i < g; i++) L(unpack)(field, page + (size_t)(t + i) * (size_t)f->angle_bytes + f->at[l], index + i * stride);
            for (int i = 0; i < g; i++) L(expand)(r + i * stride, index + i * stride, f->table[l], field->base, field->count, l ? next + i * stride : out + (ptrdiff_t)i * ld);
            float *const swap = r;
            r = next;
            next = swap;
        }
    }
}

static const polar_level L(level) = { L(split), L(scale_row), L(log2), L(exp2), L(steps), L(signs), L(unpack), L(levels), L(expand), L(rows) };
#undef VF
#undef VI
#undef VU
