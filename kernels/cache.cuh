// cache.cuh -- the device's cache as the runner uses it; cache.cu is its inside.  All pointers are device memory, nothing waits.
#pragma once
#include "launch.cuh"
#include "backend.h"

// Sequences of a cache, and where each stands: [n_seqs] committed tokens in device memory, read by every kernel of a step, so that
// one captured graph of a step serves all lengths.
int        kv_dev_cache_seqs(const kv_backend_cache *c);
const int *kv_dev_cache_lengths(const kv_backend_cache *c);
// A number that no other cache of the process has or will have; it changes when a captured step of this cache would be wrong.
unsigned long long kv_dev_cache_epoch(const kv_backend_cache *c);
// Room for n more tokens everywhere, or E_ARG with text: before anything of a step is launched.  reserve also grows the working memory of a step of n
// tokens; room is the check alone, for n steps of one.
int        kv_dev_cache_room(const kv_backend_cache *c, int n, char *err, size_t cap);
int        kv_dev_cache_reserve(kv_backend_cache *c, int n, char *err, size_t err_cap);
// Appends n tokens of every sequence to a layer, then attends: q, out [n_seqs][n][n_heads][head_dim], k, v [n_seqs][n][n_kv_heads][head_dim], keys and
// queries after RoPE, queries not scaled.  After reserve, every layer; a commit without any attend is legal too (benches: the rows are what zeroed pages say).  n = 1: the decode step, capturable into a graph; n > 1: visibility semantics.
cudaError_t kv_dev_cache_attend(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream);
// Ends a step on the device: lengths grow by n.  The host's count follows with kv_dev_cache_advance once the work is in the stream.
cudaError_t kv_dev_cache_commit(kv_backend_cache *c, int n, cudaStream_t stream);
void        kv_dev_cache_advance(kv_backend_cache *c, int n);
// After the work of a step has been waited for: E_ARG with text where a key or value was not finite or did not fit the exact dtype.
int        kv_dev_cache_verdict(kv_backend_cache *c, char *err, size_t cap);
// A step that failed halfway, or was committed on the device only: what it appended does not count.
void        kv_dev_cache_drop(kv_backend_cache *c);
