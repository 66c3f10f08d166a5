/* test_codecs.c -- what every codec promises, over the whole registry: parameters x shapes x SIMD levels x inputs.
 *
 * The plain C level is the specification: other levels must give its bytes and its decoded values exactly, and dot
 * products within rounding of a double-precision reference over the decoded rows.  Nothing here names a codec except
 * where a control or a foreign format is the point. */
#include <math.h>
#include <time.h>
#include "check.h"
#include "codec.h"

enum { GUARD = 64, QUERIES = 6 };
static const int dims[] = { 64, 80, 96, 112, 128, 256, 1, 7, 33, 72, 512 };
static const int pages[] = { 64, 32, 128 };

/* ---- inputs */
enum { GAUSS, HEAVY, CONSTANT, ZERO, OUTLIER, DENORMAL, HUGE_VALUES, OFFSET, N_INPUTS };
static const char *const input_name[] = { "gauss", "heavy", "constant", "zero", "outlier", "denormal", "huge", "offset" };

static void fill(int kind, double seed, float *x, int n_rows, int dim)
{
    const int n = n_rows * dim;
    kv_rng_normal(seed, kind, 0, n, x);
    for (int i = 0; i < n; i++) {
        const float v = x[i];
        switch (kind) {
        case HEAVY:       x[i] = v * v * v * v * v; break;
        case CONSTANT:    x[i] = (float)(i / dim % 5) * 0.25f - 0.5f; break;
        case ZERO:        x[i] = i % 3 ? 0.0f : -0.0f; break;
        case OUTLIER:     x[i] = i % dim == (i / dim * 7) % dim ? 300.0f : v * 0.01f; break;
        case DENORMAL:    x[i] = v * 1e-40f; break;
        case HUGE_VALUES: x[i] = v * (i % 2 ? 1e30f : 1e5f); break;
        case OFFSET:      x[i] = v + 20.0f; break;
        default: break;
        }
    }
}

static int all_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) if (!isfinite(x[i])) return 0;
    return 1;
}
static int all_bytes(const uint8_t *p, size_t n, uint8_t v)
{
    for (size_t i = 0; i < n; i++) if (p[i] != v) return 0;
    return 1;
}

/* ---- one instance */

/* Largest error of a product allowed, against double precision over the decoded rows and relative to |q| |k|, or to
 * sum p |v|.  f32 kernels keep 1e-6; minima folded out of the sum cost up to 1.2e-4 of a small row beside huge ones (int along
 * tokens, values to 1e30), and 16-bit fixed point stays below this too. */
static const double tolerance = 2e-4;
static double worst_fused;

/* tile: the generic forms too, which decode the page again: one number of queries says what a codec has to do with them, others are
 * the rows' kernels, which `raw` runs as its own. */
