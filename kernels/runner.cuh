// runner.cuh -- the inside of the model runner: runner.cu has its life and its steps, products.cu weights times activations,
// layer_ops.cu what lies between, score.cu and sample.cu what is made of logits.
//
// Rows: lane l's n new tokens are rows [l n, (l + 1) n) of every activation buffer, f32 and contiguous.
#pragma once
#include "backend.h"
#include "launch.cuh"
#include "status.cuh"

namespace kelvin {

// ---- weights.  Blocks are taken apart at upload: what is not a multiple of 4 bytes (scales) goes to `head`, so that payload words are aligned.
struct dev_weight {
    int            type;                   // ggml's number
    int            n_in, n_out;
    size_t         payload_row, head_row;  // bytes
    const uint8_t *payload, *head;
};

struct dev_product { const dev_weight *w; const float *bias; float *y; };       // y [rows][n_out]; the products of a call have the same n_in
enum {
    MAX_PRODUCTS = 3,
    MATVEC_ROWS = 8,                       // up to here a product waits for weights: read them once, as they are stored
    BF16_ROWS = 4,                         // the same where cuBLAS has bf16: a step of 8 rows of an 8B model took 13.7 ms as matvec on an H200, one of 64 rows 7.4 ms
};

struct dev_layer {
    dev_weight   wq, wk, wv, wo, w_gate, w_up, w_down;
    const float *bq, *bk, *bv, *bo, *b_gate, *b_up, *b_down, *attn_norm, *ffn_norm, *q_norm, *k_norm, *post_attn_norm, *post_ffn_norm;
    float        scale, softcap;
    int          table;                    // of its RoPE frequencies
};

struct dev_blas;                           // cuBLAS, when it is there
int          blas_open(dev_blas **out, cudaStream_t stream, char *err, size_t cap);      // *out null: not there, which is no error
void         blas_close(dev_blas *b);
const char  *blas_name(const dev_blas *b);

struct dev_sampler { double temperature, top_p; unsigned seed_lo, seed_hi; int top_k; };

struct product_space {                     // what products of more rows work in
    dev_blas *blas;
    float    *weights;                     // [weights_cap] dequantized rows
    size_t    weights_cap;
    uint16_t *act;                         // [act_cap] activations in bf16; null: products in f32 alone
    size_t    act_cap;
};

// ---- products.cu
size_t      weight_stored_bytes(int type, int64_t n_in, int64_t n_out, size_t *payload_row, size_t *head_row);      // 0: the type is unknown
// Rows [row0, row0 + n) of a matrix of ggml blocks, `stored` on the device, into their place.
cudaError_t weight_peel(const dev_weight &w, const uint8_t *stored, size_t row_bytes, int row0, int n, cudaStream_t stream);
cudaError_t weight_to_bf16(const dev_weight &src, int row0, int n, uint16_t *dst, cudaStream_t stream);
cudaError_t weight_random(uint16_t *dst, int n_in, int n_out, unsigned seed, cudaStream_t stream);                  // variance 1 / n_in
// y = x W^T + bias, `groups` times `rows` rows.  A row's result depends on nothing but the row and `rows`: not on its group, not on what else
// is multiplied along.
cudaError_t product(const product_space &s, const dev_product *p, int n_products, const float *x, int groups, int rows, cudaStream_t stream);
cudaError_t embed_rows(const dev_weight &w, const int *tokens, int n, int n_tokens /* row r reads tokens[r % n_tokens] */, float scale, float *x, cudaStream_t stream);

// ---- layer_ops.cu
// x += (post ? h / rms(h) * post : h) if add; then, with next, h = x / rms(x) * next.
cudaError_t residual_norm(float *x, float *h, bool add, const float *post, const float *next, int n_rows, int n, float eps, cudaStream_t stream);
// cosine, sine [n_tables][cap_rows][half], rows row0 .. of n_seqs sequences of n tokens that begin at lengths[]; freq [n_tables][half].
cudaError_t rope_tables(const int *lengths, int n_seqs, int n, int row0, const double *freq, int n_tables, int half, int cap_rows, float *cosine, float *sine, cudaStream_t stream);
struct qk_args {
    float       *q, *k, *q_pre, *k_pre;    // *_pre or null: copies before RoPE
    const float *q_norm, *k_norm, *cosine, *sine;    // norms or null; tables of this layer
    int          n_heads, n_kv_heads, head_dim, half;
    float        eps;
};
cudaError_t norm_and_rope(const qk_args &a, int n_rows, cudaStream_t stream);
cudaError_t gate(float *g, const float *up, size_t n, int activation, cudaStream_t stream);
cudaError_t soft_cap(float *x, size_t n, float cap, cudaStream_t stream);

// ---- score.cu: out [5][n_rows]: kld, nll, nll_ref, dp, same_top1
cudaError_t score_rows(const float *z_ref, const float *z_arm, const int *target, int n_rows, int n_vocab, float *out, int out_ld, cudaStream_t stream);

// ---- sample.cu: one token of each row of logits, by the number lengths[row] of the seed's stream; into next[row] and out[step[row]][row].  weights [n_rows][n_vocab]:
// scratch.  bad: 1 when a logit is NaN or inf.
cudaError_t sample_rows(const float *logits, int n_rows, int n_vocab, const dev_sampler *s, const int *lengths, double *weights, int *next, int *out, int *step, int *bad, cudaStream_t stream);

#ifdef __CUDACC__
#define KV_DEVICE __device__ __forceinline__
#else
#define KV_DEVICE __device__ inline
#endif

static KV_DEVICE double warp_sum(double x)
{
    for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(0xffffffffu, x, m);
    return x;
}

// Of all threads of a block of whole warps; part: [32] shared.
static KV_DEVICE double block_sum(double x, double *part)
{
    const int warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();                        // the last use of part
    if (threadIdx.x % 32 == 0) part[warp] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < n_warps; w++) sum += part[w];
    return sum;
}

}  // namespace kelvin
