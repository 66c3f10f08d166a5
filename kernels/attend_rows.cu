// attend_rows.cu -- one new token over rows kept as they are (codec `raw`, keys not turned): no decoding, so no tile either.
//
// A warp takes 8 positions at a time, for up to 4 query heads; a row lies across 32 lanes (16 lanes up to head_dim 64, then two positions at once),
// 4 values a lane and unit.  The products of B positions and G heads are added up over the lanes by halving: B G values on as many lanes cost B G - 1
// exchanges, and each lane ends with one score, whose weight is then handed to all.  Sums stay in registers, no block waits for another's rows.
//
// Which warp takes a position depends on the length alone: equal rows give equal bits.  Floor: the rows, read once for each 4 query heads.
#include <algorithm>
#include "attend_job.cuh"

namespace kelvin {
namespace {

enum { WARPS = 8, G = 4, STEP = 8 /* positions of a warp's step */ };

struct row_of { const uint8_t *at; int dtype; bool coded; };           // dtype 3: floats still to be rounded

__device__ __forceinline__ float4 load4(const row_of &r, int exact, int i)
{
    if (r.dtype == 0 || r.dtype == 3) {
        const float4 x = __ldg((const float4 *)((const float *)r.at + i));
        return r.dtype == 0 ? x : make_float4(round_to(exact, x.x), round_to(exact, x.y), round_to(exact, x.z), round_to(exact, x.w));
    }
    const uint2 x = __ldg((const uint2 *)((const uint16_t *)r.at + i));
    if (r.dtype == 2) return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
    const float2 u = __half22float2(*(const __half2 *)&x.x), v = __half22float2(*(const __half2 *)&x.y);
    return make_float4(u.x, u.y, v.x, v.y);
}

// Of position p: from pages, whose rows follow each other without a gap, else exact.
__device__ __forceinline__ row_of find_row(const dev_layer &a, const dev_slot &s, int seq, int head, int p, int length, int bound, const float *fresh)
{
    if (p >= a.sink && p < bound) return { s.page + seq * s.page_stride + (size_t)(p - a.sink) * a.head_dim * (s.raw ? 2 : 4), s.raw, true };
    const exact_row r = find_exact(a, s, seq, head, p, length, 1, fresh);
    return r.fresh ? row_of { (const uint8_t *)r.fresh, 3, false } : row_of { r.held, a.dtype, false };
}

// B rows that follow each other in pages: nothing to ask between the loads, so that all are in flight.
template <int TYPE, int B, int U> __device__ __forceinline__ void load_run(const uint8_t *at, int d, const int *dim, float4 (*x)[U])
{
#pragma unroll
    for (int b = 0; b < B; b++)
#pragma unroll
        for (int u = 0; u < U; u++) x[b][u] = dim[u] < d ? load4(row_of { at + (size_t)b * d * (TYPE ? 2 : 4), TYPE, true }, 0, dim[u]) : make_float4(0, 0, 0, 0);
}
template <int B, int U> __device__ __forceinline__ void load_pages(const dev_layer &a, const dev_slot &s, int seq, int p, const int *dim, float4 (*x)[U])
{
    const uint8_t *at = s.page + seq * s.page_stride + (size_t)(p - a.sink) * a.head_dim * (s.raw ? 2 : 4);
    if (s.raw == 1) load_run<1, B, U>(at, a.head_dim, dim, x);
    else if (s.raw == 2) load_run<2, B, U>(at, a.head_dim, dim, x);
    else load_run<0, B, U>(at, a.head_dim, dim, x);
}

// Lane i of 2 N keeps the sum over them of s[i], in s[0]: at each distance half of what is left goes across.
template <int N> __device__ __forceinline__ void add_over_lanes(float *s, int lane)
{
    const bool upper = lane & N;
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = (upper ? s[i + N] : s[i]) + __shfl_xor_sync(~0u, upper ? s[i] : s[i + N], N);
    if constexpr (N > 1) add_over_lanes<N / 2>(s, lane);
}

template <int LANES, int U> __global__ void __launch_bounds__(WARPS * 32, U == 1 ? 2 : 1) attend_rows_kernel(const attend_job job)
{
    constexpr int B = LANES / G, GROUPS = 32 / LANES;                   // positions whose scores the lanes hold; rows side by side
    constexpr int ROUNDS = STEP / (B * GROUPS);
    static_assert(ROUNDS == 1, "a step is one round of scores");
    KV_SHARED_DYNAMIC(memory);
    const dev_layer &a = job.a;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, in = lane % LANES, side_by = lane / LANES, head = blockIdx.y, seq = blockIdx.z, group = a.n_heads / a.n_kv_heads;
    const int tiles = (group + G - 1) / G, tile = blockIdx.x / job.n_splits, split = blockIdx.x % job.n_splits, row0 = tile * G, n_rows = min((int)G, group - row0);
    const int length = a.length[seq], lo = first_seen(a.window, length), t0 = lo / KEYS_STEP, all = length / KEYS_STEP + 1 - t0, splits = min(job.n_splits, all);
    if (split >= splits) return;
    const int from = (t0 + (int)((long long)all * split / splits)) * KEYS_STEP, to = min((t0 + (int)((long long)all * (split + 1) / splits)) * KEYS_STEP, length + 1);
    const dev_slot &sk = a.slot[head * 2], &sv = a.slot[head * 2 + 1];
    const int bound_k = a.sink + encoded_at(a, sk, seq, length + 1), bound_v = a.sink + encoded_at(a, sv, seq, length + 1);

    float q[G][U][4], acc[G][U][4], mean[U][4];
    int dim[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
        dim[u] = u * 4 * LANES + 4 * in;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            mean[u][e] = sk.mean && dim[u] < a.head_dim ? sk.mean[dim[u] + e] : 0.0f;
#pragma unroll
            for (int g = 0; g < G; g++) {
                q[g][u][e] = g < n_rows && dim[u] < a.head_dim ? job.q[((size_t)seq * a.n_heads + head * group + row0 + g) * a.head_dim + dim[u] + e] : 0.0f;
                acc[g][u][e] = 0;
            }
        }
    }
    float top = -INFINITY, sum = 0;                                     // of the head whose scores this lane holds

