/* wf.c -- a calibrated basis, water-filled bits, one scale a vector: coded components are read by attention as they are.
 *
 * From second moments of keys (S) and of the queries that meet them (Q), wf_basis.c makes, per layer and head, a basis in which
 * components are uncorrelated and an error of any of them costs the same in scores, gives each 0 to 8 bits by reverse water-filling,
 * and mixes components of equal width by a rotation so that they are alike and nearly Gaussian.  Here a row x becomes its
 * components z = A^T x, in units of their deviations, a scale s, and codes of z / s in the Lloyd-Max codebook of N(0,1) of each
 * component's width; it decodes to s S (centroids).  A query goes through S^T once, after which a score is a dot product with
 * centroids: no key is ever decoded.  With page-relative RoPE the moments, and so the tables, are right at every position.
 *
 * Values have no query to weigh them and take part in a sum, so theirs is the plain principal basis (basis=rows) in runs of 16.
 *
 * Page, little-endian.  A lane is a token (keys) or a component (values); a tile is 16 lanes:
 *
 *   | tile 0 | tile 1 | ... | scale u8 or f16 [page_tokens] |        tile: rows of 64 bytes = 16 lanes of one 32-bit word each
 *
 *   keys:    tile of tokens 0-15, 16-31, ...; unit k holds components 4k .. 4k+3, one in each of the four bytes of a lane
 *   values:  tile of components 0-15, 16-31, ...; unit k holds tokens 4k .. 4k+3
 *
 *   byte j of a lane:   row 0         row 1         row 2
 *                       |76543210|    |76543210|    |76543210|       a stream of bits, from bit 0 of row 0 on: unit 0's code,
 *                            110000     3332222        ...           then unit 1's, ...; a code may go on in the next row
 *
 * Widths are a unit's, so a register of words, shifted, holds 16 lanes' codes of two neighbours whatever the mix of widths is.
 * wf_basis.c orders the units so that few codes cross a row.
 *
 * Encoding, in f32, no contraction: z as wf_level.dense; codes of z * (1 / s) have the scale of least squares in scores
 * <u, v> / <v, v>, u = sigma z, v = sigma centroid.  Of s = sqrt(sumsq(z) / n) and its multiples by `factor` that which leaves the
 * least error gives the first scale (alternating alone ends near where it began: the best of five leaves 3 to 6 % less at 2 bits);
 * then PASSES times: the scale to its stored value, codes for that, least squares.  So the codes belong to the stored scale, and
 * its rounding costs next to nothing.  log8: code 0 is 0, code k is 2^((k - 128) / 24). */
#include <math.h>
#include <pthread.h>
#include "wf.h"
#include "wf_device.h"
#include "../calib.h"

enum { PASSES = 2, LOG_ONE = 128, LOG_STEPS = 24 };
static const double FACTOR = 1.12;         /* five tries reach from 0.8 to 1.25; wider and finer ones gain another 0.3 % of the error at most */

static const kv_param params[] = {
    { "bits",  "bits per element, spread over the components by water-filling; rounded to whole bytes of 4 components (keys) or 16 (values)", KV_PARAM_REAL, 2, 0.5, 8, NULL },
    { "scale", "stored scale of a vector: 8 bits of its logarithm, or f16", KV_PARAM_CHOICE, WF_SCALE_LOG8, 0, 1, "log8|f16" },
    { "basis", "components: principal under the queries' weight, principal of the rows alone, or the channels as they are", KV_PARAM_CHOICE, WF_BASIS_QUERY, 0, 2, "query|rows|channels" },
    { "ridge", "added to the queries' weight, in units of its mean eigenvalue", KV_PARAM_REAL, 2, 0, 1e6, NULL },
    { "mix",   "a rotation among components of equal width, or none", KV_PARAM_CHOICE, WF_MIX_ROTATION, 0, 1, "rotation|none" },
    { "search", "scales tried on each vector, by factors of 1.12 around its root mean square; the least error is kept", KV_PARAM_INT, 5, 1, WF_MAX_SEARCH, NULL },
};

static const wf_level *level(void)
{
    static const wf_level *const by_simd[] = { &wf_c, &wf_avx2, &wf_avx512 };
    return by_simd[kv_cpu_simd()];
}

