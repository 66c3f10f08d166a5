// runner.cu -- a model on the device: its weights and working memory, and the steps of core/forward.c over caches of sequences.
//
// A step of one token for all sequences of one cache (decode) is the same launches with the same addresses every time, because positions are read from the cache's
// lengths on the device.  It is captured once into a graph and replayed, until the cache says by its epoch that memory moved.
//
// Working memory grows to the largest call and stays.  Everything is asked for before the first launch of a step, and a failure later drops
// what the step appended: the caches are then as they were.
#include <stdlib.h>
#include <string.h>
#include "cache.cuh"
#include "kernels.cuh"
#include "runner.cuh"

using namespace kelvin;

enum {
    FFN_ROWS = 4096,                        // rows of the feed-forward buffers: longer chunks go through in pieces
    STAGE_BYTES = 64 << 20, DEQUANT_FLOATS = 32 << 20, LOGIT_FLOATS = 64 << 20,
    MAX_TABLES = 8, MAX_LANES = 256, N_GRAPHS = 8,
};

struct buffer { void *p; size_t bytes; };

struct graph { unsigned long long epoch, workspace; int with_sample, seen; cudaGraphExec_t exec; };

struct kv_backend_runner {
    kv_backend_model m;                     // layer and data pointers are not kept
    int              device, n_tables;
    int              bf16;                  // products of many rows in bf16: asked for, or random weights.  A file's own bf16 weights go through f32 otherwise
    cudaStream_t     stream;
    cudaEvent_t      start, end;
    dev_layer       *layer;                 // [n_layers], host
    dev_weight       embed, head;
    const float     *out_norm;
    double          *freq;                  // [n_tables][n_rot/2], device
    product_space    space;
    void           **owned;                 // weights and vectors
    size_t           n_owned, cap_owned;
    buffer           x, h, q, k, v, att, gate, up, q_pre, k_pre, cosine, sine, tokens, act, dequant;      // rows
    buffer           logits, logits2, scores, targets, weights, next, out, step, sampler, bad;
    unsigned long long workspace;           // changes when a buffer moves: captured graphs have its address
    graph            graphs[N_GRAPHS];
    int              n_lanes, n;            // of the last feed
    int              tap_layer, tapping;
    float           *tap[5];                // host: q, q_pre, k, k_pre, v
};

// ---- memory

static int own(kv_backend_runner *r, void **p, size_t bytes, char *err, size_t cap)
{
    if (r->n_owned == r->cap_owned) {
        const size_t n = r->cap_owned ? 2 * r->cap_owned : 256;
        void **grown = (void **)realloc(r->owned, n * sizeof *grown);
        if (!grown) return snprintf(err, cap, "runner: out of memory"), E_NOMEM;
        r->owned = grown;
        r->cap_owned = n;
    }
    const int status = say(cudaMalloc(p, bytes ? bytes : 1), "runner: weights", err, cap);
    if (status == 0) r->owned[r->n_owned++] = *p;
    return status;
}

static int reserve(kv_backend_runner *r, buffer *b, size_t bytes, char *err, size_t cap)
{
    if (bytes <= b->bytes) return 0;
    void *p = nullptr;
    if (b->p) {                             // the old one goes first: both may not fit
        cudaStreamSynchronize(r->stream);
        cudaFree(b->p);
        *b = {};
    }
    r->workspace++;
    const int status = say(cudaMalloc(&p, bytes), "runner: working memory", err, cap);
    if (status < 0) return status;
    *b = { p, bytes };
    return 0;
}

template <class T> static T *at(const buffer &b) { return (T *)b.p; }

// ---- weights

static int put_vector(kv_backend_runner *r, const float **dst, const float *src, size_t n, char *err, size_t cap)
{
    *dst = nullptr;
    if (!src) return 0;
    void *p;
    int status = own(r, &p, n * sizeof(float), err, cap);
    if (status == 0) status = say(cudaMemcpy(p, src, n * sizeof(float), cudaMemcpyHostToDevice), "runner: vectors", err, cap);
    *dst = (const float *)p;
    return status;
}

enum { TYPE_BF16 = 30 };

