/* fp_rows.h -- rows of small codes and attention on them: what the `fp` and `nuq` codecs share.
 *
 * A row is one token: code i takes `bits` bits from bit i*bits of the row on, lowest bit first, so 4-bit codes lie as
 * PyTorch's float4_e2m1fn_x2 and ggml's consecutive nibbles do.  Codes of up to 4 bits are indices into a table; bytes
 * are OCP FP8 numbers.  A group of columns may share a scale; a row may have a factor. */
#ifndef KV_FP_ROWS_H
#define KV_FP_ROWS_H
#include "../codec.h"

/* Kinds of code.  2, 3 and 4 are the bits of an index; e8m0 is for scales only. */
enum { FP_E4M3 = 5, FP_E5M2 = 6, FP_E8M0 = 7 };
enum { FP_TILE = 64, FP_MAX_GROUPS = KV_MAX_HEAD_DIM / 16 };   /* rows that callers hand over at a time; groups of a row */

typedef struct fp_rows {
    _Alignas(64) float table[16];              /* value of an index, repeated to the end */
    int    kind, cols, group, n_groups;        /* group: columns that share a scale, a multiple of 16, or all */
    size_t row_bytes;
} fp_rows;

static inline int    fp_bits(int kind) { return kind <= 4 ? kind : 8; }
static inline size_t fp_row_bytes(int kind, int cols) { return ((size_t)cols * (size_t)fp_bits(kind) + 7) / 8; }

/* OCP FP8 (revision 1.0) and OCP MX (version 1.0): S.1111.111 of e4m3 and 255 of e8m0 are NaN; e5m2 is the upper half of an f16. */
static inline float fp_e5m2_to_f32(uint8_t b) { return kv_f16_to_f32((uint16_t)(b << 8)); }
static inline float fp_e8m0_to_f32(uint8_t b) { return kv_bits_f32(b == 255 ? 0x7fc00000u : b ? (uint32_t)b << 23 : 0x00400000u); }
/* The exponent of an f16 has the same place in a number with 8 times less bias: a factor of 2^8. */
static inline float fp_e4m3_to_f32(uint8_t b)
{
    return (b & 0x7f) == 0x7f ? kv_bits_f32((uint32_t)b << 24 | 0x7fc00000u) : kv_f16_to_f32((uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256.0f;
}

/* n bytes of kind FP_E4M3, FP_E5M2 or FP_E8M0 as floats. */
void fp_values(int kind, const uint8_t *src, int n, float *dst);

/* Of code i of a row, without scale. */
float fp_row_value(const fp_rows *r, const uint8_t *row, int i);

/* x[t*ld + i] = value of code i of row t times scale[t*n_groups + i/group]; one rounding. */
void fp_rows_decode(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, float *x, int64_t ld);

/* y[g*y_ld + t] = factor[t] sum_i q[g*q_ld + i] v;  acc[g*acc_ld + i] += sum_t p[g*p_ld + t] factor[t] v, with v the value of
 * code i of row t times its scale, or without scale when that is NULL.  Queries share the unpacking in fours; the order
 * of additions differs between levels. */
void fp_rows_dot(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor, const float *q, int64_t q_ld, int n_q, float *y, int64_t y_ld);
void fp_rows_accumulate(const fp_rows *r, const uint8_t *rows, int n_rows, const float *scale, const float *factor, const float *p, int64_t p_ld, int n_q, float *acc, int64_t acc_ld);
#endif
