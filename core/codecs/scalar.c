/* scalar.c -- norm, random rotation, a codebook per coordinate: TurboQuant-MSE (arXiv 2504.19874, Algorithm 1).
 *
 * This file codes rows with one codebook.  scalar_parts.c adds a sketch of the residual and outlier channels, scalar_calib.c
 * calibrated tables, scalar_rotation.c and scalar_codes.c have rotations and the packing, scalar_avx2.c and scalar_avx512.c the speed.
 *
 * A row x becomes a scale and head_dim codes: y = R(x / |x|), code = number of boundaries that y_i exceeds.  R is the
 * orthonormal Walsh-Hadamard transform after random signs, a dense random orthogonal matrix, or nothing.  A head_dim that
 * is no power of two is transformed in blocks, largest first (96 = 64 + 32, 80 = 64 + 16).  Coordinates of a rotated unit
 * vector are nearly N(0, 1/d), so one codebook serves every layer, head and model.  Row = scale * R^-1(centroids).
 *
 * Page, little-endian; B = 64 bytes:
 *
 *   keys:    | plane 0: tile of tokens 0-15, tile 16-31, ... | plane 1, from 5 bits on | scale f16 [page_tokens] |
 *   values:  | plane 0: tile of dims   0-15, tile 16-31, ... | plane 1               | scale f16 [page_tokens] |
 *   tile:    | chunk 0 | chunk 1 | ...   chunk: rows of B = 16 lanes of one 32-bit word each
 *
 * A lane is a token (keys) or a dim (values); the chunks go along the other, "inner", axis.  Plane 0 holds the codes' low 4
 * bits, plane 1 the rest.  Inner element i of a chunk sits in byte i%4 of its lane's words, in slot i/4 of that byte:
 *
 *   bits of the plane     1                2              4              3 (three rows: words w0 w1 w2)
 *   elements a chunk     32               16              8             32
 *   slot s               bit s         bits 2s..2s+1   bits 4s..4s+3    s < 6: bits 3(s%2).. of w(s/2)
 *                                                                       6: w0 bits 6-7, w1 bit 6   7: w2 bits 6-7, w1 bit 7
 *
 * So a register of words, shifted, gives 16 tokens' (dims') codes, and an integer multiply-add of neighbouring elements
 * sums along the inner axis inside each lane: scores of 16 tokens come out of attention with no horizontal sum, and keys and
 * values share one kernel.  Tiles and chunks are padded to whole ones (counted as padding).
 *
 * Encoding arithmetic, in f32, no contraction: n = sqrt(sumsq(x)); y = transform(x_i * (sign_i * (1 / n))); z = centroids;
 * scale = n | n / sqrt(sumsq z) | n * (<y,z> / sumsq z) | n / <y,z>, to f16, at most 65504.  Sums as in kv_dot16.  Squares
 * that leave 2^-100..2^120 are taken from x times a power of two.
 *
 * search > 1: each factor f codes f y, and the code whose centroids have the largest <y,z> / |z| stays; norm=raw then stores n / f.
 *
 * Attention works on 16-bit fixed point: centroids of 13-14 bits, weights (query dims, probability times scale) with as many
 * bits as keep the 32-bit sum from overflowing.  Values restart the sum every 64 tokens. */
#include <math.h>
#include "scalar.h"

