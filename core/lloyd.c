/* lloyd.c -- Lloyd-Max codebooks: the scalar quantizers of least squared error for a known density.
 *
 * Two densities: N(0,1), and that of one coordinate of a uniform point on the unit sphere of R^d, times sqrt(d)
 * (TurboQuant, arXiv 2504.19874, Lemma 1).  Both are even, so only the positive half is solved: centroids
 * c_1 < ... < c_M, cells between b_0 = 0, b_i = (c_i + c_{i+1})/2 and the end of the support.
 *
 * A codebook is stationary when every centroid is its cell's mean.  Lloyd's iteration gets there linearly, and needs
 * thousands of steps from 5 bits on.  The derivative of c_i mass_i - moment_i is tridiagonal, so a Newton step costs one
 * sweep; a handful of steps from the Panter-Dite start reach rounding (8 bits: under 5 ms). */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include "codec.h"

enum { MAX_HALF = 128, GRID = 4096, MAX_STEPS = 200, MAX_DIM = 65536 };

typedef struct density { int dim; double norm, root, end; } density;   /* norm: of cos^(dim-2); root: sqrt(dim) */
typedef struct cell { double mass, moment; } cell;

/* 14: past it a Gaussian holds 1e-44, far under the rounding of any cell. */
static density density_new(int dim)
{
    if (dim == 0) return (density){ .end = 14 };
    int sign;
    const double norm = exp(lgamma_r(0.5 * dim, &sign) - lgamma_r(0.5 * (dim - 1), &sign)) / sqrt(M_PI), root = sqrt((double)dim);
    return (density){ .dim = dim, .norm = norm, .root = root, .end = fmin(root, 14) };
}

static double pdf(const density *f, double x)
{
    if (f->dim == 0) return exp(-0.5 * x * x) / sqrt(2 * M_PI);
    const double u = fmax(0, 1 - x * x / f->dim);
    return f->norm / f->root * pow(u, 0.5 * (f->dim - 3));
}

/* The sphere's cell with x = sqrt(d) sin(a): the integrand cos^(d-2) is smooth up to the end for every d >= 2.  8-point
 * Gauss-Legendre on pieces of at most a quarter of the deviation: exact to rounding, and no sum cancels. */
static cell sphere_cell(const density *f, double lo, double hi)
{
    static const double node[4] = { 0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363 };
    static const double weight[4] = { 0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763 };
    const double a = asin(lo / f->root), b = asin(fmin(1, hi / f->root));
    const int pieces = 1 + (int)(4 * (b - a) * f->root);
    const double half = 0.5 * (b - a) / pieces;
    cell r = { 0, 0 };
    for (int p = 0; p < pieces; p++)
        for (int i = 0; i < 8; i++) {
            const double t = a + half * (2 * p + 1 + (i & 1 ? node[i / 2] : -node[i / 2]));
            const double w = half * weight[i / 2] * f->norm * pow(cos(t), f->dim - 2);
            r.mass += w;
            r.moment += w * f->root * sin(t);
        }
    return r;
}

static cell cell_of(const density *f, double lo, double hi, bool last)
{
    if (f->dim) return sphere_cell(f, lo, hi);
    return (cell){ 0.5 * (erfc(lo * M_SQRT1_2) - (last ? 0 : erfc(hi * M_SQRT1_2))), pdf(f, lo) - (last ? 0 : pdf(f, hi)) };
}

/* Panter-Dite: centroids at the quantiles of pdf^(1/3). */
static void start(const density *f, int m, double *c)
{
    double total = 0, sum = 0;
    const double step = f->end / GRID;
    for (int i = 0; i < GRID; i++) total += cbrt(pdf(f, (i + 0.5) * step));
    int k = 0;
    for (int i = 0; i < GRID && k < m; i++) {
        const double g = cbrt(pdf(f, (i + 0.5) * step));
        for (double want; k < m && (want = (k + 0.5) / m * total) <= sum + g; k++) c[k] = (i + (want - sum) / g) * step;
        sum += g;
    }
    for (; k < m; k++) c[k] = f->end * (1 - 1e-3 * (m - k) / m);
}

