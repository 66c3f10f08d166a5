/* kvtc.c -- KV Cache Transform Coding as published (arXiv 2511.01815): one basis over layers and heads, for offload.
 *
 * A token's keys of all layers and heads, RoPE undone, are one row of p = layers x heads x head_dim numbers; its values another.
 * Rows are centred, projected on the principal components of calibration rows, quantized in blocks that a dynamic program chose,
 * and stored losslessly coded in blocks of tokens, each readable alone.  Fewer layers may share a basis (the paper's ablation).
 *
 *   payload   of a side, group of layers and block of tokens: rows packed as in kvtc_rows.c, then the stage; or the rows' symbols in
 *             rANS with tables of the calibration, by header byte and by block of components
 *
 * The basis comes from the smaller of the two Gram matrices: rows by rows when there are fewer rows than dimensions.  The allocation
 * is measured on a quarter of the rows that the basis has not seen: on its own rows a basis of nearly as many components as rows
 * looks perfect. */
#include <math.h>
#include "calib.h"
#include "eigen.h"
#include "entropy.h"
#include "kvtc.h"

enum { MAX_RANK = 10000 /* the paper's cap */, HELD_OUT = 4, INDEX_BYTES = 16 /* of a payload: address, length, stage */, HEADER_TABLES = 4 };

typedef struct group {
    int       l0, l1, p, rank;
    float    *mean, *basis, *step;         /* [p], [rank][p] (counted as f16, and rounded to it), [rank] */
    kvtc_plan plan;
    kv_rans  *bank;
    uint8_t  *cls;                         /* [symbols of a row] */
} group;

struct kv_kvtc {
    atomic_int refs;
    kv_model  *m;
    int        n_groups;
    group     *group[2];                   /* [n_groups], keys and values */
    size_t     bank_bytes;
};

typedef struct payload { uint8_t *data; size_t n; int stage; } payload;
struct kv_offload {
    kv_kvtc *k;
    int      n_tokens, sink, n_coded, block_tokens, n_blocks, n_exact;
    payload *part;                         /* [block][side][group] */
    uint16_t *exact;                       /* [side][layer][head][n_exact][head_dim]: sinks, then the window */
};

static int stage_by_name(const char *name)
{
    static const int all[] = { KV_STAGE_RAW, KV_STAGE_ZLIB, KV_STAGE_LZMA, KV_STAGE_RANS, KV_STAGE_SMALLEST };
    for (int i = 0; name && i < 5; i++)
        if (strcmp(name, kv_stage_name(all[i])) == 0) return all[i];
    return kv_set_error(KV_E_ARG, "offload: stage '%.40s' is none of raw, zlib, lzma, rans, smallest", name ? name : "NULL");
}

/* ---- making the tables */

/* Principal components of x [n][p], centred: up to `rank` rows of `basis`, largest first.  Returns how many, or an error. */
static int components(const float *x, int n, int p, int rank, float *basis)
{
    const int dual = n < p, order = dual ? n : p;
    int status = KV_E_NOMEM;
    double *a = kv_alloc_array((size_t)order * (size_t)order + (size_t)order, sizeof *a, false), *value = a + (size_t)order * (size_t)order;
    float *gram = kv_alloc_array((size_t)order * (size_t)order, sizeof *gram, false), *turned = kv_alloc_array((size_t)n * (size_t)p, sizeof *turned, false);
    if (!a || !gram || !turned) goto fail;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < p; i++) turned[(size_t)i * (size_t)n + (size_t)t] = x[(size_t)t * (size_t)p + (size_t)i];
    if (dual) kv_sgemm_nt(n, n, p, 1, x, p, x, p, 0, gram, n);
    else kv_sgemm_nt(p, p, n, 1, turned, n, turned, n, 0, gram, p);
    for (size_t i = 0; i < (size_t)order * (size_t)order; i++) a[i] = gram[i];
    FAIL_IF_ERROR(kv_eigen_symmetric(a, order, value));
    rank = kv_min(rank, order);
    while (rank > 1 && value[rank - 1] <= 1e-6 * value[0]) rank--;              /* what float products cannot tell from 0 */
    for (int i = 0; i < rank; i++)
        for (int k = 0; k < order; k++) gram[(size_t)i * (size_t)order + (size_t)k] = (float)(a[(size_t)i * (size_t)order + (size_t)k] / (dual ? sqrt(fmax(value[i], 1e-30)) : 1));
    if (dual) kv_sgemm_nt(rank, p, n, 1, gram, n, turned, n, 0, basis, p);       /* v = X^T u / sqrt(value) */
    else memcpy(basis, gram, (size_t)rank * (size_t)p * sizeof *basis);
    for (size_t i = 0; i < (size_t)rank * (size_t)p; i++) basis[i] = kv_f16_to_f32(kv_f32_to_f16(basis[i]));
    status = rank;
