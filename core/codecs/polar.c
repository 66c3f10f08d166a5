/* polar.c -- random signs, Walsh-Hadamard, and the pairs of what comes out as angle and radius: TurboAngle (arXiv
 * 2603.27467); with levels > 1 the radii are paired again, recursively: PolarQuant (arXiv 2502.02617).
 *
 * After the rotation a pair's angle is nearly uniform, so equal bins need no calibration.  Bins are centred on multiples of
 * 2 pi / angles; the relative squared error they leave is 2 (1 - sin(pi/n) / (pi/n)), some (pi/n)^2 / 3.  Level l >= 2 is the
 * angle in (0, pi/2) between two radii of level l - 1, with density ~ sin(2 psi)^(2^(l-1) - 1): `upper` Lloyd-Max levels.  The
 * head_dim / 2^levels radii of the last level are the row's norms.  A head_dim that is no power of two is rotated in blocks.
 *
 * Page, little-endian, P = page_tokens:
 *
 *   | angles of token 0, 1, ... P-1 | norms of token 0, 1, ... P-1 | side data of token 0, 1, ... P-1 |
 *   angles:  level 1 | level 2 | ...      each packed as polar.h says, in whole bytes; angles need be no power of two
 *   norms:   f32 | f16 | norm_bits each, packed alike
 *   side:    lin, log: lo f16, step f16   lloyd: scale f16   f32, f16: nothing
 *
 *   norm    radius                      what it costs, head_dim d, levels 1
 *   f32     as it is                    16 bits per element
 *   f16     as it is                    8
 *   lin     lo + code step              norm_bits / 2 + 32 / d      lo, step from the row's least and largest radius
 *   log     2^(lo + code step)          the same
 *   lloyd   scale * level[code]         norm_bits / 2 + 16 / d      levels of the norm of 2^levels Gaussians; scale: least squares,
 *                                                                   less what the bins of the angles lose on average
 *
 * norm=lloyd, norm_bits=0 gives all pairs of a row one radius: what the angles alone carry.
 *
 * Rows whose largest |x| leaves 2^-40..2^40 are coded times a power of two; f16 side data ends at 65504, so lin and f16
 * saturate there and log does not.
 *
 * Attention runs in rotated space: a tile of rows is expanded (a table of directions, one multiplication an element), the
 * query is rotated once, the output is rotated back once.  What is saved over decoding is the transform of every row. */
#include <math.h>
#include "polar.h"

enum { P_ANGLES, P_NORM, P_NORM_BITS, P_LEVELS, P_UPPER, P_ROTATION, P_SEED };
enum { UPPER_MAX = 64 };
enum { STREAM_SIGN = 0x504F0000 };            /* plus the side: keys and values draw apart */

static const kv_param params[] = {
    { "angles",    "directions of a pair", KV_PARAM_INT, 128, 2, POLAR_BASE_MAX, NULL },
    { "norm",      "how radii are stored: floats, linear or logarithmic between the row's extremes, or Lloyd-Max times a scale", KV_PARAM_CHOICE, POLAR_LIN, 0, 4, "f32|f16|lin|log|lloyd" },
    { "norm_bits", "bits of a radius for lin, log (1 to 8) and lloyd (0 to 8: 0 is one radius for all)", KV_PARAM_INT, 8, 0, 8, NULL },
    { "levels",    "1: pairs; more: radii are paired again (PolarQuant has 4)", KV_PARAM_INT, 1, 1, POLAR_LEVELS, NULL },
    { "upper",     "angles of a pair of radii, from level 2 on", KV_PARAM_INT, 4, 2, UPPER_MAX, NULL },
    { "rotation",  "random signs and Walsh-Hadamard, or none", KV_PARAM_CHOICE, 0, 0, 1, "hadamard|none" },
    { "seed",      "of the signs; keys and values draw from different streams of it", KV_PARAM_INT, 0, 0, 4294967295.0, NULL },
};