/* One Newton step if it keeps the order, else one Lloyd step.  Returns the largest move. */
static double step(const density *f, int m, double *c, bool newton)
{
    double b[MAX_HALF + 1], lloyd[MAX_HALF], diag[MAX_HALF], off[MAX_HALF], rhs[MAX_HALF], x[MAX_HALF];
    b[0] = 0;
    b[m] = f->end;
    for (int i = 1; i < m; i++) b[i] = 0.5 * (c[i - 1] + c[i]);
    for (int i = 0; i < m; i++) {
        const cell a = cell_of(f, b[i], b[i + 1], i == m - 1);
        const double left = i ? 0.5 * pdf(f, b[i]) * (c[i] - b[i]) : 0, right = i < m - 1 ? 0.5 * pdf(f, b[i + 1]) * (b[i + 1] - c[i]) : 0;
        lloyd[i] = a.moment / a.mass;
        diag[i] = a.mass - left - right;
        off[i] = -right;                      /* to the right; the next row's left entry is the same number */
        rhs[i] = a.moment - c[i] * a.mass;
    }
    for (int i = 1; i < m; i++) {
        const double w = off[i - 1] / diag[i - 1];
        diag[i] -= w * off[i - 1];
        rhs[i] -= w * rhs[i - 1];
    }
    bool good = newton;
    for (int i = m - 1; i >= 0; i--) {
        x[i] = (rhs[i] - (i < m - 1 ? off[i] * x[i + 1] : 0)) / diag[i];
        good = good && diag[i] > 0 && c[i] + x[i] > 0 && c[i] + x[i] < f->end && (i == m - 1 || c[i] + x[i] < c[i + 1] + x[i + 1]);
    }
    double move = 0;
    for (int i = 0; i < m; i++) {
        const double next = good ? c[i] + x[i] : lloyd[i];
        move = fmax(move, fabs(next - c[i]));
        c[i] = next;
    }
    return move;
}

static double solve(int bits, int dim, double *centroids)
{
    const density f = density_new(dim);
    const int m = 1 << (bits - 1);
    double c[MAX_HALF], kept = 0;
    start(&f, m, c);
    for (int i = 0; i < 8; i++) step(&f, m, c, false);
    for (int i = 0; i < MAX_STEPS && step(&f, m, c, true) > 1e-13 * f.end; i++) { }
    for (int i = 0; i < m; i++) {             /* E x^2 = 1, and a stationary codebook keeps sum mass c^2 of it */
        const double lo = i ? 0.5 * (c[i - 1] + c[i]) : 0, hi = i < m - 1 ? 0.5 * (c[i] + c[i + 1]) : f.end;
        kept += 2 * c[i] * cell_of(&f, lo, hi, i == m - 1).moment;
        centroids[m + i] = c[i];
        centroids[m - 1 - i] = -c[i];
    }
    return 1 - kept;
}

/* A codebook is asked for once per codec instance: layers times heads times sides of the same few. */
static struct codebook {
    struct codebook *next;
    int              bits, dim;
    double           distortion, centroid[2 * MAX_HALF];
} *known;
static pthread_mutex_t known_lock = PTHREAD_MUTEX_INITIALIZER;

int kv_lloyd_max(int bits, int dim, double *centroids, double *distortion)
{
    RETURN_ERROR_IF(bits < 1 || bits > 8, KV_E_ARG, "kv_lloyd_max: bits=%d is outside 1..8", bits);
    RETURN_ERROR_IF(dim != 0 && (dim < 2 || dim > MAX_DIM), KV_E_ARG, "kv_lloyd_max: dim=%d is neither 0 (Gaussian) nor in 2..%d", dim, MAX_DIM);
    int status = KV_OK;
    pthread_mutex_lock(&known_lock);
    struct codebook *k = known;
    while (k && (k->bits != bits || k->dim != dim)) k = k->next;
    if (!k && (k = kv_zalloc(sizeof *k)) != NULL) {
        k->bits = bits;
        k->dim = dim;
        k->distortion = solve(bits, dim, k->centroid);
        k->next = known;
        known = k;
    }
    if (!k) status = KV_E_NOMEM;
    else {
        if (centroids) memcpy(centroids, k->centroid, sizeof(double) << bits);
        if (distortion) *distortion = k->distortion;
    }
    pthread_mutex_unlock(&known_lock);
    return status;
}

