/* fused.c -- two ways of joining TurboAngle and TurboQuant in one row: ablations, kept because a negative result is one.
 *
 * form=residual    y = R1 x is coded as pairs of angle and radius, few of them, and what is left as one sign an element after a
 *                  second random rotation R2:  y^ + alpha R2^-1 s,  s = sign(R2 (y - y^)).  alpha = mean |R2 (y - y^)| has the
 *                  least squared error (it leaves 1 - 2/pi = 0.363 of it); sqrt(pi/2) |y - y^| / sqrt(d) makes inner products
 *                  right on average (and leaves pi/2 - 1 = 0.571).
 * form=subspace    the `pairs` of y with the most energy are coded as angle and radius, the other coordinates with scalar
 *                  codebooks, under one scale.  Codebooks know the cut: radii of a Rayleigh tail, coordinates of a disk.
 *
 * Page, little-endian, P = page_tokens; every part is packed as polar.h says, in whole bytes a token:
 *
 *   residual | angles [P] | radii [P] | signs [P] | lo, step f16 (or what `norm` needs) [P] | alpha f16 [P] |
 *   subspace | row [P] | scale f16 [P] |    row: map of pairs (1: polar) | angles | radii | codes of the other coordinates, ascending
 *
 * Attention on codes: a residual row is (y^, alpha s) in 2 d dimensions and the query (R1 q, R2 R1 q); a subspace row is y^. */
#include <math.h>
#include "fused_device.h"
#include "polar.h"

enum { P_FORM, P_ANGLES, P_NORM, P_NORM_BITS, P_BITS, P_PAIRS, P_SCALE, P_SEED };
enum { FORM_RESIDUAL, FORM_SUBSPACE };
enum { SCALE_MSE, SCALE_UNBIASED };
enum { STREAM_FIRST = 0x46310000, STREAM_SECOND = 0x46320000 };   /* plus the side */

static const kv_param params[] = {
    { "form",      "residual: angles, then signs of what is left; subspace: the strongest pairs as angles, the rest as scalars", KV_PARAM_CHOICE, FORM_RESIDUAL, 0, 1, "residual|subspace" },
    { "angles",    "directions of a pair", KV_PARAM_INT, 16, 2, POLAR_BASE_MAX, NULL },
    { "norm",      "residual: how radii are stored, as in polar", KV_PARAM_CHOICE, POLAR_LIN, 0, 4, "f32|f16|lin|log|lloyd" },
    { "norm_bits", "bits of a radius", KV_PARAM_INT, 4, 1, 8, NULL },
    { "bits",      "subspace: bits of a scalar code", KV_PARAM_INT, 4, 1, 8, NULL },
    { "pairs",     "subspace: pairs coded as angle and radius", KV_PARAM_INT, 8, 1, KV_MAX_HEAD_DIM / 2 - 1, NULL },
    { "scale",     "residual: of the signs, for least squared error or for unbiased inner products", KV_PARAM_CHOICE, SCALE_MSE, 0, 1, "mse|unbiased" },
    { "seed",      "of both rotations; keys and values draw from different streams of it", KV_PARAM_INT, 0, 0, 4294967295.0, NULL },
};

typedef struct fused_state {
    polar_field angle, sign, map, radius, code;               /* sign: residual; map, radius, code: subspace */
    polar_form  base;                                         /* residual: angles and radii */
    int         form, pairs, row_bytes, radius_at, code_at, angle_at;
    size_t      sign_at, scale_at;
    float      *circle, *first, *second;                      /* directions; the signs of R1 and R2 */
    _Alignas(64) float tail[256], tail_bound[256], disk[256], disk_bound[256];
} fused_state;

static void bounds(const double *c, int levels, float *level, float *bound)
{
    for (int i = 0; i < 256; i++) {
        level[i] = (float)c[i % levels];
        bound[i] = i < levels - 1 ? (float)(0.5 * (c[i] + c[i + 1])) : INFINITY;
    }
}

