// products.cu -- weights times activations, and everything else that reads weights.
//
// One function a type, quads(): what a lane holds of 256 neighbouring weights of a row, two runs of four values each, from 4-byte loads that a warp makes side
// by side.  Dequantizing, embedding and multiplying are written once over it.  The values are core/weights.c's, bit for bit: its products of a scale and a code
// are exact in f32, so one rounding is left.
//
// Up to MATVEC_ROWS rows a product waits for its weights: they are read once, for all rows, as they are stored.  A block is four warps that share the same
// few weight rows and split their length; sums are f32, in an order that depends on nothing but the shape of the weights.  More rows go through cuBLAS, f32
// weights in f32 (never TF32) or, where bf16 was asked for, in bf16 with f32 sums; without cuBLAS, through a plain tiled kernel in f32.
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "rng.h"
#include "runner.cuh"

namespace kelvin {

enum { T_F32 = 0, T_F16 = 1, T_Q4_0 = 2, T_Q4_1 = 3, T_Q5_0 = 6, T_Q5_1 = 7, T_Q8_0 = 8, T_Q2_K = 10, T_Q3_K = 11, T_Q4_K = 12, T_Q5_K = 13, T_Q6_K = 14, T_BF16 = 30 };
enum { STEP = 256 /* weights of a row that a warp takes at once */, WARPS = 4 };

// ---- formats: blocks of ggml, and which of their bytes go to `head`

struct block_form { int type, block, bytes, head_at, head; };
static const block_form forms[] = {
    { T_F32, 1, 4, 0, 0 },      { T_F16, 1, 2, 0, 0 },        { T_BF16, 1, 2, 0, 0 },
    { T_Q4_0, 32, 18, 0, 2 },   { T_Q4_1, 32, 20, 0, 4 },     { T_Q5_0, 32, 22, 0, 6 },     { T_Q5_1, 32, 24, 0, 8 },      { T_Q8_0, 32, 34, 0, 2 },
    { T_Q2_K, 256, 84, 0, 0 },  { T_Q3_K, 256, 110, 108, 2 }, { T_Q4_K, 256, 144, 0, 16 },  { T_Q5_K, 256, 176, 0, 16 },   { T_Q6_K, 256, 210, 192, 18 },
};

static const block_form *form_of(int type)
{
    for (const block_form &f : forms) if (f.type == type) return &f;
    return nullptr;
}

size_t weight_stored_bytes(int type, int64_t n_in, int64_t n_out, size_t *payload_row, size_t *head_row)
{
    const block_form *f = form_of(type);
    if (!f || n_in < 1 || n_in % f->block || n_in % 4) return 0;      // a run is four values
    *payload_row = (size_t)(n_in / f->block) * (size_t)(f->bytes - f->head);
    *head_row = (size_t)(n_in / f->block) * (size_t)f->head;
    return (*payload_row + *head_row) * (size_t)n_out;
}

struct quad { float v[4]; };

static KV_DEVICE unsigned word(const uint8_t *p) { return *(const unsigned *)p; }
static KV_DEVICE float half_at(const uint8_t *p) { return __half2float(*(const __half *)p); }
static KV_DEVICE float half_of(unsigned bits) { union { unsigned short u; __half h; } x; x.u = (unsigned short)bits; return __half2float(x.h); }
static KV_DEVICE float bf16_of(unsigned bits) { union { unsigned u; float f; } x; x.u = bits << 16; return x.f; }

// Where a lane's two runs begin within the 256: types with one value to a unit of storage.
struct runs_plain { static KV_DEVICE int first(int lane) { return 4 * lane; } static KV_DEVICE int second(int lane) { return 128 + 4 * lane; } };
// Halves of a block of 32 in low and high nibbles.
struct runs_32 { static KV_DEVICE int first(int lane) { return 32 * (lane / 4) + 4 * (lane % 4); } static KV_DEVICE int second(int lane) { return first(lane) + 16; } };
// Chunks of 32 in low and high nibbles of 32 bytes.
struct runs_64 { static KV_DEVICE int first(int lane) { return 64 * (lane / 8) + 4 * (lane % 8); } static KV_DEVICE int second(int lane) { return first(lane) + 32; } };

struct w_f32 : runs_plain {
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *, int step, int lane, bool two, quad &a, quad &b)
    {
        const float4 x = *(const float4 *)(p + 4 * (STEP * step + first(lane)));
        a = { x.x, x.y, x.z, x.w };
        if (!two) return;
        const float4 y = *(const float4 *)(p + 4 * (STEP * step + second(lane)));
        b = { y.x, y.y, y.z, y.w };
    }
};
template <bool BF16> struct w_16 : runs_plain {
    static KV_DEVICE float value(unsigned bits) { return BF16 ? bf16_of(bits) : half_of(bits); }
    static KV_DEVICE quad run(const uint8_t *p) { const uint2 x = *(const uint2 *)p; return { value(x.x & 0xffff), value(x.x >> 16), value(x.y & 0xffff), value(x.y >> 16) }; }
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *, int step, int lane, bool two, quad &a, quad &b)
    {
        a = run(p + 2 * (STEP * step + runs_plain::first(lane)));
        if (two) b = run(p + 2 * (STEP * step + runs_plain::second(lane)));
    }
};
struct w_q8_0 : runs_plain {
    static KV_DEVICE quad run(const uint8_t *p, const uint8_t *h, int i)
    {
        const unsigned w = word(p + i);
        const float d = half_at(h + 2 * (i / 32));
        quad q;
        for (int k = 0; k < 4; k++) q.v[k] = d * (float)(int8_t)(w >> 8 * k);
        return q;
    }
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *h, int step, int lane, bool two, quad &a, quad &b)
    {
        a = run(p, h, STEP * step + first(lane));
        if (two) b = run(p, h, STEP * step + second(lane));
    }
};
// value = d code + b; HIGH: bit i of a word after the scales is bit 4 of element i.
template <int HEAD, bool MIN, bool HIGH, int OFFSET> struct w_nibbles : runs_32 {
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *h, int step, int lane, bool, quad &a, quad &b)
    {
        const int at = 8 * step + lane / 4, i = 4 * (lane % 4);
        const uint8_t *const head = h + HEAD * at;
        const unsigned w = word(p + 16 * at + i);
        const float d = half_at(head), m = MIN ? half_at(head + 2) : -OFFSET * d;
        unsigned high = 0;
        if (HIGH) {
            const unsigned short *const u = (const unsigned short *)(head + (MIN ? 4 : 2));
            high = u[0] | (unsigned)u[1] << 16;
        }
        for (int k = 0; k < 4; k++) {
            a.v[k] = d * (float)((w >> 8 * k & 15) | (high >> (i + k) & 1) << 4) + m;
            b.v[k] = d * (float)((w >> (8 * k + 4) & 15) | (high >> (i + k + 16) & 1) << 4) + m;
        }
    }
};
template <bool HIGH> struct w_q45_k : runs_64 {
    // Scale and minimum j of 8: 0..3 whole in bytes j and 4 + j; 4..7 four low bits in byte 4 + j, two high ones atop bytes j - 4 and j.
    static KV_DEVICE void scales(const uint8_t *sc, int j, int *scale, int *min)
    {
        *scale = j < 4 ? sc[j] & 63 : (sc[j + 4] & 15) | sc[j - 4] >> 6 << 4;
        *min   = j < 4 ? sc[j + 4] & 63 : sc[j + 4] >> 4 | sc[j] >> 6 << 4;
    }
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *h, int step, int lane, bool, quad &a, quad &b)
    {
        const uint8_t *const head = h + 16 * step, *const block = p + (HIGH ? 160 : 128) * step;
        const int j = lane / 8, i = 4 * (lane % 8);
        const unsigned w = word(block + (HIGH ? 32 : 0) + 32 * j + i), high = HIGH ? word(block + i) >> 2 * j : 0;
        const float d = half_at(head), dmin = half_at(head + 2);
        int s0, m0, s1, m1;
        scales(head + 4, 2 * j, &s0, &m0);
        scales(head + 4, 2 * j + 1, &s1, &m1);
        const float d0 = d * (float)s0, d1 = d * (float)s1, b0 = dmin * (float)m0, b1 = dmin * (float)m1;
        for (int k = 0; k < 4; k++) {
            a.v[k] = d0 * (float)((w >> 8 * k & 15) | (high >> 8 * k & 1) << 4) - b0;
            b.v[k] = d1 * (float)((w >> (8 * k + 4) & 15) | (high >> (8 * k + 1) & 1) << 4) - b1;
        }
    }
};
struct w_q6_k {
    static KV_DEVICE int first(int lane) { return 128 * (lane / 16) + 4 * (lane % 16); }
    static KV_DEVICE int second(int lane) { return first(lane) + 64; }
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *h, int step, int lane, bool, quad &a, quad &b)
    {
        const uint8_t *const block = p + 192 * step, *const head = h + 18 * step;
        const int half = lane / 16, o = 4 * (lane % 16), shift = o / 32 * 2;
        const unsigned low = word(block + 64 * half + o), high = word(block + 128 + 32 * half + o % 32);
        const float d = half_at(head + 16), d0 = d * (float)(int8_t)head[first(lane) / 16], d1 = d * (float)(int8_t)head[second(lane) / 16];
        for (int k = 0; k < 4; k++) {
            a.v[k] = d0 * (float)((int)((low >> 8 * k & 15) | (high >> (8 * k + shift) & 3) << 4) - 32);
            b.v[k] = d1 * (float)((int)((low >> (8 * k + 4) & 15) | (high >> (8 * k + shift + 4) & 3) << 4) - 32);
        }
    }
};
struct runs_2bit {
    static KV_DEVICE int first(int lane) { return 128 * (lane % 16 / 8) + 64 * (lane / 16) + 4 * (lane % 8); }
    static KV_DEVICE int second(int lane) { return first(lane) + 32; }
};
struct w_q2_k : runs_2bit {
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *, int step, int lane, bool, quad &a, quad &b)
    {
        const uint8_t *const block = p + 84 * step;
        const unsigned w = word(block + 16 + 4 * (lane % 16)) >> 4 * (lane / 16);
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        const int sa = block[first(lane) / 16], sb = block[second(lane) / 16];
        for (int k = 0; k < 4; k++) {
            a.v[k] = d * (float)(sa & 15) * (float)(w >> 8 * k & 3) - dmin * (float)(sa >> 4);
            b.v[k] = d * (float)(sb & 15) * (float)(w >> (8 * k + 2) & 3) - dmin * (float)(sb >> 4);
        }
    }
};
struct w_q3_k : runs_2bit {
    static KV_DEVICE int scale(const uint8_t *sc, int j) { return (sc[j % 8] >> j / 8 * 4 & 15) | (sc[8 + j % 4] >> j / 4 * 2 & 3) << 4; }
    static KV_DEVICE void quads(const uint8_t *p, const uint8_t *h, int step, int lane, bool, quad &a, quad &b)
    {
        const uint8_t *const block = p + 108 * step;
        const unsigned w = word(block + 32 + 4 * (lane % 16)) >> 4 * (lane / 16), high = word(block + 4 * (lane % 8)) >> first(lane) / 32;
        const float d = half_at(h + 2 * step), da = d * (float)(scale(block + 96, first(lane) / 16) - 32), db = d * (float)(scale(block + 96, second(lane) / 16) - 32);
        for (int k = 0; k < 4; k++) {
            a.v[k] = da * (float)((int)((w >> 8 * k & 3) | (high >> 8 * k & 1) << 2) - 4);
            b.v[k] = db * (float)((int)((w >> (8 * k + 2) & 3) | (high >> (8 * k + 1) & 1) << 2) - 4);
        }
    }
};