/* Distortion of 2^bits equal steps on N(0,1), codes in the middle: 1 - 2 sum c moment + sum c^2 mass. */
static double uniform_distortion(int half, double step)
{
    const density f = density_new(0);
    double sum = 0.5;
    for (int i = 0; i < half; i++) {
        const double c = (i + 0.5) * step;
        const cell a = cell_of(&f, i * step, (i + 1) * step, i == half - 1);
        sum += c * (c * a.mass - 2 * a.moment);
    }
    return 2 * sum;
}

int kv_uniform_best(int bits, double *centroids, double *distortion)
{
    RETURN_ERROR_IF(bits < 1 || bits > 8, KV_E_ARG, "kv_uniform_best: bits=%d is outside 1..8", bits);
    const int half = 1 << (bits - 1);
    double lo = 1.0 / half, hi = 5.0 / half;      /* the best outer edge lies between 1.6 (1 bit) and 4 deviations (8 bits) */
    for (int i = 0; i < 80; i++) {
        const double third = (hi - lo) / 3;
        if (uniform_distortion(half, lo + third) < uniform_distortion(half, hi - third)) hi -= third;
        else lo += third;
    }
    for (int i = 0; i < half; i++) {
        centroids[half + i] = (i + 0.5) * 0.5 * (lo + hi);
        centroids[half - 1 - i] = -centroids[half + i];
    }
    if (distortion) *distortion = uniform_distortion(half, 0.5 * (lo + hi));
    return KV_OK;
}

static int by_size(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* The first of x[0..n) above b, by bisection. */
static size_t above(const float *x, size_t n, double b)
{
    size_t lo = 0;
    while (n) {
        const size_t half = n / 2;
        if (x[lo + half] > b) n = half;
        else lo += half + 1, n -= half + 1;
    }
    return lo;
}

/* Each step costs a bisection a level: the values are sorted and summed up once.  A cell without values keeps its centroid. */
int kv_lloyd_sample(int bits, float *x, size_t n, double *centroids)
{
    enum { STEPS = 300 };
    FORWARD_IF_ERROR(kv_lloyd_max(bits, 0, centroids, NULL));
    const int m = 1 << (bits - 1);
    double *sum = kv_alloc_array(n + 1, sizeof *sum, false), *c = centroids + m, move = 1;
    if (!sum) return KV_E_NOMEM;
    for (size_t i = 0; i < n; i++) x[i] = fabsf(x[i]);
    if (n) qsort(x, n, sizeof *x, by_size);
    sum[0] = 0;
    for (size_t i = 0; i < n; i++) sum[i + 1] = sum[i] + x[i];
    for (int k = 0; k < STEPS && move > 1e-7; k++) {
        move = 0;
        for (size_t i = 0, from = 0, to; i < (size_t)m; i++, from = to) {
            to = i + 1 < (size_t)m ? above(x, n, 0.5 * (c[i] + c[i + 1])) : n;
            if (to <= from) continue;
            const double mean = (sum[to] - sum[from]) / (double)(to - from);
            move = fmax(move, fabs(mean - c[i]));
            c[i] = mean;
        }
    }
    kv_free(sum);
    /* In float, as tables hold them, each a little above the one before: rows may be all of one value. */
    for (int i = 0; i < m; i++) {
        const double least = i ? c[i - 1] + 1e-4 : 2e-3;
        c[i] = (float)fmin(fmax(c[i], least), 900);
        centroids[m - 1 - i] = -c[i];
    }
    return KV_OK;
}
