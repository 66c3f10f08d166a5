/* calib.h -- what calibration knows of one slot (layer, K/V head, side), as a codec file gets it to make its tables.
 *
 * A codec with ops->calibrate turns a kv_moments into a blob of bytes (kv_alloc), which its init reads back and checks:
 *
 *    static int foo_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes);
 *    .caps = ... | KV_CAP_CALIBRATED      every setting needs a blob
 *    .caps = ... | KV_CAP_CALIBRATABLE    some do: write NULL and 0 for those that do not; init calls kv_codec_needs_blob()
 *
 * Figures are in the slot's own frame, that is of the rows as encode will see them and of the queries as dot will: after RoPE,
 * or, with page-relative keys, turned by the offset in a page (averaged exactly over the offsets 0 .. page_tokens-1), and
 * less the mean that the plan removes.  The pre figures are of keys and queries before RoPE with nothing removed; on values,
 * and where RoPE is not known, they are the rows' own before the removal.  Positions that calibration skipped (sinks) are in
 * none of them.  Everything is symmetric, finite and deterministic: the same text gives the same bytes.  A second moment from a
 * forged artifact need not be positive semidefinite: clamp eigenvalues. */
#ifndef KV_CALIB_H
#define KV_CALIB_H
#include "model.h"

struct kv_moments {
    const kv_calib *of;                    /* the whole calibration, for tables over several slots; NULL when made of rows alone */
    int             layer, head, side, head_dim;
    int             page_tokens;           /* > 0: keys are page-relative over pages of so many tokens; else 0 */
    const kv_rope  *rope;                  /* of the layer; NULL on values and for rows alone */
    double          n, n_query;            /* rows and queries behind the figures; n_query 0: none were given, or they were left out */
    const double   *mean, *second;         /* [D], [D][D]: E x, E x x^T (with the mean's share: covariance is second - mean mean^T) */
    const double   *query;                 /* [D][D]: E q q^T over the query heads of the group; I where none were given; NULL on values */
    const double   *mean_pre, *second_pre, *query_pre;
    int             n_sample;              /* rows kept: the same tokens in every layer, head and side; 0: they were left out, refuse if you need them */
    const float    *sample, *sample_pre;   /* [n_sample][D] */
    const int32_t  *position;              /* [n_sample] of their tokens in their chunks */
};

/* page_tokens 0: keys as cached.  removed: [D] or NULL.  Of a calibration that saw text; freed by kv_moments_free. */
int  kv_moments_new(kv_moments **out, const kv_calib *c, int layer, int head, int side, int page_tokens, const float *removed);
/* Of rows alone: x [n][D] and q [n_q][D] (or NULL, 0) are in the slot's frame already.  Up to 1024 rows, evenly spaced, are the sample. */
int  kv_moments_of_rows(kv_moments **out, int head_dim, int side, const float *x, int64_t n, const float *q, int64_t n_q);
void kv_moments_free(kv_moments *m);
/* For codecs that are made from rows: an error where the calibration left them out. */
int  kv_moments_need_rows(const kv_moments *m, const char *family);
/* Channel d of the sample in ascending order, n_sample floats. */
void kv_moments_sorted(const kv_moments *m, int d, float *out);

/* ---- what a calibration holds (calib.c collects, artifact.c saves and loads): sums over rows less a shift near their mean, so
 * that nothing cancels where keys have a large bias.  slot = layer * n_kv_heads + head. */
enum { KV_CALIB_KINDS = 5, KV_CALIB_SAMPLE = 1024 };
typedef struct kv_calib_work kv_calib_work;
struct kv_calib {
    kv_model      *m;
    double         count;                      /* positions seen; queries: times the group */
    int            n_slots, broken, without;   /* broken: a chunk failed halfway; without: KV_CALIB_NO_... */
    float         *shift[KV_CALIB_KINDS];      /* [slot][D]: mean of the first chunk's rows */
    double        *sum[KV_CALIB_KINDS];        /* [slot][D]: of x - shift */
    double        *product[KV_CALIB_KINDS];    /* [slot][D(D+1)/2]: of (x - shift)_i (x - shift)_k, k <= i */
    int            n_sample, max_sample;
    int32_t       *position;                   /* [max_sample] */
    uint16_t      *sample[2];                  /* of K_PRE and V: [slot][max_sample][D], f16 of x - shift */
    kv_calib_work *work;                       /* while collecting */
    /* Where it comes from, as 64 hex digits: the model's fingerprint, its RoPE, the tokens (a digest over chunks in turn). */
    char           model_sha[65], rope_sha[65], tokens_sha[65];
    int            n_chunks, context, skip;    /* context, skip: of the last chunk */
    uint64_t      *block;                      /* [n_block] hashes of the text's runs of KV_CALIB_BLOCK tokens */
    int            n_block, cap_block;
    char          *notes;                      /* JSON: the text's name, held-out checks; or NULL */
};
enum { KV_CALIB_BLOCK = 32, KV_CALIB_NOTES = 1 << 16 /* bytes at most */ };
static inline size_t kv_calib_triangle(const kv_calib *c) { return (size_t)c->m->info.head_dim * ((size_t)c->m->info.head_dim + 1) / 2; }
int  kv_calib_alloc(kv_calib **out, kv_model *m, int max_sample);
/* E x [D] and E x x^T [D][D] (NULL: left out) of a kind; queries: over the group's heads.  *n rows. */
int  kv_calib_raw(const kv_calib *c, int kind, int layer, int head, double *n, double *mean, double *second);
void kv_calib_fingerprint(const kv_model *m, char *model_sha65, char *rope_sha65);
int  kv_calib_remember(kv_calib *c, const int32_t *tokens, int n, int skip);      /* a chunk's tokens: digest and blocks */
/* The artifact file as bytes (artifact.c): write allocates, parse trusts nothing. */
int  kv_calib_write(const kv_calib *c, uint8_t **image, size_t *n_bytes);
int  kv_calib_parse(kv_calib **out, kv_model *m, const uint8_t *data, size_t n, const char *what);
#endif