// Calls fn<type's struct>(arguments...).
#define BY_TYPE(type, fn, ...) do { switch (type) {                                             \
    case T_F32:  fn<w_f32>(__VA_ARGS__); break;                                                 \
    case T_F16:  fn<w_16<false>>(__VA_ARGS__); break;                                           \
    case T_BF16: fn<w_16<true>>(__VA_ARGS__); break;                                            \
    case T_Q4_0: fn<w_nibbles<2, false, false, 8>>(__VA_ARGS__); break;                         \
    case T_Q4_1: fn<w_nibbles<4, true, false, 0>>(__VA_ARGS__); break;                          \
    case T_Q5_0: fn<w_nibbles<6, false, true, 16>>(__VA_ARGS__); break;                         \
    case T_Q5_1: fn<w_nibbles<8, true, true, 0>>(__VA_ARGS__); break;                           \
    case T_Q8_0: fn<w_q8_0>(__VA_ARGS__); break;                                                \
    case T_Q2_K: fn<w_q2_k>(__VA_ARGS__); break;                                                \
    case T_Q3_K: fn<w_q3_k>(__VA_ARGS__); break;                                                \
    case T_Q4_K: fn<w_q45_k<false>>(__VA_ARGS__); break;                                        \
    case T_Q5_K: fn<w_q45_k<true>>(__VA_ARGS__); break;                                         \
    default:     fn<w_q6_k>(__VA_ARGS__); } } while (0)

