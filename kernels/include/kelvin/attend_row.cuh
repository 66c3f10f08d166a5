// attend_row.cuh -- decode attention: what belongs to a row (sequence, KV head, up to 8 query heads) beside its codes: queries, exact
// tokens, a block's part, the merge of all parts.
#pragma once
#include "fragment.cuh"
#include "hadamard.cuh"

namespace kelvin {

struct attend_args {
    const float   *q;               // [n_seqs][n_heads][D], before rotation
    float         *out;             // [n_seqs][n_heads][D]
    const uint8_t *pool;            // pages of codes: [page][n_kv_heads][page_tiles][tile]
    const int     *pages;           // [n_seqs][max_pages]
    const int     *n_codes;         // [n_seqs] tokens in codes, counted from the first page on
    const int     *first;           // [n_seqs] or null: codes before it are not attended (sliding windows)
    const float   *sign;            // [n_kv_heads][D] of keys, then of values, or null
    const __half  *exact_k, *exact_v;     // [n_seqs][n_kv_heads][exact_capacity][D] or null: sinks and the recent window
    const int     *n_exact;         // [n_seqs] or null
    const float   *mean_k, *mean_v; // [n_kv_heads][D] or null: what was removed before coding
    float         *partials;        // [grid + rows][heads of a row][D + 2]
    int           *arrivals;        // [rows], zero; left zero
    int            n_seqs, n_heads, n_kv_heads, max_pages, page_shift /* log2 of a page's tiles */, exact_capacity;
    float          scale;           // of q . k, 1/sqrt(D) usually
    codebook       kb, vb;
};

namespace detail {

constexpr int WARPS = 4;

__device__ __forceinline__ float max_over_rows(float v)
{
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 4));
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 8));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 16));
}
__device__ __forceinline__ float sum_over_rows(float v)
{
    v += __shfl_xor_sync(~0u, v, 4);
    v += __shfl_xor_sync(~0u, v, 8);
    return v + __shfl_xor_sync(~0u, v, 16);
}
__device__ __forceinline__ float sum_over_warp(float v)
{
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

constexpr float LOG2E = 1.4426950408889634f;
template <int G> constexpr int UNIT_TILES = G == 4 ? 2 : 1;       // of a warp's step
template <int G> constexpr int UNIT_TOKENS = UNIT_TILES<G> * TILE_TOKENS;
constexpr int   EXACT_TOKENS = 8;               // a piece of the exact part: as many bytes as a tile of 4-bit codes

template <int G, int D> struct shared_row {
    alignas(16) int8_t q_high[8][D], q_low[8][D];
    float q_scale[8], q_half[8], q_mean[8];     // of a head: worth of the integer score, half the integers' sum, q . mean
    float m[WARPS][G], l[WARPS][G];
    int   last;
    __device__ float *o(int warp, int stride) { return (float *)(ring + (size_t)warp * stride); }        // [G][D], in the warp's own ring
    alignas(128) uint8_t ring[];
};

// Stages of a warp's ring: what fits when BLOCKS blocks share an SM.
constexpr int SM_BYTES = 227 * 1024, BLOCK_BYTES = 1024;
template <int KB, int VB, int D, int G, int BLOCKS> struct ring_of {
    static constexpr int unit_bytes = UNIT_TILES<G> * tile<KB, VB, D>::bytes, sums = G * D * 4;
    static constexpr int room = (SM_BYTES / BLOCKS - BLOCK_BYTES - (int)sizeof(shared_row<G, D>)) / WARPS;
    static constexpr int fit = room / unit_bytes, stages = fit < 2 ? 2 : fit > 6 ? 6 : fit;
    static constexpr int stride = (stages * unit_bytes > sums ? stages * unit_bytes : sums) + 127 & ~127;
    static constexpr int bytes = (int)sizeof(shared_row<G, D>) + WARPS * stride;
};

// What a row is: its tiles on the line are the exact pieces, then the tiles of codes from `tile0` on.
struct row_shape { int seq, kv_head, head0, n_q, n_exact, n_codes, first, tile0, exact_pieces, tiles; };

template <int G> __device__ __forceinline__ row_shape shape_of_seq(const attend_args &a, int seq)
{
    row_shape r;
    r.seq = seq;
    r.n_exact = a.n_exact ? a.n_exact[seq] : 0;
    r.n_codes = a.n_codes[seq];
    r.first = a.first ? min(max(a.first[seq], 0), r.n_codes) : 0;
    r.tile0 = r.first / UNIT_TOKENS<G>;
    r.exact_pieces = (r.n_exact + EXACT_TOKENS - 1) / EXACT_TOKENS;
    r.tiles = max(1, r.exact_pieces + (r.n_codes + UNIT_TOKENS<G> - 1) / UNIT_TOKENS<G> - r.tile0);     // an empty row still has an output
    return r;
}

// Rows of one sequence: its KV heads times runs of G query heads.
template <int G> __device__ __forceinline__ int runs_of(const attend_args &a) { return (a.n_heads / a.n_kv_heads + G - 1) / G; }

// The queries of a row, rotated, in 16 bits as two bytes.
template <int KB, int G, int D> __device__ void prepare(const attend_args &a, const row_shape &r, shared_row<G, D> &s, int warp, int lane)
{
    constexpr int V = D / 32;
    for (int h = warp; h < 8; h += WARPS) {
        float v[V], mean = 0, top = 0;
        const bool real = h < r.n_q;
        const float *q = a.q + ((size_t)r.seq * a.n_heads + r.head0 + (real ? h : 0)) * D + lane * V;
#pragma unroll
        for (int i = 0; i < V; i++) {
            v[i] = real ? q[i] : 0.0f;
            if (a.mean_k) mean = fmaf(v[i], a.mean_k[(size_t)r.kv_head * D + lane * V + i], mean);
            if (a.sign) v[i] *= a.sign[(size_t)r.kv_head * D + lane * V + i];
        }
        butterflies<V>(v, lane);
#pragma unroll
        for (int i = 0; i < V; i++) top = fmaxf(top, fabsf(v[i]));
        for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        const float grid = top > 0 ? 32512.0f / top : 0.0f;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < V; i++) {
            const int x = __float2int_rn(v[i] * grid), high = (x + 128) >> 8;
            s.q_high[h][lane * V + i] = (int8_t)high;
            s.q_low[h][lane * V + i] = (int8_t)(x - 256 * high);
            sum += x;
        }
        for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        mean = sum_over_warp(mean);
        if (lane == 0) {
            s.q_scale[h] = top / 32512.0f * rsqrtf((float)D) * a.kb.unit * a.scale * LOG2E;
            s.q_half[h] = a.kb.half * (float)sum;
            s.q_mean[h] = mean * a.scale * LOG2E;
        }
    }
}

