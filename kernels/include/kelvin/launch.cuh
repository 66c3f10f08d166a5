// launch.cuh -- how a kernel is started, so that the same source also builds for the emulator (tests/emulate), which runs blocks on the CPU.
//
//   KV_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...);
//   KV_SHARED_DYNAMIC(name);        the block's dynamic shared memory, uint8_t name[], aligned to 128
//
// Inside kernels only what the emulator has: threadIdx/blockIdx/blockDim/gridDim, __shared__, __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync,
// __any_sync, __all_sync, atomics, __threadfence, __ldg, __ldcg, math.h functions, __half and __nv_bfloat16 conversions, and the functions of
// kelvin/mma.cuh.  Every barrier and shuffle is reached by all threads that it names.
#pragma once
#include <cstdint>
#include <cuda_runtime.h>
#ifndef KV_EMULATE
#define KV_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define KV_SHARED_DYNAMIC(name) extern __shared__ __align__(128) uint8_t name[]
#endif
