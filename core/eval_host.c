/* eval_host.c -- a chunk of an evaluation on the CPU.
 *
 * All lanes go through the layers together; the final hidden states of the scored positions are collected, the caches are measured and dropped, and the
 * streaming head (head.c) scores every arm against the reference.
 *
 * The reference lane depends on nothing but the chunk, so its hidden states stay ([n_scored][n_embd] f32, 0.6 MB for half
 * of a 512-token chunk at n_embd 576) and later groups over the same chunk run arms only. */
#include "eval_impl.h"

typedef struct work {
    kv_forward *fwd;
    int         fwd_lanes, fwd_n;
    kv_head    *head;
    int         scoring, first_lane /* 0: with the reference, 1: arms only */;
    kv_cache  **cache;                        /* [n_arms + 1], the reference first */
    float     **hidden;                       /* [n_arms + 1][n_scored][n_embd]; [0] is the store's when first_lane is 1 */
} work;

static void host_drop(kv_eval *e)
{
    work *w = e->work;
    for (int lane = 0; lane <= e->n_arms; lane++) {
        if (w->cache) kv_cache_free(w->cache[lane]);
        if (w->hidden && lane >= w->first_lane) kv_free(w->hidden[lane]);
    }
    kv_free(w->cache);
    kv_free(w->hidden);
    w->cache = NULL;
    w->hidden = NULL;
}

static void host_drop_arms(kv_eval *e)
{
    work *w = e->work;
    kv_head_free(w->head);
    w->head = NULL;
}

static void host_free(kv_eval *e)
{
    work *w = e->work;
    kv_forward_free(w->fwd);
    kv_free(w);
}

static int host_arms(kv_eval *e)
{
    work *w = e->work;
    return kv_head_new(&w->head, &e->model->head, e->model->final_softcap, e->n_arms);
}

/* The forward pass is kept while lanes and size fit. */
static int need_forward(kv_eval *e, int n_lanes, int n)
{
    work *w = e->work;
    if (w->fwd && w->fwd_lanes == n_lanes && w->fwd_n >= n) return KV_OK;
    kv_forward_free(w->fwd);
    w->fwd = NULL;
    FORWARD_IF_ERROR(kv_forward_new(&w->fwd, e->model, n_lanes, n));
    w->fwd_lanes = n_lanes;
    w->fwd_n = n;
    return KV_OK;
}

static int begin_piece(kv_eval *e)
{
    work *w = e->work;
    e->piece = kv_eval_next_piece(e);
    return kv_forward_begin(w->fwd, w->cache + w->first_lane, e->tokens + e->fed, e->piece);
}

static int host_begin(kv_eval *e)
{
    work *w = e->work;
    const int    n_scored = e->n - 1 - e->score_from, lanes = e->n_arms + 1;
    const size_t n_embd = (size_t)e->model->info.n_embd;
    w->first_lane = e->known ? 1 : 0;
    w->scoring = 0;
    w->cache = kv_alloc_array((size_t)lanes, sizeof *w->cache, true);
    w->hidden = kv_alloc_array((size_t)lanes, sizeof *w->hidden, true);
    if (!w->cache || !w->hidden) return KV_E_NOMEM;
    if (e->known) w->hidden[0] = e->known->hidden;
    for (int lane = w->first_lane; lane < lanes; lane++) {
        if (!(w->hidden[lane] = kv_alloc_array((size_t)n_scored, n_embd * sizeof(float), false))) return KV_E_NOMEM;
        FORWARD_IF_ERROR(kv_cache_new(&w->cache[lane], &e->model->geo, lane ? e->arm[lane - 1].plan : e->ref_plan, e->n));
        kv_cache_count_from(w->cache[lane], e->score_from);
    }
    FORWARD_IF_ERROR(need_forward(e, lanes - w->first_lane, kv_eval_most(e)));
    return begin_piece(e);
}

/* Scored rows of the piece just fed: positions score_from .. n-2. */
static void collect(kv_eval *e)
{
    work *w = e->work;
    const size_t n_embd = (size_t)e->model->info.n_embd;
    const int from = kv_max(e->fed, e->score_from), to = kv_min(e->fed + e->piece, e->n - 1);
    for (int lane = w->first_lane; from < to && lane <= e->n_arms; lane++)
        memcpy(w->hidden[lane] + (size_t)(from - e->score_from) * n_embd,
               kv_forward_hidden(w->fwd, lane - w->first_lane) + (size_t)(from - e->fed) * n_embd, (size_t)(to - from) * n_embd * sizeof(float));
}

/* All tokens are in: measure the caches, drop them, start scoring. */
static int begin_head(kv_eval *e)
{
    work *w = e->work;
    for (int a = 0; a < e->n_arms; a++) {
        kv_arm_state *arm = &e->arm[a];
        FORWARD_IF_ERROR(kv_cache_bytes(w->cache[a + 1], -1, -1, &arm->bytes_now));
        kv_cache_pairs(w->cache[a + 1], &arm->pairs_now);
    }
    for (int lane = 0; lane <= e->n_arms; lane++) {
        kv_cache_free(w->cache[lane]);
        w->cache[lane] = NULL;
    }
    w->scoring = 1;
    return kv_head_begin(w->head, e->n - 1 - e->score_from, (const float *const *)w->hidden, e->tokens + e->score_from + 1, e->score);
}

/* One layer of all lanes, or a wave of vocabulary blocks. */
static int host_slice(kv_eval *e, int *done)
{
    work *w = e->work;
    int more = 0;
    *done = 0;
    if (!w->scoring) {
        FORWARD_IF_ERROR(kv_forward_layer(w->fwd, &more));
        if (more) return KV_OK;
        collect(e);
        e->fed += e->piece;
        return e->fed < e->n ? begin_piece(e) : begin_head(e);
    }
    FORWARD_IF_ERROR(kv_head_step(w->head, &more));
    *done = !more;
    if (*done && w->first_lane == 0) {
        e->ref_hidden = w->hidden[0];
        w->hidden[0] = NULL;
    }
    return KV_OK;
}

static const kv_eval_ops host_ops = { .arms = host_arms, .begin = host_begin, .slice = host_slice, .drop = host_drop, .drop_arms = host_drop_arms, .free = host_free };

int kv_eval_host_new(kv_eval *e)
{
    RETURN_ERROR_IF(!e->model->embed.data, KV_E_UNSUPPORTED, "model '%s' has a shape only: its weights are on a device", e->model->info.name);
    if (!(e->work = kv_zalloc(sizeof(work)))) return KV_E_NOMEM;
    e->ops = &host_ops;
    return KV_OK;
}
