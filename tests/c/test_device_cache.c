/* test_device_cache.c -- a device's cache against core's, step by step on the same random queries, keys and values:
 *   outputs agree to f32 rounding; pages, rows read back and pairs are equal; truncate, fork, failed steps and mutation leave both alike;
 *   lossless rows give the same bits whatever way they took.
 *
 *   test_device_cache [emulated | cuda] [PLUGIN.so [SEED [CASTS]]]       the plugin is looked for beside the tests' folder
 *
 * Core decodes tiles here (KV_PATH_TILE, no AMX), so that both sides sum f32 products over the same rows.  Tolerance, relative to the largest
 * output: 1e-5 for sums of up to a few hundred terms in another order; 4.6e-6 was the most seen.  Chunks by bf16 products (KV_PATH_BF16): 2e-2, since
 * queries, keys, weights and values are rounded to 2^-9 of themselves; a row taken in the wrong version is off by ten times that.
 * A token of the fused form reads codebooks in 8 bits (a level is off by 0.2, 0.5 and 0.5 % at 4, 3 and 2 bits): 2e-2; the same casts run again on
 * the decoding path at 1e-5. */
#include <dlfcn.h>
#include <math.h>
#include "cache_impl.h"
#include "check.h"
#include "device_plan.h"

enum { MAX_LAYERS = 2, MAX_SEQS = 3, MAX_STEPS = 16 };
static const double TOLERANCE = 1e-5, BF16_TOLERANCE = 2e-2, FUSED_TOLERANCE = 2e-2;
static const kv_backend *backend;
static char err[256];

static void must(int status)
{
    if (status < 0) {
        printf("FAIL setup: %s %s\n", kv_last_error(), err);
        exit(1);
    }
}

typedef struct side_codec { const char *family, *params; } side_codec;
typedef struct cast {
    const char *name;
    int         layers, heads, kv_heads, d, page, sink, recent, exact, window, seqs;
    float       softcap;
    side_codec  codec[2][2];           /* [head % 2][side]; head 1 NULL: as head 0 */
    int         means, page_rope;
    int         bf16;                  /* chunks by bf16 products */
    int         steps[MAX_STEPS];      /* tokens; -n: truncate sequence 0 by n; 1000: a step that is dropped; 2000: fork, and go on with the copy */
} cast;
enum { DROP = 1000, FORK = 2000 };

