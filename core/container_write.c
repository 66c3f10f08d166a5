/* container_write.c -- the writing half of the container.
 *
 * Everything goes to PATH.part in order; the header, which says where the directory is, is written last and the file then
 * renamed, so that a name never shows half a file. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "container_impl.h"

typedef struct page { uint8_t *data; size_t n_raw, n; int stage; uint32_t crc; uint64_t at; } page;
typedef struct entry { uint8_t bytes[PACK_ENTRY]; } entry;

struct kv_pack_writer {
    FILE    *f;
    char    *path, *part;
    uint64_t at;                              /* bytes written */
    entry   *entries;                         /* of the sections begun; the last is open */
    int      n_entries, cap_entries, finished;
    page    *pages;                           /* of the open section */
    int      n_pages, cap_pages, stage, level;
    uint8_t *meta;
    size_t   n_meta;
};

static int put(kv_pack_writer *w, const void *data, size_t n)
{
    RETURN_ERROR_IF(n && fwrite(data, 1, n, w->f) != n, KV_E_IO, "file '%s': %s", w->part, strerror(errno));
    w->at += n;
    return KV_OK;
}

static int align(kv_pack_writer *w)
{
    static const uint8_t zeros[PACK_ALIGN];
    return put(w, zeros, (size_t)(kv_round_up((size_t)w->at, PACK_ALIGN) - w->at));
}

int kv_pack_create(kv_pack_writer **out, const char *path)
{
    static const uint8_t header[PACK_HEADER];
    int status;
    RETURN_ERROR_IF(!out || !path || !*path, KV_E_ARG, "file: no %s", out ? "path" : "handle");
    *out = NULL;
    kv_pack_writer *w = kv_zalloc(sizeof *w);
    if (!w) return KV_E_NOMEM;
    const size_t n = strlen(path) + 1;
    if (!(w->path = kv_alloc(n)) || !(w->part = kv_alloc(n + 5))) {
        kv_pack_abandon(w);
        return KV_E_NOMEM;
    }
    memcpy(w->path, path, n);
    snprintf(w->part, n + 5, "%s.part", path);
    FAIL_IF(!(w->f = fopen(w->part, "wb")), KV_E_IO, "file '%s': %s", w->part, strerror(errno));
    FAIL_IF_ERROR(put(w, header, sizeof header));
    *out = w;
    return KV_OK;
fail:
    kv_pack_abandon(w);
    return status;
}

static void drop_section(kv_pack_writer *w)
{
    for (int i = 0; i < w->n_pages; i++) kv_free(w->pages[i].data);
    kv_free(w->meta);
    w->meta = NULL;
    w->n_pages = 0;
}

void kv_pack_abandon(kv_pack_writer *w)
{
    if (!w) return;
    drop_section(w);
    if (w->f) fclose(w->f);
    if (w->part && w->path && !w->finished) unlink(w->part);
    kv_free(w->pages);
    kv_free(w->entries);
    kv_free(w->path);
    kv_free(w->part);
    kv_free(w);
}

/* ---- a section's end: one table over its pages, all pages encoded, and out */

typedef struct job { kv_pack_writer *w; const kv_rans *bank; int *status; } job;

/* A page's bytes give way to its encoded ones where those are shorter. */
static void encode_page(void *ctx, int i, int thread)
{
    (void)thread;
    const job *j = ctx;
    page *p = &j->w->pages[i];
    size_t n = 0, shared = 0;
    uint8_t *coded = kv_alloc(p->n), *other = j->bank ? kv_alloc(p->n) : NULL;
    if (!coded || (j->bank && !other)) {
        j->status[i] = KV_E_NOMEM;
        goto out;
    }
    const int stage = kv_stage_encode(j->w->stage, j->w->level, p->data, p->n, coded, p->n, &n);
    if (stage < 0) {
        j->status[i] = stage;
        goto out;
    }
    if (j->bank) shared = kv_rans_encode(j->bank, NULL, 1, p->data, p->n, other, p->n);
    uint8_t *const best = shared && shared < n ? other : coded;
    p->stage = best == other ? PACK_RANS_BANK : stage;
    p->n = best == other ? shared : n;
    kv_free(best == other ? coded : other);
    kv_free(p->data);
    p->data = best;
    p->crc = kv_crc32c(0, best, p->n);
    return;
out:
    kv_free(coded);
    kv_free(other);
}

