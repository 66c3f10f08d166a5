/* device_run.c -- sequences on a device: sessions (one sequence a cache), batches (many), and taps. */
#include "device_model.h"

enum { FEED_AT_ONCE = 2048 /* tokens of one feed: products are long past their best size, working memory still small beside the weights */ };

typedef struct device_run {
    kv_run            run;
    kv_device_model  *d;
    kv_backend_cache *c;
} device_run;

static device_run *of(const kv_run *r) { return (device_run *)(uintptr_t)r; }

static void run_free(kv_run *r)
{
    device_run *d = of(r);
    if (d->c) d->d->b->cache_free(d->c);
    kv_device_model_free(d->d);
    kv_plan_free(r->plan);
    kv_model_free(r->m);
    kv_free(d);
}

static const kv_run_ops device_ops;

static int run_alloc(device_run **out, kv_model *m, kv_device_model *d, kv_plan *plan)
{
    device_run *r = kv_zalloc(sizeof *r);
    if (!r) return KV_E_NOMEM;
    r->d = kv_device_model_ref(d);
    r->run = (kv_run){ .ops = &device_ops, .m = kv_model_ref(m), .plan = kv_plan_ref(plan), .device = r->d->device };
    *out = r;
    return KV_OK;
}

int kv_device_run_new(kv_run **out, kv_model *m, kv_plan *plan, int max_tokens)
{
    device_run *r;
    FORWARD_IF_ERROR(run_alloc(&r, m, m->dev, plan));
    const int status = kv_device_model_cache(r->d, m, plan, 1, max_tokens, &r->c);
    if (status < 0) run_free(&r->run);
    else *out = &r->run;
    return status;
}

static int run_fork(kv_run **out, const kv_run *from)
{
    device_run *r;
    FORWARD_IF_ERROR(run_alloc(&r, from->m, of(from)->d, from->plan));
    const int status = KV_ON_DEVICE(r->d, cache_fork, of(from)->c, &r->c);
    if (status < 0) run_free(&r->run);
    else *out = &r->run;
    return status;
}

static int feed_and_read(kv_device_model *d, kv_backend_cache *c, int n_lanes, const int32_t *tokens, int n, int shared, float *logits, int all, size_t n_vocab)
{
    FORWARD_IF_ERROR(KV_ON_DEVICE(d, feed, d->runner, 1, &c, tokens, n, shared));
    for (int l = 0; logits && l < n_lanes; l++) {
        const int row0 = all ? 0 : n - 1;
        FORWARD_IF_ERROR(KV_ON_DEVICE(d, logits, d->runner, l, row0, n - row0, logits));
        logits += (size_t)(n - row0) * n_vocab;
    }
    return KV_OK;
}

static int run_feed(kv_run *r, const int32_t *tokens, int n, float *logits, int all)
{
    kv_device_model *d = of(r)->d;
    pthread_mutex_lock(&d->lock);
    const int status = feed_and_read(d, of(r)->c, 1, tokens, n, 1, logits, all, (size_t)r->m->info.n_vocab);
    pthread_mutex_unlock(&d->lock);
    return status;
}

static int run_next(kv_run *r, int32_t token, const kv_sampler_params *p, float *logits, int *wanted, int32_t *next)
{
    kv_device_model *d = of(r)->d;
    const kv_backend_sampler s = { .temperature = p->temperature, .top_p = p->top_p, .seed = p->seed, .top_k = p->top_k };
    pthread_mutex_lock(&d->lock);
    int status = KV_ON_DEVICE(d, generate, d->runner, of(r)->c, &token, 1, &s, next, NULL);
    if (*wanted == 2) *wanted = status == KV_OK && kv_token_is_end(r->m, *next);
    if (status == KV_OK && *wanted) status = KV_ON_DEVICE(d, logits, d->runner, 0, 0, 1, logits);
    pthread_mutex_unlock(&d->lock);
    return status;
}

static int  run_truncate(kv_run *r, int n) { return KV_ON_DEVICE(of(r)->d, cache_truncate, of(r)->c, 0, n); }
static int  run_n_tokens(const kv_run *r) { return of(r)->d->b->cache_n_tokens(of(r)->c, 0); }
static void run_path(kv_run *r, int path) { of(r)->d->b->cache_path(of(r)->c, path); }
static int  run_bytes(const kv_run *r, int layer, int side, kv_bytes *out) { return kv_device_bytes(of(r)->d, of(r)->c, r->plan, layer, side, out); }
static const char *run_paths(const kv_run *r) { return of(r)->d->b->cache_paths(of(r)->c); }
static int  run_mutate(kv_run *r, double seed, double share, double *n) { return KV_ON_DEVICE(of(r)->d, cache_mutate, of(r)->c, seed, share, n); }

