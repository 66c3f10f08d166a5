// mma.cuh -- the few instructions that have no C++ name: byte lookups, integer tensor-core products, transposes, streaming loads.
#pragma once
#include <cstdint>
#include <cuda_fp16.h>
#include "launch.cuh"
#ifdef KV_EMULATE
#include <mma_host.h>               // the same functions for the emulator
#endif

namespace kelvin {

#ifndef KV_EMULATE

__device__ __forceinline__ uint32_t byte_lookup(uint32_t low, uint32_t high, uint32_t selectors)
{
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(selectors));
    return r;
}

// (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// d = c + A B: A 16 x 32 bytes by rows, B 32 x 8 bytes by columns.
#define KELVIN_PRODUCT(name, types) \
    __device__ __forceinline__ void name(int d[4], const int c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) \
    { \
        asm("mma.sync.aligned.m16n8k32.row.col.s32." types ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])); \
    }
KELVIN_PRODUCT(product_s8, "s8.s8")
KELVIN_PRODUCT(product_s8u8, "s8.u8")
KELVIN_PRODUCT(product_u8s8, "u8.s8")
#undef KELVIN_PRODUCT

// c + both halves of a word.
__device__ __forceinline__ uint32_t add_halves(uint32_t halves, uint32_t c)
{
    uint32_t r;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(halves), "r"(0x0101u), "r"(c));
    return r;
}

// 8 x 8 transpose of 16-bit elements over a warp: lane 4r+c holds elements 2c, 2c+1 of row r, before and after.
__device__ __forceinline__ uint32_t transpose_b16(uint32_t a)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}

// 16 bytes from memory to shared memory without a register, past L1; commit closes a group, wait leaves the last N groups open.
__device__ __forceinline__ void copy_async(void *shared, const void *global)
{
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// d += A B, A 16 x 16 bf16 by rows, B 16 x 8 by columns.
__device__ __forceinline__ void product_add_bf16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2c, 2c+1 of row r of
// each (l = 4r+c); transposed: of column r, rows 2c, 2c+1.
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *shared_row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t r[4], const void *shared_row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Two floats rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Bulk copies of sm_90: one thread asks for a whole tile, a barrier in shared memory counts its bytes; a phase ends when all
// `count` arrivals and all announced bytes are there.
__device__ __forceinline__ void bulk_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"((uint32_t)__cvta_generic_to_shared(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void bulk_ready() { asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void bulk_copy(void *shared, const void *global, int bytes, uint64_t *barrier)
{
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared), at = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(to), "l"(global), "r"(bytes), "r"(at) : "memory");
}
__device__ __forceinline__ void bulk_nothing(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"((uint32_t)__cvta_generic_to_shared(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_wait(uint64_t *barrier, uint32_t parity)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier);
    uint32_t done;
    do asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(done) : "r"(at), "r"(parity) : "memory");
    while (!done);
}

// A range to the second-level cache.
__device__ __forceinline__ void bulk_prefetch(const void *global, int bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(global), "r"(bytes) : "memory"); }

// Launches that may begin before the one before them has ended (programmatic dependent launch): `next_may_start` lets the next one's blocks take
// the places that this one's leave; nothing that the launch before wrote is read before `wait_for_last`.  No-ops in an ordinary launch.
__device__ __forceinline__ void next_may_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float log2_fast(float x)
{
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float reciprocal_fast(float x)
{
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float exp2_fast(float x)
{
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

#endif  // KV_EMULATE

}  // namespace kelvin