// Merges the warps' parts that lie in s and leaves the block's in memory.
template <int G, int D> __device__ void leave_part(shared_row<G, D> &s, int stride, float *part, int n_q, int thread)
{
    __syncthreads();
    for (int x = thread; x < n_q * D; x += WARPS * 32) {
        const int h = x / D, d = x % D;
        float m = s.m[0][h], o = 0, l = 0;
#pragma unroll
        for (int w = 1; w < WARPS; w++) m = fmaxf(m, s.m[w][h]);
        if (m > -INFINITY)
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float e = exp2_fast(s.m[w][h] - m);
                o = fmaf(e, s.o(w, stride)[h * D + d], o);
                l = fmaf(e, s.l[w][h], l);
            }
        float *to = part + (size_t)h * (D + 2);
        to[2 + d] = o;
        if (d == 0) {
            to[0] = m;
            to[1] = l;
        }
    }
    __syncthreads();
}

// Exact tokens: pieces e0 <= e < e1 of the row, EXACT_TOKENS each, a warp a token at a time.
template <int G, int D> __device__ void attend_exact(const attend_args &a, const row_shape &r, shared_row<G, D> &s, int stride, int e0, int e1, int warp, int lane)
{
    constexpr int V = D / 32;
    float q[G][V], o[G][V], m[G], l[G];
#pragma unroll
    for (int h = 0; h < G; h++) {
        m[h] = -INFINITY;
        l[h] = 0;
#pragma unroll
        for (int i = 0; i < V; i++) {
            o[h][i] = 0;
            q[h][i] = h < r.n_q ? a.q[((size_t)r.seq * a.n_heads + r.head0 + h) * D + lane * V + i] * (a.scale * LOG2E) : 0.0f;
        }
    }
    const size_t base = ((size_t)r.seq * a.n_kv_heads + r.kv_head) * a.exact_capacity;
    for (int t = e0 * EXACT_TOKENS + warp; t < min(e1 * EXACT_TOKENS, r.n_exact); t += WARPS) {
        const __half *k = a.exact_k + (base + t) * D + lane * V, *v = a.exact_v + (base + t) * D + lane * V;
        float x[V], y[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            x[i] = __half2float(k[i]);
            y[i] = __half2float(v[i]);
        }
#pragma unroll
        for (int h = 0; h < G; h++) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < V; i++) score = fmaf(q[h][i], x[i], score);
            score = sum_over_warp(score);
            const float top = fmaxf(m[h], score), keep = exp2_fast(m[h] - top), p = exp2_fast(score - top);
            m[h] = top;
            l[h] = fmaf(l[h], keep, p);
#pragma unroll
            for (int i = 0; i < V; i++) o[h][i] = fmaf(o[h][i], keep, p * y[i]);
        }
    }
