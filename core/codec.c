/* codec.c -- the registry of codecs, their parameters as text, and attention by decoding a tile.
 *
 * A codec instance is immutable once made: its parameters are parsed, checked and written back in a canonical text that
 * lists every one of them, its state is built by ops->init, and the ledger of one page is closed here: the page is rounded
 * up to 64 bytes, the rest counted as padding. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "calib.h"

static const kv_codec_ops *const registry[] = {
#define KV_CODEC(name) &kv_codec_##name,
#include "codecs/registry.def"
#undef KV_CODEC
};
enum { N_CODECS = sizeof registry / sizeof *registry, MAX_BLOB = 1 << 30 /* bytes of one codec's tables */ };

int kv_codec_count(void) { return N_CODECS; }

int kv_codec_describe(int index, kv_codec_desc *out)
{
    RETURN_ERROR_IF(!out, KV_E_ARG, "codec: NULL description");
    RETURN_ERROR_IF(index < 0 || index >= N_CODECS, KV_E_ARG, "codec: index %d is outside 0..%d", index, N_CODECS - 1);
    const kv_codec_ops *o = registry[index];
    *out = (kv_codec_desc){ o->name, o->about, o->source, o->format, o->caps | (o->dot && o->accumulate ? KV_CAP_FUSED_CPU : 0) | (o->device ? KV_CAP_CUDA : 0), o->n_params };
    return KV_OK;
}

int kv_codec_param_at(int index, int i, kv_param *out)
{
    RETURN_ERROR_IF(!out, KV_E_ARG, "codec: NULL parameter");
    RETURN_ERROR_IF(index < 0 || index >= N_CODECS, KV_E_ARG, "codec: index %d is outside 0..%d", index, N_CODECS - 1);
    const kv_codec_ops *o = registry[index];
    RETURN_ERROR_IF(i < 0 || i >= o->n_params, KV_E_ARG, "codec '%s': parameter %d is outside 0..%d", o->name, i, o->n_params - 1);
    *out = o->params[i];
    return KV_OK;
}

static const kv_codec_ops *find(const char *family)
{
    for (int i = 0; i < N_CODECS; i++)
        if (strcmp(registry[i]->name, family) == 0) return registry[i];
    char have[256] = "";
    for (int i = 0; i < N_CODECS; i++) {
        const size_t n = strlen(have);
        snprintf(have + n, sizeof have - n, "%s%s", i ? ", " : "", registry[i]->name);
    }
    kv_set_error(KV_E_PARAM, "codec '%.40s' is unknown (have: %s)", family, have);
    return NULL;
}

/* ---- parameters as text ------------------------------------------------------------------------------------------ */

/* The word at `index` of "a|b|c"; its length, or -1. */
static int choice_word(const char *choices, int index, const char **word)
{
    const char *s = choices;
    for (; index > 0; index--) {
        s = strchr(s, '|');
        if (!s) return -1;
        s++;
    }
    *word = s;
    return (int)strcspn(s, "|");
}

static int param_index(const kv_codec_ops *o, const char *name, size_t len)
{
    for (int i = 0; i < o->n_params; i++)
        if (strlen(o->params[i].name) == len && memcmp(o->params[i].name, name, len) == 0) return i;
    return -1;
}

static int unknown_param(const kv_codec_ops *o, const char *name, int len)
{
    char have[256] = "";
    for (int i = 0; i < o->n_params; i++) {
        const size_t n = strlen(have);
        snprintf(have + n, sizeof have - n, "%s%s", i ? ", " : "", o->params[i].name);
    }
    return kv_set_error(KV_E_PARAM, "codec '%s': unknown parameter '%.*s' (has: %s)", o->name, len, name, o->n_params ? have : "none");
}

