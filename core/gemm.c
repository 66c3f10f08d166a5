/* gemm.c -- the matrix products of prefill: weights dequantized in blocks, multiplied with every lane's activations.
 *
 * Where the processor has AMX, products run on its tiles (amx.c): an element's bits depend on its two rows alone, so work is
 * cut as threads and caches like it.  Elsewhere it is OpenBLAS's sgemm, one call a thread: a task dequantizes a block of
 * output rows into scratch and multiplies it with its share of the lanes and tokens.  There a product never spans two lanes, and
 * shapes depend on the weight and on n alone.  Either way results are the same for any number of threads and lanes:
 * identical caches give identical logits. */
#include <cblas.h>
#include <pthread.h>
#include "amx.h"
#include "model.h"

void openblas_set_num_threads(int n);

enum {
    SCRATCH_FLOATS = 1024 * 1536,             /* 6 MB: large blocks pay, since OpenBLAS packs the other side again for each one */
    MAX_ROWS = 1024, ROW_STEP = 16,           /* rows of OpenBLAS's widest kernel */
    MAX_TOKENS = 256,                         /* of one product: what a thread takes when there is one lane */
    RIGHT_BYTES = 16 << 20,                   /* AMX: packed weights of one pass, in the last level cache */
    LEFT_BYTES = 768 << 10, MAX_STRIP = 256,  /* AMX: packed activations of a task, most of an L2 beside the weights that stream by */
    TASKS_A_THREAD = 4                        /* AMX: at least, so that threads finish together */
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

/* ---- scratch: two buffers a thread, grown as needed, freed when the thread ends */

enum { OWN, SHARED };                         /* of the task in work; for all tasks of the job that this thread started */

static pthread_key_t scratch_key[2];
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static _Thread_local struct { void *p; size_t n; } scratch[2];

static void free_scratch(void *p) { kv_free(p); }
static void make_scratch_keys(void)
{
    for (int i = 0; i < 2; i++) pthread_key_create(&scratch_key[i], free_scratch);
}

static void *scratch_bytes(int which, size_t n)
{
    if (n <= scratch[which].n) return scratch[which].p;
    pthread_once(&scratch_once, make_scratch_keys);
    kv_free(scratch[which].p);
    scratch[which].p = kv_alloc(n);
    scratch[which].n = scratch[which].p ? n : 0;
    pthread_setspecific(scratch_key[which], scratch[which].p);
    return scratch[which].p;
}

/* ---- linear layers */

typedef struct linear_job {
    const kv_product *p;                      /* [n_products], the same input for all */
    int n_products, n_lanes, n, n_in;
    const float *const *x;
    atomic_int status;
    /* OpenBLAS: product i has n_blocks[i] blocks of rows[i]; pieces: lanes times runs of MAX_TOKENS; a task takes per_share of them */
    int rows[KV_MAX_PRODUCTS], n_blocks[KV_MAX_PRODUCTS], n_pieces, per_share;
    /* AMX: blocks of KV_AMX_BLOCK rows, counted through all products; this pass has block0 .. block1-1 packed in `right` */
    int block0, block1, strip, n_parts;
    char *right;
} linear_job;

/* Rows of w as f32: where they lie, or dequantized into own scratch; NULL without memory. */
static const float *weight_rows(linear_job *job, const kv_weight *w, int64_t row0, int n)
{
    if (w->type == KV_W_F32 && (uintptr_t)w->data % sizeof(float) == 0) return (const float *)(const void *)w->data + row0 * w->n_in;
    float *const own = scratch_bytes(OWN, sizeof(float) * (size_t)n * (size_t)w->n_in);
    if (own) kv_weight_rows(w, row0, n, own);
    else atomic_store(&job->status, KV_E_NOMEM);
    return own;
}

static void add_bias(const float *bias, int rows, int n, float *y, int64_t ld)
{
    for (int t = 0; bias && t < n; t++)
        for (int r = 0; r < rows; r++) y[t * ld + r] += bias[r];
}

static void linear_task(void *ctx, int task, int thread)
{
    (void)thread;
    linear_job *const job = ctx;
    int i = 0, all_blocks = 0;
    for (int j = 0; j < job->n_products; j++) all_blocks += job->n_blocks[j];
    int b = task % all_blocks;
    while (b >= job->n_blocks[i]) b -= job->n_blocks[i++];
    const kv_product *const p = &job->p[i];
    const int64_t row0 = (int64_t)b * job->rows[i];
    const int n_in = job->n_in, n_out = (int)p->w->n_out, rows = (int)kv_min64(job->rows[i], n_out - row0);
    const float *const block = weight_rows(job, p->w, row0, rows);
    if (!block) return;
    const int first = task / all_blocks * job->per_share, last = kv_min(first + job->per_share, job->n_pieces), runs = job->n_pieces / job->n_lanes;
    for (int piece = first; piece < last; piece++) {
        const int t0 = piece % runs * MAX_TOKENS, n = kv_min(MAX_TOKENS, job->n - t0);
        float *const y = p->y[piece / runs] + (size_t)t0 * (size_t)n_out + row0;
        kv_sgemm_nt(n, rows, n_in, 1, job->x[piece / runs] + (size_t)t0 * (size_t)n_in, n_in, block, n_in, 0, y, n_out);
        add_bias(p->bias ? p->bias + row0 : NULL, rows, n, y, n_out);
    }
}

static void linear_blas(linear_job *job)
{
    /* Two blocks a matrix whatever the number of threads: OpenBLAS takes another kernel for small products, so where rows are
     * cut decides the last bit.  Who takes which lane and which run of tokens does not. */
    int n_blocks = 0;
    for (int i = 0; i < job->n_products; i++) {
        const kv_weight *const w = job->p[i].w;
        const int64_t fit = kv_max64(SCRATCH_FLOATS / w->n_in / ROW_STEP * ROW_STEP, ROW_STEP);
        job->rows[i] = (int)kv_min64(kv_min64(fit, MAX_ROWS), (int64_t)kv_round_up((size_t)((w->n_out + 1) / 2), ROW_STEP));
        n_blocks += job->n_blocks[i] = (int)((w->n_out + job->rows[i] - 1) / job->rows[i]);
    }
    job->n_pieces = job->n_lanes * ((job->n + MAX_TOKENS - 1) / MAX_TOKENS);
    const int shares = kv_min(job->n_pieces, (kv_threads() + n_blocks - 1) / n_blocks);
    job->per_share = (job->n_pieces + shares - 1) / shares;
    kv_parallel(n_blocks * ((job->n_pieces + job->per_share - 1) / job->per_share), linear_task, job);
}

/* ---- the same on tiles */

static int blocks_of(const kv_weight *w) { return (int)((w->n_out + KV_AMX_BLOCK - 1) / KV_AMX_BLOCK); }

static void pack_task(void *ctx, int task, int thread)
{
    (void)thread;
    linear_job *const job = ctx;
    int i = 0, b = job->block0 + task;
    while (b >= blocks_of(job->p[i].w)) b -= blocks_of(job->p[i++].w);
    const kv_weight *const w = job->p[i].w;
    const int64_t row0 = (int64_t)b * KV_AMX_BLOCK;
    const int rows = (int)kv_min64(KV_AMX_BLOCK, w->n_out - row0);
    const float *const block = weight_rows(job, w, row0, rows);
    if (block) kv_amx_pack_right(block, job->n_in, rows, job->n_in, job->right + kv_amx_bytes((int64_t)task * KV_AMX_BLOCK, job->n_in));
}

static void strip_task(void *ctx, int task, int thread)
{
    (void)thread;
    linear_job *const job = ctx;
    const int strips = (job->n + job->strip - 1) / job->strip, n_in = job->n_in, part = task % job->n_parts, lane = task / job->n_parts / strips;
    const int t0 = task / job->n_parts % strips * job->strip, n = kv_min(job->strip, job->n - t0), n_blocks = job->block1 - job->block0;
    const int from = job->block0 + (int)((int64_t)n_blocks * part / job->n_parts), to = job->block0 + (int)((int64_t)n_blocks * (part + 1) / job->n_parts);
    void *const left = scratch_bytes(OWN, kv_amx_bytes(n, n_in));
    if (!left) {
        atomic_store(&job->status, KV_E_NOMEM);
        return;
    }
    kv_amx_pack_left(job->x[lane] + (size_t)t0 * (size_t)n_in, n_in, n, n_in, 1, left);
    for (int i = 0, before = 0; i < job->n_products; before += blocks_of(job->p[i++].w)) {
        const kv_product *const p = &job->p[i];
        const int b0 = kv_max(from, before), b1 = kv_min(to, before + blocks_of(p->w));
        if (b0 >= b1) continue;
        const int64_t n_out = p->w->n_out, row0 = (int64_t)(b0 - before) * KV_AMX_BLOCK;
        const int rows = (int)kv_min64((int64_t)(b1 - b0) * KV_AMX_BLOCK, n_out - row0);
        float *const y = p->y[lane] + t0 * n_out + row0;
        kv_amx_multiply(left, n_in, n, job->right + kv_amx_bytes((int64_t)(b0 - job->block0) * KV_AMX_BLOCK, n_in), n_in, rows, n_in, false, y, n_out);
        add_bias(p->bias ? p->bias + row0 : NULL, rows, n, y, n_out);
    }
}

static void linear_amx(linear_job *job)
{
    const size_t row_bytes = kv_amx_bytes(1, job->n_in) / KV_AMX_BLOCK;
    const int pass = kv_max(1, (int)(RIGHT_BYTES / (row_bytes * KV_AMX_BLOCK))), fit = (int)(LEFT_BYTES / row_bytes) / KV_AMX_BLOCK * KV_AMX_BLOCK;
    int all = 0;
    for (int i = 0; i < job->n_products; i++) all += blocks_of(job->p[i].w);
    job->strip = kv_max(KV_AMX_BLOCK, kv_min(fit, MAX_STRIP));
    job->right = scratch_bytes(SHARED, row_bytes * KV_AMX_BLOCK * (size_t)kv_min(pass, all));
    if (!job->right) {
        atomic_store(&job->status, KV_E_NOMEM);
        return;
    }
    const int strips = job->n_lanes * ((job->n + job->strip - 1) / job->strip), want = TASKS_A_THREAD * kv_threads();
    for (job->block0 = 0; job->block0 < all; job->block0 = job->block1) {
        job->block1 = kv_min(job->block0 + pass, all);
        kv_parallel(job->block1 - job->block0, pack_task, job);
        if (atomic_load(&job->status) < 0) return;
        job->n_parts = kv_min((want + strips - 1) / strips, job->block1 - job->block0);
        kv_parallel(strips * job->n_parts, strip_task, job);
    }
}

int kv_linear(const kv_product *p, int n_products, int n_lanes, int n, const float *const *x)
{
    linear_job job = { .p = p, .n_products = n_products, .n_lanes = n_lanes, .n = n, .n_in = (int)p->w->n_in, .x = x, .status = KV_OK };
    if (kv_amx()) linear_amx(&job);
    else linear_blas(&job);
    const int status = atomic_load(&job.status);
    return status < 0 ? kv_set_error(status, "out of memory: scratch for rows of %lld values", (long long)p->w->n_in) : KV_OK;
}
