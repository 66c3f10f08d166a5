/* The index against brute force over what it stored, in double; removing, files, damage, refusals. */
#include <math.h>
#include "check.h"
#include "container_impl.h"
#include "index.h"
#include "rng.h"

enum { SEED = 20261122, N = 600, Q = 35, K = 10 };
static char path[256];

static kv_tensor rows_of(void *data, int dtype, int n, int d)
{
    return (kv_tensor){ .data = data, .dtype = dtype, .ndim = 2, .shape = { n, d }, .stride = { d, 1 } };
}
static kv_tensor normal(int stream, int n, int d, float mean)
{
    float *x = kv_alloc_array((size_t)n * (size_t)d, sizeof *x, false);
    kv_rng_normal(SEED, stream, 0, n * d, x);
    for (int i = 0; i < n * d; i++) x[i] += mean * (float)(1 + i % 3);
    return rows_of(x, KV_F32, n, d);
}
static float *row(const kv_tensor *t, int i) { return (float *)t->data + i * t->stride[0]; }

typedef struct answer { float score[Q * 64]; int32_t id[Q * 64]; } answer;
static int ask(const kv_index *ix, const kv_tensor *q, int k, int rerank, int fused, answer *a)
{
    kv_tensor s = rows_of(a->score, KV_F32, q->shape[0], k), ids = rows_of(a->id, KV_I32, q->shape[0], k);
    memset(a, 0xff, sizeof *a);
    return kv_index_search(ix, q, k, rerank, fused, &s, &ids);
}
static bool same(const answer *a, const answer *b, int n) { return !memcmp(a->score, b->score, sizeof(float) * (size_t)n) && !memcmp(a->id, b->id, sizeof(int32_t) * (size_t)n); }

static double distance(int metric, const float *q, const float *x, int d)
{
    double dot = 0, qq = 0, sum = 0;
    for (int i = 0; i < d; i++) {
        dot += (double)q[i] * x[i];
        qq += (double)q[i] * q[i];
        sum += ((double)q[i] - x[i]) * ((double)q[i] - x[i]);
    }
    return metric == KV_METRIC_L2 ? sum : metric == KV_METRIC_COSINE ? -dot / sqrt(qq) : -dot;
}

/* Every score is that of its vector, they rise (as distances), none comes twice, and nothing that was left out is nearer. */
static void against_brute_force(const kv_index *ix, const char *what, const kv_tensor *q, const float *stored, int k, double tolerance, const answer *a)
{
    double *all = kv_alloc_array((size_t)ix->n_rows, sizeof *all, false);
    int bad = 0;
    for (int g = 0; g < q->shape[0]; g++) {
        double last = -INFINITY, longest = 0;
        const double length = ix->metric == KV_METRIC_COSINE ? 1 : sqrt(-distance(KV_METRIC_IP, row(q, g), row(q, g), ix->dim));
        for (int i = 0; i < ix->n_rows; i++) {
            const float *x = stored + (size_t)i * ix->dim;
            all[i] = distance(ix->metric, row(q, g), x, ix->dim);
            longest = fmax(longest, sqrt(-distance(KV_METRIC_IP, x, x, ix->dim)));
        }
        const double scale = ix->metric == KV_METRIC_L2 ? (length + longest) * (length + longest) : length * longest;
        const double tol = tolerance * scale;
        for (int i = 0; i < k; i++) {
            const int id = a->id[g * k + i];
            const double got = ix->metric == KV_METRIC_L2 ? (double)a->score[g * k + i] : -(double)a->score[g * k + i];
            if (i >= ix->n_live) {
                bad += id != -1 || got != INFINITY;
                continue;
            }
            if (id < 0 || id >= ix->n_rows || kv_index_dead(ix, id) || got < last || !(fabs(got - all[id]) <= tol)) {
                if (!bad++) printf("%s: query %d, place %d: vector %d at %g, its distance is %g\n", what, g, i, id, got, id >= 0 && id < ix->n_rows ? all[id] : NAN);
                continue;
            }
            last = got;
            all[id] = INFINITY;
        }
        for (int i = 0; i < ix->n_rows && k < ix->n_live; i++) bad += !kv_index_dead(ix, i) && all[i] < last - 2 * tol;
    }
    CHECK(bad == 0, "%s: %d places differ from brute force", what, bad);
    kv_free(all);
}

