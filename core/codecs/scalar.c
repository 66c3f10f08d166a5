/* scalar.c -- norm, random rotation, Lloyd-Max codebook per coordinate: TurboQuant-MSE (arXiv 2504.19874, Algorithm 1).
 *
 * A row x becomes a scale and head_dim codes: y = R(x / |x|), code = number of boundaries that y_i exceeds.  R is the
 * orthonormal Walsh-Hadamard transform after random signs, a dense random orthogonal matrix, or nothing.  A head_dim that
 * is no power of two is transformed in blocks, largest first (96 = 64 + 32, 80 = 64 + 16).  Coordinates of a rotated unit
 * vector are nearly N(0, 1/d), so one codebook serves every layer, head and model.  Row = scale * R^-1(centroids).
 *
 * Page, little-endian; B = 64 bytes:
 *
 *   keys:    | plane 0: tile of tokens 0-15, tile 16-31, ... | plane 1, from 5 bits on | scale f16 [page_tokens] |
 *   values:  | plane 0: tile of dims   0-15, tile 16-31, ... | plane 1               | scale f16 [page_tokens] |
 *   tile:    | chunk 0 | chunk 1 | ...   chunk: rows of B = 16 lanes of one 32-bit word each
 *
 * A lane is a token (keys) or a dim (values); the chunks go along the other, "inner", axis.  Plane 0 holds the codes' low 4
 * bits, plane 1 the rest.  Inner element i of a chunk sits in byte i%4 of its lane's words, in slot i/4 of that byte:
 *
 *   bits of the plane     1                2              4              3 (three rows: words w0 w1 w2)
 *   elements a chunk     32               16              8             32
 *   slot s               bit s         bits 2s..2s+1   bits 4s..4s+3    s < 6: bits 3(s%2).. of w(s/2)
 *                                                                       6: w0 bits 6-7, w1 bit 6   7: w2 bits 6-7, w1 bit 7
 *
 * So a register of words, shifted, gives 16 tokens' (dims') codes, and an integer multiply-add of neighbouring elements
 * sums along the inner axis inside each lane: scores of 16 tokens come out of attention with no horizontal sum, and keys and
 * values share one kernel.  Tiles and chunks are padded to whole ones (counted as padding).
 *
 * Encoding arithmetic, in f32, no contraction: n = sqrt(sumsq(x)); y = transform(x_i * (sign_i * (1 / n))); z = centroids;
 * scale = n | n / sqrt(sumsq z) | n * (<y,z> / sumsq z) | n / <y,z>, to f16, at most 65504.  Sums as in kv_dot16.  Squares
 * that leave 2^-100..2^120 are taken from x times a power of two.
 *
 * Attention works on 16-bit fixed point: centroids of 13-14 bits, weights (query dims, probability times scale) with as many
 * bits as keep the 32-bit sum from overflowing.  Values restart the sum every 64 tokens. */
#include <math.h>
#include "scalar.h"

enum { P_BITS, P_ROTATION, P_CODEBOOK, P_NORM, P_SEED };
enum { ROT_HADAMARD, ROT_ORTHOGONAL, ROT_NONE };
enum { NORM_RAW, NORM_MATCHED, NORM_LSQ, NORM_UNBIASED };
enum { STREAM_SIGN = 0x53490000, STREAM_MATRIX = 0x4D410000 };   /* plus the side: keys and values draw apart */

static const kv_param params[] = {
    { "bits",     "bits of a code", KV_PARAM_INT, 4, 1, 8, NULL },
    { "rotation", "random signs and Walsh-Hadamard, a dense random orthogonal matrix, or none", KV_PARAM_CHOICE, ROT_HADAMARD, 0, 2, "hadamard|orthogonal|none" },
    { "codebook", "Lloyd-Max for N(0,1/d), or for the exact density of a unit vector's coordinate", KV_PARAM_CHOICE, 0, 0, 1, "gauss|beta" },
    { "norm",     "stored scale: |x|, keeps |x| after decoding, least squares, or no bias in inner products", KV_PARAM_CHOICE, NORM_MATCHED, 0, 3, "raw|matched|lsq|unbiased" },
    { "seed",     "of the rotation; keys and values draw from different streams of it", KV_PARAM_INT, 0, 0, 4294967295.0, NULL },
};

