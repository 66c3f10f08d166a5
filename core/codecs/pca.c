/* pca.c -- principal components of one head, bits where the variance is: KVTC (arXiv 2511.01815) with the basis of a head.
 *
 * z = V (x - mean) with V the eigenvectors of the covariance, largest first; a dynamic program over blocks of components says
 * how many bits each gets (kvtc.h), and what gets none is dropped.  Rows have a fixed size, so any token is at hand.
 *
 *   page     | row 0 | row 1 | ... |
 *   row      | shift f16, scale f16 of each block (scale=token) | codes, lowest bit first, in order of the components | to a byte |
 *   tables   0 head_dim u32 | 4 rank u32 | 8 blocks u32 | 12 fixed u32 | mean f32 [head_dim] | step f32 [rank], fixed only |
 *            size u16, type u16 [blocks] | V f16 [rank][head_dim] |     type: 0 nothing, 1-8 bits, 9 e4m3
 *
 * Keys are best made page-relative (page_rope=k), which is this codec's form of the paper's undoing of RoPE: rotated keys of all
 * positions have no low-rank basis.  The published basis spans all layers and heads, which pages of one head cannot hold; that
 * form is for offload (kv.offload).
 *
 * Encoding arithmetic: z_j is summed over the channels in ascending order, y_i over the components, in f32, no contraction.
 *
 * Attention reads a tile of rows as coefficients, behind which stands a 1 for the mean, and is done with them as with any f32
 * rows.  What is saved over decoding is the basis: head_dim multiplications a coefficient. */
#include <immintrin.h>
#include <math.h>
#include "../calib.h"
#include "../eigen.h"
#include "../kvtc.h"
#include "../vecmath.h"
#include "pca_device.h"

enum { P_BITS, P_TYPES, P_SCALE, P_ALLOCATE };
enum { TYPES_FINE, TYPES_PAPER, TYPES_E4M3 };
enum { SCALE_STATIC, SCALE_TOKEN };
enum { HEADER = 16, MAX_RANK = KV_MAX_HEAD_DIM, MAX_PADDED = MAX_RANK + 16, OVERREAD = 16 };

static const kv_param params[] = {
    { "bits",     "bits per element that the allocation may spend, headers of blocks included", KV_PARAM_REAL, 4, 0.25, 8, NULL },
    { "types",    "what a block may be beside nothing: 1 to 8 bits; 2, 4 or 8 bits; 2 or 4 bits or FP8 e4m3 without header", KV_PARAM_CHOICE, TYPES_FINE, 0, 2, "fine|paper|e4m3" },
    { "scale",    "step of each component from calibration, or shift and scale of each block with every token", KV_PARAM_CHOICE, SCALE_STATIC, 0, 1, "static|token" },
    { "allocate", "dynamic program over every number of bits, or Lagrange multiplier", KV_PARAM_CHOICE, 0, 0, 1, "dp|lagrange" },
};

/* Eight neighbouring components: the 4 bytes of 16 from `at` on that hold each code, its shift and its mask (0: no bits). */
typedef struct pca_eight {
    _Alignas(32) uint8_t shuffle[32];
    _Alignas(32) int32_t shift[8];
    _Alignas(32) int32_t mask[8];
    int                  at;
} pca_eight;

typedef struct pca_state {
    kvtc_plan  plan;
    int        padded, simd;        /* rank + 1 rounded up to 16; 1: no block is e4m3, which pca_level.h cannot read */
    size_t     reach;               /* of a row's reads by pca_level.h, from its start */
    size_t     forward_ld, back_ld; /* rank and head_dim, rounded up to 16 */
    float     *mean, *step, *low;   /* [head_dim], [padded]: calibrated steps and -(2^b - 1) / 2, 0 where nothing is stored */
    float     *forward, *back;      /* V^T [head_dim][forward_ld], V [rank][back_ld], zeros behind */
    pca_eight *eight;               /* [padded / 8] */
} pca_state;

/* ---- tables */

static kvtc_menu menu_of(const kv_codec *c)
{
    kvtc_menu m = kvtc_paper();
    m.fixed = c->value[P_SCALE] == SCALE_STATIC;
    /* Without headers larger blocks are the same as many small ones; those of 16 reach the places that are 16 apart (from 64 on). */
    if (m.fixed) m.n_sizes = 2;
    if (c->value[P_TYPES] == TYPES_E4M3) m.type[2] = KVTC_E4M3;
    if (c->value[P_TYPES] == TYPES_FINE) {
        m.n_types = 8;
        for (int b = 1; b <= 8; b++) m.type[b - 1] = b;
    }
    return m;
}

static void put_u32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }

