/* kvtc_impl.h -- the inside of KVTC over layers and heads, for kvtc.c, kvtc_basis.c, kvtc_file.c and offload*.c only.
 *
 *   basis     mean and principal components of each side's groups of slots, made once from a calibration; shared by reference
 *   tables    what a budget makes of a basis: which components get how many bits, calibrated steps, rANS tables
 *   offload   a session's tokens coded with tables, in blocks (offload.c) */
#ifndef KV_KVTC_IMPL_H
#define KV_KVTC_IMPL_H
#include "calib.h"
#include "entropy.h"
#include "kvtc.h"

enum { KVTC_MAX_RANK = 10000 /* the paper's cap */, KVTC_HELD_OUT = 4 /* one row in so many decides the bits */, KVTC_ITERATIONS = 8 /* of the randomized SVD, B.1 */ };

typedef struct kvtc_space {
    int   *layer, n_layers, h0, h1;        /* [n_layers] ascending, all global or all sliding; heads [h0, h1) */
    int    p, rank, held;                  /* p: channels of a row, slot by slot: layers in turn, of each its heads */
    float *mean, *v, *z;                   /* [p], [rank][p] (every number an f16), [held][rank]: rows that the basis has not seen; NULL from a file */
    float *unit;                           /* [p] or NULL: centred channels are divided by it: the same number in all channels of a slot */
} kvtc_space;

typedef struct kvtc_basis {
    atomic_int  refs;
    kv_model   *m;
    int         layers, heads, rope, n_groups;     /* as asked; groups of a side */
    kvtc_space *space[2];                          /* [n_groups], keys and values */
} kvtc_basis;
int  kvtc_basis_alloc(kvtc_basis **out, kv_model *m, int layers, int heads, int rope);
int  kvtc_basis_new(kvtc_basis **out, const kv_calib *c, const kv_kvtc_options *o);
void kvtc_basis_free(kvtc_basis *b);

/* Principal components of x [n][p], centred rows: up to `rank` rows of v, largest first.  Returns how many, or an error.
 * randomized: Halko, Martinsson and Tropp (arXiv 0909.4061), with 8 power iterations; else from the smaller Gram matrix. */
int  kvtc_components(const float *x, int n, int p, int rank, int randomized, double seed, float *v);
/* C[m][n] = A[m][k] B (+ C when add), B [n][k] when nt, else [k][n]; no gaps between rows of A and C; all threads. */
void kvtc_gemm(int nt, int m, int n, int k, const float *a, const float *b, int ldb, int add, float *c);

typedef struct kvtc_group {
    const kvtc_space *space;
    float    *step;                        /* [plan.rank], when plan.fixed */
    kvtc_plan plan;
    kv_rans  *bank;
    uint8_t  *cls;                         /* [symbols of a row] */
} kvtc_group;

struct kv_kvtc {
    atomic_int  refs;
    kvtc_basis *basis;
    kvtc_group *group[2];                  /* [basis->n_groups] */
    size_t      bank_bytes;
};
int  kvtc_group_classes(kvtc_group *g);    /* makes cls from the plan; the number of tables that a bank needs, or an error */

/* Rows x [n][p] of a group, centred here (they are overwritten), as a payload, and back.  The payload's stage is what it was
 * stored as.  level: of zlib and lzma. */
typedef struct kvtc_payload { uint8_t *data; size_t n; int stage; } kvtc_payload;
int  kvtc_encode_rows(const kvtc_group *g, float *x, int n, int stage, int level, kvtc_payload *out);
int  kvtc_decode_rows(const kvtc_group *g, const kvtc_payload *in, int n, float *x);
#endif
