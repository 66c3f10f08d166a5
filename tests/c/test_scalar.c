/* test_scalar.c -- codebooks, transform and the `scalar` codec: distortions as published, the same bytes at every SIMD
 * level, attention on codes against double precision. */
#include <math.h>
#include <stdlib.h>
#include "check.h"
#include "codec.h"

static const uint32_t SEED = 20260418;
static uint32_t drawn;

static uint32_t draw(void)
{
    uint32_t out[4];
    kv_rng_u32(SEED, 0, 0x7E57, drawn++, out);
    return out[0];
}
static void normal(float *x, int n) { kv_rng_normal(SEED, 0x7E58, (double)drawn * 4096, n, x); drawn += 1 + (uint32_t)n / 4096; }
static void *buffer(size_t n) { void *p = kv_alloc(n); if (!p) abort(); return p; }
static kv_codec *codec(const char *params, int d, int page, int side)
{
    kv_codec *c = NULL;
    if (kv_codec_new(&c, "scalar", params, d, page, side) < 0) { CHECK(0, "%s d=%d page=%d: %s", params, d, page, kv_last_error()); abort(); }
    return c;
}

/* ---- transform and sums */
static void test_rows(void)
{
    for (int n = 1; n <= 512; n *= 2) {
        float x[512], out[512], first[512];
        normal(x, n);
        for (int l = 0; l <= kv_cpu_simd_max(); l++) {
            kv_cpu_limit(l);
            memcpy(out, x, sizeof x);
            kv_fwht(out, n);
            if (l == 0) memcpy(first, out, sizeof out);
            CHECK(!memcmp(first, out, sizeof *out * (size_t)n), "fwht n=%d level %d differs from plain C", n, l);
        }
        double worst = 0;
        for (int i = 0; i < n; i++) {
            double y = 0;
            for (int j = 0; j < n; j++) y += __builtin_parity((unsigned)(i & j)) ? -x[j] : x[j];
            worst = fmax(worst, fabs(y / sqrt(n) - out[i]));
        }
        CHECK(worst < 2e-6, "fwht n=%d is off by %g", n, worst);
        kv_fwht(out, n);
        double back = 0;
        for (int i = 0; i < n; i++) back = fmax(back, fabs((double)out[i] - x[i]));
        CHECK(back < 1e-6, "fwht n=%d twice is off by %g", n, back);
    }
    for (int n = 1; n <= 300; n++) {
        float x[300], first = 0;
        double want = 0;
        normal(x, n);
        for (int i = 0; i < n; i++) want += (double)x[i] * x[i];
        for (int l = 0; l <= kv_cpu_simd_max(); l++) {
            kv_cpu_limit(l);
            const float got = kv_sumsq(x, n);
            if (l == 0) first = got;
            CHECK(got == first && fabs(got - want) < 1e-5 * want, "sumsq n=%d level %d: %.9g, plain C %.9g, exact %.9g", n, l, got, first, want);
        }
    }
    CHECK(kv_hadamard(NULL, 1, 4) == KV_E_ARG && kv_hadamard((float[12]){ 0 }, 1, 12) == KV_E_ARG, "bad kv_hadamard arguments pass");
}

