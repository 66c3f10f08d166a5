/* test_polar.c -- what `polar` and `fused` promise beyond conformance: packed indices, the published closed forms and tables,
 * bits per element, and the vector mathematics against double precision. */
#include <math.h>
#include "check.h"
#include "codecs/polar.h"

enum { VECTORS = 2048 };

/* Mean relative squared error over Gaussian vectors. */
static double rel_error(const char *family, const char *params, int dim, int side, double *bits)
{
    kv_codec *c;
    if (kv_codec_new(&c, family, params, dim, 64, side) < 0) { CHECK(0, "%s", kv_last_error()); return NAN; }
    float *x = kv_alloc((size_t)64 * dim * 4), *y = kv_alloc((size_t)64 * dim * 4);
    uint8_t *page = kv_alloc(c->page_bytes);
    double e = 0, n = 0;
    for (int b = 0; b < VECTORS / 64; b++) {
        kv_rng_normal(21, dim, (double)b * 64 * dim, 64 * dim, x);
        memset(page, 0, c->page_bytes);
        c->ops->encode(c, page, 0, 64, x, dim);
        c->ops->decode(c, page, 0, 64, y, dim);
        for (int i = 0; i < 64 * dim; i++) e += ((double)x[i] - y[i]) * ((double)x[i] - y[i]), n += (double)x[i] * x[i];
    }
    if (bits) *bits = 8.0 * (double)c->page_bytes / (64.0 * dim);
    kv_free(x); kv_free(y); kv_free(page);
    kv_codec_free(c);
    return e / n;
}

static void close_to(const char *what, double got, double want, double tolerance)
{
    CHECK(fabs(got / want - 1) <= tolerance, "%s: %.4g, want %.4g within %g %%", what, got, want, 100 * tolerance);
}

static void test_fields(void)
{
    static const int bases[] = { 2, 3, 5, 6, 7, 10, 12, 48, 64, 96, 100, 127, 128, 192, 255, 256, 257, 1000, 1448, 4095, 4096 };
    static int32_t index[POLAR_ROW], back[POLAR_ROW];
    static uint8_t bytes[2 * KV_MAX_HEAD_DIM + POLAR_OVERREAD];
    for (unsigned b = 0; b < sizeof bases / sizeof *bases; b++)
        for (int count = 1; count <= 256; count += count < 40 ? 1 : 27) {
            polar_field f;
            polar_field_init(&f, bases[b], count);
            const double floor_bits = count * log2(bases[b]), plain = ceil(log2(bases[b])) * count;
            CHECK(8 * f.bytes >= floor_bits - 1e-9 && f.bytes <= ceil(plain / 8) && f.bytes <= (int)sizeof bytes - POLAR_OVERREAD, "base %d count %d: %d bytes", bases[b], count, f.bytes);
            for (int pass = 0; pass < 2; pass++) {                    /* random, and the largest of all */
                for (int i = 0; i < count; i++) {
                    uint32_t r[4];
                    kv_rng_u32(31, (uint32_t)b, (uint32_t)count, (uint32_t)i, r);
                    index[i] = pass ? bases[b] - 1 : (int32_t)(r[0] % (uint32_t)bases[b]);
                }
                memset(bytes, 0xff, sizeof bytes);
                polar_pack(&f, index, bytes);
                CHECK(bytes[f.bytes] == 0xff, "base %d count %d: packed past the row", bases[b], count);
                for (int level = 0; level <= kv_cpu_simd_max(); level++) {
                    kv_cpu_limit(level);
                    memset(back, 0xff, sizeof back);
                    polar_at_level()->unpack(&f, bytes, back);
                    CHECK(memcmp(index, back, (size_t)count * 4) == 0, "base %d count %d simd=%d: indices do not come back", bases[b], count, level);
                }
            }
        }
    kv_cpu_limit(kv_cpu_simd_max());
    for (int base = 2; base <= POLAR_BASE_MAX; base++) {                  /* every number of angles there may be */
        polar_field f;
        polar_field_init(&f, base, 48);
        for (int i = 0; i < 48; i++) index[i] = i < 2 ? i * (base - 1) : (int32_t)((uint32_t)(i * 2654435761u) % (uint32_t)base);
        polar_pack(&f, index, bytes);
        polar_at_level()->unpack(&f, bytes, back);
        CHECK(memcmp(index, back, 48 * 4) == 0 && 8 * f.bytes < 48 * log2(base) + 48, "base %d: indices do not come back from %d bytes", base, f.bytes);
    }
    close_to("3 at 1.6 bits", polar_field_bits(3, 160), 1.6, 1e-9);              /* 5 trits a byte; log2 3 = 1.585 */
    close_to("100 in 20 bits a triple", polar_field_bits(100, 96), 20.0 / 3, 1e-9);
    close_to("192 at 23 bits a triple", polar_field_bits(192, 48), 23.0 / 3, 1e-9);
    close_to("128 plain", polar_field_bits(128, 64), 7, 1e-9);
}