fail:
    kv_free(a);
    kv_free(gram);
    kv_free(turned);
    return status;
}

/* Kept rows of a side, layers [l0, l1): x [n][p]. */
static int gather_rows(const kv_calib *c, int side, const group *g, float *x)
{
    const int d = c->m->info.head_dim, heads = c->m->info.n_kv_heads, n = c->n_sample;
    float *rows = kv_alloc_array((size_t)n * (size_t)d, sizeof *rows, false);
    if (!rows) return KV_E_NOMEM;
    int status = KV_OK;
    for (int slot = g->l0 * heads; slot < g->l1 * heads && status >= 0; slot++) {
        status = kv_calib_rows(c, side == KV_SIDE_K ? KV_CALIB_K_PRE : KV_CALIB_V, slot / heads, slot % heads, rows);
        for (int t = 0; t < n && status >= 0; t++) memcpy(x + (size_t)t * (size_t)g->p + (size_t)(slot - g->l0 * heads) * (size_t)d, rows + (size_t)t * (size_t)d, (size_t)d * sizeof *x);
    }
    kv_free(rows);
    return status;
}

static int make_bank(group *g, const float *z, int n, int ld)
{
    const kvtc_plan *p = &g->plan;
    const int n_symbols = kvtc_n_symbols(p), coded = kv_max(1, p->n_blocks), classes = kv_min(coded, KV_RANS_TABLES - HEADER_TABLES);
    uint32_t *count = kv_alloc_array((size_t)(HEADER_TABLES + classes) * 256, sizeof *count, true);
    uint8_t *symbol = kv_alloc((size_t)n_symbols + 1);
    int status = KV_E_NOMEM;
    if (!count || !symbol || !(g->cls = kv_alloc((size_t)n_symbols + 1))) goto fail;
    for (int i = 0; i < 4 * p->n_headers; i++) g->cls[i] = (uint8_t)(i % HEADER_TABLES);
    for (int b = 0, at = 4 * p->n_headers; b < p->n_blocks; b++)
        for (int i = 0; p->block[b].type != KVTC_NONE && i < p->block[b].size; i++) g->cls[at++] = (uint8_t)(HEADER_TABLES + (int64_t)b * classes / coded);
    for (int t = 0; t < n; t++) {
        kvtc_quantize(p, g->step, z + (size_t)t * (size_t)ld, symbol);
        for (int i = 0; i < n_symbols; i++) count[g->cls[i] * 256 + symbol[i]]++;
    }
    for (int k = 0; k < HEADER_TABLES + classes; k++) {                 /* a table that nothing uses still needs a symbol */
        uint32_t any = 0;
        for (int i = 0; i < 256; i++) any |= count[k * 256 + i];
        if (!any) count[k * 256] = 1;
    }
    status = kv_rans_new(&g->bank, count, HEADER_TABLES + classes);
fail:
    kv_free(count);
    kv_free(symbol);
    return status;
}

static kvtc_menu menu_of(int types)
{
    kvtc_menu m = kvtc_paper();
    if (types == 1) {
        m.fixed = m.n_sizes = 1;
        m.size[0] = 16;                                  /* one width for 16 neighbours: the tables stay small */
        m.n_types = 8;
        for (int b = 1; b <= 8; b++) m.type[b - 1] = b;
    } else if (types == 2) {
        m.n_types = 1;
        m.type[0] = 8;
    }
    return m;
}

