/* test_wf.c -- the `wf` codec beyond what every codec promises: eigenvalues, allocation, basis, attention on mixed widths,
 * and tables from outside. */
#include <math.h>
#include "calib.h"
#include "check.h"
#include "codecs/wf.h"
#include "eigen.h"

enum { D = 64, P = 64, ROWS = 4096 };

/* Rows with deviations 2^(-i * decay) along a fixed random basis, n of them. */
static void correlated(double seed, double decay, float *x, int n, int d)
{
    double *basis = kv_alloc_array((size_t)d * (size_t)d, sizeof *basis, true), value[KV_MAX_HEAD_DIM];
    float *g = kv_alloc_array((size_t)d * (size_t)d, sizeof *g, false);
    kv_rng_normal(seed, 1, 0, d * d, g);
    for (int i = 0; i < d; i++)
        for (int k = 0; k < d; k++) basis[i * d + k] = (double)g[i * d + k] + (double)g[k * d + i];
    kv_eigen_symmetric(basis, d, value);
    kv_rng_normal(seed, 2, 0, n * d, x);
    for (int t = 0; t < n; t++) {
        double y[KV_MAX_HEAD_DIM] = { 0 };
        for (int i = 0; i < d; i++)
            for (int k = 0; k < d; k++) y[k] += (double)x[t * d + i] * exp2(-i * decay) * basis[i * d + k];
        for (int k = 0; k < d; k++) x[t * d + k] = (float)y[k];
    }
    kv_free(basis);
    kv_free(g);
}

static void test_eigen(void)
{
    for (int n = 1; n <= 129; n += 32) {
        double *a = kv_alloc_array((size_t)n * (size_t)n, sizeof *a, false), *v = kv_alloc_array((size_t)n * (size_t)n, sizeof *v, false), value[129], worst = 0;
        float *g = kv_alloc_array((size_t)n * (size_t)n, sizeof *g, false);
        kv_rng_normal(7, n, 0, n * n, g);
        for (int i = 0; i < n; i++)
            for (int k = 0; k < n; k++) a[i * n + k] = v[i * n + k] = (double)g[i * n + k] + (double)g[k * n + i];
        CHECK(kv_eigen_symmetric(v, n, value) == KV_OK, "%s", kv_last_error());
        for (int i = 0; i < n; i++) {
            if (i) CHECK(value[i] <= value[i - 1], "order %d: value %d is not below the one before", n, i);
            for (int k = 0; k < n; k++) {
                double sum = 0, dot = 0;
                for (int j = 0; j < n; j++) {
                    sum += value[j] * v[j * n + i] * v[j * n + k];
                    dot += v[i * n + j] * v[k * n + j];
                }
                worst = fmax(worst, fmax(fabs(sum - a[i * n + k]), fabs(dot - (i == k))));
            }
        }
        CHECK(worst < 1e-11, "order %d: off by %g", n, worst);
        kv_free(a); kv_free(v); kv_free(g);
    }
    double bad[4] = { 1, NAN, NAN, 1 }, value[2];
    CHECK(kv_eigen_symmetric(bad, 2, value) == KV_E_ARG, "NaN");
}

/* Every allocation of `budget` bits to n units, the best cost. */
static double cheapest(const double *v, int n, int budget, const wf_tables *t)
{
    if (n == 0) return budget == 0 ? 0 : INFINITY;
    double best = INFINITY;
    for (int w = 0; w <= kv_min(WF_MAX_BITS, budget); w++) best = fmin(best, v[0] * t->book[w].distortion + cheapest(v + 1, n - 1, budget - w, t));
    return best;
}

