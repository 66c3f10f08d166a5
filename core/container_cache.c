/* container_cache.c -- a session's whole cache as sections of a file, and back.
 *
 *   cache         text: what the caller says
 *                 page 0  counts, below     page 1  layers: sink, recent, exact dtype, 0     i32 [layer][4]
 *                 page 2  slots, below      page 3  means that are removed                   f32 [mean][head_dim]
 *                 page 4  tokens i32        page 5  logits of the last token f32, or nothing
 *   codec         one for each codec of the plan (container_block.c)
 *   cache.k, .v   one for each layer, in turn; for each head: its sinks, its exact rows past the pages, its pages from the
 *                 first that a later query can still see
 *
 * Rows are kept by position, not as they lie in the ring, so that a cache can be loaded with room for more tokens.  What is
 * loaded goes on as the one that was saved would have: the same bytes, the same scores.  Everything is checked as bytes from
 * outside: a file made by hand can hold a wrong cache, not one that reads or writes where it must not. */
#include <math.h>
#include "cache_impl.h"
#include "container.h"

typedef struct counts {                           /* page 0 of "cache", as it lies in the file */
    int32_t n_layers, n_kv_heads, head_dim, page_tokens, n_tokens, max_tokens, path, count_from, n_codecs, n_means, n_logits, zero;
    double  pairs_compressed, pairs_total;
    char    model[64], rope[64];
} counts;
_Static_assert(sizeof(counts) == 192, "no padding");

typedef struct slot {                             /* page 2: [layer][head][k, v] */
    int32_t codec, mean, page_rope, n_encoded, first_page, n_sink, n_tail, zero;   /* mean -1: none; n_sink -1: given back */
} slot;

static const kv_pack_kind known[] = { { "cache", 1 }, { "codec", 1 }, { "cache.k", 1 }, { "cache.v", 1 } };

int kv_cache_max_tokens(const kv_cache *c) { return c->max_tokens; }
kv_plan *kv_cache_plan(const kv_cache *c) { return c->plan; }

/* Rows of positions [p0, p1) between the ring and a buffer in order. */
static void copy_tail(const kv_cache *c, int layer, const kv_store *st, int p0, int p1, uint8_t *rows, bool into_ring)
{
    const size_t row = kv_row_bytes(c, layer);
    for (int p = p0; p < p1; p++, rows += row) {
        uint8_t *ring = st->tail + (size_t)((p - c->plan->sink[layer]) % st->tail_rows) * row;
        memcpy(into_ring ? ring : rows, into_ring ? rows : ring, row);
    }
}

/* Exact rows past the pages that the cache still holds: all of them, or as many as a window keeps. */
static int tail_count(const kv_cache *c, int layer, const kv_store *st)
{
    const int past = kv_max(0, c->n_tokens - c->plan->sink[layer] - st->n_encoded);
    return kv_min(past, st->tail_rows);
}

/* ---- saving */

/* Plans make a codec for every layer; what codes alike is one codec in the file. */
static int find_codec(kv_codec **list, int n, const kv_codec *c)
{
    for (int i = n - 1; i >= 0; i--)
        if (list[i] == c || (list[i]->ops == c->ops && list[i]->side == c->side && strcmp(list[i]->text, c->text) == 0 && list[i]->blob_bytes == c->blob_bytes &&
            (!c->blob_bytes || memcmp(list[i]->blob, c->blob, c->blob_bytes) == 0))) return i;
    return -1;
}

static int save_store(const kv_cache *c, kv_pack_writer *w, int layer, int head, int side)
{
    const kv_store *st = kv_cache_store(c, layer, head, side);
    const kv_codec *codec = kv_plan_slot(c->plan, layer, head, side)->codec;
    const size_t row = kv_row_bytes(c, layer);
    const int n_tail = tail_count(c, layer, st), n_pages = (st->n_encoded + c->plan->page_tokens - 1) / c->plan->page_tokens;
    FORWARD_IF_ERROR(kv_pack_page(w, st->sink, st->sink ? (size_t)kv_min(st->sink_rows, c->n_tokens) * row : 0));
    uint8_t *rows = kv_alloc_array((size_t)n_tail, row, false);
    if (!rows) return KV_E_NOMEM;
    copy_tail(c, layer, st, c->n_tokens - n_tail, c->n_tokens, rows, false);
    const int status = kv_pack_page(w, rows, (size_t)n_tail * row);
    kv_free(rows);
    for (int g = st->first_page; status == KV_OK && g < n_pages; g++) FORWARD_IF_ERROR(kv_pack_page(w, st->page[g], codec->page_bytes));
    return status;
}