static const kv_param params[] = {
    { "bits",     "bits of a code; 0: the residual's sketch alone", KV_PARAM_INT, 4, 0, 8, NULL },
    { "rotation", "random signs and Walsh-Hadamard, a dense random orthogonal matrix, or none", KV_PARAM_CHOICE, SCALAR_HADAMARD, 0, 2, "hadamard|orthogonal|none" },
    { "codebook", "Lloyd-Max for N(0,1/d), for the exact density of a unit vector's coordinate, equal steps, or Lloyd's on calibration rows", KV_PARAM_CHOICE, 0, 0, 3, "gauss|beta|uniform|calibrated" },
    { "norm",     "stored scale: |x|, keeps |x| after decoding, least squares, or no bias in inner products", KV_PARAM_CHOICE, SCALAR_NORM_MATCHED, 0, 3, "raw|matched|lsq|unbiased" },
    { "seed",     "of the rotation; keys and values draw from different streams of it", KV_PARAM_INT, 0, 0, 4294967295.0, NULL },
    { "search",   "factors tried on each row; the code with the largest cosine is kept", KV_PARAM_INT, 1, 1, SCALAR_MAX_TRIES, NULL },
    { "residual", "one more bit: signs of the residual under a Gaussian, orthogonal or second Hadamard sketch, or of itself", KV_PARAM_CHOICE, 0, 0, 4, "none|qjl|orthogonal|hadamard|sign" },
    { "gain",     "the sketch's scale: sqrt(pi/2) |r| (no bias), least squares, or |r| as expected, which is not stored", KV_PARAM_CHOICE, 0, 0, 2, "norm|lsq|expected" },
    { "outliers", "channels of the largest norm in a page, coded apart with outlier_bits", KV_PARAM_INT, 0, 0, 256, NULL },
    { "outlier_bits", "bits of the outlier channels' codes", KV_PARAM_INT, 4, 1, 8, NULL },
    { "pick",     "outlier channels are those of a page, or those of the calibration", KV_PARAM_CHOICE, 0, 0, 1, "page|calibrated" },
    { "scale",    "channels as they are, or times calibrated factors before the norm", KV_PARAM_CHOICE, 0, 0, 1, "none|calibrated" },
};

/* ---- setting up ---------------------------------------------------------------------------------------------------- */

void scalar_set_centroids(scalar_state *s, const double *g, double shrink)
{
    double best = INFINITY, grid = 1;
    const int half = s->levels / 2;
    for (int i = 0; i < 256; i++) {
        s->centroid[i] = (float)(shrink * g[i % s->levels]);
        s->bound[i] = i < s->levels - 1 ? (float)(shrink * 0.5 * (g[i] + g[i + 1])) : INFINITY;
    }
    for (int top = SCALAR_C_MIN; top <= SCALAR_C_MAX; top++) {
        const double per = top / g[s->levels - 1];
        double err = 0;
        for (int i = half; i < s->levels; i++) {
            const double off = (g[i] * per - rint(g[i] * per)) / per;
            err += off * off;
        }
        if (err < best) { best = err; grid = per; }
    }
    for (int i = 0; i < 256; i++) s->fixed[i] = (int16_t)rint(g[i % s->levels] * grid);
    s->unit = (float)(shrink / grid);
    const int n_tables = s->bits > 4 ? s->levels / 32 : 1, first = s->bits > 4 ? half : 0;
    for (int i = 0; i < 16 * n_tables; i++) {
        const int16_t at = s->fixed[first + i], after = i / 16 + 1 < n_tables ? s->fixed[first + i + 16] : 0, both = (int16_t)(at ^ after);
        s->byte_lo[i / 16][i % 16] = (uint8_t)(both & 255);
        s->byte_hi[i / 16][i % 16] = (uint8_t)((uint16_t)both >> 8);
    }
}

/* Factors 1 +- 0.16, as TURBOQUANT-like codes gain by (0.2 from 10 on, where they lie denser); equal steps fit fewer rows as
 * they are, and look further. */
static void set_tries(scalar_state *s, int n, int codebook)
{
    const double reach = codebook == SCALAR_UNIFORM ? 0.4 : n < 10 ? 0.16 : 0.2;
    s->n_tries = n;
    s->tries[0] = 1;
    for (int i = 0; i < n && n > 1; i++) s->tries[i] = (float)(1 + reach * (2.0 * i / (n - 1) - 1));
}

