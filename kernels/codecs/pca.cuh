// pca.cuh -- principal components of a head, bits where the variance is (core/codecs/pca.c, kvtc_rows.c).
//
// Encode's scratch: the centred row, later headers and packed words, in the first half; coefficients in the second.
#pragma once
#include "codecs/pca_device.h"
#include "codec_math.cuh"
#include "fp.cuh"

namespace kelvin {

struct pca_codec {
    enum { HALF = 512, NONE = 0, E4M3 = 9 };

    template <class T> static __device__ __forceinline__ const T *at(const dev_codec &c, uint32_t offset) { return (const T *)((const uint8_t *)c.pod + offset); }

    // Nearest e4m3, ties to even, saturating.
    static __device__ __forceinline__ uint32_t to_e4m3(float x)
    {
        const uint32_t sign = float_bits(x) >> 24 & 0x80u;
        const float a = fabsf(x);
        if (!(a < 448.0f)) return sign | 0x7eu;
        if (a < 0x1p-6f) return sign | (uint32_t)rintf(a * 512.0f);
        uint32_t u = float_bits(a);
        u += 0x7ffffu + (u >> 20 & 1u);
        return sign | ((u >> 20) - (120u << 3));
    }
    static __device__ __forceinline__ float from_e4m3(uint8_t b) { return (b & 0x7f) == 0x7f ? 0.0f : fp_codec::e4m3(b); }

    static __device__ __forceinline__ uint32_t code_of(float z, float shift, float inverse, float top)
    {
        const float v = (z - shift) * inverse;
        return v > 0 ? (uint32_t)(uint8_t)(fminf(v, top) + 0.5f) : 0;      // NaN is 0 too
    }

    // x = x0 + sum_i a[i] m[i][k], i ascending.
    static __device__ __forceinline__ float times(const float *a, int n, const float *m, size_t ld, int k, float x0)
    {
        for (int i = 0; i < n; i++) x0 += a[i] * m[i * ld + k];
        return x0;
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok, const float *x, long long, float *scratch, int lane)
    {
        const pca_device &s = *(const pca_device *)c.pod;
        const float *mean = at<float>(c, s.at_mean);
        const pca_device_block *block = at<pca_device_block>(c, s.at_block);
        const pca_device_component *component = at<pca_device_component>(c, s.at_component);
        float *centred = scratch, *header = scratch, *z = scratch + HALF;
        uint32_t *word = (uint32_t *)(scratch + 2 * PCA_DEVICE_HEADERS);
        uint8_t *row = page + (size_t)tok * s.row_bytes;
        __syncwarp();
        for KV_ROW(i, c.head_dim) centred[i] = x[i] - mean[i];
        __syncwarp();
        for KV_ROW(k, s.rank) z[k] = times(centred, c.head_dim, at<float>(c, s.at_forward), s.forward_ld, k, 0);
        __syncwarp();
        for KV_ROW(w, (s.code_bits + 31) / 32) word[w] = 0;
        for KV_ROW(b, s.n_blocks) {
            const pca_device_block &k = block[b];
            if (k.header < 0) continue;
            float lo = z[k.start], hi = lo;
            for (int i = k.start + 1; i < k.start + k.size; i++) lo = fminf(lo, z[i]), hi = fmaxf(hi, z[i]);
            const uint16_t shift = float_half(fminf(fmaxf(lo, -65504.0f), 65504.0f));
            const uint16_t scale = float_half(fminf(fmaxf((hi - half_float(shift)) / (float)((1 << k.type) - 1), 0.0f), 65504.0f));
            store16(row + 4 * k.header, shift);
            store16(row + 4 * k.header + 2, scale);
            header[2 * k.header] = half_float(shift);
            header[2 * k.header + 1] = half_float(scale);
        }
        __syncwarp();
        for KV_ROW(k, s.rank) {
            const pca_device_component &p = component[k];
            if (p.type == NONE) continue;
            const float top = (float)((1 << p.type) - 1), half = (float)(1 << p.type) * 0.5f - 0.5f;
            uint32_t code;
            if (p.type == E4M3) code = to_e4m3(z[k]);
            else if (s.fixed) code = code_of(z[k], -half * p.step, 1.0f / p.step, top);
            else {
                const float scale = header[2 * p.header + 1];
                code = scale > 0 ? code_of(z[k], header[2 * p.header], 1.0f / scale, top) : 0;
            }
            const int up = p.bit % 32;
            atomicOr(word + p.bit / 32, code << up);
            if (up > 24 && code >> (32 - up)) atomicOr(word + p.bit / 32 + 1, code >> (32 - up));
        }
        __syncwarp();
        row += 4 * s.n_headers;
        for KV_ROW(b, (s.code_bits + 7) / 8) row[b] = (uint8_t)(word[b / 4] >> 8 * (b % 4));
        __syncwarp();
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane)
    {
        const pca_device &s = *(const pca_device *)c.pod;
        const float *mean = at<float>(c, s.at_mean);
        const pca_device_component *component = at<pca_device_component>(c, s.at_component);
        const uint8_t *from = page + (size_t)tok * s.row_bytes, *codes = from + 4 * s.n_headers;
        float *z = scratch;
        __syncwarp();
        for KV_ROW(k, s.rank) {
            const pca_device_component &p = component[k];
            if (p.type == NONE) {
                z[k] = 0;
                continue;
            }
            const int bits = p.type == E4M3 ? 8 : p.type, up = p.bit % 8;
            const uint32_t low = codes[p.bit / 8], high = up + bits > 8 ? codes[p.bit / 8 + 1] : 0, code = (low | high << 8) >> up & ((1u << bits) - 1);
            if (p.type == E4M3) z[k] = from_e4m3((uint8_t)code);
            else if (s.fixed) z[k] = ((float)(int)code - ((float)(1 << p.type) * 0.5f - 0.5f)) * p.step;
            else z[k] = half_float(load16(from + 4 * p.header)) + (float)(int)code * half_float(load16(from + 4 * p.header + 2));
        }
        __syncwarp();
        for KV_ROW(i, c.head_dim) row[i] = times(z, s.rank, at<float>(c, s.at_back), s.back_ld, i, mean[i]);
        __syncwarp();
    }
};

}  // namespace kelvin
