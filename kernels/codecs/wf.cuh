// wf.cuh -- a calibrated basis, water-filled bits, one scale a row (core/codecs/wf.c, which has the page's picture and the search).
//
// Scratch: components in the first half, codes in the second.
#pragma once
#include "codecs/wf_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct wf_codec {
    enum { HALF = 512, KEYS = 0, PASSES = 2 };

    template <class T> static __device__ __forceinline__ const T *at(const dev_codec &c, uint32_t offset) { return (const T *)((const uint8_t *)c.pod + offset); }
    static __device__ __forceinline__ int width_of(const wf_device &s, int i) { return s.width[s.unit == 4 ? i / 4 : i / 16]; }

    // ---- codes in a page

    // Keys: the stream of bits of byte i % 4 of the token's words.  Values: of byte tok % 4 of component i's words.
    static __device__ __forceinline__ int get(const dev_codec &c, const wf_device &s, const uint8_t *page, int tok, int i)
    {
        const bool keys = c.side == KEYS;
        const int width = width_of(s, i), bit = keys ? s.bit[i / 4] : tok / 4 * width, byte = keys ? i % 4 : tok % 4, up = bit % 8;
        const uint8_t *p = (keys ? page + (size_t)(tok / 16) * s.tile_bytes + 4 * (tok % 16) : page + s.tile[i / 16] + 4 * (i % 16)) + 64 * (bit / 8) + byte;
        const uint32_t high = up + width > 8 ? p[64] : 0;
        return (int)((p[0] | high << 8) >> up & ((1u << width) - 1));
    }

    static __device__ __forceinline__ void put(const dev_codec &c, const wf_device &s, uint8_t *page, int tok, const int *code, int lane)
    {
        if (c.side == KEYS) {
            uint8_t *words = page + (size_t)(tok / 16) * s.tile_bytes + 4 * (tok % 16);
            for KV_ROW(r, (int)s.n_rows) {
                uint32_t word = 0;
                for (int k = s.first[r]; k < s.n_units && s.bit[k] < 8 * r + 8; k++)
                    for (int byte = 0; byte < 4; byte++) {
                        const int up = s.bit[k] - 8 * r;
                        const uint32_t v = (uint32_t)code[4 * k + byte];
                        word |= ((up >= 0 ? v << up : v >> -up) & 255) << 8 * byte;
                    }
                *(uint32_t *)(words + 64 * r) = word;
            }
        } else {
            for KV_ROW(i, s.n) {
                const int width = width_of(s, i), bit = tok / 4 * width, up = bit % 8, byte = 8 * (tok % 4), low = min(width, 8 - up);
                uint32_t *word = (uint32_t *)(page + s.tile[i / 16] + 64 * (bit / 8)) + i % 16;
                const uint32_t v = (uint32_t)code[i], in = (1u << low) - 1, rest = (1u << (width - low)) - 1;
                put_bits(word, (v & in) << (up + byte), in << (up + byte));
                if (rest) put_bits(word + 16, (v >> low & rest) << byte, rest << byte);
            }
        }
        __syncwarp();
    }

    // ---- scales

    static __device__ __forceinline__ int log8_of(const wf_device &s, float scale)
    {
        int k = 0;
        for (int step = 128; step; step /= 2) k += scale >= s.between[k + step - 1] ? step : 0;
        return k == 0 && scale >= 0.5f * s.scale[1] ? 1 : k;
    }
    static __device__ __forceinline__ uint32_t stored_scale(const wf_device &s, float scale, float *value)
    {
        if (s.log8) {
            const int k = log8_of(s, scale);
            *value = s.scale[k];
            return (uint32_t)k;
        }
        const uint16_t h = float_half(scale < 65504 ? scale : 65504);
        *value = half_float(h);
        return h;
    }

    // ---- encode

    // z of x times 2^-e, and its root mean square; 0 for a zero row.
    static __device__ __forceinline__ float analyse(const dev_codec &c, const wf_device &s, const float *x, float *z, int *e, int lane)
    {
        const float *m = at<float>(c, s.at_analysis);
        *e = 0;
        for (int tries = 0;; tries++) {
            for KV_ROW(i, s.n) {
                float sum = 0;
                for (int j = 0; j < c.head_dim; j++) sum += (tries ? ldexpf(x[j], -*e) : x[j]) * m[(size_t)j * s.padded + i];
                z[i] = sum;
            }
            __syncwarp();
            const float sum = dot16(z, z, s.n, lane);
            if ((sum >= 0x1p-90f && sum <= 0x1p110f) || tries) return sqrtf(sum / (float)s.n);
            const float most = max_of(c.head_dim, lane, [=](int i) { return fabsf(x[i]); });
            if (most == 0) return 0;
            frexpf(most, e);
            __syncwarp();
        }
    }

    // Codes of z at a scale; the scale of least squares for them, and what it takes away.
    static __device__ __forceinline__ float take_codes(const wf_device &s, const float *sigma, const float *z, float scale, int *code, float *gain, int lane)
    {
        const float by = 1 / scale;
        __syncwarp();
        for KV_ROW(i, s.n) {
            const int width = width_of(s, i);
            const float y = z[i] * by, *bound = s.bound[width];
            int k = 0;
            for (int step = 1 << width >> 1; step; step /= 2) k += y > bound[k + step - 1] ? step : 0;
            code[i] = k;
        }
        __syncwarp();
        auto v = [&](int i) { return sigma[i] * s.centroid[width_of(s, i)][code[i]]; };
        const float uv = sum16(s.n, lane, [&](int i) { return sigma[i] * z[i] * v(i); });
        const float vv = sum16(s.n, lane, [&](int i) { const float a = v(i); return a * a; });
        const float best = uv / vv;
        *gain = best * uv;
        return best;
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok, const float *x, long long, float *scratch, int lane)
    {
        const wf_device &s = *(const wf_device *)c.pod;
        const float *sigma = at<float>(c, s.at_sigma);
        float *z = scratch, most = -1, gain, value;
        int *code = (int *)(scratch + HALF), e;
        uint32_t stored = 0;
        __syncwarp();
        for KV_ROW(i, s.n) code[i] = 0;
        const float rms = analyse(c, s, x, z, &e, lane);
        float scale = rms;
        for (int k = 0; k < s.search && rms > 0; k++) {
            const float to = take_codes(s, sigma, z, rms * s.factor[k], code, &gain, lane);
            if (gain > most) most = gain, scale = to;
        }
        for (int pass = 0; pass < PASSES && scale > 0; pass++) {
            const uint32_t before = stored;
            stored = stored_scale(s, ldexpf(scale, e), &value);
            if (value == 0 || (pass && stored == before)) break;
            scale = take_codes(s, sigma, z, ldexpf(value, -e), code, &gain, lane);
        }
        __syncwarp();
        put(c, s, page, tok, code, lane);
        if (lane == 0) {
            if (s.log8) page[s.scales + (size_t)tok] = (uint8_t)stored;
            else store16(page + s.scales + 2 * (size_t)tok, (uint16_t)stored);
        }
        __syncwarp();
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane)
    {
        const wf_device &s = *(const wf_device *)c.pod;
        const float *m = at<float>(c, s.at_rows), scale = s.log8 ? s.scale[page[s.scales + (size_t)tok]] : half_float(load16(page + s.scales + 2 * (size_t)tok));
        float *z = scratch;
        __syncwarp();
        for KV_ROW(i, s.n) z[i] = s.centroid[width_of(s, i)][get(c, s, page, tok, i)];
        __syncwarp();
        for KV_ROW(j, c.head_dim) {
            float sum = 0;
            for (int i = 0; i < s.n; i++) sum += z[i] * m[(size_t)i * s.row_ld + j];
            row[j] = sum * scale;
        }
        __syncwarp();
    }
};

}  // namespace kelvin