#define RAW32 { "raw", "dtype=f32" }
#define RAW16 { "raw", "dtype=f16" }
#define KIVI { "int", "bits=4,axis=token,group=32" }
#define INT4 { "int", "bits=4,group=8" }
#define TQ4 { "scalar", "bits=4" }
#define KIVI2 { "int", "bits=2,axis=token,group=32" }
#define INT2 { "int", "bits=2,group=16" }
#define TQ2 { "scalar", "bits=2" }
#define TQ3 { "scalar", "bits=3" }
#define TQ3N { "scalar", "bits=3,rotation=none,codebook=beta" }
static const cast CASTS[] = {
    { "raw f32, token by token", 1, 2, 2, 32, 32, 0, 0, KV_EXACT_F32, 0, 1, 0, { { RAW32, RAW32 } }, 0, 0, 0, { 1, 1, 1, 1, 1 } },
    { "raw f16, a chunk, then tokens", 2, 4, 2, 64, 32, 4, 5, KV_EXACT_F16, 0, 1, 0, { { RAW16, RAW32 } }, 0, 0, 0, { 70, 1, 1, 33, 1 } },
    { "raw, window, softcap", 2, 4, 1, 80, 32, 2, 8, KV_EXACT_BF16, 40, 1, 2, { { RAW16, RAW16 } }, 1, 0, 0, { 50, 1, 1, 60, 3, 1 } },
    { "raw, window that ends before compression", 1, 2, 1, 64, 32, 4, 48, KV_EXACT_F16, 40, 1, 0, { { RAW16, RAW16 } }, 0, 0, 0, { 30, 1, 40, 1, 5, DROP, 1, 1 } },
    { "raw, page-relative, truncated, forked", 1, 6, 2, 64, 32, 3, 7, KV_EXACT_F16, 0, 1, 0, { { RAW16, RAW16 } }, 1, 1, 0, { 67, 1, -20, 1, 9, FORK, 1, DROP, 40, -30, 1, 70, 1 } },
    { "raw, three sequences of different lengths", 2, 8, 1, 128, 64, 4, 16, KV_EXACT_F16, 0, 3, 0, { { RAW16, RAW32 } }, 0, 0, 0, { 66, -40, 1, 2, -9, 70, 1, 1 } },
    { "kivi keys", 1, 4, 2, 64, 64, 4, 32, KV_EXACT_F16, 0, 1, 0, { { KIVI, INT4 } }, 0, 0, 0, { 75, 1, 1, 60, -50, 1, DROP, 70, 1 } },
    { "kivi, page-relative, means, two sequences", 1, 10, 2, 64, 32, 0, 0, KV_EXACT_F16, 0, 2, 0, { { KIVI, KIVI } }, 1, 1, 0, { 31, 1, 1, 40, -18, 20, 1 } },
    { "codecs by head", 2, 14, 2, 64, 64, 4, 5, KV_EXACT_F16, 50, 1, 0, { { TQ4, RAW16 }, { KIVI, TQ3 } }, 1, 0, 0, { 100, 1, 1, 2, 30, FORK, 1, 40, 1 } },
    { "scalar 4 and 3 bits", 1, 4, 1, 128, 64, 4, 32, KV_EXACT_F16, 0, 1, 0, { { TQ4, TQ3 } }, 0, 0, 0, { 130, 1, -17, 1, 1, DROP, 90, 1 } },
    { "fragments: three sequences, window", 2, 8, 2, 64, 32, 4, 7, KV_EXACT_BF16, 48, 3, 0, { { TQ3N, TQ3 } }, 1, 0, 0, { 66, -40, 1, 2, -9, 70, 1, 1, FORK, 1 } },
    { "fragments: no exact window, group of 12", 1, 24, 2, 128, 96, 0, 0, KV_EXACT_F32, 0, 1, 0, { { TQ4, TQ4 } }, 1, 0, 0, { 1, 1, 130, 1, -67, 1, 1 } },
    { "fragments: head_dim 256, group of 5", 1, 5, 1, 256, 64, 9, 20, KV_EXACT_F16, 0, 2, 0, { { TQ2, TQ2 } }, 0, 0, 0, { 5, 1, 100, 1, -90, 1, 88, 1 } },
    { "a group of 20, head_dim 256", 1, 20, 1, 256, 32, 0, 4, KV_EXACT_F16, 0, 1, 0, { { RAW16, RAW16 } }, 0, 0, 0, { 1, 40, 1 } },
    { "head_dim 512 and 6", 1, 2, 1, 512, 32, 0, 4, KV_EXACT_F32, 0, 1, 0, { { RAW32, RAW16 } }, 0, 0, 0, { 20, 1, 18 } },
    { "bf16: int 4 and 2 bits", 2, 4, 2, 64, 32, 4, 5, KV_EXACT_F16, 0, 1, 0, { { INT4, INT2 } }, 0, 0, 1, { 70, 1, 61, 33, 150, 1 } },
    { "bf16: kivi, other granules, two sequences", 1, 10, 2, 64, 32, 3, 7, KV_EXACT_F16, 0, 2, 0, { { KIVI2, INT2 } }, 1, 1, 1, { 41, 60, -38, 70, 1, 44 } },
    { "bf16: scalar, window, softcap", 2, 8, 1, 128, 64, 4, 8, KV_EXACT_BF16, 70, 1, 3, { { TQ2, TQ3 } }, 1, 0, 1, { 50, 1, 90, 66, DROP, 33 } },
    { "bf16: head_dim 256, window before compression", 2, 6, 2, 256, 32, 4, 80, KV_EXACT_F16, 64, 1, 0, { { TQ2, INT2 } }, 0, 0, 1, { 100, 1, 90, -20, 41 } },
    { "bf16: fragments of 4 bits, two sequences", 1, 8, 2, 64, 64, 4, 5, KV_EXACT_F16, 0, 2, 0, { { TQ4, TQ4 } }, 1, 0, 1, { 70, 100, -38, 150, 61 } },
    { "bf16: fragments of 3 bits, window, softcap", 1, 4, 1, 128, 32, 0, 0, KV_EXACT_F16, 90, 1, 3, { { TQ3, TQ3 } }, 1, 0, 1, { 50, 90, 1, 66 } },
    { "bf16: fragments of 2 bits, many sinks", 1, 4, 1, 256, 64, 130, 8, KV_EXACT_F16, 0, 1, 0, { { TQ2, TQ2 } }, 0, 0, 1, { 200, 90, 40 } },
    { "bf16: fragments of 4 and 2 bits", 1, 6, 2, 128, 32, 1, 32, KV_EXACT_F16, 0, 1, 0, { { TQ4, TQ2 } }, 0, 0, 1, { 200, 33, 40 } },
    { "bf16: raw, two heads apart, recent 0", 1, 4, 2, 128, 32, 0, 0, KV_EXACT_F16, 0, 1, 0, { { RAW16, RAW32 } }, 0, 0, 1, { 75, 130, 1, 40 } },
    { "head_dim 6", 1, 3, 1, 6, 32, 1, 3, KV_EXACT_F16, 0, 1, 0, { { RAW32, RAW16 } }, 0, 1, 0, { 70, 1, 18 } },
};