static void check_attention(const kv_codec *c, const uint8_t *page, const float *y, int n, bool tile, const char *label)
{
    const int dim = c->head_dim, P = c->page_tokens, ld = P + 8;
    float *q = kv_alloc(QUERIES * (size_t)dim * 4), *p = kv_alloc(QUERIES * (size_t)P * 4), *scratch = kv_alloc((size_t)P * dim * 4);
    float *s = kv_alloc(QUERIES * (size_t)ld * 4), *acc = kv_alloc(QUERIES * (size_t)kv_max(dim, c->space_dim) * 4), *out = kv_alloc(QUERIES * (size_t)dim * 4);
    double *want_s = kv_zalloc(QUERIES * (size_t)P * 8), *norm_s = kv_zalloc(QUERIES * (size_t)P * 8), *want_o = kv_zalloc(QUERIES * (size_t)dim * 8), norm_o[QUERIES] = { 0 };
    uint8_t *prepared = kv_alloc(QUERIES * kv_round_up(c->query_bytes, 64) + 64);
    double worst = 0;
    kv_rng_normal(5, 1, 0, QUERIES * dim, q);
    kv_rng_uniform(6, 1, 0, QUERIES * P, p);
    for (int g = 0; g < QUERIES; g++) {
        double aa = 0;
        for (int i = 0; i < dim; i++) aa += (double)q[g * dim + i] * q[g * dim + i];
        for (int t = 0; t < P; t++) p[g * P + t] = t == 2 ? 0 : powf(p[g * P + t], (float)(1 + 4 * g));   /* flat to sharp, one token without weight */
        for (int t = 0; t < n; t++) {
            double bb = 0;
            for (int i = 0; i < dim; i++) {
                const double v = y[(size_t)t * dim + i];
                want_s[g * P + t] += q[g * dim + i] * v;
                want_o[g * dim + i] += 2.0 * p[g * P + t] * v;
                bb += v * v;
            }
            norm_s[g * P + t] = sqrt(aa * bb);
            norm_o[g] += 2 * p[g * P + t] * sqrt(bb);
        }
    }
    for (int pass = tile ? 0 : 1; pass < (kv_codec_fused(c) ? 5 : 1); pass++) {
        static const int counts[] = { QUERIES, 1, 2, 3, QUERIES };
        const int fused = pass > 0, n_q = counts[pass], space = fused ? c->space_dim : dim;
        if (!fused || c->side == KV_SIDE_K) {
            memset(s, 0xff, QUERIES * (size_t)ld * 4);
            if (fused) {
                c->ops->query(c, q, dim, n_q, prepared);
                c->ops->dot(c, page, n, prepared, n_q, s, ld);
            } else kv_tile_dot(c, page, n, q, dim, n_q, s, ld, scratch);
            for (int g = 0; g < n_q; g++) {
                for (int t = 0; t < n; t++) worst = fmax(worst, fabs(s[g * ld + t] - want_s[g * P + t]) / (norm_s[g * P + t] + 1e-30));
                CHECK(all_finite(s + g * ld, (size_t)n) && all_bytes((uint8_t *)(s + g * ld + n), (size_t)(ld - n) * 4, 0xff), "%s: dot leaves its scores", label);
            }
        }
        if (!fused || c->side == KV_SIDE_V) {
            memset(acc, 0, QUERIES * (size_t)space * 4);
            for (int twice = 0; twice < 2; twice++)                        /* it adds */
                if (fused) c->ops->accumulate(c, page, n, p, P, n_q, acc);
                else kv_tile_accumulate(c, page, n, p, P, n_q, acc, scratch);
            memset(out, 0xff, QUERIES * (size_t)dim * 4);
            if (fused) c->ops->output(c, acc, n_q, out, dim);
            else memcpy(out, acc, (size_t)n_q * dim * 4);
            for (int i = 0; i < n_q * dim; i++) worst = fmax(worst, fabs(out[i] - want_o[i]) / (norm_o[i / dim] + 1e-30));
            CHECK(all_finite(out, (size_t)n_q * dim) && all_bytes((uint8_t *)(out + n_q * dim), (size_t)(QUERIES - n_q) * dim * 4, 0xff), "%s: output leaves its rows", label);
        }
        CHECK(worst <= tolerance, "%s: fused=%d n_q=%d n=%d is %.2g off", label, fused, n_q, n, worst);
        if (fused) worst_fused = fmax(worst_fused, worst);
    }
    kv_free(q); kv_free(p); kv_free(scratch); kv_free(s); kv_free(acc); kv_free(out);
    kv_free(want_s); kv_free(norm_s); kv_free(want_o); kv_free(prepared);
}

