// fp.cuh -- small floating-point numbers (core/codecs/fp.c, which has the page's picture and the arithmetic).
#pragma once
#include "codecs/fp_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct fp_codec {
    enum { BLOCK_NONE, BLOCK_E8M0, BLOCK_E4M3 };
    enum { E4M3 = 5, E5M2 = 6 };

    static __device__ __forceinline__ float e8m0(uint8_t b) { return bits_float(b == 255 ? 0x7fc00000u : b ? (uint32_t)b << 23 : 0x00400000u); }
    // The exponent of an f16 has the same place in a number with 8 times less bias: a factor of 2^8.
    static __device__ __forceinline__ float e4m3(uint8_t b)
    {
        return (b & 0x7f) == 0x7f ? bits_float((uint32_t)b << 24 | 0x7fc00000u) : half_float((uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256.0f;
    }

    // |y| as bits to its code without sign.
    static __device__ __forceinline__ uint32_t round_to(const fp_device_grid &g, uint32_t a)
    {
        a = a < g.largest ? a : g.largest;
        const uint32_t small = float_bits(bits_float(a) + g.magic) - float_bits(g.magic);
        const uint32_t wide = ((a + ((1u << g.shift) / 2 - 1) + (a >> g.shift & 1)) >> g.shift) - g.rebias;
        return a < g.normal ? small : wide;
    }

    static __device__ __forceinline__ uint8_t group_scale(const fp_device &s, float amax, float row)
    {
        if (s.block == BLOCK_E8M0) {
            const int e = (int)(float_bits(amax / row) >> 23) - s.grid.exponent;
            return (uint8_t)(e < 0 ? 0 : e > 254 ? 254 : e);
        }
        const float want = amax / s.grid.max / row;
        const uint8_t b = (uint8_t)round_to(s.e4m3, float_bits(want));
        return (uint8_t)(b + (s.grid.bits == 8 && b < 8 && e4m3(b) < want));
    }
    static __device__ __forceinline__ float group_value(const fp_device &s, uint8_t b) { return s.block == BLOCK_E8M0 ? e8m0(b) : e4m3(b); }

    // scratch: the scale of each group.
    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok, const float *x, long long, float *scratch, int lane)
    {
        const fp_device &s = *(const fp_device *)c.pod;
        const int d = c.head_dim, top = s.grid.bits - 1;
        uint8_t *row = page + (size_t)tok * s.row_bytes, *groups = page + s.groups_at + (size_t)tok * s.n_groups;
        float all = s.value;
        if (s.by_token) {
            const float least = max_of(d, lane, [=](int i) { return fabsf(x[i]); }) / (s.block == BLOCK_E4M3 ? 448 * s.grid.max : s.grid.max);
            const uint16_t h = float_half(least < 65504 ? least : 65504);
            if (lane == 0) store16(page + s.tokens_at + 2 * (size_t)tok, h);
            all = half_float(h);
        }
        __syncwarp();
        for KV_ROW(k, s.n_groups) {
            if (s.block == BLOCK_NONE) {
                scratch[k] = all;
                continue;
            }
            float amax = 0;
            for (int i = k * s.group; i < min(d, (k + 1) * s.group); i++) amax = fmaxf(amax, fabsf(x[i]));
            groups[k] = all > 0 ? group_scale(s, amax, all) : 0;
            scratch[k] = group_value(s, groups[k]) * all;
        }
        __syncwarp();
        auto code = [&](int i) {
            const float scale = scratch[i / s.group];
            if (!(scale > 0)) return 0u;
            const uint32_t u = float_bits(x[i] / scale);
            return round_to(s.grid, u & 0x7fffffffu) | (u >> 31) << top;
        };
        if (s.grid.bits == 8) for KV_ROW(i, d) row[i] = (uint8_t)code(i);
        else for KV_ROW(i, (d + 1) / 2) row[i] = (uint8_t)(code(2 * i) | (2 * i + 1 < d ? code(2 * i + 1) : 0) << 4);
        __syncwarp();
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *, int lane)
    {
        const fp_device &s = *(const fp_device *)c.pod;
        const uint8_t *codes = page + (size_t)tok * s.row_bytes, *groups = page + s.groups_at + (size_t)tok * s.n_groups;
        const float all = s.by_token ? half_float(load16(page + s.tokens_at + 2 * (size_t)tok)) : s.value;
        fill(row, c.head_dim, lane, [&](int i) {
            const float scale = s.block == BLOCK_NONE ? all : group_value(s, groups[i / s.group]) * all;
            const float v = s.kind == E4M3 ? e4m3(codes[i]) : s.kind == E5M2 ? half_float((uint16_t)(codes[i] << 8)) : s.table[codes[i / 2] >> 4 * (i & 1) & 15];
            return v * scale;
        });
        __syncwarp();
    }
};

}  // namespace kelvin