static int put_weight(kv_backend_runner *r, dev_weight *out, const kv_backend_weight &w, int mode, uint8_t *stage, unsigned seed, char *err, size_t cap)
{
    if (w.n_in < 4 || w.n_in % 4 || w.n_in > 1 << 24 || w.n_out < 1 || w.n_out > 1 << 28)
        return snprintf(err, cap, "runner: weights of %lld x %lld: n_in is not a multiple of 4 in 4..2^24, or n_out not in 1..2^28", (long long)w.n_out, (long long)w.n_in), E_UNSUPPORTED;
    *out = {};
    out->n_in = (int)w.n_in;
    out->n_out = (int)w.n_out;
    const size_t n_values = (size_t)w.n_in * (size_t)w.n_out;
    void *p = nullptr;
    int status;
    if (!w.data) {
        out->type = TYPE_BF16;
        r->bf16 = 1;
        if ((status = own(r, &p, n_values * 2, err, cap)) < 0) return status;
        if ((status = say(weight_random((uint16_t *)p, out->n_in, out->n_out, seed, r->stream), "runner: random weights", err, cap)) < 0) return status;
        out->payload = out->head = (const uint8_t *)p;
        out->payload_row = (size_t)w.n_in * 2;
        return 0;
    }
    out->type = w.type;
    if (mode == KV_WEIGHTS_BF16) r->bf16 = 1;
    const size_t bytes = weight_stored_bytes(w.type, w.n_in, w.n_out, &out->payload_row, &out->head_row);
    if (!bytes) return snprintf(err, cap, "runner: weights of type %d with rows of %lld are not known on a device", w.type, (long long)w.n_in), E_UNSUPPORTED;
    if (out->payload_row + out->head_row > w.row_bytes || w.row_bytes > STAGE_BYTES) return snprintf(err, cap, "runner: weight rows of %zu bytes, %zu are needed", w.row_bytes, out->payload_row + out->head_row), E_ARG;
    const bool convert = mode == KV_WEIGHTS_BF16 && w.type != TYPE_BF16;
    uint8_t *to = stage + STAGE_BYTES;      // converted weights pass through the second half of the stage
    if (!convert) {
        if ((status = own(r, &p, bytes, err, cap)) < 0) return status;
        to = (uint8_t *)p;
    } else if ((status = own(r, &p, n_values * 2, err, cap)) < 0) return status;
    const int slice = (int)(STAGE_BYTES / w.row_bytes);
    for (int64_t row0 = 0; row0 < w.n_out; row0 += slice) {
        const int n = (int)(w.n_out - row0 < slice ? w.n_out - row0 : slice);
        const size_t rows = convert ? (size_t)n : (size_t)w.n_out;
        out->payload = to;
        out->head = to + rows * out->payload_row;
        status = say(cudaMemcpyAsync(stage, (const uint8_t *)w.data + (size_t)row0 * w.row_bytes, (size_t)n * w.row_bytes, cudaMemcpyHostToDevice, r->stream), "runner: upload", err, cap);
        if (status == 0) status = say(weight_peel(*out, stage, w.row_bytes, convert ? 0 : (int)row0, n, r->stream), "runner: weights", err, cap);
        if (status == 0 && convert) status = say(weight_to_bf16(*out, 0, n, (uint16_t *)p + (size_t)row0 * w.n_in, r->stream), "runner: weights", err, cap);
        if (status == 0) status = say(cudaStreamSynchronize(r->stream), "runner: upload", err, cap);
        if (status < 0) return status;
    }
    if (convert) {
        out->type = TYPE_BF16;
        out->payload = out->head = (const uint8_t *)p;
        out->payload_row = (size_t)w.n_in * 2;
        out->head_row = 0;
    }
    return 0;
}

static int put_layer(kv_backend_runner *r, dev_layer *y, const kv_backend_layer &s, int mode, uint8_t *stage, unsigned seed, char *err, size_t cap)
{
    const size_t e = r->m.n_embd, d = r->m.head_dim, q = d * r->m.n_heads, k = d * r->m.n_kv_heads, ff = r->m.n_ff;
    const struct { dev_weight *to; const kv_backend_weight *from; size_t in, out; } weights[] = {
        { &y->wq, &s.wq, e, q }, { &y->wk, &s.wk, e, k }, { &y->wv, &s.wv, e, k }, { &y->wo, &s.wo, q, e },
        { &y->w_gate, &s.w_gate, e, ff }, { &y->w_up, &s.w_up, e, ff }, { &y->w_down, &s.w_down, ff, e },
    };
    const struct { const float **to, *from; size_t n; } vectors[] = {
        { &y->bq, s.bq, q }, { &y->bk, s.bk, k }, { &y->bv, s.bv, k }, { &y->bo, s.bo, e }, { &y->b_gate, s.b_gate, ff }, { &y->b_up, s.b_up, ff }, { &y->b_down, s.b_down, e },
        { &y->attn_norm, s.attn_norm, e }, { &y->ffn_norm, s.ffn_norm, e }, { &y->q_norm, s.q_norm, d }, { &y->k_norm, s.k_norm, d },
        { &y->post_attn_norm, s.post_attn_norm, e }, { &y->post_ffn_norm, s.post_ffn_norm, e },
    };
    int i = 0;
    for (const auto &w : weights) {
        if ((size_t)w.from->n_in != w.in || (size_t)w.from->n_out != w.out)
            return snprintf(err, cap, "runner: a weight is %lld x %lld, %zu x %zu is needed", (long long)w.from->n_out, (long long)w.from->n_in, w.out, w.in), E_ARG;
        const int status = put_weight(r, w.to, *w.from, mode, stage, seed + i++, err, cap);
        if (status < 0) return status;
    }
    for (const auto &v : vectors) {
        const int status = put_vector(r, v.to, v.from, v.n, err, cap);
        if (status < 0) return status;
    }
    if (!y->attn_norm || !y->ffn_norm) return snprintf(err, cap, "runner: a layer has no norms"), E_ARG;
    y->scale = s.scale;
    y->softcap = s.softcap;
    return 0;
}