int scalar_part_init(kv_codec *c, const scalar_setup *w, size_t *end)
{
    scalar_state *s = c->state;
    const int d = c->head_dim, lanes = c->side == KV_SIDE_K ? c->page_tokens : d;
    int inner = c->side == KV_SIDE_K ? d : c->page_tokens;
    double g[256];
    s->bits = w->bits;
    s->levels = 1 << s->bits;
    s->norm = w->norm;
    if (s->bits > 4) inner = (int)kv_round_up((size_t)inner, s->bits % 2 ? 32 : 16);    /* whole chunks of both planes */
    s->n_tiles = (lanes + SCALAR_LANES - 1) / SCALAR_LANES;
    s->n_planes = s->bits > 4 ? 2 : 1;
    *end = scalar_lay_out(&s->plane[0], kv_min(s->bits, 4), inner, s->n_tiles, *end);
    if (s->n_planes == 2) *end = scalar_lay_out(&s->plane[1], s->bits - 4, inner, s->n_tiles, *end);
    if (w->codebook == SCALAR_CALIBRATED) {
        for (int i = 0; i < s->levels; i++) g[i] = w->calibrated[i];
        FORWARD_IF_ERROR(kv_lloyd_max(s->bits, 0, NULL, &s->distortion));     /* nearly */
    } else if (w->codebook == SCALAR_UNIFORM) FORWARD_IF_ERROR(kv_uniform_best(s->bits, g, &s->distortion));
    else FORWARD_IF_ERROR(kv_lloyd_max(s->bits, w->codebook == SCALAR_LLOYD_BETA ? d : 0, g, &s->distortion));
    scalar_set_centroids(s, g, 1 / sqrt((double)d));
    set_tries(s, w->search, w->codebook);
    return scalar_draw(s, w->rotation, d, w->seed, w->stream);
}

static int scalar_init(kv_codec *c)
{
    scalar_state *s = c->state;
    const int d = c->head_dim;
    RETURN_ERROR_IF(d < 8 || d % 2, KV_E_PARAM, "codec 'scalar': head_dim=%d is not an even number in 8..%d", d, KV_MAX_HEAD_DIM);
    scalar_tables tables;
    FORWARD_IF_ERROR(scalar_read_tables(c, &tables));
    s->scale = tables.scale;
    s->unscale = tables.unscale;
    const scalar_setup w = { .bits = (int)c->value[P_BITS], .rotation = (int)c->value[P_ROTATION], .codebook = (int)c->value[P_CODEBOOK],
        .norm = (int)c->value[P_NORM], .search = (int)c->value[P_SEARCH], .stream = c->side, .seed = c->value[P_SEED],
        .calibrated = tables.codebook };
    const scalar_shape shape = { .residual = (int)c->value[P_RESIDUAL], .gain = (int)c->value[P_GAIN], .outliers = (int)c->value[P_OUTLIERS],
        .outlier_bits = (int)c->value[P_OUTLIER_BITS], .order = tables.order };
    if (shape.residual || shape.outliers) return scalar_parts_init(c, &w, &shape);
    RETURN_ERROR_IF(w.bits == 0, KV_E_PARAM, "codec 'scalar': bits=0 needs a residual (qjl, orthogonal, hadamard)");
    FORWARD_IF_ERROR(scalar_part_init(c, &w, &s->scales));
    c->page.codes = (double)s->bits * d * c->page_tokens / 8;
    c->page.padding = (double)s->scales - c->page.codes;
    c->page.scales = 2.0 * c->page_tokens;
    c->bits_nominal = s->bits;
    c->granule = 1;
    c->space_dim = (int)kv_round_up((size_t)d, SCALAR_LANES);
    c->query_bytes = 64 + 8 * (size_t)scalar_padded(c);
    return KV_OK;
}

static void scalar_fini(kv_codec *c)
{
    scalar_state *s = c->state;
    if (s->parts) scalar_parts_fini(s->parts);
    scalar_drop(s);
}

/* ---- encode and decode ------------------------------------------------------------------------------------------------ */

