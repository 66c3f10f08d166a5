// language_check.cu -- what Kelvin's kernels take for granted of CUDA, against plain references: on the emulator (make emulated) and,
// built by nvcc, on a GPU, so that one holds the other.  Fragment layouts are written here from the PTX ISA's formulas.
//   language_check          exits 1 when something is wrong; the last line is N passed, N failed
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>
#include <cuda_bf16.h>
#include "kelvin/mma.cuh"
#ifdef KV_EMULATE
#include <sys/wait.h>
#include <unistd.h>
namespace kv_emulate { bool host_is_kept_out(); }       // of device memory: where the machine has protection keys
#endif
using namespace kelvin;

#define CU(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("%s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); exit(2); } } while (0)

static int passed, failed;
static void claim(bool good, const char *what)
{
    printf("%s %s\n", good ? "ok  " : "FAIL", what);
    ++(good ? passed : failed);
}

template <class T> struct buffer {
    T *p;
    size_t n;
    explicit buffer(size_t count) : n(count) { CU(cudaMalloc(&p, n * sizeof(T))); }
    buffer(const std::vector<T> &v) : buffer(v.size()) { CU(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    ~buffer() { cudaFree(p); }
    std::vector<T> get() const
    {
        std::vector<T> v(n);
        CU(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

// ---- shuffles and votes
__global__ void shuffles(const int *in, int *out, int width, int by)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    const int v = in[i];
    out[i] = __shfl_sync(~0u, v, by, width);
    out[n + i] = __shfl_xor_sync(~0u, v, by, width);
    out[2 * n + i] = __shfl_up_sync(~0u, v, by, width);
    out[3 * n + i] = __shfl_down_sync(~0u, v, by, width);
    out[4 * n + i] = (int)(__shfl_xor_sync(~0u, (long long)v << 32 | v, by) >> 32);
}
static bool check_shuffles()
{
    const int n = 128;
    std::vector<int> in(n);
    for (int i = 0; i < n; i++) in[i] = i * 7919 + 3;
    for (int width : { 32, 16, 8, 2 })
        for (int by : { 0, 1, 3, 7, 16, 31 }) {
            buffer<int> a(in), b(5 * n);
            KV_LAUNCH(shuffles, 2, 64, 0, 0, a.p, b.p, width, by);
            const std::vector<int> out = b.get();
            for (int i = 0; i < n; i++) {
                const int base = i / 32 * 32, lane = i % 32, from = lane / width * width;
                const int up = lane - by < from ? lane : lane - by, down = lane + by >= from + width ? lane : lane + by, x = (lane ^ by) >= from + width ? lane : lane ^ by;
                if (out[i] != in[base + from + by % width] || out[n + i] != in[base + x] || out[2 * n + i] != in[base + up] || out[3 * n + i] != in[base + down] || out[4 * n + i] != in[base + (lane ^ by)]) return false;
            }
        }
    return true;
}

__global__ void votes(unsigned *out)
{
    const int lane = threadIdx.x % 32;
    unsigned *o = out + (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    o[0] = __ballot_sync(~0u, lane % 3 == 0);
    if (lane < 16) o[1] = __ballot_sync(0x0000FFFFu, lane % 2), o[2] = __shfl_xor_sync(0x0000FFFFu, lane, 5);
    else o[1] = __ballot_sync(0xFFFF0000u, lane % 5 == 0), o[2] = __shfl_xor_sync(0xFFFF0000u, lane * 100, 3);
    __syncwarp();
    o[3] = __any_sync(~0u, lane == 31);
    o[4] = __all_sync(~0u, lane != 31);
    o[5] = __all_sync(~0u, lane < 32);
    o[6] = __reduce_add_sync(~0u, (unsigned)lane);
    o[7] = __match_any_sync(~0u, lane / 3);
}
static bool check_votes()
{
    buffer<unsigned> b(64 * 8);
    KV_LAUNCH(votes, 1, 64, 0, 0, b.p);
    const std::vector<unsigned> out = b.get();
    unsigned third = 0, odd = 0, fifth = 0;
    for (int i = 0; i < 32; i++) third |= (i % 3 == 0) << i, odd |= (unsigned)(i < 16 && i % 2) << i, fifth |= (unsigned)(i >= 16 && i % 5 == 0) << i;
    for (int i = 0; i < 64; i++) {
        const int lane = i % 32;
        unsigned same = 0;
        for (int j = 0; j < 32; j++) same |= (unsigned)(j / 3 == lane / 3) << j;
        const unsigned want[8] = { third, lane < 16 ? odd : fifth, lane < 16 ? (unsigned)(lane ^ 5) : (unsigned)(lane ^ 3) * 100, 1, 0, 1, 31 * 16, same };
        if (memcmp(&out[i * 8], want, sizeof want)) return false;
    }
    return true;
}

// ---- barriers, and threads that leave
__global__ void leavers(int *out)
{
    KV_SHARED_DYNAMIC(memory);
    __shared__ int before[128];
    int *after = (int *)memory;
    const int i = threadIdx.x;
    before[i] = i * i;
    if (i % 3 == 0 || i / 32 == 2) return;                      // a whole warp among them
    __syncthreads();
    after[i] = before[127 - i] + before[i / 3 * 3];             // also what those wrote who left
    const int n = __syncthreads_count(i % 2), any = __syncthreads_or(i == 127), all = __syncthreads_and(i > 0);
    out[i] = after[i] * 8 + (n == 0) + 2 * (any != 0) + 4 * (all != 0);
    out[128 + i] = n;
}
static bool check_leavers()
{
    buffer<int> b(256);
    CU(cudaMemset(b.p, 0, 256 * 4));
    KV_LAUNCH(leavers, 3, 128, 128 * 4, 0, b.p);
    const std::vector<int> out = b.get();
    int odd = 0, all = 1, any = 0;
    auto stays = [](int i) { return i % 3 != 0 && i / 32 != 2; };
    for (int i = 0; i < 128; i++) if (stays(i)) odd += i % 2, any |= i == 127, all &= i > 0;
    for (int i = 0; i < 128; i++) {
        if (!stays(i)) continue;
        const int sum = (127 - i) * (127 - i) + i / 3 * 3 * (i / 3 * 3);
        if (out[i] != sum * 8 + (odd == 0) + 2 * any + 4 * all || out[128 + i] != odd) return false;
    }
    return true;
}

__global__ void reduce(const float *x, float *out, int n)       // the usual shape: warps, then the first one
{
    __shared__ float part[32];
    float s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[(size_t)blockIdx.x * n + i];
    for (int i = 16; i; i /= 2) s += __shfl_down_sync(~0u, s, i);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x < 32) {
        s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f;
        for (int i = 16; i; i /= 2) s += __shfl_down_sync(~0u, s, i);
        if (threadIdx.x == 0) out[blockIdx.x] = s;
    }
}
static bool check_reduce()
{
    const int rows = 37, n = 1000;
    std::vector<float> x((size_t)rows * n);
    for (size_t i = 0; i < x.size(); i++) x[i] = (float)(i * 31 % 64);
    buffer<float> a(x), b(rows);
    KV_LAUNCH(reduce, rows, 1024, 0, 0, a.p, b.p, n);
    const std::vector<float> out = b.get();
    for (int r = 0; r < rows; r++) {
        float want = 0;
        for (int i = 0; i < n; i++) want += x[(size_t)r * n + i];
        if (out[r] != want) return false;
    }
    return true;
}

// ---- atomics
__global__ void atomics(unsigned *u, int *s, float *f, unsigned long long *w)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    atomicAdd(&u[0], 1u), atomicOr(&u[1], 1u << i % 32), atomicAnd(&u[2], ~(1u << i % 7)), atomicXor(&u[3], (unsigned)i), atomicMax(&u[4], (unsigned)i), atomicMin(&u[5], (unsigned)i), atomicInc(&u[6], 9u);
    u[8 + atomicAdd(&u[7], 1u)] = 1;
    atomicAdd(&s[0], i % 2 ? -i : i), atomicMax(&s[1], -i - 1), atomicMin(&s[2], -i), atomicSub(&s[3], 2);
    atomicAdd(f, 1.0f);
    atomicAdd(w, 1ull << 33);
    unsigned old = u[8 + n], was;
    do was = old, old = atomicCAS(&u[8 + n], was, max(was, (unsigned)(i * 37 % n)));
    while (old != was);
    if (atomicExch(&s[4], i) == -1) atomicAdd(&s[5], 1);
}
static bool check_atomics()
{
    const int n = 17 * 96;
    std::vector<unsigned> u(9 + n, 0);
    u[2] = ~0u, u[5] = ~0u;
    buffer<unsigned> a(u);
    buffer<int> b(std::vector<int> { 0, -1000000, 5, 0, -1, 0 });
    buffer<float> f(std::vector<float> { 0 });
    buffer<unsigned long long> w(std::vector<unsigned long long> { 5 });
    KV_LAUNCH(atomics, 17, 96, 0, 0, a.p, b.p, f.p, w.p);
    const std::vector<unsigned> x = a.get();
    const std::vector<int> y = b.get();
    unsigned all = 0;
    int sum = 0;
    for (int i = 0; i < n; i++) all ^= (unsigned)i, sum += i % 2 ? -i : i;
    bool good = x[0] == (unsigned)n && x[1] == ~0u && x[2] == ~127u && x[3] == all && x[4] == (unsigned)n - 1 && x[5] == 0 && x[6] == (unsigned)n % 10 && x[7] == (unsigned)n && x[8 + n] == (unsigned)n - 1;
    for (int i = 0; i < n; i++) good &= x[8 + i] == 1;
    return good && y[0] == sum && y[1] == -1 && y[2] == -n + 1 && y[3] == -2 * n && y[5] == 1 && f.get()[0] == (float)n && w.get()[0] == 5 + ((unsigned long long)n << 33);
}

// ---- tensor cores, transposes, byte lookups, asynchronous copies.  a [16][32], b [32][8], c [16][8] by rows.
__global__ void products(const uint8_t *a, const uint8_t *b, const int *c, int *unsigned_sum, int *mixed, int *added)
{
    const int lane = threadIdx.x, group = lane >> 2, in_group = lane & 3;
    uint32_t fa[4] = {}, fb[2] = {};
    int d[4], fc[4];
    for (int i = 0; i < 16; i++) {
        const int row = i < 4 || (8 <= i && i < 12) ? group : group + 8, col = i < 8 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
        fa[i / 4] |= (uint32_t)a[row * 32 + col] << i % 4 * 8;
    }
    for (int i = 0; i < 8; i++) {
        const int row = i < 4 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
        fb[i / 4] |= (uint32_t)b[row * 8 + group] << i % 4 * 8;
    }
    for (int i = 0; i < 4; i++) fc[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    const int zero[4] = {};
    product_s8(d, fc, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) added[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
    product_s8u8(d, zero, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) mixed[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
    product_u8s8(fc, fc, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) unsigned_sum[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fc[i];
}
static bool check_products()
{
    std::mt19937 rng(11);
    for (int round = 0; round < 8; round++) {
        std::vector<uint8_t> a(16 * 32), b(32 * 8);
        std::vector<int> c(16 * 8);
        for (auto &x : a) x = (uint8_t)(round ? rng() : 128);           // the most negative sums first
        for (auto &x : b) x = (uint8_t)(round ? rng() : 127);
        for (auto &x : c) x = (int)(rng() % 2000000) - 1000000;
        buffer<uint8_t> da(a), db(b);
        buffer<int> dc(c), x(128), y(128), z(128);
        KV_LAUNCH(products, 1, 32, 0, 0, da.p, db.p, dc.p, x.p, y.p, z.p);
        const std::vector<int> gx = x.get(), gy = y.get(), gz = z.get();
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                int s = 0, m = 0, u = 0;
                for (int k = 0; k < 32; k++) s += (int8_t)a[i * 32 + k] * (int8_t)b[k * 8 + j], m += (int8_t)a[i * 32 + k] * b[k * 8 + j], u += a[i * 32 + k] * (int8_t)b[k * 8 + j];
                if (gx[i * 8 + j] != u + c[i * 8 + j] || gy[i * 8 + j] != m || gz[i * 8 + j] != s + c[i * 8 + j]) return false;
            }
    }
    return true;
}
__global__ void transposes(const uint16_t *in, uint16_t *out)
{
    const int l = threadIdx.x;
    const uint32_t r = transpose_b16(in[2 * l] | (uint32_t)in[2 * l + 1] << 16);
    out[2 * l] = (uint16_t)r, out[2 * l + 1] = (uint16_t)(r >> 16);
}
static bool check_transposes()
{
    std::vector<uint16_t> in(64);
    for (int i = 0; i < 64; i++) in[i] = (uint16_t)(i * 997);
    buffer<uint16_t> a(in), b(64);
    KV_LAUNCH(transposes, 1, 32, 0, 0, a.p, b.p);
    const std::vector<uint16_t> out = b.get();
    for (int r = 0; r < 8; r++) for (int c = 0; c < 8; c++) if (out[r * 8 + c] != in[c * 8 + r]) return false;
    return true;
}
__global__ void lookups(uint32_t *out)
{
    const uint32_t s = blockIdx.x * blockDim.x + threadIdx.x;
    out[3 * s] = byte_lookup(0x83422180u, 0x7F91C201u, s);
    out[3 * s + 1] = and_or(s * 2654435761u, 0x0F0F33CCu, s);
    out[3 * s + 2] = __byte_perm(0x83422180u, 0x7F91C201u, s & 0x7777u) ^ (uint32_t)__popc(s) ^ (uint32_t)__ffs((int)s) << 8 ^ (uint32_t)__clz((int)s) << 16;
}
static bool check_lookups()
{
    buffer<uint32_t> b(3 << 16);
    KV_LAUNCH(lookups, 256, 256, 0, 0, b.p);
    const std::vector<uint32_t> out = b.get();
    const uint8_t bytes[8] = { 0x80, 0x21, 0x42, 0x83, 0x01, 0xC2, 0x91, 0x7F };
    for (uint32_t s = 0; s < 65536; s++) {
        uint32_t r = 0, plain = 0, ones = 0, first = 0, zeros = 32;
        for (int i = 0; i < 4; i++) {
            const uint32_t n = s >> 4 * i & 15, v = bytes[n & 7];
            r |= (n & 8 ? (v >> 7) * 255u : v) << 8 * i;
            plain |= v << 8 * i;
        }
        for (uint32_t i = 0; i < 32; i++) if (s >> i & 1) ones++, first = first ? first : i + 1, zeros = 31 - i;
        if (out[3 * s] != r || out[3 * s + 1] != ((s * 2654435761u & 0x0F0F33CCu) | s) || out[3 * s + 2] != (plain ^ ones ^ first << 8 ^ zeros << 16)) return false;
    }
    return true;
}
__global__ void copies(const uint4 *in, uint4 *out, int rounds)
{
    __shared__ uint4 ring[3][32];
    const int l = threadIdx.x;
    for (int i = 0; i < 2; i++) { copy_async(&ring[i][l], in + i * 32 + l); copy_commit(); }
    for (int i = 0; i < rounds; i++) {
        copy_wait<1>();
        __syncwarp();
        out[i * 32 + l] = ring[i % 3][31 - l];
        __syncwarp();
        if (i + 2 < rounds) copy_async(&ring[(i + 2) % 3][l], in + (i + 2) * 32 + l);
        copy_commit();
    }
}
static bool check_copies()
{
    const int rounds = 9;
    std::vector<uint4> in(rounds * 32);
    for (size_t i = 0; i < in.size(); i++) in[i] = make_uint4((unsigned)i, (unsigned)i * 3, ~(unsigned)i, 7);
    buffer<uint4> a(in), b(in.size());
    KV_LAUNCH(copies, 1, 32, 0, 0, a.p, b.p, rounds);
    const std::vector<uint4> out = b.get();
    for (int i = 0; i < rounds; i++) for (int l = 0; l < 32; l++) if (memcmp(&out[i * 32 + l], &in[i * 32 + 31 - l], 16)) return false;
    return true;
}

// ---- conversions: to the nearest, ties to even
__global__ void to_half(const float *x, uint16_t *h, uint16_t *b, int n)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) h[i] = __half_as_ushort(__float2half_rn(x[i])), b[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}
__global__ void from_half(float *h, float *b)
{
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    h[i] = __half2float(__ushort_as_half((unsigned short)i)), b[i] = __bfloat162float(__ushort_as_bfloat16((unsigned short)i));
}
static double value(unsigned bits, int exponent_bits, int mantissa_bits)
{
    const int bias = (1 << (exponent_bits - 1)) - 1, e = (int)(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
    const unsigned m = bits & ((1u << mantissa_bits) - 1);
    const double sign = bits >> (exponent_bits + mantissa_bits) & 1 ? -1.0 : 1.0;
    if (e == (1 << exponent_bits) - 1) return m ? NAN : sign * INFINITY;
    return sign * std::ldexp(e ? m + std::ldexp(1.0, mantissa_bits) : (double)m, (e ? e : 1) - bias - mantissa_bits);
}
static bool same(double a, double b) { return (a != a && b != b) || (a == b && std::signbit(a) == std::signbit(b)); }
static bool nearest(float x, unsigned got, int e, int m)
{
    if (x != x) return value(got, e, m) != value(got, e, m);
    const unsigned sign = 1u << (e + m), top = ((1u << e) - 1) << m;
    if ((got & sign) != (std::signbit(x) ? sign : 0u)) return false;
    const unsigned g = got & ~sign;
    const double a = std::fabs((double)x), limit = std::ldexp(2.0 - std::ldexp(1.0, -m - 1), (1 << (e - 1)) - 1);        // half a unit above the largest
    if (g >= top) return g == top && a >= limit;
    if (a >= limit) return false;
    const double v = value(g, e, m), d = std::fabs(v - a), down = g ? std::fabs(value(g - 1, e, m) - a) : INFINITY, up = g + 1 < top ? std::fabs(value(g + 1, e, m) - a) : INFINITY;
    return d < std::min(down, up) || (d <= std::min(down, up) && !(g & 1));
}
static bool check_conversions()
{
    buffer<float> fh(65536), fb(65536);
    KV_LAUNCH(from_half, 256, 256, 0, 0, fh.p, fb.p);
    const std::vector<float> h = fh.get(), b = fb.get();
    for (unsigned i = 0; i < 65536; i++) if (!same(h[i], value(i, 5, 10)) || !same(b[i], value(i, 8, 7))) return false;
    std::mt19937 rng(3);
    std::vector<float> x = { 0.0f, -0.0f, 65504.0f, 65519.9f, 65520.0f, 65536.0f, 1e30f, 3.4e38f, INFINITY, -INFINITY, NAN, 5.96e-8f, 2.98e-8f, 2.9802322e-8f, 2.98023224e-8f, 6.1e-5f, 1e-40f, -1e-40f };
    for (int i = 0; i < 30000; i++) {
        const uint32_t bits = rng();
        float f;
        memcpy(&f, &bits, 4);
        x.push_back(f);
        const float near = h[rng() % 65536], next = std::nextafter(near, INFINITY);        // ties between neighbours, and beside them
        const float tie = near + (float)std::ldexp(1.0, (int)(rng() % 40) - 30);
        for (float y : { near, next, tie, std::nextafter(tie, 0.0f) }) x.push_back(y);
    }
    buffer<float> in(x);
    buffer<uint16_t> oh(x.size()), ob(x.size());
    KV_LAUNCH(to_half, (int)(x.size() + 255) / 256, 256, 0, 0, in.p, oh.p, ob.p, (int)x.size());
    const std::vector<uint16_t> gh = oh.get(), gb = ob.get();
    for (size_t i = 0; i < x.size(); i++)
        if (!nearest(x[i], gh[i], 5, 10) || !nearest(x[i], gb[i], 8, 7)) { printf("  %a gives f16 %04x bf16 %04x\n", x[i], gh[i], gb[i]); return false; }
    return true;
}
__global__ void to_int(const float *x, int *out, int n)
{
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[3 * i] = __float2int_rn(x[i]), out[3 * i + 1] = __float2int_rz(x[i]), out[3 * i + 2] = (int)__float2uint_rn(x[i]);
}
static bool check_to_int()
{
    const float x[] = { 0.5f, 1.5f, -2.5f, -0.7f, 3e9f, 5e9f, -3e9f, NAN };
    const int want[][3] = { { 0, 0, 0 }, { 2, 1, 2 }, { -2, -2, 0 }, { -1, 0, 0 }, { INT32_MAX, INT32_MAX, (int)3000000000u }, { INT32_MAX, INT32_MAX, -1 }, { INT32_MIN, INT32_MIN, 0 }, { 0, 0, 0 } };
    buffer<float> a(std::vector<float>(x, x + 8));
    buffer<int> b(24);
    KV_LAUNCH(to_int, 1, 32, 0, 0, a.p, b.p, 8);
    return memcmp(b.get().data(), want, sizeof want) == 0;
}

// ---- the runtime: streams, graphs, errors
__global__ void add_one(int *x, int n) { for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x[i] += 1; }
__global__ void add_to(const int *x, int *y, int n) { for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] += x[i]; }
static bool check_graphs()
{
    const int n = 100;
    cudaStream_t s, side;
    cudaEvent_t fork, join;
    cudaGraph_t g;
    cudaGraphExec_t x;
    int *pinned;
    CU(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CU(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    CU(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
    CU(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
    CU(cudaMallocHost(&pinned, n * sizeof(int)));
    buffer<int> a(std::vector<int>(n, 5)), b(std::vector<int>(n, 0)), c(n);
    CU(cudaDeviceSynchronize());
    CU(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    KV_LAUNCH(add_one, 2, 32, 0, s, a.p, n);
    CU(cudaEventRecord(fork, s));
    CU(cudaStreamWaitEvent(side, fork, 0));
    CU(cudaMemsetAsync(c.p, 0, n * sizeof(int), side));
    KV_LAUNCH(add_one, 1, 64, 0, side, c.p, n);
    CU(cudaEventRecord(join, side));
    CU(cudaStreamWaitEvent(s, join, 0));
    KV_LAUNCH(add_to, 1, 32, 0, s, (const int *)a.p, b.p, n);
    KV_LAUNCH(add_to, 1, 32, 0, s, (const int *)c.p, b.p, n);
    CU(cudaMemcpyAsync(pinned, b.p, n * sizeof(int), cudaMemcpyDeviceToHost, s));
    CU(cudaStreamEndCapture(s, &g));
    CU(cudaGraphInstantiate(&x, g, 0));
    CU(cudaGraphDestroy(g));
    bool good = a.get()[0] == 5;                                // nothing has run yet
    int want = 0;
    for (int i = 1; i <= 3; i++) {
        CU(cudaGraphLaunch(x, s));
        CU(cudaStreamSynchronize(s));
        want += 5 + i + 1;
        good &= pinned[0] == want && pinned[n - 1] == want;
    }
    CU(cudaGraphExecDestroy(x));
    CU(cudaFreeHost(pinned));
    CU(cudaEventDestroy(fork));
    CU(cudaEventDestroy(join));
    CU(cudaStreamDestroy(side));
    CU(cudaStreamDestroy(s));
    return good;
}
__global__ void uses_shared(int *out)
{
    KV_SHARED_DYNAMIC(memory);
    memory[threadIdx.x * 1000] = (uint8_t)threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) *out = memory[63 * 1000];
}
static bool check_errors()
{
    buffer<int> a(1);
    KV_LAUNCH(uses_shared, 1, 64, 64000, 0, a.p);               // more than 48 KB, not asked for
    const bool refused = cudaGetLastError() != cudaSuccess && cudaGetLastError() == cudaSuccess;
    CU(cudaFuncSetAttribute(uses_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 64000));
    KV_LAUNCH(uses_shared, 1, 64, 64000, 0, a.p);
    CU(cudaGetLastError());
    const bool ran = a.get()[0] == 63;
    KV_LAUNCH(add_one, 0, 32, 0, 0, a.p, 1);
    const bool empty = cudaGetLastError() == cudaErrorInvalidValue;         // CUDA 13; it was cudaErrorInvalidConfiguration before
    KV_LAUNCH(add_one, 1, 1025, 0, 0, a.p, 1);
    const bool wide = cudaGetLastError() == cudaErrorInvalidValue;
    void *p = &a;
    const bool full = cudaMalloc(&p, (size_t)1 << 50) == cudaErrorMemoryAllocation && cudaGetLastError() == cudaErrorMemoryAllocation;
    cudaStream_t s;
    cudaGraph_t g = nullptr;
    CU(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CU(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    const bool captured = cudaStreamSynchronize(s) == cudaErrorStreamCaptureUnsupported && cudaStreamEndCapture(s, &g) == cudaErrorStreamCaptureInvalidated && !g;
    cudaGetLastError();
    CU(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));    // the stream is usable again
    CU(cudaStreamEndCapture(s, &g));
    CU(cudaGraphDestroy(g));
    CU(cudaStreamDestroy(s));
    if (!(refused && ran && empty && wide && full && captured)) printf("  refused %d, ran %d, empty %d, wide %d, full %d, captured %d\n", refused, ran, empty, wide, full, captured);
    return refused && ran && empty && wide && full && captured;
}

#ifdef KV_EMULATE
// ---- what only the emulator promises: mistakes show
__global__ void bulks(const uint4 *in, uint4 *out, int rounds)
{
    __shared__ __align__(128) uint4 ring[3][2][32];
    __shared__ uint64_t barriers[3];
    const int l = threadIdx.x;
    if (l < 3) bulk_init(barriers + l, 2);
    bulk_ready();
    __syncwarp();
    for (int i = 0; i < 2; i++) if (l < 2) bulk_copy(ring[i][l], in + (i * 2 + l) * 32, 512, barriers + i);
    for (int i = 0; i < rounds; i++) {
        bulk_wait(barriers + i % 3, i / 3 % 2);
        out[i * 64 + l] = ring[i % 3][0][31 - l], out[i * 64 + 32 + l] = ring[i % 3][1][31 - l];
        __syncwarp();
        const int next = i + 2;
        if (next < rounds) {
            if (l == 0) bulk_copy(ring[next % 3][0], in + next * 64, 512, barriers + next % 3);
            if (l == 5) { if (next % 4) bulk_copy(ring[next % 3][1], in + next * 64 + 32, 512, barriers + next % 3); else bulk_nothing(barriers + next % 3); }
        }
    }
}
static bool check_bulks()
{
    const int rounds = 11;
    std::vector<uint4> in(rounds * 64);
    for (size_t i = 0; i < in.size(); i++) in[i] = make_uint4((unsigned)i, (unsigned)i * 3, ~(unsigned)i, 7);
    buffer<uint4> a(in), b(in.size());
    KV_LAUNCH(bulks, 2, 32, 0, 0, a.p, b.p, rounds);
    const std::vector<uint4> out = b.get();
    for (int i = 0; i < rounds; i++)
        for (int l = 0; l < 64; l++) {
            const bool left_out = i >= 2 && i % 4 == 0 && l >= 32;      // what lay there before
            if (!left_out && memcmp(&out[i * 64 + l], &in[i * 64 + (l & 32) + 31 - l % 32], 16)) return false;
        }
    return true;
}
__global__ void bulk_short(int) { __shared__ uint64_t b; if (threadIdx.x == 0) { bulk_init(&b, 2); bulk_nothing(&b); bulk_wait(&b, 0); } }
__global__ void bulk_many(int) { __shared__ uint64_t b; if (threadIdx.x == 0) { bulk_init(&b, 1); kv_emulate::bulk_arrive(&b, 16); bulk_nothing(&b); } }
__global__ void bulk_raw(int) { __shared__ uint64_t b; if (threadIdx.x == 0) bulk_nothing(&b); }
static bool check_lazy()
{
    int *pinned;
    CU(cudaMallocHost(&pinned, 4));
    *pinned = 7;
    buffer<int> a(std::vector<int> { 1 });
    KV_LAUNCH(add_one, 1, 32, 0, 0, a.p, 1);
    CU(cudaMemcpyAsync(pinned, a.p, 4, cudaMemcpyDeviceToHost, nullptr));
    const bool before = *pinned == 7;
    CU(cudaDeviceSynchronize());
    const bool after = *pinned == 2;
    CU(cudaFreeHost(pinned));
    return (before || getenv("KV_EMULATE_EAGER")) && after;
}
static bool check_memory()
{
    int host[2] = { 1, 2 };
    buffer<int> a(2);
    const std::vector<int> fresh = a.get();
    const bool poison = fresh[0] == -1 && fresh[1] == -1;
    const bool direction = cudaMemcpy(host, a.p, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, beyond = cudaMemcpy(a.p + 1, host, 8, cudaMemcpyHostToDevice) == cudaErrorInvalidValue;
    const bool never = cudaFree(host) == cudaErrorInvalidValue;
    cudaGetLastError();
    return poison && direction && beyond && never;
}
__global__ void unwritten(float *out)
{
    KV_SHARED_DYNAMIC(memory);
    __shared__ float x[64];
    out[threadIdx.x] = x[threadIdx.x], out[64 + threadIdx.x] = ((float *)memory)[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = ((float *)memory)[threadIdx.x] = 0;
}
static bool check_unwritten()
{
    for (int i = 0; i < 2; i++) {
        buffer<float> a(128);
        KV_LAUNCH(unwritten, 1, 64, 64 * 4, 0, a.p);
        for (float v : a.get()) if (v == v) return false;
    }
    return true;
}
__global__ void unwaited(const uint4 *in, uint4 *out)
{
    __shared__ uint4 s[32];
    copy_async(&s[threadIdx.x], in + threadIdx.x);
    copy_commit();
    out[threadIdx.x] = s[threadIdx.x];
    copy_wait<0>();
    out[32 + threadIdx.x] = s[threadIdx.x];
}
static bool check_unwaited()
{
    buffer<uint4> a(std::vector<uint4>(32, make_uint4(1, 2, 3, 4))), b(64);
    KV_LAUNCH(unwaited, 1, 32, 0, 0, a.p, b.p);
    const std::vector<uint4> out = b.get();
    return out[5].x == ~0u && out[32 + 5].x == 1;
}
__global__ void half_sync(int) { if (threadIdx.x < 40) __syncthreads(); else __syncwarp(0x0000FFFFu); }
__global__ void half_warp(int) { if (threadIdx.x % 2) __shfl_sync(~0u, 1, 0); else __ballot_sync(~0u, 1); }
__global__ void some_lanes(int) { uint32_t a[4] = {}; int d[4] = {}; if (threadIdx.x != 3) product_s8(d, d, a, 0, 0); else __syncthreads(); }
// A child that makes the mistake must die of it, with words.
static bool dies(void (*mistake)(int), const std::string &words)
{
    int pipes[2];
    if (pipe(pipes) != 0) return false;
    fflush(stdout);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(pipes[1], 2);
        if (mistake) {
            KV_LAUNCH(mistake, 1, 64, 0, 0, 0);
            cudaDeviceSynchronize();
        } else {
            volatile int *p;
            cudaMalloc((int **)&p, 4);
            exit(*p == 7);
        }
        _exit(0);
    }
    close(pipes[1]);
    std::string said;
    char text[4096];
    for (ssize_t n; (n = read(pipes[0], text, sizeof text)) > 0;) said.append(text, (size_t)n);
    close(pipes[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    const bool good = !(WIFEXITED(status) && WEXITSTATUS(status) == 0) && said.find(words) != std::string::npos;
    if (!good) printf("  it said: %s\n", said.c_str());
    return good;
}
#endif

int main()
{
    claim(check_shuffles(), "shuffles of every kind and width");
    claim(check_votes(), "votes, matches and reductions, also of half a warp");
    claim(check_leavers(), "barriers and votes of a block that some threads left");
    claim(check_reduce(), "sums of a block of 1024 threads");
    claim(check_atomics(), "atomics of every kind over blocks");
    claim(check_products(), "integer products of m16n8k32 fragments");
    claim(check_transposes(), "movmatrix");
    claim(check_lookups(), "byte lookups for every selector, bit counts");
    claim(check_copies(), "a ring of asynchronous copies");
    claim(check_conversions(), "f16 and bf16 to the nearest, ties to even, and back");
    claim(check_to_int(), "float to integer, saturated");
    claim(check_graphs(), "a captured graph, forked and joined, launched three times");
    claim(check_errors(), "errors of launches, memory and captures");
#ifdef KV_EMULATE
    claim(check_lazy(), "nothing runs before somebody waits");
    claim(check_memory(), "fresh memory is poison; copies know sides and sizes");
    claim(check_bulks(), "a ring of bulk copies and their barriers");
    claim(dies(bulk_short, "wait for parity 0 of a barrier in phase 0 with 1 of 2 arrivals"), "a barrier that lacks an arrival is named");
    claim(dies(bulk_many, "more than 1 arrivals"), "a barrier with too many arrivals ends the process");
    claim(dies(bulk_raw, "was not begun"), "a barrier that was not begun ends the process");
    claim(check_unwritten(), "shared memory begins as poison, static and dynamic");
    claim(check_unwaited(), "an asynchronous copy that was not waited for is poison");
    if (kv_emulate::host_is_kept_out()) claim(dies(nullptr, "the host touches device memory"), "a host that reads device memory ends the process");
    claim(dies(half_sync, "of mask 0x0000ffff is called by lane"), "a lane outside its mask ends the process");
    claim(dies(half_warp, "no thread can go on"), "two collectives in one warp end the process");
    claim(dies(some_lanes, "wait in mma.m16n8k32 s8 s8 of mask 0xffffffff for lanes 3"), "a product without one lane names it");
#endif
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
