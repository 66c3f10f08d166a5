/* test_scalar_parts.c -- second stages of the `scalar` codec against TurboQuant's Theorem 2 and the estimators' closed forms; outlier
 * channels, equal steps, search of the factor, calibrated tables. */
#include <math.h>
#include <stdlib.h>
#include "check.h"
#include "codec.h"

static const uint32_t SEED = 20261122;
static uint32_t drawn;

static void normal(float *x, int n) { kv_rng_normal(SEED, 0x7E60, (double)drawn * 4096, n, x); drawn += 1 + (uint32_t)n / 4096; }

static kv_codec *codec(const char *params, int d, int page, int side)
{
    kv_codec *c = NULL;
    if (kv_codec_new(&c, "scalar", params, d, page, side) < 0) { CHECK(0, "%s d=%d page=%d: %s", params, d, page, kv_last_error()); abort(); }
    return c;
}

/* ---- inner products: mean and spread of <q, x^> - <q, x> for unit vectors with <q, x> = cosine, over rotations and sketches */
typedef struct error { double mean, rms, of_mean; } inner;

static inner inner_error(const char *params, int d, double cosine, int n_seeds)
{
    enum { PAGE = 64 };
    float *x = kv_alloc(sizeof *x * PAGE * (size_t)d), *y = kv_alloc(sizeof *y * PAGE * (size_t)d), *q = kv_alloc(sizeof *q * PAGE * (size_t)d);
    double sum = 0, square = 0, by_seed = 0;
    for (int seed = 0; seed < n_seeds; seed++) {
        char text[160];
        snprintf(text, sizeof text, "%s,seed=%d", params, seed);
        kv_codec *c = codec(text, d, PAGE, KV_SIDE_K);
        uint8_t *page = kv_zalloc(c->page_bytes);
        double part = 0;
        normal(x, PAGE * d);
        normal(q, PAGE * d);
        for (int t = 0; t < PAGE; t++) {
            double xx = 0, xq = 0, qq = 0;
            float *a = x + t * d, *b = q + t * d;
            for (int i = 0; i < d; i++) xx += (double)a[i] * a[i];
            for (int i = 0; i < d; i++) a[i] = (float)(a[i] / sqrt(xx)), xq += (double)a[i] * b[i];
            for (int i = 0; i < d; i++) b[i] -= (float)(xq * a[i]), qq += (double)b[i] * b[i];
            for (int i = 0; i < d; i++) b[i] = (float)(cosine * a[i] + sqrt(1 - cosine * cosine) * b[i] / sqrt(qq));
        }
        c->ops->encode(c, page, 0, PAGE, x, d);
        c->ops->decode(c, page, 0, PAGE, y, d);
        for (int t = 0; t < PAGE; t++) {
            double off = -cosine;
            for (int i = 0; i < d; i++) off += (double)q[t * d + i] * y[t * d + i];
            part += off / PAGE;
            square += off * off;
        }
        sum += part;
        by_seed += part * part;
        kv_free(page);
        kv_codec_free(c);
    }
    kv_free(x); kv_free(y); kv_free(q);
    const double mean = sum / n_seeds;
    return (inner){ mean, sqrt(square / n_seeds / PAGE), sqrt(fmax(0, by_seed / n_seeds - mean * mean) / n_seeds) };
}

/* Algorithm 2 is unbiased, with E (error)^2 = (pi/2 - <q,r>^2/|q|^2|r|^2) |q|^2 |r|^2 / d, about pi/2 D(b-1) / d; Theorem 2's bound is
 * sqrt(3) pi^2 / d 4^-b.  The residual has cosine 0 with a query of cosine 0. */