/* ---- codebooks: positive halves and distortions as published (rounded as printed there) */
static const struct table { int bits, dim; double d, tol, c[16]; } table[] = {
    { 1, 0, .363380, 1e-6, { .797885 } }, { 2, 0, .117482, 1e-6, { .452780, 1.510418 } },
    { 3, 0, .034548, 1e-6, { .245094, .756005, 1.343909, 2.151946 } },
    { 4, 0, .009501, 1e-6, { .128395, .388048, .656759, .942340, 1.256231, 1.618046, 2.069017, 2.732590 } },
    { 5, 0, .002505, 1e-5, { .06589, .198052, .331378, .4667, .604934, .747136, .894565, 1.048783, 1.211804, 1.38634, 1.576228, 1.787233, 2.028728, 2.317739, 2.69112, 3.260732 } },
    { 6, 0, .000644, 0, { 0 } }, { 7, 0, .000163, 0, { 0 } }, { 8, 0, .0000412, 0, { 0 } },
    { 1, 64, .35839, 0, { 0 } }, { 2, 64, .11453, 1e-5, { .45212, 1.49997 } }, { 3, 64, .03339, 1e-5, { .24375, .75066, 1.32934, 2.11131 } },
    { 4, 64, .00913, 1e-5, { .12735, .38472, .65049, .93189, 1.2394, 1.59085, 2.02331, 2.64637 } },
    { 1, 128, .36089, 0, { 0 } }, { 2, 128, .11600, 1e-5, { .45245, 1.50519 } }, { 3, 128, .03397, 1e-5, { .24442, .75333, 1.3366, 2.13147 } },
    { 4, 128, .00932, 1e-5, { .12787, .38638, .65362, .9371, 1.24777, 1.60434, 2.04593, 2.68886 } },
    { 1, 256, .36214, 0, { 0 } }, { 2, 256, .11674, 0, { 0 } }, { 3, 256, .03426, 0, { 0 } }, { 4, 256, .00941, 0, { 0 } },
};

static void test_codebooks(void)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const struct table *t = &table[i];
        double c[256], d;
        CHECK(kv_lloyd_max(t->bits, t->dim, c, &d) == KV_OK, "codebook %d bits dim %d", t->bits, t->dim);
        const double printed = t->d > .1 ? 5e-6 : t->d > 1e-3 ? 5e-6 : t->d > 1e-4 ? 5e-7 : 5e-8;      /* half a unit of its last digit */
        CHECK(fabs(d - t->d) < 1e-3 * t->d + printed, "%d bits dim %d: distortion %.8f, published %.8f", t->bits, t->dim, d, t->d);
        const int half = 1 << (t->bits - 1);
        for (int k = 0; k < half; k++) {
            CHECK(c[half + k] == -c[half - 1 - k], "%d bits: not symmetric at %d", t->bits, k);
            CHECK(!t->tol || fabs(c[half + k] - t->c[k]) < t->tol, "%d bits dim %d centroid %d: %.8f, published %.6f", t->bits, t->dim, k, c[half + k], t->c[k]);
        }
        for (int k = half; t->dim == 0 && k < 2 * half; k++) {          /* every centroid is its cell's mean */
            const double lo = k == half ? 0 : .5 * (c[k - 1] + c[k]), hi = k == 2 * half - 1 ? INFINITY : .5 * (c[k] + c[k + 1]);
            const double mean = (exp(-lo * lo / 2) - exp(-hi * hi / 2)) / sqrt(2 * M_PI) / (.5 * (erfc(lo / M_SQRT2) - erfc(hi / M_SQRT2)));
            CHECK(fabs(mean - c[k]) < 1e-10, "%d bits: centroid %d moves by %g", t->bits, k, mean - c[k]);
        }
    }
    for (int dim = 2; dim < 700; dim += dim < 20 ? 1 : 97)
        for (int bits = 1; bits <= 8; bits++) {
            double c[256], d;
            kv_lloyd_max(bits, dim, c, &d);
            bool rises = true;
            for (int k = 1; k < 1 << bits; k++) rises = rises && c[k] > c[k - 1];
            CHECK(rises && d > 0 && d < .37 && c[(1 << bits) - 1] < sqrt(dim), "codebook of %d bits, dim %d is broken", bits, dim);
        }
    CHECK(kv_lloyd_max(9, 0, NULL, NULL) == KV_E_ARG && kv_lloyd_max(4, 1, NULL, NULL) == KV_E_ARG, "bad codebook arguments pass");
}

