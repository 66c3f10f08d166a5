// attend_codes.cuh -- decode attention: a warp's way through the tiles of codes.
#pragma once
#include "attend_row.cuh"

namespace kelvin::detail {

// A warp's ring: where the next unit is put and taken.  It outlives rows; all that was asked for is taken before a row ends.
struct ring_state { uint8_t *ring; uint64_t *barriers; int put, take; uint32_t parity; };

// A warp's way through its units i0 + warp, i0 + warp + WARPS, ... < i1 of a row: memory to the stages of its ring.
// Lane l knows where side l of the next 32 sides of tiles is, so pages are looked up once for many units, a round ahead.
template <class RING, int G> struct stream {
    static constexpr int UT = UNIT_TILES<G>, SIDES = 2 * UT, STAGES = RING::stages, ROUND = 32 / SIDES;
    static constexpr int K_BYTES = RING::k_bytes, V_BYTES = RING::v_bytes, BYTES = K_BYTES + V_BYTES;
    ring_state &s;
    const uint8_t *base, *from;                 // of this lane's side: tile 0 of the sequence, or of page 0; the side that it is to fetch next
    const int *pages;
    size_t page_bytes;
    int n, first, tile0, n_tiles, page_shift, lane, asked = 0, page = -1;

    __device__ __forceinline__ stream(const attend_args &a, const row_shape &r, ring_state &state, int i0, int i1, int warp, int lane)
        : s(state), from(nullptr), pages(a.pages ? a.pages + (size_t)r.seq * a.max_pages : nullptr), page_bytes(((size_t)a.n_kv_heads << a.page_shift) * BYTES),
          n(i0 + warp < i1 ? (i1 - i0 - warp + WARPS - 1) / WARPS : 0), first(i0 + warp), tile0((i0 + warp) * UT), n_tiles((r.n_codes + TILE_TOKENS - 1) / TILE_TOKENS), page_shift(a.page_shift), lane(lane)
    {
        if (pages) base = a.pool + ((size_t)r.kv_head << a.page_shift) * BYTES + lane % 2 * K_BYTES;
        else {
            const attend_slot &slot = a.slots[r.kv_head * 2 + lane % 2];
            base = slot.codes + r.seq * slot.codes_stride;
        }
        look_up(0);
    }
    __device__ __forceinline__ int tile_of(int unit) const { return tile0 + (unit + lane / SIDES) * (WARPS * UT) + lane / 2 % UT; }
    __device__ __forceinline__ void look_up(int unit)
    {
        const int tile = tile_of(unit);
        page = unit + lane / SIDES < n && tile < n_tiles ? pages ? __ldg(pages + (tile >> page_shift)) : 0 : -1;
    }
    // Units that are wanted first, as far as they lie before unit `end`.
    __device__ __forceinline__ void start(int end)
    {
        while (asked < STAGES - 1 && (asked >= n || first + WARPS * asked < end)) fetch();
    }
    __device__ __forceinline__ const uint8_t *place_of(int tile) const
    {
        return page < 0 ? nullptr : pages ? base + (size_t)page * page_bytes + (size_t)(tile & ((1 << page_shift) - 1)) * BYTES : base + (size_t)tile * (lane % 2 ? V_BYTES : K_BYTES);
    }
    // Asks for one more unit.
    __device__ __forceinline__ void fetch()
    {
        const int k = asked % ROUND;
        if (asked < n) {
            if (k == 0) {
                from = place_of(tile_of(asked));
                look_up(asked + ROUND);
            }
            uint8_t *to = s.ring + s.put * (BYTES * UT);
            if constexpr (BULK) {
                if (lane / SIDES == k) {
                    if (from) bulk_copy(to + lane / 2 % UT * BYTES + lane % 2 * K_BYTES, from, lane % 2 ? V_BYTES : K_BYTES, s.barriers + s.put);
                    else bulk_nothing(s.barriers + s.put);
                }
                if constexpr (AHEAD > 0)
                    if (lane / SIDES == (k + AHEAD) % ROUND) {
                        const uint8_t *next = k + AHEAD < ROUND ? from : place_of(tile_of(asked - k + ROUND));
                        if (next) bulk_prefetch(next, lane % 2 ? V_BYTES : K_BYTES);
                    }
            } else {
#pragma unroll
                for (int t = 0; t < SIDES; t++) {
                    const uint8_t *at = (const uint8_t *)__shfl_sync(~0u, (unsigned long long)from, k * SIDES + t);
                    if (at)
                        for (int i = lane * 16; i < (t % 2 ? V_BYTES : K_BYTES); i += 512) copy_async(to + t / 2 * BYTES + t % 2 * K_BYTES + i, at + i);
                }
            }
            s.put = s.put + 1 == STAGES ? 0 : s.put + 1;
        }
        asked++;
        if constexpr (!BULK) copy_commit();
    }
    // The next unit, and done with it.
    __device__ __forceinline__ const uint8_t *next()
    {
        if constexpr (BULK) bulk_wait(s.barriers + s.take, s.parity);
        else {
            copy_wait<STAGES - 2>();
            __syncwarp();
        }
        const uint8_t *at = s.ring + s.take * (BYTES * UT);
        if (++s.take == STAGES) s.take = 0, s.parity ^= 1;
        return at;
    }
    __device__ __forceinline__ void done()
    {
        __syncwarp();
        fetch();
    }
};

// Products of a tile's keys, 8 tokens at a time, with the query: c[n] of a lane = row g (high bytes) and row g + 8 (low bytes) for tokens 8 n + 2 t, + 1.
template <int KB, int D> __device__ __forceinline__ void score_tile(const attend_args &a, const uint8_t *at, const uint32_t (*q)[4], const int start[4], int c[4][4], int lane)
{
    constexpr int KS = D / 32;
    uint32_t w[side<KB, D>::words];
    load_words<KB, D>(w, at, lane);
#pragma unroll
    for (int ks = 0; ks < KS; ks += 2)
#pragma unroll
        for (int mt = 0; mt < 2; mt++) {                // four sums in turn: a product waits for the last one of its own
            uint32_t f[8];
            unpack_two<KB>(w + (mt * KS + ks) * KB / 2, a.kb.t0, a.kb.t1, f);
#pragma unroll
            for (int i = 0; i < 2; i++) product_s8(c[2 * mt + i], ks == 0 ? start : c[2 * mt + i], q[ks], f[i], f[2 + i]);
#pragma unroll
            for (int i = 0; i < 2; i++) product_s8(c[2 * mt + i], c[2 * mt + i], q[ks + 1], f[4 + i], f[6 + i]);
        }
}

__device__ __forceinline__ void four_halves(uint32_t a, uint32_t b, float x[4])
{
    const float2 u = __half22float2(*(const __half2 *)&a), v = __half22float2(*(const __half2 *)&b);
    x[0] = u.x, x[1] = u.y, x[2] = v.x, x[3] = v.y;
}

constexpr float FLOOR = -1e30f;         // below every score: a maximum that saw nothing, without inf - inf
constexpr float COUNT = 8388608.0f;     // 2^23: a float from there on is this plus an integer in its low bits
constexpr int   TOP_BITS = 14, LOW_BITS = 10;      // the largest weight of LOOK units lies in [2^LOW_BITS, 2^16), of a unit that made the scale in (2^(TOP_BITS-1), 2^TOP_BITS]
constexpr int   LOOK = 4, FLUSH = 512;             // FLUSH units of 64 tokens times 255 * 128 stay below 2^31

// A row's sums, a lane's share.  Weights are p |v| as 16-bit integers of worth 2^e, e of the lane's head; products add up as integers.  A unit
// above the scale shifts them; LOOK units far below it (after a needle) send them to f32 sums in memory, relative to 2^m, and e follows down.
// G = 4: A = values (dims x tokens), B = weights: columns 0..3 heads' high bytes, 4..7 low bytes.
// G = 8: A = weights (rows 0..7 heads' high bytes, 8..15 low bytes), B = values.
template <int G, int D> struct sums {
    static constexpr int N = SUMS<G, D>;
    int      acc[N][4];
    uint32_t weight;                    // sum of the lane's weights: for the half a unit of 4-bit values
    float    e = FLOOR, l;              // l: sum of p relative to 2^e
    float    m = FLOOR, whole = 0, halves = 0;     // what is in memory: relative to 2^m

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = 0;
        weight = 0;
        l = 0;
    }
    // Of the head whose sums a lane has in acc[.][0], or [1].
    template <class T> __device__ __forceinline__ T of_column(T v, int j, int lane) const { return G == 4 ? __shfl_sync(~0u, v, (2 * (lane % 4) & 3) * 4 + 4 * j) : v; }
    __device__ __forceinline__ void shift(int by, int lane)
    {
        const int b0 = of_column(by, 0, lane), b1 = of_column(by, 1, lane);
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] >>= j % 2 ? b1 : b0;
        weight >>= by;
        l *= exp2_fast((float)-by);
    }
    // To `far`, [N][4] floats a lane, 32 apart.
    __device__ __forceinline__ void flush(float *far, int lane)
    {
        const float top = fmaxf(m, e), keep = exp2_fast(m - top), by = exp2_fast(e - top);
        const float k0 = of_column(keep, 0, lane), k1 = of_column(keep, 1, lane), b0 = of_column(by, 0, lane), b1 = of_column(by, 1, lane);
        const bool fresh = m <= FLOOR;          // of all heads alike: they are flushed together
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float *at = far + (i * 4 + j) * 32 + lane;
                *at = fmaf(fresh ? 0.0f : *at, j % 2 ? k1 : k0, (float)acc[i][j] * (j % 2 ? b1 : b0));
            }
        whole = fmaf(whole, keep, l * by);
        halves = fmaf(halves, keep, (float)weight * by);
        m = top;
        clear();
    }
};