static void test_fill(void)
{
    const wf_tables *t = wf_tables_get();
    static const double known[] = { 1, 0.36338, 0.11748, 0.03455, 0.00950 };   /* BEYOND 2.1: Lloyd-Max of N(0,1) */
    for (int b = 0; b < 5; b++) CHECK(fabs(t->book[b].distortion - known[b]) < 2e-5, "distortion at %d bits is %.6g", b, t->book[b].distortion);
    float r[8];
    double v[64];
    uint8_t width[64];
    for (int trial = 0; trial < 60; trial++) {
        const int n = 1 + trial % 5, budget = trial % (WF_MAX_BITS * n + 1);
        kv_rng_normal(11, trial, 0, n, r);
        double cost = 0;
        int sum = 0;
        for (int i = 0; i < n; i++) v[i] = exp(3.0 * (double)r[i]);
        wf_fill(v, n, budget, t, width);
        for (int i = 0; i < n; i++) {
            cost += v[i] * t->book[width[i]].distortion;
            sum += width[i];
        }
        const double best = cheapest(v, n, budget, t);
        CHECK(sum == budget && cost <= best * (1 + 1e-12), "trial %d: %d of %d bits, cost %g, brute force %g", trial, sum, budget, cost, best);
    }
    /* Lagrange: one water level between what the last bits took away and what the next would. */
    for (int i = 0; i < 64; i++) v[i] = exp2(-0.25 * i);
    for (int budget = 0; budget <= 512; budget += 37) {
        double given = INFINITY, next = 0;
        int descending = 1;
        wf_fill(v, 64, budget, t, width);
        for (int i = 0; i < 64; i++) {
            if (width[i]) given = fmin(given, v[i] * (t->book[width[i] - 1].distortion - t->book[width[i]].distortion));
            if (width[i] < WF_MAX_BITS) next = fmax(next, v[i] * (t->book[width[i]].distortion - t->book[width[i] + 1].distortion));
            descending &= i == 0 || width[i] <= width[i - 1];
        }
        CHECK(given >= next && descending, "budget %d: the least given bit takes %g, the best next %g", budget, given, next);
    }
}

typedef struct made { kv_codec *c; kv_moments *m; } made;

static made make(const char *params, int d, int side, const float *x, int n, const float *q, int n_q)
{
    made r = { 0 };
    kv_tensor rows = { .data = (void *)x, .dtype = KV_F32, .ndim = 2, .shape = { n, d }, .stride = { d, 1 } };
    kv_tensor queries = { .data = (void *)q, .dtype = KV_F32, .ndim = 2, .shape = { n_q, d }, .stride = { d, 1 } };
    CHECK(kv_codec_fit(&r.c, "wf", params, d, P, side, &rows, q ? &queries : NULL) == KV_OK, "%s: %s", params, kv_last_error());
    CHECK(kv_moments_of_rows(&r.m, d, side, x, n, q, n_q) == KV_OK, "%s", kv_last_error());
    return r;
}

static void drop(made r)
{
    kv_codec_free(r.c);
    kv_moments_free(r.m);
}

/* Components are of deviation 1, without correlation unless rotated, undone by the synthesis, and equally dear under the weight. */
static void test_basis(void)
{
    static float x[ROWS * D], q[ROWS * D];
    correlated(3, 0.12, x, ROWS, D);
    correlated(4, 0.1, q, ROWS, D);
    static const char *const params[] = { "bits=8,mix=none", "bits=3,mix=none", "bits=2", "bits=3,basis=rows", "bits=3,basis=channels,mix=none", "bits=2.5,ridge=0" };
    for (int i = 0; i < 6; i++) {
        const made r = make(params[i], D, KV_SIDE_K, x, ROWS, q, ROWS);
        const wf_state *s = wf_state_of(r.c);
        const int weighted = !strstr(params[i], "rows"), channels = strstr(params[i], "channels") != NULL, mixed = !strstr(params[i], "none");
        const double ridge = strstr(params[i], "ridge=0") ? 0 : 2;
        double mean = 0, deviation = 0, correlation = 0, inverse = 0, dear = 0, top = 0, price[D];
        for (int k = 0; k < D; k++) mean += r.m->query[k * D + k] / D;
        for (int pass = 0; pass < 2; pass++)
            for (int a = 0; a < s->n; a++)
                for (int b = 0; b < s->n; b++) {
                    double xx = 0, one = 0, cost = 0;
                    for (int j = 0; j < D; j++)
                        for (int k = 0; k < D; k++) {
                            const double m = weighted ? r.m->query[j * D + k] / mean + (j == k ? ridge : 0) : j == k;
                            xx += (double)s->analysis[j * s->padded + a] * r.m->second[j * D + k] * (double)s->analysis[k * s->padded + b];
                            cost += (double)s->synthesis[j * s->padded + a] * m * (double)s->synthesis[k * s->padded + b];
                            if (j == k) one += (double)s->analysis[j * s->padded + a] * (double)s->synthesis[j * s->padded + b];
                        }
                    if (a == b && !pass) {
                        price[a] = cost;
                        top = fmax(top, cost);
                        deviation = fmax(deviation, fabs(xx - 1));
                    } else if (a != b && pass) {
                        if (!mixed) correlation = fmax(correlation, fabs(xx));
                        dear = fmax(dear, fabs(cost) / sqrt(price[a] * price[b]));
                    }
                    inverse = fmax(inverse, fabs(one - (a == b)));
                }
        for (int a = 0; a < s->n; a++) dear = fmax(dear, channels ? 0 : fabs(price[a] / top - (double)s->sigma[a] * (double)s->sigma[a]));
        CHECK(deviation < 1e-5 && inverse < 1e-4, "%s: deviation off by %g, inverse by %g", params[i], deviation, inverse);
        if (!channels) CHECK(correlation < 1e-4 && dear < 1e-4, "%s: correlation %g, price off by %g", params[i], correlation, dear);
        drop(r);
    }
}

