/* stats.c -- what a set of scored positions says, with honest errors.
 *
 * Names follow llama-perplexity --kl-divergence.  Over the positions lo <= position < hi, n of them:
 *
 *   mean max min median p90 p95 p99 p999 p10 p05 p01 p001   KL divergence in nats; quantiles interpolate linearly between
 *             order statistics at f (n - 1), as llama.cpp does (others take the element at floor(n f); tails of a few
 *             hundred positions differ visibly)
 *   same_top1        share of positions where both arms' largest logit is the same token (a fraction, not percent)
 *   mean_dp max_dp min_dp   dp = p(target) - p_ref(target), fractions
 *   rms_dp           sqrt(mean dp^2)
 *   ppl, ppl_ref     exp(mean nll)
 *   ln_ratio         mean (nll - nll_ref) = ln(ppl / ppl_ref);  ppl_ratio = exp of it
 *   cor              correlation of nll and nll_ref over positions
 *
 * Errors.  Tokens of a chunk are correlated, so the unit of sampling is a block: a chunk, or, when all positions come from
 * one chunk, BLOCK neighbouring positions of it (a rest of less than half a block joins the last).  *_se is the error of
 * a ratio of block sums, sqrt(B/(B-1) sum_b (s_b - n_b mean)^2) / n, which for equal blocks is the standard error of the
 * B block means; errors of rms, exp and ratios follow by the delta method.  ln_ratio_se is of paired differences.
 * ci_lo, ci_hi: 95 % percentile interval of `mean` over n_boot resamples of blocks with replacement.  Resample r draws
 * block floor(x B / 2^32) with x the word r B + j (j < B) of stream BOOT of rng.c, so it depends on seed, B and data only.
 * With few blocks (under about 10) a percentile interval is somewhat too narrow, as every bootstrap is.
 *
 * NaN where a figure does not exist: everything but n for n = 0; *_se and ci with fewer than two blocks; ci with
 * n_boot = 0; cor of a constant.  A NaN divergence (an arm whose logits overflowed) counts as worst in the quantiles and
 * makes max, the means and their errors NaN. */
#include <math.h>
#include <stdlib.h>
#include "eval.h"

enum { BLOCK = 64, BOOT = 0x424f4f54 /* "BOOT" */, MAX_BOOT = 1000000 };

typedef struct { double n, sum; } block_sum;

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    if (isnan(x) || isnan(y)) return !!isnan(x) - !!isnan(y);
    return (x > y) - (x < y);
}

static int by_double(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double kv_quantile(const float *sorted, size_t n, double f)
{
    if (n == 0) return NAN;
    const double at = fmin(fmax(f, 0), 1) * (double)(n - 1);
    const size_t i = (size_t)at;
    const double part = at - (double)i;
    return part > 0 ? (1 - part) * sorted[i] + part * sorted[i + 1] : sorted[i];
}

static double quantile_of_doubles(const double *sorted, size_t n, double f)
{
    const double at = f * (double)(n - 1);
    const size_t i = (size_t)at;
    const double part = at - (double)i;
    return part > 0 ? (1 - part) * sorted[i] + part * sorted[i + 1] : sorted[i];
}

/* Mean of x over all positions, and its standard error from the blocks (NaN with fewer than two). */
static double mean_of(const double *x, size_t n, const int *block, int n_blocks, block_sum *sums, double *se)
{
    memset(sums, 0, (size_t)n_blocks * sizeof *sums);
    double total = 0;
    for (size_t i = 0; i < n; i++) {
        sums[block[i]].n++;
        sums[block[i]].sum += x[i];
    }
    for (int b = 0; b < n_blocks; b++) total += sums[b].sum;
    const double mean = total / (double)n;
    double sq = 0;
    for (int b = 0; b < n_blocks; b++) {
        const double d = sums[b].sum - sums[b].n * mean;
        sq += d * d;
    }
    *se = n_blocks < 2 ? NAN : sqrt(sq * n_blocks / (n_blocks - 1)) / (double)n;
    return mean;
}

/* Blocks of the chosen positions, numbered from 0 in order; returns how many. */
static int number_blocks(const kv_scores *s, const size_t *pick, size_t n, int *block)
{
    int n_blocks = 0;
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || s->chunk[pick[i]] != s->chunk[pick[i - 1]]) n_blocks++;
        block[i] = n_blocks - 1;
    }
    if (n_blocks != 1) return n_blocks;
    n_blocks = kv_max(1, (int)((n + BLOCK / 2) / BLOCK));
    for (size_t i = 0; i < n; i++) block[i] = kv_min((int)(i / BLOCK), n_blocks - 1);
    return n_blocks;
}

static int bootstrap(const block_sum *sums, int n_blocks, double seed, int n_boot, kv_kld_summary *out)
{
    double *means = kv_alloc_array((size_t)n_boot, sizeof *means, false);
    if (!means) return KV_E_NOMEM;
    const uint64_t key = (uint64_t)seed;
    uint32_t x[4] = { 0 };
    uint64_t at = 0;
    for (int r = 0; r < n_boot; r++) {
        double n = 0, sum = 0;
        for (int j = 0; j < n_blocks; j++, at++) {
            if (at % 4 == 0) kv_rng_u32((uint32_t)key, (uint32_t)(key >> 32), BOOT, (uint32_t)(at / 4), x);
            const block_sum *b = &sums[(uint64_t)x[at % 4] * (uint64_t)n_blocks >> 32];
            n += b->n;
            sum += b->sum;
        }
        means[r] = sum / n;
    }
    qsort(means, (size_t)n_boot, sizeof *means, by_double);
    out->ci_lo = quantile_of_doubles(means, (size_t)n_boot, 0.025);
    out->ci_hi = quantile_of_doubles(means, (size_t)n_boot, 0.975);
    kv_free(means);
    return KV_OK;
}