static float *stored_of(const kv_index *ix)
{
    float *x = kv_alloc_array((size_t)ix->n_rows, (size_t)ix->dim * sizeof *x, true);
    for (int i = 0; i < ix->n_rows; i++) {
        if (kv_index_dead(ix, i)) continue;
        kv_tensor t = rows_of(x + (size_t)i * ix->dim, KV_F32, 1, ix->dim);
        CHECK(kv_index_decode(ix, i, i + 1, &t) == KV_OK, "%s", kv_last_error());
    }
    return x;
}

/* In uneven pieces, so that pages and granules are filled in several goes. */
static void add_all(kv_index *ix, const kv_tensor *x)
{
    static const int piece[] = { 1, 7, 64, 3, 200, 31 };
    for (int at = 0, i = 0, n, first; at < x->shape[0]; at += n, i++) {
        n = kv_min(piece[i % 6], x->shape[0] - at);
        const kv_tensor part = rows_of(row(x, at), KV_F32, n, x->shape[1]);
        const int before = ix->n_rows;
        CHECK(kv_index_add(ix, &part, &first) == KV_OK && first == before, "%s", kv_last_error());
    }
}

typedef struct setting { const char *family, *params; int dim, page_rows, centre, keep; double tolerance; } setting;
/* Tolerance on codes, of the product of the lengths: int and scalar have 16-bit queries (measured: up to 4e-5).  Decoded pages: ROUNDING. */
#define ROUNDING 1e-6
static const setting settings[] = {
    { "raw", "dtype=f32", 24, 64, 0, -1, ROUNDING },
    { "raw", "dtype=f16", 100, 8, 1, KV_F16, ROUNDING },
    { "int", "bits=8,group=32", 96, 128, 1, -1, 1e-4 },
    { "int", "bits=2,group=32,axis=token", 64, 64, 0, KV_F32, 1e-4 },
    { "scalar", "bits=4", 128, 256, 1, KV_F16, 1e-4 },
    { "scalar", "bits=3,norm=unbiased", 768, 64, 0, -1, 1e-4 },
    { "polar", "", 64, 64, 0, -1, ROUNDING },
};
enum { N_SETTINGS = sizeof settings / sizeof *settings };

static kv_index *make(const setting *s, int metric, const kv_tensor *train)
{
    kv_index *ix = NULL;
    const kv_index_config cfg = { .family = s->family, .params = s->params, .dim = s->dim, .page_rows = s->page_rows, .metric = metric, .keep = s->keep, .centre = s->centre };
    CHECK(kv_index_new(&ix, &cfg, s->centre ? train : NULL) == KV_OK, "%s: %s", s->family, kv_last_error());
    return ix;
}

static void check_search(void)
{
    for (int i = 0; i < N_SETTINGS; i++) {
        const setting *s = &settings[i];
        const kv_tensor x = normal(2 * i, N, s->dim, (float)s->centre), q = normal(2 * i + 1, Q, s->dim, (float)s->centre);
        for (int metric = 0; metric < 3; metric++) {
            char what[200];
            answer a, b;
            kv_bytes bytes;
            kv_index *ix = make(s, metric, &x);
            add_all(ix, &x);
            float *stored = stored_of(ix);
            for (int level = kv_cpu_limit(KV_SIMD_AVX512); level >= 0; level--) {
                kv_cpu_limit(level);
                for (int fused = 0; fused <= kv_codec_fused(ix->codec[0]); fused++) {
                    snprintf(what, sizeof what, "%s(%s) dim %d metric %d fused %d level %d", s->family, s->params, s->dim, metric, fused, level);
                    kv_set_threads(2);
                    CHECK(ask(ix, &q, K, 0, fused, &a) == KV_OK, "%s: %s", what, kv_last_error());
                    against_brute_force(ix, what, &q, stored, K, fused ? s->tolerance : ROUNDING, &a);
                    kv_set_threads(1);
                    ask(ix, &q, K, 0, fused, &b);
                    CHECK(same(&a, &b, Q * K), "%s: threads change the answer", what);
                }
            }
            kv_cpu_limit(KV_SIMD_AVX512);
            CHECK(kv_index_bytes(ix, &bytes) == KV_OK && bytes.codes + bytes.scales + bytes.outliers + bytes.exact + bytes.padding + bytes.slack + bytes.state + bytes.shared == bytes.total, "%s: the ledger does not add up", what);
            if (s->keep >= 0) {                                       /* all candidates: exact search over the originals, in their precision */
                float *original = kv_alloc_array(N, (size_t)s->dim * sizeof(float), false);
                for (int k = 0; k < N; k++) {
                    kv_index_gather(ix, &x, k, original + (size_t)k * s->dim);
                    for (int c = 0; k < ix->n_coded && s->keep == KV_F16 && c < s->dim; c++) original[(size_t)k * s->dim + c] = kv_f16_to_f32(kv_f32_to_f16(original[(size_t)k * s->dim + c]));
                }
                CHECK(ask(ix, &q, K, N / K, kv_codec_fused(ix->codec[0]), &a) == KV_OK, "%s", kv_last_error());
                against_brute_force(ix, "re-ranked", &q, original, K, ROUNDING, &a);
                kv_free(original);
            }
            kv_free(stored);
            kv_index_free(ix);
        }
        kv_free(x.data);
        kv_free(q.data);
    }
}

