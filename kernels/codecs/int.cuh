// int.cuh -- group-wise integers (core/codecs/int.c, which has the page's picture and the modes' arithmetic).
//
// axis=dim: a warp's lanes share a token's row, a byte of codes each.  axis=token: a lane takes a channel's run of tokens at a time.
#pragma once
#include "codecs/int_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct int_codec {
    enum { BLOCK = 32, AFFINE = 0, SYMMETRIC, GGML_0, GGML_1 };
    struct group_scale { float mul, off; uint16_t d, m; };

    static __device__ __forceinline__ float clamp(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }
    static __device__ __forceinline__ float inverse(float d) { return fabsf(d) >= 0x1p-126f ? 1.0f / d : 0.0f; }

    static __device__ __forceinline__ group_scale scale_of(const int_device &s, float lo, float hi, float extreme)
    {
        lo += 0.0f;
        hi += 0.0f;
        const float most = 65504, levels = (float)((1 << s.bits) - 1), zero = (float)(1 << (s.bits - 1)), amax = fabsf(extreme);
        group_scale g = { 0, 0, 0, 0 };
        if (s.mode == SYMMETRIC) {
            g.d = float_half(clamp(amax / (zero - 1), 0, most));
            g.mul = inverse(half_float(g.d));
        } else if (s.mode == GGML_0) {
            const float d = clamp(s.bits == 8 ? amax / 127 : extreme / -zero, -most, most);
            g.d = float_half(d);
            g.mul = inverse(d);
        } else {
            g.off = clamp(lo, -most, most);
            g.m = float_half(g.off);
            if (s.mode == AFFINE) g.off = half_float(g.m);
            const float d = clamp((hi - g.off) / levels, 0, most);
            g.d = float_half(d);
            g.mul = inverse(s.mode == AFFINE ? half_float(g.d) : d);
        }
        return g;
    }

    static __device__ __forceinline__ uint32_t code_of(const int_device &s, const group_scale &g, float x)
    {
        const float levels = (float)((1 << s.bits) - 1), zero = (float)(1 << (s.bits - 1));
        switch (s.mode) {
        case AFFINE:    return (uint32_t)(int)rintf(clamp((x - g.off) * g.mul, 0, levels));
        case SYMMETRIC: return (uint32_t)(int)(rintf(clamp(x * g.mul, 1 - zero, zero - 1)) + zero);
        case GGML_0:
            if (s.bits == 8) return (uint32_t)(int)roundf(clamp(x * g.mul, -127, 127)) & 255;
            return (uint32_t)(int)clamp(x * g.mul + (zero + 0.5f), 0, levels);
        default:        return (uint32_t)(int)clamp((x - g.off) * g.mul + 0.5f, 0, levels);
        }
    }

    // ---- a block of n codes in planes

    static __device__ __forceinline__ int plane_bytes(int bits, int n)
    {
        if (bits == 8) return n;
        int bytes = 0;
        for (int w = 1; w <= 4; w <<= 1) bytes += bits & w ? (n * w + 7) / 8 : 0;
        return bytes;
    }

    // Byte b, from code(j) of its elements.
    template <class F> static __device__ __forceinline__ uint8_t byte_of(int bits, int n, int b, F code)
    {
        if (bits == 8) return (uint8_t)code(b);
        for (int w = 1; w <= 4; w <<= 1) {
            if (!(bits & w)) continue;
            const int shift = w == 4 ? 0 : w == 2 ? bits & 4 : bits & 6, bytes = (n * w + 7) / 8;
            if (b >= bytes) {
                b -= bytes;
                continue;
            }
            uint32_t v = 0;
            if (w == 1) for (int j = 8 * b; j < 8 * b + 8 && j < n; j++) v |= (code(j) >> shift & 1) << (j - 8 * b);
            else for (int j = b, up = 0; up < 8 && j < n; j += bytes, up += w) v |= (code(j) >> shift & ((1u << w) - 1)) << up;
            return (uint8_t)v;
        }
        return 0;
    }

    static __device__ __forceinline__ uint32_t code_at(const uint8_t *block, int bits, int n, int j)
    {
        if (bits == 8) return block[j];
        uint32_t code = 0;
        for (int w = 1; w <= 4; w <<= 1) {
            if (!(bits & w)) continue;
            const int shift = w == 4 ? 0 : w == 2 ? bits & 4 : bits & 6, bytes = (n * w + 7) / 8;
            int i = j, up = 0;
            if (w == 1) i = j / 8, up = j % 8;
            else for (; i >= bytes; i -= bytes) up += w;
            code |= (block[i] >> up & ((1u << w) - 1)) << shift;
            block += bytes;
        }
        return code;
    }

    static __device__ __forceinline__ int header(const int_device &s) { return s.has_min ? 4 : 2; }

    // Element i of a row.
    static __device__ __forceinline__ float value_at(const int_device &s, const uint8_t *row, int i)
    {
        const int k = i / s.group, in = i - k * s.group, n = min(s.group, s.cols - k * s.group), block = in / BLOCK;
        const uint8_t *g = row + (size_t)k * s.group_bytes;
        const uint32_t code = code_at(g + header(s) + (size_t)block * s.block_bytes, s.bits, min((int)BLOCK, n - block * BLOCK), in % BLOCK);
        const float v = half_float(load16(g)) * (float)((s.s8 ? (int)(int8_t)code : (int)code) - s.zero);
        return s.has_min ? v + half_float(load16(g + 2)) : v;
    }

    static __device__ __forceinline__ void put_header(const int_device &s, const group_scale &g, uint8_t *dst)
    {
        store16(dst, g.d);
        if (s.has_min) store16(dst + 2, g.m);
    }

    // ---- axis=dim: channel of a row's element, and back

    static __device__ __forceinline__ int channel(const int_device &s, int i) { return s.interleaved ? (i & 1 ? i / 2 + s.cols / 2 : i / 2) : i; }
    static __device__ __forceinline__ int place(const int_device &s, int channel) { return !s.interleaved ? channel : channel < s.cols / 2 ? 2 * channel : 2 * (channel - s.cols / 2) + 1; }

    static __device__ __forceinline__ void encode_row(const int_device &s, uint8_t *row, const float *x, int lane)
    {
        for (int k = 0, first = 0; first < s.cols; k++, first += s.group) {
            const int n = min(s.group, s.cols - first);
            uint8_t *dst = row + (size_t)k * s.group_bytes;
            auto at = [&](int i) { return x[channel(s, first + i)]; };
            float lo = at(0), hi = lo, extreme = 0;
            int where = n;
            for KV_ROW(i, n) {
                const float v = at(i);
                lo = fminf(lo, v);
                hi = fmaxf(hi, v);
                if (fabsf(v) > fabsf(extreme)) extreme = v, where = i;
            }
#pragma unroll
            for (int h = 16; h; h /= 2) {                   // of the largest |x| the first
                lo = fminf(lo, __shfl_xor_sync(~0u, lo, h));
                hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, h));
                const float other = __shfl_xor_sync(~0u, extreme, h);
                const int there = __shfl_xor_sync(~0u, where, h);
                if (fabsf(other) > fabsf(extreme) || (fabsf(other) == fabsf(extreme) && there < where)) extreme = other, where = there;
            }
            const group_scale g = scale_of(s, lo, hi, extreme);
            if (lane == 0) put_header(s, g, dst);
            dst += header(s);
            for (int i = 0; i < n; i += BLOCK) {
                const int m = min((int)BLOCK, n - i);
                for KV_ROW(b, plane_bytes(s.bits, m)) dst[b] = byte_of(s.bits, m, b, [&](int j) { return code_of(s, g, at(i + j)); });
                dst += s.block_bytes;
            }
        }
    }

    // ---- axis=token

    static __device__ __forceinline__ void encode_run(const int_device &s, uint8_t *dst, const float *x, long long ld)
    {
        float lo = x[0], hi = lo, extreme = 0;
        for (int i = 0; i < s.cols; i++) {
            const float v = x[i * ld];
            lo = fminf(lo, v);
            hi = fmaxf(hi, v);
            if (fabsf(v) > fabsf(extreme)) extreme = v;
        }
        const group_scale g = scale_of(s, lo, hi, extreme);
        put_header(s, g, dst);
        dst += header(s);
        for (int i = 0; i < s.cols; i += BLOCK) {
            const int m = min((int)BLOCK, s.cols - i), bytes = plane_bytes(s.bits, m);
            for (int b = 0; b < bytes; b++) dst[b] = byte_of(s.bits, m, b, [&](int j) { return code_of(s, g, x[(i + j) * ld]); });
            dst += s.block_bytes;
        }
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long ld, float *, int lane)
    {
        const int_device &s = *(const int_device *)c.pod;
        if (!s.along_tokens) encode_row(s, page + (size_t)tok0 * s.row_bytes, x, lane);
        else for KV_ROW(i, c.head_dim) encode_run(s, page + (size_t)(tok0 / s.group) * s.granule_bytes + (size_t)i * s.row_bytes, x + i, ld);
        __syncwarp();
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *, int lane)
    {
        const int_device s = *(const int_device *)c.pod;
        const uint8_t *from = s.along_tokens ? page + (size_t)(tok / s.group) * s.granule_bytes : page + (size_t)tok * s.row_bytes;
        const int in = tok % s.group;
        fill(row, c.head_dim, lane, [&](int i) { return s.along_tokens ? value_at(s, from + (size_t)i * s.row_bytes, in) : value_at(s, from, place(s, i)); });
        __syncwarp();
    }
};

}  // namespace kelvin
