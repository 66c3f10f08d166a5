/* kvtc.h -- transform coding of K/V rows: which bits go to which principal component, and rows of such codes.
 *
 * KV Cache Transform Coding (KVTC, arXiv 2511.01815, section 3.2 and appendix B.17).  A row in the principal basis is cut into
 * contiguous blocks; each block has a type: nothing, integers of 1 to 8 bits, or FP8.  Shared by the page codec `pca` and by
 * the offload of sessions (kvtc.c).
 *
 *   kvtc_menu m = kvtc_paper();                        what may be chosen
 *   kvtc_edges_new(&e, &m, sample, n, n_dims, ld);     what each choice would cost and gain, measured on sample rows
 *   kvtc_allocate(&plan, e, budget_bits, exact);       the best of all ways through it */
#ifndef KV_KVTC_H
#define KV_KVTC_H
#include "internal.h"

enum { KVTC_NONE = 0, KVTC_E4M3 = 9, KVTC_TYPES = 10 };   /* 1..8: integers of as many bits */
enum { KVTC_HEADER_BITS = 32, KVTC_MAX_SIZES = 8, KVTC_MAX_DIMS = 1 << 17 };

typedef struct kvtc_menu {
    int n_sizes, size[KVTC_MAX_SIZES];
    int n_types, type[KVTC_TYPES];         /* without KVTC_NONE, which is always there */
    int fixed;                             /* 1: a component's step is calibrated, blocks have no header;
                                              0: a block carries shift and scale, f16 each, with every token */
} kvtc_menu;
kvtc_menu kvtc_paper(void);                /* sizes 1, 16, 64, 256, 1024; int2, int4, int8; headers */

typedef struct kvtc_block { int start, size, type; } kvtc_block;
typedef struct kvtc_plan {
    int         n_blocks, rank, fixed;     /* blocks follow each other from 0; the last is not KVTC_NONE and ends at rank */
    kvtc_block *block;                     /* of the plan's own; kvtc_plan_clear */
    int         header_bits, code_bits, n_headers, n_codes;
    size_t      row_bytes;                 /* of a packed row, rounded up to a byte */
    double      gain;                      /* energy kept less error, per token, as measured when it was made */
} kvtc_plan;
void kvtc_plan_clear(kvtc_plan *p);
int  kvtc_plan_count(kvtc_plan *p, int max_rank);      /* checks the blocks (KV_E_CORRUPT) and fills what follows from them */
int  kvtc_plan_copy(kvtc_plan *out, const kvtc_plan *p);

typedef struct kvtc_edge { int from, to, type, cost; double gain; } kvtc_edge;   /* from, to: nodes; cost: bits a token */
typedef struct kvtc_edges {
    int        n, n_nodes, fixed;
    int       *node;                       /* [n_nodes] component that a node stands before; ascending, node[0] = 0 */
    kvtc_edge *edge;                       /* by `to` ascending; every node but the first has one of type KVTC_NONE from the node before */
    double     energy;                     /* mean |z|^2 of a row */
} kvtc_edges;
/* z: n rows of n_dims coefficients, ld apart, components by falling variance.  Blocks begin at any component up to 64, then at
 * multiples of 16, which leaves the choice as it is and the time behind. */
int  kvtc_edges_new(kvtc_edges **out, const kvtc_menu *m, const float *z, int n, int n_dims, int64_t ld);
void kvtc_edges_free(kvtc_edges *e);
/* The blocks of greatest gain within `budget` bits a token.  exact: dynamic program over every number of bits; else Lagrange
 * multiplier by bisection, exact on the convex hull of (bits, gain) and never over the budget. */
int  kvtc_allocate(kvtc_plan *out, const kvtc_edges *e, int budget, int exact);
/* Step of a component for integers of `bits` bits, as the coder with fixed steps takes it: least squared error over sample rows. */
float kvtc_fit_step(const float *z, int n, int64_t ld, int bits, double *error);

/* ---- rows.  Symbols: f16 shift and f16 scale of each block with a header (low byte first), then a byte a code, by component.
 * Packed: the headers, then the codes' bits without gaps, lowest bit first.  step: [rank], read when plan.fixed. */
static inline int kvtc_n_symbols(const kvtc_plan *p) { return 4 * p->n_headers + p->n_codes; }
void kvtc_quantize(const kvtc_plan *p, const float *step, const float *z, uint8_t *symbol);
void kvtc_dequantize(const kvtc_plan *p, const float *step, const uint8_t *symbol, float *z /* [rank] */);
void kvtc_pack(const kvtc_plan *p, const uint8_t *symbol, uint8_t *row);
void kvtc_unpack(const kvtc_plan *p, const uint8_t *row, uint8_t *symbol);
#endif
