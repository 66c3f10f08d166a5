/* eval.c -- lockstep evaluation: an exact reference and any number of arms run over the same tokens, sharing weight reads,
 * and their logits are compared on the spot.
 *
 *   new -> arms -> begin, step, step, ... -> begin, step, ... -> values, summary -> arms -> ...
 *
 * A chunk starts from empty caches and is run and scored by eval_host.c or, where the model is on a device, by eval_device.c; here are the books.  A chunk's scores join
 * the results only when it is complete: an interrupted one leaves no trace.  A SHA-256 of the tokens and score_from guards against another text under the same number.
 *
 * KV_EVAL_VISIBILITY feeds the chunk in one pass (beyond 4096 tokens in pieces of 2048, which bounds activations: the cache
 * gives every query the same view either way); KV_EVAL_STREAM feeds token by token, the decode path. */
#include "eval_impl.h"

enum { MAX_ARMS = 64, MAX_INDEX = 1 << 24 /* exact in a float */ };
#define SLICE_SECONDS 0.1                     /* a step stops after the first slice past this */

static bool reserve(kv_column *c, size_t n)
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

static const kv_stored *find(const kv_eval *e, int chunk)
{
    for (int i = 0; i < e->n_store; i++)
        if (e->store[i].chunk == chunk) return &e->store[i];
    return NULL;
}

/* Ends the chunk in work, finished or not. */
static void drop_chunk(kv_eval *e)
{
    e->ops->drop(e);
    kv_free(e->score);
    kv_free(e->tokens);
    kv_free(e->ref_hidden);
    e->score = NULL;
    e->tokens = NULL;
    e->ref_hidden = NULL;
    e->working = 0;
}

static void drop_group(kv_eval *e)
{
    drop_chunk(e);
    for (int a = 0; a < e->n_arms; a++) {
        kv_plan_free(e->arm[a].plan);
        for (int i = 0; i < 5; i++) kv_free(e->arm[a].col[i].data);
    }
    kv_free(e->arm);
    e->ops->drop_arms(e);
    e->arm = NULL;
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
    int status = m->dev ? kv_eval_device_new(e) : kv_eval_host_new(e);
    if (status == KV_OK) status = kv_plan_reference(&e->ref_plan, m->geo.n_layers, m->geo.n_kv_heads, m->geo.head_dim);
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
    if (e->ops) {
        drop_group(e);
        e->ops->free(e);
    }
    for (int i = 0; i < e->n_store; i++) kv_free(e->store[i].hidden);
    kv_free(e->store);
    kv_free(e->position.data);
    kv_free(e->chunk_of.data);
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
    return e->ops->arms(e);
}

static int check_chunk(const kv_eval *e, int chunk, const int32_t *tokens, int n, int score_from)
{
    RETURN_ERROR_IF(!e || !tokens, KV_E_ARG, "kv_eval_begin: %s is NULL", e ? "tokens" : "the evaluation");
    RETURN_ERROR_IF(e->n_arms == 0, KV_E_ARG, "kv_eval_begin: no arms; call kv_eval_arms first");
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

int kv_eval_next_piece(const kv_eval *e)
{
    const int whole = kv_eval_most(e), left = e->n - e->fed, piece = kv_min(whole, left);
    return whole > 1 && left - piece == 1 ? piece - 1 : piece;      /* a rest of one token would take the decode path */
}

int kv_eval_begin(kv_eval *e, int chunk, const int32_t *tokens, int n, int score_from)
{
    FORWARD_IF_ERROR(check_chunk(e, chunk, tokens, n, score_from));
    drop_chunk(e);
    int status = KV_E_NOMEM;

    e->tokens = kv_alloc_array((size_t)n + 1, sizeof *e->tokens, false);    /* + 1: score_from, for the hash */
    if (!e->tokens) return KV_E_NOMEM;
    memcpy(e->tokens, tokens, (size_t)n * sizeof *tokens);
    e->tokens[n] = score_from;
    FAIL_IF_ERROR(kv_sha256(e->tokens, ((double)n + 1) * sizeof *e->tokens, e->hash));
    e->known = find(e, chunk);
    FAIL_IF(e->known && strcmp(e->known->hash, e->hash) != 0, KV_E_ARG,
            "kv_eval_begin: chunk %d was another text before: tokens or score_from differ; give it another number", chunk);

    e->chunk = chunk;
    e->n = n;
    e->score_from = score_from;
    e->fed = 0;
    status = KV_E_NOMEM;
    e->score = kv_alloc_array((size_t)e->n_arms * (size_t)(n - 1 - score_from), sizeof *e->score, false);
    if (!e->score) goto fail;
    FAIL_IF_ERROR(e->ops->begin(e));
    e->working = 1;
    return KV_OK;
fail:
    drop_chunk(e);
    return status;
}

static int keep_reference(kv_eval *e)
{
    if (e->known) return KV_OK;
    if (e->n_store == e->cap_store) {
        const int cap = e->cap_store ? 2 * e->cap_store : 32;
        kv_stored *s = kv_alloc_array((size_t)cap, sizeof *s, true);
        if (!s) return KV_E_NOMEM;
        if (e->n_store) memcpy(s, e->store, (size_t)e->n_store * sizeof *s);
        kv_free(e->store);
        e->store = s;
        e->cap_store = cap;
    }
    kv_stored *s = &e->store[e->n_store++];
    *s = (kv_stored){ .chunk = e->chunk, .hidden = e->ref_hidden };
    memcpy(s->hash, e->hash, sizeof s->hash);
    e->ref_hidden = NULL;
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
        kv_column *c = e->arm[a].col;
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

static int slice(kv_eval *e)
{
    int done = 0;
    FORWARD_IF_ERROR(e->ops->slice(e, &done));
    return done ? finish_chunk(e) : KV_OK;
}

/* A failure ends the chunk; results of chunks before it stay. */
int kv_eval_step(kv_eval *e, int *more)
{
    RETURN_ERROR_IF(!e || !more, KV_E_ARG, "kv_eval_step: %s is NULL", e ? "more" : "the evaluation");
    *more = 0;
    const double start = kv_now();
    while (e->working) {
        const int status = slice(e);
        if (status < 0) {
            drop_chunk(e);
            return status;
        }
        if (kv_now() - start > SLICE_SECONDS) break;
    }
    *more = e->working;
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
    const kv_column *c = e->arm[arm].col;
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
