/* scalar_calib.c -- calibrated tables of the `scalar` codec, one set for a layer, head and side:
 *
 *   | codebook f32 [2^bits] (codebook=calibrated) | factors f32 [head_dim] | inverses f32 [head_dim] (scale=calibrated) |
 *   | channels u16 [head_dim], outliers first (pick=calibrated) |
 *
 * codebook: Lloyd's iteration on the coordinates of rotated, normalized rows of the calibration text, signs dropped, from the
 * Gaussian's codebook on; ascending, symmetric, in units of 1/sqrt(head_dim).
 *
 * factors: the rotation makes the error white, so a channel times s_i gets an error of the whole row's size over s_i.  With k_i and
 * q_i the root mean squares of keys and queries, sum k_i^2 s_i^2 * sum q_i^2 / s_i^2 is least at s_i^2 = q_i / k_i; values weigh alike
 * (q_i = 1).  The largest factor is 1, so that nothing overflows. */
#include <math.h>
#include "../calib.h"
#include "scalar.h"

static bool wants(const kv_codec *c, int what)
{
    return what == P_CODEBOOK ? c->value[P_CODEBOOK] == SCALAR_CALIBRATED : what == P_SCALE ? c->value[P_SCALE] == 1 : c->value[P_OUTLIERS] > 0 && c->value[P_PICK] == 1;
}

/* Combinations that have no tables. */
static int check(const kv_codec *c)
{
    RETURN_ERROR_IF(wants(c, P_CODEBOOK) && (c->value[P_OUTLIERS] > 0 || c->value[P_BITS] == 0), KV_E_PARAM,
                    "codec 'scalar': codebook=calibrated with %s is not made (gauss, beta, uniform)", c->value[P_BITS] == 0 ? "bits=0" : "outliers");
    RETURN_ERROR_IF(wants(c, P_SCALE) && c->value[P_OUTLIERS] > 0, KV_E_PARAM, "codec 'scalar': scale=calibrated with outliers is not made (none)");
    return KV_OK;
}

/* Where each table is from `base` on, and how many bytes they take. */
static scalar_tables lay_out(const kv_codec *c, const void *base)
{
    const size_t d = (size_t)c->head_dim;
    const uint8_t *blob = base;
    scalar_tables t = { 0 };
    if (wants(c, P_CODEBOOK)) {
        t.codebook = (const float *)(blob + t.bytes);
        t.bytes += sizeof(float) << (int)c->value[P_BITS];
    }
    if (wants(c, P_SCALE)) {
        t.scale = (const float *)(blob + t.bytes);
        t.unscale = t.scale + d;
        t.bytes += 2 * d * sizeof(float);
    }
    if (wants(c, P_PICK)) {
        t.order = (const uint16_t *)(blob + t.bytes);
        t.bytes += d * sizeof(uint16_t);
    }
    return t;
}

int scalar_read_tables(const kv_codec *c, scalar_tables *t)
{
    FORWARD_IF_ERROR(check(c));
    *t = (scalar_tables){ 0 };
    if (!wants(c, P_CODEBOOK) && !wants(c, P_SCALE) && !wants(c, P_PICK)) {
        RETURN_ERROR_IF(c->blob_bytes, KV_E_CORRUPT, "codec 'scalar': %zu bytes of tables, these parameters have none", c->blob_bytes);
        return KV_OK;
    }
    if (!c->blob) return kv_codec_needs_blob(c);
    *t = lay_out(c, c->blob);
    RETURN_ERROR_IF(c->blob_bytes != t->bytes, KV_E_CORRUPT, "codec 'scalar': %zu bytes of tables, %zu are needed", c->blob_bytes, t->bytes);
    const int levels = 1 << (int)c->value[P_BITS];
    for (int i = 0; i < levels && t->codebook; i++)
        RETURN_ERROR_IF(!(fabsf(t->codebook[i]) <= 1e3f) || t->codebook[i] != -t->codebook[levels - 1 - i] || (i ? t->codebook[i] <= t->codebook[i - 1] : t->codebook[i] > -1e-3f),
                        KV_E_CORRUPT, "codec 'scalar': level %d of the tables' codebook is %g: out of order, or no mirror image", i, (double)t->codebook[i]);
    for (int i = 0; i < c->head_dim && t->scale; i++)
        RETURN_ERROR_IF(!(t->scale[i] >= 0x1p-20f && t->scale[i] <= 1) || fabsf(t->scale[i] * t->unscale[i] - 1) > 1e-5f, KV_E_CORRUPT,
                        "codec 'scalar': factor %d of the tables is %g with inverse %g", i, (double)t->scale[i], (double)t->unscale[i]);
    uint8_t seen[KV_MAX_HEAD_DIM] = { 0 };
    for (int i = 0; i < c->head_dim && t->order; i++) {
        RETURN_ERROR_IF(t->order[i] >= c->head_dim || seen[t->order[i]], KV_E_CORRUPT, "codec 'scalar': channel %d of the tables' order is out of range or there twice", t->order[i]);
        seen[t->order[i]] = 1;
    }
    return KV_OK;
}

