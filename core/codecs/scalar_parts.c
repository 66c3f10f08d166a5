/* scalar_parts.c -- `scalar` in several parts: one more bit on the residual, outlier channels coded apart.
 *
 * residual: a row is y = R(x/|x|), z its centroids and s their scale; r = |x| y - s z is what the codes leave.  A sketch keeps
 * g and the signs of S r, and adds r^ = g a S^T signs:
 *
 *   qjl           S of independent N(0,1), a = sqrt(pi/2) / d          QJL, arXiv 2406.03482; with it TurboQuant's Algorithm 2
 *   orthogonal    S = sqrt(d) Q, Q a random orthogonal matrix          a variance of 0.36 times Algorithm 2's
 *   hadamard      S = sqrt(d) times signs and Walsh-Hadamard           the same at d log d
 *   sign          S = sqrt(d) times nothing: signs of r itself         for reconstruction (with gain=lsq)
 *
 * gain=norm stores g = |r|: <q, s z + r^> is then <q, |x| y> on average over S.  gain=lsq stores the g of least squared error.
 * gain=expected takes g = s sqrt(D), D the codebook's distortion, and stores nothing.  bits=0: no codes, r = x, no rotation.
 *
 * outliers=n: the n channels of the largest norm are coded apart from the others, each set with its own norm, rotation and
 * residual, as rows of n and head_dim - n channels.  pick=page: over a page's tokens; the page holds the choice, so the granule
 * is a page, and queries are split and rotated page by page.  pick=calibrated: over the calibration's.
 *
 *   | planes of part 0 | part 1 | ... | outlier channels (pick=page): bit i%8 of byte i/8 | scales f16 [page_tokens] of part 0 | ... |
 *   parts: outliers' codes, outliers' sketch, the others' codes, the others' sketch; whichever there are
 *
 * A sketch is a part like any other, with 1 bit and centroids +-a: its products run in the kernels of codes, on S R q. */
#include <math.h>
#include "scalar.h"
#include "scalar_device.h"

typedef struct scalar_part { kv_codec codec; scalar_state state; size_t query_at; int acc_at; } scalar_part;
/* Some channels, or all.  code or sketch is NULL where there is none. */
typedef struct scalar_group { int dim; scalar_part part[2], *code, *sketch; } scalar_group;
typedef struct scalar_parts {
    int          n_groups, gain, space;     /* space: floats of all parts of a query's sum */
    bool         by_page;                   /* which channels are outliers: page by page */
    int          order[KV_MAX_HEAD_DIM];    /* else: outliers, then the others */
    size_t       mask, query_bytes;         /* of all parts */
    scalar_group group[2];
} scalar_parts;

enum { MAX_SPACE = 2 * (KV_MAX_HEAD_DIM + 32) };          /* every channel in two parts, each part rounded up to 16 */

static inline const scalar_parts *parts_of(const kv_codec *c) { return scalar_state_of(c)->parts; }

/* ---- setting up */

static int add_part(kv_codec *c, scalar_parts *p, scalar_group *g, scalar_part *part, const scalar_setup *w, size_t *end)
{
    part->codec = (kv_codec){ .ops = c->ops, .head_dim = g->dim, .page_tokens = c->page_tokens, .side = c->side, .state = &part->state };
    part->query_at = p->query_bytes;
    part->acc_at = p->space;
    p->query_bytes += 64 + 8 * (size_t)scalar_padded(&part->codec);
    p->space += (int)kv_round_up((size_t)g->dim, SCALAR_LANES);
    c->page.codes += (double)w->bits * g->dim * c->page_tokens / 8;
    return scalar_part_init(&part->codec, w, end);
}

