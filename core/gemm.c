/* gemm.c -- the matrix products of prefill: OpenBLAS's sgemm, one call a thread, over weights dequantized in blocks.
 *
 * A task dequantizes a block of output rows into scratch and multiplies it with its share of the lanes and tokens.  A product
 * never spans two lanes, and shapes depend on the weight and on n alone, so that results are the same for any number of
 * threads and lanes: identical caches give identical logits. */
#include <cblas.h>
#include <pthread.h>
#include "model.h"

void openblas_set_num_threads(int n);

enum {
    SCRATCH_FLOATS = 1024 * 1536,             /* 6 MB: large blocks pay, since OpenBLAS packs the other side again for each one */
    MAX_ROWS = 1024, ROW_STEP = 16,           /* rows of OpenBLAS's widest kernel */
    MAX_TOKENS = 256                          /* of one product: what a thread takes when there is one lane */
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static void single_thread(void) { openblas_set_num_threads(1); }

void kv_blas_single_thread(void) { pthread_once(&once, single_thread); }

static void sgemm(CBLAS_TRANSPOSE tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc)
{
    kv_blas_single_thread();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void kv_sgemm_nt(int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc)
{
    sgemm(CblasTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void kv_sgemm_nn(int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc)
{
    sgemm(CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* ---- scratch: one buffer a thread, grown as needed, freed when the thread ends */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static _Thread_local struct { float *p; size_t n; } scratch;

static void free_scratch(void *p) { kv_free(p); }
static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

static float *scratch_floats(size_t n)
{
    if (n <= scratch.n) return scratch.p;
    pthread_once(&scratch_once, make_scratch_key);
    kv_free(scratch.p);
    scratch.p = kv_alloc_array(n, sizeof(float), false);
    scratch.n = scratch.p ? n : 0;
    pthread_setspecific(scratch_key, scratch.p);
    return scratch.p;
}

/* ---- linear layers */

typedef struct {
    const kv_weight *w;
    int n_lanes, n, rows, n_blocks, n_pieces, per_share;     /* pieces: lanes times runs of MAX_TOKENS; a task takes per_share of them */
    const float *const *x;
    float *const *y;
    const float *bias;
    atomic_int status;
} linear_job;

static void linear_task(void *ctx, int task, int thread)
{
    (void)thread;
    linear_job *const job = ctx;
    const kv_weight *const w = job->w;
    const int64_t row0 = (int64_t)(task % job->n_blocks) * job->rows;
    const int n_in = (int)w->n_in, n_out = (int)w->n_out, rows = (int)kv_min64(job->rows, w->n_out - row0);
    const float *block;
    if (w->type == KV_W_F32 && (uintptr_t)w->data % sizeof(float) == 0) block = (const float *)(const void *)w->data + row0 * n_in;
    else {
        float *const own = scratch_floats((size_t)job->rows * (size_t)n_in);
        if (!own) {
            atomic_store(&job->status, KV_E_NOMEM);
            return;
        }
        kv_weight_rows(w, row0, rows, own);
        block = own;
    }
    const int first = task / job->n_blocks * job->per_share, last = kv_min(first + job->per_share, job->n_pieces), runs = job->n_pieces / job->n_lanes;
    for (int i = first; i < last; i++) {
        const int t0 = i % runs * MAX_TOKENS, n = kv_min(MAX_TOKENS, job->n - t0);
        float *const y = job->y[i / runs] + (size_t)t0 * (size_t)n_out + row0;
        kv_sgemm_nt(n, rows, n_in, 1, job->x[i / runs] + (size_t)t0 * (size_t)n_in, n_in, block, n_in, 0, y, n_out);
        for (int t = 0; job->bias && t < n; t++)
            for (int r = 0; r < rows; r++) y[(size_t)t * (size_t)n_out + (size_t)r] += job->bias[row0 + r];
    }
}

int kv_linear(const kv_weight *w, int n_lanes, int n, const float *const *x, float *const *y, const float *bias)
{
    /* Two blocks a matrix whatever the number of threads: OpenBLAS takes another kernel for small products, so where rows are
     * cut decides the last bit.  Who takes which lane and which run of tokens does not. */
    const int64_t fit = kv_max64(SCRATCH_FLOATS / w->n_in / ROW_STEP * ROW_STEP, ROW_STEP);
    const int64_t rows = kv_min64(kv_min64(fit, MAX_ROWS), (int64_t)kv_round_up((size_t)((w->n_out + 1) / 2), ROW_STEP));
    const int n_blocks = (int)((w->n_out + rows - 1) / rows), n_pieces = n_lanes * ((n + MAX_TOKENS - 1) / MAX_TOKENS);
    const int shares = kv_min(n_pieces, (kv_threads() + n_blocks - 1) / n_blocks), per_share = (n_pieces + shares - 1) / shares;
    linear_job job = { w, n_lanes, n, (int)rows, n_blocks, n_pieces, per_share, x, y, bias, KV_OK };
    kv_parallel(n_blocks * ((n_pieces + per_share - 1) / per_share), linear_task, &job);
    const int status = atomic_load(&job.status);
    return status < 0 ? kv_set_error(status, "out of memory: scratch for %lld rows of %lld values", (long long)rows, (long long)w->n_in) : KV_OK;
}