// ---- into their place

__global__ void peel_kernel(const uint8_t *stored, size_t row_bytes, int blocks, int bytes, int head_at, int head_bytes, uint8_t *payload, size_t payload_row, uint8_t *head, size_t head_row)
{
    const uint8_t *src = stored + (size_t)blockIdx.x * row_bytes;
    uint8_t *to = payload + (size_t)blockIdx.x * payload_row, *top = head + (size_t)blockIdx.x * head_row;
    const int rest = bytes - head_bytes;
    for (int i = threadIdx.x; i < blocks * bytes; i += blockDim.x) {
        const int b = i / bytes, k = i % bytes;
        if (k >= head_at && k < head_at + head_bytes) top[b * head_bytes + k - head_at] = src[i];
        else to[b * rest + (k < head_at ? k : k - head_bytes)] = src[i];
    }
}

cudaError_t weight_peel(const dev_weight &w, const uint8_t *stored, size_t row_bytes, int row0, int n, cudaStream_t stream)
{
    const block_form *f = form_of(w.type);
    KV_LAUNCH((peel_kernel), dim3(n), dim3(128), 0, stream, stored, row_bytes, w.n_in / f->block, f->bytes, f->head_at, f->head,
              (uint8_t *)w.payload + (size_t)row0 * w.payload_row, w.payload_row, (uint8_t *)w.head + (size_t)row0 * w.head_row, w.head_row);
    return cudaGetLastError();
}

