// slab.cuh -- codes to bf16 images in the rotated domain: one pass over a slab of the prefix, which prefill.cuh then attends.
//
// fragment order (fragment.cuh): the same bytes from the codebook as decode attention uses, times the norm.  Floor: the codes read once, 4 D bytes
// written a token of a head (644 bytes in all at 4 bits, D = 128).
#pragma once
#include "fragment.cuh"
#include "prefill_image.cuh"

namespace kelvin {

struct slab_args {
    const uint8_t *pool;            // as attend_args has them: [page][n_kv_heads][page tiles][tile]
    const int     *pages;           // [n_seqs][max_pages]
    const int     *n_codes;         // [n_seqs]; rows from there on become zero
    uint8_t       *k, *v;           // images [n_seqs][n_kv_heads][..], strides as given
    size_t         k_stride, v_stride;
    int            n_kv_heads, max_pages, page_shift /* log2 of a page's tiles */, first /* tile of the grid's first image here, a multiple of an image's */;
    codebook       kb, vb;
};

namespace detail {

__device__ __forceinline__ float byte_of(uint32_t w, int b) { return (float)(int8_t)(w >> (8 * b)); }

// A tile of 32 rows to their place in an image, 64 dims at a time through stage [32][64] (4 KB of the warp).  norm: of token `lane`, 0 for one that is
// not there; half, unit: of the codebook.
template <int BITS, int D, bool KEYS> __device__ void tile_to_image(const uint8_t *words, float norm, float unit, float half, uint32_t t0, uint32_t t1, uint8_t *stage, uint8_t *image, int row0, int lane)
{
    constexpr int ROWS = IMAGE_KEYS<D>;
    const int g = lane / 4, t = lane % 4;
    uint32_t w[side<BITS, D>::words];
    load_words<BITS, D>(w, words, lane);
    float worth[4];                                 // of tokens g + 8 i
#pragma unroll
    for (int i = 0; i < 4; i++) worth[i] = __shfl_sync(~0u, norm, g + 8 * i) * unit;
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++) {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t f[8];
            const int fragment = KEYS ? pair * (D / 32) + 2 * panel : 4 * panel + 2 * pair;
            unpack_two<BITS>(w + fragment * BITS / 2, t0, t1, f);
#pragma unroll
            for (int reg = 0; reg < 8; reg++) {
                const uint32_t x = f[reg];
                float v[4];
#pragma unroll
                for (int b = 0; b < 4; b++) v[b] = byte_of(x, b) + half;
                if constexpr (KEYS) {               // four dims of one token
                    const int token = pair * 16 + reg % 2 * 8 + g, dim = reg / 4 * 32 + reg / 2 % 2 * 16 + 4 * t;
                    const float by = worth[pair * 2 + reg % 2];
                    *(uint2 *)(stage + image_byte(32, token, dim)) = make_uint2(pack_bf16(v[0] * by, v[1] * by), pack_bf16(v[2] * by, v[3] * by));
                } else {                            // four tokens of one dim: two transposes
#pragma unroll
                    for (int b = 0; b < 4; b += 2) {
                        const int i = reg / 2 % 2 * 2 + b / 2, dim = pair * 32 + reg / 4 * 16 + reg % 2 * 8 + 2 * t;
                        const uint32_t both = transpose_b16(byte_lookup(__float_as_uint(v[b]), __float_as_uint(v[b + 1]), 0x7632));
                        const float first = __uint_as_float(both << 16), second = __uint_as_float(both & 0xFFFF0000u);
                        *(uint32_t *)(stage + image_byte(32, i * 8 + g, dim)) = pack_bf16(first * worth[i], second * worth[i]);
                    }
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; i++) *(uint4 *)(image + panel * ROWS * 128 + row0 * 128 + i * 512 + lane * 16) = *(const uint4 *)(stage + i * 512 + lane * 16);
        __syncwarp();
    }
}

}  // namespace detail

// A block an image of keys and values; grid: (images, n_kv_heads, n_seqs), 128 threads.
template <int KB, int VB, int D> __global__ void __launch_bounds__(128) slab_fragments(const slab_args a)
{
    using T = tile<KB, VB, D>;
    constexpr int TILES = IMAGE_KEYS<D> / TILE_TOKENS;
    __shared__ uint4 stages[4][256];                            // 32 lines of 128 bytes a warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, seq = blockIdx.z;
    const size_t place = (size_t)seq * a.n_kv_heads + head;
    for (int i = warp; i < 2 * TILES; i += 4) {
        const int tile_at = a.first + blockIdx.x * TILES + i / 2, token0 = tile_at * TILE_TOKENS, n = a.n_codes[seq];
        const bool values = i % 2;
        uint8_t *image = (values ? a.v + place * a.v_stride : a.k + place * a.k_stride) + (size_t)blockIdx.x * IMAGE_BYTES<D>;
        if (token0 >= n) {
            for (int panel = 0; panel < D / 64; panel++)
                for (int j = 0; j < 8; j++) *(uint4 *)(image + panel * IMAGE_KEYS<D> * 128 + i / 2 * TILE_TOKENS * 128 + j * 512 + lane * 16) = make_uint4(0, 0, 0, 0);
            continue;
        }
        const int page = a.pages[(size_t)seq * a.max_pages + (tile_at >> a.page_shift)];
        const uint8_t *from = a.pool + ((((size_t)page * a.n_kv_heads + head) << a.page_shift) + (tile_at & (1 << a.page_shift) - 1)) * T::bytes;
        const __half *norms = (const __half *)(from + (values ? T::k_bytes + side<VB, D>::word_bytes : side<KB, D>::word_bytes));
        const float norm = token0 + lane < n ? __half2float(norms[norm_place(lane)]) : 0.0f;
        if (values) detail::tile_to_image<VB, D, false>(from + T::k_bytes, norm, a.vb.unit, a.vb.half, a.vb.t0, a.vb.t1, (uint8_t *)stages[warp], image, i / 2 * TILE_TOKENS, lane);
        else detail::tile_to_image<KB, D, true>(from, norm, a.kb.unit, a.kb.half, a.kb.t0, a.kb.t1, (uint8_t *)stages[warp], image, i / 2 * TILE_TOKENS, lane);
    }
}

}  // namespace kelvin
