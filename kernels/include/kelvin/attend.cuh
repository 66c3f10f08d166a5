// attend.cuh -- decode attention on the codes of a paged, rotated cache: one launch from queries to outputs.
//
// The units (tiles or pairs of tiles) of all sequences and heads form one line, cut into equal pieces, one a block: ragged batches
// balance themselves.  Where all sequences are alike the cuts fall on the rows' ends (row = sequence, KV head, up to 8 query heads).
// A block walks its piece row by row; its four warps take every fourth unit.
// A warp's units come through its own ring in shared memory: keys' codes to signed bytes to an integer product with the query
// (16 bits as two bytes), an online softmax, weights times the values' norms in 16 bits relative to a power of two that follows the
// units' largest, values' codes to an integer product whose sums stay integers until that power changes.
// Blocks leave partial sums; whoever is last for a row merges them, adds the exact tokens and turns the sum back.
//
// Everything is in base 2.
#pragma once
#include "attend_codes.cuh"

namespace kelvin {
namespace detail {

constexpr int PIECE = 8;                // units: fewer are not worth a block, whose part must be merged
constexpr int LEAD = 4;                 // what a row that starts within a piece costs beside its units: queries anew, a drained ring

// How the line is cut: block c takes [c * piece, (c + 1) * piece).  A row takes `span` places, `lead` of them empty.
struct line { int piece, lead, span /* of all rows, or 0: their own */; };
struct lengths { int sum, least, most; };       // of rows, in pieces

template <int G> __device__ __forceinline__ line cut_line(const attend_args &a, int rows, const lengths &n)
{
    if (n.least == n.most && rows <= (int)gridDim.x) {
        const int blocks = min((int)gridDim.x / rows, max(1, n.most / PIECE)), piece = (n.most + blocks - 1) / blocks;
        return { piece, 0, (n.most + piece - 1) / piece * piece };
    }
    const int total = n.sum + rows * LEAD, piece = (total + (int)gridDim.x - 1) / (int)gridDim.x;
    return { max(piece, PIECE), LEAD, 0 };
}

}  // namespace detail

template <int KB, int VB, int D, int G, int BLOCKS>
__global__ void __launch_bounds__(detail::WARPS * 32, BLOCKS) attend_kernel(const attend_args a)
{
    using namespace detail;
    using ring = ring_of<KB, VB, D, G, BLOCKS>;
    KV_SHARED_DYNAMIC(memory);
    shared_row<G, D> &s = *(shared_row<G, D> *)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, runs = runs_of<G>(a), per_seq = a.n_kv_heads * runs, rows = a.n_seqs * per_seq;
    ring_state state = { s.ring + (size_t)warp * ring::stride, s.barriers[warp], 0, 0, 0 };
    next_may_start();
    bool waited = false;                                // for the launch before, whose rows and codes this one reads
    if constexpr (BULK) {
        if (lane < ring::stages) bulk_init(s.barriers[warp] + lane, stream<ring, G>::SIDES);
        bulk_ready();
        __syncwarp();
    }

    // Lengths are read here, so that one captured launch serves every length.  Every warp finds its block's place by itself.
    lengths n = { 0, 1 << 30, 0 };
    int mine = 0;                                       // pieces of a row of sequence `lane`
    for (int seq0 = 0; seq0 < a.n_seqs; seq0 += 32) {
        const bool real = seq0 + lane < a.n_seqs;
        mine = real ? shape_of_seq<G>(a, seq0 + lane).pieces : 0;
        n.sum += mine;
        if (real) n.least = min(n.least, mine), n.most = max(n.most, mine);
    }
    for (int i = 16; i; i /= 2) {
        n.sum += __shfl_xor_sync(~0u, n.sum, i);
        n.least = min(n.least, __shfl_xor_sync(~0u, n.least, i));
        n.most = max(n.most, __shfl_xor_sync(~0u, n.most, i));
    }
    n.sum *= per_seq;
    const line cut = cut_line<G>(a, rows, n);
    const int from = (int)blockIdx.x * cut.piece, to = from + cut.piece;

    int seq = 0, seq_start = 0;                         // on the line
    if (cut.span) {
        seq = from / (cut.span * per_seq);
        seq_start = seq * cut.span * per_seq;
    } else
        for (int seq0 = 0; seq0 < a.n_seqs; seq0 += 32) {
            if (a.n_seqs > 32) mine = seq0 + lane < a.n_seqs ? shape_of_seq<G>(a, seq0 + lane).pieces : 0;
            const int own = seq0 + lane < a.n_seqs ? (mine + cut.lead) * per_seq : 0;
            int end = own;
            for (int i = 1; i < 32; i *= 2) {
                const int before = __shfl_up_sync(~0u, end, i);
                if (lane >= i) end += before;
            }
            const unsigned past = __ballot_sync(~0u, seq_start + end > from);
            seq = seq0 + (past ? __ffs(past) - 1 : 32);
            seq_start += past ? __shfl_sync(~0u, end - own, __ffs(past) - 1) : __shfl_sync(~0u, end, 31);
            if (past) break;
        }

    for (; seq < a.n_seqs && seq_start < to; seq++) {
        row_shape r = shape_of_seq<G>(a, seq);
        const int span = cut.span ? cut.span : r.pieces + cut.lead, seq_end = seq_start + span * per_seq;
        for (int at = max(from, seq_start); at < min(to, seq_end);) {
            const int in_seq = (at - seq_start) / span, row = seq * per_seq + in_seq, start = seq_start + in_seq * span + cut.lead;
            const int p0 = max(at - start, 0), p1 = min(to - start, r.pieces), group = a.n_heads / a.n_kv_heads;
            at = min(to, start + span - cut.lead);
            if (p0 >= p1) continue;                     // nothing but places
            r.kv_head = in_seq / runs;
            r.head0 = r.kv_head * group + in_seq % runs * G;
            r.n_q = min(G, group - in_seq % runs * G);
            const int i0 = r.unit0 + max(p0 - r.exact_pieces, 0), i1 = min(r.unit0 + p1 - r.exact_pieces, (r.n_codes + UNIT_TOKENS<G> - 1) / UNIT_TOKENS<G>);

            const size_t part = (size_t)G * (D + 2), slots = (size_t)gridDim.x + rows;
            float *codes = a.partials + ((size_t)blockIdx.x + row) * part, *exact = codes + slots * part, *far = a.partials + 2 * slots * part + (size_t)blockIdx.x * (WARPS * SUMS<G, D> * 128);
            const auto wait = [&] { if (!waited) wait_for_last(), waited = true; };
            if (p0 < r.exact_pieces) {
                wait();
                attend_exact<G, D>(a, r, s, ring::stride, p0, min(p1, r.exact_pieces), warp, lane);
                leave_part<false, G, D>(s, ring::stride, nullptr, 1.0f, exact, r.n_q, threadIdx.x);
            }
            stream<ring, G> in(a, r, state, i0, i1, warp, lane);
            if constexpr (BULK) bulk_ready();           // what was written to the ring's place before
            __syncwarp();
            in.start(waited ? i1 : (r.n_codes - 1) / UNIT_TOKENS<G>);      // the last unit may be new
            wait();
            queries<KB, G, D> q;
            q.load(a, r, warp, lane);
            in.start(i1);
            q.prepare(a, r, s, warp, lane);
            const int first = start / cut.piece, last = (start + r.pieces - 1) / cut.piece;
            __syncthreads();
            attend_codes<KB, VB, D, G, ring>(a, r, s, in, far + warp * (SUMS<G, D> * 128), i0, warp, lane);
            leave_part<true, G, D>(s, ring::stride, far, a.vb.unit, codes, r.n_q, threadIdx.x);

            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) s.last = atomicAdd(a.arrivals + row, 1) == last - first;
            __syncthreads();
            if (s.last) {
                __threadfence();
                const int exact_last = r.exact_pieces ? (start + r.exact_pieces - 1) / cut.piece : first - 1;
                const float *p = a.partials + ((size_t)first + row) * part;
                merge<G, D>(a, r, s, ring::stride, p, p + slots * part, last - first + 1, exact_last - first + 1, warp, lane);
                if (threadIdx.x == 0) a.arrivals[row] = 0;
                __syncthreads();
            }
        }
        seq_start = seq_end;
    }
    if (!waited) wait_for_last();                       // the launch after this one relies on this one's end being the end of all before it
    if constexpr (!BULK) copy_wait<0>();
}

// Floats of attend_args.partials for a grid and rows of up to G query heads: parts of codes, of exact tokens, blocks' sums that left their integers.
inline size_t attend_partials(int blocks, int rows, int g, int d) { return 2 * ((size_t)blocks + (size_t)rows) * (size_t)g * ((size_t)d + 2) + (size_t)blocks * detail::WARPS * (g == 4 ? d / 16 : d / 8) * 128; }

}  // namespace kelvin