static void test_theorem(void)
{
    enum { D = 128 };
    static const struct { int bits; double rms; } published[] = { { 2, .755 }, { 3, .430 }, { 4, .233 } }, orthogonal[] = { { 2, .455 }, { 3, .257 }, { 4, .138 } };
    char params[128];
    for (int bits = 1; bits <= 5; bits++)
        for (int k = 0; k < 3; k++) {
            const double cosine = k == 0 ? 0 : k == 1 ? .3 : .7;
            snprintf(params, sizeof params, "bits=%d,norm=raw,residual=qjl", bits - 1);
            const inner e = inner_error(params, D, cosine, 80);
            double left = 1;
            if (bits > 1) kv_lloyd_max(bits - 1, D, NULL, &left);
            const double variance = M_PI / 2 * left / D, bound = sqrt(3) * M_PI * M_PI / D * pow(4, -bits);
            CHECK(fabs(e.mean) < 4 * e.of_mean + 1e-4, "prod-%d cosine %g: bias %.5f +- %.5f", bits, cosine, e.mean, e.of_mean);
            CHECK(bits == 1 || e.rms * e.rms < bound * 1.02, "prod-%d cosine %g: E error^2 %.3g is over Theorem 2's %.3g", bits, cosine, e.rms * e.rms, bound);
            if (bits == 1) {                             /* the sketch alone: exact at every cosine */
                const double exact = (M_PI / 2 - cosine * cosine) / D;
                CHECK(fabs(e.rms * e.rms / exact - 1) < .05, "qjl cosine %g: E error^2 %.4g, exact %.4g", cosine, e.rms * e.rms, exact);
            }
            if (k == 0) CHECK(fabs(e.rms * e.rms / variance - 1) < .05, "prod-%d: E error^2 %.4g, pi/2 D/d %.4g", bits, e.rms * e.rms, variance);
            if (k == 0 && bits >= 2 && bits <= 4) CHECK(fabs(e.rms * sqrt(D) / published[bits - 2].rms - 1) < .03, "prod-%d: rms*sqrt(d) %.4f, published %.3f", bits, e.rms * sqrt(D), published[bits - 2].rms);
        }
    for (int bits = 2; bits <= 4; bits++)
        for (int k = 0; k < 2; k++) {
            snprintf(params, sizeof params, "bits=%d,norm=raw,residual=%s", bits - 1, k ? "orthogonal" : "hadamard");
            const inner e = inner_error(params, D, 0, k ? 12 : 60), biased = inner_error(params, D, .7, k ? 12 : 60);
            CHECK(fabs(e.rms * sqrt(D) / orthogonal[bits - 2].rms - 1) < .04, "%s: rms*sqrt(d) %.4f, published %.3f", params, e.rms * sqrt(D), orthogonal[bits - 2].rms);
            CHECK(fabs(biased.mean) < 4 * biased.of_mean + .002, "%s: bias %.5f +- %.5f", params, biased.mean, biased.of_mean);
        }
    /* |r| as expected costs little and keeps no second scale. */
    for (int bits = 2; bits <= 4; bits++) {
        snprintf(params, sizeof params, "bits=%d,norm=raw,residual=qjl,gain=expected", bits - 1);
        const inner e = inner_error(params, D, 0, 80);
        CHECK(fabs(e.rms * sqrt(D) / published[bits - 2].rms - 1) < .03, "%s: rms*sqrt(d) %.4f, published %.3f", params, e.rms * sqrt(D), published[bits - 2].rms);
        kv_codec *c = codec(params, D, 64, 0);
        CHECK(c->page.scales == 128, "%s: %g bytes of scales", params, c->page.scales);
        kv_codec_free(c);
    }
}

