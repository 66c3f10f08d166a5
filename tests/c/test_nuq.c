/* test_nuq.c -- calibrated levels against closed forms: the k-means finds Lloyd-Max levels, outliers are exact and bounded,
 * channels get their own range, damaged tables are refused. */
#include <math.h>
#include "check.h"
#include "codec.h"

enum { D = 64, P = 64, N = 4096 };
static float x[N * D], y[P * D];

static kv_codec *fit(const char *params, int side)
{
    kv_codec *c = NULL;
    const kv_tensor t = { .data = x, .dtype = KV_F32, .ndim = 2, .shape = { N, D }, .stride = { D, 1 } };
    CHECK(kv_codec_fit(&c, "nuq", params, D, P, side, &t, NULL) == KV_OK, "%s: %s", params, kv_last_error());
    return c;
}

/* Relative error over the first `pages` pages of x. */
static double error_of(const kv_codec *c, int pages)
{
    double e = 0, n = 0;
    uint8_t *page = kv_alloc(c->page_bytes);
    for (int p = 0; p < pages; p++) {
        const float *from = x + (size_t)p * P * D;
        memset(page, 0, c->page_bytes);
        c->ops->encode(c, page, 0, P, from, D);
        c->ops->decode(c, page, 0, P, y, D);
        for (int i = 0; i < P * D; i++) e += pow((double)from[i] - y[i], 2), n += (double)from[i] * from[i];
    }
    kv_free(page);
    return e / n;
}

/* Unit Gaussian channels of very different size: what Lloyd-Max reaches in each (0.1175, 0.0345, 0.0095: Max 1960), less what
 * leaving the tails to the outliers saves, plus what clipping them costs without. */
static void gaussian_channels(void)
{
    static const double lloyd_max[] = { 0.11748, 0.03454, 0.009497 };
    kv_rng_normal(21, 0, 0, N * D, x);
    for (int i = 0; i < N * D; i++) x[i] *= i % D == 7 ? 3.0f : i % D == 9 ? 1e-3f : 1.0f;
    for (int bits = 2; bits <= 4; bits++) {
        char dense[40], sparse[40];
        snprintf(dense, sizeof dense, "bits=%d,outliers=0", bits);
        snprintf(sparse, sizeof sparse, "bits=%d", bits);
        kv_codec *a = fit(dense, KV_SIDE_K), *b = fit(sparse, KV_SIDE_K);
        if (!a || !b) return;
        const double ea = error_of(a, 16), eb = error_of(b, 16);
        printf("%d bits, Gaussian channels: dense %.4f, with outliers %.4f, Lloyd-Max %.4f\n", bits, ea, eb, lloyd_max[bits - 2]);
        CHECK(fabs(ea / lloyd_max[bits - 2] - 1) < 0.15, "%d bits: %g", bits, ea);
        CHECK(eb < 0.95 * ea, "%d bits: 1 %% of outliers leaves %g of %g", bits, eb, ea);
        kv_codec_free(a);
        kv_codec_free(b);
    }
}

/* Few large values among small ones: all of them are in the list, so the error is that of the small ones and of f16. */
static void outliers(void)
{
    kv_rng_normal(22, 0, 0, N * D, x);
    for (int i = 0; i < N * D; i++) if (i % 199 == 3) x[i] *= 50;
    for (int side = 0; side < 2; side++) {
        kv_codec *c = fit("bits=4", side);
        if (!c) return;
        uint8_t *page = kv_zalloc(c->page_bytes);
        c->ops->encode(c, page, 0, P, x, D);
        c->ops->decode(c, page, 0, P, y, D);
        double worst = 0;
        for (int i = 3; i < P * D; i += 199) if (fabsf(x[i]) > 5) worst = fmax(worst, fabs(x[i] - y[i]) / fabs(x[i]));
        CHECK(worst < 0x1p-11, "side %d: an outlier is %g off", side, worst);
        CHECK(c->page.outliers == 4 * (2 + 4 * 11), "side %d: %g bytes of lists", side, c->page.outliers);   /* 1 % of 16 x 64 is 10.24 */
        kv_free(page);
        kv_codec_free(c);
    }
}

