// fused.cuh -- angles and radii with signs of what is left, or the strongest pairs as angles and the rest as scalars (core/codecs/fused.c,
// which has the page's picture).  Indices are packed where they lie.
#pragma once
#include "codecs/fused_device.h"
#include "polar.cuh"

namespace kelvin {

struct fused_codec {
    enum { HALF = 512 };

    template <class T> static __device__ __forceinline__ const T *at(const dev_codec &c, uint32_t offset) { return (const T *)((const uint8_t *)c.pod + offset); }

    static __device__ __forceinline__ void turn(float *x, const float *sign, int d, int lane)
    {
        for KV_ROW(i, d) x[i] *= sign[i];
        __syncwarp();
        fwht(x, d, lane);
    }

    // How many boundaries x exceeds.
    static __device__ __forceinline__ int cell(const float *bound, int levels, float x)
    {
        int k = 0;
        for (int step = levels / 2; step; step /= 2) k += x > bound[k + step - 1] ? step : 0;
        return k;
    }

    static __device__ __forceinline__ void pack(const polar_device_field &f, int *index, uint8_t *dst, int lane) { polar_codec::pack(f, index, (uint32_t *)index, dst, lane); }

    static __device__ __forceinline__ const uint8_t *norms_of(const fused_device &s, const uint8_t *page, int tok) { return page + s.base.norm_at + (size_t)tok * s.base.norm_bytes; }
    static __device__ __forceinline__ const uint8_t *side_of(const fused_device &s, const uint8_t *page, int tok) { return page + s.base.side_at + (size_t)tok * s.base.side_bytes; }

    // ---- residual

    static __device__ void encode_residual(const dev_codec &c, const fused_device &s, uint8_t *page, int tok, float *y, float *other, int e, int lane)
    {
        const int d = c.head_dim;
        const float *circle = at<float>(c, s.at_circle);
        float *r = other;
        int *index = (int *)(other + HALF / 2);
        uint8_t *angles = page + (size_t)tok * s.angle.bytes;
        polar_codec::split(y, d / 2, s.angle.base, r, index, lane);
        pack(s.angle, index, angles, lane);
        polar_codec::put_radii(s.base, r, e, index, (uint32_t *)index, (uint8_t *)norms_of(s, page, tok), (uint8_t *)side_of(s, page, tok), lane);
        __syncwarp();
        for KV_ROW(i, d / 2) {                              // less what will be decoded
            const uint32_t k = polar_codec::index_at(s.angle, angles, i);
            const float radius = polar_codec::radius(s.base, norms_of(s, page, tok), side_of(s, page, tok), i);
            y[2 * i] = (e ? ldexpf(y[2 * i], e) : y[2 * i]) - radius * circle[2 * k];
            y[2 * i + 1] = (e ? ldexpf(y[2 * i + 1], e) : y[2 * i + 1]) - radius * circle[2 * k + 1];
        }
        __syncwarp();
        turn(y, at<float>(c, s.at_second), d, lane);
        float alpha;
        if (s.unbiased) alpha = 1.2533141373155002512f * sqrtf(dot16(y, y, d, lane) / (float)d);
        else alpha = sum16(d, lane, [=](int i) { return y[i] * (y[i] >= 0 ? 1.0f : -1.0f); }) / (float)d;
        if (!(alpha < 65504)) alpha = 65504;
        index = (int *)other;
        for KV_ROW(i, d) index[i] = y[i] >= 0;
        pack(s.sign, index, page + s.sign_at + (size_t)tok * s.sign.bytes, lane);
        if (lane == 0) store16(page + s.scale_at + 2 * (size_t)tok, polar_codec::half_of(alpha));
    }

    static __device__ void decode_residual(const dev_codec &c, const fused_device &s, const uint8_t *page, int tok, float *z, float *w, int lane)
    {
        const int d = c.head_dim;
        const float *circle = at<float>(c, s.at_circle), *second = at<float>(c, s.at_second), alpha = half_float(load16(page + s.scale_at + 2 * (size_t)tok));
        const uint8_t *signs = page + s.sign_at + (size_t)tok * s.sign.bytes;
        for KV_ROW(i, d / 2) {
            const uint32_t k = polar_codec::index_at(s.angle, page + (size_t)tok * s.angle.bytes, i);
            const float radius = polar_codec::radius(s.base, norms_of(s, page, tok), side_of(s, page, tok), i);
            z[2 * i] = radius * circle[2 * k];
            z[2 * i + 1] = radius * circle[2 * k + 1];
        }
        for KV_ROW(i, d) w[i] = signs[i / 8] >> i % 8 & 1 ? alpha : -alpha;
        __syncwarp();
        fwht(w, d, lane);
        for KV_ROW(i, d) z[i] += w[i] * second[i];
        __syncwarp();
    }

    // ---- subspace

    // A pair while a row is encoded: polar, its place among its kind, and its codes.
    static __device__ __forceinline__ uint32_t note(bool polar, int place, uint32_t codes) { return (uint32_t)polar << 31 | (uint32_t)place << 21 | codes; }
    static __device__ __forceinline__ int place_of(uint32_t n) { return (int)(n >> 21 & 1023); }

