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
 * Encoding arithmetic: z_j is summed over the channels in ascending order, y_i over the components, in f32, no contraction. */
#include <math.h>
#include "../calib.h"
#include "../eigen.h"
#include "../kvtc.h"
#include "../vecmath.h"

enum { P_BITS, P_TYPES, P_SCALE, P_ALLOCATE };
enum { TYPES_FINE, TYPES_PAPER, TYPES_E4M3 };
enum { SCALE_STATIC, SCALE_TOKEN };
enum { HEADER = 16, MAX_RANK = KV_MAX_HEAD_DIM };

static const kv_param params[] = {
    { "bits",     "bits per element that the allocation may spend, headers of blocks included", KV_PARAM_REAL, 4, 0.25, 8, NULL },
    { "types",    "what a block may be beside nothing: 1 to 8 bits; 2, 4 or 8 bits; 2 or 4 bits or FP8 e4m3 without header", KV_PARAM_CHOICE, TYPES_FINE, 0, 2, "fine|paper|e4m3" },
    { "scale",    "step of each component from calibration, or shift and scale of each block with every token", KV_PARAM_CHOICE, SCALE_STATIC, 0, 1, "static|token" },
    { "allocate", "dynamic program over every number of bits, or Lagrange multiplier", KV_PARAM_CHOICE, 0, 0, 1, "dp|lagrange" },
};

typedef struct pca_state {
    kvtc_plan plan;
    float    *mean, *step;          /* [head_dim], [rank] */
    float    *forward, *back;       /* V^T [head_dim][rank], V [rank][head_dim] */
} pca_state;

/* ---- tables */

static kvtc_menu menu_of(const kv_codec *c)
{
    kvtc_menu m = kvtc_paper();
    m.fixed = c->value[P_SCALE] == SCALE_STATIC;
    if (m.fixed) m.n_sizes = 1;                          /* without headers larger blocks are the same as many small ones */
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
    const size_t cells = (size_t)rank * (size_t)d;
    p->block = kv_alloc_array((size_t)blocks + 1, sizeof *p->block, true);
    s->mean = kv_alloc_array((size_t)d, sizeof(float), false);
    s->step = kv_alloc_array((size_t)rank + 1, sizeof(float), true);
    s->forward = kv_alloc_array(cells + 1, sizeof(float), false);
    s->back = kv_alloc_array(cells + 1, sizeof(float), false);
    if (!p->block || !s->mean || !s->step || !s->forward || !s->back) return KV_E_NOMEM;
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
            s->forward[(size_t)i * rank + (size_t)j] = s->back[(size_t)j * (size_t)d + (size_t)i] = v;
        }
    if (!p->row_bytes) p->row_bytes = 1;                 /* a budget below one block: the mean alone */
    c->page.scales = (double)p->header_bits / 8 * c->page_tokens;
    c->page.codes = (double)p->code_bits * c->page_tokens / 8;
    c->page.padding = (double)p->row_bytes * c->page_tokens - c->page.scales - c->page.codes;
    c->bits_nominal = (double)p->code_bits / d;
    c->granule = 1;
    c->space_dim = (int)rank + 1;
    c->query_bytes = kv_round_up(((size_t)rank + 1) * sizeof(float), 64);
    return KV_OK;
}

static void pca_fini(kv_codec *c)
{
    pca_state *s = c->state;
    kvtc_plan_clear(&s->plan);
    kv_free(s->mean);
    kv_free(s->step);
    kv_free(s->forward);
    kv_free(s->back);
}

/* ---- rows */

/* y[k] = sum_i x[i] m[i][k], i ascending. */
static void times(const float *x, int n, const float *m, int cols, float *y)
{
    for (int i = 0; i < n; i++, m += cols)
        for (int k = 0; k < cols; k++) y[k] += x[i] * m[k];
}

static void pca_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const pca_state *s = c->state;
    float centred[KV_MAX_HEAD_DIM], z[MAX_RANK];
    uint8_t symbol[5 * MAX_RANK];
    for (int t = 0; t < n; t++, x += ld) {
        for (int i = 0; i < c->head_dim; i++) centred[i] = x[i] - s->mean[i];
        memset(z, 0, sizeof(float) * (size_t)s->plan.rank);
        times(centred, c->head_dim, s->forward, s->plan.rank, z);
        kvtc_quantize(&s->plan, s->step, z, symbol);
        kvtc_pack(&s->plan, symbol, page + (size_t)(tok0 + t) * s->plan.row_bytes);
    }
}

static void coefficients(const pca_state *s, const uint8_t *page, int token, float *z)
{
    uint8_t symbol[5 * MAX_RANK];
    kvtc_unpack(&s->plan, page + (size_t)token * s->plan.row_bytes, symbol);
    kvtc_dequantize(&s->plan, s->step, symbol, z);
}

static void pca_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const pca_state *s = c->state;
    float z[MAX_RANK];
    for (int t = 0; t < n; t++, x += ld) {
        coefficients(s, page, tok0 + t, z);
        memcpy(x, s->mean, sizeof(float) * (size_t)c->head_dim);
        times(z, s->plan.rank, s->back, c->head_dim, x);
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
        times(q, c->head_dim, s->forward, s->plan.rank, to);
        to[s->plan.rank] = kv_vec_dot(q, s->mean, c->head_dim);
    }
}

static void pca_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const pca_state *s = c->state;
    const size_t stride = c->query_bytes / sizeof(float);
    const float *q = prepared;
    float z[MAX_RANK];
    for (int t = 0; t < n_tokens; t++) {
        coefficients(s, page, t, z);
        for (int g = 0; g < n_q; g++) scores[g * ld + t] = kv_vec_dot(q + (size_t)g * stride, z, s->plan.rank) + q[(size_t)g * stride + (size_t)s->plan.rank];
    }
}

static void pca_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    const pca_state *s = c->state;
    float z[MAX_RANK];
    for (int t = 0; t < n_tokens; t++) {
        coefficients(s, page, t, z);
        for (int g = 0; g < n_q; g++) {
            kv_vec_axpy(p[g * ld + t], z, acc + (size_t)g * (size_t)c->space_dim, s->plan.rank);
            acc[(size_t)g * (size_t)c->space_dim + (size_t)s->plan.rank] += p[g * ld + t];
        }
    }
}

static void pca_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    const pca_state *s = c->state;
    for (int g = 0; g < n_q; g++, acc += c->space_dim, out += ld) {
        for (int i = 0; i < c->head_dim; i++) out[i] = acc[s->plan.rank] * s->mean[i];
        times(acc, s->plan.rank, s->back, c->head_dim, out);
    }
}

static int pca_fit_bits(kv_codec *c, double target)
{
    c->value[P_BITS] = fmin(fmax(target, params[P_BITS].min), params[P_BITS].max);
    return KV_OK;
}

const kv_codec_ops kv_codec_pca = {
    .name = "pca", .about = "principal components of each head, bits allotted by dynamic programming",
    .source = "KVTC, arXiv 2511.01815, section 3, with one basis per head; fixed-size rows in place of DEFLATE",
    .params = params, .n_params = sizeof params / sizeof *params,
    .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CALIBRATED, .state_size = sizeof(pca_state),
    .calibrate = pca_calibrate, .init = pca_init, .fini = pca_fini, .encode = pca_encode, .decode = pca_decode,
    .query = pca_query, .dot = pca_dot, .accumulate = pca_accumulate, .output = pca_output, .fit_bits = pca_fit_bits,
};
