/* test_cache.c -- the cache's promises, on random data and many small geometries:
 *   a chunk gives every query what feeding its tokens one at a time would;
 *   both agree with attention in double precision over the rows kv_cache_read returns;
 *   results do not depend on the number of threads, nor on which lossless way rows took;
 *   the ledger is what was allocated; truncate, fork, mutate and failed steps leave a working cache. */
#include <math.h>
#include <malloc.h>
#include "amx.h"
#include "cache_impl.h"
#include "check.h"

/* ---- allocations, seen from outside: requested bytes of every aligned block alive */

#if !defined(__SANITIZE_ADDRESS__) && defined(__GLIBC__)
#define COUNT_ALLOCATIONS 1
void *__libc_memalign(size_t align, size_t n);
void __libc_free(void *p);
static struct { void *p; size_t n; } live[1 << 16];
static size_t live_bytes;
static int counting;

static size_t live_slot(const void *p)
{
    size_t i = ((uintptr_t)p >> 6) * 0x9e3779b97f4a7c15ull >> 48;
    while (live[i].p && live[i].p != p) i = (i + 1) & 0xffff;
    return i;
}
int posix_memalign(void **out, size_t align, size_t n)
{
    if (!(*out = __libc_memalign(align, n))) return 12;
    if (counting) {
        const size_t i = live_slot(*out);
        if (live[i].p) live_bytes -= live[i].n;
        live[i].p = *out;
        live[i].n = n;
        live_bytes += n;
    }
    return 0;
}
void free(void *p)
{
    if (counting && p) {
        const size_t i = live_slot(p);
        if (live[i].p) {                     /* the key stays: an open-addressed table must not lose its chain */
            live_bytes -= live[i].n;
            live[i].n = 0;
        }
    }
    __libc_free(p);
}
#endif

/* ---- geometry, plans, data */

enum { MAX_LAYERS = 2 };
typedef struct setup {
    kv_geometry g;
    kv_rope     rope[MAX_LAYERS];
    int         sliding[MAX_LAYERS];
    double      freq[KV_MAX_HEAD_DIM / 2];
} setup;

static void make_setup(setup *s, int layers, int heads, int kv_heads, int d, int window)
{
    memset(s, 0, sizeof *s);
    for (int i = 0; i < d / 2; i++) s->freq[i] = pow(10000.0, -2.0 * i / d);
    for (int l = 0; l < layers; l++) {
        s->rope[l] = (kv_rope){ .n_rot = d, .freq = s->freq };
        s->sliding[l] = l == 0 ? window : 0;
    }
    s->g = (kv_geometry){ .n_layers = layers, .n_heads = heads, .n_kv_heads = kv_heads, .head_dim = d, .rope = s->rope, .sliding = s->sliding };
}

#define AMX_ERROR 3e-5                   /* of a chunk's products on pairs of bf16; 2.1e-5 measured */
typedef struct choice { const char *kf, *kp, *vf, *vp; double tolerance; int means, page_rope, path; } choice;

static float *randoms(double seed, size_t n)
{
    float *x = malloc(sizeof(float) * n);
    if (!x || kv_rng_normal(seed, 0, 0, (int)n, x) < 0) exit(3);
    return x;
}

static void must(int status) { if (status < 0) { printf("FAIL setup: %s\n", kv_last_error()); exit(1); } }

static kv_plan *make_plan(const setup *s, const choice *ch, int page, int sink, int recent, int exact)
{
    kv_plan *p;
    const int d = s->g.head_dim;
    must(kv_plan_new(&p, s->g.n_layers, s->g.n_kv_heads, d, page));
    must(kv_plan_window(p, -1, sink, recent, exact));
    for (int side = 0; side < 2; side++) {
        kv_codec *c;
        must(kv_codec_new(&c, side ? ch->vf : ch->kf, side ? ch->vp : ch->kp, d, page, side));
        must(kv_plan_set(p, -1, -1, side, c));
        kv_codec_free(c);
        if (ch->means) {
            float *m = randoms(77 + side, (size_t)d);
            must(kv_plan_mean(p, -1, -1, side, m));
            free(m);
        }
    }
    if (ch->page_rope) must(kv_plan_page_rope(p, -1, -1, 1));
    return p;
}

