// prefill_launch.cuh -- host side of prefill.cuh: which form, how many parts, the grids.
#pragma once
#include "prefill_wide.cuh"

namespace kelvin {

enum { PREFILL_AUTO, PREFILL_PLAIN, PREFILL_WIDE };

// Hopper, and machine code of sm_90a in this program: compiled for another target the kernel is empty and needs next to no registers.
template <int D> inline bool prefill_has_wide()
{
#ifdef KV_EMULATE
    return false;
#else
    int device = 0, major = 0;
    cudaFuncAttributes f;
    return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9
        && cudaFuncGetAttributes(&f, prefill_wide<D>) == cudaSuccess && f.numRegs > 100;
#endif
}

inline int prefill_images(int n, int group) { return (n * group + 127) / 128 * 2; }       // of queries, of one (seq, kv_head); both forms take whole pairs
template <int D> inline size_t prefill_query_bytes(int n_seqs, int n, int n_heads, int n_kv_heads)
{
    return (size_t)n_seqs * n_kv_heads * prefill_images(n, n_heads / n_kv_heads) * QUERY_ROWS * D * 2;
}

// Parts along the keys, so that few queries still fill the device: none is shorter than 8 units of 64 positions.
inline int prefill_splits(int n_seqs, int n, int group, int n_kv_heads, int positions, int n_sm)
{
    const long long blocks = (long long)n_seqs * n_kv_heads * (prefill_images(n, group) / 2);
    const long long want = 2ll * n_sm / blocks, most = positions / 512;
    const long long splits = want < most ? want : most;
    return blocks >= n_sm || splits < 1 ? 1 : splits > 64 ? 64 : (int)splits;
}

template <int D> inline cudaError_t prefill_launch(const prefill_args &a, int form, cudaStream_t stream)
{
    const int group = a.n_heads / a.n_kv_heads, rows = prefill_images(a.n, group) * QUERY_ROWS;
#ifndef KV_EMULATE
    if (form == PREFILL_WIDE || (form == PREFILL_AUTO && prefill_has_wide<D>())) {
        const cudaError_t e = cudaFuncSetAttribute(prefill_wide<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, wide_form<D>::SHARED);
        if (e != cudaSuccess) return e;
        const dim3 grid(rows / wide_form<D>::ROWS, a.n_kv_heads, a.n_seqs * a.splits);
        KV_LAUNCH((prefill_wide<D>), grid, dim3(wide_form<D>::THREADS), wide_form<D>::SHARED, stream, a);
        return cudaGetLastError();
    }
#endif
    (void)form;
    const cudaError_t e = cudaFuncSetAttribute(prefill_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, prefill_form<D>::SHARED);
    if (e != cudaSuccess) return e;
    const dim3 grid(rows / prefill_form<D>::ROWS, a.n_kv_heads, a.n_seqs * a.splits);
    KV_LAUNCH((prefill_kernel<D>), grid, dim3(128), prefill_form<D>::SHARED, stream, a);
    return cudaGetLastError();
}

template <int D> inline cudaError_t prefill_prepare(const float *q, const prefill_turn &turn, float scale, int n_seqs, int n, int n_heads, int n_kv_heads, uint8_t *images, float *bias, cudaStream_t stream)
{
    const dim3 grid(prefill_images(n, n_heads / n_kv_heads) * QUERY_ROWS / 4, n_kv_heads, n_seqs);
    KV_LAUNCH((prefill_queries<D>), grid, dim3(128), 0, stream, q, turn, scale * 1.4426950408889634f, n, n_heads, n_kv_heads, images, bias);
    return cudaGetLastError();
}

// out null: part 0 becomes the parts joined.
template <int D> inline cudaError_t prefill_join(float *sums, float2 *tops, int n_parts, const prefill_turn &turn, int n_seqs, int n, int n_heads, int n_kv_heads, float *out, cudaStream_t stream)
{
    const long long rows = (long long)n_seqs * n * n_heads;
    KV_LAUNCH((merge_parts<D>), dim3((unsigned)((rows + 7) / 8)), dim3(256), 0, stream, sums, tops, n_parts, turn, rows, n_heads, n_kv_heads, out);
    return cudaGetLastError();
}

template <int D, class ROWS> inline cudaError_t prefill_put(const ROWS &rows, const prefill_turn &turn, uint8_t *images, size_t stride, const int *origin, int first, int n_images, int shift, int keep,
    int n_seqs, int n_kv_heads, cudaStream_t stream)
{
    const dim3 grid(n_images * IMAGE_KEYS<D> / 4, n_kv_heads, n_seqs);
    KV_LAUNCH((prefill_rows<D, ROWS>), grid, dim3(128), 0, stream, rows, turn, images, stride, origin, first, shift, keep);
    return cudaGetLastError();
}

}  // namespace kelvin
