// cuda_fp16.h -- f16 for the emulator: IEEE conversions to nearest even; arithmetic in f32, rounded once (exact for + - * / sqrt).
#pragma once
#include "emulate.h"

inline unsigned short kv_half_of(float f)
{
    const uint32_t u = kv_bits<uint32_t>(f), sign = u >> 16 & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return 0x7FFF;                                         // NaN: the hardware's own
    if (a >= 0x47800000u) return (unsigned short)(sign | 0x7C00u);              // 65536 and above
    if (a < 0x38800000u) return (unsigned short)(sign | (kv_bits<uint32_t>(kv_bits<float>(a) + 0.5f) - 0x3F000000u));   // below 2^-14: adding 1/2 rounds to units of 2^-24
    return (unsigned short)(sign | (a + 0xC8000FFFu + (a >> 13 & 1u)) >> 13);   // the exponent's bias from 127 to 15, and half a unit
}
inline float kv_float_of_half(unsigned short h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, a = h & 0x7FFFu;
    if (a >= 0x7C00u) return kv_bits<float>(sign | 0x7F800000u | (a & 0x3FFu) << 13);
    if (a < 0x0400u) return kv_bits<float>(sign | kv_bits<uint32_t>((float)a * 5.9604645e-8f));        // 2^-24
    return kv_bits<float>(sign | ((a << 13) + 0x38000000u));
}

#define KV_SMALL_FLOAT(T, T2, of, to) \
    struct alignas(2) T { \
        unsigned short x; \
        T() = default; \
        T(float v) : x(of(v)) {} \
        T(double v) : x(of((float)v)) {} \
        T(int v) : x(of((float)v)) {} \
        T(unsigned v) : x(of((float)v)) {} \
        operator float() const { return to(x); } \
    }; \
    inline T operator+(T a, T b) { return T((float)a + (float)b); } \
    inline T operator-(T a, T b) { return T((float)a - (float)b); } \
    inline T operator*(T a, T b) { return T((float)a * (float)b); } \
    inline T operator/(T a, T b) { return T((float)a / (float)b); } \
    inline T operator-(T a) { a.x ^= 0x8000; return a; } \
    inline T &operator+=(T &a, T b) { return a = a + b; } \
    inline T &operator-=(T &a, T b) { return a = a - b; } \
    inline T &operator*=(T &a, T b) { return a = a * b; } \
    inline bool operator==(T a, T b) { return (float)a == (float)b; } \
    inline bool operator!=(T a, T b) { return (float)a != (float)b; } \
    inline bool operator<(T a, T b) { return (float)a < (float)b; } \
    inline bool operator>(T a, T b) { return (float)a > (float)b; } \
    inline bool operator<=(T a, T b) { return (float)a <= (float)b; } \
    inline bool operator>=(T a, T b) { return (float)a >= (float)b; } \
    struct alignas(4) T2 { \
        T x, y; \
        T2() = default; \
        T2(T a, T b) : x(a), y(b) {} \
    }; \
    inline T __hadd(T a, T b) { return a + b; } \
    inline T __hsub(T a, T b) { return a - b; } \
    inline T __hmul(T a, T b) { return a * b; } \
    inline T __hdiv(T a, T b) { return a / b; } \
    inline T __hneg(T a) { return -a; } \
    inline T __habs(T a) { a.x &= 0x7FFF; return a; } \
    inline T __hfma(T a, T b, T c) { return T((float)((double)(float)a * (double)(float)b + (double)(float)c)); } \
    inline T __hmax(T a, T b) { return T(fmaxf(a, b)); } \
    inline T __hmin(T a, T b) { return T(fminf(a, b)); } \
    inline bool __hisnan(T a) { return (float)a != (float)a; } \
    inline bool __hisinf(T a) { return isinf((float)a); } \
    inline bool __heq(T a, T b) { return a == b; } \
    inline bool __hlt(T a, T b) { return a < b; } \
    inline bool __hgt(T a, T b) { return a > b; } \
    inline T2 __hadd2(T2 a, T2 b) { return { a.x + b.x, a.y + b.y }; } \
    inline T2 __hsub2(T2 a, T2 b) { return { a.x - b.x, a.y - b.y }; } \
    inline T2 __hmul2(T2 a, T2 b) { return { a.x * b.x, a.y * b.y }; } \
    inline T2 __hfma2(T2 a, T2 b, T2 c) { return { __hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y) }; } \
    inline T2 __hmax2(T2 a, T2 b) { return { __hmax(a.x, b.x), __hmax(a.y, b.y) }; } \
    inline T2 __hmin2(T2 a, T2 b) { return { __hmin(a.x, b.x), __hmin(a.y, b.y) }; } \
    inline float __low2float(T2 v) { return v.x; } \
    inline float __high2float(T2 v) { return v.y; }

KV_SMALL_FLOAT(__half, __half2, kv_half_of, kv_float_of_half)
typedef __half half;
typedef __half2 half2;

inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half __float2half_rz(float v)
{
    __half h(v);
    if (fabsf(h) > fabsf(v)) h.x--;                     // towards zero, also from infinity to 65504
    return h;
}
inline __half __double2half(double v) { return __half((float)v); }
inline __half __int2half_rn(int v) { return __half((float)v); }
inline int __half2int_rn(__half v) { return __float2int_rn(v); }
inline unsigned short __half_as_ushort(__half v) { return v.x; }
inline short __half_as_short(__half v) { return (short)v.x; }
inline __half __ushort_as_half(unsigned short v) { __half h; h.x = v; return h; }
inline __half __short_as_half(short v) { return __ushort_as_half((unsigned short)v); }
inline float2 __half22float2(__half2 v) { return { v.x, v.y }; }
inline __half2 __float22half2_rn(float2 v) { return { v.x, v.y }; }
inline __half2 __floats2half2_rn(float a, float b) { return { a, b }; }
inline __half2 __float2half2_rn(float v) { return { v, v }; }
inline __half2 __half2half2(__half v) { return { v, v }; }
inline __half2 __halves2half2(__half a, __half b) { return { a, b }; }
inline __half2 make_half2(__half a, __half b) { return { a, b }; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half hsqrt(__half v) { return __half(sqrtf(v)); }
inline __half hexp(__half v) { return __half(expf(v)); }
inline __half hexp2(__half v) { return __half(exp2f(v)); }
inline __half hrsqrt(__half v) { return __half(rsqrtf(v)); }
