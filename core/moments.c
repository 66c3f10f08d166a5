/* moments.c -- the statistics of one slot in the frame its codec sees, and codecs made from them.
 *
 * Before RoPE a key has mean m and second moment S; at position p they are R_p m and R_p S R_p^T, so page-relative keys have
 * the average of these over the offsets p = 0 .. W-1 (BEYOND 4.6).  With z_i = x_i + j x_{i+half} a rotated pair as a complex
 * number, E z_i conj(z_k) takes the factor avg e^{jp(f_i - f_k)}, E z_i z_k takes avg e^{jp(f_i + f_k)}, both in closed form. */
#include <complex.h>
#include <math.h>
#include <stdlib.h>
#include "calib.h"

typedef double complex cplx;

static cplx make_cplx(double re, double im) { return re + im * I; }

/* avg of e^{j p f} over p = 0 .. n-1. */
static cplx average_turn(double f, int n)
{
    const double s = sin(f / 2);
    if (fabs(s) < 1e-9) return 1;
    return cexp(I * (f * (n - 1) / 2)) * (sin(f * n / 2) / (s * n));
}

static void spread_mean(const kv_rope *r, int w, double *m)
{
    const int half = r->n_rot / 2;
    for (int i = 0; i < half; i++) {
        const cplx z = make_cplx(m[i], m[i + half]) * average_turn(r->freq[i], w);
        m[i] = creal(z);
        m[i + half] = cimag(z);
    }
}

/* Channel d as part of a complex channel: its frequency, and its partner (-1: not rotated, imaginary part 0). */
static void spread_second(const kv_rope *r, int w, int dim, double *s)
{
    const int half = r->n_rot / 2, n = dim - half;                     /* complex channels: half pairs, then what is not rotated */
    for (int i = 0; i < n; i++) {
        const int xi = i < half ? i : i + half, yi = i < half ? i + half : -1;
        for (int k = 0; k <= i; k++) {
            const int xk = k < half ? k : k + half, yk = k < half ? k + half : -1;
            const double xx = s[xi * dim + xk], yx = yi < 0 ? 0 : s[yi * dim + xk], xy = yk < 0 ? 0 : s[xi * dim + yk], yy = yi < 0 || yk < 0 ? 0 : s[yi * dim + yk];
            const double fi = yi < 0 ? 0 : r->freq[i], fk = yk < 0 ? 0 : r->freq[k];
            const cplx a = make_cplx(xx + yy, yx - xy) * average_turn(fi - fk, w), b = make_cplx(xx - yy, yx + xy) * average_turn(fi + fk, w);
            const double out[4] = { creal(a + b) / 2, cimag(a + b) / 2, cimag(b - a) / 2, creal(a - b) / 2 };
            s[xi * dim + xk] = s[xk * dim + xi] = out[0];
            if (yi >= 0) s[yi * dim + xk] = s[xk * dim + yi] = out[1];
            if (yk >= 0) s[xi * dim + yk] = s[yk * dim + xi] = out[2];
            if (yi >= 0 && yk >= 0) s[yi * dim + yk] = s[yk * dim + yi] = out[3];
        }
    }
}

/* A moments object with its arrays behind it, in one allocation. */
static kv_moments *alloc_moments(int dim, int n_sample, bool query)
{
    const size_t d = (size_t)dim, square = d * d, rows = (size_t)n_sample * d;
    kv_moments *m = kv_zalloc(sizeof *m + (2 * d + 4 * square) * sizeof(double) + 2 * rows * sizeof(float) + (size_t)n_sample * sizeof(int32_t));
    if (!m) return NULL;
    double *at = (double *)(m + 1);
    m->head_dim = dim;
    m->n_sample = n_sample;
    m->mean = at;
    m->mean_pre = at + d;
    m->second = at + 2 * d;
    m->second_pre = m->second + square;
    if (query) {
        m->query = m->second_pre + square;
        m->query_pre = m->query + square;
    }
    m->sample = (float *)(m->second_pre + 3 * square);
    m->sample_pre = m->sample + rows;
    m->position = (int32_t *)(m->sample_pre + rows);
    return m;
}