// Layers share their tables of frequencies.
static int put_tables(kv_backend_runner *r, const kv_backend_layer *layer, char *err, size_t cap)
{
    const size_t half = (size_t)r->m.n_rot / 2, bytes = half * sizeof(double);
    const double *known[MAX_TABLES];
    for (int l = 0; l < r->m.n_layers; l++) {
        int t = 0;
        if (half == 0) continue;
        if (!layer[l].freq) return snprintf(err, cap, "runner: layer %d has no RoPE frequencies", l), E_ARG;
        while (t < r->n_tables && memcmp(known[t], layer[l].freq, bytes)) t++;
        if (t == MAX_TABLES) return snprintf(err, cap, "runner: more than %d different RoPE tables", MAX_TABLES), E_UNSUPPORTED;
        if (t == r->n_tables) known[r->n_tables++] = layer[l].freq;
        r->layer[l].table = t;
    }
    if (half == 0) return 0;
    void *p;
    int status = own(r, &p, r->n_tables * bytes, err, cap);
    r->freq = (double *)p;
    for (int t = 0; status == 0 && t < r->n_tables; t++) status = say(cudaMemcpy((char *)p + t * bytes, known[t], bytes, cudaMemcpyHostToDevice), "runner: RoPE", err, cap);
    return status;
}

static void drop_graphs(kv_backend_runner *r)
{
    for (graph &g : r->graphs) if (g.exec) cudaGraphExecDestroy(g.exec);
    memset(r->graphs, 0, sizeof r->graphs);
}

static void runner_free(kv_backend_runner *r)
{
    if (!r) return;
    cudaSetDevice(r->device);
    if (r->stream) cudaStreamSynchronize(r->stream);
    drop_graphs(r);
    buffer *const all[] = { &r->x, &r->h, &r->q, &r->k, &r->v, &r->att, &r->gate, &r->up, &r->q_pre, &r->k_pre, &r->cosine, &r->sine, &r->tokens, &r->act, &r->dequant,
                            &r->logits, &r->logits2, &r->scores, &r->targets, &r->weights, &r->next, &r->out, &r->step, &r->sampler, &r->bad };
    for (buffer *b : all) if (b->p) cudaFree(b->p);
    for (size_t i = 0; i < r->n_owned; i++) cudaFree(r->owned[i]);
    blas_close(r->space.blas);
    if (r->start) cudaEventDestroy(r->start);
    if (r->end) cudaEventDestroy(r->end);
    if (r->stream) cudaStreamDestroy(r->stream);
    free(r->owned);
    free(r->layer);
    free(r);
}

static int fill_runner(kv_backend_runner *r, const kv_backend_model *m, int mode, char *err, size_t cap)
{
    void *stage = nullptr;
    int status = say(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking), "runner: stream", err, cap);
    if (status == 0) status = say(cudaEventCreate(&r->start), "runner: event", err, cap);
    if (status == 0) status = say(cudaEventCreate(&r->end), "runner: event", err, cap);
    if (status == 0) status = blas_open(&r->space.blas, r->stream, err, cap);
    if (status == 0) status = say(cudaMalloc(&stage, 2 * (size_t)STAGE_BYTES), "runner: staging", err, cap);
    for (int l = 0; status == 0 && l < m->n_layers; l++) status = put_layer(r, &r->layer[l], m->layer[l], mode, (uint8_t *)stage, 16 * (unsigned)l + 16, err, cap);
    if (status == 0) status = put_weight(r, &r->embed, m->embed, mode, (uint8_t *)stage, 1, err, cap);
    if (status == 0 && m->head.data && m->head.data == m->embed.data) r->head = r->embed;
    else if (status == 0) status = put_weight(r, &r->head, m->head, mode, (uint8_t *)stage, 2, err, cap);
    if (status == 0) status = put_vector(r, &r->out_norm, m->out_norm, (size_t)m->n_embd, err, cap);
    if (status == 0 && !r->out_norm) status = (snprintf(err, cap, "runner: the model has no final norm"), E_ARG);
    if (status == 0) status = put_tables(r, m->layer, err, cap);
    if (status == 0) status = reserve(r, &r->bad, sizeof(int), err, cap);
    if (status == 0) status = reserve(r, &r->sampler, sizeof(dev_sampler), err, cap);
    if (status == 0) status = say(cudaStreamSynchronize(r->stream), "runner: weights", err, cap);
    if (stage) cudaFree(stage);
    return status;
}

