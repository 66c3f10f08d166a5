/* wf_basis.c -- the tables of the `wf` codec from moments: basis, widths, deviations.
 *
 * Rows x have second moment S; an error e of a key costs (q . e)^2, on average e^T Q e, with Q the queries' second moment.  Let
 * M = Q / (mean eigenvalue) + ridge I and W = M^(1/2).  The eigenvectors U of W S W make components y = U^T W x uncorrelated, and
 * |error of y|^2 is the cost: all components are equally dear, so bits follow their variances alone (reverse water-filling) and
 * components may be rotated among each other.  x = W^-1 U y.
 *
 * Q is known from few tokens and queries come from elsewhere too: without a ridge its small eigenvalues would be trusted.
 *
 * All arithmetic is in double. */
#include <math.h>
#include "wf.h"
#include "../calib.h"
#include "../eigen.h"

enum { STREAM_MIX = 0x57460000 };          /* of random numbers; plus the width */
static const double FLOOR = 1e-12;         /* variances below this share of the largest are taken as it: deviations differ by 2^20 at most */
static const double WEIGHT_FLOOR = 1e-6;   /* the same of the weight, which only a ridge of 0 can need: W and W^-1 stay good in f32 */

typedef struct work {
    int     d, n;                          /* n: coded components */
    double *analysis, *synthesis;          /* [component][d]: rows u_i^T W and (W^-1 u_i)^T */
    double *variance, *tmp, *other;        /* [d]; [d][d] each */
    double *m, *root, *inverse;            /* [d][d] */
} work;

static void free_work(work *w)
{
    double *all[] = { w->analysis, w->synthesis, w->variance, w->tmp, w->other, w->m, w->root, w->inverse };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kv_free(all[i]);
}

static int alloc_work(work *w, int d)
{
    const size_t square = (size_t)d * (size_t)d;
    *w = (work){ .d = d };
    double **all[] = { &w->analysis, &w->synthesis, &w->tmp, &w->other, &w->m, &w->root, &w->inverse, &w->variance };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!(*all[i] = kv_alloc_array(i < 7 ? square : (size_t)d, sizeof(double), true))) return KV_E_NOMEM;
    return KV_OK;
}

/* out [n][d] = a [n][k] b [k][d] */
static void multiply(const double *a, const double *b, double *out, int n, int k, int d)
{
    for (int i = 0; i < n; i++) {
        double *to = out + (size_t)i * (size_t)d;
        for (int c = 0; c < d; c++) to[c] = 0;
        for (int j = 0; j < k; j++) {
            const double x = a[(size_t)i * (size_t)k + (size_t)j];
            for (int c = 0; c < d; c++) to[c] += x * b[(size_t)j * (size_t)d + (size_t)c];
        }
    }
}

static double trace(const double *a, int d)
{
    double t = 0;
    for (int i = 0; i < d; i++) t += a[(size_t)i * (size_t)d + (size_t)i];
    return t;
}

/* root = M^(1/2), inverse = M^(-1/2) for M = query / (mean eigenvalue) + ridge I; the identity where there is no query. */
static int weigh(work *w, const double *query, double ridge)
{
    const int d = w->d;
    const double mean = query ? trace(query, d) / d : 0;
    double value[KV_MAX_HEAD_DIM];
    for (int i = 0; i < d; i++)
        for (int k = 0; k < d; k++) w->m[(size_t)i * (size_t)d + (size_t)k] = mean > 0 ? query[(size_t)i * (size_t)d + (size_t)k] / mean + (i == k ? ridge : 0) : i == k;
    FORWARD_IF_ERROR(kv_eigen_symmetric(w->m, d, value));
    for (int which = 0; which < 2; which++) {
        for (int i = 0; i < d; i++) {
            const double root = sqrt(fmax(value[i], WEIGHT_FLOOR * value[0])), by = which ? 1 / root : root;
            for (int k = 0; k < d; k++) w->tmp[(size_t)k * (size_t)d + (size_t)i] = by * w->m[(size_t)i * (size_t)d + (size_t)k];
        }
        multiply(w->tmp, w->m, which ? w->inverse : w->root, d, d, d);
    }
    return KV_OK;
}

