/* vecmath_level.h -- vecmath's loops for one SIMD level, included by vecmath.c once per level with
 * L(name): the level's names, TARGET: the function attribute, LANES: floats in a register.
 * Written with the compiler's vectors, so that there is one text for all levels. */
typedef float    L(vf) __attribute__((vector_size(LANES * 4)));
typedef uint32_t L(vu) __attribute__((vector_size(LANES * 4)));
#define VF L(vf)
#define VU L(vu)

TARGET static inline VF L(load)(const float *p) { VF v; memcpy(&v, p, sizeof v); return v; }
TARGET static inline void L(store)(float *p, VF v) { memcpy(p, &v, sizeof v); }
TARGET static inline VF L(load_part)(const float *p, int n, float fill)
{
    float t[LANES];
    for (int i = 0; i < LANES; i++) t[i] = i < n ? p[i] : fill;
    return L(load)(t);
}
TARGET static inline void L(store_part)(float *p, int n, VF v)
{
    float t[LANES];
    L(store)(t, v);
    for (int i = 0; i < n; i++) p[i] = t[i];
}
TARGET static inline VF L(set)(float x) { return x - (VF){ 0 }; }
TARGET static inline float L(hsum)(VF v)
{
    float t[LANES];
    L(store)(t, v);
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
}

/* e^x = 2^n e^r with n = round(x / ln 2): |r| <= ln(2)/2, where seven terms of Taylor's series are within 5.2e-9.
 * ln 2 is split so that n * LN2_HI is exact. */
TARGET static inline VF L(exp)(VF x)
{
    const VF magic = L(set)(12582912.0f);                       /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    const VU hi = (VU)(x > 88.72f), lo = (VU)(x < -87.3f);
    const VF t = x * 1.44269504f + magic, n = t - magic;
    const VF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    VF p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    const VU e = ((VU)t - (VU)magic) << 23;
    const VU y = (VU)p + e;                                     /* p in [0.7, 1.42): adding to the exponent scales by 2^n */
    const VU nan = (VU)(x != x);
    return (VF)((y & ~(lo | hi | nan)) | (hi & 0x7f800000u) | (nan & 0x7fc00000u));
}

TARGET static float L(max)(const float *x, int n)
{
    const float none = -__builtin_inff();
    VF m = L(set)(none);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const VF v = L(load)(x + i);
        const VU gt = (VU)(v > m);
        m = (VF)((gt & (VU)v) | (~gt & (VU)m));
    }
    float t[LANES], best = none;
    L(store)(t, m);
    for (int k = 0; k < LANES; k++) best = t[k] > best ? t[k] : best;
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

TARGET static float L(exp_sum)(float *x, int n, float shift)
{
    VF sum = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const VF e = L(exp)(L(load)(x + i) - shift);
        L(store)(x + i, e);
        sum += e;
    }
    if (i < n) {
        const VF e = L(exp)(L(load_part)(x + i, n - i, -__builtin_inff()) - shift);
        L(store_part)(x + i, n - i, e);
        float t[LANES];
        L(store)(t, e);
        for (int k = n - i; k < LANES; k++) t[k] = 0;           /* a shift of -inf makes the filler NaN */
        sum += L(load)(t);
    }
    return L(hsum)(sum);
}

TARGET static inline VF L(cap)(VF x, float scale, float cap)
{
    return cap * (1.0f - 2.0f / (L(exp)(x * scale * (2.0f / cap)) + 1.0f));
}

TARGET static void L(scale_cap)(float *x, int n, float scale, float cap)
{
    int i = 0;
    if (!(cap > 0)) {
        for (; i + LANES <= n; i += LANES) L(store)(x + i, L(load)(x + i) * scale);
        for (; i < n; i++) x[i] *= scale;
        return;
    }
    for (; i + LANES <= n; i += LANES) L(store)(x + i, L(cap)(L(load)(x + i), scale, cap));
    if (i < n) L(store_part)(x + i, n - i, L(cap)(L(load_part)(x + i, n - i, 0), scale, cap));
}

TARGET static float L(sum)(const float *x, int n)
{
    VF s = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES) s += L(load)(x + i);
    float r = L(hsum)(s);
    for (; i < n; i++) r += x[i];
    return r;
}

TARGET static float L(dot)(const float *a, const float *b, int n)
{
    VF s = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES) s += L(load)(a + i) * L(load)(b + i);
    float r = L(hsum)(s);
    for (; i < n; i++) r += a[i] * b[i];
    return r;
}

TARGET static void L(axpy)(float w, const float *x, float *y, int n)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) L(store)(y + i, L(load)(y + i) + w * L(load)(x + i));
    for (; i < n; i++) y[i] += w * x[i];
}

TARGET static uint32_t L(abs_bits)(const float *x, int64_t n)
{
    VU m = { 0 };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const VU v = (VU)L(load)(x + i) & 0x7fffffffu, gt = (VU)(v > m);
        m = (gt & v) | (~gt & m);
    }
    uint32_t t[LANES], best = 0;
    memcpy(t, &m, sizeof t);
    for (int k = 0; k < LANES; k++) best = t[k] > best ? t[k] : best;
    for (; i < n; i++) {
        const uint32_t v = kv_f32_bits(x[i]) & 0x7fffffffu;
        best = v > best ? v : best;
    }
    return best;
}

TARGET static void L(rows_dot)(const float *q, int n_q, const float *rows, int n_rows, int d, float *scores, int64_t ld)
{
    for (int t = 0; t < n_rows; t++)
        for (int i = 0; i < n_q; i++) scores[i * ld + t] = L(dot)(q + (int64_t)i * d, rows + (int64_t)t * d, d);
}

/* Four registers of an output stay put while the rows go by. */
TARGET static void L(rows_accumulate)(const float *p, int64_t ld, int n_q, const float *rows, int n_rows, int d, float *acc)
{
    for (int i = 0; i < n_q; i++, p += ld, acc += d) {
        int k = 0;
        for (; k + 4 * LANES <= d; k += 4 * LANES) {
            VF a = L(load)(acc + k), b = L(load)(acc + k + LANES), c = L(load)(acc + k + 2 * LANES), e = L(load)(acc + k + 3 * LANES);
            const float *r = rows + k;
            for (int t = 0; t < n_rows; t++, r += d) {
                a += p[t] * L(load)(r);
                b += p[t] * L(load)(r + LANES);
                c += p[t] * L(load)(r + 2 * LANES);
                e += p[t] * L(load)(r + 3 * LANES);
            }
            L(store)(acc + k, a);
            L(store)(acc + k + LANES, b);
            L(store)(acc + k + 2 * LANES, c);
            L(store)(acc + k + 3 * LANES, e);
        }
        if (k < d)
            for (int t = 0; t < n_rows; t++) L(axpy)(p[t], rows + (int64_t)t * d + k, acc + k, d - k);
    }
}
#undef VF
#undef VU
