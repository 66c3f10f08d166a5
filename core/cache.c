/* cache.c -- what a sequence stores: sinks, pages, tail; append and read, truncate, fork, mutate.
 *
 * truncate(n) keeps what is compressed compressed: whole granules below n stay in their pages, although a sequence of n
 * tokens fed afresh would hold the last of them exactly (their exact rows are gone); the rows of a granule that n cuts are
 * decoded into the tail, and are encoded again with what follows.  A sliding layer has dropped what its window passed: where
 * the next query would need such rows, truncate is KV_E_UNSUPPORTED and nothing changes (0 always works). */
#include <stdio.h>
#include "amx.h"
#include "cache_impl.h"

/* ---- life */

static int find_turn(kv_cache *c, int layer)
{
    const kv_rope *r = &c->geo.rope[layer];
    const int sink = c->plan->sink[layer], pt = c->plan->page_tokens;
    for (int l = 0; l < layer; l++) {
        kv_turn *t = c->turn[l];
        if (t && t->freq == r->freq && t->n_rot == r->n_rot && t->sink == sink) {
            c->turn[layer] = t;
            return KV_OK;
        }
    }
    kv_turn *t = c->turn[layer] = kv_zalloc(sizeof *t);
    if (!t) return KV_E_NOMEM;
    *t = (kv_turn){ .freq = r->freq, .n_rot = r->n_rot, .sink = sink, .n_pages = kv_max(0, c->max_tokens - sink + pt - 1) / pt };
    t->cs = kv_alloc_array((size_t)t->n_pages * (size_t)r->n_rot, sizeof(float), true);
    if (!t->cs) return KV_E_NOMEM;
    for (int g = 0; g < t->n_pages; g++) {
        float *cs = t->cs + (size_t)g * (size_t)r->n_rot;
        for (int i = 0; i < r->n_rot / 2; i++) cs[i] = 1;      /* turning the row 1, 0 leaves cosines and sines */
        kv_rope_rows(r, cs, r->n_rot, 1, sink + (int64_t)g * pt, 0);
    }
    return KV_OK;
}

