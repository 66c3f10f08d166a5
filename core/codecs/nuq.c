/* nuq.c -- KVQuant (arXiv 2401.18079): calibrated non-uniform levels, keys per channel, values per token, outliers apart.
 *
 * A value becomes u = (x - zero) / scale and the nearest of 2^bits levels in about -1..1.  Keys: zero and scale belong to the channel
 * and come from calibration, where they put all but `outliers` percent of a channel inside -1..1.  Values: they belong to the
 * token and are f16.  The levels come from calibration (k-means).  What lies furthest out is kept in f16 in a side list of bounded
 * length, one list for `span` tokens, so that pages keep their size:
 *
 *   page   | codes: row 0, row 1, ... | zero f16 [page_tokens] | scale f16 [page_tokens] (values) | list 0 | list 1 | ... |
 *   row    head_dim codes, code i in bits i*bits .. from the lowest bit on
 *   list   | count u16 | cap x (index u16, value f16) |    index = (token in span) * head_dim + channel, ascending; the rest 0
 *          cap = ceil(outliers/100 * span * head_dim); without outliers there is no list
 *   blob   | level f32 [2^bits] ascending | zero f32 [head_dim] | scale f32 [head_dim] (keys) |
 *
 * Encoding a span: each value has a score; the cap highest above the bar leave, the lower index first among equals.  Keys: score |u|,
 * bar 1.  Values: |x - mean| / deviation of the token (in double), bar 0.  Then, in f32, one rounding a step: values take
 * zero = f16((hi + lo) / 2) and scale = f16((hi - lo) / 2) of what stayed in the token; u = (x - zero) * (1 / scale); code = number of
 * midpoints between levels below u.  x = level * scale + zero, or the list's value.
 *
 * Against the paper: keys are coded as the cache holds them, after RoPE, or page-relative with page_rope=k, which comes nearest to the paper's
 * keys before RoPE; k-means weighs by scale^2 times E q^2 of the channel instead of Fisher information, which needs gradients;
 * levels are per layer, head and side instead of per layer; outliers compete within a span instead of a vector. */
#include <math.h>
#include "../calib.h"
#include "../vecmath.h"
#include "fp_rows.h"
#include "nuq_device.h"

enum { P_BITS, P_OUTLIERS, P_SPAN, P_LEVELS };
enum { LEVELS_KMEANS, LEVELS_UNIFORM };
enum { MAX_SPAN = 128, MAX_OUT = 4 /* percent */, MAX_CAP = MAX_SPAN * KV_MAX_HEAD_DIM * MAX_OUT / 100 + 1 };
enum { BINS = 2048, ROUNDS = 300 };                       /* of the k-means: bins over -1..1, iterations at most */

static const kv_param params[] = {
    { "bits",     "bits of a code", KV_PARAM_INT, 4, 2, 4, NULL },
    { "outliers", "percent of the values that are kept in f16 beside the codes", KV_PARAM_REAL, 1, 0, MAX_OUT, NULL },
    { "span",     "tokens that share a list of outliers; a multiple of 8 that divides page_tokens", KV_PARAM_INT, 16, 8, MAX_SPAN, NULL },
    { "levels",   "calibrated by k-means, or evenly spaced", KV_PARAM_CHOICE, LEVELS_KMEANS, 0, 1, "kmeans|uniform" },
};

typedef struct nuq_state {
    fp_rows rows;
    float   level[16], bound[16];                         /* bound[i] between i and i + 1 */
    float  *zero, *scale, *inverse;                       /* [head_dim] of keys; NULL on values */
    int     bits, n_levels, span, cap;
    size_t  zeros_at, scales_at, lists_at, list_bytes;
} nuq_state;

static inline const nuq_state *state_of(const kv_codec *c) { return c->state; }

