/* calib.c -- streaming moments of queries, keys and values over a calibration text, per layer and K/V head.
 *
 * Figures are over all positions but the first `skip` of each chunk: position 0 is an outlier that takes half of all
 * attention, and stays exact anyway (BEYOND 4.5).  A reservoir of tokens is kept besides (algorithm R, numbers of Philox by
 * the token's index, so that it depends on the text alone): the same tokens in every layer, for what needs rows. */
#include <math.h>
#include "calib.h"

enum { BLOCK = 256 /* rows of one matrix product: its float sums are added up in double */ };

struct kv_calib_work {
    kv_forward  *f;
    kv_cache    *cache;
    float       *scratch;             /* [threads][D * BLOCK + D * D] */
    int32_t     *keep;                /* [n] place in the sample, or -1 */
    int          n, skip, first, layer;
    const float *rows[KV_CALIB_KINDS];
};

/* ---- one layer of one chunk */

static void add_block(kv_calib *c, int kind, size_t slot, const float *x, size_t ld, int n, float *scratch)
{
    const int d = c->m->info.head_dim;
    const float *shift = c->shift[kind] + slot * (size_t)d;
    double *sum = c->sum[kind] + slot * (size_t)d, *product = c->product[kind] + slot * kv_calib_triangle(c);
    float *turned = scratch, *square = scratch + (size_t)d * BLOCK;
    for (int i = 0; i < d; i++) {
        double s = 0;
        for (int t = 0; t < n; t++) s += turned[(size_t)i * BLOCK + t] = x[(size_t)t * ld + i] - shift[i];
        sum[i] += s;
    }
    kv_sgemm_nt(d, d, n, 1, turned, BLOCK, turned, BLOCK, 0, square, d);
    for (int i = 0; i < d; i++)
        for (int k = 0; k <= i; k++) *product++ += square[(size_t)i * d + k];
}

static void add_slot(void *ctx, int task, int thread)
{
    kv_calib *c = ctx;
    const kv_calib_work *w = c->work;
    const kv_model_info *info = &c->m->info;
    const int heads = info->n_kv_heads, kind = task / heads, head = task % heads, d = info->head_dim;
    const int query = kind == KV_CALIB_Q || kind == KV_CALIB_Q_PRE, group = query ? info->n_heads / heads : 1, n = w->n - w->skip;
    const size_t slot = (size_t)w->layer * heads + head, ld = (size_t)d * heads * group;
    if (query && (c->without & KV_CALIB_NO_QUERIES)) return;
    const float *x = w->rows[kind] + w->skip * ld + (size_t)head * group * d;
    float *shift = c->shift[kind] + slot * (size_t)d;
    for (int i = 0; w->first && i < d; i++) {
        double s = 0;
        for (int t = 0; t < n; t++)
            for (int g = 0; g < group; g++) s += x[t * ld + (size_t)g * d + i];
        shift[i] = (float)(s / ((double)n * group));
    }
    float *scratch = w->scratch + (size_t)thread * ((size_t)d * BLOCK + (size_t)d * d);
    for (int g = 0; g < group; g++)
        for (int t = 0; t < n; t += BLOCK) add_block(c, kind, slot, x + t * ld + (size_t)g * d, ld, kv_min(BLOCK, n - t), scratch);
    if ((kind != KV_CALIB_K_PRE && kind != KV_CALIB_V) || (c->without & KV_CALIB_NO_ROWS)) return;
    uint16_t *sample = c->sample[kind == KV_CALIB_V] + slot * (size_t)c->max_sample * d;
    for (int t = 0; t < n; t++) {
        if (w->keep[w->skip + t] < 0) continue;
        uint16_t *to = sample + (size_t)w->keep[w->skip + t] * d;
        for (int i = 0; i < d; i++) to[i] = kv_f32_to_f16(fminf(fmaxf(x[t * ld + i] - shift[i], -65504), 65504));
    }
}

static void on_tap(void *ctx, int lane, int layer, int n, const float *q_pre, const float *q, const float *k_pre, const float *k, const float *v)
{
    (void)lane, (void)n;
    kv_calib *c = ctx;
    kv_calib_work *w = c->work;
    w->layer = layer;
    w->rows[KV_CALIB_K] = k;
    w->rows[KV_CALIB_K_PRE] = k_pre;
    w->rows[KV_CALIB_V] = v;
    w->rows[KV_CALIB_Q] = q;
    w->rows[KV_CALIB_Q_PRE] = q_pre;
    kv_parallel(KV_CALIB_KINDS * c->m->info.n_kv_heads, add_slot, c);
}

