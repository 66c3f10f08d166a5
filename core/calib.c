/* calib.c -- streaming moments of keys and values over a calibration text, per layer, head and channel.
 *
 * Means are over all positions but the first `skip` of each chunk: position 0 is an outlier that takes half of all
 * attention, and stays exact anyway (BEYOND 4.5). */
#include <math.h>
#include "model.h"

struct kv_calib {
    kv_model   *m;
    kv_forward *f;
    kv_cache   *cache;
    double     *sum[3];               /* by KV_CALIB_*: [n_layers][n_kv_heads][head_dim] */
    double      count;
    int         skip, busy;
};

static void on_tap(void *ctx, int lane, int layer, int n, const float *q_pre, const float *q, const float *k_pre, const float *k, const float *v)
{
    (void)lane, (void)q_pre, (void)q;
    kv_calib *c = ctx;
    const size_t row = (size_t)c->m->info.n_kv_heads * (size_t)c->m->info.head_dim;
    const float *const src[] = { [KV_CALIB_K] = k, [KV_CALIB_K_PRE] = k_pre, [KV_CALIB_V] = v };
    for (int what = 0; what < 3; what++) {
        double *to = c->sum[what] + (size_t)layer * row;
        for (int t = c->skip; t < n; t++)
            for (size_t i = 0; i < row; i++) to[i] += src[what][(size_t)t * row + i];
    }
}

int kv_calib_new(kv_calib **out, kv_model *m)
{
    RETURN_ERROR_IF(!out || !m, KV_E_ARG, "kv_calib_new: NULL argument");
    *out = NULL;
    kv_calib *c = kv_zalloc(sizeof *c);
    if (!c) return KV_E_NOMEM;
    c->m = kv_model_ref(m);
    const size_t n = (size_t)m->info.n_layers * (size_t)m->info.n_kv_heads * (size_t)m->info.head_dim;
    for (int what = 0; what < 3; what++)
        if (!(c->sum[what] = kv_alloc_array(n, sizeof(double), true))) {
            kv_calib_free(c);
            return KV_E_NOMEM;
        }
    *out = c;
    return KV_OK;
}

static void end_chunk(kv_calib *c)
{
    kv_forward_free(c->f);
    if (c->cache) kv_cache_free(c->cache);
    c->f = NULL;
    c->cache = NULL;
    c->busy = 0;
}

void kv_calib_free(kv_calib *c)
{
    if (!c) return;
    end_chunk(c);
    for (int what = 0; what < 3; what++) kv_free(c->sum[what]);
    kv_model_free(c->m);
    kv_free(c);
}

int kv_calib_begin(kv_calib *c, const int32_t *tokens, int n, int skip)
{
    RETURN_ERROR_IF(!c || !tokens, KV_E_ARG, "kv_calib_begin: NULL argument");
    RETURN_ERROR_IF(n < 1 || n > 1 << 14, KV_E_ARG, "calibration: a chunk of %d tokens is outside 1..%d", n, 1 << 14);
    RETURN_ERROR_IF(skip < 0 || skip >= n, KV_E_ARG, "calibration: skip=%d is outside 0..%d", skip, n - 1);
    RETURN_ERROR_IF(c->busy, KV_E_ARG, "calibration: the chunk before is not finished");
    kv_plan *plan;
    const kv_geometry *g = &c->m->geo;
    int status;
    FORWARD_IF_ERROR(kv_plan_reference(&plan, g->n_layers, g->n_kv_heads, g->head_dim));
    FAIL_IF_ERROR(kv_cache_new(&c->cache, g, plan, n));
    FAIL_IF_ERROR(kv_forward_new(&c->f, c->m, 1, n));
    kv_forward_tap(c->f, on_tap, c);
    FAIL_IF_ERROR(kv_forward_begin(c->f, &c->cache, tokens, n));
    c->skip = skip;
    c->count += n - skip;
    c->busy = 1;
    kv_plan_free(plan);
    return KV_OK;
fail:
    kv_plan_free(plan);
    end_chunk(c);
    return status;
}

