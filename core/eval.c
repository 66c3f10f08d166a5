/* eval.c -- lockstep evaluation: an exact reference and any number of arms run over the same tokens, sharing weight reads,
 * and their logits are compared on the spot.
 *
 *   new -> arms -> begin, step, step, ... -> begin, step, ... -> values, summary -> arms -> ...
 *
 * A chunk starts from empty caches.  All lanes go through the layers together; the final hidden states of the scored
 * positions are collected, the caches are measured and dropped, and the streaming head (head.c) scores every arm against
 * the reference.  A chunk's scores join the results only when it is complete: an interrupted one leaves no trace.
 *
 * The reference lane depends on nothing but the chunk, so its hidden states stay ([n_scored][n_embd] f32, 0.6 MB for half
 * of a 512-token chunk at n_embd 576) and later groups over the same chunk run arms only.  A SHA-256 of the tokens and
 * score_from guards against another text under the same number.
 *
 * KV_EVAL_VISIBILITY feeds the chunk in one pass (beyond 4096 tokens in pieces of 2048, which bounds activations: the cache
 * gives every query the same view either way); KV_EVAL_STREAM feeds token by token, the decode path. */
#include "eval.h"

enum { MAX_ARMS = 64, MAX_ONE_FEED = 4096, PIECE = 2048, MAX_INDEX = 1 << 24 /* exact in a float */ };
#define SLICE_SECONDS 0.1                     /* a step stops after the first slice past this */

typedef struct { float *data; size_t n, cap; } column;

typedef struct { int chunk; char hash[65]; float *hidden; } stored;

typedef struct { kv_plan *plan; column col[5]; kv_bytes bytes, bytes_now; kv_pairs pairs, pairs_now; } arm_state;   /* _now: of the chunk in work */

enum { IDLE, FEED, HEAD };

struct kv_eval {
    kv_model   *model;
    kv_plan    *ref_plan;
    int         mode, n_arms, n_chunks;       /* n_chunks: done in this group */
    arm_state  *arm;
    column      position, chunk_of;
    stored     *store;
    int         n_store, cap_store;
    kv_forward *fwd;
    int         fwd_lanes, fwd_n;
    kv_head    *head;

    int         state, chunk, n, score_from, fed, piece, first_lane /* 0: with the reference, 1: arms only */;
    char        hash[65];
    int32_t    *tokens;
    kv_cache  **cache;                        /* [n_arms + 1], the reference first */
    float     **hidden;                       /* [n_arms + 1][n_scored][n_embd]; [0] is the store's when first_lane is 1 */
    kv_score   *score;
};

static bool reserve(column *c, size_t n)
{
    if (n <= c->cap) return true;
    const size_t cap = kv_round_up(n + n / 2, 1024);
    float *p = kv_alloc_array(cap, sizeof *p, false);
    if (!p) return false;
    if (c->n) memcpy(p, c->data, c->n * sizeof *p);
    kv_free(c->data);
    c->data = p;
    c->cap = cap;
    return true;
}

static const stored *find(const kv_eval *e, int chunk)
{
    for (int i = 0; i < e->n_store; i++)
        if (e->store[i].chunk == chunk) return &e->store[i];
    return NULL;
}

/* Ends the chunk in work, finished or not. */
static void drop_chunk(kv_eval *e)
{
    for (int lane = 0; lane <= e->n_arms; lane++) {
        if (e->cache) kv_cache_free(e->cache[lane]);
        if (e->hidden && lane >= e->first_lane) kv_free(e->hidden[lane]);
    }
    kv_free(e->cache);
    kv_free(e->hidden);
    kv_free(e->score);
    kv_free(e->tokens);
    e->cache = NULL;
    e->hidden = NULL;
    e->score = NULL;
    e->tokens = NULL;
    e->state = IDLE;
}