/* ---- tables that all instances share */

static wf_tables tables;
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

/* The grid on which the codebook's rounding errs least, its top in SCALAR_C_MIN .. SCALAR_C_MAX. */
static void make_codebook(int bits, wf_codebook *b)
{
    double g[256], best = INFINITY, grid = 1;
    if (kv_lloyd_max(bits, 0, g, &b->distortion) < 0) return;      /* cannot: bits is in range */
    const int n = 1 << bits;
    for (int top = SCALAR_C_MIN; top <= SCALAR_C_MAX; top++) {
        const double per = top / g[n - 1];
        double err = 0;
        for (int i = n / 2; i < n; i++) err += pow((g[i] * per - rint(g[i] * per)) / per, 2);
        if (err < best) { best = err; grid = per; }
    }
    b->unit = (float)(1 / grid);
    for (int i = 0; i < 256; i++) {
        b->fixed[i] = (int16_t)rint(g[i % n] * grid);
        b->centroid[i] = b->unit * (float)b->fixed[i];
        b->bound[i] = i < n - 1 ? (float)(0.5 * (g[i] + g[i + 1])) : INFINITY;
        b->byte_lo[i / 16][i % 16] = (uint8_t)(b->fixed[i] & 255);
        b->byte_hi[i / 16][i % 16] = (uint8_t)((uint16_t)b->fixed[i] >> 8);
    }
}

static void make_tables(void)
{
    tables.book[0].distortion = 1;
    for (int bits = 1; bits <= WF_MAX_BITS; bits++) make_codebook(bits, &tables.book[bits]);
    for (int k = 1; k < 256; k++) {
        tables.scale[k] = (float)exp2((double)(k - LOG_ONE) / LOG_STEPS);
        tables.between[k - 1] = (float)exp2((k - LOG_ONE - 0.5) / LOG_STEPS);
    }
    tables.between[255] = INFINITY;
}

const wf_tables *wf_tables_get(void)
{
    pthread_once(&tables_once, make_tables);
    return &tables;
}

int wf_budget(const kv_codec *c)
{
    const double per = c->side == KV_SIDE_K ? 8 : 1, lane = c->side == KV_SIDE_K ? 32 : SCALAR_LANES;
    return (int)(per * fmax(1, rint(c->value[WF_P_BITS] * c->head_dim / lane)));
}

/* ---- setting up: everything in the blob comes from outside */

static int check_blob(const kv_codec *c, const wf_blob *b, int *n)
{
    const int unit = wf_unit(c->side), max_units = c->head_dim / unit;
    int sum = 0;
    RETURN_ERROR_IF(c->blob_bytes < sizeof *b || b->magic != WF_MAGIC, KV_E_CORRUPT, "codec 'wf': %zu bytes of tables are not its own", c->blob_bytes);
    RETURN_ERROR_IF(b->head_dim != (uint32_t)c->head_dim || b->side != (uint32_t)c->side, KV_E_CORRUPT, "codec 'wf': tables of head_dim=%u side=%u, %d and %d are needed",
                    b->head_dim, b->side, c->head_dim, c->side);
    RETURN_ERROR_IF(b->n_units < 1 || b->n_units > (uint32_t)max_units, KV_E_CORRUPT, "codec 'wf': tables of %u units of %d, 1..%d are possible", b->n_units, unit, max_units);
    for (int i = 0; i < WF_MAX_UNITS; i++) {
        const int least = i < (int)b->n_units;
        RETURN_ERROR_IF(b->width[i] < least || b->width[i] > least * WF_MAX_BITS, KV_E_CORRUPT, "codec 'wf': unit %d of the tables has %d bits, %d..%d are possible", i, b->width[i], least, least * WF_MAX_BITS);
        sum += b->width[i];
    }
    RETURN_ERROR_IF(sum != wf_budget(c), KV_E_CORRUPT, "codec 'wf': tables made for %g bits an element, bits=%g means %g", (double)sum * unit / c->head_dim, c->value[WF_P_BITS],
                    (double)wf_budget(c) * unit / c->head_dim);
    *n = (int)b->n_units * unit;
    RETURN_ERROR_IF(c->blob_bytes != wf_blob_bytes(c->head_dim, *n), KV_E_CORRUPT, "codec 'wf': %zu bytes of tables, %zu are needed", c->blob_bytes, wf_blob_bytes(c->head_dim, *n));
    return KV_OK;
}