/* What follows from codebooks alone: Theorem 1's and Theorem 3's bounds, entropy of the codes, the constants of gain=expected. */
static void test_bounds(void)
{
    static const double entropy[] = { 1.000, 1.911, 2.825, 3.765, 4.730 }, left[] = { 1, .60281, .34267, .18576, .09743 };
    static const struct { int dim; double d[3]; } sub[] = { { 32, { .112, .0325, .0089 } }, { 96, { .1156, .0337, .0093 } } };   /* 2, 3, 4 bits */
    for (int bits = 1; bits <= 8; bits++) {
        double c[256], d, h = 0;
        for (int dim = 0; dim <= 512; dim = dim ? 2 * dim : 32) {
            kv_lloyd_max(bits, dim, c, &d);
            CHECK(d < sqrt(3) * M_PI / 2 * pow(4, -bits) && d > pow(4, -bits), "%d bits dim %d: distortion %g is outside 1..2.72 times 4^-bits", bits, dim, d);
        }
        kv_lloyd_max(bits, 0, c, &d);
        for (int k = 0; k < 1 << bits; k++) {
            const double lo = k ? .5 * (c[k - 1] + c[k]) : -INFINITY, hi = k + 1 < 1 << bits ? .5 * (c[k] + c[k + 1]) : INFINITY, p = .5 * (erfc(lo / M_SQRT2) - erfc(hi / M_SQRT2));
            h -= p * log2(p);
        }
        CHECK(bits > 5 || fabs(h - entropy[bits - 1]) < 6e-4, "%d bits: entropy of the codes %.4f, published %.3f", bits, h, entropy[bits - 1]);
        CHECK(bits > 4 || fabs(sqrt(d) / left[bits] - 1) < 1e-3, "%d bits leave a residual of %.5f, published %.5f", bits, sqrt(d), left[bits]);
        /* The Gaussian's codebook under the exact density: 0.3 % at dim 128. */
        double exact, mass = 0, off = 0;
        kv_lloyd_max(bits, 128, NULL, &exact);
        for (int i = 0, k = 0; i < 200000; i++) {
            const double z = (2 * (i + .5) / 200000 - 1) * sqrt(128), f = pow(1 - z * z / 128, 62.5);
            while (k + 1 < 1 << bits && z > .5 * (c[k] + c[k + 1])) k++;
            mass += f;
            off += f * (z - c[k]) * (z - c[k]);
        }
        CHECK(bits > 4 || (off / mass >= exact * .9999 && off / mass < exact * 1.003), "%d bits, dim 128: the Gaussian's codebook leaves %g, its own %g", bits, off / mass, exact);
    }
    for (int i = 0; i < 2; i++)
        for (int bits = 2; bits <= 4; bits++) {
            double d;
            kv_lloyd_max(bits, sub[i].dim, NULL, &d);
            CHECK(fabs(d / sub[i].d[bits - 2] - 1) < .02, "%d bits in %d channels: distortion %.5f, published %.4f", bits, sub[i].dim, d, sub[i].d[bits - 2]);
        }
}

/* ---- distortion of unit vectors */
typedef struct quality { double mse, cosine, gain; } quality;
static quality measure(const char *params, int d, int n)
{
    enum { PAGE = 64 };
    kv_codec *c = codec(params, d, PAGE, KV_SIDE_K);
    float *x = buffer(sizeof *x * PAGE * (size_t)d), *y = buffer(sizeof *y * PAGE * (size_t)d);
    uint8_t *page = kv_zalloc(c->page_bytes);
    quality q = { 0, 0, 0 };
    for (int at = 0; at < n; at += PAGE) {
        normal(x, PAGE * d);
        c->ops->encode(c, page, 0, PAGE, x, d);
        c->ops->decode(c, page, 0, PAGE, y, d);
        for (int t = 0; t < PAGE; t++) {
            double xx = 0, yy = 0, xy = 0;
            for (int i = 0; i < d; i++) {
                const double a = x[t * d + i], b = y[t * d + i];
                xx += a * a; yy += b * b; xy += a * b;
            }
            q.mse += (xx + yy - 2 * xy) / xx / n;
            q.cosine += xy / sqrt(xx * yy) / n;
            q.gain += sqrt(yy / xx) / n;
        }
    }
    kv_free(x); kv_free(y); kv_free(page); kv_codec_free(c);
    return q;
}

