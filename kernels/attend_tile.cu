// attend_tile.cu -- attention over a cache of any codec, in f32: decode a tile of rows, then attend.
//
// The queries of a KV head's group are stacked: row r is new token r / group, head r % group.  A block takes a tile of such rows and walks over
// tiles of keys, at absolute positions that are multiples of the tile, so that the order of a row's sums depends on nothing but its position: two
// plans that give equal rows give equal bits.
//
//   few rows (a decode step)   16 rows; pages of a tile come to shared memory by asynchronous copies, its warps decode them there.  Keys are split
//                              between blocks; the last to arrive merges.
//   chunks                     16 to 64 rows.  Decoded rows come from a slab: all tiles of queries meet the same positions, decoded once, slab after
//                              slab; maximum, sum and accumulator wait in memory in between.  No prefix is ever decoded as a whole.
//
// Query i sees position p decoded if p < sink + encoded(i + 1), else exact; the two sides apart.  Where a tile of keys holds both versions for a
// tile of queries it is loaded twice, and a score or a weight is taken from its own version.  Exact rows come from sinks, ring and the step's k, v.
//
// 256 threads are 16 x 16: thread (r, c) has rows r + 16 i, scores of keys c + 16 j, and dims 4 c + 64 j of the accumulator, so a row's maximum, sum
// and weights stay within a half warp.  A step of the score loop is 4 x 4 x 4 FMAs for 8 loads of 16 bytes, of the value loop 32 x 4 for 12.
// Floor: n^2 / 2 x heads x 2 D FMAs a layer of a chunk over itself, at 128 a clock and SM.
#include <algorithm>
#include "attend_job.cuh"
#include "codecs.cuh"
#include "kelvin/mma.cuh"