/* ---- life */

int kv_calib_alloc(kv_calib **out, kv_model *m, int max_sample)
{
    kv_calib *c = kv_zalloc(sizeof *c);
    if (!c) return KV_E_NOMEM;
    c->m = kv_model_ref(m);
    c->max_sample = max_sample;
    c->n_slots = m->info.n_layers * m->info.n_kv_heads;
    const size_t slots = (size_t)c->n_slots, d = (size_t)m->info.head_dim;
    bool ok = (c->position = kv_alloc_array((size_t)max_sample, sizeof *c->position, true)) != NULL;
    for (int kind = 0; ok && kind < KV_CALIB_KINDS; kind++)
        ok = (c->shift[kind] = kv_alloc_array(slots * d, sizeof(float), true)) && (c->sum[kind] = kv_alloc_array(slots * d, sizeof(double), true)) &&
             (c->product[kind] = kv_alloc_array(slots * kv_calib_triangle(c), sizeof(double), true));
    for (int i = 0; ok && i < 2; i++) ok = (c->sample[i] = kv_alloc_array(slots * (size_t)max_sample, d * sizeof(uint16_t), true)) != NULL;
    if (!ok) {
        kv_calib_free(c);
        return KV_E_NOMEM;
    }
    kv_calib_fingerprint(m, c->model_sha, c->rope_sha);
    memset(c->tokens_sha, '0', 64);
    *out = c;
    return KV_OK;
}

