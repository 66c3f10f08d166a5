/* attend.c -- one new token: append its keys and values, attend in the codecs' own spaces.
 *
 * No prefix is ever decoded.  Two parallel regions a layer: K/V heads append and prepare their queries; then tasks of about
 * SPAN positions of one head score its keys, take exponentials below the span's own maximum and sum values:
 *
 *   span      0                      1               2
 *   position  | sinks | page 0 .. 7  | page 8 .. 15  | 16 .. 18, tail |
 *             exact    codes                          exact rows, through f32 in tiles of TILE_ROWS
 *
 * Keys and values of a head may differ in how far they are encoded, so a span's scores are one row a query and each side
 * walks it in its own pieces.  The caller then merges a head's spans in order: the result does not depend on threads. */
#include <math.h>
#include "cache_impl.h"

enum { SPAN = 512 /* of a codec's fixed-point sums (CPU.md); 27 tasks at 4096 tokens and 3 heads */, TILE_ROWS = 64 };

typedef struct span_info { int used, exact, coded; } span_info;

struct kv_work {
    int        n_threads, span, max_spans;
    size_t     rows_floats, score_floats, query_floats, thread_floats, part_floats, exact_at, coded_at, prepared_bytes;
    float     *thread;                /* [n_threads][rows | rows | scores | queries] */
    float     *part;                  /* [n_kv_heads][max_spans][max | sum | mean's share | exact acc | coded acc] */
    span_info *info;                  /* [n_kv_heads][max_spans] */
    uint8_t   *prepared;              /* [n_kv_heads] queries of slots that are not page-relative */
};

typedef struct token_job {
    kv_cache    *c;
    int          layer, pos, n_spans, origin;     /* span s > 0 starts at origin + s * span */
    const float *q, *k, *v;
    float        scale, softcap, *out;
} token_job;

void kv_work_free(kv_work *w)
{
    if (!w) return;
    kv_free(w->thread);
    kv_free(w->part);
    kv_free(w->info);
    kv_free(w->prepared);
    kv_free(w);
}

static int reserve_work(kv_cache *c)
{
    if (c->work && c->work->n_threads >= kv_threads()) return KV_OK;
    kv_work_free(c->work);
    kv_work *w = c->work = kv_zalloc(sizeof *w);
    if (!w) return KV_E_NOMEM;
    const size_t d = (size_t)c->geo.head_dim, group = (size_t)c->group, pt = (size_t)c->plan->page_tokens;
    size_t query_bytes = 0, space = 0;
    for (size_t i = 0; i < (size_t)c->geo.n_layers * (size_t)c->geo.n_kv_heads * 2; i++) {
        const kv_codec *codec = c->plan->slot[i].codec;
        if (!kv_codec_fused(codec)) continue;
        if (codec->query_bytes > query_bytes) query_bytes = codec->query_bytes;
        if ((size_t)codec->space_dim > space) space = (size_t)codec->space_dim;
    }
    w->span = (int)kv_round_up(SPAN, pt);
    w->max_spans = c->max_tokens / w->span + 1;
    w->rows_floats = kv_round_up((pt > TILE_ROWS ? pt : TILE_ROWS) * d, 16);
    w->score_floats = kv_round_up(group * 2 * (size_t)w->span, 16);
    w->prepared_bytes = kv_round_up(group * query_bytes, 64);
    w->query_floats = kv_round_up(group * d, 16) + w->prepared_bytes / sizeof(float);
    w->thread_floats = 2 * w->rows_floats + w->score_floats + w->query_floats;
    w->thread_floats += kv_round_up(group * d, 16) + kv_round_up(group * space, 16);      /* merging */
    w->exact_at = kv_round_up(3 * group, 16);
    w->coded_at = w->exact_at + kv_round_up(group * d, 16);
    w->part_floats = kv_round_up(w->coded_at + group * space, 16);
    const size_t n_parts = (size_t)c->geo.n_kv_heads * (size_t)w->max_spans, n_threads = (size_t)kv_threads();
    w->thread = kv_alloc_array(n_threads, sizeof(float) * w->thread_floats, false);
    w->part = kv_alloc_array(n_parts, sizeof(float) * w->part_floats, false);
    w->info = kv_alloc_array(n_parts, sizeof *w->info, false);
    w->prepared = kv_alloc_array((size_t)c->geo.n_kv_heads, w->prepared_bytes, false);
    if (!w->thread || !w->part || !w->info || !w->prepared) {
        kv_work_free(w);
        c->work = NULL;
        return KV_E_NOMEM;
    }
    w->n_threads = (int)n_threads;
    return KV_OK;
}

