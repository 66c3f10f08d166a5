// hadamard.cuh -- the butterflies of a fast Walsh-Hadamard transform over a warp.
#pragma once
#include "launch.cuh"

namespace kelvin {

// A row over a warp's first `lanes` lanes (a power of two), lane l holding elements l*V .. l*V+V-1; the additions in the order of
// core/hadamard.c (distances 1, 2, 4, ...), unscaled.
template <int V> __device__ __forceinline__ void butterflies(float v[V], int lane, int lanes = 32)
{
#pragma unroll
    for (int h = 1; h < V; h *= 2)
#pragma unroll
        for (int i = 0; i < V; i++)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
#pragma unroll
    for (int h = 1; h < lanes; h *= 2)
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float other = __shfl_xor_sync(~0u, v[i], h);
            v[i] = lane & h ? other - v[i] : v[i] + other;
        }
}

}  // namespace kelvin
