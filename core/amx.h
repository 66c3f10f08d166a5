/* amx.h -- products of f32 matrices on bf16 tiles (amx.c). */
#ifndef KV_AMX_H
#define KV_AMX_H
#include "internal.h"

enum { KV_AMX_BLOCK = 32 };                   /* rows of either operand, and inner positions, are packed in blocks of this */

bool   kv_amx(void);                          /* cpu.c: processor, system and kv_cpu_limit allow it; else nothing below may be called */
/* A packed operand: rows [n] of k values, 4 bytes each, both rounded up to whole blocks.  Block b of the rows starts at
 * kv_amx_bytes(b * KV_AMX_BLOCK, k). */
size_t kv_amx_bytes(int64_t n, int64_t k);
void   kv_amx_pack_left(const float *x, int64_t ld, int n, int k, float scale, void *dst);    /* scale times x[n][k] */
void   kv_amx_pack_right(const float *x, int64_t ld, int n, int k, void *dst);                /* x[n][k] */
void   kv_amx_pack_right_t(const float *x, int64_t ld, int n, int k, void *dst);              /* x[k][n] */
/* c[m][n] (ldc) = left right^T, or c += that, over the first k rounded up to whole blocks; left was packed for k_left values a
 * row, right for k_right (k, or more when it is a part).  An element's bits depend on its two rows and k alone. */
void   kv_amx_multiply(const void *left, int64_t k_left, int m, const void *right, int64_t k_right, int n, int k, bool add, float *c, int64_t ldc);
#endif
