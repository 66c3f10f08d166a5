/* The streaming head against closed forms in long double, statistics against direct formulas, and, where the model is
 * there, whole evaluations: an exact arm diverges by exactly 0 in both modes. */
#include <math.h>
#include "check.h"
#include "eval.h"

enum { K = 48, ARMS = 4 };

/* Multiples of 1/8 within +-scale: products of two such sums are exact in f32, so logits have no rounding to excuse. */
static void fill(float *x, size_t n, double seed, float scale)
{
    kv_rng_uniform(seed, 0, 0, (int)n, x);
    for (size_t i = 0; i < n; i++) x[i] = roundf((2 * x[i] - 1) * scale * 8) / 8;
}

typedef struct { int n_pos, vocab; kv_weight w; float *weights, *hidden[ARMS + 1]; int32_t *target; kv_score *score; } synthetic;

/* Arm 0 equals the reference; 1 differs in one channel, 2 in all, 3 is another model with far larger logits. */
static synthetic make(int n_pos, int vocab, double seed)
{
    synthetic s = { .n_pos = n_pos, .vocab = vocab };
    const size_t nw = (size_t)vocab * K, nh = (size_t)n_pos * K;
    s.weights = kv_alloc_array(nw, sizeof(float), false);
    fill(s.weights, nw, seed, 1);
    s.w = (kv_weight){ .type = KV_W_F32, .n_in = K, .n_out = vocab, .row_bytes = K * sizeof(float), .data = (const uint8_t *)s.weights };
    float *noise = kv_alloc_array(nh, sizeof(float), false);
    fill(noise, nh, seed + 2, 1);
    for (int lane = 0; lane <= ARMS; lane++) {
        s.hidden[lane] = kv_alloc_array(nh, sizeof(float), false);
        fill(s.hidden[lane], nh, seed + 1, 2);
    }
    for (size_t i = 0; i < nh; i++) {
        if (i % K == 5) s.hidden[2][i] += 0.125f * noise[i];
        s.hidden[3][i] += noise[i];
        s.hidden[4][i] = 64 * noise[i];
    }
    kv_free(noise);
    s.target = kv_alloc_array((size_t)n_pos, sizeof *s.target, false);
    for (int i = 0; i < n_pos; i++) s.target[i] = (int32_t)((i * 7919LL + 3) % vocab);
    s.target[0] = vocab - 1;
    s.score = kv_alloc_array((size_t)n_pos * ARMS, sizeof *s.score, false);
    return s;
}

static void drop(synthetic *s)
{
    for (int lane = 0; lane <= ARMS; lane++) kv_free(s->hidden[lane]);
    kv_free(s->weights);
    kv_free(s->target);
    kv_free(s->score);
}

/* Scores of arms [first, first + n) in score[n][n_pos]. */
static int run(const synthetic *s, int first, int n, float cap, kv_score *score)
{
    const float *hidden[ARMS + 1] = { s->hidden[0] };
    for (int a = 0; a < n; a++) hidden[a + 1] = s->hidden[first + a + 1];
    memset(score, 0xff, (size_t)n * (size_t)s->n_pos * sizeof *score);
    kv_head *h;
    int status = kv_head_new(&h, &s->w, cap, n), more = 1;
    if (status == KV_OK) status = kv_head_begin(h, s->n_pos, hidden, s->target, score);
    while (status == KV_OK && more) status = kv_head_step(h, &more);
    kv_head_free(h);
    return status;
}

/* Logits of one position in long double, rounded to float after the cap as the head does. */
static void logits(const synthetic *s, int lane, int pos, float cap, float *z)
{
    for (int v = 0; v < s->vocab; v++) {
        long double dot = 0;
        for (int k = 0; k < K; k++) dot += (long double)s->weights[(size_t)v * K + (size_t)k] * s->hidden[lane][(size_t)pos * K + (size_t)k];
        z[v] = cap > 0 ? (float)(cap * tanhl(dot / cap)) : (float)dot;
    }
}

static long double lse(const float *z, int n, int *top)
{
    *top = 0;
    for (int v = 1; v < n; v++) if (z[v] > z[*top]) *top = v;
    long double sum = 0;
    for (int v = 0; v < n; v++) sum += expl((long double)z[v] - z[*top]);
    return z[*top] + logl(sum);
}