typedef struct data { int n; float *q, *k, *v; } data;
static data make_data(const setup *s, int n, double seed)
{
    const size_t rows = (size_t)s->g.n_layers * (size_t)n, d = (size_t)s->g.head_dim;
    return (data){ n, randoms(seed, rows * (size_t)s->g.n_heads * d), randoms(seed + 1, rows * (size_t)s->g.n_kv_heads * d), randoms(seed + 2, rows * (size_t)s->g.n_kv_heads * d) };
}
static void free_data(data *x) { free(x->q); free(x->k); free(x->v); }

/* Feeds tokens [t0, t1) of all layers as one step; out [layer][token][head][dim]. */
static int feed(kv_cache *c, const setup *s, const data *x, int t0, int t1, float softcap, float *out)
{
    const size_t d = (size_t)s->g.head_dim, nq = (size_t)s->g.n_heads * d, nk = (size_t)s->g.n_kv_heads * d;
    for (int l = 0; l < s->g.n_layers; l++) {
        const size_t r = (size_t)l * (size_t)x->n + (size_t)t0;
        FORWARD_IF_ERROR(kv_cache_attend(c, l, t1 - t0, x->q + r * nq, x->k + r * nk, x->v + r * nk, 1.0f / sqrtf((float)d), softcap, out + r * nq));
    }
    return kv_cache_commit(c, t1 - t0);
}

/* Softmax attention in double over the rows the cache says it reads, for the last query. */
static double reference_gap(const kv_cache *c, const setup *s, const data *x, float softcap, const float *out)
{
    const int d = s->g.head_dim, n = kv_cache_n_tokens(c), group = s->g.n_heads / s->g.n_kv_heads;
    float *kr = malloc(sizeof(float) * (size_t)(n * d)), *vr = malloc(sizeof(float) * (size_t)(n * d));
    double *p = malloc(sizeof(double) * (size_t)n), worst = 0;
    for (int l = 0; l < s->g.n_layers; l++) {
        const int w = s->sliding[l], first = w && n - w > 0 ? n - w : 0;
        const size_t row = ((size_t)l * (size_t)x->n + (size_t)n - 1) * (size_t)(s->g.n_heads * d);
        for (int h = 0; h < s->g.n_kv_heads; h++) {
            /* The oldest row of the last query is gone already when it ends a page: no later query reads it. */
            if (kv_cache_read(c, l, h, 0, first, n, kr + first * d) < 0 || kv_cache_read(c, l, h, 1, first, n, vr + first * d) < 0) {
                must(kv_cache_read(c, l, h, 0, first + 1, n, kr + first * d) | kv_cache_read(c, l, h, 1, first + 1, n, vr + first * d));
                continue;
            }
            for (int i = 0; i < group; i++) {
                const float *q = x->q + row + (size_t)((h * group + i) * d);
                double best = -1e300, sum = 0;
                for (int j = first; j < n; j++) {
                    p[j] = 0;
                    for (int e = 0; e < d; e++) p[j] += (double)q[e] * kr[j * d + e];
                    p[j] /= sqrt(d);
                    if (softcap > 0) p[j] = softcap * tanh(p[j] / softcap);
                    best = fmax(best, p[j]);
                }
                for (int j = first; j < n; j++) sum += p[j] = exp(p[j] - best);
                for (int e = 0; e < d; e++) {
                    double o = 0;
                    for (int j = first; j < n; j++) o += p[j] * vr[j * d + e];
                    const double g = fabs(o / sum - out[row + (size_t)((h * group + i) * d + e)]);
                    if (!(g <= worst)) worst = g;              /* NaN counts */
                }
            }
        }
    }
    free(kr);
    free(vr);
    free(p);
    return worst;
}

static double gap(const float *a, const float *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        const double g = fabs((double)a[i] - b[i]);
        if (!(g <= worst)) worst = g;
    }
    return worst;
}

