/* cache_import.c -- rows put into a cache from outside, for what was offloaded and comes back.
 *
 * kv_cache_import makes room for n tokens in an empty cache, as if they had been appended; kv_cache_write fills them, through the exact
 * dtype where they are exact and through the slot's codec where they are coded.  What a sliding layer of so many tokens no longer
 * holds is not taken. */
#include "cache_impl.h"

int kv_cache_import(kv_cache *c, int n)
{
    RETURN_ERROR_IF(!c, KV_E_ARG, "cache: NULL argument");
    RETURN_ERROR_IF(c->n_tokens != 0, KV_E_ARG, "cache: import into a cache of %d tokens, it must be empty", c->n_tokens);
    RETURN_ERROR_IF(n < 1 || n > c->max_tokens, KV_E_ARG, "cache: import of %d tokens is outside 1..%d", n, c->max_tokens);
    for (int l = 0; l < c->geo.n_layers; l++) FORWARD_IF_ERROR(kv_cache_reserve(c, l, n));
    for (int l = 0; l < c->geo.n_layers; l++)
        for (int i = 0; i < c->geo.n_kv_heads * 2; i++) {
            kv_store *st = kv_cache_store(c, l, i / 2, i % 2);
            st->n_encoded = st->n_before = kv_encoded_at(c, l, st, kv_plan_slot(c->plan, l, i / 2, i % 2)->codec, n);
        }
    c->n_tokens = n;
    for (int l = 0; l < c->geo.n_layers; l++)
        for (int i = 0; i < c->geo.n_kv_heads * 2; i++) kv_store_drop_unseen(c, l, kv_cache_store(c, l, i / 2, i % 2));
    return KV_OK;
}

int kv_cache_write(kv_cache *c, int layer, int head, int side, int tok0, int tok1, const float *src)
{
    const int sink = c->plan->sink[layer], d = c->geo.head_dim;
    kv_store *st = kv_cache_store(c, layer, head, side);
    RETURN_ERROR_IF(tok0 < 0 || tok1 <= tok0 || tok1 > c->n_tokens, KV_E_ARG, "cache: layer %d: tokens %d..%d are not all within 1..%d", layer + 1, tok0 + 1, tok1, c->n_tokens);
    const int first = kv_max(tok0, kv_store_first_held(c, layer, st));
    if (first >= tok1) return KV_OK;
    src += (size_t)(first - tok0) * (size_t)d;
    tok0 = first;
    const int granule = kv_plan_slot(c->plan, layer, head, side)->codec->granule, coded = sink + st->n_encoded;
    const int e0 = kv_max(tok0, sink), e1 = kv_min(tok1, coded), t0 = kv_max(tok0, coded);
    const size_t n = (size_t)(tok1 - tok0) * (size_t)d;
    RETURN_ERROR_IF(e0 < e1 && ((e0 - sink) % granule || (e1 - sink) % granule), KV_E_ARG, "cache: tokens %d..%d do not begin and end with granules of %d", tok0 + 1, tok1, granule);
    RETURN_ERROR_IF(t0 < tok1 && tok1 - t0 > st->tail_rows, KV_E_ARG, "cache: %d exact tokens are more than the %d that the window holds", tok1 - t0, st->tail_rows);
    float *rows = kv_alloc_array(n + (size_t)c->plan->page_tokens * (size_t)d, sizeof *rows, false);
    if (!rows) return KV_E_NOMEM;
    kv_vec_round(c->plan->exact_dtype[layer], src, rows, (int64_t)n);
    int status = KV_OK;
    if (kv_vec_abs_bits(rows, (int64_t)n) >= 0x7f800000u) status = kv_set_error(KV_E_ARG, "cache: layer %d head %d: a row of tokens %d..%d is not finite", layer + 1, head + 1, tok0 + 1, tok1);
    if (status == KV_OK && tok0 < sink) kv_store_save_exact(c, layer, st, tok0, kv_min(tok1, sink), rows);
    if (status == KV_OK && e0 < e1) kv_store_encode(c, layer, head, side, e0 - sink, e1 - sink, rows + (size_t)(e0 - tok0) * (size_t)d, rows + n);
    if (status == KV_OK && t0 < tok1) kv_store_save_exact(c, layer, st, kv_max(t0, sink), tok1, rows + (size_t)(kv_max(t0, sink) - tok0) * (size_t)d);
    kv_free(rows);
    return status;
}
