/* container.h -- files of encoded pages: a writer and a memory-mapped reader, for blocks, caches and indexes.
 *
 *   kv_pack_create(&w, path);                                                    kv_pack_open(&p, path);
 *   kv_pack_section(w, "codes", 1, 0, meta, n, KV_STAGE_RAW, KV_LEVEL_DEFAULT);  i = kv_pack_find(p, "codes", 0);
 *   kv_pack_page(w, codes, n_codes);                                             kv_pack_map(p, i, page)   raw: the page in the mapped file
 *   kv_pack_finish(w);                                                           kv_pack_read(p, i, page, dst, n)   any stage, CRC checked
 *
 * A section has a kind (its name), a version of its own, a text that says what is in it, and pages.  What a reader does not
 * know it refuses by name (kv_pack_known), unless the section says that it may be passed over.  Bytes: docs/formats.md. */
#ifndef KV_CONTAINER_H
#define KV_CONTAINER_H
#include "codec.h"
#include "entropy.h"

enum { KV_PACK_VERSION = 1, KV_PACK_KIND = 24 /* bytes of a kind's name with its NUL */, KV_PACK_MAX_PAGE = 1 << 30 };
enum { KV_PACK_OPTIONAL = 1 /* section flag: a reader that does not know the kind may pass over it */ };

/* ---- writing.  Pages of staged sections are kept until the section ends, then encoded by all threads; raw ones go out at
 * once.  The file appears under its name when it is whole: until kv_pack_finish it is PATH.part. */
typedef struct kv_pack_writer kv_pack_writer;
int  kv_pack_create(kv_pack_writer **out, const char *path);
/* meta: JSON text by habit; level as for kv_stage_encode.  rans and smallest share one table over the section. */
int  kv_pack_section(kv_pack_writer *w, const char *kind, int version, int flags, const char *meta, size_t n_meta, int stage, int level);
int  kv_pack_page(kv_pack_writer *w, const void *data, size_t n);         /* copied; 0 bytes are fine */
int  kv_pack_finish(kv_pack_writer *w);                                   /* then only kv_pack_abandon(w) is left to call */
void kv_pack_abandon(kv_pack_writer *w);                                  /* frees; removes a file that was not finished; NULL is fine */

/* ---- reading.  An open file is immutable: threads share it. */
typedef struct kv_pack_part {
    char        kind[KV_PACK_KIND];
    int         version, flags, stage, level, n_pages;
    const char *meta;                                                     /* NUL-terminated copy */
    size_t      n_meta, raw_bytes, stored_bytes;                          /* of all pages */
} kv_pack_part;
int  kv_pack_parse(kv_pack **out, const uint8_t *data, size_t n, const char *what);   /* over memory the caller keeps, 8-byte aligned or not */
const char *kv_pack_name(const kv_pack *p);                               /* for messages: the path */
int  kv_pack_n_parts(const kv_pack *p);
const kv_pack_part *kv_pack_at(const kv_pack *p, int i);                  /* NULL outside */
int  kv_pack_find(const kv_pack *p, const char *kind, int from);          /* index of the first at `from` or later, -1: none */
size_t kv_pack_page_bytes(const kv_pack *p, int i, int page);             /* decoded; 0 outside */
/* CRC and stage.  KV_E_CORRUPT names file, section and page; dst is then undefined. */
int  kv_pack_read(const kv_pack *p, int i, int page, void *dst, size_t n);
const uint8_t *kv_pack_map(const kv_pack *p, int i, int page);            /* a raw page in place, 64-byte aligned in a mapped file, its CRC not looked at; NULL if staged */
int  kv_pack_check(const kv_pack *p, int i, int page);                    /* as kv_pack_read, the bytes thrown away */

/* KV_OK when every section is of one of these kinds and not newer than this library, or may be passed over. */
typedef struct kv_pack_kind { const char *kind; int version; } kv_pack_kind;
int  kv_pack_known(const kv_pack *p, const kv_pack_kind *known, int n);

/* ---- shared sections (container_block.c): a codec with its parameters and calibrated tables is a section "codec" */
int  kv_pack_put_codec(kv_pack_writer *w, const kv_codec *c);
int  kv_pack_get_codec(kv_codec **out, const kv_pack *p, int i);          /* section i */
int  kv_stage_find(const char *name, int *stage);                         /* "zlib" -> KV_STAGE_ZLIB */
#endif