/* Mean of (q . error)^2 over rows and queries of another seed, through the codec's page. */
static double score_noise(const made *r, const float *x, const float *q, int n)
{
    uint8_t *page = kv_zalloc(r->c->page_bytes);
    double sum = 0;
    float y[P * D];
    for (int t = 0; t < n; t += P) {
        r->c->ops->encode(r->c, page, 0, P, x + t * D, D);
        r->c->ops->decode(r->c, page, 0, P, y, D);
        for (int i = 0; i < P; i++)
            for (int g = 0; g < 16; g++) {
                double e = 0;
                for (int k = 0; k < D; k++) e += (double)q[((t + i) % 256 * 16 + g) % ROWS * D + k] * ((double)y[i * D + k] - (double)x[(t + i) * D + k]);
                sum += e * e / 16 / n;
            }
    }
    kv_free(page);
    return sum;
}

static void test_gain(void)
{
    static float x[ROWS * D], q[ROWS * D], h[ROWS * D];
    correlated(5, 0.1, x, ROWS, D);
    correlated(6, 0.1, q, ROWS, D);
    memcpy(h, x, sizeof h);
    double noise[3];
    static const char *const params[] = { "bits=2,ridge=0.01", "bits=2,basis=rows", "bits=2,basis=channels" };
    for (int i = 0; i < 3; i++) {
        const made r = make(params[i], D, KV_SIDE_K, x, ROWS, q, ROWS);
        const wf_state *s = wf_state_of(r.c);
        noise[i] = score_noise(&r, h, q, 1024);
        if (i < 2) {                                           /* the sum of variances times distortions is what comes out */
            double want = 0, got = 0, y[D];
            uint8_t *page = kv_zalloc(r.c->page_bytes);
            float z[P * D];
            for (int t = 0; t < 1024; t += P) {
                r.c->ops->encode(r.c, page, 0, P, h + t * D, D);
                r.c->ops->decode(r.c, page, 0, P, z, D);
                for (int n = 0; n < P; n++)
                    for (int k = 0; k < s->n; k++) {
                        y[0] = 0;
                        for (int j = 0; j < D; j++) y[0] += ((double)z[n * D + j] - (double)h[(t + n) * D + j]) * (double)s->analysis[j * s->padded + k];
                        got += pow((double)s->sigma[k] * y[0], 2) / 1024;
                    }
            }
            for (int k = 0; k < s->n; k++) want += pow((double)s->sigma[k], 2) * s->tables->book[wf_width(s, r.c, k)].distortion;
            CHECK(got < 1.05 * want && got > 0.7 * want, "%s: distortion %g, the allocation's sum is %g", params[i], got, want);
            kv_free(page);
        }
        drop(r);
    }
    CHECK(noise[0] < 0.8 * noise[1] && noise[1] < 0.8 * noise[2], "score noise under the queries' weight %g, of rows alone %g, channels %g", noise[0], noise[1], noise[2]);
}

/* In a basis without a weight the error of scores is that of rows: more starts make all together better, and hardly a row worse. */
static void test_search(void)
{
    static float x[ROWS * D], y[2][P * D];
    correlated(7, 0.1, x, ROWS, D);
    const made one = make("bits=2,basis=rows,search=1", D, KV_SIDE_K, x, ROWS, NULL, 0), five = make("bits=2,basis=rows", D, KV_SIDE_K, x, ROWS, NULL, 0);
    uint8_t *page = kv_zalloc(one.c->page_bytes);
    double sum[2] = { 0 }, worst = 0;
    for (int t = 0; t < 1024; t += P) {
        for (int i = 0; i < 2; i++) {
            const kv_codec *c = i ? five.c : one.c;
            c->ops->encode(c, page, 0, P, x + t * D, D);
            c->ops->decode(c, page, 0, P, y[i], D);
        }
        for (int n = 0; n < P; n++) {
            double e[2] = { 0 };
            for (int i = 0; i < 2; i++)
                for (int k = 0; k < D; k++) e[i] += pow((double)y[i][n * D + k] - (double)x[(t + n) * D + k], 2);
            worst = fmax(worst, e[1] / e[0]);
            for (int i = 0; i < 2; i++) sum[i] += e[i];
        }
    }
    CHECK(worst < 1.25, "a row's error is %g of what one start leaves", worst);
    CHECK(sum[1] < 0.97 * sum[0], "five starts leave %g of one's error", sum[1] / sum[0]);
    kv_free(page);
    drop(one);
    drop(five);
}