#define F(row, shift, width, from) { row, shift, width, from }
const scalar_field scalar_fields[4][8][2] = {
    { { F(0, 0, 1, 0) }, { F(0, 1, 1, 0) }, { F(0, 2, 1, 0) }, { F(0, 3, 1, 0) }, { F(0, 4, 1, 0) }, { F(0, 5, 1, 0) }, { F(0, 6, 1, 0) }, { F(0, 7, 1, 0) } },
    { { F(0, 0, 2, 0) }, { F(0, 2, 2, 0) }, { F(0, 4, 2, 0) }, { F(0, 6, 2, 0) } },
    { { F(0, 0, 3, 0) }, { F(0, 3, 3, 0) }, { F(1, 0, 3, 0) }, { F(1, 3, 3, 0) }, { F(2, 0, 3, 0) }, { F(2, 3, 3, 0) },
      { F(0, 6, 2, 0), F(1, 6, 1, 2) }, { F(2, 6, 2, 0), F(1, 7, 1, 2) } },
    { { F(0, 0, 4, 0) }, { F(0, 4, 4, 0) } },
};
#undef F

static const scalar_level *level(void)
{
    static const scalar_level *const by_simd[] = { &scalar_c, &scalar_avx2, &scalar_avx512 };
    return by_simd[kv_cpu_simd()];
}

/* ---- setting up ---------------------------------------------------------------------------------------------------- */

static size_t lay_out(scalar_plane *p, int bits, int inner, int n_tiles, size_t offset)
{
    static const struct { int chunk, rows; } shape[4] = { { 32, 1 }, { 16, 1 }, { 32, 3 }, { 8, 1 } };
    *p = (scalar_plane){ .bits = bits, .chunk = shape[bits - 1].chunk, .rows = shape[bits - 1].rows, .offset = offset };
    p->n_chunks = (inner + p->chunk - 1) / p->chunk;
    return offset + (size_t)n_tiles * scalar_plane_tile(p);
}

static int set_codebook(kv_codec *c, scalar_state *s)
{
    double g[256], best = INFINITY, grid = 1;
    FORWARD_IF_ERROR(kv_lloyd_max(s->bits, c->value[P_CODEBOOK] != 0 ? c->head_dim : 0, g, NULL));
    const double shrink = 1 / sqrt((double)c->head_dim);
    const int half = s->levels / 2;
    for (int i = 0; i < 256; i++) {
        s->centroid[i] = (float)(shrink * g[i % s->levels]);
        s->bound[i] = i < s->levels - 1 ? (float)(shrink * 0.5 * (g[i] + g[i + 1])) : INFINITY;
    }
    for (int top = SCALAR_C_MIN; top <= SCALAR_C_MAX; top++) {
        const double per = top / g[s->levels - 1];
        double err = 0;
        for (int i = half; i < s->levels; i++) {
            const double off = (g[i] * per - rint(g[i] * per)) / per;
            err += off * off;
        }
        if (err < best) { best = err; grid = per; }
    }
    for (int i = 0; i < 256; i++) s->fixed[i] = (int16_t)rint(g[i % s->levels] * grid);
    s->unit = (float)(shrink / grid);
    for (int i = 0; i < 256; i++) {
        s->byte_lo[i / 16][i % 16] = (uint8_t)(s->fixed[i] & 255);
        s->byte_hi[i / 16][i % 16] = (uint8_t)((uint16_t)s->fixed[i] >> 8);
    }
    return KV_OK;
}

/* Random orthogonal rows: Gaussian ones, orthonormalized in order, which is a QR with a positive diagonal, so the matrix is
 * Haar-distributed.  Each row is cleared of the earlier ones twice: once leaves 1e-13 times the condition number. */
