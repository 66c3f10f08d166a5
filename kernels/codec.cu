// codec.cu -- a codec alone on the device: whole runs of tokens from host memory to pages and back.  For tests and benches; what the
// cache does lies in cache.cu.
#include <cuda_runtime.h>
#include "backend.h"
#include "codecs.cuh"
#include "kernels.cuh"
#include "status.cuh"

namespace {

enum { WARPS = 4 };

using kelvin::dev_codec;

// Granules, or tokens, over the warps of the grid.
__global__ void encode_rows(dev_codec c, const float *x, int n, uint8_t *pages)
{
    __shared__ float4 lent[WARPS][kelvin::CODEC_SCRATCH / 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long tok = ((long long)blockIdx.x * WARPS + warp) * c.granule;
    if (tok >= n) return;
    kelvin::codec_encode(c, pages + tok / c.page_tokens * c.page_bytes, (int)(tok % c.page_tokens), x + tok * c.head_dim, c.head_dim, (float *)lent[warp], lane);
}

__global__ void decode_rows(dev_codec c, const uint8_t *pages, int tok0, int n, float *x)
{
    __shared__ float4 lent[WARPS][kelvin::CODEC_SCRATCH / 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long i = (long long)blockIdx.x * WARPS + warp, tok = tok0 + i;
    if (i >= n) return;
    kelvin::codec_decode(c, pages + tok / c.page_tokens * c.page_bytes, (int)(tok % c.page_tokens), x + i * c.head_dim, (float *)lent[warp], lane);
}

// Device memory of one call.
struct memory {
    void *pod = nullptr, *pages = nullptr, *rows = nullptr;
    ~memory() { cudaFree(pod), cudaFree(pages), cudaFree(rows); }
};

// Allocates, copies the pod and the pages, fills `out`.
int set_up(int device, const kv_backend_codec *c, const uint8_t *host_pages, size_t page_bytes, size_t row_bytes, memory &m, dev_codec &out, char *err, size_t cap)
{
    out = dev_codec { kelvin::codec_family(c->family), c->head_dim, c->page_tokens, c->granule, c->side, c->page_bytes, nullptr };
    if (out.family < 0) {
        snprintf(err, cap, "codec '%s' is not one that this device knows", c->family);
        return E_UNSUPPORTED;
    }
    int status = say(cudaSetDevice(device), "select device", err, cap);
    if (status == 0) status = say(cudaMalloc(&m.pod, c->pod_bytes), "allocate", err, cap);
    if (status == 0) status = say(cudaMalloc(&m.pages, page_bytes), "allocate", err, cap);
    if (status == 0) status = say(cudaMalloc(&m.rows, row_bytes), "allocate", err, cap);
    if (status == 0) status = say(cudaMemcpy(m.pod, c->pod, c->pod_bytes, cudaMemcpyHostToDevice), "upload", err, cap);
    if (status == 0) status = say(cudaMemcpy(m.pages, host_pages, page_bytes, cudaMemcpyHostToDevice), "upload", err, cap);
    out.pod = m.pod;
    return status;
}

size_t pages_of(const kv_backend_codec *c, long long n_tokens) { return (size_t)((n_tokens + c->page_tokens - 1) / c->page_tokens) * c->page_bytes; }

}  // namespace

cudaError_t kv_cuda_encode_rows(const dev_codec &c, const float *x, int n, uint8_t *pages, cudaStream_t stream)
{
    KV_LAUNCH(encode_rows, (n / c.granule + WARPS - 1) / WARPS, WARPS * 32, 0, stream, c, x, n, pages);
    return cudaGetLastError();
}

cudaError_t kv_cuda_decode_rows(const dev_codec &c, const uint8_t *pages, int tok0, int n, float *x, cudaStream_t stream)
{
    KV_LAUNCH(decode_rows, (n + WARPS - 1) / WARPS, WARPS * 32, 0, stream, c, pages, tok0, n, x);
    return cudaGetLastError();
}

int kv_cuda_codec_family(const char *name) { return kelvin::codec_family(name); }
int kv_cuda_codec_known(const char *family) { return kelvin::codec_family(family) >= 0; }

int kv_cuda_codec_encode(int device, const kv_backend_codec *c, const float *host_rows, int n, uint8_t *host_pages, char *err, size_t cap)
{
    memory m;
    dev_codec d;
    const size_t page_bytes = pages_of(c, n), row_bytes = (size_t)n * c->head_dim * sizeof(float);
    int status = set_up(device, c, host_pages, page_bytes, row_bytes, m, d, err, cap);
    if (status < 0) return status;
    status = say(cudaMemcpy(m.rows, host_rows, row_bytes, cudaMemcpyHostToDevice), "upload", err, cap);
    if (status < 0) return status;
    status = say(kv_cuda_encode_rows(d, (const float *)m.rows, n, (uint8_t *)m.pages, 0), "encode", err, cap);
    return status < 0 ? status : say(cudaMemcpy(host_pages, m.pages, page_bytes, cudaMemcpyDeviceToHost), "encode", err, cap);
}

int kv_cuda_codec_decode(int device, const kv_backend_codec *c, const uint8_t *host_pages, int tok0, int n, float *host_rows, char *err, size_t cap)
{
    memory m;
    dev_codec d;
    const size_t row_bytes = (size_t)n * c->head_dim * sizeof(float);
    int status = set_up(device, c, host_pages, pages_of(c, (long long)tok0 + n), row_bytes, m, d, err, cap);
    if (status < 0) return status;
    status = say(kv_cuda_decode_rows(d, (const uint8_t *)m.pages, tok0, n, (float *)m.rows, 0), "decode", err, cap);
    return status < 0 ? status : say(cudaMemcpy(host_rows, m.rows, row_bytes, cudaMemcpyDeviceToHost), "decode", err, cap);
}
