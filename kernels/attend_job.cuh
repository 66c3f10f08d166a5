// attend_job.cuh -- what the kernels of attend_tile.cu and attend_rows.cu share: a launch's arguments, exact rows four values at a time, and the
// merge of the parts that blocks with a share of the keys leave.
#pragma once
#include "cache_impl.cuh"

namespace kelvin {

struct attend_job {
    dev_layer    a;
    const float *q, *k, *v;
    float       *out;
    float        scale, softcap;
    int          n, d4;                         // new tokens; head_dim in steps of 4
    const float *rows;                          // [n_seqs][n_kv_heads][2][slab][ld] decoded: positions from p0 on; or null
    int          p0, p1, slab, ld, first, last; // of this slab
    float       *state;                         // [n_seqs][n_kv_heads][stacked rows][D + 2]
    float       *parts;                         // [n_seqs][n_kv_heads][row tiles][splits][16][D + 2]
    int         *arrivals, n_splits, stage_bytes;       // of a side's pages of a tile of keys in shared memory; 0: pages are read where they lie
};

// Four values of an exact row from dim i on.
__device__ __forceinline__ float4 exact4(const dev_layer &a, const exact_row &r, int i)
{
    if (a.head_dim % 4) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = i + j < a.head_dim ? exact_value(r, a.dtype, i + j) : 0.0f;
        return make_float4(x[0], x[1], x[2], x[3]);
    }
    if (r.fresh) {
        const float4 x = *(const float4 *)(r.fresh + i);
        return make_float4(round_to(a.dtype, x.x), round_to(a.dtype, x.y), round_to(a.dtype, x.z), round_to(a.dtype, x.w));
    }
    if (a.dtype == 0) return *(const float4 *)((const float *)r.held + i);
    const uint2 x = *(const uint2 *)((const uint16_t *)r.held + i);
    if (a.dtype == 2) return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
    const float2 u = __half22float2(*(const __half2 *)&x.x), v = __half22float2(*(const __half2 *)&x.y);
    return make_float4(u.x, u.y, v.x, v.y);
}

// All threads of a block that left its part: whoever is last for these rows makes their outputs.  Parts are `stride` floats apart, a row
// maximum | sum | head_dim values; arrivals is zero before and after.
__device__ inline void merge_parts(const attend_job &job, int seq, int head, int row0, int n_rows, int splits, const float *part, size_t stride, int *arrivals)
{
    __shared__ int arrived;
    const dev_layer &a = job.a;
    const int group = a.n_heads / a.n_kv_heads, lane = threadIdx.x % 32;
    const size_t held = (size_t)a.head_dim + 2;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(arrivals, 1);
    __syncthreads();
    if (arrived != splits - 1) return;
    __threadfence();
    for (int row = threadIdx.x / 32; row < n_rows; row += blockDim.x / 32) {
        const float *p = part + row * held;
        float best = -INFINITY, total = 0;
        for (int k = lane; k < splits; k += 32) best = fmaxf(best, __ldcg(p + k * stride));
        for (int i = 16; i; i /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
        for (int k = lane; k < splits; k += 32) total = fmaf(expf(__ldcg(p + k * stride) - best), __ldcg(p + k * stride + 1), total);
        for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
        const int y = row0 + row;
        float *out = job.out + (((size_t)seq * job.n + y / group) * a.n_heads + head * group + y % group) * a.head_dim;
        for (int i0 = 0; i0 < a.head_dim; i0 += 128) {
            float o[4] = {};
            for (int k0 = 0; k0 < splits; k0 += 32) {
                const float mine = k0 + lane < splits ? expf(__ldcg(p + (k0 + lane) * stride) - best) : 0.0f;
#pragma unroll 4
                for (int k = 0; k < min(32, splits - k0); k++) {
                    const float w = __shfl_sync(~0u, mine, k);
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        if (i0 + 32 * j + lane < a.head_dim) o[j] = fmaf(w, __ldcg(p + (k0 + k) * stride + 2 + i0 + 32 * j + lane), o[j]);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i0 + 32 * j + lane < a.head_dim) out[i0 + 32 * j + lane] = o[j] / total;
        }
    }
    if (threadIdx.x == 0) *arrivals = 0;
}

}  // namespace kelvin