static int runner_new(int device, const kv_backend_model *m, int weights, kv_backend_runner **out, char *err, size_t cap)
{
    *out = nullptr;
    if (!m || !m->layer || m->n_layers < 1 || m->n_heads < 1 || m->n_kv_heads < 1 || m->head_dim < 1 || m->n_embd < 4 || m->n_ff < 4 || m->n_vocab < 1 || m->n_rot < 0 || m->n_rot > m->head_dim || m->n_rot % 2)
        return snprintf(err, cap, "runner: the model's shape is not one"), E_ARG;
    if (weights != KV_WEIGHTS_STORED && weights != KV_WEIGHTS_BF16) return snprintf(err, cap, "runner: weights=%d is neither stored (0) nor bf16 (1)", weights), E_ARG;
    int status = say(cudaSetDevice(device), "select device", err, cap);
    if (status < 0) return status;
    kv_backend_runner *r = (kv_backend_runner *)calloc(1, sizeof *r);
    if (r) r->layer = (dev_layer *)calloc((size_t)m->n_layers, sizeof *r->layer);
    if (!r || !r->layer) {
        free(r);
        return snprintf(err, cap, "runner: out of memory"), E_NOMEM;
    }
    r->m = *m;
    r->m.layer = nullptr;
    r->device = device;
    status = fill_runner(r, m, weights, err, cap);
    if (status < 0) runner_free(r);
    else *out = r;
    return status;
}

// ---- a step

static int reserve_rows(kv_backend_runner *r, size_t rows, char *err, size_t cap)
{
    const kv_backend_model &m = r->m;
    const size_t f = sizeof(float), e = (size_t)m.n_embd, q = (size_t)m.n_heads * m.head_dim, k = (size_t)m.n_kv_heads * m.head_dim, ff = (size_t)m.n_ff, half = (size_t)m.n_rot / 2;
    const size_t widest = (e > q ? e : q) > ff ? (e > q ? e : q) : ff, ffn = rows < FFN_ROWS ? rows : FFN_ROWS, most = ffn * ff > rows * (e > q ? e : q) ? ffn * ff : rows * (e > q ? e : q);
    struct { buffer *b; size_t bytes; } want[] = {
        { &r->x, rows * e * f }, { &r->h, rows * e * f }, { &r->q, rows * q * f }, { &r->k, rows * k * f }, { &r->v, rows * k * f }, { &r->att, rows * q * f },
        { &r->gate, ffn * ff * f }, { &r->up, ffn * ff * f }, { &r->cosine, r->n_tables * rows * half * f }, { &r->sine, r->n_tables * rows * half * f },
        { &r->tokens, rows * sizeof(int) }, { &r->act, rows > BF16_ROWS && r->bf16 ? most * 2 : 0 },
        { &r->dequant, rows > MATVEC_ROWS ? (widest > DEQUANT_FLOATS ? widest : (size_t)DEQUANT_FLOATS) * f : 0 },
        { &r->q_pre, r->tapping ? rows * q * f : 0 }, { &r->k_pre, r->tapping ? rows * k * f : 0 },
    };
    for (auto &w : want) {
        const int status = reserve(r, w.b, w.bytes, err, cap);
        if (status < 0) return status;
    }
    r->space.weights = at<float>(r->dequant);
    r->space.weights_cap = r->dequant.bytes / f;
    r->space.act = at<uint16_t>(r->act);
    r->space.act_cap = r->act.bytes / 2;
    return 0;
}

struct step_of {
    kv_backend_cache *const *caches;
    int n_caches, n_lanes, n, n_tokens;     // n_tokens: n when all lanes get the same, else lanes x n
    int groups, rows;                       // of the products
};

#define TRY(expr) do { const cudaError_t e_ = (expr); if (e_ != cudaSuccess) return e_; } while (0)

static cudaError_t keep_tap(kv_backend_runner *r, int layer, int n)
{
    const kv_backend_model &m = r->m;
    if (r->tap_layer >= 0 && r->tap_layer != layer) return cudaSuccess;
    const struct { float *to; const float *from; int heads; } what[] = { { r->tap[0], at<float>(r->q), m.n_heads }, { r->tap[1], at<float>(r->q_pre), m.n_heads },
        { r->tap[2], at<float>(r->k), m.n_kv_heads }, { r->tap[3], at<float>(r->k_pre), m.n_kv_heads }, { r->tap[4], at<float>(r->v), m.n_kv_heads } };
    const size_t row = (size_t)m.head_dim * sizeof(float);
    for (const auto &w : what) {
        if (!w.to) continue;
        float *to = w.to + (r->tap_layer < 0 ? (size_t)layer * w.heads * n * m.head_dim : 0);
        for (int h = 0; h < w.heads; h++)
            TRY(cudaMemcpy2DAsync(to + (size_t)h * n * m.head_dim, row, w.from + (size_t)h * m.head_dim, row * w.heads, row, (size_t)n, cudaMemcpyDeviceToHost, r->stream));
    }
    return cudaSuccess;
}

