// canary.cuh -- the control that must fail (core/codecs/canary.c): 4 bits, the sign of every second channel lost.
#pragma once
#include "codecs/canary_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct canary_codec {
    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *, int lane)
    {
        const uint8_t *src = page + (size_t)tok * ((const canary_device *)c.pod)->row_bytes;
        const float d = half_float((uint16_t)(src[0] | src[1] << 8));
        for KV_ROW(i, c.head_dim) row[i] = d * (float)((src[2 + i / 2] >> i % 2 * 4 & 15) - 8);
        __syncwarp();
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long, float *, int lane)
    {
        uint8_t *dst = page + (size_t)tok0 * ((const canary_device *)c.pod)->row_bytes;
        float amax = 0;
        for KV_ROW(i, c.head_dim) amax = fmaxf(amax, fabsf(x[i]));
        for (int m = 16; m; m >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, m));
        const uint16_t d = float_half(fminf(amax / 7, 65504.0f));
        const float mul = d ? 1.0f / half_float(d) : 0;
        if (lane == 0) {
            dst[0] = (uint8_t)d;
            dst[1] = (uint8_t)(d >> 8);
        }
        for KV_ROW(i, (c.head_dim + 1) / 2) {
            int q[2] = { 0, 0 };
            for (int k = 0; k < 2 && 2 * i + k < c.head_dim; k++) {
                const float v = k ? fabsf(x[2 * i + k]) : x[2 * i + k];
                q[k] = (int)rintf(fminf(fmaxf(v * mul, -7), 7)) + 8;
            }
            dst[2 + i] = (uint8_t)(q[0] | q[1] << 4);
        }
        __syncwarp();
    }
};

}  // namespace kelvin