static int parse_value(const kv_codec_ops *o, const kv_param *p, const char *text, int len, double *out)
{
    const int shown = kv_min(len, 40);
    if (p->type == KV_PARAM_CHOICE) {
        const char *word;
        for (int i = 0, n; (n = choice_word(p->choices, i, &word)) >= 0; i++)
            if (n == len && memcmp(word, text, (size_t)len) == 0) { *out = i; return KV_OK; }
        return kv_set_error(KV_E_PARAM, "codec '%s': %s=%.*s is not one of %s", o->name, p->name, shown, text, p->choices);
    }
    char buf[64];
    RETURN_ERROR_IF(len == 0 || len >= (int)sizeof buf || strspn(text, "+-.0123456789eE") < (size_t)len, KV_E_PARAM,
                    "codec '%s': %s=%.*s is not a number", o->name, p->name, shown, text);
    memcpy(buf, text, (size_t)len);
    buf[len] = 0;
    char *end;
    const double v = strtod(buf, &end);
    RETURN_ERROR_IF(end != buf + len, KV_E_PARAM, "codec '%s': %s=%s is not a number", o->name, p->name, buf);
    RETURN_ERROR_IF(!(v >= p->min && v <= p->max), KV_E_PARAM, "codec '%s': %s=%s is outside %.9g..%.9g", o->name, p->name, buf, p->min, p->max);
    RETURN_ERROR_IF(p->type == KV_PARAM_INT && v != floor(v), KV_E_PARAM, "codec '%s': %s=%s is not a whole number", o->name, p->name, buf);
    *out = v + 0.0;                                                   /* -0 becomes 0 */
    return KV_OK;
}

/* Fills value[] from "name=value,name=value" over the defaults.  Spaces around names and values are ignored. */
static int parse_params(const kv_codec_ops *o, const char *params, double *value)
{
    bool seen[KV_CODEC_MAX_PARAMS] = { false };
    for (int i = 0; i < o->n_params; i++) value[i] = o->params[i].def;
    const char *s = params ? params : "";
    s += strspn(s, " ");
    if (!*s) return KV_OK;
    for (;;) {
        s += strspn(s, " ");
        const size_t item = strcspn(s, ",");
        const char *eq = memchr(s, '=', item);
        RETURN_ERROR_IF(!eq, KV_E_PARAM, "codec '%s': '%.*s' is not name=value", o->name, kv_min((int)kv_min64((int64_t)item, 40), 40), s);
        size_t n_name = (size_t)(eq - s);
        while (n_name && s[n_name - 1] == ' ') n_name--;
        const char *text = eq + 1;
        size_t n_text = item - (size_t)(text - s);
        while (n_text && *text == ' ') text++, n_text--;
        while (n_text && text[n_text - 1] == ' ') n_text--;
        const int i = param_index(o, s, n_name);
        if (i < 0) return unknown_param(o, s, (int)kv_min64((int64_t)n_name, 40));
        RETURN_ERROR_IF(seen[i], KV_E_PARAM, "codec '%s': parameter '%s' is given twice", o->name, o->params[i].name);
        seen[i] = true;
        FORWARD_IF_ERROR(parse_value(o, &o->params[i], text, (int)kv_min64((int64_t)n_text, 4096), &value[i]));
        s += item;
        if (!*s) return KV_OK;
        s++;
    }
}

/* The shortest decimal that reads back as v. */
static void shortest(double v, char *buf, size_t cap)
{
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(buf, cap, "%.*g", digits, v);
        if (strtod(buf, NULL) == v) return;
    }
}

static int write_params(const kv_codec_ops *o, const double *value, char *buf, size_t cap)
{
    size_t n = 0;
    buf[0] = 0;
    for (int i = 0; i < o->n_params && n < cap; i++) {
        const kv_param *p = &o->params[i];
        const char *word = "";
        char number[40];
        int len;
        if (p->type == KV_PARAM_CHOICE) {
            len = choice_word(p->choices, (int)value[i], &word);
        } else {
            shortest(value[i], number, sizeof number);
            word = number;
            len = (int)strlen(number);
        }
        n += (size_t)snprintf(buf + n, cap - n, "%s%s=%.*s", i ? "," : "", p->name, len, word);
    }
    RETURN_ERROR_IF(n >= cap, KV_E_ARG, "codec '%s': the parameters' text needs %zu bytes, %zu given", o->name, n + 1, cap);
    return KV_OK;
}

/* ---- instances --------------------------------------------------------------------------------------------------- */