/* What parameters and geometry say; the levels are not there yet. */
static int read_params(const kv_codec *c, nuq_state *s)
{
    s->bits = (int)c->value[P_BITS];
    s->n_levels = 1 << s->bits;
    s->span = (int)c->value[P_SPAN];
    RETURN_ERROR_IF(s->span % 8 != 0 || c->page_tokens % s->span != 0, KV_E_PARAM, "codec 'nuq': span=%d is not a multiple of 8 that divides page_tokens=%d", s->span, c->page_tokens);
    s->cap = (int)ceil(c->value[P_OUTLIERS] / 100 * s->span * c->head_dim);
    return KV_OK;
}

static int nuq_init(kv_codec *c)
{
    nuq_state *s = c->state;
    const int d = c->head_dim, keys = c->side == KV_SIDE_K;
    FORWARD_IF_ERROR(read_params(c, s));
    const float *blob = c->blob;
    const size_t n = (size_t)s->n_levels + (keys ? 2 * (size_t)d : 0);
    RETURN_ERROR_IF(c->blob_bytes != n * sizeof(float), KV_E_CORRUPT, "codec 'nuq': %zu bytes of tables, bits=%d and head_dim=%d need %zu", c->blob_bytes, s->bits, d, n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        RETURN_ERROR_IF(!(fabsf(blob[i]) <= 1e30f) || (i >= n - (keys ? (size_t)d : 0) && !(blob[i] >= 1e-30f)) || (i > 0 && i < (size_t)s->n_levels && !(blob[i] >= blob[i - 1])),
                        KV_E_CORRUPT, "codec 'nuq': table entry %zu is %g: levels ascend, scales are positive, all within 1e30", i, (double)blob[i]);
    memcpy(s->level, blob, (size_t)s->n_levels * sizeof(float));
    for (int i = 0; i + 1 < s->n_levels; i++) s->bound[i] = (s->level[i] + s->level[i + 1]) / 2;
    if (keys) {
        if (!(s->zero = kv_alloc_array(3 * (size_t)d, sizeof(float), false))) return KV_E_NOMEM;
        s->scale = s->zero + d;
        s->inverse = s->scale + d;
        memcpy(s->zero, blob + s->n_levels, 2 * (size_t)d * sizeof(float));
        for (int i = 0; i < d; i++) s->inverse[i] = 1 / s->scale[i];
    }
    s->rows = (fp_rows){ .kind = s->bits, .cols = d, .group = d, .n_groups = 1, .row_bytes = fp_row_bytes(s->bits, d) };
    for (int i = 0; i < 16; i++) s->rows.table[i] = s->level[i % s->n_levels];
    const size_t tokens = (size_t)c->page_tokens, n_lists = tokens / (size_t)s->span;
    s->zeros_at = tokens * s->rows.row_bytes;
    s->scales_at = s->zeros_at + (keys ? 0 : 2 * tokens);
    s->lists_at = s->scales_at + (keys ? 0 : 2 * tokens);
    s->list_bytes = s->cap ? 2 + 4 * (size_t)s->cap : 0;
    c->granule = s->span;
    c->page.codes = (double)s->zeros_at;
    c->page.scales = (double)(s->lists_at - s->zeros_at);
    c->page.outliers = (double)(n_lists * s->list_bytes);
    c->bits_nominal = s->bits;
    c->space_dim = d;
    c->query_bytes = 64 + 2 * kv_round_up((size_t)d * sizeof(float), 64);
    return KV_OK;
}

static void nuq_fini(kv_codec *c) { kv_free(((nuq_state *)c->state)->zero); }

/* ---- outliers of a span ---------------------------------------------------------------------------------------------- */

typedef struct span_marks { uint8_t bit[MAX_SPAN * KV_MAX_HEAD_DIM / 8]; } span_marks;
static inline bool marked(const span_marks *m, int i) { return m->bit[i / 8] >> i % 8 & 1; }

/* Highest scores above the bar, as a heap whose root is the lowest kept.  A key orders by score, then lower index first. */
typedef struct top { uint64_t key[MAX_CAP]; int n, cap; } top;

static inline uint64_t key_of(float score, int i) { return (uint64_t)kv_f32_bits(score) << 32 | (0xffffffffu - (uint32_t)i); }

static void top_add(top *h, uint64_t key)
{
    int at = h->n;
    if (h->n < h->cap) {
        for (h->n++; at && h->key[(at - 1) / 2] > key; at = (at - 1) / 2) h->key[at] = h->key[(at - 1) / 2];
    } else {
        if (!h->cap || key <= h->key[0]) return;
        for (int child = (at = 0) + 1; child < h->n; child = 2 * at + 1) {
            if (child + 1 < h->n && h->key[child + 1] < h->key[child]) child++;
            if (h->key[child] >= key) break;
            h->key[at] = h->key[child];
            at = child;
        }
    }
    h->key[at] = key;
}

/* zero and inverse: of keys' channels, or NULL for values. */
static void mark_outliers(const nuq_state *s, const float *zero, const float *inverse, int d, const float *x, int64_t ld, int n_tokens, span_marks *m)
{
    top h = { .cap = s->cap };
    memset(m, 0, sizeof *m);
    for (int t = 0; t < n_tokens && s->cap; t++, x += ld) {
        double mean = 0, square = 0;
        for (int i = 0; i < d && !zero; i++) mean += x[i];
        mean /= d;
        for (int i = 0; i < d && !zero; i++) square += (x[i] - mean) * (x[i] - mean);
        const double per = square > 0 ? 1 / sqrt(square / d) : 0;
        for (int i = 0; i < d; i++) {
            const float score = zero ? fabsf((x[i] - zero[i]) * inverse[i]) : (float)(fabs(x[i] - mean) * per);
            if (score > (zero ? 1.0f : 0.0f)) top_add(&h, key_of(score, t * d + i));
        }
    }
    for (int i = 0; i < h.n; i++) {
        const uint32_t at = 0xffffffffu - (uint32_t)h.key[i];
        m->bit[at / 8] |= (uint8_t)(1u << at % 8);
    }
}

/* Zero and scale of what stays of a token; both as f16. */
static void token_range(const float *x, int d, const span_marks *m, int first, uint16_t *zero, uint16_t *scale)
{
    float lo = INFINITY, hi = -INFINITY;
    for (int i = 0; i < d; i++) {
        if (marked(m, first + i)) continue;
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    if (lo > hi) lo = hi = 0;
    const float z = hi / 2 + lo / 2, r = hi / 2 - lo / 2;
    *zero = kv_f32_to_f16(fminf(fmaxf(z, -65504), 65504) + 0.0f);
    *scale = kv_f32_to_f16(fminf(r, 65504));
}

static inline float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0; }

/* ---- calibration -------------------------------------------------------------------------------------------------------- */

/* Weighted mass of u in -1..1. */
typedef struct histogram { double mass[BINS], first[BINS], total; } histogram;

static void add_to(histogram *h, float u, double weight)
{
    if (!(fabsf(u) <= 1)) return;
    const int bin = kv_min((int)((u + 1) / 2 * BINS), BINS - 1);
    h->mass[bin] += weight;
    h->first[bin] += weight * u;
    h->total += weight;
}

/* Lloyd's iteration from quantiles of the mass. */
static void k_means(const histogram *h, int n, float *level)
{
    double c[16], sum = 0;
    for (int i = 0; i < n; i++) c[i] = (2 * i + 1.0) / n - 1;
    for (int bin = 0, i = 0; bin < BINS && h->total > 0; bin++)
        for (sum += h->mass[bin]; i < n && sum >= h->total * (i + 0.5) / n; i++) c[i] = (2 * bin + 1.0) / BINS - 1;
    for (int round = 0; round < ROUNDS; round++) {
        double mass[16] = { 0 }, first[16] = { 0 }, moved = 0;
        for (int bin = 0, i = 0; bin < BINS; bin++) {
            const double u = (2 * bin + 1.0) / BINS - 1;
            while (i + 1 < n && u > (c[i] + c[i + 1]) / 2) i++;
            mass[i] += h->mass[bin];
            first[i] += h->first[bin];
        }
        for (int i = 0; i < n; i++) {
            const double to = mass[i] > 0 ? first[i] / mass[i] : c[i];
            moved += fabs(to - c[i]);
            c[i] = to;
        }
        if (moved < 1e-7) break;
    }
    for (int i = 0; i < n; i++) level[i] = (float)(i && c[i] < c[i - 1] ? (c[i] = c[i - 1]) : c[i]);
}

/* Channel ranges that leave share/2 outside at each end. */
static void channel_ranges(const kv_moments *m, double share, float *sorted, float *zero, float *scale)
{
    const int last = m->n_sample - 1, cut = (int)(share / 2 * last);
    for (int i = 0; i < m->head_dim; i++) {
        kv_moments_sorted(m, i, sorted);
        zero[i] = sorted[last - cut] / 2 + sorted[cut] / 2;
        scale[i] = fmaxf(sorted[last - cut] / 2 - sorted[cut] / 2, 1e-20f);
    }
}

static int nuq_calibrate(const kv_codec *c, const kv_moments *m, void **out, size_t *out_bytes)
{
    nuq_state s = { 0 };
    const int d = c->head_dim, keys = c->side == KV_SIDE_K;
    FORWARD_IF_ERROR(read_params(c, &s));
    FORWARD_IF_ERROR(kv_moments_need_rows(m, c->ops->name));
    *out_bytes = ((size_t)s.n_levels + (keys ? 2 * (size_t)d : 0)) * sizeof(float);
    float *blob = *out = kv_alloc(*out_bytes), *zero = NULL, *scale = NULL, *inverse = kv_alloc(((size_t)d + (size_t)m->n_sample) * sizeof(float));
    histogram *h = kv_zalloc(sizeof *h);
    int status = KV_OK;
    if (!blob || !inverse || !h) { status = KV_E_NOMEM; goto done; }
    if (keys) {
        zero = blob + s.n_levels;
        scale = zero + d;
        channel_ranges(m, c->value[P_OUTLIERS] / 100, inverse + d, zero, scale);
        for (int i = 0; i < d; i++) inverse[i] = 1 / scale[i];
    }
    for (int i = 0; i < s.n_levels; i++) blob[i] = (float)(2 * i) / (float)(s.n_levels - 1) - 1;
    if (c->value[P_LEVELS] == LEVELS_UNIFORM) goto done;
    for (int t = 0; t < m->n_sample; t += s.span) {
        const int n = kv_min(s.span, m->n_sample - t);
        const float *x = m->sample + (size_t)t * (size_t)d;
        span_marks marks;
        mark_outliers(&s, zero, inverse, d, x, d, n, &marks);
        for (int j = 0; j < n; j++, x += d) {
            uint16_t z16 = 0, s16 = 0;
            if (!keys) token_range(x, d, &marks, j * d, &z16, &s16);
            const float z = kv_f16_to_f32(z16), r = kv_f16_to_f32(s16), per = inverse_of(r);
            for (int i = 0; i < d; i++) {
                if (marked(&marks, j * d + i)) continue;
                if (keys) add_to(h, (x[i] - zero[i]) * inverse[i], (double)scale[i] * scale[i] * m->query[(size_t)i * (size_t)d + (size_t)i]);
                else add_to(h, (x[i] - z) * per, (double)r * r);
            }
        }
    }
    if (h->total > 0) k_means(h, s.n_levels, blob);
done:
    kv_free(h);
    kv_free(inverse);
    if (status < 0) {
        kv_free(blob);
        *out = NULL;
        *out_bytes = 0;
    }
    return status;
}

/* ---- pages ---------------------------------------------------------------------------------------------------------------- */

static void encode_span(const kv_codec *c, uint8_t *page, int tok0, const float *x, int64_t ld)
{
    const nuq_state *s = state_of(c);
    const int d = c->head_dim;
    span_marks marks;
    mark_outliers(s, s->zero, s->inverse, d, x, ld, s->span, &marks);
    for (int j = 0; j < s->span; j++) {
        const float *from = x + j * ld;
        uint8_t *row = page + (size_t)(tok0 + j) * s->rows.row_bytes;
        uint16_t z16 = 0, s16 = 0;
        if (!s->zero) {
            token_range(from, d, &marks, j * d, &z16, &s16);
            kv_store_u16(page + s->zeros_at + 2 * (size_t)(tok0 + j), z16);
            kv_store_u16(page + s->scales_at + 2 * (size_t)(tok0 + j), s16);
        }
        const float z = kv_f16_to_f32(z16), per = inverse_of(kv_f16_to_f32(s16));
        memset(row, 0, s->rows.row_bytes);
        for (int i = 0; i < d; i++) {
            const float u = s->zero ? (from[i] - s->zero[i]) * s->inverse[i] : (from[i] - z) * per;
            int code = 0;
            for (int k = 0; k + 1 < s->n_levels; k++) code += u > s->bound[k];
            const int bit = i * s->bits;
            row[bit / 8] |= (uint8_t)(code << bit % 8);
            if (bit % 8 + s->bits > 8) row[bit / 8 + 1] |= (uint8_t)(code >> (8 - bit % 8));
        }
    }
    if (!s->cap) return;
    uint8_t *list = page + s->lists_at + (size_t)(tok0 / s->span) * s->list_bytes, *at = list + 2;
    memset(list, 0, s->list_bytes);
    for (int i = 0; i < s->span * d; i++) {
        if (!marked(&marks, i)) continue;
        kv_store_u16(at, (uint16_t)i);
        kv_store_u16(at + 2, kv_f32_to_f16(fminf(fmaxf(x[i / d * ld + i % d], -65504), 65504)));
        at += 4;
    }
    kv_store_u16(list, (uint16_t)((at - list) / 4));
}

static void nuq_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const int span = state_of(c)->span;
    for (int t = 0; t < n; t += span) encode_span(c, page, tok0 + t, x + t * ld, ld);
}