/* Magnitudes that cannot overflow, zeros in the padding, and matrices that undo each other: an error of a component is taken
 * relative to the deviations of the two that are involved. */
static int check_matrices(const kv_codec *c, const wf_state *s)
{
    const size_t ld = (size_t)s->padded;
    for (size_t i = 0; i < ld; i++)
        RETURN_ERROR_IF(!((int)i < s->n ? s->sigma[i] >= 0x1p-40f && s->sigma[i] <= 1 : s->sigma[i] == 0), KV_E_CORRUPT, "codec 'wf': sigma[%zu] = %g of the tables is outside 2^-40..1", i, (double)s->sigma[i]);
    for (size_t i = 0; i < 2 * ld * (size_t)c->head_dim; i++) {
        const float most = (int)(i % ld) < s->n ? 0x1p50f : 0;
        RETURN_ERROR_IF(!(fabsf(s->analysis[i]) <= most), KV_E_CORRUPT, "codec 'wf': element %zu of the tables is %g, beyond %g", i, (double)s->analysis[i], (double)most);
    }
    for (int i = 0; i < s->n; i++) {
        double product[KV_MAX_HEAD_DIM] = { 0 };
        for (int j = 0; j < c->head_dim; j++) {
            const double a = s->analysis[(size_t)j * ld + (size_t)i];
            const float *from = s->synthesis + (size_t)j * ld;
            for (int k = 0; k < s->n; k++) product[k] += a * from[k];
        }
        for (int k = 0; k < s->n; k++) {
            const double off = fabs(product[k] - (i == k)) * s->sigma[i] / s->sigma[k];
            RETURN_ERROR_IF(!(off < 1e-3), KV_E_CORRUPT, "codec 'wf': analysis and synthesis of the tables are not inverse (component %d from %d: off by %.2g)", k, i, off);
        }
    }
    return KV_OK;
}

/* Where unit k's code lies when widths before it add up to `at`. */
static wf_slot slot_at(int at, int width)
{
    const int row = at / 8, shift = at % 8;
    return (wf_slot){ .offset = (uint32_t)row * 64, .even = (uint32_t)shift * 0x10001u, .odd = (uint32_t)(shift + 8) * 0x10001u,
                      .width = (uint8_t)width, .low = (uint8_t)kv_min(width, 8 - shift), .shift = (uint8_t)shift };
}

static void lay_out(kv_codec *c, wf_state *s)
{
    const int keys = c->side == KV_SIDE_K, n_units = s->n / wf_unit(c->side);
    size_t at = 0;
    int sum = 0;
    for (int k = 0; k < n_units; k++) {
        if (keys) s->slot[k] = slot_at(sum, s->width[k]);
        sum += s->width[k];
    }
    s->n_tiles = keys ? (c->page_tokens + SCALAR_LANES - 1) / SCALAR_LANES : n_units;
    s->tile_bytes = (size_t)sum / 8 * 64;
    for (int i = 0; i < s->n_tiles; i++) {
        if (!keys) s->tile[i] = at;
        at += keys ? s->tile_bytes : 64 * ((size_t)(s->width[i] * c->page_tokens + 31) / 32);
    }
    s->scales = at;
    c->page.codes = (double)sum * wf_unit(c->side) * c->page_tokens / 8;
    c->page.padding = (double)at - c->page.codes;
    c->page.scales = (s->scale_mode == WF_SCALE_LOG8 ? 1.0 : 2.0) * c->page_tokens;
    c->bits_nominal = (double)sum * wf_unit(c->side) / c->head_dim;
}