/* How many boundaries x exceeds. */
static int cell(const float *bound, int levels, float x)
{
    int at = 0;
    for (int step = levels / 2; step; step /= 2) at += x > bound[at + step - 1] ? step : 0;
    return at;
}

static void init_residual(kv_codec *c, fused_state *s)
{
    const int d = c->head_dim;
    const size_t tokens = (size_t)c->page_tokens;
    polar_field_init(&s->angle, (int)c->value[P_ANGLES], d / 2);
    polar_field_init(&s->sign, 2, d);
    polar_form *f = &s->base;
    f->levels = 1;
    f->field[0] = s->angle;
    f->angle_bytes = s->angle.bytes;
    polar_norms_init(&f->norms, (int)c->value[P_NORM], (int)c->value[P_NORM_BITS], d / 2, 2, (int)c->value[P_ANGLES]);
    f->norm_at = tokens * (size_t)s->angle.bytes;
    s->sign_at = f->norm_at + tokens * (size_t)f->norms.bytes;
    f->side_at = s->sign_at + tokens * (size_t)s->sign.bytes;
    s->scale_at = f->side_at + tokens * (size_t)f->norms.side_bytes;
    c->page.codes = (double)tokens * (s->angle.bytes + s->sign.bytes);
    c->page.scales = (double)tokens * (f->norms.bytes + f->norms.side_bytes + 2);
    c->bits_nominal = 0.5 * log2(c->value[P_ANGLES]) + 1;
    c->space_dim = 2 * d;
}

static int init_subspace(kv_codec *c, fused_state *s)
{
    const int d = c->head_dim, norm_bits = (int)c->value[P_NORM_BITS], bits = (int)c->value[P_BITS], m = s->pairs = (int)c->value[P_PAIRS];
    RETURN_ERROR_IF(m >= d / 2, KV_E_PARAM, "codec 'fused': pairs=%d is outside 1..%d at head_dim=%d", m, d / 2 - 1, d);
    polar_field_init(&s->map, 2, d / 2);
    polar_field_init(&s->angle, (int)c->value[P_ANGLES], m);
    polar_field_init(&s->radius, 1 << norm_bits, m);
    polar_field_init(&s->code, 1 << bits, d - 2 * m);
    s->angle_at = s->map.bytes;
    s->radius_at = s->angle_at + s->angle.bytes;
    s->code_at = s->radius_at + s->radius.bytes;
    s->row_bytes = s->code_at + s->code.bytes;
    s->scale_at = (size_t)c->page_tokens * (size_t)s->row_bytes;
    c->page.outliers = (double)c->page_tokens * s->map.bytes;
    c->page.codes = (double)c->page_tokens * (s->row_bytes - s->map.bytes);
    c->page.scales = 2.0 * c->page_tokens;
    c->bits_nominal = (m * (log2(c->value[P_ANGLES]) + norm_bits) + (d - 2 * m) * bits) / d;

    /* The strongest m of d/2 pairs are those whose radius, of mean square 2, passes this on average. */
    const double cut = sqrt(-2 * log(2.0 * m / d));
    double level[256];
    polar_lloyd(POLAR_CHI, 2, cut / M_SQRT2, 1 << norm_bits, level);
    for (int i = 0; i < 1 << norm_bits; i++) level[i] *= M_SQRT2;
    bounds(level, 1 << norm_bits, s->tail, s->tail_bound);
    const int half = 1 << (bits - 1);
    polar_lloyd(POLAR_DISK, 2, cut, half, level + half);
    for (int i = 0; i < half; i++) level[i] = -level[2 * half - 1 - i];
    bounds(level, 2 * half, s->disk, s->disk_bound);
    return KV_OK;
}