/* ---- making them */

static void make_scale(const kv_codec *c, const kv_moments *m, float *scale)
{
    const int d = c->head_dim;
    double s[KV_MAX_HEAD_DIM], most = 0;
    for (int i = 0; i < d; i++) {
        const size_t at = (size_t)i * (size_t)d + (size_t)i;
        const double weight = m->query ? m->query[at] : 1;
        s[i] = sqrt(sqrt(fmax(weight, 1e-30) / fmax(m->second[at], 1e-30)));
        most = fmax(most, s[i]);
    }
    for (int i = 0; i < d; i++) {
        scale[i] = (float)fmax(s[i] / most, 0x1p-10);
        scale[d + i] = 1 / scale[i];
    }
}

static void make_order(const kv_codec *c, const kv_moments *m, uint16_t *order)
{
    const int d = c->head_dim, n = kv_min((int)c->value[P_OUTLIERS], d);
    int high = 0, low = n;
    for (int i = 0; i < d; i++) {
        const double own = m->second[(size_t)i * (size_t)d + (size_t)i];
        int before = 0;
        for (int j = 0; j < d; j++) {
            const double other = m->second[(size_t)j * (size_t)d + (size_t)j];
            before += other > own || (other == own && j < i);
        }
        order[before < n ? high++ : low++] = (uint16_t)i;
    }
}

/* The coordinates that the encoder will see, times sqrt(head_dim). */
static int make_codebook(const kv_codec *c, const kv_moments *m, const float *scale, float *levels)
{
    const int d = c->head_dim, bits = (int)c->value[P_BITS];
    const scalar_level *l = scalar_level_now();
    const float root = sqrtf((float)d);
    scalar_state turn = { 0 };
    double g[256];
    size_t n = 0;
    int status;
    float *x = kv_alloc_array((size_t)m->n_sample * (size_t)d, sizeof *x, false);
    FAIL_IF(!x, KV_E_NOMEM, "codec 'scalar': no memory for %d rows", m->n_sample);
    FAIL_IF_ERROR(scalar_draw(&turn, (int)c->value[P_ROTATION], d, c->value[P_SEED], c->side));
    for (int t = 0; t < m->n_sample; t++) {
        float row[KV_MAX_HEAD_DIM], copy[KV_MAX_HEAD_DIM], by;
        const float *from = row;
        for (int i = 0; i < d; i++) row[i] = m->sample[(size_t)t * (size_t)d + (size_t)i] * (scale ? scale[i] : 1);
        scalar_row_norm(&from, d, copy, &by);
        if (!(by > 0)) continue;
        scalar_rotate(&turn, l, d, from, by * root, x + n);
        n += (size_t)d;
    }
    FAIL_IF_ERROR(kv_lloyd_sample(bits, x, n, g));
    for (int i = 0; i < 1 << bits; i++) levels[i] = (float)g[i];
fail:
    scalar_drop(&turn);
    kv_free(x);
    return status;
}

int scalar_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes)
{
    int status = KV_OK;
    *blob = NULL;
    *blob_bytes = 0;
    FORWARD_IF_ERROR(check(c));
    const size_t bytes = lay_out(c, c->text).bytes;    /* any address: none is read */
    if (!bytes) return KV_OK;
    uint8_t *to = kv_zalloc(bytes);
    if (!to) return KV_E_NOMEM;
    const scalar_tables t = lay_out(c, to);
    if (t.scale) make_scale(c, m, (float *)t.scale);
    if (t.order) make_order(c, m, (uint16_t *)t.order);
    if (t.codebook) FAIL_IF_ERROR(make_codebook(c, m, t.scale, (float *)t.codebook));
    *blob = to;
    *blob_bytes = bytes;
    return KV_OK;
fail:
    kv_free(to);
    return status;
}