/* More values out of range than the list holds, all of one size: it is full and no fuller, the others saturate, K and V. */
static void ties(void)
{
    kv_rng_normal(25, 0, 0, N * D, x);
    for (int side = 0; side < 2; side++) {
        kv_codec *c = fit("bits=3", side);
        if (!c) return;
        uint8_t *page = kv_zalloc(c->page_bytes);
        float same[P * D];
        for (int i = 0; i < P * D; i++) same[i] = i % 5 ? 0.1f : i % 2 ? 1000.0f : -1000.0f;
        c->ops->encode(c, page, 0, P, same, D);
        c->ops->decode(c, page, 0, P, y, D);
        const size_t lists = (size_t)c->page_tokens * D * 3 / 8 + (side ? 4 * (size_t)P : 0);
        int exact = 0;
        for (int k = 0; k < 4; k++) CHECK(kv_load_u16(page + lists + (size_t)k * 46) == 11, "side %d: list %d has %d entries of 11", side, k, kv_load_u16(page + lists + (size_t)k * 46));
        for (int i = 0; i < P * D; i += 5) exact += y[i] == same[i];
        CHECK(exact >= 44, "side %d: %d of 44 places keep their value", side, exact);
        kv_free(page);
        kv_codec_free(c);
    }
}

static void tables(void)
{
    kv_rng_normal(23, 0, 0, N * D, x);
    kv_codec *c = fit("bits=3", KV_SIDE_K), *again;
    const void *blob;
    double bytes;
    if (!c) return;
    CHECK(kv_codec_blob(c, &blob, &bytes) == KV_OK && bytes == 4 * (8 + 2 * D), "%g bytes of tables", bytes);
    CHECK(kv_codec_new_calibrated(&again, "nuq", c->text, D, P, KV_SIDE_K, blob, bytes) == KV_OK, "%s", kv_last_error());
    kv_codec_free(again);
    CHECK(kv_codec_new_calibrated(&again, "nuq", "bits=4", D, P, KV_SIDE_K, blob, bytes) == KV_E_CORRUPT, "tables of another width");
    static const struct { int at; float value; } damage[] = { { 0, NAN }, { 3, 5 }, { 8, INFINITY }, { 8 + D, 0 }, { 8 + D, -1 } };
    for (int i = 0; i < 5; i++) {
        float bad[8 + 2 * D];
        memcpy(bad, blob, sizeof bad);
        bad[damage[i].at] = damage[i].value;
        CHECK(kv_codec_new_calibrated(&again, "nuq", "bits=3", D, P, KV_SIDE_K, bad, sizeof bad) == KV_E_CORRUPT && !again, "damage %d: %s", i, kv_last_error());
    }
    CHECK(kv_codec_new(&again, "nuq", "", D, P, 0) == KV_E_UNCALIBRATED, "made without tables");
    CHECK(kv_codec_new_nominal(&again, "nuq", "span=24", D, P, 0) == KV_E_PARAM && strstr(kv_last_error(), "span=24 is not a multiple of 8 that divides page_tokens=64"), "%s", kv_last_error());
    kv_codec_free(c);
}

/* k-means levels beat even ones where values are not even. */
static void levels(void)
{
    kv_rng_normal(24, 0, 0, N * D, x);
    for (int side = 0; side < 2; side++) {
        kv_codec *a = fit("bits=3", side), *b = fit("bits=3,levels=uniform", side);
        if (!a || !b) return;
        const double ea = error_of(a, 16), eb = error_of(b, 16);
        printf("side %d, 3 bits and 1 %%: k-means %.4f, even levels %.4f\n", side, ea, eb);
        CHECK(ea < eb, "side %d: %g, even levels %g", side, ea, eb);
        kv_codec_free(a);
        kv_codec_free(b);
    }
}

int main(void)
{
    printf("seeds 21-25; simd %d\n", kv_cpu_simd());
    gaussian_channels();
    outliers();
    ties();
    tables();
    levels();
    return check_end();
}
