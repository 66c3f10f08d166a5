// raw.cuh -- rows as they are (core/codecs/raw.c).
#pragma once
#include "codecs/raw_device.h"
#include "codec_math.cuh"

namespace kelvin {

struct raw_codec {
    enum { F32, F16, BF16 };

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *, int lane)
    {
        const int type = ((const raw_device *)c.pod)->dtype;
        const size_t at = (size_t)tok * c.head_dim;
        fill(row, c.head_dim, lane, [=](int i) {
            return type == F32 ? ((const float *)page)[at + i] : type == F16 ? half_float(((const uint16_t *)page)[at + i]) : bf16_float(((const uint16_t *)page)[at + i]);
        });
        __syncwarp();
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long, float *, int lane)
    {
        const int type = ((const raw_device *)c.pod)->dtype;
        const float most = type == F16 ? 65504.0f : bits_float(0x7f7f0000u);       // the largest of the type
        const size_t at = (size_t)tok0 * c.head_dim;
        for KV_ROW(i, c.head_dim) {
            const float v = fminf(fmaxf(x[i], -most), most);
            if (type == F32) ((float *)page)[at + i] = x[i];
            else ((uint16_t *)page)[at + i] = type == F16 ? float_half(v) : float_bf16(v);
        }
        __syncwarp();
    }
};

}  // namespace kelvin