    for (int p0 = from + warp * STEP; p0 < to; p0 += WARPS * STEP) {
        const int p_of = p0 + side_by * B;                              // this group's first position
        float s[G * B];
        float4 x[B][U];
        if (!sk.mean && p_of >= max(lo, a.sink) && p_of + B <= min(to, bound_k)) load_pages<B, U>(a, sk, seq, p_of, dim, x);
        else
#pragma unroll
        for (int b = 0; b < B; b++) {
            const int p = p_of + b;
            const bool there = p >= lo && p < to;
            const row_of r = there ? find_row(a, sk, seq, head, p, length, bound_k, job.k) : row_of {};
#pragma unroll
            for (int u = 0; u < U; u++) {
                x[b][u] = make_float4(0, 0, 0, 0);
                if (there && dim[u] < a.head_dim) x[b][u] = load4(r, a.dtype, dim[u]);
                if (sk.mean && there && r.coded) x[b][u] = make_float4(x[b][u].x + mean[u][0], x[b][u].y + mean[u][1], x[b][u].z + mean[u][2], x[b][u].w + mean[u][3]);
            }
        }
#pragma unroll
        for (int b = 0; b < B; b++)
#pragma unroll
            for (int g = 0; g < G; g++) {
                float y = 0;
#pragma unroll
                for (int u = 0; u < U; u++) y = fmaf(q[g][u][3], x[b][u].w, fmaf(q[g][u][2], x[b][u].z, fmaf(q[g][u][1], x[b][u].y, fmaf(q[g][u][0], x[b][u].x, y))));
                s[g * B + b] = y;
            }
        add_over_lanes<LANES / 2>(s, lane);
        const int p = p_of + in % B;
        float y = s[0] * job.scale;
        if (job.softcap > 0) y = job.softcap * tanhf(y / job.softcap);
        if (p < lo || p >= to) y = -INFINITY;
        float best = y;
#pragma unroll
        for (int n = B / 2; n; n /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, n));
        best = fmaxf(top, best);
        const float keep = top == best ? 1.0f : expf(top - best), weight = y > -INFINITY ? expf(y - best) : 0.0f;
        sum = fmaf(sum, keep, weight);                                  // of this lane's positions
        top = best;
        if (__any_sync(~0u, keep != 1.0f)) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float k = __shfl_sync(~0u, keep, side_by * LANES + g * B);
#pragma unroll
                for (int u = 0; u < U; u++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[g][u][e] *= k;
            }
        }
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int e = 0; e < 4; e++) mean[u][e] = sv.mean && dim[u] < a.head_dim ? sv.mean[dim[u] + e] : 0.0f;
        if (!sv.mean && p_of >= max(lo, a.sink) && p_of + B <= min(to, bound_v)) load_pages<B, U>(a, sv, seq, p_of, dim, x);
        else
#pragma unroll
        for (int b = 0; b < B; b++) {
            const int v = p_of + b;
            const bool there = v >= lo && v < to;
            const row_of r = there ? find_row(a, sv, seq, head, v, length, bound_v, job.v) : row_of {};
#pragma unroll
            for (int u = 0; u < U; u++) {
                x[b][u] = make_float4(0, 0, 0, 0);
                if (there && dim[u] < a.head_dim) x[b][u] = load4(r, a.dtype, dim[u]);
                if (sv.mean && there && r.coded) x[b][u] = make_float4(x[b][u].x + mean[u][0], x[b][u].y + mean[u][1], x[b][u].z + mean[u][2], x[b][u].w + mean[u][3]);
            }
        }
