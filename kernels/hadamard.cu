// hadamard.cu -- sign flip and orthonormal fast Walsh-Hadamard transform of rows.
//
// The same additions in the same order as core/hadamard.c (stages of distance 1, 2, 4, ... n/2, then one multiplication
// by 1/sqrt(n)), so the results are the same bits.  Compiled with --fmad=false like every file that makes codes.
//
//   n <= 1024: a warp takes a row.  Lane l holds elements l*V .. l*V+V-1 (V = n/32, at least 1): distances below V are
//              register pairs, the others are shuffles.  Two 16-byte accesses a lane at n = 256.
//   n >  1024: a block takes a row in shared memory.
//
// Floor: 8 bytes of traffic an element.
#include "kelvin/hadamard.cuh"
#include "kernels.cuh"

enum { WARPS = 8 };

template <int V>
__global__ void hadamard_warp(float *x, const float *sign, int n_rows, int n, float scale)
{
    const int lane = threadIdx.x & 31;
    const long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= n_rows) return;                                  // whole warps leave together
    const bool mine = lane * V < n;                             // rows shorter than a warp leave lanes idle
    float *p = x + row * n + lane * V;
    float v[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        v[i] = mine ? p[i] : 0.0f;
        if (sign && mine) v[i] *= sign[lane * V + i];
    }
    kelvin::butterflies<V>(v, lane, n / V);
#pragma unroll
    for (int i = 0; i < V; i++)
        if (mine) p[i] = v[i] * scale;
}

__global__ void hadamard_block(float *x, const float *sign, int n, float scale)
{
    KV_SHARED_DYNAMIC(memory);
    float *s = (float *)memory;
    float *p = x + (long long)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = sign ? p[i] * sign[i] : p[i];
    for (int h = 1; h < n; h *= 2) {
        __syncthreads();
        for (int k = threadIdx.x; k < n / 2; k += blockDim.x) {
            const int i = 2 * k - (k & (h - 1));
            const float a = s[i], b = s[i + h];
            s[i] = a + b;
            s[i + h] = a - b;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) p[i] = s[i] * scale;
}

cudaError_t kv_cuda_hadamard(float *x, const float *sign, int n_rows, int n, cudaStream_t stream)
{
    const float scale = (float)(1.0 / sqrt((double)n));
    const int blocks = (n_rows + WARPS - 1) / WARPS;
    switch (n <= 32 ? 1 : n / 32) {
    case 1:  KV_LAUNCH(hadamard_warp<1>, blocks, WARPS * 32, 0, stream, x, sign, n_rows, n, scale); break;
    case 2:  KV_LAUNCH(hadamard_warp<2>, blocks, WARPS * 32, 0, stream, x, sign, n_rows, n, scale); break;
    case 4:  KV_LAUNCH(hadamard_warp<4>, blocks, WARPS * 32, 0, stream, x, sign, n_rows, n, scale); break;
    case 8:  KV_LAUNCH(hadamard_warp<8>, blocks, WARPS * 32, 0, stream, x, sign, n_rows, n, scale); break;
    case 16: KV_LAUNCH(hadamard_warp<16>, blocks, WARPS * 32, 0, stream, x, sign, n_rows, n, scale); break;
    case 32: KV_LAUNCH(hadamard_warp<32>, blocks, WARPS * 32, 0, stream, x, sign, n_rows, n, scale); break;
    default: KV_LAUNCH(hadamard_block, n_rows, 512, (size_t)n * sizeof(float), stream, x, sign, n, scale);
    }
    return cudaGetLastError();
}