static int add_group(kv_codec *c, scalar_parts *p, scalar_group *g, const scalar_setup *setup, const scalar_shape *shape, size_t *end)
{
    static const int rotation[] = { [SCALAR_QJL] = SCALAR_GAUSS, [SCALAR_QJL_ORTHOGONAL] = SCALAR_ORTHOGONAL, [SCALAR_QJL_HADAMARD] = SCALAR_HADAMARD, [SCALAR_SIGN] = SCALAR_PLAIN };
    scalar_setup w = *setup;
    double distortion = 1;
    w.stream += 4 * (int)(g - p->group);                  /* bit 0 is the side, bit 1 the sketch */
    if (w.bits > 0) {
        g->code = &g->part[0];
        FORWARD_IF_ERROR(add_part(c, p, g, g->code, &w, end));
        distortion = g->code->state.distortion;
    }
    if (shape->residual == SCALAR_NO_RESIDUAL) return KV_OK;
    w.bits = w.search = 1;
    w.stream += 2;
    w.rotation = rotation[shape->residual];
    g->sketch = &g->part[1];
    FORWARD_IF_ERROR(add_part(c, p, g, g->sketch, &w, end));
    const double d = g->dim, a = sqrt(M_PI / 2) / (w.rotation == SCALAR_GAUSS ? d : sqrt(d));
    const double by = shape->gain == SCALAR_GAIN_EXPECTED && g->code ? sqrt(distortion) : 1;
    scalar_set_centroids(&g->sketch->state, (double[2]){ -1, 1 }, a * by);
    return KV_OK;
}

int scalar_parts_init(kv_codec *c, const scalar_setup *w, const scalar_shape *shape)
{
    const int d = c->head_dim, n = shape->outliers;
    RETURN_ERROR_IF(n && (n < 8 || n % 2 || d - n < 8), KV_E_PARAM, "codec 'scalar': outliers=%d of head_dim=%d is not an even number in 8..%d", n, d, d - 8);
    RETURN_ERROR_IF(w->bits == 0 && (!shape->residual || shape->residual == SCALAR_SIGN), KV_E_PARAM, "codec 'scalar': bits=0 needs a residual (qjl, orthogonal, hadamard)");
    scalar_parts *p = kv_zalloc(sizeof *p);
    if (!p) return KV_E_NOMEM;
    ((scalar_state *)c->state)->parts = p;
    p->gain = shape->gain;
    p->n_groups = n ? 2 : 1;
    p->group[0].dim = n ? n : d;
    p->group[1].dim = d - n;
    p->by_page = n && !shape->order;
    for (int i = 0; i < d && shape->order; i++) p->order[i] = shape->order[i];
    size_t end = 0;
    double bits = 0;
    for (int i = 0; i < p->n_groups; i++) {
        scalar_setup of = *w;
        if (n && i == 0) of.bits = shape->outlier_bits;
        FORWARD_IF_ERROR(add_group(c, p, &p->group[i], &of, shape, &end));
        bits += (double)p->group[i].dim * (of.bits + (shape->residual != SCALAR_NO_RESIDUAL)) / d;
    }
    c->page.padding = (double)end - c->page.codes;
    p->mask = end;
    if (p->by_page) {
        c->page.outliers = (d + 7) / 8;
        end = kv_round_up(end + (size_t)(d + 7) / 8, 2);
        c->page.padding += (double)(end - p->mask) - c->page.outliers;
    }
    c->granule = p->by_page ? c->page_tokens : 1;
    c->space_dim = p->by_page ? d : p->space;
    c->query_bytes = p->by_page ? kv_round_up(sizeof(float) * (size_t)d, 64) : p->query_bytes;
    c->bits_nominal = bits;
    for (int i = 0; i < p->n_groups; i++) {
        scalar_group *g = &p->group[i];
        for (int k = 0; k < 2; k++) {
            scalar_part *part = &g->part[k];
            if (part != g->code && part != g->sketch) continue;
            /* The kernels step from query to query by these. */
            part->codec.query_bytes = p->query_bytes;
            part->codec.space_dim = p->space;
            part->state.scales = end;
            if (part == g->sketch && p->gain == SCALAR_GAIN_EXPECTED && g->code) part->state.scales = g->code->state.scales;
            else end += 2 * (size_t)c->page_tokens, c->page.scales += 2.0 * c->page_tokens;
        }
    }
    return KV_OK;
}

void scalar_parts_fini(scalar_parts *p)
{
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 2; k++) scalar_drop(&p->group[i].part[k].state);
    kv_free(p);
}

int scalar_parts_device(const kv_codec *c, kv_pod *pod, struct scalar_device *h)
{
    const scalar_parts *p = parts_of(c);
    uint16_t order[KV_MAX_HEAD_DIM];
    h->n_groups = p->n_groups;
    h->gain = p->gain;
    h->by_page = p->by_page;
    h->mask = (uint32_t)p->mask;
    for (int i = 0; i < p->n_groups; i++) {
        const scalar_group *g = &p->group[i];
        h->group[i].dim = g->dim;
        if (g->code) FORWARD_IF_ERROR(scalar_part_device(&g->code->codec, pod, &h->group[i].at_code));
        if (g->sketch) FORWARD_IF_ERROR(scalar_part_device(&g->sketch->codec, pod, &h->group[i].at_sketch));
    }
    if (p->n_groups == 1 || p->by_page) return KV_OK;
    for (int i = 0; i < c->head_dim; i++) order[i] = (uint16_t)p->order[i];
    return kv_pod_add(pod, order, sizeof *order * (size_t)c->head_dim, &h->at_order);
}

