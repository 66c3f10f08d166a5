// kernels.cuh -- the launchers, one line each.  All take device pointers and a stream, allocate nothing, do not wait.
#pragma once
#include <cuda_runtime.h>

// x [n_rows][n] in place: x = FWHT(sign * x) / sqrt(n).  n a power of two in 1..4096; sign [n] or null.
cudaError_t kv_cuda_hadamard(float *x, const float *sign, int n_rows, int n, cudaStream_t stream);
