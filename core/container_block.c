/* container_block.c -- codecs and blocks as sections of a file, and the small calls that Lua reads a file with.
 *
 *   codec        text {"family":"int","params":"bits=4,...","format":1,"side":"k","head_dim":64,"page_tokens":64}
 *                page 0: calibrated tables, or nothing
 *   block        text: what the caller says      page 0: heads u32, tokens u32
 *   block.pages  for each head: its pages, then its rows past the last whole granule as f16 */
#include <stdio.h>
#include "block.h"
#include "container.h"

int kv_stage_find(const char *name, int *stage)
{
    static const int all[] = { KV_STAGE_RAW, KV_STAGE_ZLIB, KV_STAGE_LZMA, KV_STAGE_RANS, KV_STAGE_SMALLEST };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(kv_stage_name(all[i]), name) == 0) {
            *stage = all[i];
            return KV_OK;
        }
    return kv_set_error(KV_E_ARG, "stage '%.40s' is none of raw, zlib, lzma, rans, smallest", name);
}

/* ---- codecs */

int kv_pack_put_codec(kv_pack_writer *w, const kv_codec *c)
{
    char meta[640];
    const int n = snprintf(meta, sizeof meta, "{\"family\":\"%s\",\"params\":\"%s\",\"format\":%d,\"side\":\"%s\",\"head_dim\":%d,\"page_tokens\":%d}",
                           c->ops->name, c->text, c->ops->format, c->side == KV_SIDE_K ? "k" : "v", c->head_dim, c->page_tokens);
    FORWARD_IF_ERROR(kv_pack_section(w, "codec", 1, 0, meta, (size_t)n, c->blob_bytes ? KV_STAGE_SMALLEST : KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    return kv_pack_page(w, c->blob, c->blob_bytes);
}

static const char *word(const kv_json_node *root, const char *key)
{
    for (const kv_json_node *n = kv_json_child(root); n; n = kv_json_next(n))
        if (kv_json_key(n) && strcmp(kv_json_key(n), key) == 0 && kv_json_type(n) == KV_JSON_STRING) return kv_json_string(n);
    return NULL;
}

static int number(const kv_json_node *root, const char *key)
{
    for (const kv_json_node *n = kv_json_child(root); n; n = kv_json_next(n))
        if (kv_json_key(n) && strcmp(kv_json_key(n), key) == 0 && kv_json_type(n) == KV_JSON_NUMBER && kv_json_number(n) >= 0 && kv_json_number(n) < 1 << 30) return (int)kv_json_number(n);
    return -1;
}

int kv_pack_get_codec(kv_codec **out, const kv_pack *p, int i)
{
    *out = NULL;
    const kv_pack_part *part = kv_pack_at(p, i);
    RETURN_ERROR_IF(!part || strcmp(part->kind, "codec") != 0 || part->n_pages != 1, KV_E_CORRUPT, "file '%s': section %d is not a codec", kv_pack_name(p), i);
    const size_t n = kv_pack_page_bytes(p, i, 0);
    kv_json *json = NULL;
    void *blob = NULL;
    int status;
    FAIL_IF_ERROR(kv_json_parse(&json, part->meta, (double)part->n_meta, kv_pack_name(p)));
    const kv_json_node *root = kv_json_root(json);
    const char *family = word(root, "family"), *params = word(root, "params"), *side = word(root, "side");
    FAIL_IF(!family || !params || !side, KV_E_CORRUPT, "file '%s': the codec in section %d lacks its family, params or side", kv_pack_name(p), i);
    if (n) {
        if (!(blob = kv_alloc(n))) FAIL_IF_ERROR(KV_E_NOMEM);
        FAIL_IF_ERROR(kv_pack_read(p, i, 0, blob, n));
    }
    FAIL_IF_ERROR(kv_codec_new_calibrated(out, family, params, number(root, "head_dim"), number(root, "page_tokens"), side[0] == 'v' ? KV_SIDE_V : KV_SIDE_K, blob, (double)n));
    const int format = number(root, "format");
    if (format != (*out)->ops->format) {
        status = kv_set_error(KV_E_UNSUPPORTED, "file '%s': codec '%s' has format %d, this library's is %d", kv_pack_name(p), (*out)->ops->name, format, (*out)->ops->format);
        kv_codec_free(*out);
        *out = NULL;
    }
fail:
    kv_json_free(json);
    kv_free(blob);
    return status;
}

/* ---- blocks */

static size_t exact_bytes(const kv_block *b) { return (size_t)(b->n_tokens - b->n_coded) * (size_t)b->codec->head_dim * 2; }

int kv_block_save(const kv_block *b, const char *path, const char *about, const char *stage, int level)
{
    int status, n_stage = KV_STAGE_RAW;
    kv_pack_writer *w = NULL;
    RETURN_ERROR_IF(!b || !path || !about || !stage, KV_E_ARG, "kv_block_save: NULL argument");
    FORWARD_IF_ERROR(kv_stage_find(stage, &n_stage));
    const uint32_t shape[2] = { (uint32_t)b->n_heads, (uint32_t)b->n_tokens };
    const size_t page = b->codec->page_bytes, exact = exact_bytes(b);
    FAIL_IF_ERROR(kv_pack_create(&w, path));
    FAIL_IF_ERROR(kv_pack_section(w, "block", 1, 0, about, strlen(about), KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    FAIL_IF_ERROR(kv_pack_page(w, shape, sizeof shape));
    FAIL_IF_ERROR(kv_pack_put_codec(w, b->codec));
    FAIL_IF_ERROR(kv_pack_section(w, "block.pages", 1, 0, "{}", 2, n_stage, level));
    for (int h = 0; h < b->n_heads; h++) {
        for (int g = 0; g < b->n_pages; g++) FAIL_IF_ERROR(kv_pack_page(w, b->pages + ((size_t)h * (size_t)b->n_pages + (size_t)g) * page, page));
        FAIL_IF_ERROR(kv_pack_page(w, exact ? (const uint8_t *)b->exact + (size_t)h * exact : NULL, exact));
    }
    status = kv_pack_finish(w);
fail:
    kv_pack_abandon(w);
    return status;
}

int kv_block_load(kv_block **out, const kv_pack *p, int salvage)
{
    static const kv_pack_kind known[] = { { "block", 1 }, { "codec", 1 }, { "block.pages", 1 } };
    int status;
    uint32_t shape[2];
    kv_codec *c = NULL;
    kv_block *b = NULL;
    RETURN_ERROR_IF(!out || !p, KV_E_ARG, "kv_block_load: NULL argument");
    *out = NULL;
    FORWARD_IF_ERROR(kv_pack_known(p, known, 3));
    const int head = kv_pack_find(p, "block", 0), pages = kv_pack_find(p, "block.pages", 0);
    RETURN_ERROR_IF(head < 0 || pages < 0, KV_E_CORRUPT, "file '%s' holds no block", kv_pack_name(p));
    FORWARD_IF_ERROR(kv_pack_read(p, head, 0, shape, sizeof shape));
    FAIL_IF_ERROR(kv_pack_get_codec(&c, p, kv_pack_find(p, "codec", 0)));
    const int64_t n_coded = shape[1] / (uint32_t)c->granule * (uint32_t)c->granule, a_head = (n_coded + c->page_tokens - 1) / c->page_tokens + 1;
    FAIL_IF(shape[0] < 1 || shape[1] < 1 || shape[0] > 1 << 24 || shape[1] > 1 << 30 || a_head * shape[0] != kv_pack_at(p, pages)->n_pages, KV_E_CORRUPT,
        "file '%s': a block of %u heads and %u tokens in %d pages", kv_pack_name(p), shape[0], shape[1], kv_pack_at(p, pages)->n_pages);
    FAIL_IF(kv_pack_at(p, pages)->raw_bytes < (size_t)shape[0] * (size_t)(a_head - 1) * c->page_bytes, KV_E_CORRUPT,     /* before memory for it is asked for */
        "file '%s': %zu bytes of pages for %u heads and %u tokens", kv_pack_name(p), kv_pack_at(p, pages)->raw_bytes, shape[0], shape[1]);
    FAIL_IF_ERROR(kv_block_new(&b, c, (int)shape[0], (int)shape[1]));
    const size_t exact = exact_bytes(b);
    for (int h = 0, at = 0; h < b->n_heads; h++)
        for (int g = 0; g <= b->n_pages; g++, at++) {
            const size_t n = g < b->n_pages ? c->page_bytes : exact;
            uint8_t *dst = g < b->n_pages ? b->pages + ((size_t)h * (size_t)b->n_pages + (size_t)g) * n : exact ? (uint8_t *)b->exact + (size_t)h * exact : NULL;
            FAIL_IF(kv_pack_page_bytes(p, pages, at) != n, KV_E_CORRUPT, "file '%s': page %d of head %d has %zu bytes, not %zu", kv_pack_name(p), g, h, kv_pack_page_bytes(p, pages, at), n);
            status = kv_pack_read(p, pages, at, dst, n);
            if (status == KV_E_CORRUPT && salvage) {
                if (n) memset(dst, 0, n);
                status = KV_OK;
            }
            if (status < 0) goto fail;
        }
    *out = b;
    b = NULL;
fail:
    kv_block_free(b);
    kv_codec_free(c);
    return status;
}

kv_codec *kv_block_codec(const kv_block *b) { return b ? kv_codec_ref(b->codec) : NULL; }

int kv_pack_page_size(const kv_pack *p, int section, int page, double *n_bytes)
{
    RETURN_ERROR_IF(!p || !n_bytes, KV_E_ARG, "file: NULL %s", p ? "result" : "handle");
    const kv_pack_part *s = kv_pack_at(p, section);
    RETURN_ERROR_IF(!s || page < 0 || page >= s->n_pages, KV_E_ARG, "file '%s': section %d has no page %d", kv_pack_name(p), section, page);
    *n_bytes = (double)kv_pack_page_bytes(p, section, page);
    return KV_OK;
}

int kv_pack_copy(const kv_pack *p, int section, int page, void *dst, double n_bytes)
{
    RETURN_ERROR_IF(!p || !(n_bytes >= 0 && n_bytes <= KV_PACK_MAX_PAGE), KV_E_ARG, "file: NULL handle, or %g bytes", n_bytes);
    return kv_pack_read(p, section, page, dst, (size_t)n_bytes);
}