static int make_group(group *g, const kv_calib *c, int side, double ratio, int rank, int types)
{
    const int n = c->n_sample, held = n / HELD_OUT, fit = n - held, p = g->p;
    const kvtc_menu menu = menu_of(types);
    kvtc_edges *edges = NULL;
    int status = KV_E_NOMEM;
    float *x = kv_alloc_array((size_t)n * (size_t)p, sizeof *x, false), *z = NULL;
    const int most = kv_min(kv_min(rank ? rank : MAX_RANK, p), fit);
    g->mean = kv_alloc_array((size_t)p, sizeof(float), true);
    g->basis = kv_alloc_array((size_t)most * (size_t)p, sizeof(float), false);
    if (!x || !g->mean || !g->basis) goto fail;
    FAIL_IF_ERROR(gather_rows(c, side, g, x));
    for (int i = 0; i < p; i++) {
        double sum = 0;
        for (int t = 0; t < n; t++) sum += x[(size_t)t * (size_t)p + (size_t)i];
        g->mean[i] = (float)(sum / n);
        for (int t = 0; t < n; t++) x[(size_t)t * (size_t)p + (size_t)i] -= g->mean[i];
    }
    FAIL_IF_ERROR(g->rank = components(x, fit, p, most, g->basis));
    if (!(z = kv_alloc_array((size_t)held * (size_t)g->rank, sizeof *z, false)) || !(g->step = kv_alloc_array((size_t)g->rank, sizeof(float), true))) { status = KV_E_NOMEM; goto fail; }
    kv_sgemm_nt(held, g->rank, p, 1, x + (size_t)fit * (size_t)p, p, g->basis, p, 0, z, g->rank);
    FAIL_IF_ERROR(kvtc_edges_new(&edges, &menu, z, held, g->rank, g->rank));
    FAIL_IF_ERROR(kvtc_allocate(&g->plan, edges, (int)(16.0 * p / ratio), 1));
    g->rank = g->plan.rank;                              /* trimming: what gets no bits is not projected on */
    for (int b = 0; menu.fixed && b < g->plan.n_blocks; b++)
        for (int i = g->plan.block[b].start; i < g->plan.block[b].start + g->plan.block[b].size; i++)
            g->step[i] = g->plan.block[b].type ? kvtc_fit_step(z + i, held, edges->node[edges->n_nodes - 1], g->plan.block[b].type, NULL) : 1.0f;
    FAIL_IF_ERROR(make_bank(g, z, held, edges->node[edges->n_nodes - 1]));
    status = KV_OK;
fail:
    kvtc_edges_free(edges);
    kv_free(x);
    kv_free(z);
    return status;
}