static void test_mathematics(void)
{
    enum { N = 256 };
    static float y[2 * N + POLAR_PAD], r[POLAR_ROW], x[POLAR_ROW];
    static int32_t index[POLAR_ROW];
    for (int level = 0; level <= kv_cpu_simd_max(); level++) {
        kv_cpu_limit(level);
        const polar_level *l = polar_at_level();
        for (int base = 2; base <= 4096; base = base * 3 / 2 + 1) {
            kv_rng_normal(41, base, 0, 2 * N, y);
            y[0] = y[1] = y[3] = 0;
            y[4] = -1, y[5] = 0;
            l->split(y, N, base, r, index);
            for (int i = 0; i < N; i++) {
                const double turn = atan2(y[2 * i + 1], y[2 * i]) / (2 * M_PI), off = remainder(turn - (double)index[i] / base, 1);
                CHECK(index[i] >= 0 && index[i] < base && fabs(off) <= 0.5 / base + 2e-7, "simd=%d base %d: (%g, %g) -> %d", level, base, y[2 * i], y[2 * i + 1], index[i]);
                CHECK(fabs(r[i] - hypot(y[2 * i], y[2 * i + 1])) <= 2e-7 * r[i], "radius %g", r[i]);
            }
        }
        for (int i = 0; i < N; i++) x[i] = y[i] = ldexpf(1.0f + (float)i / N, i - 126);
        l->log2(x, N);
        for (int i = 0; i < N - 2; i++) CHECK(fabs(x[i] - log2(y[i])) < 2e-7 * fabs(log2(y[i])) + 1e-7, "log2 %g: %.9g", y[i], x[i]);
        for (int i = 0; i < N; i++) x[i] = y[i] = (float)(i - 128) * 0.97f;
        x[0] = -65504;
        l->exp2(x, N);
        CHECK(x[0] == 0, "2^-65504 is %g", x[0]);
        for (int i = 3; i < N; i++) CHECK(fabs(x[i] / exp2(y[i]) - 1) < 2e-7, "exp2 %g: %.9g", y[i], x[i]);
    }
}

/* 2 (1 - sin(pi/n)/(pi/n)): uniform angles, centred bins, exact radii. */
static void test_angles(void)
{
    static const int n[] = { 2, 3, 5, 7, 12, 16, 24, 32, 48, 64, 100, 128, 192, 256, 300, 512, 1000, 4096 };
    for (int i = 0; i < 18; i++) {
        char text[64];
        const double a = M_PI / n[i], want = 2 * (1 - sin(a) / a);
        snprintf(text, sizeof text, "angles=%d,norm=f32", n[i]);
        close_to(text, rel_error("polar", text, 128, i % 2, NULL), want, 0.01);
    }
}

/* Radii of least error for the angles' loss are shrunk by sin(pi/n)/(pi/n), which leaves 1 - its square. */
static void test_shrink(void)
{
    for (int n = 3; n <= 16; n++) {
        char text[64];
        const double a = M_PI / n, sinc = sin(a) / a;
        snprintf(text, sizeof text, "angles=%d,norm=lloyd,norm_bits=8", n);
        close_to(text, rel_error("polar", text, 128, n % 2, NULL), 1 - sinc * sinc, n == 3 ? 0.05 : 0.015);   /* three bins and 64 pairs: the row's own share shows */
        CHECK(1 - sinc * sinc < 2 * (1 - sinc), "%d angles: a shrunk radius is nearer", n);
    }
}

/* After signs and transform the angles of rows that are far from Gaussian are nearly uniform: counts of 8 bins over 64 pairs of 4096
 * rows are within a few per cent (rms), without the rotation more than half off. */