static void check_remove(void)
{
    const setting s = { "scalar", "bits=4", 64, 64, 0, KV_F32, 1e-4 };
    const kv_tensor x = normal(50, N, s.dim, 0), q = normal(51, Q, s.dim, 0);
    kv_index *ix = make(&s, KV_METRIC_L2, NULL);
    add_all(ix, &x);
    int32_t gone[N];
    int n = 0, removed;
    answer a;
    kv_bytes before, after;
    for (int i = 0; i < N; i++) if (i % 3 == 0 || (i >= 128 && i < 192)) gone[n++] = i;
    kv_index_bytes(ix, &before);
    CHECK(kv_index_remove(ix, gone, n, &removed) == KV_OK && removed == n && ix->n_live == N - n, "%d removed: %s", removed, kv_last_error());
    CHECK(kv_index_remove(ix, gone, n, &removed) == KV_OK && removed == 0, "%d removed again", removed);
    CHECK(kv_index_remove(ix, (int32_t[]){ 1, N }, 2, &removed) == KV_E_ARG && strcmp(kv_last_error(), "index: vector 600 is outside 0..599") == 0 && ix->n_live == N - n, "%s", kv_last_error());
    kv_index_bytes(ix, &after);
    CHECK(before.total - after.total == (double)(ix->record_bytes + ix->row_bytes), "%g bytes given back for a page without vectors", before.total - after.total);
    float *stored = stored_of(ix);
    CHECK(ask(ix, &q, K, 0, 1, &a) == KV_OK, "%s", kv_last_error());
    against_brute_force(ix, "removed", &q, stored, K, s.tolerance, &a);
    kv_tensor one = rows_of(stored, KV_F32, 1, s.dim);
    CHECK(kv_index_decode(ix, 129, 130, &one) == KV_E_ARG && strcmp(kv_last_error(), "index: vector 129 was removed") == 0, "%s", kv_last_error());
    kv_free(stored);
    add_all(ix, &x);
    stored = stored_of(ix);
    ask(ix, &q, K, 0, 1, &a);
    against_brute_force(ix, "added after removing", &q, stored, K, s.tolerance, &a);
    for (int i = 0; i < ix->n_rows; i++) kv_index_remove(ix, &i, 1, &removed);
    CHECK(ix->n_live == 0 && ask(ix, &q, K, 0, 1, &a) == KV_OK && a.id[0] == -1 && a.score[0] == INFINITY, "an emptied index answers %d at %g", a.id[0], (double)a.score[0]);
    kv_free(stored);
    kv_index_free(ix);
    kv_free(x.data);
    kv_free(q.data);
}

