/* cache.h -- the paged cache of one sequence, and attention over it.  Not part of the public header.
 *
 * Of every layer and K/V head the first `sink` tokens stay exact; the rest are compressed as they leave the exact window
 * of `recent` tokens, in granules of the slot's codec, into pages of page_tokens tokens:
 *
 *    position   0 .. sink-1 | sink .. sink+n_encoded-1          | .. n_tokens-1
 *               exact         pages 0, 1, 2 ... (u = pos - sink)  exact tail
 *
 * visible_at: query i reads position j >= sink compressed from i = e + recent on, where e is the last position of j's
 * granule (recent = 0: a token reads even itself through the codec).  So after appending token n-1,
 * n_encoded = floor((n - sink - recent) / granule) * granule, at least 0.
 * Every row enters through the plan's exact dtype (f16 by default) and is encoded from that.
 *
 * A chunk of n > 1 tokens gives every query what token-by-token feeding would (visibility semantics, PROTOCOL B.4): all
 * rows are encoded, and attention takes the exact or the reconstructed row of each (query, position) pair.
 *
 * Page-relative RoPE (BEYOND 4.6): page g starts at position p0 = sink + g*page_tokens; its keys are stored as R(-p0) k,
 * and the query is turned by R(-p0) once per page. */
#ifndef KV_CACHE_H
#define KV_CACHE_H
#include "codec.h"

typedef struct kv_rope {                   /* of one layer; half-split pairs (i, i + n_rot/2) */
    int           n_rot;                   /* rotated channels, even; 0: no RoPE */
    const double *freq;                    /* [n_rot/2] radians per position; owned by the model */
} kv_rope;

typedef struct kv_geometry {
    int            n_layers, n_heads, n_kv_heads, head_dim;
    const kv_rope *rope;                   /* [n_layers], outlives the cache */
    const int     *sliding;                /* [n_layers], 0: global; query i reads j > i - sliding only */
} kv_geometry;

/* ---- plan (plan.c) */
typedef struct kv_slot { kv_codec *codec; float *mean; int page_rope; } kv_slot;   /* mean: [head_dim] or NULL */
struct kv_plan {
    atomic_int refs;
    int        n_layers, n_kv_heads, head_dim, page_tokens;
    int       *sink, *recent, *exact_dtype;           /* [n_layers] */
    kv_slot   *slot;                                  /* [n_layers][n_kv_heads][2] */
};
kv_plan *kv_plan_ref(kv_plan *p);
int      kv_plan_reference(kv_plan **out, int n_layers, int n_kv_heads, int head_dim);    /* raw f32 everywhere: sees every pair exactly */
static inline kv_slot *kv_plan_slot(const kv_plan *p, int layer, int head, int side)
{
    return &p->slot[((size_t)layer * p->n_kv_heads + head) * 2 + side];
}

/* ---- cache (cache.c: storage; attend.c: one token on codes; attend_chunk.c: many tokens, visibility) */
typedef struct kv_cache kv_cache;
int  kv_cache_new(kv_cache **out, const kv_geometry *g, kv_plan *plan, int max_tokens);
void kv_cache_free(kv_cache *c);
int  kv_cache_fork(kv_cache **out, const kv_cache *c);
int  kv_cache_truncate(kv_cache *c, int n_tokens);
int  kv_cache_n_tokens(const kv_cache *c);
int  kv_cache_max_tokens(const kv_cache *c);
kv_plan *kv_cache_plan(const kv_cache *c);            /* not a new reference */
/* One layer's attention for n new tokens at positions n_tokens .. n_tokens+n-1: appends their K and V, then attends.
 * q: [n][n_heads][head_dim], after RoPE and not scaled; k, v: [n][n_kv_heads][head_dim], k after RoPE; out like q.
 * softcap 0: none.  Layers are called in order 0 .. n_layers-1; kv_cache_commit(n) ends the step. */
int  kv_cache_attend(kv_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out);
int  kv_cache_commit(kv_cache *c, int n);
void kv_cache_path(kv_cache *c, int path);
int  kv_cache_read(const kv_cache *c, int layer, int head, int side, int tok0, int tok1, float *dst);
/* Rows from outside (cache_import.c): room for n tokens in an empty cache, then the rows of them all. */
int  kv_cache_first_held(const kv_cache *c, int layer);                   /* of the layer's stores, the latest */
int  kv_cache_import(kv_cache *c, int n);
int  kv_cache_write(kv_cache *c, int layer, int head, int side, int tok0, int tok1, const float *src);
int  kv_cache_bytes(const kv_cache *c, int layer /* -1: all */, int side /* -1: both */, kv_bytes *out);
void kv_cache_pairs(const kv_cache *c, kv_pairs *out);
void kv_cache_count_from(kv_cache *c, int first_query);   /* pairs are counted for queries at this position and later */
double kv_cache_mutate(kv_cache *c, double seed, double share);
const char *kv_cache_paths(const kv_cache *c);

/* ---- files (container_cache.c): sections "cache", "codec", "cache.k" and "cache.v"; bytes in docs/formats.md */
typedef struct kv_cache_extras {              /* what a session keeps beside its cache */
    const char    *model, *rope, *about;      /* digests, 64 hex digits each; JSON */
    const int32_t *tokens;                    /* [n_tokens] */
    const float   *logits;                    /* [n_logits] */
    int            n_logits;
} kv_cache_extras;
struct kv_pack_writer;
int  kv_cache_save(const kv_cache *c, struct kv_pack_writer *w, const kv_cache_extras *x, int stage, int level);
/* x: digests of the model that it is for.  *n_logits: how many lie in page 5 of section "cache".  A damaged page is
 * KV_E_CORRUPT; with salvage the cache ends before it. */
int  kv_cache_load(kv_cache **out, const kv_geometry *g, const kv_pack *p, const kv_cache_extras *x, int max_tokens, int salvage, int *n_logits);

/* rope.c: rotate n_rows rows of head_dim floats, ld apart, by position pos (row r at pos + r * step; step 0: all alike). */
void kv_rope_rows(const kv_rope *r, float *x, int64_t ld, int n_rows, int64_t pos, int64_t step);
#endif
