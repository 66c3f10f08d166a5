/* scalar.h -- what the files of the `scalar` codec share.  scalar.c has the page's byte picture.
 *
 * A row, or some of its channels, coded with one codebook is a *part*: a kv_codec of its own (head_dim: its channels) whose
 * state is a scalar_state.  A codec of one part is that part; scalar_parts.c joins several in one page. */
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

enum { SCALAR_HADAMARD, SCALAR_ORTHOGONAL, SCALAR_PLAIN, SCALAR_GAUSS };             /* rotations; the last for sketches alone */
enum { SCALAR_NORM_RAW, SCALAR_NORM_MATCHED, SCALAR_NORM_LSQ, SCALAR_NORM_UNBIASED };
enum { SCALAR_LLOYD_GAUSS, SCALAR_LLOYD_BETA, SCALAR_UNIFORM, SCALAR_CALIBRATED };   /* codebooks */
enum { SCALAR_STREAM_SIGN = 0x53490000, SCALAR_STREAM_MATRIX = 0x4D410000 };        /* of the seed, plus what tells rotations apart */
enum { SCALAR_MAX_TRIES = 33 };

typedef struct scalar_state {
    _Alignas(64) float centroid[256], bound[256];      /* of unit vectors; bound[i] between i and i+1; past the last +inf */
    _Alignas(64) int16_t fixed[256];                   /* centroid / unit; repeated to the end, so bits above a code may be junk */
    /* For byte shuffles, of 16 centroids each.  Up to 4 bits: all of them, low and high bytes.  Beyond: the positive half,
     * table k xor table k + 1, so that the xor of tables k.. is table k. */
    _Alignas(64) uint8_t byte_lo[8][16], byte_hi[8][16];
    float        unit;
    double       distortion;                           /* of the codebook: E|y - z|^2 for a unit vector */
    int          bits, levels, norm, n_planes, n_tiles, n_tries;
    float        tries[SCALAR_MAX_TRIES];              /* factors of a row that the encoder compares */
    scalar_plane plane[2];                             /* the low 4 bits (or all); what is above */
    size_t       scales;                               /* offset of f16 scale[page_tokens] */
    float       *sign;                                 /* +-1 per dim (hadamard), or NULL */
    float       *matrix, *inverse;                     /* dense rotation [in][out] and its transpose (orthogonal), or NULL */
    const float *scale, *unscale;                      /* calibrated factors of a row's channels and their inverses, or NULL */
    struct scalar_parts *parts;                        /* NULL: this is the only part */
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

static inline const scalar_level *scalar_level_now(void)
{
    static const scalar_level *const by_simd[] = { &scalar_c, &scalar_avx2, &scalar_avx512 };
    return by_simd[kv_cpu_simd()];
}

/* ---- rotation (scalar_rotation.c) */
int  scalar_draw(scalar_state *s, int rotation, int d, double seed, int stream);
void scalar_drop(scalar_state *s);
void scalar_rotate(const scalar_state *s, const scalar_level *l, int d, const float *x, float by, float *out);        /* out = R(x * by) */
void scalar_rotate_back(const scalar_state *s, const scalar_level *l, int d, float *z, float by, float *out);   /* out = R^-1(z) * by; z is overwritten */

/* ---- codes in a page (scalar_codes.c) */
size_t scalar_lay_out(scalar_plane *p, int bits, int inner, int n_tiles, size_t offset);      /* returns where the plane ends */
void   scalar_put_key(const kv_codec *c, uint8_t *page, int token, const uint8_t *code);      /* zeros up to the next multiple of 32 */
float  scalar_get_row(const kv_codec *c, const uint8_t *page, int token, float *z);           /* centroids of one token; returns its scale */

/* ---- one part (scalar.c) */
typedef struct scalar_setup { int bits, rotation, codebook, norm, search, stream; double seed; const float *calibrated; } scalar_setup;
/* Sets up c->state for c->head_dim, page_tokens and side, planes from *end on, which moves past them; scales are the caller's. */
int  scalar_part_init(kv_codec *c, const scalar_setup *w, size_t *end);
void scalar_set_centroids(scalar_state *s, const double *g, double shrink);                 /* levels ascending, symmetric, times shrink */
/* What a row became: R(x)/norm, the codes' centroids, and both scales; norm 0 for a zero row. */
typedef struct scalar_row { float norm, scale, y[KV_MAX_HEAD_DIM], z[KV_MAX_HEAD_DIM]; } scalar_row;
void scalar_part_encode(const kv_codec *c, const scalar_level *l, uint8_t *page, int token, const float *x, scalar_row *r);
void scalar_part_query(const kv_codec *c, const scalar_level *l, const float *q, void *prepared);
/* |row|, and 1/|*x|; *x moves to `copy` when its squares need another exponent.  0 for a zero row. */
float scalar_row_norm(const float **x, int n, float *copy, float *by);
void  scalar_put(const kv_codec *c, const scalar_level *l, uint8_t *page, int token, const uint8_t *code);

/* ---- calibrated tables (scalar_calib.c) */
enum { P_BITS, P_ROTATION, P_CODEBOOK, P_NORM, P_SEED, P_SEARCH, P_RESIDUAL, P_GAIN, P_OUTLIERS, P_OUTLIER_BITS, P_PICK, P_SCALE };
typedef struct scalar_tables { const float *codebook, *scale, *unscale; const uint16_t *order; size_t bytes; } scalar_tables;
int scalar_read_tables(const kv_codec *c, scalar_tables *t);          /* NULL for what the parameters do not ask for */
int scalar_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes);

/* ---- several parts (scalar_parts.c) */
enum { SCALAR_NO_RESIDUAL, SCALAR_QJL, SCALAR_QJL_ORTHOGONAL, SCALAR_QJL_HADAMARD, SCALAR_SIGN };
enum { SCALAR_GAIN_NORM, SCALAR_GAIN_LSQ, SCALAR_GAIN_EXPECTED };
/* order: the channels, outliers first; NULL: each page has its own. */
typedef struct scalar_shape { int residual, gain, outliers, outlier_bits; const uint16_t *order; } scalar_shape;
int  scalar_parts_init(kv_codec *c, const scalar_setup *w, const scalar_shape *shape);
void scalar_parts_fini(struct scalar_parts *p);
void scalar_parts_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld);
void scalar_parts_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld);
void scalar_parts_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared);
void scalar_parts_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld);
void scalar_parts_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc);
void scalar_parts_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld);

/* ---- on a device (scalar_device.c) */
struct scalar_device;
int  scalar_on_device(const kv_codec *c, void **pod, size_t *bytes);
int  scalar_part_device(const kv_codec *c, kv_pod *pod, uint32_t *at);
int  scalar_parts_device(const kv_codec *c, kv_pod *pod, struct scalar_device *h);
#endif