static KV_DEVICE void put(float *dst, const quad &q) { *(float4 *)dst = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]); }
static KV_DEVICE void put(uint16_t *dst, const quad &q)
{
    for (int k = 0; k < 4; k++) {
        union { __nv_bfloat16 b; uint16_t u; } x;
        x.b = __float2bfloat16(q.v[k]);
        dst[k] = x.u;
    }
}

// Rows row0 .. of w, times scale, to dst [n][n_in]; with tokens, row r is row tokens[r % n_tokens].  A warp a step of 256.
template <class W, class OUT> __global__ void rows_kernel(dev_weight w, int row0, const int *tokens, int n_tokens, float scale, OUT *dst)
{
    const int lane = threadIdx.x % 32, row = tokens ? tokens[(int)blockIdx.x % n_tokens] : row0 + (int)blockIdx.x;
    const uint8_t *p = w.payload + (size_t)row * w.payload_row, *h = w.head + (size_t)row * w.head_row;
    OUT *out = dst + (size_t)blockIdx.x * w.n_in;
    for (int step = threadIdx.x / 32; step * STEP < w.n_in; step += blockDim.x / 32) {
        const int i = STEP * step + W::first(lane), j = STEP * step + W::second(lane);
        if (i >= w.n_in) continue;
        quad a, b = {};
        W::quads(p, h, step, lane, j < w.n_in, a, b);
        for (int k = 0; k < 4; k++) {
            a.v[k] *= scale;
            b.v[k] *= scale;
        }
        put(out + i, a);
        if (j < w.n_in) put(out + j, b);
    }
}

