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
#include "fragment.cuh"

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

// Cuts of the line: block c takes tiles c * total / blocks on.
constexpr int TILES_A_BLOCK = 8;                // fewer are not worth a block: its part must be merged

__device__ __forceinline__ long long cut(long long total, int blocks, int c) { return total * c / blocks; }
__device__ __forceinline__ int block_of(long long total, int blocks, long long tile) { return (int)(((tile + 1) * blocks - 1) / total); }

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

// A row of D floats over a warp, lane l holding l*V .. l*V+V-1, through sign and the orthonormal FWHT (or back: then sign last).
template <int V> __device__ __forceinline__ void butterflies(float v[V], int lane)
{
#pragma unroll
    for (int h = 1; h < V; h *= 2)
#pragma unroll
        for (int i = 0; i < V; i++)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
#pragma unroll
    for (int h = 1; h < 32; h *= 2)
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float other = __shfl_xor_sync(~0u, v[i], h);
            v[i] = lane & h ? other - v[i] : v[i] + other;
        }
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

// A lane's words of a side that lies in shared memory.
template <int BITS, int D> __device__ __forceinline__ void load_words(uint32_t *w, const uint8_t *at, int lane)
{
    using S = side<BITS, D>;
#pragma unroll
    for (int i = 0; i < S::quads; i++) {
        const uint4 v = *(const uint4 *)(at + i * 512 + lane * 16);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
    if constexpr (S::pairs) {
        const uint2 v = *(const uint2 *)(at + S::quads * 512 + lane * 8);
        w[4 * S::quads] = v.x, w[4 * S::quads + 1] = v.y;
    }
}

// A warp's way through its units i0 + warp, i0 + warp + WARPS, ... < i1: memory to the stages of its ring.
template <class RING, int G> struct stream {
    static constexpr int BYTES = RING::unit_bytes, STAGES = RING::stages;
    uint8_t *ring;
    const int *pages;
    const uint8_t *pool;
    size_t page_bytes;
    int ahead, end, page, shift, lane, stage = 0;

    __device__ __forceinline__ stream(const attend_args &a, const row_shape &r, uint8_t *ring, int i0, int i1, int warp, int lane)
        : ring(ring), pages(a.pages + (size_t)r.seq * a.max_pages), pool(a.pool + ((size_t)r.kv_head << a.page_shift) * (BYTES / UNIT_TILES<G>)),
          page_bytes(((size_t)a.n_kv_heads << a.page_shift) * (BYTES / UNIT_TILES<G>)), ahead(i0 + warp), end(i1), page(0),
          shift(a.page_shift - (UNIT_TILES<G> - 1)), lane(lane)
    {
        if (ahead < end) page = __ldg(pages + (ahead >> shift));
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) fetch(i);
    }
    __device__ __forceinline__ void fetch(int to_stage)
    {
        if (ahead < end) {
            const uint8_t *from = pool + (size_t)page * page_bytes + (ahead & (1 << shift) - 1) * BYTES + lane * 16;
            uint8_t *to = ring + to_stage * BYTES + lane * 16;
#pragma unroll
            for (int i = 0; i < BYTES / 512; i++) copy_async(to + i * 512, from + i * 512);
            if (BYTES % 512 && lane < BYTES % 512 / 16) copy_async(to + BYTES / 512 * 512, from + BYTES / 512 * 512);
            ahead += WARPS;
            if (ahead < end) page = __ldg(pages + (ahead >> shift));
        }
        copy_commit();
    }
    // The next unit; the stage of the one before it is filled again.
    __device__ __forceinline__ const uint8_t *next()
    {
        copy_wait<STAGES - 2>();
        __syncwarp();
        const uint8_t *at = ring + stage * BYTES;
        fetch(stage ? stage - 1 : STAGES - 1);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        return at;
    }
};

