/* kvtc.c -- KV Cache Transform Coding as published (arXiv 2511.01815): one basis over layers and heads, for offload.
 *
 * A token's keys of all layers and heads, RoPE undone, are one row of p = layers x heads x head_dim numbers; its values another.
 * Rows are centred, projected on the principal components of calibration rows (kvtc_basis.c), quantized in blocks that a dynamic program
 * chose, and stored losslessly coded in blocks of tokens, each readable alone (offload.c).  Fewer layers or heads may share a
 * basis (the paper's ablation).
 *
 *   payload   of a side, group of slots and block of tokens: rows packed as in kvtc_rows.c, then the stage; or the rows' symbols in
 *             rANS with tables of the calibration, by header byte and by block of components */
#include <math.h>
#include "kvtc_impl.h"

enum { HEADER_TABLES = 4 };

/* ---- tables */

int kvtc_group_classes(kvtc_group *g)
{
    const kvtc_plan *p = &g->plan;
    const int coded = kv_max(1, p->n_blocks), classes = kv_min(coded, KV_RANS_TABLES - HEADER_TABLES);
    if (!(g->cls = kv_alloc((size_t)kvtc_n_symbols(p) + 1))) return KV_E_NOMEM;
    for (int i = 0; i < 4 * p->n_headers; i++) g->cls[i] = (uint8_t)(i % HEADER_TABLES);
    for (int b = 0, at = 4 * p->n_headers; b < p->n_blocks; b++)
        for (int i = 0; p->block[b].type != KVTC_NONE && i < p->block[b].size; i++) g->cls[at++] = (uint8_t)(HEADER_TABLES + (int64_t)b * classes / coded);
    return HEADER_TABLES + classes;
}

static int make_bank(kvtc_group *g, const float *z, int n, int ld)
{
    const int n_symbols = kvtc_n_symbols(&g->plan), n_tables = kvtc_group_classes(g);
    uint32_t *count = kv_alloc_array((size_t)kv_max(0, n_tables) * 256, sizeof *count, true);
    uint8_t *symbol = kv_alloc((size_t)n_symbols + 1);
    int status = KV_E_NOMEM;
    if (n_tables < 0 || !count || !symbol) goto fail;
    for (int t = 0; t < n; t++) {
        kvtc_quantize(&g->plan, g->step, z + (size_t)t * (size_t)ld, symbol);
        for (int i = 0; i < n_symbols; i++) count[g->cls[i] * 256 + symbol[i]]++;
    }
    for (int k = 0; k < n_tables; k++) {                 /* a table that nothing uses still needs a symbol */
        uint32_t any = 0;
        for (int i = 0; i < 256; i++) any |= count[k * 256 + i];
        if (!any) count[k * 256] = 1;
    }
    status = kv_rans_new(&g->bank, count, n_tables);
fail:
    kv_free(count);
    kv_free(symbol);
    return status;
}

static kvtc_menu menu_of(const kv_kvtc_options *o)
{
    kvtc_menu m = kvtc_paper();
    if (o->types == KV_KVTC_FINE) {
        m.fixed = m.n_sizes = 1;
        m.size[0] = 16;                                  /* one width for 16 neighbours: the tables stay small */
        m.n_types = 8;
        for (int b = 1; b <= 8; b++) m.type[b - 1] = b;
    } else if (o->types == KV_KVTC_E4M3) {
        m.type[2] = KVTC_E4M3;
    } else if (o->types == KV_KVTC_UNIFORM) {
        m.n_types = 1;
        m.type[0] = o->bits;
    }
    return m;
}

static int make_group(kvtc_group *g, const kvtc_space *s, double ratio, const kv_kvtc_options *o)
{
    const kvtc_menu menu = menu_of(o);
    kvtc_edges *edges = NULL;
    int status;
    g->space = s;
    FAIL_IF_ERROR(kvtc_edges_new(&edges, &menu, s->z, s->held, s->rank, s->rank));
    FAIL_IF_ERROR(kvtc_allocate(&g->plan, edges, (int)(16.0 * s->p / ratio), !o->lagrange));
    if (!(g->step = kv_alloc_array((size_t)g->plan.rank + 1, sizeof(float), true))) { status = KV_E_NOMEM; goto fail; }
    for (int b = 0; menu.fixed && b < g->plan.n_blocks; b++)
        for (int i = g->plan.block[b].start; i < g->plan.block[b].start + g->plan.block[b].size; i++)
            g->step[i] = g->plan.block[b].type ? kvtc_fit_step(s->z + i, s->held, s->rank, g->plan.block[b].type, NULL) : 1.0f;
    status = make_bank(g, s->z, s->held, s->rank);
fail:
    kvtc_edges_free(edges);
    return status;
}