static int draw_matrix(kv_codec *c, scalar_state *s, double seed)
{
    int status = KV_OK;
    const int d = c->head_dim;
    float *gauss = kv_alloc_array((size_t)d, sizeof *gauss, false);
    double *q = kv_alloc_array((size_t)d * (size_t)d, sizeof *q, false);
    s->matrix = kv_alloc_array((size_t)d * (size_t)d, sizeof *s->matrix, false);
    s->inverse = kv_alloc_array((size_t)d * (size_t)d, sizeof *s->inverse, false);
    if (!gauss || !q || !s->matrix || !s->inverse) { status = KV_E_NOMEM; goto fail; }
    for (int r = 0; r < d; r++) {
        double *row = q + (size_t)r * (size_t)d, sum = 0;
        FAIL_IF_ERROR(kv_rng_normal(seed, STREAM_MATRIX + c->side, (double)r * d, d, gauss));
        for (int i = 0; i < d; i++) row[i] = gauss[i];
        for (int pass = 0; pass < 2; pass++)
            for (int k = 0; k < r; k++) {
                const double *other = q + (size_t)k * (size_t)d;
                double along = 0;
                for (int i = 0; i < d; i++) along += row[i] * other[i];
                for (int i = 0; i < d; i++) row[i] -= along * other[i];
            }
        for (int i = 0; i < d; i++) sum += row[i] * row[i];
        for (int i = 0; i < d; i++) {
            row[i] /= sqrt(sum);
            s->inverse[(size_t)r * (size_t)d + (size_t)i] = s->matrix[(size_t)i * (size_t)d + (size_t)r] = (float)row[i];
        }
    }
fail:
    kv_free(gauss);
    kv_free(q);
    return status;
}

static int draw_signs(kv_codec *c, scalar_state *s, double seed)
{
    s->sign = kv_alloc_array((size_t)c->head_dim, sizeof *s->sign, false);
    if (!s->sign) return KV_E_NOMEM;
    kv_signs(seed, STREAM_SIGN + c->side, c->head_dim, s->sign);
    return KV_OK;
}

static int scalar_init(kv_codec *c)
{
    scalar_state *s = c->state;
    const int d = c->head_dim;
    RETURN_ERROR_IF(d < 8 || d % 2, KV_E_PARAM, "codec 'scalar': head_dim=%d is not an even number in 8..%d", d, KV_MAX_HEAD_DIM);
    s->bits = (int)c->value[P_BITS];
    s->levels = 1 << s->bits;
    s->rotation = (int)c->value[P_ROTATION];
    s->norm = (int)c->value[P_NORM];
    const int lanes = c->side == KV_SIDE_K ? c->page_tokens : d;
    int inner = c->side == KV_SIDE_K ? d : c->page_tokens;
    if (s->bits > 4) inner = (int)kv_round_up((size_t)inner, s->bits % 2 ? 32 : 16);    /* whole chunks of both planes */
    s->n_tiles = (lanes + SCALAR_LANES - 1) / SCALAR_LANES;
    s->n_planes = s->bits > 4 ? 2 : 1;
    s->scales = lay_out(&s->plane[0], kv_min(s->bits, 4), inner, s->n_tiles, 0);
    if (s->n_planes == 2) s->scales = lay_out(&s->plane[1], s->bits - 4, inner, s->n_tiles, s->scales);
    c->page.codes = (double)s->bits * d * c->page_tokens / 8;
    c->page.padding = (double)s->scales - c->page.codes;
    c->page.scales = 2.0 * c->page_tokens;
    c->bits_nominal = s->bits;
    c->granule = 1;
    c->space_dim = (int)kv_round_up((size_t)d, SCALAR_LANES);
    c->query_bytes = 64 + 8 * (size_t)scalar_padded(c);
    FORWARD_IF_ERROR(set_codebook(c, s));
    if (s->rotation == ROT_HADAMARD) return draw_signs(c, s, c->value[P_SEED]);
    return s->rotation == ROT_ORTHOGONAL ? draw_matrix(c, s, c->value[P_SEED]) : KV_OK;
}

static void scalar_fini(kv_codec *c)
{
    scalar_state *s = c->state;
    kv_free(s->sign);
    kv_free(s->matrix);
    kv_free(s->inverse);
}

/* ---- rotation ------------------------------------------------------------------------------------------------------- */

/* out = R(x * by) */
static void rotate(const kv_codec *c, const scalar_level *l, const float *x, float by, float *out)
{
    const scalar_state *s = c->state;
    float scaled[KV_MAX_HEAD_DIM];
    l->scale_row(x, s->sign, by, s->matrix ? scaled : out, c->head_dim);
    if (s->matrix) l->dense(s->matrix, scaled, out, c->head_dim);
    else if (s->sign) kv_fwht_blocks(out, c->head_dim);
}

