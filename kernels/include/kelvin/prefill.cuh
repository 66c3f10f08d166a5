// prefill.cuh -- attention of many new queries over keys and values in bf16 images (prefill_image.cuh): a slab decoded from codes, exact rows, or both.
//
// Rows of a KV head are packed: row = token * group + head of the group.  A block takes ROWS of them; keys and values pass through shared
// memory; scores, weights and sums stay in registers, everything is in base 2.  A part leaves unnormalised sums, maximum and sum of
// weights in f32; merge_parts joins any number of parts (splits of the keys, slabs) and turns the output back.
//
// What a query sees of a source is an interval of positions.  With boundaries b (prefill_args.bound) the four kinds of source together are
// each position once, as feeding the tokens one at a time would have shown it: below b the coded version (late), from b on the exact
// one (early), keys and values apart.
#pragma once
#include "prefill_image.cuh"

namespace kelvin {

enum { SOURCE_WHOLE, SOURCE_LATE, SOURCE_EARLY, SOURCE_KEYS_LATE, SOURCE_VALUES_LATE };

// Positions [begin, end) of keys and values.  Position p lies in image (p + shift) / KEYS of the grid; the grid's image i is image i - origin of the source.
struct prefill_source {
    const uint8_t *k, *v;
    size_t         k_stride, v_stride;          // bytes of one (seq, kv_head)
    const int     *k_origin, *v_origin;         // [n_seqs] in images, or null: k_first, v_first
    int            k_first, v_first, begin, end, kind;
};

struct prefill_args {
    const uint8_t *q;               // [n_seqs][n_kv_heads][images] of 64 packed rows, scaled by scale * log2 e
    const float   *bias;            // [n_seqs][n][n_heads] added to scores (base 2), or null: q . mean, which only a softcap can tell from 0
    const int     *lengths;         // [n_seqs] tokens before the chunk, or null: 0
    const int     *bound;           // [n_seqs][n_kv_heads][2][n] or null: first position that query i sees exact, keys and values
    float         *sums;            // [parts][n_seqs][n][n_heads][D]
    float2        *tops;            // [parts][n_seqs][n][n_heads] maximum, sum of weights
    prefill_source source[4];
    int            n_sources, n_seqs, n, n_heads, n_kv_heads, window /* 0: none */, causal, splits, part0;
    int            shift;           // the grid starts this many positions before the first: codes begin where an image does
    float          softcap;         // times log2 e; 0: none
};

namespace detail {

constexpr float LOWEST = -1e30f;        // below every score; not -inf, so that a row that sees nothing makes no inf - inf

struct interval { int from, to; };

// What query i sees of a source, on the grid.  Both ends grow with i.
__device__ __forceinline__ interval seen_by(const prefill_args &a, const prefill_source &s, int seq, int kv_head, int i)
{
    const int at = (a.lengths ? a.lengths[seq] : 0) + i;
    interval r = { s.begin, s.end };
    if (a.causal) r.to = min(r.to, at + 1);
    if (a.window) r.from = max(r.from, at - a.window + 1);
    if (s.kind != SOURCE_WHOLE) {
        const int *b = a.bound + ((size_t)seq * a.n_kv_heads + kv_head) * 2 * a.n + i;
        const int k = b[0], v = b[a.n];
        if (s.kind == SOURCE_LATE) r.to = min(r.to, min(k, v));
        else if (s.kind == SOURCE_EARLY) r.from = max(r.from, max(k, v));
        else {
            r.from = max(r.from, s.kind == SOURCE_KEYS_LATE ? v : k);
            r.to = min(r.to, s.kind == SOURCE_KEYS_LATE ? k : v);
        }
    }
    r.from += a.shift, r.to += a.shift;
    return r;
}

// The units (UNIT positions each) of a block's way through the sources; in shared memory.
struct way {
    int start[5];                       // of a source's units on the way
    int unit0[4];                       // its first unit on the grid
    int whole_from[4], whole_to[4];     // what all queries of the block see
};

// By one thread.  i0, i1: the block's first and last query.
template <int UNIT> __device__ void plan_way(const prefill_args &a, way &w, int seq, int kv_head, int i0, int i1)
{
    w.start[0] = 0;
    for (int s = 0; s < a.n_sources; s++) {
        const interval first = seen_by(a, a.source[s], seq, kv_head, i0), last = seen_by(a, a.source[s], seq, kv_head, i1);
        const int u0 = first.from / UNIT, u1 = (last.to + UNIT - 1) / UNIT;
        w.unit0[s] = u0;
        w.start[s + 1] = w.start[s] + max(0, u1 - u0);
        w.whole_from[s] = last.from;
        w.whole_to[s] = first.to;
    }
}

// Scores of a strip to weights in place; what was summed before must be multiplied by keep.  s: [n / 8][4] as the tensor cores leave them.
template <int N> __device__ __forceinline__ void soften(float s[N][4], float top[2], float sum[2], float keep[2])
{
    float high[2] = { top[0], top[1] };
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) high[c / 2] = fmaxf(high[c / 2], s[j][c]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 2));
        keep[r] = exp2_fast(top[r] - high[r]);
        top[r] = high[r];
        sum[r] *= keep[r];
    }
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            s[j][c] = exp2_fast(s[j][c] - high[c / 2]);
            sum[c / 2] += s[j][c];                      // a lane's own columns; joined at the end
        }
}