int kv_kvtc_new(kv_kvtc **out, const kv_calib *c, const kv_kvtc *like, const kv_kvtc_options *o)
{
    RETURN_ERROR_IF(!out || !o || (!c && !like), KV_E_ARG, "kvtc: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(!(o->ratio_k >= 2 && o->ratio_k <= 1024) || !(o->ratio_v >= 2 && o->ratio_v <= 1024), KV_E_PARAM, "kvtc: ratios %g and %g are outside 2..1024", o->ratio_k, o->ratio_v);
    RETURN_ERROR_IF(o->types < KV_KVTC_PAPER || o->types > KV_KVTC_UNIFORM, KV_E_PARAM, "kvtc: types=%d is none of 0 (paper), 1 (fine), 2 (e4m3), 3 (uniform)", o->types);
    RETURN_ERROR_IF(o->types == KV_KVTC_UNIFORM && (o->bits < 1 || o->bits > 8), KV_E_PARAM, "kvtc: bits=%d is outside 1..8", o->bits);
    RETURN_ERROR_IF(like && !like->basis->space[0][0].z, KV_E_ARG, "kvtc: tables from a file have their own components only, others cannot be made of them");
    kv_kvtc *k = kv_zalloc(sizeof *k);
    if (!k) return KV_E_NOMEM;
    int status = KV_OK;
    atomic_init(&k->refs, 1);
    if (like) {
        k->basis = like->basis;
        atomic_fetch_add(&k->basis->refs, 1);
    } else FAIL_IF_ERROR(kvtc_basis_new(&k->basis, c, o));
    for (int side = 0; side < 2; side++)
        if (!(k->group[side] = kv_alloc_array((size_t)k->basis->n_groups, sizeof(kvtc_group), true))) { status = KV_E_NOMEM; goto fail; }
    for (int i = 0; i < 2 * k->basis->n_groups; i++) {
        FAIL_IF_ERROR(make_group(&k->group[i % 2][i / 2], &k->basis->space[i % 2][i / 2], i % 2 ? o->ratio_v : o->ratio_k, o));
        k->bank_bytes += kv_rans_write(k->group[i % 2][i / 2].bank, NULL, 0);
    }
    *out = k;
    return KV_OK;
fail:
    kv_kvtc_free(k);
    return status;
}

int kv_kvtc_tables(const kv_kvtc *k, double *bytes, int *rank_k, int *rank_v)
{
    RETURN_ERROR_IF(!k || !bytes || !rank_k || !rank_v, KV_E_ARG, "kvtc: NULL argument");
    *bytes = (double)k->bank_bytes;
    *rank_k = *rank_v = 0;
    for (int i = 0; i < 2 * k->basis->n_groups; i++) {
        const kvtc_group *g = &k->group[i % 2][i / 2];
        *bytes += 2.0 * g->plan.rank * g->space->p + (g->space->unit ? 8.0 : 4.0) * g->space->p + (g->plan.fixed ? 4.0 * g->plan.rank : 0) + 4.0 * g->plan.n_blocks;
        *(i % 2 ? rank_v : rank_k) += g->plan.rank;
    }
    return KV_OK;
}

void kv_kvtc_free(kv_kvtc *k)
{
    if (!k || atomic_fetch_sub(&k->refs, 1) != 1) return;
    for (int i = 0; k->basis && i < 2 * k->basis->n_groups; i++) {
        kvtc_group *g = k->group[i % 2] ? &k->group[i % 2][i / 2] : NULL;
        if (!g) continue;
        kv_free(g->step);
        kv_free(g->cls);
        kv_rans_free(g->bank);
        kvtc_plan_clear(&g->plan);
    }
    kv_free(k->group[0]);
    kv_free(k->group[1]);
    kvtc_basis_free(k->basis);
    kv_free(k);
}

/* ---- a block of tokens */

static int keep_payload(kvtc_payload *out, const uint8_t *data, size_t n, int stage)
{
    kv_free(out->data);
    *out = (kvtc_payload){ kv_alloc(n + 1), n, stage };
    if (!out->data) return KV_E_NOMEM;
    memcpy(out->data, data, n);
    return KV_OK;
}

int kvtc_encode_rows(const kvtc_group *g, float *x, int n, int stage, int level, kvtc_payload *out)
{
    const kvtc_plan *p = &g->plan;
    const int width = g->space->p;
    const size_t n_symbols = (size_t)kvtc_n_symbols(p), raw = p->row_bytes * (size_t)n;
    float *z = kv_alloc_array((size_t)n * (size_t)p->rank + 1, sizeof *z, false);
    uint8_t *symbol = kv_alloc(n_symbols * (size_t)n + 1), *packed = kv_alloc(raw + 1), *coded = kv_alloc(raw + 1);
    size_t best = raw;
    int status = KV_E_NOMEM, used;
    if (!z || !symbol || !packed || !coded) goto fail;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < width; i++) {
            float *at = &x[(size_t)t * (size_t)width + (size_t)i];
            *at -= g->space->mean[i];
            if (g->space->unit) *at /= g->space->unit[i];
        }
    kvtc_gemm(1, n, p->rank, width, x, g->space->v, width, 0, z);
    for (int t = 0; t < n; t++) {
        kvtc_quantize(p, g->step, z + (size_t)t * (size_t)p->rank, symbol + (size_t)t * n_symbols);
        kvtc_pack(p, symbol + (size_t)t * n_symbols, packed + (size_t)t * p->row_bytes);
    }
    if (raw && (stage == KV_STAGE_RANS || stage == KV_STAGE_SMALLEST)) {
        const size_t now = kv_rans_encode(g->bank, g->cls, n_symbols, symbol, n_symbols * (size_t)n, coded, raw);
        if (now && now < best) FAIL_IF_ERROR(keep_payload(out, coded, best = now, KV_STAGE_RANS));
    }
    for (int other = KV_STAGE_ZLIB; other <= KV_STAGE_LZMA && raw; other++) {
        size_t now = raw;
        if (stage != other && stage != KV_STAGE_SMALLEST) continue;
        FAIL_IF_ERROR(used = kv_stage_encode(other, level, packed, raw, coded, raw, &now));
        if (used == other && now < best) FAIL_IF_ERROR(keep_payload(out, coded, best = now, other));
    }
    status = out->data ? KV_OK : keep_payload(out, packed, raw, KV_STAGE_RAW);
fail:
    kv_free(z);
    kv_free(symbol);
    kv_free(packed);
    kv_free(coded);
    return status;
}