static size_t table_bytes(int d, const kvtc_plan *p)
{
    return HEADER + 4 * (size_t)d + (p->fixed ? 4 * (size_t)p->rank : 0) + 4 * (size_t)p->n_blocks + 2 * (size_t)p->rank * (size_t)d;
}

/* z [n][d] of the sample in the basis v. */
static void project(const kv_moments *m, const double *v, float *z)
{
    const int d = m->head_dim;
    for (int t = 0; t < m->n_sample; t++)
        for (int j = 0; j < d; j++) {
            double s = 0;
            for (int i = 0; i < d; i++) s += v[(size_t)j * d + i] * (m->sample[(size_t)t * d + i] - m->mean[i]);
            z[(size_t)t * d + j] = (float)s;
        }
}

static void write_tables(const kv_moments *m, const kvtc_plan *p, const double *v, const float *z, uint8_t *to)
{
    const int d = m->head_dim;
    put_u32(to, (uint32_t)d);
    put_u32(to + 4, (uint32_t)p->rank);
    put_u32(to + 8, (uint32_t)p->n_blocks);
    put_u32(to + 12, (uint32_t)p->fixed);
    to += HEADER;
    for (int i = 0; i < d; i++, to += 4) put_u32(to, kv_f32_bits((float)m->mean[i]));
    for (int b = 0; p->fixed && b < p->n_blocks; b++)
        for (int i = p->block[b].start; i < p->block[b].start + p->block[b].size; i++, to += 4) {
            const int type = p->block[b].type;
            put_u32(to, kv_f32_bits(type == KVTC_NONE || type == KVTC_E4M3 ? 1.0f : kvtc_fit_step(z + i, m->n_sample, d, type, NULL)));
        }
    for (int b = 0; b < p->n_blocks; b++, to += 4) put_u32(to, (uint32_t)p->block[b].size | (uint32_t)p->block[b].type << 16);
    for (size_t i = 0; i < (size_t)p->rank * (size_t)d; i++, to += 2) kv_store_u16(to, kv_f32_to_f16((float)v[i]));
}

static int pca_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes)
{
    const int d = c->head_dim;
    const size_t square = (size_t)d * (size_t)d;
    const kvtc_menu menu = menu_of(c);
    FORWARD_IF_ERROR(kv_moments_need_rows(m, c->ops->name));
    int status = KV_E_NOMEM;
    kvtc_edges *edges = NULL;
    kvtc_plan plan = { 0 };
    double *v = kv_alloc_array(square + (size_t)d, sizeof *v, false);
    float *z = kv_alloc_array((size_t)m->n_sample * (size_t)d, sizeof *z, false);
    if (!v || !z) goto fail;
    for (int i = 0; i < d; i++)
        for (int k = 0; k < d; k++) v[(size_t)i * d + k] = m->second[(size_t)i * d + k] - m->mean[i] * m->mean[k];
    FAIL_IF_ERROR(kv_eigen_symmetric(v, d, v + square));
    project(m, v, z);
    FAIL_IF_ERROR(kvtc_edges_new(&edges, &menu, z, m->n_sample, d, d));
    FAIL_IF_ERROR(kvtc_allocate(&plan, edges, 8 * (int)ceil(c->value[P_BITS] * d / 8), c->value[P_ALLOCATE] == 0));
    *blob_bytes = table_bytes(d, &plan);
    if (!(*blob = kv_alloc(*blob_bytes))) { status = KV_E_NOMEM; goto fail; }
    write_tables(m, &plan, v, z, *blob);
    status = KV_OK;
fail:
    kvtc_plan_clear(&plan);
    kvtc_edges_free(edges);
    kv_free(v);
    kv_free(z);
    return status;
}

/* ---- life */

static int read_floats(float *to, const uint8_t **at, int n, const char *what, bool positive)
{
    for (int i = 0; i < n; i++, *at += 4) {
        to[i] = kv_bits_f32(kv_load_u32(*at));
        RETURN_ERROR_IF(!isfinite(to[i]) || (positive && !(to[i] >= 1e-30f)), KV_E_CORRUPT, "codec 'pca': %s[%d] = %g is not a %s number", what, i, (double)to[i], positive ? "positive" : "finite");
    }
    return KV_OK;
}

