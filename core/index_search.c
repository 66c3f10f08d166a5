/* index_search.c -- the k nearest of a batch of queries.
 *
 * Queries go in groups over all pages: a page's codes are unpacked once for the group, threads take pages as they come, and
 * every thread keeps the best of each query in a heap of its own.  A score does not depend on thread or page, and equal scores
 * go by number, so the result is the same for any number of threads.
 *
 * Scores are ranked without what is the same for all vectors of a query: <q, x - mean> for ip and cosine,
 * 2 <q - mean, x - mean> - |x - mean|^2 for l2. */
#include <math.h>
#include <stdlib.h>
#include "index.h"
#include "vecmath.h"

enum { GROUP = 32, MAX_HITS = 1 << 16 };        /* GROUP: 32 prepared queries of 128 dimensions and a page of codes share a first-level cache */
_Static_assert((int)GROUP <= (int)KV_MAX_GROUP, "codecs take this many");

typedef struct hit { float key; int32_t id; } hit;
typedef struct heap { int n; hit *h; } heap;    /* the worst on top */

static inline bool worse(hit a, hit b) { return a.key < b.key || (a.key == b.key && a.id > b.id); }

static void sift_down(hit *h, int n, int i)
{
    for (int c; (c = 2 * i + 1) < n; i = c) {
        if (c + 1 < n && worse(h[c + 1], h[c])) c++;
        if (!worse(h[c], h[i])) return;
        const hit t = h[i];
        h[i] = h[c];
        h[c] = t;
    }
}

static void offer(heap *p, int cap, hit x)
{
    if (p->n == cap) {
        if (!worse(p->h[0], x)) return;
        p->h[0] = x;
        sift_down(p->h, p->n, 0);
        return;
    }
    int i = p->n++;
    for (; i && worse(x, p->h[(i - 1) / 2]); i = (i - 1) / 2) p->h[i] = p->h[(i - 1) / 2];
    p->h[i] = x;
}

static int best_first(const void *a, const void *b) { return worse(*(const hit *)a, *(const hit *)b) ? 1 : -1; }

typedef struct search {
    const kv_index *ix;
    int             n_q, k, n_hits, n_threads, fused, rerank;   /* n_hits: k, or more for re-ranking */
    const float    *q, *centred;                /* [GROUP][dim]; centred: less the mean for l2, else q */
    const uint8_t  *prepared;                   /* [n_parts][GROUP] */
    size_t          prepared_part;              /* bytes of a part */
    float          *base;                       /* [GROUP]: what all scores of a query lack */
    heap           *heaps;                      /* [threads][GROUP] */
    float          *scratch;                    /* a thread: scores, a part's scores, a decoded page */
    size_t          scratch_floats;
    atomic_int      damaged;                    /* lowest page, INT_MAX: none */
    atomic_int      damaged_what;
} search;

static void note_damage(search *s, int page, int what)
{
    int was = atomic_load(&s->damaged);
    while (page < was && !atomic_compare_exchange_weak(&s->damaged, &was, page)) {}
    atomic_store(&s->damaged_what, what);
}

static void scan_page(void *ctx, int page, int thread)
{
    search *s = ctx;
    const kv_index *ix = s->ix;
    const kv_index_page *p = &ix->pages[page];
    if (p->n_live == 0) return;
    if (!kv_index_seen(ix, page, KV_INDEX_CODES_SEEN)) {
        note_damage(s, page, KV_INDEX_CODES_SEEN);
        return;
    }
    const int n = kv_index_fill(ix, page), ld = ix->page_rows, first = page * ix->page_rows, d = ix->part_dim;
    float *scores = s->scratch + (size_t)thread * s->scratch_floats, *more = scores + GROUP * ld, *tile = more + GROUP * ld;
    for (int part = 0; part < ix->n_parts; part++) {
        const kv_codec *c = ix->codec[part];
        const uint8_t *codes = p->record + (size_t)part * c->page_bytes;
        float *to = part ? more : scores;
        if (s->fused) c->ops->dot(c, codes, n, s->prepared + (size_t)part * s->prepared_part, s->n_q, to, ld);
        else kv_tile_dot(c, codes, n, s->centred + (size_t)part * d, ix->dim, s->n_q, to, ld, tile);
        for (int g = 0; part && g < s->n_q; g++) kv_vec_axpy(1, more + g * ld, scores + g * ld, n);
    }
    const float *norm = kv_index_norms(ix, p->record);
    for (int g = 0; g < s->n_q; g++) {
        float *x = scores + g * ld;
        heap *best = &s->heaps[thread * GROUP + g];
        if (ix->metric == KV_METRIC_L2)
            for (int t = 0; t < n; t++) x[t] = 2 * x[t] - norm[t];
        const bool full = best->n == s->n_hits;
        if (full && kv_vec_max(x, n) < best->h[0].key) continue;
        float worst = full ? best->h[0].key : -INFINITY;
        for (int t = 0; t < n; t++) {
            if (!(x[t] >= worst) || kv_index_dead(ix, first + t)) continue;
            offer(best, s->n_hits, (hit){ x[t], first + t });
            if (best->n == s->n_hits) worst = best->h[0].key;
        }
    }
}