typedef struct world {
    const cast       *k;
    kv_geometry       g;
    kv_rope           rope[MAX_LAYERS];
    int               sliding[MAX_LAYERS];
    double            freq[KV_MAX_HEAD_DIM / 2];
    kv_plan          *plan;
    kv_cache         *core[MAX_SEQS];
    kv_backend_cache *dev;
    int               max_tokens;
    double            seed, worst, worst_fused;
} world;

static float *randoms(double seed, size_t n)
{
    float *x = malloc(sizeof(float) * n);
    if (!x || kv_rng_normal(seed, 0, 0, (int)n, x) < 0) exit(3);
    return x;
}

static int make_plan(world *w)
{
    const cast *k = w->k;
    must(kv_plan_new(&w->plan, k->layers, k->kv_heads, k->d, k->page));
    must(kv_plan_window(w->plan, -1, k->sink, k->recent, k->exact));
    for (int h = 0; h < k->kv_heads; h++)
        for (int side = 0; side < 2; side++) {
            const side_codec *s = &k->codec[h % 2][side];
            if (!s->family) s = &k->codec[0][side];
            if (!backend->codec_known(s->family)) {
                SKIP("%s: '%s' has no form on the device", k->name, s->family);
                kv_plan_free(w->plan);
                return 0;
            }
            kv_codec *c;
            must(kv_codec_new(&c, s->family, s->params, k->d, k->page, side));
            must(kv_plan_set(w->plan, -1, h, side, c));
            kv_codec_free(c);
            if (k->means) {
                float *m = randoms(77 + side + 2 * h, (size_t)k->d);
                must(kv_plan_mean(w->plan, -1, h, side, m));
                free(m);
            }
        }
    if (k->page_rope) must(kv_plan_page_rope(w->plan, -1, -1, 1));
    return 1;
}

static int make_world(world *w, const cast *k)
{
    memset(w, 0, sizeof *w);
    w->k = k;
    const int n_rot = k->d / 2 * 2;
    for (int i = 0; i < n_rot / 2; i++) w->freq[i] = pow(10000.0, -2.0 * i / n_rot);
    for (int l = 0; l < k->layers; l++) {
        w->rope[l] = (kv_rope){ .n_rot = n_rot, .freq = w->freq };
        w->sliding[l] = l == 0 ? k->window : 0;
    }
    w->g = (kv_geometry){ .n_layers = k->layers, .n_heads = k->heads, .n_kv_heads = k->kv_heads, .head_dim = k->d, .rope = w->rope, .sliding = w->sliding };
    if (!make_plan(w)) return 0;
    w->max_tokens = 8;
    for (int i = 0; i < MAX_STEPS; i++) w->max_tokens += k->steps[i] > 0 && k->steps[i] < DROP ? k->steps[i] : 0;
    kv_device_plan *d;
    must(kv_device_plan_new(&d, backend, &w->g, w->plan));
    must(backend->cache_new(0, &d->plan, k->seqs, w->max_tokens, &w->dev, err, sizeof err));
    kv_device_plan_free(d);
    if (k->bf16) backend->cache_path(w->dev, KV_PATH_BF16);
    for (int s = 0; s < k->seqs; s++) {
        must(kv_cache_new(&w->core[s], &w->g, w->plan, w->max_tokens));
        kv_cache_path(w->core[s], KV_PATH_TILE);
    }
    return 1;
}