/* Estimators without a sketch: rms*sqrt(d) at cosine 0 and what is lost at 0.7, 3 bits; and the sketches' there. */
static void test_estimators(void)
{
    enum { D = 128 };
    static const double raw[] = { .319, .181, .0956 }, unbiased[] = { .362, .188, .0967 };
    static const struct { const char *params; double bias, rms; } at7[] = {
        { "bits=3,norm=raw", -.0228, 0 }, { "bits=3,norm=matched", -.0118, 0 }, { "bits=3,norm=unbiased", 0, .133 }, { "bits=2,norm=raw,residual=qjl", 0, .417 }, { "bits=2,norm=raw,residual=hadamard", 0, .250 } };
    char params[64];
    for (int bits = 2; bits <= 4; bits++)
        for (int k = 0; k < 2; k++) {
            snprintf(params, sizeof params, "bits=%d,norm=%s", bits, k ? "unbiased" : "raw");
            const double got = inner_error(params, D, 0, 120).rms * sqrt(D), want = (k ? unbiased : raw)[bits - 2];
            CHECK(fabs(got / want - 1) < .03, "%s: rms*sqrt(d) %.4f, published %.4f", params, got, want);
        }
    for (int i = 0; i < 5; i++) {
        const inner e = inner_error(at7[i].params, D, .7, 120);
        CHECK(fabs(e.mean - at7[i].bias) < 4 * e.of_mean + 1.5e-3, "%s at cosine 0.7: bias %.4f +- %.4f, published %.4f", at7[i].params, e.mean, e.of_mean, at7[i].bias);
        CHECK(at7[i].rms == 0 || fabs(e.rms * sqrt(D) / at7[i].rms - 1) < .04, "%s at cosine 0.7: rms*sqrt(d) %.4f, published %.4f", at7[i].params, e.rms * sqrt(D), at7[i].rms);
    }
}

/* ---- reconstruction */
static double cosine_of(const char *params, int d, int n_pages, double *mse)
{
    enum { PAGE = 64 };
    kv_codec *c = codec(params, d, PAGE, KV_SIDE_V);
    float *x = kv_alloc(sizeof *x * PAGE * (size_t)d), *y = kv_alloc(sizeof *y * PAGE * (size_t)d);
    uint8_t *page = kv_zalloc(c->page_bytes);
    double cosine = 0, error = 0;
    for (int p = 0; p < n_pages; p++) {
        normal(x, PAGE * d);
        c->ops->encode(c, page, 0, PAGE, x, d);
        c->ops->decode(c, page, 0, PAGE, y, d);
        for (int t = 0; t < PAGE; t++) {
            double xx = 0, yy = 0, xy = 0;
            for (int i = 0; i < d; i++) {
                const double a = x[t * d + i], b = y[t * d + i];
                xx += a * a; yy += b * b; xy += a * b;
            }
            cosine += xy / sqrt(xx * yy) / n_pages / PAGE;
            error += (xx + yy - 2 * xy) / xx / n_pages / PAGE;
        }
    }
    kv_free(x); kv_free(y); kv_free(page); kv_codec_free(c);
    if (mse) *mse = error;
    return cosine;
}

/* Relative error, cosine and slope <x,x^>/<x,x> at d = 128, and stored bits, with and without the second rotation's signs: the slope is
 * 1 - D without, and 1 with the unbiased scale. */