// Products of a tile's keys with the query's fragments.
template <int KB, int D, int N> __device__ __forceinline__ void score_tile(const attend_args &a, const uint8_t *at, const uint32_t *const q[N], int c[N][2][4], int lane)
{
    constexpr int KS = D / 32;
    uint32_t w[side<KB, D>::words];
    load_words<KB, D>(w, at, lane);
#pragma unroll
    for (int mt = 0; mt < 2; mt++)
#pragma unroll
        for (int ks = 0; ks < KS; ks += 2) {
            uint32_t f[8];
            unpack_two<KB>(w + (mt * KS + ks) * KB / 2, a.kb.t0, a.kb.t1, f);
#pragma unroll
            for (int n = 0; n < N; n++) {
                if (ks == 0) product_s8(c[n][mt], f, q[n][0], q[n][1]);
                else product_add_s8(c[n][mt], f, q[n][2 * ks], q[n][2 * ks + 1]);
                product_add_s8(c[n][mt], f + 4, q[n][2 * ks + 2], q[n][2 * ks + 3]);
            }
        }
}

__device__ __forceinline__ void four_halves(uint2 v, float x[4])
{
    const float2 a = __half22float2(*(const __half2 *)&v.x), b = __half22float2(*(const __half2 *)&v.y);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

constexpr float FLOOR = -1e30f;         // below every score: a running maximum that saw nothing, without inf - inf

// Up to 4 query heads.  A unit is two tiles; columns 0..3 of a product are the heads' high bytes, 4..7 their low bytes, so lanes
// t < 2 end with the first tile's scores and lanes t >= 2 with the second's: nothing is computed twice.
template <int KB, int VB, int D, class RING> __device__ void attend_codes(const attend_args &a, const row_shape &r, shared_row<4, D> &s, int i0, int i1, int warp, int lane)
{
    constexpr int KS = D / 32, DS = D / 16;
    using T = tile<KB, VB, D>;
    const int g = lane / 4, t = lane % 4, h0 = 2 * t & 3, h1 = h0 + 1;
    const bool first = t < 2;                           // of the two tiles; and these columns are high bytes
    stream<RING, 4> in(a, r, s.ring + (size_t)warp * RING::stride, i0, i1, warp, lane);
    uint32_t q[2 * KS];
#pragma unroll
    for (int i = 0; i < 2 * KS; i++) q[i] = *(const uint32_t *)((g < 4 ? s.q_high[g] : s.q_low[g - 4]) + i / 2 * 32 + i % 2 * 16 + 4 * t);
    const uint32_t *const queries[1] = { q };
    const float scale0 = s.q_scale[h0], scale1 = s.q_scale[h1], half0 = s.q_half[h0], half1 = s.q_half[h1], mean0 = s.q_mean[h0], mean1 = s.q_mean[h1];
    const float own = first ? 256.0f : 1.0f, other = first ? 1.0f : 256.0f;
    const uint32_t keep = g < 4 ? 0x7531u : 0x6420u, send = g < 4 ? 0x6420u : 0x7531u;
    float acc[DS][4], m0 = FLOOR, m1 = FLOOR, l0 = 0, l1 = 0, w0 = 0, w1 = 0;
#pragma unroll
    for (int i = 0; i < DS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0;

    for (int i = i0 + warp; i < i1; i += WARPS) {
        const uint8_t *at = in.next();
        int c0[1][2][4], c1[1][2][4];
        score_tile<KB, D, 1>(a, at, queries, c0, lane);
        score_tile<KB, D, 1>(a, at + T::bytes, queries, c1, lane);
        const uint4 norms = *(const uint4 *)(at + (first ? 0 : T::bytes) + T::k_bytes + T::v_bytes + g * 16);
        float nk[4], nv[4], x[4][2];
        four_halves({ norms.x, norms.y }, nk);
        four_halves({ norms.z, norms.w }, nv);
#pragma unroll
        for (int row = 0; row < 4; row++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int p = c0[0][row / 2][row % 2 * 2 + j], n = c1[0][row / 2][row % 2 * 2 + j];
                const int mine = first ? p : n, got = __shfl_xor_sync(~0u, first ? n : p, 2);
                const float sum = fmaf(counted(mine), own, counted(got) * other);
                x[row][j] = fmaf(sum + (j ? half1 : half0), nk[row] * (j ? scale1 : scale0), j ? mean1 : mean0);
            }
            // A weight is p |v|: the norm goes into the exponent, so that the largest weight of a tile is 1 exactly.
            const float norm = fmaxf(nv[row], 5.9604645e-8f);          // also of a NaN in an unused slot
            const float lift = log2_fast(norm);
            nv[row] = reciprocal_fast(norm);
            x[row][0] += lift, x[row][1] += lift;
        }
        if (i * UNIT_TOKENS<4> < r.first || (i + 1) * UNIT_TOKENS<4> > r.n_codes) {
            const int token = i * UNIT_TOKENS<4> + (first ? 0 : TILE_TOKENS) + g;
            __syncwarp();
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (token + 8 * row < r.first || token + 8 * row >= r.n_codes) x[row][0] = x[row][1] = -INFINITY;
        }
        const float t0 = fmaxf(max_over_rows(fmaxf(fmaxf(x[0][0], x[1][0]), fmaxf(x[2][0], x[3][0]))), FLOOR);
        const float t1 = fmaxf(max_over_rows(fmaxf(fmaxf(x[0][1], x[1][1]), fmaxf(x[2][1], x[3][1]))), FLOOR);
        const float o0 = __shfl_xor_sync(~0u, t0, 2), o1 = __shfl_xor_sync(~0u, t1, 2), n0 = fmaxf(t0, o0), n1 = fmaxf(t1, o1);
        if (__any_sync(~0u, n0 > m0 || n1 > m1)) {
            const float k0 = fmaxf(m0, n0), k1 = fmaxf(m1, n1), r0 = exp2_fast(m0 - k0), r1 = exp2_fast(m1 - k1);
            m0 = k0, m1 = k1, l0 *= r0, l1 *= r1, w0 *= r0, w1 *= r1;
#pragma unroll
            for (int k = 0; k < DS; k++) acc[k][0] *= r0, acc[k][1] *= r1, acc[k][2] *= r0, acc[k][3] *= r1;
        }
        float sl0 = 0, sl1 = 0, sw0 = 0, sw1 = 0;
        uint32_t p[4];
#pragma unroll
        for (int row = 0; row < 4; row++) {
            const float p0 = exp2_fast(x[row][0] - t0), p1 = exp2_fast(x[row][1] - t1);
            sl0 = fmaf(p0, nv[row], sl0), sl1 = fmaf(p1, nv[row], sl1);
            if constexpr (VB == 4) sw0 += p0, sw1 += p1;
            p[row] = transpose_b16(byte_lookup(__float_as_uint(fmaf(p0, 65535.0f, 8388608.0f)), __float_as_uint(fmaf(p1, 65535.0f, 8388608.0f)), 0x5410));
        }
        const float e0 = exp2_fast(t0 - m0), e1 = exp2_fast(t1 - m1), f0 = exp2_fast(o0 - m0) * (1 / 65535.0f), f1 = exp2_fast(o1 - m1) * (1 / 65535.0f);
        l0 = fmaf(sl0, e0, l0), l1 = fmaf(sl1, e1, l1);
        if constexpr (VB == 4) w0 = fmaf(sw0, e0, w0), w1 = fmaf(sw1, e1, w1);
        // Transposed, lanes g < 4 hold the first tile's weights of head g, the others the second tile's of head g - 4.
        const uint32_t own0 = byte_lookup(p[0], p[1], keep), own1 = byte_lookup(p[2], p[3], keep);
        const uint32_t got0 = __shfl_xor_sync(~0u, byte_lookup(p[0], p[1], send), 16), got1 = __shfl_xor_sync(~0u, byte_lookup(p[2], p[3], send), 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool mine = (g < 4) == (half == 0);
            const uint32_t b0 = mine ? own0 : got0, b1 = mine ? own1 : got1;
            const float u0 = first == (half == 0) ? e0 * (1 / 65535.0f) : f0, u1 = first == (half == 0) ? e1 * (1 / 65535.0f) : f1;
            uint32_t w[side<VB, D>::words];
            load_words<VB, D>(w, at + half * T::bytes + T::k_bytes, lane);
#pragma unroll
            for (int k = 0; k < DS; k += 2) {
                uint32_t f[8];
                unpack_two<VB>(w + k * VB / 2, a.vb.t0, a.vb.t1, f);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    int d[4];
                    product_s8u8(d, f + 4 * n, b0, b1);
#pragma unroll
                    for (int j = 0; j < 4; j++) acc[k + n][j] = fmaf(counted(d[j]), j % 2 ? u1 : u0, acc[k + n][j]);
                }
            }
        }
        __syncwarp();
    }
    copy_wait<0>();
    __syncwarp();

    l0 = sum_over_rows(l0), l1 = sum_over_rows(l1);
    l0 += __shfl_xor_sync(~0u, l0, 2), l1 += __shfl_xor_sync(~0u, l1, 2);
    if constexpr (VB == 4) {
        w0 = sum_over_rows(w0), w1 = sum_over_rows(w1);
        w0 = (w0 + __shfl_xor_sync(~0u, w0, 2)) * a.vb.half, w1 = (w1 + __shfl_xor_sync(~0u, w1, 2)) * a.vb.half;
    }
    if (g == 0 && first) {
        s.m[warp][h0] = m0, s.m[warp][h1] = m1;
        s.l[warp][h0] = l0, s.l[warp][h1] = l1;
    }
    float *const o = s.o(warp, RING::stride);
#pragma unroll
    for (int k = 0; k < DS; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float sum = fmaf(acc[k][j], own, __shfl_xor_sync(~0u, acc[k][j], 2) * other);
            if (first) o[(j % 2 ? h1 : h0) * D + k * 16 + j / 2 * 8 + g] = (sum + (j % 2 ? w1 : w0)) * a.vb.unit;
        }
}

