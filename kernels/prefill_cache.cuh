// prefill_cache.cuh -- a cache's chunks by bf16 products (prefill.cu).
#pragma once
#include "cache_impl.cuh"

namespace kelvin {

// Whether a layer's rows are attended turned, as its codes lie; pods are the host's.
bool        prefill_turned(const kv_backend_plan *p, int layer);
// Enough query rows, and a head_dim that has a form.
bool        prefill_fits(const kv_backend_cache *c, int n);
// Of c->prefill, for n new tokens at the lengths of now.
size_t      prefill_bytes(const kv_backend_cache *c, int n);
cudaError_t attend_prefill(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream);

}  // namespace kelvin