/* ---- one row of a group */

static void encode_sketch(const scalar_parts *p, const scalar_group *g, const scalar_level *l, uint8_t *page, int token, const scalar_row *row)
{
    const kv_codec *c = &g->sketch->codec;
    const scalar_state *s = c->state;
    const int d = g->dim;
    const float share = row->norm > 0 ? row->scale / row->norm : 0;
    float r[KV_MAX_HEAD_DIM], u[KV_MAX_HEAD_DIM], gain = 0;
    uint8_t code[KV_MAX_HEAD_DIM];
    memset(code, 0, (size_t)scalar_padded(c));
    for (int i = 0; i < d; i++) r[i] = row->norm > 0 ? row->y[i] - (g->code ? share * row->z[i] : 0) : 0;
    const float length = sqrtf(kv_sumsq(r, d));
    if (length > 0) {
        scalar_rotate(s, l, d, r, 1 / length, u);
        l->index(s, u, code, d);
        gain = length;
        if (p->gain == SCALAR_GAIN_LSQ) {
            float z[KV_MAX_HEAD_DIM];
            for (int i = 0; i < d; i++) z[i] = s->centroid[code[i]];
            scalar_rotate_back(s, l, d, z, 1, u);
            gain = kv_dot16(r, u, d) / kv_sumsq(u, d);
        }
        gain *= row->norm;
        if (!(gain < 65504)) gain = 65504;                /* the largest f16 */
    }
    scalar_put(c, l, page, token, code);
    if (p->gain != SCALAR_GAIN_EXPECTED || !g->code) kv_store_u16(page + s->scales + 2 * (size_t)token, kv_f32_to_f16(gain));
}

static void encode_row(const scalar_parts *p, const scalar_group *g, const scalar_level *l, uint8_t *page, int token, const float *x)
{
    scalar_row row;
    if (g->code) scalar_part_encode(&g->code->codec, l, page, token, x, &row);
    else {
        float copy[KV_MAX_HEAD_DIM], by;
        row.norm = scalar_row_norm(&x, g->dim, copy, &by);
        l->scale_row(x, NULL, by, row.y, g->dim);
        row.scale = 0;
    }
    if (g->sketch) encode_sketch(p, g, l, page, token, &row);
}

/* out = R^-1(code + S^T sketch); each of the two, in its own space and scaled, is at in + acc_at of its part, and overwritten. */
static void turn_back(const scalar_group *g, const scalar_level *l, float *in, float *out)
{
    const int d = g->dim;
    if (!g->sketch) {
        scalar_rotate_back(&g->code->state, l, d, in + g->code->acc_at, 1, out);
        return;
    }
    float r[KV_MAX_HEAD_DIM];
    scalar_rotate_back(&g->sketch->state, l, d, in + g->sketch->acc_at, 1, g->code ? r : out);
    if (!g->code) return;
    float *z = in + g->code->acc_at;
    for (int i = 0; i < d; i++) z[i] += r[i];
    scalar_rotate_back(&g->code->state, l, d, z, 1, out);
}

static void decode_row(const scalar_group *g, const scalar_level *l, const uint8_t *page, int token, float *out)
{
    float in[MAX_SPACE];
    for (int k = 0; k < 2; k++) {
        const scalar_part *part = k ? g->sketch : g->code;
        if (!part) continue;
        float *z = in + part->acc_at;
        const float scale = scalar_get_row(&part->codec, page, token, z);
        for (int i = 0; i < g->dim; i++) z[i] *= scale;
    }
    turn_back(g, l, in, out);
}

/* R q for the codes, S R q for the sketch. */
static void query_row(const scalar_group *g, const scalar_level *l, const float *q, uint8_t *prepared)
{
    if (g->code) {
        scalar_part_query(&g->code->codec, l, q, prepared + g->code->query_at);
        q = scalar_query_f32(prepared + g->code->query_at);
    }
    if (g->sketch) scalar_part_query(&g->sketch->codec, l, q, prepared + g->sketch->query_at);
}