double kv_device_tokens_compressed(const kv_geometry *g, const kv_plan *p, int n)
{
    double sum = 0;
    for (int l = 0; l < p->n_layers; l++)
        for (int i = 0; i < 2 * p->n_kv_heads; i++) {
            const int window = g->sliding ? g->sliding[l] : 0, granule = kv_plan_slot(p, l, i / 2, i % 2)->codec->granule, ripe = n - p->sink[l] - p->recent[l];
            const int first = window > 0 ? kv_max(0, n - window + 1 - p->sink[l]) / p->page_tokens * p->page_tokens : 0;
            if (ripe > 0 && !(window > 0 && p->recent[l] >= window)) sum += kv_max(0, ripe - ripe % granule - first);
        }
    return sum / (2.0 * p->n_layers * p->n_kv_heads);
}

static void run_pairs(const kv_run *r, kv_pairs *out)
{
    *out = (kv_pairs){ 0 };
    of(r)->d->b->cache_pairs(of(r)->c, &out->compressed, &out->total);
    out->tokens_compressed = kv_device_tokens_compressed(&r->m->geo, r->plan, run_n_tokens(r));
}

static int run_read(const kv_run *r, int layer, int head, int side, int tok0, int tok1, float *dst)
{
    return KV_ON_DEVICE(of(r)->d, cache_read, of(r)->c, 0, layer, head, side, tok0, tok1, dst);
}

static const kv_run_ops device_ops = {
    .feed_at_once = FEED_AT_ONCE, .free = run_free, .fork = run_fork, .feed = run_feed, .next = run_next, .truncate = run_truncate, .n_tokens = run_n_tokens, .path = run_path,
    .bytes = run_bytes, .pairs = run_pairs, .read = run_read, .mutate = run_mutate, .paths = run_paths,
};

/* ---- taps */

/* [n_layers or 1][heads][n][d] of one feed to where they belong among n_total tokens. */
static void place(float *dst, const float *src, int n_outer, int n, int start, int n_total, size_t d)
{
    for (int h = 0; h < n_outer; h++) memcpy(dst + ((size_t)h * (size_t)n_total + (size_t)start) * d, src + (size_t)h * (size_t)n * d, (size_t)n * d * sizeof(float));
}

int kv_device_tap(kv_model *m, const int32_t *tokens, int n, int layer, float *const to[5])
{
    enum { AT_ONCE = 512 };
    kv_device_model *d = kv_device_model_ref(m->dev);
    const int layers = layer < 0 ? m->info.n_layers : 1;
    const size_t dim = (size_t)m->info.head_dim;
    kv_plan *plan = NULL;
    kv_backend_cache *c = NULL;
    float *piece[5] = { 0 };
    int heads[5], status;
    FAIL_IF_ERROR(kv_plan_reference(&plan, m->geo.n_layers, m->geo.n_kv_heads, m->geo.head_dim));
    FAIL_IF_ERROR(kv_device_model_cache(d, m, plan, 1, n, &c));
    for (int i = 0; i < 5; i++) {
        status = KV_E_NOMEM;
        heads[i] = layers * (i < 2 ? m->info.n_heads : m->info.n_kv_heads);
        if (to[i] && !(piece[i] = kv_alloc_array((size_t)heads[i] * kv_min(n, AT_ONCE), dim * sizeof(float), false))) goto fail;
    }
    status = KV_OK;
    for (int start = 0; status == KV_OK && start < n; start += AT_ONCE) {
        const int part = kv_min(AT_ONCE, n - start);
        pthread_mutex_lock(&d->lock);
        status = KV_ON_DEVICE(d, tap, d->runner, layer, piece[0], piece[1], piece[2], piece[3], piece[4]);
        if (status == KV_OK) status = KV_ON_DEVICE(d, feed, d->runner, 1, &c, tokens + start, part, 1);
        d->b->tap(d->runner, -1, NULL, NULL, NULL, NULL, NULL, (char[256]){ 0 }, 256);
        pthread_mutex_unlock(&d->lock);
        for (int i = 0; status == KV_OK && i < 5; i++)
            if (to[i]) place(to[i], piece[i], heads[i], part, start, n, dim);
    }
fail:
    for (int i = 0; i < 5; i++) kv_free(piece[i]);
    if (c) d->b->cache_free(c);
    kv_plan_free(plan);
    kv_device_model_free(d);
    return status;
}

/* ---- batches */

struct kv_batch { kv_model *m; kv_device_model *d; kv_plan *plan; kv_backend_cache *c; int n_seqs; };