static void closed_form(int n_pos, int vocab, float cap)
{
    synthetic s = make(n_pos, vocab, vocab + n_pos);
    float *zr = kv_alloc_array((size_t)vocab, sizeof(float), false), *za = kv_alloc_array((size_t)vocab, sizeof(float), false);
    CHECK(run(&s, 0, ARMS, cap, s.score) == KV_OK, "%s", kv_last_error());
    double worst_kld = 0, worst_nll = 0;
    int same_wrong = 0, identity_wrong = 0;
    for (int i = 0; i < n_pos; i += 1 + n_pos / 37) {
        int top_r, top_a;
        logits(&s, 0, i, cap, zr);
        const long double lr = lse(zr, vocab, &top_r);
        for (int a = 0; a < ARMS; a++) {
            logits(&s, a + 1, i, cap, za);
            const long double la = lse(za, vocab, &top_a), nll = la - za[s.target[i]], nll_ref = lr - zr[s.target[i]];
            long double kld = 0;
            for (int v = 0; v < vocab; v++) kld += expl(zr[v] - lr) * ((zr[v] - lr) - (za[v] - la));
            const kv_score *g = &s.score[(size_t)a * (size_t)n_pos + (size_t)i];
            const double scale = 1e-9 + (double)kld;
            worst_kld = fmax(worst_kld, fabs((double)(g->kld - kld)) / scale);
            worst_nll = fmax(worst_nll, fabs((double)(g->nll - nll)) / (1 + (double)nll));
            worst_nll = fmax(worst_nll, fabs((double)(g->nll_ref - nll_ref)) / (1 + (double)nll_ref));
            worst_nll = fmax(worst_nll, fabs((double)(g->dp - (expl(-nll) - expl(-nll_ref)))));
            same_wrong += g->same_top1 != (top_r == top_a);
            identity_wrong += a == 0 && (g->kld != 0 || signbit(g->kld) || g->dp != 0 || g->nll != g->nll_ref || g->same_top1 != 1);
        }
    }
    /* with a cap, one ulp of a capped logit of 30 (2e-6) goes straight into an arm's difference */
    CHECK(worst_kld < (cap > 0 ? 2e-3 : 1e-6), "n_pos %d vocab %d cap %g: relative error of kld %g", n_pos, vocab, (double)cap, worst_kld);
    CHECK(worst_nll < (cap > 0 ? 4e-6 : 1e-6), "n_pos %d vocab %d cap %g: nll or dp off by %g", n_pos, vocab, (double)cap, worst_nll);
    CHECK(same_wrong == 0 && identity_wrong == 0, "%d top-1 wrong, %d identity positions not exactly 0", same_wrong, identity_wrong);
    kv_free(zr);
    kv_free(za);
    drop(&s);
}

static void same_bits(void)
{
    synthetic s = make(300, 1999, 5);
    const size_t bytes = (size_t)s.n_pos * sizeof(kv_score);
    kv_score *got = kv_alloc_array((size_t)s.n_pos * ARMS, sizeof *got, false);
    const int threads = kv_threads();
    for (int capped = 0; capped < 2; capped++) {
        const float cap = capped ? 30 : 0;
        CHECK(run(&s, 0, ARMS, cap, s.score) == KV_OK, "%s", kv_last_error());
        for (int level = 0; level <= kv_cpu_simd_max(); level++) {
            kv_cpu_limit(level);
            CHECK(run(&s, 0, ARMS, cap, got) == KV_OK && memcmp(got, s.score, bytes * ARMS) == 0, "SIMD level %d, cap %g: other bits", level, (double)cap);
        }
        kv_cpu_limit(KV_SIMD_AMX);
        for (int t = 1; t <= 3; t += 2) {
            kv_set_threads(t);
            CHECK(run(&s, 0, ARMS, cap, got) == KV_OK && memcmp(got, s.score, bytes * ARMS) == 0, "%d threads: other bits", t);
        }
        kv_set_threads(threads);
        for (int a = 0; a < ARMS; a++)
            CHECK(run(&s, a, 1, cap, got) == KV_OK && memcmp(got, s.score + (size_t)a * (size_t)s.n_pos, bytes) == 0, "arm %d alone: other bits", a);
    }
    kv_free(got);
    drop(&s);
}