/* out = R^-1(z) * by; z is overwritten */
static void rotate_back(const kv_codec *c, const scalar_level *l, float *z, float by, float *out)
{
    const scalar_state *s = c->state;
    float turned[KV_MAX_HEAD_DIM];
    if (s->matrix) l->dense(s->inverse, z, turned, c->head_dim);
    else if (s->sign) kv_fwht_blocks(z, c->head_dim);
    l->scale_row(s->matrix ? turned : z, s->sign, by, out, c->head_dim);
}

/* ---- codes in a page ------------------------------------------------------------------------------------------------- */

static inline uint8_t *words(const scalar_plane *p, const uint8_t *page, int tile, int chunk)
{
    return (uint8_t *)page + p->offset + (size_t)tile * scalar_plane_tile(p) + (size_t)chunk * (size_t)p->rows * 64;
}

static inline uint32_t in_each_byte(int width) { return 0x01010101u * ((1u << width) - 1); }

/* code: head_dim codes, zeros up to the next multiple of 32. */
static void put_key(const kv_codec *c, uint8_t *page, int token, const uint8_t *code)
{
    const scalar_state *s = c->state;
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *p = &s->plane[k];
        for (int n = 0; n < p->n_chunks; n++) {
            uint32_t row[3] = { 0 };
            for (int slot = 0; slot < p->chunk / 4; slot++) {
                const uint32_t four = kv_load_u32(code + n * p->chunk + 4 * slot) >> 4 * k;   /* junk above is masked */
                for (int f = 0; f < 2; f++) {
                    const scalar_field b = scalar_fields[p->bits - 1][slot][f];
                    row[b.row] |= (four >> b.from & in_each_byte(b.width)) << b.shift;
                }
            }
            uint8_t *dst = words(p, page, token / SCALAR_LANES, n) + 4 * (token % SCALAR_LANES);
            for (int r = 0; r < p->rows; r++) memcpy(dst + 64 * r, &row[r], 4);
        }
    }
}

static void get_key(const kv_codec *c, const uint8_t *page, int token, uint8_t *code)
{
    const scalar_state *s = c->state;
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *p = &s->plane[k];
        for (int n = 0; n < p->n_chunks; n++) {
            const uint8_t *src = words(p, page, token / SCALAR_LANES, n) + 4 * (token % SCALAR_LANES);
            for (int slot = 0; slot < p->chunk / 4; slot++) {
                uint8_t *at = code + n * p->chunk + 4 * slot;
                uint32_t four = k ? kv_load_u32(at) : 0;
                for (int f = 0; f < 2; f++) {
                    const scalar_field b = scalar_fields[p->bits - 1][slot][f];
                    four |= (kv_load_u32(src + 64 * b.row) >> b.shift & in_each_byte(b.width)) << (b.from + 4 * k);
                }
                memcpy(at, &four, 4);
            }
        }
    }
}

static void put_value_c(const scalar_state *s, uint8_t *page, int token, const uint8_t *code)
{
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *p = &s->plane[k];
        const scalar_field *field = scalar_fields[p->bits - 1][token % p->chunk / 4];
        for (int f = 0; f < 2 && field[f].width; f++) {
            const int shift = field[f].shift + token % 4 * 8, from = field[f].from + 4 * k;
            const uint32_t mask = (1u << field[f].width) - 1;
            for (int tile = 0; tile < s->n_tiles; tile++) {
                uint32_t lane[SCALAR_LANES];
                uint8_t *at = words(p, page, tile, token / p->chunk) + 64 * field[f].row;
                memcpy(lane, at, 64);
                for (int i = 0; i < SCALAR_LANES; i++)
                    lane[i] = (lane[i] & ~(mask << shift)) | ((uint32_t)code[tile * SCALAR_LANES + i] >> from & mask) << shift;
                memcpy(at, lane, 64);
            }
        }
    }
}