/* The k-th outlier of the list that token t0 opens; false past its end, or where a damaged entry points nowhere. */
typedef struct outlier { int token, channel; float value; } outlier;

static int n_outliers(const nuq_state *s, const uint8_t *page, int t0)
{
    return s->cap ? kv_min(kv_load_u16(page + s->lists_at + (size_t)(t0 / s->span) * s->list_bytes), s->cap) : 0;
}
static bool outlier_at(const kv_codec *c, const uint8_t *page, int t0, int k, outlier *o)
{
    const nuq_state *s = state_of(c);
    const uint8_t *at = page + s->lists_at + (size_t)(t0 / s->span) * s->list_bytes + 2 + 4 * (size_t)k;
    const int i = kv_load_u16(at);
    *o = (outlier){ t0 + i / c->head_dim, i % c->head_dim, kv_f16_to_f32(kv_load_u16(at + 2)) };
    return i < s->span * c->head_dim;
}

static void token_scales(const kv_codec *c, const uint8_t *page, int tok0, int n, float *zero, float *scale)
{
    const nuq_state *s = state_of(c);
    kv_vec_load(KV_F16, page + s->zeros_at + 2 * (size_t)tok0, zero, n);
    kv_vec_load(KV_F16, page + s->scales_at + 2 * (size_t)tok0, scale, n);
}