static int fused_init(kv_codec *c)
{
    fused_state *s = c->state;
    const int d = c->head_dim;
    RETURN_ERROR_IF(d < 4 || d % 2, KV_E_PARAM, "codec 'fused': head_dim=%d is not an even number in 4..%d", d, KV_MAX_HEAD_DIM);
    s->form = (int)c->value[P_FORM];
    c->granule = 1;
    c->space_dim = d;
    if (s->form == FORM_RESIDUAL) init_residual(c, s);
    else FORWARD_IF_ERROR(init_subspace(c, s));
    const double after = 2.0 * c->page_tokens;                /* bytes that follow what unpack reads last */
    c->page.padding = after < POLAR_OVERREAD ? POLAR_OVERREAD - after : 0;
    c->query_bytes = kv_round_up(4 * (size_t)c->space_dim, 64);
    FORWARD_IF_ERROR(polar_circle(s->angle.base, &s->circle));
    s->base.table[0] = s->circle;
    s->first = kv_alloc_array((size_t)d, sizeof *s->first, false);
    s->second = kv_alloc_array((size_t)d, sizeof *s->second, false);
    if (!s->first || !s->second) return KV_E_NOMEM;
    kv_signs(c->value[P_SEED], STREAM_FIRST + c->side, d, s->first);
    kv_signs(c->value[P_SEED], STREAM_SECOND + c->side, d, s->second);
    return KV_OK;
}

static void fused_fini(kv_codec *c)
{
    fused_state *s = c->state;
    kv_free(s->circle);
    kv_free(s->first);
    kv_free(s->second);
}

/* ---- rows in the codec's space -------------------------------------------------------------------------------------------- */

static void subspace_row(const fused_state *s, const uint8_t *page, int t, float *out)
{
    int32_t map[POLAR_ROW], angle[POLAR_ROW], radius[POLAR_ROW], code[POLAR_ROW];
    float r[POLAR_ROW], part[2][POLAR_ROW + 2];               /* scalars, pairs */
    const polar_level *l = polar_at_level();
    const uint8_t *row = page + (size_t)t * (size_t)s->row_bytes;
    const float scale = kv_f16_to_f32(kv_load_u16(page + s->scale_at + 2 * (size_t)t));
    l->unpack(&s->map, row, map);
    l->unpack(&s->angle, row + s->angle_at, angle);
    l->unpack(&s->radius, row + s->radius_at, radius);
    l->unpack(&s->code, row + s->code_at, code);
    l->levels(s->tail, radius, s->pairs, scale, r);
    l->levels(s->disk, code, s->code.count, scale, part[0]);
    l->expand(r, angle, s->circle, s->angle.base, s->pairs, part[1]);
    const float *scalar = part[0], *const scalars = scalar + s->code.count - 1, *pair = part[1], *const pairs = pair + 2 * s->pairs;
    for (int i = 0; i < s->map.count; i++) {                  /* a map from elsewhere may have any number of ones; no branch: it is a coin toss */
        const int polar = (pair < pairs) & ((map[i] != 0) | (scalar >= scalars));
        memcpy(out + 2 * i, polar ? pair : scalar, 2 * sizeof *out);
        pair += 2 * polar;
        scalar += 2 * !polar;
    }
}

static void fused_rows(const kv_codec *c, const uint8_t *page, int tok0, int n, float *out, int ld)
{
    const fused_state *s = c->state;
    if (s->form == FORM_RESIDUAL) polar_at_level()->rows(&s->base, page, tok0, n, out, ld);
    for (int t = tok0; t < tok0 + n; t++, out += ld) {
        if (s->form == FORM_SUBSPACE) subspace_row(s, page, t, out);
        else polar_at_level()->signs(page + s->sign_at + (size_t)t * (size_t)s->sign.bytes, c->head_dim, kv_f16_to_f32(kv_load_u16(page + s->scale_at + 2 * (size_t)t)), out + c->head_dim);
    }
}

/* x of a row in the codec's space, which is overwritten. */
static void leave_space(const kv_codec *c, float *row, float *x)
{
    const fused_state *s = c->state;
    const int d = c->head_dim;
    if (s->form == FORM_RESIDUAL) {
        float w[KV_MAX_HEAD_DIM];
        polar_rotate_back(s->second, c->head_dim, row + d, w);
        for (int i = 0; i < d; i++) row[i] += w[i];
    }
    polar_rotate_back(s->first, c->head_dim, row, x);
}