static void drop_group(kv_eval *e)
{
    drop_chunk(e);
    for (int a = 0; a < e->n_arms; a++) {
        kv_plan_free(e->arm[a].plan);
        for (int i = 0; i < 5; i++) kv_free(e->arm[a].col[i].data);
    }
    kv_free(e->arm);
    kv_head_free(e->head);
    e->arm = NULL;
    e->head = NULL;
    e->n_arms = e->n_chunks = 0;
    e->position.n = e->chunk_of.n = 0;
}

int kv_eval_new(kv_eval **out, kv_model *m, int mode)
{
    RETURN_ERROR_IF(!out || !m, KV_E_ARG, "kv_eval_new: %s is NULL", out ? "the model" : "out");
    *out = NULL;
    RETURN_ERROR_IF(mode != KV_EVAL_VISIBILITY && mode != KV_EVAL_STREAM, KV_E_ARG, "kv_eval_new: mode=%d is neither 0 (visibility) nor 1 (stream)", mode);
    kv_eval *e = kv_zalloc(sizeof *e);
    if (!e) return KV_E_NOMEM;
    e->model = kv_model_ref(m);
    e->mode = mode;
    const int status = kv_plan_reference(&e->ref_plan, m->geo.n_layers, m->geo.n_kv_heads, m->geo.head_dim);
    if (status < 0) {
        kv_eval_free(e);
        return status;
    }
    *out = e;
    return KV_OK;
}

void kv_eval_free(kv_eval *e)
{
    if (!e) return;
    drop_group(e);
    for (int i = 0; i < e->n_store; i++) kv_free(e->store[i].hidden);
    kv_free(e->store);
    kv_free(e->position.data);
    kv_free(e->chunk_of.data);
    kv_forward_free(e->fwd);
    kv_plan_free(e->ref_plan);
    kv_model_free(e->model);
    kv_free(e);
}

int kv_eval_arms(kv_eval *e, int n_arms, kv_plan **plans)
{
    RETURN_ERROR_IF(!e || !plans, KV_E_ARG, "kv_eval_arms: %s is NULL", e ? "plans" : "the evaluation");
    RETURN_ERROR_IF(n_arms < 1 || n_arms > MAX_ARMS, KV_E_ARG, "kv_eval_arms: n_arms=%d is outside 1..%d", n_arms, MAX_ARMS);
    const kv_geometry *g = &e->model->geo;
    for (int a = 0; a < n_arms; a++) {
        const kv_plan *p = plans[a];
        RETURN_ERROR_IF(!p, KV_E_ARG, "kv_eval_arms: plan %d is NULL", a);
        RETURN_ERROR_IF(p->n_layers != g->n_layers || p->n_kv_heads != g->n_kv_heads || p->head_dim != g->head_dim, KV_E_ARG,
                        "kv_eval_arms: plan %d is for %d layers x %d heads x %d, the model has %d x %d x %d", a,
                        p->n_layers, p->n_kv_heads, p->head_dim, g->n_layers, g->n_kv_heads, g->head_dim);
        FORWARD_IF_ERROR(kv_plan_check(p));
    }
    drop_group(e);
    e->arm = kv_alloc_array((size_t)n_arms, sizeof *e->arm, true);
    if (!e->arm) return KV_E_NOMEM;
    e->n_arms = n_arms;
    for (int a = 0; a < n_arms; a++) e->arm[a].plan = kv_plan_ref(plans[a]);
    return kv_head_new(&e->head, &e->model->head, e->model->final_softcap, n_arms);
}

