/* plan.c -- the table that says which codec holds the keys and the values of every layer and head.
 *
 * A plan is filled, checked and then shared: sessions and evaluations hold references, and while they do, nobody may
 * change it, so caches can read it without locks. */
#include <math.h>
#include "cache.h"

enum { REFERENCE_PAGE = 64 };

int kv_plan_new(kv_plan **out, int n_layers, int n_kv_heads, int head_dim, int page_tokens)
{
    RETURN_ERROR_IF(!out, KV_E_ARG, "plan: out is NULL");
    *out = NULL;
    RETURN_ERROR_IF(n_layers < 1 || n_layers > 4096, KV_E_ARG, "plan: n_layers=%d is outside 1..4096", n_layers);
    RETURN_ERROR_IF(n_kv_heads < 1 || n_kv_heads > 4096, KV_E_ARG, "plan: n_kv_heads=%d is outside 1..4096", n_kv_heads);
    RETURN_ERROR_IF(head_dim < 1 || head_dim > KV_MAX_HEAD_DIM, KV_E_ARG, "plan: head_dim=%d is outside 1..%d", head_dim, KV_MAX_HEAD_DIM);
    RETURN_ERROR_IF(page_tokens < 1 || page_tokens > KV_MAX_PAGE, KV_E_ARG, "plan: page_tokens=%d is outside 1..%d", page_tokens, KV_MAX_PAGE);
    kv_plan *p = kv_zalloc(sizeof *p);
    if (!p) return KV_E_NOMEM;
    atomic_init(&p->refs, 1);
    p->n_layers = n_layers;
    p->n_kv_heads = n_kv_heads;
    p->head_dim = head_dim;
    p->page_tokens = page_tokens;
    p->sink = kv_alloc_array((size_t)n_layers, sizeof(int), true);
    p->recent = kv_alloc_array((size_t)n_layers, sizeof(int), true);
    p->exact_dtype = kv_alloc_array((size_t)n_layers, sizeof(int), true);
    p->slot = kv_alloc_array((size_t)n_layers * (size_t)n_kv_heads * 2, sizeof *p->slot, true);
    if (!p->sink || !p->recent || !p->exact_dtype || !p->slot) {
        kv_plan_free(p);
        return KV_E_NOMEM;
    }
    for (int l = 0; l < n_layers; l++) p->exact_dtype[l] = KV_EXACT_F16;
    *out = p;
    return KV_OK;
}

kv_plan *kv_plan_ref(kv_plan *p)
{
    if (p) atomic_fetch_add(&p->refs, 1);
    return p;
}

void kv_plan_free(kv_plan *p)
{
    if (!p || atomic_fetch_sub(&p->refs, 1) != 1) return;
    if (p->slot)
        for (size_t i = 0; i < (size_t)p->n_layers * (size_t)p->n_kv_heads * 2; i++) {
            kv_codec_free(p->slot[i].codec);
            kv_free(p->slot[i].mean);
        }
    kv_free(p->slot);
    kv_free(p->sink);
    kv_free(p->recent);
    kv_free(p->exact_dtype);
    kv_free(p);
}

/* Turns (layer, head) with -1 for all into inclusive ranges. */
static int select_slots(const kv_plan *p, int layer, int head, int *l0, int *l1, int *h0, int *h1)
{
    RETURN_ERROR_IF(!p, KV_E_ARG, "plan is NULL");
    RETURN_ERROR_IF(layer < -1 || layer >= p->n_layers, KV_E_ARG, "plan: layer %d is outside 0..%d (-1: all)", layer, p->n_layers - 1);
    RETURN_ERROR_IF(head < -1 || head >= p->n_kv_heads, KV_E_ARG, "plan: head %d is outside 0..%d (-1: all)", head, p->n_kv_heads - 1);
    RETURN_ERROR_IF(atomic_load(&p->refs) > 1, KV_E_ARG, "plan is in use by a session or an evaluation; make another one to change it");
    *l0 = layer < 0 ? 0 : layer;
    *l1 = layer < 0 ? p->n_layers - 1 : layer;
    *h0 = head < 0 ? 0 : head;
    *h1 = head < 0 ? p->n_kv_heads - 1 : head;
    return KV_OK;
}

int kv_plan_window(kv_plan *p, int layer, int sink, int recent, int exact_dtype)
{
    int l0 = 0, l1 = 0, h0 = 0, h1 = 0;
    FORWARD_IF_ERROR(select_slots(p, layer, -1, &l0, &l1, &h0, &h1));
    RETURN_ERROR_IF(sink < 0 || sink > 1 << 28, KV_E_ARG, "plan: sink=%d is outside 0..%d", sink, 1 << 28);
    RETURN_ERROR_IF(recent < 0 || recent > 1 << 28, KV_E_ARG, "plan: recent=%d is outside 0..%d", recent, 1 << 28);
    RETURN_ERROR_IF(exact_dtype < KV_EXACT_F32 || exact_dtype > KV_EXACT_BF16, KV_E_ARG, "plan: exact_dtype=%d is none of f32 (0), f16 (1), bf16 (2)", exact_dtype);
    for (int l = l0; l <= l1; l++) {
        p->sink[l] = sink;
        p->recent[l] = recent;
        p->exact_dtype[l] = exact_dtype;
    }
    return KV_OK;
}

