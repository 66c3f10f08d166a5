// attend.cuh -- decode attention on the codes of a paged, rotated cache: one launch from queries to outputs.
//
// The tiles of all sequences and heads form one line, cut into equal pieces, one a block: ragged batches balance themselves.
// A block walks its piece row by row (row = sequence, KV head, up to 8 query heads); its four warps take every fourth tile.
// A warp's tile comes through its own ring in shared memory: keys' codes to signed bytes to an integer product with the query
// (16 bits as two bytes), an online softmax with the tile's own maximum, weights times the values' norms in 16 bits relative to
// the largest of the tile (so a needle in one tile costs the others nothing), values' codes to an integer product, f32 sums.
// Blocks leave partial sums; whoever is last for a row merges them, adds the exact tokens and turns the sum back.
//
// Everything is in base 2.
#pragma once
#include "attend_codes.cuh"

namespace kelvin {
namespace detail {

// Cuts of the line: block c takes tiles c * total / blocks on.
constexpr int TILES_A_BLOCK = 8;                // fewer are not worth a block: its part must be merged

__device__ __forceinline__ long long cut(long long total, int blocks, int c) { return total * c / blocks; }
__device__ __forceinline__ int block_of(long long total, int blocks, long long tile) { return (int)(((tile + 1) * blocks - 1) / total); }

// Tiles of up to 128 sequences, a lane four of them in order, and their sum.
template <int G> __device__ __forceinline__ long long tiles_of_seqs(const attend_args &a, int seq0, int per_seq, long long t[4], int lane)
{
    long long sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int seq = seq0 + 4 * lane + j;
        t[j] = seq < a.n_seqs ? (long long)shape_of_seq<G>(a, seq).tiles * per_seq : 0;
        sum += t[j];
    }
    return sum;
}

}  // namespace detail

template <int KB, int VB, int D, int G, int BLOCKS>
__global__ void __launch_bounds__(detail::WARPS * 32, BLOCKS) attend_kernel(const attend_args a)
{
    using namespace detail;
    using ring = ring_of<KB, VB, D, G, BLOCKS>;
    KV_SHARED_DYNAMIC(memory);
    shared_row<G, D> &s = *(shared_row<G, D> *)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, runs = runs_of<G>(a), per_seq = a.n_kv_heads * runs;

    // Lengths are read here, so that one captured launch serves every length.  Every warp finds its block's place by itself.
    long long total = 0, t[4];
    for (int seq0 = 0; seq0 < a.n_seqs; seq0 += 128) {
        long long sum = tiles_of_seqs<G>(a, seq0, per_seq, t, lane);
        for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        total += sum;
    }
    const int blocks = (int)min((long long)gridDim.x, max(1ll, (total + TILES_A_BLOCK - 1) / TILES_A_BLOCK));
    if (blockIdx.x >= blocks) return;
    const long long from = cut(total, blocks, blockIdx.x), to = cut(total, blocks, blockIdx.x + 1);

    int seq = 0;
    long long seq_start = 0;                            // on the line
    for (int seq0 = 0; seq0 < a.n_seqs; seq0 += 128) {
        if (a.n_seqs > 128) tiles_of_seqs<G>(a, seq0, per_seq, t, lane);
        const long long own = t[0] + t[1] + t[2] + t[3];
        long long end = own;
        for (int i = 1; i < 32; i *= 2) {
            const long long before = __shfl_up_sync(~0u, end, i);
            if (lane >= i) end += before;
        }
        const unsigned past = __ballot_sync(~0u, seq_start + end > from);
        if (past) {
            const int first = __ffs(past) - 1;
            long long at = seq_start + end - own;
            int j = 0;
            while (j < 3 && at + t[j] <= from) at += t[j++];
            seq = seq0 + __shfl_sync(~0u, 4 * lane + j, first);
            seq_start = __shfl_sync(~0u, at, first);
            break;
        }
        seq_start += __shfl_sync(~0u, end, 31);
    }

    for (; seq < a.n_seqs && seq_start < to; seq++) {
        row_shape r = shape_of_seq<G>(a, seq);
        const long long seq_end = seq_start + (long long)r.tiles * per_seq;
        for (long long at = max(from, seq_start); at < min(to, seq_end);) {
            const int in_seq = (int)((at - seq_start) / r.tiles), row = seq * per_seq + in_seq;
            const long long start = seq_start + (long long)in_seq * r.tiles, end = start + r.tiles;
            const int t0 = (int)(at - start), t1 = (int)(min(to, end) - start), group = a.n_heads / a.n_kv_heads;
            r.kv_head = in_seq / runs;
            r.head0 = r.kv_head * group + in_seq % runs * G;
            r.n_q = min(G, group - in_seq % runs * G);

            const size_t part = (size_t)G * (D + 2), slots = (size_t)gridDim.x + (size_t)a.n_seqs * per_seq;
            float *codes = a.partials + ((size_t)blockIdx.x + row) * part, *exact = codes + slots * part;
            prepare<KB, G, D>(a, r, s, warp, lane);
            __syncthreads();
            if (t0 < r.exact_pieces) {
                attend_exact<G, D>(a, r, s, ring::stride, t0, min(t1, r.exact_pieces), warp, lane);
                leave_part<G, D>(s, ring::stride, exact, r.n_q, threadIdx.x);
            }
            attend_codes<KB, VB, D, ring>(a, r, s, r.tile0 + max(t0 - r.exact_pieces, 0), min(r.tile0 + t1 - r.exact_pieces, (r.n_codes + UNIT_TOKENS<G> - 1) / UNIT_TOKENS<G>), warp, lane);
            leave_part<G, D>(s, ring::stride, codes, r.n_q, threadIdx.x);

            const int first = block_of(total, blocks, start), last = block_of(total, blocks, end - 1);
            __threadfence();
            if (threadIdx.x == 0) s.last = atomicAdd(a.arrivals + row, 1) == last - first;
            __syncthreads();
            if (s.last) {
                __threadfence();
                const int exact_last = r.exact_pieces ? block_of(total, blocks, start + r.exact_pieces - 1) : first - 1;
                const float *p = a.partials + ((size_t)first + row) * part;
                merge<G, D>(a, r, s, ring::stride, p, p + slots * part, last - first + 1, exact_last - first + 1, warp, lane);
                if (threadIdx.x == 0) a.arrivals[row] = 0;
            }
            __syncthreads();
            at = start + t1;
        }
        seq_start = seq_end;
    }
}

// Floats of attend_args.partials for a grid and rows of up to G query heads.
inline size_t attend_partials(int blocks, int rows, int g, int d) { return 2 * ((size_t)blocks + (size_t)rows) * (size_t)g * ((size_t)d + 2); }

}  // namespace kelvin
