// emulate.h -- CUDA's device language for g++: what a kernel of Kelvin may use, run on the CPU (docs/gpu.md, "Without a GPU").
//
// A block's threads are fibers of one OS thread, so between two collectives a thread runs alone.  A collective (barrier, shuffle, vote,
// tensor-core product) waits until every living lane of its mask is there; the last one to come computes all lanes' results.
// What can never be completed ends the process with the kernel, the block and every waiting thread by name.
#pragma once
#include <math.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__                    // libstdc++ has __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local
#define __constant__
#define __grid_constant__

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define KV_VECTOR(type, name, bytes) \
    struct alignas(2 * bytes) name##2 { type x, y; }; \
    struct name##3 { type x, y, z; }; \
    struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return { x, y }; } \
    inline name##3 make_##name##3(type x, type y, type z) { return { x, y, z }; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return { x, y, z, w }; }
KV_VECTOR(signed char, char, 1)
KV_VECTOR(unsigned char, uchar, 1)
KV_VECTOR(short, short, 2)
KV_VECTOR(unsigned short, ushort, 2)
KV_VECTOR(int, int, 4)
KV_VECTOR(float, float, 4)
KV_VECTOR(double, double, 8)
KV_VECTOR(long long, longlong, 8)
KV_VECTOR(unsigned long long, ulonglong, 8)
#undef KV_VECTOR
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return { x, y }; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return { x, y, z }; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }

namespace kv_emulate {

// A thread of a block as kernels see it; the fiber around it is blocks.cpp's.
struct thread {
    uint3       index, block;
    dim3        block_dim, grid_dim;
    int         lane;
    void       *dynamic;                                // the block's dynamic shared memory
};
extern __thread thread *self __attribute__((visibility("hidden")));

// A collective: `complete` sees every member's payload (by lane) and fills in the results.
struct collective { const char *name; void (*complete)(void *const payload[32], uint32_t members); };
void in_warp(uint32_t mask, const collective *what, void *payload);
enum { COUNT, AND, OR };
int  in_block(int what, int predicate);                 // __syncthreads and its votes
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void copy_async(void *shared, const void *global, int n_bytes);
void copy_commit();
void copy_wait(int open_groups);

struct word { uint64_t value, result; int from; };      // from: a lane, or -1 for one's own
extern const collective shuffle, vote, barrier, match;
constexpr uint64_t POISON = ~0ull;                      // NaN in every format: what a shuffle gives where CUDA gives nothing

template <class T> T shuffled(uint32_t mask, T v, int from, const char *)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 2, 4 and 8 bytes");
    word w = { 0, POISON, from };
    memcpy(&w.value, &v, sizeof v);
    in_warp(mask, &shuffle, &w);
    T r;
    memcpy(&r, &w.result, sizeof r);
    return r;
}
inline int segment(int width) { return self->lane & -width; }

struct ballot { uint32_t predicate, result; };
inline uint32_t vote_of(uint32_t mask, int predicate)
{
    ballot b = { predicate != 0, 0 };
    in_warp(mask, &vote, &b);
    return b.result;
}

}  // namespace kv_emulate

#define threadIdx (kv_emulate::self->index)
#define blockIdx  (kv_emulate::self->block)
#define blockDim  (kv_emulate::self->block_dim)
#define gridDim   (kv_emulate::self->grid_dim)
constexpr int warpSize = 32;

#define KV_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kv_emulate::launch(#kernel, kernel, (grid), (block), (shared_bytes), (stream), ##__VA_ARGS__)
#define KV_SHARED_DYNAMIC(name) uint8_t *const name = (uint8_t *)kv_emulate::self->dynamic