int kv_plan_set(kv_plan *p, int layer, int head, int side, kv_codec *c)
{
    int l0 = 0, l1 = 0, h0 = 0, h1 = 0;
    FORWARD_IF_ERROR(select_slots(p, layer, head, &l0, &l1, &h0, &h1));
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "plan: side=%d is neither K (0) nor V (1)", side);
    RETURN_ERROR_IF(!c, KV_E_ARG, "plan: codec is NULL");
    RETURN_ERROR_IF(c->side != side, KV_E_ARG, "plan: codec '%s' was made for %s, not for %s", c->ops->name, c->side == KV_SIDE_K ? "keys" : "values", side == KV_SIDE_K ? "keys" : "values");
    RETURN_ERROR_IF(c->head_dim != p->head_dim, KV_E_ARG, "plan: codec '%s' has head_dim=%d, the plan %d", c->ops->name, c->head_dim, p->head_dim);
    RETURN_ERROR_IF(c->page_tokens != p->page_tokens, KV_E_ARG, "plan: codec '%s' has page_tokens=%d, the plan %d", c->ops->name, c->page_tokens, p->page_tokens);
    for (int l = l0; l <= l1; l++)
        for (int h = h0; h <= h1; h++) {
            kv_slot *s = kv_plan_slot(p, l, h, side);
            kv_codec *old = s->codec;
            s->codec = kv_codec_ref(c);
            kv_codec_free(old);
        }
    return KV_OK;
}

/* mean NULL: none. */
int kv_plan_mean(kv_plan *p, int layer, int head, int side, const float *mean)
{
    int l0 = 0, l1 = 0, h0 = 0, h1 = 0;
    FORWARD_IF_ERROR(select_slots(p, layer, head, &l0, &l1, &h0, &h1));
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "plan: side=%d is neither K (0) nor V (1)", side);
    for (int d = 0; mean && d < p->head_dim; d++)
        RETURN_ERROR_IF(!isfinite(mean[d]), KV_E_ARG, "plan: mean[%d] = %g is not finite", d, (double)mean[d]);
    for (int l = l0; l <= l1; l++)
        for (int h = h0; h <= h1; h++) {
            kv_slot *s = kv_plan_slot(p, l, h, side);
            if (!mean) {
                kv_free(s->mean);
                s->mean = NULL;
                continue;
            }
            if (!s->mean && !(s->mean = kv_alloc_array((size_t)p->head_dim, sizeof(float), false))) return KV_E_NOMEM;
            memcpy(s->mean, mean, sizeof(float) * (size_t)p->head_dim);
        }
    return KV_OK;
}

int kv_plan_page_rope(kv_plan *p, int layer, int head, int on)
{
    int l0 = 0, l1 = 0, h0 = 0, h1 = 0;
    FORWARD_IF_ERROR(select_slots(p, layer, head, &l0, &l1, &h0, &h1));
    for (int l = l0; l <= l1; l++)
        for (int h = h0; h <= h1; h++) kv_plan_slot(p, l, h, KV_SIDE_K)->page_rope = on != 0;
    return KV_OK;
}

int kv_plan_check(const kv_plan *p)
{
    RETURN_ERROR_IF(!p, KV_E_ARG, "plan is NULL");
    for (int l = 0; l < p->n_layers; l++)
        for (int h = 0; h < p->n_kv_heads; h++)
            for (int s = 0; s < 2; s++)
                RETURN_ERROR_IF(!kv_plan_slot(p, l, h, s)->codec, KV_E_ARG, "plan: layer %d head %d has no codec for its %s", l, h, s == KV_SIDE_K ? "keys" : "values");
    return KV_OK;
}

int kv_plan_reference(kv_plan **out, int n_layers, int n_kv_heads, int head_dim)
{
    kv_plan *p = NULL;
    int status;
    RETURN_ERROR_IF(!out, KV_E_ARG, "plan: out is NULL");
    *out = NULL;
    FAIL_IF_ERROR(kv_plan_new(&p, n_layers, n_kv_heads, head_dim, REFERENCE_PAGE));
    FAIL_IF_ERROR(kv_plan_window(p, -1, 0, 0, KV_EXACT_F32));
    for (int side = 0; side < 2; side++) {
        kv_codec *raw;
        FAIL_IF_ERROR(kv_codec_new(&raw, "raw", "dtype=f32", head_dim, REFERENCE_PAGE, side));
        status = kv_plan_set(p, -1, -1, side, raw);
        kv_codec_free(raw);
        if (status < 0) goto fail;
    }
    *out = p;
    return KV_OK;
fail:
    kv_plan_free(p);
    return status;
}