int kv_cache_new(kv_cache **out, const kv_geometry *g, kv_plan *plan, int max_tokens)
{
    int status = KV_E_NOMEM;
    RETURN_ERROR_IF(!out || !g || !plan, KV_E_ARG, "cache: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(max_tokens < 1 || max_tokens > 1 << 24, KV_E_ARG, "cache: max_tokens=%d is outside 1..%d", max_tokens, 1 << 24);
    RETURN_ERROR_IF(g->n_layers != plan->n_layers || g->n_kv_heads != plan->n_kv_heads || g->head_dim != plan->head_dim, KV_E_ARG,
        "cache: the plan is for %d layers, %d K/V heads, head_dim %d; the model has %d, %d, %d", plan->n_layers, plan->n_kv_heads, plan->head_dim, g->n_layers, g->n_kv_heads, g->head_dim);
    RETURN_ERROR_IF(g->n_heads < 1 || g->n_heads % g->n_kv_heads || g->n_heads / g->n_kv_heads > KV_MAX_GROUP, KV_E_ARG,
        "cache: n_heads=%d is not 1..%d times n_kv_heads=%d", g->n_heads, KV_MAX_GROUP, g->n_kv_heads);
    FORWARD_IF_ERROR(kv_plan_check(plan));
    kv_cache *c = kv_zalloc(sizeof *c);
    if (!c) return KV_E_NOMEM;
    c->geo = *g;
    c->plan = kv_plan_ref(plan);
    c->max_tokens = max_tokens;
    c->group = g->n_heads / g->n_kv_heads;
    const size_t n_stores = (size_t)g->n_layers * (size_t)g->n_kv_heads * 2;
    c->store = kv_alloc_array(n_stores, sizeof *c->store, true);
    c->pending = kv_alloc_array((size_t)g->n_layers, sizeof(int), true);
    c->turn = kv_alloc_array((size_t)g->n_layers, sizeof *c->turn, true);
    if (!c->store || !c->pending || !c->turn) goto fail;
    for (int l = 0; l < g->n_layers; l++) {
        const int window = g->sliding ? g->sliding[l] : 0, recent = plan->recent[l];
        const size_t row = kv_row_bytes(c, l);
        for (int i = 0; i < g->n_kv_heads * 2; i++) {
            kv_store *st = kv_cache_store(c, l, i / 2, i % 2);
            const kv_slot *slot = kv_plan_slot(plan, l, i / 2, i % 2);
            if (i % 2 == KV_SIDE_K && slot->page_rope && g->rope && g->rope[l].n_rot > 0 && !c->turn[l]) FAIL_IF_ERROR(find_turn(c, l));
            status = KV_E_NOMEM;
            st->never = window > 0 && recent >= window;
            st->sink_rows = kv_min(plan->sink[l], max_tokens);
            /* recent 0: the row that completes a granule never enters the tail.  Otherwise one row more than stays, so
             * that a step's row overwrites nothing that taking the step back would need. */
            const int64_t rows = st->never ? window : recent == 0 ? slot->codec->granule - 1 : (int64_t)recent + slot->codec->granule;
            st->tail_rows = (int)kv_min64(rows, max_tokens - st->sink_rows);
            if (st->sink_rows && !(st->sink = kv_alloc_array((size_t)st->sink_rows, row, false))) goto fail;
            if (st->tail_rows && !(st->tail = kv_alloc_array((size_t)st->tail_rows, row, false))) goto fail;
        }
    }
    *out = c;
    return KV_OK;
fail:
    kv_cache_free(c);
    return status;
}

void kv_cache_free(kv_cache *c)
{
    if (!c) return;
    for (size_t i = 0; c->store && i < (size_t)c->geo.n_layers * (size_t)c->geo.n_kv_heads * 2; i++) {
        kv_store *st = &c->store[i];
        for (int g = 0; g < st->n_pages; g++) kv_free(st->page[g]);
        kv_free(st->page);
        kv_free(st->sink);
        kv_free(st->tail);
        kv_free(st->saved);
    }
    for (int l = 0; c->turn && l < c->geo.n_layers; l++) {
        kv_turn *t = c->turn[l];
        for (int m = l; m < c->geo.n_layers; m++) if (c->turn[m] == t) c->turn[m] = NULL;
        if (t) kv_free(t->cs);
        kv_free(t);
    }
    kv_work_free(c->work);
    kv_chunk_free(c->chunk);
    kv_free(c->store);
    kv_free(c->pending);
    kv_free(c->turn);
    kv_plan_free(c->plan);
    kv_free(c);
}

static int grow_page_table(kv_store *st, int need)
{
    if (need <= st->cap_pages) return KV_OK;
    const int cap = kv_max(need, st->cap_pages + st->cap_pages / 2);
    uint8_t **page = kv_alloc_array((size_t)cap, sizeof *page, true);
    if (!page) return KV_E_NOMEM;
    if (st->n_pages) memcpy(page, st->page, sizeof *page * (size_t)st->n_pages);
    kv_free(st->page);
    st->page = page;
    st->cap_pages = cap;
    return KV_OK;
}

static int copy_bytes(uint8_t **dst, const uint8_t *src, size_t n)
{
    *dst = NULL;
    if (!src) return KV_OK;
    if (!(*dst = kv_alloc(n))) return KV_E_NOMEM;
    memcpy(*dst, src, n);
    return KV_OK;
}

/* A deep copy as of the last commit. */
int kv_cache_fork(kv_cache **out, const kv_cache *c)
{
    int status;
    kv_cache *f = NULL;
    RETURN_ERROR_IF(!out || !c, KV_E_ARG, "cache: NULL argument");
    for (int l = 0; l < c->geo.n_layers; l++) RETURN_ERROR_IF(c->pending[l], KV_E_ARG, "cache: fork in the middle of a step (layer %d has %d tokens not committed)", l, c->pending[l]);
    *out = NULL;
    FORWARD_IF_ERROR(kv_cache_new(&f, &c->geo, c->plan, c->max_tokens));
    for (int l = 0; l < c->geo.n_layers; l++)
        for (int i = 0; i < c->geo.n_kv_heads * 2; i++) {
            const kv_store *a = kv_cache_store(c, l, i / 2, i % 2);
            kv_store *b = kv_cache_store(f, l, i / 2, i % 2);
            const size_t row = kv_row_bytes(c, l), bytes = kv_plan_slot(c->plan, l, i / 2, i % 2)->codec->page_bytes;
            if (a->sink) memcpy(b->sink, a->sink, row * (size_t)a->sink_rows);
            else {
                kv_free(b->sink);
                b->sink = NULL;
            }
            if (a->tail) memcpy(b->tail, a->tail, row * (size_t)a->tail_rows);
            FAIL_IF_ERROR(grow_page_table(b, a->n_pages));
            b->first_page = a->first_page;
            for (; b->n_pages < a->n_pages; b->n_pages++) FAIL_IF_ERROR(copy_bytes(&b->page[b->n_pages], a->page[b->n_pages], bytes));
            b->n_encoded = a->n_encoded;
            b->n_before = a->n_before;
        }
    f->n_tokens = c->n_tokens;
    f->path = c->path;
    f->count_from = c->count_from;
    f->pairs_compressed = c->pairs_compressed;
    f->pairs_total = c->pairs_total;
    f->did = c->did;
    memcpy(f->paths, c->paths, sizeof f->paths);
    *out = f;
    return KV_OK;
fail:
    kv_cache_free(f);
    return status;
}

/* ---- rows in and out */

int kv_cache_check_rows(const kv_cache *c, int layer, int n, const float *k, const float *v)
{
    static const char *const name[] = { "f32", "f16", "bf16" };
    static const uint32_t limit[] = { 0x7f800000u, 0x477ff000u, 0x7f7f8000u };     /* |x| from here on rounds to inf */
    const int d = c->geo.head_dim, nh = c->geo.n_kv_heads, dtype = c->plan->exact_dtype[layer];
    const int64_t total = (int64_t)n * nh * d;
    for (int side = 0; side < 2; side++) {
        const float *x = side == KV_SIDE_K ? k : v;
        if (kv_vec_abs_bits(x, total) < limit[dtype]) continue;
        for (int64_t i = 0; i < total; i++) {
            const uint32_t a = kv_f32_bits(x[i]) & 0x7fffffffu;
            if (a < limit[dtype]) continue;
            const char *what = side == KV_SIDE_K ? "key" : "value";
            const int pos = c->n_tokens + (int)(i / (nh * d)), head = (int)(i / d % nh), dim = (int)(i % d);
            RETURN_ERROR_IF(a >= 0x7f800000u, KV_E_ARG, "cache: layer %d head %d position %d: %s[%d] = %g is not finite", layer, head, pos, what, dim, (double)x[i]);
            return kv_set_error(KV_E_ARG, "cache: layer %d head %d position %d: %s[%d] = %g does not fit exact dtype %s", layer, head, pos, what, dim, (double)x[i], name[dtype]);
        }
    }
    return KV_OK;
}

int kv_cache_reserve(kv_cache *c, int layer, int n_tokens)
{
    const int pt = c->plan->page_tokens;
    for (int i = 0; i < c->geo.n_kv_heads * 2; i++) {
        kv_store *st = kv_cache_store(c, layer, i / 2, i % 2);
        const kv_codec *codec = kv_plan_slot(c->plan, layer, i / 2, i % 2)->codec;
        const int need = (kv_encoded_at(c, layer, st, codec, n_tokens) + pt - 1) / pt;
        FORWARD_IF_ERROR(grow_page_table(st, need));
        for (; st->n_pages < need; st->n_pages++)
            if (!(st->page[st->n_pages] = kv_zalloc(codec->page_bytes))) return KV_E_NOMEM;
    }
    return KV_OK;
}

/* Calls with runs of neighbouring rows: where position p lies, and how many follow it. */
static uint8_t *exact_row(const kv_store *st, size_t row, int sink, int p, int p1, int *run)
{
    if (p < sink) {
        *run = kv_min(p1, sink) - p;
        return st->sink + (size_t)p * row;
    }
    const int r = (p - sink) % st->tail_rows;
    *run = kv_min(p1 - p, st->tail_rows - r);
    return st->tail + (size_t)r * row;
}

void kv_store_load_exact(const kv_cache *c, int layer, const kv_store *st, int p0, int p1, float *dst)
{
    const int d = c->geo.head_dim;
    for (int run; p0 < p1; p0 += run, dst += (size_t)run * (size_t)d) {
        const uint8_t *src = exact_row(st, kv_row_bytes(c, layer), c->plan->sink[layer], p0, p1, &run);
        kv_vec_load(c->plan->exact_dtype[layer], src, dst, (int64_t)run * d);
    }
}

void kv_store_save_exact(const kv_cache *c, int layer, kv_store *st, int p0, int p1, const float *rows)
{
    const int d = c->geo.head_dim;
    for (int run; p0 < p1; p0 += run, rows += (size_t)run * (size_t)d) {
        uint8_t *dst = exact_row(st, kv_row_bytes(c, layer), c->plan->sink[layer], p0, p1, &run);
        kv_vec_store(c->plan->exact_dtype[layer], rows, dst, (int64_t)run * d);
    }
}

void kv_turn_rows(const kv_turn *t, int page, int back, float *x, int64_t ld, int n_rows)
{
    const int half = t->n_rot / 2;
    const float *cs = t->cs + (size_t)page * (size_t)t->n_rot, *sn = cs + half;
    const float sign = back ? 1.0f : -1.0f;
    for (int r = 0; r < n_rows; r++, x += ld)
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half], s = sign * sn[i];
            x[i] = a * cs[i] - b * s;
            x[i + half] = b * cs[i] + a * s;
        }
}