static int row_threads(int n_in) { return n_in > 3 * STEP ? 128 : n_in > STEP ? 64 : 32; }
template <class W> static void launch_rows_f32(const dev_weight &w, int row0, int n, const int *tokens, int n_tokens, float scale, float *dst, cudaStream_t stream)
{
    KV_LAUNCH((rows_kernel<W, float>), dim3(n), dim3(row_threads(w.n_in)), 0, stream, w, row0, tokens, n_tokens, scale, dst);
}
template <class W> static void launch_rows_bf16(const dev_weight &w, int row0, int n, uint16_t *dst, cudaStream_t stream)
{
    KV_LAUNCH((rows_kernel<W, uint16_t>), dim3(n), dim3(row_threads(w.n_in)), 0, stream, w, row0, (const int *)nullptr, 1, 1.0f, dst);
}

cudaError_t embed_rows(const dev_weight &w, const int *tokens, int n, int n_tokens, float scale, float *x, cudaStream_t stream)
{
    BY_TYPE(w.type, launch_rows_f32, w, 0, n, tokens, n_tokens, scale, x, stream);
    return cudaGetLastError();
}

cudaError_t weight_to_bf16(const dev_weight &src, int row0, int n, uint16_t *dst, cudaStream_t stream)
{
    BY_TYPE(src.type, launch_rows_bf16, src, row0, n, dst, stream);
    return cudaGetLastError();
}

// Uniform in +-sqrt(3 / n_in), which has variance 1 / n_in.
__global__ void random_kernel(uint16_t *dst, size_t n, float range, unsigned seed)
{
    for (size_t b = (size_t)blockIdx.x * blockDim.x + threadIdx.x; 4 * b < n; b += (size_t)gridDim.x * blockDim.x) {
        const uint32_t counter[4] = { (uint32_t)b, (uint32_t)(b >> 32), 0, 0 }, key[2] = { seed, 0 };
        uint32_t x[4];
        kv_philox(counter, key, x);
        quad q;
        for (int k = 0; k < 4; k++) q.v[k] = ((float)x[k] * 0x1p-31f - 1) * range;
        put(dst + 4 * b, q);
    }
}

cudaError_t weight_random(uint16_t *dst, int n_in, int n_out, unsigned seed, cudaStream_t stream)
{
    KV_LAUNCH((random_kernel), dim3(1024), dim3(256), 0, stream, dst, (size_t)n_in * (size_t)n_out, sqrtf(3.0f / (float)n_in), seed);
    return cudaGetLastError();
}

// ---- few rows: matvec

struct matvec_args { dev_weight w[MAX_PRODUCTS]; const float *bias[MAX_PRODUCTS]; float *y[MAX_PRODUCTS]; int first_block[MAX_PRODUCTS], n_products, n_rows, n_in; const float *x; };