static int check_chunk(const kv_eval *e, int chunk, const int32_t *tokens, int n, int score_from)
{
    RETURN_ERROR_IF(!e || !tokens, KV_E_ARG, "kv_eval_begin: %s is NULL", e ? "tokens" : "the evaluation");
    RETURN_ERROR_IF(e->n_arms == 0 || !e->head, KV_E_ARG, "kv_eval_begin: no arms; call kv_eval_arms first");
    RETURN_ERROR_IF(chunk < 0 || chunk >= MAX_INDEX, KV_E_ARG, "kv_eval_begin: chunk=%d is outside 0..%d", chunk, MAX_INDEX - 1);
    RETURN_ERROR_IF(n < 2 || n > MAX_INDEX, KV_E_ARG, "kv_eval_begin: n=%d tokens are outside 2..%d", n, MAX_INDEX);
    RETURN_ERROR_IF(score_from < 0 || score_from > n - 2, KV_E_ARG, "kv_eval_begin: score_from=%d is outside 0..%d", score_from, n - 2);
    for (int i = 0; i < n; i++)
        RETURN_ERROR_IF(tokens[i] < 0 || tokens[i] >= e->model->info.n_vocab, KV_E_ARG, "kv_eval_begin: token %d at position %d is outside 0..%d",
                        tokens[i], i, e->model->info.n_vocab - 1);
    for (size_t i = 0; i < e->chunk_of.n; i++)
        RETURN_ERROR_IF(e->chunk_of.data[i] == (float)chunk, KV_E_ARG, "kv_eval_begin: chunk %d is already scored in this group", chunk);
    return KV_OK;
}

/* The forward pass is kept while lanes and size fit. */
static int need_forward(kv_eval *e, int n_lanes, int n)
{
    if (e->fwd && e->fwd_lanes == n_lanes && e->fwd_n >= n) return KV_OK;
    kv_forward_free(e->fwd);
    e->fwd = NULL;
    FORWARD_IF_ERROR(kv_forward_new(&e->fwd, e->model, n_lanes, n));
    e->fwd_lanes = n_lanes;
    e->fwd_n = n;
    return KV_OK;
}

/* What one kv_forward_begin gets: the next piece of the chunk, or in stream mode the next token. */
static int begin_piece(kv_eval *e)
{
    const int whole = e->mode == KV_EVAL_STREAM ? 1 : e->n > MAX_ONE_FEED ? PIECE : e->n, left = e->n - e->fed;
    e->piece = kv_min(whole, left);
    if (whole > 1 && left - e->piece == 1) e->piece--;       /* a rest of one token would take the decode path */
    return kv_forward_begin(e->fwd, e->cache + e->first_lane, e->tokens + e->fed, e->piece);
}

int kv_eval_begin(kv_eval *e, int chunk, const int32_t *tokens, int n, int score_from)
{
    FORWARD_IF_ERROR(check_chunk(e, chunk, tokens, n, score_from));
    drop_chunk(e);
    const int    n_scored = n - 1 - score_from, lanes = e->n_arms + 1;
    const size_t n_embd = (size_t)e->model->info.n_embd;
    int  status = KV_E_NOMEM;

    e->tokens = kv_alloc_array((size_t)n + 1, sizeof *e->tokens, false);    /* + 1: score_from, for the hash */
    if (!e->tokens) return KV_E_NOMEM;
    memcpy(e->tokens, tokens, (size_t)n * sizeof *tokens);
    e->tokens[n] = score_from;
    FAIL_IF_ERROR(kv_sha256(e->tokens, ((double)n + 1) * sizeof *e->tokens, e->hash));
    const stored *s = find(e, chunk);
    FAIL_IF(s && strcmp(s->hash, e->hash) != 0, KV_E_ARG,
            "kv_eval_begin: chunk %d was another text before: tokens or score_from differ; give it another number", chunk);

    e->chunk = chunk;
    e->n = n;
    e->score_from = score_from;
    e->fed = 0;
    e->first_lane = s ? 1 : 0;
    status = KV_E_NOMEM;
    e->cache = kv_alloc_array((size_t)lanes, sizeof *e->cache, true);
    e->hidden = kv_alloc_array((size_t)lanes, sizeof *e->hidden, true);
    e->score = kv_alloc_array((size_t)e->n_arms * (size_t)n_scored, sizeof *e->score, false);
    if (!e->cache || !e->hidden || !e->score) goto fail;
    if (s) e->hidden[0] = s->hidden;
    for (int lane = e->first_lane; lane < lanes; lane++) {
        status = KV_E_NOMEM;
        if (!(e->hidden[lane] = kv_alloc_array((size_t)n_scored, n_embd * sizeof(float), false))) goto fail;
        FAIL_IF_ERROR(kv_cache_new(&e->cache[lane], &e->model->geo, lane ? e->arm[lane - 1].plan : e->ref_plan, n));
        kv_cache_count_from(e->cache[lane], score_from);
    }
    FAIL_IF_ERROR(need_forward(e, lanes - e->first_lane, e->mode == KV_EVAL_STREAM ? 1 : n > MAX_ONE_FEED ? PIECE : n));
    FAIL_IF_ERROR(begin_piece(e));
    e->state = FEED;
    return KV_OK;
fail:
    drop_chunk(e);
    return status;
}

