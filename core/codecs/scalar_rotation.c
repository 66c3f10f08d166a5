/* scalar_rotation.c -- the rotations of the `scalar` codec: random signs and Walsh-Hadamard, or a dense random matrix. */
#include <math.h>
#include "scalar.h"

/* Both hold `n` rows of `n`: out = x matrix, x = out inverse. */
static int new_matrix(scalar_state *s, int n)
{
    s->matrix = kv_alloc_array((size_t)n * (size_t)n, sizeof *s->matrix, false);
    s->inverse = kv_alloc_array((size_t)n * (size_t)n, sizeof *s->inverse, false);
    return s->matrix && s->inverse ? KV_OK : KV_E_NOMEM;
}

static void set_row(scalar_state *s, int n, int r, const double *row)
{
    for (int i = 0; i < n; i++) s->inverse[(size_t)r * (size_t)n + (size_t)i] = s->matrix[(size_t)i * (size_t)n + (size_t)r] = (float)row[i];
}

/* Random orthogonal rows: Gaussian ones, orthonormalized in order, which is a QR with a positive diagonal, so the matrix is
 * Haar-distributed.  Each row is cleared of the earlier ones twice: once leaves 1e-13 times the condition number.
 * Not orthonormalized, they are the QJL's sketch. */
static int draw_matrix(scalar_state *s, int d, double seed, int stream, bool orthonormal)
{
    int status = KV_OK;
    float *gauss = kv_alloc_array((size_t)d, sizeof *gauss, false);
    double *q = kv_alloc_array((size_t)d * (size_t)d, sizeof *q, false);
    FAIL_IF_ERROR(new_matrix(s, d));
    if (!gauss || !q) { status = KV_E_NOMEM; goto fail; }
    for (int r = 0; r < d; r++) {
        double *row = q + (size_t)r * (size_t)d, sum = 0;
        FAIL_IF_ERROR(kv_rng_normal(seed, stream, (double)r * d, d, gauss));
        for (int i = 0; i < d; i++) row[i] = gauss[i];
        for (int pass = 0; pass < (orthonormal ? 2 : 0); pass++)
            for (int k = 0; k < r; k++) {
                const double *other = q + (size_t)k * (size_t)d;
                double along = 0;
                for (int i = 0; i < d; i++) along += row[i] * other[i];
                for (int i = 0; i < d; i++) row[i] -= along * other[i];
            }
        for (int i = 0; i < d && orthonormal; i++) sum += row[i] * row[i];
        for (int i = 0; i < d && orthonormal; i++) row[i] /= sqrt(sum);
        set_row(s, d, r, row);
    }
fail:
    kv_free(gauss);
    kv_free(q);
    return status;
}

static int draw_signs(scalar_state *s, int d, double seed, int stream)
{
    s->sign = kv_alloc_array((size_t)d, sizeof *s->sign, false);
    if (!s->sign) return KV_E_NOMEM;
    kv_signs(seed, stream, d, s->sign);
    return KV_OK;
}

int scalar_draw(scalar_state *s, int rotation, int d, double seed, int stream)
{
    switch (rotation) {
    case SCALAR_HADAMARD:   return draw_signs(s, d, seed, SCALAR_STREAM_SIGN + stream);
    case SCALAR_ORTHOGONAL: return draw_matrix(s, d, seed, SCALAR_STREAM_MATRIX + stream, true);
    case SCALAR_GAUSS:      return draw_matrix(s, d, seed, SCALAR_STREAM_MATRIX + stream, false);
    default:                return KV_OK;
    }
}

void scalar_drop(scalar_state *s)
{
    kv_free(s->sign);
    kv_free(s->matrix);
    kv_free(s->inverse);
}

void scalar_rotate(const scalar_state *s, const scalar_level *l, int d, const float *x, float by, float *out)
{
    float scaled[KV_MAX_HEAD_DIM];
    l->scale_row(x, s->sign, by, s->matrix ? scaled : out, d);
    if (s->matrix) l->dense(s->matrix, scaled, out, d);
    else if (s->sign) kv_fwht_blocks(out, d);
}

void scalar_rotate_back(const scalar_state *s, const scalar_level *l, int d, float *z, float by, float *out)
{
    float turned[KV_MAX_HEAD_DIM];
    if (s->matrix) l->dense(s->inverse, z, turned, d);
    else if (s->sign) kv_fwht_blocks(z, d);
    l->scale_row(s->matrix ? turned : z, s->sign, by, out, d);
}
