/* test_calib.c -- moments in a slot's frame against sums over explicitly rotated rows, and a codec's way to its tables. */
#include <math.h>
#include <string.h>
#include "calib.h"
#include "check.h"

enum { LAYERS = 1, D = 16, N = 40, W = 24 };

static kv_tensor rows_of(float *x, int n) { return (kv_tensor){ .data = x, .dtype = KV_F32, .ndim = 2, .shape = { n, D }, .stride = { D, 1 } }; }

/* A calibration filled by hand: one layer, one head, n rows of keys before RoPE at positions 0 .. n-1. */
static kv_calib *by_hand(kv_model *m, const float *k_pre, const float *q_pre)
{
    kv_calib *c;
    if (kv_calib_alloc(&c, m, 8) < 0) return NULL;
    c->count = N;
    c->n_sample = 8;
    const kv_rope *r = &m->geo.rope[0];
    for (int kind = 0; kind < KV_CALIB_KINDS; kind++) {
        for (int i = 0; i < D; i++) c->shift[kind][i] = 0.25f * (float)i;
        for (int t = 0; t < N; t++) {
            float x[D];
            memcpy(x, (kind >= KV_CALIB_Q ? q_pre : k_pre) + t * D, sizeof x);
            if (kind == KV_CALIB_K || kind == KV_CALIB_Q) kv_rope_rows(r, x, D, 1, t, 0);
            double *p = c->product[kind];
            for (int i = 0; i < D; i++) {
                const double a = (double)x[i] - c->shift[kind][i];
                c->sum[kind][i] += a;
                for (int k = 0; k <= i; k++) *p++ += a * ((double)x[k] - c->shift[kind][k]);
            }
            if (t < 8) {
                c->position[t] = t * 5;
                for (int i = 0; i < D; i++)
                    c->sample[0][t * D + i] = c->sample[1][t * D + i] = kv_f32_to_f16(k_pre[t * 5 * D + i] - c->shift[KV_CALIB_K_PRE][i]);
            }
        }
    }
    return c;
}

/* Largest difference from sums over the rows, each turned by every offset 0 .. w-1 (w = 0: by its own position), less r. */
static double worst_moment(const float *x, const kv_rope *rope, int w, const float *r, const double *mean, const double *second)
{
    double m[D] = { 0 }, s[D][D] = { { 0 } }, worst = 0;
    const int turns = w ? w : 1;
    for (int t = 0; t < N; t++)
        for (int p = 0; p < turns; p++) {
            double y[D];
            for (int i = 0; i < D; i++) y[i] = x[t * D + i];
            for (int i = 0; rope && i < rope->n_rot / 2; i++) {
                const double a = (w ? p : t) * rope->freq[i], u = y[i], v = y[i + rope->n_rot / 2];
                y[i] = u * cos(a) - v * sin(a);
                y[i + rope->n_rot / 2] = v * cos(a) + u * sin(a);
            }
            for (int i = 0; r && i < D; i++) y[i] -= r[i];
            for (int i = 0; i < D; i++) {
                m[i] += y[i] / (N * turns);
                for (int k = 0; k < D; k++) s[i][k] += y[i] * y[k] / (N * turns);
            }
        }
    for (int i = 0; i < D; i++) {
        if (mean) worst = fmax(worst, fabs(m[i] - mean[i]));
        for (int k = 0; k < D; k++) worst = fmax(worst, fabs(s[i][k] - second[i * D + k]));
    }
    return worst;
}

static float k[N * D], q[N * D];

static const int sliding[1];
typedef struct toy { kv_model m; kv_rope rope; double freq[D / 2]; } toy;

/* Geometry alone, that nothing here runs: one layer, one head; biased keys and queries to go with it. */
static void set_toy(toy *x, int n_rot)
{
    memset(x, 0, sizeof *x);
    for (int i = 0; i < n_rot / 2; i++) x->freq[i] = pow(100, -2.0 * i / n_rot);
    x->rope = (kv_rope){ n_rot, x->freq };
    atomic_init(&x->m.refs, 1 << 20);                      /* never freed */
    x->m.info.n_layers = x->m.info.n_kv_heads = x->m.info.n_heads = 1;
    x->m.info.head_dim = D;
    x->m.geo = (kv_geometry){ 1, 1, 1, D, &x->rope, sliding };
    kv_rng_normal(7, n_rot, 0, N * D, k);
    kv_rng_normal(8, n_rot, 0, N * D, q);
    for (int i = 0; i < N * D; i++) k[i] += (float)(i % D) * 3, q[i] += 2;
}