// R: rows of x at most; NR: weight rows of a block, whose activations they share.
template <class W, int R, int NR> __global__ void __launch_bounds__(32 * WARPS) matvec_kernel(matvec_args a)
{
    __shared__ float part[WARPS][NR * R];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int which = 0;
    while (which + 1 < a.n_products && (int)blockIdx.x >= a.first_block[which + 1]) which++;
    const dev_weight w = a.w[which];
    const int row0 = ((int)blockIdx.x - a.first_block[which]) * NR, n_in = a.n_in;
    float acc[NR][R] = {};
    for (int step = warp; step * STEP < n_in; step += WARPS) {
        const int i = STEP * step + W::first(lane), j = STEP * step + W::second(lane);
        const bool one = i < n_in, two = j < n_in;
        quad q[NR][2] = {};
#pragma unroll
        for (int r = 0; r < NR; r++) {
            const int row = row0 + r < w.n_out ? row0 + r : w.n_out - 1;
            if (one) W::quads(w.payload + (size_t)row * w.payload_row, w.head + (size_t)row * w.head_row, step, lane, two, q[r][0], q[r][1]);
        }
#pragma unroll
        for (int k = 0; k < R; k++) {
            if (k >= a.n_rows) break;
            const float *const x = a.x + (size_t)k * n_in;
            float4 u = make_float4(0, 0, 0, 0), v = u;
            if (one) u = *(const float4 *)(x + i);
            if (two) v = *(const float4 *)(x + j);
#pragma unroll
            for (int r = 0; r < NR; r++) {
                float s = acc[r][k];
                s = fmaf(q[r][0].v[0], u.x, s); s = fmaf(q[r][0].v[1], u.y, s); s = fmaf(q[r][0].v[2], u.z, s); s = fmaf(q[r][0].v[3], u.w, s);
                s = fmaf(q[r][1].v[0], v.x, s); s = fmaf(q[r][1].v[1], v.y, s); s = fmaf(q[r][1].v[2], v.z, s); s = fmaf(q[r][1].v[3], v.w, s);
                acc[r][k] = s;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < NR; r++)
#pragma unroll
        for (int k = 0; k < R; k++) {
            float s = acc[r][k];
            for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(0xffffffffu, s, m);
            if (lane == 0) part[warp][r * R + k] = s;
        }
    __syncthreads();
    for (int t = threadIdx.x; t < NR * R; t += blockDim.x) {
        const int r = t / R, k = t % R, row = row0 + r;
        if (row >= w.n_out || k >= a.n_rows) continue;
        float s = part[0][t];
        for (int v = 1; v < WARPS; v++) s += part[v][t];
        a.y[which][(size_t)k * w.n_out + row] = a.bias[which] ? s + a.bias[which][row] : s;
    }
}

template <class W, int R, int NR> static void launch_one_matvec(matvec_args &a, cudaStream_t stream)
{
    int blocks = 0;
    for (int i = 0; i < a.n_products; i++) {
        a.first_block[i] = blocks;
        blocks += (a.w[i].n_out + NR - 1) / NR;
    }
    KV_LAUNCH((matvec_kernel<W, R, NR>), dim3(blocks), dim3(32 * WARPS), 0, stream, a);
}

template <class W> static void launch_matvec(matvec_args &a, cudaStream_t stream)
{
    if (a.n_rows == 1) launch_one_matvec<W, 1, 4>(a, stream);
    else if (a.n_rows == 2) launch_one_matvec<W, 2, 4>(a, stream);
    else if (a.n_rows <= 4) launch_one_matvec<W, 4, 4>(a, stream);
    else launch_one_matvec<W, 8, 4>(a, stream);
}

// ---- more rows: cuBLAS, whose few names are declared here so that the plugin builds and loads without it

typedef int (*gemm_s)(void *, int, int, int, int, int, const float *, const float *, int, const float *, int, const float *, float *, int);
typedef int (*gemm_ex)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *, void *, int, int, int, int);

struct dev_blas {
    void       *so, *handle, *space;
    gemm_s      sgemm;
    gemm_ex     gemm;
    int       (*destroy)(void *);
    char        name[64];
};

enum { OP_N = 0, OP_T = 1, R_32F = 0, R_16BF = 14, COMPUTE_32F = 68, ALGO_DEFAULT = -1, BLAS_SPACE = 32 << 20 };

void blas_close(dev_blas *b)
{
    if (!b) return;
    if (b->handle) b->destroy(b->handle);
    if (b->space) cudaFree(b->space);
    free(b);                                // the library stays loaded: its state does not survive being unloaded
}

const char *blas_name(const dev_blas *b) { return b ? b->name : "tiled f32"; }

int blas_open(dev_blas **out, cudaStream_t stream, char *err, size_t cap)
{
    *out = nullptr;
#ifndef KV_EMULATE
    static const char *const names[] = { "libcublas.so.13", "/usr/local/cuda/lib64/libcublas.so.13", "libcublas.so.12", "/usr/local/cuda/lib64/libcublas.so.12" };
    void *so = nullptr;
    const char *name = "";
    for (const char *n : names) {
        if ((so = dlopen(n, RTLD_NOW | RTLD_LOCAL))) {
            name = n;
            break;
        }
    }
    if (!so) return 0;
    dev_blas *b = (dev_blas *)calloc(1, sizeof *b);
    if (!b) return E_NOMEM;
    int (*create)(void **) = (int (*)(void **))dlsym(so, "cublasCreate_v2");
    int (*set_stream)(void *, cudaStream_t) = (int (*)(void *, cudaStream_t))dlsym(so, "cublasSetStream_v2");
    int (*set_space)(void *, void *, size_t) = (int (*)(void *, void *, size_t))dlsym(so, "cublasSetWorkspace_v2");
    b->so = so;
    b->sgemm = (gemm_s)dlsym(so, "cublasSgemm_v2");
    b->gemm = (gemm_ex)dlsym(so, "cublasGemmEx");
    b->destroy = (int (*)(void *))dlsym(so, "cublasDestroy_v2");
    snprintf(b->name, sizeof b->name, "%s", strrchr(name, '/') ? strrchr(name, '/') + 1 : name);
    int status = create && set_stream && set_space && b->sgemm && b->gemm && b->destroy ? 0 : -1;
    if (status == 0) status = create(&b->handle);
    // A workspace of our own: the library would otherwise allocate one while a graph is being captured.
    if (status == 0 && cudaMalloc(&b->space, BLAS_SPACE) != cudaSuccess) status = -2;
    if (status == 0) status = set_stream(b->handle, stream);
    if (status == 0) status = set_space(b->handle, b->space, BLAS_SPACE);
    if (status != 0) {
        snprintf(err, cap, "cuBLAS: %s was found, but does not start (status %d)", name, status);
        cudaGetLastError();
        blas_close(b);
        return E_DEVICE;
    }
    *out = b;
#else
    (void)stream, (void)err, (void)cap;
#endif
    return 0;
}

// ---- more rows: without it.  y[m][0..n) (ldy apart) = x [m][k] w[n][k]^T, f32, summed in the order of k.

enum { TILE = 64, DEPTH = 16, THREAD = 4 };

__global__ void __launch_bounds__(256) tiled_kernel(const float *x, const float *w, float *y, int m, int n, int k, int ldy)
{
    __shared__ float xs[DEPTH][TILE + 4], ws[DEPTH][TILE + 4];
    const int t = threadIdx.x, tx = t % 16, ty = t / 16, m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    float acc[THREAD][THREAD] = {};
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
        for (int i = t; i < TILE * DEPTH; i += 256) {
            const int r = i / DEPTH, c = i % DEPTH;
            xs[c][r] = m0 + r < m && k0 + c < k ? x[(size_t)(m0 + r) * k + k0 + c] : 0;
            ws[c][r] = n0 + r < n && k0 + c < k ? w[(size_t)(n0 + r) * k + k0 + c] : 0;
        }
        __syncthreads();
        for (int c = 0; c < DEPTH; c++)
            for (int i = 0; i < THREAD; i++)
                for (int j = 0; j < THREAD; j++) acc[i][j] = fmaf(xs[c][ty * THREAD + i], ws[c][tx * THREAD + j], acc[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < THREAD; i++)
        for (int j = 0; j < THREAD; j++) {
            const int r = m0 + ty * THREAD + i, c = n0 + tx * THREAD + j;
            if (r < m && c < n) y[(size_t)r * ldy + c] = acc[i][j];
        }
}

__global__ void add_bias_kernel(float *y, const float *bias, int n)
{
    float *row = y + (size_t)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] += bias[i];
}

__global__ void to_bf16_kernel(const float *x, uint16_t *y, size_t n4)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n4; i += (size_t)gridDim.x * blockDim.x) {
        const float4 v = *(const float4 *)(x + 4 * i);
        put(y + 4 * i, quad{ { v.x, v.y, v.z, v.w } });
    }
}

