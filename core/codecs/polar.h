/* polar.h -- the stages that codecs with angles share (polar, fused): packed indices of any radix, tables of directions,
 * the split of pairs into angle and radius, and its inverse.
 *
 * Rows here are padded: every array of n elements has room for n rounded up to 8, plus 8. */
#ifndef POLAR_H
#define POLAR_H
#include "../codec.h"
#include "polar_device.h"

enum { POLAR_PAD = 16, POLAR_ROW = KV_MAX_HEAD_DIM + POLAR_PAD, POLAR_BASE_MAX = 4096,
       POLAR_OVERREAD = 32 };   /* unpack reads this far past the last field */

/* `count` indices below `base`, packed.  One field of `width` bits holds `digits` indices as the fraction 0.d1 d2 d3...
 * in that base, rounded up to width bits, so that multiplying by base shifts the next digit out: no division.  Fields
 * follow each other from the lowest bit up.  Field j holds indices j, j + fields, j + 2 fields, ...
 *
 * digits is what makes the row shortest with width <= 25 (a field is read as one unaligned word) and the product below
 * 2^32; for powers of two that is plain fields of log2 base bits. */
typedef struct polar_field {
    int base, count, digits, width, fields, bytes;
    _Alignas(32) uint8_t shuffle[32];         /* of two 16-byte loads: the 4 bytes that hold each of 8 fields */
    _Alignas(32) int32_t shift[8];
} polar_field;

void   polar_field_init(polar_field *f, int base, int count);
double polar_field_bits(int base, int count);                     /* per index, whole bytes a row */
void   polar_pack(const polar_field *f, const int32_t *index, uint8_t *dst);

/* Directions (cos, sin) of the 2 pi k / n, from kv_alloc: once around and on to a power of two, for a page from elsewhere may
 * hold any index that its bits can. */
int    polar_circle(int n, float **table);
/* Lloyd-Max levels, ascending, of a density:
 *   angle  between the norms of two Gaussian vectors of k components each: sin(2 psi)^(k-1) on (0, pi/2)
 *   chi    the norm of one such vector, with mean square 1, where it exceeds `limit`
 *   disk   the positive half of a coordinate of a Gaussian pair whose norm stays below `limit` */
enum { POLAR_ANGLE, POLAR_CHI, POLAR_DISK };
void   polar_lloyd(int density, int k, double limit, int levels, double *centroid);

/* ---- radii of one row, quantized */
enum { POLAR_F32, POLAR_F16, POLAR_LIN, POLAR_LOG, POLAR_LLOYD };
typedef struct polar_norms {
    int mode, bits, count, bytes, side_bytes; /* of a row; side: lo and step (lin, log), scale (lloyd) as f16 */
    polar_field field;
    float shrink;                             /* lloyd: of the scale, for what the angles' bins lose: sin(pi/n)/(pi/n) */
    _Alignas(64) float table[256], bound[256];/* lloyd: levels of radii with mean square 1; boundaries, then +inf */
} polar_norms;
/* k: components under one radius. */
void polar_norms_init(polar_norms *s, int mode, int bits, int count, int k, int angles);
/* r is overwritten; what is stored stands for r * 2^e. */
void polar_norms_put(const polar_norms *s, float *r, int e, uint8_t *row, uint8_t *side);

/* Rows of angles, level by level, and radii, in three arrays of a page. */
enum { POLAR_LEVELS = 9 };
typedef struct polar_form {
    polar_norms  norms;
    polar_field  field[POLAR_LEVELS];
    const float *table[POLAR_LEVELS];         /* directions of a level's indices */
    int          levels, angle_bytes, at[POLAR_LEVELS];   /* at: where a level starts in a row of angles */
    size_t       norm_at, side_at;
} polar_form;

/* One text (polar_level.h) at each SIMD level; all levels give the same bits. */
typedef struct polar_level {
    /* n pairs (y[2i], y[2i+1]) -> radius and index = round(angle base / 2 pi) mod base */
    void (*split)(const float *y, int n, int base, float *r, int32_t *index);
    void (*scale_row)(const float *x, const float *sign /* or NULL */, float by, float *out, int n);   /* out = x * (sign * by) */
    void (*log2)(float *x, int n);            /* in place; x > 0; within 2e-7 of the value plus 1e-7 */
    void (*exp2)(float *x, int n);            /* below -126: 0; at most 2^127 */
    void (*steps)(const float *x, int n, float lo, float per, int top, int32_t *code);   /* clamp(rint((x - lo) * per), 0, top) */
    void (*signs)(const uint8_t *bits, int n, float x, float *out);   /* bit i: x, else -x */
    void (*unpack)(const polar_field *f, const uint8_t *src, int32_t *index);
    void (*levels)(const float *table, const int32_t *index, int n, float by, float *out);            /* by * table[index] */
    /* out[2i] = r[i] * table[2 index[i]], out[2i+1] = r[i] * table[2 index[i] + 1]; size: directions of the table; out may not be r */
    void (*expand)(const float *r, const int32_t *index, const float *table, int size, int n, float *out);
    /* Rows tok0.. of a page, ld floats apart; a row is written past its end, into the next one or the padding. */
    void (*rows)(const polar_form *f, const uint8_t *page, int tok0, int n, float *out, int ld);
} polar_level;
const polar_level *polar_at_level(void);

/* Attention on rows of `dim` floats in the codec's space, which `rows` decodes to: what dot and accumulate end in. */
/* out = R(x * by) and, overwriting z, out = R^-1(z): signs, then Walsh-Hadamard in blocks; nothing where sign is NULL. */
void polar_rotate(const float *sign, int d, const float *x, float by, float *out);
void polar_rotate_back(const float *sign, int d, float *z, float *out);

/* As devices read them (polar_device.h): all but tables of directions. */
struct polar_device_field polar_field_device(const polar_field *f);
void polar_form_device(const polar_form *f, struct polar_device *d);

typedef void (*polar_rows_fn)(const kv_codec *c, const uint8_t *page, int tok0, int n, float *out, int ld);
void polar_dot_rows(const kv_codec *c, polar_rows_fn rows, int dim, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld);
void polar_accumulate_rows(const kv_codec *c, polar_rows_fn rows, int dim, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc);

/* 2^-e of what brings the largest |x| to 0.5..1, or e = 0 when squares are safe as they are. */
int  polar_exponent(const float *x, int n);
static inline uint16_t polar_f16(float x) { return kv_f32_to_f16(x > 65504 ? 65504 : x < -65504 ? -65504 : x); }
#endif