static void free_world(world *w)
{
    backend->cache_free(w->dev);
    for (int s = 0; s < w->k->seqs; s++) kv_cache_free(w->core[s]);
    kv_plan_free(w->plan);
}

/* n tokens of every sequence through `layers` layers of both. */
static void step(world *w, int n, int layers, int commit, const char *what)
{
    const cast *k = w->k;
    const size_t rows = (size_t)k->seqs * (size_t)n, nq = (size_t)(k->heads * k->d), nk = (size_t)(k->kv_heads * k->d);
    float *out = malloc(sizeof(float) * rows * nq), *ref = malloc(sizeof(float) * rows * nq);
    const float scale = 1.0f / sqrtf((float)k->d);
    for (int l = 0; l < layers; l++) {
        float *q = randoms(w->seed, rows * nq), *key = randoms(w->seed + 1, rows * nk), *v = randoms(w->seed + 2, rows * nk);
        w->seed += 3;
        memset(out, 0x7f, sizeof(float) * rows * nq);                       /* a value that is not written stands out */
        must(backend->cache_attend(w->dev, l, n, q, key, v, scale, k->softcap, out, err, sizeof err));
        for (int s = 0; s < k->seqs; s++) {
            const size_t at = (size_t)s * (size_t)n;
            must(kv_cache_attend(w->core[s], l, n, q + at * nq, key + at * nk, v + at * nk, scale, k->softcap, ref + at * nq));
        }
        double gap = 0, top = 0;
        for (size_t i = 0; i < rows * nq; i++) {
            const double g = fabs((double)out[i] - ref[i]);
            if (!(g <= gap)) gap = g;                                        /* NaN counts */
            top = fmax(top, fabs((double)ref[i]));
        }
        const int fused = n == 1 && strstr(backend->cache_paths(w->dev), "fused") != NULL;
        double *worst = fused ? &w->worst_fused : &w->worst;
        if (!(gap / top <= *worst)) *worst = gap / top;
        CHECK(gap <= (fused ? FUSED_TOLERANCE : k->bf16 ? BF16_TOLERANCE : TOLERANCE) * top, "%s, %s, layer %d: off core's attention by %.3g of %.3g", k->name, what, l, gap, top);
        free(q);
        free(key);
        free(v);
    }
    free(out);
    free(ref);
    if (!commit) return;
    must(backend->cache_commit(w->dev, n, err, sizeof err));
    for (int s = 0; s < k->seqs; s++) must(kv_cache_commit(w->core[s], n));
}

/* Pages, rows, counts. */
static void compare(world *w, const char *what)
{
    const cast *k = w->k;
    float *a = malloc(sizeof(float) * (size_t)(w->max_tokens * k->d)), *b = malloc(sizeof(float) * (size_t)(w->max_tokens * k->d));
    double compressed, total, core_compressed = 0, core_total = 0;
    int pages = 0, other_pages = 0, other_rows = 0, other_refusals = 0;
    for (int s = 0; s < k->seqs; s++) {
        const int n = kv_cache_n_tokens(w->core[s]);
        CHECK(backend->cache_n_tokens(w->dev, s) == n, "%s, %s: sequence %d has %d tokens, core %d", k->name, what, s, backend->cache_n_tokens(w->dev, s), n);
        for (int l = 0; l < k->layers; l++)
            for (int i = 0; i < k->kv_heads * 2; i++) {
                const kv_store *st = kv_cache_store(w->core[s], l, i / 2, i % 2);
                const size_t bytes = kv_plan_slot(w->plan, l, i / 2, i % 2)->codec->page_bytes;
                uint8_t *page = malloc(bytes);
                for (int g = st->first_page; g < (st->n_encoded + k->page - 1) / k->page; g++, pages++) {
                    must(backend->cache_page(w->dev, s, l, i / 2, i % 2, g, page, err, sizeof err));
                    other_pages += memcmp(page, st->page[g], bytes) != 0;
                }
                free(page);
                for (int from = 0; from < n; from += kv_max(1, n / 3)) {
                    const int x = kv_cache_read(w->core[s], l, i / 2, i % 2, from, n, a), y = backend->cache_read(w->dev, s, l, i / 2, i % 2, from, n, b, err, sizeof err);
                    other_refusals += x != y;
                    if (x == KV_OK && y == KV_OK) other_rows += memcmp(a, b, sizeof(float) * (size_t)((n - from) * k->d)) != 0;
                }
            }
        kv_pairs p;
        kv_cache_pairs(w->core[s], &p);
        core_compressed += p.compressed;
        core_total += p.total;
    }
    CHECK(other_pages == 0, "%s, %s: %d of %d pages are not core's bytes", k->name, what, other_pages, pages);
    CHECK(other_rows == 0, "%s, %s: %d runs of rows are not core's", k->name, what, other_rows);
    CHECK(other_refusals == 0, "%s, %s: %d reads end otherwise than core's", k->name, what, other_refusals);
    backend->cache_pairs(w->dev, &compressed, &total);
    CHECK(compressed == core_compressed && total == core_total, "%s, %s: pairs %g of %g, core %g of %g", k->name, what, compressed, total, core_compressed, core_total);
    free(a);
    free(b);
}