static int fused(const kv_cache *c, const kv_slot *slot) { return c->path == KV_PATH_FUSED && kv_codec_fused(slot->codec); }
static int page_relative(const kv_cache *c, int layer, const kv_slot *slot) { return slot->page_rope && c->turn[layer] != NULL; }

/* ---- append */

static void append_row(kv_cache *c, int layer, int head, int side, const float *x, float *rows, float *scratch)
{
    kv_store *st = kv_cache_store(c, layer, head, side);
    const kv_codec *codec = kv_plan_slot(c->plan, layer, head, side)->codec;
    const int d = c->geo.head_dim, sink = c->plan->sink[layer], pos = c->n_tokens, dtype = c->plan->exact_dtype[layer];
    const int encoded = kv_encoded_at(c, layer, st, codec, (int64_t)pos + 1), from = sink + st->n_encoded, to = sink + encoded;
    if (encoded > st->n_encoded) {
        kv_store_load_exact(c, layer, st, from, kv_min(to, pos), rows);
        if (to > pos) kv_vec_round(dtype, x, rows + (size_t)(pos - from) * (size_t)d, d);
        kv_store_encode(c, layer, head, side, st->n_encoded, encoded, rows, scratch);
        st->n_encoded = encoded;
    }
    if (pos >= to || pos < sink) {
        kv_vec_round(dtype, x, rows, d);
        kv_store_save_exact(c, layer, st, pos, pos + 1, rows);
    }
}

static void append_head(void *ctx, int head, int thread)
{
    const token_job *job = ctx;
    kv_cache *c = job->c;
    const kv_work *w = c->work;
    const size_t d = (size_t)c->geo.head_dim, group = (size_t)c->group;
    float *rows = w->thread + (size_t)thread * w->thread_floats, *scratch = rows + w->rows_floats;
    append_row(c, job->layer, head, KV_SIDE_K, job->k + (size_t)head * d, rows, scratch);
    append_row(c, job->layer, head, KV_SIDE_V, job->v + (size_t)head * d, rows, scratch);
    const kv_slot *slot = kv_plan_slot(c->plan, job->layer, head, KV_SIDE_K);
    if (fused(c, slot) && !page_relative(c, job->layer, slot))
        slot->codec->ops->query(slot->codec, job->q + (size_t)head * group * d, (int64_t)d, c->group, w->prepared + (size_t)head * w->prepared_bytes);
}

/* ---- one span of one head */

/* scores[i*ld + p - p0] of the pages' keys from p0 = sink + u0 on; page-relative slots turn the query for each page. */
static void score_pages(const token_job *job, int head, int u0, int u1, const float *q, float *scores, int64_t ld, float *scratch, float *queries)
{
    kv_cache *c = job->c;
    const kv_work *w = c->work;
    const kv_slot *slot = kv_plan_slot(c->plan, job->layer, head, KV_SIDE_K);
    const kv_store *st = kv_cache_store(c, job->layer, head, KV_SIDE_K);
    const kv_codec *codec = slot->codec;
    const int d = c->geo.head_dim, pt = c->plan->page_tokens, on_codes = fused(c, slot), turned = page_relative(c, job->layer, slot);
    const float *qp = q;
    const void *prepared = w->prepared + (size_t)head * w->prepared_bytes;
    uint8_t *own = (uint8_t *)(queries + kv_round_up((size_t)c->group * (size_t)d, 16));
    float bias[KV_MAX_GROUP] = { 0 };
    for (int u = u0; u < u1; u += pt) {
        const int n = kv_min(pt, u1 - u);
        const uint8_t *page = st->page[u / pt];
        float *s = scores + (u - u0);
        if (turned) {
            memcpy(queries, q, sizeof(float) * (size_t)c->group * (size_t)d);
            kv_turn_rows(c->turn[job->layer], u / pt, 0, queries, d, c->group);
            qp = queries;
            if (on_codes) {
                codec->ops->query(codec, qp, d, c->group, own);
                prepared = own;
            }
        }
        if (slot->mean && (turned || u == u0))
            for (int i = 0; i < c->group; i++) bias[i] = kv_vec_dot(qp + (size_t)i * (size_t)d, slot->mean, d);
        if (on_codes) codec->ops->dot(codec, page, n, prepared, c->group, s, ld);
        else kv_tile_dot(codec, page, n, qp, d, c->group, s, ld, scratch);
        for (int i = 0; slot->mean && i < c->group; i++)
            for (int t = 0; t < n; t++) s[i * ld + t] += bias[i];
    }
}

