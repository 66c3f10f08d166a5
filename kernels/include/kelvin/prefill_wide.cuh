// prefill_wide.cuh -- prefill_kernel for Hopper: two warpgroups of 64 packed rows each, whole images by bulk copies that a third orders.
//
// A warpgroup starts the scores of the next image before the weighted values of this one, so that the exponentials run beside a product;
// the two warpgroups take turns at starting products, so that one's exponentials run beside the other's products.  Needs sm_90a.
#pragma once
#include "prefill.cuh"
#ifndef KV_EMULATE                      // which has no asynchronous products
#include "wgmma.cuh"

namespace kelvin {

template <int D> struct wide_form {
    static constexpr int GROUPS = 2, ROWS = GROUPS * QUERY_ROWS, THREADS = (GROUPS + 1) * 128, UNIT = IMAGE_KEYS<D>, STAGES = D > 64 ? 2 : 4;
    static constexpr int QUERY_BYTES = ROWS * D * 2, SHARED = 1024 + QUERY_BYTES + STAGES * 2 * IMAGE_BYTES<D> + 256;
};

template <int D> __global__ void __launch_bounds__(wide_form<D>::THREADS, 1) prefill_wide(const prefill_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace detail;
    using F = wide_form<D>;
    constexpr int N = F::UNIT / 8;
    KV_SHARED_DYNAMIC(memory);
    uint8_t *const queries = memory + (1024 - (shared_address(memory) & 1023)) % 1024, *const ring = queries + F::QUERY_BYTES;
    uint64_t *const barriers = (uint64_t *)(ring + F::STAGES * 2 * IMAGE_BYTES<D>);
    uint64_t *const keys_here = barriers, *const values_here = keys_here + F::STAGES, *const keys_free = values_here + F::STAGES, *const values_free = keys_free + F::STAGES,
             *const queries_here = values_free + F::STAGES;
    way &w = *(way *)(queries_here + 1);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, group = a.n_heads / a.n_kv_heads;
    const int block = gridDim.x - 1 - blockIdx.x, row0 = block * F::ROWS;         // the longest first
    const int kv_head = blockIdx.y, seq = blockIdx.z / a.splits, split = blockIdx.z % a.splits;
    const size_t place = (size_t)seq * a.n_kv_heads + kv_head;
    if (thread == 0) {
        for (int i = 0; i < F::STAGES; i++) {
            barrier_init(keys_here + i, 1);
            barrier_init(values_here + i, 1);
            barrier_init(keys_free + i, F::GROUPS * 4);
            barrier_init(values_free + i, F::GROUPS * 4);
        }
        barrier_init(queries_here, 1);
        barrier_visible();
        plan_way<F::UNIT>(a, w, seq, kv_head, row0 / group, min(a.n - 1, (row0 + F::ROWS - 1) / group));
    }
    __syncthreads();
    const int total = w.start[a.n_sources], u0 = (int)((long long)total * split / a.splits), n = (int)((long long)total * (split + 1) / a.splits) - u0;

    if (warp >= F::GROUPS * 4) {
        registers_give<24>();
        if (thread != F::GROUPS * 128) return;
        const int images = (int)gridDim.x * F::GROUPS;
        barrier_expect(queries_here, F::QUERY_BYTES);
        copy_bulk(queries, a.q + (place * images + (size_t)block * F::GROUPS) * (QUERY_ROWS * D * 2), F::QUERY_BYTES, queries_here);
        int source = 0;
        for (int i = 0; i < n; i++) {
            const int stage = i % F::STAGES, turn = i / F::STAGES & 1;
            while (u0 + i >= w.start[source + 1]) source++;
            const prefill_source &s = a.source[source];
            const int image = w.unit0[source] + u0 + i - w.start[source];
            uint8_t *const to = ring + stage * 2 * IMAGE_BYTES<D>;
            if (i >= F::STAGES) barrier_wait(keys_free + stage, turn ^ 1);
            barrier_expect(keys_here + stage, IMAGE_BYTES<D>);
            copy_bulk(to, s.k + place * s.k_stride + (size_t)(image - (s.k_origin ? s.k_origin[seq] : s.k_first)) * IMAGE_BYTES<D>, IMAGE_BYTES<D>, keys_here + stage);
            if (i >= F::STAGES) barrier_wait(values_free + stage, turn ^ 1);
            barrier_expect(values_here + stage, IMAGE_BYTES<D>);
            copy_bulk(to + IMAGE_BYTES<D>, s.v + place * s.v_stride + (size_t)(image - (s.v_origin ? s.v_origin[seq] : s.v_first)) * IMAGE_BYTES<D>, IMAGE_BYTES<D>, values_here + stage);
        }
    } else {
        registers_take<240>();
        const int strip0 = row0 + warp * 16;
        const uint8_t *const own = queries + warp / 4 * QUERY_ROWS * D * 2;
        float o[D / 8][4], s[N][4], top[2] = { LOWEST, LOWEST }, sum[2] = { 0, 0 }, keep[2];
        uint32_t f[F::UNIT / 16][4];
        int source = -1;
        interval see[2];
#pragma unroll
        for (int j = 0; j < D / 8; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;

        auto start_scores = [&](int i) {
            const uint8_t *const keys = ring + i % F::STAGES * 2 * IMAGE_BYTES<D>;
            barrier_wait(keys_here + i % F::STAGES, i / F::STAGES & 1);
            products_hold<N>(s);
            products_open();
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                product_shared<F::UNIT>(s, operand(own + k / 4 * QUERY_ROWS * 128 + k % 4 * 32), operand(keys + k / 4 * F::UNIT * 128 + k % 4 * 32), k > 0);
            products_commit();
        };
        auto start_values = [&](int i) {
            const uint8_t *const values = ring + i % F::STAGES * 2 * IMAGE_BYTES<D> + IMAGE_BYTES<D>;
            barrier_wait(values_here + i % F::STAGES, i / F::STAGES & 1);
            products_hold<D / 8>(o);
            products_open();
#pragma unroll
            for (int k = 0; k < F::UNIT / 16; k++) product_stacked<D>(o, f[k], operand(values + k * 16 * 128, F::UNIT * 128));
            products_commit();
        };
        auto weigh_scores = [&](int i) {
            const int u = u0 + i;
            while (source < 0 || u >= w.start[source + 1]) {
                source++;
#pragma unroll
                for (int r = 0; r < 2; r++) see[r] = seen_by(a, a.source[source], seq, kv_head, min(a.n - 1, (strip0 + lane / 4 + 8 * r) / group));
            }
            const int p = (w.unit0[source] + u - w.start[source]) * F::UNIT;
            if (a.softcap > 0) {
                float bias[2];
                bias_of(a, seq, kv_head, strip0, bias, lane);
                bend_scores<N>(a, s, bias);
            }
            if (p < w.whole_from[source] || p + F::UNIT > w.whole_to[source]) hide_scores<N>(s, see, p, lane);
            soften<N>(s, top, sum, keep);
        };

        if (n > 0) {
            const int mine = 1 + warp / 4, others = 3 - mine;
            if (mine == 2 && n > 1) turn_give(others);
            barrier_wait(queries_here, 0);
            start_scores(0);
            products_wait<0>();
            products_hold<N>(s);
            if (lane == 0) barrier_arrive(keys_free);
            weigh_scores(0);
#pragma unroll
            for (int k = 0; k < F::UNIT / 16; k++) weights_of(s + 2 * k, f[k]);
#pragma unroll 1
            for (int i = 1; i < n; i++) {
                turn_wait(mine);
                start_scores(i);
                start_values(i - 1);
                if (mine == 1 || i + 1 < n) turn_give(others);
                products_wait<1>();
                products_hold<N>(s);
                if (lane == 0) barrier_arrive(keys_free + i % F::STAGES);
                weigh_scores(i);
                products_wait<0>();
                products_hold<D / 8>(o);
                if (lane == 0) barrier_arrive(values_free + (i - 1) % F::STAGES);
                rescale<D / 8>(o, keep);
#pragma unroll
                for (int k = 0; k < F::UNIT / 16; k++) weights_of(s + 2 * k, f[k]);
            }
            start_values(n - 1);
            products_wait<0>();
            products_hold<D / 8>(o);
        }
        leave_strip<D>(a, a.part0 + split, seq, kv_head, strip0, o, top, sum, lane);
    }
#endif
}

}  // namespace kelvin
#endif