/* What overflow or a file's bytes made no number of is the worst. */
static inline float number(float x) { return isnan(x) ? -INFINITY : x; }

/* <q, x>, or minus the squared distance. */
static float exact_key(const kv_index *ix, const float *q, const float *x, float *diff)
{
    if (ix->metric != KV_METRIC_L2) return number(kv_dot16(q, x, ix->dim));
    for (int i = 0; i < ix->dim; i++) diff[i] = q[i] - x[i];
    return number(-kv_sumsq(diff, ix->dim));
}

/* One query's heaps into one list, best first; re-ranked by the originals where the search asks for more than k. */
static void finish_query(void *ctx, int g, int thread)
{
    search *s = ctx;
    const kv_index *ix = s->ix;
    heap *all = &s->heaps[g];
    float *x = s->scratch + (size_t)thread * s->scratch_floats, *diff = x + ix->dim;
    for (int t = 1; t < s->n_threads; t++) {
        const heap *other = &s->heaps[t * GROUP + g];
        for (int i = 0; i < other->n; i++) offer(all, s->n_hits, other->h[i]);
    }
    for (int i = ix->n_coded; i < ix->n_rows; i++)
        if (!kv_index_dead(ix, i)) offer(all, s->n_hits, (hit){ number(exact_key(ix, s->q + (size_t)g * ix->dim, ix->tail + (size_t)(i - ix->n_coded) * ix->dim, diff) - s->base[g]), i });
    for (int i = 0; i < all->n; i++) {
        hit *h = &all->h[i];
        h->key = number(h->key + s->base[g]);
        if (!s->rerank || h->id >= ix->n_coded) continue;
        const int page = h->id / ix->page_rows;
        if (!kv_index_seen(ix, page, KV_INDEX_ROWS_SEEN)) {
            note_damage(s, page, KV_INDEX_ROWS_SEEN);
            return;
        }
        kv_vec_load(ix->keep, ix->pages[page].rows + (size_t)(h->id % ix->page_rows) * (size_t)ix->dim * (size_t)kv_dtype_size(ix->keep), x, ix->dim);
        h->key = exact_key(ix, s->q + (size_t)g * ix->dim, x, diff);
    }
    if (all->n > 1) qsort(all->h, (size_t)all->n, sizeof *all->h, best_first);
}

static void prepare(search *s, const kv_tensor *queries, int q0, float *q, float *centred, uint8_t *prepared)
{
    const kv_index *ix = s->ix;
    for (int g = 0; g < s->n_q; g++) {
        float *x = q + (size_t)g * ix->dim, *y = centred + (size_t)g * ix->dim;
        kv_index_gather(ix, queries, q0 + g, x);
        for (int i = 0; i < ix->dim; i++) y[i] = x[i] - (ix->metric == KV_METRIC_L2 && ix->mean ? ix->mean[i] : 0);
        s->base[g] = ix->metric == KV_METRIC_L2 ? -kv_sumsq(y, ix->dim) : ix->mean ? kv_dot16(x, ix->mean, ix->dim) : 0;
    }
    for (int p = 0; s->fused && p < ix->n_parts; p++) ix->codec[p]->ops->query(ix->codec[p], centred + (size_t)p * ix->part_dim, ix->dim, s->n_q, prepared + (size_t)p * s->prepared_part);
}

static void put(const search *s, int q0, const kv_tensor *score, const kv_tensor *ids)
{
    const bool l2 = s->ix->metric == KV_METRIC_L2;
    for (int g = 0; g < s->n_q; g++)
        for (int i = 0; i < s->k; i++) {
            const heap *best = &s->heaps[g];
            const bool have = i < best->n;
            const float key = have ? best->h[i].key : -INFINITY;
            ((float *)score->data)[(q0 + g) * score->stride[0] + i * score->stride[1]] = l2 ? fmaxf(-key, 0) : key;
            ((int32_t *)ids->data)[(q0 + g) * ids->stride[0] + i * ids->stride[1]] = have ? best->h[i].id : -1;
        }
}

