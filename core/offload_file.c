/* offload_file.c -- KVTC tables and offloaded sessions as sections of a file, and back.
 *
 *   kvtc          text: what the caller says
 *                 page 0  shape, below; then for keys, then values, for each group of slots four pages:
 *                         mean f32 [p], unit f32 [p] if there is one  |  blocks u32, fixed u32, rank u32, 0 | size u16, type u16 [blocks] | step f32 [rank], fixed only
 *                         basis f16 [rank][p]  |  bank of rANS tables
 *   offload       text: what the caller says
 *                 page 0  counts, below   page 1  blocks: first token, tokens i32   page 2  tokens i32
 *                 page 3  exact rows f16 [side][layer][head][n_exact][head_dim]: sinks, then the window
 *   offload.rows  a page for each block, side and group: | stage u8 | payload |
 *
 * The tables may be in the same file or in one of their own that serves many sessions; the digest in the counts says which they
 * must be.  Everything is checked as bytes from outside. */
#include <math.h>
#include "offload.h"

typedef struct shape {                             /* page 0 of "kvtc" */
    int32_t n_layers, n_kv_heads, head_dim, layers, heads, rope, n_groups, zero;
    char    model[64], rope_digest[64];
} shape;
_Static_assert(sizeof(shape) == 160, "no padding");
typedef struct counts {                            /* page 0 of "offload" */
    int32_t n_tokens, sink, n_coded, block_tokens, n_blocks, stage, level, zero;
    char    tables[64];
} counts;
_Static_assert(sizeof(counts) == 96, "no padding");

enum { TABLE_PAGES = 4, PLAN_HEADER = 16 };
static const kv_pack_kind known[] = { { "kvtc", 1 }, { "offload", 1 }, { "offload.rows", 1 } };

/* ---- tables out: page i of their section as bytes */

static shape shape_of(const kv_kvtc *k)
{
    const kvtc_basis *b = k->basis;
    const kv_model_info *info = &b->m->info;
    char model[65], rope[65];
    shape s = { info->n_layers, info->n_kv_heads, info->head_dim, b->layers, b->heads, b->rope, b->n_groups, 0, { 0 }, { 0 } };
    kv_calib_fingerprint(b->m, model, rope);
    memcpy(s.model, model, sizeof s.model);
    memcpy(s.rope_digest, rope, sizeof s.rope_digest);
    return s;
}

static int plan_page(const kvtc_group *g, uint8_t **out, size_t *n)
{
    const kvtc_plan *p = &g->plan;
    *n = PLAN_HEADER + 4 * (size_t)p->n_blocks + (p->fixed ? 4 * (size_t)p->rank : 0);
    uint8_t *at = *out = kv_zalloc(*n);
    if (!at) return KV_E_NOMEM;
    const uint32_t head[3] = { (uint32_t)p->n_blocks, (uint32_t)p->fixed, (uint32_t)p->rank };
    memcpy(at, head, sizeof head);
    at += PLAN_HEADER;
    for (int b = 0; b < p->n_blocks; b++, at += 4) {
        kv_store_u16(at, (uint16_t)p->block[b].size);
        kv_store_u16(at + 2, (uint16_t)p->block[b].type);
    }
    if (p->fixed) memcpy(at, g->step, 4 * (size_t)p->rank);
    return KV_OK;
}

static int table_page(const kvtc_group *g, int page, uint8_t **out, size_t *n)
{
    const size_t p = (size_t)g->space->p, cells = (size_t)g->plan.rank * p;
    if (page == 1) return plan_page(g, out, n);
    const size_t unit = g->space->unit ? 4 * p : 0;
    *n = page == 0 ? 4 * p + unit : page == 2 ? 2 * cells : kv_rans_write(g->bank, NULL, 0);
    if (!(*out = kv_alloc(*n + 1))) return KV_E_NOMEM;
    if (page == 0) memcpy(*out, g->space->mean, 4 * p);
    if (page == 0 && unit) memcpy(*out + 4 * p, g->space->unit, unit);
    for (size_t i = 0; page == 2 && i < cells; i++) kv_store_u16(*out + 2 * i, kv_f32_to_f16(g->space->v[i]));
    if (page == 3) kv_rans_write(g->bank, *out, *n);
    return KV_OK;
}

