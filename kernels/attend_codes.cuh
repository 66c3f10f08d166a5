// attend_codes.cuh -- which forms of decode attention on codes there are, and their launch.  Allocates nothing, waits for nothing, may be captured.
#pragma once
#include "kelvin/attend.cuh"

// A form: bits of keys and values, head_dim, query heads a row takes.
struct attend_form {
    int bits_k, bits_v, head_dim, heads, tile_bytes, shared_bytes;
    void (*kernel)(const kelvin::attend_args);
};
enum { ATTEND_N_FORMS = 8 };            // of a head_dim
// For `group` query heads a K/V head, or null.  There are 2, 3 and 4 bits alike, and up to 4 heads 4-bit keys with 3- or 2-bit values; head_dim 64, 128, 256.
const attend_form *kv_cuda_attend_form(int bits_k, int bits_v, int head_dim, int group);
int kv_cuda_attend_rows(const attend_form *f, const kelvin::attend_args &a);           // ints of a.arrivals, zero before the first launch
// Floats of a.partials on the current device, or 0 with *status.
size_t      kv_cuda_attend_partials(const attend_form *f, const kelvin::attend_args &a, cudaError_t *status);
// From sm_90 on a launch begins while the one before it in the stream ends: that one must not write lengths, page tables or codes before the
// last unit (64 tokens) of a sequence; rows, queries and the last unit it may.
cudaError_t kv_cuda_attend_codes(const attend_form *f, const kelvin::attend_args &a, cudaStream_t stream);
