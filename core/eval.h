/* eval.h -- the pieces of lockstep evaluation that can be tested without a model.  Not part of the public header. */
#ifndef KV_EVAL_H
#define KV_EVAL_H
#include "model.h"

/* ---- the streaming head (head.c): logits of a reference and its arms compared on the spot, never stored */

typedef struct kv_score { float kld, nll, nll_ref, dp, same_top1; } kv_score;

/* z_r, z_a: logits of reference and arm, t: the target token.  With lse(z) = ln sum_i exp(z_i):
 *   nll_ref   = lse(z_r) - z_r[t]         nll = lse(z_a) - z_a[t]        dp = exp(-nll) - exp(-nll_ref)
 *   kld       = sum_i p_r[i] (ln p_r[i] - ln p_a[i]) = sum_i p_r[i] (z_r[i] - z_a[i]) - lse(z_r) + lse(z_a)
 *   same_top1 = 1 if both have the same largest logit (of equals the lowest id), else 0
 * Equal hidden states give kld = 0 and dp = 0 exactly.  A logit that is not finite makes kld NaN or inf. */
typedef struct kv_head kv_head;
int  kv_head_new(kv_head **out, const kv_weight *w, float softcap, int n_arms);        /* keeps w */
void kv_head_free(kv_head *h);
/* hidden: n_arms + 1 pointers to [n_pos][w->n_in], the reference first; target: [n_pos], below w->n_out;
 * score: [n_arms][n_pos].  All are kept until kv_head_step says *more = 0, when the scores are complete. */
int  kv_head_begin(kv_head *h, int n_pos, const float *const *hidden, const int32_t *target, kv_score *score);
int  kv_head_step(kv_head *h, int *more);

/* ---- statistics (stats.c) */

typedef struct kv_scores { const float *kld, *nll, *nll_ref, *dp, *same_top1, *position, *chunk; size_t n; } kv_scores;
/* See stats.c for the definition of every field. */
int    kv_scores_summary(const kv_scores *s, int lo, int hi, double seed, int n_boot, kv_kld_summary *out);
double kv_quantile(const float *sorted, size_t n, double f);   /* linear between order statistics; NaN if n is 0 */
#endif