static int close_ledger(kv_codec *c)
{
    kv_bytes *b = &c->page;
    b->total = b->codes + b->scales + b->outliers + b->exact + b->padding + b->slack + b->state + b->shared;
    RETURN_ERROR_IF(!(b->total >= 1 && b->total < 0x1p40) || b->total != floor(b->total), KV_E_INTERNAL,
                    "codec '%s': a page of %.17g bytes", c->ops->name, b->total);
    c->page_bytes = kv_round_up((size_t)b->total, 64);
    b->padding += (double)c->page_bytes - b->total;
    b->total = (double)c->page_bytes;
    RETURN_ERROR_IF(c->granule < 1 || c->page_tokens % c->granule != 0, KV_E_INTERNAL,
                    "codec '%s': granule %d does not divide page_tokens=%d", c->ops->name, c->granule, c->page_tokens);
    return KV_OK;
}

int kv_codec_needs_blob(const kv_codec *c)
{
    return kv_set_error(KV_E_UNCALIBRATED, "codec '%s': needs calibration; make one with kv.calibrate{ model =, text = } (--calib FILE or --artifact FILE)", c->ops->name);
}

static int make(kv_codec **out, const kv_codec_ops *o, const double *value, int head_dim, int page_tokens, int side, const void *blob, size_t blob_bytes)
{
    int status = KV_OK;
    kv_codec *c = kv_zalloc(sizeof *c);
    if (!c) return KV_E_NOMEM;
    c->ops = o;
    atomic_init(&c->refs, 1);
    c->head_dim = head_dim;
    c->page_tokens = page_tokens;
    c->side = side;
    c->caps = o->caps | (kv_codec_fused(c) ? KV_CAP_FUSED_CPU : 0);
    c->granule = 1;
    c->space_dim = head_dim;
    memcpy(c->value, value, sizeof c->value);
    if (blob_bytes) {
        void *copy = kv_alloc(blob_bytes);
        if (!copy) {
            kv_free(c);
            return KV_E_NOMEM;
        }
        c->blob = memcpy(copy, blob, blob_bytes);
        c->blob_bytes = blob_bytes;
    }
    if (o->state_size && !(c->state = kv_zalloc(o->state_size))) {
        kv_free((void *)c->blob);
        kv_free(c);
        return KV_E_NOMEM;
    }
    FAIL_IF_ERROR(write_params(o, c->value, c->text, sizeof c->text));
    if ((o->caps & KV_CAP_CALIBRATED) && !c->blob) FAIL_IF_ERROR(kv_codec_needs_blob(c));
    FAIL_IF_ERROR(o->init(c));
    FAIL_IF_ERROR(close_ledger(c));
    *out = c;
    return KV_OK;
fail:
    kv_codec_free(c);
    return status;
}

static int check_shape(const kv_codec_ops *o, int head_dim, int page_tokens, int side)
{
    RETURN_ERROR_IF(head_dim < 1 || head_dim > KV_MAX_HEAD_DIM, KV_E_ARG, "codec '%s': head_dim=%d is outside 1..%d", o->name, head_dim, KV_MAX_HEAD_DIM);
    RETURN_ERROR_IF(page_tokens < 8 || page_tokens > KV_MAX_PAGE || page_tokens % 8 != 0, KV_E_ARG,
                    "codec '%s': page_tokens=%d is not a multiple of 8 in 8..%d", o->name, page_tokens, KV_MAX_PAGE);
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "codec '%s': side=%d is not 0 (keys) or 1 (values)", o->name, side);
    RETURN_ERROR_IF(!(o->caps & (side == KV_SIDE_K ? KV_CAP_KEYS : KV_CAP_VALUES)), KV_E_UNSUPPORTED,
                    "codec '%s' is for %s, asked for %s", o->name, side == KV_SIDE_K ? "values" : "keys", side == KV_SIDE_K ? "keys" : "values");
    return KV_OK;
}

/* What every constructor does first. */
static int read_request(const kv_codec_ops **o, double *value, kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side)
{
    RETURN_ERROR_IF(!out || !family, KV_E_ARG, "codec: NULL %s", out ? "family" : "handle");
    *out = NULL;
    *o = find(family);
    if (!*o) return KV_E_PARAM;
    FORWARD_IF_ERROR(check_shape(*o, head_dim, page_tokens, side));
    return parse_params(*o, params, value);
}

