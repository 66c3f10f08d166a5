/* scalar.h -- what the files of the `scalar` codec share.  scalar.c has the page's byte picture. */
#ifndef KV_SCALAR_H
#define KV_SCALAR_H
#include "../codec.h"

enum {
    SCALAR_LANES    = 16,      /* tokens (keys) or dims (values) of a tile: one AVX-512 register of 32-bit lanes */
    SCALAR_SEGMENT  = 64,      /* values: tokens that share one int32 accumulation */
    SCALAR_QUERIES  = 4,       /* queries that share one unpacking */
    SCALAR_C_MIN    = 8192,    /* the largest fixed-point centroid lies in C_MIN..C_MAX: where the others round best */
    SCALAR_C_MAX    = 12287,
    SCALAR_SUM_MAX  = 174400,  /* bound on sum |weight|: times C_MAX under 2^31, with 0.5 of rounding for each of 512 */
};

/* A bit plane: `rows` 32-bit words of a lane hold `chunk` inner elements. */
typedef struct scalar_plane { int bits, chunk, rows, n_chunks; size_t offset; } scalar_plane;

/* A slot is 4 neighbouring inner elements, one a byte of the lane's words; up to two bit fields hold its code:
 * code |= (word[row] >> shift & (1 << width) - 1) << from. */
typedef struct scalar_field { uint8_t row, shift, width, from; } scalar_field;
extern const scalar_field scalar_fields[4][8][2];      /* [bits - 1][slot][]; width 0: none */

typedef struct scalar_state {
    _Alignas(64) float centroid[256], bound[256];      /* of unit vectors; bound[i] between i and i+1; past the last +inf */
    _Alignas(64) int16_t fixed[256];                   /* centroid / unit; repeated to the end, so bits above a code may be junk */
    _Alignas(64) uint8_t byte_lo[16][16], byte_hi[16][16];   /* of fixed, for byte shuffles */
    float        unit;
    int          bits, levels, rotation, norm, n_planes, n_tiles;
    scalar_plane plane[2];                             /* the low 4 bits (or all); what is above */
    size_t       scales;                               /* offset of f16 scale[page_tokens] */
    float       *sign;                                 /* +-1 per dim (hadamard), or NULL */
    float       *matrix, *inverse;                     /* dense rotation [in][out] and its transpose (orthogonal), or NULL */
} scalar_state;

static inline const scalar_state *scalar_state_of(const kv_codec *c) { return c->state; }
static inline size_t scalar_plane_tile(const scalar_plane *p) { return (size_t)p->n_chunks * (size_t)p->rows * 64; }

/* A prepared query: its unit (score = integer sum * unit * centroid unit * scale), then from byte 64 rows of `padded`
 * elements: f32; int16; int16 with the middle two of every four exchanged, since AVX-512 takes bytes 0 and 2 of a lane's
 * word together, then 1 and 3.  Past head_dim all are 0. */
static inline int      scalar_padded(const kv_codec *c) { return (int)kv_round_up((size_t)c->head_dim, 32); }
static inline float   *scalar_query_f32(void *q) { return (float *)((uint8_t *)q + 64); }
static inline int16_t *scalar_query_quads(void *q, int padded) { return (int16_t *)((uint8_t *)q + 64 + 4 * (size_t)padded); }
static inline int16_t *scalar_query_pairs(void *q, int padded) { return scalar_query_quads(q, padded) + padded; }

/* What each SIMD level brings.  All write the same bytes; dot and accumulate agree to 2e-4 of |q||k| and of the output. */
typedef struct scalar_level {
    void (*scale_row)(const float *x, const float *sign /* or NULL */, float by, float *out, int n);   /* out = x * (sign * by) */
    void (*dense)(const float *m, const float *x, float *out, int n);       /* out[i] = sum_j x[j] m[j][i], j ascending */
    void (*index)(const scalar_state *s, const float *y, uint8_t *code, int n);   /* n rounded up to 16 may be written */
    void (*put_value)(const scalar_state *s, uint8_t *page, int token, const uint8_t *code);
    void (*prepare)(void *q, int padded);                                   /* the f32 row is there: unit and int16 rows */
    void (*dot)(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld);
    void (*accumulate)(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc);
} scalar_level;
extern const scalar_level scalar_c, scalar_avx2, scalar_avx512;
void scalar_prepare_avx2(void *q, int padded);           /* AVX-512 has nothing to add to it */
#endif