// 5 to 8 query heads: high and low bytes in products of their own, a tile a step.
template <int KB, int VB, int D, class RING> __device__ void attend_codes(const attend_args &a, const row_shape &r, shared_row<8, D> &s, int i0, int i1, int warp, int lane)
{
    constexpr int KS = D / 32, DS = D / 16;
    using T = tile<KB, VB, D>;
    const int g = lane / 4, t = lane % 4, h0 = 2 * t, h1 = h0 + 1;
    stream<RING, 8> in(a, r, s.ring + (size_t)warp * RING::stride, i0, i1, warp, lane);
    uint32_t qa[2 * KS], qb[2 * KS];
#pragma unroll
    for (int i = 0; i < 2 * KS; i++) {
        qa[i] = *(const uint32_t *)(s.q_high[g] + i / 2 * 32 + i % 2 * 16 + 4 * t);
        qb[i] = *(const uint32_t *)(s.q_low[g] + i / 2 * 32 + i % 2 * 16 + 4 * t);
    }
    const uint32_t *const queries[2] = { qa, qb };
    const float scale0 = s.q_scale[h0], scale1 = s.q_scale[h1], half0 = s.q_half[h0], half1 = s.q_half[h1], mean0 = s.q_mean[h0], mean1 = s.q_mean[h1];
    float acc[DS][4], m0 = FLOOR, m1 = FLOOR, l0 = 0, l1 = 0, w0 = 0, w1 = 0;
#pragma unroll
    for (int i = 0; i < DS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0;

    for (int i = i0 + warp; i < i1; i += WARPS) {
        const uint8_t *at = in.next();
        int c[2][2][4];
        score_tile<KB, D, 2>(a, at, queries, c, lane);
        const uint4 norms = *(const uint4 *)(at + T::k_bytes + T::v_bytes + g * 16);
        float nk[4], nv[4], x[4][2];
        four_halves({ norms.x, norms.y }, nk);
        four_halves({ norms.z, norms.w }, nv);
#pragma unroll
        for (int row = 0; row < 4; row++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float sum = fmaf(counted(c[0][row / 2][row % 2 * 2 + j]), 256.0f, counted(c[1][row / 2][row % 2 * 2 + j]));
                x[row][j] = fmaf(sum + (j ? half1 : half0), nk[row] * (j ? scale1 : scale0), j ? mean1 : mean0);
            }
#pragma unroll
        for (int row = 0; row < 4; row++) {
            const float norm = fmaxf(nv[row], 5.9604645e-8f), lift = log2_fast(norm);
            nv[row] = reciprocal_fast(norm);
            x[row][0] += lift, x[row][1] += lift;
        }
        if (i * TILE_TOKENS < r.first || (i + 1) * TILE_TOKENS > r.n_codes) {
            const int token = i * TILE_TOKENS + g;
            __syncwarp();
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (token + 8 * row < r.first || token + 8 * row >= r.n_codes) x[row][0] = x[row][1] = -INFINITY;
        }
        const float t0 = max_over_rows(fmaxf(fmaxf(x[0][0], x[1][0]), fmaxf(x[2][0], x[3][0])));
        const float t1 = max_over_rows(fmaxf(fmaxf(x[0][1], x[1][1]), fmaxf(x[2][1], x[3][1])));
        if (__any_sync(~0u, t0 > m0 || t1 > m1)) {
            const float n0 = fmaxf(m0, t0), n1 = fmaxf(m1, t1), r0 = exp2_fast(m0 - n0), r1 = exp2_fast(m1 - n1);
            m0 = n0, m1 = n1, l0 *= r0, l1 *= r1, w0 *= r0, w1 *= r1;
#pragma unroll
            for (int k = 0; k < DS; k++) acc[k][0] *= r0, acc[k][1] *= r1, acc[k][2] *= r0, acc[k][3] *= r1;
        }
        float sl0 = 0, sl1 = 0, sw0 = 0, sw1 = 0;
        uint32_t p[4];
#pragma unroll
        for (int row = 0; row < 4; row++) {
            const float p0 = exp2_fast(x[row][0] - t0), p1 = exp2_fast(x[row][1] - t1);
            sl0 = fmaf(p0, nv[row], sl0), sl1 = fmaf(p1, nv[row], sl1);
            if constexpr (VB == 4) sw0 += p0, sw1 += p1;
            p[row] = transpose_b16(byte_lookup(__float_as_uint(fmaf(p0, 65535.0f, 8388608.0f)), __float_as_uint(fmaf(p1, 65535.0f, 8388608.0f)), 0x5410));
        }
        const float e0 = exp2_fast(t0 - m0), e1 = exp2_fast(t1 - m1), u0 = e0 * (1 / 65535.0f), u1 = e1 * (1 / 65535.0f);
        l0 = fmaf(sl0, e0, l0), l1 = fmaf(sl1, e1, l1);
        if constexpr (VB == 4) w0 = fmaf(sw0, e0, w0), w1 = fmaf(sw1, e1, w1);
        const uint32_t b0 = byte_lookup(p[0], p[1], 0x7531), b1 = byte_lookup(p[2], p[3], 0x7531);
        const uint32_t b2 = byte_lookup(p[0], p[1], 0x6420), b3 = byte_lookup(p[2], p[3], 0x6420);
        uint32_t w[side<VB, D>::words];
        load_words<VB, D>(w, at + T::k_bytes, lane);
#pragma unroll
        for (int k = 0; k < DS; k += 2) {
            uint32_t f[8];
            unpack_two<VB>(w + k * VB / 2, a.vb.t0, a.vb.t1, f);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int d[4], e[4];
                product_s8u8(d, f + 4 * n, b0, b1);
                product_s8u8(e, f + 4 * n, b2, b3);
#pragma unroll
                for (int j = 0; j < 4; j++) acc[k + n][j] = fmaf(fmaf(counted(d[j]), 256.0f, counted(e[j])), j % 2 ? u1 : u0, acc[k + n][j]);
            }
        }
        __syncwarp();
    }
    copy_wait<0>();
    __syncwarp();

    l0 = sum_over_rows(l0), l1 = sum_over_rows(l1);
    if constexpr (VB == 4) w0 = sum_over_rows(w0) * a.vb.half, w1 = sum_over_rows(w1) * a.vb.half;
    if (g == 0) {
        s.m[warp][h0] = m0, s.m[warp][h1] = m1;
        s.l[warp][h0] = l0, s.l[warp][h1] = l1;
    }
    float *const o = s.o(warp, RING::stride);
#pragma unroll
    for (int k = 0; k < DS; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[(j % 2 ? h1 : h0) * D + k * 16 + j / 2 * 8 + g] = (acc[k][j] + (j % 2 ? w1 : w0)) * a.vb.unit;
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
    extern __shared__ uint8_t memory[];
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
