// mma_host.h -- kelvin/mma.cuh's instructions for the emulator, from the fragment tables of the PTX ISA (9.7.14, warp level matrix
// instructions, and 9.7.9, data movement).
#pragma once
#include "bulk.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace kelvin {

inline uint32_t byte_lookup(uint32_t low, uint32_t high, uint32_t selectors) { return kv_prmt(low, high, selectors); }
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

}  // namespace kelvin

namespace kv_emulate {

// d = c + A B over a warp, m16n8k32, 8-bit elements.  In lane l, group g = l / 4, t = l % 4:
//   A, byte i of register r:  row g + 8 (r % 2), column 4 t + i + 16 (r / 2)
//   B, byte i of register r:  row 4 t + i + 16 r, column g
//   C, D, register r:         row g + 8 (r / 2), column 2 t + r % 2
struct product { uint32_t a[4], b[2], c[4], d[4]; };
extern const collective product_s8s8, product_s8u8, product_u8s8;
// movmatrix m8n8 trans b16: lane l holds elements (l / 4, 2 (l % 4)) and the next, before and after.
extern const collective movmatrix;

// d += A B, m16n8k16, bf16, f32 sums.  A, half i of register r: row g + 8 (r % 2), column 2 t + i + 8 (r / 2); B: row 2 t + i + 8 r, column g.
struct product_f { uint32_t a[4], b[2]; float d[4]; };
extern const collective product_bf16;
// ldmatrix x4: lane l gives row l % 8 of matrix l / 8; as it is, and transposed.
struct matrices { const void *row; uint32_t r[4]; };
extern const collective ldmatrix, ldmatrix_transposed;

inline void product_of(const collective *what, int d[4], const uint32_t a[4], uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3)
{
    product p = { { a[0], a[1], a[2], a[3] }, { b0, b1 }, { c0, c1, c2, c3 }, {} };
    in_warp(~0u, what, &p);
    memcpy(d, p.d, sizeof p.d);
}

}  // namespace kv_emulate

namespace kelvin {

#define KV_PRODUCT(name, what) \
    inline void name(int d[4], const int c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) \
    { kv_emulate::product_of(&kv_emulate::what, d, a, b0, b1, (uint32_t)c[0], (uint32_t)c[1], (uint32_t)c[2], (uint32_t)c[3]); }
KV_PRODUCT(product_s8, product_s8s8)
KV_PRODUCT(product_s8u8, product_s8u8)
KV_PRODUCT(product_u8s8, product_u8s8)
#undef KV_PRODUCT
inline uint32_t add_halves(uint32_t halves, uint32_t c) { return c + (halves & 0xFFFFu) + (halves >> 16); }

// Bulk copies are sm_90's: kernels take the other way here.
inline void next_may_start() {}
inline void wait_for_last() {}

inline uint32_t transpose_b16(uint32_t a)
{
    uint32_t x[2] = { a, 0 };
    kv_emulate::in_warp(~0u, &kv_emulate::movmatrix, x);
    return x[1];
}

inline void product_add_bf16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    kv_emulate::product_f p = { { a[0], a[1], a[2], a[3] }, { b0, b1 }, { d[0], d[1], d[2], d[3] } };
    kv_emulate::in_warp(~0u, &kv_emulate::product_bf16, &p);
    memcpy(d, p.d, sizeof p.d);
}
inline void load_matrices(uint32_t r[4], const void *shared_row)
{
    kv_emulate::matrices m = { shared_row, {} };
    kv_emulate::in_warp(~0u, &kv_emulate::ldmatrix, &m);
    memcpy(r, m.r, sizeof m.r);
}
inline void load_matrices_transposed(uint32_t r[4], const void *shared_row)
{
    kv_emulate::matrices m = { shared_row, {} };
    kv_emulate::in_warp(~0u, &kv_emulate::ldmatrix_transposed, &m);
    memcpy(r, m.r, sizeof m.r);
}
inline uint32_t pack_bf16(float low, float high) { return kv_bf16_of(low) | (uint32_t)kv_bf16_of(high) << 16; }

inline void copy_async(void *shared, const void *global) { kv_emulate::copy_async(shared, global, 16); }
inline void copy_commit() { kv_emulate::copy_commit(); }
template <int N> inline void copy_wait() { kv_emulate::copy_wait(N); }

inline void bulk_init(uint64_t *barrier, int count) { kv_emulate::bulk_init(barrier, count); }
inline void bulk_ready() {}
inline void bulk_copy(void *shared, const void *global, int bytes, uint64_t *barrier)
{
    kv_emulate::bulk_arrive(barrier, bytes);
    kv_emulate::bulk_copy(shared, global, bytes, barrier);
}
inline void bulk_nothing(uint64_t *barrier) { kv_emulate::bulk_arrive(barrier, 0); }
inline void bulk_wait(uint64_t *barrier, uint32_t parity) { kv_emulate::bulk_wait(barrier, parity); }
inline void bulk_prefetch(const void *, int) {}

// The instructions' results are within 2^-22 or so of these; the emulator's are exact to a rounding, denormals flushed alike.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
inline float log2_fast(float x) { return log2f(flushed(x)); }
inline float reciprocal_fast(float x) { return flushed(1 / flushed(x)); }
inline float exp2_fast(float x) { return flushed(exp2f(flushed(x))); }

}  // namespace kelvin