static void hostile(void)
{
    synthetic s = make(20, 300, 9);
    s.hidden[2][3 * K] = NAN;
    s.hidden[3][4 * K] = INFINITY;
    CHECK(run(&s, 0, ARMS, 0, s.score) == KV_OK, "%s", kv_last_error());
    int bad = 0;
    for (int i = 0; i < 20; i++) bad += !isfinite(s.score[20 + i].kld) != (i == 3);
    CHECK(bad == 0, "a NaN at position 3 shows at %d other positions, or not at its own", bad);
    CHECK(!isfinite(s.score[40 + 4].kld) && isfinite(s.score[40 + 5].kld), "an infinite hidden value is hidden");
    bad = 0;
    for (int i = 0; i < 20; i++) bad += !isfinite(s.score[60 + i].kld) || s.score[60 + i].kld <= 0;
    CHECK(bad == 0, "huge logits: %d divergences are not positive and finite", bad);
    s.target[19] = 300;
    CHECK(run(&s, 0, 1, 0, s.score) == KV_E_ARG, "a target past the vocabulary is accepted");
    drop(&s);
}

/* ---- statistics */

enum { MAX_N = 4000 };
static float kld[MAX_N], nll[MAX_N], nll_ref[MAX_N], dp[MAX_N], same[MAX_N], position[MAX_N], chunk[MAX_N];
static const kv_scores all = { kld, nll, nll_ref, dp, same, position, chunk, MAX_N };

/* chunks x per positions; every chunk has its own level, as text does. */
static void data(int chunks, int per, double seed)
{
    static float z[MAX_N], u[MAX_N];
    kv_rng_normal(seed, 1, 0, MAX_N, z);
    kv_rng_uniform(seed, 2, 0, MAX_N, u);
    for (int i = 0; i < chunks * per; i++) {
        const float level = z[MAX_N - 1 - i / per];
        kld[i] = 0.05f * expf(0.5f * z[i] + 0.3f * level);
        nll_ref[i] = 3 + level + z[i];
        nll[i] = nll_ref[i] + 0.1f * u[i];
        dp[i] = expf(-nll[i]) - expf(-nll_ref[i]);
        same[i] = u[i] < 0.8f;
        position[i] = (float)(i % per + 256);
        chunk[i] = (float)(i / per);
    }
}