static const choice CHOICES[] = {
    { "raw", "dtype=f32", "raw", "dtype=f32", 1e-5, 0, 0, KV_PATH_FUSED },
    { "raw", "dtype=f16", "raw", "dtype=f32", 1e-5, 1, 0, KV_PATH_FUSED },
    { "raw", "dtype=f32", "raw", "dtype=f16", 1e-5, 1, 1, KV_PATH_TILE },
    { "raw", "dtype=f32", "raw", "dtype=f32", 1e-5, 0, 1, KV_PATH_FUSED },
    { "int", "bits=4,axis=token,group=32", "int", "bits=4,group=8", 2e-5, 1, 1, KV_PATH_TILE },
    { "int", "bits=4,axis=token,group=32", "raw", "dtype=f16", 5e-4, 0, 0, KV_PATH_FUSED },
    { "int", "bits=8,group=8", "int", "bits=4,axis=token,group=32", 5e-4, 1, 1, KV_PATH_FUSED },
    { "scalar", "bits=4", "int", "bits=4,group=8", 2e-5, 0, 0, KV_PATH_TILE },
    { "scalar", "bits=4", "scalar", "bits=3", 5e-4, 1, 1, KV_PATH_FUSED },
    { "scalar", "bits=2", "int", "bits=2,axis=token,group=32", 5e-4, 1, 0, KV_PATH_FUSED },
};
enum { N_CHOICES = sizeof CHOICES / sizeof *CHOICES };

static int available(const choice *ch)
{
    for (int side = 0; side < 2; side++) {
        kv_codec *c;
        if (kv_codec_new(&c, side ? ch->vf : ch->kf, side ? ch->vp : ch->kp, 32, 64, side) < 0) {
            SKIP("%s", kv_last_error());
            return 0;
        }
        kv_codec_free(c);
    }
    return 1;
}

/* ---- chunks against the stream */

static void visibility(const choice *ch, int page, int sink, int recent, int window, int exact, const int *split, float softcap, double *worst_stream, double *worst_reference)
{
    setup s;
    make_setup(&s, 2, 6, 2, 32, window);
    enum { N = 130 };
    const double seed = page + 10 * sink + 100 * recent + window;
    data x = make_data(&s, N, seed);
    const size_t per_token = (size_t)s.g.n_heads * (size_t)s.g.head_dim, total = per_token * N * (size_t)s.g.n_layers;
    float *stream = malloc(sizeof(float) * total), *chunk = malloc(sizeof(float) * total);
    kv_plan *p = make_plan(&s, ch, page, sink, recent, exact);
    kv_cache *a, *b;
    must(kv_cache_new(&a, &s.g, p, N));
    must(kv_cache_new(&b, &s.g, p, N));
    kv_plan_free(p);
    kv_cache_path(a, ch->path);
    kv_cache_path(b, ch->path);
    double ref = 0;
    for (int t = 0; t < N; t++) {
        must(feed(a, &s, &x, t, t + 1, softcap, stream));
        if (t % 7 == 0 || t == N - 1) {
            const double r = reference_gap(a, &s, &x, softcap, stream);
            if (!(r <= ref)) ref = r;
        }
    }
    for (int i = 0, t = 0; t < N; i++) {
        const int t1 = split[i] ? kv_min(N, t + split[i]) : N;
        must(feed(b, &s, &x, t, t1, softcap, chunk));
        t = t1;
    }
    const double g = gap(stream, chunk, total);
    const double allowed = ch->tolerance + (kv_amx() ? AMX_ERROR : 0);
    CHECK(g <= allowed, "%s/%s page %d sink %d recent %d window %d split %d.. softcap %g: chunk and stream differ by %g", ch->kf, ch->vf, page, sink, recent, window, split[0], (double)softcap, g);
    CHECK(ref <= ch->tolerance, "%s/%s page %d sink %d recent %d window %d softcap %g: off the double reference by %g", ch->kf, ch->vf, page, sink, recent, window, (double)softcap, ref);
    *worst_stream = fmax(*worst_stream, g);
    *worst_reference = fmax(*worst_reference, ref);
    int same = 1;                             /* both hold the same bytes, rows and counts in the end */
    for (size_t i = 0; i < 8; i++) {
        const kv_store *sa = &a->store[i], *sb = &b->store[i];
        same &= sa->n_encoded == sb->n_encoded && sa->n_pages == sb->n_pages && sa->first_page == sb->first_page && !sa->sink == !sb->sink;
        for (int g2 = sa->first_page; same && g2 < sa->n_pages; g2++) same &= memcmp(sa->page[g2], sb->page[g2], s.g.n_layers ? a->plan->slot[i].codec->page_bytes : 0) == 0;
    }
    CHECK(same, "%s/%s page %d sink %d recent %d window %d: chunk and stream left different storage", ch->kf, ch->vf, page, sink, recent, window);
    kv_pairs pa, pb;
    kv_cache_pairs(a, &pa);
    kv_cache_pairs(b, &pb);
    CHECK(pa.compressed == pb.compressed && pa.total == pb.total, "pairs %g/%g by stream, %g/%g by chunks", pa.compressed, pa.total, pb.compressed, pb.total);
    kv_cache_free(a);
    kv_cache_free(b);
    free_data(&x);
    free(stream);
    free(chunk);
}