void kv_store_encode(const kv_cache *c, int layer, int head, int side, int u0, int u1, const float *rows, float *scratch)
{
    const kv_slot *slot = kv_plan_slot(c->plan, layer, head, side);
    kv_store *st = kv_cache_store(c, layer, head, side);
    const int d = c->geo.head_dim, pt = c->plan->page_tokens;
    const int turned = side == KV_SIDE_K && slot->page_rope && c->turn[layer] != NULL;
    while (u0 < u1) {
        const int page = u0 / pt, t0 = u0 % pt, n = kv_min(u1 - u0, pt - t0);
        const float *x = rows;
        if (turned || slot->mean) {
            memcpy(scratch, rows, sizeof(float) * (size_t)n * (size_t)d);
            if (turned) kv_turn_rows(c->turn[layer], page, 0, scratch, d, n);
            if (slot->mean)
                for (int r = 0; r < n; r++) kv_vec_axpy(-1.0f, slot->mean, scratch + (size_t)r * (size_t)d, d);
            x = scratch;
        }
        slot->codec->ops->encode(slot->codec, st->page[page], t0, n, x, d);
        u0 += n;
        rows += (size_t)n * (size_t)d;
    }
}

void kv_store_decode(const kv_cache *c, int layer, int head, int side, int u0, int u1, float *dst)
{
    const kv_slot *slot = kv_plan_slot(c->plan, layer, head, side);
    const kv_store *st = kv_cache_store(c, layer, head, side);
    const int d = c->geo.head_dim, pt = c->plan->page_tokens;
    while (u0 < u1) {
        const int page = u0 / pt, t0 = u0 % pt, n = kv_min(u1 - u0, pt - t0);
        slot->codec->ops->decode(slot->codec, st->page[page], t0, n, dst, d);
        if (slot->mean)
            for (int r = 0; r < n; r++) kv_vec_axpy(1.0f, slot->mean, dst + (size_t)r * (size_t)d, d);
        if (side == KV_SIDE_K && slot->page_rope && c->turn[layer]) kv_turn_rows(c->turn[layer], page, 1, dst, d, n);
        u0 += n;
        dst += (size_t)n * (size_t)d;
    }
}