static void test_second_rotation(void)
{
    static const struct { int bits; double plain[3], unbiased[3], mse[3]; } row[] = {      /* relative error, cosine, slope */
        { 1, { 3.60e-1, .7998, .647 }, { 0, 0, 0 }, { 0, 0, 0 } },
        { 2, { 1.15e-1, .9409, .894 }, { 6.54e-2, .9690, .997 }, { 4.17e-2, .9791, .960 } },
        { 3, { 3.38e-2, .9832, .966 }, { 1.92e-2, .9906, 1.001 }, { 1.22e-2, .9939, .988 } },
        { 4, { 9.28e-3, .99543, .993 }, { 5.26e-3, .9974, 1.000 }, { 3.35e-3, .9983, .998 } },
        { 5, { 2.45e-3, .99880, .997 }, { 1.39e-3, .99931, 1.000 }, { 8.8e-4, .99956, .999 } } };
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < (row[i].bits > 1 ? 3 : 1); k++) {
            static const char *const stage[] = { "", ",residual=hadamard", ",residual=hadamard,gain=lsq" };
            const double *want = k == 0 ? row[i].plain : k == 1 ? row[i].unbiased : row[i].mse;
            char params[96];
            double mse, left;
            snprintf(params, sizeof params, "bits=%d,norm=raw%s", row[i].bits, stage[k]);
            const double cosine = cosine_of(params, 128, 60, &mse);
            const inner e = inner_error(params, 128, .999, 40);                            /* slope - 1 at cosine 1 */
            kv_lloyd_max(row[i].bits, 128, NULL, &left);
            CHECK(fabs(mse / want[0] - 1) < .05, "%s: relative error %.3g, published %.3g", params, mse, want[0]);
            CHECK(k == 2 || fabs(mse / (k ? (M_PI / 2 - 1) * left : left) - 1) < .02, "%s: relative error %.4g, closed form %.4g", params, mse, k ? (M_PI / 2 - 1) * left : left);
            CHECK(fabs((1 - cosine) / (1 - want[1]) - 1) < .06, "%s: cosine %.5f, published %.5f", params, cosine, want[1]);
            CHECK(fabs(1 + e.mean / .999 - want[2]) < .012, "%s: slope %.4f, published %.3f", params, 1 + e.mean / .999, want[2]);
            CHECK(k == 2 || fabs(e.mean / .999 + (k ? 0 : left)) < 4 * e.of_mean + 2e-3, "%s: slope %.4f, closed form %.4f", params, 1 + e.mean / .999, 1 - (k ? 0 : left));
            kv_codec *c = codec(params, 128, 64, 0);
            CHECK(8.0 * (double)c->page_bytes / 64 / 128 == row[i].bits + (k ? 1.25 : .125), "%s: %zu bytes", params, c->page_bytes);
            kv_codec_free(c);
        }
    double mse, plain;                                                                     /* the factor's search at d = 64: .0102 to .0081 */
    cosine_of("bits=4,norm=lsq", 64, 60, &plain);
    cosine_of("bits=4,norm=lsq,search=9", 64, 60, &mse);
    CHECK(fabs(mse / plain / (.0081 / .0102) - 1) < .05, "d=64, 4 bits: the search takes the relative error from %.5f to %.5f", plain, mse);
}

static void test_reconstruction(void)
{
    char params[128];
    double mse, want;
    /* One bit by least squares leaves 1 - 2/pi of a Gaussian residual; Lloyd's codebook of b bits leaves a residual that is nearly
     * uniform in its cells, where a sign leaves 1/4. */
    for (int bits = 1; bits <= 4; bits++) {
        kv_lloyd_max(bits, 128, NULL, &want);
        snprintf(params, sizeof params, "bits=%d,norm=raw,residual=hadamard,gain=lsq", bits);
        cosine_of(params, 128, 40, &mse);
        CHECK(fabs(mse / (want * (1 - 2 / M_PI)) - 1) < .03, "%s: relative MSE %.5f, expected %.5f", params, mse, want * (1 - 2 / M_PI));
        snprintf(params, sizeof params, "bits=%d,norm=raw,residual=sign,gain=lsq", bits);
        cosine_of(params, 128, 40, &mse);
        CHECK(mse < want * .45 && mse > want * .25, "%s: relative MSE %.5f of %.5f", params, mse, want);
    }
    /* Equal steps of the best size, and the factor's search: published 1 - cosine at d = 128. */
    static const double uniform[] = { .0596, .0176, .0049 }, searched[] = { .0588, .0159, .0039 };
    for (int bits = 2; bits <= 4; bits++) {
        snprintf(params, sizeof params, "bits=%d,codebook=uniform,norm=lsq,search=33", bits);
        double off = 1 - cosine_of(params, 128, 60, NULL);
        CHECK(off < uniform[bits - 2] * 1.04, "%s: 1 - cosine %.5f, published %.4f", params, off, uniform[bits - 2]);
        snprintf(params, sizeof params, "bits=%d,norm=lsq,search=%d", bits, bits == 2 ? 9 : 17);
        off = 1 - cosine_of(params, 128, 60, NULL);
        CHECK(fabs(off / searched[bits - 2] - 1) < .03, "%s: 1 - cosine %.5f, published %.4f", params, off, searched[bits - 2]);
    }
    for (int bits = 1; bits <= 8; bits++) {
        double g[256], lloyd;
        kv_uniform_best(bits, g, &want);
        kv_lloyd_max(bits, 0, NULL, &lloyd);
        CHECK(want >= lloyd * (1 - 1e-9) && want < lloyd * 2.2, "equal steps of %d bits: distortion %.3g, Lloyd's %.3g", bits, want, lloyd);
    }
    double g[256], d2;
    kv_uniform_best(2, g, &d2);          /* Max 1960, table II: steps 0.9957 and 0.5860, errors 0.1188 and 0.03744 */
    CHECK(fabs(2 * g[2] - .9957) < 1e-3 && fabs(d2 - .1188) < 1e-4, "equal steps, 2 bits: %.4f, %.4f", 2 * g[2], d2);
    kv_uniform_best(3, g, &d2);
    CHECK(fabs(2 * g[4] - .5860) < 1e-3 && fabs(d2 - .03744) < 1e-5, "equal steps, 3 bits: %.4f, %.5f", 2 * g[4], d2);
}