static void test_distortion(void)
{
    static const char *const mode[] = { "raw", "matched", "lsq", "unbiased" };
    static const double d128[3][4] = { { .1161, .1189, .1153, .1307 }, { .0340, .0338, .0336, .0348 }, { .00932, .00918, .00916, .00924 } };
    static const double cosine[] = { .7979, .9405, .9831, .99541 };
    char params[128];
    for (int bits = 2; bits <= 4; bits++)
        for (int m = 0; m < 4; m++) {
            snprintf(params, sizeof params, "bits=%d,norm=%s,codebook=gauss", bits, mode[m]);
            const quality q = measure(params, 128, 4096);
            CHECK(fabs(q.mse / d128[bits - 2][m] - 1) < .01, "d=128 %s: relative MSE %.5f, published %.5f", params, q.mse, d128[bits - 2][m]);
            CHECK(fabs((1 - q.cosine) / (1 - cosine[bits - 1]) - 1) < .02 && fabs(q.cosine / cosine[bits - 1] - 1) < .01, "d=128 %s: cosine %.5f, published %.5f", params, q.cosine, cosine[bits - 1]);
            if (m == 1) CHECK(fabs(q.gain - 1) < 1e-4, "%s: |decoded| is %.5f of |x|", params, q.gain);
        }
    for (int d = 64; d <= 256; d *= 2)
        for (int bits = 1; bits <= 8; bits++) {
            double want;
            kv_lloyd_max(bits, d, NULL, &want);
            for (int r = 0; r < (d == 64 ? 2 : 1); r++) {
                snprintf(params, sizeof params, "bits=%d,norm=raw,codebook=beta,rotation=%s", bits, r ? "orthogonal" : "hadamard");
                const quality q = measure(params, d, 1 << (bits > 5 ? 22 : 21) >> (d == 64 ? 6 : d == 128 ? 7 : 8));
                CHECK(fabs(q.mse / want - 1) < .01, "d=%d %s: relative MSE %.6f, density's %.6f", d, params, q.mse, want);
            }
            snprintf(params, sizeof params, "bits=%d,norm=raw", bits);
            const quality q = measure(params, d, 1 << (bits > 5 ? 22 : 21) >> (d == 64 ? 6 : d == 128 ? 7 : 8));
            double gauss;
            kv_lloyd_max(bits, 0, NULL, &gauss);
            CHECK(q.mse > want * .99 && q.mse < gauss * 1.01, "d=%d %s: relative MSE %.6f is outside %.6f..%.6f", d, params, q.mse, want, gauss);
        }
    CHECK(fabs(measure("bits=1,norm=raw", 128, 4096).cosine - cosine[0]) < .003, "1 bit: cosine");
    static const int blocks[] = { 80, 96, 112, 192, 320, 512 };                     /* transforms of several sizes: as good as one */
    for (int i = 0; i < 6; i++) {
        double exact, gauss;
        kv_lloyd_max(3, blocks[i], NULL, &exact);
        kv_lloyd_max(3, 0, NULL, &gauss);
        const quality q = measure("bits=3,norm=raw", blocks[i], 4096);
        CHECK(q.mse > exact * .99 && q.mse < gauss * 1.01, "d=%d: relative MSE %.6f is outside %.6f..%.6f", blocks[i], q.mse, exact, gauss);
    }
}

static double scale_of_row(const char *params, int d, const float *x)
{
    kv_codec *c = codec(params, d, 32, KV_SIDE_K);                    /* whole tiles: scales follow the codes */
    uint8_t *page = kv_zalloc(c->page_bytes);
    c->ops->encode(c, page, 0, 1, x, d);
    const double scale = kv_f16_to_f32(kv_load_u16(page + (size_t)c->page.codes));
    kv_free(page);
    kv_codec_free(c);
    return scale;
}

/* matched^2 = unbiased lsq, of every row.  One-hot rows become +-const, the same code everywhere: without norm correction they lose
 * (1 - centroid)^2, with it nothing. */
