/* eval_device.c -- a chunk of an evaluation on a device.
 *
 * Every group of arms runs with its reference: beside the arms that is one lane more, and hidden states never leave the device.  They stay in the runner until its next
 * feed, so scores are taken after each piece. */
#include "device_model.h"
#include "eval_impl.h"

typedef struct work {
    kv_device_model   *d;
    kv_backend_cache **cache;                 /* [n_arms + 1], the reference first */
    float             *column[5];             /* [n_scored] of one arm */
} work;

static void device_drop(kv_eval *e)
{
    work *w = e->work;
    for (int lane = 0; w->cache && lane <= e->n_arms; lane++) if (w->cache[lane]) w->d->b->cache_free(w->cache[lane]);
    kv_free(w->cache);
    w->cache = NULL;
    for (int i = 0; i < 5; i++) {
        kv_free(w->column[i]);
        w->column[i] = NULL;
    }
}

static void device_free(kv_eval *e)
{
    work *w = e->work;
    kv_device_model_free(w->d);
    kv_free(w);
}

static int  nothing(kv_eval *e) { (void)e; return KV_OK; }
static void no_arms(kv_eval *e) { (void)e; }

static int device_begin(kv_eval *e)
{
    work *w = e->work;
    const size_t n_scored = (size_t)(e->n - 1 - e->score_from), lanes = (size_t)e->n_arms + 1;
    if (!(w->cache = kv_alloc_array(lanes, sizeof *w->cache, true))) return KV_E_NOMEM;
    for (int i = 0; i < 5; i++) if (!(w->column[i] = kv_alloc_array(n_scored, sizeof(float), false))) return KV_E_NOMEM;
    for (size_t lane = 0; lane < lanes; lane++) {
        FORWARD_IF_ERROR(kv_device_model_cache(w->d, e->model, lane ? e->arm[lane - 1].plan : e->ref_plan, 1, e->n, &w->cache[lane]));
        w->d->b->cache_count_from(w->cache[lane], e->score_from);
    }
    return KV_OK;
}

/* Scored rows of the piece just fed: positions score_from .. n-2. */
static int score_piece(kv_eval *e)
{
    work *w = e->work;
    const int from = kv_max(e->fed, e->score_from), n = kv_min(e->fed + e->piece, e->n - 1) - from;
    const kv_backend_scores s = { w->column[0], w->column[1], w->column[2], w->column[3], w->column[4] };
    for (int a = 0; n > 0 && a < e->n_arms; a++) {
        FORWARD_IF_ERROR(KV_ON_DEVICE(w->d, score, w->d->runner, 0, a + 1, from - e->fed, n, e->tokens + from + 1, &s));
        kv_score *out = e->score + (size_t)a * (size_t)(e->n - 1 - e->score_from) + (from - e->score_from);
        for (int i = 0; i < n; i++) out[i] = (kv_score){ s.kld[i], s.nll[i], s.nll_ref[i], s.dp[i], s.same_top1[i] };
    }
    return KV_OK;
}

static int device_slice(kv_eval *e, int *done)
{
    work *w = e->work;
    e->piece = kv_eval_next_piece(e);
    pthread_mutex_lock(&w->d->lock);
    int status = KV_ON_DEVICE(w->d, feed, w->d->runner, e->n_arms + 1, w->cache, e->tokens + e->fed, e->piece, 1);
    if (status == KV_OK) status = score_piece(e);
    pthread_mutex_unlock(&w->d->lock);
    FORWARD_IF_ERROR(status);
    e->fed += e->piece;
    *done = e->fed >= e->n;
    for (int a = 0; *done && a < e->n_arms; a++) {
        kv_arm_state *arm = &e->arm[a];
        FORWARD_IF_ERROR(kv_device_bytes(w->d, w->cache[a + 1], arm->plan, -1, -1, &arm->bytes_now));
        arm->pairs_now = (kv_pairs){ 0 };
        w->d->b->cache_pairs(w->cache[a + 1], &arm->pairs_now.compressed, &arm->pairs_now.total);
        arm->pairs_now.tokens_compressed = kv_device_tokens_compressed(&e->model->geo, arm->plan, e->n);
    }
    return KV_OK;
}

static const kv_eval_ops device_ops = { .arms = nothing, .begin = device_begin, .slice = device_slice, .drop = device_drop, .drop_arms = no_arms, .free = device_free };

int kv_eval_device_new(kv_eval *e)
{
    work *w = kv_zalloc(sizeof *w);
    if (!w) return KV_E_NOMEM;
    w->d = kv_device_model_ref(e->model->dev);
    e->work = w;
    e->ops = &device_ops;
    return KV_OK;
}