static void check_refusals(void)
{
    const setting s = { "scalar", "bits=4", 64, 64, 0, -1, 0 };
    kv_tensor x = normal(60, 20, 64, 0), wrong = normal(61, 2, 32, 0);
    kv_index *ix = make(&s, KV_METRIC_IP, NULL), *bad;
    answer a;
    int first;
    kv_index_config cfg = { .family = "scalar", .params = "", .dim = 64, .page_rows = 64, .metric = 0, .keep = -1 };
#define REFUSED(status, expr, text) do { CHECK((expr) == (status), "%s", #expr); CHECK(strcmp(kv_last_error(), text) == 0, "'%s' is not '%s'", kv_last_error(), text); } while (0)
    CHECK(ask(ix, &x, K, 0, 1, &a) == KV_OK && a.id[0] == -1 && a.score[0] == -INFINITY, "an empty index answers %d", a.id[0]);
    CHECK(kv_index_add(ix, &x, &first) == KV_OK, "%s", kv_last_error());
    CHECK(ask(ix, &x, 30, 0, 1, &a) == KV_OK && a.id[19] >= 0 && a.id[20] == -1 && a.id[29] == -1, "k over the number of vectors");
    REFUSED(KV_E_ARG, kv_index_add(ix, &wrong, &first), "index vectors: 32 dimensions given, the index has 64");
    REFUSED(KV_E_ARG, ask(ix, &wrong, K, 0, 1, &a), "index queries: 32 dimensions given, the index has 64");
    REFUSED(KV_E_UNSUPPORTED, ask(ix, &x, K, 4, 1, &a), "index: re-ranking needs the originals, and this index keeps none");
    REFUSED(KV_E_ARG, ask(ix, &x, 0, 0, 1, &a), "index: k=0 with rerank=0: 1 or more neighbours and at most 65536 candidates");
    row(&x, 3)[7] = NAN;
    REFUSED(KV_E_ARG, kv_index_add(ix, &x, &first), "index vectors: row 3, dimension 7 is nan, not a finite number");
    REFUSED(KV_E_ARG, ask(ix, &x, K, 0, 1, &a), "index queries: row 3, dimension 7 is nan, not a finite number");
    row(&x, 3)[7] = -INFINITY;
    REFUSED(KV_E_ARG, kv_index_add(ix, &x, &first), "index vectors: row 3, dimension 7 is inf, not a finite number");
    CHECK(ix->n_rows == 20, "a refused add left %d vectors", ix->n_rows);
    cfg.dim = 9000;
    REFUSED(KV_E_ARG, kv_index_new(&bad, &cfg, NULL), "index: dim=9000 is outside 1..8192");
    cfg.dim = 521;
    REFUSED(KV_E_ARG, kv_index_new(&bad, &cfg, NULL), "index: dim=521 is over 512 and not a whole number of parts of 64..512 dimensions: pad the vectors with zeros");
    cfg = (kv_index_config){ .family = "scalar", .params = "bits=12", .dim = 64, .page_rows = 64, .keep = -1 };
    REFUSED(KV_E_PARAM, kv_index_new(&bad, &cfg, NULL), "codec 'scalar': bits=12 is outside 0..8");
    cfg = (kv_index_config){ .family = "scalar", .params = "", .dim = 64, .page_rows = 64, .metric = 3, .keep = -1 };
    REFUSED(KV_E_ARG, kv_index_new(&bad, &cfg, NULL), "index: metric=3 is none of 0 (ip), 1 (l2), 2 (cosine)");
    kv_index_free(ix);
    kv_free(x.data);
    kv_free(wrong.data);
}

/* ---- files */

static uint8_t *slurp(size_t *n)
{
    FILE *f = fopen(path, "rb");
    fseek(f, 0, SEEK_END);
    uint8_t *x = kv_alloc(*n = (size_t)ftell(f));
    rewind(f);
    CHECK(fread(x, 1, *n, f) == *n, "%s cannot be read", path);
    fclose(f);
    return x;
}
static void spill(const uint8_t *x, size_t n)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(x, 1, n, f) == n, "%s cannot be written", path);
    fclose(f);
}