static void get_value(const kv_codec *c, const uint8_t *page, int token, uint8_t *code)
{
    const scalar_state *s = c->state;
    memset(code, 0, (size_t)s->n_tiles * SCALAR_LANES);
    for (int k = 0; k < s->n_planes; k++) {
        const scalar_plane *p = &s->plane[k];
        const scalar_field *field = scalar_fields[p->bits - 1][token % p->chunk / 4];
        for (int f = 0; f < 2 && field[f].width; f++) {
            const int shift = field[f].shift + token % 4 * 8, from = field[f].from + 4 * k;
            const uint32_t mask = (1u << field[f].width) - 1;
            for (int tile = 0; tile < s->n_tiles; tile++) {
                uint32_t lane[SCALAR_LANES];
                memcpy(lane, words(p, page, tile, token / p->chunk) + 64 * field[f].row, 64);
                for (int i = 0; i < SCALAR_LANES; i++) code[tile * SCALAR_LANES + i] |= (uint8_t)((lane[i] >> shift & mask) << from);
            }
        }
    }
}

/* Centroids of one token; returns its scale. */
static float get_row(const kv_codec *c, const uint8_t *page, int token, float *z)
{
    const scalar_state *s = c->state;
    uint8_t code[KV_MAX_HEAD_DIM];            /* whole chunks: head_dim rounded up to 32 at most */
    (c->side == KV_SIDE_K ? get_key : get_value)(c, page, token, code);
    for (int i = 0; i < c->head_dim; i++) z[i] = s->centroid[code[i]];
    return kv_f16_to_f32(kv_load_u16(page + s->scales + 2 * (size_t)token));
}

/* ---- encode and decode ------------------------------------------------------------------------------------------------ */

/* |row|, and 1/|*x|; *x moves to `copy` when its squares need another exponent.  0 for a zero row. */
static float row_norm(const float **x, int n, float *copy, float *by)
{
    const float sum = kv_sumsq(*x, n);
    if (sum >= 0x1p-100f && sum <= 0x1p120f) {
        const float norm = sqrtf(sum);
        *by = 1 / norm;
        return norm;
    }
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fmaxf(amax, fabsf((*x)[i]));
    *by = 0;
    if (amax == 0) return 0;
    int e;
    frexpf(amax, &e);
    for (int i = 0; i < n; i++) copy[i] = ldexpf((*x)[i], -e);
    const float norm = sqrtf(kv_sumsq(copy, n));
    *by = 1 / norm;
    *x = copy;
    return ldexpf(norm, e);
}

static float scale_of(const kv_codec *c, float norm, const float *y, const uint8_t *code)
{
    const scalar_state *s = c->state;
    if (s->norm == NORM_RAW) return norm;
    float z[KV_MAX_HEAD_DIM];
    for (int i = 0; i < c->head_dim; i++) z[i] = s->centroid[code[i]];
    const float zz = kv_sumsq(z, c->head_dim);
    if (s->norm == NORM_MATCHED) return norm / sqrtf(zz);
    const float yz = kv_dot16(y, z, c->head_dim);
    return s->norm == NORM_LSQ ? norm * (yz / zz) : norm / yz;
}

static void scalar_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const scalar_state *s = c->state;
    const scalar_level *l = level();
    const int d = c->head_dim, padded = scalar_padded(c);
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float y[KV_MAX_HEAD_DIM], copy[KV_MAX_HEAD_DIM], by, scale = 0;
        uint8_t code[KV_MAX_HEAD_DIM];
        const float *row = x;
        const float norm = row_norm(&row, d, copy, &by);
        memset(code, 0, (size_t)padded);
        if (by > 0) {
            rotate(c, l, row, by, y);
            l->index(s, y, code, d);
            scale = scale_of(c, norm, y, code);
            if (!(scale < 65504)) scale = 65504;          /* the largest f16 */
        }
        if (c->side == KV_SIDE_K) put_key(c, page, t, code);
        else l->put_value(s, page, t, code);
        kv_store_u16(page + s->scales + 2 * (size_t)t, kv_f32_to_f16(scale));
    }
}

static void scalar_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const scalar_level *l = level();
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float z[KV_MAX_HEAD_DIM];
        const float scale = get_row(c, page, t, z);
        rotate_back(c, l, z, scale, x);
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------------------- */

static void scalar_query_rows(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const scalar_level *l = level();
    const int padded = scalar_padded(c);
    for (int i = 0; i < n_q; i++) {
        void *one = (uint8_t *)prepared + (size_t)i * c->query_bytes;
        float *row = scalar_query_f32(one);
        rotate(c, l, q + i * ld, 1, row);
        memset(row + c->head_dim, 0, sizeof *row * (size_t)(padded - c->head_dim));
        l->prepare(one, padded);
    }
}