static int encode_pages(kv_pack_writer *w, uint8_t **bank, size_t *n_bank)
{
    int status = KV_OK;
    kv_rans *r = NULL;
    *n_bank = 0;
    job j = { w, NULL, kv_alloc_array((size_t)w->n_pages, sizeof(int), true) };
    if (!j.status) return KV_E_NOMEM;
    if (w->stage == KV_STAGE_RANS || w->stage == KV_STAGE_SMALLEST) {
        uint64_t count[256] = { 0 }, most = 1;
        uint32_t scaled[256];
        for (int i = 0; i < w->n_pages; i++)
            for (size_t k = 0; k < w->pages[i].n; k++) count[w->pages[i].data[k]]++;
        for (int s = 0; s < 256; s++) most = count[s] > most ? count[s] : most;
        for (int s = 0; s < 256; s++) scaled[s] = (uint32_t)(most >> 31 ? (count[s] + (most >> 31)) / ((most >> 31) + 1) : count[s]);
        FAIL_IF_ERROR(kv_rans_new(&r, scaled, 1));
        *n_bank = kv_rans_write(r, NULL, 0);
        if (!(*bank = kv_alloc(*n_bank))) FAIL_IF_ERROR(KV_E_NOMEM);
        kv_rans_write(r, *bank, *n_bank);
        j.bank = r;
    }
    kv_parallel(w->n_pages, encode_page, &j);
    for (int i = 0; i < w->n_pages; i++)
        FAIL_IF(j.status[i] < 0, j.status[i], "file '%s': page %d of %zu bytes could not be encoded as %s", w->path, i, w->pages[i].n_raw, kv_stage_name(w->stage));
fail:
    kv_rans_free(r);
    kv_free(j.status);
    return status;
}

static int put_pages(kv_pack_writer *w)
{
    for (int i = 0; i < w->n_pages; i++) {
        page *p = &w->pages[i];
        if (!p->data) continue;               /* gone out already, or empty */
        if (p->stage == KV_STAGE_RAW) FORWARD_IF_ERROR(align(w));
        p->at = w->at;
        FORWARD_IF_ERROR(put(w, p->data, p->n));
        kv_free(p->data);
        p->data = NULL;
    }
    return KV_OK;
}

static int end_section(kv_pack_writer *w)
{
    if (!w->n_entries || !w->meta) return KV_OK;
    int status;
    uint8_t *e = w->entries[w->n_entries - 1].bytes, *bank = NULL, *table = NULL;
    size_t n_bank = 0, n_table = (size_t)w->n_pages * PACK_PAGE, n_data = 0;
    for (int i = 0; i < w->n_pages; i++) n_data += w->pages[i].data ? w->pages[i].n : 0;
    if (w->stage != KV_STAGE_RAW && n_data) FAIL_IF_ERROR(encode_pages(w, &bank, &n_bank));
    if (w->stage != KV_STAGE_RAW) {           /* raw sections have put their meta before their first page */
        kv_put_u64(e + 32, w->at);
        FAIL_IF_ERROR(put(w, w->meta, w->n_meta));
        FAIL_IF_ERROR(put(w, bank, n_bank));
        FAIL_IF_ERROR(put_pages(w));
    }
    if (!(table = kv_zalloc(n_table))) FAIL_IF_ERROR(KV_E_NOMEM);
    for (int i = 0; i < w->n_pages; i++) {
        const page *p = &w->pages[i];
        uint8_t *t = table + (size_t)i * PACK_PAGE;
        kv_put_u64(t, p->at);
        kv_put_u32(t + 8, (uint32_t)p->n);
        kv_put_u32(t + 12, (uint32_t)p->n_raw);
        kv_put_u32(t + 16, p->crc);
        t[20] = (uint8_t)p->stage;
    }
    kv_put_u32(e + 44, (uint32_t)n_bank);
    kv_put_u64(e + 48, w->at);
    kv_put_u32(e + 56, (uint32_t)w->n_pages);
    kv_put_u32(e + 64, kv_crc32c(kv_crc32c(0, w->meta, w->n_meta), bank, n_bank));
    kv_put_u32(e + 68, kv_crc32c(0, table, n_table));
    status = put(w, table, n_table);
fail:
    kv_free(table);
    kv_free(bank);
    drop_section(w);
    return status;
}