int kv_calib_new(kv_calib **out, kv_model *m, int n_sample)
{
    RETURN_ERROR_IF(!out || !m, KV_E_ARG, "kv_calib_new: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(n_sample < 0 || n_sample > 1 << 20, KV_E_ARG, "calibration: a sample of %d rows is outside 0..%d", n_sample, 1 << 20);
    return kv_calib_alloc(out, m, n_sample ? n_sample : KV_CALIB_SAMPLE);
}

int kv_calib_leave_out(kv_calib *c, int what)
{
    RETURN_ERROR_IF(!c, KV_E_ARG, "kv_calib_leave_out: NULL argument");
    RETURN_ERROR_IF(what & ~(KV_CALIB_NO_QUERIES | KV_CALIB_NO_ROWS), KV_E_ARG, "calibration: %d is no sum of 1 (queries) and 2 (rows)", what);
    RETURN_ERROR_IF(c->count > 0, KV_E_ARG, "calibration: what is left out is said before the first chunk");
    c->without = what;
    return KV_OK;
}

static void end_chunk(kv_calib *c)
{
    kv_calib_work *w = c->work;
    if (!w) return;
    kv_forward_free(w->f);
    if (w->cache) kv_cache_free(w->cache);
    kv_free(w->scratch);
    kv_free(w->keep);
    kv_free(w);
    c->work = NULL;
}

void kv_calib_free(kv_calib *c)
{
    if (!c) return;
    end_chunk(c);
    for (int kind = 0; kind < KV_CALIB_KINDS; kind++) {
        kv_free(c->shift[kind]);
        kv_free(c->sum[kind]);
        kv_free(c->product[kind]);
    }
    for (int i = 0; i < 2; i++) kv_free(c->sample[i]);
    kv_free(c->position);
    kv_free(c->block);
    kv_free(c->notes);
    kv_model_free(c->m);
    kv_free(c);
}

/* Token number `index` of all seen: its place in the sample, or -1.  Each of n tokens stays with probability max / n. */
static int choose(kv_calib *c, double index)
{
    if (c->n_sample < c->max_sample) return c->n_sample++;
    uint32_t r[4];
    kv_rng_u32(1, 0, 0x63616c69 /* "cali" */, (uint32_t)(uint64_t)index, r);
    const double place = floor((double)r[0] * (index + 1) / 4294967296.0);
    return place < c->max_sample ? (int)place : -1;
}

int kv_calib_begin(kv_calib *c, const int32_t *tokens, int n, int skip)
{
    RETURN_ERROR_IF(!c || !tokens, KV_E_ARG, "kv_calib_begin: NULL argument");
    RETURN_ERROR_IF(n < 1 || n > 1 << 14, KV_E_ARG, "calibration: a chunk of %d tokens is outside 1..%d", n, 1 << 14);
    RETURN_ERROR_IF(skip < 0 || skip >= n, KV_E_ARG, "calibration: skip=%d is outside 0..%d", skip, n - 1);
    RETURN_ERROR_IF(c->work, KV_E_ARG, "calibration: the chunk before is not finished");
    RETURN_ERROR_IF(c->broken, KV_E_ARG, "calibration: a chunk failed halfway; start another");
    const kv_geometry *g = &c->m->geo;
    const size_t d = (size_t)g->head_dim;
    kv_plan *plan = NULL;
    int status = KV_E_NOMEM;
    kv_calib_work *w = c->work = kv_zalloc(sizeof *w);
    if (!w) return KV_E_NOMEM;
    w->n = n;
    w->skip = skip;
    w->first = c->count == 0;
    if (!(w->scratch = kv_alloc_array((size_t)kv_threads(), (d * BLOCK + d * d) * sizeof(float), false)) || !(w->keep = kv_alloc_array((size_t)n, sizeof *w->keep, false))) goto fail;
    FAIL_IF_ERROR(kv_plan_reference(&plan, g->n_layers, g->n_kv_heads, g->head_dim));
    FAIL_IF_ERROR(kv_cache_new(&w->cache, g, plan, n));
    FAIL_IF_ERROR(kv_forward_new(&w->f, c->m, 1, n));
    kv_forward_tap(w->f, on_tap, c);
    FAIL_IF_ERROR(kv_forward_begin(w->f, &w->cache, tokens, n));
    for (int t = 0; t < n; t++) {
        w->keep[t] = t < skip || (c->without & KV_CALIB_NO_ROWS) ? -1 : choose(c, c->count + t - skip);
        if (w->keep[t] >= 0) c->position[w->keep[t]] = t;
    }
    c->count += n - skip;
    kv_plan_free(plan);
    plan = NULL;
    status = kv_calib_remember(c, tokens, n, skip);
    if (status >= 0) return KV_OK;
    c->broken = 1;
fail:
    kv_plan_free(plan);
    end_chunk(c);
    return status;
}

int kv_calib_step(kv_calib *c, int *more)
{
    RETURN_ERROR_IF(!c || !more, KV_E_ARG, "kv_calib_step: NULL argument");
    RETURN_ERROR_IF(!c->work, KV_E_ARG, "calibration: no chunk was begun");
    const int status = kv_forward_layer(c->work->f, more);
    if (status < 0) c->broken = 1;
    if (status < 0 || !*more) end_chunk(c);
    return status;
}

/* ---- what was collected */

static int check(const kv_calib *c, int layer, int head, const void *out)
{
    RETURN_ERROR_IF(!c || !out, KV_E_ARG, "calibration: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= c->m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, c->m->info.n_layers);
    RETURN_ERROR_IF(head < 0 || head >= c->m->info.n_kv_heads, KV_E_ARG, "head %d is outside 1..%d", head + 1, c->m->info.n_kv_heads);
    RETURN_ERROR_IF(c->work || c->broken || c->count == 0, KV_E_UNCALIBRATED, "calibration: %s", c->work || c->broken ? "a chunk is not finished" : "no text was seen");
    return KV_OK;
}

int kv_calib_raw(const kv_calib *c, int kind, int layer, int head, double *n, double *mean, double *second)
{
    FORWARD_IF_ERROR(check(c, layer, head, mean));
    RETURN_ERROR_IF(kind < 0 || kind >= KV_CALIB_KINDS, KV_E_ARG, "calibration: kind=%d is outside 0..%d", kind, KV_CALIB_KINDS - 1);
    RETURN_ERROR_IF(kind >= KV_CALIB_Q && (c->without & KV_CALIB_NO_QUERIES), KV_E_UNCALIBRATED, "calibration: queries were left out of this one");
    const int d = c->m->info.head_dim;
    const size_t slot = (size_t)layer * (size_t)c->m->info.n_kv_heads + (size_t)head;
    const float *shift = c->shift[kind] + slot * (size_t)d;
    const double *sum = c->sum[kind] + slot * (size_t)d, *product = c->product[kind] + slot * kv_calib_triangle(c);
    *n = c->count * (kind >= KV_CALIB_Q ? c->m->info.n_heads / c->m->info.n_kv_heads : 1);
    for (int i = 0; i < d; i++) {
        mean[i] = shift[i] + sum[i] / *n;
        RETURN_ERROR_IF(!isfinite(mean[i]) || !isfinite(product[(size_t)i * ((size_t)i + 3) / 2]), KV_E_ARG, "calibration: layer %d head %d channel %d is not finite", layer + 1, head + 1, i + 1);
    }
    /* E x x^T = E (x-s)(x-s)^T + s m^T + m s^T - s s^T, m the mean */
    for (int i = 0; second && i < d; i++)
        for (int k = 0; k <= i; k++)
            second[(size_t)i * d + k] = second[(size_t)k * d + i] = *product++ / *n + shift[i] * mean[k] + mean[i] * shift[k] - (double)shift[i] * shift[k];
    return KV_OK;
}

int kv_calib_rows(const kv_calib *c, int kind, int layer, int head, float *dst)
{
    FORWARD_IF_ERROR(check(c, layer, head, dst));
    RETURN_ERROR_IF(kind != KV_CALIB_K_PRE && kind != KV_CALIB_V, KV_E_ARG, "calibration: rows of kind %d are not kept (kept: 1, k_pre; 2, v)", kind);
    RETURN_ERROR_IF(c->without & KV_CALIB_NO_ROWS, KV_E_UNCALIBRATED, "calibration: rows were left out of this one");
    const size_t d = (size_t)c->m->info.head_dim, slot = (size_t)layer * (size_t)c->m->info.n_kv_heads + (size_t)head;
    const float *shift = c->shift[kind] + slot * d;
    const uint16_t *from = c->sample[kind == KV_CALIB_V] + slot * (size_t)c->max_sample * d;
    for (size_t t = 0; t < (size_t)c->n_sample; t++)
        for (size_t i = 0; i < d; i++) dst[t * d + i] = shift[i] + kv_f16_to_f32(from[t * d + i]);
    return KV_OK;
}

int kv_calib_mean(const kv_calib *c, int what, int layer, int head, float *mean)
{
    double n, m[KV_MAX_HEAD_DIM];
    RETURN_ERROR_IF(!mean, KV_E_ARG, "kv_calib_mean: NULL argument");
    FORWARD_IF_ERROR(kv_calib_raw(c, what, layer, head, &n, m, NULL));
    for (int i = 0; i < c->m->info.head_dim; i++) mean[i] = (float)m[i];
    return KV_OK;
}

int kv_calib_rms(const kv_calib *c, int what, int layer, int head, float *rms)
{
    double n, m[KV_MAX_HEAD_DIM];
    RETURN_ERROR_IF(!rms, KV_E_ARG, "kv_calib_rms: NULL argument");
    FORWARD_IF_ERROR(kv_calib_raw(c, what, layer, head, &n, m, NULL));
    const int d = c->m->info.head_dim;
    const size_t slot = (size_t)layer * (size_t)c->m->info.n_kv_heads + (size_t)head;
    const double *product = c->product[what] + slot * kv_calib_triangle(c);
    for (int i = 0; i < d; i++) {
        const double s = c->shift[what][slot * (size_t)d + (size_t)i];
        rms[i] = (float)sqrt(fmax(0, product[(size_t)i * ((size_t)i + 3) / 2] / n + 2 * s * m[i] - s * s));
    }
    return KV_OK;
}

int kv_calib_second(const kv_calib *c, int what, int layer, int head, float *second)
{
    RETURN_ERROR_IF(!c || !second, KV_E_ARG, "kv_calib_second: NULL argument");
    const size_t d = (size_t)c->m->info.head_dim;
    double n, m[KV_MAX_HEAD_DIM], *s = kv_alloc_array(d * d, sizeof *s, false);
    if (!s) return KV_E_NOMEM;
    const int status = kv_calib_raw(c, what, layer, head, &n, m, s);
    for (size_t i = 0; status >= 0 && i < d * d; i++) second[i] = (float)s[i];
    kv_free(s);
    return status;
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