/* ---- encode and decode ------------------------------------------------------------------------------------------------------ */

static void encode_residual(const kv_codec *c, uint8_t *page, int t, float *y, int e)
{
    const fused_state *s = c->state;
    const int d = c->head_dim;
    float r[POLAR_ROW], base[POLAR_ROW], w[POLAR_ROW];
    int32_t index[POLAR_ROW];
    polar_at_level()->split(y, d / 2, s->angle.base, r, index);
    polar_pack(&s->angle, index, page + (size_t)t * (size_t)s->angle.bytes);
    polar_norms_put(&s->base.norms, r, e, page + s->base.norm_at + (size_t)t * (size_t)s->base.norms.bytes, page + s->base.side_at + (size_t)t * (size_t)s->base.norms.side_bytes);
    polar_at_level()->rows(&s->base, page, t, 1, base, 0);
    for (int i = 0; i < d; i++) y[i] = (e ? ldexpf(y[i], e) : y[i]) - base[i];
    polar_rotate(s->second, c->head_dim, y, 1, w);
    for (int i = 0; i < d; i++) {
        index[i] = w[i] >= 0;
        base[i] = w[i] >= 0 ? 1.0f : -1.0f;
    }
    polar_pack(&s->sign, index, page + s->sign_at + (size_t)t * (size_t)s->sign.bytes);
    float alpha = c->value[P_SCALE] == SCALE_MSE ? kv_dot16(w, base, d) / (float)d : (float)sqrt(M_PI_2) * sqrtf(kv_sumsq(w, d) / (float)d);
    if (!(alpha < 65504)) alpha = 65504;
    kv_store_u16(page + s->scale_at + 2 * (size_t)t, polar_f16(alpha));
}

static void encode_subspace(const kv_codec *c, uint8_t *page, int t, float *y, int e)
{
    const fused_state *s = c->state;
    const int d = c->head_dim, n = d / 2;
    float r[POLAR_ROW], z[POLAR_ROW];
    int32_t index[POLAR_ROW], map[POLAR_ROW], angle[POLAR_ROW], radius[POLAR_ROW], code[POLAR_ROW];
    uint8_t *row = page + (size_t)t * (size_t)s->row_bytes;
    const float rms = sqrtf(kv_sumsq(y, d) / (float)d), per = rms > 0 ? 1 / rms : 0;
    polar_at_level()->split(y, n, s->angle.base, r, index);
    for (int i = 0, a = 0, b = 0; i < n; i++) {
        int stronger = 0;                                     /* of equals the earlier is the stronger */
        for (int j = 0; j < n; j++) stronger += r[j] > r[i] || (r[j] == r[i] && j < i);
        map[i] = stronger < s->pairs;
        if (map[i]) {
            angle[a] = index[i];
            radius[a] = cell(s->tail_bound, s->radius.base, r[i] * per);
            z[2 * i] = s->tail[radius[a]] * s->circle[2 * index[i]];
            z[2 * i + 1] = s->tail[radius[a++]] * s->circle[2 * index[i] + 1];
        } else for (int k = 2 * i; k < 2 * i + 2; k++) {
            code[b] = cell(s->disk_bound, s->code.base, y[k] * per);
            z[k] = s->disk[code[b++]];
        }
    }
    polar_pack(&s->map, map, row);
    polar_pack(&s->angle, angle, row + s->angle_at);
    polar_pack(&s->radius, radius, row + s->radius_at);
    polar_pack(&s->code, code, row + s->code_at);
    kv_store_u16(page + s->scale_at + 2 * (size_t)t, polar_f16(ldexpf(kv_dot16(y, z, d) / kv_sumsq(z, d), e)));
}