static void test_visibility(void)
{
    static const int splits[][8] = { { 0 }, { 1, 2, 3, 70, 1, 0 }, { 40, 40, 40, 0 }, { 5, 1, 1, 100, 2, 0 } };
    static const int sinks[] = { 0, 4, 70 }, recents[] = { 0, 5, 32 }, windows[] = { 0, 33, 6 }, pages[] = { 32, 64 };
    for (int c = 0; c < N_CHOICES; c++) {
        if (!available(&CHOICES[c])) continue;
        double ws = 0, wr = 0;
        int i = 0;
        for (int s = 0; s < 3; s++)
            for (int r = 0; r < 3; r++)
                for (int w = 0; w < 3; w++, i++)
                    visibility(&CHOICES[c], pages[i % 2], sinks[s], recents[r], windows[w], i % 5 == 4 ? KV_EXACT_BF16 : i % 3 ? KV_EXACT_F16 : KV_EXACT_F32, splits[(i + c) % 4], i % 4 == 3 ? 2.0f : 0.0f, &ws, &wr);
        printf("k %s:%s v %s:%s%s%s%s: stream - chunk %.2g, stream - double %.2g\n", CHOICES[c].kf, CHOICES[c].kp, CHOICES[c].vf, CHOICES[c].vp, CHOICES[c].means ? " means" : "",
            CHOICES[c].page_rope ? " page-relative" : "", CHOICES[c].path == KV_PATH_TILE ? " tile" : "", ws, wr);
    }
}

/* ---- long enough for several spans, tiles and pieces; other shapes; SIMD levels; threads */

static void run_long(const choice *ch, int d, int heads, int kv_heads, int n, int window, double *worst)
{
    setup s;
    make_setup(&s, 1, heads, kv_heads, d, window);
    data x = make_data(&s, n, n + d);
    const size_t total = (size_t)n * (size_t)heads * (size_t)d;
    float *out[4], *chunk[4];
    const int tail = n - 4;
    for (int i = 0; i < 4; i++) {                                 /* 1 and 2 threads, then the lower levels */
        must(kv_set_threads(i == 0 ? 1 : 2));
        kv_cpu_limit(i == 2 ? KV_SIMD_AVX2 : i == 3 ? KV_SIMD_C : KV_SIMD_AVX512);
        out[i] = calloc(total, sizeof(float));
        chunk[i] = calloc(total, sizeof(float));
        kv_plan *p = make_plan(&s, ch, 64, 4, 40, KV_EXACT_F16);
        kv_cache *c;
        must(kv_cache_new(&c, &s.g, p, n));
        kv_plan_free(p);
        kv_cache_path(c, ch->path);
        must(feed(c, &s, &x, 0, n / 2, 0, chunk[i]));
        must(feed(c, &s, &x, n / 2, tail, 0, chunk[i]));
        for (int t = tail; t < n; t++) must(feed(c, &s, &x, t, t + 1, 0, out[i]));
        const double r = reference_gap(c, &s, &x, 0, out[i]);
        *worst = fmax(*worst, r);
        CHECK(r <= ch->tolerance, "d %d heads %d/%d n %d window %d level %d: off the double reference by %g", d, heads, kv_heads, n, window, kv_cpu_simd(), r);
        kv_cache_free(c);
    }
    kv_cpu_limit(KV_SIMD_AVX512);
    must(kv_set_threads(1));
    CHECK(memcmp(out[0], out[1], sizeof(float) * total) == 0, "one and two threads differ, one token");
    CHECK(memcmp(chunk[0], chunk[1], sizeof(float) * total) == 0, "one and two threads differ, chunk");
    for (int i = 2; i < 4; i++) {
        const double g = fmax(gap(out[1], out[i], total), gap(chunk[1], chunk[i], total));
        CHECK(g <= ch->tolerance, "levels differ by %g", g);
    }
    for (int i = 0; i < 4; i++) {
        free(out[i]);
        free(chunk[i]);
    }
    free_data(&x);
}

