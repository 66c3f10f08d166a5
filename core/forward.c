/* forward.c -- tokens through all layers, several sequences in lockstep.
 *
 * All lanes get the same tokens at the same positions and differ only in their caches, so every weight is read (and
 * dequantized) once for all of them.  One call does one layer.  n = 1 is the decode step: quantized weights times 16-bit
 * fixed-point activations; n > 1 dequantizes blocks of rows and multiplies in f32. */
#include <math.h>
#include "model.h"
#include "ops.h"

enum { ROWS_PER_TASK = 64 /* of a decode product: some 25 us of work, and enough tasks to balance */ };

typedef struct lane { float *x, *h, *q, *k, *v, *att, *gate, *up, *q_pre, *k_pre; kv_act act; } lane;

struct kv_forward {
    kv_model *m;
    int       n_lanes, max_n, n, layer, pos;
    lane     *lane;
    kv_cache **cache;
    const float **in;                  /* [n_lanes] scratch for kv_linear */
    float   **out;                     /* [KV_MAX_PRODUCTS][n_lanes] */
    float    *cosine, *sine;           /* [2][max_n][n_rot/2]: tables of the two RoPE bases */
    const double *table_freq[2];
    kv_tap_fn tap;
    void     *tap_ctx;
};

static void free_lane(lane *l)
{
    float *const buffers[] = { l->x, l->h, l->q, l->k, l->v, l->att, l->gate, l->up, l->q_pre, l->k_pre };
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) kv_free(buffers[i]);
    kv_act_free(&l->act);
}

static int alloc_lane(lane *l, const kv_model_info *s, int n)
{
    const size_t e = (size_t)s->n_embd, q = (size_t)s->n_heads * s->head_dim, k = (size_t)s->n_kv_heads * s->head_dim, ff = (size_t)s->n_ff;
    const struct { float **p; size_t width; } want[] = { { &l->x, e }, { &l->h, e }, { &l->q, q }, { &l->k, k }, { &l->v, k }, { &l->att, q }, { &l->gate, ff }, { &l->up, ff } };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        size_t count;
        RETURN_ERROR_IF(!kv_mul(want[i].width, (size_t)n, &count), KV_E_NOMEM, "forward: %d tokens of %zu values overflow", n, want[i].width);
        if (!(*want[i].p = kv_alloc_array(count, sizeof(float), false))) return KV_E_NOMEM;
    }
    size_t widest = e > q ? e : q;
    if (ff > widest) widest = ff;
    return kv_act_reserve(&l->act, (int64_t)widest);
}

int kv_forward_new(kv_forward **out, kv_model *m, int n_lanes, int max_n)
{
    RETURN_ERROR_IF(!out || !m, KV_E_ARG, "kv_forward_new: NULL argument");
    RETURN_ERROR_IF(n_lanes < 1 || n_lanes > 256, KV_E_ARG, "forward: %d lanes is outside 1..256", n_lanes);
    RETURN_ERROR_IF(max_n < 1 || max_n > 1 << 16, KV_E_ARG, "forward: %d tokens at once is outside 1..%d", max_n, 1 << 16);
    int status = KV_E_NOMEM;
    kv_forward *f = kv_zalloc(sizeof *f);
    if (!f) return KV_E_NOMEM;
    f->m = kv_model_ref(m);
    f->n_lanes = n_lanes;
    f->max_n = max_n;
    f->layer = -1;
    const size_t table = (size_t)max_n * (size_t)kv_max(m->info.n_rot / 2, 1);
    f->lane = kv_alloc_array((size_t)n_lanes, sizeof *f->lane, true);
    f->cache = kv_alloc_array((size_t)n_lanes, sizeof *f->cache, true);
    f->in = kv_alloc_array((size_t)n_lanes, sizeof *f->in, true);
    f->out = kv_alloc_array((size_t)n_lanes * KV_MAX_PRODUCTS, sizeof *f->out, true);
    f->cosine = kv_alloc_array(2 * table, sizeof(float), false);
    f->sine = kv_alloc_array(2 * table, sizeof(float), false);
    if (!f->lane || !f->cache || !f->in || !f->out || !f->cosine || !f->sine) goto fail;
    for (int i = 0; i < n_lanes; i++) FAIL_IF_ERROR(alloc_lane(&f->lane[i], &m->info, max_n));
    *out = f;
    return KV_OK;
fail:
    kv_forward_free(f);
    return status;
}