static void nuq_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const nuq_state *s = state_of(c);
    const int d = c->head_dim;
    float zero[FP_TILE], scale[FP_TILE];
    for (int j = 0; j < FP_TILE; j++) scale[j] = 1;
    for (int t = 0; t < n; t += FP_TILE) {
        const int m = kv_min(FP_TILE, n - t);
        float *to = x + t * ld;
        if (!s->zero) token_scales(c, page, tok0 + t, m, zero, scale);
        fp_rows_decode(&s->rows, page + (size_t)(tok0 + t) * s->rows.row_bytes, m, scale, to, ld);
        for (int j = 0; j < m; j++, to += ld) {
            if (s->zero) for (int i = 0; i < d; i++) to[i] = to[i] * s->scale[i] + s->zero[i];
            else         for (int i = 0; i < d; i++) to[i] += zero[j];
        }
    }
    outlier o;
    for (int t0 = tok0 / s->span * s->span; t0 < tok0 + n; t0 += s->span)
        for (int k = 0, end = n_outliers(s, page, t0); k < end; k++)
            if (outlier_at(c, page, t0, k, &o) && o.token >= tok0 && o.token < tok0 + n) x[(o.token - tok0) * ld + o.channel] = o.value;
}

/* ---- attention -------------------------------------------------------------------------------------------------------------- */