static int wf_init(kv_codec *c)
{
    wf_state *s = c->state;
    const wf_blob *b = c->blob;
    const int d = c->head_dim, unit = wf_unit(c->side);
    RETURN_ERROR_IF(d % unit, KV_E_PARAM, "codec 'wf': head_dim=%d is not a multiple of %d, which %s need", d, unit, c->side == KV_SIDE_K ? "keys" : "values");
    FORWARD_IF_ERROR(check_blob(c, b, &s->n));
    s->tables = wf_tables_get();
    s->padded = (int)wf_padded(s->n);
    s->sigma = wf_sigma(b);
    s->analysis = s->sigma + s->padded;
    s->synthesis = s->analysis + (size_t)d * (size_t)s->padded;
    s->scale_mode = (int)c->value[WF_P_SCALE];
    s->search = (int)c->value[WF_P_SEARCH];
    for (int k = 0; k < s->search; k++) s->factor[k] = (float)pow(FACTOR, k % 2 ? (k + 1) / 2 : -k / 2);
    memcpy(s->width, b->width, sizeof s->width);
    FORWARD_IF_ERROR(check_matrices(c, s));
    lay_out(c, s);
    for (int i = 0; i < s->n; i++) s->unit[i] = s->tables->book[wf_width(s, c, i)].unit;
    const size_t row = kv_round_up((size_t)d, 16);
    if (!(s->rows = kv_alloc_array((size_t)s->n, row * sizeof *s->rows, true))) return KV_E_NOMEM;
    for (int j = 0; j < d; j++)
        for (int i = 0; i < s->n; i++) s->rows[(size_t)i * row + (size_t)j] = s->synthesis[(size_t)j * (size_t)s->padded + (size_t)i];
    c->granule = 1;
    c->space_dim = s->padded;
    c->query_bytes = 64 + 8 * (size_t)s->padded;
    return KV_OK;
}

static void wf_fini(kv_codec *c) { kv_free(((wf_state *)c->state)->rows); }

/* Bits of the keys in steps of 32 / head_dim, of the values in steps of 16 / head_dim, and the scale. */
static int wf_fit_bits(kv_codec *c, double target)
{
    const double step = (c->side == KV_SIDE_K ? 32.0 : SCALAR_LANES) / c->head_dim, scale = (c->value[WF_P_SCALE] == WF_SCALE_LOG8 ? 8.0 : 16.0) / c->head_dim;
    c->value[WF_P_BITS] = fmin(8, fmax(0.5, rint((target - scale) / step) * step));
    return KV_OK;
}

/* ---- codes in a page */

static inline uint32_t in_each_byte(int width) { return 0x01010101u * ((1u << width) - 1); }

static uint32_t get_four(const uint8_t *lane, wf_slot f)
{
    const uint8_t *at = lane + f.offset;
    uint32_t four = kv_load_u32(at) >> f.shift & in_each_byte(f.low);
    if (f.low < f.width) four |= (kv_load_u32(at + 64) & in_each_byte(f.width - f.low)) << f.low;
    return four;
}

static void put_bits(uint8_t *at, uint32_t bits, uint32_t mask)
{
    const uint32_t word = (kv_load_u32(at) & ~mask) | bits;
    memcpy(at, &word, 4);
}

/* Bytes of `four` that `bytes` names: ff for each. */
static void put_four(uint8_t *lane, wf_slot f, uint32_t four, uint32_t bytes)
{
    const uint32_t low = in_each_byte(f.low) & bytes, high = in_each_byte(f.width - f.low) & bytes;
    put_bits(lane + f.offset, (four & low) << f.shift, low << f.shift);
    if (f.low < f.width) put_bits(lane + f.offset + 64, four >> f.low & high, high);
}

static void put_codes(const kv_codec *c, uint8_t *page, int token, const uint8_t *code)
{
    const wf_state *s = c->state;
    if (c->side == KV_SIDE_K) {
        uint8_t *lane = page + (size_t)(token / SCALAR_LANES) * s->tile_bytes + 4 * (size_t)(token % SCALAR_LANES);
        for (int k = 0; k < s->n / 4; k++) put_four(lane, s->slot[k], kv_load_u32(code + 4 * k), ~0u);
        return;
    }
    for (int tile = 0; tile < s->n_tiles; tile++) {
        const wf_slot f = slot_at(token / 4 * s->width[tile], s->width[tile]);
        const int byte = token % 4 * 8;
        for (int i = 0; i < SCALAR_LANES; i++)
            put_four(page + s->tile[tile] + 4 * i, f, (uint32_t)code[tile * SCALAR_LANES + i] << byte, 0xffu << byte);
    }
}