int kvtc_decode_rows(const kvtc_group *g, const kvtc_payload *in, int n, float *x)
{
    const kvtc_plan *p = &g->plan;
    const int width = g->space->p;
    const size_t n_symbols = (size_t)kvtc_n_symbols(p), raw = p->row_bytes * (size_t)n;
    float *z = kv_alloc_array((size_t)n * (size_t)p->rank + 1, sizeof *z, false);
    uint8_t *symbol = kv_alloc(n_symbols * (size_t)n + 1), *packed = kv_alloc(raw + 1);
    int status = KV_E_NOMEM;
    if (!z || !symbol || !packed) goto fail;
    if (in->stage == KV_STAGE_RANS) FAIL_IF_ERROR(kv_rans_decode(g->bank, g->cls, n_symbols, in->data, in->n, symbol, n_symbols * (size_t)n));
    else FAIL_IF_ERROR(kv_stage_decode(in->stage, in->data, in->n, packed, raw));
    for (int t = 0; t < n; t++) {
        if (in->stage != KV_STAGE_RANS) kvtc_unpack(p, packed + (size_t)t * p->row_bytes, symbol + (size_t)t * n_symbols);
        kvtc_dequantize(p, g->step, symbol + (size_t)t * n_symbols, z + (size_t)t * (size_t)p->rank);
    }
    memset(x, 0, (size_t)n * (size_t)width * sizeof *x);
    kvtc_gemm(0, n, width, p->rank, z, g->space->v, width, 0, x);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < width; i++) {
            float *at = &x[(size_t)t * (size_t)width + (size_t)i];
            *at = (g->space->unit ? *at * g->space->unit[i] : *at) + g->space->mean[i];
        }
    status = KV_OK;
fail:
    kv_free(z);
    kv_free(symbol);
    kv_free(packed);
    return status;
}
