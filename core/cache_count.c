/* cache_count.c -- what a cache weighs, which pairs it served compressed, and the mutation control.
 *
 * The ledger is made from the allocations a sequence keeps between steps:
 *   codes, scales, outliers, padding   pages, by their codec's page ledger, for the tokens encoded so far
 *   exact                              rows of sinks and tail in use
 *   slack                              page slots and rows allocated and not in use, and rounding to 64-byte blocks
 *   state                              page tables and the books of each layer and side; the cache's own only in the grand total
 *   shared                             means and codecs' calibrated tables: they belong to the plan, and every sequence of it
 *                                      shares them; a codec in several slots counts in the first
 * Working memory is not the sequence's and not counted: a chunk's is gone after its commit, the token path's is a fixed few
 * pages a thread, and the page angles depend on the geometry alone. */
#include "cache_impl.h"

static double block(double n_bytes) { return n_bytes > 0 ? (double)kv_round_up((size_t)n_bytes, 64) : 0; }      /* as kv_alloc rounds */

/* Whether no slot before this one has the same codec. */
static int first_use(const kv_plan *p, const kv_slot *slot)
{
    for (const kv_slot *s = p->slot; s < slot; s++)
        if (s->codec == slot->codec) return 0;
    return 1;
}

static void add_store(const kv_cache *c, int layer, int head, int side, kv_bytes *b)
{
    const kv_store *st = kv_cache_store(c, layer, head, side);
    const kv_slot *slot = kv_plan_slot(c->plan, layer, head, side);
    const int pt = c->plan->page_tokens, sink = c->plan->sink[layer];
    const double n_pages = st->n_pages - st->first_page, row = (double)kv_row_bytes(c, layer), page_bytes = (double)slot->codec->page_bytes;
    const double used = kv_max(0, st->n_encoded - st->first_page * pt) / (double)pt;
    const kv_bytes *p = &slot->codec->page;
    b->codes += used * p->codes;
    b->scales += used * p->scales;
    b->outliers += used * p->outliers;
    b->exact += used * p->exact;
    b->padding += used * p->padding;
    b->state += used * p->state;
    b->slack += used * p->slack + (n_pages - used) * page_bytes;
    const double sinks = st->sink ? row * kv_min(c->n_tokens, st->sink_rows) : 0, sink_block = st->sink ? block(row * st->sink_rows) : 0;
    const double tail = row * kv_min(st->tail_rows, kv_max(0, c->n_tokens - sink - st->n_encoded));
    b->exact += sinks + tail;
    b->slack += sink_block - sinks + block(row * st->tail_rows) - tail;
    b->state += (double)sizeof *st + block((double)st->cap_pages * (double)sizeof *st->page);
    if (slot->mean) b->shared += (double)c->geo.head_dim * (double)sizeof(float);
    if (slot->codec->blob && first_use(c->plan, slot)) b->shared += block((double)slot->codec->blob_bytes);
}

int kv_cache_bytes(const kv_cache *c, int layer, int side, kv_bytes *out)
{
    RETURN_ERROR_IF(!c || !out, KV_E_ARG, "cache: NULL argument");
    RETURN_ERROR_IF(layer < -1 || layer >= c->geo.n_layers, KV_E_ARG, "cache: layer %d is outside 0..%d (-1: all)", layer, c->geo.n_layers - 1);
    RETURN_ERROR_IF(side < -1 || side > 1, KV_E_ARG, "cache: side=%d is neither K (0) nor V (1) nor both (-1)", side);
    kv_bytes b = { 0 };
    for (int l = layer < 0 ? 0 : layer; l <= (layer < 0 ? c->geo.n_layers - 1 : layer); l++)
        for (int h = 0; h < c->geo.n_kv_heads; h++)
            for (int s = 0; s < 2; s++)
                if (side < 0 || side == s) add_store(c, l, h, s, &b);
    if (layer < 0 && side < 0) {
        const double n = c->geo.n_layers, stores = n * c->geo.n_kv_heads * 2 * (double)sizeof *c->store;
        b.state += block((double)sizeof *c) + block(n * (double)sizeof *c->pending) + block(n * (double)sizeof *c->turn) + block(stores) - stores;
    }
    b.total = b.codes + b.scales + b.outliers + b.exact + b.padding + b.slack + b.state + b.shared;
    *out = b;
    return KV_OK;
}

void kv_cache_count_from(kv_cache *c, int first_query) { c->count_from = first_query; }

/* Of the step's n queries in a layer; commit adds them up. */
void kv_cache_count_pairs(kv_cache *c, int layer, int n)
{
    const int sink = c->plan->sink[layer];
    for (int i = 0; i < c->geo.n_kv_heads * 2; i++) {
        const kv_store *st = kv_cache_store(c, layer, i / 2, i % 2);
        const kv_codec *codec = kv_plan_slot(c->plan, layer, i / 2, i % 2)->codec;
        for (int64_t t = kv_max(c->n_tokens, c->count_from); t < c->n_tokens + n; t++) {
            const int first = kv_first_seen(c, layer, (int)t);
            c->step_total += (double)(t + 1 - first);
            c->step_compressed += kv_max(0, sink + kv_encoded_at(c, layer, st, codec, t + 1) - kv_max(first, sink));
        }
    }
}

/* tokens_compressed: positions now held compressed, the mean over layers, heads and sides. */
void kv_cache_pairs(const kv_cache *c, kv_pairs *out)
{
    const size_t n = (size_t)c->geo.n_layers * (size_t)c->geo.n_kv_heads * 2;
    double tokens = 0;
    for (size_t i = 0; i < n; i++) tokens += kv_max(0, c->store[i].n_encoded - c->store[i].first_page * c->plan->page_tokens);
    *out = (kv_pairs){ .compressed = c->pairs_compressed, .total = c->pairs_total, .tokens_compressed = tokens / (double)n };
}

/* Flips all bits of each byte of every page with probability share; a page's padding is left alone.  Returns how many. */
double kv_cache_mutate(kv_cache *c, double seed, double share)
{
    const uint64_t s = (uint64_t)(int64_t)seed;
    const double below = (share < 0 ? 0 : share > 1 ? 1 : share) * 4294967296.0;
    const size_t n = (size_t)c->geo.n_layers * (size_t)c->geo.n_kv_heads * 2;
    double flipped = 0;
    for (size_t i = 0; i < n; i++) {
        kv_store *st = &c->store[i];
        const kv_codec *codec = c->plan->slot[i].codec;
        const size_t used = codec->page_bytes - (size_t)codec->page.padding;
        uint32_t counter = 0, r[4];
        for (int g = st->first_page; g < (st->n_encoded + c->plan->page_tokens - 1) / c->plan->page_tokens; g++)
            for (size_t k = 0; k < used; k++) {
                if (k % 4 == 0) kv_rng_u32((uint32_t)s, (uint32_t)(s >> 32), (uint32_t)i, counter++, r);
                if ((double)r[k % 4] < below) {
                    st->page[g][k] ^= 0xff;
                    flipped++;
                }
            }
    }
    return flipped;
}
