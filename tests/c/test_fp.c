/* test_fp.c -- small floating-point numbers against the published formats: tests/golden/fp_grids.py made the values, with
 * ml_dtypes and numpy.  Every SIMD level; attention itself is test_codecs.c's. */
#include <math.h>
#include "check.h"
#include "codecs/fp_rows.h"

enum { ROWS = 32, DIM = 64 };

static kv_codec *make(const char *params, int dim, int page)
{
    kv_codec *c = NULL;
    CHECK(kv_codec_new(&c, "fp", params, dim, page, KV_SIDE_K) == KV_OK, "%s: %s", params, kv_last_error());
    return c;
}

static int same(float a, float b) { return isnan(a) ? isnan(b) : kv_f32_bits(a) == kv_f32_bits(b); }

static void read_all(FILE *f, void *to, size_t n) { CHECK(fread(to, 1, n, f) == n, "golden file is short"); }

/* Codes 0..255 in the first row of a page decode to the grid's numbers, NaN and infinities included. */
static void grid_values(FILE *f, const char *params, int kind, int n)
{
    float want[256], got[512], direct[256];
    uint8_t all[256];
    read_all(f, want, (size_t)n * 4);
    for (int i = 0; i < 256; i++) all[i] = (uint8_t)i;
    for (int level = 0; level <= kv_cpu_simd_max(); level++) {
        if (kv_cpu_limit(level) != level) continue;
        if (kind >= FP_E4M3) {
            fp_values(kind, all, n, direct);
            for (int i = 0; i < n; i++) CHECK(same(direct[i], want[i]), "kind %d simd=%d: code %d is %g, want %g", kind, level, i, direct[i], want[i]);
        }
        if (!params) continue;
        kv_codec *c = make(params, 256, 8);
        if (!c) continue;
        uint8_t *page = kv_zalloc(c->page_bytes);
        for (int i = 0; i < 256; i++) page[i] = (uint8_t)(n == 256 ? i : (i % 8 * 2 + 1) << 4 | i % 8 * 2);
        c->ops->decode(c, page, 0, n == 256 ? 1 : 2, got, 256);
        for (int i = 0; i < 256; i++) CHECK(same(got[i], want[i % n]), "%s simd=%d: code %d is %g, want %g", params, level, i % n, got[i], want[i % n]);
        kv_free(page);
        kv_codec_free(c);
    }
}

static void rounding(FILE *f)
{
    static const char *const params[] = { "grid=e4m3", "grid=e5m2", "grid=e2m1" };
    uint32_t n;
    read_all(f, &n, 4);
    const int n_rows = (int)(n + DIM - 1) / DIM, page_tokens = (int)kv_round_up((size_t)n_rows, 8);
    float *x = kv_zalloc((size_t)page_tokens * DIM * 4);
    uint8_t *want = kv_zalloc((size_t)page_tokens * DIM);
    read_all(f, x, 4 * (size_t)n);
    for (int g = 0; g < 3; g++) {
        read_all(f, want, n);
        for (int level = 0; level <= kv_cpu_simd_max(); level++) {
            if (kv_cpu_limit(level) != level) continue;
            kv_codec *c = make(params[g], DIM, page_tokens);
            if (!c) continue;
            uint8_t *page = kv_zalloc(c->page_bytes);
            c->ops->encode(c, page, 0, page_tokens, x, DIM);
            int wrong = 0;
            for (uint32_t i = 0; i < n; i++) {
                const int code = g < 2 ? page[i] : page[i / 2] >> i % 2 * 4 & 15;
                if (code != want[i] && wrong++ < 5) CHECK(0, "%s simd=%d: %.9g became %#x, want %#x", params[g], level, x[i], code, want[i]);
            }
            CHECK(wrong == 0, "%s simd=%d: %d of %u rounded otherwise", params[g], level, wrong, n);
            kv_free(page);
            kv_codec_free(c);
        }
    }
    kv_free(x);
    kv_free(want);
}

