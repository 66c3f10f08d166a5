/* session.c -- one sequence, here or on a device (run.h), and the logits it last made.
 *
 * Also what is a session in disguise: taps, which run a text once over an exact cache and keep Q, K and V of one layer. */
#include "calib.h"
#include "container.h"
#include "backend.h"
#include "run.h"

struct kv_session {
    kv_model   *m;
    kv_run     *run;
    float      *logits;
    size_t      logits_cap;
    int         n_logits, max_tokens;
};

static int session_alloc(kv_session **out, kv_model *m, int max_tokens)
{
    kv_session *s = kv_zalloc(sizeof *s);
    if (!s) return KV_E_NOMEM;
    s->m = kv_model_ref(m);
    s->max_tokens = max_tokens;
    *out = s;
    return KV_OK;
}

int kv_session_new(kv_session **out, kv_model *m, kv_plan *plan, int max_tokens)
{
    RETURN_ERROR_IF(!out || !m, KV_E_ARG, "kv_session_new: NULL argument");
    RETURN_ERROR_IF(max_tokens < 1 || max_tokens > 1 << 24, KV_E_ARG, "session: max_tokens=%d is outside 1..%d", max_tokens, 1 << 24);
    *out = NULL;
    kv_plan *p = NULL;
    kv_session *s = NULL;
    int status;
    if (plan) p = kv_plan_ref(plan);
    else FAIL_IF_ERROR(kv_plan_reference(&p, m->geo.n_layers, m->geo.n_kv_heads, m->geo.head_dim));
    FAIL_IF_ERROR(session_alloc(&s, m, max_tokens));
    FAIL_IF_ERROR(kv_run_new(&s->run, m, p, max_tokens));
    kv_plan_free(p);
    *out = s;
    return KV_OK;
fail:
    kv_plan_free(p);
    kv_session_free(s);
    return status;
}

void kv_session_free(kv_session *s)
{
    if (!s) return;
    kv_run_free(s->run);
    kv_free(s->logits);
    kv_model_free(s->m);
    kv_free(s);
}

int kv_session_path(kv_session *s, int path)
{
    RETURN_ERROR_IF(!s, KV_E_ARG, "session is NULL");
    RETURN_ERROR_IF(path != KV_PATH_FUSED && path != KV_PATH_TILE && (path != KV_PATH_BF16 || s->run->cache), KV_E_ARG, "session: path=%d is not 0 (fused), 1 (tile) or, on a device, 2 (bf16)", path);
    s->run->ops->path(s->run, path);
    return KV_OK;
}

static int reserve_logits(kv_session *s, int n)
{
    size_t count;
    RETURN_ERROR_IF(!kv_mul((size_t)n, (size_t)s->m->info.n_vocab, &count) || count > (size_t)1 << 31, KV_E_ARG, "session: logits of %d tokens x %d are too many; feed fewer at once", n, s->m->info.n_vocab);
    if (count <= s->logits_cap) return KV_OK;
    float *p = kv_alloc_array(count, sizeof *p, false);
    if (!p) return KV_E_NOMEM;
    kv_free(s->logits);
    s->logits = p;
    s->logits_cap = count;
    s->n_logits = 0;
    return KV_OK;
}

int kv_session_feed(kv_session *s, const int32_t *tokens, int n, int want_logits)
{
    RETURN_ERROR_IF(!s || !tokens, KV_E_ARG, "kv_session_feed: NULL argument");
    RETURN_ERROR_IF(n < 1, KV_E_ARG, "session: %d tokens to feed is less than 1", n);
    const int have = kv_session_n_tokens(s), at_once = s->run->ops->feed_at_once;
    RETURN_ERROR_IF(n > s->max_tokens - have, KV_E_ARG, "session: %d tokens after %d do not fit max_tokens=%d", n, have, s->max_tokens);
    RETURN_ERROR_IF(want_logits < 0 || want_logits > 2, KV_E_ARG, "session: want_logits=%d is outside 0..2", want_logits);
    const int rows = want_logits == 2 ? n : want_logits;
    if (rows) FORWARD_IF_ERROR(reserve_logits(s, rows));
    s->n_logits = 0;
    for (int done = 0; done < n;) {
        const int piece = kv_min(at_once, n - done), last = done + piece == n;
        float *to = want_logits == 2 ? s->logits + (size_t)done * (size_t)s->m->info.n_vocab : want_logits && last ? s->logits : NULL;
        const int status = s->run->ops->feed(s->run, tokens + done, piece, to, want_logits == 2);
        if (status < 0) {
            char why[512];                                  /* the truncation below may speak too */
            strncpy(why, kv_last_error(), sizeof why - 1);
            why[sizeof why - 1] = 0;
            s->run->ops->truncate(s->run, have);
            return kv_set_error(status, "%s", why);
        }
        done += piece;
    }
    s->n_logits = rows;
    return KV_OK;
}

