/* device_model.c -- a model's weights on a device: copied once, shared by everything that runs there, freed with the last of it. */
#include <stdio.h>
#include "device_model.h"
#include "device_plan.h"

_Thread_local char kv_device_text_[512];

int kv_device_fail(const kv_device_model *d, int status, const char *err) { return kv_set_error(status, "%s: %s", d->device, err); }

kv_device_model *kv_device_model_ref(kv_device_model *d)
{
    if (d) atomic_fetch_add(&d->refs, 1);
    return d;
}

const char *kv_device_model_name(const kv_device_model *d) { return d ? d->device : "cpu"; }

void kv_device_model_free(kv_device_model *d)
{
    if (!d || atomic_fetch_sub(&d->refs, 1) > 1) return;
    if (d->runner) d->b->runner_free(d->runner);
    pthread_mutex_destroy(&d->lock);
    kv_free(d);
}

static int open_device(kv_device_model **out, const char *device)
{
    const kv_backend *b;
    int number;
    FORWARD_IF_ERROR(kv_device_open(device, &b, &number));
    RETURN_ERROR_IF(!b->runner_new || !b->cache_new, KV_E_UNSUPPORTED, "device '%s' does not run models", device);
    kv_device_model *d = kv_zalloc(sizeof *d);
    if (!d) return KV_E_NOMEM;
    atomic_init(&d->refs, 1);
    pthread_mutex_init(&d->lock, NULL);
    d->b = b;
    d->number = number;
    snprintf(d->device, sizeof d->device, "%s", device);
    *out = d;
    return KV_OK;
}

static kv_backend_weight weight(const kv_weight *w) { return (kv_backend_weight){ .type = w->type, .n_in = w->n_in, .n_out = w->n_out, .row_bytes = w->row_bytes, .data = w->data }; }

static kv_backend_layer layer(const kv_model *m, int l)
{
    const kv_layer *y = &m->layer[l];
    return (kv_backend_layer){
        .wq = weight(&y->wq), .wk = weight(&y->wk), .wv = weight(&y->wv), .wo = weight(&y->wo), .w_gate = weight(&y->w_gate), .w_up = weight(&y->w_up), .w_down = weight(&y->w_down),
        .bq = y->bq, .bk = y->bk, .bv = y->bv, .bo = y->bo, .b_gate = y->b_gate, .b_up = y->b_up, .b_down = y->b_down,
        .attn_norm = y->attn_norm, .ffn_norm = y->ffn_norm, .q_norm = y->q_norm, .k_norm = y->k_norm, .post_attn_norm = y->post_attn_norm, .post_ffn_norm = y->post_ffn_norm,
        .scale = y->scale, .softcap = y->softcap, .freq = m->geo.rope[l].freq };
}

static int upload(kv_device_model *d, const kv_model *m, int weights)
{
    const kv_model_info *s = &m->info;
    kv_backend_layer *layers = kv_alloc_array((size_t)s->n_layers, sizeof *layers, true);
    if (!layers) return KV_E_NOMEM;
    for (int l = 0; l < s->n_layers; l++) layers[l] = layer(m, l);
    const kv_backend_model model = { .n_layers = s->n_layers, .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .n_embd = s->n_embd, .n_ff = s->n_ff, .n_vocab = s->n_vocab,
        .n_rot = s->n_rot, .activation = m->activation, .norm_eps = (float)s->norm_eps, .embed_scale = m->embed_scale, .final_softcap = m->final_softcap, .layer = layers,
        .embed = weight(&m->embed), .head = weight(&m->head), .out_norm = m->out_norm };
    const int status = KV_ON_DEVICE(d, runner_new, d->number, &model, weights, &d->runner);
    d->weights = weights;
    kv_free(layers);
    return status;
}