/* ---- a step: attend of each layer, commit; or taken back */

int kv_cache_n_tokens(const kv_cache *c) { return c->n_tokens; }

int kv_cache_attend(kv_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out)
{
    RETURN_ERROR_IF(!c || !q || !k || !v || !out, KV_E_ARG, "cache: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= c->geo.n_layers, KV_E_ARG, "cache: layer %d is outside 0..%d", layer, c->geo.n_layers - 1);
    RETURN_ERROR_IF(n < 1, KV_E_ARG, "cache: %d tokens to attend, at least 1 is needed", n);
    RETURN_ERROR_IF(n > c->max_tokens - c->n_tokens, KV_E_ARG, "cache: %lld tokens do not fit max_tokens=%d", (long long)c->n_tokens + n, c->max_tokens);
    if (c->pending[layer]) kv_cache_roll_back(c, layer);       /* a step that did not come to its commit is tried again */
    if (layer == 0) c->step_compressed = c->step_total = 0;
    FORWARD_IF_ERROR(kv_cache_check_rows(c, layer, n, k, v));
    FORWARD_IF_ERROR(kv_cache_reserve(c, layer, c->n_tokens + n));
    FORWARD_IF_ERROR((n == 1 ? kv_attend_token(c, layer, q, k, v, scale, softcap, out) : kv_attend_chunk(c, layer, n, q, k, v, scale, softcap, out)));
    c->pending[layer] = n;
    kv_cache_count_pairs(c, layer, n);
    return KV_OK;
}

void kv_store_drop_unseen(const kv_cache *c, int layer, kv_store *st)
{
    const int first = kv_first_seen(c, layer, c->n_tokens), sink = c->plan->sink[layer], pt = c->plan->page_tokens;
    if (first == 0) return;
    if (first >= sink && st->sink) {
        kv_free(st->sink);
        st->sink = NULL;
    }
    for (; st->first_page < st->n_pages && (int64_t)sink + (int64_t)(st->first_page + 1) * pt <= first; st->first_page++) {
        kv_free(st->page[st->first_page]);
        st->page[st->first_page] = NULL;
    }
}

int kv_cache_commit(kv_cache *c, int n)
{
    RETURN_ERROR_IF(!c, KV_E_ARG, "cache: NULL argument");
    for (int l = 0; l < c->geo.n_layers; l++)
        RETURN_ERROR_IF(n < 1 || c->pending[l] != n, KV_E_ARG, "cache: commit of %d tokens, but layer %d has attended to %d", n, l, c->pending[l]);
    c->n_tokens += n;
    for (int l = 0; l < c->geo.n_layers; l++) {
        c->pending[l] = 0;
        for (int i = 0; i < c->geo.n_kv_heads * 2; i++) {
            kv_store *st = kv_cache_store(c, l, i / 2, i % 2);
            st->n_before = st->n_encoded;
            kv_free(st->saved);
            st->saved = NULL;
            kv_store_drop_unseen(c, l, st);
        }
    }
    kv_chunk_free(c->chunk);
    c->chunk = NULL;
    c->pairs_compressed += c->step_compressed;
    c->pairs_total += c->step_total;
    c->step_compressed = c->step_total = 0;
    return KV_OK;
}

void kv_cache_roll_back(kv_cache *c, int layer)
{
    for (int i = 0; i < c->geo.n_kv_heads * 2; i++) {
        kv_store *st = kv_cache_store(c, layer, i / 2, i % 2);
        st->n_encoded = st->n_before;
        if (st->saved) {
            kv_free(st->tail);
            st->tail = st->saved;
            st->saved = NULL;
        }
    }
    c->pending[layer] = 0;
}

int kv_store_first_held(const kv_cache *c, int layer, const kv_store *st)
{
    const int sink = c->plan->sink[layer];
    const int lost_tail = st->never ? kv_max(sink, c->n_tokens - st->tail_rows) : sink + kv_min(st->first_page * c->plan->page_tokens, st->n_encoded);
    return lost_tail > sink || (sink > 0 && !st->sink) ? lost_tail : 0;
}

int kv_cache_first_held(const kv_cache *c, int layer)
{
    int held = 0;
    for (int i = 0; i < c->geo.n_kv_heads * 2; i++) held = kv_max(held, kv_store_first_held(c, layer, kv_cache_store(c, layer, i / 2, i % 2)));
    return held;
}

int kv_cache_truncate(kv_cache *c, int n)
{
    RETURN_ERROR_IF(!c, KV_E_ARG, "cache: NULL argument");
    RETURN_ERROR_IF(n < 0 || n > c->n_tokens, KV_E_ARG, "cache: truncate to %d tokens is outside 0..%d", n, c->n_tokens);
    const int nh2 = c->geo.n_kv_heads * 2, d = c->geo.head_dim, pt = c->plan->page_tokens;
    for (int l = 0; l < c->geo.n_layers; l++) kv_cache_roll_back(c, l);
    kv_chunk_free(c->chunk);
    c->chunk = NULL;
    c->step_compressed = c->step_total = 0;
    if (n == c->n_tokens) return KV_OK;
    for (int l = 0; n > 0 && l < c->geo.n_layers; l++)
        for (int i = 0; i < nh2; i++) {
            const int held = kv_store_first_held(c, l, kv_cache_store(c, l, i / 2, i % 2)), seen = kv_first_seen(c, l, n);
            RETURN_ERROR_IF(held > seen, KV_E_UNSUPPORTED, "cache: truncate to %d tokens needs positions %d..%d of layer %d, which its sliding window of %d has dropped; feed the text again",
                n, seen, kv_min(held, n) - 1, l, c->geo.sliding[l]);
        }
    /* Sinks that sliding layers gave back, needed again after truncate(0), and the rows of cut granules: all memory first. */
    float *rows = kv_alloc_array((size_t)pt * (size_t)d, sizeof(float), false);
    if (!rows) return KV_E_NOMEM;
    for (int l = 0; l < c->geo.n_layers; l++)
        for (int i = 0; i < nh2; i++) {
            kv_store *st = kv_cache_store(c, l, i / 2, i % 2);
            if (n < st->sink_rows && !st->sink && !(st->sink = kv_alloc_array((size_t)st->sink_rows, kv_row_bytes(c, l), false))) {
                kv_free(rows);
                return KV_E_NOMEM;
            }
        }
    for (int l = 0; l < c->geo.n_layers; l++)
        for (int i = 0; i < nh2; i++) {
            kv_store *st = kv_cache_store(c, l, i / 2, i % 2);
            const int granule = kv_plan_slot(c->plan, l, i / 2, i % 2)->codec->granule, sink = c->plan->sink[l];
            const int left = kv_max(0, n - sink), keep = kv_min(st->n_encoded, left - left % granule);
            const int cut = kv_min(st->n_encoded, left);
            if (cut > keep) {
                if (keep / pt >= st->first_page) kv_store_decode(c, l, i / 2, i % 2, keep, cut, rows);
                else memset(rows, 0, sizeof(float) * (size_t)(cut - keep) * (size_t)d);      /* a window of 1: nobody looks back */
                kv_vec_round(c->plan->exact_dtype[l], rows, rows, (int64_t)(cut - keep) * d);
                kv_store_save_exact(c, l, st, sink + keep, sink + cut, rows);
            }
            while (st->n_pages > (keep + pt - 1) / pt) kv_free(st->page[--st->n_pages]);
            st->first_page = kv_min(st->first_page, st->n_pages);
            st->n_encoded = st->n_before = keep;
        }
    kv_free(rows);
    c->n_tokens = n;
    return KV_OK;
}

int kv_cache_read(const kv_cache *c, int layer, int head, int side, int tok0, int tok1, float *dst)
{
    RETURN_ERROR_IF(!c || !dst, KV_E_ARG, "cache: NULL argument");
    RETURN_ERROR_IF(layer < 0 || layer >= c->geo.n_layers, KV_E_ARG, "cache: layer %d is outside 0..%d", layer, c->geo.n_layers - 1);
    RETURN_ERROR_IF(head < 0 || head >= c->geo.n_kv_heads, KV_E_ARG, "cache: head %d is outside 0..%d", head, c->geo.n_kv_heads - 1);
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "cache: side=%d is neither K (0) nor V (1)", side);
    RETURN_ERROR_IF(tok0 < 0 || tok1 < tok0 || tok1 > c->n_tokens, KV_E_ARG, "cache: positions %d..%d are outside 0..%d", tok0, tok1 - 1, c->n_tokens - 1);
    RETURN_ERROR_IF(c->pending[layer], KV_E_ARG, "cache: read in the middle of a step (layer %d has %d tokens not committed)", layer, c->pending[layer]);
    const kv_store *st = kv_cache_store(c, layer, head, side);
    const int sink = c->plan->sink[layer], d = c->geo.head_dim, held = kv_store_first_held(c, layer, st);
    RETURN_ERROR_IF(tok0 < tok1 && tok0 < held, KV_E_ARG, "cache: layer %d no longer holds position %d, only %d..%d: its window has passed", layer, tok0, held, c->n_tokens - 1);
    const int s1 = kv_min(tok1, sink), e0 = kv_max(tok0, sink), e1 = kv_min(tok1, sink + st->n_encoded), t0 = kv_max(tok0, sink + st->n_encoded);
    if (tok0 < s1) kv_store_load_exact(c, layer, st, tok0, s1, dst);
    if (e0 < e1) kv_store_decode(c, layer, head, side, e0 - sink, e1 - sink, dst + (size_t)(e0 - tok0) * (size_t)d);
    if (t0 < tok1) kv_store_load_exact(c, layer, st, t0, tok1, dst + (size_t)(t0 - tok0) * (size_t)d);
    return KV_OK;
}

