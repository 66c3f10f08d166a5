// backend.cu -- fills the back-end table for CUDA: device, memory, copies, and the ops of the other files.
//
// The plugin exports one symbol.  It links cudart statically, loads without a driver, and says so when asked.
#include <cuda_runtime.h>
#include <cstdio>
#include "backend.h"
#include "kernels.cuh"
#include "status.cuh"

static int probe(int *n_devices, int *driver, int *runtime, char *err, size_t cap)
{
    *n_devices = 0;
    cudaDriverGetVersion(driver);
    cudaRuntimeGetVersion(runtime);
    if (*driver == 0) {
        snprintf(err, cap, "no driver: libcuda.so.1 is missing or does not load");
        return E_DEVICE;
    }
    return say(cudaGetDeviceCount(n_devices), "no device", err, cap);
}

static int describe(int device, kv_backend_device *out, char *err, size_t cap)
{
    cudaDeviceProp p;
    const int status = say(cudaGetDeviceProperties(&p, device), "device properties", err, cap);
    if (status < 0) return status;
    snprintf(out->name, sizeof out->name, "%.127s", p.name);
    out->sm = p.major * 10 + p.minor;
    out->memory_bytes = (double)p.totalGlobalMem;
    return 0;
}

static void *device_alloc(int device, size_t n_bytes, char *err, size_t cap)
{
    void *p = nullptr;
    if (say(cudaSetDevice(device), "select device", err, cap) < 0) return nullptr;
    return say(cudaMalloc(&p, n_bytes), "allocate", err, cap) < 0 ? nullptr : p;
}

static void device_release(int device, void *p)
{
    cudaSetDevice(device);
    cudaFree(p);
}

static int upload(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t cap)
{
    (void)device;
    return say(cudaMemcpy(dst, src, n_bytes, cudaMemcpyHostToDevice), "upload", err, cap);
}

static int download(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t cap)
{
    (void)device;
    return say(cudaMemcpy(dst, src, n_bytes, cudaMemcpyDeviceToHost), "download", err, cap);
}

static int sync_device(int device, char *err, size_t cap)
{
    (void)device;
    return say(cudaDeviceSynchronize(), "synchronize", err, cap);
}

static int hadamard(int device, float *x, const float *sign, int n_rows, int n, char *err, size_t cap)
{
    const int status = say(cudaSetDevice(device), "select device", err, cap);
    return status < 0 ? status : say(kv_cuda_hadamard(x, sign, n_rows, n, 0), "hadamard", err, cap);
}

static kv_backend make_table()
{
    kv_backend t = {};
    t.abi = KV_BACKEND_ABI;
#ifdef KV_EMULATE
    t.name = "emulated";
#else
    t.name = "cuda";
#endif
    t.probe = probe;
    t.describe = describe;
    t.alloc = device_alloc;
    t.release = device_release;
    t.upload = upload;
    t.download = download;
    t.sync = sync_device;
    t.hadamard = hadamard;
    t.codec_known = kv_cuda_codec_known;
    t.codec_encode = kv_cuda_codec_encode;
    t.codec_decode = kv_cuda_codec_decode;
    t.bench = kv_cuda_bench;
    kv_cache_entries(&t);
    kv_runner_entries(&t);
    return t;
}

extern "C" __attribute__((visibility("default"))) const kv_backend *kv_backend_get(void)
{
    static const kv_backend table = make_table();
    return &table;
}