static void test_frames(int n_rot)
{
    toy model;
    set_toy(&model, n_rot);
    kv_model *m = &model.m;
    const kv_rope rope = model.rope;
    float removed[D];
    for (int i = 0; i < D; i++) removed[i] = (float)i - 2;
    kv_calib *c = by_hand(m, k, q);
    kv_moments *x;
    for (int w = 0; w <= W; w += W)
        for (int r = 0; r < 2; r++) {
            CHECK(kv_moments_new(&x, c, 0, 0, KV_SIDE_K, w, r ? removed : NULL) == KV_OK, "%s", kv_last_error());
            double off = worst_moment(k, &rope, w, r ? removed : NULL, x->mean, x->second);
            CHECK(off < 2e-4, "keys: n_rot %d, w %d, removed %d: off by %g", n_rot, w, r, off);    /* RoPE's cosines are floats */
            off = worst_moment(q, &rope, w, NULL, NULL, x->query);
            CHECK(off < 2e-4, "queries: n_rot %d, w %d: off by %g", n_rot, w, off);
            off = worst_moment(k, NULL, 0, NULL, x->mean_pre, x->second_pre);
            CHECK(off < 1e-9, "before RoPE: off by %g", off);
            CHECK(x->of == c && x->rope == &m->geo.rope[0] && x->n == N && x->n_query == N && x->n_sample == 8 && x->page_tokens == w, "books");
            for (int t = 0; t < 8; t++) {
                float y[D];
                memcpy(y, k + t * 5 * D, sizeof y);
                kv_rope_rows(&rope, y, D, 1, w ? t * 5 % w : t * 5, 0);
                for (int i = 0; i < D; i++) {
                    const float want = y[i] - (r ? removed[i] : 0);
                    CHECK(fabsf(x->sample[t * D + i] - want) < 0.05f, "sample %d, %d: %g, not %g", t, i, (double)x->sample[t * D + i], (double)want);
                }
            }
            kv_moments_free(x);
        }
    CHECK(kv_moments_new(&x, c, 0, 0, KV_SIDE_V, W, removed) == KV_OK, "%s", kv_last_error());
    double off = worst_moment(k, NULL, 0, removed, x->mean, x->second);
    CHECK(off < 1e-9 && !x->query && !x->rope && x->page_tokens == 0, "values: off by %g", off);
    kv_moments_free(x);
    CHECK(kv_moments_new(&x, c, 0, 1, KV_SIDE_V, 0, NULL) == KV_E_ARG && strstr(kv_last_error(), "head 2 is outside 1..1"), "%s", kv_last_error());
    CHECK(kv_moments_new(&x, c, 0, 0, 2, 0, NULL) == KV_E_ARG, "%s", kv_last_error());
    c->product[KV_CALIB_K_PRE][5] = NAN;
    CHECK(kv_moments_new(&x, c, 0, 0, KV_SIDE_K, W, NULL) == KV_E_ARG && strstr(kv_last_error(), "channel 3 is not finite"), "%s", kv_last_error());
    c->work = (kv_calib_work *)c;                          /* a chunk on its way */
    CHECK(kv_moments_new(&x, c, 0, 0, KV_SIDE_V, 0, NULL) == KV_E_UNCALIBRATED, "%s", kv_last_error());
    c->work = NULL;
    kv_calib_free(c);
}

/* ---- the artifact */

static void seal(uint8_t *image, size_t n, int payload)    /* makes the checksums fit again */
{
    char hex[65];
    for (int part = payload ? 0 : 1; part < 2; part++) {
        kv_sha256(part ? image : image + 256, part ? 224 : (double)(n - 256), hex);
        for (int i = 0; i < 32; i++) sscanf(hex + 2 * i, "%2hhx", image + (part ? 224 : 168) + i);
    }
}