/* Half of the kinds of input, the other half in the next call; of large pages a quarter. */
static void check_instance(const kv_codec *c, int attention)
{
    static int turn;
    const int dim = c->head_dim, P = c->page_tokens;
    const size_t bytes = c->page_bytes, values = (size_t)P * dim;
    float *x = kv_alloc(values * 4), *y = kv_alloc(values * 4), *y0 = kv_alloc(values * 4), *z = kv_alloc((values + GUARD) * 4);
    uint8_t *page = kv_zalloc(bytes + GUARD), *page0 = kv_zalloc(bytes), *page2 = kv_zalloc(bytes);
    char label[512];

    const kv_bytes *b = &c->page;
    CHECK(b->codes + b->scales + b->outliers + b->exact + b->padding + b->slack + b->state + b->shared == b->total && b->total == (double)bytes && bytes % 64 == 0,
          "%s %s: the ledger does not sum to %zu", c->ops->name, c->text, bytes);

    const int step = values > 16384 ? 4 : 2;
    for (int kind = turn++ % step; kind < N_INPUTS; kind += step) {
        fill(kind, 17, x, P, dim);
        for (int level = 0; level <= kv_cpu_simd_max(); level++) {
            if (kv_cpu_limit(level) != level) continue;
            snprintf(label, sizeof label, "%s %s d=%d page=%d side=%d simd=%d %s", c->ops->name, c->text, dim, P, c->side, level, input_name[kind]);
            memset(page, 0, bytes);
            memset(page + bytes, 0xa5, GUARD);
            c->ops->encode(c, page, 0, P, x, dim);
            CHECK(all_bytes(page + bytes, GUARD, 0xa5), "%s: encode wrote past the page", label);
            if (level == 0) memcpy(page0, page, bytes);
            CHECK(memcmp(page, page0, bytes) == 0, "%s: other bytes than plain C", label);

            memset(page2, 0, bytes);
            for (int t = P - c->granule; t >= 0; t -= c->granule) c->ops->encode(c, page2, t, c->granule, x + (size_t)t * dim, dim);
            CHECK(memcmp(page, page2, bytes) == 0, "%s: granule by granule gives other bytes", label);

            memset(y, 0xff, values * 4);
            c->ops->decode(c, page, 0, P, y, dim);
            CHECK(all_finite(y, values), "%s: decodes to something that is not finite", label);
            if (level == 0) memcpy(y0, y, values * 4);
            CHECK(memcmp(y, y0, values * 4) == 0, "%s: other values than plain C", label);

            for (int k = 0; k < 6; k++) {                                /* any range, any row distance, nothing past it */
                uint32_t r[4];
                kv_rng_u32(3, (uint32_t)kind, (uint32_t)level, (uint32_t)k, r);
                const int t0 = (int)(r[0] % (unsigned)P), n = 1 + (int)(r[1] % (unsigned)(P - t0)), ld = n * (dim + 5) <= (int)values ? dim + 5 : dim;
                memset(z, 0xff, (values + GUARD) * 4);
                c->ops->decode(c, page, t0, n, z, ld);
                int same = 1, clean = 1;
                for (int t = 0; t < n; t++) {
                    same &= memcmp(z + (size_t)t * ld, y + (size_t)(t0 + t) * dim, (size_t)dim * 4) == 0;
                    clean &= all_bytes((uint8_t *)(z + (size_t)t * ld + dim), (size_t)(t < n - 1 ? ld - dim : GUARD) * 4, 0xff);
                }
                CHECK(same && clean, "%s: tokens %d..%d decode apart from the whole (same %d, clean %d)", label, t0, t0 + n, same, clean);
            }
            if (attention && kind != DENORMAL) {
                const bool last = level == kv_cpu_simd_max();
                check_attention(c, page, y, P, last && kind < 2, label);
                check_attention(c, page, y, kv_max(1, P - c->granule - 3), last && kind >= 2 && kind < 4, label);
            }
        }
    }
    /* Hostile bytes: anything decodes, nothing is touched outside. */
    for (int level = 0; level <= kv_cpu_simd_max(); level++) {
        if (kv_cpu_limit(level) != level) continue;
        for (size_t i = 0; i < bytes; i += 4) {
            uint32_t r[4];
            kv_rng_u32(99, 0, (uint32_t)level, (uint32_t)i, r);
            memcpy(page + i, r, 4);
        }
        c->ops->decode(c, page, 0, P, y, dim);
        if (kv_codec_fused(c)) {
            uint8_t *prepared = kv_alloc(kv_round_up(c->query_bytes, 64));
            float *acc = kv_zalloc((size_t)c->space_dim * 4);
            fill(GAUSS, 1, x, 1, dim);
            c->ops->query(c, x, dim, 1, prepared);
            if (c->side == KV_SIDE_K) c->ops->dot(c, page, P, prepared, 1, z, P);
            fill(CONSTANT, 1, x, P, 1);
            if (c->side == KV_SIDE_V) c->ops->accumulate(c, page, P, x, P, 1, acc);
            kv_free(prepared);
            kv_free(acc);
        }
        CHECK(1, "survived");
    }
    kv_cpu_limit(KV_SIMD_AMX);
    kv_free(x); kv_free(y); kv_free(y0); kv_free(z); kv_free(page); kv_free(page0); kv_free(page2);
}

/* ---- the registry: the product of choices and bits, with every other number at its ends and some in between */

static int n_made, n_refused;

static void try_params(const char *family, const char *params, int head_dim, int page_tokens, int side, int attention)
{
    kv_codec *c, *again;
    kv_codec_info info;
    const int status = kv_codec_new_nominal(&c, family, params, head_dim, page_tokens, side);
    if (status < 0) {
        n_refused++;
        CHECK((status == KV_E_PARAM || status == KV_E_UNSUPPORTED) && strncmp(kv_last_error(), "codec '", 7) == 0 && !strchr(kv_last_error(), '\n'),
              "%s %s d=%d: %s %s", family, params, head_dim, kv_status_name(status), kv_last_error());
        return;
    }
    n_made++;
    CHECK(kv_codec_get_info(c, &info) == KV_OK && info.page_bytes == (double)c->page_bytes, "info");
    if (head_dim <= 128) {                                             /* text knows no shape; matrices of large ones take their time */
        CHECK(kv_codec_new_calibrated(&again, family, info.params, head_dim, page_tokens, side, c->blob, (double)c->blob_bytes) == KV_OK && strcmp(again->text, info.params) == 0,
              "%s: canonical text '%s' does not read back as itself", family, info.params);
        kv_codec_free(again);
    }
    check_instance(c, attention);
    kv_codec_free(c);
}