static void find_codes(pca_state *s)
{
    const kvtc_plan *p = &s->plan;
    int bit = p->header_bits;
    s->simd = 1;
    s->reach = OVERREAD;
    for (int b = 0; b < p->n_blocks; b++)
        for (int k = p->block[b].start; k < p->block[b].start + p->block[b].size; k++) {
            const int type = p->block[b].type;
            pca_eight *e = &s->eight[k / 8];
            s->simd &= type != KVTC_E4M3;
            if (k % 8 == 0) e->at = bit / 8;
            for (int i = 0; i < 4; i++) e->shuffle[4 * (k % 8) + i] = (uint8_t)(bit / 8 - e->at + i);
            e->shift[k % 8] = bit % 8;
            s->reach = (size_t)e->at + OVERREAD;
            if (type == KVTC_NONE) s->step[k] = 0;
            else if (type != KVTC_E4M3) {
                e->mask[k % 8] = (1 << type) - 1;
                s->low[k] = -((float)(1 << type) * 0.5f - 0.5f);
                bit += type;
            }
        }
}

static int pca_init(kv_codec *c)
{
    pca_state *s = c->state;
    const int d = c->head_dim;
    const uint8_t *at = c->blob;
    RETURN_ERROR_IF(c->blob_bytes < HEADER, KV_E_CORRUPT, "codec 'pca': %zu bytes of tables are less than %d", c->blob_bytes, HEADER);
    const uint32_t dim = kv_load_u32(at), rank = kv_load_u32(at + 4), blocks = kv_load_u32(at + 8), fixed = kv_load_u32(at + 12);
    RETURN_ERROR_IF(dim != (uint32_t)d || rank > dim || blocks > rank || fixed > 1, KV_E_CORRUPT, "codec 'pca': tables for head_dim=%u of rank %u in %u blocks do not fit head_dim=%d", dim, rank, blocks, d);
    kvtc_plan *p = &s->plan;
    p->fixed = (int)fixed;
    p->rank = (int)rank;
    p->n_blocks = (int)blocks;
    RETURN_ERROR_IF(c->blob_bytes != table_bytes(d, p), KV_E_CORRUPT, "codec 'pca': %zu bytes of tables, rank %u in %u blocks needs %zu", c->blob_bytes, rank, blocks, table_bytes(d, p));
    s->padded = (int)kv_round_up((size_t)rank + 1, 16);
    s->forward_ld = kv_round_up(rank, 16);
    s->back_ld = kv_round_up((size_t)d, 16);
    p->block = kv_alloc_array((size_t)blocks + 1, sizeof *p->block, true);
    s->mean = kv_alloc_array((size_t)d, sizeof(float), false);
    s->step = kv_alloc_array((size_t)s->padded, sizeof(float), true);
    s->low = kv_alloc_array((size_t)s->padded, sizeof(float), true);
    s->forward = kv_alloc_array((size_t)d * s->forward_ld + 1, sizeof(float), true);
    s->back = kv_alloc_array((size_t)rank * s->back_ld + 1, sizeof(float), true);
    s->eight = kv_alloc_array((size_t)s->padded / 8, sizeof *s->eight, true);
    if (!p->block || !s->mean || !s->step || !s->low || !s->forward || !s->back || !s->eight) return KV_E_NOMEM;
    at += HEADER;
    FORWARD_IF_ERROR(read_floats(s->mean, &at, d, "mean", false));
    if (fixed) FORWARD_IF_ERROR(read_floats(s->step, &at, (int)rank, "step", true));
    for (int b = 0, start = 0; b < (int)blocks; b++, at += 4) {
        p->block[b] = (kvtc_block){ start, kv_load_u16(at), kv_load_u16(at + 2) };
        start += p->block[b].size;
    }
    FORWARD_IF_ERROR(kvtc_plan_count(p, (int)rank));
    RETURN_ERROR_IF(p->rank != (int)rank, KV_E_CORRUPT, "codec 'pca': blocks end at component %d of %u", p->rank, rank);
    for (int j = 0; j < (int)rank; j++)
        for (int i = 0; i < d; i++, at += 2) {
            const float v = kv_f16_to_f32(kv_load_u16(at));
            RETURN_ERROR_IF(!(fabsf(v) <= 2), KV_E_CORRUPT, "codec 'pca': basis[%d][%d] = %g is not within 2", j, i, (double)v);
            s->forward[(size_t)i * s->forward_ld + (size_t)j] = s->back[(size_t)j * s->back_ld + (size_t)i] = v;
        }
    find_codes(s);
    if (!p->row_bytes) p->row_bytes = 1;                 /* a budget below one block: the mean alone */
    c->page.scales = (double)p->header_bits / 8 * c->page_tokens;
    c->page.codes = (double)p->code_bits * c->page_tokens / 8;
    c->page.padding = (double)p->row_bytes * c->page_tokens - c->page.scales - c->page.codes;
    c->bits_nominal = (double)p->code_bits / d;
    c->granule = 1;
    c->space_dim = s->padded;
    c->query_bytes = (size_t)s->padded * sizeof(float);
    return KV_OK;
}