static void run_path(const cast *k, double seed, int path, int *fused)
{
    world w;
    if (!make_world(&w, k)) return;
    w.seed = seed;
    backend->cache_path(w.dev, k->bf16 ? KV_PATH_BF16 : path);
    for (int i = 0; i < MAX_STEPS && k->steps[i]; i++) {
        const int n = k->steps[i];
        char what[64];
        snprintf(what, sizeof what, "step %d (%d)", i, n);
        if (n == DROP) {                                                     /* a chunk that reaches no commit in both; truncate takes it back */
            step(&w, kv_min(37, w.max_tokens - kv_cache_n_tokens(w.core[0])), k->layers, 0, what);
            for (int s = 0; s < k->seqs; s++) {
                must(backend->cache_truncate(w.dev, s, kv_cache_n_tokens(w.core[s]), err, sizeof err));
                must(kv_cache_truncate(w.core[s], kv_cache_n_tokens(w.core[s])));
            }
        } else if (n == FORK) {
            kv_backend_cache *copy;
            must(backend->cache_fork(w.dev, &copy, err, sizeof err));
            backend->cache_free(w.dev);
            w.dev = copy;
        } else if (n < 0) {
            const int to = kv_cache_n_tokens(w.core[0]) + n, a = kv_cache_truncate(w.core[0], to), b = backend->cache_truncate(w.dev, 0, to, err, sizeof err);
            CHECK(a == b, "%s, %s: truncate to %d is %d, core %d", k->name, what, to, b, a);
        } else step(&w, n, k->layers, 1, what);
        compare(&w, what);
    }
    printf("%-44s off core by %.2g of the output", k->name, w.worst);
    if (w.worst_fused > 0) printf(", fused %.2g", w.worst_fused);
    printf("\n");
    *fused = w.worst_fused > 0;
    free_world(&w);
}
static void run(const cast *k, double seed)
{
    int fused = 0, again;
    run_path(k, seed, KV_PATH_FUSED, &fused);
    if (fused) run_path(k, seed, KV_PATH_TILE, &again);
}