int kv_codec_new_calibrated(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side, const void *blob, double blob_bytes)
{
    const kv_codec_ops *o = NULL;
    double value[KV_CODEC_MAX_PARAMS] = { 0 };
    FORWARD_IF_ERROR(read_request(&o, value, out, family, params, head_dim, page_tokens, side));
    RETURN_ERROR_IF(!(blob_bytes >= 0 && blob_bytes <= MAX_BLOB) || blob_bytes != floor(blob_bytes) || (blob_bytes > 0 && !blob), KV_E_ARG,
                    "codec '%s': %g bytes of tables at %s are not 0..%d", o->name, blob_bytes, blob ? "an address" : "NULL", MAX_BLOB);
    RETURN_ERROR_IF(blob_bytes > 0 && !(o->caps & (KV_CAP_CALIBRATED | KV_CAP_CALIBRATABLE)), KV_E_ARG, "codec '%s': %.0f bytes of tables given, it has none", o->name, blob_bytes);
    return make(out, o, value, head_dim, page_tokens, side, blob, (size_t)blob_bytes);
}

int kv_codec_new(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side)
{
    return kv_codec_new_calibrated(out, family, params, head_dim, page_tokens, side, NULL, 0);
}

int kv_codec_blob(const kv_codec *c, const void **blob, double *blob_bytes)
{
    RETURN_ERROR_IF(!c || !blob || !blob_bytes, KV_E_ARG, "codec: NULL %s", c ? "result" : "handle");
    *blob = c->blob;
    *blob_bytes = (double)c->blob_bytes;
    return KV_OK;
}

/* With tables from m, where the parameters need any. */
static int make_from(kv_codec **out, const kv_codec_ops *o, const double *value, int head_dim, int page_tokens, int side, const kv_moments *m)
{
    void *blob = NULL;
    size_t blob_bytes = 0;
    if (o->calibrate) {
        kv_codec c = { .ops = o, .head_dim = head_dim, .page_tokens = page_tokens, .side = side, .caps = o->caps, .granule = 1, .space_dim = head_dim };
        memcpy(c.value, value, sizeof c.value);
        FORWARD_IF_ERROR(write_params(o, value, c.text, sizeof c.text));
        FORWARD_IF_ERROR(o->calibrate(&c, m, &blob, &blob_bytes));
    }
    const int status = blob_bytes > MAX_BLOB ? kv_set_error(KV_E_INTERNAL, "codec '%s': %zu bytes of tables are over %d", o->name, blob_bytes, MAX_BLOB)
                                             : make(out, o, value, head_dim, page_tokens, side, blob, blob_bytes);
    kv_free(blob);
    return status;
}

/* Any [rows, head_dim] view as rows without gaps; freed by the caller. */
static int gather(const kv_tensor *t, const char *what, int head_dim, float **rows)
{
    FORWARD_IF_ERROR(kv_tensor_check(t, what));
    RETURN_ERROR_IF(t->ndim != 2 || t->shape[1] != head_dim, KV_E_ARG, "%s: [rows, %d] is needed, %d dimensions and rows of %d given", what, head_dim, t->ndim, t->shape[t->ndim - 1]);
    if (!(*rows = kv_alloc_array((size_t)t->shape[0] * (size_t)head_dim, sizeof(float), false))) return KV_E_NOMEM;
    kv_tensor to = { .data = *rows, .dtype = KV_F32, .ndim = 2, .shape = { t->shape[0], head_dim }, .stride = { head_dim, 1 } };
    return kv_tensor_copy(t, &to);
}

int kv_codec_fit(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side, const kv_tensor *x, const kv_tensor *q)
{
    const kv_codec_ops *o = NULL;
    double value[KV_CODEC_MAX_PARAMS] = { 0 };
    float *rows = NULL, *queries = NULL;
    kv_moments *m = NULL;
    int status;
    FORWARD_IF_ERROR(read_request(&o, value, out, family, params, head_dim, page_tokens, side));
    FAIL_IF_ERROR(gather(x, "codec rows", head_dim, &rows));
    if (q) FAIL_IF_ERROR(gather(q, "codec queries", head_dim, &queries));
    FAIL_IF_ERROR(kv_moments_of_rows(&m, head_dim, side, rows, x->shape[0], queries, q ? q->shape[0] : 0));
    status = make_from(out, o, value, head_dim, page_tokens, side, m);
fail:
    kv_moments_free(m);
    kv_free(queries);
    kv_free(rows);
    return status;
}