static cudaError_t one_layer(kv_backend_runner *r, const step_of &s, int layer)
{
    const kv_backend_model &m = r->m;
    const dev_layer &y = r->layer[layer];
    const int rows = s.n_lanes * s.n, e = m.n_embd, q_row = m.n_heads * m.head_dim, k_row = m.n_kv_heads * m.head_dim;
    const size_t table = (size_t)y.table * rows * (m.n_rot / 2);
    float *x = at<float>(r->x), *h = at<float>(r->h), *q = at<float>(r->q), *k = at<float>(r->k), *v = at<float>(r->v), *att = at<float>(r->att);
    const dev_product qkv[] = { { &y.wq, y.bq, q }, { &y.wk, y.bk, k }, { &y.wv, y.bv, v } }, out = { &y.wo, y.bo, h };

    if (layer == 0) TRY(residual_norm(x, h, false, nullptr, y.attn_norm, rows, e, m.norm_eps, r->stream));
    TRY(product(r->space, qkv, 3, h, s.groups, s.rows, r->stream));
    const qk_args a = { q, k, r->tapping ? at<float>(r->q_pre) : nullptr, r->tapping ? at<float>(r->k_pre) : nullptr, y.q_norm, y.k_norm, at<float>(r->cosine) + table, at<float>(r->sine) + table,
                        m.n_heads, m.n_kv_heads, m.head_dim, m.n_rot / 2, m.norm_eps };
    TRY(norm_and_rope(a, rows, r->stream));
    if (r->tapping) TRY(keep_tap(r, layer, s.n));
    size_t row = 0;
    for (int c = 0; c < s.n_caches; c++) {
        TRY(kv_dev_cache_attend(s.caches[c], layer, s.n, q + row * q_row, k + row * k_row, v + row * k_row, y.scale, y.softcap, att + row * q_row, r->stream));
        row += (size_t)kv_dev_cache_seqs(s.caches[c]) * s.n;
    }
    TRY(product(r->space, &out, 1, att, s.groups, s.rows, r->stream));
    TRY(residual_norm(x, h, true, y.post_attn_norm, y.ffn_norm, rows, e, m.norm_eps, r->stream));
    // Whole groups, and within a long group pieces that are the same in every group.
    const int piece = s.rows < FFN_ROWS ? s.rows : FFN_ROWS, at_once = s.rows < FFN_ROWS ? FFN_ROWS / s.rows : 1;
    for (int g = 0; g < s.groups; g += at_once)
        for (int r0 = 0; r0 < s.rows; r0 += piece) {
            const int groups = s.groups - g < at_once ? s.groups - g : at_once, n = s.rows - r0 < piece ? s.rows - r0 : piece;
            float *in = h + ((size_t)g * s.rows + r0) * e;
            const dev_product ffn[] = { { &y.w_gate, y.b_gate, at<float>(r->gate) }, { &y.w_up, y.b_up, at<float>(r->up) } }, down = { &y.w_down, y.b_down, in };
            TRY(product(r->space, ffn, 2, in, groups, n, r->stream));
            TRY(gate(at<float>(r->gate), at<float>(r->up), (size_t)groups * n * m.n_ff, m.activation, r->stream));
            TRY(product(r->space, &down, 1, at<float>(r->gate), groups, n, r->stream));
        }
    const float *next = layer + 1 < m.n_layers ? r->layer[layer + 1].attn_norm : r->out_norm;
    return residual_norm(x, h, true, y.post_ffn_norm, next, rows, e, m.norm_eps, r->stream);
}

// Everything of a step after its tokens lie on the device, the commit included.
static cudaError_t run_step(kv_backend_runner *r, const step_of &s, const int *tokens)
{
    const kv_backend_model &m = r->m;
    const int rows = s.n_lanes * s.n;
    for (int c = 0, row = 0; c < s.n_caches; c++) {
        const int seqs = kv_dev_cache_seqs(s.caches[c]);
        TRY(rope_tables(kv_dev_cache_lengths(s.caches[c]), seqs, s.n, row, r->freq, r->n_tables, m.n_rot / 2, rows, at<float>(r->cosine), at<float>(r->sine), r->stream));
        row += seqs * s.n;
    }
    TRY(embed_rows(r->embed, tokens, rows, s.n_tokens, m.embed_scale, at<float>(r->x), r->stream));
    for (int l = 0; l < m.n_layers; l++) TRY(one_layer(r, s, l));
    for (int c = 0; c < s.n_caches; c++) TRY(kv_dev_cache_commit(s.caches[c], s.n, r->stream));
    return cudaSuccess;
}

static cudaError_t make_logits(kv_backend_runner *r, const float *hidden, int n, float *z)
{
    const dev_product p = { &r->head, nullptr, z };
    TRY(product(r->space, &p, 1, hidden, 1, n, r->stream));
    return soft_cap(z, (size_t)n * r->m.n_vocab, r->m.final_softcap, r->stream);
}

