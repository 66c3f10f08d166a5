/* rope.c -- rotary position embedding of half-split pairs (i, i + n_rot/2).
 *
 * Angles are position times frequency in double and their cosines are rounded once to float: a position of a million
 * with a frequency of 1 still has an angle good to 1e-10, where a float angle would be off by 0.06. */
#include <math.h>
#include "cache.h"

void kv_rope_rows(const kv_rope *r, float *x, int64_t ld, int n_rows, int64_t pos, int64_t step)
{
    const int half = r->n_rot / 2;
    float c[KV_MAX_HEAD_DIM / 2], s[KV_MAX_HEAD_DIM / 2];
    for (int row = 0; row < n_rows; row++, x += ld) {
        if (row == 0 || step != 0) {
            const double p = (double)(pos + row * step);
            for (int i = 0; i < half; i++) {
                double sn, cs;
                sincos(p * r->freq[i], &sn, &cs);
                c[i] = (float)cs;
                s[i] = (float)sn;
            }
        }
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * c[i] - b * s[i];
            x[i + half] = b * c[i] + a * s[i];
        }
    }
}