float scalar_row_norm(const float **x, int n, float *copy, float *by)
{
    const float sum = kv_sumsq(*x, n);
    if (sum >= 0x1p-100f && sum <= 0x1p120f) {
        const float norm = sqrtf(sum);
        *by = 1 / norm;
        return norm;
    }
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fmaxf(amax, fabsf((*x)[i]));
    *by = 0;
    if (amax == 0) return 0;
    int e;
    frexpf(amax, &e);
    for (int i = 0; i < n; i++) copy[i] = ldexpf((*x)[i], -e);
    const float norm = sqrtf(kv_sumsq(copy, n));
    *by = 1 / norm;
    *x = copy;
    return ldexpf(norm, e);
}

/* Codes and centroids of the factor whose code has the largest cosine with y; returns the factor. */
static float choose(const scalar_state *s, const scalar_level *l, int d, const float *y, uint8_t *code, float *z)
{
    float best = -1, factor = 1, scaled[KV_MAX_HEAD_DIM], zk[KV_MAX_HEAD_DIM];
    uint8_t ck[KV_MAX_HEAD_DIM];
    for (int k = 0; k < s->n_tries; k++) {
        l->scale_row(y, NULL, s->tries[k], scaled, d);
        l->index(s, scaled, ck, d);
        for (int i = 0; i < d; i++) zk[i] = s->centroid[ck[i]];
        const float cosine = kv_dot16(y, zk, d) / sqrtf(kv_sumsq(zk, d));
        if (!(cosine > best)) continue;
        best = cosine;
        factor = s->tries[k];
        memcpy(code, ck, (size_t)d);
        memcpy(z, zk, sizeof *z * (size_t)d);
    }
    return factor;
}

static float scale_of(const scalar_state *s, int d, float norm, float factor, const float *y, const float *z)
{
    if (s->norm == SCALAR_NORM_RAW) return norm / factor;
    const float zz = kv_sumsq(z, d);
    if (s->norm == SCALAR_NORM_MATCHED) return norm / sqrtf(zz);
    const float yz = kv_dot16(y, z, d);
    return s->norm == SCALAR_NORM_LSQ ? norm * (yz / zz) : norm / yz;
}

void scalar_put(const kv_codec *c, const scalar_level *l, uint8_t *page, int token, const uint8_t *code)
{
    if (c->side == KV_SIDE_K) scalar_put_key(c, page, token, code);
    else l->put_value(c->state, page, token, code);
}

void scalar_part_encode(const kv_codec *c, const scalar_level *l, uint8_t *page, int token, const float *x, scalar_row *r)
{
    const scalar_state *s = c->state;
    const int d = c->head_dim;
    float copy[KV_MAX_HEAD_DIM], by, scale = 0, factor = 1;
    uint8_t code[KV_MAX_HEAD_DIM];
    r->norm = scalar_row_norm(&x, d, copy, &by);
    memset(code, 0, (size_t)scalar_padded(c));
    if (by > 0) {
        scalar_rotate(s, l, d, x, by, r->y);
        if (s->n_tries > 1) factor = choose(s, l, d, r->y, code, r->z);
        else {
            l->index(s, r->y, code, d);
            for (int i = 0; i < d; i++) r->z[i] = s->centroid[code[i]];
        }
        scale = scale_of(s, d, r->norm, factor, r->y, r->z);
        if (!(scale < 65504)) scale = 65504;              /* the largest f16 */
    }
    scalar_put(c, l, page, token, code);
    const uint16_t half = kv_f32_to_f16(scale);
    r->scale = kv_f16_to_f32(half);
    kv_store_u16(page + s->scales + 2 * (size_t)token, half);
}

/* out = x times the calibrated factors, or x where there are none. */
static const float *scaled(const kv_codec *c, const scalar_level *l, const float *x, float *out)
{
    const scalar_state *s = c->state;
    if (s->scale) l->scale_row(x, s->scale, 1, out, c->head_dim);
    return s->scale ? out : x;
}