static void rows(FILE *f)
{
    static const struct { const char *params; int codes, scales; } format[] = {
        { "grid=e4m3,block=e8m0", DIM, 2 }, { "grid=e5m2,block=e8m0", DIM, 2 }, { "grid=e2m1,block=e8m0", DIM / 2, 2 }, { "grid=e2m1,block=e4m3,group=16,value=0.25", DIM / 2, 4 } };
    static float x[ROWS * DIM], y[ROWS * DIM], want_y[ROWS * DIM];
    static uint8_t want[ROWS * DIM];
    read_all(f, x, sizeof x);
    for (int i = 0; i < 4; i++) {
        const size_t codes = (size_t)ROWS * (size_t)format[i].codes, scales = (size_t)ROWS * (size_t)format[i].scales;
        uint8_t want_scale[ROWS * 4];
        read_all(f, want, codes);
        read_all(f, want_scale, scales);
        read_all(f, want_y, sizeof want_y);
        for (int level = 0; level <= kv_cpu_simd_max(); level++) {
            if (kv_cpu_limit(level) != level) continue;
            kv_codec *c = make(format[i].params, DIM, ROWS);
            if (!c) continue;
            uint8_t *page = kv_zalloc(c->page_bytes);
            c->ops->encode(c, page, 0, ROWS, x, DIM);
            CHECK(memcmp(page + codes, want_scale, scales) == 0, "%s simd=%d: other group scales", format[i].params, level);
            CHECK(memcmp(page, want, codes) == 0, "%s simd=%d: other codes", format[i].params, level);
            c->ops->decode(c, page, 0, ROWS, y, DIM);
            CHECK(memcmp(y, want_y, sizeof y) == 0, "%s simd=%d: other values", format[i].params, level);
            kv_free(page);
            kv_codec_free(c);
        }
    }
}

/* Relative error of n unit Gaussian rows times `by`. */
static double error_of(const char *params, float by)
{
    enum { P = 512 };
    static float x[P * DIM], y[P * DIM];
    kv_codec *c = make(params, DIM, P);
    if (!c) return NAN;
    uint8_t *page = kv_zalloc(c->page_bytes);
    kv_rng_normal(3, 1, 0, P * DIM, x);
    for (int i = 0; i < P * DIM; i++) x[i] *= by;
    c->ops->encode(c, page, 0, P, x, DIM);
    c->ops->decode(c, page, 0, P, y, DIM);
    double e = 0, n = 0;
    for (int i = 0; i < P * DIM; i++) e += pow((double)x[i] - y[i], 2), n += (double)x[i] * x[i];
    kv_free(page);
    kv_codec_free(c);
    return e / n;
}

/* Distortion of unit Gaussians as published (0.00904 NVFP4, 0.01323 MXFP4, 0.00071 FP8: relative MSE), and where scales help. */
static void distortion(void)
{
    const double fp8 = error_of("", 1), mx8 = error_of("block=e8m0", 1), mx4 = error_of("grid=e2m1,block=e8m0", 1), nv4 = error_of("grid=e2m1,block=e4m3,group=16", 1);
    printf("relative MSE on N(0,1): fp8-e4m3 %.5f, e5m2 %.5f, mxfp8 %.5f, mxfp4 %.5f, nvfp4 %.5f\n", fp8, error_of("grid=e5m2", 1), mx8, mx4, nv4);
    CHECK(fabs(fp8 / 0.00071 - 1) < 0.05, "fp8 %g", fp8);
    CHECK(fabs(mx4 / 0.01323 - 1) < 0.05, "mxfp4 %g", mx4);
    CHECK(fabs(nv4 / 0.00904 - 1) < 0.05, "nvfp4 %g", nv4);
    CHECK(error_of("", 1e6f) > 0.9 && error_of("scale=token", 1e6f) < 0.001, "a static scale saturates, a token's does not");
    CHECK(fabs(error_of("value=0.5", 0.5f) - fp8) < 1e-12, "a static scale is a change of units");
    CHECK(fabs(error_of("block=e8m0", 0x1p60f) - mx8) < 1e-12, "e8m0 scales do not feel a power of two");
}

/* Group scales below e4m3's normal numbers are coarse, and under its smallest there is only 0: codes of a byte keep what they can. */
static void small_groups(void)
{
    for (float by = 1; by > 4e-3f; by /= 2) {
        const double e4m3 = error_of("grid=e4m3,block=e4m3,group=16", by), e5m2 = error_of("grid=e5m2,block=e4m3,group=16", by);
        CHECK(e4m3 < 0.03 && e5m2 < 0.06, "rows of %g: relative error %.4f with e4m3, %.4f with e5m2", (double)by, e4m3, e5m2);
    }
}