/* A prepared query: its product with the zeros; from byte 64 on q * scale; then q. */
static void nuq_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const nuq_state *s = state_of(c);
    const size_t row = kv_round_up((size_t)c->head_dim * sizeof(float), 64);
    for (int g = 0; g < n_q; g++, q += ld) {
        uint8_t *p = (uint8_t *)prepared + (size_t)g * c->query_bytes;
        float *base = (float *)p, *scaled = (float *)(p + 64);
        double sum[4] = { 0 };                             /* one would wait for its last addition at every channel */
        for (int i = 0; i < c->head_dim; i++) scaled[i] = s->zero ? q[i] * s->scale[i] : q[i];
        for (int i = 0; s->zero && i + 4 <= c->head_dim; i += 4)
            for (int j = 0; j < 4; j++) sum[j] += (double)q[i + j] * s->zero[i + j];
        for (int i = c->head_dim & ~3; s->zero && i < c->head_dim; i++) sum[0] += (double)q[i] * s->zero[i];
        *base = (float)(sum[0] + sum[1] + (sum[2] + sum[3]));
        memcpy(p + 64 + row, q, (size_t)c->head_dim * sizeof(float));
    }
}

/* Queries from which decoding first is faster: codes are unpacked for every four of them, outliers put right for each. */
static int many_dot(const nuq_state *s) { return s->cap ? 8 : 21; }
static int many_accumulate(const kv_codec *c) { return state_of(c)->cap ? 8 : c->head_dim < 128 ? 16 : 21; }