/* ---- which channels are outliers */

/* The page's or the calibration's order: outliers ascending, then the others ascending.  Any mask gives an order: too many bits
 * are cut, too few filled up. */
static const int *order_of(const kv_codec *c, const uint8_t *page, int *order)
{
    const scalar_parts *p = parts_of(c);
    const int d = c->head_dim, n = p->group[0].dim;
    int high = 0, low = 0, late[KV_MAX_HEAD_DIM];
    if (!p->by_page) return p->order;
    for (int i = 0; i < d; i++) {
        if (page[p->mask + (size_t)i / 8] >> i % 8 & 1 && high < n) order[high++] = i;
        else late[low++] = i;
    }
    memcpy(order + high, late, sizeof *late * (size_t)low);
    return order;
}

static void choose_outliers(const kv_codec *c, uint8_t *page, const float *x, int64_t ld)
{
    const scalar_parts *p = parts_of(c);
    const int d = c->head_dim, n = p->group[0].dim;
    double sum[KV_MAX_HEAD_DIM] = { 0 };
    for (int t = 0; t < c->page_tokens; t++)
        for (int i = 0; i < d; i++) sum[i] += (double)x[t * ld + i] * x[t * ld + i];
    memset(page + p->mask, 0, (size_t)(d + 7) / 8);
    for (int i = 0; i < d; i++) {
        int before = 0;                                   /* channels that come first; of equals the lower one */
        for (int j = 0; j < d; j++) before += sum[j] > sum[i] || (sum[j] == sum[i] && j < i);
        if (before < n) page[p->mask + (size_t)i / 8] |= (uint8_t)(1 << i % 8);
    }
}

/* The row's channels by group; x itself where there is one. */
static const float *split(const kv_codec *c, const int *order, const float *x, float *out)
{
    if (parts_of(c)->n_groups == 1) return x;
    for (int i = 0; i < c->head_dim; i++) out[i] = x[order[i]];
    return out;
}

static void join(const kv_codec *c, const int *order, const float *x, float *out)
{
    if (parts_of(c)->n_groups == 1) memcpy(out, x, sizeof *x * (size_t)c->head_dim);
    else for (int i = 0; i < c->head_dim; i++) out[order[i]] = x[i];
}

/* ---- pages */

void scalar_parts_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const scalar_parts *p = parts_of(c);
    const scalar_level *l = scalar_level_now();
    int own[KV_MAX_HEAD_DIM];
    if (p->by_page) choose_outliers(c, page, x, ld);
    const int *order = order_of(c, page, own);
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float row[KV_MAX_HEAD_DIM];
        const float *from = split(c, order, x, row);
        for (int i = 0; i < p->n_groups; from += p->group[i++].dim) encode_row(p, &p->group[i], l, page, t, from);
    }
}

void scalar_parts_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const scalar_parts *p = parts_of(c);
    const scalar_level *l = scalar_level_now();
    int own[KV_MAX_HEAD_DIM];
    const int *order = order_of(c, page, own);
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float row[KV_MAX_HEAD_DIM] = { 0 }, *to = row;
        for (int i = 0; i < p->n_groups; to += p->group[i++].dim) decode_row(&p->group[i], l, page, t, to);
        join(c, order, row, x);
    }
}

/* ---- attention: SCALAR_QUERIES queries at a time */

enum { MAX_QUERY = 4 * 64 + 2 * 8 * (KV_MAX_HEAD_DIM + 64) };   /* bytes of a query's parts: at most 4, every channel in two */

static void query_parts(const kv_codec *c, const scalar_level *l, const int *order, const float *q, uint8_t *prepared)
{
    const scalar_parts *p = parts_of(c);
    float row[KV_MAX_HEAD_DIM];
    const float *from = split(c, order, q, row);
    for (int i = 0; i < p->n_groups; from += p->group[i++].dim) query_row(&p->group[i], l, from, prepared);
}

void scalar_parts_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const scalar_parts *p = parts_of(c);
    for (int i = 0; i < n_q; i++) {
        uint8_t *to = (uint8_t *)prepared + (size_t)i * c->query_bytes;
        if (p->by_page) memcpy(to, q + i * ld, sizeof(float) * (size_t)c->head_dim);
        else query_parts(c, scalar_level_now(), p->order, q + i * ld, to);
    }
}