/* Scores on codes of every level against double precision over decoded rows, with widths up to 8 and codes across rows. */
static void test_dot(void)
{
    static float x[ROWS * 128], y[P * 128], q[9 * 128], s[9 * P];
    static const struct { const char *params; int d; double decay; } shape[] = {
        { "bits=2", 64, 0.1 }, { "bits=3,scale=f16", 64, 0.2 }, { "bits=5", 64, 0.12 }, { "bits=7.5", 80, 0.05 }, { "bits=0.5", 128, 0.05 }, { "bits=3", 96, 0.3 }, { "bits=4,mix=none", 8, 1 } };
    int seen = 0;
    double worst = 0;
    for (int i = 0; i < 7; i++) {
        const int d = shape[i].d;
        correlated(20 + i, shape[i].decay, x, 1024, d);
        kv_rng_normal(30, i, 0, 9 * d, q);
        const made r = make(shape[i].params, d, KV_SIDE_K, x, 1024, NULL, 0);
        const wf_state *st = wf_state_of(r.c);
        for (int k = 0; k < st->n / 4; k++) seen |= 1 << st->slot[k].width | (st->slot[k].low < st->slot[k].width) << 16;
        uint8_t *page = kv_zalloc(r.c->page_bytes), *prepared = kv_alloc(9 * r.c->query_bytes);
        r.c->ops->encode(r.c, page, 0, P, x, d);
        r.c->ops->decode(r.c, page, 0, P, y, d);
        for (int level = 0; level <= kv_cpu_simd_max(); level++)
            for (int n_q = 1; n_q <= 9; n_q++) {
                if (kv_cpu_limit(level) != level) continue;
                const int n = P - n_q;
                memset(s, 0xff, sizeof s);
                r.c->ops->query(r.c, q, d, n_q, prepared);
                r.c->ops->dot(r.c, page, n, prepared, n_q, s, P);
                for (int g = 0; g < n_q; g++)
                    for (int t = 0; t < n; t++) {
                        double want = 0, qq = 0, kk = 0;
                        for (int k = 0; k < d; k++) {
                            want += (double)q[g * d + k] * (double)y[t * d + k];
                            qq += pow((double)q[g * d + k], 2);
                            kk += pow((double)y[t * d + k], 2);
                        }
                        worst = fmax(worst, fabs((double)s[g * P + t] - want) / sqrt(qq * kk));
                    }
            }
        kv_cpu_limit(KV_SIMD_AMX);
        kv_free(page);
        kv_free(prepared);
        drop(r);
    }
    CHECK(worst < 1e-4, "scores on codes are %g of |q| |k| off", worst);
    CHECK((seen & 0x1ff) == 0x1fe && seen >> 16, "widths seen: %x", (unsigned)seen);
}

/* A mean of 900 beside a residual of norm 20, left in: it takes the component of most bits, 2^-8 of it as an error.  A rotation
 * without a basis (turboquant) would lose the residual: 3 bits of 900 err by 170. */
static void test_bias(void)
{
    static float x[ROWS * D], y[P * D];
    double error[2] = { 0 };
    for (int biased = 0; biased < 2; biased++) {
        kv_rng_normal(40, 0, 0, ROWS * D, x);
        for (int i = 0; i < ROWS * D; i++) x[i] = x[i] * 2.5f + (biased ? (i % D % 3 ? 110.0f : -120.0f) : 0);
        const made r = make("bits=3", D, KV_SIDE_K, x, ROWS, NULL, 0);
        uint8_t *page = kv_zalloc(r.c->page_bytes);
        r.c->ops->encode(r.c, page, 0, P, x, D);
        r.c->ops->decode(r.c, page, 0, P, y, D);
        for (int i = 0; i < P * D; i++) error[biased] += pow((double)y[i] - (double)x[i], 2) / (P * D) / 6.25;
        kv_free(page);
        drop(r);
    }
    CHECK(error[1] < 5 * error[0], "error relative to the residual: %g with a bias of norm 900, %g without", error[1], error[0]);
}

