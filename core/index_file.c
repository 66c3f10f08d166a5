/* index_file.c -- an index as a container, and back without copying: pages stay in the mapped file.
 *
 *   index        text {"metric":"ip","dim":128,"page_rows":256,"rows":1000,"coded":1000,"keep":"f16"}
 *                pages: mean f32 [dim] or nothing | removed vectors, a bit each | tail f32 [rows - coded][dim]
 *   codec        one for all parts of a vector, or one a part when tables differ
 *   index.codes  a record (index.h) a page; no bytes when none of its vectors is left
 *   index.rows   originals f32 or f16 [page_rows][dim] a page, when they are kept */
#include <math.h>
#include <stdio.h>
#include "index.h"

static const char *const metrics[] = { "ip", "l2", "cosine" }, *const keeps[] = { "f32", "f16" };   /* by KV_METRIC_*, by KV_F32 and KV_F16 */
enum { PAGE_MEAN, PAGE_DEAD, PAGE_TAIL, N_PAGES };

/* ---- out */

static int put_pages(const kv_index *ix, kv_pack_writer *w, int what, int stage, int level)
{
    const bool codes = what == KV_INDEX_CODES_SEEN;
    FORWARD_IF_ERROR(kv_pack_section(w, codes ? "index.codes" : "index.rows", KV_INDEX_VERSION, 0, "{}", 2, stage, level));
    for (int p = 0; p < ix->n_pages; p++) {
        const kv_index_page *page = &ix->pages[p];
        if (page->n_live && !kv_index_seen(ix, p, what)) return kv_index_damage(ix, p, what);   /* damage must not get a checksum that fits */
        const uint8_t *data = codes ? page->record : page->rows;
        FORWARD_IF_ERROR(kv_pack_page(w, data, data ? codes ? ix->record_bytes : ix->row_bytes : 0));
    }
    return KV_OK;
}

