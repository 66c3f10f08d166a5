/* eval_impl.h -- between eval.c, which keeps the books of an evaluation, and what runs its chunks: eval_host.c or eval_device.c. */
#ifndef KV_EVAL_IMPL_H
#define KV_EVAL_IMPL_H
#include "eval.h"

enum { KV_EVAL_ONE_FEED = 4096, KV_EVAL_PIECE = 2048 };      /* longer chunks go in pieces */

typedef struct { float *data; size_t n, cap; } kv_column;
typedef struct { int chunk; char hash[65]; float *hidden; /* the reference's, [n_scored][n_embd], or NULL */ } kv_stored;
typedef struct { kv_plan *plan; kv_column col[5]; kv_bytes bytes, bytes_now; kv_pairs pairs, pairs_now; } kv_arm_state;   /* _now: of the chunk in work */

typedef struct kv_eval_ops {
    int  (*arms)(kv_eval *e);                 /* a new group of arms */
    int  (*begin)(kv_eval *e);                /* a new chunk: caches, the first piece */
    int  (*slice)(kv_eval *e, int *done);     /* some work; done: e->score is complete, and every arm's bytes_now and pairs_now */
    void (*drop)(kv_eval *e);                 /* what a chunk, finished or not, holds */
    void (*drop_arms)(kv_eval *e);
    void (*free)(kv_eval *e);
} kv_eval_ops;

struct kv_eval {
    const kv_eval_ops *ops;
    void         *work;                       /* of ops */
    kv_model     *model;
    kv_plan      *ref_plan;
    int           mode, n_arms, n_chunks;     /* n_chunks: done in this group */
    kv_arm_state *arm;
    kv_column     position, chunk_of;
    kv_stored    *store;
    int           n_store, cap_store;

    int           working, chunk, n, score_from, fed, piece;
    char          hash[65];
    const kv_stored *known;                   /* the chunk has been scored before, in another group */
    int32_t      *tokens;
    float        *ref_hidden;                 /* made by this chunk: kept for later groups, or NULL */
    kv_score     *score;                      /* [n_arms][n_scored] */
};

int  kv_eval_host_new(kv_eval *e);
int  kv_eval_device_new(kv_eval *e);
/* What one feed gets: the next piece of the chunk, or in stream mode the next token. */
int  kv_eval_next_piece(const kv_eval *e);
static inline int kv_eval_most(const kv_eval *e) { return e->mode == KV_EVAL_STREAM ? 1 : e->n > KV_EVAL_ONE_FEED ? KV_EVAL_PIECE : e->n; }
#endif