typedef struct polar_state {
    polar_form form;
    int        upper;
    float     *circle, *sign;                                 /* sign: NULL without rotation */
    _Alignas(64) float direction[POLAR_LEVELS][2 * UPPER_MAX], bound[POLAR_LEVELS][2 * UPPER_MAX];   /* (cos, sin) of levels and of the boundaries between them */
} polar_state;

static int polar_init(kv_codec *c)
{
    polar_state *s = c->state;
    polar_form *f = &s->form;
    const int d = c->head_dim, angles = (int)c->value[P_ANGLES], norm = (int)c->value[P_NORM], norm_bits = (int)c->value[P_NORM_BITS];
    f->levels = (int)c->value[P_LEVELS];
    s->upper = (int)c->value[P_UPPER];
    RETURN_ERROR_IF(d % (1 << f->levels), KV_E_PARAM, "codec 'polar': levels=%d needs a head_dim that is a multiple of %d, head_dim=%d is not", f->levels, 1 << f->levels, d);
    RETURN_ERROR_IF(norm_bits == 0 && norm != POLAR_LLOYD, KV_E_PARAM, "codec 'polar': norm_bits=0 is for norm=lloyd alone, others take 1..8");
    double index_bits = 0;
    for (int l = 0; l < f->levels; l++) {
        const int count = d >> (l + 1), base = l ? s->upper : angles;
        polar_field_init(&f->field[l], base, count);
        f->at[l] = f->angle_bytes;
        f->angle_bytes += f->field[l].bytes;
        index_bits += count * log2(base);
        f->table[l] = s->direction[l];
        if (l == 0) continue;
        double psi[UPPER_MAX];
        polar_lloyd(POLAR_ANGLE, 1 << l, 0, base, psi);
        for (int i = 0; i < base; i++) {
            const double edge = i + 1 < base ? 0.5 * (psi[i] + psi[i + 1]) : M_PI_2;
            s->direction[l][2 * i] = (float)cos(psi[i]);
            s->direction[l][2 * i + 1] = (float)sin(psi[i]);
            s->bound[l][2 * i] = (float)cos(edge);
            s->bound[l][2 * i + 1] = (float)sin(edge);
        }
    }
    polar_norms_init(&f->norms, norm, norm_bits, d >> f->levels, 1 << f->levels, angles);
    const size_t tokens = (size_t)c->page_tokens;
    f->norm_at = tokens * (size_t)f->angle_bytes;
    f->side_at = f->norm_at + tokens * (size_t)f->norms.bytes;
    const size_t tail = tokens * (size_t)(f->norms.side_bytes + (norm == POLAR_F32 || norm == POLAR_F16 ? f->norms.bytes : 0));
    c->page.codes = (double)f->norm_at;
    c->page.scales = (double)(f->side_at - f->norm_at + tokens * (size_t)f->norms.side_bytes);
    c->page.padding = tail < POLAR_OVERREAD ? (double)(POLAR_OVERREAD - tail) : 0;
    c->bits_nominal = index_bits / d;
    c->granule = 1;
    c->space_dim = d;
    c->query_bytes = kv_round_up(4 * (size_t)d, 64);
    FORWARD_IF_ERROR(polar_circle(angles, &s->circle));
    f->table[0] = s->circle;
    if (c->value[P_ROTATION] != 0) return KV_OK;
    s->sign = kv_alloc_array((size_t)d, sizeof *s->sign, false);
    if (!s->sign) return KV_E_NOMEM;
    kv_signs(c->value[P_SEED], STREAM_SIGN + c->side, d, s->sign);
    return KV_OK;
}

static void polar_fini(kv_codec *c)
{
    polar_state *s = c->state;
    kv_free(s->circle);
    kv_free(s->sign);
}

static const float *sign_of(const kv_codec *c) { return ((const polar_state *)c->state)->sign; }

/* Pairs of radii: the angle's cell by bisection, psi > edge being b cos(edge) > a sin(edge); then the pair's norm. */
static void join(const float *bound, int upper, float *r, int n, int32_t *index)
{
    for (int i = 0; i < n; i++) {
        const float a = r[2 * i], b = r[2 * i + 1];
        int lo = 0, hi = upper - 1;
        while (lo < hi) {
            const int mid = (lo + hi) / 2;
            if (b * bound[2 * mid] > a * bound[2 * mid + 1]) lo = mid + 1;
            else hi = mid;
        }
        index[i] = lo;
        r[i] = sqrtf(a * a + b * b);
    }
}

