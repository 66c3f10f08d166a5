// codecs.cuh -- the codecs that kernels know, and which one a slot has.  A new codec: its file below, its name in the list.
#pragma once
#include <cstring>
#include "codecs/canary.cuh"
#include "codecs/fp.cuh"
#include "codecs/fused.cuh"
#include "codecs/int.cuh"
#include "codecs/nuq.cuh"
#include "codecs/pca.cuh"
#include "codecs/polar.cuh"
#include "codecs/raw.cuh"
#include "codecs/scalar.cuh"
#include "codecs/wf.cuh"

#define KV_DEVICE_CODECS(X) X(raw) X(scalar) X(int) X(fp) X(polar) X(nuq) X(pca) X(wf) X(canary) X(fused)

namespace kelvin {

enum {
#define X(name) FAMILY_##name,
    KV_DEVICE_CODECS(X)
#undef X
    N_FAMILIES
};

// The number of a family, or -1.
inline int codec_family(const char *family)
{
    static const char *const names[] = {
#define X(name) #name,
        KV_DEVICE_CODECS(X)
#undef X
    };
    for (int i = 0; i < N_FAMILIES; i++)
        if (!strcmp(names[i], family)) return i;
    return -1;
}

// A warp's row, and a warp's granule (codec.cuh).  Not inlined: a kernel holds them once.
[[maybe_unused]] static __device__ __noinline__ void codec_decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane)
{
    switch (c.family) {
#define X(name) case FAMILY_##name: name##_codec::decode(c, page, tok, row, scratch, lane); break;
        KV_DEVICE_CODECS(X)
#undef X
    }
}
[[maybe_unused]] static __device__ __noinline__ void codec_encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long ld, float *scratch, int lane)
{
    switch (c.family) {
#define X(name) case FAMILY_##name: name##_codec::encode(c, page, tok0, x, ld, scratch, lane); break;
        KV_DEVICE_CODECS(X)
#undef X
    }
}

}  // namespace kelvin