static void attend_span(void *ctx, int task, int thread)
{
    const token_job *job = ctx;
    kv_cache *c = job->c;
    const kv_work *w = c->work;
    const int head = task % c->geo.n_kv_heads, span = task / c->geo.n_kv_heads, group = c->group, d = c->geo.head_dim;
    const int sink = c->plan->sink[job->layer], pt = c->plan->page_tokens, lo = kv_first_seen(c, job->layer, job->pos);
    const int a = span ? job->origin + span * w->span : 0, b = kv_min(job->pos + 1, job->origin + (span + 1) * w->span);
    const int64_t ld = 2 * (int64_t)w->span;
    float *rows = w->thread + (size_t)thread * w->thread_floats, *scores = rows + 2 * w->rows_floats, *queries = scores + w->score_floats;
    float *part = w->part + ((size_t)head * (size_t)w->max_spans + (size_t)span) * w->part_floats;
    float *top = part, *sum = top + group, *share = sum + group, *exact = part + w->exact_at, *coded = part + w->coded_at;
    span_info *info = &w->info[(size_t)head * (size_t)w->max_spans + (size_t)span];
    *info = (span_info){ .used = b > lo };
    if (b <= lo) return;

    const float *q = job->q + (size_t)head * (size_t)group * (size_t)d;
    const int seen = kv_max(a, lo), first_page = sink + kv_max(0, kv_max(a, lo) - sink) / pt * pt;   /* where the first seen page starts */
    const kv_store *ks = kv_cache_store(c, job->layer, head, KV_SIDE_K), *vs = kv_cache_store(c, job->layer, head, KV_SIDE_V);
    for (int side = 0; side < 2; side++) {
        const kv_store *st = side == KV_SIDE_K ? ks : vs;
        const kv_slot *slot = kv_plan_slot(c->plan, job->layer, head, side);
        const int on_codes = side == KV_SIDE_V && fused(c, slot), end = sink + st->n_encoded;
        const int piece[2][2] = { { seen, kv_min(b, sink) }, { kv_max(seen, end), b } };          /* sinks, tail */
        const int p0 = kv_max(first_page, a), p1 = kv_min(b, end);                                /* pages */
        if (side == KV_SIDE_V) {
            info->exact = !on_codes || piece[0][0] < piece[0][1] || piece[1][0] < piece[1][1];
            info->coded = on_codes && p0 < p1;
            if (info->exact) memset(exact, 0, sizeof(float) * (size_t)group * (size_t)d);
            if (info->coded) memset(coded, 0, sizeof(float) * (size_t)group * (size_t)slot->codec->space_dim);
        }
        for (int i = 0; i < 2; i++)
            for (int p = piece[i][0]; p < piece[i][1]; p += TILE_ROWS) {
                const int n = kv_min(TILE_ROWS, piece[i][1] - p);
                kv_store_load_exact(c, job->layer, st, p, p + n, rows);
                if (side == KV_SIDE_K) kv_vec_rows_dot(q, group, rows, n, d, scores + (p - a), ld);
                else kv_vec_rows_accumulate(scores + (p - a), ld, group, rows, n, d, exact);
            }
        if (side == KV_SIDE_K) {
            if (p0 < p1) score_pages(job, head, p0 - sink, p1 - sink, q, scores + (p0 - a), ld, rows, queries);
            for (int i = 0; i < group; i++) {
                float *s = scores + i * ld;
                for (int p = a; p < seen; p++) s[p - a] = 0;       /* weights of what the window has passed, in a seen page */
                kv_vec_scale_cap(s + (seen - a), b - seen, job->scale, job->softcap);
                top[i] = kv_vec_max(s + (seen - a), b - seen);
                sum[i] = kv_vec_exp_sum(s + (seen - a), b - seen, top[i]);
            }
            continue;
        }
        for (int p = p0; p < p1; p += pt) {
            const uint8_t *page = st->page[(p - sink) / pt];
            const int n = kv_min(pt, p1 - p);
            if (on_codes) slot->codec->ops->accumulate(slot->codec, page, n, scores + (p - a), ld, group, coded);
            else kv_tile_accumulate(slot->codec, page, n, scores + (p - a), ld, group, exact, rows);
        }
        for (int i = 0; i < group; i++) share[i] = slot->mean && p0 < p1 ? kv_vec_sum(scores + i * ld + (p0 - a), p1 - p0) : 0;
    }
}

