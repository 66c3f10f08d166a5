/* vecmath.h -- the float loops around attention and softmax, over arrays of any length and alignment.
 *
 * One source (vecmath_level.h) compiled at each SIMD level; sums run in as many lanes as the level has, so levels agree
 * to rounding, and one level always gives the same bits for the same input.  Not part of the public header. */
#ifndef KV_VECMATH_H
#define KV_VECMATH_H
#include "internal.h"

/* Largest element, NaN passed over; -inf for n = 0. */
float    kv_vec_max(const float *x, int n);
/* x = exp(x - shift), relative error below 3e-7; returns the sum.  Below e^-87 is 0, NaN stays NaN. */
float    kv_vec_exp_sum(float *x, int n, float shift);
/* x = x * scale, then cap * tanh(x / cap) when cap > 0 (absolute error below 4e-7 cap). */
void     kv_vec_scale_cap(float *x, int n, float scale, float cap);
float    kv_vec_sum(const float *x, int n);
float    kv_vec_dot(const float *a, const float *b, int n);
void     kv_vec_axpy(float w, const float *x, float *y, int n);              /* y += w x */
void     kv_vec_scale(float w, float *x, int n);                             /* x *= w */
/* The largest |x| as its bits, which order as the values do; at least 0x7f800000 when some x is inf or NaN. */
uint32_t kv_vec_abs_bits(const float *x, int64_t n);
/* scores[i*ld + t] = <q_i, row_t> and acc_i += sum_t p[i*ld + t] row_t, rows d floats, one after the other. */
void     kv_vec_rows_dot(const float *q, int n_q, const float *rows, int n_rows, int d, float *scores, int64_t ld);
void     kv_vec_rows_accumulate(const float *p, int64_t ld, int n_q, const float *rows, int n_rows, int d, float *acc);
/* Between f32 and storage of dtype KV_F32, KV_F16, KV_BF16: round to nearest even, same bits at every level. */
void     kv_vec_load(int dtype, const void *src, float *dst, int64_t n);
void     kv_vec_store(int dtype, const float *src, void *dst, int64_t n);
void     kv_vec_round(int dtype, const float *src, float *dst, int64_t n);   /* store, then load; src may be dst */
#endif
