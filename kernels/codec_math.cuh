// codec_math.cuh -- what the codecs of kernels/codecs share: a warp's sums, transforms and words, with core's bits.
//
// Rows lie in shared memory, element i belongs to lane i % 32.  Every function is reached by all 32 lanes; those that write leave the
// warp in step.  Sums follow kv_dot16: partial sums by index mod 16, each in order, then + 8, + 4, + 2, + 1.
#pragma once
#include <cuda_fp16.h>
#include "bits.h"
#include "codec.cuh"

namespace kelvin {

#define KV_ROW(i, n) (int i = lane; i < (n); i += 32)      // for KV_ROW(i, n): a lane's elements of a row

__device__ __forceinline__ float    bits_float(uint32_t u) { return __uint_as_float(u); }
__device__ __forceinline__ uint32_t float_bits(float f) { return __float_as_uint(f); }

__device__ __forceinline__ float half_float(uint16_t h)
{
#ifdef KV_EMULATE
    return kv_f16_to_f32(h);
#else
    return __half2float(__ushort_as_half(h));
#endif
}
__device__ __forceinline__ uint16_t float_half(float f)
{
#ifdef KV_EMULATE
    return kv_f32_to_f16(f);
#else
    return __half_as_ushort(__float2half_rn(f));
#endif
}
__device__ __forceinline__ float    bf16_float(uint16_t h) { return bits_float((uint32_t)h << 16); }
__device__ __forceinline__ uint16_t float_bf16(float f) { const uint32_t u = float_bits(f); return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16); }

// Numbers in a page may lie at any byte.
__device__ __forceinline__ uint16_t load16(const uint8_t *p)
{
    return (uintptr_t)p & 1 ? (uint16_t)(p[0] | p[1] << 8) : *(const uint16_t *)p;
}
__device__ __forceinline__ void store16(uint8_t *p, uint16_t v)
{
    if ((uintptr_t)p & 1) p[0] = (uint8_t)v, p[1] = (uint8_t)(v >> 8);
    else *(uint16_t *)p = v;
}

__device__ __forceinline__ uint32_t load32(const uint8_t *p) { return (uintptr_t)p & 3 ? load16(p) | (uint32_t)load16(p + 2) << 16 : *(const uint32_t *)p; }
__device__ __forceinline__ void store32(uint8_t *p, uint32_t v)
{
    if ((uintptr_t)p & 3) store16(p, (uint16_t)v), store16(p + 2, (uint16_t)(v >> 16));
    else *(uint32_t *)p = v;
}

// Sets the bits of `mask` in an aligned word to those of `bits`.  Each bit has one warp that writes it, so only the word is contended,
// and what it held before (a token since truncated) is turned by the difference.
__device__ __forceinline__ void put_bits(uint32_t *word, uint32_t bits, uint32_t mask)
{
    const uint32_t turn = (*(volatile uint32_t *)word ^ bits) & mask;
    if (turn) atomicXor(word, turn);
}

// out[i] = f(i), i < n, four of a lane's elements at a time: their loads do not wait for each other's stores.
template <class T, class F> __device__ __forceinline__ void fill(T *out, int n, int lane, F f)
{
    for (int first = lane; first < n; first += 128) {
        T v[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + 32 * k < n) v[k] = f(first + 32 * k);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + 32 * k < n) out[first + 32 * k] = v[k];
    }
}

// sum of f(i) over i < n.
template <class F> __device__ __forceinline__ float sum16(int n, int lane, F f)
{
    float sum = 0;
    for (int i = lane & 15; i < n; i += 16) sum += f(i);
#pragma unroll
    for (int h = 8; h; h /= 2) sum += __shfl_xor_sync(~0u, sum, h);
    return sum;
}
__device__ __forceinline__ float dot16(const float *a, const float *b, int n, int lane)
{
    return sum16(n, lane, [=](int i) { return a[i] * b[i]; });
}

// The largest f(i), i < n, of numbers >= 0.
template <class F> __device__ __forceinline__ float max_of(int n, int lane, F f)
{
    float most = 0;
    for KV_ROW(i, n) most = fmaxf(most, f(i));
#pragma unroll
    for (int h = 16; h; h /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, h));
    return most;
}

// A block of 32 V elements: distances below 32 by shuffles, then pairs of registers.
template <int V> __device__ __forceinline__ void fwht_block(float *x, float scale, int lane)
{
    float v[V];
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = x[lane + 32 * k];
#pragma unroll
    for (int h = 1; h < 32; h *= 2)
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float other = __shfl_xor_sync(~0u, v[k], h);
            v[k] = lane & h ? other - v[k] : v[k] + other;
        }
#pragma unroll
    for (int h = 1; h < V; h *= 2)
#pragma unroll
        for (int k = 0; k < V; k++)
            if (!(k & h)) {
                const float a = v[k], b = v[k + h];
                v[k] = a + b;
                v[k + h] = a - b;
            }
#pragma unroll
    for (int k = 0; k < V; k++) x[lane + 32 * k] = v[k] * scale;
}

// Walsh-Hadamard in place in blocks of powers of two, largest first (kv_fwht_blocks).
__device__ __forceinline__ void fwht(float *x, int n, int lane)
{
    for (int at = 0; at < n;) {
        const int log_size = 31 - __clz(n - at), size = 1 << log_size;
        const float scale = ldexpf(log_size & 1 ? 0.70710678118654752f : 1.0f, -(log_size / 2));      // 1 / sqrt(size), rounded once
        float *b = x + at;
        switch (log_size) {
        case 5: fwht_block<1>(b, scale, lane); break;
        case 6: fwht_block<2>(b, scale, lane); break;
        case 7: fwht_block<4>(b, scale, lane); break;
        case 8: fwht_block<8>(b, scale, lane); break;
        case 9: fwht_block<16>(b, scale, lane); break;
        default:
            for (int h = 1; h < size; h *= 2) {
                if (lane < size / 2) {
                    const int i = 2 * lane - (lane & (h - 1));
                    const float p = b[i], q = b[i + h];
                    b[i] = p + q;
                    b[i + h] = p - q;
                }
                __syncwarp();
            }
            if (lane < size) b[lane] *= scale;
        }
        at += size;
    }
    __syncwarp();
}

}  // namespace kelvin