int kv_kvtc_new(kv_kvtc **out, const kv_calib *c, double ratio_k, double ratio_v, int layers, int rank, int types)
{
    RETURN_ERROR_IF(!out || !c, KV_E_ARG, "kvtc: NULL argument");
    *out = NULL;
    const kv_model_info *info = &c->m->info;
    RETURN_ERROR_IF(!(ratio_k >= 2 && ratio_k <= 1024) || !(ratio_v >= 2 && ratio_v <= 1024), KV_E_PARAM, "kvtc: ratios %g and %g are outside 2..1024", ratio_k, ratio_v);
    RETURN_ERROR_IF(layers < 0 || layers > info->n_layers, KV_E_PARAM, "kvtc: layers=%d is outside 0..%d", layers, info->n_layers);
    RETURN_ERROR_IF(rank < 0 || rank > MAX_RANK, KV_E_PARAM, "kvtc: rank=%d is outside 0..%d", rank, MAX_RANK);
    RETURN_ERROR_IF(types < 0 || types > 2, KV_E_PARAM, "kvtc: types=%d is none of 0 (paper), 1 (fine), 2 (truncate)", types);
    RETURN_ERROR_IF(c->n_sample < 64, KV_E_UNCALIBRATED, "kvtc: %d calibration rows are less than 64", c->n_sample);
    RETURN_ERROR_IF(c->n_sample > 1 << 14, KV_E_ARG, "kvtc: %d calibration rows are more than %d", c->n_sample, 1 << 14);
    kv_kvtc *k = kv_zalloc(sizeof *k);
    if (!k) return KV_E_NOMEM;
    int status = KV_OK;
    atomic_init(&k->refs, 1);
    k->m = kv_model_ref(c->m);
    layers = layers ? layers : info->n_layers;
    k->n_groups = (info->n_layers + layers - 1) / layers;
    for (int side = 0; side < 2; side++)
        if (!(k->group[side] = kv_alloc_array((size_t)k->n_groups, sizeof(group), true))) { status = KV_E_NOMEM; goto fail; }
    for (int i = 0; i < 2 * k->n_groups; i++) {
        group *g = &k->group[i % 2][i / 2];
        g->l0 = i / 2 * layers;
        g->l1 = kv_min(info->n_layers, g->l0 + layers);
        g->p = (g->l1 - g->l0) * info->n_kv_heads * info->head_dim;
        FAIL_IF(g->p > KVTC_MAX_DIMS, KV_E_UNSUPPORTED, "kvtc: rows of %d numbers are more than %d; layers=N makes them shorter", g->p, KVTC_MAX_DIMS);
        FAIL_IF_ERROR(make_group(g, c, i % 2, i % 2 ? ratio_v : ratio_k, rank, types));
        k->bank_bytes += kv_rans_write(g->bank, NULL, 0);
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
    for (int i = 0; i < 2 * k->n_groups; i++) {
        const group *g = &k->group[i % 2][i / 2];
        *bytes += 2.0 * g->rank * g->p + 4.0 * g->p + (g->plan.fixed ? 4.0 * g->rank : 0) + 4.0 * g->plan.n_blocks;
        *(i % 2 ? rank_v : rank_k) += g->rank;
    }
    return KV_OK;
}

void kv_kvtc_free(kv_kvtc *k)
{
    if (!k || atomic_fetch_sub(&k->refs, 1) != 1) return;
    for (int i = 0; i < 2 * k->n_groups; i++) {
        group *g = k->group[i % 2] ? &k->group[i % 2][i / 2] : NULL;
        if (!g) continue;
        kv_free(g->mean);
        kv_free(g->basis);
        kv_free(g->step);
        kv_free(g->cls);
        kv_rans_free(g->bank);
        kvtc_plan_clear(&g->plan);
    }
    kv_free(k->group[0]);
    kv_free(k->group[1]);
    kv_model_free(k->m);
    kv_free(k);
}

/* ---- a block of tokens */

/* Between the rows of one head [n][d] and a group's rows [n][p]; keys leave their positions on the way in, and get them back. */
static int move_rows(const kv_kvtc *k, const group *g, int side, int tok0, int n, const kv_session *s, float *x, float *heads)
{
    const int d = k->m->info.head_dim, nh = k->m->info.n_kv_heads;
    for (int slot = g->l0 * nh; slot < g->l1 * nh; slot++) {
        float *at = x + (size_t)(slot - g->l0 * nh) * (size_t)d;
        float *rows = heads + (s ? 0 : (size_t)slot * (size_t)n * (size_t)d);
        if (s) {
            FORWARD_IF_ERROR(kv_session_read(s, slot / nh, slot % nh, side, tok0, tok0 + n, rows));
            if (side == KV_SIDE_K) kv_rope_rows(&k->m->geo.rope[slot / nh], rows, d, n, -(int64_t)tok0, -1);
        }
        for (int t = 0; t < n; t++) {
            if (s) memcpy(at + (size_t)t * (size_t)g->p, rows + (size_t)t * (size_t)d, (size_t)d * sizeof *at);
            else memcpy(rows + (size_t)t * (size_t)d, at + (size_t)t * (size_t)g->p, (size_t)d * sizeof *at);
        }
        if (!s && side == KV_SIDE_K) kv_rope_rows(&k->m->geo.rope[slot / nh], rows, d, n, tok0, 1);
    }
    return KV_OK;
}

static int keep_payload(payload *out, const uint8_t *data, size_t n, int stage)
{
    if (!(out->data = kv_alloc(n + 1))) return KV_E_NOMEM;
    memcpy(out->data, data, n);
    out->n = n;
    out->stage = stage;
    return KV_OK;
}

/* x [n][p], centred here. */
static int encode_part(const group *g, float *x, int n, int stage, payload *out)
{
    const kvtc_plan *p = &g->plan;
    const size_t n_symbols = (size_t)kvtc_n_symbols(p), raw = p->row_bytes * (size_t)n;
    float *z = kv_alloc_array((size_t)n * (size_t)g->rank + 1, sizeof *z, false);
    uint8_t *symbol = kv_alloc(n_symbols * (size_t)n + 1), *packed = kv_alloc(raw + 1), *coded = kv_alloc(raw + 1);
    size_t n_coded = raw, by_rans = 0;
    int status = KV_E_NOMEM, used;
    if (!z || !symbol || !packed || !coded) goto fail;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < g->p; i++) x[(size_t)t * (size_t)g->p + (size_t)i] -= g->mean[i];
    if (g->rank) kv_sgemm_nt(n, g->rank, g->p, 1, x, g->p, g->basis, g->p, 0, z, g->rank);
    for (int t = 0; t < n; t++) {
        kvtc_quantize(p, g->step, z + (size_t)t * (size_t)g->rank, symbol + (size_t)t * n_symbols);
        kvtc_pack(p, symbol + (size_t)t * n_symbols, packed + (size_t)t * p->row_bytes);
    }
    if (raw && (stage == KV_STAGE_RANS || stage == KV_STAGE_SMALLEST)) by_rans = kv_rans_encode(g->bank, g->cls, n_symbols, symbol, n_symbols * (size_t)n, coded, raw);
    if (by_rans && stage == KV_STAGE_RANS) {
        status = keep_payload(out, coded, by_rans, KV_STAGE_RANS);
        goto fail;
    }
    if (by_rans) FAIL_IF_ERROR(keep_payload(out, coded, by_rans, KV_STAGE_RANS));
    n_coded = by_rans ? by_rans : raw;
    for (int other = KV_STAGE_ZLIB; other <= KV_STAGE_LZMA && raw; other++) {
        size_t now = raw;
        if (stage != other && stage != KV_STAGE_SMALLEST) continue;
        FAIL_IF_ERROR(used = kv_stage_encode(other, KV_LEVEL_DEFAULT, packed, raw, coded, raw, &now));
        if (used != other || now >= n_coded) continue;
        kv_free(out->data);
        out->data = NULL;
        FAIL_IF_ERROR(keep_payload(out, coded, now, other));
        n_coded = now;
    }
    status = out->data ? KV_OK : keep_payload(out, packed, raw, KV_STAGE_RAW);
fail:
    kv_free(z);
    kv_free(symbol);
    kv_free(packed);
    kv_free(coded);
    return status;
}