/* Every so manieth combination is made, so that families with many choices stay affordable: 35 a shape, 250 of the usual one.
 * Primes: from shape to shape others have their turn. */
static unsigned stride_of(int codec, int shape)
{
    static const unsigned prime[] = { 3, 11, 31, 101, 211, 401, 809, 1601 };
    kv_codec_desc d;
    kv_param p;
    unsigned all = 1;
    int k = shape >= 0;
    kv_codec_describe(codec, &d);
    for (int i = 0; i < d.n_params; i++) {
        kv_codec_param_at(codec, i, &p);
        if (p.type == KV_PARAM_CHOICE) all *= (unsigned)(p.max - p.min) + 1;
        else if (strcmp(p.name, "bits") == 0) all *= (unsigned)(p.max - p.min) / (shape >= 0 ? 2 : 1) + 1;
    }
    while (k < 7 && prime[k] < all / (shape >= 0 ? 35 : 250)) k++;
    return prime[k];
}

/* Sets parameters i.. in turn; text holds what is set so far. */
static void product(int codec, int i, const char *text, int shape)
{
    kv_codec_desc d;
    kv_param p;
    kv_codec_describe(codec, &d);
    if (i == d.n_params) {
        static unsigned turn, count;
        if (count++ % stride_of(codec, shape) != 0) return;
        if (shape >= 0) try_params(d.name, text, dims[shape], pages[turn % 3], (int)(turn / 3 % 2), 1);
        else {
            try_params(d.name, text, 64, 64, KV_SIDE_K, turn % 2);
            try_params(d.name, text, dims[turn % 8], pages[turn % 3], KV_SIDE_V, 1);
        }
        turn++;
        return;
    }
    kv_codec_param_at(codec, i, &p);
    char more[512];
    const char *comma = *text ? "," : "";
    if (p.type == KV_PARAM_CHOICE) {
        for (const char *s = p.choices; *s; s += strcspn(s, "|"), s += *s == '|') {
            snprintf(more, sizeof more, "%s%s%s=%.*s", text, comma, p.name, (int)strcspn(s, "|"), s);
            product(codec, i + 1, more, shape);
        }
    } else if (strcmp(p.name, "bits") == 0) {
        for (double v = p.min; v <= p.max; v += shape >= 0 ? 2 : 1) {
            snprintf(more, sizeof more, "%s%s%s=%g", text, comma, p.name, v);
            product(codec, i + 1, more, shape);
        }
    } else product(codec, i + 1, text, shape);
}

static void numbers(int codec)
{
    kv_codec_desc d;
    kv_param p;
    kv_codec_describe(codec, &d);
    for (int i = 0; i < d.n_params; i++) {
        kv_codec_param_at(codec, i, &p);
        if (p.type == KV_PARAM_CHOICE) continue;
        const double some[] = { p.min, p.max, p.min + 8, p.min + 16, 2 * p.def, 4 * p.def };
        for (int k = 0; k < 6; k++) {
            char text[100];
            if (!(some[k] >= p.min && some[k] <= p.max)) continue;
            snprintf(text, sizeof text, "%s=%.17g", p.name, some[k]);
            try_params(d.name, text, 128, 64, k % 2, 1);
            try_params(d.name, text, 80, 128, (k + 1) % 2, 1);
        }
    }
}

/* ---- parameters as text */
static void refused(const char *family, const char *params, const char *want)
{
    kv_codec *c = (kv_codec *)1;
    const int status = kv_codec_new(&c, family, params, 64, 64, 0);
    CHECK(status == KV_E_PARAM && !c && strstr(kv_last_error(), want), "%s '%s': %s: %s (want: %s)", family, params, kv_status_name(status), kv_last_error(), want);
}