static cudaError_t blas_error(int status) { return status == 0 ? cudaSuccess : cudaErrorUnknown; }

static cudaError_t many_rows(const product_space &s, const dev_product &p, const float *x, int groups, int rows, cudaStream_t stream)
{
    const dev_weight &w = *p.w;
    const float one = 1, zero = 0;
    const size_t n_in = (size_t)w.n_in;
    if (w.type == T_BF16 && s.blas && s.act) {       // activations were made bf16 by product()
        for (int g = 0; g < groups; g++) {
            const cudaError_t e = blas_error(s.blas->gemm(s.blas->handle, OP_T, OP_N, w.n_out, rows, w.n_in, &one, w.payload, R_16BF, w.n_in, s.act + (size_t)g * rows * n_in, R_16BF, w.n_in,
                                                          &zero, p.y + (size_t)g * rows * w.n_out, R_32F, w.n_out, COMPUTE_32F, ALGO_DEFAULT));
            if (e != cudaSuccess) return e;
        }
    } else {
        const int slice = (int)(s.weights_cap / n_in);
        for (int row0 = 0; row0 < w.n_out; row0 += slice) {
            const int n = w.n_out - row0 < slice ? w.n_out - row0 : slice;
            const float *f = s.weights;
            if (w.type == T_F32) f = (const float *)(w.payload + (size_t)row0 * w.payload_row);
            else BY_TYPE(w.type, launch_rows_f32, w, row0, n, (const int *)nullptr, 1, 1.0f, s.weights, stream);
            for (int g = 0; g < groups; g++) {
                const float *in = x + (size_t)g * rows * n_in;
                float *out = p.y + (size_t)g * rows * w.n_out + row0;
                if (s.blas) {
                    const cudaError_t e = blas_error(s.blas->sgemm(s.blas->handle, OP_T, OP_N, n, rows, w.n_in, &one, f, w.n_in, in, w.n_in, &zero, out, w.n_out));
                    if (e != cudaSuccess) return e;
                } else KV_LAUNCH((tiled_kernel), dim3((n + TILE - 1) / TILE, (rows + TILE - 1) / TILE), dim3(256), 0, stream, in, f, out, rows, n, w.n_in, w.n_out);
            }
        }
    }
    if (p.bias) KV_LAUNCH((add_bias_kernel), dim3(groups * rows), dim3(128), 0, stream, p.y, p.bias, w.n_out);
    return cudaGetLastError();
}