template <int N> __device__ __forceinline__ void rescale(float o[N][4], const float keep[2])
{
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) o[j][c] *= keep[c / 2];
}

// Weights of 16 keys as the next product's left side.
__device__ __forceinline__ void weights_of(const float s[2][4], uint32_t f[4])
{
    f[0] = pack_bf16(s[0][0], s[0][1]);
    f[1] = pack_bf16(s[0][2], s[0][3]);
    f[2] = pack_bf16(s[1][0], s[1][1]);
    f[3] = pack_bf16(s[1][2], s[1][3]);
}

// tanh by 1 - 2 / (1 + 2^(2 x log2 e)): within 2^-21 of 1, where tanh.approx is within 2^-11 of itself.
__device__ __forceinline__ float cap_score(float x, float cap, float per_cap) { return cap * (1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(x * per_cap))); }

// Of the strip's two rows that a lane owns: lane / 4 and 8 more.
__device__ __forceinline__ void bias_of(const prefill_args &a, int seq, int kv_head, int row, float bias[2], int lane)
{
    const int group = a.n_heads / a.n_kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int at = row + lane / 4 + 8 * r;
        bias[r] = a.bias ? a.bias[((size_t)seq * a.n + min(a.n - 1, at / group)) * a.n_heads + (size_t)kv_head * group + at % group] : 0.0f;
    }
}

template <int N> __device__ __forceinline__ void bend_scores(const prefill_args &a, float s[N][4], const float bias[2])
{
    const float per_cap = 2.0f * 1.4426950408889634f / a.softcap;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[j][c] = cap_score(s[j][c] + bias[c / 2], a.softcap, per_cap);
}

// p0: of column 0, on the grid.
template <int N> __device__ __forceinline__ void hide_scores(float s[N][4], const interval see[2], int p0, int lane)
{
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int p = p0 + 8 * j + lane % 4 * 2 + c % 2;
            if (p < see[c / 2].from || p >= see[c / 2].to) s[j][c] = -INFINITY;
        }
}

// A strip's part to memory.  row: of the strip's first row among the packed ones.
template <int D> __device__ __forceinline__ void leave_strip(const prefill_args &a, int part, int seq, int kv_head, int row, const float o[D / 8][4], const float top[2], const float sum[2], int lane)
{
    const int group = a.n_heads / a.n_kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float l = sum[r];
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        const int at = row + lane / 4 + 8 * r, i = at / group;
        if (i >= a.n) continue;
        const size_t to = (((size_t)part * a.n_seqs + seq) * a.n + i) * a.n_heads + (size_t)kv_head * group + at % group;
        if (lane % 4 == 0) a.tops[to] = make_float2(top[r], l);
        float *dst = a.sums + to * D + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < D / 8; j++) *(float2 *)(dst + 8 * j) = make_float2(o[j][2 * r], o[j][2 * r + 1]);
    }
}

}  // namespace detail

// The form that every tensor core from sm_80 on runs: 4 warps, each STRIPS strips of 16 rows; two stages of UNIT keys and values.
template <int D> struct prefill_form {
    static constexpr int WARPS = 4, ROWS = D > 128 ? 64 : 128, STRIPS = ROWS / 64, UNIT = D > 128 ? 32 : 64, STAGES = 2;
    static constexpr int UNIT_BYTES = UNIT * D * 2, SHARED = ROWS * D * 2 + STAGES * 2 * UNIT_BYTES + 128;
};