int kv_session_next(kv_session *s, int token, const kv_sampler_params *p, int want_logits, int *next)
{
    RETURN_ERROR_IF(!s || !p || !next, KV_E_ARG, "kv_session_next: NULL argument");
    RETURN_ERROR_IF(want_logits < 0 || want_logits > 2, KV_E_ARG, "session: want_logits=%d is outside 0..2", want_logits);
    const int32_t id = token;
    if (!s->run->ops->next) {
        FORWARD_IF_ERROR(kv_session_feed(s, &id, 1, 1));
        return kv_sample(s->logits, s->m->info.n_vocab, p, kv_session_n_tokens(s), next);
    }
    RETURN_ERROR_IF(kv_session_n_tokens(s) >= s->max_tokens, KV_E_ARG, "session: 1 token after %d does not fit max_tokens=%d", kv_session_n_tokens(s), s->max_tokens);
    if (want_logits) FORWARD_IF_ERROR(reserve_logits(s, 1));
    s->n_logits = 0;
    int32_t drawn;
    FORWARD_IF_ERROR(s->run->ops->next(s->run, id, p, s->logits, &want_logits, &drawn));
    s->n_logits = want_logits;
    *next = drawn;
    return KV_OK;
}

const char *kv_session_where(const kv_session *s) { return s ? s->run->device : ""; }
const float *kv_session_logits(const kv_session *s) { return s && s->n_logits ? s->logits : NULL; }
const kv_model *kv_session_model(const kv_session *s) { return s->m; }
int kv_session_n_tokens(const kv_session *s) { return s ? s->run->ops->n_tokens(s->run) : 0; }

int kv_session_truncate(kv_session *s, int n_tokens)
{
    RETURN_ERROR_IF(!s, KV_E_ARG, "session is NULL");
    s->n_logits = 0;
    return s->run->ops->truncate(s->run, n_tokens);
}

int kv_session_fork(kv_session **out, const kv_session *s)
{
    RETURN_ERROR_IF(!out || !s, KV_E_ARG, "kv_session_fork: NULL argument");
    *out = NULL;
    kv_session *copy;
    FORWARD_IF_ERROR(session_alloc(&copy, s->m, s->max_tokens));
    const int status = s->run->ops->fork(&copy->run, s->run);
    if (status < 0) kv_session_free(copy);
    else *out = copy;
    return status;
}

int kv_session_bytes(const kv_session *s, kv_bytes *out)
{
    RETURN_ERROR_IF(!s || !out, KV_E_ARG, "kv_session_bytes: NULL argument");
    return s->run->ops->bytes(s->run, -1, -1, out);
}