static void scalar_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    level()->dot(c, page, n_tokens, prepared, n_q, scores, ld);
}

static void scalar_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    level()->accumulate(c, page, n_tokens, p, ld, n_q, acc);
}

static void scalar_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    const scalar_level *l = level();
    for (int i = 0; i < n_q; i++) {
        float z[KV_MAX_HEAD_DIM];
        memcpy(z, acc + (size_t)i * (size_t)c->space_dim, sizeof *z * (size_t)c->head_dim);
        rotate_back(c, l, z, 1, out + i * ld);
    }
}

/* ---- plain C --------------------------------------------------------------------------------------------------------------- */

static void scale_row_c(const float *x, const float *sign, float by, float *out, int n)
{
    for (int i = 0; i < n; i++) out[i] = x[i] * (sign ? sign[i] * by : by);
}

static void dense_c(const float *m, const float *x, float *out, int n)
{
    for (int i = 0; i < n; i++) out[i] = 0;
    for (int j = 0; j < n; j++)
        for (int i = 0; i < n; i++) out[i] += x[j] * m[(size_t)j * (size_t)n + (size_t)i];
}

/* Boundaries ascend, so bisection counts the exceeded ones. */
static void index_c(const scalar_state *s, const float *y, uint8_t *code, int n)
{
    for (int i = 0; i < n; i++) {
        int at = 0;
        for (int step = s->levels / 2; step; step /= 2) at += y[i] > s->bound[at + step - 1] ? step : 0;
        code[i] = (uint8_t)at;
    }
}

static void prepare_c(void *q, int padded)
{
    const float *row = scalar_query_f32(q);
    int16_t *quads = scalar_query_quads(q, padded), *pairs = scalar_query_pairs(q, padded);
    float amax = 0, sum = 0;
    for (int i = 0; i < padded; i++) {
        amax = fmaxf(amax, fabsf(row[i]));
        sum += fabsf(row[i]);
    }
    const bool usable = amax >= 0x1p-100f && sum < INFINITY;
    const float per = usable ? fminf(32767 / amax, SCALAR_SUM_MAX / sum) : 0;
    *(float *)q = usable ? 1 / per : sum < INFINITY ? 0 : NAN;
    for (int i = 0; i < padded; i++) {
        quads[i] = usable ? (int16_t)lrintf(row[i] * per) : 0;
        pairs[(i & ~3) | (i & 1) << 1 | (i >> 1 & 1)] = quads[i];
    }
}

static void dot_c(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    for (int t = 0; t < n_tokens; t++) {
        float z[KV_MAX_HEAD_DIM];
        const float scale = get_row(c, page, t, z);
        for (int q = 0; q < n_q; q++)
            scores[q * ld + t] = scale * kv_dot16(scalar_query_f32((uint8_t *)prepared + (size_t)q * c->query_bytes), z, c->head_dim);
    }
}

static void accumulate_c(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    for (int t = 0; t < n_tokens; t++) {
        float z[KV_MAX_HEAD_DIM];
        const float scale = get_row(c, page, t, z);
        for (int q = 0; q < n_q; q++) {
            const float w = p[q * ld + t] * scale;
            for (int i = 0; i < c->head_dim; i++) acc[(size_t)q * (size_t)c->space_dim + (size_t)i] += w * z[i];
        }
    }
}

const scalar_level scalar_c = { scale_row_c, dense_c, index_c, put_value_c, prepare_c, dot_c, accumulate_c };

const kv_codec_ops kv_codec_scalar = {
    .name = "scalar", .about = "norm, random rotation and a Lloyd-Max codebook per coordinate (TurboQuant)",
    .source = "TurboQuant, arXiv 2504.19874, Algorithm 1; scale modes: EDEN, arXiv 2108.08842",
    .params = params, .n_params = sizeof params / sizeof *params, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES,
    .state_size = sizeof(scalar_state),
    .init = scalar_init, .fini = scalar_fini, .encode = scalar_encode, .decode = scalar_decode,
    .query = scalar_query_rows, .dot = scalar_dot, .accumulate = scalar_accumulate, .output = scalar_output,
};
