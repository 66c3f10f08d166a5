/* kvtc_basis.c -- principal components over layers and heads: from the smaller Gram matrix, or by randomized SVD.
 *
 * A row is one token's keys before RoPE (or as cached: the ablation), or its values, of the slots that share a basis.  The last
 * quarter of the calibration rows is kept out: on its own rows a basis of nearly as many components as rows looks perfect, so bits
 * are decided on rows that it has not seen. */
#include <math.h>
#include <stdio.h>
#include "eigen.h"
#include "kvtc_impl.h"

void sgeqrf_(const int *m, const int *n, float *a, const int *lda, float *tau, float *work, const int *lwork, int *info);
void sorgqr_(const int *m, const int *n, const int *k, float *a, const int *lda, const float *tau, float *work, const int *lwork, int *info);

/* ---- products by all threads.  Tiles are the same whatever the number of threads, and so are the bits of the result. */

enum { TILE_ROWS = 256, TILE_COLS = 512 };
typedef struct gemm_job { int nt, m, n, k, ldb, add; const float *a, *b; float *c; } gemm_job;

static void gemm_tile(void *ctx, int task, int thread)
{
    (void)thread;
    const gemm_job *j = ctx;
    const int cols = (j->n + TILE_COLS - 1) / TILE_COLS, r0 = task / cols * TILE_ROWS, c0 = task % cols * TILE_COLS;
    const int rows = kv_min(TILE_ROWS, j->m - r0), width = kv_min(TILE_COLS, j->n - c0);
    const float *a = j->a + (size_t)r0 * (size_t)j->k, *b = j->b + (j->nt ? (size_t)c0 * (size_t)j->ldb : (size_t)c0);
    (j->nt ? kv_sgemm_nt : kv_sgemm_nn)(rows, width, j->k, 1, a, j->k, b, j->ldb, j->add ? 1 : 0, j->c + (size_t)r0 * (size_t)j->n + c0, j->n);
}

void kvtc_gemm(int nt, int m, int n, int k, const float *a, const float *b, int ldb, int add, float *c)
{
    gemm_job job = { nt, m, n, k, ldb, add, a, b, c };
    if (m && n && k) kv_parallel((m + TILE_ROWS - 1) / TILE_ROWS * ((n + TILE_COLS - 1) / TILE_COLS), gemm_tile, &job);
}

/* ---- components */

/* v = rows of u^T b, each divided by the square root of its eigenvalue: u [rank][k] eigenvectors of b b^T, b [k][p]. */
static int lift(const double *u, const double *value, int rank, int k, const float *b, int p, float *v)
{
    float *w = kv_alloc_array((size_t)rank * (size_t)k, sizeof *w, false);
    if (!w) return KV_E_NOMEM;
    for (int i = 0; i < rank; i++)
        for (int j = 0; j < k; j++) w[(size_t)i * (size_t)k + (size_t)j] = (float)(u[(size_t)i * (size_t)k + (size_t)j] / sqrt(fmax(value[i], 1e-30)));
    kvtc_gemm(0, rank, p, k, w, b, p, 0, v);
    kv_free(w);
    return KV_OK;
}

/* Eigenvectors of b b^T, b [k][p], lifted to `rank` rows of length p at most.  Of what float products cannot tell from 0 there are none. */
static int by_rows(const float *b, int k, int p, int rank, float *v)
{
    int status = KV_E_NOMEM;
    float *gram = kv_alloc_array((size_t)k * (size_t)k, sizeof *gram, false);
    double *a = kv_alloc_array((size_t)k * (size_t)k + (size_t)k, sizeof *a, false), *value = a ? a + (size_t)k * (size_t)k : NULL;
    if (!gram || !a) goto fail;
    kvtc_gemm(1, k, k, p, b, b, p, 0, gram);
    for (size_t i = 0; i < (size_t)k * (size_t)k; i++) a[i] = gram[i];
    FAIL_IF_ERROR(kv_eigen_symmetric(a, k, value));
    rank = kv_min(rank, k);
    while (rank > 1 && value[rank - 1] <= 1e-6 * value[0]) rank--;
    FAIL_IF_ERROR(lift(a, value, rank, k, b, p, v));
    status = rank;
fail:
    kv_free(gram);
    kv_free(a);
    return status;
}