static void test_scales(void)
{
    for (int bits = 1; bits <= 8; bits++) {
        float x[128];
        double scale[3], g[256];
        char params[64];
        static const char *const mode[] = { "matched", "lsq", "unbiased" };
        normal(x, 128);
        for (int m = 0; m < 3; m++) {
            snprintf(params, sizeof params, "bits=%d,norm=%s", bits, mode[m]);
            scale[m] = scale_of_row(params, 128, x);
        }
        CHECK(fabs(scale[0] * scale[0] / (scale[1] * scale[2]) - 1) < 2e-3, "%d bits: scales %g, %g, %g", bits, scale[0], scale[1], scale[2]);   /* f16: 2^-11 each */
        kv_lloyd_max(bits, 0, g, NULL);
        double nearest = INFINITY;
        for (int k = 0; k < 1 << bits; k++) nearest = fmin(nearest, fabs(1 - g[k]));
        for (int m = 0; m < 2; m++) {
            float y[128], one[128] = { 0 };
            one[17] = 2;
            snprintf(params, sizeof params, "bits=%d,norm=%s", bits, m ? "matched" : "raw");
            kv_codec *c = codec(params, 128, 8, KV_SIDE_V);
            uint8_t *page = kv_zalloc(c->page_bytes);
            double off = 0;
            c->ops->encode(c, page, 0, 1, one, 128);
            c->ops->decode(c, page, 0, 1, y, 128);
            for (int i = 0; i < 128; i++) off += ((double)one[i] - y[i]) * ((double)one[i] - y[i]) / 4;
            CHECK(m ? off < 1e-6 : fabs(off - nearest * nearest) < 1e-4, "%s: a one-hot row is %g off, 1 - centroid squared %g", params, off, nearest * nearest);
            kv_free(page);
            kv_codec_free(c);
        }
    }
}

/* Mean of <q, x^> over rotations: nothing is lost with norm=unbiased, a share D of it with norm=raw. */
static void test_bias(void)
{
    enum { D = 64, N = 1500 };
    float x[D], q[D], y[D];
    normal(x, D);
    normal(q, D);
    double xx = 0, xy = 0;
    for (int i = 0; i < D; i++) q[i] += x[i];
    for (int i = 0; i < D; i++) { xx += (double)x[i] * x[i]; xy += (double)x[i] * q[i]; }
    for (int mode = 0; mode < 2; mode++) {
        double sum = 0, sq = 0;
        for (int seed = 0; seed < N; seed++) {
            char params[96];
            snprintf(params, sizeof params, "bits=2,norm=%s,seed=%d,rotation=%s", mode ? "unbiased" : "raw", seed, seed % 8 ? "hadamard" : "orthogonal");
            kv_codec *c = codec(params, D, 8, KV_SIDE_K);
            uint8_t *page = kv_zalloc(c->page_bytes);
            c->ops->encode(c, page, 3, 1, x, D);
            c->ops->decode(c, page, 3, 1, y, D);
            double dot = 0;
            for (int i = 0; i < D; i++) dot += (double)q[i] * y[i];
            sum += dot / xy - 1;
            sq += (dot / xy - 1) * (dot / xy - 1);
            kv_free(page);
            kv_codec_free(c);
        }
        const double mean = sum / N, error = sqrt((sq / N - mean * mean) / N);
        if (mode) CHECK(fabs(mean) < 4 * error, "norm=unbiased: bias %.5f +- %.5f", mean, error);
        else CHECK(mean < -.1 && mean > -.13, "norm=raw at 2 bits: bias %.5f, expected about -0.117", mean);
    }
}

/* ---- bytes: every level, any split of the tokens */
static const struct shape { int d, page; } shape[] = { { 64, 64 }, { 128, 32 }, { 80, 24 }, { 96, 16 }, { 10, 8 }, { 256, 72 }, { 112, 40 }, { 512, 8 }, { 72, 136 } };
enum { N_SHAPES = sizeof shape / sizeof *shape };

static void params_of(char *out, size_t cap, int bits, int k)
{
    static const char *const rot[] = { "hadamard", "orthogonal", "none" }, *const norm[] = { "raw", "matched", "lsq", "unbiased" };
    snprintf(out, cap, "bits=%d,rotation=%s,norm=%s,codebook=%s,seed=%d", bits, rot[k % 3], norm[k / 3 % 4], k & 1 ? "beta" : "gauss", k);
}