/* Rows that tell nothing still make a codec. */
static void test_degenerate(void)
{
    static float x[256 * D], y[P * D];
    for (int kind = 0; kind < 4; kind++) {
        memset(x, 0, sizeof x);
        if (kind) kv_rng_normal(50, kind, 0, 256 * D, x);
        for (int i = 0; i < 256 * D; i++) x[i] *= kind == 1 ? 1e-30f : kind == 2 ? (i % D == 5) : 1e6f;
        const made r = make("bits=2", D, KV_SIDE_K, x, 256, kind ? x : NULL, kind ? 256 : 0);
        if (!r.c) continue;
        uint8_t *page = kv_zalloc(r.c->page_bytes);
        double e = 0, n = 0;
        r.c->ops->encode(r.c, page, 0, P, x, D);
        r.c->ops->decode(r.c, page, 0, P, y, D);
        for (int i = 0; i < P * D; i++) e += pow((double)y[i] - (double)x[i], 2), n += pow((double)x[i], 2);
        CHECK(isfinite(e) && (kind < 2 || e < 0.13 * n), "kind %d: error %g of %g", kind, e, n);
        kv_free(page);
        drop(r);
    }
    kv_codec *c;
    for (int i = 0; i < 256 * D; i++) x[i] = 1e20f;
    kv_tensor rows = { .data = x, .dtype = KV_F32, .ndim = 2, .shape = { 256, D }, .stride = { D, 1 } };
    CHECK(kv_codec_fit(&c, "wf", "", D, P, KV_SIDE_K, &rows, NULL) == KV_E_ARG && strstr(kv_last_error(), "are beyond 2^28"), "%s", kv_last_error());
}

static void test_hostile(void)
{
    static float x[1024 * D], y[P * D];
    correlated(60, 0.1, x, 1024, D);
    const made r = make("bits=2", D, KV_SIDE_K, x, 1024, NULL, 0);
    const size_t bytes = r.c->blob_bytes;
    uint8_t *blob = kv_alloc(bytes + 1), *page = kv_zalloc(r.c->page_bytes);
    kv_codec *c;
    int refused = 0, taken = 0;
    blob[bytes] = 0;
    for (int trial = 0; trial < 400; trial++) {
        uint32_t w[4];
        kv_rng_u32(61, 0, 0, (uint32_t)trial, w);
        memcpy(blob, r.c->blob, bytes);
        size_t n = bytes, at = trial < 200 ? w[0] % sizeof(wf_blob) : w[0] % bytes;
        if (trial % 4 == 3) n = trial == 3 ? bytes + 1 : w[1] % bytes;
        else if (trial % 4 == 2) memcpy(blob + (at & ~(size_t)3), w + 2, 4);
        else blob[at] ^= (uint8_t)(1 << w[1] % 8);
        const int status = kv_codec_new_calibrated(&c, "wf", "bits=2", D, P, KV_SIDE_K, blob, (double)n);
        if (status < 0) {
            refused++;
            CHECK((status == KV_E_CORRUPT || status == KV_E_UNCALIBRATED) && strncmp(kv_last_error(), "codec 'wf': ", 12) == 0, "trial %d: %s", trial, kv_last_error());
            continue;
        }
        taken++;
        int finite = 1;
        c->ops->encode(c, page, 0, P, x, D);
        c->ops->decode(c, page, 0, P, y, D);
        for (int i = 0; i < P * D; i++) finite &= isfinite(y[i]) != 0;
        CHECK(finite, "trial %d: not finite", trial);
        kv_codec_free(c);
    }
    CHECK(refused > 250, "%d refused, %d taken", refused, taken);
    memcpy(blob, r.c->blob, bytes);
    CHECK(kv_codec_new_calibrated(&c, "wf", "bits=3", D, P, KV_SIDE_K, blob, (double)bytes) == KV_E_CORRUPT && strstr(kv_last_error(), "tables made for 2 bits an element, bits=3 means 3"), "%s", kv_last_error());
    CHECK(kv_codec_new_calibrated(&c, "wf", "bits=2", 128, P, KV_SIDE_K, blob, (double)bytes) == KV_E_CORRUPT, "another head_dim");
    CHECK(kv_codec_new(&c, "wf", "bits=2", D, P, KV_SIDE_K) == KV_E_UNCALIBRATED, "no tables");
    kv_free(blob);
    kv_free(page);
    drop(r);
}

int main(void)
{
    printf("seeds 3-7, 11, 20-30, 40, 50, 60, 61; simd up to %d\n", kv_cpu_simd_max());
    test_eigen();
    test_fill();
    test_basis();
    test_gain();
    test_search();
    test_dot();
    test_bias();
    test_degenerate();
    test_hostile();
    return check_end();
}
