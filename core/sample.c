/* sample.c -- from logits to a token.
 *
 * Order: top-k, softmax at a temperature, top-p, one draw.  Candidates are taken from a max-heap, largest logit first
 * and the lowest id among equals, so that only as many are ordered as the limits let through.  The draw is number
 * `counter` of the seed's stream: the same seed and counter give the same token whatever was drawn before. */
#include <math.h>
#include "internal.h"

enum { STREAM = 0x73 };                     /* 's': apart from the streams that make rotations and noise */

static bool before(const float *logits, int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); }

static void sift_down(const float *logits, int32_t *heap, int n, int i)
{
    const int32_t id = heap[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(logits, heap[child + 1], heap[child])) child++;
        if (!before(logits, heap[child], id)) break;
        heap[i] = heap[child];
    }
    heap[i] = id;
}

/* The n_left-element heap's first goes to its end: afterwards the ids taken lie in heap[n_left..], last taken first. */
static int32_t pop(const float *logits, int32_t *heap, int *n_left)
{
    const int32_t top = heap[0];
    heap[0] = heap[--*n_left];
    heap[*n_left] = top;
    if (*n_left > 0) sift_down(logits, heap, *n_left, 0);
    return top;
}

/* One token of n.  temperature 0: the largest logit, lowest id among equals.  top_k 0 and top_p 0 or 1 set no limit.
 * NaN and +inf logits are KV_E_ARG; -inf excludes a token. */
int kv_sample(const float *logits, int n, const kv_sampler_params *p, double counter, int *token)
{
    RETURN_ERROR_IF(!logits || !p || !token, KV_E_ARG, "sample: %s is NULL", !logits ? "logits" : !p ? "params" : "token");
    RETURN_ERROR_IF(n < 1, KV_E_ARG, "sample: n=%d is less than 1", n);
    RETURN_ERROR_IF(!(p->temperature >= 0 && p->temperature <= 1e6), KV_E_ARG, "sample: temperature=%g is outside 0..1e6", p->temperature);
    RETURN_ERROR_IF(!(p->top_p >= 0 && p->top_p <= 1), KV_E_ARG, "sample: top_p=%g is outside 0..1", p->top_p);
    RETURN_ERROR_IF(p->top_k < 0, KV_E_ARG, "sample: top_k=%d is negative", p->top_k);
    int best = 0;
    for (int i = 0; i < n; i++) {
        RETURN_ERROR_IF(isnan(logits[i]) || logits[i] == INFINITY, KV_E_ARG, "sample: logit %d of %d is %s", i, n, isnan(logits[i]) ? "NaN" : "+inf");
        if (logits[i] > logits[best]) best = i;
    }
    RETURN_ERROR_IF(logits[best] == -INFINITY, KV_E_ARG, "sample: all %d logits are -inf", n);
    *token = best;
    if (p->temperature == 0 || p->top_k == 1) return KV_OK;

    float u;
    FORWARD_IF_ERROR(kv_rng_uniform(p->seed, STREAM, counter, 1, &u));
    const double top_p = p->top_p > 0 ? p->top_p : 1, top = logits[best];
    const int k = p->top_k > 0 ? kv_min(p->top_k, n) : n;
    int32_t *const heap = kv_alloc_array((size_t)n, sizeof *heap, false);
    double *const weight = kv_alloc_array((size_t)n, sizeof *weight, false);   /* of the i-th candidate */
    int status = heap && weight ? KV_OK : KV_E_NOMEM, n_left = n, m = 0;
    if (status < 0) goto fail;

    double total = 0, kept = 0;
    for (int i = 0; i < n; i++) heap[i] = i;
    for (int i = n / 2 - 1; i >= 0; i--) sift_down(logits, heap, n, i);
    if (k < n) {                            /* the total is over the k candidates: take them all first */
        for (; m < k; m++) total += weight[m] = exp((logits[pop(logits, heap, &n_left)] - top) / p->temperature);
        for (m = 0; m < k && kept < top_p * total; m++) kept += weight[m];
    } else {                                /* without top-p only as many as the draw will pass */
        for (int i = 0; i < n; i++) total += exp((logits[i] - top) / p->temperature);
        const double enough = (top_p < 1 ? top_p : u) * total;
        for (; m < n && kept <= enough; m++) kept += weight[m] = exp((logits[pop(logits, heap, &n_left)] - top) / p->temperature);
        if (top_p == 1) kept = total;
    }
    int i = 0;
    for (double left = u * kept; i < m - 1 && (left -= weight[i]) >= 0; i++) {}
    *token = heap[n - 1 - i];
fail:
    kv_free(weight);
    kv_free(heap);
    return status;
}
