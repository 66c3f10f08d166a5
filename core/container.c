/* container.c -- the reading half of the container: a mapped file, everything but the pages checked when it is opened.
 *
 * Header, directory, texts, tables and page tables are held against their checksums and the file's length at once; a breach
 * there is refused, since nothing else could be trusted.  A page is held against its own when it is read: one that is
 * damaged is named, and the others are as good as before. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "container_impl.h"

typedef struct part {
    kv_pack_part   info;
    const uint8_t *table;                     /* page table, in the file */
    kv_rans       *bank;
} part;

struct kv_pack {
    const uint8_t *data;
    size_t         n;
    void          *mapped;                    /* the same, when it is ours to unmap */
    char          *name;
    part          *parts;
    int            n_parts;
};

static bool inside(const kv_pack *p, uint64_t at, uint64_t n) { return at <= p->n && n <= p->n - at; }

static int read_part(kv_pack *p, int i, const uint8_t *e)
{
    part *s = &p->parts[i];
    kv_pack_part *info = &s->info;
    memcpy(info->kind, e, KV_PACK_KIND);
    bool named = info->kind[0] && !info->kind[KV_PACK_KIND - 1];
    for (const char *c = info->kind; named && *c; c++) named = *c > ' ' && *c < 127;
    RETURN_ERROR_IF(!named, KV_E_CORRUPT, "file '%s': section %d has no name", p->name, i);
    const uint32_t version = kv_load_u32(e + 24), flags = kv_load_u32(e + 28), n_meta = kv_load_u32(e + 40), n_bank = kv_load_u32(e + 44), n_pages = kv_load_u32(e + 56);
    const uint64_t at = kv_load_u64(e + 32), table = kv_load_u64(e + 48);
    RETURN_ERROR_IF(version < 1 || version > INT32_MAX || n_pages > PACK_MAX_PAGES || n_meta > PACK_MAX_META || !inside(p, at, (uint64_t)n_meta + n_bank) || !inside(p, table, (uint64_t)n_pages * PACK_PAGE), KV_E_CORRUPT,
        "file '%s': section %d ('%s') reaches past the end of the file", p->name, i, info->kind);
    RETURN_ERROR_IF(flags & ~(uint32_t)KV_PACK_OPTIONAL, KV_E_UNSUPPORTED, "file '%s': section %d ('%s') has flags %u, this library knows 0 and 1", p->name, i, info->kind, flags);
    RETURN_ERROR_IF(kv_crc32c(0, p->data + at, (size_t)n_meta + n_bank) != kv_load_u32(e + 64), KV_E_CORRUPT, "file '%s': the text of section %d ('%s') is damaged", p->name, i, info->kind);
    RETURN_ERROR_IF(kv_crc32c(0, p->data + table, (size_t)n_pages * PACK_PAGE) != kv_load_u32(e + 68), KV_E_CORRUPT, "file '%s': the page table of section %d ('%s') is damaged", p->name, i, info->kind);
    info->version = (int)version;
    info->flags = (int)flags;
    info->stage = e[60];
    info->level = (int8_t)e[61];
    info->n_pages = (int)n_pages;
    info->n_meta = n_meta;
    s->table = p->data + table;
    char *meta = kv_alloc((size_t)n_meta + 1);
    if (!meta) return KV_E_NOMEM;
    memcpy(meta, p->data + at, n_meta);
    meta[n_meta] = 0;
    info->meta = meta;
    if (n_bank) {
        size_t used;
        const int status = kv_rans_read(&s->bank, p->data + at + n_meta, n_bank, &used);
        RETURN_ERROR_IF(status < 0, status, "file '%s': the rans table of section %d ('%s') does not parse", p->name, i, info->kind);
    }
    for (uint32_t k = 0; k < n_pages; k++) {
        const uint8_t *t = s->table + (size_t)k * PACK_PAGE;
        const uint32_t stored = kv_load_u32(t + 8), raw = kv_load_u32(t + 12);
        RETURN_ERROR_IF(t[20] > PACK_RANS_BANK, KV_E_UNSUPPORTED, "file '%s': page %u of section %d ('%s') has stage %d, this library knows 0..%d", p->name, k, i, info->kind, t[20], PACK_RANS_BANK);
        RETURN_ERROR_IF(!inside(p, kv_load_u64(t), stored) || raw > KV_PACK_MAX_PAGE || stored > raw || (t[20] == KV_STAGE_RAW && stored != raw) || (t[20] == PACK_RANS_BANK && !s->bank), KV_E_CORRUPT,
            "file '%s': page %u of section %d ('%s'): %u bytes from %u do not fit the file", p->name, k, i, info->kind, raw, stored);
        info->raw_bytes += raw;
        info->stored_bytes += stored;
    }
    return KV_OK;
}