static int decode_part(const group *g, const payload *in, int n, float *x)
{
    const kvtc_plan *p = &g->plan;
    const size_t n_symbols = (size_t)kvtc_n_symbols(p), raw = p->row_bytes * (size_t)n;
    float *z = kv_alloc_array((size_t)n * (size_t)g->rank + 1, sizeof *z, false), *turned = kv_alloc_array((size_t)g->rank * (size_t)g->p + 1, sizeof *turned, false);
    uint8_t *symbol = kv_alloc(n_symbols * (size_t)n + 1), *packed = kv_alloc(raw + 1);
    int status = KV_E_NOMEM;
    if (!z || !turned || !symbol || !packed) goto fail;
    if (in->stage == KV_STAGE_RANS) FAIL_IF_ERROR(kv_rans_decode(g->bank, g->cls, n_symbols, in->data, in->n, symbol, n_symbols * (size_t)n));
    else FAIL_IF_ERROR(kv_stage_decode(in->stage, in->data, in->n, packed, raw));
    for (int t = 0; t < n; t++) {
        if (in->stage != KV_STAGE_RANS) kvtc_unpack(p, packed + (size_t)t * p->row_bytes, symbol + (size_t)t * n_symbols);
        kvtc_dequantize(p, g->step, symbol + (size_t)t * n_symbols, z + (size_t)t * (size_t)g->rank);
    }
    for (int j = 0; j < g->rank; j++)
        for (int i = 0; i < g->p; i++) turned[(size_t)i * (size_t)g->rank + (size_t)j] = g->basis[(size_t)j * (size_t)g->p + (size_t)i];
    for (int t = 0; t < n; t++) memcpy(x + (size_t)t * (size_t)g->p, g->mean, (size_t)g->p * sizeof *x);
    if (g->rank) kv_sgemm_nt(n, g->p, g->rank, 1, z, g->rank, turned, g->rank, 1, x, g->p);
    status = KV_OK;
fail:
    kv_free(z);
    kv_free(turned);
    kv_free(symbol);
    kv_free(packed);
    return status;
}

/* ---- a session's tokens */

static int block_rows(const kv_offload *o, int block) { return kv_min(o->block_tokens, o->n_coded - block * o->block_tokens); }