static void test_bytes(void)
{
    for (int i = 0; i < N_SHAPES; i++)
        for (int bits = 1; bits <= 8; bits++)
            for (int side = 0; side < 2; side++) {
                const int d = shape[i].d, n = shape[i].page, ld = d + 3;
                char params[128];
                params_of(params, sizeof params, bits, (int)(draw() % 24));
                kv_codec *c = codec(params, d, n, side);
                float *x = buffer(sizeof *x * (size_t)(n * ld)), *y = buffer(sizeof *y * (size_t)(n * ld)), *first = buffer(sizeof *y * (size_t)(n * ld));
                uint8_t *want = kv_zalloc(c->page_bytes), *page = buffer(c->page_bytes);
                normal(x, n * ld);
                for (int k = 0; k < d; k++) x[k] = 0;                       /* a zero row, a large one, a small one, one-hot */
                for (int k = 0; k < d; k++) x[ld + k] *= 1e30f;
                for (int k = 0; k < d; k++) x[2 * ld + k] *= 1e-30f;
                for (int k = 1; k < d; k++) x[3 * ld + k] = 0;
                kv_cpu_limit(0);
                c->ops->encode(c, want, 0, n, x, ld);
                for (int l = 0; l <= kv_cpu_simd_max(); l++) {
                    kv_cpu_limit(l);
                    memset(page, 0, c->page_bytes);
                    c->ops->encode(c, page, 0, n, x, ld);
                    CHECK(!memcmp(page, want, c->page_bytes), "%s d=%d page=%d side=%d: level %d writes other bytes", params, d, n, side, l);
                    for (int again = 0; again < 2; again++) {               /* token by token in any order; then over old contents */
                        if (!again) memset(page, 0, c->page_bytes);
                        else c->ops->encode(c, page, 0, n - 1, x + ld, ld);
                        for (int k = 0, t = 5 % n; k < n; k++, t = (t + (n % 7 ? 7 : 5)) % n) c->ops->encode(c, page, t, 1, x + t * ld, ld);
                        CHECK(!memcmp(page, want, c->page_bytes), "%s d=%d page=%d side=%d level %d: token by token writes other bytes (%d)", params, d, n, side, l, again);
                    }
                    for (int k = 0; k < n * ld; k++) y[k] = NAN;
                    c->ops->decode(c, page, 0, n, y, ld);
                    if (l == 0) memcpy(first, y, sizeof *y * (size_t)(n * ld));
                    CHECK(!memcmp(first, y, sizeof *y * (size_t)(n * ld)), "%s d=%d page=%d side=%d: level %d decodes otherwise", params, d, n, side, l);
                    bool zero = true, finite = true, kept = true;
                    for (int k = 0; k < d; k++) zero = zero && y[k] == 0;
                    for (int t = 0; t < n; t++)
                        for (int k = 0; k < ld; k++) {
                            finite = finite && (k >= d || isfinite(y[t * ld + k]));
                            kept = kept && (k < d || isnan(y[t * ld + k]));
                        }
                    CHECK(zero && finite && kept, "%s d=%d side=%d: zero row %d, finite %d, past the row untouched %d", params, d, side, zero, finite, kept);
                }
                kv_bytes b = c->page;
                CHECK(b.codes + b.scales + b.padding == (double)c->page_bytes && b.codes == bits * d * n / 8.0, "%s d=%d page=%d: ledger", params, d, n);
                kv_free(x); kv_free(y); kv_free(first); kv_free(want); kv_free(page);
                kv_codec_free(c);
            }
}

/* ---- attention on codes */
static double worst_dot[3], worst_acc[3];