/* Eigenvectors of x^T x, x [n][p]. */
static int by_columns(const float *x, int n, int p, int rank, float *v)
{
    int status = KV_E_NOMEM;
    float *turned = kv_alloc_array((size_t)n * (size_t)p, sizeof *turned, false), *gram = kv_alloc_array((size_t)p * (size_t)p, sizeof *gram, false);
    double *a = kv_alloc_array((size_t)p * (size_t)p + (size_t)p, sizeof *a, false), *value = a ? a + (size_t)p * (size_t)p : NULL;
    if (!turned || !gram || !a) goto fail;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < p; i++) turned[(size_t)i * (size_t)n + (size_t)t] = x[(size_t)t * (size_t)p + (size_t)i];
    kvtc_gemm(0, p, p, n, turned, x, p, 0, gram);
    for (size_t i = 0; i < (size_t)p * (size_t)p; i++) a[i] = gram[i];
    FAIL_IF_ERROR(kv_eigen_symmetric(a, p, value));
    rank = kv_min(rank, p);
    while (rank > 1 && value[rank - 1] <= 1e-6 * value[0]) rank--;
    for (size_t i = 0; i < (size_t)rank * (size_t)p; i++) v[i] = (float)a[i];
    status = rank;
fail:
    kv_free(turned);
    kv_free(gram);
    kv_free(a);
    return status;
}

/* The k rows of y [k][n], k <= n, made orthonormal: Householder's QR of y^T, which is what LAPACK sees in our rows. */
static int orthonormal(float *y, int k, int n)
{
    int info = 0, n_work = 64 * k;
    float *tau = kv_alloc_array((size_t)k, sizeof *tau, false), *work = kv_alloc_array((size_t)n_work, sizeof *work, false);
    if (tau && work) {
        kv_blas_single_thread();
        sgeqrf_(&n, &k, y, &n, tau, work, &n_work, &info);
        if (info == 0) sorgqr_(&n, &k, &k, y, &n, tau, work, &n_work, &info);
    }
    const bool got = tau && work;
    kv_free(tau);
    kv_free(work);
    if (!got) return KV_E_NOMEM;
    RETURN_ERROR_IF(info != 0, KV_E_ARG, "kvtc: %d rows of %d numbers cannot be made orthonormal (%d)", k, n, info);
    return KV_OK;
}

/* A random subspace of a few more dimensions than asked, turned towards the largest components by power iterations; then the
 * components within it. */
static int by_random(const float *x, int n, int p, int rank, double seed, float *v)
{
    enum { MORE = 16 };
    const int k = kv_min(rank + MORE, kv_min(n, p));
    int status = KV_E_NOMEM;
    float *z = kv_alloc_array((size_t)k * (size_t)p, sizeof *z, false), *y = kv_alloc_array((size_t)k * (size_t)n, sizeof *y, false);
    if (!z || !y) goto fail;
    for (int i = 0; i < k; i++) FAIL_IF_ERROR(kv_rng_normal(seed, i, 0, p, z + (size_t)i * (size_t)p));
    for (int i = 0; i <= KVTC_ITERATIONS; i++) {
        kvtc_gemm(1, k, n, p, z, x, p, 0, y);
        FAIL_IF_ERROR(orthonormal(y, k, n));
        kvtc_gemm(0, k, p, n, y, x, p, 0, z);
        if (i < KVTC_ITERATIONS) FAIL_IF_ERROR(orthonormal(z, k, p));
    }
    status = by_rows(z, k, p, rank, v);
fail:
    kv_free(z);
    kv_free(y);
    return status;
}

int kvtc_components(const float *x, int n, int p, int rank, int randomized, double seed, float *v)
{
    rank = kv_min(rank, kv_min(n, p));
    const int got = randomized ? by_random(x, n, p, rank, seed, v) : n < p ? by_rows(x, n, p, rank, v) : by_columns(x, n, p, rank, v);
    for (size_t i = 0; got > 0 && i < (size_t)got * (size_t)p; i++) v[i] = kv_f16_to_f32(kv_f32_to_f16(v[i]));
    return got;
}

/* ---- from a calibration */

/* Row t of `n` is row t n_sample / n of what was kept, so that fewer rows come from the whole text too. */
static int gather_rows(const kvtc_basis *b, const kvtc_space *s, const kv_calib *c, int side, int n, float *x)
{
    const int d = b->m->info.head_dim, wide = s->h1 - s->h0;
    float *rows = kv_alloc_array((size_t)c->n_sample * (size_t)d, sizeof *rows, false);
    int status = rows ? KV_OK : KV_E_NOMEM;
    for (int slot = 0; slot < s->n_layers * wide && status >= 0; slot++) {
        const int layer = s->layer[slot / wide];
        status = kv_calib_rows(c, side == KV_SIDE_K ? KV_CALIB_K_PRE : KV_CALIB_V, layer, s->h0 + slot % wide, rows);
        for (int t = 0; t < n && status >= 0; t++) {
            const int from = (int)((int64_t)t * c->n_sample / n);
            float *to = x + (size_t)t * (size_t)s->p + (size_t)slot * (size_t)d;
            memcpy(to, rows + (size_t)from * (size_t)d, (size_t)d * sizeof *x);
            if (side == KV_SIDE_K && !b->rope) kv_rope_rows(&b->m->geo.rope[layer], to, d, 1, c->position[from], 0);
        }
    }
    kv_free(rows);
    return status;
}

