// nuq.cuh -- calibrated non-uniform levels, outliers of a span in a bounded list (core/codecs/nuq.c, which has the page's picture).
//
// The list holds the cap highest keys (score, then the lower index) above the bar: their lowest is found bit by bit by counting, and
// every element is then judged by itself.  Scratch: mean and 1 / deviation of each token of a span, in double.
#pragma once
#include "codecs/nuq_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct nuq_codec {
    template <class T> static __device__ __forceinline__ const T *at(const dev_codec &c, uint32_t offset) { return (const T *)((const uint8_t *)c.pod + offset); }

    struct span {
        const dev_codec  &c;
        const nuq_device &s;
        const float *x, *zero, *inverse;                    // zero: of keys' channels, null for values
        long long    ld;
        const double *moments;                              // [span] mean, 1 / deviation
        uint64_t     least;                                 // lowest key of the list

        __device__ __forceinline__ float at(int token, int i) const { return x[token * ld + i]; }
        __device__ __forceinline__ uint64_t key(int token, int i) const       // 0: not above the bar
        {
            const float v = at(token, i), score = zero ? fabsf((v - zero[i]) * inverse[i]) : (float)(fabs(v - moments[2 * token]) * moments[2 * token + 1]);
            return score > (zero ? 1.0f : 0.0f) ? (uint64_t)float_bits(score) << 32 | (0xffffffffu - (uint32_t)(token * c.head_dim + i)) : 0;
        }
        __device__ __forceinline__ bool marked(int token, int i) const
        {
            const uint64_t k = s.cap ? key(token, i) : 0;
            return k && k >= least;
        }
    };

    static __device__ __forceinline__ int count(const span &m, uint64_t least, int lane)
    {
        int n = 0;
        for (int t = 0; t < m.s.span; t++)
            for KV_ROW(i, m.c.head_dim) {
                const uint64_t k = m.key(t, i);
                n += k && k >= least;
            }
        for (int h = 16; h; h /= 2) n += __shfl_xor_sync(~0u, n, h);
        return n;
    }

    static __device__ __noinline__ void find_least(span &m, double *moments, int lane)
    {
        const int d = m.c.head_dim;
        if (!m.zero) {
            __syncwarp();
            for KV_ROW(t, m.s.span) {
                double mean = 0, square = 0;
                for (int i = 0; i < d; i++) mean += m.at(t, i);
                mean /= d;
                for (int i = 0; i < d; i++) square += (m.at(t, i) - mean) * (m.at(t, i) - mean);
                moments[2 * t] = mean;
                moments[2 * t + 1] = square > 0 ? 1 / sqrt(square / d) : 0;
            }
            __syncwarp();
        }
        m.least = 0;
        if (count(m, 0, lane) <= m.s.cap) return;
        // The bits of a score, then those of an index, of which there are 16.
        for (int bit = 62; bit >= 0; bit--) {
            if (bit == 31) m.least |= 0xffff0000u, bit = 15;
            const uint64_t higher = m.least | (uint64_t)1 << bit;
            const int n = count(m, higher, lane);
            if (n >= m.s.cap) m.least = higher;
            if (n == m.s.cap) return;
        }
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long ld, float *scratch, int lane)
    {
        const nuq_device &s = *(const nuq_device *)c.pod;
        const int d = c.head_dim;
        span m = { c, s, x, s.at_zero ? at<float>(c, s.at_zero) : nullptr, s.at_zero ? at<float>(c, s.at_inverse) : nullptr, ld, (const double *)scratch, 0 };
        if (s.cap) find_least(m, (double *)scratch, lane);
        for (int t = 0; t < s.span; t++) {
            float z = 0, per = 0;
            if (!m.zero) {
                float lo = INFINITY, hi = -INFINITY;
                for KV_ROW(i, d) {
                    if (m.marked(t, i)) continue;
                    lo = fminf(lo, m.at(t, i));
                    hi = fmaxf(hi, m.at(t, i));
                }
                for (int h = 16; h; h /= 2) lo = fminf(lo, __shfl_xor_sync(~0u, lo, h)), hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, h));
                if (lo > hi) lo = hi = 0;
                const uint16_t zero = float_half(fminf(fmaxf(hi / 2 + lo / 2, -65504.0f), 65504.0f) + 0.0f), scale = float_half(fminf(hi / 2 - lo / 2, 65504.0f) + 0.0f);
                if (lane == 0) store16(page + s.zeros_at + 2 * (size_t)(tok0 + t), zero), store16(page + s.scales_at + 2 * (size_t)(tok0 + t), scale);
                z = half_float(zero);
                per = half_float(scale) > 0 ? 1 / half_float(scale) : 0;
            }
            auto code = [&](int i) {
                const float u = m.zero ? (m.at(t, i) - m.zero[i]) * m.inverse[i] : (m.at(t, i) - z) * per;
                uint32_t k = 0;
                for (int b = 0; b + 1 < s.n_levels; b++) k += u > s.bound[b];
                return k;
            };
            uint8_t *row = page + (size_t)(tok0 + t) * s.row_bytes;
            for KV_ROW(b, (int)s.row_bytes) {
                uint32_t v = 0;
                for (int i = 8 * b / s.bits; i < d && i * s.bits < 8 * b + 8; i++) {
                    const int up = i * s.bits - 8 * b;
                    v |= up >= 0 ? code(i) << up : code(i) >> -up;
                }
                row[b] = (uint8_t)v;
            }
        }
        if (s.cap) put_list(m, page + s.lists_at + (size_t)(tok0 / s.span) * s.list_bytes, lane);
        __syncwarp();
    }

    static __device__ __forceinline__ void put_list(const span &m, uint8_t *list, int lane)
    {
        const int d = m.c.head_dim;
        int n = 0;
        for (int t = 0; t < m.s.span; t++)
            for (int first = 0; first < d; first += 32) {
                const int i = first + lane;
                const bool here = i < d && m.marked(t, i);
                const uint32_t all = __ballot_sync(~0u, here);
                if (here) {
                    uint8_t *to = list + 2 + 4 * (n + __popc(all & ((1u << lane) - 1)));
                    store16(to, (uint16_t)(t * d + i));
                    store16(to + 2, float_half(fminf(fmaxf(m.at(t, i), -65504.0f), 65504.0f)));
                }
                n += __popc(all);
            }
        for (int k = n + lane; k < m.s.cap; k += 32) store16(list + 2 + 4 * k, 0), store16(list + 4 + 4 * k, 0);
        if (lane == 0) store16(list, (uint16_t)n);
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *, int lane)
    {
        const nuq_device &s = *(const nuq_device *)c.pod;
        const int d = c.head_dim;
        const float *zero = s.at_zero ? at<float>(c, s.at_zero) : nullptr, *scale = s.at_zero ? at<float>(c, s.at_scale) : nullptr;
        const float z = zero ? 0 : half_float(load16(page + s.zeros_at + 2 * (size_t)tok)), r = zero ? 0 : half_float(load16(page + s.scales_at + 2 * (size_t)tok));
        const uint8_t *codes = page + (size_t)tok * s.row_bytes;
        __syncwarp();
        for KV_ROW(i, d) {
            const int bit = i * s.bits, up = bit % 8;
            const uint32_t high = up + s.bits > 8 ? codes[bit / 8 + 1] : 0;
            const float v = s.level[(codes[bit / 8] | high << 8) >> up & ((1u << s.bits) - 1)];
            row[i] = zero ? v * scale[i] + zero[i] : v * r + z;
        }
        __syncwarp();
        if (!s.cap) return;
        const uint8_t *list = page + s.lists_at + (size_t)(tok / s.span) * s.list_bytes;
        const int n = min((int)load16(list), s.cap), own = tok % s.span;
        for (int first = 0; first < n; first += 32) {
            const int k = first + lane, i = k < n ? load16(list + 2 + 4 * k) : 0;
            for (uint32_t hits = __ballot_sync(~0u, k < n && i / d == own); hits; hits &= hits - 1) {      // in order: of entries for one place the last counts
                if (lane == __ffs((int)hits) - 1) row[i - own * d] = half_float(load16(list + 4 + 4 * k));
                __syncwarp();
            }
        }
    }
};

}  // namespace kelvin