static void get_codes(const kv_codec *c, const uint8_t *page, int token, uint8_t *code)
{
    const wf_state *s = c->state;
    if (c->side == KV_SIDE_K) {
        const uint8_t *lane = page + (size_t)(token / SCALAR_LANES) * s->tile_bytes + 4 * (size_t)(token % SCALAR_LANES);
        for (int k = 0; k < s->n / 4; k++) {
            const uint32_t four = get_four(lane, s->slot[k]);
            memcpy(code + 4 * k, &four, 4);
        }
        return;
    }
    for (int tile = 0; tile < s->n_tiles; tile++) {
        const wf_slot f = slot_at(token / 4 * s->width[tile], s->width[tile]);
        for (int i = 0; i < SCALAR_LANES; i++) code[tile * SCALAR_LANES + i] = (uint8_t)(get_four(page + s->tile[tile] + 4 * i, f) >> token % 4 * 8);
    }
}

/* ---- encode and decode */

/* Codes of z * by and their centroids.  Boundaries ascend, so bisection counts the exceeded ones; four components of one width go
 * side by side, since each waits for its own last load. */
static void index_row(const wf_state *s, int unit, const float *z, float by, uint8_t *code, float *centroid)
{
    for (int i = 0; i < s->n; i += 4) {
        const int width = s->width[i / unit];
        const wf_codebook *b = &s->tables->book[width];
        const float y[4] = { z[i] * by, z[i + 1] * by, z[i + 2] * by, z[i + 3] * by };
        unsigned at[4] = { 0 };
        for (unsigned step = 1u << width >> 1; step; step /= 2)
            for (int k = 0; k < 4; k++) at[k] += (unsigned)(y[k] > b->bound[at[k] + step - 1]) * step;
        for (int k = 0; k < 4; k++) {
            code[i + k] = (uint8_t)at[k];
            centroid[i + k] = b->centroid[at[k]];
        }
    }
}

/* The code whose scale is nearest in ratio; 0 only for scales under half of the least. */
static int log8_of(const wf_tables *t, float scale)
{
    int at = 0;
    for (int step = 128; step; step /= 2) at += scale >= t->between[at + step - 1] ? step : 0;
    return at == 0 && scale >= 0.5f * t->scale[1] ? 1 : at;
}

/* A scale as it is stored: its bits and its value. */
static unsigned store_scale(const wf_state *s, float scale, float *value)
{
    if (s->scale_mode == WF_SCALE_LOG8) {
        const int k = log8_of(s->tables, scale);
        *value = s->tables->scale[k];
        return (unsigned)k;
    }
    const uint16_t h = kv_f32_to_f16(scale < 65504 ? scale : 65504);
    *value = kv_f16_to_f32(h);
    return h;
}

/* z and its root mean square; where that leaves the range of squares, z and it are of x times 2^-e.  0 for a zero row. */
static float analyse(const kv_codec *c, const wf_level *l, const float *x, float *z, int *e)
{
    const wf_state *s = c->state;
    float copy[KV_MAX_HEAD_DIM];
    *e = 0;
    for (int tries = 0;; tries++) {
        l->dense(s->analysis, (size_t)s->padded, x, z, c->head_dim, s->padded);
        const float sum = kv_sumsq(z, s->n);
        if ((sum >= 0x1p-90f && sum <= 0x1p110f) || tries) return sqrtf(sum / (float)s->n);
        float amax = 0;
        for (int i = 0; i < c->head_dim; i++) amax = fmaxf(amax, fabsf(x[i]));
        if (amax == 0) return 0;
        frexpf(amax, e);
        for (int i = 0; i < c->head_dim; i++) copy[i] = ldexpf(x[i], -*e);
        x = copy;
    }
}

/* Codes of z at a scale; returns the scale of least squares for them, and what of sumsq(u) it takes away. */
static float take_codes(const kv_codec *c, const float *z, const float *u, float scale, uint8_t *code, float *gain)
{
    const wf_state *s = c->state;
    float centroid[KV_MAX_HEAD_DIM], v[KV_MAX_HEAD_DIM];
    index_row(s, wf_unit(c->side), z, 1 / scale, code, centroid);
    for (int i = 0; i < s->n; i++) v[i] = s->sigma[i] * centroid[i];
    const float uv = kv_dot16(u, v, s->n), vv = kv_sumsq(v, s->n), best = uv / vv;
    *gain = best * uv;
    return best;
}