static void test_uniform(void)
{
    enum { D = 128, ROWS = 4096 };
    for (int rotated = 0; rotated < 2; rotated++) {
        kv_codec *c;
        double chi = 0;
        int count[8] = { 0 };
        if (kv_codec_new(&c, "polar", rotated ? "angles=8" : "angles=8,rotation=none", D, 64, 0) < 0) { CHECK(0, "%s", kv_last_error()); return; }
        float *x = kv_alloc(64 * D * sizeof *x);
        uint8_t *page = kv_alloc(c->page_bytes);
        for (int b = 0; b < ROWS / 64; b++) {
            kv_rng_normal(23, 0, (double)b * 64 * D, 64 * D, x);
            for (int i = 0; i < 64 * D; i++) x[i] = x[i] * x[i] * x[i] + (i % D % 9 == 4 ? 1.0f : 0.0f);      /* heavy tails, channels with a mean */
            memset(page, 0, c->page_bytes);
            c->ops->encode(c, page, 0, 64, x, D);
            polar_field f;
            polar_field_init(&f, 8, D / 2);
            for (int t = 0; t < 64; t++) {
                int32_t index[POLAR_ROW];
                polar_at_level()->unpack(&f, page + (size_t)t * (size_t)f.bytes, index);
                for (int i = 0; i < D / 2; i++) count[index[i]]++;
            }
        }
        const double want = (double)ROWS * D / 2 / 8;
        for (int i = 0; i < 8; i++) chi += (count[i] - want) * (count[i] - want) / want;
        const double off = sqrt(chi / (8 * want));
        CHECK(rotated ? off < 0.04 : off > 0.5, "rotated %d: counts of angles are %.3f off", rotated, off);
        kv_free(x); kv_free(page);
        kv_codec_free(c);
    }
}

