// attend_codes.cuh -- decode attention: a warp's way through the tiles of codes.
#pragma once
#include "attend_row.cuh"

namespace kelvin::detail {

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

// A weight is p |v|: the norm goes into the exponent, so that the largest weight of a tile is 1 exactly.  norm becomes its inverse.
__device__ __forceinline__ void lift(float x[2], float &norm)
{
    const float n = fmaxf(norm, 5.9604645e-8f), by = log2_fast(n);     // also of a NaN in an unused slot
    norm = reciprocal_fast(n);
    x[0] += by, x[1] += by;
}

__device__ __forceinline__ float top_score(const float x[4][2], int j) { return max_over_rows(fmaxf(fmaxf(x[0][j], x[1][j]), fmaxf(x[2][j], x[3][j]))); }

// The running maxima become at least n0 and n1, and all that is relative to them follows.
template <int DS> __device__ __forceinline__ void raise(float n0, float n1, float &m0, float &m1, float &l0, float &l1, float &w0, float &w1, float acc[DS][4])
{
    if (__any_sync(~0u, n0 > m0 || n1 > m1)) {
        const float k0 = fmaxf(m0, n0), k1 = fmaxf(m1, n1), r0 = exp2_fast(m0 - k0), r1 = exp2_fast(m1 - k1);
        m0 = k0, m1 = k1, l0 *= r0, l1 *= r1, w0 *= r0, w1 *= r1;
#pragma unroll
        for (int k = 0; k < DS; k++) acc[k][0] *= r0, acc[k][1] *= r1, acc[k][2] *= r0, acc[k][3] *= r1;
    }
}

// Weights of a tile in 16 bits, transposed for the second product; sl sums p, sw (4-bit values alone need it) p |v|.
template <int VB> __device__ __forceinline__ void weigh(const float x[4][2], const float back[4], float t0, float t1, float &sl0, float &sl1, float &sw0, float &sw1, uint32_t p[4])
{
#pragma unroll
    for (int row = 0; row < 4; row++) {
        const float p0 = exp2_fast(x[row][0] - t0), p1 = exp2_fast(x[row][1] - t1);
        sl0 = fmaf(p0, back[row], sl0), sl1 = fmaf(p1, back[row], sl1);
        if constexpr (VB == 4) sw0 += p0, sw1 += p1;
        p[row] = transpose_b16(byte_lookup(__float_as_uint(fmaf(p0, 65535.0f, 8388608.0f)), __float_as_uint(fmaf(p1, 65535.0f, 8388608.0f)), 0x5410));
    }
}

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
            lift(x[row], nv[row]);
        }
        if (i * UNIT_TOKENS<4> < r.first || (i + 1) * UNIT_TOKENS<4> > r.n_codes) {
            const int token = i * UNIT_TOKENS<4> + (first ? 0 : TILE_TOKENS) + g;
            __syncwarp();
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (token + 8 * row < r.first || token + 8 * row >= r.n_codes) x[row][0] = x[row][1] = -INFINITY;
        }
        const float t0 = fmaxf(top_score(x, 0), FLOOR);
        const float t1 = fmaxf(top_score(x, 1), FLOOR);
        const float o0 = __shfl_xor_sync(~0u, t0, 2), o1 = __shfl_xor_sync(~0u, t1, 2), n0 = fmaxf(t0, o0), n1 = fmaxf(t1, o1);
        raise<DS>(n0, n1, m0, m1, l0, l1, w0, w1, acc);
        float sl0 = 0, sl1 = 0, sw0 = 0, sw1 = 0;
        uint32_t p[4];
        weigh<VB>(x, nv, t0, t1, sl0, sl1, sw0, sw1, p);
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
        for (int row = 0; row < 4; row++) lift(x[row], nv[row]);
        if (i * TILE_TOKENS < r.first || (i + 1) * TILE_TOKENS > r.n_codes) {
            const int token = i * TILE_TOKENS + g;
            __syncwarp();
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (token + 8 * row < r.first || token + 8 * row >= r.n_codes) x[row][0] = x[row][1] = -INFINITY;
        }
        const float t0 = top_score(x, 0);
        const float t1 = top_score(x, 1);
        raise<DS>(t0, t1, m0, m1, l0, l1, w0, w1, acc);
        float sl0 = 0, sl1 = 0, sw0 = 0, sw1 = 0;
        uint32_t p[4];
        weigh<VB>(x, nv, t0, t1, sl0, sl1, sw0, sw1, p);
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

}  // namespace kelvin::detail