static double correlation(const kv_scores *s, const size_t *pick, size_t n, double mean, double mean_ref)
{
    double xx = 0, yy = 0, xy = 0;
    for (size_t i = 0; i < n; i++) {
        const double x = s->nll[pick[i]] - mean, y = s->nll_ref[pick[i]] - mean_ref;
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    return xx > 0 && yy > 0 ? xy / (sqrt(xx) * sqrt(yy)) : NAN;
}

int kv_scores_summary(const kv_scores *s, int lo, int hi, double seed, int n_boot, kv_kld_summary *out)
{
    RETURN_ERROR_IF(!out, KV_E_ARG, "summary: out is NULL");
    RETURN_ERROR_IF(!(seed >= 0 && seed <= 9007199254740992.0) || seed != floor(seed), KV_E_ARG, "summary: seed=%.17g is not an integer in 0..2^53", seed);
    RETURN_ERROR_IF(n_boot < 0 || n_boot > MAX_BOOT, KV_E_ARG, "summary: n_boot=%d is outside 0..%d", n_boot, MAX_BOOT);
    for (size_t i = 0; i < sizeof *out / sizeof(double); i++) ((double *)out)[i] = NAN;
    out->n = 0;

    int        status = KV_E_NOMEM;
    size_t     n = 0;
    size_t    *pick = kv_alloc_array(s->n, sizeof *pick, false);
    int       *block = kv_alloc_array(s->n, sizeof *block, false);
    double    *x = kv_alloc_array(s->n, sizeof *x, false);
    float     *sorted = kv_alloc_array(s->n, sizeof *sorted, false);
    block_sum *sums = kv_alloc_array(s->n + 1, sizeof *sums, false);
    if (!pick || !block || !x || !sorted || !sums) goto fail;
    for (size_t i = 0; i < s->n; i++)
        if (s->position[i] >= (float)lo && s->position[i] < (float)hi) pick[n++] = i;
    status = KV_OK;
    out->n = (double)n;
    if (n == 0) goto fail;
    const int n_blocks = number_blocks(s, pick, n, block);
    FAIL_IF((double)n_blocks * n_boot > 0x1p34, KV_E_ARG, "summary: %d resamples of %d blocks are more than 2^34 draws", n_boot, n_blocks);

    double se;
    for (size_t i = 0; i < n; i++) x[i] = s->same_top1[pick[i]];
    out->same_top1 = mean_of(x, n, block, n_blocks, sums, &out->same_top1_se);

    out->max_dp = -INFINITY;
    out->min_dp = INFINITY;
    for (size_t i = 0; i < n; i++) {
        x[i] = s->dp[pick[i]];
        out->max_dp = x[i] > out->max_dp || isnan(x[i]) ? x[i] : out->max_dp;
        out->min_dp = x[i] < out->min_dp || isnan(x[i]) ? x[i] : out->min_dp;
    }
    out->mean_dp = mean_of(x, n, block, n_blocks, sums, &out->mean_dp_se);
    for (size_t i = 0; i < n; i++) x[i] *= x[i];
    out->rms_dp = sqrt(mean_of(x, n, block, n_blocks, sums, &se));
    out->rms_dp_se = out->rms_dp > 0 ? se / (2 * out->rms_dp) : se;

    for (size_t i = 0; i < n; i++) x[i] = s->nll[pick[i]];
    const double nll = mean_of(x, n, block, n_blocks, sums, &se);
    out->ppl = exp(nll);
    out->ppl_se = out->ppl * se;
    for (size_t i = 0; i < n; i++) x[i] = s->nll_ref[pick[i]];
    const double nll_ref = mean_of(x, n, block, n_blocks, sums, &se);
    out->ppl_ref = exp(nll_ref);
    out->ppl_ref_se = out->ppl_ref * se;
    for (size_t i = 0; i < n; i++) x[i] = (double)s->nll[pick[i]] - s->nll_ref[pick[i]];
    out->ln_ratio = mean_of(x, n, block, n_blocks, sums, &out->ln_ratio_se);
    out->ppl_ratio = exp(out->ln_ratio);
    out->ppl_ratio_se = out->ppl_ratio * out->ln_ratio_se;
    out->cor = correlation(s, pick, n, nll, nll_ref);

    for (size_t i = 0; i < n; i++) x[i] = sorted[i] = s->kld[pick[i]];
    out->mean = mean_of(x, n, block, n_blocks, sums, &out->se);    /* last: sums now holds kld, for the bootstrap */
    qsort(sorted, n, sizeof *sorted, by_value);
    const struct { double *to, f; } q[] = { { &out->min, 0 }, { &out->p001, .001 }, { &out->p01, .01 }, { &out->p05, .05 }, { &out->p10, .1 },
        { &out->median, .5 }, { &out->p90, .9 }, { &out->p95, .95 }, { &out->p99, .99 }, { &out->p999, .999 }, { &out->max, 1 } };
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) *q[i].to = kv_quantile(sorted, n, q[i].f);
    if (n_blocks >= 2 && n_boot > 0 && !isnan(out->mean)) status = bootstrap(sums, n_blocks, seed, n_boot, out);
fail:
    kv_free(pick);
    kv_free(block);
    kv_free(x);
    kv_free(sorted);
    kv_free(sums);
    return status;
}