int kv_batch_new(kv_batch **out, kv_model *m, kv_plan *plan, int n_seqs, int max_tokens)
{
    RETURN_ERROR_IF(!out || !m, KV_E_ARG, "kv_batch_new: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(!m->dev, KV_E_UNSUPPORTED, "batch: model '%s' is on the cpu; batches run on a device (kv_model_device)", m->info.name);
    RETURN_ERROR_IF(n_seqs < 1 || n_seqs > 256, KV_E_ARG, "batch: n_seqs=%d is outside 1..256", n_seqs);
    RETURN_ERROR_IF(max_tokens < 1 || max_tokens > 1 << 24, KV_E_ARG, "batch: max_tokens=%d is outside 1..%d", max_tokens, 1 << 24);
    kv_batch *b = kv_zalloc(sizeof *b);
    if (!b) return KV_E_NOMEM;
    int status = KV_OK;
    b->m = kv_model_ref(m);
    b->d = kv_device_model_ref(m->dev);
    b->n_seqs = n_seqs;
    if (plan) b->plan = kv_plan_ref(plan);
    else FAIL_IF_ERROR(kv_plan_reference(&b->plan, m->geo.n_layers, m->geo.n_kv_heads, m->geo.head_dim));
    FAIL_IF_ERROR(kv_device_model_cache(b->d, m, b->plan, n_seqs, max_tokens, &b->c));
    *out = b;
    return KV_OK;
fail:
    kv_batch_free(b);
    return status;
}

void kv_batch_free(kv_batch *b)
{
    if (!b) return;
    if (b->c) b->d->b->cache_free(b->c);
    kv_device_model_free(b->d);
    kv_plan_free(b->plan);
    kv_model_free(b->m);
    kv_free(b);
}

int kv_batch_feed(kv_batch *b, const int32_t *tokens, int n, int shared, float *logits)
{
    RETURN_ERROR_IF(!b || !tokens, KV_E_ARG, "kv_batch_feed: NULL argument");
    RETURN_ERROR_IF(n < 1, KV_E_ARG, "batch: %d tokens to feed is less than 1", n);
    pthread_mutex_lock(&b->d->lock);
    const int status = feed_and_read(b->d, b->c, b->n_seqs, tokens, n, shared != 0, logits, 0, (size_t)b->m->info.n_vocab);
    pthread_mutex_unlock(&b->d->lock);
    return status;
}

int kv_batch_skip(kv_batch *b, int n)
{
    RETURN_ERROR_IF(!b || n < 1, KV_E_ARG, "kv_batch_skip: %s", b ? "n is less than 1" : "NULL argument");
    return KV_ON_DEVICE(b->d, cache_commit, b->c, n);
}

int kv_batch_generate(kv_batch *b, const int32_t *first, int n_steps, const kv_sampler_params *p, int32_t *tokens, double *seconds)
{
    RETURN_ERROR_IF(!b || !first || !p || !tokens, KV_E_ARG, "kv_batch_generate: NULL argument");
    const kv_backend_sampler s = { .temperature = p->temperature, .top_p = p->top_p, .seed = p->seed, .top_k = p->top_k };
    pthread_mutex_lock(&b->d->lock);
    const int status = KV_ON_DEVICE(b->d, generate, b->d->runner, b->c, first, n_steps, &s, tokens, seconds);
    pthread_mutex_unlock(&b->d->lock);
    return status;
}

static int check_seq(const kv_batch *b, int seq)
{
    RETURN_ERROR_IF(!b, KV_E_ARG, "batch is NULL");
    RETURN_ERROR_IF(seq < 0 || seq >= b->n_seqs, KV_E_ARG, "batch: sequence %d is outside 1..%d", seq + 1, b->n_seqs);
    return KV_OK;
}

int kv_batch_truncate(kv_batch *b, int seq, int n_tokens)
{
    FORWARD_IF_ERROR(check_seq(b, seq));
    return KV_ON_DEVICE(b->d, cache_truncate, b->c, seq, n_tokens);
}

int kv_batch_n_tokens(const kv_batch *b, int seq) { return check_seq(b, seq) < 0 ? 0 : b->d->b->cache_n_tokens(b->c, seq); }

int kv_batch_path(kv_batch *b, int path)
{
    RETURN_ERROR_IF(!b || path < KV_PATH_FUSED || path > KV_PATH_BF16, KV_E_ARG, "batch: path=%d is not 0 (fused), 1 (tile) or 2 (bf16)", path);
    b->d->b->cache_path(b->c, path);
    return KV_OK;
}

int kv_batch_bytes(const kv_batch *b, kv_bytes *out)
{
    RETURN_ERROR_IF(!b || !out, KV_E_ARG, "kv_batch_bytes: NULL argument");
    return kv_device_bytes(b->d, b->c, b->plan, -1, -1, out);
}

const char *kv_batch_paths(const kv_batch *b) { return b ? b->d->b->cache_paths(b->c) : ""; }
