/* weights.h -- between weights.c (plain C, the specification) and its SIMD variants, and what these share.
 *
 * Every quantized type is value = a u + b with an unsigned code u of a byte at most, and a, b per group of 16 or 32
 * values.  So a type is two inline functions here: its 32 codes as bytes, and the a and b of a run of groups; dequantizing
 * and multiplying are written once for all.  The products d sc u are exact in f32 (11 + 6 + 5 bits at most; Q6_K by the FMA),
 * so dequantization is bit-equal to plain C for finite scales.
 *
 * Activations as products need them, in one allocation behind kv_act.x:
 *   q       i16 per value: x = scale q, scale = max |x| / 32639 per 32 values
 *   extra   64 bytes per 32 values: the low digits i8 x 32, the high digits i8 x 32, q = 256 high + low;
 *           then per 16 values scale f32, then per 16 values the sum of scale q f32 (scale and sum: the same per 32)
 *   fine    what q leaves over, in 256ths, i16 per value, then the same as i8: x = scale (q + fine / 256) has 24 bits.  Then
 *           per 32 values the sum of that, f32.  Only panels read these (panels.h): they wait for memory anyway. */
#ifndef KV_WEIGHTS_H
#define KV_WEIGHTS_H
#include <float.h>
#include "model.h"

enum {
    KV_ACT_PAD = 512,                          /* activations are padded with zeros to whole groups of this: 16 scales, one wide load */
    KV_ACT_MAX = 127 * 256 + 127,              /* the largest q whose digits are both i8 */
};

void kv_weight_rows_plain(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst);
void kv_weight_rows_avx2(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst);
void kv_matvec_plain(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);
void kv_matvec_avx2(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);
void kv_matvec_avx512(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);
/* q, extra, scale and sum of n values (a multiple of 32) from a->x: the same bytes at every level. */
void kv_act_quantize_avx2(kv_act *a, int64_t n);

/* 1 / scale, or 0 where all q are 0: nothing but zeros, or not finite (then scale carries inf or NaN into the result). */
static inline float kv_act_inverse(float max_abs) { return max_abs >= 0x1p-100f && max_abs <= FLT_MAX ? KV_ACT_MAX / max_abs : 0; }

static inline const int8_t *kv_act_digits(const kv_act *a)  { return a->extra; }
static inline float        *kv_act_scale16(const kv_act *a) { return (float *)((char *)a->extra + 2 * a->cap); }
static inline float        *kv_act_sum16(const kv_act *a)   { return kv_act_scale16(a) + a->cap / 16; }
static inline int16_t      *kv_act_fine16(const kv_act *a)  { return (int16_t *)(a->sum + a->cap / 32); }
static inline int8_t       *kv_act_fine8(const kv_act *a)   { return (int8_t *)(kv_act_fine16(a) + a->cap); }
static inline float        *kv_act_sum24(const kv_act *a)   { return (float *)(void *)(kv_act_fine8(a) + a->cap); }
#endif