static void test_long(void)
{
    for (int c = 0; c < N_CHOICES; c++) {
        if (!available(&CHOICES[c])) continue;
        double worst = 0;
        run_long(&CHOICES[c], 64, 6, 2, c % 3 ? 600 : 1100, 0, &worst);
        run_long(&CHOICES[c], 128, 4, 1, 560, 530, &worst);
        run_long(&CHOICES[c], 32, 14, 2, 200, 30, &worst);
        printf("long, choice %d: stream - double %.2g\n", c, worst);
    }
}

/* ---- lossless rows give the reference's bits, whatever their way */

static void test_identity(void)
{
    setup s;
    make_setup(&s, 2, 6, 2, 32, 0);
    enum { N = 700 };
    data x = make_data(&s, N, 5);
    const size_t total = (size_t)N * 6 * 32 * 2;
    const choice raw = { "raw", "dtype=f32", "raw", "dtype=f32", 0, 0, 0, KV_PATH_FUSED };
    static const int window[][2] = { { 0, 0 }, { 0, 4096 }, { 4, 32 }, { 4096, 0 }, { 0, 100 } };
    float *first = NULL;
    for (int i = -1; i < 5; i++) {
        kv_plan *p;
        kv_cache *c;
        float *out = calloc(total, sizeof(float));
        if (i < 0) must(kv_plan_reference(&p, 2, 2, 32));
        else p = make_plan(&s, &raw, 64, window[i][0], window[i][1], KV_EXACT_F32);
        must(kv_cache_new(&c, &s.g, p, N));
        kv_plan_free(p);
        must(feed(c, &s, &x, 0, 300, 0, out));
        must(feed(c, &s, &x, 300, N, 0, out));
        if (!first) first = out;
        else {
            CHECK(memcmp(first, out, sizeof(float) * total) == 0, "raw f32 with sink %d recent %d is not the reference's bits, gap %g", window[i][0], window[i][1], gap(first, out, total));
            free(out);
        }
        kv_cache_free(c);
    }
    free(first);
    free_data(&x);
}

/* ---- the ledger */

static void test_ledger(void)
{
    for (int i = 0; i < N_CHOICES * 3; i++) {
        const choice *ch = &CHOICES[i % N_CHOICES];
        if (!available(ch)) continue;
        setup s;
        make_setup(&s, 2, 6, 2, 32, i / N_CHOICES == 2 ? 100 : 0);
        const int n = i / N_CHOICES == 1 ? 77 : 400;
        data x = make_data(&s, n, i);
        float *out = calloc((size_t)n * 6 * 32 * 2, sizeof(float));
        kv_plan *p = make_plan(&s, ch, 64, 4, i % 3 ? 32 : 0, KV_EXACT_F16);
        kv_cache *c;
#ifdef COUNT_ALLOCATIONS
        memset(live, 0, sizeof live);
        live_bytes = 0;
        counting = 1;
#endif
        must(kv_cache_new(&c, &s.g, p, 500));
        must(feed(c, &s, &x, 0, n, 0, out));
        kv_bytes all, part, sum = { 0 };
        must(kv_cache_bytes(c, -1, -1, &all));
        for (int l = 0; l < 2; l++)
            for (int side = 0; side < 2; side++) {
                must(kv_cache_bytes(c, l, side, &part));
                sum.codes += part.codes;
                sum.exact += part.exact;
                sum.slack += part.slack;
                sum.total += part.total;
            }
        CHECK(sum.codes == all.codes && sum.exact == all.exact && sum.slack == all.slack && all.total - sum.total < 2 * sizeof *c, "layers and sides add up: %g of %g", sum.total, all.total);
        const double parts = all.codes + all.scales + all.outliers + all.exact + all.padding + all.slack + all.state + all.shared;
        CHECK(fabs(parts - all.total) < 1e-6 * all.total, "total %g is not the sum %g", all.total, parts);
#ifdef COUNT_ALLOCATIONS
        counting = 0;
        double turn = 0;                      /* angles: the geometry's */
        if (c->turn[0]) turn = (double)(kv_round_up(sizeof *c->turn[0], 64) + kv_round_up(sizeof(float) * (size_t)(c->turn[0]->n_pages * c->turn[0]->n_rot), 64));
        const double held = (double)live_bytes - turn;
        CHECK(fabs(all.total - all.shared - held) <= 1e-9 * held, "choice %d: ledger %.0f without shared %.0f, allocated %.0f", i, all.total, all.shared, held);
#endif
        kv_cache_free(c);
        kv_plan_free(p);
        free(out);
        free_data(&x);
    }
}