/* Centred rows of every slot to a mean square of 1, so that layers of small rows count as much as those of large ones. */
static int equalize(kvtc_space *s, float *x, int n, int d)
{
    if (!(s->unit = kv_alloc_array((size_t)s->p, sizeof(float), false))) return KV_E_NOMEM;
    for (int slot = 0; slot < s->p; slot += d) {
        double sum = 0;
        for (int t = 0; t < n; t++)
            for (int i = slot; i < slot + d; i++) sum += (double)x[(size_t)t * (size_t)s->p + (size_t)i] * x[(size_t)t * (size_t)s->p + (size_t)i];
        const float unit = (float)fmax(sqrt(sum / ((double)n * d)), 1e-20);
        for (int i = slot; i < slot + d; i++) s->unit[i] = unit;
        for (int t = 0; t < n; t++)
            for (int i = slot; i < slot + d; i++) x[(size_t)t * (size_t)s->p + (size_t)i] /= unit;
    }
    return KV_OK;
}

static int make_space(kvtc_basis *b, kvtc_space *s, const kv_calib *c, int side, const kv_kvtc_options *o)
{
    const int n = o->rows ? kv_min(o->rows, c->n_sample) : c->n_sample, held = n / KVTC_HELD_OUT, fit = n - held, p = s->p;
    const int most = kv_min(kv_min(o->rank ? o->rank : KVTC_MAX_RANK, p), fit);
    int status = KV_E_NOMEM;
    float *x = kv_alloc_array((size_t)n * (size_t)p, sizeof *x, false);
    s->mean = kv_alloc_array((size_t)p, sizeof(float), true);
    s->v = kv_alloc_array((size_t)most * (size_t)p, sizeof(float), false);
    if (!x || !s->mean || !s->v) goto fail;
    FAIL_IF_ERROR(gather_rows(b, s, c, side, n, x));
    for (int i = 0; i < p; i++) {
        double sum = 0;
        for (int t = 0; t < n; t++) sum += x[(size_t)t * (size_t)p + (size_t)i];
        s->mean[i] = (float)(sum / n);
        for (int t = 0; t < n; t++) x[(size_t)t * (size_t)p + (size_t)i] -= s->mean[i];
    }
    if (o->equal) FAIL_IF_ERROR(equalize(s, x, n, b->m->info.head_dim));
    FAIL_IF_ERROR(s->rank = kvtc_components(x, fit, p, most, o->randomized, o->seed, s->v));
    if (!(s->z = kv_alloc_array((size_t)held * (size_t)s->rank, sizeof(float), false))) { status = KV_E_NOMEM; goto fail; }
    s->held = held;
    kvtc_gemm(1, held, s->rank, p, x + (size_t)fit * (size_t)p, s->v, p, 0, s->z);
    status = KV_OK;
fail:
    kv_free(x);
    return status;
}

typedef struct spaces_job { kvtc_basis *b; const kv_calib *c; const kv_kvtc_options *o; atomic_int status; char error[256]; } spaces_job;

static void one_space(void *ctx, int task, int thread)
{
    (void)thread;
    spaces_job *j = ctx;
    int none = 0;
    if (atomic_load(&j->status) < 0) return;
    const int status = make_space(j->b, &j->b->space[task % 2][task / 2], j->c, task % 2, j->o);
    if (status < 0 && atomic_compare_exchange_strong(&j->status, &none, status)) snprintf(j->error, sizeof j->error, "%s", kv_last_error());
}

static int slides(const kv_model *m, int layer) { return m->geo.sliding && m->geo.sliding[layer] > 0; }