static void wf_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const wf_state *s = c->state;
    const wf_level *l = level();
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float z[KV_MAX_HEAD_DIM], u[KV_MAX_HEAD_DIM], most = -1, gain, value;
        uint8_t code[KV_MAX_HEAD_DIM] = { 0 };
        unsigned stored = 0;
        int e;
        const float rms = analyse(c, l, x, z, &e);
        float scale = rms;
        for (int i = 0; i < s->n; i++) u[i] = s->sigma[i] * z[i];
        for (int k = 0; k < s->search && rms > 0; k++) {
            const float to = take_codes(c, z, u, rms * s->factor[k], code, &gain);
            if (gain > most) { most = gain; scale = to; }
        }
        for (int pass = 0; pass < PASSES && scale > 0; pass++) {
            const unsigned before = stored;
            stored = store_scale(s, ldexpf(scale, e), &value);
            if (value == 0 || (pass && stored == before)) break;
            scale = take_codes(c, z, u, ldexpf(value, -e), code, &gain);
        }
        put_codes(c, page, t, code);
        if (s->scale_mode == WF_SCALE_LOG8) page[s->scales + (size_t)t] = (uint8_t)stored;
        else kv_store_u16(page + s->scales + 2 * (size_t)t, (uint16_t)stored);
    }
}

/* Centroids of one token; returns its scale. */
static float get_row(const kv_codec *c, const uint8_t *page, int token, float *centroid)
{
    const wf_state *s = c->state;
    uint8_t code[KV_MAX_HEAD_DIM];
    float scale;
    get_codes(c, page, token, code);
    for (int i = 0; i < s->n; i++) centroid[i] = s->tables->book[wf_width(s, c, i)].centroid[code[i]];
    wf_load_scales(s, page, token, 1, &scale);
    return scale;
}

/* out row = by * sum_i z_i (synthesis column i) */
static void synthesise(const kv_codec *c, const wf_level *l, const float *z, float by, float *out)
{
    const wf_state *s = c->state;
    const int row = (int)kv_round_up((size_t)c->head_dim, 16);
    float sum[KV_MAX_HEAD_DIM];
    l->dense(s->rows, (size_t)row, z, sum, s->n, row);
    for (int i = 0; i < c->head_dim; i++) out[i] = sum[i] * by;
}

static void wf_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const wf_level *l = level();
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        float z[KV_MAX_HEAD_DIM];
        const float scale = get_row(c, page, t, z);
        synthesise(c, l, z, scale, x);
    }
}

/* ---- attention */

static void wf_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared) { level()->query(c, q, ld, n_q, prepared); }

static void wf_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    level()->dot(c, page, n_tokens, prepared, n_q, scores, ld);
}

static void wf_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    level()->accumulate(c, page, n_tokens, p, ld, n_q, acc);
}

static void wf_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int i = 0; i < n_q; i++) synthesise(c, level(), acc + (size_t)i * (size_t)c->space_dim, 1, out + i * ld);
}

/* ---- plain C */

static void dense_c(const float *m, size_t ld, const float *x, float *out, int n_in, int n_out)
{
    for (int i = 0; i < n_out; i++) out[i] = 0;
    for (int j = 0; j < n_in; j++)
        for (int i = 0; i < n_out; i++) out[i] += x[j] * m[(size_t)j * ld + (size_t)i];
}

static void query_c(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    const wf_state *s = c->state;
    for (int i = 0; i < n_q; i++) {
        void *one = (uint8_t *)prepared + (size_t)i * c->query_bytes;
        float *row = scalar_query_f32(one);
        dense_c(s->synthesis, (size_t)s->padded, q + i * ld, row, c->head_dim, s->padded);
        for (int k = 0; k < s->padded; k++) row[k] *= s->unit[k];
        scalar_c.prepare(one, s->padded);
    }
}