    static __device__ void encode_subspace(const dev_codec &c, const fused_device &s, uint8_t *page, int tok, float *y, float *other, int e, int lane)
    {
        const int d = c.head_dim, n = d / 2;
        const float *circle = at<float>(c, s.at_circle);
        float *r = other;
        int *index = (int *)(other + HALF / 2), *list = (int *)y;
        uint32_t *notes = (uint32_t *)index;
        uint8_t *row = page + (size_t)tok * s.row_bytes;
        const float rms = sqrtf(dot16(y, y, d, lane) / (float)d), per = rms > 0 ? 1 / rms : 0;
        polar_codec::split(y, n, s.angle.base, r, index, lane);
        __syncwarp();
        for (int first = 0, ones = 0; first < n; first += 32) {
            const int i = first + lane;
            int stronger = 0;                               // of equals the earlier is the stronger
            for (int j = 0; j < n && i < n; j++) stronger += r[j] > r[i] || (r[j] == r[i] && j < i);
            const bool polar = i < n && stronger < s.pairs;
            const uint32_t all = __ballot_sync(~0u, polar);
            const int before = ones + __popc(all & ((1u << lane) - 1));
            if (polar) notes[i] = note(true, before, (uint32_t)index[i] << 8 | (uint32_t)cell(s.tail_bound, s.radius.base, r[i] * per));
            else if (i < n) notes[i] = note(false, i - before, (uint32_t)cell(s.disk_bound, s.code.base, y[2 * i + 1] * per) << 8 | (uint32_t)cell(s.disk_bound, s.code.base, y[2 * i] * per));
            ones += __popc(all);
        }
        __syncwarp();
        auto z = [&](int i) {
            const uint32_t k = notes[i / 2];
            return k >> 31 ? s.tail[k & 255] * circle[2 * (k >> 8 & 8191) + i % 2] : s.disk[k >> 8 * (i % 2) & 255];
        };
        const float yz = sum16(d, lane, [&](int i) { return y[i] * z(i); }), zz = sum16(d, lane, [&](int i) { const float v = z(i); return v * v; });
        if (lane == 0) store16(page + s.scale_at + 2 * (size_t)tok, polar_codec::half_of(ldexpf(yz / zz, e)));
        __syncwarp();
        for KV_ROW(i, n) list[i] = (int)(notes[i] >> 31);
        pack(s.map, list, row, lane);
        for KV_ROW(i, n)
            if (notes[i] >> 31) list[place_of(notes[i])] = (int)(notes[i] >> 8 & 8191);
        pack(s.angle, list, row + s.angle_at, lane);
        for KV_ROW(i, n)
            if (notes[i] >> 31) list[place_of(notes[i])] = (int)(notes[i] & 255);
        pack(s.radius, list, row + s.radius_at, lane);
        for KV_ROW(i, n)
            if (!(notes[i] >> 31)) list[2 * place_of(notes[i])] = (int)(notes[i] & 255), list[2 * place_of(notes[i]) + 1] = (int)(notes[i] >> 8 & 255);
        pack(s.code, list, row + s.code_at, lane);
    }

    // A map from elsewhere may have any number of ones: what has no place left in one kind goes to the other.
    static __device__ void decode_subspace(const dev_codec &c, const fused_device &s, const uint8_t *page, int tok, float *z, int lane)
    {
        const int n = c.head_dim / 2, m = s.pairs;
        const float *circle = at<float>(c, s.at_circle), scale = half_float(load16(page + s.scale_at + 2 * (size_t)tok));
        const uint8_t *row = page + (size_t)tok * s.row_bytes;
        for (int first = 0, ones = 0; first < n; first += 32) {
            const int i = first + lane;
            const bool one = i < n && polar_codec::index_at(s.map, row, i) != 0;
            const uint32_t all = __ballot_sync(~0u, one);
            const int before = ones + __popc(all & ((1u << lane) - 1)), pairs = before >= m ? m : i - before >= n - m ? i - (n - m) : before;
            ones += __popc(all);
            if (i >= n) continue;
            if (before < m && (one || i - before >= n - m)) {
                const uint32_t k = polar_codec::index_at(s.angle, row + s.angle_at, pairs);
                const float radius = scale * s.tail[polar_codec::index_at(s.radius, row + s.radius_at, pairs)];
                z[2 * i] = radius * circle[2 * k];
                z[2 * i + 1] = radius * circle[2 * k + 1];
            } else {
                z[2 * i] = scale * s.disk[polar_codec::index_at(s.code, row + s.code_at, 2 * (i - pairs))];
                z[2 * i + 1] = scale * s.disk[polar_codec::index_at(s.code, row + s.code_at, 2 * (i - pairs) + 1)];
            }
        }
        __syncwarp();
    }

    // ---- rows

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok, const float *x, long long, float *scratch, int lane)
    {
        const fused_device &s = *(const fused_device *)c.pod;
        const int e = polar_codec::exponent(x, c.head_dim, lane);
        __syncwarp();
        for KV_ROW(i, c.head_dim) scratch[i] = e ? ldexpf(x[i], -e) : x[i];
        turn(scratch, at<float>(c, s.at_first), c.head_dim, lane);
        if (s.subspace) encode_subspace(c, s, page, tok, scratch, scratch + HALF, e, lane);
        else encode_residual(c, s, page, tok, scratch, scratch + HALF, e, lane);
        __syncwarp();
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane)
    {
        const fused_device &s = *(const fused_device *)c.pod;
        const float *first = at<float>(c, s.at_first);
        __syncwarp();
        if (s.subspace) decode_subspace(c, s, page, tok, scratch, lane);
        else decode_residual(c, s, page, tok, scratch, scratch + HALF, lane);
        fwht(scratch, c.head_dim, lane);
        fill(row, c.head_dim, lane, [=](int i) { return scratch[i] * first[i]; });
        __syncwarp();
    }
};

}  // namespace kelvin