/* Pages go to a writer, or (w NULL) their digests to `digest`: a page at a time, for tables are large. */
static int walk_tables(const kv_kvtc *k, kv_pack_writer *w, char *digest65)
{
    const shape s = shape_of(k);
    const size_t pages = (size_t)k->basis->n_groups * 2 * TABLE_PAGES;
    char *digests = kv_alloc_array(pages + 1, 64 + 1, true);
    int status = digests ? KV_OK : KV_E_NOMEM;
    if (status >= 0) status = w ? kv_pack_page(w, &s, sizeof s) : kv_sha256(&s, sizeof s, digests);
    for (size_t i = 0; i < pages && status >= 0; i++) {
        const size_t group = i / TABLE_PAGES;
        uint8_t *page = NULL;
        size_t n = 0;
        status = table_page(&k->group[group / (size_t)k->basis->n_groups][group % (size_t)k->basis->n_groups], (int)(i % TABLE_PAGES), &page, &n);
        if (status >= 0) status = w ? kv_pack_page(w, page, n) : kv_sha256(page, (double)n, digests + (i + 1) * 64);
        kv_free(page);
    }
    if (status >= 0 && !w) status = kv_sha256(digests, 64.0 * (double)(pages + 1), digest65);
    kv_free(digests);
    return status;
}

int kv_kvtc_digest(const kv_kvtc *k, char *hex65)
{
    RETURN_ERROR_IF(!k || !hex65, KV_E_ARG, "kvtc: NULL argument");
    return walk_tables(k, NULL, hex65);
}

static int put_tables(const kv_kvtc *k, kv_pack_writer *w, const char *about, int stage, int level)
{
    FORWARD_IF_ERROR(kv_pack_section(w, "kvtc", 1, 0, about, strlen(about), stage, level));
    return walk_tables(k, w, NULL);
}

int kv_kvtc_save(const kv_kvtc *k, const char *path, const char *about, const char *stage_name, int level)
{
    kv_pack_writer *w = NULL;
    int status, stage;
    RETURN_ERROR_IF(!k || !path || !about || !stage_name, KV_E_ARG, "kv_kvtc_save: NULL argument");
    FORWARD_IF_ERROR(kv_stage_find(stage_name, &stage));
    FAIL_IF_ERROR(kv_pack_create(&w, path));
    FAIL_IF_ERROR(put_tables(k, w, about, stage, level));
    status = kv_pack_finish(w);
fail:
    kv_pack_abandon(w);
    return status;
}

/* ---- tables in */

static int read_whole(const kv_pack *p, int part, int page, uint8_t **out, size_t *n)
{
    *n = kv_pack_page_bytes(p, part, page);
    if (!(*out = kv_alloc(*n + 1))) return KV_E_NOMEM;
    return kv_pack_read(p, part, page, *out, *n);
}

static int read_mean(kvtc_space *s, const uint8_t *x, size_t n, const char *name)
{
    const size_t half = 4 * (size_t)s->p;
    RETURN_ERROR_IF(n != half && n != 2 * half, KV_E_CORRUPT, "file '%s': a mean of %zu bytes for rows of %d numbers", name, n, s->p);
    if (!(s->mean = kv_alloc(half)) || (n > half && !(s->unit = kv_alloc(half)))) return KV_E_NOMEM;
    memcpy(s->mean, x, half);
    if (s->unit) memcpy(s->unit, x + half, half);
    for (int i = 0; i < s->p; i++) {
        RETURN_ERROR_IF(!isfinite(s->mean[i]), KV_E_CORRUPT, "file '%s': mean[%d] = %g is not finite", name, i, (double)s->mean[i]);
        RETURN_ERROR_IF(s->unit && !(s->unit[i] >= 1e-20f && isfinite(s->unit[i])), KV_E_CORRUPT, "file '%s': unit[%d] = %g is not a positive number", name, i, (double)s->unit[i]);
    }
    return KV_OK;
}

