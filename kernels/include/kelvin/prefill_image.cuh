// prefill_image.cuh -- rows in bf16 as attention over many queries reads them.
//
// An image is `rows` rows of D dims: D/64 panels of [rows][64] bf16, lines of 128 bytes whose eight 16-byte pieces are exchanged by the
// row's last three bits.  That is what ldmatrix reads without bank conflicts and what wgmma calls 128-byte swizzle, so that an image
// goes from memory to shared memory as it is, in one bulk copy.
//
//   byte of (row, dim) = dim/64 * rows*128 + row*128 + (dim%64/8 ^ row%8) * 16 + dim%8 * 2
//
// Keys and values: images of KEYS positions, on a grid that starts at position 0.  Queries: images of 64 packed rows, row = token * group + head
// of the group.  Rows that no query sees are finite (zero where nothing was ever there): their weight is zero.
#pragma once
#include <cuda_bf16.h>
#include "hadamard.cuh"
#include "mma.cuh"

namespace kelvin {

constexpr int QUERY_ROWS = 64;
template <int D> constexpr int IMAGE_KEYS = D > 128 ? 64 : 128;
template <int D> constexpr int IMAGE_BYTES = IMAGE_KEYS<D> * D * 2;

__host__ __device__ constexpr int image_byte(int rows, int row, int dim)
{
    return dim / 64 * rows * 128 + row * 128 + ((dim % 64 / 8 ^ row % 8) * 16) + dim % 8 * 2;
}

// A warp's row, lane l holding dims l*V .. l*V+V-1, into an image.
template <int D> __device__ __forceinline__ void put_row(uint8_t *image, int rows, int row, const float *v, int lane)
{
    constexpr int V = D / 32;
    uint32_t w[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; i++) w[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
    uint8_t *to = image + image_byte(rows, row, lane * V);
    if constexpr (V == 2) *(uint32_t *)to = w[0];
    else if constexpr (V == 4) *(uint2 *)to = make_uint2(w[0], w[1]);
    else *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
}

}  // namespace kelvin