static void check_files(void)
{
    static const char *const stages[] = { "raw", "zlib", "smallest" };
    for (int i = 0; i < N_SETTINGS; i++)
        for (int stage = 0; stage < 3; stage++) {
            const setting *s = &settings[i];
            const int metric = (i + stage) % 3;
            const kv_tensor x = normal(2 * i, N, s->dim, (float)s->centre), q = normal(2 * i + 1, Q, s->dim, (float)s->centre);
            kv_index *ix = make(s, metric, &x), *back = NULL;
            const int rerank = s->keep >= 0 ? 3 : 0, fused = kv_codec_fused(ix->codec[0]);
            int32_t gone[80];
            int removed, first;
            answer a, b;
            add_all(ix, &x);
            for (int k = 0; k < 80; k++) gone[k] = 128 + k;
            kv_index_remove(ix, gone, 80, &removed);
            CHECK(ask(ix, &q, K, rerank, fused, &a) == KV_OK, "%s", kv_last_error());
            CHECK(kv_index_save(ix, path, stages[stage], -1) == KV_OK && kv_index_load(&back, path) == KV_OK, "%s: %s", s->family, kv_last_error());
            if (!back) continue;
            CHECK(ask(back, &q, K, rerank, fused, &b) == KV_OK && same(&a, &b, Q * K), "%s as %s: another answer after loading", s->family, stages[stage]);
            const kv_tensor more = rows_of(x.data, KV_F32, 77, s->dim);        /* onto mapped pages */
            CHECK(kv_index_add(back, &more, &first) == KV_OK && kv_index_add(ix, &more, &first) == KV_OK && first == N, "%s", kv_last_error());
            kv_index_remove(back, (int32_t[]){ N, 0 }, 2, &removed);
            kv_index_remove(ix, (int32_t[]){ N, 0 }, 2, &removed);
            CHECK(kv_index_save(back, path, "raw", -1) == KV_OK, "over its own file: %s", kv_last_error());
            ask(ix, &q, K, rerank, fused, &a);
            CHECK(ask(back, &q, K, rerank, fused, &b) == KV_OK && same(&a, &b, Q * K), "%s: another answer after adding to a loaded index", s->family);
            kv_index_free(back);
            kv_index_free(ix);
            kv_free(x.data);
            kv_free(q.data);
        }
    kv_index *ix = make(&settings[0], 0, NULL), *back;
    answer a;
    const kv_tensor q = normal(1, 1, settings[0].dim, 0);
    CHECK(kv_index_save(ix, path, "raw", -1) == KV_OK && kv_index_load(&back, path) == KV_OK && ask(back, &q, K, 0, 1, &a) == KV_OK && a.id[0] == -1, "an empty index: %s", kv_last_error());
    kv_index_free(back);
    CHECK(kv_index_save(ix, path, "gzip", -1) == KV_E_ARG, "a stage that is none");
    kv_index_free(ix);
    kv_free(q.data);
}

/* A damaged page of codes is named; when its vectors are removed the rest answers as before. */
static void check_damage(void)
{
    const setting s = { "scalar", "bits=4", 64, 64, 0, KV_F16, 1e-4 };
    const kv_tensor x = normal(70, N, s.dim, 0), q = normal(71, Q, s.dim, 0);
    kv_index *ix = make(&s, KV_METRIC_IP, NULL), *bad = NULL;
    answer a, b;
    size_t n;
    char want[400];
    add_all(ix, &x);
    kv_index_save(ix, path, "raw", -1);
    kv_pack *p;
    CHECK(kv_pack_open(&p, path) == KV_OK, "%s", kv_last_error());
    uint8_t *bytes = slurp(&n);
    const size_t at = (size_t)(kv_pack_map(p, kv_pack_find(p, "index.codes", 0), 9) - kv_pack_map(p, kv_pack_find(p, "index.codes", 0), 0));
    const uint8_t *start = kv_pack_map(p, kv_pack_find(p, "index.codes", 0), 0);
    size_t base = 0;
    while (base < n && memcmp(bytes + base, start, ix->record_bytes)) base += 64;
    kv_pack_free(p);
    bytes[base + at + 5] ^= 1;                                        /* page 9, the last, has 24 of 64 vectors */
    spill(bytes, n);
    CHECK(kv_index_load(&bad, path) == KV_OK, "%s", kv_last_error());
    CHECK(ask(bad, &q, K, 0, 1, &a) == KV_E_CORRUPT, "damage is not seen");
    snprintf(want, sizeof want, "index '%s': page 9 of the codes is damaged: vectors 576 to 599, counted from 0; the others can be searched once these are removed", path);
    CHECK(strcmp(kv_last_error(), want) == 0, "'%s'", kv_last_error());
    char copy[300];
    snprintf(copy, sizeof copy, "%s.copy", path);
    CHECK(kv_index_save(bad, copy, "raw", -1) == KV_E_CORRUPT && access(copy, F_OK) != 0, "damage is saved with a new checksum");
    for (int i = 576, removed; i < 600; i++) {
        kv_index_remove(ix, &i, 1, &removed);
        kv_index_remove(bad, &i, 1, &removed);
    }
    CHECK(ask(bad, &q, K, 2, 1, &a) == KV_OK && ask(ix, &q, K, 2, 1, &b) == KV_OK && same(&a, &b, Q * K), "the rest: %s", kv_last_error());
    int first;
    CHECK(kv_index_add(bad, &q, &first) == KV_OK && kv_index_add(ix, &q, &first) == KV_OK, "%s", kv_last_error());
    CHECK(ask(bad, &q, K, 2, 1, &a) == KV_OK && ask(ix, &q, K, 2, 1, &b) == KV_OK && same(&a, &b, Q * K), "added behind damage: %s", kv_last_error());
    kv_index_free(bad);
    /* Any flipped byte and any cut: refused or answered, in one line. */
    bytes[base + at + 5] ^= 1;
    for (int i = 0; i < 300; i++) {
        uint32_t u[4];
        kv_rng_u32(SEED, 5, 0, (uint32_t)i, u);
        const size_t where = i < 200 ? (i % 2 ? u[0] % n : n - 1 - u[0] % 1500) : 0, cut = i < 200 ? n : u[0] % n;
        bytes[where] ^= (uint8_t)(i < 200 ? 1u << u[1] % 8 : 0);
        spill(bytes, cut);
        bytes[where] ^= (uint8_t)(i < 200 ? 1u << u[1] % 8 : 0);
        const int status = kv_index_load(&bad, path) < 0 ? KV_E_CORRUPT : ask(bad, &q, K, 2, 1, &a);
        if (status < 0) CHECK(!strchr(kv_last_error(), '\n') && *kv_last_error(), "no line of text");
        kv_index_free(bad);
    }
    kv_free(bytes);
    kv_index_free(ix);
    kv_free(x.data);
    kv_free(q.data);
}