// ---- barriers
inline void __syncthreads() { kv_emulate::in_block(kv_emulate::COUNT, 0); }
inline int  __syncthreads_count(int p) { return kv_emulate::in_block(kv_emulate::COUNT, p); }
inline int  __syncthreads_and(int p) { return kv_emulate::in_block(kv_emulate::AND, p); }
inline int  __syncthreads_or(int p) { return kv_emulate::in_block(kv_emulate::OR, p); }
inline void __syncwarp(unsigned mask = ~0u) { kv_emulate::word w = {}; kv_emulate::in_warp(mask, &kv_emulate::barrier, &w); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- shuffles and votes
template <class T> inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32)
{
    return kv_emulate::shuffled(mask, v, kv_emulate::segment(width) + (lane & (width - 1)), "__shfl_sync");
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32)
{
    const int to = kv_emulate::self->lane ^ by;         // into a higher segment: one's own
    return kv_emulate::shuffled(mask, v, to >= kv_emulate::segment(width) + width ? -1 : to, "__shfl_xor_sync");
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32)
{
    const int to = kv_emulate::self->lane - (int)by;
    return kv_emulate::shuffled(mask, v, to < kv_emulate::segment(width) ? -1 : to, "__shfl_up_sync");
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32)
{
    const int to = kv_emulate::self->lane + (int)by;
    return kv_emulate::shuffled(mask, v, to >= kv_emulate::segment(width) + width ? -1 : to, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int p) { return kv_emulate::vote_of(mask, p) & mask; }
inline int __any_sync(unsigned mask, int p) { return kv_emulate::vote_of(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return kv_emulate::vote_of(mask, !p) == 0; }
template <class T> inline unsigned __match_any_sync(unsigned mask, T v)
{
    kv_emulate::word w = {};
    memcpy(&w.value, &v, sizeof v);
    kv_emulate::in_warp(mask, &kv_emulate::match, &w);
    return (unsigned)w.result;
}
#define KV_REDUCE(name, type, expression) \
    inline type __reduce_##name##_sync(unsigned mask, type v) \
    { \
        static const kv_emulate::collective c = { "__reduce_" #name "_sync", [](void *const p[32], uint32_t members) { \
            bool any = false; \
            type a = 0; \
            for (int i = 0; i < 32; i++) if (members >> i & 1) { const type b = *(const type *)p[i]; a = any ? (expression) : b; any = true; } \
            for (int i = 0; i < 32; i++) if (members >> i & 1) *(type *)p[i] = a; } }; \
        kv_emulate::in_warp(mask, &c, &v); \
        return v; \
    }
KV_REDUCE(add, unsigned, a + b) KV_REDUCE(add, int, (int)((unsigned)a + (unsigned)b))
KV_REDUCE(min, unsigned, a < b ? a : b) KV_REDUCE(min, int, a < b ? a : b)
KV_REDUCE(max, unsigned, a > b ? a : b) KV_REDUCE(max, int, a > b ? a : b)
KV_REDUCE(and, unsigned, a & b) KV_REDUCE(or, unsigned, a | b) KV_REDUCE(xor, unsigned, a ^ b)
#undef KV_REDUCE

unsigned __activemask();                                  // the lanes that wait in nothing, and oneself: no more is sure on a device

// ---- atomics: blocks run on several OS threads, so these are real
template <class T> using kv_same = typename std::common_type<T>::type;          // the value takes the pointer's type
template <class T, class F> inline T kv_atomic(T *p, F f)
{
    T old, next;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    do next = f(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}
template <class T> inline T atomicAdd(T *p, kv_same<T> v)
{
    if constexpr (std::is_integral<T>::value) return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
    else return kv_atomic(p, [v](T x) { return (T)(x + v); });
}
template <class T> inline T atomicSub(T *p, kv_same<T> v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicOr(T *p, kv_same<T> v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicAnd(T *p, kv_same<T> v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicXor(T *p, kv_same<T> v) { return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicMax(T *p, kv_same<T> v) { static_assert(std::is_integral<T>::value, "integers"); return kv_atomic(p, [v](T x) { return x > v ? x : v; }); }
template <class T> inline T atomicMin(T *p, kv_same<T> v) { static_assert(std::is_integral<T>::value, "integers"); return kv_atomic(p, [v](T x) { return x < v ? x : v; }); }
template <class T> inline T atomicExch(T *p, kv_same<T> v) { return kv_atomic(p, [v](T) { return v; }); }
template <class T> inline T atomicCAS(T *p, kv_same<T> was, kv_same<T> v)
{
    T old = was;
    __atomic_compare_exchange(p, &old, &v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return old;
}
inline unsigned atomicInc(unsigned *p, unsigned top) { return kv_atomic(p, [top](unsigned x) { return x >= top ? 0u : x + 1; }); }
inline unsigned atomicDec(unsigned *p, unsigned top) { return kv_atomic(p, [top](unsigned x) { return x == 0 || x > top ? top : x - 1; }); }

// ---- loads and stores with a cache hint
template <class T> inline T __ldg(const T *p) { return *p; }
template <class T> inline T __ldcg(const T *p) { return *p; }
template <class T> inline T __ldca(const T *p) { return *p; }
template <class T> inline T __ldcs(const T *p) { return *p; }
template <class T> inline T __ldlu(const T *p) { return *p; }
template <class T> inline T __ldcv(const T *p) { return *p; }
template <class T> inline void __stwb(T *p, T v) { *p = v; }
template <class T> inline void __stcg(T *p, T v) { *p = v; }
template <class T> inline void __stcs(T *p, T v) { *p = v; }
template <class T> inline void __stwt(T *p, T v) { *p = v; }

// ---- bits
template <class TO, class FROM> inline TO kv_bits(FROM v) { static_assert(sizeof(TO) == sizeof(FROM), "same size"); TO r; memcpy(&r, &v, sizeof r); return r; }
inline unsigned  __float_as_uint(float v) { return kv_bits<unsigned>(v); }
inline int       __float_as_int(float v) { return kv_bits<int>(v); }
inline float     __uint_as_float(unsigned v) { return kv_bits<float>(v); }
inline float     __int_as_float(int v) { return kv_bits<float>(v); }
inline long long __double_as_longlong(double v) { return kv_bits<long long>(v); }
inline double    __longlong_as_double(long long v) { return kv_bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline unsigned __brev(unsigned v) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (v >> i & 1u) << (31 - i); return r; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) { return (unsigned)((((uint64_t)high << 32 | low) << (by & 31)) >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31)); }
// PTX prmt: a selector's low 3 bits choose a byte of high:low, its top bit spreads that byte's sign.
inline unsigned kv_prmt(unsigned low, unsigned high, unsigned selectors)
{
    const uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selectors >> 4 * i, b = (unsigned)(bytes >> 8 * (s & 7)) & 255u;
        r |= (s & 8 ? (b & 128 ? 255u : 0u) : b) << 8 * i;
    }
    return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { return kv_prmt(a, b, s & 0x7777u); }
inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 4; i++) c = (int)((unsigned)c + (unsigned)((int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i)));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c)
{
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255u) * (b >> 8 * i & 255u);
    return c;
}

// ---- arithmetic.  Conversions saturate and take NaN to 0, as the hardware's do.
template <class I> inline I kv_to_int(double v)
{
    if (!(v == v)) return sizeof(I) == 4 || std::is_unsigned<I>::value ? (I)0 : (I)((uint64_t)1 << 63);
    constexpr bool is_signed = std::is_signed<I>::value;
    const double top = ldexp(1.0, (int)sizeof(I) * 8 - is_signed), low = is_signed ? -top : 0.0;
    const I most = (I)(is_signed ? ~(typename std::make_unsigned<I>::type)0 >> 1 : ~(typename std::make_unsigned<I>::type)0);
    return v >= top ? most : v <= low ? (I)(is_signed ? -most - 1 : 0) : (I)v;
}
#define KV_CONVERT(from, type, name, to) \
    inline to __##from##2##name##_rn(type v) { return kv_to_int<to>(nearbyint((double)v)); } \
    inline to __##from##2##name##_rz(type v) { return kv_to_int<to>(trunc((double)v)); } \
    inline to __##from##2##name##_rd(type v) { return kv_to_int<to>(floor((double)v)); } \
    inline to __##from##2##name##_ru(type v) { return kv_to_int<to>(ceil((double)v)); }
KV_CONVERT(float, float, int, int) KV_CONVERT(float, float, uint, unsigned) KV_CONVERT(float, float, ll, long long) KV_CONVERT(float, float, ull, unsigned long long)
KV_CONVERT(double, double, int, int) KV_CONVERT(double, double, uint, unsigned) KV_CONVERT(double, double, ll, long long) KV_CONVERT(double, double, ull, unsigned long long)
#undef KV_CONVERT
inline float __int2float_rn(int v) { return (float)v; }
inline float __uint2float_rn(unsigned v) { return (float)v; }
inline float __ll2float_rn(long long v) { return (float)v; }
inline float __double2float_rn(double v) { return (float)v; }
inline double __int2double_rn(int v) { return (double)v; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return (float)(1 / sqrt((double)a)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __exp10f(float v) { return powf(10.0f, v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float __log10f(float v) { return log10f(v); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float v) { return sinf(v); }
inline float __cosf(float v) { return cosf(v); }
inline float __tanhf(float v) { return tanhf(v); }
inline void __sincosf(float v, float *s, float *c) { *s = sinf(v); *c = cosf(v); }
inline float __saturatef(float v) { return v > 0 ? v < 1 ? v : 1.0f : 0.0f; }
inline float rsqrtf(float v) { return (float)(1 / sqrt((double)v)); }
inline double rsqrt(double v) { return 1 / sqrt(v); }
#define KV_MIN_MAX(type) \
    inline type min(type a, type b) { return b < a ? b : a; } \
    inline type max(type a, type b) { return a < b ? b : a; }
KV_MIN_MAX(int) KV_MIN_MAX(unsigned) KV_MIN_MAX(long) KV_MIN_MAX(unsigned long) KV_MIN_MAX(long long) KV_MIN_MAX(unsigned long long)
#undef KV_MIN_MAX
inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline size_t __cvta_generic_to_shared(const void *p) { return (size_t)p; }
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
inline void __nanosleep(unsigned) {}
#define __builtin_assume(x) ((void)0)
