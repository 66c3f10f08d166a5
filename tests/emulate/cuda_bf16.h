// cuda_bf16.h -- bf16 for the emulator, as cuda_fp16.h does f16.
#pragma once
#include "cuda_fp16.h"

inline unsigned short kv_bf16_of(float f)
{
    const uint32_t u = kv_bits<uint32_t>(f);
    return (u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFF : (unsigned short)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}
inline float kv_float_of_bf16(unsigned short b) { return kv_bits<float>((uint32_t)b << 16); }

KV_SMALL_FLOAT(__nv_bfloat16, __nv_bfloat162, kv_bf16_of, kv_float_of_bf16)

inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __double2bfloat16(double v) { return __nv_bfloat16((float)v); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { __nv_bfloat16 b; b.x = v; return b; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return { v.x, v.y }; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return { v.x, v.y }; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return { a, b }; }
inline __nv_bfloat162 __float2bfloat162_rn(float v) { return { v, v }; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 v) { return { v, v }; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return { a, b }; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