static int parse(kv_pack *p)
{
    const uint8_t *h = p->data;
    RETURN_ERROR_IF(p->n < PACK_HEADER || memcmp(h, PACK_MAGIC, 8) != 0, KV_E_CORRUPT, "file '%s' is not a container of Kelvin's: it does not begin with " PACK_MAGIC, p->name);
    const uint32_t version = kv_load_u32(h + 8), n_parts = kv_load_u32(h + 12);
    const uint64_t directory = kv_load_u64(h + 16);
    RETURN_ERROR_IF(version > KV_PACK_VERSION, KV_E_UNSUPPORTED, "file '%s' has container version %u, this library reads up to %d", p->name, version, KV_PACK_VERSION);
    RETURN_ERROR_IF(kv_crc32c(0, h, 60) != kv_load_u32(h + 60) || version < 1, KV_E_CORRUPT, "file '%s': the header is damaged", p->name);
    RETURN_ERROR_IF(kv_load_u64(h + 24) != p->n, KV_E_CORRUPT, "file '%s' has %zu bytes, its header says %llu", p->name, p->n, (unsigned long long)kv_load_u64(h + 24));
    RETURN_ERROR_IF(n_parts > PACK_MAX_PARTS || !inside(p, directory, (uint64_t)n_parts * PACK_ENTRY) || kv_crc32c(0, h + directory, (size_t)n_parts * PACK_ENTRY) != kv_load_u32(h + 32), KV_E_CORRUPT,
        "file '%s': the directory of %u sections is damaged", p->name, n_parts);
    if (!(p->parts = kv_alloc_array(n_parts, sizeof *p->parts, true))) return KV_E_NOMEM;
    p->n_parts = (int)n_parts;
    for (int i = 0; i < p->n_parts; i++) FORWARD_IF_ERROR(read_part(p, i, h + directory + (size_t)i * PACK_ENTRY));
    return KV_OK;
}

int kv_pack_parse(kv_pack **out, const uint8_t *data, size_t n, const char *what)
{
    RETURN_ERROR_IF(!out || !what || (n && !data), KV_E_ARG, "file: NULL argument");
    *out = NULL;
    kv_pack *p = kv_zalloc(sizeof *p);
    if (!p) return KV_E_NOMEM;
    p->data = data;
    p->n = n;
    int status = (p->name = kv_alloc(strlen(what) + 1)) ? KV_OK : KV_E_NOMEM;
    if (status == KV_OK) {
        memcpy(p->name, what, strlen(what) + 1);
        status = parse(p);
    }
    if (status < 0) kv_pack_free(p);
    else *out = p;
    return status;
}

int kv_pack_open(kv_pack **out, const char *path)
{
    RETURN_ERROR_IF(!out || !path, KV_E_ARG, "file: no %s", out ? "path" : "handle");
    *out = NULL;
    struct stat st;
    void *data = MAP_FAILED;
    int status = KV_OK;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    FAIL_IF(fd < 0 || fstat(fd, &st) < 0, KV_E_IO, "file '%s': %s", path, strerror(errno));
    FAIL_IF(!S_ISREG(st.st_mode) || st.st_size < PACK_HEADER, KV_E_CORRUPT, "file '%s' is not a container of Kelvin's: %s", path, S_ISREG(st.st_mode) ? "it is too short" : "it is no file");
    data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    FAIL_IF(data == MAP_FAILED, KV_E_IO, "file '%s': %s", path, strerror(errno));
    FAIL_IF_ERROR(kv_pack_parse(out, data, (size_t)st.st_size, path));
    (*out)->mapped = data;
fail:
    if (fd >= 0) close(fd);
    if (status < 0 && data != MAP_FAILED) munmap(data, (size_t)st.st_size);
    return status;
}

void kv_pack_free(kv_pack *p)
{
    if (!p) return;
    for (int i = 0; i < p->n_parts; i++) {
        kv_free((void *)(uintptr_t)p->parts[i].info.meta);
        kv_rans_free(p->parts[i].bank);
    }
    if (p->mapped) munmap(p->mapped, p->n);
    kv_free(p->parts);
    kv_free(p->name);
    kv_free(p);
}

const char *kv_pack_name(const kv_pack *p) { return p->name; }
int kv_pack_n_parts(const kv_pack *p) { return p->n_parts; }
const kv_pack_part *kv_pack_at(const kv_pack *p, int i) { return i >= 0 && i < p->n_parts ? &p->parts[i].info : NULL; }

int kv_pack_find(const kv_pack *p, const char *kind, int from)
{
    for (int i = kv_max(from, 0); i < p->n_parts; i++)
        if (strcmp(p->parts[i].info.kind, kind) == 0) return i;
    return -1;
}

static const uint8_t *page_at(const kv_pack *p, int i, int page)
{
    return i >= 0 && i < p->n_parts && page >= 0 && page < p->parts[i].info.n_pages ? p->parts[i].table + (size_t)page * PACK_PAGE : NULL;
}