int kv_index_save(const kv_index *ix, const char *path, const char *stage, int level)
{
    int status, n_stage = KV_STAGE_RAW;
    kv_pack_writer *w = NULL;
    char meta[200];
    RETURN_ERROR_IF(!ix || !path || !stage, KV_E_ARG, "index: NULL %s", ix ? path ? "stage" : "path" : "handle");
    FORWARD_IF_ERROR(kv_stage_find(stage, &n_stage));
    const int n = snprintf(meta, sizeof meta, "{\"metric\":\"%s\",\"dim\":%d,\"page_rows\":%d,\"rows\":%d,\"coded\":%d,\"keep\":\"%s\"}",
                           metrics[ix->metric], ix->dim, ix->page_rows, ix->n_rows, ix->n_coded, ix->keep < 0 ? "none" : keeps[ix->keep]);
    FAIL_IF_ERROR(kv_pack_create(&w, path));
    FAIL_IF_ERROR(kv_pack_section(w, "index", KV_INDEX_VERSION, 0, meta, (size_t)n, KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    FAIL_IF_ERROR(kv_pack_page(w, ix->mean, ix->mean ? (size_t)ix->dim * sizeof(float) : 0));
    FAIL_IF_ERROR(kv_pack_page(w, ix->dead, ((size_t)ix->n_rows + 7) / 8));
    FAIL_IF_ERROR(kv_pack_page(w, ix->tail, (size_t)(ix->n_rows - ix->n_coded) * (size_t)ix->dim * sizeof(float)));
    for (int q = 0; q < (ix->codec[0]->blob_bytes ? ix->n_parts : 1); q++) FAIL_IF_ERROR(kv_pack_put_codec(w, ix->codec[q]));
    FAIL_IF_ERROR(put_pages(ix, w, KV_INDEX_CODES_SEEN, n_stage, level));
    if (ix->row_bytes) FAIL_IF_ERROR(put_pages(ix, w, KV_INDEX_ROWS_SEEN, n_stage, level));
    status = kv_pack_finish(w);
fail:
    kv_pack_abandon(w);
    return status;
}

/* ---- in: what the file says is held against what it has before memory is asked for */

static const kv_json_node *field(const kv_json *json, const char *key, int type)
{
    for (const kv_json_node *n = kv_json_child(kv_json_root(json)); n; n = kv_json_next(n))
        if (kv_json_key(n) && strcmp(kv_json_key(n), key) == 0 && kv_json_type(n) == type) return n;
    return NULL;
}
static int whole(const kv_json *json, const char *key)
{
    const kv_json_node *n = field(json, key, KV_JSON_NUMBER);
    const double x = n ? kv_json_number(n) : -1;
    return x >= 0 && x <= INT32_MAX - KV_MAX_PAGE && x == floor(x) ? (int)x : -1;
}
/* Index of the word among n; n for "none"; -1 when it is no other. */
static int word(const kv_json *json, const char *key, const char *const *words, int n)
{
    const kv_json_node *at = field(json, key, KV_JSON_STRING);
    for (int i = 0; at && i < n; i++) if (strcmp(kv_json_string(at), words[i]) == 0) return i;
    return at && strcmp(kv_json_string(at), "none") == 0 ? n : -1;
}

static int read_settings(kv_index *ix, int part, int *coded)
{
    const char *const name = kv_pack_name(ix->file);
    kv_json *json;
    FORWARD_IF_ERROR(kv_json_parse(&json, kv_pack_at(ix->file, part)->meta, (double)kv_pack_at(ix->file, part)->n_meta, name));
    const int keep = word(json, "keep", keeps, 2);
    ix->metric = word(json, "metric", metrics, 3);
    ix->dim = whole(json, "dim");
    ix->page_rows = whole(json, "page_rows");
    ix->n_rows = whole(json, "rows");
    *coded = whole(json, "coded");
    kv_json_free(json);
    RETURN_ERROR_IF(ix->metric < 0 || ix->metric > KV_METRIC_COSINE || ix->dim < 1 || ix->dim > KV_INDEX_MAX_DIM || ix->page_rows < 1 || ix->n_rows < 0 || *coded < 0 || *coded > ix->n_rows || keep < 0, KV_E_CORRUPT,
        "file '%s': the index's metric, dim=%d, page_rows=%d, rows=%d, coded=%d or keep is missing or not possible", name, ix->dim, ix->page_rows, ix->n_rows, *coded);
    ix->keep = keep == 2 ? -1 : keep;
    return KV_OK;
}

static int read_codecs(kv_index *ix, int coded)
{
    const char *const name = kv_pack_name(ix->file);
    int n = 0;
    for (int i = kv_pack_find(ix->file, "codec", 0); i >= 0; i = kv_pack_find(ix->file, "codec", i + 1), n++) {
        RETURN_ERROR_IF(n == KV_INDEX_MAX_PARTS, KV_E_CORRUPT, "file '%s': more than %d codecs", name, KV_INDEX_MAX_PARTS);
        FORWARD_IF_ERROR(kv_pack_get_codec(&ix->codec[n], ix->file, i));
        ix->n_parts = n + 1;
    }
    RETURN_ERROR_IF(n == 0, KV_E_CORRUPT, "file '%s': the index has no codec", name);
    const kv_codec *c = ix->codec[0];
    RETURN_ERROR_IF(ix->dim % c->head_dim || ix->dim / c->head_dim > KV_INDEX_MAX_PARTS || (n != 1 && n != ix->dim / c->head_dim) || c->page_tokens != ix->page_rows, KV_E_CORRUPT,
        "file '%s': %d codecs of %d dimensions and %d vectors a page for an index of %d and %d", name, n, c->head_dim, c->page_tokens, ix->dim, ix->page_rows);
    for (int i = 0; i < n; i++)
        RETURN_ERROR_IF(ix->codec[i]->ops != c->ops || strcmp(ix->codec[i]->text, c->text) != 0 || ix->codec[i]->side != KV_SIDE_K || ix->codec[i]->head_dim != c->head_dim ||
            ix->codec[i]->page_tokens != c->page_tokens || ix->codec[i]->page_bytes != c->page_bytes, KV_E_CORRUPT, "file '%s': the index's codecs %d and 0 differ, or are not for keys", name, i);
    ix->part_dim = c->head_dim;
    for (; n < ix->dim / ix->part_dim; n++) {
        ix->codec[n] = kv_codec_ref(ix->codec[0]);
        ix->n_parts = n + 1;
    }
    RETURN_ERROR_IF(coded % c->granule || ix->n_rows - coded >= c->granule, KV_E_CORRUPT, "file '%s': %d of %d vectors are coded, in granules of %d", name, coded, ix->n_rows, c->granule);
    return KV_OK;
}

/* A page of floats into dst, all of them finite. */
static int read_floats(const kv_index *ix, int part, int page, float *dst, size_t n)
{
    FORWARD_IF_ERROR(kv_pack_read(ix->file, part, page, dst, n * sizeof(float)));
    for (size_t i = 0; i < n; i++)
        RETURN_ERROR_IF(!isfinite(dst[i]), KV_E_CORRUPT, "file '%s': the index's %s has numbers that are not finite", kv_pack_name(ix->file), page == PAGE_MEAN ? "mean" : "tail");
    return KV_OK;
}

static int read_vectors(kv_index *ix, int part, int coded)
{
    const size_t n_dead = ((size_t)ix->n_rows + 7) / 8;
    if (kv_pack_page_bytes(ix->file, part, PAGE_MEAN)) {
        if (!(ix->mean = kv_alloc((size_t)ix->dim * sizeof(float)))) return KV_E_NOMEM;
        FORWARD_IF_ERROR(read_floats(ix, part, PAGE_MEAN, ix->mean, (size_t)ix->dim));
    }
    RETURN_ERROR_IF(kv_pack_page_bytes(ix->file, part, PAGE_DEAD) != n_dead, KV_E_CORRUPT, "file '%s': %zu bytes of bits for %d vectors", kv_pack_name(ix->file), kv_pack_page_bytes(ix->file, part, PAGE_DEAD), ix->n_rows);
    const int n_rows = ix->n_rows;
    ix->n_rows = 0;                            /* what is there to be kept by growing */
    FORWARD_IF_ERROR(kv_index_reserve(ix, n_rows));
    ix->n_rows = n_rows;
    FORWARD_IF_ERROR(kv_pack_read(ix->file, part, PAGE_DEAD, ix->dead, n_dead));
    for (int i = 0; i < n_rows; i++) ix->n_live += !kv_index_dead(ix, i);
    ix->n_coded = coded;
    return ix->tail ? read_floats(ix, part, PAGE_TAIL, ix->tail, (size_t)(n_rows - coded) * (size_t)ix->dim) : KV_OK;
}

/* In place when the file has it raw, else decoded. */
static int page_from(const kv_index *ix, int part, int page, size_t bytes, const uint8_t **at, bool *is_own)
{
    const size_t n = kv_pack_page_bytes(ix->file, part, page);
    RETURN_ERROR_IF(n != bytes, KV_E_CORRUPT, "file '%s': page %d of the index has %zu bytes, not %zu", kv_pack_name(ix->file), page, n, bytes);
    if ((*at = kv_pack_map(ix->file, part, page)) && (uintptr_t)*at % 64 == 0) return KV_OK;
    uint8_t *own = kv_alloc(n);
    if (!own) return KV_E_NOMEM;
    *at = own;
    *is_own = true;
    return kv_pack_read(ix->file, part, page, own, n);
}

static int read_pages(kv_index *ix)
{
    const char *const name = kv_pack_name(ix->file);
    const int n_pages = (ix->n_coded + ix->page_rows - 1) / ix->page_rows;
    ix->codes_part = kv_pack_find(ix->file, "index.codes", 0);
    ix->rows_part = kv_pack_find(ix->file, "index.rows", 0);
    RETURN_ERROR_IF(ix->codes_part < 0 || kv_pack_at(ix->file, ix->codes_part)->n_pages != n_pages || (ix->row_bytes != 0) != (ix->rows_part >= 0) ||
        (ix->rows_part >= 0 && kv_pack_at(ix->file, ix->rows_part)->n_pages != n_pages), KV_E_CORRUPT, "file '%s': pages of codes or originals are missing for %d vectors", name, ix->n_coded);
    for (int p = 0; p < n_pages; p++) {
        kv_index_page *page = &ix->pages[p];
        atomic_init(&page->seen, 0);
        for (int i = p * ix->page_rows; i < kv_min((p + 1) * ix->page_rows, ix->n_coded); i++) page->n_live += !kv_index_dead(ix, i);
        ix->n_pages = p + 1;
        if (page->n_live == 0 && kv_pack_page_bytes(ix->file, ix->codes_part, p) == 0 && kv_index_fill(ix, p) == ix->page_rows) continue;
        FORWARD_IF_ERROR(page_from(ix, ix->codes_part, p, ix->record_bytes, &page->record, &page->own_record));
        if (ix->row_bytes) FORWARD_IF_ERROR(page_from(ix, ix->rows_part, p, ix->row_bytes, &page->rows, &page->own_rows));
        atomic_init(&page->seen, (page->own_record ? KV_INDEX_CODES_SEEN : 0) | (page->own_rows ? KV_INDEX_ROWS_SEEN : 0));
    }
    return KV_OK;
}

int kv_index_read(kv_index **out, kv_pack *file)
{
    static const kv_pack_kind known[] = { { "index", KV_INDEX_VERSION }, { "codec", 1 }, { "index.codes", KV_INDEX_VERSION }, { "index.rows", KV_INDEX_VERSION } };
    int status, coded = 0;
    *out = NULL;
    kv_index *ix = kv_zalloc(sizeof *ix);
    if (!ix) {
        kv_pack_free(file);
        return KV_E_NOMEM;
    }
    ix->file = file;
    FAIL_IF_ERROR(kv_pack_known(file, known, 4));
    const int part = kv_pack_find(file, "index", 0);
    FAIL_IF(part < 0 || kv_pack_at(file, part)->n_pages != N_PAGES, KV_E_CORRUPT, "file '%s' holds no index", kv_pack_name(file));
    FAIL_IF_ERROR(read_settings(ix, part, &coded));
    FAIL_IF_ERROR(read_codecs(ix, coded));
    FAIL_IF_ERROR(kv_index_set_up(ix));
    FAIL_IF_ERROR(read_vectors(ix, part, coded));
    FAIL_IF_ERROR(read_pages(ix));
    *out = ix;
    return KV_OK;
fail:
    kv_index_free(ix);
    return status;
}

int kv_index_load(kv_index **out, const char *path)
{
    kv_pack *file;
    RETURN_ERROR_IF(!out || !path, KV_E_ARG, "index: NULL %s", out ? "path" : "handle");
    *out = NULL;
    FORWARD_IF_ERROR(kv_pack_open(&file, path));
    return kv_index_read(out, file);
}