int kv_pack_section(kv_pack_writer *w, const char *kind, int version, int flags, const char *meta, size_t n_meta, int stage, int level)
{
    RETURN_ERROR_IF(!w || !kind || (n_meta && !meta), KV_E_ARG, "file: NULL argument of a section");
    RETURN_ERROR_IF(!*kind || strlen(kind) >= KV_PACK_KIND || version < 1 || (flags & ~KV_PACK_OPTIONAL) || n_meta > PACK_MAX_META, KV_E_ARG,
        "file '%s': section '%.40s', version %d, flags %d, %zu bytes of text: a name of 1..%d bytes, a version from 1, flags 0 or 1 and at most %d bytes are allowed",
        w->path, kind, version, flags, n_meta, KV_PACK_KIND - 1, PACK_MAX_META);
    FORWARD_IF_ERROR(kv_stage_check(stage, level));
    FORWARD_IF_ERROR(end_section(w));
    RETURN_ERROR_IF(w->n_entries == PACK_MAX_PARTS, KV_E_ARG, "file '%s': more than %d sections", w->path, PACK_MAX_PARTS);
    if (w->n_entries == w->cap_entries) {
        const int cap = kv_max(16, 2 * w->cap_entries);
        entry *e = kv_alloc_array((size_t)cap, sizeof *e, true);
        if (!e) return KV_E_NOMEM;
        if (w->n_entries) memcpy(e, w->entries, sizeof *e * (size_t)w->n_entries);
        kv_free(w->entries);
        w->entries = e;
        w->cap_entries = cap;
    }
    if (!(w->meta = kv_alloc(n_meta))) return KV_E_NOMEM;
    if (n_meta) memcpy(w->meta, meta, n_meta);
    w->n_meta = n_meta;
    w->stage = stage;
    w->level = level;
    uint8_t *e = w->entries[w->n_entries++].bytes;
    memset(e, 0, PACK_ENTRY);
    memcpy(e, kind, strlen(kind));
    kv_put_u32(e + 24, (uint32_t)version);
    kv_put_u32(e + 28, (uint32_t)flags);
    kv_put_u32(e + 40, (uint32_t)n_meta);
    e[60] = (uint8_t)stage;
    e[61] = (uint8_t)(int8_t)level;
    if (stage != KV_STAGE_RAW) return KV_OK;
    kv_put_u64(e + 32, w->at);
    return put(w, meta, n_meta);
}

int kv_pack_page(kv_pack_writer *w, const void *data, size_t n)
{
    RETURN_ERROR_IF(!w || (n && !data) || !w->meta, KV_E_ARG, "file: a page %s", w && w->meta ? "at NULL" : "outside a section");
    RETURN_ERROR_IF(n > KV_PACK_MAX_PAGE || w->n_pages == PACK_MAX_PAGES, KV_E_ARG, "file '%s': page %d of %zu bytes, at most %d pages of %d", w->path, w->n_pages, n, PACK_MAX_PAGES, KV_PACK_MAX_PAGE);
    if (w->n_pages == w->cap_pages) {
        const int cap = kv_max(64, 2 * w->cap_pages);
        page *p = kv_alloc_array((size_t)cap, sizeof *p, true);
        if (!p) return KV_E_NOMEM;
        if (w->n_pages) memcpy(p, w->pages, sizeof *p * (size_t)w->n_pages);
        kv_free(w->pages);
        w->pages = p;
        w->cap_pages = cap;
    }
    page p = { .n_raw = n, .n = n, .at = w->at, .crc = kv_crc32c(0, data, n) };
    if (n && w->stage == KV_STAGE_RAW) {
        FORWARD_IF_ERROR(align(w));
        p.at = w->at;
        FORWARD_IF_ERROR(put(w, data, n));
    } else if (n) {
        if (!(p.data = kv_alloc(n))) return KV_E_NOMEM;
        memcpy(p.data, data, n);
    }
    w->pages[w->n_pages++] = p;
    return KV_OK;
}

int kv_pack_finish(kv_pack_writer *w)
{
    RETURN_ERROR_IF(!w || w->finished, KV_E_ARG, "file: %s", w ? "finished already" : "NULL handle");
    FORWARD_IF_ERROR(end_section(w));
    const uint64_t directory = w->at;
    const size_t n = (size_t)w->n_entries * PACK_ENTRY;
    FORWARD_IF_ERROR(put(w, w->entries, n));
    uint8_t h[PACK_HEADER] = PACK_MAGIC;
    kv_put_u32(h + 8, KV_PACK_VERSION);
    kv_put_u32(h + 12, (uint32_t)w->n_entries);
    kv_put_u64(h + 16, directory);
    kv_put_u64(h + 24, w->at);
    kv_put_u32(h + 32, kv_crc32c(0, w->entries, n));
    kv_put_u32(h + 60, kv_crc32c(0, h, 60));
    RETURN_ERROR_IF(fseek(w->f, 0, SEEK_SET) || fwrite(h, 1, sizeof h, w->f) != sizeof h || fflush(w->f) || fsync(fileno(w->f)), KV_E_IO, "file '%s': %s", w->part, strerror(errno));
    const int closed = fclose(w->f);
    w->f = NULL;
    RETURN_ERROR_IF(closed, KV_E_IO, "file '%s': %s", w->part, strerror(errno));
    RETURN_ERROR_IF(rename(w->part, w->path), KV_E_IO, "file '%s': %s", w->path, strerror(errno));
    w->finished = 1;
    return KV_OK;
}
