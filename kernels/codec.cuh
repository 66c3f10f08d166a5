// codec.cuh -- a codec inside a kernel.  kernels/codecs/<family>.cuh has one struct per family with these two functions; codecs.cuh lists them.
//
// A warp does one row (decode) or one granule (encode).  The arithmetic is the CPU's in the CPU's order: f32, no contraction (files that
// include this compile with --fmad=false), so bytes and decoded rows are the same bits.
#pragma once
#include <cstdint>
#include "launch.cuh"

namespace kelvin {

constexpr int CODEC_SCRATCH = 2 * 512 + 64;     // floats a warp lends, in shared memory

struct dev_codec {                              // of a slot, by value or in device memory
    int         family;                         // index into the list of codecs.cuh
    int         head_dim, page_tokens, granule, side;
    size_t      page_bytes;
    const void *pod;                            // device memory: struct <family>_device of core/codecs/<family>_device.h
};

// struct foo_codec {
//     // row [head_dim] in shared or global memory = token tok of a page; scratch: CODEC_SCRATCH floats of shared memory of the warp, aligned to 16 for encode
//     static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane);
//     // rows x (ld floats apart) into slots [tok0, tok0 + granule) of a page whose slots were zero
//     static __device__ void encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long ld, float *scratch, int lane);
// };
// Pages are shared by warps that work on neighbouring tokens: a byte or word that holds several tokens' codes is changed with atomics
// (atomicOr on its aligned 32-bit word), so that any number of warps may encode tokens of one page at once.

}  // namespace kelvin