/* Shapes, windows and steps at random. */
static void test_random(uint32_t seed, int n_casts)
{
    static const side_codec codecs[] = { RAW16, RAW32, INT4, KIVI, TQ4, TQ3, { "fp", "grid=e4m3,scale=token" }, { "polar", "" }, { "nuq", "" } };
    static const int dims[] = { 64, 80, 128, 32 }, sinks[] = { 0, 1, 4, 40 }, recents[] = { 0, 1, 7, 33 }, windows[] = { 0, 0, 0, 20, 45 }, pages[] = { 32, 64, 96 };
    for (int i = 0; i < n_casts; i++) {
        uint32_t r[32];
        for (uint32_t j = 0; j < 8; j++) kv_rng_u32(seed, 0, (uint32_t)i, j, r + 4 * j);
        cast k = { .name = "random", .layers = 1 + (int)(r[0] % 2), .kv_heads = 1 + (int)(r[1] % 2), .d = dims[r[2] % 4], .page = pages[r[3] % 3], .sink = sinks[r[4] % 4], .recent = recents[r[5] % 4],
                   .exact = (int)(r[6] % 3), .window = windows[r[7] % 5], .seqs = 1 + (int)(r[8] % 3 == 0), .softcap = r[9] % 4 ? 0.0f : 3.0f, .means = r[10] % 2, .page_rope = r[11] % 3 == 0, .bf16 = r[23] % 4 == 0 };
        k.heads = k.kv_heads * (1 + (int)(r[12] % 8));
        for (int h = 0; h < 2; h++)
            for (int side = 0; side < 2; side++) {
                const uint32_t first = r[13 + 2 * h + side] % (sizeof codecs / sizeof *codecs);
                for (uint32_t t = 0; t < 9; t++) {
                    kv_codec *c;
                    k.codec[h][side] = codecs[(first + t) % 9];
                    if (!backend->codec_known(k.codec[h][side].family) || kv_codec_new(&c, k.codec[h][side].family, k.codec[h][side].params, k.d, k.page, side) < 0) continue;
                    kv_codec_free(c);
                    break;
                }
            }
        int total = 0;
        for (int j = 0; j < 6; j++) {
            const uint32_t x = r[17 + j];
            k.steps[j] = x % 3 == 0 ? 1 : x % 7 == 1 && total > 30 ? -(int)(x / 7 % 30) - 1 : x % 11 == 2 ? DROP : x % 13 == 3 ? FORK : 1 + (int)(x / 13 % 50);
            if (k.steps[j] < DROP) total += k.steps[j];
        }
        char name[160];
        snprintf(name, sizeof name, "random %u/%d:%s d %d heads %d/%d page %d sink %d recent %d window %d %s.%s %s.%s", seed, i, k.bf16 ? " bf16" : "", k.d, k.heads, k.kv_heads, k.page, k.sink, k.recent, k.window,
            k.codec[0][0].family, k.codec[0][1].family, k.codec[1][0].family, k.codec[1][1].family);
        k.name = name;
        run(&k, 1e6 + 1000.0 * i);
    }
}

/* Raw f32 rows in any window give one output's bits. */
static void test_identity(void)
{
    static const int window[][2] = { { 0, 0 }, { 0, 4096 }, { 4, 32 }, { 4096, 0 }, { 0, 100 } };
    float *first = NULL;
    enum { N = 210, HEADS = 4, KV = 2, D = 64 };
    float *q = randoms(5, N * HEADS * D), *key = randoms(6, N * KV * D), *v = randoms(7, N * KV * D);
    for (int i = 0; i < 5; i++) {
        cast k = { "identity", 1, HEADS, KV, D, 64, window[i][0], window[i][1], KV_EXACT_F32, 0, 1, 0, { { RAW32, RAW32 } }, 0, 0, 0, { N } };
        world w;
        if (!make_world(&w, &k)) return;
        float *out = calloc(N * HEADS * D, sizeof(float));
        static const int at[] = { 0, 100, 101, 203, 209, N };
        for (int s = 0; s < 5; s++) {
            const int n = at[s + 1] - at[s];
            must(backend->cache_attend(w.dev, 0, n, q + at[s] * HEADS * D, key + at[s] * KV * D, v + at[s] * KV * D, 0.125f, 0, out + at[s] * HEADS * D, err, sizeof err));
            must(backend->cache_commit(w.dev, n, err, sizeof err));
        }
        if (!first) first = out;
        else {
            CHECK(memcmp(first, out, sizeof(float) * N * HEADS * D) == 0, "raw f32 with sink %d recent %d gives other bits", window[i][0], window[i][1]);
            free(out);
        }
        free_world(&w);
    }
    free(first);
    free(q);
    free(key);
    free(v);
}