void kv_forward_free(kv_forward *f)
{
    if (!f) return;
    for (int i = 0; f->lane && i < f->n_lanes; i++) free_lane(&f->lane[i]);
    kv_free(f->lane);
    kv_free(f->cache);
    kv_free(f->in);
    kv_free(f->out);
    kv_free(f->cosine);
    kv_free(f->sine);
    kv_model_free(f->m);
    kv_free(f);
}

void kv_forward_tap(kv_forward *f, kv_tap_fn fn, void *ctx)
{
    f->tap = fn;
    f->tap_ctx = ctx;
}

/* ---- RoPE by table: the chunk's positions are the same for every head and lane */

static void fill_tables(kv_forward *f)
{
    const kv_geometry *g = &f->m->geo;
    const int half = f->m->info.n_rot / 2;
    f->table_freq[0] = f->table_freq[1] = NULL;
    for (int l = 0, used = 0; l < g->n_layers && used < 2; l++) {
        const double *freq = g->rope[l].freq;
        if (freq == f->table_freq[0] || freq == f->table_freq[1]) continue;
        f->table_freq[used] = freq;
        float *c = f->cosine + (size_t)used * f->max_n * half, *s = f->sine + (size_t)used * f->max_n * half;
        for (int t = 0; t < f->n; t++)
            for (int i = 0; i < half; i++) {
                const double angle = (f->pos + t) * freq[i];
                c[(size_t)t * half + i] = (float)cos(angle);
                s[(size_t)t * half + i] = (float)sin(angle);
            }
        used++;
    }
}

/* ---- row-parallel elementwise work */

typedef struct row_job { kv_forward *f; int what; const kv_layer *y; } row_job;
enum { ROW_ATTN_IN, ROW_QK, ROW_AFTER_ATTN, ROW_GATE, ROW_AFTER_FFN, ROW_FINAL };

static void rope_heads(const kv_forward *f, float *x, int n_heads, int t, const double *freq)
{
    const int half = f->m->info.n_rot / 2, d = f->m->info.head_dim, which = freq == f->table_freq[0] ? 0 : 1;
    const float *c = f->cosine + ((size_t)which * f->max_n + t) * half, *s = f->sine + ((size_t)which * f->max_n + t) * half;
    for (int h = 0; h < n_heads; h++, x += d)
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * c[i] - b * s[i];
            x[i + half] = a * s[i] + b * c[i];
        }
}