#pragma unroll
    for (int h = 0; h < G; h++) {
        if (lane == 0) {
            s.m[warp][h] = m[h];
            s.l[warp][h] = l[h];
        }
#pragma unroll
        for (int i = 0; i < V; i++) s.o(warp, stride)[h * D + lane * V + i] = o[h][i];
    }
}

// The last block of a row: sums of all its parts, turned back.  A warp a head; parts' weights go to the warp's ring.
template <int G, int D> __device__ __forceinline__ float add_parts(const float *parts, int n, float m, float *o, float *weight, int room, int lane)
{
    constexpr int V = D / 32;
    constexpr size_t PART = (size_t)G * (D + 2);
    float l = 0;
    for (int from = 0; from < n; from += room) {
        const int here = min(room, n - from);
        const float *p = parts + from * PART;
        __syncwarp();
        for (int i = lane; i < here; i += 32) {
            const float e = exp2_fast(__ldcg(p + i * PART) - m);
            weight[i] = e;
            l = fmaf(e, __ldcg(p + i * PART + 1), l);
        }
        __syncwarp();
#pragma unroll 8
        for (int i = 0; i < here; i++)
#pragma unroll
            for (int k = 0; k < V; k += 2) {
                const float2 v = __ldcg((const float2 *)(p + i * PART + 2 + lane * V + k));
                o[k] = fmaf(weight[i], v.x, o[k]);
                o[k + 1] = fmaf(weight[i], v.y, o[k + 1]);
            }
    }
    return sum_over_warp(l);
}

template <int G, int D> __device__ void merge(const attend_args &a, const row_shape &r, shared_row<G, D> &s, int stride, const float *codes, const float *exact, int n_codes, int n_exact, int warp, int lane)
{
    constexpr int V = D / 32;
    constexpr size_t HEAD = D + 2, PART = (size_t)G * HEAD;
    for (int h = warp; h < r.n_q; h += WARPS) {
        float m = -INFINITY;
        for (int i = lane; i < n_codes; i += 32) m = fmaxf(m, __ldcg(codes + i * PART + h * HEAD));
        for (int i = lane; i < n_exact; i += 32) m = fmaxf(m, __ldcg(exact + i * PART + h * HEAD));
        for (int i = 16; i; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
        float o[V] = {}, x[V] = {}, lc = 0, le = 0;
        if (m > -INFINITY) {
            float *weight = s.o(warp, stride);
            lc = add_parts<G, D>(codes + h * HEAD, n_codes, m, o, weight, stride / 4, lane);
            le = add_parts<G, D>(exact + h * HEAD, n_exact, m, x, weight, stride / 4, lane);
        }
        butterflies<V>(o, lane);
        const float whole = lc + le, by = whole > 0 ? 1 / whole : 0.0f, norm = rsqrtf((float)D);
        float *out = a.out + ((size_t)r.seq * a.n_heads + r.head0 + h) * D + lane * V;
#pragma unroll
        for (int k = 0; k < V; k++) {
            const int at = r.kv_head * D + lane * V + k;
            float y = o[k] * norm;
            if (a.sign) y *= a.sign[(size_t)a.n_kv_heads * D + at];
            if (a.mean_v) y = fmaf(lc, a.mean_v[at], y);
            out[k] = (y + x[k]) * by;
        }
    }
}

}  // namespace detail
}  // namespace kelvin