static void refused(toy *model, const uint8_t *image, size_t n, int status, const char *want)
{
    kv_calib *c;
    const int got = kv_calib_parse(&c, &model->m, image, n, "x");
    CHECK(got == status && !c && strstr(kv_last_error(), want) && !strchr(kv_last_error(), '\n'), "%s: %s (want: %s)", kv_status_name(got), kv_last_error(), want);
    kv_calib_free(c);
}

static void test_artifact(void)
{
    toy model, other;
    uint8_t *image, *again;
    size_t n, n_again;
    int32_t tokens[200];
    set_toy(&model, D);
    kv_calib *c = by_hand(&model.m, k, q), *loaded;
    for (int t = 0; t < 200; t++) tokens[t] = t * t % 1009;
    CHECK(kv_calib_remember(c, tokens, 130, 4) == KV_OK && kv_calib_remember(c, tokens + 130, 70, 4) == KV_OK && c->n_block == 4 + 2, "%d blocks", c->n_block);
    CHECK(kv_calib_note(c, "{\"text\":\"a\"}") == KV_OK && kv_calib_write(c, &image, &n) == KV_OK, "%s", kv_last_error());
    CHECK(kv_calib_parse(&loaded, &model.m, image, n, "x") == KV_OK, "%s", kv_last_error());
    CHECK(kv_calib_write(loaded, &again, &n_again) == KV_OK && n == n_again && memcmp(image, again, n) == 0, "read and written it is other bytes");
    kv_moments *a, *b;
    kv_moments_new(&a, c, 0, 0, KV_SIDE_K, W, NULL);
    kv_moments_new(&b, loaded, 0, 0, KV_SIDE_K, W, NULL);
    CHECK(memcmp(a->second, b->second, sizeof(double) * D * D) == 0 && memcmp(a->query, b->query, sizeof(double) * D * D) == 0 &&
          memcmp(a->sample, b->sample, sizeof(float) * 8 * D) == 0 && memcmp(a->position, b->position, sizeof(int32_t) * 8) == 0, "other moments");
    kv_moments_free(a);
    kv_moments_free(b);
    kv_calib_info info;
    CHECK(kv_calib_get_info(loaded, &info) == KV_OK && strcmp(info.notes, "{\"text\":\"a\"}") == 0 && info.n_chunks == 2 && info.context == 70 && info.skip == 4, "books");
    kv_calib_free(loaded);

    set_toy(&other, D);
    other.freq[3] *= 1.01;
    refused(&other, image, n, KV_E_ARG, "artifact 'x': made for RoPE ");
    set_toy(&other, D);
    other.m.info.n_ff = 7;
    refused(&other, image, n, KV_E_ARG, "artifact 'x': made for model ");
    other.m.info.n_heads = 2;
    refused(&other, image, n, KV_E_ARG, "made for 1 layers, 1 K/V heads, 1 heads, head_dim 16; model '' has 1, 1, 2, 16");
    for (size_t cut = 0; cut < n; cut += cut < 300 ? 1 : 997) refused(&model, image, cut, KV_E_CORRUPT, "artifact 'x': ");
    for (size_t at = 0; at < n; at += at < 256 ? 1 : 61) {                     /* any flipped byte is seen */
        image[at] ^= 0x10;
        CHECK(kv_calib_parse(&loaded, &model.m, image, n, "x") < 0, "byte %zu flipped is not seen", at);
        image[at] ^= 0x10;
    }
    memcpy(again, image, n);
    again[8] = 2;
    seal(again, n, 0);
    refused(&model, again, n, KV_E_UNSUPPORTED, "artifact 'x': version 2, this build reads 1");
    for (uint32_t seed = 0; seed < 3000; seed++) {                             /* forged: checksums that fit over other bytes */
        uint32_t r[4];
        memcpy(again, image, n);
        for (uint32_t i = 0; i <= seed % 3; i++) {
            kv_rng_u32(seed, 1, 0, i, r);
            again[r[0] % (r[1] & 1 ? 72 : (uint32_t)n)] = (uint8_t)(r[2] & 1 ? 0xff : r[3]);
        }
        seal(again, n, 1);
        if (kv_calib_parse(&loaded, &model.m, again, n, "x") < 0) continue;
        if (kv_moments_new(&a, loaded, 0, 0, (int)(seed & 1), seed & 2 ? W : 0, NULL) == KV_OK) {
            bool finite = true;
            for (int i = 0; i < D * D; i++) finite &= isfinite(a->second[i]) && (!a->query || isfinite(a->query[i]));
            CHECK(finite, "seed %u: moments are not finite", seed);
            kv_moments_free(a);
        }
        kv_calib_free(loaded);
    }

    int found, of;
    CHECK(kv_calib_overlap(c, tokens, 200, &found, &of) == KV_OK && found == 6 && of == 6, "%d of %d", found, of);
    CHECK(kv_calib_overlap(c, tokens + 50, 100, &found, &of) == KV_OK && found == 2, "%d of %d", found, of);   /* runs at 65 and 97 are whole */
    int32_t shifted[400] = { 0 };
    memcpy(shifted + 137, tokens, sizeof tokens);
    CHECK(kv_calib_overlap(c, shifted, 400, &found, &of) == KV_OK && found == 6, "at another offset: %d of %d", found, of);
    for (int t = 0; t < 400; t++) shifted[t] = t * 7 % 1013;
    CHECK(kv_calib_overlap(c, shifted, 400, &found, &of) == KV_OK && found == 0, "another text: %d of %d", found, of);
    CHECK(kv_calib_overlap(c, NULL, 0, &found, &of) == KV_OK && found == 0, "no tokens");

    char path[] = "/tmp/kelvin_test_calib_XXXXXX", hex[65];
    const int fd = mkstemp(path);
    CHECK(fd >= 0 && kv_calib_save(c, path) == KV_OK, "%s", kv_last_error());
    CHECK(kv_calib_load(&loaded, &model.m, path) == KV_OK && kv_calib_digest(loaded, hex) == KV_OK && strlen(hex) == 64, "%s", kv_last_error());
    kv_calib_free(loaded);
    close(fd);
    unlink(path);
    CHECK(kv_calib_load(&loaded, &model.m, path) == KV_E_IO && kv_calib_load(&loaded, &model.m, "/") < 0 && kv_calib_save(c, "/nowhere/x") == KV_E_IO, "%s", kv_last_error());
    kv_free(image);
    kv_free(again);
    kv_calib_free(c);
}