static void pca_fini(kv_codec *c)
{
    pca_state *s = c->state;
    kvtc_plan_clear(&s->plan);
    kv_free(s->mean);
    kv_free(s->step);
    kv_free(s->low);
    kv_free(s->forward);
    kv_free(s->back);
    kv_free(s->eight);
}

/* ---- rows */

#define LEVEL_FILE "codecs/pca_level.h"
#include "../levels.h"
#undef LEVEL_FILE

/* y[k] += sum_i x[i] m[i][k], i ascending. */
static void times(const float *x, int n, const float *m, size_t ld, float *y)
{
    const int level = kv_cpu_simd();
    if (level >= KV_SIMD_AVX512) times_avx512(x, n, m, ld, y);
    else if (level >= KV_SIMD_AVX2) times_avx2(x, n, m, ld, y);
    else for (int i = 0; i < n; i++, m += ld)
        for (size_t k = 0; k < ld; k++) y[k] += x[i] * m[k];
}

/* Coefficients of n tokens, s->padded floats apart, in each 1 behind the last and then 0. */
static void coefficients(const kv_codec *c, const uint8_t *page, int token, int n, float *z)
{
    const pca_state *s = c->state;
    const kvtc_plan *p = &s->plan;
    const int level = s->simd ? kv_cpu_simd() : KV_SIMD_C;
    for (int m; n > 0; n -= m, token += m, z += (size_t)m * (size_t)s->padded) {
        uint8_t symbol[5 * MAX_RANK], last[5 * MAX_RANK + OVERREAD];
        const size_t at = (size_t)token * p->row_bytes;
        const uint8_t *row = page + at;
        m = 1;
        if (level == KV_SIMD_C) {
            memset(z, 0, sizeof *z * (size_t)s->padded);
            kvtc_unpack(p, row, symbol);
            kvtc_dequantize(p, s->step, symbol, z);
            z[p->rank] = 1;
            continue;
        }
        if (at + s->reach <= c->page_bytes) m = (int)kv_min64(n, (int64_t)((c->page_bytes - at - s->reach) / p->row_bytes) + 1);
        else row = memcpy(last, row, p->row_bytes);              /* the page ends before its reads do */
        (level >= KV_SIMD_AVX512 ? rows_avx512 : rows_avx2)(s, row, m, z);
    }
}

static void pca_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const pca_state *s = c->state;
    float centred[KV_MAX_HEAD_DIM], z[MAX_RANK];
    uint8_t symbol[5 * MAX_RANK];
    for (int t = 0; t < n; t++, x += ld) {
        for (int i = 0; i < c->head_dim; i++) centred[i] = x[i] - s->mean[i];
        memset(z, 0, sizeof(float) * s->forward_ld);
        times(centred, c->head_dim, s->forward, s->forward_ld, z);
        kvtc_quantize(&s->plan, s->step, z, symbol);
        kvtc_pack(&s->plan, symbol, page + (size_t)(tok0 + t) * s->plan.row_bytes);
    }
}

static void pca_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const pca_state *s = c->state;
    const size_t d = (size_t)c->head_dim;
    float z[MAX_PADDED], y[KV_MAX_HEAD_DIM];
    for (int t = 0; t < n; t++, x += ld) {
        coefficients(c, page, tok0 + t, 1, z);
        memcpy(y, s->mean, sizeof(float) * d);
        memset(y + d, 0, sizeof(float) * (s->back_ld - d));
        times(z, s->plan.rank, s->back, s->back_ld, y);
        memcpy(x, y, sizeof(float) * d);
    }
}

/* ---- attention on coefficients: <q, mean + V^T z> = <q, mean> + <V q, z> */

static void pca_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const pca_state *s = c->state;
    const size_t stride = c->query_bytes / sizeof(float);
    float *to = prepared;
    for (int g = 0; g < n_q; g++, q += ld, to += stride) {
        memset(to, 0, c->query_bytes);
        times(q, c->head_dim, s->forward, s->forward_ld, to);
        to[s->plan.rank] = kv_vec_dot(q, s->mean, c->head_dim);
    }
}

enum { TILE_FLOATS = 4096, TILE_ROWS = 8, TILE_MAX = TILE_ROWS * MAX_PADDED };   /* a tile stays in the first cache level */

