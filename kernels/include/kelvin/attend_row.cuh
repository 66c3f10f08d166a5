// attend_row.cuh -- decode attention: what belongs to a row (sequence, KV head, up to 8 query heads) beside its codes: queries, exact
// tokens, a block's part, the merge of all parts.
#pragma once
#include "fragment.cuh"
#include "hadamard.cuh"

namespace kelvin {

// A KV head's keys or values in a cache that keeps each apart: tiles one after the other, exact rows in `sink` and in a ring.
struct attend_slot {
    const uint8_t *codes, *sink, *tail;         // of sequence 0
    size_t         codes_stride, sink_stride, tail_stride;      // bytes to the next sequence's
    const float   *sign, *mean;                 // [D] or null
};

// What a sequence holds, from its books: position p < sink lies in the sink, up to sink + encoded in codes, then in the ring at (p - sink) % tail_rows.
struct attend_books {
    const int *length, *encoded;                // tokens before this step's one; [n_seqs][n_kinds] in codes
    int        n_kinds, kind, sink, recent, never, window /* 0: none */, tail_rows, dtype /* of exact rows: 0 f32, 1 f16, 2 bf16 */;
};

struct attend_args {
    const float   *q;               // [n_seqs][n_heads][D], before rotation
    float         *out;             // [n_seqs][n_heads][D]
    // Either a pool of pages and arrays of the caller's ...
    const uint8_t *pool;            // [page][n_kv_heads][page_tiles][tile]
    const int     *pages;           // [n_seqs][max_pages]
    const int     *n_codes;         // [n_seqs] tokens in codes, counted from the first page on
    const int     *first;           // [n_seqs] or null: codes before it are not attended (sliding windows)
    const float   *sign;            // [n_kv_heads][D] of keys, then of values, or null
    const __half  *exact_k, *exact_v;     // [n_seqs][n_kv_heads][exact_capacity][D] or null: sinks and the recent window
    const int     *n_exact;         // [n_seqs] or null
    const float   *mean_k, *mean_v; // [n_kv_heads][D] or null: what was removed before coding
    // ... or, with pages null, slots [n_kv_heads][2] and books.
    const attend_slot *slots;
    attend_books   books;
    float         *partials;        // attend_partials() floats
    int           *arrivals;        // [rows], zero; left zero
    int            n_seqs, n_heads, n_kv_heads, max_pages, page_shift /* log2 of a page's tiles */, exact_capacity;
    float          scale;           // of q . k, 1/sqrt(D) usually
    codebook       kb, vb;
    bool           plain_k, plain_v;        // codes of rows that were not turned by sign and Hadamard
};

namespace detail {

constexpr int WARPS = 4;
#ifndef KELVIN_BULK                     // tiles come by bulk copies where the machine has them
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KELVIN_BULK true
#else
#define KELVIN_BULK false
#endif
#endif
constexpr bool BULK = KELVIN_BULK;
#ifndef KELVIN_AHEAD                    // units that are brought to the second-level cache before the ring has room for them
#define KELVIN_AHEAD 0
#endif
constexpr int AHEAD = KELVIN_AHEAD;

__device__ __forceinline__ float sum_over_warp(float v)
{
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

constexpr float LOG2E = 1.4426950408889634f;
template <int G> constexpr int UNIT_TILES = G == 4 ? 2 : 1;       // of a warp's step
template <int G> constexpr int UNIT_TOKENS = UNIT_TILES<G> * TILE_TOKENS;
constexpr int   EXACT_TOKENS = 8;               // a piece of the exact part: as many bytes as a tile of 4-bit codes

constexpr int   MAX_STAGES = 6;
template <int G, int D> constexpr int SUMS = G == 4 ? D / 16 : D / 8;      // products that a lane adds up, of four integers

template <int G, int D> struct shared_row {
    alignas(16) int8_t q_high[G][D], q_low[G][D];
    float q_scale[G], q_mean[G];                // of a head: worth of the integer score, q . mean
    int   q_half[G];                            // half the integers' sum
    float m[WARPS][G], l[WARPS][G];             // a warp's part: relative to 2^m, sum of weights,
    float by[WARPS][G], half[WARPS][G], keep[WARPS][G];         // what its integers are worth, what is added to them, what its sums in memory are worth
    int   last;
    uint64_t barriers[WARPS][MAX_STAGES];
    alignas(128) uint8_t ring[];                // of each warp; between rows: its integers, or its exact tokens' sums [G][D]
};

// Stages of a warp's ring: what fits when BLOCKS blocks share an SM.
constexpr int SM_BYTES = 227 * 1024, BLOCK_BYTES = 1024;
template <int KB, int VB, int D, int G, int BLOCKS> struct ring_of {
    static constexpr int k_bytes = tile<KB, VB, D>::k_bytes, v_bytes = tile<KB, VB, D>::v_bytes, unit_bytes = UNIT_TILES<G> * (k_bytes + v_bytes);
    static constexpr int room = (SM_BYTES / BLOCKS - BLOCK_BYTES - (int)sizeof(shared_row<G, D>)) / WARPS;
    static constexpr int fit = room / unit_bytes, stages = fit < 2 ? 2 : fit > MAX_STAGES ? MAX_STAGES : fit, sums = SUMS<G, D> * 512;
    static constexpr int stride = stages * unit_bytes > sums ? stages * unit_bytes : sums;
    static constexpr int bytes = (int)sizeof(shared_row<G, D>) + WARPS * stride;
};

// What a row is: its pieces on the line are `lead` empty ones (what a new row costs), the exact tokens, then units of codes from `unit0` on.
struct row_shape { int seq, kv_head, head0, n_q, n_exact, n_sink, sink0, tail0, n_codes, first, unit0, exact_pieces, pieces; };

template <int G> __device__ __forceinline__ row_shape shape_of_seq(const attend_args &a, int seq)
{
    row_shape r;
    r.seq = seq;
    r.n_sink = r.sink0 = r.tail0 = 0;
    if (a.pages) {
        r.n_exact = a.n_exact ? a.n_exact[seq] : 0;
        r.n_codes = a.n_codes[seq];
        r.first = a.first ? min(max(a.first[seq], 0), r.n_codes) : 0;
    } else {
        const attend_books &b = a.books;
        const int n = b.length[seq] + 1, seen = b.window > 0 ? max(n - b.window, 0) : 0, sinks = min(b.sink, n);
        r.n_codes = b.never ? 0 : max(b.encoded[(size_t)seq * b.n_kinds + b.kind], max(n - b.sink - b.recent, 0));
        r.first = min(max(seen - b.sink, 0), r.n_codes);
        r.sink0 = min(seen, sinks);
        r.n_sink = sinks - r.sink0;
        r.tail0 = max(seen - b.sink, r.n_codes);
        r.n_exact = r.n_sink + max(n - b.sink - r.tail0, 0);
    }
    r.unit0 = r.first / UNIT_TOKENS<G>;
    r.exact_pieces = (r.n_exact + EXACT_TOKENS - 1) / EXACT_TOKENS;
    r.pieces = max(1, r.exact_pieces + (r.n_codes + UNIT_TOKENS<G> - 1) / UNIT_TOKENS<G> - r.unit0);     // an empty row still has an output
    return r;
}

// Signs, means and exact rows of a row's side.
template <int D> struct row_side {
    const float *sign, *mean;
    __device__ __forceinline__ row_side(const attend_args &a, const row_shape &r, int side)
    {
        if (a.pages) {
            sign = a.sign ? a.sign + ((size_t)side * a.n_kv_heads + r.kv_head) * D : nullptr;
            mean = side ? a.mean_v : a.mean_k;
            if (mean) mean += (size_t)r.kv_head * D;
        } else {
            const attend_slot &s = a.slots[r.kv_head * 2 + side];
            sign = s.sign, mean = s.mean;
        }
    }
};

// A lane's V elements of exact row t.
template <int D> __device__ __forceinline__ void exact_row(const attend_args &a, const row_shape &r, int side, int t, int lane, float *x)
{
    constexpr int V = D / 32;
    const int dtype = a.pages ? 1 : a.books.dtype;
    const uint8_t *at;
    if (a.pages) at = (const uint8_t *)((side ? a.exact_v : a.exact_k) + (((size_t)r.seq * a.n_kv_heads + r.kv_head) * a.exact_capacity + t) * D);
    else {
        const attend_slot &s = a.slots[r.kv_head * 2 + side];
        const size_t bytes = (size_t)D * (dtype ? 2 : 4);
        at = t < r.n_sink ? s.sink + r.seq * s.sink_stride + (r.sink0 + t) * bytes : s.tail + r.seq * s.tail_stride + (r.tail0 + t - r.n_sink) % a.books.tail_rows * bytes;
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
        const int k = lane * V + i;
        x[i] = dtype == 1 ? __half2float(((const __half *)at)[k]) : dtype == 2 ? __uint_as_float((uint32_t)((const uint16_t *)at)[k] << 16) : ((const float *)at)[k];
    }
}

// Rows of one sequence: its KV heads times runs of G query heads.
template <int G> __device__ __forceinline__ int runs_of(const attend_args &a) { return (a.n_heads / a.n_kv_heads + G - 1) / G; }

// The queries of a row, rotated, in 16 bits as two bytes.
template <int KB, int G, int D> struct queries {
    static constexpr int V = D / 32, N = G / WARPS;
    float v[N][V];
    __device__ __forceinline__ void load(const attend_args &a, const row_shape &r, int warp, int lane)
    {
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int h = warp + n * WARPS;
            const float *q = a.q + ((size_t)r.seq * a.n_heads + r.head0 + (h < r.n_q ? h : 0)) * D + lane * V;
#pragma unroll
            for (int i = 0; i < V; i += 2) {
                const float2 x = *(const float2 *)(q + i);
                v[n][i] = x.x, v[n][i + 1] = x.y;
            }
        }
    }
    __device__ __forceinline__ void prepare(const attend_args &a, const row_shape &r, shared_row<G, D> &s, int warp, int lane)
    {
        const row_side<D> keys(a, r, 0);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int h = warp + n * WARPS;
            float mean = 0, top = 0;
#pragma unroll
            for (int i = 0; i < V; i++) {
                if (keys.mean) mean = fmaf(v[n][i], keys.mean[lane * V + i], mean);
                if (keys.sign) v[n][i] *= keys.sign[lane * V + i];
            }
            if (!a.plain_k) butterflies<V>(v[n], lane);
#pragma unroll
            for (int i = 0; i < V; i++) top = fmaxf(top, fabsf(v[n][i]));
            for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
            const float grid = top > 0 ? 32512.0f / top : 0.0f;
            int sum = 0;
#pragma unroll
            for (int i = 0; i < V; i++) {
                const int x = __float2int_rn(v[n][i] * grid), high = (x + 128) >> 8;
                s.q_high[h][lane * V + i] = (int8_t)high;
                s.q_low[h][lane * V + i] = (int8_t)(x - 256 * high);
                sum += x;
            }
            for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
            if (keys.mean) mean = sum_over_warp(mean);
            if (lane == 0) {
                s.q_scale[h] = top / 32512.0f * (a.plain_k ? 1.0f : rsqrtf((float)D)) * a.kb.unit * a.scale * LOG2E;
                s.q_half[h] = a.kb.half > 0 ? (sum + 1) >> 1 : 0;       // of scores up to 2^29: half a one is nothing
                s.q_mean[h] = mean * a.scale * LOG2E;
            }
        }
    }
};

// Merges the warps' parts that lie in s and leaves the block's in memory.  CODES: integers, and what their warps have in `far`.
template <bool CODES, int G, int D> __device__ void leave_part(shared_row<G, D> &s, int stride, const float *far, float unit, float *part, int n_q, int thread)
{
    __syncthreads();
    for (int x = thread; x < n_q * D; x += WARPS * 32) {
        const int h = x / D, d = x % D;
        const int high = G == 4 ? (d / 16 * 32 + d % 8 * 4 + h / 2) * 4 + d % 16 / 8 * 2 + h % 2 : (d / 8 * 32 + h * 4 + d % 8 / 2) * 4 + d % 2, low = high + (G == 4 ? 8 : 2);
        float m = s.m[0][h], o = 0, l = 0;
#pragma unroll
        for (int w = 1; w < WARPS; w++) m = fmaxf(m, s.m[w][h]);
        if (m > -INFINITY)
#pragma unroll 1
            for (int w = 0; w < WARPS; w++) {
                const float e = exp2_fast(s.m[w][h] - m);
                float v;
                if constexpr (CODES) {
                    const int *acc = (const int *)(s.ring + (size_t)w * stride);
                    v = fmaf(fmaf((float)acc[high], 256.0f, (float)acc[low]), s.by[w][h], s.half[w][h]);
                    if (s.keep[w][h] > 0) {
                        const float *f = far + (size_t)w * SUMS<G, D> * 128;
                        v = fmaf(fmaf(f[high / 128 * 128 + high % 4 * 32 + high % 128 / 4], 256.0f, f[low / 128 * 128 + low % 4 * 32 + low % 128 / 4]), s.keep[w][h], v);
                    }
                } else v = ((const float *)(s.ring + (size_t)w * stride))[x];
                o = fmaf(e, v, o);
                l = fmaf(e, s.l[w][h], l);
            }
        float *to = part + (size_t)h * (D + 2);
        to[2 + d] = o * unit;
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
    for (int t = e0 * EXACT_TOKENS + warp; t < min(e1 * EXACT_TOKENS, r.n_exact); t += WARPS) {
        float x[V], y[V];
        exact_row<D>(a, r, 0, t, lane, x);
        exact_row<D>(a, r, 1, t, lane, y);
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
        for (int i = 0; i < V; i++) ((float *)(s.ring + (size_t)warp * stride))[h * D + lane * V + i] = o[h][i];
    }
}

// The last block of a row: sums of all its parts, turned back.  A warp a head; parts' weights go to the warp's own sums.
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
#pragma unroll 4
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
    const row_side<D> values(a, r, 1);
    for (int h = warp; h < r.n_q; h += WARPS) {
        float m = -INFINITY;
        for (int i = lane; i < n_codes; i += 32) m = fmaxf(m, __ldcg(codes + i * PART + h * HEAD));
        for (int i = lane; i < n_exact; i += 32) m = fmaxf(m, __ldcg(exact + i * PART + h * HEAD));
        for (int i = 16; i; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
        float o[V] = {}, x[V] = {}, lc = 0, le = 0;
        if (m > -INFINITY) {
            float *weight = (float *)(s.ring + (size_t)warp * stride);
            lc = add_parts<G, D>(codes + h * HEAD, n_codes, m, o, weight, G * D, lane);
            le = add_parts<G, D>(exact + h * HEAD, n_exact, m, x, weight, G * D, lane);
        }
        if (!a.plain_v) butterflies<V>(o, lane);
        const float whole = lc + le, by = whole > 0 ? 1 / whole : 0.0f, norm = a.plain_v ? 1.0f : rsqrtf((float)D);
        float *out = a.out + ((size_t)r.seq * a.n_heads + r.head0 + h) * D + lane * V;
#pragma unroll
        for (int k = 0; k < V; k++) {
            const int at = lane * V + k;
            float y = o[k] * norm;
            if (values.sign) y *= values.sign[at];
            if (values.mean) y = fmaf(lc, values.mean[at], y);
            out[k] = (y + x[k]) * by;
        }
    }
}

}  // namespace detail
}  // namespace kelvin