static void nuq_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const nuq_state *s = state_of(c);
    const int64_t q_ld = (int64_t)(c->query_bytes / sizeof(float)), q_at = (int64_t)(kv_round_up((size_t)c->head_dim * sizeof(float), 64) / sizeof(float)) + 16;
    const float *q = prepared;
    float one[FP_TILE];
    if (n_q >= many_dot(s)) {
        kv_decoded_dot(c, page, n_tokens, q + q_at, q_ld, n_q, scores, ld);
        return;
    }
    for (int j = 0; j < FP_TILE; j++) one[j] = 1;
    for (int t = 0; t < n_tokens; t += FP_TILE)
        fp_rows_dot(&s->rows, page + (size_t)t * s->rows.row_bytes, kv_min(FP_TILE, n_tokens - t), NULL, one, q + 16, q_ld, n_q, scores + t, ld);
    for (int g = 0; g < n_q; g++)
        for (int t = 0; t < n_tokens; t++) scores[g * ld + t] += q[g * q_ld];
    outlier o;
    for (int t0 = 0; t0 < n_tokens; t0 += s->span)
        for (int k = 0, end = n_outliers(s, page, t0); k < end; k++) {
            if (!outlier_at(c, page, t0, k, &o) || o.token >= n_tokens) continue;
            const float dense = fp_row_value(&s->rows, page + (size_t)o.token * s->rows.row_bytes, o.channel) * s->scale[o.channel] + s->zero[o.channel];
            for (int g = 0; g < n_q; g++) scores[g * ld + o.token] += q[g * q_ld + q_at + o.channel] * (o.value - dense);
        }
}