static void polar_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const polar_state *s = c->state;
    const polar_form *f = &s->form;
    const int d = c->head_dim;
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float y[POLAR_ROW], r[POLAR_ROW];
        int32_t index[POLAR_ROW];
        uint8_t *row = page + (size_t)t * (size_t)f->angle_bytes;
        const int e = polar_exponent(x, d);
        if (e < -60) for (int i = 0; i < d; i++) y[i] = ldexpf(x[i], -e);   /* 2^-e may be no float */
        polar_rotate(sign_of(c), c->head_dim, e < -60 ? y : x, e < -60 ? 1 : ldexpf(1, -e), y);
        polar_at_level()->split(y, d / 2, f->field[0].base, r, index);
        polar_pack(&f->field[0], index, row);
        for (int l = 1; l < f->levels; l++) {
            join(s->bound[l], s->upper, r, f->field[l].count, index);
            polar_pack(&f->field[l], index, row + f->at[l]);
        }
        polar_norms_put(&f->norms, r, e, page + f->norm_at + (size_t)t * (size_t)f->norms.bytes, page + f->side_at + (size_t)t * (size_t)f->norms.side_bytes);
    }
}

/* Rows in rotated space. */
static void polar_rows(const kv_codec *c, const uint8_t *page, int tok0, int n, float *out, int ld)
{
    const polar_state *s = c->state;
    polar_at_level()->rows(&s->form, page, tok0, n, out, ld);
}

static void polar_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float z[POLAR_ROW];
        polar_rows(c, page, t, 1, z, 0);
        polar_rotate_back(sign_of(c), c->head_dim, z, x);
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------------- */

static void polar_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    for (int i = 0; i < n_q; i++) polar_rotate(sign_of(c), c->head_dim, q + i * ld, 1, (float *)((uint8_t *)prepared + (size_t)i * c->query_bytes));
}

static void polar_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    polar_dot_rows(c, polar_rows, c->head_dim, page, n_tokens, prepared, n_q, scores, ld);
}

static void polar_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    polar_accumulate_rows(c, polar_rows, c->head_dim, page, n_tokens, p, ld, n_q, acc);
}

static void polar_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int i = 0; i < n_q; i++) {
        float z[KV_MAX_HEAD_DIM];
        memcpy(z, acc + (size_t)i * (size_t)c->space_dim, sizeof *z * (size_t)c->head_dim);
        polar_rotate_back(sign_of(c), c->head_dim, z, out + i * ld);
    }
}

/* ---- the setting for a number of bits ------------------------------------------------------------------------------------ */

/* Predicted relative squared error: bins of angles, and radii whose extremes grow with their number as those of Rayleigh
 * variables do.  Good to a third or so: it only has to rank settings that cost the same. */
static double predicted(int angles, int norm, int bits, int levels, int upper, int count)
{
    const double steps = (1 << bits) - 0.9, m = kv_max(count, 2), span = norm == POLAR_LOG ? 1.1 * log(sqrt(m * log(m + 1))) : sqrt(log(m + 1)), cell = M_PI / angles;
    double err = cell * cell / 3;
    for (int l = 1; l < levels; l++) err += 1 / (3.0 * upper * upper * (1 << l));
    if (norm == POLAR_LIN || norm == POLAR_LOG) err += span * span / (12 * steps * steps) / (1 << (levels - 1));
    else if (norm == POLAR_LLOYD) err += 0.4654 / (1 << 2 * bits) / (1 << (levels - 1));
    return err;
}

