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
TARGET static void L(exp2)(float *x, int n)
{
    for (int i = 0; i < n; i += LANES) {
        const VF in = L(load)(x + i);
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
        L(store)(x + i, (VF)(((VI)p + (e << 23)) & (in >= -126.0f)));
    }
}

TARGET static void L(steps)(const float *x, int n, float lo, float per, int top, int32_t *code)
{
    for (int i = 0; i < n; i += LANES) {
        const VF v = (L(load)(x + i) - lo) * per;
        const VF c = L(pick)(v > (float)top, L(set)((float)top), L(pick)(v > 0.0f, v, L(set)(0)));
        L(store_int)(code + i, L(round)(c));
    }
}

TARGET static void L(line)(const int32_t *code, int n, float lo, float step, float *x)
{
    for (int i = 0; i < n; i += LANES) L(store)(x + i, lo + __builtin_convertvector(L(load_int)(code + i), VF) * step);
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

TARGET static void L(expand)(const float *r, const int32_t *index, const float *table, int n, float *out)
{
#if LANES == 16
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int i = 0; i < n; i += 8) {
        const __m512 at = _mm512_castpd_ps(_mm512_i32gather_pd(_mm256_loadu_si256((const __m256i *)(index + i)), table, 8));
        _mm512_storeu_ps(out + 2 * i, _mm512_mul_ps(_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(r + i))), at));
    }
#elif LANES == 8
    for (int i = 0; i < n; i += 4) {
        const __m256 at = _mm256_castpd_ps(_mm256_i32gather_pd((const double *)table, _mm_loadu_si128((const __m128i *)(index + i)), 8));
        const __m128 four = _mm_loadu_ps(r + i);
        const __m256 twice = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_unpacklo_ps(four, four)), _mm_unpackhi_ps(four, four), 1);
        _mm256_storeu_ps(out + 2 * i, _mm256_mul_ps(twice, at));
    }
#else
    for (int i = 0; i < n; i++) {
        out[2 * i] = r[i] * table[2 * index[i]];
        out[2 * i + 1] = r[i] * table[2 * index[i] + 1];
    }
#endif
}

static const polar_level L(level) = { L(split), L(scale_row), L(log2), L(exp2), L(steps), L(line), L(unpack), L(expand) };
#undef VF
#undef VI
#undef VU