cudaError_t product(const product_space &s, const dev_product *p, int n_products, const float *x, int groups, int rows, cudaStream_t stream)
{
    const int n_in = p[0].w->n_in;
    if (rows <= (s.act && s.blas ? BF16_ROWS : MATVEC_ROWS)) {
        // Products of one type go in one launch.
        bool done[MAX_PRODUCTS] = {};
        for (int i = 0; i < n_products; i++) {
            if (done[i]) continue;
            const dev_product *of[MAX_PRODUCTS];
            int n = 0;
            for (int j = i; j < n_products; j++)
                if (p[j].w->type == p[i].w->type) {
                    done[j] = true;
                    of[n++] = &p[j];
                }
            for (int r = 0; r < groups * rows; r += MATVEC_ROWS) {
                matvec_args a = {};
                a.n_products = n;
                a.n_rows = groups * rows - r < MATVEC_ROWS ? groups * rows - r : MATVEC_ROWS;
                a.n_in = n_in;
                a.x = x + (size_t)r * n_in;
                for (int j = 0; j < n; j++) {
                    a.w[j] = *of[j]->w;
                    a.bias[j] = of[j]->bias;
                    a.y[j] = of[j]->y + (size_t)r * a.w[j].n_out;
                }
                BY_TYPE(p[i].w->type, launch_matvec, a, stream);
            }
        }
        return cudaGetLastError();
    }
    bool bf16 = false;
    for (int i = 0; i < n_products; i++) bf16 = bf16 || (s.blas && s.act && p[i].w->type == T_BF16);
    if (bf16) {
        if ((size_t)groups * rows * n_in > s.act_cap) return cudaErrorInvalidValue;
        const size_t n4 = (size_t)groups * rows * n_in / 4;
        KV_LAUNCH((to_bf16_kernel), dim3((unsigned)(n4 / 256 + 1 < 65535 ? n4 / 256 + 1 : 65535)), dim3(256), 0, stream, x, s.act, n4);
    }
    for (int i = 0; i < n_products; i++) {
        const cudaError_t e = many_rows(s, p[i], x, groups, rows, stream);
        if (e != cudaSuccess) return e;
    }
    return cudaGetLastError();
}

}  // namespace kelvin
