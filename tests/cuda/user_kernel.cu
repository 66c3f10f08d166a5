// user_kernel.cu -- a program of a user's own against kernels/include alone: keys are rotated, coded and packed on the device, then a
// kernel of its own reads them in fragment order and leaves the log-sum-exp of a query's scores.  docs/gpu.md walks through it.
//   user_kernel        every width against double precision on the host; exits 1 when one is wrong
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#include "kelvin/launch.cuh"
#include "kelvin/fragment.cuh"
#include "kelvin/hadamard.cuh"
using namespace kelvin;

#define CU(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("FAIL %s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); exit(2); } } while (0)

constexpr int D = 64, V = D / 32;               // a lane holds V elements of a row
struct centroids { float at[16]; };

// A warp a token: x = FWHT(x) / sqrt(D), norm = |x|, codes of x / norm.
__global__ void encode_kernel(const float *x, int n_tokens, centroids c, int bits, uint8_t *codes, __half *norms)
{
    const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= n_tokens) return;
    float v[V], sum = 0;
    for (int i = 0; i < V; i++) v[i] = x[token * D + lane * V + i];
    butterflies<V>(v, lane);
    for (int i = 0; i < V; i++) sum += v[i] * v[i];
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    const float norm = sqrtf(sum / D);
    for (int i = 0; i < V; i++) {
        const float y = norm > 0 ? v[i] * rsqrtf((float)D) / norm : 0.0f;
        int best = 0;
        for (int k = 1; k < 1 << bits; k++) if (fabsf(y - c.at[k]) < fabsf(y - c.at[best])) best = k;
        codes[token * D + lane * V + i] = (uint8_t)best;
    }
    if (lane == 0) norms[token] = __float2half(norm);
}

// A thread a tile: codes to the place where a tensor core's operand wants them.
template <int BITS> __global__ void pack_kernel(const uint8_t *codes, int n_tokens, uint8_t *tiles)
{
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t * TILE_TOKENS >= n_tokens) return;
    for (int j = 0; j < TILE_TOKENS && t * TILE_TOKENS + j < n_tokens; j++)
        for (int i = 0; i < D; i++)
            put_code(BITS, side<BITS, D>::words, tiles + (size_t)t * side<BITS, D>::bytes, key_place(D / 32, j, i), codes[(t * TILE_TOKENS + j) * D + i]);
}

// A warp in all: lane 4g + c holds, of every fragment's register r, row g + 8 (r % 2) and k = 16 (r / 2) + 4 c + byte.
template <int BITS> __global__ void lse_kernel(const uint8_t *tiles, const __half *norms, int n_tokens, const float *q, codebook book, float *out)
{
    constexpr int KS = D / 32, WORDS = side<BITS, D>::words;
    __shared__ float turned[D];
    const int lane = threadIdx.x, g = lane / 4, c = lane % 4;
    float v[V];
    for (int i = 0; i < V; i++) v[i] = q[lane * V + i];
    butterflies<V>(v, lane);
    for (int i = 0; i < V; i++) turned[lane * V + i] = v[i] * rsqrtf((float)D);
    __syncwarp();
    float top = -1e30f, sum = 0;
    for (int t = 0; t * TILE_TOKENS < n_tokens; t++) {
        const uint8_t *at = tiles + (size_t)t * side<BITS, D>::bytes;
        uint32_t w[WORDS];
        for (int i = 0; i < WORDS; i++) w[i] = *(const uint32_t *)(at + word_offset(WORDS, i, lane));
        float score[4] = {};                    // of tokens g, g + 8, g + 16, g + 24
        for (int f = 0; f < 2 * KS; f += 2) {
            uint32_t a[8];
            unpack_two<BITS>(w + f * BITS / 2, book.t0, book.t1, a);
            for (int r = 0; r < 8; r++)
                for (int b = 0; b < 4; b++) {
                    const int dim = (f + r / 4) % KS * 32 + r % 4 / 2 * 16 + 4 * c + b;
                    score[(f + r / 4) / KS * 2 + r % 2] += turned[dim] * ((float)(int8_t)(a[r] >> (8 * b)) + book.half);
                }
        }
        for (int i = 0; i < 4; i++) {
            const int token = t * TILE_TOKENS + g + 8 * i;
            score[i] += __shfl_xor_sync(~0u, score[i], 1);
            score[i] += __shfl_xor_sync(~0u, score[i], 2);
            if (token >= n_tokens) continue;
            // The online softmax, in base 2: what was summed follows a maximum that rises.
            const float x = score[i] * book.unit * __half2float(norms[token]) * rsqrtf((float)D) * 1.4426950408889634f, m = fmaxf(top, x);
            sum = sum * exp2_fast(top - m) + exp2_fast(x - m);
            top = m;
        }
    }
    for (int i = 4; i < 32; i *= 2) {           // over g: the four lanes of a row hold the same
        const float other = __shfl_xor_sync(~0u, top, i), l = __shfl_xor_sync(~0u, sum, i), m = fmaxf(top, other);
        sum = sum * exp2_fast(top - m) + l * exp2_fast(other - m);
        top = m;
    }
    if (lane == 0) out[0] = (top + log2f(sum)) / 1.4426950408889634f;
}