int kv_cache_save(const kv_cache *c, kv_pack_writer *w, const kv_cache_extras *x, int stage, int level)
{
    const int n_layers = c->geo.n_layers, nh2 = c->geo.n_kv_heads * 2, d = c->geo.head_dim;
    const size_t n_slots = (size_t)n_layers * (size_t)nh2;
    int status = KV_E_NOMEM;
    for (int l = 0; l < n_layers; l++) RETURN_ERROR_IF(c->pending[l], KV_E_ARG, "cache: save in the middle of a step (layer %d has %d tokens not committed)", l, c->pending[l]);
    counts n = { .n_layers = n_layers, .n_kv_heads = c->geo.n_kv_heads, .head_dim = d, .page_tokens = c->plan->page_tokens, .n_tokens = c->n_tokens, .max_tokens = c->max_tokens,
        .path = c->path, .count_from = c->count_from, .n_logits = x->n_logits, .pairs_compressed = c->pairs_compressed, .pairs_total = c->pairs_total };
    memcpy(n.model, x->model, sizeof n.model);
    memcpy(n.rope, x->rope, sizeof n.rope);
    int32_t *layers = kv_alloc_array((size_t)n_layers, 4 * sizeof *layers, true);
    slot *slots = kv_alloc_array(n_slots, sizeof *slots, true);
    kv_codec **codecs = kv_alloc_array(n_slots, sizeof *codecs, true);
    float *means = kv_alloc_array(n_slots, (size_t)d * sizeof *means, false);
    if (!layers || !slots || !codecs || !means) goto fail;
    for (int l = 0; l < n_layers; l++) {
        const int32_t layer[4] = { c->plan->sink[l], c->plan->recent[l], c->plan->exact_dtype[l], 0 };
        memcpy(layers + 4 * l, layer, sizeof layer);
        for (int i = 0; i < nh2; i++) {
            const kv_slot *from = kv_plan_slot(c->plan, l, i / 2, i % 2);
            const kv_store *st = kv_cache_store(c, l, i / 2, i % 2);
            slot *to = &slots[(size_t)l * (size_t)nh2 + (size_t)i];
            *to = (slot){ find_codec(codecs, n.n_codecs, from->codec), from->mean ? n.n_means : -1, from->page_rope, st->n_encoded, st->first_page,
                st->sink || !st->sink_rows ? kv_min(st->sink_rows, c->n_tokens) : -1, tail_count(c, l, st), 0 };
            if (to->codec < 0) {
                to->codec = n.n_codecs;
                codecs[n.n_codecs++] = from->codec;
            }
            if (from->mean) memcpy(means + (size_t)n.n_means++ * (size_t)d, from->mean, sizeof(float) * (size_t)d);
        }
    }
    FAIL_IF_ERROR(kv_pack_section(w, "cache", 1, 0, x->about, strlen(x->about), KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    FAIL_IF_ERROR(kv_pack_page(w, &n, sizeof n));
    FAIL_IF_ERROR(kv_pack_page(w, layers, (size_t)n_layers * 4 * sizeof *layers));
    FAIL_IF_ERROR(kv_pack_page(w, slots, n_slots * sizeof *slots));
    FAIL_IF_ERROR(kv_pack_page(w, means, (size_t)n.n_means * (size_t)d * sizeof *means));
    FAIL_IF_ERROR(kv_pack_page(w, x->tokens, (size_t)c->n_tokens * sizeof *x->tokens));
    FAIL_IF_ERROR(kv_pack_page(w, x->logits, (size_t)n.n_logits * sizeof *x->logits));
    for (int i = 0; i < n.n_codecs; i++) FAIL_IF_ERROR(kv_pack_put_codec(w, codecs[i]));
    for (int l = 0; l < n_layers; l++)
        for (int side = 0; side < 2; side++) {
            FAIL_IF_ERROR(kv_pack_section(w, side == KV_SIDE_K ? "cache.k" : "cache.v", 1, 0, "{}", 2, stage, level));
            for (int h = 0; h < c->geo.n_kv_heads; h++) FAIL_IF_ERROR(save_store(c, w, l, h, side));
        }
    status = KV_OK;
fail:
    kv_free(layers);
    kv_free(slots);
    kv_free(codecs);
    kv_free(means);
    return status;
}

/* ---- loading */

typedef struct loader {
    const kv_pack *p;
    int            head;                          /* section "cache" */
    counts         n;
    int32_t       *layers;
    slot          *slots;
    float         *means;
    kv_codec     **codecs;
    kv_plan       *plan;
    kv_cache      *c;
    int            salvage, whole;                /* whole: tokens before the first damaged page */
} loader;

/* A page that must have n bytes, into memory of its own. */
static int take(const loader *ld, int page, size_t n, void *out)
{
    void *x = kv_alloc(n);
    *(void **)out = x;
    if (!x) return KV_E_NOMEM;
    return kv_pack_read(ld->p, ld->head, page, x, n);
}

static int read_plan(loader *ld)
{
    const counts *n = &ld->n;
    const size_t n_slots = (size_t)n->n_layers * (size_t)n->n_kv_heads * 2;
    FORWARD_IF_ERROR(take(ld, 1, (size_t)n->n_layers * 16, &ld->layers));
    FORWARD_IF_ERROR(take(ld, 2, n_slots * sizeof(slot), &ld->slots));
    RETURN_ERROR_IF(n->n_codecs < 1 || n->n_means < 0 || (size_t)n->n_codecs > n_slots || (size_t)n->n_means > n_slots, KV_E_CORRUPT, "file '%s': %d codecs and %d means for %zu slots", kv_pack_name(ld->p), n->n_codecs, n->n_means, n_slots);
    FORWARD_IF_ERROR(take(ld, 3, (size_t)n->n_means * (size_t)n->head_dim * sizeof(float), &ld->means));
    if (!(ld->codecs = kv_alloc_array((size_t)n->n_codecs, sizeof *ld->codecs, true))) return KV_E_NOMEM;
    for (int i = 0, at = -1; i < n->n_codecs; i++) {
        at = kv_pack_find(ld->p, "codec", at + 1);
        RETURN_ERROR_IF(at < 0, KV_E_CORRUPT, "file '%s': %d codecs of %d", kv_pack_name(ld->p), i, n->n_codecs);
        FORWARD_IF_ERROR(kv_pack_get_codec(&ld->codecs[i], ld->p, at));
    }
    FORWARD_IF_ERROR(kv_plan_new(&ld->plan, n->n_layers, n->n_kv_heads, n->head_dim, n->page_tokens));
    for (int l = 0; l < n->n_layers; l++) {
        FORWARD_IF_ERROR(kv_plan_window(ld->plan, l, ld->layers[4 * l], ld->layers[4 * l + 1], ld->layers[4 * l + 2]));
        for (int i = 0; i < 2 * n->n_kv_heads; i++) {
            const slot *s = &ld->slots[(size_t)l * (size_t)n->n_kv_heads * 2 + (size_t)i];
            RETURN_ERROR_IF(s->codec < 0 || s->codec >= n->n_codecs || s->mean < -1 || s->mean >= n->n_means, KV_E_CORRUPT, "file '%s': layer %d head %d names codec %d of %d and mean %d of %d",
                kv_pack_name(ld->p), l, i / 2, s->codec, n->n_codecs, s->mean, n->n_means);
            FORWARD_IF_ERROR(kv_plan_set(ld->plan, l, i / 2, i % 2, ld->codecs[s->codec]));
            if (s->mean >= 0) FORWARD_IF_ERROR(kv_plan_mean(ld->plan, l, i / 2, i % 2, ld->means + (size_t)s->mean * (size_t)n->head_dim));
            if (i % 2 == KV_SIDE_K && s->page_rope) FORWARD_IF_ERROR(kv_plan_page_rope(ld->plan, l, i / 2, 1));
        }
    }
    return KV_OK;
}

/* Reads a page, or notes from which position on the cache is not whole. */
static int take_page(loader *ld, int part, int page, void *dst, size_t n, int position)
{
    const int status = kv_pack_page_bytes(ld->p, part, page) == n ? kv_pack_read(ld->p, part, page, dst, n)
        : kv_set_error(KV_E_CORRUPT, "file '%s': page %d of section %d has %zu bytes, not %zu", kv_pack_name(ld->p), page, part, kv_pack_page_bytes(ld->p, part, page), n);
    if (status != KV_E_CORRUPT || !ld->salvage) return status;
    if (n) memset(dst, 0, n);
    ld->whole = kv_min(ld->whole, kv_max(position, 0));
    return KV_OK;
}

/* The counts of a store are those that a cache of this plan can have after n_tokens, some truncation included. */
static int check_store(const loader *ld, int layer, const kv_store *st, const kv_codec *codec, const slot *s)
{
    const kv_cache *c = ld->c;
    const int sink = c->plan->sink[layer], pt = c->plan->page_tokens, seen = kv_first_seen(c, layer, c->n_tokens), past = kv_max(0, c->n_tokens - sink);
    bool ok = s->n_encoded >= 0 && s->n_encoded <= past && s->n_encoded % codec->granule == 0 && (!st->never || s->n_encoded == 0);
    ok = ok && s->n_encoded == kv_encoded_at(c, layer, st, codec, c->n_tokens);
    ok = ok && s->first_page >= 0 && (s->first_page == 0 || ((int64_t)sink + (int64_t)s->first_page * pt <= seen && (int64_t)s->first_page * pt <= s->n_encoded));
    ok = ok && (s->n_sink == kv_min(st->sink_rows, c->n_tokens) || (s->n_sink == -1 && st->sink_rows && seen >= sink));
    ok = ok && s->n_tail >= 0 && s->n_tail <= st->tail_rows && s->n_tail <= past - s->n_encoded;
    ok = ok && c->n_tokens - s->n_tail <= kv_max(sink + s->n_encoded, seen);
    RETURN_ERROR_IF(!ok, KV_E_CORRUPT, "file '%s': layer %d: %d tokens in pages from page %d on, %d sinks and %d exact rows are not what %d tokens leave", kv_pack_name(ld->p), layer,
        s->n_encoded, s->first_page, s->n_sink, s->n_tail, c->n_tokens);
    return KV_OK;
}

static int load_store(loader *ld, int part, int *page, int layer, int head, int side)
{
    kv_cache *c = ld->c;
    kv_store *st = kv_cache_store(c, layer, head, side);
    const kv_codec *codec = kv_plan_slot(c->plan, layer, head, side)->codec;
    const slot *s = &ld->slots[((size_t)layer * (size_t)c->geo.n_kv_heads + (size_t)head) * 2 + (size_t)side];
    const size_t row = kv_row_bytes(c, layer);
    const int pt = c->plan->page_tokens, sink = c->plan->sink[layer];
    st->n_encoded = st->n_before = s->n_encoded;
    FORWARD_IF_ERROR(check_store(ld, layer, st, codec, s));
    if (s->n_sink < 0) {
        kv_free(st->sink);
        st->sink = NULL;
    }
    FORWARD_IF_ERROR(take_page(ld, part, (*page)++, st->sink, (size_t)kv_max(s->n_sink, 0) * row, 0));
    uint8_t *rows = kv_alloc_array((size_t)s->n_tail, row, false);
    if (!rows) return KV_E_NOMEM;
    const int status = take_page(ld, part, (*page)++, rows, (size_t)s->n_tail * row, c->n_tokens - s->n_tail);
    if (status == KV_OK) copy_tail(c, layer, st, c->n_tokens - s->n_tail, c->n_tokens, rows, true);
    kv_free(rows);
    FORWARD_IF_ERROR(status);
    const int n_pages = (s->n_encoded + pt - 1) / pt;
    if (n_pages && !(st->page = kv_alloc_array((size_t)n_pages, sizeof *st->page, true))) return KV_E_NOMEM;
    st->cap_pages = n_pages;
    st->first_page = s->first_page;
    for (st->n_pages = s->first_page; st->n_pages < n_pages; st->n_pages++) {
        RETURN_ERROR_IF(kv_pack_page_bytes(ld->p, part, *page) != codec->page_bytes, KV_E_CORRUPT, "file '%s': page %d of section %d has %zu bytes, codec '%s' makes %zu", kv_pack_name(ld->p), *page, part,
            kv_pack_page_bytes(ld->p, part, *page), codec->ops->name, codec->page_bytes);
        if (!(st->page[st->n_pages] = kv_alloc(codec->page_bytes))) return KV_E_NOMEM;
        const int got = take_page(ld, part, (*page)++, st->page[st->n_pages], codec->page_bytes, sink + st->n_pages * pt);
        if (got < 0) {
            st->n_pages++;                        /* this one is there to be freed */
            return got;
        }
    }
    return KV_OK;
}

static int read_counts(loader *ld, const kv_geometry *g, const kv_cache_extras *x, int *max_tokens)
{
    counts *n = &ld->n;
    const char *name = kv_pack_name(ld->p);
    FORWARD_IF_ERROR(kv_pack_known(ld->p, known, 4));
    ld->head = kv_pack_find(ld->p, "cache", 0);
    RETURN_ERROR_IF(ld->head < 0, KV_E_CORRUPT, "file '%s' holds no cache", name);
    FORWARD_IF_ERROR(kv_pack_read(ld->p, ld->head, 0, n, sizeof *n));
    for (size_t i = 0; i < sizeof n->model; i++)
        RETURN_ERROR_IF(!n->model[i] || !n->rope[i] || !strchr("0123456789abcdef", n->model[i]) || !strchr("0123456789abcdef", n->rope[i]), KV_E_CORRUPT, "file '%s': a digest is not 64 hex digits", name);
    RETURN_ERROR_IF(memcmp(n->model, x->model, sizeof n->model) != 0, KV_E_ARG, "file '%s' is the cache of model %.16s, this model is %.16s", name, n->model, x->model);
    RETURN_ERROR_IF(memcmp(n->rope, x->rope, sizeof n->rope) != 0, KV_E_ARG, "file '%s' was made with RoPE %.16s, this model has %.16s", name, n->rope, x->rope);
    RETURN_ERROR_IF(n->n_layers != g->n_layers || n->n_kv_heads != g->n_kv_heads || n->head_dim != g->head_dim, KV_E_CORRUPT, "file '%s': %d layers, %d K/V heads, head_dim %d; the model has %d, %d, %d", name,
        n->n_layers, n->n_kv_heads, n->head_dim, g->n_layers, g->n_kv_heads, g->head_dim);
    RETURN_ERROR_IF(*max_tokens < 0 || (*max_tokens && *max_tokens < n->n_tokens), KV_E_ARG, "file '%s': max_tokens=%d, but it holds %d tokens", name, *max_tokens, n->n_tokens);
    if (!*max_tokens) *max_tokens = n->max_tokens;
    RETURN_ERROR_IF(n->n_tokens < 0 || n->n_tokens > *max_tokens || (n->path != KV_PATH_FUSED && n->path != KV_PATH_TILE) || n->n_logits < 0 || n->n_logits > 1 << 24 ||
        kv_pack_page_bytes(ld->p, ld->head, 4) != (size_t)n->n_tokens * sizeof(int32_t) || kv_pack_page_bytes(ld->p, ld->head, 5) != (size_t)n->n_logits * sizeof(float) ||
        !isfinite(n->pairs_compressed) || !isfinite(n->pairs_total), KV_E_CORRUPT, "file '%s': counts of %d tokens of %d, path %d, %d logits are not a cache's", name, n->n_tokens, *max_tokens, n->path, n->n_logits);
    return KV_OK;
}

static int read_stores(loader *ld)
{
    const counts *n = &ld->n;
    int part[2] = { -1, -1 };
    for (int l = 0; l < n->n_layers; l++)
        for (int side = 0; side < 2; side++) {
            part[side] = kv_pack_find(ld->p, side == KV_SIDE_K ? "cache.k" : "cache.v", part[side] + 1);
            RETURN_ERROR_IF(part[side] < 0, KV_E_CORRUPT, "file '%s': layer %d has no %s", kv_pack_name(ld->p), l, side == KV_SIDE_K ? "keys" : "values");
            for (int h = 0, page = 0; h < n->n_kv_heads; h++) FORWARD_IF_ERROR(load_store(ld, part[side], &page, l, h, side));
        }
    return KV_OK;
}

int kv_cache_load(kv_cache **out, const kv_geometry *g, const kv_pack *p, const kv_cache_extras *x, int max_tokens, int salvage, int *n_logits)
{
    int status;
    loader ld = { .p = p, .salvage = salvage };
    *out = NULL;
    FAIL_IF_ERROR(read_counts(&ld, g, x, &max_tokens));
    FAIL_IF_ERROR(read_plan(&ld));
    FAIL_IF_ERROR(kv_cache_new(&ld.c, g, ld.plan, max_tokens));
    ld.whole = ld.c->n_tokens = ld.n.n_tokens;
    FAIL_IF_ERROR(read_stores(&ld));
    ld.c->path = ld.n.path;
    ld.c->count_from = ld.n.count_from;
    ld.c->pairs_compressed = ld.n.pairs_compressed;
    ld.c->pairs_total = ld.n.pairs_total;
    *n_logits = ld.whole == ld.n.n_tokens ? ld.n.n_logits : 0;
    if (ld.whole < ld.n.n_tokens) {
        FAIL_IF(ld.whole == 0, KV_E_CORRUPT, "file '%s': the first page is damaged, and no token before it is whole", kv_pack_name(p));
        FAIL_IF_ERROR(kv_cache_truncate(ld.c, ld.whole));
    }
    *out = ld.c;
    ld.c = NULL;
fail:
    kv_cache_free(ld.c);
    for (int i = 0; ld.codecs && i < ld.n.n_codecs; i++) kv_codec_free(ld.codecs[i]);
    kv_plan_free(ld.plan);
    kv_free(ld.codecs);
    kv_free(ld.layers);
    kv_free(ld.slots);
    kv_free(ld.means);
    return status;
}