int kv_calib_step(kv_calib *c, int *more)
{
    RETURN_ERROR_IF(!c || !more, KV_E_ARG, "kv_calib_step: NULL argument");
    RETURN_ERROR_IF(!c->busy, KV_E_ARG, "calibration: no chunk was begun");
    const int status = kv_forward_layer(c->f, more);
    if (status < 0 || !*more) end_chunk(c);
    return status;
}

static int check(const kv_calib *c, int layer, int head, const float *mean)
{
    RETURN_ERROR_IF(!c || !mean, KV_E_ARG, "calibration: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= c->m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, c->m->info.n_layers);
    RETURN_ERROR_IF(head < 0 || head >= c->m->info.n_kv_heads, KV_E_ARG, "head %d is outside 1..%d", head + 1, c->m->info.n_kv_heads);
    RETURN_ERROR_IF(c->busy || c->count == 0, KV_E_UNCALIBRATED, "calibration: %s", c->busy ? "a chunk is not finished" : "no text was seen");
    return KV_OK;
}

int kv_calib_mean(const kv_calib *c, int what, int layer, int head, float *mean)
{
    FORWARD_IF_ERROR(check(c, layer, head, mean));
    RETURN_ERROR_IF(what < 0 || what > KV_CALIB_V, KV_E_ARG, "calibration: what=%d is outside 0..2 (k, k_pre, v)", what);
    const int d = c->m->info.head_dim;
    const double *sum = c->sum[what] + ((size_t)layer * (size_t)c->m->info.n_kv_heads + (size_t)head) * (size_t)d;
    for (int i = 0; i < d; i++) mean[i] = (float)(sum[i] / c->count);
    return KV_OK;
}

/* mean := average over p = 0..n-1 of R_p mean, in double. */
static void spread(const kv_rope *r, int n, float *mean)
{
    const int half = r->n_rot / 2;
    for (int i = 0; i < half; i++) {
        double c = 0, s = 0;
        for (int p = 0; p < n; p++) {
            c += cos(p * r->freq[i]);
            s += sin(p * r->freq[i]);
        }
        const double a = mean[i], b = mean[i + half];
        mean[i] = (float)((a * c - b * s) / n);
        mean[i + half] = (float)((a * s + b * c) / n);
    }
}

int kv_calib_page_mean(const kv_calib *c, int layer, int head, int page_tokens, float *mean)
{
    RETURN_ERROR_IF(page_tokens < 1 || page_tokens > KV_MAX_PAGE, KV_E_ARG, "page_tokens=%d is outside 1..%d", page_tokens, KV_MAX_PAGE);
    FORWARD_IF_ERROR(kv_calib_mean(c, KV_CALIB_K_PRE, layer, head, mean));
    spread(&c->m->geo.rope[layer], page_tokens, mean);
    return KV_OK;
}

int kv_calib_count(const kv_calib *c, double *n_tokens)
{
    RETURN_ERROR_IF(!c || !n_tokens, KV_E_ARG, "kv_calib_count: NULL argument");
    *n_tokens = c->count;
    return KV_OK;
}

int kv_model_bias_mean(const kv_model *m, int layer, int head, int n_positions, float *mean)
{
    RETURN_ERROR_IF(!m || !mean, KV_E_ARG, "kv_model_bias_mean: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, m->info.n_layers);
    RETURN_ERROR_IF(head < 0 || head >= m->info.n_kv_heads, KV_E_ARG, "head %d is outside 1..%d", head + 1, m->info.n_kv_heads);
    RETURN_ERROR_IF(n_positions < 1 || n_positions > 1 << 24, KV_E_ARG, "n_positions=%d is outside 1..%d", n_positions, 1 << 24);
    const float *bias = kv_model_key_bias(m, layer);
    RETURN_ERROR_IF(!bias, KV_E_UNSUPPORTED, "model '%s' has no key bias: calibrate a mean on a text instead", m->info.arch);
    memcpy(mean, bias + (size_t)head * (size_t)m->info.head_dim, (size_t)m->info.head_dim * sizeof(float));
    spread(&m->geo.rope[layer], n_positions, mean);
    return KV_OK;
}
