/* rows.c -- attention pieces on plain f32 rows: what the tile path and codecs without a kernel of their own end in. */
#include "codec.h"

void kv_rows_dot(const float *x, int64_t ld, int n_rows, int dim, const float *q, int64_t q_ld, int n_q, float *scores, int64_t s_ld)
{
    for (int g = 0; g < n_q; g++)
        for (int t = 0; t < n_rows; t++) {
            float part[8] = { 0 };
            for (int i = 0; i < dim; i++) part[i & 7] += x[t * ld + i] * q[g * q_ld + i];
            scores[g * s_ld + t] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
        }
}

void kv_rows_accumulate(const float *x, int64_t ld, int n_rows, int dim, const float *p, int64_t p_ld, int n_q, float *acc, int64_t a_ld)
{
    for (int g = 0; g < n_q; g++)
        for (int t = 0; t < n_rows; t++) {
            const float w = p[g * p_ld + t];
            for (int i = 0; i < dim; i++) acc[g * a_ld + i] += w * x[t * ld + i];
        }
}