static void direct_formulas(void)
{
    enum { B = 8, PER = 100, N = B * PER };
    kv_scores s = all;
    s.n = N;
    data(B, PER, 3);
    kv_kld_summary r, again;
    CHECK(kv_scores_summary(&s, 0, 1 << 20, 1, 1000, &r) == KV_OK, "%s", kv_last_error());
    long double mean = 0, block[B] = { 0 }, se = 0, dp2 = 0, ratio = 0, lr = 0, la = 0, xx = 0, yy = 0, xy = 0;
    for (int i = 0; i < N; i++) {
        mean += kld[i] / (long double)N;
        block[i / PER] += kld[i] / (long double)PER;
        dp2 += (long double)dp[i] * dp[i] / N;
        ratio += ((long double)nll[i] - nll_ref[i]) / N;
        lr += nll_ref[i] / (long double)N;
        la += nll[i] / (long double)N;
    }
    for (int i = 0; i < N; i++) {
        xx += (nll[i] - la) * (nll[i] - la);
        yy += (nll_ref[i] - lr) * (nll_ref[i] - lr);
        xy += (nll[i] - la) * (nll_ref[i] - lr);
    }
    for (int b = 0; b < B; b++) se += (block[b] - mean) * (block[b] - mean);
    se = sqrtl(se / (B - 1) / B);             /* standard error of the mean of B block means */
    CHECK(r.n == N && fabsl(r.mean - mean) < 1e-12L && fabsl(r.se - se) < 1e-12L, "mean %g se %g against %Lg %Lg", r.mean, r.se, mean, se);
    CHECK(fabsl(r.rms_dp - sqrtl(dp2)) < 1e-12L && fabsl(r.ln_ratio - ratio) < 1e-10L && fabsl(r.ppl_ref - expl(lr)) < 1e-9L &&
          fabsl(r.ppl_ratio - expl(ratio)) < 1e-10L && fabsl(r.cor - xy / sqrtl(xx * yy)) < 1e-12L, "rms_dp %g ln_ratio %g ppl_ref %g cor %g", r.rms_dp, r.ln_ratio, r.ppl_ref, r.cor);
    CHECK(fabs(r.ppl / r.ppl_ref - r.ppl_ratio) < 1e-9 && r.ppl_se > 0 && r.rms_dp_se > 0 && r.same_top1_se > 0 && r.ln_ratio_se < r.ppl_se, "errors");
    CHECK(r.min <= r.p001 && r.p001 <= r.p01 && r.p01 <= r.p05 && r.p05 <= r.p10 && r.p10 <= r.median && r.median <= r.p90 && r.p90 <= r.p95 &&
          r.p95 <= r.p99 && r.p99 <= r.p999 && r.p999 <= r.max, "quantiles are not in order");
    CHECK(r.ci_lo < r.mean && r.mean < r.ci_hi && fabs((r.ci_hi - r.ci_lo) / (2 * 1.96 * r.se) - 1) < 0.25, "ci %g..%g around %g, se %g", r.ci_lo, r.ci_hi, r.mean, r.se);

    CHECK(kv_scores_summary(&s, 0, 1 << 20, 1, 1000, &again) == KV_OK && memcmp(&r, &again, sizeof r) == 0, "the same seed gives other figures");
    kv_scores_summary(&s, 0, 1 << 20, 2, 1000, &again);
    CHECK(again.ci_lo != r.ci_lo && again.mean == r.mean && again.se == r.se, "another seed changes nothing, or more than the interval");
    kv_scores_summary(&s, 300, 310, 1, 1000, &again);
    CHECK(again.n == 10 * B, "depth bin holds %g", again.n);
    for (int lo = 256; lo < 356; lo += 25) {   /* bins add up to the whole */
        kv_kld_summary bin;
        kv_scores_summary(&s, lo, lo + 25, 1, 0, &bin);
        mean -= bin.mean * bin.n / N;
        CHECK(isnan(bin.ci_lo) && bin.se > 0, "n_boot 0 gives an interval");
    }
    CHECK(fabsl(mean) < 1e-12L, "depth bins miss %Lg", mean);
}

static void edges(void)
{
    kv_kld_summary r;
    kv_scores s = all;
    data(8, 100, 4);
    s.n = 0;
    CHECK(kv_scores_summary(&s, 0, 9999, 1, 100, &r) == KV_OK && r.n == 0 && isnan(r.mean) && isnan(r.median) && isnan(r.ppl), "no values");
    s.n = 1;
    CHECK(kv_scores_summary(&s, 0, 9999, 1, 100, &r) == KV_OK && r.mean == kld[0] && r.max == kld[0] && r.median == kld[0] && isnan(r.se) && isnan(r.ci_lo) && isnan(r.cor), "one value");
    s.n = 100;                                /* one chunk: blocks of 64 positions and the rest */
    CHECK(kv_scores_summary(&s, 0, 9999, 1, 100, &r) == KV_OK && r.se > 0 && r.ci_lo < r.ci_hi, "one chunk has no error");
    s.n = 95;                                 /* 64 + 31: the rest joins, one block is left */
    CHECK(kv_scores_summary(&s, 0, 9999, 1, 100, &r) == KV_OK && isnan(r.se) && isnan(r.ci_lo) && !isnan(r.mean), "95 positions make two blocks");
    s.n = 800;
    kld[17] = NAN;
    CHECK(kv_scores_summary(&s, 0, 9999, 1, 100, &r) == KV_OK && isnan(r.mean) && isnan(r.max) && isnan(r.ci_lo) && r.min > 0 && r.median > 0, "NaN is hidden");
    CHECK(kv_scores_summary(&s, 0, 9999, -1, 100, &r) == KV_E_ARG && kv_scores_summary(&s, 0, 9999, 0.5, 100, &r) == KV_E_ARG &&
          kv_scores_summary(&s, 0, 9999, 1, -1, &r) == KV_E_ARG && kv_scores_summary(&s, 0, 9999, 1, 1, NULL) == KV_E_ARG, "bad arguments");
    const float five[] = { 1, 2, 3, 4, 10 };
    CHECK(kv_quantile(five, 5, 0) == 1 && kv_quantile(five, 5, 1) == 10 && kv_quantile(five, 5, .5) == 3 && fabs(kv_quantile(five, 5, .9) - 7.6) < 1e-9 &&
          fabs(kv_quantile(five, 5, .3) - 2.2) < 1e-9 && isnan(kv_quantile(five, 0, .5)), "quantiles");
}