static void test_rows(void)
{
    static float x[N * D];
    kv_moments *m;
    kv_rng_normal(9, 0, 0, N * D, x);
    CHECK(kv_moments_of_rows(&m, D, KV_SIDE_K, x, N, NULL, 0) == KV_OK, "%s", kv_last_error());
    CHECK(worst_moment(x, NULL, 0, NULL, m->mean, m->second) < 1e-9, "rows");
    CHECK(m->query[0] == 1 && m->query[1] == 0 && m->n_query == 0 && m->n_sample == N && m->position[3] == 3, "white queries, all rows");
    float sorted[N];
    kv_moments_sorted(m, 2, sorted);
    for (int t = 1; t < N; t++) CHECK(sorted[t - 1] <= sorted[t], "sorted at %d", t);
    kv_moments_free(m);
    x[3 * D + 1] = NAN;
    CHECK(kv_moments_of_rows(&m, D, KV_SIDE_K, x, N, NULL, 0) == KV_E_ARG && strstr(kv_last_error(), "x[3][1] = nan"), "%s", kv_last_error());
    CHECK(kv_moments_of_rows(&m, D, KV_SIDE_K, x, 0, NULL, 0) == KV_E_ARG, "%s", kv_last_error());
}

/* Every codec of the registry: made on noise, its tables taken out and given back, cut and flipped tables refused or harmless. */
static void test_codecs(void)
{
    enum { DIM = 64, ROWS = 256, P = 64 };
    static float x[ROWS * DIM];
    kv_rng_normal(10, 0, 0, ROWS * DIM, x);
    const kv_tensor t = { .data = x, .dtype = KV_F32, .ndim = 2, .shape = { ROWS, DIM }, .stride = { DIM, 1 } };
    for (int i = 0; i < kv_codec_count(); i++) {
        kv_codec_desc desc;
        kv_codec_describe(i, &desc);
        for (int side = 0; side < 2; side++) {
            kv_codec *c, *again;
            if (!(desc.caps & (side ? KV_CAP_VALUES : KV_CAP_KEYS))) continue;
            CHECK(kv_codec_fit(&c, desc.name, "", DIM, P, side, &t, NULL) == KV_OK, "%s: %s", desc.name, kv_last_error());
            const void *blob;
            double bytes;
            CHECK(kv_codec_blob(c, &blob, &bytes) == KV_OK && (bytes > 0) == (blob != NULL), "%s", desc.name);
            CHECK(!(desc.caps & KV_CAP_CALIBRATED) || bytes > 0, "%s: no tables", desc.name);
            CHECK(((uintptr_t)blob & 63) == 0, "%s: tables are not aligned", desc.name);
            if (desc.caps & KV_CAP_CALIBRATED) {
                CHECK(kv_codec_new(&again, desc.name, "", DIM, P, side) == KV_E_UNCALIBRATED && strstr(kv_last_error(), "needs calibration"), "%s: %s", desc.name, kv_last_error());
            }
            if (bytes > 0) {
                CHECK(kv_codec_new_calibrated(&again, desc.name, "", DIM, P, side, blob, bytes) == KV_OK && again->page_bytes == c->page_bytes, "%s: %s", desc.name, kv_last_error());
                kv_codec_free(again);
                static uint8_t bad[1 << 20];
                CHECK(kv_codec_new_calibrated(&again, desc.name, "", DIM, P, side, blob, bytes - 1) < 0, "%s: tables cut by a byte are taken", desc.name);
                for (uint32_t seed = 0; seed < 200 && bytes <= sizeof bad; seed++) {
                    uint32_t r[4];
                    kv_rng_u32(seed, 0, 0, 0, r);
                    memcpy(bad, blob, (size_t)bytes);
                    bad[r[0] % (size_t)bytes] ^= (uint8_t)(1u << (r[1] & 7));
                    if (seed < 4) memset(bad, seed & 1 ? 0xff : 0, seed & 2 ? (size_t)bytes : (size_t)bytes / 2);
                    if (kv_codec_new_calibrated(&again, desc.name, "", DIM, P, side, bad, bytes) < 0) continue;
                    kv_block *b;
                    kv_tensor three = { .data = x, .dtype = KV_F32, .ndim = 3, .shape = { 1, ROWS, DIM }, .stride = { ROWS * DIM, DIM, 1 } };
                    if (kv_block_encode(&b, again, &three) == KV_OK) {
                        static float y[ROWS * DIM];
                        three.data = y;
                        kv_block_decode(b, 0, ROWS, &three);
                        kv_block_free(b);
                    }
                    kv_codec_free(again);
                }
            } else {
                CHECK(kv_codec_new_calibrated(&again, desc.name, "", DIM, P, side, x, 64) < 0, "%s: tables it has no use for are taken", desc.name);
            }
            kv_codec_free(c);
        }
    }
    kv_codec *c;
    CHECK(kv_codec_new_calibrated(&c, "int", "", DIM, P, 0, NULL, 3) == KV_E_ARG, "%s", kv_last_error());
    CHECK(kv_codec_new_calibrated(&c, "int", "", DIM, P, 0, x, -1) == KV_E_ARG, "%s", kv_last_error());
    float few[2 * D] = { 0 };
    kv_tensor narrow = rows_of(few, 2);
    CHECK(kv_codec_fit(&c, "int", "", DIM, P, 0, &narrow, NULL) == KV_E_ARG && strstr(kv_last_error(), "[rows, 64] is needed"), "%s", kv_last_error());
    CHECK(kv_codec_new_nominal(&c, "int", "bits=3", DIM, P, 0) == KV_OK, "%s", kv_last_error());
    kv_codec_free(c);
}

int main(void)
{
    test_frames(D);
    test_frames(D / 2);                                    /* partial RoPE */
    test_frames(0);
    test_artifact();
    test_rows();
    test_codecs();
    return check_end();
}