static int read_plan(kvtc_group *g, const kvtc_space *s, const uint8_t *x, size_t n, const char *name)
{
    kvtc_plan *p = &g->plan;
    const uint32_t n_blocks = n < PLAN_HEADER ? 0 : kv_load_u32(x), fixed = n < PLAN_HEADER ? 2 : kv_load_u32(x + 4), rank = n < PLAN_HEADER ? 0 : kv_load_u32(x + 8);
    RETURN_ERROR_IF(fixed > 1 || n_blocks > rank || rank > (uint32_t)s->p || n != PLAN_HEADER + 4 * (size_t)n_blocks + (fixed ? 4 * (size_t)rank : 0), KV_E_CORRUPT,
                    "file '%s': a plan of %zu bytes with %u blocks for %u of %d components", name, n, n_blocks, rank, s->p);
    p->fixed = (int)fixed;
    p->n_blocks = (int)n_blocks;
    p->block = kv_alloc_array((size_t)n_blocks + 1, sizeof *p->block, true);
    g->step = kv_alloc_array((size_t)rank + 1, sizeof *g->step, true);
    if (!p->block || !g->step) return KV_E_NOMEM;
    x += PLAN_HEADER;
    for (int b = 0, start = 0; b < p->n_blocks; b++, x += 4) {
        p->block[b] = (kvtc_block){ start, kv_load_u16(x), kv_load_u16(x + 2) };
        start += p->block[b].size;
    }
    FORWARD_IF_ERROR(kvtc_plan_count(p, (int)rank));
    RETURN_ERROR_IF(p->rank != (int)rank, KV_E_CORRUPT, "file '%s': blocks end at component %d of %u", name, p->rank, rank);
    for (uint32_t i = 0; fixed && i < rank; i++, x += 4) {
        g->step[i] = kv_bits_f32(kv_load_u32(x));
        RETURN_ERROR_IF(!isfinite(g->step[i]) || !(g->step[i] >= 1e-30f), KV_E_CORRUPT, "file '%s': step[%u] = %g is not a positive number", name, i, (double)g->step[i]);
    }
    return KV_OK;
}

static int read_components(kvtc_space *s, int rank, const uint8_t *x, size_t n, const char *name)
{
    const size_t cells = (size_t)rank * (size_t)s->p;
    RETURN_ERROR_IF(n != 2 * cells, KV_E_CORRUPT, "file '%s': %zu bytes of components, %d of %d numbers need %zu", name, n, rank, s->p, 2 * cells);
    s->rank = rank;
    if (!(s->v = kv_alloc_array(cells + 1, sizeof *s->v, false))) return KV_E_NOMEM;
    for (size_t i = 0; i < cells; i++) {
        s->v[i] = kv_f16_to_f32(kv_load_u16(x + 2 * i));
        RETURN_ERROR_IF(!(fabsf(s->v[i]) <= 2), KV_E_CORRUPT, "file '%s': number %zu of the components is %g, not within 2", name, i, (double)s->v[i]);
    }
    return KV_OK;
}

static int read_bank(kvtc_group *g, const uint8_t *x, size_t n, const char *name)
{
    size_t used = 0;
    int n_tables;
    FORWARD_IF_ERROR(n_tables = kvtc_group_classes(g));
    FORWARD_IF_ERROR(kv_rans_read(&g->bank, x, n, &used));
    RETURN_ERROR_IF(used != n || kv_rans_tables(g->bank) != n_tables, KV_E_CORRUPT, "file '%s': %d rANS tables in %zu of %zu bytes, the plan has %d", name, kv_rans_tables(g->bank), used, n, n_tables);
    return KV_OK;
}