// A decode step of one cache; with_sample: its next tokens too.  The second step with the same memory is captured, the ones after it replay.
static cudaError_t decode_step(kv_backend_runner *r, const step_of &s, bool with_sample)
{
    kv_backend_cache *cache = s.caches[0];
    int *tokens = with_sample ? at<int>(r->next) : at<int>(r->tokens);
    const auto launch = [&]() -> cudaError_t {
        TRY(run_step(r, s, tokens));
        if (!with_sample) return cudaSuccess;
        TRY(make_logits(r, at<float>(r->h), s.n_lanes, at<float>(r->logits)));
        return sample_rows(at<float>(r->logits), s.n_lanes, r->m.n_vocab, at<dev_sampler>(r->sampler), kv_dev_cache_lengths(cache), at<double>(r->weights),
                           at<int>(r->next), at<int>(r->out), at<int>(r->step), at<int>(r->bad), r->stream);
    };
    const unsigned long long epoch = kv_dev_cache_epoch(cache);
    graph *g = nullptr, *oldest = &r->graphs[0];
    for (graph &c : r->graphs) {
        if (c.seen && c.epoch == epoch && c.workspace == r->workspace && c.with_sample == with_sample) g = &c;
        if (c.seen < oldest->seen) oldest = &c;
    }
    static int clock;
    if (!g) {                               // the first time plainly: libraries load and kernels take their shared memory then
        if (oldest->exec) cudaGraphExecDestroy(oldest->exec);
        *oldest = { epoch, r->workspace, with_sample, ++clock, nullptr };
        return launch();
    }
    g->seen = ++clock;
    if (!g->exec) {
        cudaGraph_t captured = nullptr;
        TRY(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
        const cudaError_t e = launch(), end = cudaStreamEndCapture(r->stream, &captured);
        if (e != cudaSuccess || end != cudaSuccess) {
            if (captured) cudaGraphDestroy(captured);
            return e != cudaSuccess ? e : end;
        }
        const cudaError_t made = cudaGraphInstantiate(&g->exec, captured, 0);
        cudaGraphDestroy(captured);
        TRY(made);
    }
    return cudaGraphLaunch(g->exec, r->stream);
}

// After the work: what went wrong on the device, else the host's counts follow.
static int finish(kv_backend_runner *r, cudaError_t e, const char *what, kv_backend_cache *const *caches, int n_caches, int n, char *err, size_t cap)
{
    const cudaError_t done = cudaStreamSynchronize(r->stream);
    int status = say(e != cudaSuccess ? e : done, what, err, cap);
    for (int c = 0; status == 0 && c < n_caches; c++) status = kv_dev_cache_verdict(caches[c], err, cap);
    for (int c = 0; c < n_caches; c++) {
        if (status == 0) kv_dev_cache_advance(caches[c], n);
        else kv_dev_cache_drop(caches[c]);
    }
    return status;
}

static int check_feed(const kv_backend_runner *r, int n_caches, kv_backend_cache *const *caches, const int32_t *tokens, int n, int shared, int *n_lanes, char *err, size_t cap)
{
    *n_lanes = 0;
    if (!r || !caches || !tokens || n_caches < 1 || n < 1) return snprintf(err, cap, "feed: %d caches and %d tokens, at least 1 of each is needed", n_caches, n), E_ARG;
    for (int c = 0; c < n_caches; c++) *n_lanes += kv_dev_cache_seqs(caches[c]);
    if (*n_lanes > MAX_LANES || (int64_t)*n_lanes * n > 1 << 20) return snprintf(err, cap, "feed: %d sequences of %d tokens are outside 1..%d and 2^20 tokens at once", *n_lanes, n, MAX_LANES), E_ARG;
    for (int i = 0; i < (shared ? n : n * *n_lanes); i++)
        if (tokens[i] < 0 || tokens[i] >= r->m.n_vocab) return snprintf(err, cap, "token %d at %d is outside 0..%d", tokens[i], i % n + 1, r->m.n_vocab - 1), E_ARG;
    return 0;
}

static int feed(kv_backend_runner *r, int n_caches, kv_backend_cache *const *caches, const int32_t *tokens, int n, int shared, char *err, size_t cap)
{
    int n_lanes, status = check_feed(r, n_caches, caches, tokens, n, shared, &n_lanes, err, cap);
    if (status == 0) status = say(cudaSetDevice(r->device), "select device", err, cap);
    for (int c = 0; status == 0 && c < n_caches; c++) status = kv_dev_cache_reserve(caches[c], n, err, cap);
    if (status == 0) status = reserve_rows(r, (size_t)n_lanes * n, err, cap);
    if (status < 0) return status;
    // Lanes of different caches must not share a product's shape with anything else: an arm that equals the reference gets its bits.
    const bool decode = n == 1 && n_caches == 1 && !r->tapping;
    const step_of s = { caches, n_caches, n_lanes, n, shared ? n : n * n_lanes, decode ? 1 : n_lanes, decode ? n_lanes : n };
    cudaError_t e = cudaMemcpyAsync(r->tokens.p, tokens, (size_t)s.n_tokens * sizeof(int), cudaMemcpyHostToDevice, r->stream);
    if (e == cudaSuccess) {
        // In the graph every row has its token.
        for (int i = 1; decode && shared && i < n_lanes && e == cudaSuccess; i++) e = cudaMemcpyAsync(at<int>(r->tokens) + i, tokens, sizeof(int), cudaMemcpyHostToDevice, r->stream);
        if (e == cudaSuccess) {
            step_of own_tokens = s;
            own_tokens.n_tokens = n_lanes;
            e = decode ? decode_step(r, own_tokens, false) : run_step(r, s, at<int>(r->tokens));
        }
    }
    status = finish(r, e, "feed", caches, n_caches, n, err, cap);
    r->n_lanes = status == 0 ? n_lanes : 0;
    r->n = n;
    return status;
}

static int tap(kv_backend_runner *r, int layer, float *q, float *q_pre, float *k, float *k_pre, float *v, char *err, size_t cap)
{
    if (layer < -1 || layer >= r->m.n_layers) return snprintf(err, cap, "tap: layer %d is outside -1..%d", layer, r->m.n_layers - 1), E_ARG;
    float *const to[] = { q, q_pre, k, k_pre, v };
    memcpy(r->tap, to, sizeof to);
    r->tap_layer = layer;
    r->tapping = q || q_pre || k || k_pre || v;
    return 0;
}

// ---- what a feed left

static int check_rows(const kv_backend_runner *r, int lane, int row0, int n_rows, char *err, size_t cap)
{
    if (lane < 0 || lane >= r->n_lanes || row0 < 0 || n_rows < 1 || n_rows > r->n - row0)
        return snprintf(err, cap, "runner: rows %d..%d of lane %d are not among the %d lanes x %d rows of the last feed", row0, row0 + n_rows - 1, lane, r->n_lanes, r->n), E_ARG;
    return 0;
}

static const float *hidden_at(const kv_backend_runner *r, int lane, int row) { return at<float>(r->h) + ((size_t)lane * r->n + row) * r->m.n_embd; }

static int hidden(kv_backend_runner *r, int lane, int row0, int n_rows, float *host, char *err, size_t cap)
{
    int status = check_rows(r, lane, row0, n_rows, err, cap);
    if (status == 0) status = say(cudaSetDevice(r->device), "select device", err, cap);
    if (status < 0) return status;
    return say(cudaMemcpy(host, hidden_at(r, lane, row0), (size_t)n_rows * r->m.n_embd * sizeof(float), cudaMemcpyDeviceToHost), "hidden", err, cap);
}

// Rows whose logits are made at once: both lanes of a score in the same slices.
static int slice_of(const kv_backend_runner *r, int n_rows)
{
    const int most = LOGIT_FLOATS / r->m.n_vocab;
    return most < 1 ? 1 : n_rows < most ? n_rows : most;
}

static int logits(kv_backend_runner *r, int lane, int row0, int n_rows, float *host, char *err, size_t cap)
{
    int status = check_rows(r, lane, row0, n_rows, err, cap);
    if (status == 0) status = say(cudaSetDevice(r->device), "select device", err, cap);
    if (status < 0) return status;
    const int slice = slice_of(r, n_rows);
    const size_t row = (size_t)r->m.n_vocab;
    status = reserve(r, &r->logits, slice * row * sizeof(float), err, cap);
    for (int i = 0; status == 0 && i < n_rows; i += slice) {
        const int n = n_rows - i < slice ? n_rows - i : slice;
        status = say(make_logits(r, hidden_at(r, lane, row0 + i), n, at<float>(r->logits)), "logits", err, cap);
        if (status == 0) status = say(cudaMemcpyAsync(host + i * row, r->logits.p, n * row * sizeof(float), cudaMemcpyDeviceToHost, r->stream), "logits", err, cap);
        if (status == 0) status = say(cudaStreamSynchronize(r->stream), "logits", err, cap);
    }
    return status;
}

static int score(kv_backend_runner *r, int ref, int lane, int row0, int n_rows, const int32_t *targets, const kv_backend_scores *out, char *err, size_t cap)
{
    int status = check_rows(r, ref, row0, n_rows, err, cap);
    if (status == 0) status = check_rows(r, lane, row0, n_rows, err, cap);
    for (int i = 0; status == 0 && i < n_rows; i++)
        if (targets[i] < 0 || targets[i] >= r->m.n_vocab) status = (snprintf(err, cap, "score: target %d is outside 0..%d", targets[i], r->m.n_vocab - 1), E_ARG);
    if (status == 0) status = say(cudaSetDevice(r->device), "select device", err, cap);
    if (status < 0) return status;
    const int slice = slice_of(r, n_rows);
    const size_t row = (size_t)r->m.n_vocab;
    struct { buffer *b; size_t bytes; } want[] = { { &r->logits, slice * row * sizeof(float) }, { &r->logits2, slice * row * sizeof(float) }, { &r->targets, n_rows * sizeof(int) }, { &r->scores, 5 * (size_t)n_rows * sizeof(float) } };
    for (auto &w : want) if ((status = reserve(r, w.b, w.bytes, err, cap)) < 0) return status;
    cudaError_t e = cudaMemcpyAsync(r->targets.p, targets, n_rows * sizeof(int), cudaMemcpyHostToDevice, r->stream);
    for (int i = 0; e == cudaSuccess && i < n_rows; i += slice) {
        const int n = n_rows - i < slice ? n_rows - i : slice;
        e = make_logits(r, hidden_at(r, ref, row0 + i), n, at<float>(r->logits));
        if (e == cudaSuccess) e = make_logits(r, hidden_at(r, lane, row0 + i), n, at<float>(r->logits2));
        if (e == cudaSuccess) e = score_rows(at<float>(r->logits), at<float>(r->logits2), at<int>(r->targets) + i, n, r->m.n_vocab, at<float>(r->scores) + i, n_rows, r->stream);
    }
    float *const to[] = { out->kld, out->nll, out->nll_ref, out->dp, out->same_top1 };
    for (int i = 0; i < 5; i++)
        if (e == cudaSuccess && to[i]) e = cudaMemcpyAsync(to[i], at<float>(r->scores) + (size_t)i * n_rows, n_rows * sizeof(float), cudaMemcpyDeviceToHost, r->stream);
    const cudaError_t done = cudaStreamSynchronize(r->stream);
    return say(e != cudaSuccess ? e : done, "score", err, cap);
}

// ---- generation

static int check_sampler(const kv_backend_sampler *s, char *err, size_t cap)
{
    if (!(s->temperature >= 0 && s->temperature <= 1e6)) return snprintf(err, cap, "sample: temperature=%g is outside 0..1e6", s->temperature), E_ARG;
    if (!(s->top_p >= 0 && s->top_p <= 1)) return snprintf(err, cap, "sample: top_p=%g is outside 0..1", s->top_p), E_ARG;
    if (s->top_k < 0) return snprintf(err, cap, "sample: top_k=%d is negative", s->top_k), E_ARG;
    if (!(s->seed >= 0 && s->seed <= 9007199254740992.0) || s->seed != (double)(uint64_t)s->seed) return snprintf(err, cap, "sample: seed=%.17g is not an integer in 0..2^53", s->seed), E_ARG;
    return 0;
}

static int generate(kv_backend_runner *r, kv_backend_cache *c, const int32_t *first, int n_steps, const kv_backend_sampler *s, int32_t *host_tokens, double *seconds, char *err, size_t cap)
{
    int n_seqs, status = check_feed(r, 1, &c, first, 1, 0, &n_seqs, err, cap);
    if (status == 0 && n_steps < 1) status = (snprintf(err, cap, "generate: n_steps=%d is less than 1", n_steps), E_ARG);
    if (status == 0) status = check_sampler(s, err, cap);
    if (status == 0) status = say(cudaSetDevice(r->device), "select device", err, cap);
    if (status == 0) status = kv_dev_cache_reserve(c, n_steps, err, cap);
    if (status == 0) status = reserve_rows(r, (size_t)n_seqs, err, cap);
    const size_t rows = (size_t)n_seqs, vocab = (size_t)r->m.n_vocab;
    struct { buffer *b; size_t bytes; } want[] = { { &r->logits, rows * vocab * sizeof(float) }, { &r->weights, rows * vocab * sizeof(double) }, { &r->next, rows * sizeof(int) },
        { &r->step, rows * sizeof(int) }, { &r->out, rows * (size_t)n_steps * sizeof(int) } };
    for (auto &w : want) if (status == 0) status = reserve(r, w.b, w.bytes, err, cap);
    if (status < 0) return status;

    const uint64_t seed = (uint64_t)s->seed;
    const dev_sampler params = { s->temperature, s->top_p, (unsigned)seed, (unsigned)(seed >> 32), s->top_k };
    const step_of step = { &c, 1, n_seqs, 1, n_seqs, 1, n_seqs };
    int bad = 0;
    const bool tapping = r->tapping;
    r->tapping = 0;
    cudaError_t e = cudaMemcpyAsync(r->next.p, first, rows * sizeof(int), cudaMemcpyHostToDevice, r->stream);
    if (e == cudaSuccess) e = cudaMemcpyAsync(r->sampler.p, &params, sizeof params, cudaMemcpyHostToDevice, r->stream);
    if (e == cudaSuccess) e = cudaMemsetAsync(r->step.p, 0, rows * sizeof(int), r->stream);
    if (e == cudaSuccess) e = cudaMemsetAsync(r->bad.p, 0, sizeof(int), r->stream);
    if (e == cudaSuccess) e = cudaEventRecord(r->start, r->stream);
    for (int i = 0; i < n_steps && e == cudaSuccess; i++) e = decode_step(r, step, true);
    if (e == cudaSuccess) e = cudaEventRecord(r->end, r->stream);
    if (e == cudaSuccess) e = cudaMemcpyAsync(host_tokens, r->out.p, rows * (size_t)n_steps * sizeof(int), cudaMemcpyDeviceToHost, r->stream);
    if (e == cudaSuccess) e = cudaMemcpyAsync(&bad, r->bad.p, sizeof bad, cudaMemcpyDeviceToHost, r->stream);
    r->tapping = tapping;
    status = finish(r, e, "generate", &c, 1, n_steps, err, cap);
    r->n_lanes = status == 0 ? n_seqs : 0;
    r->n = 1;
    if (status == 0 && bad) status = (snprintf(err, cap, "sample: a logit is NaN or +inf"), E_ARG);
    if (status == 0 && seconds) {
        float ms = 0;
        status = say(cudaEventElapsedTime(&ms, r->start, r->end), "generate", err, cap);
        *seconds = ms * 1e-3;
    }
    return status;
}

void kv_runner_entries(kv_backend *t)
{
    t->runner_new = runner_new;
    t->runner_free = runner_free;
    t->feed = feed;
    t->tap = tap;
    t->hidden = hidden;
    t->logits = logits;
    t->score = score;
    t->generate = generate;
}