size_t kv_pack_page_bytes(const kv_pack *p, int i, int page)
{
    const uint8_t *t = page_at(p, i, page);
    return t ? kv_load_u32(t + 12) : 0;
}

const uint8_t *kv_pack_map(const kv_pack *p, int i, int page)
{
    const uint8_t *t = page_at(p, i, page);
    return t && t[20] == KV_STAGE_RAW ? p->data + kv_load_u64(t) : NULL;
}

static int no_page(const kv_pack *p, int i, int page)
{
    RETURN_ERROR_IF(i < 0 || i >= p->n_parts, KV_E_ARG, "file '%s': section %d is outside 0..%d", p->name, i, p->n_parts - 1);
    return kv_set_error(KV_E_ARG, "file '%s': page %d of section %d ('%s') is outside 0..%d", p->name, page, i, p->parts[i].info.kind, p->parts[i].info.n_pages - 1);
}

int kv_pack_read(const kv_pack *p, int i, int page, void *dst, size_t n)
{
    const uint8_t *t = page_at(p, i, page);
    if (!t) return no_page(p, i, page);
    const part *s = &p->parts[i];
    const uint8_t *src = p->data + kv_load_u64(t);
    const size_t stored = kv_load_u32(t + 8), raw = kv_load_u32(t + 12);
    RETURN_ERROR_IF(n != raw || (n && !dst), KV_E_CORRUPT, "file '%s': page %d of section %d ('%s') has %zu bytes, %zu are wanted", p->name, page, i, s->info.kind, raw, n);
    int status = kv_crc32c(0, src, stored) == kv_load_u32(t + 16) ? KV_OK : KV_E_CORRUPT;
    if (status == KV_OK) status = t[20] == PACK_RANS_BANK ? kv_rans_decode(s->bank, NULL, 1, src, stored, dst, n) : kv_stage_decode(t[20], src, stored, dst, n);
    RETURN_ERROR_IF(status == KV_E_CORRUPT, status, "file '%s': page %d of section %d ('%s') is damaged", p->name, page, i, s->info.kind);
    return status;
}

int kv_pack_check(const kv_pack *p, int i, int page)
{
    RETURN_ERROR_IF(!p, KV_E_ARG, "file: NULL handle");
    const uint8_t *t = page_at(p, i, page);
    if (!t) return no_page(p, i, page);
    const size_t n = kv_load_u32(t + 12);
    uint8_t *spare = kv_alloc(n);
    if (!spare) return KV_E_NOMEM;
    const int status = kv_pack_read(p, i, page, spare, n);
    kv_free(spare);
    return status;
}

int kv_pack_known(const kv_pack *p, const kv_pack_kind *known, int n)
{
    for (int i = 0; i < p->n_parts; i++) {
        const kv_pack_part *s = &p->parts[i].info;
        int k = 0;
        while (k < n && strcmp(known[k].kind, s->kind) != 0) k++;
        if (s->flags & KV_PACK_OPTIONAL && (k == n || s->version > known[k].version)) continue;
        RETURN_ERROR_IF(k == n, KV_E_UNSUPPORTED, "file '%s': section %d is of kind '%s', which this library does not know here", p->name, i, s->kind);
        RETURN_ERROR_IF(s->version > known[k].version, KV_E_UNSUPPORTED, "file '%s': section %d ('%s') has version %d, this library reads up to %d", p->name, i, s->kind, s->version, known[k].version);
    }
    return KV_OK;
}

/* ---- for Lua: what is in a file */

int kv_pack_info(const kv_pack *p, int *version, int *n_sections, double *file_bytes)
{
    RETURN_ERROR_IF(!p || !version || !n_sections || !file_bytes, KV_E_ARG, "file: NULL %s", p ? "result" : "handle");
    *version = (int)kv_load_u32(p->data + 8);
    *n_sections = p->n_parts;
    *file_bytes = (double)p->n;
    return KV_OK;
}

int kv_pack_section_at(const kv_pack *p, int i, kv_pack_section_info *out)
{
    RETURN_ERROR_IF(!p || !out, KV_E_ARG, "file: NULL %s", p ? "result" : "handle");
    const kv_pack_part *s = kv_pack_at(p, i);
    if (!s) return no_page(p, i, 0);
    const char *stage = kv_stage_name(s->stage);
    *out = (kv_pack_section_info){ .kind = s->kind, .meta = s->meta, .stage = stage ? stage : "unknown", .version = s->version, .optional = s->flags & KV_PACK_OPTIONAL,
        .level = s->level, .n_pages = s->n_pages, .raw_bytes = (double)s->raw_bytes, .stored_bytes = (double)s->stored_bytes };
    return KV_OK;
}