void kv_cache_path(kv_cache *c, int path)
{
    c->path = path;
    c->did = 0;
    c->paths[0] = 0;
}

/* The text of kv_cache_paths, made when a kind of step is done for the first time since the path was set. */
void kv_cache_describe(kv_cache *c, int did)
{
    static const char *const level[] = { "c", "avx2", "avx512" };
    if (c->did & did) return;
    c->did |= did;
    int n = 0;
    c->paths[0] = 0;
    for (int side = 0; (c->did & 1) && side < 2; side++) {
        int fused = 0, slots = c->geo.n_layers * c->geo.n_kv_heads;
        for (int i = 0; i < slots; i++) fused += c->path == KV_PATH_FUSED && kv_codec_fused(c->plan->slot[2 * i + side].codec);
        n += snprintf(c->paths + n, sizeof c->paths - (size_t)n, "%s: %s%s%s", side ? ", v" : "k", fused ? "fused " : "tile", fused ? level[kv_cpu_simd()] : "", fused && fused < slots ? " + tile" : "");
    }
    if (c->did & 2) snprintf(c->paths + n, sizeof c->paths - (size_t)n, "%schunks: decoded, %s", n ? "; " : "", kv_amx() ? "amx" : "sgemm");
}
const char *kv_cache_paths(const kv_cache *c) { return c->paths; }