/* A scale for each layer and head, from rows: rows of any size are as near as with a token's own, and no page holds it. */
static void head_scale(void)
{
    enum { N = 1024, P = 64 };
    static float x[N * DIM], y[P * DIM];
    static const struct { const char *params, *twin; double spare, over; } format[] = {
        { "grid=e4m3", "grid=e4m3,scale=token", 2, 448 }, { "grid=e5m2", "grid=e5m2,scale=token", 2, 57344 }, { "grid=e2m1", "grid=e2m1,scale=token", 1, 6 },
        { "grid=e2m1,block=e4m3,group=16", "grid=e2m1,block=e4m3,group=16,scale=token", 2, 448 * 6 } };
    for (int i = 0; i < 8; i++) {
        const float by = i % 2 ? 3e-5f : 7e6f;
        double amax = 0, ee = 0, xx = 0;
        char text[100];
        kv_codec *c = NULL, *again;
        kv_rng_normal(4, i, 0, N * DIM, x);
        for (int k = 0; k < N * DIM; k++) amax = fmax(amax, fabs((double)(x[k] *= by)));
        const kv_tensor t = { .data = x, .dtype = KV_F32, .ndim = 2, .shape = { N, DIM }, .stride = { DIM, 1 } };
        snprintf(text, sizeof text, "%s,scale=head", format[i / 2].params);
        CHECK(kv_codec_fit(&c, "fp", text, DIM, P, KV_SIDE_K, &t, NULL) == KV_OK, "%s: %s", text, kv_last_error());
        if (!c) continue;
        const void *blob;
        double bytes, want = format[i / 2].spare * amax / format[i / 2].over;
        CHECK(kv_codec_blob(c, &blob, &bytes) == KV_OK && bytes == 4 && fabs(*(const float *)blob / want - 1) < 1e-6, "%s: the table holds %g, want %g", text, *(const float *)blob, want);
        kv_codec *plain = make(format[i / 2].params, DIM, P);
        CHECK(plain && c->page_bytes == plain->page_bytes, "%s: %zu bytes", text, c->page_bytes);
        uint8_t *page = kv_zalloc(c->page_bytes);
        c->ops->encode(c, page, 0, P, x, DIM);
        c->ops->decode(c, page, 0, P, y, DIM);
        for (int k = 0; k < P * DIM; k++) ee += pow((double)x[k] - y[k], 2), xx += (double)x[k] * x[k];
        const double twin = error_of(format[i / 2].twin, 1), most = format[i / 2].spare > 1 ? 1.25 : 2.5;   /* four bits without blocks feel one range for all rows */
        CHECK(ee / xx < most * twin, "%s times %g: relative MSE %.5f, with a scale per token %.5f", text, by, ee / xx, twin);
        float bad[] = { NAN, 0, -1, INFINITY };
        for (int k = 0; k < 4; k++) CHECK(kv_codec_new_calibrated(&again, "fp", c->text, DIM, P, 0, &bad[k], 4) == KV_E_CORRUPT && !again, "a scale of %g passes", bad[k]);
        CHECK(kv_codec_new_calibrated(&again, "fp", c->text, DIM, P, 0, bad, 8) == KV_E_CORRUPT, "8 bytes pass for a scale");
        CHECK(kv_codec_new_calibrated(&again, "fp", "", DIM, P, 0, blob, 4) == KV_E_CORRUPT, "a static scale takes tables");
        CHECK(kv_codec_new(&again, "fp", text, DIM, P, 0) == KV_E_UNCALIBRATED, "made without tables");
        kv_free(page);
        kv_codec_free(plain);
        kv_codec_free(c);
    }
}

static void refusals(void)
{
    static const struct { const char *params, *want; } bad[] = {
        { "group=24", "codec 'fp': group=24 is not a multiple of 16" }, { "scale=token,block=e8m0", "scale=token with block=e8m0 adds nothing" },
        { "scale=token,value=2", "value=2 with scale=token is not used" }, { "grid=e3m4", "grid=e3m4 is not one of e4m3|e5m2|e2m1" }, { "value=0", "value=0 is outside" },
        { "scale=head,block=e8m0", "scale=head with block=e8m0 adds nothing" }, { "scale=head,value=2", "value=2 with scale=head is not used" } };
    for (int i = 0; i < 7; i++) {
        kv_codec *c;
        CHECK(kv_codec_new(&c, "fp", bad[i].params, 64, 64, 0) == KV_E_PARAM && strstr(kv_last_error(), bad[i].want), "%s: %s", bad[i].params, kv_last_error());
    }
    char buf[128];
    CHECK(kv_codec_fit_bits("fp", "block=e8m0", 64, 0, 4.3, buf, sizeof buf) == KV_OK && strstr(buf, "grid=e2m1"), "fit 4.3: %s", buf);
    CHECK(kv_codec_fit_bits("fp", "grid=e5m2", 64, 0, 8, buf, sizeof buf) == KV_OK && strstr(buf, "grid=e5m2"), "fit 8: %s", buf);
}

int main(void)
{
    printf("seed 3; simd up to %d\n", kv_cpu_simd_max());
    FILE *f = fopen("tests/golden/fp_grids.bin", "rb");
    CHECK(f != NULL, "tests/golden/fp_grids.bin is not there (run from the repository's root)");
    if (f) {
        grid_values(f, "grid=e4m3", FP_E4M3, 256);
        grid_values(f, "grid=e5m2", FP_E5M2, 256);
        grid_values(f, "grid=e2m1", 4, 16);
        grid_values(f, NULL, FP_E8M0, 256);
        rounding(f);
        rows(f);
        CHECK(fgetc(f) == EOF, "golden file is longer than what is tested");
        fclose(f);
    }
    kv_cpu_limit(KV_SIMD_AMX);
    distortion();
    head_scale();
    small_groups();
    refusals();
    return check_end();
}