/* Groups: global layers, then sliding ones, `layers` of them at a time; within, heads. */
int kvtc_basis_alloc(kvtc_basis **out, kv_model *m, int layers, int heads, int rope)
{
    const kv_model_info *info = &m->info;
    *out = NULL;
    RETURN_ERROR_IF(layers < 0 || layers > info->n_layers, KV_E_PARAM, "kvtc: layers=%d is outside 0..%d", layers, info->n_layers);
    RETURN_ERROR_IF(heads < 0 || heads > info->n_kv_heads, KV_E_PARAM, "kvtc: heads=%d is outside 0..%d", heads, info->n_kv_heads);
    kvtc_basis *b = kv_zalloc(sizeof *b);
    if (!b) return KV_E_NOMEM;
    atomic_init(&b->refs, 1);
    b->m = kv_model_ref(m);
    b->layers = layers ? layers : info->n_layers;
    b->heads = heads ? heads : info->n_kv_heads;
    b->rope = rope != 0;
    const int across = (info->n_kv_heads + b->heads - 1) / b->heads;
    int n_slides = 0, status = KV_OK;
    for (int l = 0; l < info->n_layers; l++) n_slides += slides(m, l);
    b->n_groups = ((info->n_layers - n_slides + b->layers - 1) / b->layers + (n_slides + b->layers - 1) / b->layers) * across;
    for (int side = 0; side < 2; side++) {
        if (!(b->space[side] = kv_alloc_array((size_t)b->n_groups, sizeof(kvtc_space), true))) { status = KV_E_NOMEM; goto fail; }
        for (int i = 0, kind = 0, next = 0; i < b->n_groups; i++) {
            kvtc_space *s = &b->space[side][i];
            if (!(s->layer = kv_alloc_array((size_t)b->layers, sizeof *s->layer, true))) { status = KV_E_NOMEM; goto fail; }
            if (i % across) {                            /* other heads of the same layers */
                s->n_layers = s[-1].n_layers;
                memcpy(s->layer, s[-1].layer, (size_t)s->n_layers * sizeof *s->layer);
            }
            while (i % across == 0 && s->n_layers < b->layers) {
                while (next < info->n_layers && slides(m, next) != kind) next++;
                if (next < info->n_layers) s->layer[s->n_layers++] = next++;
                else if (s->n_layers || kind) break;
                else kind = 1, next = 0;
            }
            s->h0 = i % across * b->heads;
            s->h1 = kv_min(info->n_kv_heads, s->h0 + b->heads);
            s->p = s->n_layers * (s->h1 - s->h0) * info->head_dim;
            FAIL_IF(s->p > KVTC_MAX_DIMS, KV_E_UNSUPPORTED, "kvtc: rows of %d numbers are more than %d; layers=N makes them shorter", s->p, KVTC_MAX_DIMS);
        }
    }
    *out = b;
    return KV_OK;
fail:
    kvtc_basis_free(b);
    return status;
}

int kvtc_basis_new(kvtc_basis **out, const kv_calib *c, const kv_kvtc_options *o)
{
    int status;
    kvtc_basis *b;
    *out = NULL;
    RETURN_ERROR_IF(o->rank < 0 || o->rank > KVTC_MAX_RANK, KV_E_PARAM, "kvtc: rank=%d is outside 0..%d", o->rank, KVTC_MAX_RANK);
    RETURN_ERROR_IF(o->rows < 0 || (o->rows && o->rows < 64), KV_E_PARAM, "kvtc: rows=%d is neither 0 nor 64 at least", o->rows);
    RETURN_ERROR_IF(c->n_sample < 64, KV_E_UNCALIBRATED, "kvtc: %d calibration rows are less than 64", c->n_sample);
    RETURN_ERROR_IF(c->n_sample > 1 << 15, KV_E_ARG, "kvtc: %d calibration rows are more than %d", c->n_sample, 1 << 15);
    FORWARD_IF_ERROR(kvtc_basis_alloc(&b, c->m, o->layers, o->heads, !o->keep_rope));
    /* LAPACK's part has one thread: sides and groups go side by side. */
    spaces_job job = { .b = b, .c = c, .o = o };
    kv_parallel(2 * b->n_groups, one_space, &job);
    status = atomic_load(&job.status);
    if (status < 0) {
        kv_set_error(status, "%s", job.error);
        kvtc_basis_free(b);
        return status;
    }
    *out = b;
    return KV_OK;
}

void kvtc_basis_free(kvtc_basis *b)
{
    if (!b || atomic_fetch_sub(&b->refs, 1) != 1) return;
    for (int i = 0; i < 2 * b->n_groups; i++) {
        kvtc_space *s = b->space[i % 2] ? &b->space[i % 2][i / 2] : NULL;
        if (!s) continue;
        kv_free(s->layer);
        kv_free(s->mean);
        kv_free(s->unit);
        kv_free(s->v);
        kv_free(s->z);
    }
    kv_free(b->space[0]);
    kv_free(b->space[1]);
    kv_model_free(b->m);
    kv_free(b);
}
