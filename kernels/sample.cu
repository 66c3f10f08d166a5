// sample.cu -- from logits to a token, a block a row: core/sample.c's rules and its numbers.
//
// Candidates are ordered by logit, the lowest id first among equals.  Nothing is sorted: what is asked is where a running sum of weights in that order passes a
// value (the k-th candidate, top-p's share, the draw), and that is found by fixing two bits of the logit's 32 a pass, from the sums of the elements that share
// what is fixed so far.  Sums are in double but not in core/sample.c's order, so a draw that falls within 1e-13 of a border between two tokens may take the other one.
#include <math.h>
#include "rng.h"
#include "runner.cuh"

namespace kelvin {

enum { STREAM = 0x73 /* core/sample.c's */ };

// Ordered like the floats; -0 like 0.
static KV_DEVICE unsigned key_of(float z)
{
    union { float f; unsigned u; } x;
    x.f = z + 0.0f;
    return x.u & 0x80000000u ? ~x.u : x.u | 0x80000000u;
}
static KV_DEVICE float of_key(unsigned k)
{
    union { unsigned u; float f; } x;
    x.u = k & 0x80000000u ? k & 0x7fffffffu : ~k;
    return x.f;
}

struct crossing { unsigned key; double above; int equal; };     // the sum of what is before that key, and how many have it

// weight null: every element counts 1.  The first key at which the sum passes `target`, or reaches it with `reach`.
static KV_DEVICE crossing find(const float *z, const double *weight, int n, double target, bool reach, double *part)
{
    unsigned prefix = 0;
    double above = 0, last = 0;
    for (int shift = 30; shift >= 0; shift -= 2) {
        double s1 = 0, s2 = 0, s3 = 0, s0 = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const unsigned k = key_of(z[i]);
            if (shift < 30 && (k ^ prefix) >> (shift + 2)) continue;
            const double w = weight ? weight[i] : 1;
            const unsigned bits = k >> shift & 3;
            if (bits == 3) s3 += w;
            else if (bits == 2) s2 += w;
            else if (bits == 1) s1 += w;
            else s0 += w;
        }
        s3 = block_sum(s3, part);
        s2 = block_sum(s2, part);
        s1 = block_sum(s1, part);
        s0 = block_sum(s0, part);
        const double s[4] = { s0, s1, s2, s3 };
        // Rounding may leave the target past the end: then the last key that has any weight.
        int take = -1, some = -1;
        double before = above;
        for (int b = 3; b >= 0; b--) {
            if (s[b] <= 0) continue;
            some = b;
            if (reach ? before + s[b] >= target : before + s[b] > target) {
                take = b;
                break;
            }
            before += s[b];
        }
        if (take < 0) {
            take = some < 0 ? 0 : some;
            if (some >= 0) before -= s[some];
        }
        above = before;
        last = s[take];
        prefix |= (unsigned)take << shift;
    }
    int equal = 0;
    if (weight) {
        double count = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) count += key_of(z[i]) == prefix;
        equal = (int)block_sum(count, part);
    } else equal = (int)last;
    return { prefix, above, equal };
}

__global__ void sample_kernel(const float *logits, int n, const dev_sampler *sampler, const int *lengths, double *weights, int *next, int *out, int *step, int *bad)
{
    __shared__ double part[32];
    __shared__ float  top_z[32];
    __shared__ int    top_id[32];
    const int row = blockIdx.x, n_rows = gridDim.x;
    const float *z = logits + (size_t)row * n;
    double *w = weights + (size_t)row * n;

    float best = -INFINITY;
    int id = 0x7fffffff, wrong = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float x = z[i];
        wrong |= !(x < INFINITY);
        if (x > best || (x == best && i < id)) {
            best = x;
            id = i;
        }
    }
    for (int m = 16; m; m >>= 1) {
        const float x = __shfl_xor_sync(0xffffffffu, best, m);
        const int   i = __shfl_xor_sync(0xffffffffu, id, m);
        if (x > best || (x == best && i < id)) {
            best = x;
            id = i;
        }
    }
    if (threadIdx.x % 32 == 0) {
        top_z[threadIdx.x / 32] = best;
        top_id[threadIdx.x / 32] = id;
    }
    if (wrong) *bad = 1;
    __syncthreads();
    for (int v = 0; v < (int)blockDim.x / 32; v++)
        if (top_z[v] > best || (top_z[v] == best && top_id[v] < id)) {
            best = top_z[v];
            id = top_id[v];
        }
    if (id < 0 || id >= n) id = 0;          // all NaN
    int token = id;
    const double temperature = sampler->temperature;
    if (temperature > 0 && sampler->top_k != 1) {
        double total = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            w[i] = exp(((double)z[i] - (double)best) / temperature);
            total += w[i];
        }
        total = block_sum(total, part);
        if (sampler->top_k > 0 && sampler->top_k < n) {
            const crossing c = find(z, nullptr, n, (double)sampler->top_k, true, part);
            double before = 0;
            for (int i = threadIdx.x; i < n; i += blockDim.x) before += key_of(z[i]) > c.key ? w[i] : 0;
            total = block_sum(before, part) + ((double)sampler->top_k - c.above) * exp(((double)of_key(c.key) - (double)best) / temperature);
        }
        double kept = total;
        if (sampler->top_p > 0 && sampler->top_p < 1) {
            const double share = sampler->top_p * total;
            const crossing c = find(z, w, n, share, true, part);
            const double each = exp(((double)of_key(c.key) - (double)best) / temperature), need = ceil((share - c.above) / each);
            kept = c.above + (need < 1 ? 1 : need > c.equal ? c.equal : need) * each;
            kept = kept < total ? kept : total;
        }
        const unsigned number = (unsigned)lengths[row];
        const uint32_t counter[4] = { number / 4, 0, STREAM, 0 }, seed[2] = { sampler->seed_lo, sampler->seed_hi };
        uint32_t x[4];
        kv_philox(counter, seed, x);
        const float unit = (float)(((double)x[number % 4] + 0.5) * 0x1p-32), u = unit < 0x1.fffffep-1f ? unit : 0x1.fffffep-1f;
        const double left = (double)u * kept;
        const crossing c = find(z, w, n, left, false, part);
        const double each = exp(((double)of_key(c.key) - (double)best) / temperature);
        int rank = (int)((left - c.above) / each);
        rank = rank < 0 ? 0 : rank >= c.equal ? c.equal - 1 : rank;
        // The rank-th id of those with that key: one in nearly all cases.
        __shared__ int found;
        if (threadIdx.x == 0) found = id;
        __syncthreads();
        if (c.equal == 1) {
            for (int i = threadIdx.x; i < n; i += blockDim.x) if (key_of(z[i]) == c.key) found = i;
        } else if (threadIdx.x == 0) {
            for (int i = 0; i < n; i++)
                if (key_of(z[i]) == c.key && rank-- == 0) {
                    found = i;
                    break;
                }
        }
        __syncthreads();
        token = found;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    next[row] = token;
    out[(size_t)step[row] * n_rows + row] = token;
    step[row]++;
}

cudaError_t sample_rows(const float *logits, int n_rows, int n_vocab, const dev_sampler *s, const int *lengths, double *weights, int *next, int *out, int *step, int *bad, cudaStream_t stream)
{
    KV_LAUNCH((sample_kernel), dim3(n_rows), dim3(n_vocab > 16384 ? 1024 : 256), 0, stream, logits, n_vocab, s, lengths, weights, next, out, step, bad);
    return cudaGetLastError();
}

}  // namespace kelvin