static void nuq_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    const nuq_state *s = state_of(c);
    const int d = c->head_dim;
    float zero[KV_MAX_PAGE], scale[KV_MAX_PAGE];
    if (n_q >= many_accumulate(c)) {
        kv_decoded_accumulate(c, page, n_tokens, p, ld, n_q, acc);
        return;
    }
    token_scales(c, page, 0, n_tokens, zero, scale);
    fp_rows_accumulate(&s->rows, page, n_tokens, NULL, scale, p, ld, n_q, acc, d);
    for (int g = 0; g < n_q; g++) {
        const float base = kv_vec_dot(p + g * ld, zero, n_tokens);
        for (int i = 0; i < d; i++) acc[g * d + i] += base;
    }
    outlier o;
    for (int t0 = 0; t0 < n_tokens; t0 += s->span)
        for (int k = 0, end = n_outliers(s, page, t0); k < end; k++) {
            if (!outlier_at(c, page, t0, k, &o) || o.token >= n_tokens) continue;
            const float dense = fp_row_value(&s->rows, page + (size_t)o.token * s->rows.row_bytes, o.channel) * scale[o.token] + zero[o.token];
            for (int g = 0; g < n_q; g++) acc[g * d + o.channel] += p[g * ld + o.token] * (o.value - dense);
        }
}

static void nuq_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int g = 0; g < n_q; g++) memcpy(out + g * ld, acc + g * c->space_dim, (size_t)c->head_dim * sizeof(float));
}

static int fill_device(const kv_codec *c, kv_pod *pod)
{
    const nuq_state *s = state_of(c);
    const size_t row = sizeof(float) * (size_t)c->head_dim;
    struct nuq_device d = { .bits = s->bits, .n_levels = s->n_levels, .span = s->span, .cap = s->cap, .row_bytes = (uint32_t)s->rows.row_bytes,
        .zeros_at = (uint32_t)s->zeros_at, .scales_at = (uint32_t)s->scales_at, .lists_at = (uint32_t)s->lists_at, .list_bytes = (uint32_t)s->list_bytes };
    uint32_t start;
    memcpy(d.level, s->level, sizeof d.level);
    memcpy(d.bound, s->bound, sizeof d.bound);
    FORWARD_IF_ERROR(kv_pod_add(pod, &d, sizeof d, &start));
    if (!s->zero) return KV_OK;
    FORWARD_IF_ERROR(kv_pod_add(pod, s->zero, row, &d.at_zero));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->scale, row, &d.at_scale));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->inverse, row, &d.at_inverse));
    memcpy(pod->data, &d, sizeof d);
    return KV_OK;
}

static int nuq_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    kv_pod pod = { 0 };
    const int status = fill_device(c, &pod);
    return kv_pod_done(&pod, status, out, bytes);
}

const kv_codec_ops kv_codec_nuq = {
    .name = "nuq", .about = "calibrated non-uniform levels, keys per channel, values per token, outliers in a bounded list",
    .source = "KVQuant, arXiv 2401.18079, section 3",
    .params = params, .n_params = 4, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CALIBRATED, .state_size = sizeof(nuq_state),
    .calibrate = nuq_calibrate, .init = nuq_init, .fini = nuq_fini, .encode = nuq_encode, .decode = nuq_decode,
    .query = nuq_query, .dot = nuq_dot, .accumulate = nuq_accumulate, .output = nuq_output, .device = nuq_on_device,
};