// grid: (blocks of ROWS packed rows, n_kv_heads, n_seqs * splits)
template <int D> __global__ void __launch_bounds__(128, D > 128 ? 1 : 2) prefill_kernel(const prefill_args a)
{
    using namespace detail;
    using F = prefill_form<D>;
    constexpr int PANELS = D / 64, KEYS = IMAGE_KEYS<D>, N = F::UNIT / 8;
    KV_SHARED_DYNAMIC(memory);
    uint8_t *const queries = memory, *const ring = memory + F::ROWS * D * 2;
    way &w = *(way *)(ring + F::STAGES * 2 * F::UNIT_BYTES);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, group = a.n_heads / a.n_kv_heads;
    const int block = gridDim.x - 1 - blockIdx.x, row0 = block * F::ROWS;         // the longest first
    const int kv_head = blockIdx.y, seq = blockIdx.z / a.splits, split = blockIdx.z % a.splits;
    const size_t place = (size_t)seq * a.n_kv_heads + kv_head;
    const int images = (int)gridDim.x * F::ROWS / QUERY_ROWS;
    const uint8_t *const q = a.q + (place * images + (size_t)row0 / QUERY_ROWS) * (QUERY_ROWS * D * 2);
    for (int x = thread * 16; x < F::ROWS * D * 2; x += 128 * 16) copy_async(queries + x, q + x);
    copy_commit();
    if (thread == 0) plan_way<F::UNIT>(a, w, seq, kv_head, row0 / group, min(a.n - 1, (row0 + F::ROWS - 1) / group));
    __syncthreads();
    const int total = w.start[a.n_sources], u0 = (int)((long long)total * split / a.splits), u1 = (int)((long long)total * (split + 1) / a.splits);

    int ahead_source = 0;
    auto fetch = [&](int u) {
        if (u < u1) {
            while (u >= w.start[ahead_source + 1]) ahead_source++;
            const prefill_source &s = a.source[ahead_source];
            const int p = (w.unit0[ahead_source] + u - w.start[ahead_source]) * F::UNIT, image = p / KEYS, line = p % KEYS;
            const uint8_t *k = s.k + place * s.k_stride + (size_t)(image - (s.k_origin ? s.k_origin[seq] : s.k_first)) * IMAGE_BYTES<D> + line * 128;
            const uint8_t *v = s.v + place * s.v_stride + (size_t)(image - (s.v_origin ? s.v_origin[seq] : s.v_first)) * IMAGE_BYTES<D> + line * 128;
            uint8_t *to = ring + (u - u0) % F::STAGES * 2 * F::UNIT_BYTES;
#pragma unroll
            for (int panel = 0; panel < PANELS; panel++)
                for (int x = thread * 16; x < F::UNIT * 128; x += 128 * 16) {
                    copy_async(to + panel * F::UNIT * 128 + x, k + panel * KEYS * 128 + x);
                    copy_async(to + F::UNIT_BYTES + panel * F::UNIT * 128 + x, v + panel * KEYS * 128 + x);
                }
        }
        copy_commit();
    };

    float o[F::STRIPS][D / 8][4], top[F::STRIPS][2], sum[F::STRIPS][2];
#pragma unroll
    for (int m = 0; m < F::STRIPS; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[m][r] = LOWEST;
            sum[m][r] = 0;
#pragma unroll
            for (int j = 0; j < D / 8; j++) o[m][j][2 * r] = o[m][j][2 * r + 1] = 0;
        }
    const int strip0 = row0 + warp * F::STRIPS * 16;
    int source = -1;
    interval see[F::STRIPS][2];
    fetch(u0);
    for (int u = u0; u < u1; u++) {
        fetch(u + 1);
        copy_wait<1>();
        __syncthreads();
        while (source < 0 || u >= w.start[source + 1]) {
            source++;
#pragma unroll
            for (int m = 0; m < F::STRIPS; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) see[m][r] = seen_by(a, a.source[source], seq, kv_head, min(a.n - 1, (strip0 + m * 16 + lane / 4 + 8 * r) / group));
        }
        const int p = (w.unit0[source] + u - w.start[source]) * F::UNIT;
        const uint8_t *const keys = ring + (u - u0) % F::STAGES * 2 * F::UNIT_BYTES, *const values = keys + F::UNIT_BYTES;
        float s[F::STRIPS][N][4];
#pragma unroll
        for (int m = 0; m < F::STRIPS; m++)
#pragma unroll
            for (int j = 0; j < N; j++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t f[F::STRIPS][4];
#pragma unroll
            for (int m = 0; m < F::STRIPS; m++) {
                const int line = (warp * F::STRIPS + m) * 16 + lane % 16;
                load_matrices(f[m], queries + line / QUERY_ROWS * (QUERY_ROWS * D * 2) + image_byte(QUERY_ROWS, line % QUERY_ROWS, k * 16 + lane / 16 * 8));
            }
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                uint32_t b[4];
                load_matrices(b, keys + image_byte(F::UNIT, j * 8 + lane / 16 * 8 + lane % 8, k * 16 + lane / 8 % 2 * 8));
#pragma unroll
                for (int m = 0; m < F::STRIPS; m++) {
                    product_add_bf16(s[m][j], f[m], b[0], b[1]);
                    product_add_bf16(s[m][j + 1], f[m], b[2], b[3]);
                }
            }
        }
        const bool whole = p >= w.whole_from[source] && p + F::UNIT <= w.whole_to[source];
#pragma unroll
        for (int m = 0; m < F::STRIPS; m++) {
            if (a.softcap > 0) {
                float bias[2];
                bias_of(a, seq, kv_head, strip0 + m * 16, bias, lane);
                bend_scores<N>(a, s[m], bias);
            }
            if (!whole) hide_scores<N>(s[m], see[m], p, lane);
            float keep[2];
            soften<N>(s[m], top[m], sum[m], keep);
            rescale<D / 8>(o[m], keep);
        }
#pragma unroll
        for (int k = 0; k < F::UNIT / 16; k++) {
            uint32_t f[F::STRIPS][4];
#pragma unroll
            for (int m = 0; m < F::STRIPS; m++) weights_of(s[m] + 2 * k, f[m]);
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, values + image_byte(F::UNIT, k * 16 + lane % 16, j * 8 + lane / 16 * 8));
#pragma unroll
                for (int m = 0; m < F::STRIPS; m++) {
                    product_add_bf16(o[m][j], f[m], b[0], b[1]);
                    product_add_bf16(o[m][j + 1], f[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < F::STRIPS; m++) leave_strip<D>(a, a.part0 + split, seq, kv_head, strip0 + m * 16, o[m], top[m], sum[m], lane);
}

// ---- around it

// Where rows turn: signs and Walsh-Hadamard, or nothing; and the mean that was taken off before.
struct prefill_turn { const float *sign /* [n_kv_heads][D] or null */, *mean /* [n_kv_heads][D] or null */; int rotate; };

namespace detail {
template <int D> __device__ __forceinline__ void turn_row(const prefill_turn &t, int head, float *v, int lane)
{
    constexpr int V = D / 32;
    if (!t.rotate) return;
#pragma unroll
    for (int k = 0; k < V; k++)
        if (t.sign) v[k] *= t.sign[(size_t)head * D + lane * V + k];
    butterflies<V>(v, lane);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] *= rsqrtf((float)D);
}
template <int D> __device__ __forceinline__ void center_and_turn(const prefill_turn &t, int head, float *v, int lane)
{
    constexpr int V = D / 32;
#pragma unroll
    for (int k = 0; k < V; k++)
        if (t.mean) v[k] -= t.mean[(size_t)head * D + lane * V + k];
    turn_row<D>(t, head, v, lane);
}
}  // namespace detail

// Queries [n_seqs][n][n_heads][D] to images; bias gets q . mean when it is not null.  A warp a row of an image; grid: (rows / 4, n_kv_heads, n_seqs), 128 threads.
template <int D> __global__ void prefill_queries(const float *q, prefill_turn turn, float scale /* times log2 e */, int n, int n_heads, int n_kv_heads, uint8_t *images, float *bias)
{
    constexpr int V = D / 32;
    const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32, rows = gridDim.x * 4, kv_head = blockIdx.y, seq = blockIdx.z;
    const int group = n_heads / n_kv_heads, i = row / group;
    float v[V], mean = 0;
    const size_t from = (((size_t)seq * n + min(i, n - 1)) * n_heads + (size_t)kv_head * group + row % group);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = i < n ? q[from * D + lane * V + k] * scale : 0.0f;
    if (bias) {
#pragma unroll
        for (int k = 0; k < V; k++)
            if (turn.mean) mean = fmaf(v[k], turn.mean[(size_t)kv_head * D + lane * V + k], mean);
        for (int x = 16; x; x /= 2) mean += __shfl_xor_sync(~0u, mean, x);
        if (lane == 0 && i < n) bias[from] = mean;
    }
    detail::turn_row<D>(turn, kv_head, v, lane);
    put_row<D>(images + (((size_t)seq * n_kv_heads + kv_head) * rows + row / QUERY_ROWS * QUERY_ROWS) * (D * 2), QUERY_ROWS, row % QUERY_ROWS, v, lane);
}

// Joins parts: out [n_seqs][n][n_heads][D], turned back, the mean added; or, with out null, part 0 becomes the joined one.  A warp a row.
template <int D> __global__ void merge_parts(float *sums, float2 *tops, int n_parts, prefill_turn turn, long long n_rows, int n_heads, int n_kv_heads, float *out)
{
    constexpr int V = D / 32;
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= n_rows) return;
    float m = detail::LOWEST, l = 0, o[V];
    for (int p = 0; p < n_parts; p++) m = fmaxf(m, tops[p * n_rows + row].x);
#pragma unroll
    for (int k = 0; k < V; k++) o[k] = 0;
    for (int p = 0; p < n_parts; p++) {
        const float2 t = tops[p * n_rows + row];
        const float by = t.y > 0 ? exp2_fast(t.x - m) : 0.0f;
        l = fmaf(by, t.y, l);
#pragma unroll
        for (int k = 0; k < V; k++) o[k] = fmaf(by, sums[(p * n_rows + row) * D + lane * V + k], o[k]);
    }
    if (!out) {
        __syncwarp();
        if (lane == 0) tops[row] = make_float2(m, l);
#pragma unroll
        for (int k = 0; k < V; k++) sums[row * D + lane * V + k] = o[k];
        return;
    }
    const int kv_head = (int)(row % n_heads) / (n_heads / n_kv_heads);
    if (turn.rotate) butterflies<V>(o, lane);
    const float by = l > 0 ? 1.0f / l : 0.0f;
#pragma unroll
    for (int k = 0; k < V; k++) {
        float y = o[k] * by;
        if (turn.rotate) y *= rsqrtf((float)D);
        if (turn.rotate && turn.sign) y *= turn.sign[(size_t)kv_head * D + lane * V + k];
        if (turn.mean && l > 0) y += turn.mean[(size_t)kv_head * D + lane * V + k];
        out[row * D + lane * V + k] = y;
    }
}