/* ---- outlier channels: constant channels of size 60 no longer spoil those outside their set, and every byte is counted */
static void test_outliers(void)
{
    enum { D = 128, PAGE = 64 };
    float x[PAGE * D], y[PAGE * D];
    normal(x, PAGE * D);
    for (int t = 0; t < PAGE; t++)
        for (int k = 0; k < 6; k++) x[t * D + 7 + 19 * k] += k % 2 ? 60 : -60;
    double error[2];
    for (int k = 0; k < 2; k++) {
        kv_codec *c = codec(k ? "bits=3,norm=raw,outliers=32,outlier_bits=4" : "bits=3,norm=raw", D, PAGE, KV_SIDE_K);
        uint8_t *page = kv_zalloc(c->page_bytes);
        c->ops->encode(c, page, 0, PAGE, x, D);
        c->ops->decode(c, page, 0, PAGE, y, D);
        error[k] = 0;
        const uint8_t *set = page + PAGE * (32 * 4 + 96 * 3) / 8;
        for (int i = 0; i < D; i++) {
            const bool ordinary = k ? !(set[i / 8] >> i % 8 & 1) : i < 7 || i > 7 + 19 * 5 || (i - 7) % 19;
            for (int t = 0; t < PAGE && ordinary; t++) error[k] += pow(x[t * D + i] - y[t * D + i], 2) / PAGE / (k ? 96 : D - 6);
        }
        if (k) {
            CHECK(c->page.codes == PAGE * (32 * 4 + 96 * 3) / 8 && c->page.outliers == D / 8 && c->page.scales == 2 * 2 * PAGE && c->granule == PAGE, "3.5 bits: codes %g, set %g, scales %g",
                  c->page.codes, c->page.outliers, c->page.scales);
            CHECK(fabs(c->bits_nominal - 3.25) < 1e-12 && fabs(8.0 * (double)c->page_bytes / PAGE / D - 3.5) < .07, "3.5 bits: nominal %g, stored %g", c->bits_nominal, 8.0 * (double)c->page_bytes / PAGE / D);
            for (int ch = 0; ch < 6; ch++) CHECK(set[(7 + 19 * ch) / 8] >> (7 + 19 * ch) % 8 & 1, "channel %d is not among the outliers", 7 + 19 * ch);
        }
        kv_free(page);
        kv_codec_free(c);
    }
    /* Channels of equal norm: as many as asked for all the same, the lowest. */
    kv_codec *c = codec("bits=2,outliers=32,outlier_bits=3", D, PAGE, KV_SIDE_K);
    uint8_t *page = kv_zalloc(c->page_bytes);
    for (int i = 0; i < PAGE * D; i++) x[i] = i % 2 ? 1 : -1;
    c->ops->encode(c, page, 0, PAGE, x, D);
    const uint8_t *set = page + PAGE * (32 * 3 + 96 * 2) / 8;
    for (int i = 0; i < D; i++) CHECK((set[i / 8] >> i % 8 & 1) == (i < 32), "equal channels: channel %d %s among the outliers", i, i < 32 ? "is not" : "is");
    kv_free(page);
    kv_codec_free(c);
    CHECK(error[0] > 3 && error[1] < .05, "error of ordinary channels beside outliers: %.3f apart, %.3f together", error[1], error[0]);
}

