/* run.h -- a sequence's cache and what feeds it, on the CPU (host_run.c) or on a device (device_run.c): all that a session needs of either. */
#ifndef KV_RUN_H
#define KV_RUN_H
#include "model.h"

typedef struct kv_run kv_run;
typedef struct kv_run_ops {
    int    feed_at_once;                      /* tokens of one feed at most */
    void (*free)(kv_run *r);
    int  (*fork)(kv_run **out, const kv_run *r);
    int  (*feed)(kv_run *r, const int32_t *tokens, int n, float *logits /* [n][n_vocab] when all, [n_vocab] of the last token, or NULL */, int all);
    /* Feeds a token and draws the next; logits: [n_vocab], written always or, *wanted 2, when the drawn token ends a text: *wanted is then 1, else 0.  NULL: feed and kv_sample do it. */
    int  (*next)(kv_run *r, int32_t token, const kv_sampler_params *p, float *logits, int *wanted, int32_t *next);
    int  (*truncate)(kv_run *r, int n_tokens);
    int  (*n_tokens)(const kv_run *r);
    void (*path)(kv_run *r, int path);
    int  (*bytes)(const kv_run *r, int layer, int side, kv_bytes *out);     /* -1: all */
    void (*pairs)(const kv_run *r, kv_pairs *out);
    int  (*read)(const kv_run *r, int layer, int head, int side, int tok0, int tok1, float *dst);
    int  (*mutate)(kv_run *r, double seed, double share, double *n);
    const char *(*paths)(const kv_run *r);
} kv_run_ops;
struct kv_run {
    const kv_run_ops *ops;
    kv_model   *m;
    kv_plan    *plan;
    kv_cache   *cache;                        /* NULL on a device */
    const char *device;
};

int  kv_run_new(kv_run **out, kv_model *m, kv_plan *plan, int max_tokens);   /* where the model is */
int  kv_run_adopt(kv_run **out, kv_model *m, kv_cache *c);                   /* on the CPU; takes c over unless it fails */
static inline void kv_run_free(kv_run *r) { if (r) r->ops->free(r); }
#endif