/* A file whole in itself whose text asks for what its pages do not have. */
static void check_hostile(void)
{
    static const struct { const char *meta; size_t dead, codes; } files[] = {
        { "{}", 1, 0 },
        { "{\"metric\":\"ip\",\"dim\":64,\"page_rows\":64,\"rows\":2147480000,\"coded\":2147480000,\"keep\":\"none\"}", 1, 0 },
        { "{\"metric\":\"ip\",\"dim\":64,\"page_rows\":64,\"rows\":8,\"coded\":8,\"keep\":\"none\"}", 1, 64 },
        { "{\"metric\":\"ip\",\"dim\":64,\"page_rows\":64,\"rows\":8,\"coded\":8,\"keep\":\"f16\"}", 1, 2176 },
        { "{\"metric\":\"ip\",\"dim\":64,\"page_rows\":32,\"rows\":8,\"coded\":8,\"keep\":\"none\"}", 1, 2176 },
        { "{\"metric\":\"ip\",\"dim\":96,\"page_rows\":64,\"rows\":8,\"coded\":8,\"keep\":\"none\"}", 1, 2176 },
        { "{\"metric\":\"ip\",\"dim\":64,\"page_rows\":64,\"rows\":8,\"coded\":7,\"keep\":\"none\"}", 1, 2176 },
        { "{\"metric\":\"ip\",\"dim\":64,\"page_rows\":64,\"rows\":8,\"coded\":8.5,\"keep\":\"none\"}", 1, 2176 },
        { "{\"metric\":\"none\",\"dim\":64,\"page_rows\":64,\"rows\":8,\"coded\":8,\"keep\":\"none\"}", 1, 2176 },
        { "{\"metric\":\"ip\",\"dim\":-64,\"page_rows\":64,\"rows\":8,\"coded\":8,\"keep\":\"none\"}", 1, 2176 },
    };
    kv_codec *c;
    kv_index *ix;
    CHECK(kv_codec_new(&c, "scalar", "bits=4", 64, 64, KV_SIDE_K) == KV_OK, "%s", kv_last_error());
    uint8_t *zeros = kv_zalloc(c->page_bytes);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        kv_pack_writer *w;
        kv_pack_create(&w, path);
        kv_pack_section(w, "index", 1, 0, files[i].meta, strlen(files[i].meta), KV_STAGE_RAW, KV_LEVEL_DEFAULT);
        kv_pack_page(w, NULL, 0);
        kv_pack_page(w, zeros, files[i].dead);
        kv_pack_page(w, NULL, 0);
        kv_pack_put_codec(w, c);
        kv_pack_section(w, "index.codes", 1, 0, "{}", 2, KV_STAGE_RAW, KV_LEVEL_DEFAULT);
        kv_pack_page(w, zeros, files[i].codes);
        CHECK(kv_pack_finish(w) == KV_OK, "%s", kv_last_error());
        kv_pack_abandon(w);
        CHECK(kv_index_load(&ix, path) == KV_E_CORRUPT && !ix, "'%s' is accepted", files[i].meta);
    }
    kv_free(zeros);
    kv_codec_free(c);
}

int main(void)
{
    printf("seed %d\n", SEED);
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/kelvin-test-index-%ld.kv", tmp ? tmp : "/tmp", (long)getpid());
    check_search();
    check_remove();
    check_refusals();
    check_files();
    check_damage();
    check_hostile();
    unlink(path);
    return check_end();
}