/* ---- calibrated tables, from rows */
static kv_codec *fitted(const char *params, int d, int side, float *x, int n)
{
    const kv_tensor t = { .data = x, .dtype = KV_F32, .ndim = 2, .shape = { n, d }, .stride = { d, 1 } };
    kv_codec *c = NULL;
    if (kv_codec_fit(&c, "scalar", params, d, 64, side, &t, NULL) < 0) { CHECK(0, "%s: %s", params, kv_last_error()); abort(); }
    return c;
}

static double error_on(const kv_codec *c, const float *x, int n)
{
    double ee = 0, xx = 0;
    uint8_t *page = kv_zalloc(c->page_bytes);
    float y[64 * 64];
    for (int t = 0; t + 64 <= n; t += 64) {
        c->ops->encode(c, page, 0, 64, x + t * 64, 64);
        c->ops->decode(c, page, 0, 64, y, 64);
        for (int i = 0; i < 64 * 64; i++) ee += pow((double)x[t * 64 + i] - y[i], 2), xx += pow(x[t * 64 + i], 2);
    }
    kv_free(page);
    return ee / xx;
}

static void test_tables(void)
{
    enum { D = 64, N = 1024 };
    static float x[N * D];
    normal(x, N * D);
    kv_codec *c = fitted("bits=3,codebook=calibrated", D, 0, x, N);
    const float *table = c->blob;
    double g[256];
    kv_lloyd_max(3, D, g, NULL);
    for (int i = 0; i < 8; i++) CHECK(fabs(table[i] - g[i]) < .03, "calibrated on white noise, level %d: %.4f, exact %.4f", i, table[i], g[i]);
    kv_codec_free(c);

    for (int i = 0; i < N * D; i++) x[i] *= expf(1.5f * sinf((float)(i % D)) );      /* unequal channels */
    c = fitted("bits=3,scale=calibrated,norm=lsq", D, 1, x, N);
    kv_codec *plain = codec("bits=3,norm=lsq", D, 64, 1);
    const double with = error_on(c, x, N), without = error_on(plain, x, N);
    CHECK(with < .85 * without, "calibrated factors: relative MSE %.4f, %.4f without", with, without);
    kv_codec_free(plain);
    /* Tables from outside. */
    const void *blob;
    double bytes;
    kv_codec_blob(c, &blob, &bytes);
    float bad[2 * D];
    kv_codec *again;
    CHECK(kv_codec_new_calibrated(&again, "scalar", "bits=3,scale=calibrated,norm=lsq", D, 64, 1, blob, bytes) == KV_OK && !memcmp(again->blob, blob, (size_t)bytes), "tables do not read back");
    kv_codec_free(again);
    for (int k = 0; k < 4; k++) {
        memcpy(bad, blob, sizeof bad);
        if (k < 3) bad[k * 20] = k == 0 ? NAN : k == 1 ? -1 : 2;
        CHECK(kv_codec_new_calibrated(&again, "scalar", "bits=3,scale=calibrated", D, 64, 1, bad, k == 3 ? bytes - 4 : bytes) == KV_E_CORRUPT, "bad factors pass (%d)", k);
    }
    CHECK(kv_codec_new_calibrated(&again, "scalar", "bits=3,codebook=calibrated", D, 64, 1, bad, 32) == KV_E_CORRUPT, "bad codebook passes");
    CHECK(kv_codec_new_calibrated(&again, "scalar", "bits=3,outliers=16,pick=calibrated", D, 64, 1, bad, 128) == KV_E_CORRUPT, "bad order passes");
    CHECK(kv_codec_new_calibrated(&again, "scalar", "bits=3", D, 64, 1, blob, bytes) == KV_E_CORRUPT, "tables that nothing asked for pass");
    CHECK(kv_codec_new(&again, "scalar", "codebook=calibrated", D, 64, 1) == KV_E_UNCALIBRATED, "a calibrated codebook from nothing");
    kv_codec_free(c);
    c = fitted("bits=2,outliers=16,pick=calibrated", D, 0, x, N);
    CHECK(c->granule == 1 && c->page.outliers == 0, "calibrated outliers: granule %d", c->granule);
    kv_codec_free(c);
}

