/* bits.h -- half floats and little-endian reads, inline and dependency-free: also for kernels/. */
#ifndef KV_BITS_H
#define KV_BITS_H
#include <stdint.h>
#include <string.h>

static inline uint32_t kv_f32_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float    kv_bits_f32(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

/* f16 <-> f32, round to nearest even; overflow becomes inf, NaN stays NaN. */
static inline float kv_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, em = h & 0x7fffu;
    if (em >= 0x7c00u) return kv_bits_f32(sign | 0x7f800000u | (em & 0x3ffu) << 13);
    if (em >= 0x0400u) return kv_bits_f32(sign | ((em << 13) + (112u << 23)));
    const float sub = (float)em * 0x1p-24f;               /* exact: em < 1024 */
    return kv_bits_f32(sign | kv_f32_bits(sub));
}
static inline uint16_t kv_f32_to_f16(float f)
{
    const uint32_t u = kv_f32_bits(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);          /* rounds past 65504 */
    if (a < 0x38800000u) {                                            /* subnormal half: adding 0.5 rounds at bit 2^-24 */
        const float r = kv_bits_f32(a) + 0.5f;
        return (uint16_t)(sign | (kv_f32_bits(r) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13));
}
static inline float    kv_bf16_to_f32(uint16_t h) { return kv_bits_f32((uint32_t)h << 16); }
static inline uint16_t kv_f32_to_bf16(float f)
{
    const uint32_t u = kv_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static inline uint16_t kv_load_u16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline uint32_t kv_load_u32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint64_t kv_load_u64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline void     kv_store_u16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
#endif