static int read_tables(kv_kvtc **out, kv_model *m, const kv_pack *p)
{
    const char *name = kv_pack_name(p);
    const int part = kv_pack_find(p, "kvtc", 0);
    const kv_model_info *info = &m->info;
    char model[65], rope[65];
    shape s;
    int status = KV_OK;
    RETURN_ERROR_IF(part < 0, KV_E_CORRUPT, "file '%s' holds no kvtc tables", name);
    FORWARD_IF_ERROR(kv_pack_read(p, part, 0, &s, sizeof s));
    kv_calib_fingerprint(m, model, rope);
    RETURN_ERROR_IF(memcmp(s.model, model, 64) != 0, KV_E_ARG, "file '%s' has tables of model %.16s, this model is %.16s", name, s.model, model);
    RETURN_ERROR_IF(memcmp(s.rope_digest, rope, 64) != 0, KV_E_ARG, "file '%s' was made with RoPE %.16s, this model has %.16s", name, s.rope_digest, rope);
    RETURN_ERROR_IF(s.n_layers != info->n_layers || s.n_kv_heads != info->n_kv_heads || s.head_dim != info->head_dim || s.layers < 1 || s.heads < 1 || s.rope < 0 || s.rope > 1, KV_E_CORRUPT,
                    "file '%s': tables of %d layers, %d heads of %d channels; the model has %d, %d, %d", name, s.n_layers, s.n_kv_heads, s.head_dim, info->n_layers, info->n_kv_heads, info->head_dim);
    kv_kvtc *k = kv_zalloc(sizeof *k);
    if (!k) return KV_E_NOMEM;
    atomic_init(&k->refs, 1);
    FAIL_IF_ERROR(kvtc_basis_alloc(&k->basis, m, s.layers, s.heads, s.rope));
    const int n_groups = k->basis->n_groups;
    FAIL_IF(s.n_groups != n_groups || kv_pack_at(p, part)->n_pages != 1 + n_groups * 2 * TABLE_PAGES, KV_E_CORRUPT, "file '%s': %d groups in %d pages, %d are needed", name, s.n_groups, kv_pack_at(p, part)->n_pages, n_groups);
    for (int side = 0; side < 2; side++)
        if (!(k->group[side] = kv_alloc_array((size_t)n_groups, sizeof(kvtc_group), true))) { status = KV_E_NOMEM; goto fail; }
    for (int i = 0; i < n_groups * 2 * TABLE_PAGES; i++) {
        kvtc_group *g = &k->group[i / TABLE_PAGES / n_groups][i / TABLE_PAGES % n_groups];
        kvtc_space *space = &k->basis->space[i / TABLE_PAGES / n_groups][i / TABLE_PAGES % n_groups];
        uint8_t *x = NULL;
        size_t n;
        g->space = space;
        status = read_whole(p, part, 1 + i, &x, &n);
        if (status >= 0) status = i % TABLE_PAGES == 0 ? read_mean(space, x, n, name) : i % TABLE_PAGES == 1 ? read_plan(g, space, x, n, name)
            : i % TABLE_PAGES == 2 ? read_components(space, g->plan.rank, x, n, name) : read_bank(g, x, n, name);
        kv_free(x);
        if (status < 0) goto fail;
        if (i % TABLE_PAGES == 3) k->bank_bytes += n;
    }
    *out = k;
    return KV_OK;
fail:
    kv_kvtc_free(k);
    return status;
}

int kv_kvtc_load(kv_kvtc **out, kv_model *m, const kv_pack *p)
{
    RETURN_ERROR_IF(!out || !m || !p, KV_E_ARG, "kv_kvtc_load: NULL argument");
    *out = NULL;
    FORWARD_IF_ERROR(kv_pack_known(p, known, 3));
    return read_tables(out, m, p);
}

/* ---- offloads */

static size_t n_parts(const kv_offload *o) { return (size_t)o->n_blocks * 2 * (size_t)o->k->basis->n_groups; }
static size_t exact_numbers(const kv_offload *o)
{
    const kv_model_info *info = &o->k->basis->m->info;
    return (size_t)o->n_exact * 2 * (size_t)info->n_layers * (size_t)info->n_kv_heads * (size_t)info->head_dim;
}

