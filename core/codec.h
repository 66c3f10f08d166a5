/* codec.h -- what a codec file implements.  Not part of the public header.
 *
 * A codec turns rows of head_dim floats (one head's keys or values) into fixed-size pages of page_tokens tokens.
 * One instance serves any number of heads; it is immutable after init, so threads share it freely.
 *
 *   core/codecs/foo.c      opens with what it does, the paper and the byte picture of a page; ends with
 *                          const kv_codec_ops kv_codec_foo = { .name = "foo", ... };
 *   core/codecs/registry.def   KV_CODEC(foo)
 *
 * Nothing else needs an edit: parameters, help, conformance and completion come from the descriptor.
 *
 * The mean (centre stage) and page-relative RoPE are not a codec's business: the cache removes and restores them. */
#ifndef KV_CODEC_H
#define KV_CODEC_H
#include "internal.h"

enum { KV_CODEC_MAX_PARAMS = 16, KV_MAX_HEAD_DIM = 512, KV_MAX_PAGE = 1024, KV_MAX_GROUP = 64 /* query heads per K/V head in one call */ };

typedef struct kv_moments kv_moments;   /* calib.h */

typedef struct kv_codec_ops {
    const char     *name, *about, *source;
    const kv_param *params;        /* n_params entries */
    int             n_params, format, caps;
    size_t          state_size;    /* zeroed and freed by codec.c */

    /* Calibrated tables, for a codec of KV_CAP_CALIBRATED (always needs them) or KV_CAP_CALIBRATABLE (some parameters do).
     * c has its parameters and geometry and no state yet.  Writes the tables of one (layer, head, side) as bytes from kv_alloc:
     * little-endian, float32 and integers, laid out as docs/formats.md says; NULL and 0 when these parameters need none.
     * init finds a 64-byte aligned copy in c->blob, and checks it like any bytes from outside: length, ranges, finite. */
    int  (*calibrate)(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes);                /* optional */

    /* Reads c->value[], c->head_dim, c->page_tokens, c->side; fills c->granule, c->page (the ledger of one page, whose
     * total codec.c copies to page_bytes after rounding up to 64 with the rest counted as padding), c->bits_nominal,
     * c->space_dim and c->query_bytes.  A bad combination is KV_E_PARAM with value and what is allowed. */
    int  (*init)(kv_codec *c);
    void (*fini)(kv_codec *c);                                                     /* optional */

    /* Encode n tokens into slots [tok0, tok0+n) of a page; both multiples of the granule.  x: rows of head_dim floats,
     * ld floats apart, finite (the caller checked).  Other slots keep their bytes: a page may be filled a token at a time.
     * A fresh page is zeroed. */
    void (*encode)(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld);
    /* Decode any tokens [tok0, tok0+n).  Any bytes decode to something: no crash, no out-of-range access. */
    void (*decode)(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld);

    /* Attention on codes; all four or none.
     * query:      n_q query rows of head_dim floats (ld apart) -> prepared, query_bytes each, 64-byte aligned
     * dot:        scores[q*ld + t] = <query q, token t>, t in [0, n_tokens)      (keys)
     * accumulate: acc[q*space_dim + i] += sum_t p[q*ld + t] * code-space value   (values; p >= 0)
     * output:     out rows (ld apart) = un-transformed acc, overwritten */
    void (*query)(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared);
    void (*dot)(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld);
    void (*accumulate)(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc);
    void (*output)(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld);

    /* What a device needs to encode and decode: struct <family>_device of codecs/<family>_device.h, flat, tables inside it or at offsets
     * from its start; bytes from kv_alloc.  Parameters that no device does: KV_E_UNSUPPORTED with value and what is possible. */
    int  (*device)(const kv_codec *c, void **pod, size_t *bytes);                  /* optional */

    /* Sets the value[] that come nearest to `target` stored bits per element; NULL: bits parameter is searched. */
    int  (*fit_bits)(kv_codec *c, double target);
} kv_codec_ops;