/* The first part writes scores, the others add. */
static void dot_parts(const scalar_parts *p, const scalar_level *l, const uint8_t *page, int n_tokens, const uint8_t *prepared, int n_q, float *scores, int64_t ld)
{
    float more[SCALAR_QUERIES * KV_MAX_PAGE];
    bool first = true;
    for (int k = 0; k < 2 * p->n_groups; k++) {
        const scalar_part *part = k % 2 ? p->group[k / 2].sketch : p->group[k / 2].code;
        if (!part) continue;
        l->dot(&part->codec, page, n_tokens, prepared + part->query_at, n_q, first ? scores : more, first ? ld : KV_MAX_PAGE);
        for (int i = 0; i < n_q && !first; i++)
            for (int t = 0; t < n_tokens; t++) scores[i * ld + t] += more[i * KV_MAX_PAGE + t];
        first = false;
    }
}

void scalar_parts_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const scalar_parts *p = parts_of(c);
    const scalar_level *l = scalar_level_now();
    const uint8_t *from = prepared;
    int own[KV_MAX_HEAD_DIM];
    const int *order = order_of(c, page, own);
    for (int at = 0, n; at < n_q; at += n, from += (size_t)n * c->query_bytes, scores += n * ld) {
        n = kv_min(n_q - at, SCALAR_QUERIES);
        if (!p->by_page) {
            dot_parts(p, l, page, n_tokens, from, n, scores, ld);
            continue;
        }
        _Alignas(64) uint8_t rows[SCALAR_QUERIES * MAX_QUERY];
        for (int i = 0; i < n; i++) query_parts(c, l, order, (const float *)(from + (size_t)i * c->query_bytes), rows + (size_t)i * p->query_bytes);
        dot_parts(p, l, page, n_tokens, rows, n, scores, ld);
    }
}

static void accumulate_parts(const scalar_parts *p, const scalar_level *l, const uint8_t *page, int n_tokens, const float *w, int64_t ld, int n_q, float *acc)
{
    for (int k = 0; k < 2 * p->n_groups; k++) {
        const scalar_part *part = k % 2 ? p->group[k / 2].sketch : p->group[k / 2].code;
        if (part) l->accumulate(&part->codec, page, n_tokens, w, ld, n_q, acc + part->acc_at);
    }
}

/* A row of head_dim from the sums of all parts, which are overwritten. */
static void turn_all_back(const kv_codec *c, const scalar_level *l, const int *order, float *sums, float *out)
{
    const scalar_parts *p = parts_of(c);
    float row[KV_MAX_HEAD_DIM] = { 0 }, *to = row;
    for (int i = 0; i < p->n_groups; to += p->group[i++].dim) turn_back(&p->group[i], l, sums, to);
    join(c, order, row, out);
}

void scalar_parts_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *w, int64_t ld, int n_q, float *acc)
{
    const scalar_parts *p = parts_of(c);
    const scalar_level *l = scalar_level_now();
    if (!p->by_page) {
        accumulate_parts(p, l, page, n_tokens, w, ld, n_q, acc);
        return;
    }
    int own[KV_MAX_HEAD_DIM];
    const int *order = order_of(c, page, own);
    for (int at = 0, n; at < n_q; at += n, w += n * ld) {
        float sum[SCALAR_QUERIES * MAX_SPACE], row[KV_MAX_HEAD_DIM];
        n = kv_min(n_q - at, SCALAR_QUERIES);
        memset(sum, 0, sizeof *sum * (size_t)(n * p->space));
        accumulate_parts(p, l, page, n_tokens, w, ld, n, sum);
        for (int i = 0; i < n; i++, acc += c->space_dim) {
            turn_all_back(c, l, order, sum + i * p->space, row);
            for (int k = 0; k < c->head_dim; k++) acc[k] += row[k];
        }
    }
}

void scalar_parts_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    const scalar_parts *p = parts_of(c);
    for (int i = 0; i < n_q; i++, acc += c->space_dim, out += ld) {
        float sums[MAX_SPACE];
        memcpy(sums, acc, sizeof *sums * (size_t)c->space_dim);
        if (p->by_page) memcpy(out, sums, sizeof *sums * (size_t)c->head_dim);
        else turn_all_back(c, scalar_level_now(), p->order, sums, out);
    }
}