static void unscale(const kv_codec *c, const scalar_level *l, float *x)
{
    const scalar_state *s = c->state;
    if (s->scale) l->scale_row(x, s->unscale, 1, x, c->head_dim);
}

static void scalar_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const scalar_state *s = c->state;
    const scalar_level *l = scalar_level_now();
    scalar_row r;
    float row[KV_MAX_HEAD_DIM];
    if (s->parts && !s->scale) scalar_parts_encode(c, page, tok0, n, x, ld);
    else for (int t = tok0; t < tok0 + n; t++, x += ld) {
        const float *y = scaled(c, l, x, row);
        if (s->parts) scalar_parts_encode(c, page, t, 1, y, ld);
        else scalar_part_encode(c, l, page, t, y, &r);
    }
}

static void scalar_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const scalar_level *l = scalar_level_now();
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        if (scalar_state_of(c)->parts) scalar_parts_decode(c, page, t, 1, x, ld);
        else {
            float z[KV_MAX_HEAD_DIM];
            const float scale = scalar_get_row(c, page, t, z);
            scalar_rotate_back(c->state, l, c->head_dim, z, scale, x);
        }
        unscale(c, l, x);
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------------------- */

void scalar_part_query(const kv_codec *c, const scalar_level *l, const float *q, void *prepared)
{
    const int padded = scalar_padded(c);
    float *row = scalar_query_f32(prepared);
    scalar_rotate(c->state, l, c->head_dim, q, 1, row);
    memset(row + c->head_dim, 0, sizeof *row * (size_t)(padded - c->head_dim));
    l->prepare(prepared, padded);
}

static void scalar_query_rows(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const scalar_level *l = scalar_level_now();
    for (int i = 0; i < n_q; i++) {
        uint8_t *to = (uint8_t *)prepared + (size_t)i * c->query_bytes;
        float row[KV_MAX_HEAD_DIM];
        const float *from = q + i * ld;
        if (scalar_state_of(c)->unscale) {
            memcpy(row, from, sizeof *row * (size_t)c->head_dim);
            unscale(c, l, row);
            from = row;
        }
        if (scalar_state_of(c)->parts) scalar_parts_query(c, from, ld, 1, to);
        else scalar_part_query(c, l, from, to);
    }
}

static void scalar_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    (scalar_state_of(c)->parts ? scalar_parts_dot : scalar_level_now()->dot)(c, page, n_tokens, prepared, n_q, scores, ld);
}

static void scalar_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    (scalar_state_of(c)->parts ? scalar_parts_accumulate : scalar_level_now()->accumulate)(c, page, n_tokens, p, ld, n_q, acc);
}

static void scalar_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    const scalar_level *l = scalar_level_now();
    for (int i = 0; i < n_q; i++, acc += c->space_dim, out += ld) {
        if (scalar_state_of(c)->parts) scalar_parts_output(c, acc, 1, out, ld);
        else {
            float z[KV_MAX_HEAD_DIM];
            memcpy(z, acc, sizeof *z * (size_t)c->head_dim);
            scalar_rotate_back(c->state, l, c->head_dim, z, 1, out);
        }
        unscale(c, l, out);
    }
}

const kv_codec_ops kv_codec_scalar = {
    .name = "scalar", .about = "norm, random rotation, a codebook per coordinate; sign sketches of the residual, outlier channels (TurboQuant, QJL, RaBitQ)",
    .source = "TurboQuant, arXiv 2504.19874, Algorithms 1 and 2; QJL, arXiv 2406.03482; RaBitQ, arXiv 2409.09913; scale modes: EDEN, arXiv 2108.08842",
    .params = params, .n_params = sizeof params / sizeof *params, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CALIBRATABLE,
    .state_size = sizeof(scalar_state),
    .calibrate = scalar_calibrate, .init = scalar_init, .fini = scalar_fini, .encode = scalar_encode, .decode = scalar_decode,
    .query = scalar_query_rows, .dot = scalar_dot, .accumulate = scalar_accumulate, .output = scalar_output,
    .device = scalar_on_device,
};