// Rows of a source to images first .. first + gridDim.x / (KEYS / 4) - 1 of the grid; a warp a row of an image; 128 threads, grid: (images * KEYS / 4,
// n_kv_heads, n_seqs).  ROWS::load(seq, kv_head, position, v, lane) fills a lane's V dims and says whether it has that position; what
// nobody has becomes zero, or, with `keep`, stays.
template <int D, class ROWS> __global__ void prefill_rows(ROWS rows, prefill_turn turn, uint8_t *images, size_t stride, const int *origin, int first, int shift, int keep)
{
    constexpr int V = D / 32, KEYS = IMAGE_KEYS<D>;
    const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32, head = blockIdx.y, seq = blockIdx.z;
    const int position = (first + (origin ? origin[seq] : 0)) * KEYS + row - shift;
    float v[V];
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = 0;
    const bool here = rows.load(seq, head, position, v, lane);          // the same for all lanes
    if (keep && !here) return;
    if (here) detail::center_and_turn<D>(turn, head, v, lane);
    put_row<D>(images + ((size_t)seq * gridDim.y + head) * stride + (size_t)(row / KEYS) * IMAGE_BYTES<D>, KEYS, row % KEYS, v, lane);
}

// The chunk's own rows, f32 [n_seqs][n][n_kv_heads][D], at positions lengths[seq] on.
template <int D> struct chunk_rows {
    const float *x;
    const int   *lengths;               // or null: 0
    int          n, n_kv_heads;
    __device__ __forceinline__ bool load(int seq, int head, int position, float *v, int lane) const
    {
        constexpr int V = D / 32;
        const int i = position - (lengths ? lengths[seq] : 0);
        if (position < 0 || i < 0 || i >= n) return false;
        const float *from = x + (((size_t)seq * n + i) * n_kv_heads + head) * D + lane * V;
#pragma unroll
        for (int k = 0; k < V; k++) v[k] = from[k];
        return true;
    }
};

}  // namespace kelvin