static void one_row(const row_job *j, lane *l, int t)
{
    const kv_forward *f = j->f;
    const kv_model *m = f->m;
    const kv_model_info *s = &m->info;
    const kv_layer *y = j->y;
    const int e = s->n_embd, d = s->head_dim;
    const float eps = (float)s->norm_eps;
    float *x = l->x + (size_t)t * e, *h = l->h + (size_t)t * e;
    switch (j->what) {
    case ROW_ATTN_IN: kv_rmsnorm(h, x, y->attn_norm, e, eps); break;
    case ROW_QK: {
        float *q = l->q + (size_t)t * s->n_heads * d, *k = l->k + (size_t)t * s->n_kv_heads * d;
        if (y->q_norm) for (int i = 0; i < s->n_heads; i++) kv_rmsnorm(q + (size_t)i * d, q + (size_t)i * d, y->q_norm, d, eps);
        if (y->k_norm) for (int i = 0; i < s->n_kv_heads; i++) kv_rmsnorm(k + (size_t)i * d, k + (size_t)i * d, y->k_norm, d, eps);
        if (f->tap) {
            memcpy(l->q_pre + (size_t)t * s->n_heads * d, q, sizeof(float) * (size_t)s->n_heads * d);
            memcpy(l->k_pre + (size_t)t * s->n_kv_heads * d, k, sizeof(float) * (size_t)s->n_kv_heads * d);
        }
        const double *freq = m->geo.rope[f->layer].freq;
        rope_heads(f, q, s->n_heads, t, freq);
        rope_heads(f, k, s->n_kv_heads, t, freq);
        break;
    }
    case ROW_AFTER_ATTN:                                     /* h holds Wo's output */
        if (y->post_attn_norm) kv_rmsnorm(h, h, y->post_attn_norm, e, eps);
        kv_add_to(x, h, e);
        kv_rmsnorm(h, x, y->ffn_norm, e, eps);
        break;
    case ROW_GATE: kv_gate(l->gate + (size_t)t * s->n_ff, l->up + (size_t)t * s->n_ff, s->n_ff, m->activation); break;
    case ROW_AFTER_FFN:                                      /* h holds W_down's output */
        if (y->post_ffn_norm) kv_rmsnorm(h, h, y->post_ffn_norm, e, eps);
        kv_add_to(x, h, e);
        break;
    case ROW_FINAL: kv_rmsnorm(h, x, m->out_norm, e, eps); break;
    }
}

enum { TOKENS_PER_TASK = 32 };

