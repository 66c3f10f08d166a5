// kernels.cuh -- the launchers, one line each.  All take device pointers and a stream, allocate nothing, do not wait.
#pragma once
#include "launch.cuh"

// x [n_rows][n] in place: x = FWHT(sign * x) / sqrt(n).  n a power of two in 1..4096; sign [n] or null.
cudaError_t kv_cuda_hadamard(float *x, const float *sign, int n_rows, int n, cudaStream_t stream);

// The codec entries of the table (codec.cu): host memory in and out.
struct kv_backend_codec;
int kv_cuda_codec_known(const char *family);
int kv_cuda_codec_encode(int device, const kv_backend_codec *c, const float *host_rows, int n, uint8_t *host_pages, char *err, size_t cap);
int kv_cuda_codec_decode(int device, const kv_backend_codec *c, const uint8_t *host_pages, int tok0, int n, float *host_rows, char *err, size_t cap);
// Rows [n][head_dim] to whole pages and back, with a codec as it lies on the device; family_of: codecs.cuh's number of a name, or -1.
namespace kelvin { struct dev_codec; }
cudaError_t kv_cuda_encode_rows(const kelvin::dev_codec &c, const float *x, int n, uint8_t *pages, cudaStream_t stream);
cudaError_t kv_cuda_decode_rows(const kelvin::dev_codec &c, const uint8_t *pages, int tok0, int n, float *x, cudaStream_t stream);
int         kv_cuda_codec_family(const char *name);
// backend.h's `bench`.
int kv_cuda_bench(int device, const char *cases, int repeats, char *json, size_t json_cap, char *err, size_t err_cap);

// Fills the table's cache_* entries (cache_table.cu).
struct kv_backend;
void kv_cache_entries(kv_backend *t);
// And its entries from runner_new to generate (runner.cu).
void kv_runner_entries(kv_backend *t);