/* ---- a head's spans into its outputs */

static void merge_head(const token_job *job, int head)
{
    const kv_cache *c = job->c;
    const kv_work *w = c->work;
    const kv_slot *slot = kv_plan_slot(c->plan, job->layer, head, KV_SIDE_V);
    const int d = c->geo.head_dim, group = c->group, space = slot->codec->space_dim;
    const span_info *info = w->info + (size_t)head * (size_t)w->max_spans;
    float *out = job->out + (size_t)head * (size_t)group * (size_t)d, *exact = w->thread, *coded = exact + kv_round_up((size_t)group * (size_t)d, 16);
    int any_coded = 0;
    float total[KV_MAX_GROUP], share[KV_MAX_GROUP];
    for (int s = 0; s < job->n_spans; s++) any_coded |= info[s].used && info[s].coded;
    memset(exact, 0, sizeof(float) * (size_t)group * (size_t)d);
    if (any_coded) memset(coded, 0, sizeof(float) * (size_t)group * (size_t)space);
    for (int i = 0; i < group; i++) {
        float best = -INFINITY;
        total[i] = share[i] = 0;
        for (int s = 0; s < job->n_spans; s++)
            if (info[s].used) best = fmaxf(best, w->part[((size_t)head * (size_t)w->max_spans + (size_t)s) * w->part_floats + (size_t)i]);
        for (int s = 0; s < job->n_spans; s++) {
            if (!info[s].used) continue;
            const float *part = w->part + ((size_t)head * (size_t)w->max_spans + (size_t)s) * w->part_floats;
            const float weight = part[i] == best ? 1.0f : expf(part[i] - best);
            total[i] += weight * part[group + i];
            share[i] += weight * part[2 * group + i];
            if (info[s].exact) kv_vec_axpy(weight, part + w->exact_at + (size_t)(i * d), exact + i * d, d);
            if (info[s].coded) kv_vec_axpy(weight, part + w->coded_at + (size_t)(i * space), coded + i * space, space);
        }
    }
    if (any_coded) slot->codec->ops->output(slot->codec, coded, group, out, d);
    for (int i = 0; i < group; i++) {
        float *o = out + (size_t)i * (size_t)d;
        if (any_coded) kv_vec_axpy(1.0f, exact + i * d, o, d);
        else memcpy(o, exact + i * d, sizeof(float) * (size_t)d);
        if (slot->mean) kv_vec_axpy(share[i], slot->mean, o, d);
        kv_vec_scale(1.0f / total[i], o, d);
    }
}

int kv_attend_token(kv_cache *c, int layer, const float *q, const float *k, const float *v, float scale, float softcap, float *out)
{
    FORWARD_IF_ERROR(reserve_work(c));
    const kv_work *w = c->work;
    token_job job = { .c = c, .layer = layer, .pos = c->n_tokens, .origin = c->plan->sink[layer] % w->span, .q = q, .k = k, .v = v, .scale = scale, .softcap = softcap, .out = out };
    const int past = job.pos + 1 - job.origin;
    job.n_spans = past <= w->span ? 1 : (past + w->span - 1) / w->span;
    kv_parallel(c->geo.n_kv_heads, append_head, &job);
    kv_parallel(c->geo.n_kv_heads * job.n_spans, attend_span, &job);
    for (int h = 0; h < c->geo.n_kv_heads; h++) merge_head(&job, h);
    kv_cache_describe(c, 1);
    return KV_OK;
}