/* ---- attention on codes of every composition; bytes alike at every level and in any split: what test_codecs samples */
static void attention_case(const char *params, int d, int pt, int side, int n, int n_q)
{
    kv_codec *c = NULL;
    if (kv_codec_new_nominal(&c, "scalar", params, d, pt, side) < 0) { CHECK(0, "%s: %s", params, kv_last_error()); return; }
    float *x = kv_alloc(sizeof *x * (size_t)(pt * d)), *y = kv_alloc(sizeof *y * (size_t)(pt * d)), *q = kv_alloc(sizeof *q * (size_t)(n_q * d)), *s = kv_alloc(sizeof *s * (size_t)(n_q * pt));
    float *acc = kv_alloc(sizeof *acc * (size_t)(n_q * c->space_dim)), *out = kv_alloc(sizeof *out * (size_t)(n_q * d));
    uint8_t *page = kv_zalloc(c->page_bytes), *want = kv_zalloc(c->page_bytes), *prepared = kv_alloc(c->query_bytes * (size_t)n_q);
    normal(x, pt * d);
    normal(q, n_q * d);
    for (int i = 0; i < pt * d; i++) x[i] *= i % d % 7 == 3 ? 9.0f : expf((float)(i / d % 5) - 2);
    for (int l = 0; l <= kv_cpu_simd_max(); l++) {
        kv_cpu_limit(l);
        memset(page, 0, c->page_bytes);
        for (int t = 0; t < pt; t += c->granule) c->ops->encode(c, page, t, c->granule, x + t * d, d);
        if (l == 0) memcpy(want, page, c->page_bytes);
        CHECK(!memcmp(page, want, c->page_bytes), "%s d=%d side=%d: level %d writes other bytes", params, d, side, l);
        c->ops->decode(c, page, 0, pt, y, d);
        double worst = 0;
        if (side == KV_SIDE_K) {
            c->ops->query(c, q, d, n_q, prepared);
            c->ops->dot(c, page, n, prepared, n_q, s, pt);
            for (int g = 0; g < n_q; g++)
                for (int t = 0; t < n; t++) {
                    double dot = 0, qq = 0, yy = 0;
                    for (int i = 0; i < d; i++) { const double a = q[g * d + i], b = y[t * d + i]; dot += a * b; qq += a * a; yy += b * b; }
                    worst = fmax(worst, fabs(s[g * pt + t] - dot) / sqrt(qq * yy));
                }
        } else {
            for (int i = 0; i < n_q * pt; i++) s[i] = expf(-(float)(i * 37 % 101) / 9);
            memset(acc, 0, sizeof *acc * (size_t)(n_q * c->space_dim));
            c->ops->accumulate(c, page, n, s, pt, n_q, acc);
            c->ops->output(c, acc, n_q, out, d);
            for (int g = 0; g < n_q; g++) {
                double ee = 0, ww = 0;
                for (int i = 0; i < d; i++) {
                    double sum = 0;
                    for (int t = 0; t < n; t++) sum += (double)s[g * pt + t] * y[t * d + i];
                    ee += pow(out[g * d + i] - sum, 2);
                    ww += sum * sum;
                }
                worst = fmax(worst, sqrt(ee / ww));
            }
        }
        CHECK(worst < 2e-4, "%s d=%d side=%d n=%d level %d: off by %.2g", params, d, side, n, l, worst);
        for (size_t i = 0; i < c->page_bytes; i++) page[i] = (uint8_t)(i * 2654435761u >> 13);      /* hostile: no access outside */
        c->ops->decode(c, page, 0, pt, y, d);
        c->ops->query(c, q, d, n_q, prepared);
        if (side == KV_SIDE_K) c->ops->dot(c, page, n, prepared, n_q, s, pt);
        else c->ops->accumulate(c, page, n, s, pt, n_q, acc);
    }
    kv_free(x); kv_free(y); kv_free(q); kv_free(s); kv_free(acc); kv_free(out); kv_free(page); kv_free(want); kv_free(prepared);
    kv_codec_free(c);
}