/* Scored rows of the piece just fed: positions score_from .. n-2. */
static void collect(kv_eval *e)
{
    const size_t n_embd = (size_t)e->model->info.n_embd;
    const int from = kv_max(e->fed, e->score_from), to = kv_min(e->fed + e->piece, e->n - 1);
    for (int lane = e->first_lane; from < to && lane <= e->n_arms; lane++)
        memcpy(e->hidden[lane] + (size_t)(from - e->score_from) * n_embd,
               kv_forward_hidden(e->fwd, lane - e->first_lane) + (size_t)(from - e->fed) * n_embd, (size_t)(to - from) * n_embd * sizeof(float));
}

/* All tokens are in: measure the caches, drop them, start scoring. */
static int begin_head(kv_eval *e)
{
    for (int a = 0; a < e->n_arms; a++) {
        arm_state *arm = &e->arm[a];
        FORWARD_IF_ERROR(kv_cache_bytes(e->cache[a + 1], -1, -1, &arm->bytes_now));
        kv_cache_pairs(e->cache[a + 1], &arm->pairs_now);
    }
    for (int lane = 0; lane <= e->n_arms; lane++) {
        kv_cache_free(e->cache[lane]);
        e->cache[lane] = NULL;
    }
    e->state = HEAD;
    return kv_head_begin(e->head, e->n - 1 - e->score_from, (const float *const *)e->hidden, e->tokens + e->score_from + 1, e->score);
}

static int keep_reference(kv_eval *e)
{
    if (e->first_lane == 1) return KV_OK;
    if (e->n_store == e->cap_store) {
        const int cap = e->cap_store ? 2 * e->cap_store : 32;
        stored *s = kv_alloc_array((size_t)cap, sizeof *s, true);
        if (!s) return KV_E_NOMEM;
        if (e->n_store) memcpy(s, e->store, (size_t)e->n_store * sizeof *s);
        kv_free(e->store);
        e->store = s;
        e->cap_store = cap;
    }
    stored *s = &e->store[e->n_store++];
    *s = (stored){ .chunk = e->chunk, .hidden = e->hidden[0] };
    memcpy(s->hash, e->hash, sizeof s->hash);
    e->hidden[0] = NULL;
    return KV_OK;
}

static int finish_chunk(kv_eval *e)
{
    const size_t n = (size_t)(e->n - 1 - e->score_from), have = e->position.n;
    if (!reserve(&e->position, have + n) || !reserve(&e->chunk_of, have + n)) return KV_E_NOMEM;
    for (int a = 0; a < e->n_arms; a++)
        for (int i = 0; i < 5; i++)
            if (!reserve(&e->arm[a].col[i], have + n)) return KV_E_NOMEM;
    FORWARD_IF_ERROR(keep_reference(e));
    for (size_t i = 0; i < n; i++) {
        e->position.data[have + i] = (float)(e->score_from + (int)i);
        e->chunk_of.data[have + i] = (float)e->chunk;
    }
    e->position.n = e->chunk_of.n = have + n;
    for (int a = 0; a < e->n_arms; a++) {
        column *c = e->arm[a].col;
        for (size_t i = 0; i < n; i++) {
            const kv_score *s = &e->score[(size_t)a * n + i];
            c[0].data[have + i] = s->kld;
            c[1].data[have + i] = s->nll;
            c[2].data[have + i] = s->nll_ref;
            c[3].data[have + i] = s->dp;
            c[4].data[have + i] = s->same_top1;
        }
        for (int i = 0; i < 5; i++) c[i].n = have + n;
        const kv_pairs *p = &e->arm[a].pairs_now;
        e->arm[a].bytes = e->arm[a].bytes_now;
        e->arm[a].pairs.compressed += p->compressed;
        e->arm[a].pairs.total += p->total;
        e->arm[a].pairs.tokens_compressed += p->tokens_compressed;
    }
    e->n_chunks++;
    drop_chunk(e);
    return KV_OK;
}