static void test_tables(void)
{
    /* d = 128, f16 side data: relative error of angles x norms over Gaussian vectors; 0: not published */
    static const char *const norm[] = { "norm=f32", "norm=lin,norm_bits=8", "norm=lin,norm_bits=7", "norm=lin,norm_bits=6", "norm=lin,norm_bits=5", "norm=lin,norm_bits=4", "norm=log,norm_bits=4", "norm=log,norm_bits=3" };
    static const struct { int angles; double want[8]; } table[] = {
        { 16,  { 1.28e-2, 1.28e-2, 0, 0, 0, 1.44e-2, 1.64e-2, 2.98e-2 } },
        { 32,  { 3.22e-3, 3.23e-3, 0, 0, 0, 4.75e-3, 6.73e-3, 2.0e-2 } },
        { 64,  { 8.02e-4, 8.08e-4, 8.24e-4, 8.89e-4, 1.16e-3, 2.34e-3, 4.31e-3, 1.8e-2 } },
        { 128, { 2.01e-4, 2.06e-4, 2.22e-4, 2.88e-4, 5.59e-4, 1.73e-3, 3.70e-3, 1.7e-2 } },
        { 256, { 5.03e-5, 5.56e-5, 7.17e-5, 1.37e-4, 4.08e-4, 1.58e-3, 3.55e-3, 0 } },
        { 512, { 1.26e-5, 1.79e-5, 3.40e-5, 9.93e-5, 3.70e-4, 1.55e-3, 3.52e-3, 0 } } };
    double got[6][8];
    for (int i = 0; i < 6; i++)
        for (int k = 0; k < 8; k++) {
            char text[64];
            double bits = 0;
            snprintf(text, sizeof text, "angles=%d,%s", table[i].angles, norm[k]);
            got[i][k] = rel_error("polar", text, 128, KV_SIDE_K, &bits);
            if (table[i].want[k] > 0) close_to(text, got[i][k], table[i].want[k], 0.05);
            if (k) close_to("angle, norm and side bits", bits, 0.5 * log2(table[i].angles) + 0.5 * (text[strlen(text) - 1] - '0') + 32.0 / 128, 1e-9);
        }
    /* The same bits, split otherwise: 15 a pair of keys, 10 a pair of values. */
    close_to("128 angles and 8 bits over 256 and 7", got[3][1] / got[4][2], 2.9, 0.03);
    close_to("log 4 over lin 4 at 64 angles", got[2][6] / got[2][5], 1.85, 0.03);

    /* The published totals: K128 V64 with K8V4-log is 3.25 angle bits, 3 norm bits and two f16 a vector. */
    double k, v, k4, v4;
    const double kept = rel_error("polar", "angles=128,norm=lin,norm_bits=8", 128, KV_SIDE_K, &k);
    rel_error("polar", "angles=64,norm=log,norm_bits=4", 128, KV_SIDE_V, &v);
    rel_error("polar", "angles=256,norm=lin,norm_bits=8", 128, KV_SIDE_K, &k4);
    rel_error("polar", "angles=128,norm=log,norm_bits=4", 128, KV_SIDE_V, &v4);
    close_to("uniform base", (k + v) / 2, 6.5, 1e-9);
    close_to("Mistral-7B, four boosted layers of 32", (28 * (k + v) + 4 * (k4 + v4)) / 64, 6.5625, 1e-9);
    double b;
    const double moved = rel_error("polar", "angles=256,norm=lin,norm_bits=7", 128, KV_SIDE_K, &b);
    CHECK(b == k && kept / moved > 2.7 && kept / moved < 3.1, "rebalanced keys: %g bits against %g, error %g times smaller", b, k, kept / moved);

    /* PolarQuant: 62 bits for 16 elements; its error is the sum of what its angles leave. */
    const double e = rel_error("polar", "levels=4,angles=16,upper=4,norm=f16", 128, KV_SIDE_K, &b);
    close_to("PolarQuant's bits", b, 3.875, 1e-9);
    double sum = 2 * (1 - sin(M_PI / 16) / (M_PI / 16));
    for (int l = 1; l < 4; l++) {
        double c[4], err = 0, mass = 0;
        polar_lloyd(POLAR_ANGLE, 1 << l, 0, 4, c);
        for (int i = 0; i < 100000; i++) {
            const double psi = (i + 0.5) * M_PI_2 / 100000, f = pow(sin(2 * psi), (1 << l) - 1);
            double best = 9;
            for (int j = 0; j < 4; j++) best = fmin(best, fabs(psi - c[j]));
            err += f * 2 * (1 - cos(best));
            mass += f;
        }
        sum += err / mass;
        for (int j = 0; j < 4; j++) CHECK(fabs(c[j] + c[3 - j] - M_PI_2) < 2e-3, "level %d: codebook is symmetric about pi/4 (%g %g)", l + 1, c[j], c[3 - j]);
    }
    close_to("PolarQuant's error", e, sum, 0.03);
}

static void test_modes(void)
{
    double b, one;
    one = rel_error("polar", "angles=1024,norm=lloyd,norm_bits=0", 128, KV_SIDE_V, &b);
    close_to("one radius for all: 1 - E[r]^2 of Rayleigh variables, less the scale's share", one, (1 - M_PI / 4) * 63 / 64, 0.01);
    close_to("5 bits and a scale", b, 5.125, 1e-9);
    CHECK(rel_error("polar", "angles=1024,norm=lloyd,norm_bits=4", 128, KV_SIDE_V, NULL) < 1.9e-3, "Lloyd-Max of radii: Panter and Dite's 1.8e-3");
    kv_codec *c;
    CHECK(kv_codec_new(&c, "polar", "norm_bits=0", 64, 64, 0) == KV_E_PARAM && strstr(kv_last_error(), "norm_bits=0 is for norm=lloyd alone"), "%s", kv_last_error());
    CHECK(kv_codec_new(&c, "polar", "levels=4", 72, 64, 0) == KV_E_PARAM && strstr(kv_last_error(), "multiple of 16, head_dim=72 is not"), "%s", kv_last_error());
    CHECK(kv_codec_new(&c, "polar", "angles=4097", 64, 64, 0) == KV_E_PARAM && strstr(kv_last_error(), "angles=4097 is outside 2..4096"), "%s", kv_last_error());
    static const int dims[] = { 64, 80, 96, 112, 128, 256, 512 };
    for (int i = 0; i < 7; i++) {
        rel_error("polar", "angles=100,norm=lin,norm_bits=6", dims[i], KV_SIDE_K, &b);
        CHECK(b >= 0.5 * log2(100) + 3 + 32.0 / dims[i] && b < 0.5 * log2(100) + 3 + 32.0 / dims[i] + 0.2, "head_dim %d: %g bits", dims[i], b);
    }
    for (double target = 3; target <= 9; target += 0.25) {
        char text[128];
        CHECK(kv_codec_fit_bits("polar", "norm=lin", 64, 0, target, text, sizeof text) == KV_OK, "%s", kv_last_error());
        rel_error("polar", text, 64, 0, &b);
        CHECK(b - target < 0.05 && target - b < 0.2, "fit %g: %s is %g", target, text, b);
    }
    /* The same angles with Lloyd-Max radii and one scale leave what scalar Lloyd-Max codes leave, at the same bytes. */
    for (int bits = 3; bits <= 6; bits++) {
        char scalar[64], polar[64];
        snprintf(scalar, sizeof scalar, "bits=%d,norm=lsq", bits);
        snprintf(polar, sizeof polar, "angles=%d,norm=lloyd,norm_bits=%d", 2 << bits, bits - 1);
        double bs = 0, bp = 0;
        const double es = rel_error("scalar", scalar, 128, 0, &bs), ep = rel_error("polar", polar, 128, 0, &bp);
        CHECK(bs == bp && fabs(ep / es - 1) < 0.05, "%d bits: polar %g, scalar %g", bits, ep, es);
    }
    /* What fits 8 bits is no worse than the published split of them. */
    char text[128];
    kv_codec_fit_bits("polar", "norm=lin", 128, 0, 7.75, text, sizeof text);
    CHECK(rel_error("polar", text, 128, 0, NULL) < 1e-4, "%s", text);
}