static void test_params(void)
{
    refused("int", "bits=9", "codec 'int': bits=9 is outside 1..8");
    refused("int", "bits=0", "codec 'int': bits=0 is outside 1..8");
    refused("int", "bits=1e99", "outside 1..8");
    refused("int", "bits=nan", "bits=nan is not a number");
    refused("int", "bits=0x4", "is not a number");
    refused("int", "bits=", "is not a number");
    refused("int", "bits=2.5", "bits=2.5 is not a whole number");
    refused("int", "bits=2,bits=3", "'bits' is given twice");
    refused("int", "bit=2", "codec 'int': unknown parameter 'bit' (has: bits, group, axis");
    refused("int", "bits", "'bits' is not name=value");
    refused("int", "bits=2,", "is not name=value");
    refused("int", "bits=2,gr\nou\x1b[2Jp\x7f", "'gr?ou?[2Jp?' is not name=value");           /* one line, and nothing for the terminal to obey */
    refused("int", "axis=row", "axis=row is not one of dim|token");
    refused("int", "group=12", "group=12 is not a multiple of 8");
    refused("int", "group=128", "group=128 is more than head_dim=64");
    refused("int", "axis=token,group=48", "group=48 along tokens does not divide page_tokens=64");
    refused("int", "mode=ggml_0,bits=3", "bits=3 with mode=ggml_0 is not one of 4, 5, 8");
    refused("int", "mode=symmetric,bits=1", "bits=1 with mode=symmetric");
    refused("canary", "bits=3", "codec 'canary': unknown parameter 'bits' (has: none)");
    refused("foo", "", "codec 'foo' is unknown (have: raw, int");
    char longest[3000];
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = 0;
    refused("int", longest, "is not name=value");
    refused(longest, "", "is unknown");

    kv_codec *c;
    CHECK(kv_codec_new(&c, "int", " bits = 3 , axis=token ", 64, 64, 0) == KV_OK, "%s", kv_last_error());
    CHECK(c && strcmp(c->text, "bits=3,group=32,axis=token,mode=affine,order=half") == 0, "canonical text '%s'", c ? c->text : "");
    kv_codec_free(c);
    const int bad[][3] = { { 0, 64, 0 }, { 513, 64, 0 }, { 64, 4, 0 }, { 64, 12, 0 }, { 64, 1032, 0 }, { 64, 64, 2 }, { -1, 64, 0 } };
    for (int i = 0; i < 7; i++) CHECK(kv_codec_new(&c, "raw", NULL, bad[i][0], bad[i][1], bad[i][2]) == KV_E_ARG, "shape %d", i);
    CHECK(kv_codec_new(NULL, "raw", "", 64, 64, 0) == KV_E_ARG && kv_codec_new(&c, NULL, "", 64, 64, 0) == KV_E_ARG, "NULL");
    kv_codec_free(NULL);

    char buf[128];
    CHECK(kv_codec_fit_bits("int", "", 64, 0, 4.4, buf, sizeof buf) == KV_OK && strstr(buf, "bits=3,"), "fit 4.4: %s", buf);   /* 3 + 1 of scale and minimum */
    CHECK(kv_codec_fit_bits("int", "mode=ggml_0", 64, 0, 4.9, buf, sizeof buf) == KV_OK && strstr(buf, "bits=4,"), "fit 4.9: %s", buf);
    CHECK(kv_codec_fit_bits("raw", "", 64, 0, 30, buf, sizeof buf) == KV_OK && strcmp(buf, "dtype=f32") == 0, "fit 30: %s", buf);
    CHECK(kv_codec_fit_bits("canary", "", 64, 0, 4, buf, sizeof buf) == KV_E_UNSUPPORTED, "fit of nothing");
    CHECK(kv_codec_fit_bits("int", "", 64, 0, NAN, buf, sizeof buf) == KV_E_ARG && kv_codec_fit_bits("int", "", 64, 0, 4, buf, 4) == KV_E_ARG, "fit arguments");
    kv_codec_desc d;
    kv_param p;
    CHECK(kv_codec_describe(-1, &d) == KV_E_ARG && kv_codec_describe(kv_codec_count(), &d) == KV_E_ARG && kv_codec_param_at(0, 99, &p) == KV_E_ARG, "indices");
}