/* Channels in order of variance under the weight's diagonal: what allocation alone gives. */
static void take_channels(work *w, const double *second, const double *query)
{
    const int d = w->d;
    int order[KV_MAX_HEAD_DIM];
    double cost[KV_MAX_HEAD_DIM];
    const double mean = query ? trace(query, d) / d : 0;
    for (int i = 0; i < d; i++) {
        const size_t ii = (size_t)i * (size_t)d + (size_t)i;
        cost[i] = fmax(mean > 0 ? query[ii] / mean : 1, WEIGHT_FLOOR);
        int at = i;
        for (; at > 0 && cost[order[at - 1]] * second[(size_t)order[at - 1] * (size_t)(d + 1)] < cost[i] * second[ii]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    for (int i = 0; i < d; i++) {
        const size_t at = (size_t)i * (size_t)d + (size_t)order[i];
        w->analysis[at] = sqrt(cost[order[i]]);
        w->synthesis[at] = 1 / w->analysis[at];
        w->variance[i] = cost[order[i]] * second[(size_t)order[i] * (size_t)(d + 1)];
    }
}

static int take_principal(work *w, const double *second, const double *query, double ridge)
{
    const int d = w->d;
    FORWARD_IF_ERROR(weigh(w, query, ridge));
    multiply(w->root, second, w->tmp, d, d, d);
    multiply(w->tmp, w->root, w->other, d, d, d);
    FORWARD_IF_ERROR(kv_eigen_symmetric(w->other, d, w->variance));
    multiply(w->other, w->root, w->analysis, d, d, d);
    multiply(w->other, w->inverse, w->synthesis, d, d, d);
    return KV_OK;
}

/* Each bit goes where it takes away most: optimal, since every bit of a unit takes away less than the one before. */
void wf_fill(const double *v, int n_units, int budget, const wf_tables *t, uint8_t *width)
{
    memset(width, 0, (size_t)n_units);
    for (int k = 0; k < budget; k++) {
        int best = -1;
        double gain = -1;
        for (int i = 0; i < n_units; i++) {
            const double g = width[i] < WF_MAX_BITS ? v[i] * (t->book[width[i]].distortion - t->book[width[i] + 1].distortion) : -1;
            if (g > gain) { gain = g; best = i; }
        }
        if (best < 0) return;
        width[best]++;
    }
}

/* An order of the units' widths (which descend) in which few codes cross the end of a byte: the widest that still fits, else
 * the widest left.  order[i]: the unit that comes i-th. */
static void order_units(const uint8_t *width, int n, int *order)
{
    bool used[WF_MAX_UNITS] = { false };
    for (int i = 0, bit = 0; i < n; i++) {
        int pick = -1;
        for (int k = 0; k < n && pick < 0; k++)
            if (!used[k] && width[k] <= 8 - bit) pick = k;
        for (int k = 0; k < n && pick < 0; k++)
            if (!used[k]) pick = k;
        used[pick] = true;
        order[i] = pick;
        bit = (bit + width[pick]) % 8;
    }
}

/* A random rotation of n rows of a [n][d] and b: of Gaussian rows, made orthonormal in order (Haar).  Each is cleared of the
 * earlier ones twice: once leaves 1e-13 times the condition number. */
static int rotate(work *w, int first, int n, int width)
{
    const int d = w->d;
    float *gauss = kv_alloc_array((size_t)n, sizeof *gauss, false);
    double *r = w->m;                      /* [n][n] */
    if (!gauss) return KV_E_NOMEM;
    for (int i = 0; i < n; i++) {
        double *row = r + (size_t)i * (size_t)n, norm = 0;
        const int status = kv_rng_normal(0, STREAM_MIX + width, (double)i * n, n, gauss);
        if (status < 0) {
            kv_free(gauss);
            return status;
        }
        for (int k = 0; k < n; k++) row[k] = (double)gauss[k];
        for (int times = 0; times < 2; times++)
            for (int p = 0; p < i; p++) {
                const double *with = r + (size_t)p * (size_t)n;
                double dot = 0;
                for (int k = 0; k < n; k++) dot += row[k] * with[k];
                for (int k = 0; k < n; k++) row[k] -= dot * with[k];
            }
        for (int k = 0; k < n; k++) norm += row[k] * row[k];
        for (int k = 0; k < n; k++) row[k] /= sqrt(norm);
    }
    kv_free(gauss);
    double *sides[] = { w->analysis, w->synthesis };
    for (int side = 0; side < 2; side++) {
        double *at = sides[side] + (size_t)first * (size_t)d;
        multiply(r, at, w->tmp, n, n, d);
        memcpy(at, w->tmp, sizeof *at * (size_t)n * (size_t)d);
    }
    for (int i = 0; i < n; i++) {
        w->tmp[i] = 0;
        for (int k = 0; k < n; k++) w->tmp[i] += r[(size_t)i * (size_t)n + (size_t)k] * r[(size_t)i * (size_t)n + (size_t)k] * w->variance[first + k];
    }
    memcpy(w->variance + first, w->tmp, sizeof *w->tmp * (size_t)n);
    return KV_OK;
}

static int write_blob(const kv_codec *c, const work *w, const uint8_t *width, int n_units, void **out, size_t *bytes)
{
    const int unit = wf_unit(c->side), n = n_units * unit;
    const size_t padded = wf_padded(n);
    int order[WF_MAX_UNITS];
    order_units(width, n_units, order);
    *bytes = wf_blob_bytes(c->head_dim, n);
    wf_blob *b = kv_zalloc(*bytes);
    if (!b) return KV_E_NOMEM;
    *b = (wf_blob){ .magic = WF_MAGIC, .head_dim = (uint32_t)c->head_dim, .side = (uint32_t)c->side, .n_units = (uint32_t)n_units };
    float *sigma = (float *)(b + 1), *analysis = sigma + padded, *synthesis = analysis + padded * (size_t)c->head_dim;
    double top = 0;
    for (int i = 0; i < n; i++) top = fmax(top, w->variance[i]);
    for (int i = 0; i < n; i++) {
        const int from = order[i / unit] * unit + i % unit;
        const double deviation = sqrt(w->variance[from]);
        b->width[i / unit] = width[order[i / unit]];
        sigma[i] = (float)(deviation / sqrt(top));
        for (int j = 0; j < c->head_dim; j++) {
            analysis[(size_t)j * padded + (size_t)i] = (float)(w->analysis[(size_t)from * (size_t)c->head_dim + (size_t)j] / deviation);
            synthesis[(size_t)j * padded + (size_t)i] = (float)(w->synthesis[(size_t)from * (size_t)c->head_dim + (size_t)j] * deviation);
        }
    }
    *out = b;
    return KV_OK;
}

int wf_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes)
{
    const int d = c->head_dim, unit = wf_unit(c->side), basis = (int)c->value[WF_P_BASIS];
    const double *query = basis == WF_BASIS_ROWS ? NULL : m->query;
    double sums[WF_MAX_UNITS] = { 0 };
    uint8_t width[WF_MAX_UNITS];
    int status, n_units = 0;
    work w = { 0 };
    RETURN_ERROR_IF(d % unit, KV_E_PARAM, "codec 'wf': head_dim=%d is not a multiple of %d, which %s need", d, unit, c->side == KV_SIDE_K ? "keys" : "values");
    const double rms = sqrt(trace(m->second, d) / d);
    RETURN_ERROR_IF(!(rms < 0x1p28), KV_E_ARG, "codec 'wf': rows of root mean square %g are beyond 2^28", rms);
    FAIL_IF_ERROR(alloc_work(&w, d));
    if (basis == WF_BASIS_CHANNELS) take_channels(&w, m->second, query);
    else FAIL_IF_ERROR(take_principal(&w, m->second, query, c->value[WF_P_RIDGE]));
    const double least = w.variance[0] > 0x1p-40 ? FLOOR * w.variance[0] : 1;
    for (int i = 0; i < d; i++) w.variance[i] = fmax(w.variance[i], least);
    for (int i = 0; i < d; i++) sums[i / unit] += w.variance[i];
    wf_fill(sums, d / unit, wf_budget(c), wf_tables_get(), width);
    while (n_units < d / unit && width[n_units]) n_units++;
    for (int first = 0, last; first < n_units && c->value[WF_P_MIX] == WF_MIX_ROTATION; first = last) {
        for (last = first + 1; last < n_units && width[last] == width[first];) last++;
        FAIL_IF_ERROR(rotate(&w, first * unit, (last - first) * unit, width[first]));
    }
    status = write_blob(c, &w, width, n_units, blob, blob_bytes);
fail:
    free_work(&w);
    return status;
}