static int check_result(const kv_tensor *t, const char *what, int dtype, int n_q, int k)
{
    FORWARD_IF_ERROR(kv_tensor_check(t, what));
    RETURN_ERROR_IF(t->dtype != dtype || t->device != 0 || t->ndim != 2 || t->shape[0] != n_q || t->shape[1] != k, KV_E_ARG, "%s: %s [%d, %d] in host memory is needed", what, dtype == KV_F32 ? "f32" : "i32", n_q, k);
    return KV_OK;
}

int kv_index_search(const kv_index *ix, const kv_tensor *queries, int k, int rerank, int fused, kv_tensor *score, kv_tensor *ids)
{
    RETURN_ERROR_IF(!ix, KV_E_ARG, "index: NULL handle");
    FORWARD_IF_ERROR(kv_index_check_rows(queries, "index queries", ix->dim, INFINITY));
    RETURN_ERROR_IF(k < 1 || rerank < 0 || (int64_t)k * kv_max(rerank, 1) > MAX_HITS, KV_E_ARG, "index: k=%d with rerank=%d: 1 or more neighbours and at most %d candidates", k, rerank, MAX_HITS);
    RETURN_ERROR_IF(rerank && ix->keep < 0, KV_E_UNSUPPORTED, "index: re-ranking needs the originals, and this index keeps none");
    RETURN_ERROR_IF(fused && !kv_codec_fused(ix->codec[0]), KV_E_UNSUPPORTED, "codec '%s' has no attention on codes (fused=0 decodes pages)", ix->codec[0]->ops->name);
    const int n_queries = queries->shape[0], n_threads = kv_threads();
    FORWARD_IF_ERROR(check_result(score, "index scores", KV_F32, n_queries, k));
    FORWARD_IF_ERROR(check_result(ids, "index numbers", KV_I32, n_queries, k));
    int status = KV_OK;
    const int n_heaps = n_threads * GROUP;
    search s = { .ix = ix, .k = k, .n_hits = k * kv_max(rerank, 1), .n_threads = n_threads, .fused = fused, .rerank = rerank, .prepared_part = kv_round_up(GROUP * ix->codec[0]->query_bytes, 64),
        .scratch_floats = (size_t)kv_max(GROUP * 2 * ix->page_rows + ix->page_rows * ix->part_dim, 2 * ix->dim) };
    float *q = kv_alloc_array(GROUP, (size_t)ix->dim * sizeof(float), false), *centred = kv_alloc_array(GROUP, (size_t)ix->dim * sizeof(float), false);
    uint8_t *prepared = kv_alloc_array((size_t)ix->n_parts, s.prepared_part, false);
    hit *hits = kv_alloc_array((size_t)n_heaps, (size_t)s.n_hits * sizeof(hit), false);
    s.q = q;
    s.centred = centred;
    s.prepared = prepared;
    s.base = kv_alloc_array(GROUP, sizeof(float), true);
    s.heaps = kv_alloc_array((size_t)n_heaps, sizeof(heap), true);
    s.scratch = kv_alloc_array((size_t)n_threads, s.scratch_floats * sizeof(float), false);
    atomic_init(&s.damaged, INT32_MAX);
    atomic_init(&s.damaged_what, 0);
    if (!q || !centred || !prepared || !hits || !s.base || !s.heaps || !s.scratch) FAIL_IF_ERROR(KV_E_NOMEM);
    for (int i = 0; i < n_heaps; i++) s.heaps[i].h = hits + (size_t)i * (size_t)s.n_hits;
    for (int q0 = 0; q0 < n_queries; q0 += GROUP) {
        s.n_q = kv_min(GROUP, n_queries - q0);
        for (int i = 0; i < n_heaps; i++) s.heaps[i].n = 0;
        prepare(&s, queries, q0, q, centred, prepared);
        kv_parallel(ix->n_pages, scan_page, &s);
        if (atomic_load(&s.damaged) == INT32_MAX) kv_parallel(s.n_q, finish_query, &s);
        if (atomic_load(&s.damaged) < INT32_MAX) {
            FAIL_IF_ERROR(kv_index_damage(ix, atomic_load(&s.damaged), atomic_load(&s.damaged_what)));
            FAIL_IF(true, KV_E_INTERNAL, "index: page %d was damaged for a moment", atomic_load(&s.damaged));
        }
        put(&s, q0, score, ids);
    }
fail:
    kv_free(q);
    kv_free(centred);
    kv_free(prepared);
    kv_free(hits);
    kv_free(s.base);
    kv_free(s.heaps);
    kv_free(s.scratch);
    return status;
}