/* ---- ggml's bytes: tests/golden/ggml_blocks.py made them */
static void test_ggml(void)
{
    enum { ROWS = 32, DIM = 64 };
    static const struct { const char *params; int row; } format[] = {
        { "bits=8,mode=ggml_0", 68 }, { "bits=5,mode=ggml_1", 48 }, { "bits=5,mode=ggml_0", 44 }, { "bits=4,mode=ggml_1", 40 }, { "bits=4,mode=ggml_0", 36 } };
    static float x[ROWS * DIM], y[ROWS * DIM], want_y[ROWS * DIM];
    static uint8_t want[ROWS * 68];
    FILE *f = fopen("tests/golden/ggml_blocks.bin", "rb");
    CHECK(f != NULL, "tests/golden/ggml_blocks.bin is not there (run from the repository's root)");
    if (!f) return;
    CHECK(fread(x, sizeof x, 1, f) == 1, "golden input");
    for (int i = 0; i < 5; i++) {
        kv_codec *c;
        CHECK(fread(want, (size_t)format[i].row, ROWS, f) == ROWS && fread(want_y, sizeof want_y, 1, f) == 1, "golden %s", format[i].params);
        if (kv_codec_new(&c, "int", format[i].params, DIM, ROWS, 0) < 0) { CHECK(0, "%s", kv_last_error()); continue; }
        for (int level = 0; level <= kv_cpu_simd_max(); level++) {
            kv_cpu_limit(level);
            uint8_t *page = kv_zalloc(c->page_bytes);
            c->ops->encode(c, page, 0, ROWS, x, DIM);
            CHECK(memcmp(page, want, (size_t)format[i].row * ROWS) == 0, "%s simd=%d: not ggml's bytes", format[i].params, level);
            c->ops->decode(c, page, 0, ROWS, y, DIM);
            CHECK(memcmp(y, want_y, sizeof y) == 0, "%s simd=%d: not ggml's values", format[i].params, level);
            kv_free(page);
        }
        kv_codec_free(c);
    }
    fclose(f);
}

/* ---- what single codecs promise */
static double rel_error(const char *family, const char *params, int kind, int odd_only)
{
    enum { DIM = 64, P = 64 };
    static float x[P * DIM], y[P * DIM];
    kv_codec *c;
    if (kv_codec_new(&c, family, params, DIM, P, 0) < 0) { CHECK(0, "%s", kv_last_error()); return NAN; }
    uint8_t *page = kv_zalloc(c->page_bytes);
    fill(kind, 4, x, P, DIM);
    c->ops->encode(c, page, 0, P, x, DIM);
    c->ops->decode(c, page, 0, P, y, DIM);
    kv_free(page);
    kv_codec_free(c);
    double e = 0, n = 0;
    for (int i = odd_only; i < P * DIM; i += 1 + odd_only) e += pow((double)x[i] - y[i], 2), n += (double)x[i] * x[i];
    return n > 0 ? e / n : e;
}

static void test_promises(void)
{
    CHECK(rel_error("raw", "dtype=f32", HEAVY, 0) == 0, "raw f32 is exact");
    CHECK(rel_error("raw", "dtype=f16", GAUSS, 0) < 1e-7, "raw f16");
    CHECK(rel_error("raw", "dtype=bf16", GAUSS, 0) < 1e-5, "raw bf16");
    for (int bits = 1; bits <= 8; bits++)
        for (int axis = 0; axis < 2; axis++) {
            char text[64];
            snprintf(text, sizeof text, "bits=%d,axis=%s", bits, axis ? "token" : "dim");
            if (!axis) CHECK(rel_error("int", text, CONSTANT, 0) == 0, "%s: a constant group decodes exactly", text);
            CHECK(rel_error("int", text, ZERO, 0) == 0, "%s: zero decodes to zero", text);
            const double e = rel_error("int", text, GAUSS, 0), bound = bits == 1 ? 2.5 : 2.7 / pow(4, bits);   /* one bit keeps the extremes only */
            CHECK(e < bound, "%s: relative error %g, bound %g", text, e, bound);
        }
    /* Minimum and scale of a whole row of 128: published 1 - cosine, which is half the relative error. */
    static const double whole[] = { .103, .0218, .0049 };
    for (int bits = 2; bits <= 4; bits++) {
        enum { D = 128, P = 512 };
        static float x[P * D], y[P * D];
        kv_codec *c;
        char text[64];
        double off = 0;
        snprintf(text, sizeof text, "bits=%d,group=128", bits);
        if (kv_codec_new(&c, "int", text, D, P, 0) < 0) { CHECK(0, "%s", kv_last_error()); continue; }
        uint8_t *page = kv_zalloc(c->page_bytes);
        fill(GAUSS, 12, x, P, D);
        c->ops->encode(c, page, 0, P, x, D);
        c->ops->decode(c, page, 0, P, y, D);
        for (int t = 0; t < P; t++) {
            double xx = 0, yy = 0, xy = 0;
            for (int i = t * D; i < (t + 1) * D; i++) xx += (double)x[i] * x[i], yy += (double)y[i] * y[i], xy += (double)x[i] * y[i];
            off += (1 - xy / sqrt(xx * yy)) / P;
        }
        CHECK(fabs(off / whole[bits - 2] - 1) < .03, "%s: 1 - cosine %.5f, published %.4f", text, off, whole[bits - 2]);
        kv_free(page);
        kv_codec_free(c);
    }
    CHECK(rel_error("canary", "", GAUSS, 1) > 0.8 && rel_error("canary", "", GAUSS, 0) < 2, "the canary fails, and stays finite");
}