/* Among settings within 0.02 bits of the nearest, or up to 0.15 cheaper, the one with the least predicted error. */
static int polar_fit(kv_codec *c, double target)
{
    const int d = c->head_dim, norm = (int)c->value[P_NORM], levels = (int)c->value[P_LEVELS], count = d >> levels;
    RETURN_ERROR_IF(count == 0 || d % (1 << levels), KV_E_PARAM, "codec 'polar': levels=%d needs a head_dim that is a multiple of %d, head_dim=%d is not", levels, 1 << levels, d);
    const int floats = norm == POLAR_F32 || norm == POLAR_F16;
    double best = INFINITY, angle_bits[POLAR_BASE_MAX + 1];
    for (int n = 2; n <= POLAR_BASE_MAX; n++) angle_bits[n] = 0.5 * polar_field_bits(n, d / 2);
    for (int pass = 0; pass < 2; pass++) {
        double least = INFINITY;
        for (int upper = levels > 1 ? 2 : (int)c->value[P_UPPER]; upper <= (levels > 1 ? UPPER_MAX : (int)c->value[P_UPPER]); upper *= 2)
            for (int bits = floats ? (int)c->value[P_NORM_BITS] : 1; bits <= (floats ? (int)c->value[P_NORM_BITS] : 8); bits++) {
                double rest = floats ? (norm == POLAR_F32 ? 32.0 : 16.0) * count / d : polar_field_bits(1 << bits, count) * count / d + (norm == POLAR_LLOYD ? 16.0 : 32.0) / d;
                for (int l = 1; l < levels; l++) rest += polar_field_bits(upper, d >> (l + 1)) / (1 << (l + 1));
                for (int n = 2; n <= POLAR_BASE_MAX; n++) {
                    const double over = angle_bits[n] + rest - target, off = fabs(over), err = predicted(n, norm, bits, levels, upper, count);
                    if (pass == 0) best = fmin(best, off);
                    else if (off <= best + (over < 0 ? 0.15 : 0.02) && err < least) {
                        least = err;
                        c->value[P_ANGLES] = n;
                        c->value[P_NORM_BITS] = bits;
                        c->value[P_UPPER] = upper;
                    }
                }
            }
    }
    return KV_OK;
}

static int fill_device(const kv_codec *c, kv_pod *pod)
{
    const polar_state *s = c->state;
    const polar_form *f = &s->form;
    struct polar_device d;
    polar_form_device(f, &d);
    d.upper = s->upper;
    uint32_t start;
    FORWARD_IF_ERROR(kv_pod_add(pod, &d, sizeof d, &start));
    if (s->sign) FORWARD_IF_ERROR(kv_pod_add(pod, s->sign, sizeof(float) * (size_t)c->head_dim, &d.at_sign));
    for (int l = 0; l < f->levels; l++) {
        struct polar_device_level *to = &d.level[l];
        /* As many directions as the bits of an index, or of one digit, can name. */
        const size_t n = l ? UPPER_MAX : f->field[0].digits == 1 ? (size_t)1 << f->field[0].width : (size_t)f->field[0].base;
        FORWARD_IF_ERROR(kv_pod_add(pod, f->table[l], 2 * sizeof(float) * n, &to->at_table));
        if (l) FORWARD_IF_ERROR(kv_pod_add(pod, s->bound[l], sizeof s->bound[l], &to->at_bound));
    }
    memcpy(pod->data, &d, sizeof d);
    return KV_OK;
}

static int polar_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    kv_pod pod = { 0 };
    const int status = fill_device(c, &pod);
    return kv_pod_done(&pod, status, out, bytes);
}

const kv_codec_ops kv_codec_polar = {
    .name = "polar", .about = "random rotation, pairs as angle and radius (TurboAngle); radii paired again and again (PolarQuant)",
    .source = "TurboAngle, arXiv 2603.27467; PolarQuant, arXiv 2502.02617",
    .params = params, .n_params = sizeof params / sizeof *params, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES,
    .state_size = sizeof(polar_state),
    .init = polar_init, .fini = polar_fini, .encode = polar_encode, .decode = polar_decode,
    .query = polar_query, .dot = polar_dot, .accumulate = polar_accumulate, .output = polar_output, .device = polar_on_device, .fit_bits = polar_fit,
};