/* The interval must hold the true mean about 95 times in 100 although positions of a chunk are correlated. */
static void coverage(void)
{
    enum { TRIALS = 300, B = 30, PER = 20 };
    const double truth = 0.05 * exp((0.25 + 0.09) / 2);    /* E exp(N(0, .5^2 + .3^2)) */
    kv_scores s = all;
    s.n = B * PER;
    int hit = 0;
    for (int t = 0; t < TRIALS; t++) {
        kv_kld_summary r;
        data(B, PER, 1000 + t);
        kv_scores_summary(&s, 0, 9999, 1, 300, &r);
        hit += r.ci_lo <= truth && truth <= r.ci_hi;
    }
    printf("coverage of the 95 %% interval with %d correlated blocks: %.1f %%\n", B, 100.0 * hit / TRIALS);
    CHECK(hit > TRIALS * 0.88 && hit < TRIALS * 0.985, "%d of %d", hit, TRIALS);
}

/* ---- with a model */

static kv_plan *plan_of(const kv_model_info *m, const char *codec, const char *params, int exact)
{
    kv_plan *p = NULL;
    kv_codec *k = NULL, *v = NULL;
    const int ok = kv_plan_new(&p, m->n_layers, m->n_kv_heads, m->head_dim, 64) == KV_OK && kv_plan_window(p, -1, 0, 0, exact) == KV_OK &&
                   kv_codec_new(&k, codec, params, m->head_dim, 64, KV_SIDE_K) == KV_OK && kv_codec_new(&v, codec, params, m->head_dim, 64, KV_SIDE_V) == KV_OK &&
                   kv_plan_set(p, -1, -1, KV_SIDE_K, k) == KV_OK && kv_plan_set(p, -1, -1, KV_SIDE_V, v) == KV_OK;
    CHECK(ok, "%s", kv_last_error());
    kv_codec_free(k);
    kv_codec_free(v);
    return p;
}

static int run_chunk(kv_eval *e, int index, const int32_t *tokens, int n, int from)
{
    int more = 1, status = kv_eval_begin(e, index, tokens, n, from);
    while (status == KV_OK && more) status = kv_eval_step(e, &more);
    return status;
}