static void dot_c(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const wf_state *s = c->state;
    for (int t = 0; t < n_tokens; t++) {
        uint8_t code[KV_MAX_HEAD_DIM];
        float fixed[KV_MAX_HEAD_DIM], scale;
        get_codes(c, page, t, code);
        wf_load_scales(s, page, t, 1, &scale);
        for (int i = 0; i < s->n; i++) fixed[i] = s->tables->book[wf_width(s, c, i)].fixed[code[i]];
        for (int q = 0; q < n_q; q++) scores[q * ld + t] = scale * kv_dot16(scalar_query_f32((uint8_t *)prepared + (size_t)q * c->query_bytes), fixed, s->n);
    }
}

static void accumulate_c(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    const wf_state *s = c->state;
    for (int t = 0; t < n_tokens; t++) {
        float z[KV_MAX_HEAD_DIM];
        const float scale = get_row(c, page, t, z);
        for (int q = 0; q < n_q; q++) {
            const float w = p[q * ld + t] * scale;
            for (int i = 0; i < s->n; i++) acc[(size_t)q * (size_t)c->space_dim + (size_t)i] += w * z[i];
        }
    }
}

const wf_level wf_c = { dense_c, query_c, dot_c, accumulate_c };

static int fill_device(const kv_codec *c, kv_pod *pod, struct wf_device *d)
{
    const wf_state *s = c->state;
    const int keys = c->side == KV_SIDE_K;
    const size_t dim = (size_t)c->head_dim, row_ld = kv_round_up(dim, 16);
    uint32_t start;
    *d = (struct wf_device){ .n = s->n, .padded = s->padded, .unit = wf_unit(c->side), .n_units = s->n / wf_unit(c->side), .n_tiles = s->n_tiles,
        .log8 = s->scale_mode == WF_SCALE_LOG8, .search = s->search, .tile_bytes = (uint32_t)s->tile_bytes, .n_rows = (uint32_t)(s->tile_bytes / 64),
        .scales = (uint32_t)s->scales, .row_ld = (uint32_t)row_ld };
    memcpy(d->factor, s->factor, sizeof d->factor);
    memcpy(d->width, s->width, sizeof d->width);
    for (int k = 0, at = 0; k < d->n_units && keys; at += s->width[k++]) {
        d->bit[k] = (uint16_t)at;
        for (int r = (at + 7) / 8; 8 * r < at + s->width[k]; r++) d->first[r] = (uint8_t)k;
    }
    for (int i = 0; i < s->n_tiles && !keys; i++) d->tile[i] = (uint32_t)s->tile[i];
    memcpy(d->scale, s->tables->scale, sizeof d->scale);
    memcpy(d->between, s->tables->between, sizeof d->between);
    for (int w = 0; w <= WF_MAX_BITS; w++) {
        memcpy(d->centroid[w], s->tables->book[w].centroid, sizeof d->centroid[w]);
        memcpy(d->bound[w], s->tables->book[w].bound, sizeof d->bound[w]);
    }
    FORWARD_IF_ERROR(kv_pod_add(pod, d, sizeof *d, &start));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->sigma, sizeof(float) * (size_t)s->padded, &d->at_sigma));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->analysis, sizeof(float) * dim * (size_t)s->padded, &d->at_analysis));
    FORWARD_IF_ERROR(kv_pod_add(pod, s->rows, sizeof(float) * (size_t)s->n * row_ld, &d->at_rows));
    memcpy(pod->data, d, sizeof *d);
    return KV_OK;
}

static int wf_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    kv_pod pod = { 0 };
    struct wf_device *d = kv_alloc(sizeof *d);
    if (!d) return KV_E_NOMEM;
    const int status = fill_device(c, &pod, d);
    kv_free(d);
    return kv_pod_done(&pod, status, out, bytes);
}

const kv_codec_ops kv_codec_wf = {
    .name = "wf", .about = "calibrated basis under the queries' weight, water-filled bits, attended without decoding",
    .source = "reverse water-filling: Cover and Thomas, section 10.3.3; page-relative keys: docs/codecs.md",
    .params = params, .n_params = sizeof params / sizeof *params, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CALIBRATED,
    .state_size = sizeof(wf_state), .calibrate = wf_calibrate,
    .init = wf_init, .fini = wf_fini, .encode = wf_encode, .decode = wf_decode,
    .query = wf_query, .dot = wf_dot, .accumulate = wf_accumulate, .output = wf_output, .device = wf_on_device, .fit_bits = wf_fit_bits,
};
