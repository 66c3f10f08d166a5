/* panels.h -- quantized weights repacked for the decode step: 16 rows side by side (panels.c). */
#ifndef KV_PANELS_H
#define KV_PANELS_H
#include "weights.h"

enum { KV_PANEL_ROWS = 16, PANEL_AHEAD = 2048 /* bytes asked for ahead of their use */ };

/* Bytes of 16 rows of 32 values, or 0 where the type (or the shape) has no panels. */
size_t kv_panel_block_bytes(const kv_weight *w);
/* Rows row0..row1, both multiples of 16, of a weight that has panels. */
void kv_panels_avx2(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);
void kv_panels_avx512(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);
#endif