/* Mutated pages are core's mutated pages; refusals are told in words; the ledger adds up. */
static void test_rest(void)
{
    world w;
    if (!make_world(&w, &CASTS[1])) return;
    w.seed = 99;
    step(&w, 70, 2, 1, "before mutation");
    double n = 0;
    must(backend->cache_mutate(w.dev, 12, 0.05, &n, err, sizeof err));
    const double core = kv_cache_mutate(w.core[0], 12, 0.05);
    CHECK(n == core && n > 0, "mutate flipped %g bytes, core %g", n, core);
    int other = 0;
    uint8_t page[32 * 64 * 4];
    for (int i = 0; i < 8; i++) {
        const kv_store *st = &w.core[0]->store[i];
        for (int g = 0; g < (st->n_encoded + 31) / 32; g++) {
            must(backend->cache_page(w.dev, 0, i / 4, i / 2 % 2, i % 2, g, page, err, sizeof err));
            other += memcmp(page, st->page[g], w.plan->slot[i].codec->page_bytes) != 0;
        }
    }
    CHECK(other == 0, "%d mutated pages are not core's", other);
    double c[4], sum = 0, whole = 0;
    for (int l = -1; l < 2; l++) {
        must(backend->cache_bytes(w.dev, l, -1, &c[0], &c[1], &c[2], &c[3]));
        if (l < 0) whole = c[0] + c[1] + c[2];
        else sum += c[0] + c[1] + c[2];
    }
    CHECK(fabs(sum - whole) < 1, "layers' bytes %g, all %g", sum, whole);
    float *x = randoms(1, 64 * 64 * 8), out[8 * 64];
    CHECK(backend->cache_attend(w.dev, 2, 1, x, x, x, 1, 0, out, err, sizeof err) == KV_E_ARG && strstr(err, "layer 2"), "layer past the end: %s", err);
    CHECK(backend->cache_attend(w.dev, 0, w.max_tokens, x, x, x, 1, 0, out, err, sizeof err) == KV_E_ARG && strstr(err, "max_tokens"), "too many tokens: %s", err);
    x[3] = NAN;
    CHECK(backend->cache_attend(w.dev, 0, 1, x, x, x, 1, 0, out, err, sizeof err) == KV_E_ARG && strstr(err, "not finite"), "NaN: %s", err);
    x[3] = 1e6f;
    CHECK(backend->cache_attend(w.dev, 0, 1, x, x, x, 1, 0, out, err, sizeof err) == KV_E_ARG && strstr(err, "does not fit"), "past f16: %s", err);
    CHECK(backend->cache_read(w.dev, 0, 0, 0, 0, 60, 71, x, err, sizeof err) == KV_E_ARG, "read past the end");
    CHECK(backend->cache_page(w.dev, 0, 0, 0, 0, 99, page, err, sizeof err) == KV_E_ARG, "page past the end");
    CHECK(backend->cache_commit(w.dev, 0, err, sizeof err) == KV_E_ARG, "commit of nothing");
    free(x);
    step(&w, 1, 2, 1, "after mutation");
    CHECK(strstr(backend->cache_paths(w.dev), "k: rows ") && strstr(backend->cache_paths(w.dev), "chunks: decoded, f32 "), "paths are '%s'", backend->cache_paths(w.dev));
    free_world(&w);
}

int main(int argc, char **argv)
{
    const char *const device = argc > 1 ? argv[1] : "emulated";
    char path[4200], self[4096];
    const ssize_t got = readlink("/proc/self/exe", self, sizeof self - 1);
    self[got > 0 ? got : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash) *slash = 0;
    snprintf(path, sizeof path, "%s/../libkelvin_%s.so", self, device);
    void *so = dlopen(argc > 2 ? argv[2] : path, RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        SKIP("no device '%s': %s", device, dlerror());
        return check_end();
    }
    const kv_backend *(*get)(void);
    void *symbol = dlsym(so, "kv_backend_get");
    memcpy(&get, &symbol, sizeof get);
    backend = get();
    int n = 0, driver = 0, runtime = 0;
    if (backend->probe(&n, &driver, &runtime, err, sizeof err) < 0 || n == 0) {
        SKIP("no device '%s': %s", device, err);
        return check_end();
    }
    kv_cpu_limit(KV_SIMD_AVX2);                                              /* no AMX: its products are pairs of bf16 */
    for (size_t i = 0; i < sizeof CASTS / sizeof *CASTS; i++) run(&CASTS[i], 1000.0 * (double)i);
    test_random(argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 1, argc > 4 ? atoi(argv[4]) : 8);
    test_identity();
    test_rest();
    return check_end();
}