/* ---- truncate, fork, failed steps, errors, mutation */

static void test_truncate_and_fork(void)
{
    for (int i = 0; i < N_CHOICES; i++) {
        const choice *ch = &CHOICES[i];
        if (!available(ch)) continue;
        setup s;
        make_setup(&s, 2, 6, 2, 32, 0);
        enum { N = 200 };
        data x = make_data(&s, N, 40 + i);
        const size_t total = (size_t)N * 6 * 32 * 2;
        float *a = calloc(total, sizeof(float)), *b = calloc(total, sizeof(float));
        kv_plan *p = make_plan(&s, ch, 64, i % 2 ? 4 : 0, i % 3 ? 7 : 0, KV_EXACT_F32);
        kv_cache *c, *f;
        must(kv_cache_new(&c, &s.g, p, N));
        kv_plan_free(p);
        must(feed(c, &s, &x, 0, 100, 0, a));
        must(kv_cache_fork(&f, c));
        must(feed(c, &s, &x, 100, N, 0, a));
        must(feed(f, &s, &x, 100, N, 0, b));
        const size_t half = (size_t)N * 6 * 32, from = (size_t)100 * 6 * 32;
        CHECK(memcmp(a + from, b + from, sizeof(float) * (half - from)) == 0 && memcmp(a + half + from, b + half + from, sizeof(float) * (half - from)) == 0, "choice %d: a fork goes another way", i);
        kv_cache_free(c);
        static const int to[] = { 199, 160, 131, 67, 4, 3, 1, 0 };
        float row[2][2][200 * 32];
        for (int k = 0; k < 8; k++) {
            const int n = to[k];
            for (int side = 0; side < 2; side++) must(kv_cache_read(f, 1, 1, side, 0, n, row[0][side]));
            CHECK(kv_cache_truncate(f, n) == KV_OK && kv_cache_n_tokens(f) == n, "truncate to %d: %s", n, kv_last_error());
            for (int side = 0; side < 2; side++) {
                must(kv_cache_read(f, 1, 1, side, 0, n, row[1][side]));
                CHECK(gap(row[0][side], row[1][side], (size_t)n * 32) == 0, "choice %d: truncate to %d changed side %d", i, n, side);
            }
            const int n1 = kv_min(N, n + 35);
            kv_cache *g;                       /* tokens and chunks agree after it */
            must(kv_cache_fork(&g, f));
            kv_cache_path(g, ch->path);
            for (int t = n; t < n1; t++) must(feed(g, &s, &x, t, t + 1, 0, a));
            CHECK(reference_gap(g, &s, &x, 0, a) <= ch->tolerance, "choice %d: stream after truncate to %d", i, n);
            if (n1 - n > 1) {
                must(feed(f, &s, &x, n, n1, 0, b));
                double worst = 0;
                for (int l = 0; l < 2; l++) worst = fmax(worst, gap(a + ((size_t)l * N + (size_t)n) * 192, b + ((size_t)l * N + (size_t)n) * 192, (size_t)(n1 - n) * 192));
                CHECK(worst <= ch->tolerance + (kv_amx() ? AMX_ERROR : 0), "choice %d: chunk and stream after truncate to %d differ by %g", i, n, worst);
            }
            kv_cache_free(g);
        }
        kv_cache_free(f);
        free(a);
        free(b);
        free_data(&x);
    }
    setup s;                                  /* what a sliding layer has dropped does not come back */
    make_setup(&s, 2, 2, 1, 32, 20);
    data x = make_data(&s, 200, 9);
    float *out = calloc(200 * 2 * 32 * 2, sizeof(float));
    kv_plan *p = make_plan(&s, &CHOICES[0], 32, 4, 0, KV_EXACT_F16);
    kv_cache *c;
    must(kv_cache_new(&c, &s.g, p, 200));
    kv_plan_free(p);
    must(feed(c, &s, &x, 0, 200, 0, out));
    CHECK(kv_cache_truncate(c, 100) == KV_E_UNSUPPORTED && strstr(kv_last_error(), "layer 0") && kv_cache_n_tokens(c) == 200, "%s", kv_last_error());
    CHECK(kv_cache_truncate(c, 198) == KV_OK, "%s", kv_last_error());
    CHECK(kv_cache_read(c, 0, 0, 0, 0, 5, out) == KV_E_ARG && kv_cache_read(c, 1, 0, 0, 0, 5, out) == KV_OK, "reading dropped rows: %s", kv_last_error());
    CHECK(kv_cache_truncate(c, 0) == KV_OK, "%s", kv_last_error());
    must(feed(c, &s, &x, 0, 50, 0, out));
    must(feed(c, &s, &x, 50, 51, 0, out));
    CHECK(reference_gap(c, &s, &x, 0, out) < 1e-5, "after truncate to 0");
    kv_cache_free(c);
    free(out);
    free_data(&x);
}