/* One sign after a second rotation leaves 1 - 2/pi of the error with the least-squares scale, pi/2 - 1 with the unbiased one. */
static void test_fused(void)
{
    double b, base = rel_error("polar", "angles=16,norm=lin,norm_bits=4", 128, KV_SIDE_K, NULL);
    const double mse = rel_error("fused", "", 128, KV_SIDE_K, &b), unbiased = rel_error("fused", "scale=unbiased", 128, KV_SIDE_K, NULL);
    close_to("signs of the residual", mse, 5.2e-3, 0.05);
    close_to("signs of the residual", mse / base, 1 - 2 / M_PI, 0.02);
    close_to("unbiased signs of the residual", unbiased / base, M_PI_2 - 1, 0.02);
    close_to("their bits", b, 2 + 2 + 1 + 48.0 / 128, 1e-9);
    const double one = rel_error("scalar", "bits=4,norm=lsq", 128, KV_SIDE_K, NULL), both = rel_error("fused", "form=subspace,angles=64,norm_bits=4,pairs=8,bits=4", 128, KV_SIDE_K, &b);
    printf("subspace fusion: %g at %g bits; scalar alone %g at 4.125\n", both, b, one);
    CHECK(both < one && b > 4.7 && b < 4.8, "subspace fusion: %g at %g bits, scalar alone %g", both, b, one);
    CHECK(mse > rel_error("scalar", "bits=5,norm=lsq", 128, KV_SIDE_K, NULL), "the fused form has not beaten 5 scalar bits; say so if it does");
    kv_codec *c;
    CHECK(kv_codec_new(&c, "fused", "form=subspace,pairs=32", 64, 64, 0) == KV_E_PARAM && strstr(kv_last_error(), "pairs=32 is outside 1..31 at head_dim=64"), "%s", kv_last_error());
}