int kv_device_model_load(kv_model *m, const char *device, int weights)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    kv_device_model *d = NULL;
    if (strcmp(device, "cpu")) {
        FORWARD_IF_ERROR(open_device(&d, device));
        const int status = upload(d, m, weights);
        if (status < 0) {
            kv_device_model_free(d);
            return status;
        }
    }
    pthread_mutex_lock(&lock);
    kv_device_model *old = m->dev;
    m->dev = d;
    pthread_mutex_unlock(&lock);
    kv_device_model_free(old);
    return KV_OK;
}

int kv_model_device(kv_model *m, const char *device, int bf16)
{
    RETURN_ERROR_IF(!m || !device, KV_E_ARG, "kv_model_device: %s is NULL", m ? "device" : "the model");
    RETURN_ERROR_IF(bf16 != 0 && bf16 != 1, KV_E_ARG, "kv_model_device: bf16=%d is neither 0 nor 1", bf16);
    RETURN_ERROR_IF(!m->embed.data, KV_E_UNSUPPORTED, "model '%s' has a shape only: it stays on its device", m->info.name);
    return kv_device_model_load(m, device, bf16 ? KV_WEIGHTS_BF16 : KV_WEIGHTS_STORED);
}

const char *kv_model_where(const kv_model *m) { return m ? kv_device_model_name(m->dev) : ""; }

int kv_device_model_cache(const kv_device_model *d, const kv_model *m, const kv_plan *p, int n_seqs, int max_tokens, kv_backend_cache **out)
{
    kv_device_plan *plan;
    FORWARD_IF_ERROR(kv_plan_check(p));
    FORWARD_IF_ERROR(kv_device_plan_new(&plan, d->b, &m->geo, p));
    const int status = KV_ON_DEVICE(d, cache_new, d->number, &plan->plan, n_seqs, max_tokens, out);
    kv_device_plan_free(plan);
    return status;
}

/* ---- the ledger */

/* Whether no slot before this one has the same codec. */
static bool first_use(const kv_plan *p, const kv_slot *slot)
{
    for (const kv_slot *s = p->slot; s < slot; s++)
        if (s->codec == slot->codec) return false;
    return true;
}

/* A device tells what its pages take; their codecs' page ledgers say what for. */
static int add_side(const kv_device_model *d, const kv_backend_cache *c, const kv_plan *p, int layer, int side, kv_bytes *b)
{
    double codes, exact, slack, state;
    const int status = d->b->cache_bytes(c, layer, side, &codes, &exact, &slack, &state);
    if (status < 0) return kv_device_fail(d, status, "the cache's bytes cannot be told");
    double page = 0;
    for (int h = 0; h < p->n_kv_heads; h++) page += (double)kv_plan_slot(p, layer, h, side)->codec->page_bytes;
    for (int h = 0; h < p->n_kv_heads; h++) {
        const kv_slot *slot = kv_plan_slot(p, layer, h, side);
        const kv_bytes *l = &slot->codec->page;
        const double used = page > 0 ? codes / page : 0;
        b->codes += used * l->codes;
        b->scales += used * l->scales;
        b->outliers += used * l->outliers;
        b->exact += used * l->exact;
        b->padding += used * l->padding;
        b->state += used * l->state;
        b->slack += used * l->slack;
        if (slot->mean) b->shared += (double)p->head_dim * (double)sizeof(float);
        if (slot->codec->blob && first_use(p, slot)) b->shared += (double)kv_round_up(slot->codec->blob_bytes, 64);
    }
    b->exact += exact;
    b->slack += slack;
    b->state += state;
    return KV_OK;
}

int kv_device_bytes(const kv_device_model *d, const kv_backend_cache *c, const kv_plan *p, int layer, int side, kv_bytes *out)
{
    kv_bytes b = { 0 };
    for (int l = layer < 0 ? 0 : layer; l <= (layer < 0 ? p->n_layers - 1 : layer); l++)
        for (int s = 0; s < 2; s++)
            if (side < 0 || side == s) FORWARD_IF_ERROR(add_side(d, c, p, l, s, &b));
    b.total = b.codes + b.scales + b.outliers + b.exact + b.padding + b.slack + b.state + b.shared;
    *out = b;
    return KV_OK;
}
