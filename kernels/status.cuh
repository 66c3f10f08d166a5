// status.cuh -- a CUDA error as a back-end status and one line.
#pragma once
#include <cuda_runtime.h>
#include <cstdio>

enum { E_ARG = -1, E_NOMEM = -3, E_UNSUPPORTED = -4, E_DEVICE = -8 };      // kelvin.h's KV_E_*

inline int say(cudaError_t e, const char *what, char *err, size_t cap)
{
    if (e == cudaSuccess) {
        if (cap) err[0] = 0;
        return 0;
    }
    snprintf(err, cap, "%s: %s (%s)", what, cudaGetErrorName(e), cudaGetErrorString(e));
    cudaGetLastError();                     // a failed call must not fail the next one
    return e == cudaErrorMemoryAllocation ? E_NOMEM : E_DEVICE;
}