static void whole(const char *path, int mode)
{
    enum { N = 48, FROM = 20, SCORED = N - 1 - FROM };
    kv_model *m = NULL;
    kv_model_info info;
    kv_eval *e = NULL;
    CHECK(kv_model_open(&m, path) == KV_OK && kv_model_get_info(m, &info) == KV_OK, "%s", kv_last_error());
    if (!m) return;
    kv_plan *plans[3] = { plan_of(&info, "raw", "dtype=f32", KV_F32), plan_of(&info, "raw", "dtype=f16", KV_F16), plan_of(&info, "int", "bits=4", KV_F16) };
    int32_t tokens[2 * N];
    for (int i = 0; i < 2 * N; i++) tokens[i] = (int32_t)((i * 2654435761u + 12345) % 4000 + 100);
    CHECK(kv_eval_new(&e, m, mode) == KV_OK, "%s", kv_last_error());
    CHECK(kv_eval_begin(e, 0, tokens, N, FROM) == KV_E_ARG, "a chunk without arms is accepted");
    CHECK(kv_eval_arms(e, 3, plans) == KV_OK, "%s", kv_last_error());
    CHECK(kv_eval_values(e, 0, 0) == NULL && kv_eval_scored(e) == 0, "values before any chunk");
    CHECK(kv_eval_begin(e, 0, tokens, N, N - 1) == KV_E_ARG && kv_eval_begin(e, -1, tokens, N, 0) == KV_E_ARG && kv_eval_begin(e, 0, tokens, 1, 0) == KV_E_ARG, "bad chunk");

    int more = 0;                             /* an abandoned chunk leaves no trace */
    CHECK(kv_eval_begin(e, 0, tokens, N, FROM) == KV_OK && kv_eval_step(e, &more) == KV_OK, "%s", kv_last_error());
    CHECK(run_chunk(e, 0, tokens, N, FROM) == KV_OK && run_chunk(e, 1, tokens + N, N, FROM) == KV_OK, "%s", kv_last_error());
    CHECK(kv_eval_begin(e, 1, tokens + N, N, FROM) == KV_E_ARG, "a chunk counts twice");
    CHECK(kv_eval_scored(e) == 2 * SCORED, "%d scored", kv_eval_scored(e));
    const float *exact = kv_eval_values(e, 0, 0), *half = kv_eval_values(e, 1, 0), *four = kv_eval_values(e, 2, 0), *pos = kv_eval_values(e, 0, 5), *ch = kv_eval_values(e, 0, 6);
    if (!exact || !half || !four) { CHECK(0, "no values: %s", kv_last_error()); goto done; }
    double nonzero = 0, sum_half = 0, sum_four = 0;
    for (int i = 0; i < 2 * SCORED; i++) {
        nonzero += exact[i] != 0;
        sum_half += half[i];
        sum_four += four[i];
        CHECK(pos[i] == (float)(FROM + i % SCORED) && ch[i] == (float)(i / SCORED), "value %d: position %g of chunk %g", i, (double)pos[i], (double)ch[i]);
    }
    CHECK(nonzero == 0, "mode %d: an exact f32 arm differs at %g positions", mode, nonzero);
    CHECK(sum_half > 0 && sum_half < 1e-3 * sum_four, "mode %d: f16 %g, 4 bits %g", mode, sum_half / (2 * SCORED), sum_four / (2 * SCORED));
    printf("%s, %s: mean kld f16 %.3g, int 4 %.3g\n", info.name, mode ? "stream" : "visibility", sum_half / (2 * SCORED), sum_four / (2 * SCORED));

    kv_pairs pairs;
    kv_bytes bytes, bytes_half;
    CHECK(kv_eval_pairs(e, 2, &pairs) == KV_OK && pairs.total > 0 && pairs.compressed > 0, "pairs %g of %g", pairs.compressed, pairs.total);
    CHECK(kv_eval_bytes(e, 2, &bytes) == KV_OK && kv_eval_bytes(e, 1, &bytes_half) == KV_OK && bytes.total > 0 && bytes.total < bytes_half.total, "bytes %g and %g", bytes.total, bytes_half.total);

    /* later groups meet the stored reference: same scores, another text refused */
    float *before = kv_alloc_array(2 * SCORED, sizeof *before, false);
    memcpy(before, four, 2 * SCORED * sizeof *before);
    CHECK(kv_eval_arms(e, 1, plans + 2) == KV_OK && kv_eval_begin(e, 0, tokens + 1, N, FROM) == KV_E_ARG, "another text under chunk 0 is accepted");
    CHECK(kv_eval_begin(e, 0, tokens, N, FROM + 1) == KV_E_ARG, "another score_from under chunk 0 is accepted");
    CHECK(run_chunk(e, 0, tokens, N, FROM) == KV_OK && run_chunk(e, 1, tokens + N, N, FROM) == KV_OK, "%s", kv_last_error());
    CHECK(kv_eval_values(e, 0, 0) && memcmp(before, kv_eval_values(e, 0, 0), 2 * SCORED * sizeof *before) == 0, "an arm alone, against the stored reference, scores otherwise");
    kv_free(before);
done:
    kv_eval_free(e);
    for (int i = 0; i < 3; i++) kv_plan_free(plans[i]);
    kv_model_free(m);
}

int main(void)
{
    closed_form(7, 5, 0);
    closed_form(300, 1000, 0);
    closed_form(257, 4099, 0);
    closed_form(40, 777, 30);
    same_bits();
    hostile();
    direct_formulas();
    edges();
    coverage();
    char path[2048];
    if (model_path(path, sizeof path, "smollm2-135m.gguf")) {
        whole(path, KV_EVAL_VISIBILITY);
        whole(path, KV_EVAL_STREAM);
    } else SKIP("smollm2-135m.gguf is in neither KELVIN_MODELS nor the cache folder: no whole evaluation");
    return check_end();
}
