/* bench_scalar.c -- attention on codes and encoding, per SIMD level, against a plain read of the same bytes.
 *
 * The shape is SmolLM2-135M's cache: 30 layers x 3 heads of 64 dims, pages of 64 tokens.
 *   make && cc -O3 -std=c11 -D_GNU_SOURCE -pthread -Icore tests/bench/bench_scalar.c $(find build/release/core -name '*.o') \
 *     $(pkg-config --libs openblas libcjson libpcre2-8 libedit) -lm -ldl -o build/bench_scalar
 * Arguments: tokens (4096), threads (1), queries a head (3), lowest SIMD level (0). */
#include <stdio.h>
#include <stdlib.h>
#include "codec.h"

enum { HEADS = 90, DIM = 64, PAGE = 64, REPEAT = 15 };

static struct job {
    kv_codec *k, *v;
    uint8_t  *keys, *values;
    float    *q, *scores, *out;
    int       n_pages, n_q, read_only;
    float     sum[HEADS];
    double    fastest[HEADS];
} job;

static void attend_head(void *ctx, int head, int thread)
{
    const struct job *j = ctx;
    const size_t kp = j->k->page_bytes, vp = j->v->page_bytes;
    const uint8_t *k = j->keys + (size_t)head * kp, *v = j->values + (size_t)head * vp;   /* page p of all heads, then p + 1 */
    if (j->read_only) {
        uint64_t a = 0, b = 0, c = 0, d = 0;
        for (int p = 0; p < 2 * j->n_pages; p++) {
            const uint64_t *w = (const uint64_t *)(p < j->n_pages ? k + (size_t)p * HEADS * kp : v + (size_t)(p - j->n_pages) * HEADS * vp);
            for (size_t i = 0; i < (p < j->n_pages ? kp : vp) / 8; i += 4) { a += w[i]; b += w[i + 1]; c += w[i + 2]; d += w[i + 3]; }
        }
        job.sum[head] = (float)(a + b + c + d);
        return;
    }
    _Alignas(64) uint8_t prepared[4 * 4096];
    float acc[4 * DIM] = { 0 };
    float *s = j->scores + (size_t)thread * 4 * (size_t)j->n_pages * PAGE;
    const int64_t ld = (int64_t)j->n_pages * PAGE;
    j->k->ops->query(j->k, j->q, DIM, j->n_q, prepared);
    for (int p = 0; p < j->n_pages; p++) j->k->ops->dot(j->k, k + (size_t)p * HEADS * kp, PAGE, prepared, j->n_q, s + p * PAGE, ld);
    for (int64_t i = 0; i < ld * j->n_q; i++) s[i] = s[i] * s[i];      /* in softmax's place: any weights >= 0 */
    for (int p = 0; p < j->n_pages; p++) j->v->ops->accumulate(j->v, v + (size_t)p * HEADS * vp, PAGE, s + p * PAGE, ld, j->n_q, acc);
    j->v->ops->output(j->v, acc, j->n_q, j->out + (size_t)thread * 4 * DIM, DIM);
}

static void attend(void *ctx, int head, int thread)
{
    const double t = kv_now();
    attend_head(ctx, head, thread);
    if (kv_now() - t < job.fastest[head]) job.fastest[head] = kv_now() - t;
}

/* Seconds: on one thread the sum of every head's fastest run, which other processes disturb less than the fastest whole. */
static double best_of(int n)
{
    double best = 1e9, sum = 0;
    for (int h = 0; h < HEADS; h++) job.fastest[h] = 1e9;
    for (int i = 0; i < n; i++) {
        const double t = kv_now();
        kv_parallel(HEADS, attend, &job);
        if (kv_now() - t < best) best = kv_now() - t;
    }
    for (int h = 0; h < HEADS; h++) sum += job.fastest[h];
    return kv_threads() == 1 ? sum : best;
}

static double encode_rate(const kv_codec *c, uint8_t *page, const float *x, int tokens)
{
    double best = 1e9;
    for (int i = 0; i < 15; i++) {
        const double t = kv_now();
        for (int r = 0; r < 64; r++)
            for (int k = 0; k < PAGE; k += tokens) c->ops->encode(c, page, k, tokens, x + k * DIM, DIM);
        if (kv_now() - t < best) best = kv_now() - t;
    }
    return best / 64 / PAGE;                  /* seconds a token */
}

int main(int argc, char **argv)
{
    const int tokens = argc > 1 ? atoi(argv[1]) : 4096;
    kv_set_threads(argc > 2 ? atoi(argv[2]) : 1);
    job.n_q = argc > 3 ? atoi(argv[3]) : 3;
    job.n_pages = tokens / PAGE;
    float x[PAGE * DIM];
    job.q = kv_alloc(4 * DIM * sizeof(float));
    job.scores = kv_alloc((size_t)kv_threads() * 4 * (size_t)tokens * sizeof(float));
    job.out = kv_alloc((size_t)kv_threads() * 4 * DIM * sizeof(float));
    kv_rng_normal(1, 1, 0, 4 * DIM, job.q);
    printf("%d tokens, %d threads, %d queries a head; encode per token of %d floats\n", tokens, kv_threads(), job.n_q, DIM);
    for (int bits = 1; bits <= 8; bits++) {
        char params[64];
        snprintf(params, sizeof params, "bits=%d,norm=raw", bits);
        if (kv_codec_new(&job.k, "scalar", params, DIM, PAGE, KV_SIDE_K) < 0 || kv_codec_new(&job.v, "scalar", params, DIM, PAGE, KV_SIDE_V) < 0) return 1;
        const size_t pages = (size_t)HEADS * (size_t)job.n_pages;
        job.keys = kv_zalloc(pages * job.k->page_bytes);
        job.values = kv_zalloc(pages * job.v->page_bytes);
        for (size_t p = 0; p < pages; p++) {
            if (p < 16) kv_rng_normal(2, 1, (double)p * PAGE * DIM, PAGE * DIM, x);
            job.k->ops->encode(job.k, job.keys + p * job.k->page_bytes, 0, PAGE, x, DIM);
            job.v->ops->encode(job.v, job.values + p * job.v->page_bytes, 0, PAGE, x, DIM);
        }
        job.read_only = 1;
        const double read = best_of(REPEAT), mb = (double)pages * (double)(job.k->page_bytes + job.v->page_bytes) / 1e6;
        job.read_only = 0;
        printf("%d bits: %5.1f MB, read %.2f ms", bits, mb, read * 1e3);
        for (int l = argc > 4 ? atoi(argv[4]) : 0; l <= kv_cpu_simd_max(); l++) {
            kv_cpu_limit(l);
            const double t = best_of(l ? REPEAT : 1);
            const double ke = encode_rate(job.k, job.keys, x, PAGE), ve = encode_rate(job.v, job.values, x, PAGE);
            const double k1 = encode_rate(job.k, job.keys, x, 1), v1 = encode_rate(job.v, job.values, x, 1);
            printf(" | level %d: %6.2f ms, encode K %.2f V %.2f GB/s, append K %.0f V %.0f ns", l, t * 1e3, DIM * 4e-9 / ke, DIM * 4e-9 / ve, k1 * 1e9, v1 * 1e9);
        }
        printf("\n");
        kv_free(job.keys);
        kv_free(job.values);
        kv_codec_free(job.k);
        kv_codec_free(job.v);
    }
    kv_free(job.q);
    kv_free(job.scores);
    kv_free(job.out);
    return 0;
}