static void test_attention(void)
{
    static const char *const compositions[] = {
        "bits=0,residual=qjl", "bits=0,residual=hadamard,gain=lsq", "bits=2,residual=qjl", "bits=3,residual=orthogonal,norm=lsq", "bits=5,residual=hadamard,gain=expected",
        "bits=1,residual=sign,gain=lsq,rotation=none", "bits=2,outliers=16,outlier_bits=3", "bits=3,outliers=32,outlier_bits=4,residual=hadamard", "bits=0,outliers=8,outlier_bits=8,residual=qjl,gain=expected",
        "bits=2,outliers=16,outlier_bits=3,pick=calibrated,residual=qjl", "bits=3,scale=calibrated", "bits=4,codebook=calibrated,residual=sign", "bits=8,codebook=uniform,search=5", "bits=6,codebook=calibrated,scale=calibrated" };
    static const struct { int d, page; } shape[] = { { 64, 64 }, { 80, 24 }, { 128, 72 }, { 40, 8 }, { 512, 16 } };
    for (int k = 0; k < (int)(sizeof compositions / sizeof *compositions); k++)
        for (int i = 0; i < 4; i++)
            for (int side = 0; side < 2; side++) attention_case(compositions[k], shape[i].d, shape[i].page, side, i % 2 ? shape[i].page - 3 : shape[i].page, 1 + (k + 2 * i) % 7);
    attention_case("bits=2,outliers=256,outlier_bits=3,residual=hadamard", 512, 16, KV_SIDE_K, 16, 5);
    attention_case("bits=2,outliers=256,outlier_bits=3,residual=hadamard", 512, 16, KV_SIDE_V, 13, 5);
}

static void test_refusals(void)
{
    static const struct { const char *params, *want; } bad[] = {
        { "bits=0", "codec 'scalar': bits=0 needs a residual (qjl, orthogonal, hadamard)" }, { "bits=0,residual=sign", "bits=0 needs a residual" },
        { "outliers=60", "codec 'scalar': outliers=60 of head_dim=64 is not an even number in 8..56" }, { "outliers=9", "not an even number in 8..56" },
        { "outliers=16,scale=calibrated", "scale=calibrated with outliers" }, { "outliers=16,codebook=calibrated", "codebook=calibrated with outliers" } };
    for (int i = 0; i < (int)(sizeof bad / sizeof *bad); i++) {
        kv_codec *c;
        CHECK(kv_codec_new(&c, "scalar", bad[i].params, 64, 64, 0) == KV_E_PARAM && strstr(kv_last_error(), bad[i].want), "%s: %s", bad[i].params, kv_last_error());
    }
}

int main(void)
{
    printf("seed %u, levels 0..%d\n", SEED, kv_cpu_simd_max());
    test_refusals();
    test_attention();
    kv_cpu_limit(KV_SIMD_AMX);
    test_theorem();
    test_estimators();
    test_second_rotation();
    test_reconstruction();
    test_outliers();
    test_tables();
    return check_end();
}