#pragma unroll
        for (int b = 0; b < B; b++)
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float w = __shfl_sync(~0u, weight, side_by * LANES + g * B + b);
#pragma unroll
                for (int u = 0; u < U; u++) {
                    acc[g][u][0] = fmaf(w, x[b][u].x, acc[g][u][0]);
                    acc[g][u][1] = fmaf(w, x[b][u].y, acc[g][u][1]);
                    acc[g][u][2] = fmaf(w, x[b][u].z, acc[g][u][2]);
                    acc[g][u][3] = fmaf(w, x[b][u].w, acc[g][u][3]);
                }
            }
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int e = 0; e < 4; e++) mean[u][e] = sk.mean && dim[u] < a.head_dim ? sk.mean[dim[u] + e] : 0.0f;
    }

    // Groups' sums to shared memory, merged there in order.
    const size_t held = (size_t)a.head_dim + 2;
    float *left = (float *)memory;                                      // [WARPS * GROUPS][G][D + 2]
#pragma unroll
    for (int n = B / 2; n; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
    float *mine = left + (size_t)(warp * GROUPS + side_by) * G * held;
    if (in % B == 0) {
        mine[in / B * held] = top;
        mine[in / B * held + 1] = sum;
    }
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (dim[u] < a.head_dim) mine[g * held + 2 + dim[u] + e] = acc[g][u][e];
    __syncthreads();
    float *part = job.parts + (((size_t)seq * a.n_kv_heads + head) * job.n_splits + split) * group * held + row0 * held;
    for (int i = threadIdx.x; i < n_rows * a.head_dim; i += WARPS * 32) {
        const int g = i / a.head_dim, d = i % a.head_dim;
        float best = -INFINITY, total = 0, o = 0;
        for (int k = 0; k < WARPS * GROUPS; k++) best = fmaxf(best, left[((size_t)k * G + g) * held]);
        for (int k = 0; k < WARPS * GROUPS; k++) {
            const float *l = left + ((size_t)k * G + g) * held;
            const float w = l[0] > -INFINITY ? expf(l[0] - best) : 0.0f;
            total = fmaf(w, l[1], total);
            o = fmaf(w, l[2 + d], o);
        }
        if (splits == 1) job.out[((size_t)seq * a.n_heads + head * group + row0 + g) * a.head_dim + d] = o / total;
        else {
            part[g * held + 2 + d] = o;
            if (d == 0) {
                part[g * held] = best;
                part[g * held + 1] = total;
            }
        }
    }
    if (splits == 1) return;
    merge_parts(job, seq, head, row0, n_rows, splits, part - (size_t)split * group * held, group * held, job.arrivals + ((size_t)seq * a.n_kv_heads + head) * tiles + tile);
}

template <int LANES, int U> cudaError_t launch(const attend_job &job, cudaStream_t stream)
{
    const int group = job.a.n_heads / job.a.n_kv_heads;
    const size_t bytes = sizeof(float) * WARPS * (32 / LANES) * G * ((size_t)job.a.head_dim + 2);
    const cudaError_t e = cudaFuncSetAttribute((const void *)attend_rows_kernel<LANES, U>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (e != cudaSuccess) return e;
    KV_LAUNCH((attend_rows_kernel<LANES, U>), dim3((group + G - 1) / G * job.n_splits, job.a.n_kv_heads, job.a.n_seqs), WARPS * 32, bytes, stream, job);
    return cudaGetLastError();
}

}  // namespace

bool rows_as_they_are(const kv_backend_cache *c, int layer)
{
    for (int i = 0; i < c->n_kv_heads * 2; i++) {
        const dev_slot &s = c->at(layer, i / 2, i % 2);
        if (s.raw < 0 || s.turn || s.codec.page_bytes != (size_t)c->page_tokens * c->head_dim * (s.raw ? 2 : 4)) return false;
    }
    return c->head_dim % 4 == 0 && c->head_dim <= 256;
}

cudaError_t attend_rows(kv_backend_cache *c, int layer, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    attend_job job = { c->layer_args(layer), q, k, v, out, scale, softcap, 1, (c->head_dim + 3) / 4 };
    job.parts = c->parts;
    job.arrivals = c->arrivals;
    job.n_splits = c->n_splits;
    if (c->head_dim <= 64) return launch<16, 1>(job, stream);
    if (c->head_dim <= 128) return launch<32, 1>(job, stream);
    return launch<32, 2>(job, stream);
}

}  // namespace kelvin