static void fused_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const fused_state *s = c->state;
    const int d = c->head_dim;
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float y[POLAR_ROW];
        const int e = polar_exponent(x, d);
        for (int i = 0; i < d; i++) y[i] = e ? ldexpf(x[i], -e) : x[i];
        polar_rotate(s->first, c->head_dim, y, 1, y);
        (s->form == FORM_RESIDUAL ? encode_residual : encode_subspace)(c, page, t, y, e);
    }
}

static void fused_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float row[2 * KV_MAX_HEAD_DIM + POLAR_PAD];
        fused_rows(c, page, t, 1, row, 0);
        leave_space(c, row, x);
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------------------------- */

static void fused_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const fused_state *s = c->state;
    for (int i = 0; i < n_q; i++) {
        float *row = (float *)((uint8_t *)prepared + (size_t)i * c->query_bytes);
        polar_rotate(s->first, c->head_dim, q + i * ld, 1, row);
        if (s->form == FORM_RESIDUAL) polar_rotate(s->second, c->head_dim, row, 1, row + c->head_dim);
    }
}

static void fused_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    polar_dot_rows(c, fused_rows, c->space_dim, page, n_tokens, prepared, n_q, scores, ld);
}

static void fused_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    polar_accumulate_rows(c, fused_rows, c->space_dim, page, n_tokens, p, ld, n_q, acc);
}

static void fused_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int i = 0; i < n_q; i++) {
        float row[2 * KV_MAX_HEAD_DIM];
        memcpy(row, acc + (size_t)i * (size_t)c->space_dim, sizeof *row * (size_t)c->space_dim);
        leave_space(c, row, out + i * ld);
    }
}

static int fill_device(const kv_codec *c, kv_pod *pod)
{
    const fused_state *s = c->state;
    const size_t signs = sizeof(float) * (size_t)c->head_dim;
    struct fused_device d = { .angle = polar_field_device(&s->angle), .sign = polar_field_device(&s->sign), .map = polar_field_device(&s->map),
        .radius = polar_field_device(&s->radius), .code = polar_field_device(&s->code), .subspace = s->form == FORM_SUBSPACE, .pairs = s->pairs,
        .unbiased = c->value[P_SCALE] == SCALE_UNBIASED, .row_bytes = (uint32_t)s->row_bytes, .angle_at = (uint32_t)s->angle_at,
        .radius_at = (uint32_t)s->radius_at, .code_at = (uint32_t)s->code_at, .sign_at = (uint32_t)s->sign_at, .scale_at = (uint32_t)s->scale_at };
    uint32_t start;
    if (!d.subspace) polar_form_device(&s->base, &d.base);
    memcpy(d.tail, s->tail, sizeof d.tail);
    memcpy(d.tail_bound, s->tail_bound, sizeof d.tail_bound);
    memcpy(d.disk, s->disk, sizeof d.disk);
    memcpy(d.disk_bound, s->disk_bound, sizeof d.disk_bound);
    FORWARD_IF_ERROR(kv_pod_add(pod, &d, sizeof d, &start));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->circle, 2 * sizeof(float) * (s->angle.digits == 1 ? (size_t)1 << s->angle.width : (size_t)s->angle.base), &d.at_circle));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->first, signs, &d.at_first));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->second, signs, &d.at_second));
    memcpy(pod->data, &d, sizeof d);
    return KV_OK;
}

static int fused_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    kv_pod pod = { 0 };
    const int status = fill_device(c, &pod);
    return kv_pod_done(&pod, status, out, bytes);
}

const kv_codec_ops kv_codec_fused_hybrid = {
    .name = "fused", .about = "TurboAngle and TurboQuant in one row: signs of the residual, or the strongest pairs as angles",
    .source = "ablation: two readings of a fused TurboAngle and TurboQuant hybrid",
    .params = params, .n_params = sizeof params / sizeof *params, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES,
    .state_size = sizeof(fused_state),
    .init = fused_init, .fini = fused_fini, .encode = fused_encode, .decode = fused_decode,
    .query = fused_query, .dot = fused_dot, .accumulate = fused_accumulate, .output = fused_output, .device = fused_on_device,
};