static int put_offload(const kv_offload *o, kv_pack_writer *w, const int32_t *tokens, const char *about)
{
    char digest[65];
    counts n = { o->n_tokens, o->sink, o->n_coded, o->block_tokens, o->n_blocks, o->stage, o->level, 0, { 0 } };
    FORWARD_IF_ERROR(kv_kvtc_digest(o->k, digest));
    memcpy(n.tables, digest, sizeof n.tables);
    FORWARD_IF_ERROR(kv_pack_section(w, "offload", 1, 0, about, strlen(about), KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    FORWARD_IF_ERROR(kv_pack_page(w, &n, sizeof n));
    FORWARD_IF_ERROR(kv_pack_page(w, o->block, (size_t)o->n_blocks * sizeof *o->block));
    FORWARD_IF_ERROR(kv_pack_page(w, tokens, (size_t)o->n_tokens * sizeof *tokens));
    return kv_pack_page(w, o->exact, exact_numbers(o) * sizeof *o->exact);
}

static int put_rows(const kv_offload *o, kv_pack_writer *w)
{
    FORWARD_IF_ERROR(kv_pack_section(w, "offload.rows", 1, 0, "{}", 2, KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    int status = KV_OK;
    for (size_t i = 0; i < n_parts(o) && status >= 0; i++) {
        const kvtc_payload *part = &o->part[i];
        RETURN_ERROR_IF(!part->data, KV_E_ARG, "offload: it lacks blocks that were damaged in the file, and cannot be saved");
        uint8_t *page = kv_alloc(part->n + 1);
        if (!page) return KV_E_NOMEM;
        page[0] = (uint8_t)part->stage;
        memcpy(page + 1, part->data, part->n);
        status = kv_pack_page(w, page, part->n + 1);
        kv_free(page);
    }
    return status;
}

int kv_offload_save(const kv_offload *o, const char *path, const int32_t *tokens, const char *about, const char *tables_about)
{
    kv_pack_writer *w = NULL;
    int status;
    RETURN_ERROR_IF(!o || !path || !tokens || !about, KV_E_ARG, "kv_offload_save: NULL argument");
    FAIL_IF_ERROR(kv_pack_create(&w, path));
    FAIL_IF_ERROR(put_offload(o, w, tokens, about));
    if (tables_about) FAIL_IF_ERROR(put_tables(o->k, w, tables_about, KV_STAGE_ZLIB, KV_LEVEL_DEFAULT));
    FAIL_IF_ERROR(put_rows(o, w));
    status = kv_pack_finish(w);
fail:
    kv_pack_abandon(w);
    return status;
}

static int read_counts(kv_offload *o, const kv_pack *p, int part, counts *n)
{
    const char *name = kv_pack_name(p);
    FORWARD_IF_ERROR(kv_pack_read(p, part, 0, n, sizeof *n));
    RETURN_ERROR_IF(n->n_tokens < 1 || n->n_tokens > 1 << 24 || n->n_coded < 1 || n->sink < 0 || n->n_coded > n->n_tokens || n->sink > n->n_tokens - n->n_coded || n->block_tokens < 1 ||
                    n->block_tokens > OFFLOAD_MAX_BLOCK || n->n_blocks < 1 || n->n_blocks > n->n_coded, KV_E_CORRUPT,
                    "file '%s': %d of %d tokens in %d blocks of %d after %d sinks are not an offload's", name, n->n_coded, n->n_tokens, n->n_blocks, n->block_tokens, n->sink);
    FORWARD_IF_ERROR(kv_stage_check(n->stage, n->level));
    o->n_tokens = n->n_tokens;
    o->sink = n->sink;
    o->n_coded = n->n_coded;
    o->block_tokens = n->block_tokens;
    o->n_blocks = n->n_blocks;
    o->n_exact = n->n_tokens - n->n_coded;
    o->stage = n->stage;
    o->level = n->level;
    return KV_OK;
}

static int read_blocks(kv_offload *o, const kv_pack *p, int part)
{
    const char *name = kv_pack_name(p);
    int at = o->sink;
    const size_t n = (size_t)o->n_blocks * sizeof *o->block;
    RETURN_ERROR_IF(kv_pack_page_bytes(p, part, 1) != n || kv_pack_page_bytes(p, part, 2) != (size_t)o->n_tokens * sizeof(int32_t), KV_E_CORRUPT, "file '%s': %zu bytes of blocks and %zu of tokens, for %d and %d",
                    name, kv_pack_page_bytes(p, part, 1), kv_pack_page_bytes(p, part, 2), o->n_blocks, o->n_tokens);
    if (!(o->block = kv_alloc(n))) return KV_E_NOMEM;
    FORWARD_IF_ERROR(kv_pack_read(p, part, 1, o->block, n));
    for (int b = 0; b < o->n_blocks; b++) {
        RETURN_ERROR_IF(o->block[b].tok0 != at || o->block[b].n < 1 || o->block[b].n > o->block_tokens || o->block[b].n > o->sink + o->n_coded - at, KV_E_CORRUPT,
                        "file '%s': block %d has %d tokens from %d, where %d is the next", name, b + 1, o->block[b].n, o->block[b].tok0, at);
        at += o->block[b].n;
    }
    RETURN_ERROR_IF(at != o->sink + o->n_coded, KV_E_CORRUPT, "file '%s': blocks end at token %d of %d", name, at, o->sink + o->n_coded);
    return KV_OK;
}

static int read_parts(kv_offload *o, const kv_pack *p, int salvage)
{
    const char *name = kv_pack_name(p);
    const int part = kv_pack_find(p, "offload.rows", 0);
    RETURN_ERROR_IF(part < 0 || (size_t)kv_pack_at(p, part)->n_pages != n_parts(o), KV_E_CORRUPT, "file '%s': %d pages of rows, %zu are needed", name, part < 0 ? 0 : kv_pack_at(p, part)->n_pages, n_parts(o));
    if (!(o->part = kv_alloc_array(n_parts(o), sizeof *o->part, true))) return KV_E_NOMEM;
    for (size_t i = 0; i < n_parts(o); i++) {
        kvtc_payload *to = &o->part[i];
        uint8_t *x = NULL;
        size_t n;
        int status = read_whole(p, part, (int)i, &x, &n);
        if (status >= 0 && (n < 1 || x[0] > OFFLOAD_NOTHING || (x[0] == OFFLOAD_NOTHING && n > 1))) status = kv_set_error(KV_E_CORRUPT, "file '%s': page %zu of rows has %zu bytes, stage %d", name, i, n, n ? x[0] : -1);
        if (status >= 0) {
            *to = (kvtc_payload){ x, n - 1, x[0] };
            memmove(x, x + 1, n - 1);
        } else kv_free(x);
        if (status < 0 && (status != KV_E_CORRUPT || !salvage)) return status;
    }
    return KV_OK;
}

int kv_offload_load(kv_offload **out, kv_model *m, const kv_pack *p, kv_kvtc *k, int salvage)
{
    RETURN_ERROR_IF(!out || !m || !p, KV_E_ARG, "kv_offload_load: NULL argument");
    *out = NULL;
    FORWARD_IF_ERROR(kv_pack_known(p, known, 3));
    const char *name = kv_pack_name(p);
    const int part = kv_pack_find(p, "offload", 0);
    RETURN_ERROR_IF(part < 0, KV_E_CORRUPT, "file '%s' holds no offload", name);
    RETURN_ERROR_IF(!k && kv_pack_find(p, "kvtc", 0) < 0, KV_E_ARG, "file '%s' was saved without its tables: tables = is needed", name);
    RETURN_ERROR_IF(k && k->basis->m != m, KV_E_ARG, "file '%s': the tables are of another model than the one given", name);
    kv_offload *o = kv_zalloc(sizeof *o);
    if (!o) return KV_E_NOMEM;
    char digest[65];
    counts n;
    int status;
    if (k) {
        o->k = k;
        atomic_fetch_add(&k->refs, 1);
    } else FAIL_IF_ERROR(read_tables(&o->k, m, p));
    FAIL_IF_ERROR(read_counts(o, p, part, &n));
    FAIL_IF_ERROR(kv_kvtc_digest(o->k, digest));
    FAIL_IF(memcmp(digest, n.tables, 64) != 0, KV_E_ARG, "file '%s' was coded with tables %.16s, these are %.16s", name, n.tables, digest);
    FAIL_IF_ERROR(read_blocks(o, p, part));
    FAIL_IF(kv_pack_page_bytes(p, part, 3) != exact_numbers(o) * sizeof *o->exact, KV_E_CORRUPT, "file '%s': %zu bytes of exact rows for %d tokens", name, kv_pack_page_bytes(p, part, 3), o->n_exact);
    if (!(o->exact = kv_alloc(exact_numbers(o) * sizeof *o->exact + 1))) { status = KV_E_NOMEM; goto fail; }
    FAIL_IF_ERROR(kv_pack_read(p, part, 3, o->exact, exact_numbers(o) * sizeof *o->exact));
    FAIL_IF_ERROR(read_parts(o, p, salvage));
    *out = o;
    return KV_OK;
fail:
    kv_offload_free(o);
    return status;
}
