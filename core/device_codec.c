/* device_codec.c -- a codec as a device sees it, and one alone on a device. */
#include <stdio.h>
#include <string.h>
#include "backend.h"
#include "codec.h"
#include "device.h"

int kv_pod_add(kv_pod *p, const void *src, size_t bytes, uint32_t *at)
{
    const size_t start = kv_round_up(p->bytes, 16), end = start + bytes;
    RETURN_ERROR_IF(bytes > 1u << 30 || end > 1u << 30, KV_E_UNSUPPORTED, "codec: a device form of %zu bytes is more than %u", end, 1u << 30);
    if (end > p->room) {
        const size_t room = end > 2 * p->room ? end : 2 * p->room;
        uint8_t *data = kv_zalloc(room);
        if (!data) return KV_E_NOMEM;
        if (p->bytes) memcpy(data, p->data, p->bytes);
        kv_free(p->data);
        p->data = data;
        p->room = room;
    }
    memcpy(p->data + start, src, bytes);
    p->bytes = end;
    *at = (uint32_t)start;
    return KV_OK;
}

int kv_pod_done(kv_pod *p, int status, void **out, size_t *bytes)
{
    if (status < 0) kv_free(p->data);
    else *out = p->data, *bytes = p->bytes;
    return status;
}

int kv_codec_device(const kv_codec *c, kv_backend_codec *out)
{
    void *pod = NULL;
    size_t bytes = 0;
    RETURN_ERROR_IF(!c->ops->device, KV_E_UNSUPPORTED, "codec '%s' has no device form (`kelvin codecs` says which have)", c->ops->name);
    FORWARD_IF_ERROR(c->ops->device(c, &pod, &bytes));
    *out = (kv_backend_codec){ .family = c->ops->name, .params = c->text, .head_dim = c->head_dim, .page_tokens = c->page_tokens,
        .granule = c->granule, .side = c->side, .page_bytes = c->page_bytes, .pod = pod, .pod_bytes = bytes,
        .used_bytes = c->page_bytes - (size_t)c->page.padding };
    return KV_OK;
}

void kv_codec_device_free(kv_backend_codec *d) { kv_free((void *)d->pod); }

/* The CPU's own operations, a page at a time. */
static void encode_here(const kv_codec *c, const float *rows, int n, uint8_t *pages)
{
    for (int t = 0; t < n; t += c->page_tokens, pages += c->page_bytes)
        c->ops->encode(c, pages, 0, kv_min(n - t, c->page_tokens), rows + (size_t)t * (size_t)c->head_dim, c->head_dim);
}
static void decode_here(const kv_codec *c, const uint8_t *pages, int tok0, int n, float *rows)
{
    for (int t = tok0, m; t < tok0 + n; t += m, rows += (size_t)m * (size_t)c->head_dim) {
        const int first = t % c->page_tokens;
        m = kv_min(c->page_tokens - first, tok0 + n - t);
        c->ops->decode(c, pages + (size_t)(t / c->page_tokens) * c->page_bytes, first, m, rows, c->head_dim);
    }
}

/* The form of a codec that device `b` knows. */
static int with_form(const kv_backend *b, const char *device, const kv_codec *c, kv_backend_codec *out)
{
    RETURN_ERROR_IF(!b->codec_known || !b->codec_known(c->ops->name), KV_E_UNSUPPORTED, "codec '%s' is not one that device '%s' knows", c->ops->name, device);
    return kv_codec_device(c, out);
}

int kv_codec_encode_on(const char *device, const kv_codec *c, const float *rows, int n, uint8_t *pages)
{
    RETURN_ERROR_IF(!c || !rows || !pages, KV_E_ARG, "kv_codec_encode_on: NULL %s", !c ? "codec" : !rows ? "rows" : "pages");
    RETURN_ERROR_IF(n < 1 || n > 1 << 24 || n % c->granule, KV_E_ARG, "codec '%s': %d rows are not a multiple of the granule %d in 1..%d", c->ops->name, n, c->granule, 1 << 24);
    const kv_backend *b;
    kv_backend_codec d;
    int number;
    char err[256] = "";
    FORWARD_IF_ERROR(kv_device_open(device, &b, &number));
    if (b == &kv_backend_cpu) {
        encode_here(c, rows, n, pages);
        return KV_OK;
    }
    FORWARD_IF_ERROR(with_form(b, device, c, &d));
    const int status = b->codec_encode(number, &d, rows, n, pages, err, sizeof err);
    kv_codec_device_free(&d);
    return status < 0 ? kv_set_error(status, "%s: %s", b->name, err) : KV_OK;
}

int kv_codec_decode_on(const char *device, const kv_codec *c, const uint8_t *pages, int tok0, int n, float *rows)
{
    RETURN_ERROR_IF(!c || !rows || !pages, KV_E_ARG, "kv_codec_decode_on: NULL %s", !c ? "codec" : !rows ? "rows" : "pages");
    RETURN_ERROR_IF(tok0 < 0 || n < 1 || tok0 > (1 << 24) - n, KV_E_ARG, "codec '%s': tokens %d.. (%d of them) are no range within 0..%d", c->ops->name, tok0, n, 1 << 24);
    const kv_backend *b;
    kv_backend_codec d;
    int number;
    char err[256] = "";
    FORWARD_IF_ERROR(kv_device_open(device, &b, &number));
    if (b == &kv_backend_cpu) {
        decode_here(c, pages, tok0, n, rows);
        return KV_OK;
    }
    FORWARD_IF_ERROR(with_form(b, device, c, &d));
    const int status = b->codec_decode(number, &d, pages, tok0, n, rows, err, sizeof err);
    kv_codec_device_free(&d);
    return status < 0 ? kv_set_error(status, "%s: %s", b->name, err) : KV_OK;
}

int kv_codec_bench_case(const kv_codec *c, const char *what, int n_tokens, char *line, int line_cap)
{
    RETURN_ERROR_IF(!c || !what || !line, KV_E_ARG, "kv_codec_bench_case: NULL %s", !c ? "codec" : !what ? "what" : "line");
    RETURN_ERROR_IF(strcmp(what, "encode") && strcmp(what, "decode"), KV_E_ARG, "kv_codec_bench_case: '%.20s' is neither encode nor decode", what);
    kv_backend_codec d;
    FORWARD_IF_ERROR(kv_codec_device(c, &d));
    const size_t need = 2 * d.pod_bytes + 256;
    int status = KV_OK;
    if (line_cap < 0 || (size_t)line_cap < need) status = kv_set_error(KV_E_ARG, "codec '%s': its case takes %zu bytes, %d given", c->ops->name, need, line_cap);
    else {
        int at = snprintf(line, (size_t)line_cap, "%s family=%s tokens=%d head_dim=%d page_tokens=%d granule=%d side=%d page_bytes=%zu pod=", what, d.family, n_tokens, d.head_dim, d.page_tokens, d.granule,
            d.side, d.page_bytes);
        for (size_t i = 0; i < d.pod_bytes; i++) at += snprintf(line + at, 3, "%02x", ((const uint8_t *)d.pod)[i]);
    }
    kv_codec_device_free(&d);
    return status;
}
