// polar.cuh -- pairs after a rotation as angle and radius, over several levels (core/codecs/polar.c and polar_stages.c, which have the
// page's picture; the polynomials are polar_level.h's, step by step).
//
// Encode's scratch: y, later radii and packed fields, in the first half; radii and indices in the second.
#pragma once
#include "codecs/polar_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct polar_codec {
    enum { F32, F16, LIN, LOG, LLOYD };
    enum { HALF = 512 };

    template <class T> static __device__ __forceinline__ const T *at(const dev_codec &c, uint32_t offset) { return (const T *)((const uint8_t *)c.pod + offset); }

    // Half to even, |x| < 2^22.
    static __device__ __forceinline__ int round_even(float x) { return (int)(float_bits(x + 12582912.0f) - 0x4b400000u); }

    // Angle over 2 pi in [-0.5, 0.5].
    static __device__ __forceinline__ float turn(float x, float y)
    {
        const float ax = fabsf(x), ay = fabsf(y);
        const bool steep = ay > ax;
        const float big = steep ? ay : ax, small = steep ? ax : ay, z = small / (big > 0 ? big : 1), s = z * z;
        float p = s * 0.0010841303737834096f + -0.005348277278244495f;
        p = p * s + 0.012672500684857368f;
        p = p * s + -0.021061517298221588f;
        p = p * s + 0.03152511641383171f;
        p = p * s + -0.0530262365937233f;
        p = (p * s + 0.15915432572364807f) * z;
        p = steep ? 0.25f - p : p;
        p = x < 0 ? 0.5f - p : p;
        return bits_float(float_bits(p) | (float_bits(y) & 0x80000000u));
    }

    static __device__ __forceinline__ float log2_of(float x)
    {
        const uint32_t bits = float_bits(x);
        const bool up = (bits & 0x7fffff) > 0x3504f3;
        const int e = (int)(bits >> 23) - 127 + up;
        const float m = bits_float((bits & 0x7fffff) | (up ? 0x3f000000u : 0x3f800000u)), t = (m - 1.0f) / (m + 1.0f), s = t * t;
        float p = s * 0.41219858f + 0.57707802f;
        p = p * s + 0.96179669f;
        p = p * s + 2.88539008f;
        return p * t + (float)e;
    }

    // 2^x; 0 below -126, at most 2^126.
    static __device__ __forceinline__ float power(float x)
    {
        if (!(x >= -126)) return 0;
        const float v = x > 126 ? 126 : x;
        const int e = round_even(v);
        const float f = v - (float)e;
        float p = f * 1.52527338e-5f + 1.54035304e-4f;
        p = p * f + 1.33335581e-3f;
        p = p * f + 9.61812911e-3f;
        p = p * f + 5.55041087e-2f;
        p = p * f + 2.40226507e-1f;
        p = p * f + 6.93147181e-1f;
        p = p * f + 1.0f;
        return bits_float(float_bits(p) + ((uint32_t)e << 23));
    }

    // ---- packed indices

    // All of a row's; field: room for their fields, or where the indices are, which are then spent.
    static __device__ __forceinline__ void pack(const polar_device_field &f, const int *index, uint32_t *field, uint8_t *dst, int lane)
    {
        uint64_t values = 1;
        for (int g = 0; g < f.digits; g++) values *= (uint64_t)f.base;
        __syncwarp();
        for KV_ROW(j, f.fields) {
            uint64_t v = 0;
            for (int i = j, g = 0; g < f.digits; g++, i += f.fields) v = v * (uint64_t)f.base + (i < f.count ? (uint64_t)index[i] : 0);
            if (f.digits > 1) v = ((v << f.width) + values - 1) / values;
            field[j] = (uint32_t)v;
        }
        __syncwarp();
        for KV_ROW(b, f.bytes) {
            uint32_t v = 0;
            for (int j = 8 * b / f.width; j < f.fields && j * f.width < 8 * b + 8; j++) {
                const int up = j * f.width - 8 * b;
                v |= up >= 0 ? field[j] << up : field[j] >> -up;
            }
            dst[b] = (uint8_t)v;
        }
        __syncwarp();
    }

    static __device__ __forceinline__ uint32_t index_at(const polar_device_field &f, const uint8_t *src, int i)
    {
        const int digit = f.digits > 1 ? i / f.fields : 0, bit = (i - digit * f.fields) * f.width;
        const uint8_t *p = src + bit / 8;
        const uint32_t mask = (1u << f.width) - 1;
        uint32_t v = (p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24) >> bit % 8 & mask;
        if (f.digits == 1) return v;
        for (int k = 0; k < digit; k++) v = v * (uint32_t)f.base & mask;
        return v * (uint32_t)f.base >> f.width;
    }

    // ---- radii

    static __device__ __forceinline__ uint16_t half_of(float x) { return float_half(x > 65504 ? 65504 : x < -65504 ? -65504 : x); }

    static __device__ __forceinline__ void put_steps(const polar_device &s, const float *x, int *code, uint32_t *field, uint8_t *row, uint8_t *side, int lane)
    {
        const int n = s.count, top = (1 << s.bits) - 1;
        float lo = x[0], hi = x[0];
        for KV_ROW(i, n) lo = fminf(lo, x[i]), hi = fmaxf(hi, x[i]);
#pragma unroll
        for (int h = 16; h; h /= 2) lo = fminf(lo, __shfl_xor_sync(~0u, lo, h)), hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, h));
        const uint16_t l = half_of(lo), step = half_of(fmaxf(0, hi - half_float(l)) / (float)top);
        const float low = half_float(l), d = half_float(step), per = d > 0 ? 1 / d : 0;
        for KV_ROW(i, n) {
            const float v = (x[i] - low) * per;
            code[i] = round_even(v > (float)top ? (float)top : v > 0 ? v : 0);
        }
        pack(s.radii, code, field, row, lane);
        if (lane == 0) store16(side, l), store16(side + 2, step);
    }

    static __device__ __forceinline__ void put_lloyd(const polar_device &s, const float *r, int e, int *code, uint32_t *field, uint8_t *row, uint8_t *side, int lane)
    {
        const int n = s.count;
        const float rms = sqrtf(dot16(r, r, n, lane) / (float)n), per = rms > 0 ? 1 / rms : 0;
        for KV_ROW(i, n) {
            int k = 0;
            for (int step = 1 << s.bits >> 1; step; step /= 2) k += r[i] * per > s.bound[k + step - 1] ? step : 0;
            code[i] = k;
        }
        __syncwarp();
        const float rl = sum16(n, lane, [&](int i) { return r[i] * s.table[code[i]]; });
        const float ll = sum16(n, lane, [&](int i) { const float v = s.table[code[i]]; return v * v; });
        if (lane == 0) store16(side, half_of(ldexpf(s.shrink * (rl / ll), e)));
        if (s.bits) pack(s.radii, code, field, row, lane);
    }

    // r is overwritten; what is stored stands for r 2^e.
    static __device__ __forceinline__ void put_radii(const polar_device &s, float *r, int e, int *code, uint32_t *field, uint8_t *row, uint8_t *side, int lane)
    {
        const int n = s.count;
        if (s.mode == LLOYD) {
            put_lloyd(s, r, e, code, field, row, side, lane);
            return;
        }
        if (s.mode == LOG) {
            const float top = max_of(n, lane, [=](int i) { return r[i]; });
            __syncwarp();
            for KV_ROW(i, n) r[i] = top > 0 ? log2_of(fmaxf(r[i], top * 0x1p-10f)) + (float)e : -65504;
        } else if (e) {
            for KV_ROW(i, n) r[i] = fminf(ldexpf(r[i], e), 0x1.fffffep127f);
        }
        __syncwarp();
        if (s.mode == LIN || s.mode == LOG) put_steps(s, r, code, field, row, side, lane);
        else if (s.mode == F32) for KV_ROW(i, n) store32(row + 4 * i, float_bits(r[i]));
        else for KV_ROW(i, n) store16(row + 2 * i, half_of(r[i]));
    }

    static __device__ __forceinline__ float radius(const polar_device &s, const uint8_t *row, const uint8_t *side, int i)
    {
        if (s.mode == F32) return bits_float(load32(row + 4 * i));
        if (s.mode == F16) return half_float(load16(row + 2 * i));
        const float lo = half_float(load16(side));                                 // lloyd: the scale
        const uint32_t code = s.bits ? index_at(s.radii, row, i) : 0;
        if (s.mode == LLOYD) return lo * s.table[code];
        const float v = lo + (float)(int)code * half_float(load16(side + 2));
        return s.mode == LOG ? power(v) : v;
    }

    // ---- rows

    // 2^-e of what brings the largest |x| to 0.5..1, or 0 when squares are safe as they are.
    static __device__ __forceinline__ int exponent(const float *x, int n, int lane)
    {
        int e = 0;
        const float top = max_of(n, lane, [=](int i) { return fabsf(x[i]); });
        if (top != 0 && !(top > 0x1p-40f && top < 0x1p40f)) frexpf(top, &e);
        return e;
    }

    // Pairs of y to radius and index.
    static __device__ __forceinline__ void split(const float *y, int n, int base, float *r, int *index, int lane)
    {
        for KV_ROW(i, n) {
            const float a = y[2 * i], b = y[2 * i + 1];
            const int k = round_even(turn(a, b) * (float)base);
            index[i] = k < 0 ? k + base : k;
            r[i] = sqrtf(a * a + b * b);
        }
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok, const float *x, long long, float *scratch, int lane)
    {
        const polar_device &s = *(const polar_device *)c.pod;
        const float *sign = s.at_sign ? at<float>(c, s.at_sign) : nullptr;
        const int d = c.head_dim;
        float *y = scratch, *r = scratch + HALF, *next = scratch;
        int *index = (int *)(scratch + HALF + HALF / 2);
        uint32_t *field = (uint32_t *)(scratch + HALF / 2);
        uint8_t *row = page + (size_t)tok * s.angle_bytes;
        const int e = exponent(x, d, lane);
        const float by = e < -60 ? 1 : ldexpf(1, -e);                              // 2^-e may be no float
        __syncwarp();
        for KV_ROW(i, d) y[i] = (e < -60 ? ldexpf(x[i], -e) : x[i]) * (sign ? sign[i] * by : by);
        __syncwarp();
        if (sign) fwht(y, d, lane);
        split(y, d / 2, s.level[0].field.base, r, index, lane);
        pack(s.level[0].field, index, field, row, lane);
        for (int l = 1; l < s.levels; l++) {
            const float *bound = at<float>(c, s.level[l].at_bound);
            for KV_ROW(i, s.level[l].field.count) {                                // psi > edge is b cos(edge) > a sin(edge)
                const float a = r[2 * i], b = r[2 * i + 1];
                int lo = 0, hi = s.upper - 1;
                while (lo < hi) {
                    const int mid = (lo + hi) / 2;
                    if (b * bound[2 * mid] > a * bound[2 * mid + 1]) lo = mid + 1;
                    else hi = mid;
                }
                index[i] = lo;
                next[i] = sqrtf(a * a + b * b);
            }
            pack(s.level[l].field, index, field, row + s.level[l].at, lane);
            float *const swap = r;
            r = next;
            next = swap;
        }
        put_radii(s, r, e, index, field, page + s.norm_at + (size_t)tok * s.norm_bytes, page + s.side_at + (size_t)tok * s.side_bytes, lane);
        __syncwarp();
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane)
    {
        const polar_device &s = *(const polar_device *)c.pod;
        const float *sign = s.at_sign ? at<float>(c, s.at_sign) : nullptr;
        const uint8_t *angles = page + (size_t)tok * s.angle_bytes, *norms = page + s.norm_at + (size_t)tok * s.norm_bytes, *side = page + s.side_at + (size_t)tok * s.side_bytes;
        float *r = scratch, *next = scratch + HALF;
        __syncwarp();
        for KV_ROW(i, s.count) r[i] = radius(s, norms, side, i);
        __syncwarp();
        for (int l = s.levels - 1; l >= 0; l--) {
            const polar_device_level &level = s.level[l];
            const float *table = at<float>(c, level.at_table);
            for KV_ROW(i, level.field.count) {
                const uint32_t k = index_at(level.field, angles + level.at, i);
                next[2 * i] = r[i] * table[2 * k];
                next[2 * i + 1] = r[i] * table[2 * k + 1];
            }
            __syncwarp();
            float *const swap = r;
            r = next;
            next = swap;
        }
        if (sign) fwht(r, c.head_dim, lane);
        for KV_ROW(i, c.head_dim) row[i] = r[i] * (sign ? sign[i] : 1);
        __syncwarp();
    }
};

}  // namespace kelvin
