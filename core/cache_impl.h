/* cache_impl.h -- the inside of a cache, for cache*.c and attend*.c only.
 *
 * A store is one layer's, one head's keys or values:
 *
 *   sink  [min(sink, max_tokens)] rows in the exact dtype; position p at row p
 *   page  [n_pages] encoded pages; position sink + u in page u / page_tokens.  Pages before first_page are freed:
 *         no later query can see them (sliding layers)
 *   tail  ring of tail_rows rows in the exact dtype; position p at row (p - sink) % tail_rows
 *
 * A step (attend of every layer, then commit) can be taken back as if it had not happened, until it is committed: encoding
 * fills slots past n_encoded, a one-token step overwrites only a row that no longer counted, and a chunk keeps a copy of
 * the tail in `saved`. */
#ifndef KV_CACHE_IMPL_H
#define KV_CACHE_IMPL_H
#include "cache.h"
#include "vecmath.h"

typedef struct kv_store {
    uint8_t **page, *sink, *tail, *saved;
    int       cap_pages, n_pages, first_page;
    int       n_encoded;              /* tokens in pages, counted from position sink */
    int       n_before;               /* n_encoded at the last commit */
    int       sink_rows, tail_rows;
    int       never;                  /* the sliding window ends before a position would be read compressed: all stay exact */
} kv_store;

typedef struct kv_turn {              /* cos and sin of a page's first position: [n_pages][n_rot] */
    const double *freq;
    int           n_rot, sink, n_pages;
    float        *cs;
} kv_turn;

typedef struct kv_work kv_work;       /* attend.c: one token */
typedef struct kv_chunk kv_chunk;     /* attend_chunk.c: working memory from a chunk's first layer to its commit */

struct kv_cache {
    kv_geometry geo;
    kv_plan    *plan;
    int         max_tokens, n_tokens, group;    /* group: query heads per K/V head */
    kv_store   *store;                /* [n_layers][n_kv_heads][2] */
    int        *pending;              /* [n_layers] tokens appended since the last commit */
    kv_turn   **turn;                 /* [n_layers] where some key slot is page-relative, else NULL; shared between layers */
    int         path, count_from, did;          /* did: 1 a token step, 2 a chunk; what paths tells */
    double      pairs_compressed, pairs_total, step_compressed, step_total;
    kv_work    *work;
    kv_chunk   *chunk;
    char        paths[96];
};

static inline kv_store *kv_cache_store(const kv_cache *c, int layer, int head, int side)
{
    return &c->store[((size_t)layer * (size_t)c->geo.n_kv_heads + (size_t)head) * 2 + (size_t)side];
}
/* Positions compressed once n_tokens are there; what a truncation left compressed stays so (n_before). */
static inline int kv_encoded_at(const kv_cache *c, int layer, const kv_store *st, const kv_codec *codec, int64_t n_tokens)
{
    if (st->never) return 0;
    const int64_t ripe = n_tokens - c->plan->sink[layer] - c->plan->recent[layer];
    return (int)kv_max64(st->n_before, ripe > 0 ? ripe - ripe % codec->granule : 0);
}
/* First position that query i of a layer reads. */
static inline int kv_first_seen(const kv_cache *c, int layer, int i)
{
    const int w = c->geo.sliding ? c->geo.sliding[layer] : 0;
    return w > 0 && i - w + 1 > 0 ? i - w + 1 : 0;
}
static inline size_t kv_row_bytes(const kv_cache *c, int layer) { return (size_t)c->geo.head_dim * (size_t)kv_dtype_size(c->plan->exact_dtype[layer]); }

/* ---- cache.c */
/* Every value finite, in the exact dtype too; otherwise the error names the first that is not. */
int  kv_cache_check_rows(const kv_cache *c, int layer, int n, const float *k, const float *v);
/* Allocates the pages that n_encoded tokens of every store of a layer need. */
int  kv_cache_reserve(kv_cache *c, int layer, int n_tokens);
/* Exact rows of positions [p0, p1), which sinks and tail hold, as f32 with head_dim floats a row. */
void kv_store_load_exact(const kv_cache *c, int layer, const kv_store *st, int p0, int p1, float *dst);
/* Puts rows (already rounded to the exact dtype) of positions [p0, p1) where sinks and tail keep them. */
void kv_store_save_exact(const kv_cache *c, int layer, kv_store *st, int p0, int p1, const float *rows);
/* Rows of tokens u in [u0, u1), granule multiples, through the slot's stages into its pages.  scratch: page_tokens * head_dim. */
void kv_store_encode(const kv_cache *c, int layer, int head, int side, int u0, int u1, const float *rows, float *scratch);
/* And back: mean added, keys turned to their absolute positions. */
void kv_store_decode(const kv_cache *c, int layer, int head, int side, int u0, int u1, float *dst);
/* x rows (ld apart) turned by -p0 (or by +p0 when back) of a page. */
void kv_turn_rows(const kv_turn *t, int page, int back, float *x, int64_t ld, int n_rows);
/* Frees what query n_tokens and all later ones do not see. */
void kv_store_drop_unseen(const kv_cache *c, int layer, kv_store *st);
int  kv_store_first_held(const kv_cache *c, int layer, const kv_store *st);   /* the first position that is still held */
void kv_cache_roll_back(kv_cache *c, int layer);
void kv_cache_count_pairs(kv_cache *c, int layer, int n);

/* ---- attend.c, attend_chunk.c */
int    kv_attend_token(kv_cache *c, int layer, const float *q, const float *k, const float *v, float scale, float softcap, float *out);
int    kv_attend_chunk(kv_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out);
void   kv_cache_describe(kv_cache *c, int did);
void   kv_work_free(kv_work *w);
void   kv_chunk_free(kv_chunk *w);
#endif
