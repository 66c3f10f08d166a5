// score.cu -- an arm's logits against the reference's: core/eval.h's definitions, a block a row.
//
// Exponentials and sums are in double, as in core/head.c and for its reason; their order is fixed by the number of threads.  Equal logits make every term of a zero and
// both sums equal: kld is exactly 0.
#include <math.h>
#include "runner.cuh"

namespace kelvin {

enum { SCORE_THREADS = 256 };

struct top_of { float z; int id; };

static KV_DEVICE top_of better(top_of a, float z, int id) { return z > a.z || (z == a.z && id < a.id) ? top_of{ z, id } : a; }

// The largest of a row, the lowest id among equals.
static KV_DEVICE top_of block_top(const float *z, int n, top_of *part)
{
    top_of t = { -INFINITY, 0x7fffffff };
    for (int i = threadIdx.x; i < n; i += blockDim.x) t = better(t, z[i], i);
    for (int m = 16; m; m >>= 1) {
        const float v = __shfl_xor_sync(0xffffffffu, t.z, m);
        const int   i = __shfl_xor_sync(0xffffffffu, t.id, m);
        t = better(t, v, i);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = t;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; w++) t = better(t, part[w].z, part[w].id);
    return t;
}

__global__ void score_kernel(const float *z_ref, const float *z_arm, const int *target, int n_vocab, float *out, int out_ld)
{
    __shared__ double sums[32];
    __shared__ top_of tops[32];
    const int row = blockIdx.x;
    const float *r = z_ref + (size_t)row * n_vocab, *a = z_arm + (size_t)row * n_vocab;
    const top_of tr = block_top(r, n_vocab, tops), ta = block_top(a, n_vocab, tops);
    const double mr = tr.z, ma = ta.z;
    double sr = 0, sa = 0, d = 0;
    for (int i = threadIdx.x; i < n_vocab; i += blockDim.x) {
        const double x = r[i], y = a[i], e = exp(x - mr);
        sr += e;
        sa += exp(y - ma);
        d += e * (x - y);
    }
    sr = block_sum(sr, sums);
    sa = block_sum(sa, sums);
    d = block_sum(d, sums);
    if (threadIdx.x != 0) return;
    const double lse_ref = mr + log(sr), lse = ma + log(sa), nll_ref = lse_ref - (double)r[target[row]], nll = lse - (double)a[target[row]];
    out[row] = (float)(d / sr - (lse_ref - lse));
    out[out_ld + row] = (float)nll;
    out[2 * out_ld + row] = (float)nll_ref;
    out[3 * out_ld + row] = (float)(exp(-nll) - exp(-nll_ref));
    out[4 * out_ld + row] = tr.id == ta.id ? 1.0f : 0.0f;
}

cudaError_t score_rows(const float *z_ref, const float *z_arm, const int *target, int n_rows, int n_vocab, float *out, int out_ld, cudaStream_t stream)
{
    KV_LAUNCH((score_kernel), dim3(n_rows), dim3(SCORE_THREADS), 0, stream, z_ref, z_arm, target, n_vocab, out, out_ld);
    return cudaGetLastError();
}

}  // namespace kelvin
