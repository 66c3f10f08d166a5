// cuda_runtime.h -- the runtime API for the emulator: the part that Kelvin calls, with CUDA's names, numbers and error rules.
//
// Streams are one queue that runs when somebody waits (synchronize, a blocking copy, an event's time): what reads a result, or
// reuses a pinned buffer, before it waited reads poison or spoils the copy.  Device memory comes filled with 0xFF, NaN in every format.
//
//   KV_EMULATE_THREADS=N     OS threads that run blocks (default: the processors)
//   KV_EMULATE_ORDER=...     forward (default), reverse, random: which of the ready threads of a block, and which block, goes on
//   KV_EMULATE_MEMORY=N      bytes of device memory (default 4 GiB)
//   KV_EMULATE_EAGER=1       streams run at once
#pragma once
#include <functional>
#include <tuple>
#include <utility>
#include "emulate.h"

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInitializationError = 3, cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidMemcpyDirection = 21, cudaErrorInsufficientDriver = 35, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600, cudaErrorIllegalAddress = 700, cudaErrorLaunchOutOfResources = 701, cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801, cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901, cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureImplicit = 906, cudaErrorIllegalState = 401, cudaErrorUnknown = 999,
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10, cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrMemoryPoolsSupported = 115,
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock, l2CacheSize, memoryBusWidth;
};
struct cudaFuncAttributes { size_t sharedSizeBytes, constSizeBytes, localSizeBytes; int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes; };
typedef struct kv_emulated_stream *cudaStream_t;
typedef struct kv_emulated_event *cudaEvent_t;
typedef struct kv_emulated_graph *cudaGraph_t;
typedef struct kv_emulated_graph *cudaGraphExec_t;

namespace kv_emulate {
cudaError_t enqueue_kernel(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, std::function<void()> one_thread);
// The kernel's parameters are copied now, and again for every thread.
template <class... P, class... A>
void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A &&...arguments)
{
    static_assert(sizeof(std::tuple<P...>) <= 32764, "a kernel's parameters take at most 32764 bytes");
    std::tuple<P...> parameters(std::forward<A>(arguments)...);
    enqueue_kernel(name, (const void *)kernel, grid, block, shared, stream, [kernel, parameters] { std::apply(kernel, parameters); });
}
cudaError_t set_attribute(const void *kernel, cudaFuncAttribute what, int value);
cudaError_t attributes(cudaFuncAttributes *out, const void *kernel);
cudaError_t blocks_per_sm(int *out, const void *kernel, int threads, size_t shared);
}  // namespace kv_emulate

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorName(cudaError_t e);
const char *cudaGetErrorString(cudaError_t e);
cudaError_t cudaDriverGetVersion(int *v);
cudaError_t cudaRuntimeGetVersion(int *v);
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr what, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total);

cudaError_t kv_malloc(void **p, size_t n);
cudaError_t kv_malloc_host(void **p, size_t n);
cudaError_t kv_malloc_async(void **p, size_t n, cudaStream_t s);
template <class T> inline cudaError_t cudaMalloc(T **p, size_t n) { return kv_malloc((void **)p, n); }
template <class T> inline cudaError_t cudaMallocHost(T **p, size_t n, unsigned = 0) { return kv_malloc_host((void **)p, n); }
template <class T> inline cudaError_t cudaHostAlloc(T **p, size_t n, unsigned) { return kv_malloc_host((void **)p, n); }
template <class T> inline cudaError_t cudaMallocAsync(T **p, size_t n, cudaStream_t s) { return kv_malloc_async((void **)p, n, s); }
cudaError_t cudaFree(void *p);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaFreeAsync(void *p, cudaStream_t s);
cudaError_t cudaMemcpy(void *dst, const void *src, size_t n, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t n, cudaMemcpyKind kind, cudaStream_t s = nullptr);
cudaError_t cudaMemcpy2D(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width, size_t height, cudaMemcpyKind kind);
cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t s = nullptr);
cudaError_t cudaMemset(void *dst, int value, size_t n);
cudaError_t cudaMemsetAsync(void *dst, int value, size_t n, cudaStream_t s = nullptr);
// __constant__ and __device__ variables are plain ones.
cudaError_t kv_memcpy_symbol(void *symbol, void *other, size_t n, bool to_symbol);
template <class T> inline cudaError_t cudaMemcpyToSymbol(T &symbol, const void *src, size_t n, size_t offset = 0, cudaMemcpyKind = cudaMemcpyHostToDevice)
{
    return offset + n > sizeof symbol ? cudaErrorInvalidValue : kv_memcpy_symbol((char *)&symbol + offset, (void *)src, n, true);
}
template <class T> inline cudaError_t cudaMemcpyFromSymbol(void *dst, T &symbol, size_t n, size_t offset = 0, cudaMemcpyKind = cudaMemcpyDeviceToHost)
{
    return offset + n > sizeof symbol ? cudaErrorInvalidValue : kv_memcpy_symbol((char *)&symbol + offset, dst, n, false);
}

cudaError_t cudaStreamCreate(cudaStream_t *s);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaStreamQuery(cudaStream_t s);
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t *e);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t e);
cudaError_t cudaEventQuery(cudaEvent_t e);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to);

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g);
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus *status);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s);
cudaError_t cudaGraphUpload(cudaGraphExec_t x, cudaStream_t s);
cudaError_t cudaGraphGetNodes(cudaGraph_t g, void **nodes, size_t *n);
cudaError_t cudaGraphDestroy(cudaGraph_t g);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x);

template <class F> inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute what, int value) { return kv_emulate::set_attribute((const void *)kernel, what, value); }
template <class F> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, F *kernel) { return kv_emulate::attributes(out, (const void *)kernel); }
template <class F> inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *kernel, int threads, size_t shared) { return kv_emulate::blocks_per_sm(n, (const void *)kernel, threads, shared); }
