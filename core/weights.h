/* weights.h -- between weights.c (plain C, the specification) and weights_simd.c. */
#ifndef KV_WEIGHTS_H
#define KV_WEIGHTS_H
#include "model.h"

enum { KV_ACT_PAD = 64 /* activations are padded with zeros to whole groups of this */ };

void kv_weight_rows_plain(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst);
void kv_matvec_plain(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);
#endif