static void fused_case(int bits, int d, int n_page, int side, int n_q, int n, int kind)
{
    char params[128];
    params_of(params, sizeof params, bits, (int)(draw() % 24));
    kv_codec *c = codec(params, d, n_page, side);
    const int ld = n_page + 5;
    float *x = buffer(sizeof *x * (size_t)(n_page * d)), *y = buffer(sizeof *y * (size_t)(n_page * d)), *q = buffer(sizeof *q * (size_t)(n_q * d));
    float *s = buffer(sizeof *s * (size_t)(n_q * ld)), *acc = buffer(sizeof *acc * (size_t)(n_q * c->space_dim)), *out = buffer(sizeof *out * (size_t)(n_q * d));
    uint8_t *page = kv_zalloc(c->page_bytes), *prepared = buffer(c->query_bytes * (size_t)n_q);
    normal(x, n_page * d);
    for (int t = 0; t < n_page; t++) {
        const float gain = expf((float)(draw() % 1000) / 250 - 2);
        for (int i = 0; i < d; i++) x[t * d + i] *= gain;
    }
    c->ops->encode(c, page, 0, n_page, x, d);
    c->ops->decode(c, page, 0, n_page, y, d);
    normal(q, n_q * d);
    if (kind == 1) for (int i = 0; i < n_q * d; i++) q[i] = i % d == 3 ? 100 : q[i] * 1e-3f;
    if (kind == 2) for (int i = 0; i < d; i++) q[i] = 0;
    for (int l = 0; l <= kv_cpu_simd_max(); l++) {
        kv_cpu_limit(l);
        if (side == KV_SIDE_K) {
            memset(prepared, 0xff, c->query_bytes * (size_t)n_q);
            for (int i = 0; i < n_q * ld; i++) s[i] = NAN;
            c->ops->query(c, q, d, n_q, prepared);
            c->ops->dot(c, page, n, prepared, n_q, s, ld);
            for (int k = 0; k < n_q; k++)
                for (int t = 0; t < ld; t++) {
                    double want = 0, qq = 0, yy = 0;
                    if (t >= n) { CHECK(isnan(s[k * ld + t]), "%s d=%d n=%d/%d level %d: wrote score %d", params, d, n, n_page, l, t); continue; }
                    for (int i = 0; i < d; i++) { const double a = q[k * d + i], b = y[t * d + i]; want += a * b; qq += a * a; yy += b * b; }
                    const double err = fabs(s[k * ld + t] - want) / (sqrt(qq * yy) + 1e-30);
                    worst_dot[l] = fmax(worst_dot[l], err);
                    CHECK(err < 2e-4, "%s d=%d n=%d/%d n_q=%d level %d query %d token %d: %.6g, exact %.6g (%.2g of |q||k|)", params, d, n, n_page, n_q, l, k, t, s[k * ld + t], want, err);
                }
        } else {
            for (int k = 0; k < n_q; k++)
                for (int t = 0; t < ld; t++) {
                    const float u = (float)(draw() >> 8) * 0x1p-24f;
                    s[k * ld + t] = t >= n ? NAN : kind == 0 ? u / (float)n : kind == 1 ? expf(12 * u - 12) : k == 0 ? 0 : t == n / 2 ? 1 : 1e-9f * u;
                }
            memset(acc, 0, sizeof *acc * (size_t)(n_q * c->space_dim));
            c->ops->accumulate(c, page, n, s, ld, n_q, acc);
            c->ops->accumulate(c, page, n, s, ld, n_q, acc);                /* adds */
            for (int i = 0; i < n_q * d; i++) out[i] = NAN;
            c->ops->output(c, acc, n_q, out, d);
            for (int k = 0; k < n_q; k++) {
                double ee = 0, ww = 0;
                for (int i = 0; i < d; i++) {
                    double want = 0;
                    for (int t = 0; t < n; t++) want += 2.0 * s[k * ld + t] * y[t * d + i];
                    ee += (out[k * d + i] - want) * (out[k * d + i] - want);
                    ww += want * want;
                }
                const double err = sqrt(ee) / (sqrt(ww) + 1e-30);
                worst_acc[l] = fmax(worst_acc[l], err);
                CHECK(err < 2e-4, "%s d=%d n=%d/%d n_q=%d level %d kind %d query %d: output off by %.2g of its norm", params, d, n, n_page, n_q, l, kind, k, err);
            }
        }
    }
    kv_free(x); kv_free(y); kv_free(q); kv_free(s); kv_free(acc); kv_free(out); kv_free(page); kv_free(prepared);
    kv_codec_free(c);
}