namespace kelvin {
namespace {

enum { THREADS = 256, LENT_WARPS = 8 };

template <int RI, int NJ> struct tile_shape {
    static constexpr int KJ = NJ <= 2 ? 4 : NJ == 4 ? 2 : 1, KEYS = 16 * KJ, ROWS = 16 * RI, D = 64 * NJ, LD = D + 4, LP = KEYS + 4;
    static constexpr int lenders = NJ == 8 ? 4 : LENT_WARPS;          // warps that decode
    static constexpr size_t floats = (size_t)ROWS * LD + (size_t)KEYS * LD + (size_t)ROWS * LP;
    static constexpr size_t bytes(bool few) { return sizeof(float) * (floats + (few ? (size_t)lenders * CODEC_SCRATCH : 0)); }
};

struct tile_of_keys { int j0, from, to; bool decoded; };              // rows of [from, to) are loaded, the tile's others zero

// Rows of a tile of keys in one version to shared memory.
template <int RI, int NJ, bool FEW>
__device__ __forceinline__ void load_tile(const attend_job &job, const dev_slot &s, int side, int seq, int head, int length, const tile_of_keys &t, const uint8_t *pages, float *x, float *lent)
{
    using shape = tile_shape<RI, NJ>;
    constexpr int AT_ONCE = 8;                                          // loads in flight before the first store
    const dev_layer &a = job.a;
    const float *fresh = side ? job.v : job.k, *rows = FEW ? nullptr : job.rows + (((size_t)seq * a.n_kv_heads + head) * 2 + side) * job.slab * job.ld;
    const int decoded0 = FEW && t.decoded ? max(t.from, a.sink) : t.to;   // rows of [decoded0, to) are decoded here
    if (FEW) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (warp < shape::lenders)
            for (int p = t.j0 + warp; p < t.to; p += shape::lenders)
                if (p >= decoded0) decode_slot_row(a, s, pages, p - a.sink, x + (p - t.j0) * shape::LD, lent + warp * CODEC_SCRATCH, lane, codec_decode);
        if (decoded0 <= t.j0 && t.to >= t.j0 + shape::KEYS) return;
    }
    for (int base = 0; base < shape::KEYS * job.d4; base += AT_ONCE * THREADS) {
        float4 y[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int x4 = base + k * THREADS + threadIdx.x, r = x4 / job.d4, i = (x4 - r * job.d4) * 4, p = t.j0 + r;
            y[k] = make_float4(0, 0, 0, 0);
            if (r >= shape::KEYS || p < t.from || p >= t.to || (FEW && p >= decoded0)) continue;
            if (!FEW && t.decoded && p >= a.sink) y[k] = *(const float4 *)(rows + (size_t)(p - job.p0) * job.ld + i);
            else y[k] = exact4(a, find_exact(a, s, seq, head, p, length, job.n, fresh), i);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int x4 = base + k * THREADS + threadIdx.x, r = x4 / job.d4, i = (x4 - r * job.d4) * 4;
            if (r < shape::KEYS && !(FEW && t.j0 + r >= decoded0 && t.j0 + r < t.to)) *(float4 *)(x + r * shape::LD + i) = y[k];
        }
    }
}

// Starts copying the pages of a tile's positions [p0, p1) to shared memory, and says where page 0 would lie there.  One group of copies, empty or not.
__device__ __forceinline__ const uint8_t *copy_pages(const dev_layer &a, const dev_slot &s, int seq, int p0, int p1, uint8_t *stage)
{
    const uint8_t *pages = pages_of(s, seq), *base = stage;
    if (p0 < p1) {
        const int page0 = (p0 - a.sink) / a.page_tokens, page1 = (p1 - 1 - a.sink) / a.page_tokens + 1;
        base -= (size_t)page0 * s.codec.page_bytes;
        for (size_t i = (size_t)page0 * s.codec.page_bytes + threadIdx.x * 16; i < (size_t)page1 * s.codec.page_bytes; i += THREADS * 16) copy_async((uint8_t *)base + i, pages + i);
    }
    copy_commit();
    return base;
}

__device__ __forceinline__ float max_of_half(float x)
{
    for (int i = 8; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    return x;
}
__device__ __forceinline__ float sum_of_half(float x)
{
    for (int i = 8; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

template <int RI, int NJ, bool FEW> __global__ void __launch_bounds__(THREADS, NJ <= 2 ? 2 : 1) attend_kernel(const attend_job job)
{
    using shape = tile_shape<RI, NJ>;
    constexpr int KJ = shape::KJ, KEYS = shape::KEYS, ROWS = shape::ROWS, LD = shape::LD, LP = shape::LP;
    KV_SHARED_DYNAMIC(memory);
    const dev_layer &a = job.a;
    float *q = (float *)memory, *x = q + ROWS * LD, *w = x + KEYS * LD, *lent = w + ROWS * LP;
    const int r = threadIdx.x / 16, c = threadIdx.x % 16, head = blockIdx.y, seq = blockIdx.z, group = a.n_heads / a.n_kv_heads, m = job.n * group;
    const int n_tiles = (m + ROWS - 1) / ROWS, tile = FEW ? blockIdx.x / job.n_splits : n_tiles - 1 - blockIdx.x, row0 = tile * ROWS;      // longest first
    const int length = a.length[seq], i0 = length + row0 / group, i1 = length + (min(row0 + ROWS, m) - 1) / group;
    const dev_slot &sk = a.slot[head * 2], &sv = a.slot[head * 2 + 1];        // not copies: what decodes takes them by reference, and a thread's own would fill the cache

    // Tiles of keys of this block.
    const int lo = first_seen(a.window, i0);
    int t0 = lo / KEYS, t1 = i1 / KEYS + 1, splits = 1;
    const int split = FEW ? blockIdx.x % job.n_splits : 0;
    if (FEW) {
        const int all = t1 - t0, from = t0;
        splits = min(job.n_splits, all);
        if (split >= splits) return;
        t0 = from + (int)((long long)all * split / splits);
        t1 = from + (int)((long long)all * (split + 1) / splits);
    } else {
        t0 = max(t0, job.p0 / KEYS);
        t1 = min(t1, job.p1 / KEYS);
    }

    for (int i = threadIdx.x; i < ROWS * shape::D; i += THREADS) {
        const int row = i / shape::D, dim = i % shape::D, y = row0 + row;
        q[row * LD + dim] = y < m && dim < a.head_dim ? job.q[(((size_t)seq * job.n + y / group) * a.n_heads + head * group + y % group) * a.head_dim + dim] : 0.0f;
    }
    for (int i = threadIdx.x; i < KEYS * LD; i += THREADS) x[i] = 0;   // dims past head_dim stay zero

    int pos[RI], seen[RI], late[2][RI];                                 // of my rows; no position is visible to a row that is none
    float top[RI], sum[RI], acc[RI][NJ][4];
#pragma unroll
    for (int i = 0; i < RI; i++) {
        const int y = row0 + r + 16 * i;
        pos[i] = y < m ? length + y / group : -1;
        seen[i] = first_seen(a.window, pos[i]);
        late[0][i] = a.sink + encoded_at(a, sk, seq, pos[i] + 1);
        late[1][i] = a.sink + encoded_at(a, sv, seq, pos[i] + 1);
        top[i] = -INFINITY;
        sum[i] = 0;
#pragma unroll
        for (int j = 0; j < NJ; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0;
    }
    const size_t held = (size_t)a.head_dim + 2;
    if (!FEW && !job.first)
#pragma unroll
        for (int i = 0; i < RI; i++) {
            if (pos[i] < 0) continue;
            const float *state = job.state + (((size_t)seq * a.n_kv_heads + head) * m + row0 + r + 16 * i) * held;
            top[i] = state[0];
            sum[i] = state[1];
#pragma unroll
            for (int j = 0; j < NJ; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][j][e] = 64 * j + 4 * c + e < a.head_dim ? state[2 + 64 * j + 4 * c + e] : 0.0f;
        }
    // Where the versions part for the tile's first and last query.
    int bound[2][2];
    bool alike[2];                                                      // every query reads all it sees decoded
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const dev_slot &s = side ? sv : sk;
        bound[side][0] = a.sink + encoded_at(a, s, seq, i0 + 1);
        bound[side][1] = a.sink + encoded_at(a, s, seq, i1 + 1);
        alike[side] = !s.never && a.recent == 0 && s.codec.granule == 1;
    }

    uint8_t *stage = (uint8_t *)(lent + shape::lenders * CODEC_SCRATCH);
    const uint8_t *pages[2] = {};
    for (int t = t0; t < t1; t++) {
        const int j0 = t * KEYS, j1 = min(j0 + KEYS, i1 + 1);
        if (FEW) {
            if (job.stage_bytes) {
                if (t == t0) pages[0] = copy_pages(a, sk, seq, max(max(j0, lo), a.sink), min(j1, bound[0][1]), stage);
                pages[1] = copy_pages(a, sv, seq, max(max(j0, lo), a.sink), min(j1, bound[1][1]), stage + job.stage_bytes);
                copy_wait<1>();                                         // the keys' pages are there
            } else {
                pages[0] = pages_of(sk, seq);
                pages[1] = pages_of(sv, seq);
            }
        }
        float s[RI][KJ];
#pragma unroll
        for (int i = 0; i < RI; i++)
#pragma unroll
            for (int j = 0; j < KJ; j++) s[i][j] = 0;
        // Scores, version by version.
#pragma unroll 1
        for (int early = 0; early < 2; early++) {
            if (early ? alike[0] || bound[0][0] >= j1 : j0 >= bound[0][1]) continue;
            const tile_of_keys keys = { j0, max(j0, early ? max(lo, bound[0][0]) : lo), early ? j1 : min(j1, bound[0][1]), !early };
            __syncthreads();
            load_tile<RI, NJ, FEW>(job, sk, 0, seq, head, length, keys, pages[0], x, lent);
            __syncthreads();
            float y[RI][KJ];
#pragma unroll
            for (int i = 0; i < RI; i++)
#pragma unroll
                for (int j = 0; j < KJ; j++) y[i][j] = 0;
            for (int d = 0; d < job.d4 * 4; d += 4) {
                float4 u[RI], v[KJ];
#pragma unroll
                for (int i = 0; i < RI; i++) u[i] = *(const float4 *)(q + (r + 16 * i) * LD + d);
#pragma unroll
                for (int j = 0; j < KJ; j++) v[j] = *(const float4 *)(x + (c + 16 * j) * LD + d);
#pragma unroll
                for (int i = 0; i < RI; i++)
#pragma unroll
                    for (int j = 0; j < KJ; j++) y[i][j] = fmaf(u[i].w, v[j].w, fmaf(u[i].z, v[j].z, fmaf(u[i].y, v[j].y, fmaf(u[i].x, v[j].x, y[i][j]))));
            }
#pragma unroll
            for (int i = 0; i < RI; i++)
#pragma unroll
                for (int j = 0; j < KJ; j++)
                    if ((j0 + c + 16 * j < late[0][i]) == !early) s[i][j] = y[i][j];
        }
        // Weights.
#pragma unroll
        for (int i = 0; i < RI; i++) {
            float best = -INFINITY;
#pragma unroll
            for (int j = 0; j < KJ; j++) {
                const int p = j0 + c + 16 * j;
                float y = s[i][j] * job.scale;
                if (job.softcap > 0) y = job.softcap * tanhf(y / job.softcap);
                s[i][j] = p <= pos[i] && p >= seen[i] ? y : -INFINITY;
                best = fmaxf(best, s[i][j]);
            }
            best = fmaxf(top[i], max_of_half(best));
            float part = 0;
#pragma unroll
            for (int j = 0; j < KJ; j++) {
                s[i][j] = s[i][j] > -INFINITY ? expf(s[i][j] - best) : 0.0f;
                part += s[i][j];
            }
            const float keep = top[i] == best ? 1.0f : expf(top[i] - best);     // 0 from a maximum of nothing
            sum[i] = fmaf(sum[i], keep, sum_of_half(part));
            top[i] = best;
#pragma unroll
            for (int j = 0; j < NJ; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][j][e] *= keep;
        }
        // Values.
        if (FEW && job.stage_bytes) {
            pages[0] = copy_pages(a, sk, seq, max(j0 + KEYS, a.sink), t + 1 < t1 ? min(min(j0 + 2 * KEYS, i1 + 1), bound[0][1]) : 0, stage);
            copy_wait<1>();
        }
#pragma unroll 1
        for (int early = 0; early < 2; early++) {
            if (early ? alike[1] || bound[1][0] >= j1 : j0 >= bound[1][1]) continue;
            const tile_of_keys keys = { j0, max(j0, early ? max(lo, bound[1][0]) : lo), early ? j1 : min(j1, bound[1][1]), !early };
#pragma unroll
            for (int i = 0; i < RI; i++)
#pragma unroll
                for (int j = 0; j < KJ; j++) w[(r + 16 * i) * LP + c + 16 * j] = (j0 + c + 16 * j < late[1][i]) == !early ? s[i][j] : 0.0f;
            __syncthreads();
            load_tile<RI, NJ, FEW>(job, sv, 1, seq, head, length, keys, pages[1], x, lent);
            __syncthreads();
            for (int k = 0; k < KEYS; k += 4) {
                float4 p[RI];
#pragma unroll
                for (int i = 0; i < RI; i++) p[i] = *(const float4 *)(w + (r + 16 * i) * LP + k);
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int j = 0; j < NJ; j++) {
                        const float4 y = *(const float4 *)(x + (k + e) * LD + 64 * j + 4 * c);
#pragma unroll
                        for (int i = 0; i < RI; i++) {
                            const float weight = e == 0 ? p[i].x : e == 1 ? p[i].y : e == 2 ? p[i].z : p[i].w;
                            acc[i][j][0] = fmaf(weight, y.x, acc[i][j][0]);
                            acc[i][j][1] = fmaf(weight, y.y, acc[i][j][1]);
                            acc[i][j][2] = fmaf(weight, y.z, acc[i][j][2]);
                            acc[i][j][3] = fmaf(weight, y.w, acc[i][j][3]);
                        }
                    }
            }
            __syncthreads();
        }
    }

    // Out, to the next slab, or to the merge.
    const bool whole = FEW ? splits == 1 : job.last != 0;
    float *part = FEW ? job.parts + ((((size_t)seq * a.n_kv_heads + head) * n_tiles + tile) * job.n_splits + split) * ROWS * held : nullptr;
#pragma unroll
    for (int i = 0; i < RI; i++) {
        if (pos[i] < 0) continue;
        const int y = row0 + r + 16 * i;
        float *to = whole ? job.out + (((size_t)seq * job.n + y / group) * a.n_heads + head * group + y % group) * a.head_dim
                  : FEW ? part + (size_t)(r + 16 * i) * held : job.state + (((size_t)seq * a.n_kv_heads + head) * m + y) * held;
        const float by = whole ? 1.0f / sum[i] : 1.0f;
        if (!whole) {
            if (c == 0) {
                to[0] = top[i];
                to[1] = sum[i];
            }
            to += 2;
        }
#pragma unroll
        for (int j = 0; j < NJ; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (64 * j + 4 * c + e < a.head_dim) to[64 * j + 4 * c + e] = acc[i][j][e] * by;
    }
    if (!FEW || whole) return;
    merge_parts(job, seq, head, row0, min(ROWS, m - row0), splits, part - (size_t)split * ROWS * held, ROWS * held, job.arrivals + ((size_t)seq * a.n_kv_heads + head) * n_tiles + tile);
}

template <int RI, int NJ, bool FEW> cudaError_t launch(attend_job job, int blocks, int page_bytes, int room, cudaStream_t stream)
{
    using shape = tile_shape<RI, NJ>;
    size_t bytes = shape::bytes(FEW);
    if (FEW) {
        const size_t stage = (size_t)((shape::KEYS - 1) / job.a.page_tokens + 2) * page_bytes;       // pages that a tile can touch
        if (bytes + 2 * stage <= (size_t)room) {
            job.stage_bytes = (int)stage;
            bytes += 2 * stage;
        }
    }
    const cudaError_t e = cudaFuncSetAttribute((const void *)attend_kernel<RI, NJ, FEW>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (e != cudaSuccess) return e;
    KV_LAUNCH((attend_kernel<RI, NJ, FEW>), dim3(blocks, job.a.n_kv_heads, job.a.n_seqs), THREADS, bytes, stream, job);
    return cudaGetLastError();
}

}  // namespace

cudaError_t attend_few_tile(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    const bool rows = n == 1 && rows_as_they_are(c, layer);
    if (n == 1) c->did |= rows ? DID_ROWS : DID_TILE;
    if (rows) return attend_rows(c, layer, q, k, v, scale, softcap, out, stream);
    attend_job job = { c->layer_args(layer), q, k, v, out, scale, softcap, n, (c->head_dim + 3) / 4 };
    job.parts = c->parts;
    job.arrivals = c->arrivals;
    job.n_splits = c->n_splits;
    const int blocks = (n * c->group + ROWS_OF_FEW - 1) / ROWS_OF_FEW * c->n_splits;
    size_t page_bytes = 0;
    for (int i = 0; i < c->n_kv_heads * 2; i++) page_bytes = std::max(page_bytes, c->at(layer, i / 2, i % 2).codec.page_bytes);
    const int bytes = (int)std::min(page_bytes, (size_t)1 << 24), room = c->shared_bytes;
    switch ((c->head_dim + 63) / 64) {
    case 1: return launch<1, 1, true>(job, blocks, bytes, room, stream);
    case 2: return launch<1, 2, true>(job, blocks, bytes, room, stream);
    case 3: case 4: return launch<1, 4, true>(job, blocks, bytes, room, stream);
    default: return launch<1, 8, true>(job, blocks, bytes, room, stream);
    }
}

cudaError_t attend_chunk(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    const int m = n * c->group, shortest = *std::min_element(c->length.begin(), c->length.end()), longest = *std::max_element(c->length.begin(), c->length.end()) + n;
    attend_job job = { c->layer_args(layer), q, k, v, out, scale, softcap, n, (c->head_dim + 3) / 4 };
    job.rows = c->slab;
    job.slab = c->slab_tokens;
    job.ld = c->ld;
    job.state = c->state;
    const int begin = first_seen(c->window[layer], shortest) / c->slab_tokens * c->slab_tokens;
    for (int p0 = begin; p0 < longest; p0 += c->slab_tokens) {
        job.p0 = p0;
        job.p1 = p0 + c->slab_tokens;
        job.first = p0 == begin;
        job.last = job.p1 >= longest;
        cudaError_t e = c->form[layer]->decode(c, layer, n, p0, std::min(job.p1, longest), c->slab, c->slab_tokens, c->ld, stream);
        if (e != cudaSuccess) return e;
        switch ((c->head_dim + 63) / 64) {
        case 1: e = launch<4, 1, false>(job, (m + 63) / 64, 0, 0, stream); break;
        case 2: e = launch<4, 2, false>(job, (m + 63) / 64, 0, 0, stream); break;
        case 3: case 4: e = launch<2, 4, false>(job, (m + 31) / 32, 0, 0, stream); break;
        default: e = launch<1, 8, false>(job, (m + 15) / 16, 0, 0, stream);
        }
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

}  // namespace kelvin