// Up to G query heads over units i0 <= i < i1.  G = 4: a unit is two tiles, lanes g < 4 score the first, the others the second, so
// nothing is computed twice.  A lane's scores are all of one head, h = g % G.
template <int KB, int VB, int D, int G, class RING> __device__ void attend_codes(const attend_args &a, const row_shape &r, shared_row<G, D> &s, stream<RING, G> &in, float *far, int i0, int warp, int lane)
{
    constexpr int KS = D / 32, DS = D / 16;
    using T = tile<KB, VB, D>;
    const int g = lane / 4, t = lane % 4, h = g % G < r.n_q ? g % G : 0;
    const bool low = g < 4;                             // G = 4: of the two tiles the first; and these columns are high bytes
    uint32_t q[KS][4];
#pragma unroll
    for (int ks = 0; ks < KS; ks++)
#pragma unroll
        for (int i = 0; i < 4; i++) q[ks][i] = *(const uint32_t *)((i % 2 ? s.q_low[h] : s.q_high[h]) + ks * 32 + i / 2 * 16 + 4 * t);
    const float scale = s.q_scale[h], mean = s.q_mean[h];
    const int half = s.q_half[h], start[4] = { 0, 0, half, half };
    sums<G, D> sum;
    sum.clear();

    float seen = COUNT;                                 // the largest weight since the last look
    for (int u = 0; u < in.n; u++) {
        const uint8_t *at = in.next();
        const uint8_t *mine = G == 4 && !low ? at + T::bytes : at;
        int c[4][4], score[2][4];
        score_tile<KB, D>(a, at, q, start, c, lane);
#pragma unroll
        for (int n = 0; n < 4; n++) score[0][n] = c[n][0] * 256 + c[n][2], score[1][n] = c[n][1] * 256 + c[n][3];
        if constexpr (G == 4) {
            score_tile<KB, D>(a, at + T::bytes, q, start, c, lane);
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (!low) score[0][n] = c[n][0] * 256 + c[n][2], score[1][n] = c[n][1] * 256 + c[n][3];
        }
        float k[2][4], v[2][4], x[2][4];
        const uint4 kn = *(const uint4 *)(mine + side<KB, D>::word_bytes + t * 16), vn = *(const uint4 *)(mine + T::k_bytes + side<VB, D>::word_bytes + t * 16);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            four_halves(j ? kn.z : kn.x, j ? kn.w : kn.y, k[j]);
            four_halves(j ? vn.z : vn.x, j ? vn.w : vn.y, v[j]);
#pragma unroll
            for (int n = 0; n < 4; n++) k[j][n] *= scale, x[j][n] = (float)score[j][n];
        }
        const int i = i0 + warp + WARPS * u;
        if (i * UNIT_TOKENS<G> < r.first || (i + 1) * UNIT_TOKENS<G> > r.n_codes) {
            const int token = i * UNIT_TOKENS<G> + (G == 4 && !low ? TILE_TOKENS : 0) + 2 * t;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (token + 8 * n + j < r.first || token + 8 * n + j >= r.n_codes) x[j][n] = -INFINITY, k[j][n] = 1, v[j][n] = 0;
            __syncwarp();
        }
        if (u % LOOK == 0 && u > 0) {                   // has every head filled the window since the last look?
            unsigned enough = __ballot_sync(~0u, seen >= COUNT + (1 << LOW_BITS));
            if (G == 4) enough |= enough >> 16;
            enough |= enough >> 2;
            enough |= enough >> 1;
            const unsigned all = G == 4 ? 0x1111u : 0x11111111u;
            if ((enough & all) != all || u % FLUSH == 0) {
                float most = fmaxf(seen - COUNT, 0.0f);
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                if (G == 4) most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
                if (__any_sync(~0u, sum.e > FLOOR)) sum.flush(far, lane);
                if (sum.e > FLOOR && most < (1 << LOW_BITS)) sum.e += ceilf(log2_fast(fmaxf(most, 1.0f))) - TOP_BITS;
            }
            seen = COUNT;
        }
        float w[2][4], l, top;
        const auto weigh = [&] {
            const float off = mean - sum.e;
            l = 0, top = 0;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float p = exp2_fast(fmaf(x[j][n], k[j][n], off));
                    w[j][n] = fmaf(p, v[j][n], COUNT);
                    top = fmaxf(top, w[j][n]);
                    l += p;
                }
        };
        weigh();
        seen = fmaxf(seen, top);
        if (__any_sync(~0u, top > COUNT + 65535.0f)) {
            float y = -INFINITY;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) y = fmaxf(y, fmaf(x[j][n], k[j][n], mean) + log2_fast(fmaxf(v[j][n], 5.9604645e-8f)));
            y = fmaxf(y, __shfl_xor_sync(~0u, y, 1));
            y = fmaxf(y, __shfl_xor_sync(~0u, y, 2));
            if (G == 4) y = fmaxf(y, __shfl_xor_sync(~0u, y, 16));
            const float fit = ceilf(y) - TOP_BITS;
            const bool above = y > FLOOR && y - sum.e > 15.9f;
            sum.shift(above ? (int)fminf(fit - sum.e, 31.0f) : 0, lane);
            if (above) sum.e = fit;
            weigh();
        }
        sum.l += l;
        uint32_t p[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            p[n] = byte_lookup(__float_as_uint(w[0][n]), __float_as_uint(w[1][n]), 0x5410);
            if constexpr (VB == 4) sum.weight = add_halves(p[n], sum.weight);
        }
        if constexpr (G == 4) {
            const uint32_t keep = low ? 0x7531u : 0x6420u, send = low ? 0x6420u : 0x7531u;
            const uint32_t own0 = byte_lookup(p[0], p[1], keep), own1 = byte_lookup(p[2], p[3], keep);
            const uint32_t got0 = __shfl_xor_sync(~0u, byte_lookup(p[0], p[1], send), 16), got1 = __shfl_xor_sync(~0u, byte_lookup(p[2], p[3], send), 16);
#pragma unroll
            for (int tile_i = 0; tile_i < 2; tile_i++) {
                const uint32_t b0 = low == (tile_i == 0) ? own0 : got0, b1 = low == (tile_i == 0) ? own1 : got1;
                uint32_t words[side<VB, D>::words];
                load_words<VB, D>(words, at + tile_i * T::bytes + T::k_bytes, lane);
#pragma unroll
                for (int d = 0; d < DS; d += 2) {
                    uint32_t f[8];
                    unpack_two<VB>(words + d * VB / 2, a.vb.t0, a.vb.t1, f);
                    product_s8u8(sum.acc[d], sum.acc[d], f, b0, b1);
                    product_s8u8(sum.acc[d + 1], sum.acc[d + 1], f + 4, b0, b1);
                }
            }
        } else {
            const uint32_t f8[4] = { byte_lookup(p[0], p[1], 0x7531), byte_lookup(p[0], p[1], 0x6420), byte_lookup(p[2], p[3], 0x7531), byte_lookup(p[2], p[3], 0x6420) };
            uint32_t words[side<VB, D>::words];
            load_words<VB, D>(words, at + T::k_bytes, lane);
#pragma unroll
            for (int d = 0; d < DS; d += 2) {
                uint32_t f[8];
                unpack_two<VB>(words + d * VB / 2, a.vb.t0, a.vb.t1, f);
#pragma unroll
                for (int j = 0; j < 4; j++) product_u8s8(sum.acc[2 * d + j], sum.acc[2 * d + j], f8, f[j / 2 * 4 + j % 2], f[j / 2 * 4 + 2 + j % 2]);
            }
        }
        in.done();
    }
    // The integers as they are, to where the ring was.
    int4 *dump = (int4 *)in.s.ring;
#pragma unroll
    for (int i = 0; i < sums<G, D>::N; i++) dump[i * 32 + lane] = make_int4(sum.acc[i][0], sum.acc[i][1], sum.acc[i][2], sum.acc[i][3]);
    const auto over_head = [&](float x) {
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        return G == 4 ? x + __shfl_xor_sync(~0u, x, 16) : x;
    };
    const float top = fmaxf(sum.m, sum.e), keep = exp2_fast(sum.m - top), by = exp2_fast(sum.e - top);
    const float l = over_head(fmaf(sum.whole, keep, sum.l * by)), halves = over_head(fmaf(sum.halves, keep, (float)sum.weight * by));
    if (t == 0 && (G == 8 || low)) s.m[warp][g] = top, s.l[warp][g] = l, s.half[warp][g] = halves * a.vb.half, s.keep[warp][g] = sum.m > FLOOR ? keep : 0.0f, s.by[warp][g] = by;
}

}  // namespace kelvin::detail