/* Twice as many rows as dimensions, for a covariance of full rank. */
static int make_nominal(kv_codec **out, const kv_codec_ops *o, const double *value, int head_dim, int page_tokens, int side)
{
    if (!o->calibrate) return make(out, o, value, head_dim, page_tokens, side, NULL, 0);
    const int n = kv_max(64, 2 * head_dim);
    float *rows = kv_alloc_array((size_t)n * (size_t)head_dim, sizeof(float), false);
    kv_moments *m = NULL;
    int status = rows ? kv_rng_normal(1, 0, 0, n * head_dim, rows) : KV_E_NOMEM;
    if (status >= 0) status = kv_moments_of_rows(&m, head_dim, side, rows, n, NULL, 0);
    if (status >= 0) status = make_from(out, o, value, head_dim, page_tokens, side, m);
    kv_moments_free(m);
    kv_free(rows);
    return status;
}

int kv_codec_new_nominal(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side)
{
    const kv_codec_ops *o = NULL;
    double value[KV_CODEC_MAX_PARAMS] = { 0 };
    FORWARD_IF_ERROR(read_request(&o, value, out, family, params, head_dim, page_tokens, side));
    return make_nominal(out, o, value, head_dim, page_tokens, side);
}

int kv_codec_calibrate(kv_codec **out, const kv_calib *calib, const char *family, const char *params, int page_tokens, int layer, int head, int side, int page_rope, const float *mean)
{
    const kv_codec_ops *o = NULL;
    double value[KV_CODEC_MAX_PARAMS] = { 0 };
    kv_moments *m = NULL;
    RETURN_ERROR_IF(!calib, KV_E_ARG, "codec: NULL calibration");
    const int head_dim = calib->m->info.head_dim;
    FORWARD_IF_ERROR(read_request(&o, value, out, family, params, head_dim, page_tokens, side));
    FORWARD_IF_ERROR(kv_moments_new(&m, calib, layer, head, side, page_rope ? page_tokens : 0, mean));
    const int status = make_from(out, o, value, head_dim, page_tokens, side, m);
    kv_moments_free(m);
    return status;
}

kv_codec *kv_codec_ref(kv_codec *c)
{
    atomic_fetch_add_explicit(&c->refs, 1, memory_order_relaxed);
    return c;
}

void kv_codec_free(kv_codec *c)
{
    if (!c || atomic_fetch_sub_explicit(&c->refs, 1, memory_order_acq_rel) != 1) return;
    if (c->ops->fini) c->ops->fini(c);
    kv_free(c->state);
    kv_free((void *)c->blob);
    kv_free(c);
}

int kv_codec_get_info(const kv_codec *c, kv_codec_info *out)
{
    RETURN_ERROR_IF(!c || !out, KV_E_ARG, "codec: NULL %s", c ? "info" : "handle");
    *out = (kv_codec_info){ .family = c->ops->name, .params = c->text, .head_dim = c->head_dim, .page_tokens = c->page_tokens,
        .side = c->side, .caps = c->caps | (c->ops->device ? KV_CAP_CUDA : 0), .format = c->ops->format, .granule = c->granule,
        .fused = kv_codec_fused(c), .page_bytes = (double)c->page_bytes, .page = c->page, .bits_nominal = c->bits_nominal,
        .bits_payload = 8.0 * (double)c->page_bytes / ((double)c->page_tokens * c->head_dim) };
    return KV_OK;
}