static int encode_blocks(kv_offload *o, const kv_session *s, int stage)
{
    const kv_kvtc *k = o->k;
    const int widest = k->group[0][0].p;
    int status = KV_OK;
    float *x = kv_alloc_array((size_t)o->block_tokens, (size_t)widest * sizeof *x, false), *rows = kv_alloc_array((size_t)o->block_tokens, (size_t)k->m->info.head_dim * sizeof *rows, false);
    if (!x || !rows) status = KV_E_NOMEM;
    for (int i = 0; i < o->n_blocks * 2 * k->n_groups && status >= 0; i++) {
        const int block = i / (2 * k->n_groups), side = i / k->n_groups % 2, n = block_rows(o, block);
        const group *g = &k->group[side][i % k->n_groups];
        status = move_rows(k, g, side, o->sink + block * o->block_tokens, n, s, x, rows);
        if (status >= 0) status = encode_part(g, x, n, stage, &o->part[i]);
    }
    kv_free(x);
    kv_free(rows);
    return status;
}

/* Exact rows lie before the coded ones and after them. */
static int exact_token(const kv_offload *o, int i) { return i < o->sink ? i : i + o->n_coded; }

static int copy_exact(kv_offload *o, const kv_session *from, kv_session *to)
{
    const kv_model_info *info = &o->k->m->info;
    const int d = info->head_dim, slots = info->n_layers * info->n_kv_heads;
    float *rows = kv_alloc_array((size_t)o->n_exact + 1, (size_t)d * sizeof *rows, false);
    int status = rows ? KV_OK : KV_E_NOMEM;
    for (int i = 0; i < 2 * slots && status >= 0; i++) {
        uint16_t *half = o->exact + (size_t)i * (size_t)o->n_exact * (size_t)d;
        for (int e = 0, n; e < o->n_exact && status >= 0; e += n) {
            n = e < o->sink ? kv_min(o->sink, o->n_exact) - e : o->n_exact - e;
            const int at = exact_token(o, e);
            if (from) {
                status = kv_session_read(from, i % slots / info->n_kv_heads, i % info->n_kv_heads, i / slots, at, at + n, rows);
                for (int j = 0; j < n * d && status >= 0; j++) half[(size_t)e * (size_t)d + (size_t)j] = kv_f32_to_f16(fminf(fmaxf(rows[j], -65504.0f), 65504.0f));
            } else {
                for (int j = 0; j < n * d; j++) rows[j] = kv_f16_to_f32(half[(size_t)e * (size_t)d + (size_t)j]);
                status = kv_session_write(to, i % slots / info->n_kv_heads, i % info->n_kv_heads, i / slots, at, at + n, rows);
            }
        }
    }
    kv_free(rows);
    return status;
}

int kv_offload_new(kv_offload **out, kv_kvtc *k, const kv_session *s, int sink, int window, int block_tokens, const char *stage_name)
{
    RETURN_ERROR_IF(!out || !k || !s, KV_E_ARG, "offload: NULL argument");
    *out = NULL;
    int status, stage;
    FORWARD_IF_ERROR(stage = stage_by_name(stage_name));
    RETURN_ERROR_IF(kv_session_model(s) != k->m, KV_E_ARG, "offload: the session is of another model than the tables");
    const kv_model_info *info = &k->m->info;
    const int n = kv_session_n_tokens(s);
    RETURN_ERROR_IF(sink < 0 || window < 0 || block_tokens < 1 || block_tokens > 1 << 14, KV_E_ARG, "offload: sink=%d, window=%d and block_tokens=%d are outside 0.., 0.. and 1..%d", sink, window, block_tokens, 1 << 14);
    RETURN_ERROR_IF(n - sink - window < 1, KV_E_ARG, "offload: of %d tokens none lies between sink=%d and window=%d", n, sink, window);
    kv_offload *o = kv_zalloc(sizeof *o);
    if (!o) return KV_E_NOMEM;
    atomic_fetch_add(&k->refs, 1);
    *o = (kv_offload){ .k = k, .n_tokens = n, .sink = sink, .n_coded = n - sink - window, .block_tokens = block_tokens, .n_exact = sink + window };
    o->n_blocks = (o->n_coded + block_tokens - 1) / block_tokens;
    o->part = kv_alloc_array((size_t)o->n_blocks * 2 * (size_t)k->n_groups, sizeof *o->part, true);
    o->exact = kv_alloc_array((size_t)o->n_exact * 2 + 1, (size_t)info->n_layers * (size_t)info->n_kv_heads * (size_t)info->head_dim * sizeof *o->exact, true);
    if (!o->part || !o->exact) { status = KV_E_NOMEM; goto fail; }
    FAIL_IF_ERROR(encode_blocks(o, s, stage));
    FAIL_IF_ERROR(copy_exact(o, s, NULL));
    *out = o;
    return KV_OK;
fail:
    kv_offload_free(o);
    return status;
}