static void pca_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const pca_state *s = c->state;
    _Alignas(64) float tile[TILE_MAX];
    const int step = kv_max(TILE_FLOATS / s->padded, TILE_ROWS);
    for (int t = 0; t < n_tokens; t += step) {
        const int n = kv_min(step, n_tokens - t);
        coefficients(c, page, t, n, tile);
        kv_rows_dot(KV_F32, tile, s->padded, n, s->padded, prepared, (int64_t)(c->query_bytes / sizeof(float)), n_q, scores + t, ld);
    }
}

static void pca_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    const pca_state *s = c->state;
    _Alignas(64) float tile[TILE_MAX];
    const int step = kv_max(TILE_FLOATS / s->padded, TILE_ROWS);
    for (int t = 0; t < n_tokens; t += step) {
        const int n = kv_min(step, n_tokens - t);
        coefficients(c, page, t, n, tile);
        kv_rows_accumulate(KV_F32, tile, s->padded, n, s->padded, p + t, ld, n_q, acc, c->space_dim);
    }
}

static void pca_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    const pca_state *s = c->state;
    const size_t d = (size_t)c->head_dim;
    float y[KV_MAX_HEAD_DIM];
    for (int g = 0; g < n_q; g++, acc += c->space_dim, out += ld) {
        memset(y + d, 0, sizeof(float) * (s->back_ld - d));
        for (size_t i = 0; i < d; i++) y[i] = acc[s->plan.rank] * s->mean[i];
        times(acc, s->plan.rank, s->back, s->back_ld, y);
        memcpy(out, y, sizeof(float) * d);
    }
}

static int pca_fit_bits(kv_codec *c, double target)
{
    c->value[P_BITS] = fmin(fmax(target, params[P_BITS].min), params[P_BITS].max);
    return KV_OK;
}

static int fill_device(const kv_codec *c, kv_pod *pod)
{
    const pca_state *s = c->state;
    const kvtc_plan *p = &s->plan;
    const size_t dim = (size_t)c->head_dim, rank = (size_t)p->rank;
    struct pca_device d = { .rank = p->rank, .n_blocks = p->n_blocks, .n_headers = p->n_headers, .fixed = p->fixed, .code_bits = p->code_bits,
        .row_bytes = (uint32_t)p->row_bytes, .forward_ld = (uint32_t)s->forward_ld, .back_ld = (uint32_t)s->back_ld };
    struct pca_device_block block[MAX_RANK] = { { 0 } };
    struct pca_device_component component[MAX_RANK] = { { 0 } };
    uint32_t start;
    RETURN_ERROR_IF(p->n_headers > PCA_DEVICE_HEADERS, KV_E_UNSUPPORTED, "codec 'pca': tables of %d blocks with shift and scale have no device form (at most %d)", p->n_headers, PCA_DEVICE_HEADERS);
    for (int b = 0, bit = 0, header = 0; b < p->n_blocks; b++) {
        const kvtc_block k = p->block[b];
        const int with = k.type != KVTC_NONE && k.type != KVTC_E4M3 && !p->fixed ? header++ : -1, bits = k.type == KVTC_E4M3 ? 8 : k.type;
        block[b] = (struct pca_device_block){ k.start, k.size, k.type, with };
        for (int i = k.start; i < k.start + k.size; i++, bit += bits) component[i] = (struct pca_device_component){ s->step[i], k.type, with, bit };
    }
    FORWARD_IF_ERROR(kv_pod_add(pod, &d, sizeof d, &start));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->mean, sizeof(float) * dim, &d.at_mean));
    FORWARD_IF_ERROR(kv_pod_add(pod, block, sizeof *block * (size_t)p->n_blocks, &d.at_block));
    FORWARD_IF_ERROR(kv_pod_add(pod, component, sizeof *component * rank, &d.at_component));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->forward, sizeof(float) * dim * s->forward_ld, &d.at_forward));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->back, sizeof(float) * rank * s->back_ld, &d.at_back));
    memcpy(pod->data, &d, sizeof d);
    return KV_OK;
}

static int pca_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    kv_pod pod = { 0 };
    const int status = fill_device(c, &pod);
    return kv_pod_done(&pod, status, out, bytes);
}

const kv_codec_ops kv_codec_pca = {
    .name = "pca", .about = "principal components of each head, bits allotted by dynamic programming",
    .source = "KVTC, arXiv 2511.01815, section 3, with one basis per head; fixed-size rows in place of DEFLATE",
    .params = params, .n_params = sizeof params / sizeof *params,
    .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CALIBRATED, .state_size = sizeof(pca_state),
    .calibrate = pca_calibrate, .init = pca_init, .fini = pca_fini, .encode = pca_encode, .decode = pca_decode,
    .query = pca_query, .dot = pca_dot, .accumulate = pca_accumulate, .output = pca_output, .device = pca_on_device, .fit_bits = pca_fit_bits,
};