/* A field of w bits by itself can hold indices from base up to 2^w - 1, which no encoder writes: they go on around the circle. */
static void test_foreign(void)
{
    for (int base = 2; base <= 100; base++) {
        float *circle, x[8 * 36], plain[8 * 36];
        char params[2][48];
        CHECK(polar_circle(base, &circle) == KV_OK, "%s", kv_last_error());
        for (int k = 0; k < base || (k & (k - 1)) != 0; k++)
            CHECK(fabs(circle[2 * k] - cos(2 * M_PI * k / base)) < 1e-6 && fabs(circle[2 * k + 1] - sin(2 * M_PI * k / base)) < 1e-6, "base %d: direction %d", base, k);
        kv_free(circle);
        snprintf(params[0], sizeof params[0], "angles=%d,norm=lloyd", base);
        snprintf(params[1], sizeof params[1], "angles=%d,norm=lloyd,norm_bits=2", base);
        for (int i = 0; i < 4; i++) {
            kv_codec *c;
            const int d = i < 2 ? 32 : 36;
            if (kv_codec_new(&c, i % 2 ? "fused" : "polar", params[i % 2], d, 8, KV_SIDE_K) < 0) { CHECK(0, "%s", kv_last_error()); continue; }
            uint8_t *page = kv_alloc(c->page_bytes);
            memset(page, 0xff, c->page_bytes);
            for (int level = 0; level <= kv_cpu_simd_max(); level++) {
                kv_cpu_limit(level);
                c->ops->decode(c, page, 0, 8, level ? x : plain, d);
                for (int k = 0; level && k < 8 * d; k++) CHECK(x[k] == plain[k] || (isnan(x[k]) && isnan(plain[k])), "%s %s simd=%d: value %d is %g, plain %g", c->ops->name, params[i % 2], level, k, (double)x[k], (double)plain[k]);
            }
            kv_free(page);
            kv_codec_free(c);
        }
    }
}

/* Every way through polar_level.h: kinds of radii, one and several indices a field, registers filled and not, more than one level.
 * All SIMD levels give the bits of plain C for a page's rows, and any bytes decode. */
static void test_paths(void)
{
    static const char *const settings[] = { "angles=128,norm=lin,norm_bits=8", "angles=64,norm=log,norm_bits=4", "angles=256,norm=log,norm_bits=7", "angles=32,norm=lloyd,norm_bits=3",
        "angles=64,norm=lloyd,norm_bits=6", "angles=100,norm=lloyd,norm_bits=0", "angles=4096,norm=f16", "angles=127,norm=f32", "angles=100,norm=lin,norm_bits=5", "angles=3,norm=f16",
        "levels=4,angles=16,upper=4,norm=f16", "levels=3,angles=100,upper=8,norm=lin,norm_bits=5", "levels=2,angles=33,upper=48,norm=log,norm_bits=3", "levels=4,angles=8,upper=13,norm=f32" };
    static const int dims[] = { 32, 48, 64, 80, 112, 128, 512 };
    for (unsigned i = 0; i < sizeof settings / sizeof *settings; i++)
        for (unsigned k = 0; k < sizeof dims / sizeof *dims; k++) {
            const int d = dims[k], n = 11;
            kv_codec *c;
            if (kv_codec_new(&c, "polar", settings[i], d, 24, (int)(i % 2)) < 0) { CHECK(strstr(kv_last_error(), "multiple of"), "%s", kv_last_error()); continue; }
            float *x = kv_alloc((size_t)(24 * d) * 4), *y = kv_alloc((size_t)(n * d) * 4), *z = kv_alloc((size_t)(n * d) * 4);
            uint8_t *page = kv_zalloc(c->page_bytes), *noise = kv_alloc(c->page_bytes);
            kv_rng_normal(77, (int)i, (double)d, 24 * d, x);
            c->ops->encode(c, page, 0, 24, x, d);
            for (size_t b = 0; b + 4 <= c->page_bytes; b += 4) {
                uint32_t r[4];
                kv_rng_u32(78, i, k, (uint32_t)b, r);
                memcpy(noise + b, r, 4);
            }
            for (int level = 0; level <= kv_cpu_simd_max(); level++) {
                if (kv_cpu_limit(level) != level) continue;
                memset(z, 0xff, (size_t)(n * d) * 4);
                c->ops->decode(c, page, 24 - n, n, z, d);
                if (level == 0) memcpy(y, z, (size_t)(n * d) * 4);
                CHECK(memcmp(y, z, (size_t)(n * d) * 4) == 0, "polar %s d=%d simd=%d: other values than plain C", settings[i], d, level);
                c->ops->decode(c, noise, 24 - n, n, z, d);
            }
            kv_cpu_limit(kv_cpu_simd_max());
            kv_free(x); kv_free(y); kv_free(z); kv_free(page); kv_free(noise);
            kv_codec_free(c);
        }
}

int main(void)
{
    printf("seeds 21, 23, 31, 41; simd up to %d\n", kv_cpu_simd_max());
    test_fields();
    test_mathematics();
    test_angles();
    test_shrink();
    test_uniform();
    test_tables();
    test_modes();
    test_fused();
    test_foreign();
    test_paths();
    return check_end();
}