int kv_offload_shape(const kv_offload *o, int *n_tokens, int *n_coded, int *n_blocks)
{
    RETURN_ERROR_IF(!o || !n_tokens || !n_coded || !n_blocks, KV_E_ARG, "offload: NULL argument");
    *n_tokens = o->n_tokens;
    *n_coded = o->n_coded;
    *n_blocks = o->n_blocks;
    return KV_OK;
}

int kv_offload_bytes(const kv_offload *o, kv_bytes *out)
{
    RETURN_ERROR_IF(!o || !out, KV_E_ARG, "offload: NULL argument");
    const kv_model_info *info = &o->k->m->info;
    const int parts = o->n_blocks * 2 * o->k->n_groups;
    int rank_k, rank_v;
    *out = (kv_bytes){ .exact = 4.0 * o->n_exact * info->n_layers * info->n_kv_heads * info->head_dim, .state = (double)INDEX_BYTES * parts };
    for (int i = 0; i < parts; i++) out->codes += (double)o->part[i].n;
    FORWARD_IF_ERROR(kv_kvtc_tables(o->k, &out->shared, &rank_k, &rank_v));
    out->total = out->codes + out->exact + out->state + out->shared;
    return KV_OK;
}

int kv_offload_read(const kv_offload *o, int side, int block, float *dst)
{
    RETURN_ERROR_IF(!o || !dst, KV_E_ARG, "offload: NULL argument");
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "side %d is not 0 (k) or 1 (v)", side);
    RETURN_ERROR_IF(block < 0 || block >= o->n_blocks, KV_E_ARG, "offload: block %d is outside 1..%d", block + 1, o->n_blocks);
    const kv_kvtc *k = o->k;
    const int n = block_rows(o, block);
    float *x = kv_alloc_array((size_t)n, (size_t)k->group[0][0].p * sizeof *x, false);
    int status = x ? KV_OK : KV_E_NOMEM;
    for (int i = 0; i < k->n_groups && status >= 0; i++) {
        const group *g = &k->group[side][i];
        status = decode_part(g, &o->part[(block * 2 + side) * k->n_groups + i], n, x);
        if (status >= 0) status = move_rows(k, g, side, o->sink + block * o->block_tokens, n, NULL, x, dst);
    }
    kv_free(x);
    return status;
}

int kv_offload_restore(const kv_offload *o, kv_session *s)
{
    RETURN_ERROR_IF(!o || !s, KV_E_ARG, "offload: NULL argument");
    RETURN_ERROR_IF(kv_session_model(s) != o->k->m, KV_E_ARG, "offload: the session is of another model than what was offloaded");
    const kv_model_info *info = &o->k->m->info;
    const int slots = info->n_layers * info->n_kv_heads, d = info->head_dim;
    int status = KV_OK;
    FORWARD_IF_ERROR(kv_session_import(s, o->n_tokens));
    float *rows = kv_alloc_array((size_t)o->block_tokens * (size_t)slots, (size_t)d * sizeof *rows, false);
    if (!rows) return KV_E_NOMEM;
    for (int i = 0; i < 2 * o->n_blocks && status >= 0; i++) {
        const int n = block_rows(o, i / 2), at = o->sink + i / 2 * o->block_tokens;
        status = kv_offload_read(o, i % 2, i / 2, rows);
        for (int slot = 0; slot < slots && status >= 0; slot++)
            status = kv_session_write(s, slot / info->n_kv_heads, slot % info->n_kv_heads, i % 2, at, at + n, rows + (size_t)slot * (size_t)n * (size_t)d);
    }
    kv_free(rows);
    return status < 0 ? status : copy_exact((kv_offload *)o, NULL, s);
}

void kv_offload_free(kv_offload *o)
{
    if (!o) return;
    for (int i = 0; o->part && i < o->n_blocks * 2 * o->k->n_groups; i++) kv_free(o->part[i].data);
    kv_free(o->part);
    kv_free(o->exact);
    kv_kvtc_free(o->k);
    kv_free(o);
}
