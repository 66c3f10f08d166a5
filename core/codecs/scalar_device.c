/* scalar_device.c -- the `scalar` codec as devices read it. */
#include "scalar.h"
#include "scalar_device.h"

int scalar_part_device(const kv_codec *c, kv_pod *pod, uint32_t *at)
{
    const scalar_state *s = c->state;
    const size_t d = (size_t)c->head_dim;
    struct scalar_device_part p = { .dim = c->head_dim, .bits = s->bits, .levels = s->levels, .norm = s->norm, .n_planes = s->n_planes,
        .n_tiles = s->n_tiles, .n_tries = s->n_tries, .scales = (uint32_t)s->scales };
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *q = &s->plane[k];
        p.plane[k] = (struct scalar_device_plane){ q->bits, __builtin_ctz((unsigned)q->chunk), q->rows, q->n_chunks, (uint32_t)q->offset, (uint32_t)scalar_plane_tile(q) };
    }
    memcpy(p.tries, s->tries, sizeof p.tries);
    memcpy(p.centroid, s->centroid, sizeof p.centroid);
    memcpy(p.bound, s->bound, sizeof p.bound);
    if (s->sign) FORWARD_IF_ERROR(kv_pod_add(pod, s->sign, d * sizeof(float), &p.at_sign));
    if (s->matrix) FORWARD_IF_ERROR(kv_pod_add(pod, s->matrix, d * d * sizeof(float), &p.at_matrix));
    if (s->inverse) FORWARD_IF_ERROR(kv_pod_add(pod, s->inverse, d * d * sizeof(float), &p.at_inverse));
    return kv_pod_add(pod, &p, sizeof p, at);
}

static int fill(const kv_codec *c, kv_pod *pod)
{
    const scalar_state *s = c->state;
    const size_t d = (size_t)c->head_dim;
    struct scalar_device h = { .n_groups = 1, .plain = s->parts == NULL, .group = { { .dim = c->head_dim } } };
    uint32_t start;
    FORWARD_IF_ERROR(kv_pod_add(pod, &h, sizeof h, &start));
    if (s->scale) FORWARD_IF_ERROR(kv_pod_add(pod, s->scale, d * sizeof(float), &h.at_scale));
    if (s->unscale) FORWARD_IF_ERROR(kv_pod_add(pod, s->unscale, d * sizeof(float), &h.at_unscale));
    if (s->parts) FORWARD_IF_ERROR(scalar_parts_device(c, pod, &h));
    else FORWARD_IF_ERROR(scalar_part_device(c, pod, &h.group[0].at_code));
    memcpy(pod->data, &h, sizeof h);
    return KV_OK;
}

int scalar_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    kv_pod pod = { 0 };
    const int status = fill(c, &pod);
    return kv_pod_done(&pod, status, out, bytes);
}