static kv_tensor view(float *data, int n0, int n1, int n2)
{
    return (kv_tensor){ .data = data, .dtype = KV_F32, .ndim = 3, .shape = { n0, n1, n2 }, .stride = { (int64_t)n1 * n2, n2, 1 } };
}

static void test_blocks(const char *family, const char *params, int side)
{
    enum { H = 2, T = 151, DIM = 64, P = 64, Q = 67 };
    static float x[H * T * DIM], y[H * T * DIM], q[H * Q * DIM], s[H * Q * T], s1[H * Q * T], o[H * Q * DIM], o1[H * Q * DIM];
    kv_codec *c;
    kv_block *b;
    kv_bytes n;
    if (kv_codec_new(&c, family, params, DIM, P, side) < 0) { CHECK(0, "%s", kv_last_error()); return; }
    fill(GAUSS, 8, x, H * T, DIM);
    kv_tensor tx = view(x, H, T, DIM), ty = view(y, H, T, DIM), tq = view(q, H, Q, DIM), ts = view(s, H, Q, T), to = view(o, H, Q, DIM);
    CHECK(kv_block_encode(&b, c, &tx) == KV_OK, "%s", kv_last_error());
    if (!b) { kv_codec_free(c); return; }
    const int coded = T / c->granule * c->granule, n_pages = (coded + P - 1) / P;
    const double alloc = (double)H * n_pages * (double)c->page_bytes + (double)kv_round_up((size_t)H * (T - coded) * DIM * 2, 64);
    CHECK(kv_block_bytes(b, &n) == KV_OK && n.total == alloc && n.codes + n.scales + n.outliers + n.exact + n.padding + n.slack + n.state + n.shared == n.total,
          "%s %s: ledger %g, allocated %g", family, params, n.total, alloc);
    CHECK(n.slack >= 0 && n.exact >= (double)H * (T - coded) * DIM * 2 && (coded == T) == (n.exact == 0), "%s %s: slack %g exact %g", family, params, n.slack, n.exact);
    CHECK(kv_block_decode(b, 0, T, &ty) == KV_OK, "%s", kv_last_error());
    double e = 0, m = 0;
    for (int i = 0; i < H * T * DIM; i++) e += pow((double)x[i] - y[i], 2), m += (double)x[i] * x[i];
    CHECK(e / m < 0.5, "%s %s: relative error %g", family, params, e / m);
    static float part[H * 70 * DIM];
    kv_tensor tp = view(part, H, 70, DIM);
    CHECK(kv_block_decode(b, 40, 110, &tp) == KV_OK, "%s", kv_last_error());
    for (int h = 0; h < H; h++) CHECK(memcmp(part + h * 70 * DIM, y + (h * T + 40) * DIM, 70 * DIM * 4) == 0, "a range decodes as in the whole");
    CHECK(kv_block_decode(b, 5, 5, &tp) == KV_E_ARG && kv_block_decode(b, 0, T + 1, &tp) == KV_E_ARG && kv_block_decode(b, 0, 9, &tp) == KV_E_ARG, "ranges");

    /* Elements two apart give the same pages and the same rows as elements side by side, and nothing between is written. */
    static float wide[2 * H * T * DIM];
    const kv_tensor apart = { .data = wide, .dtype = KV_F32, .ndim = 3, .shape = { H, T, DIM }, .stride = { 2 * T * DIM, 2 * DIM, 2 } };
    kv_tensor gaps = apart;
    kv_block *same;
    uint8_t *one, *other;
    double page_bytes;
    for (int i = 0; i < H * T * DIM; i++) wide[2 * i] = x[i];
    CHECK(kv_block_encode(&same, c, &apart) == KV_OK, "%s", kv_last_error());
    for (int h = 0; same && h < H; h++)
        for (int i = 0; i < n_pages; i++)
            CHECK(kv_block_page(b, h, i, &one, &page_bytes) == KV_OK && kv_block_page(same, h, i, &other, &page_bytes) == KV_OK && memcmp(one, other, (size_t)page_bytes) == 0,
                  "%s %s: page %d of head %d", family, params, i, h);
    kv_block_free(same);
    for (int i = 0; i < 2 * H * T * DIM; i++) wide[i] = -7;
    CHECK(kv_block_decode(b, 0, T, &gaps) == KV_OK, "%s", kv_last_error());
    for (int i = 0; i < H * T * DIM; i++) CHECK(wide[2 * i] == y[i] && wide[2 * i + 1] == -7, "%s %s: element %d of a view with gaps", family, params, i);

    fill(GAUSS, 9, q, H * Q, DIM);
    for (int i = 0; i < H * Q * T; i++) s1[i] = s[i] = 0;
    CHECK(kv_block_dot(b, &tq, 0, &ts) == KV_OK, "%s", kv_last_error());
    memcpy(s1, s, sizeof s);
    const int fused_k = kv_codec_fused(c) && side == KV_SIDE_K, fused_v = kv_codec_fused(c) && side == KV_SIDE_V;
    CHECK(kv_block_dot(b, &tq, 1, &ts) == (fused_k ? KV_OK : KV_E_UNSUPPORTED), "fused dot");
    for (int i = 0; i < H * Q * T; i += 37) {
        const int h = i / (Q * T), r = i / T % Q, t = i % T;
        double want = 0;
        for (int k = 0; k < DIM; k++) want += (double)q[(h * Q + r) * DIM + k] * y[(h * T + t) * DIM + k];
        CHECK(fabs(s1[i] - want) < 1e-2 && fabs(s[i] - want) < 2e-2, "%s %s: scores %g %g, want %g", family, params, s1[i], s[i], want);
    }
    for (int i = 0; i < H * Q * T; i++) s[i] = (float)(i % 13) / 600.0f;
    CHECK(kv_block_accumulate(b, &ts, 0, &to) == KV_OK, "%s", kv_last_error());
    memcpy(o1, o, sizeof o);
    CHECK(kv_block_accumulate(b, &ts, 1, &to) == (fused_v ? KV_OK : KV_E_UNSUPPORTED), "fused accumulate");
    for (int i = 0; i < H * Q * DIM; i += 11) {
        const int h = i / (Q * DIM), r = i / DIM % Q, k = i % DIM;
        double want = 0;
        for (int t = 0; t < T; t++) want += (double)s[(h * Q + r) * T + t] * y[(h * T + t) * DIM + k];
        CHECK(fabs(o1[i] - want) < 1e-3 && fabs(o[i] - want) < 2e-3, "%s %s: output %g %g, want %g", family, params, o1[i], o[i], want);
    }
    uint8_t *data;
    double bytes;
    int heads, tokens, dim;
    CHECK(kv_block_page(b, 1, n_pages - 1, &data, &bytes) == KV_OK && bytes == (double)c->page_bytes, "page");
    CHECK(kv_block_page(b, H, 0, &data, &bytes) == KV_E_ARG && kv_block_page(b, 0, n_pages, &data, &bytes) == KV_E_ARG, "page index");
    CHECK(kv_block_shape(b, &heads, &tokens, &dim) == KV_OK && heads == H && tokens == T && dim == DIM, "shape");
    kv_block_free(b);

    static const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 3; i++) {
        x[(1 * T + 77) * DIM + 5] = bad[i];
        CHECK(kv_block_encode(&b, c, &tx) == KV_E_ARG && !b && strstr(kv_last_error(), "head 1, token 77, channel 5 is"), "%s", kv_last_error());
    }
    kv_tensor wrong = view(x, H, T, DIM - 1);
    CHECK(kv_block_encode(&b, c, &wrong) == KV_E_ARG && kv_block_encode(&b, c, NULL) == KV_E_ARG && kv_block_encode(NULL, c, &tx) == KV_E_ARG, "arguments");
    kv_block_free(NULL);
    kv_codec_free(c);
}

int main(void)
{
    printf("seeds 17 (inputs), 5, 6 (attention), 99 (hostile bytes); simd up to %d\n", kv_cpu_simd_max());
    test_params();
    test_ggml();
    test_promises();
    for (int side = 0; side < 2; side++) {
        test_blocks("raw", "", side);
        test_blocks("raw", "dtype=f32", side);
        test_blocks("int", "", side);
        test_blocks("int", "bits=2,axis=token", side);
        test_blocks("int", "bits=5,mode=ggml_0,order=interleaved", side);
    }
    for (int i = 0; i < kv_codec_count(); i++) {
        const int made = n_made;
        const clock_t from = clock();
        for (int shape = 0; shape < (int)(sizeof dims / sizeof *dims); shape++) product(i, 0, "", shape);
        product(i, 0, "", -1);
        numbers(i);
        kv_codec_desc d;
        kv_codec_describe(i, &d);
        printf("%-8s %4d instances, %4.1f s, fused attention within %.1e\n", d.name, n_made - made, (double)(clock() - from) / CLOCKS_PER_SEC, worst_fused);
        worst_fused = 0;
    }
    printf("%d instances, %d refused\n", n_made, n_refused);
    return check_end();
}