template <class T> T *device(const std::vector<T> &v)
{
    T *p;
    CU(cudaMalloc((void **)&p, v.size() * sizeof(T)));
    CU(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> std::vector<T> host(const T *p, size_t n)
{
    std::vector<T> v(n);
    CU(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
static void fwht(std::vector<double> &v)
{
    for (size_t h = 1; h < v.size(); h *= 2)
        for (size_t i = 0; i < v.size(); i++)
            if (!(i & h)) { const double a = v[i], b = v[i + h]; v[i] = a + b; v[i + h] = a - b; }
    for (double &x : v) x /= std::sqrt((double)v.size());
}

// A centroid as the codebook's bytes have it: whole or half multiples of its unit, symmetric.
static double value_of(const codebook &c, double centroid)
{
    const double v = (std::floor(std::fabs(centroid) / c.unit - c.half + 0.5) + c.half) * c.unit;
    return centroid < 0 ? -v : v;
}

// Lloyd-Max levels of a unit normal, the positive half, and the share of the energy that their error keeps (J. Max, 1960).
static const std::vector<float> half_levels[5] = { {}, {}, { 0.452780f, 1.510418f }, { 0.245094f, 0.756005f, 1.343909f, 2.151946f },
    { 0.128395f, 0.388048f, 0.656759f, 0.942341f, 1.256231f, 1.618046f, 2.069017f, 2.732590f } };
static const double distortion[5] = { 0, 0, 0.1175, 0.03454, 0.009497 };

template <int BITS> static bool check(int n, unsigned seed)
{
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const std::vector<float> &h = half_levels[BITS];
    centroids c = {};
    for (size_t i = 0; i < h.size(); i++) c.at[h.size() + i] = h[i] / std::sqrt((float)D), c.at[h.size() - 1 - i] = -c.at[h.size() + i];
    const codebook book = codebook_of(BITS, c.at);
    std::vector<float> x((size_t)n * D), q(D);
    for (float &v : x) v = normal(rng) * 3;
    for (float &v : q) v = normal(rng) * 2;
    const int n_tiles = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    float *dx = device(x), *dq = device(q), *out = device(std::vector<float>(1, NAN));
    uint8_t *codes = device(std::vector<uint8_t>((size_t)n * D, 0xFF)), *tiles = device(std::vector<uint8_t>((size_t)n_tiles * side<BITS, D>::bytes, 0));
    __half *norms = device(std::vector<__half>(n, __float2half(NAN)));
    KV_LAUNCH(encode_kernel, (n + 3) / 4, 128, 0, 0, dx, n, c, BITS, codes, norms);
    CU(cudaGetLastError());
    KV_LAUNCH(pack_kernel<BITS>, (n_tiles + 31) / 32, 32, 0, 0, codes, n, tiles);
    CU(cudaGetLastError());
    KV_LAUNCH(lse_kernel<BITS>, 1, 32, 0, 0, tiles, norms, n, dq, book, out);
    CU(cudaGetLastError());
    CU(cudaDeviceSynchronize());

    const std::vector<uint8_t> got_codes = host(codes, (size_t)n * D);
    const std::vector<__half> got_norms = host(norms, n);
    const double got = host(out, 1)[0];
    std::vector<double> r(q.begin(), q.end()), score(n);
    fwht(r);
    double lost = 0, all = 0, top = -INFINITY, sum = 0;
    for (int t = 0; t < n; t++) {
        std::vector<double> y(x.begin() + (size_t)t * D, x.begin() + (size_t)(t + 1) * D);
        fwht(y);
        const double norm = __half2float(got_norms[t]);
        double dot = 0;
        for (int i = 0; i < D; i++) {
            const double value = norm * value_of(book, c.at[got_codes[(size_t)t * D + i]]);
            lost += (y[i] - value) * (y[i] - value), all += y[i] * y[i];
            dot += r[i] * value;
        }
        score[t] = dot / std::sqrt((double)D);
        top = std::max(top, score[t]);
    }
    for (double s : score) sum += std::exp(s - top);
    const double want = top + std::log(sum), off = std::fabs(got - want) / std::max(1.0, std::fabs(want));
    // f32 sums of 64 terms, base-2 exponentials good to 2^-22; the distortion of a few thousand numbers scatters by some percent.
    const bool good = off < 1e-5 && std::fabs(lost / all - distortion[BITS]) < 0.15 * distortion[BITS];
    printf("%s %d bits, %d keys: log-sum-exp %.6f, in double precision %.6f; %.4f of the energy lost (Lloyd-Max: %.4f)\n", good ? "ok  " : "FAIL", BITS, n, got, want, lost / all, distortion[BITS]);
    for (void *p : { (void *)dx, (void *)dq, (void *)out, (void *)codes, (void *)tiles, (void *)norms }) CU(cudaFree(p));
    return good;
}

int main()
{
    int failed = 0, n = 0;
    for (int keys : { 33, 257, 1024 }) {
        const bool ok[] = { check<4>(keys, 40u + keys), check<3>(keys, 30u + keys), check<2>(keys, 20u + keys) };
        for (bool x : ok) n++, failed += !x;
    }
    printf("%d checks, %d failed\n", n, failed);
    return failed != 0;
}