static void test_failures(void)
{
    for (int i = 0; i < N_CHOICES; i++) {
        const choice *ch = &CHOICES[i];
        if (!available(ch)) continue;
        setup s;
        make_setup(&s, 2, 6, 2, 32, i % 2 ? 24 : 0);
        enum { N = 120 };
        data x = make_data(&s, N, 60 + i);
        const size_t total = (size_t)N * 6 * 32 * 2;
        float *a = calloc(total, sizeof(float)), *b = calloc(total, sizeof(float));
        kv_plan *p = make_plan(&s, ch, 32, 3, i % 3 ? 9 : 40, KV_EXACT_F16);
        kv_cache *c, *d;
        must(kv_cache_new(&c, &s.g, p, N));
        must(kv_cache_new(&d, &s.g, p, N));
        kv_plan_free(p);
        for (int t = 0; t < N;) {
            const int t1 = kv_min(N, t + (t % 3 ? 1 : 20));
            float *k = malloc(sizeof(float) * (size_t)N * 64 * 2);        /* one bad key in the second layer */
            memcpy(k, x.k, sizeof(float) * (size_t)N * 64 * 2);
            k[((size_t)N + (size_t)t) * 64 + 37] = t % 2 ? INFINITY : NAN;
            const data probe = { N, x.q, k, x.v };
            CHECK(feed(c, &s, &probe, t, t1, 0, a) == KV_E_ARG && strstr(kv_last_error(), "layer 1 head 1") && strstr(kv_last_error(), "not finite"), "%s", kv_last_error());
            free(k);
            must(feed(c, &s, &x, t, t1, 0, a));
            must(feed(d, &s, &x, t, t1, 0, b));
            t = t1;
        }
        CHECK(memcmp(a, b, sizeof(float) * total) == 0, "choice %d: a failed step left a trace", i);
        CHECK(kv_cache_attend(c, 0, 1, x.q, x.k, x.v, 1, 0, a) == KV_E_ARG && strcmp(kv_last_error(), "cache: 121 tokens do not fit max_tokens=120") == 0, "%s", kv_last_error());
        must(kv_cache_truncate(d, 0));
        x.v[3] = 1e5f;
        CHECK(kv_cache_attend(d, 0, 1, x.q, x.k, x.v, 1, 0, a) == KV_E_ARG && strstr(kv_last_error(), "f16"), "%s", kv_last_error());
        x.v[3] = 1;
        must(kv_cache_attend(d, 0, 1, x.q, x.k, x.v, 1, 0, a));
        CHECK(kv_cache_commit(d, 1) == KV_E_ARG, "a commit before all layers");
        CHECK(kv_cache_attend(d, 2, 1, x.q, x.k, x.v, 1, 0, a) == KV_E_ARG, "layer out of range");
        CHECK(kv_cache_truncate(d, 1) == KV_E_ARG, "truncate past the end");
        kv_cache_free(c);
        kv_cache_free(d);
        free(a);
        free(b);
        free_data(&x);
    }
    kv_plan *p;
    setup s;
    make_setup(&s, 2, 6, 2, 32, 0);
    kv_cache *c;
    CHECK(kv_plan_new(&p, 0, 1, 32, 64) == KV_E_ARG && kv_plan_new(&p, 1, 1, 32, 0) == KV_E_ARG, "bad plans");
    must(kv_plan_new(&p, 2, 2, 32, 64));
    CHECK(kv_cache_new(&c, &s.g, p, 10) == KV_E_ARG && strstr(kv_last_error(), "no codec"), "%s", kv_last_error());
    kv_plan_free(p);
    p = make_plan(&s, &CHOICES[0], 64, 0, 0, KV_EXACT_F16);
    s.g.n_layers = 1;
    CHECK(kv_cache_new(&c, &s.g, p, 10) == KV_E_ARG, "a plan of another shape");
    s.g.n_layers = 2;
    must(kv_cache_new(&c, &s.g, p, 10));
    CHECK(kv_plan_window(p, -1, 1, 1, KV_EXACT_F16) == KV_E_ARG, "a plan in use was changed");
    kv_cache_free(c);
    CHECK(kv_plan_window(p, -1, 1, 1, KV_EXACT_F16) == KV_OK && kv_plan_window(p, 2, 1, 1, KV_EXACT_F16) == KV_E_ARG && kv_plan_window(p, -1, 1, 1, 7) == KV_E_ARG, "windows");
    kv_plan_free(p);
}