/* The bits setting whose page comes nearest to the target; settings that the codec refuses are passed over. */
static int search_bits(kv_codec *c, double target)
{
    const kv_codec_ops *o = c->ops;
    const int i = param_index(o, "bits", 4);
    RETURN_ERROR_IF(i < 0, KV_E_UNSUPPORTED, "codec '%s' has no bits setting to fit", o->name);
    double best = INFINITY, value[KV_CODEC_MAX_PARAMS];
    int status = KV_OK;
    memcpy(value, c->value, sizeof value);
    for (double bits = o->params[i].min; bits <= o->params[i].max; bits += 1) {
        kv_codec *trial;
        value[i] = bits;
        const int s = make_nominal(&trial, o, value, c->head_dim, c->page_tokens, c->side);
        if (s < 0) { status = s; continue; }
        const double off = fabs(8.0 * (double)trial->page_bytes / ((double)c->page_tokens * c->head_dim) - target);
        kv_codec_free(trial);
        if (off < best) { best = off; c->value[i] = bits; }
    }
    return best < INFINITY ? KV_OK : status;
}

int kv_codec_fit_bits(const char *family, const char *params, int head_dim, int side, double target, char *buf, int cap)
{
    RETURN_ERROR_IF(!family || !buf || cap < 1, KV_E_ARG, "codec: fit_bits needs a family and a buffer");
    const kv_codec_ops *o = find(family);
    if (!o) return KV_E_PARAM;
    RETURN_ERROR_IF(!(target > 0 && target <= 64), KV_E_ARG, "codec '%s': target of %g bits is outside 0..64", o->name, target);
    /* The largest page: any granule divides it, and rounding to 64 bytes weighs least. */
    kv_codec c = { .ops = o, .head_dim = head_dim, .page_tokens = KV_MAX_PAGE, .side = side };
    FORWARD_IF_ERROR(check_shape(o, head_dim, c.page_tokens, side));
    FORWARD_IF_ERROR(parse_params(o, params, c.value));
    FORWARD_IF_ERROR(o->fit_bits ? o->fit_bits(&c, target) : search_bits(&c, target));
    return write_params(o, c.value, buf, (size_t)cap);
}

/* ---- attention by decoding a tile ---------------------------------------------------------------------------------- */

void kv_tile_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const float *q, int64_t q_ld, int n_q, float *scores, int64_t ld, float *scratch)
{
    c->ops->decode(c, page, 0, n_tokens, scratch, c->head_dim);
    kv_rows_dot(KV_F32, scratch, c->head_dim, n_tokens, c->head_dim, q, q_ld, n_q, scores, ld);
}

void kv_tile_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc, float *scratch)
{
    c->ops->decode(c, page, 0, n_tokens, scratch, c->head_dim);
    kv_rows_accumulate(KV_F32, scratch, c->head_dim, n_tokens, c->head_dim, p, ld, n_q, acc, c->head_dim);
}

enum { DECODED_FLOATS = 8192 };                        /* 32 KB: of a first cache level of 32 to 48 */

/* Whole granules, or a codec of groups along tokens would decode them again and again. */
static int decoded_step(const kv_codec *c, int tokens)
{
    const int step = kv_min(kv_min(DECODED_FLOATS / c->head_dim, tokens), c->page_tokens);
    return step > c->granule ? step / c->granule * c->granule : step;
}

void kv_decoded_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const float *q, int64_t q_ld, int n_q, float *scores, int64_t ld)
{
    _Alignas(64) float tile[DECODED_FLOATS];
    const int dim = c->head_dim, step = decoded_step(c, kv_max(32, DECODED_FLOATS / 2 / dim));  /* queries take their share of the cache */
    for (int t = 0; t < n_tokens; t += step) {
        const int n = kv_min(step, n_tokens - t);
        c->ops->decode(c, page, t, n, tile, dim);
        kv_rows_dot(KV_F32, tile, dim, n, dim, q, q_ld, n_q, scores + t, ld);
    }
}

void kv_decoded_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    _Alignas(64) float tile[DECODED_FLOATS];
    const int step = decoded_step(c, KV_MAX_PAGE), dim = c->head_dim;
    for (int t = 0; t < n_tokens; t += step) {
        const int n = kv_min(step, n_tokens - t);
        c->ops->decode(c, page, t, n, tile, dim);
        kv_rows_accumulate(KV_F32, tile, dim, n, dim, p + t, ld, n_q, acc, c->space_dim);
    }
}