struct kv_codec {
    const kv_codec_ops *ops;
    atomic_int          refs;
    int                 head_dim, page_tokens, side;
    double              value[KV_CODEC_MAX_PARAMS];   /* by index into ops->params */
    char                text[384];                    /* canonical parameters */
    int                 caps;                         /* ops->caps; init takes away what these parameters cannot do */
    const void         *blob;                         /* calibrated tables: an own copy, 64-byte aligned, or NULL */
    size_t              blob_bytes;                   /* as given; counted once per codec as a shared artifact */
    int                 granule, space_dim;
    size_t              page_bytes, query_bytes;
    kv_bytes            page;
    double              bits_nominal;
    void               *state;
};

kv_codec *kv_codec_ref(kv_codec *c);
/* For an init that finds out from its parameters that it needs tables: KV_E_UNCALIBRATED with the text that says how. */
int kv_codec_needs_blob(const kv_codec *c);
static inline int kv_codec_fused(const kv_codec *c) { return c->ops->dot != NULL && c->ops->accumulate != NULL; }

/* A codec as kernels see it (device_codec.c); the texts are c's, the pod is freed by kv_codec_device_free. */
struct kv_backend_codec;
int  kv_codec_device(const kv_codec *c, struct kv_backend_codec *out);
void kv_codec_device_free(struct kv_backend_codec *d);
/* Bytes that grow, for a `device` operation: add() puts a copy at a multiple of 16 and says where.  done() hands them over, or frees them on a failure. */
typedef struct kv_pod { uint8_t *data; size_t bytes, room; } kv_pod;
int  kv_pod_add(kv_pod *p, const void *src, size_t bytes, uint32_t *at);
int  kv_pod_done(kv_pod *p, int status, void **out, size_t *bytes);

/* The generic forms, by decoding a tile: what the fused ones are checked against (codec.c).
 * scratch: page_tokens * head_dim floats. */
void kv_tile_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const float *q, int64_t q_ld, int n_q, float *scores, int64_t ld, float *scratch);
void kv_tile_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc /* [n_q][head_dim] */, float *scratch);

/* dot and accumulate of a codec whose space is that of its rows, by decoding up to 32 KB at a time: for so many queries that unpacking
 * the codes anew for every few of them costs more than decoding them once. */
void kv_decoded_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const float *q, int64_t q_ld, int n_q, float *scores, int64_t ld);
void kv_decoded_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc);

/* Attention on rows of dtype KV_F32, KV_F16 or KV_BF16, ld elements apart (rows.c): scores[q*s_ld + t] = <q, row t>;  acc[q*a_ld + i] += sum_t p[q*p_ld + t] row_t[i].
 * SIMD by level, queries share the loads; the order of additions differs between levels, so results agree to rounding. */
void kv_rows_dot(int dtype, const void *x, int64_t ld, int n_rows, int dim, const float *q, int64_t q_ld, int n_q, float *scores, int64_t s_ld);
void kv_rows_accumulate(int dtype, const void *x, int64_t ld, int n_rows, int dim, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld);

/* Shared stages (hadamard.c, lloyd.c). */
int   kv_uniform_best(int bits, double *centroids, double *distortion /* or NULL */);   /* equal steps of least squared error for N(0,1) */
int   kv_lloyd_sample(int bits, float *x, size_t n, double *centroids);   /* Lloyd's iteration on |x|, which is sorted: levels ascending and symmetric */
void kv_fwht(float *x, int n);                        /* one row, orthonormal, SIMD by level; same bits at every level */
void kv_fwht_blocks(float *x, int n);                 /* any n: transforms of powers of two, largest first (96 = 64 + 32) */
void kv_signs(double seed, int stream, int n, float *sign);   /* n random signs, +1 or -1 */
float kv_dot16(const float *a, const float *b, int n);  /* 16 partial sums by index mod 16, then a fixed tree; same bits at every level */
float kv_sumsq(const float *x, int n);                /* kv_dot16(x, x, n) */

#define KV_CODEC(name) extern const kv_codec_ops kv_codec_##name;
#include "codecs/registry.def"
#undef KV_CODEC
#endif