int kv_session_layer_bytes(const kv_session *s, int layer, int side, kv_bytes *out)
{
    RETURN_ERROR_IF(!s || !out, KV_E_ARG, "kv_session_layer_bytes: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= s->m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, s->m->info.n_layers);
    RETURN_ERROR_IF(side < -1 || side > 1, KV_E_ARG, "side %d is not 0 (k), 1 (v) or -1 (both)", side);
    return s->run->ops->bytes(s->run, layer, side, out);
}

int kv_session_pairs(const kv_session *s, kv_pairs *out)
{
    RETURN_ERROR_IF(!s || !out, KV_E_ARG, "kv_session_pairs: NULL argument");
    s->run->ops->pairs(s->run, out);
    return KV_OK;
}

int kv_session_read(const kv_session *s, int layer, int head, int side, int tok0, int tok1, float *dst)
{
    RETURN_ERROR_IF(!s || !dst, KV_E_ARG, "kv_session_read: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= s->m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, s->m->info.n_layers);
    RETURN_ERROR_IF(head < 0 || head >= s->m->info.n_kv_heads, KV_E_ARG, "head %d is outside 1..%d", head + 1, s->m->info.n_kv_heads);
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "side %d is not 0 (k) or 1 (v)", side);
    RETURN_ERROR_IF(tok0 < 0 || tok1 < tok0 || tok1 > kv_session_n_tokens(s), KV_E_ARG, "tokens %d..%d are outside 1..%d", tok0 + 1, tok1, kv_session_n_tokens(s));
    return s->run->ops->read(s->run, layer, head, side, tok0, tok1, dst);
}

/* The cache, for what only one here can do. */
static int host_cache(const kv_session *s, const char *what, kv_cache **out)
{
    *out = NULL;
    RETURN_ERROR_IF(!s->run->cache, KV_E_UNSUPPORTED, "session: %s needs a session on the cpu; this one is on device '%s'", what, s->run->device);
    *out = s->run->cache;
    return KV_OK;
}

int kv_session_first_held(const kv_session *s, int layer)
{
    return s && s->run->cache && layer >= 0 && layer < s->m->info.n_layers ? kv_cache_first_held(s->run->cache, layer) : -1;
}

int kv_session_import(kv_session *s, int n)
{
    RETURN_ERROR_IF(!s, KV_E_ARG, "session is NULL");
    kv_cache *cache = NULL;
    FORWARD_IF_ERROR(host_cache(s, "import", &cache));
    s->n_logits = 0;
    return kv_cache_import(cache, n);
}

int kv_session_write(kv_session *s, int layer, int head, int side, int tok0, int tok1, const float *src)
{
    RETURN_ERROR_IF(!s || !src, KV_E_ARG, "kv_session_write: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= s->m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, s->m->info.n_layers);
    RETURN_ERROR_IF(head < 0 || head >= s->m->info.n_kv_heads, KV_E_ARG, "head %d is outside 1..%d", head + 1, s->m->info.n_kv_heads);
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "side %d is not 0 (k) or 1 (v)", side);
    kv_cache *cache = NULL;
    FORWARD_IF_ERROR(host_cache(s, "write", &cache));
    return kv_cache_write(cache, layer, head, side, tok0, tok1, src);
}

int kv_session_mutate(kv_session *s, double seed, double share, double *n)
{
    RETURN_ERROR_IF(!s || !n, KV_E_ARG, "kv_session_mutate: NULL argument");
    RETURN_ERROR_IF(!(share > 0 && share <= 1), KV_E_ARG, "mutate: share=%g is outside (0, 1]", share);
    return s->run->ops->mutate(s->run, seed, share, n);
}

const char *kv_session_paths(const kv_session *s) { return s ? s->run->ops->paths(s->run) : ""; }

/* ---- files */

kv_plan *kv_session_plan(const kv_session *s) { return s ? kv_plan_ref(s->run->plan) : NULL; }

int kv_session_max_tokens(const kv_session *s) { return s ? s->max_tokens : 0; }

int kv_session_save(const kv_session *s, const char *path, const int32_t *tokens, const char *about, const char *stage, int level)
{
    char model[65], rope[65];
    kv_pack_writer *w = NULL;
    int status, n_stage;
    kv_cache *cache = NULL;
    RETURN_ERROR_IF(!s || !path || !about || !stage || (!tokens && kv_session_n_tokens(s) > 0), KV_E_ARG, "kv_session_save: NULL argument");
    FORWARD_IF_ERROR(host_cache(s, "save", &cache));
    FORWARD_IF_ERROR(kv_stage_find(stage, &n_stage));
    kv_calib_fingerprint(s->m, model, rope);
    const kv_cache_extras x = { model, rope, about, tokens, s->logits, s->n_logits == 1 ? s->m->info.n_vocab : 0 };
    FAIL_IF_ERROR(kv_pack_create(&w, path));
    FAIL_IF_ERROR(kv_cache_save(cache, w, &x, n_stage, level));
    status = kv_pack_finish(w);
fail:
    kv_pack_abandon(w);
    return status;
}

int kv_session_load(kv_session **out, kv_model *m, const kv_pack *p, int max_tokens, int salvage)
{
    char model[65], rope[65];
    kv_session *s = NULL;
    kv_cache *cache = NULL;
    int status, n_logits;
    RETURN_ERROR_IF(!out || !m || !p, KV_E_ARG, "kv_session_load: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(m->dev, KV_E_UNSUPPORTED, "file '%s': a session is loaded on the cpu; the model is on device '%s'", kv_pack_name(p), kv_device_model_name(m->dev));
    kv_calib_fingerprint(m, model, rope);
    FORWARD_IF_ERROR(kv_cache_load(&cache, &m->geo, p, &(kv_cache_extras){ .model = model, .rope = rope }, max_tokens, salvage, &n_logits));
    FAIL_IF_ERROR(session_alloc(&s, m, kv_cache_max_tokens(cache)));
    FAIL_IF_ERROR(kv_run_adopt(&s->run, m, cache));
    cache = NULL;
    if (n_logits) {
        FAIL_IF(n_logits != m->info.n_vocab, KV_E_CORRUPT, "file '%s': %d logits, the model has %d", kv_pack_name(p), n_logits, m->info.n_vocab);
        FAIL_IF_ERROR(reserve_logits(s, 1));
        FAIL_IF_ERROR(kv_pack_read(p, kv_pack_find(p, "cache", 0), 5, s->logits, (size_t)n_logits * sizeof(float)));
        s->n_logits = 1;
    }
    *out = s;
    return KV_OK;
fail:
    if (cache) kv_cache_free(cache);
    kv_session_free(s);
    return status;
}

/* ---- taps */

typedef struct tap { const kv_model_info *info; int layer, n_total, start; float *q, *q_pre, *k, *k_pre, *v; } tap;

static void keep(float *dst, const float *src, int n_heads, const tap *t, int layer, int n)      /* [n][heads][d] -> [heads][n_total][d] */
{
    const size_t d = (size_t)t->info->head_dim;
    if (dst && t->layer < 0) dst += (size_t)layer * (size_t)n_heads * (size_t)t->n_total * d;
    if (dst)
        for (int h = 0; h < n_heads; h++)
            for (int i = 0; i < n; i++)
                memcpy(dst + ((size_t)h * (size_t)t->n_total + (size_t)(t->start + i)) * d, src + ((size_t)i * (size_t)n_heads + (size_t)h) * d, d * sizeof(float));
}

static void on_tap(void *ctx, int lane, int layer, int n, const float *q_pre, const float *q, const float *k_pre, const float *k, const float *v)
{
    (void)lane;
    const tap *t = ctx;
    if (t->layer >= 0 && layer != t->layer) return;
    keep(t->q, q, t->info->n_heads, t, layer, n);
    keep(t->q_pre, q_pre, t->info->n_heads, t, layer, n);
    keep(t->k, k, t->info->n_kv_heads, t, layer, n);
    keep(t->k_pre, k_pre, t->info->n_kv_heads, t, layer, n);
    keep(t->v, v, t->info->n_kv_heads, t, layer, n);
}

static int tap_here(kv_model *m, const int32_t *tokens, int n, tap *t)
{
    enum { AT_ONCE = 512 };
    kv_plan *plan = NULL;
    kv_cache *cache = NULL;
    kv_forward *f = NULL;
    int status, more;
    FAIL_IF_ERROR(kv_plan_reference(&plan, m->geo.n_layers, m->geo.n_kv_heads, m->geo.head_dim));
    FAIL_IF_ERROR(kv_cache_new(&cache, &m->geo, plan, n));
    FAIL_IF_ERROR(kv_forward_new(&f, m, 1, kv_min(AT_ONCE, n)));
    kv_forward_tap(f, on_tap, t);
    for (; t->start < n; t->start += AT_ONCE) {
        FAIL_IF_ERROR(kv_forward_begin(f, &cache, tokens + t->start, kv_min(AT_ONCE, n - t->start)));
        do FAIL_IF_ERROR(kv_forward_layer(f, &more)); while (more);
    }
    status = KV_OK;
fail:
    kv_forward_free(f);
    if (cache) kv_cache_free(cache);
    kv_plan_free(plan);
    return status;
}

int kv_model_tap(kv_model *m, const int32_t *tokens, int n, int layer, float *q, float *q_pre, float *k, float *k_pre, float *v)
{
    RETURN_ERROR_IF(!m || !tokens, KV_E_ARG, "kv_model_tap: NULL argument");
    RETURN_ERROR_IF(layer < -1 || layer >= m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, m->info.n_layers);
    RETURN_ERROR_IF(n < 1 || n > 1 << 20, KV_E_ARG, "tap: %d tokens is outside 1..%d", n, 1 << 20);
    if (m->dev) return kv_device_tap(m, tokens, n, layer, (float *const[]){ q, q_pre, k, k_pre, v });
    tap t = { &m->info, layer, n, 0, q, q_pre, k, k_pre, v };
    return tap_here(m, tokens, n, &t);
}
