// layer_ops.cu -- what lies between the products: residuals and RMS norms, RoPE, gates, soft caps.  The formulas and their constants are core/ops.c's; sums of
// squares are in double as there, in another order.
#include <math.h>
#include "runner.cuh"

namespace kelvin {

enum { ROW_THREADS = 256, FLAT_THREADS = 256, HEADS = 4 /* a block of norm_and_rope: a warp each */ };

static KV_DEVICE float rms_scale(double sum, int n, float eps) { return (float)(1 / sqrt(sum / n + (double)eps)); }

__global__ void residual_norm_kernel(float *x, float *h, int add, const float *post, const float *next, int n, float eps)
{
    __shared__ double part[32];
    x += (size_t)blockIdx.x * n;
    h += (size_t)blockIdx.x * n;
    double sum = 0;
    float  scale = 1;
    if (post) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) sum += (double)h[i] * h[i];
        scale = rms_scale(block_sum(sum, part), n, eps);
    }
    sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = x[i];
        if (add) {
            v += post ? h[i] * scale * post[i] : h[i];
            x[i] = v;
        }
        sum += (double)v * v;
    }
    if (!next) return;
    scale = rms_scale(block_sum(sum, part), n, eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) h[i] = x[i] * scale * next[i];
}

cudaError_t residual_norm(float *x, float *h, bool add, const float *post, const float *next, int n_rows, int n, float eps, cudaStream_t stream)
{
    KV_LAUNCH((residual_norm_kernel), dim3(n_rows), dim3(n < ROW_THREADS ? (n + 31) / 32 * 32 : ROW_THREADS), 0, stream, x, h, add ? 1 : 0, post, next, n, eps);
    return cudaGetLastError();
}

// Angles are position times frequency in double, rounded once as cosine and sine: as the CPU does.
__global__ void rope_tables_kernel(const int *lengths, int n, int row0, const double *freq, int half, int cap_rows, float *cosine, float *sine)
{
    const int row = blockIdx.x, table = blockIdx.y;
    const double pos = (double)(lengths[row / n] + row % n);
    const size_t at = ((size_t)table * cap_rows + row0 + row) * half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const double angle = pos * freq[table * half + i];
        cosine[at + i] = (float)cos(angle);
        sine[at + i] = (float)sin(angle);
    }
}

cudaError_t rope_tables(const int *lengths, int n_seqs, int n, int row0, const double *freq, int n_tables, int half, int cap_rows, float *cosine, float *sine, cudaStream_t stream)
{
    if (half == 0) return cudaSuccess;
    KV_LAUNCH((rope_tables_kernel), dim3(n_seqs * n, n_tables), dim3(half < 64 ? 32 : 64), 0, stream, lengths, n, row0, freq, half, cap_rows, cosine, sine);
    return cudaGetLastError();
}

__global__ void norm_and_rope_kernel(qk_args a, int n_all)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads = a.n_heads + a.n_kv_heads, d = a.head_dim, half = a.half;
    const int item = blockIdx.x * HEADS + warp;
    if (item >= n_all) return;              // whole warps
    const int row = item / heads, head = item % heads;
    const bool is_q = head < a.n_heads;
    const size_t at = (is_q ? (size_t)row * a.n_heads + head : (size_t)row * a.n_kv_heads + (head - a.n_heads)) * d;
    float *x = (is_q ? a.q : a.k) + at, *pre = is_q ? a.q_pre : a.k_pre;
    const float *norm = is_q ? a.q_norm : a.k_norm;
    if (norm) {
        double sum = 0;
        for (int i = lane; i < d; i += 32) sum += (double)x[i] * x[i];
        const float scale = rms_scale(warp_sum(sum), d, a.eps);
        for (int i = lane; i < d; i += 32) x[i] = x[i] * scale * norm[i];
        __syncwarp();
    }
    if (pre) for (int i = lane; i < d; i += 32) pre[at + i] = x[i];
    __syncwarp();
    const float *c = a.cosine + (size_t)row * half, *s = a.sine + (size_t)row * half;
    for (int i = lane; i < half; i += 32) {
        const float u = x[i], v = x[i + half];
        x[i] = u * c[i] - v * s[i];
        x[i + half] = u * s[i] + v * c[i];
    }
}

cudaError_t norm_and_rope(const qk_args &a, int n_rows, cudaStream_t stream)
{
    const int n = n_rows * (a.n_heads + a.n_kv_heads);
    KV_LAUNCH((norm_and_rope_kernel), dim3((n + HEADS - 1) / HEADS), dim3(32 * HEADS), 0, stream, a, n);
    return cudaGetLastError();
}

// core/ops.c's exp_poly: the same operations in the same order.
static KV_DEVICE float exp_poly(float x)
{
    x = x > -87.0f ? x < 87.0f ? x : 87.0f : -87.0f;
    const float k = rintf(x * 1.44269504f);
    const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    float p = 1.3981999507e-3f;             // Cephes expf
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { unsigned u; float f; } two = { (unsigned)((int)k + 127) << 23 };
    return p * two.f;
}

__global__ void gate_kernel(float *g, const float *up, size_t n, int activation)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        const float x = g[i];
        if (activation == 0) g[i] = x / (1.0f + exp_poly(-x)) * up[i];
        else {
            const float u = 0.7978845608f * (x + 0.044715f * x * x * x);        // sqrt(2/pi)
            g[i] = 0.5f * x * (2.0f - 2.0f / (exp_poly(2.0f * u) + 1.0f)) * up[i];
        }
    }
}

static dim3 flat(size_t n)
{
    const size_t blocks = (n + FLAT_THREADS - 1) / FLAT_THREADS;
    return dim3((unsigned)(blocks < 65535 ? blocks : 65535));
}

cudaError_t gate(float *g, const float *up, size_t n, int activation, cudaStream_t stream)
{
    KV_LAUNCH((gate_kernel), flat(n), dim3(FLAT_THREADS), 0, stream, g, up, n, activation);
    return cudaGetLastError();
}

__global__ void soft_cap_kernel(float *x, size_t n, float cap)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) x[i] = cap * tanhf(x[i] / cap);
}

cudaError_t soft_cap(float *x, size_t n, float cap, cudaStream_t stream)
{
    if (cap <= 0) return cudaSuccess;
    KV_LAUNCH((soft_cap_kernel), flat(n), dim3(FLAT_THREADS), 0, stream, x, n, cap);
    return cudaGetLastError();
}

}  // namespace kelvin
