/* host_run.c -- a sequence on the CPU: a cache and forward passes of one lane. */
#include "device_model.h"
#include "run.h"

enum { FEED_AT_ONCE = 512 /* tokens of one pass: past this the products gain nothing and activations grow */ };

typedef struct host_run {
    kv_run      run;
    kv_forward *one, *many;                   /* passes of 1 and of up to FEED_AT_ONCE tokens; the second is made when needed */
} host_run;

static void host_free(kv_run *r)
{
    host_run *h = (host_run *)r;
    if (r->cache) kv_cache_free(r->cache);
    kv_forward_free(h->one);
    kv_forward_free(h->many);
    kv_model_free(r->m);
    kv_free(h);
}

static int host_feed(kv_run *r, const int32_t *tokens, int n, float *logits, int all)
{
    host_run *h = (host_run *)r;
    if (n > 1 && !h->many) FORWARD_IF_ERROR(kv_forward_new(&h->many, r->m, 1, kv_min(FEED_AT_ONCE, kv_cache_max_tokens(r->cache))));
    kv_forward *f = n > 1 ? h->many : h->one;
    int more = 1;
    FORWARD_IF_ERROR(kv_forward_begin(f, &r->cache, tokens, n));
    while (more) FORWARD_IF_ERROR(kv_forward_layer(f, &more));
    if (!logits) return KV_OK;
    const float *hidden = kv_forward_hidden(f, 0);
    return all ? kv_logits(r->m, hidden, n, logits) : kv_logits(r->m, hidden + (size_t)(n - 1) * (size_t)r->m->info.n_embd, 1, logits);
}

static int host_fork(kv_run **out, const kv_run *r)
{
    kv_cache *c;
    FORWARD_IF_ERROR(kv_cache_fork(&c, r->cache));
    const int status = kv_run_adopt(out, r->m, c);
    if (status < 0) kv_cache_free(c);
    return status;
}

static int  host_truncate(kv_run *r, int n) { return kv_cache_truncate(r->cache, n); }
static int  host_n_tokens(const kv_run *r) { return kv_cache_n_tokens(r->cache); }
static void host_path(kv_run *r, int path) { kv_cache_path(r->cache, path); }
static int  host_bytes(const kv_run *r, int layer, int side, kv_bytes *out) { return kv_cache_bytes(r->cache, layer, side, out); }
static void host_pairs(const kv_run *r, kv_pairs *out) { kv_cache_pairs(r->cache, out); }
static const char *host_paths(const kv_run *r) { return kv_cache_paths(r->cache); }

static int host_read(const kv_run *r, int layer, int head, int side, int tok0, int tok1, float *dst) { return kv_cache_read(r->cache, layer, head, side, tok0, tok1, dst); }

static int host_mutate(kv_run *r, double seed, double share, double *n)
{
    *n = kv_cache_mutate(r->cache, seed, share);
    return KV_OK;
}

static const kv_run_ops host_ops = {
    .feed_at_once = FEED_AT_ONCE, .free = host_free, .fork = host_fork, .feed = host_feed, .truncate = host_truncate, .n_tokens = host_n_tokens, .path = host_path,
    .bytes = host_bytes, .pairs = host_pairs, .read = host_read, .mutate = host_mutate, .paths = host_paths,
};

int kv_run_adopt(kv_run **out, kv_model *m, kv_cache *c)
{
    RETURN_ERROR_IF(!m->embed.data, KV_E_UNSUPPORTED, "model '%s' has a shape only: its weights are on a device", m->info.name);
    host_run *h = kv_zalloc(sizeof *h);
    if (!h) return KV_E_NOMEM;
    h->run = (kv_run){ .ops = &host_ops, .m = kv_model_ref(m), .device = "cpu" };
    const int status = kv_forward_new(&h->one, m, 1, 1);
    if (status < 0) {
        host_free(&h->run);
        return status;
    }
    h->run.cache = c;
    h->run.plan = kv_cache_plan(c);
    *out = &h->run;
    return KV_OK;
}

int kv_run_new(kv_run **out, kv_model *m, kv_plan *plan, int max_tokens)
{
    if (m->dev) return kv_device_run_new(out, m, plan, max_tokens);
    kv_cache *c;
    FORWARD_IF_ERROR(kv_cache_new(&c, &m->geo, plan, max_tokens));
    const int status = kv_run_adopt(out, m, c);
    if (status < 0) kv_cache_free(c);
    return status;
}