static void row_task(void *ctx, int task, int thread)
{
    (void)thread;
    const row_job *j = ctx;
    const int blocks = (j->f->n + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK;
    lane *l = &j->f->lane[task / blocks];
    const int t0 = task % blocks * TOKENS_PER_TASK, t1 = kv_min(t0 + TOKENS_PER_TASK, j->f->n);
    for (int t = t0; t < t1; t++) one_row(j, l, t);
}

static void rows(kv_forward *f, int what, const kv_layer *y)
{
    row_job j = { f, what, y };
    if (f->n == 1) for (int i = 0; i < f->n_lanes; i++) one_row(&j, &f->lane[i], 0);
    else kv_parallel(f->n_lanes * ((f->n + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK), row_task, &j);
}

/* ---- products */

typedef struct product { const kv_weight *w; const float *bias; size_t out; } product;    /* out: offset of the buffer in lane */
typedef struct decode_job { kv_forward *f; const product *p; int n_products, first_task[KV_MAX_PRODUCTS]; } decode_job;

static float *lane_buffer(lane *l, size_t offset) { return *(float **)(void *)((char *)l + offset); }

static void decode_task(void *ctx, int task, int thread)
{
    (void)thread;
    const decode_job *j = ctx;
    int i = 0;
    while (i + 1 < j->n_products && task >= j->first_task[i + 1]) i++;
    const product *p = &j->p[i];
    const int64_t r0 = (int64_t)(task - j->first_task[i]) * ROWS_PER_TASK, r1 = kv_min64(r0 + ROWS_PER_TASK, p->w->n_out);
    for (int l = 0; l < j->f->n_lanes; l++) {
        float *y = lane_buffer(&j->f->lane[l], p->out);
        kv_matvec(p->w, &j->f->lane[l].act, r0, r1, y);
        if (p->bias) for (int64_t r = r0; r < r1; r++) y[r] += p->bias[r];
    }
}

/* n_products weights times the same input: the buffer at offset `in` of every lane. */
static int multiply(kv_forward *f, const product *p, int n_products, size_t in)
{
    if (f->n > 1) {
        kv_product all[KV_MAX_PRODUCTS];
        for (int l = 0; l < f->n_lanes; l++) f->in[l] = lane_buffer(&f->lane[l], in);
        for (int i = 0; i < n_products; i++) {
            float **const y = f->out + (size_t)i * (size_t)f->n_lanes;
            for (int l = 0; l < f->n_lanes; l++) y[l] = lane_buffer(&f->lane[l], p[i].out);
            all[i] = (kv_product){ p[i].w, p[i].bias, y };
        }
        return kv_linear(all, n_products, f->n_lanes, f->n, f->in);
    }
    decode_job j = { .f = f, .p = p, .n_products = n_products };
    int n_tasks = 0;
    for (int i = 0; i < n_products; i++) {
        j.first_task[i] = n_tasks;
        n_tasks += (int)((p[i].w->n_out + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
    }
    for (int l = 0; l < f->n_lanes; l++) kv_act_set(&f->lane[l].act, lane_buffer(&f->lane[l], in), p->w->n_in);
    kv_parallel(n_tasks, decode_task, &j);
    return KV_OK;
}

/* ---- the steps */

int kv_forward_begin(kv_forward *f, kv_cache **caches, const int32_t *tokens, int n)
{
    RETURN_ERROR_IF(!f || !caches || !tokens, KV_E_ARG, "kv_forward_begin: NULL argument");
    RETURN_ERROR_IF(n < 1 || n > f->max_n, KV_E_ARG, "forward: %d tokens is outside 1..%d", n, f->max_n);
    const kv_model *m = f->m;
    for (int t = 0; t < n; t++)
        RETURN_ERROR_IF(tokens[t] < 0 || tokens[t] >= m->info.n_vocab, KV_E_ARG, "token %d at %d is outside 0..%d", tokens[t], t + 1, m->info.n_vocab - 1);
    f->pos = kv_cache_n_tokens(caches[0]);
    for (int l = 0; l < f->n_lanes; l++) {
        RETURN_ERROR_IF(kv_cache_n_tokens(caches[l]) != f->pos, KV_E_ARG, "lane %d is at token %d, lane 1 at %d", l + 1, kv_cache_n_tokens(caches[l]), f->pos);
        f->cache[l] = caches[l];
    }
    if (f->tap)
        for (int l = 0; l < f->n_lanes; l++) {
            const size_t d = (size_t)m->info.head_dim * (size_t)f->max_n;
            if (!f->lane[l].q_pre && !(f->lane[l].q_pre = kv_alloc_array(d * (size_t)m->info.n_heads, sizeof(float), false))) return KV_E_NOMEM;
            if (!f->lane[l].k_pre && !(f->lane[l].k_pre = kv_alloc_array(d * (size_t)m->info.n_kv_heads, sizeof(float), false))) return KV_E_NOMEM;
        }
    if (n == 1) kv_model_pack(f->m);
    f->n = n;
    f->layer = 0;
    fill_tables(f);
    float *x = f->lane[0].x;
    const size_t e = (size_t)m->info.n_embd;
    for (int t = 0; t < n; t++) kv_weight_rows(&m->embed, tokens[t], 1, x + (size_t)t * e);
    if (m->embed_scale != 1) for (size_t i = 0; i < e * (size_t)n; i++) x[i] *= m->embed_scale;
    for (int l = 1; l < f->n_lanes; l++) memcpy(f->lane[l].x, x, e * (size_t)n * sizeof(float));
    return KV_OK;
}

/* After a failure every cache is back where the step began. */
static int give_up(kv_forward *f, int status)
{
    char why[512];
    strncpy(why, kv_last_error(), sizeof why - 1);
    why[sizeof why - 1] = 0;
    for (int l = 0; l < f->n_lanes; l++) kv_cache_truncate(f->cache[l], f->pos);
    f->layer = -1;
    return kv_set_error(status, "%s", why);
}

static int one_layer(kv_forward *f)
{
    const kv_model *m = f->m;
    const kv_layer *y = &m->layer[f->layer];
    const product qkv[] = { { &y->wq, y->bq, offsetof(lane, q) }, { &y->wk, y->bk, offsetof(lane, k) }, { &y->wv, y->bv, offsetof(lane, v) } };
    const product out = { &y->wo, y->bo, offsetof(lane, h) }, ffn[] = { { &y->w_gate, y->b_gate, offsetof(lane, gate) }, { &y->w_up, y->b_up, offsetof(lane, up) } };
    const product down = { &y->w_down, y->b_down, offsetof(lane, h) };

    rows(f, ROW_ATTN_IN, y);
    FORWARD_IF_ERROR(multiply(f, qkv, 3, offsetof(lane, h)));
    rows(f, ROW_QK, y);
    for (int i = 0; i < f->n_lanes; i++) {
        const lane *l = &f->lane[i];
        if (f->tap) f->tap(f->tap_ctx, i, f->layer, f->n, l->q_pre, l->q, l->k_pre, l->k, l->v);
        FORWARD_IF_ERROR(kv_cache_attend(f->cache[i], f->layer, f->n, l->q, l->k, l->v, y->scale, y->softcap, l->att));
    }
    FORWARD_IF_ERROR(multiply(f, &out, 1, offsetof(lane, att)));
    rows(f, ROW_AFTER_ATTN, y);
    FORWARD_IF_ERROR(multiply(f, ffn, 2, offsetof(lane, h)));
    rows(f, ROW_GATE, y);
    FORWARD_IF_ERROR(multiply(f, &down, 1, offsetof(lane, gate)));
    rows(f, ROW_AFTER_FFN, y);
    return KV_OK;
}

int kv_forward_layer(kv_forward *f, int *more)
{
    RETURN_ERROR_IF(!f || !more, KV_E_ARG, "kv_forward_layer: NULL argument");
    RETURN_ERROR_IF(f->layer < 0, KV_E_ARG, "kv_forward_layer: no step was begun");
    const int status = one_layer(f);
    if (status < 0) return give_up(f, status);
    *more = ++f->layer < f->m->info.n_layers;
    if (*more) return KV_OK;
    rows(f, ROW_FINAL, NULL);
    f->layer = -1;
    for (int i = 0; i < f->n_lanes; i++) FORWARD_IF_ERROR(kv_cache_commit(f->cache[i], f->n));
    return KV_OK;
}

const float *kv_forward_hidden(const kv_forward *f, int i) { return f->lane[i].h; }

/* ---- logits */

typedef struct head_job { const kv_model *m; const kv_act *act; float *logits; } head_job;
enum { HEAD_ROWS = 256 };

static void head_task(void *ctx, int task, int thread)
{
    (void)thread;
    const head_job *j = ctx;
    const int64_t r0 = (int64_t)task * HEAD_ROWS;
    kv_matvec(&j->m->head, j->act, r0, kv_min64(r0 + HEAD_ROWS, j->m->head.n_out), j->logits);
}

int kv_logits(const kv_model *m, const float *hidden, int n, float *logits)
{
    RETURN_ERROR_IF(!m || !hidden || !logits || n < 1, KV_E_ARG, "kv_logits: NULL argument or n=%d", n);
    if (n == 1) {
        kv_act act = { 0 };
        FORWARD_IF_ERROR(kv_act_reserve(&act, m->info.n_embd));
        kv_act_set(&act, hidden, m->info.n_embd);
        head_job j = { m, &act, logits };
        kv_parallel((m->info.n_vocab + HEAD_ROWS - 1) / HEAD_ROWS, head_task, &j);
        kv_act_free(&act);
    } else {
        const kv_product p = { &m->head, NULL, &logits };
        FORWARD_IF_ERROR(kv_linear(&p, 1, 1, n, &hidden));
    }
    if (m->final_softcap > 0)
        for (size_t i = 0; i < (size_t)n * (size_t)m->info.n_vocab; i++) logits[i] = m->final_softcap * tanhf(logits[i] / m->final_softcap);
    return KV_OK;
}