static void test_fused(void)
{
    static const int some[] = { 1, 2, 3, 4, 5, 7, 8, 9, 64 };
    for (int i = 0; i < N_SHAPES; i++)
        for (int bits = 1; bits <= 8; bits++)
            for (int kind = 0; kind < 3; kind++)
                for (int side = 0; side < 2; side++) {
                    const int n = kind == 0 ? shape[i].page : 1 + (int)(draw() % (uint32_t)shape[i].page);
                    fused_case(bits, shape[i].d, shape[i].page, side, some[draw() % (shape[i].d > 200 ? 6 : 9)], n, kind);
                }
    for (int l = 0; l <= kv_cpu_simd_max(); l++) printf("level %d: worst score error %.2g of |q||k|, worst output error %.2g of its norm\n", l, worst_dot[l], worst_acc[l]);
}

/* Any bytes: finite time, no access outside (the sanitizer watches), no trap. */
static void test_hostile(void)
{
    for (int round = 0; round < 160; round++) {
        const int i = round % N_SHAPES, bits = 1 + round / 2 % 8, side = round & 1, d = shape[i].d, n = shape[i].page;
        char params[64];
        snprintf(params, sizeof params, "bits=%d", bits);
        kv_codec *c = codec(params, d, n, side);
        uint8_t *page = buffer(c->page_bytes), *prepared = buffer(c->query_bytes * 3);
        float *x = buffer(sizeof *x * (size_t)(n * d)), *s = buffer(sizeof *s * (size_t)(3 * n)), *acc = kv_zalloc(sizeof *acc * (size_t)(3 * c->space_dim));
        for (size_t k = 0; k < c->page_bytes; k++) page[k] = (uint8_t)draw();
        normal(x, 3 * d);
        if (round % 5 == 0) x[1] = round % 2 ? 3e38f : 1e-40f;
        for (int l = 0; l <= kv_cpu_simd_max(); l++) {
            kv_cpu_limit(l);
            c->ops->query(c, x, d, 3, prepared);
            if (side == KV_SIDE_K) c->ops->dot(c, page, n - 3, prepared, 3, s, n);
            for (int k = 0; k < 3 * n; k++) s[k] = (float)(draw() % 7);
            if (side == KV_SIDE_V) c->ops->accumulate(c, page, n - 3, s, n, 3, acc);
            c->ops->output(c, acc, 3, x, d);
        }
        c->ops->decode(c, page, 0, n, x, d);
        check_passed++;
        kv_free(page); kv_free(prepared); kv_free(x); kv_free(s); kv_free(acc);
        kv_codec_free(c);
    }
    kv_codec *c = NULL;
    CHECK(kv_codec_new(&c, "scalar", "bits=9", 64, 64, 0) == KV_E_PARAM, "bits=9 passes");
    CHECK(kv_codec_new(&c, "scalar", "", 63, 64, 0) == KV_E_PARAM && kv_codec_new(&c, "scalar", "", 6, 64, 0) == KV_E_PARAM, "odd or tiny head_dim passes");
}

/* Keys and values, and two seeds, rotate apart. */
static void test_seeds(void)
{
    float x[64], y[3][64];
    normal(x, 64);
    for (int k = 0; k < 3; k++) {
        kv_codec *c = codec(k == 2 ? "bits=2,seed=1" : "bits=2", 64, 8, k == 1);
        uint8_t *page = kv_zalloc(c->page_bytes);
        c->ops->encode(c, page, 0, 1, x, 64);
        c->ops->decode(c, page, 0, 1, y[k], 64);
        kv_free(page);
        kv_codec_free(c);
    }
    CHECK(memcmp(y[0], y[1], sizeof x) && memcmp(y[0], y[2], sizeof x), "sides or seeds share a rotation");
}

int main(void)
{
    printf("seed %u, levels 0..%d\n", SEED, kv_cpu_simd_max());
    test_rows();
    test_codebooks();
    test_bounds();
    kv_cpu_limit(KV_SIMD_AMX);
    test_distortion();
    test_scales();
    test_bias();
    test_bytes();
    test_fused();
    test_hostile();
    test_seeds();
    return check_end();
}