void kv_moments_free(kv_moments *m) { kv_free(m); }

int kv_moments_need_rows(const kv_moments *m, const char *family)
{
    RETURN_ERROR_IF(m->n_sample < 1, KV_E_UNCALIBRATED, "codec '%s' is made from rows, which this calibration left out (what = moments,rows,queries keeps them)", family);
    return KV_OK;
}

static double *rw(const double *p) { return (double *)p; }       /* the arrays are ours to fill until the object is handed out */

/* Rows x - r: E x loses r, E x x^T becomes E x x^T - m r^T - r m^T + r r^T. */
static void remove_mean(kv_moments *m, const float *r)
{
    const int d = m->head_dim;
    double *mean = rw(m->mean), *second = rw(m->second);
    float *sample = (float *)m->sample;
    for (int i = 0; i < d; i++)
        for (int k = 0; k < d; k++) second[i * d + k] += (double)r[i] * r[k] - (mean[i] * r[k] + r[i] * mean[k]);
    for (int i = 0; i < d; i++) mean[i] -= r[i];
    for (int t = 0; t < m->n_sample; t++)
        for (int i = 0; i < d; i++) sample[(size_t)t * d + i] -= r[i];
}

int kv_moments_new(kv_moments **out, const kv_calib *c, int layer, int head, int side, int page_tokens, const float *removed)
{
    int status;
    kv_moments *m = NULL;
    RETURN_ERROR_IF(!out || !c, KV_E_ARG, "moments: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "moments: side=%d is neither K (0) nor V (1)", side);
    RETURN_ERROR_IF(page_tokens < 0 || page_tokens > KV_MAX_PAGE, KV_E_ARG, "moments: page_tokens=%d is outside 0..%d", page_tokens, KV_MAX_PAGE);
    const int d = c->m->info.head_dim, keys = side == KV_SIDE_K, n_sample = c->n_sample;
    if (!(m = alloc_moments(d, n_sample, keys))) return KV_E_NOMEM;
    m->of = c;
    m->layer = layer;
    m->head = head;
    m->side = side;
    m->page_tokens = keys ? page_tokens : 0;
    const size_t square = (size_t)d * (size_t)d * sizeof(double), rows = (size_t)n_sample * (size_t)d * sizeof(float);
    FAIL_IF_ERROR(kv_calib_raw(c, keys ? KV_CALIB_K_PRE : KV_CALIB_V, layer, head, &m->n, rw(m->mean_pre), rw(m->second_pre)));
    const bool queries = keys && !(c->without & KV_CALIB_NO_QUERIES);
    for (int i = 0; keys && !queries && i < d; i++) rw(m->query)[(size_t)i * (size_t)d + (size_t)i] = rw(m->query_pre)[(size_t)i * (size_t)d + (size_t)i] = 1;
    if (n_sample) FAIL_IF_ERROR(kv_calib_rows(c, keys ? KV_CALIB_K_PRE : KV_CALIB_V, layer, head, (float *)m->sample_pre));
    memcpy((int32_t *)m->position, c->position, (size_t)n_sample * sizeof(int32_t));
    memcpy((float *)m->sample, m->sample_pre, rows);
    if (keys) m->rope = &c->m->geo.rope[layer];
    if (keys && !page_tokens) {
        if (queries) FAIL_IF_ERROR(kv_calib_raw(c, KV_CALIB_Q, layer, head, &m->n_query, rw(m->mean), rw(m->query)));
        FAIL_IF_ERROR(kv_calib_raw(c, KV_CALIB_K, layer, head, &m->n, rw(m->mean), rw(m->second)));
        for (int t = 0; t < n_sample; t++) kv_rope_rows(m->rope, (float *)m->sample + (size_t)t * d, d, 1, m->position[t], 0);
    } else {
        memcpy(rw(m->mean), m->mean_pre, (size_t)d * sizeof(double));
        memcpy(rw(m->second), m->second_pre, square);
    }
    if (queries) {
        double *mean_q = kv_alloc_array((size_t)d, sizeof(double), false);
        if (!mean_q) { status = KV_E_NOMEM; goto fail; }
        status = kv_calib_raw(c, KV_CALIB_Q_PRE, layer, head, &m->n_query, mean_q, rw(m->query_pre));
        kv_free(mean_q);
        if (status < 0) goto fail;
    }
    if (keys && page_tokens) {
        if (queries) {
            memcpy(rw(m->query), m->query_pre, square);
            spread_second(m->rope, page_tokens, d, rw(m->query));
        }
        spread_mean(m->rope, page_tokens, rw(m->mean));
        spread_second(m->rope, page_tokens, d, rw(m->second));
        for (int t = 0; t < n_sample; t++) kv_rope_rows(m->rope, (float *)m->sample + (size_t)t * d, d, 1, m->position[t] % page_tokens, 0);
    }
    if (removed) remove_mean(m, removed);
    *out = m;
    return KV_OK;
fail:
    kv_moments_free(m);
    return status;
}

/* second := E x x^T of rows, and mean unless NULL.  In double, one pass over the rows. */
static void moments_of(const float *x, int64_t n, int d, double *mean, double *second)
{
    for (int64_t t = 0; t < n; t++)
        for (int i = 0; i < d; i++) {
            const double v = x[t * d + i];
            if (mean) mean[i] += v / (double)n;
            for (int k = 0; k <= i; k++) second[i * d + k] += v * x[t * d + k];
        }
    for (int i = 0; i < d; i++)
        for (int k = 0; k <= i; k++) second[i * d + k] = second[k * d + i] = second[i * d + k] / (double)n;
}

static int check_finite(const char *what, const float *x, int64_t n, int d)
{
    for (int64_t i = 0; i < n * d; i++)
        RETURN_ERROR_IF(!isfinite(x[i]), KV_E_ARG, "moments: %s[%lld][%lld] = %g is not finite", what, (long long)(i / d), (long long)(i % d), (double)x[i]);
    return KV_OK;
}

int kv_moments_of_rows(kv_moments **out, int head_dim, int side, const float *x, int64_t n, const float *q, int64_t n_q)
{
    RETURN_ERROR_IF(!out || !x || (n_q && !q), KV_E_ARG, "moments: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(head_dim < 1 || head_dim > KV_MAX_HEAD_DIM, KV_E_ARG, "moments: head_dim=%d is outside 1..%d", head_dim, KV_MAX_HEAD_DIM);
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "moments: side=%d is neither K (0) nor V (1)", side);
    RETURN_ERROR_IF(n < 1 || n > 1 << 24 || n_q < 0 || n_q > 1 << 24, KV_E_ARG, "moments: %lld rows and %lld queries are outside 1..%d and 0..%d", (long long)n, (long long)n_q, 1 << 24, 1 << 24);
    const int d = head_dim, n_sample = (int)kv_min64(n, KV_CALIB_SAMPLE);
    FORWARD_IF_ERROR(check_finite("x", x, n, d));
    FORWARD_IF_ERROR(check_finite("q", q, n_q, d));
    kv_moments *m = alloc_moments(d, n_sample, side == KV_SIDE_K);
    if (!m) return KV_E_NOMEM;
    m->side = side;
    m->n = (double)n;
    moments_of(x, n, d, rw(m->mean), rw(m->second));
    if (m->query && n_q) {
        m->n_query = (double)n_q;
        moments_of(q, n_q, d, NULL, rw(m->query));
    } else if (m->query) {
        for (int i = 0; i < d; i++) rw(m->query)[(size_t)i * d + i] = 1;
    }
    for (int t = 0; t < n_sample; t++) {
        const int64_t row = t * n / n_sample;
        memcpy((float *)m->sample + (size_t)t * d, x + row * d, (size_t)d * sizeof(float));
        ((int32_t *)m->position)[t] = (int32_t)row;
    }
    m->mean_pre = m->mean;
    m->second_pre = m->second;
    m->query_pre = m->query;
    m->sample_pre = m->sample;
    *out = m;
    return KV_OK;
}

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

void kv_moments_sorted(const kv_moments *m, int d, float *out)
{
    for (int t = 0; t < m->n_sample; t++) out[t] = m->sample[(size_t)t * m->head_dim + d];
    qsort(out, (size_t)m->n_sample, sizeof *out, ascending);
}