/* One layer of all lanes, or a wave of vocabulary blocks. */
static int slice(kv_eval *e)
{
    int more = 0;
    if (e->state == FEED) {
        FORWARD_IF_ERROR(kv_forward_layer(e->fwd, &more));
        if (more) return KV_OK;
        collect(e);
        e->fed += e->piece;
        return e->fed < e->n ? begin_piece(e) : begin_head(e);
    }
    FORWARD_IF_ERROR(kv_head_step(e->head, &more));
    return more ? KV_OK : finish_chunk(e);
}

/* A failure ends the chunk; results of chunks before it stay. */
int kv_eval_step(kv_eval *e, int *more)
{
    RETURN_ERROR_IF(!e || !more, KV_E_ARG, "kv_eval_step: %s is NULL", e ? "more" : "the evaluation");
    *more = 0;
    const double start = kv_now();
    while (e->state != IDLE) {
        const int status = slice(e);
        if (status < 0) {
            drop_chunk(e);
            return status;
        }
        if (kv_now() - start > SLICE_SECONDS) break;
    }
    *more = e->state != IDLE;
    return KV_OK;
}

int kv_eval_scored(const kv_eval *e) { return e ? (int)e->position.n : 0; }

const float *kv_eval_values(const kv_eval *e, int arm, int kind)
{
    if (!e || arm < 0 || arm >= e->n_arms || kind < 0 || kind > 6 || e->position.n == 0) return NULL;
    return kind == 5 ? e->position.data : kind == 6 ? e->chunk_of.data : e->arm[arm].col[kind].data;
}

static int check_arm(const kv_eval *e, int arm, const void *out, const char *what)
{
    RETURN_ERROR_IF(!e || !out, KV_E_ARG, "%s: %s is NULL", what, e ? "out" : "the evaluation");
    RETURN_ERROR_IF(arm < 0 || arm >= e->n_arms, KV_E_ARG, "%s: arm=%d is outside 0..%d", what, arm, e->n_arms - 1);
    return KV_OK;
}

int kv_eval_summary(const kv_eval *e, int arm, int lo, int hi, double seed, int n_boot, kv_kld_summary *out)
{
    FORWARD_IF_ERROR(check_arm(e, arm, out, "kv_eval_summary"));
    const column *c = e->arm[arm].col;
    const kv_scores s = { c[0].data, c[1].data, c[2].data, c[3].data, c[4].data, e->position.data, e->chunk_of.data, e->position.n };
    return kv_scores_summary(&s, lo, hi, seed, n_boot, out);
}

int kv_eval_bytes(const kv_eval *e, int arm, kv_bytes *out)
{
    FORWARD_IF_ERROR(check_arm(e, arm, out, "kv_eval_bytes"));
    RETURN_ERROR_IF(e->n_chunks == 0, KV_E_ARG, "kv_eval_bytes: no chunk is complete yet");
    *out = e->arm[arm].bytes;
    return KV_OK;
}

int kv_eval_pairs(const kv_eval *e, int arm, kv_pairs *out)
{
    FORWARD_IF_ERROR(check_arm(e, arm, out, "kv_eval_pairs"));
    *out = e->arm[arm].pairs;
    return KV_OK;
}