static void test_mutate(void)
{
    for (int i = 0; i < N_CHOICES; i++) {
        const choice *ch = &CHOICES[i];
        if (!available(ch)) continue;
        setup s;
        make_setup(&s, 2, 6, 2, 32, i % 2 ? 70 : 0);
        enum { N = 200 };
        data x = make_data(&s, N, 20 + i);
        const size_t total = (size_t)N * 6 * 32 * 2;
        float *a = calloc(total, sizeof(float));
        kv_plan *p = make_plan(&s, ch, 64, 4, 0, KV_EXACT_F16);
        kv_cache *c, *f;
        must(kv_cache_new(&c, &s.g, p, N));
        kv_plan_free(p);
        must(feed(c, &s, &x, 0, 150, 0, a));
        must(kv_cache_fork(&f, c));
        const double n1 = kv_cache_mutate(c, 3, 0.25), n2 = kv_cache_mutate(f, 3, 0.25);
        CHECK(n1 == n2 && n1 > 0, "the same seed flips %g and %g bytes", n1, n2);
        kv_cache_free(f);
        must(kv_cache_fork(&f, c));
        CHECK(kv_cache_mutate(f, 4, 0) == 0, "share 0");
        CHECK(kv_cache_mutate(f, 4, 1) > 2 * n1, "share 1");
        for (int t = 150; t < 160; t++) must(feed(f, &s, &x, t, t + 1, 0, a));
        must(feed(f, &s, &x, 160, N, 0, a));
        CHECK(strncmp(kv_cache_paths(f), "k: ", 3) == 0 && strstr(kv_cache_paths(f), "; chunks: "), "paths: %s", kv_cache_paths(f));
        kv_cache_free(c);
        kv_cache_free(f);
        free(a);
        free_data(&x);
    }
}

/* A slot that was used before (a truncation, a step taken back) encodes to the bytes of a fresh one. */
static void test_encode_over_used_slots(void)
{
    for (int i = 0; i < N_CHOICES; i++) {
        const choice *ch = &CHOICES[i];
        if (!available(ch)) continue;
        for (int side = 0; side < 2; side++) {
            kv_codec *c;
            must(kv_codec_new(&c, side ? ch->vf : ch->kf, side ? ch->vp : ch->kp, 32, 64, side));
            uint8_t *a = kv_zalloc(c->page_bytes), *b = kv_zalloc(c->page_bytes);
            float *x = randoms(31, 64 * 32), *y = randoms(32, 64 * 32);
            c->ops->encode(c, a, 0, 64, x, 32);
            c->ops->encode(c, b, 0, 64, y, 32);
            for (int t = 0; t < 64; t += c->granule) c->ops->encode(c, b, t, c->granule, x + t * 32, 32);
            CHECK(memcmp(a, b, c->page_bytes) == 0, "codec '%s' %s: encoding over used slots leaves other bytes", c->ops->name, c->text);
            kv_free(a);
            kv_free(b);
            free(x);
            free(y);
            kv_codec_free(c);
        }
    }
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    must(kv_set_threads(1));             /* many thousand short steps: on a busy machine waiting for a second thread would be most of the time */
    test_encode_over_used_slots();
    test_visibility();
    test_identity();
    if (kv_amx()) {                      /* and as processors without it do */
        kv_cpu_limit(KV_SIMD_AVX512);
        test_visibility();
        test_identity();
        kv_cpu_limit(KV_SIMD_AMX);
    }
    test_long();
    test_ledger();
    test_truncate_and_fork();
    test_failures();
    test_mutate();
    return check_end();
}
