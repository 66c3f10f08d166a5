/* device_plan.c -- resolves a plan for a device: each codec as its flat description, once however many slots share it. */
#include <stdio.h>
#include "device_plan.h"

/* The families that b knows, "raw, int, ...". */
static void known_codecs(const kv_backend *b, char *out, size_t cap)
{
    kv_codec_desc d;
    size_t n = 0;
    out[0] = 0;
    for (int i = 0; i < kv_codec_count(); i++) {
        if (kv_codec_describe(i, &d) < 0 || !b->codec_known || !b->codec_known(d.name)) continue;
        snprintf(out + n, cap - n, "%s%s", n ? ", " : "", d.name);
        n = strlen(out);
    }
}

static int find_codec(kv_device_plan *d, const kv_backend *b, const kv_plan *p, int layer, int head, int side, const kv_codec **seen, const kv_backend_codec **out)
{
    const kv_codec *c = kv_plan_slot(p, layer, head, side)->codec;
    int i = 0;
    while (i < d->n_codecs && seen[i] != c) i++;
    *out = &d->codec[i];
    if (i < d->n_codecs) return KV_OK;
    if (!b->codec_known || !b->codec_known(c->ops->name)) {
        char have[256];
        known_codecs(b, have, sizeof have);
        return kv_set_error(KV_E_UNSUPPORTED, "device '%s': layer %d head %d %s: codec '%s' has no form for it (have: %s)", b->name, layer, head, side == KV_SIDE_K ? "keys" : "values", c->ops->name, have);
    }
    const int status = kv_codec_device(c, &d->codec[i]);
    if (status < 0) {
        char why[256];
        snprintf(why, sizeof why, "%s", kv_last_error());
        return kv_set_error(status, "device '%s': layer %d head %d %s: %s", b->name, layer, head, side == KV_SIDE_K ? "keys" : "values", why);
    }
    seen[d->n_codecs++] = c;
    return KV_OK;
}

int kv_device_plan_new(kv_device_plan **out, const kv_backend *b, const kv_geometry *g, const kv_plan *p)
{
    int status = KV_E_NOMEM;
    RETURN_ERROR_IF(!out || !b || !g || !p, KV_E_ARG, "device plan: NULL argument");
    *out = NULL;
    FORWARD_IF_ERROR(kv_plan_check(p));
    RETURN_ERROR_IF(g->n_layers != p->n_layers || g->n_kv_heads != p->n_kv_heads || g->head_dim != p->head_dim, KV_E_ARG,
        "cache: the plan is for %d layers, %d K/V heads, head_dim %d; the model has %d, %d, %d", p->n_layers, p->n_kv_heads, p->head_dim, g->n_layers, g->n_kv_heads, g->head_dim);
    const size_t n = (size_t)p->n_layers * (size_t)p->n_kv_heads * 2;
    kv_device_plan *d = kv_zalloc(sizeof *d);
    const kv_codec **seen = kv_alloc_array(n, sizeof *seen, true);
    if (!d || !seen) goto fail;
    d->codec = kv_alloc_array(n, sizeof *d->codec, true);
    d->slot = kv_alloc_array(n, sizeof *d->slot, true);
    d->freq = kv_alloc_array((size_t)p->n_layers, sizeof *d->freq, true);
    if (!d->codec || !d->slot || !d->freq) goto fail;
    d->plan = (kv_backend_plan){ .n_layers = p->n_layers, .n_heads = g->n_heads, .n_kv_heads = p->n_kv_heads, .head_dim = p->head_dim, .page_tokens = p->page_tokens,
        .sink = p->sink, .recent = p->recent, .exact_dtype = p->exact_dtype, .sliding = g->sliding, .freq = d->freq, .slot = d->slot };
    for (int l = 0; l < p->n_layers; l++) {
        const kv_rope *rope = g->rope ? &g->rope[l] : NULL;
        if (rope && rope->n_rot > 0) {
            FAIL_IF(d->plan.n_rot && d->plan.n_rot != rope->n_rot, KV_E_UNSUPPORTED, "device '%s': layer %d rotates %d channels, one before it %d: only one number for all layers", b->name, l, rope->n_rot, d->plan.n_rot);
            d->plan.n_rot = rope->n_rot;
            d->freq[l] = rope->freq;
        }
        for (int i = 0; i < p->n_kv_heads * 2; i++) {
            const kv_slot *s = kv_plan_slot(p, l, i / 2, i % 2);
            kv_backend_slot *to = &d->slot[(size_t)l * (size_t)p->n_kv_heads * 2 + (size_t)i];
            FAIL_IF_ERROR(find_codec(d, b, p, l, i / 2, i % 2, seen, &to->codec));
            to->mean = s->mean;
            to->page_rope = i % 2 == KV_SIDE_K && s->page_rope && d->freq[l];
        }
    }
    kv_free(seen);
    *out = d;
    return KV_OK;
fail:
    kv_free(seen);
    kv_device_plan_free(d);
    return status;
}

void kv_device_plan_free(kv_device_plan *d)
{
    if (!d) return;
    for (int i = 0; i < d->n_codecs; i++) kv_codec_device_free(&d->codec[i]);
    kv_free(d->codec);
    kv_free(d->slot);
    kv_free(d->freq);
    kv_free(d);
}
