/* ops.c -- the elementwise pieces of the forward pass: plain loops, compiled once per SIMD level.
 *
 * The bodies are ordinary C whose operation order is fixed (no contraction), so every level gives the same bits. */
#include <math.h>
#include "model.h"
#include "ops.h"

#define INLINE static inline __attribute__((always_inline))

/* e^x by 2^k * p(r), r in [-ln2/2, ln2/2], degree 6: relative error 2e-7; x is clamped to +-87, NaN to -87: k must be a number. */
INLINE float exp_poly(float x)
{
    x = x > -87.0f ? x < 87.0f ? x : 87.0f : -87.0f;
    const float k = __builtin_rintf(x * 1.44269504f);
    const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;             /* ln 2 in two parts */
    float p = 1.3981999507e-3f;                                               /* Cephes expf */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * kv_bits_f32((uint32_t)((int32_t)k + 127) << 23);
}

INLINE void silu_body(float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exp_poly(-gate[i])) * up[i];
}

INLINE void gelu_body(float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++) {
        const float x = gate[i], u = 0.7978845608f * (x + 0.044715f * x * x * x);   /* sqrt(2/pi) */
        gate[i] = 0.5f * x * (2.0f - 2.0f / (exp_poly(2.0f * u) + 1.0f)) * up[i];     /* 1 + tanh u */
    }
}

INLINE void rmsnorm_body(float *out, const float *x, const float *weight, int n, float eps)
{
    double part[16] = { 0 };
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) part[k] += (double)x[i + k] * x[i + k];
    for (; i < n; i++) part[i % 16] += (double)x[i] * x[i];
    double sum = 0;
    for (int k = 0; k < 16; k++) sum += part[k];
    const float scale = (float)(1 / sqrt(sum / n + eps));
    for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

#define LEVELS(name, params, args)                                      \
    static void name##_c params { name##_body args; }                   \
    KV_AVX2 static void name##_avx2 params { name##_body args; }        \
    KV_AVX512 static void name##_avx512 params { name##_body args; }
LEVELS(silu, (float *gate, const float *up, int n), (gate, up, n))
LEVELS(gelu, (float *gate, const float *up, int n), (gate, up, n))
LEVELS(rmsnorm, (float *out, const float *x, const float *weight, int n, float eps), (out, x, weight, n, eps))

#define CALL(name, ...) do { switch (kv_cpu_simd()) {                   \
    case KV_SIMD_AVX512: name##_avx512(__VA_ARGS__); break;             \
    case KV_SIMD_AVX2:   name##_avx2(__VA_ARGS__); break;               \
    default:             name##_c(__VA_ARGS__); } } while (0)

void kv_rmsnorm(float *out, const float *x, const float *weight, int n, float eps) { CALL(rmsnorm, out, x, weight, n, eps); }

void kv_add_to(float *x, const float *y, int n)
{
    for (int i = 0; i < n; i++) x[i] += y[i];
}

void kv_gate(float *gate, const float *up, int n, int activation)
{
    if (activation == KV_ACT_SILU) CALL(silu, gate, up, n);
    else CALL(gelu, gate, up, n);
}
