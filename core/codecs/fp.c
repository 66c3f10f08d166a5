/* fp.c -- small floating-point numbers: FP8 (e4m3, e5m2), NVFP4, MXFP4, MXFP8.
 *
 * A row x becomes codes of a number grid, an optional scale for each group of neighbouring channels, and one scale for
 * the whole row (a constant, or stored with the token):
 *
 *   page   | codes: row 0, row 1, ... | group scales: row 0, row 1, ... | token scales f16 [page_tokens] |
 *   row    head_dim codes, code i in bits i*b .. i*b+b-1 from the lowest bit on: a byte each, or nibbles, even channel low
 *   group scales of a row: ceil(head_dim / group) bytes (block=e8m0 or e4m3);  token scales: scale=token
 *   tables (scale=head): S f32
 *
 *   grid    bits: sign exponent mantissa   bias   smallest, smallest normal, largest      (OCP FP8 1.0, OCP MX 1.0)
 *   e4m3    1 4 3                             7   2^-9, 2^-6, 448         S.1111.111 is NaN, no infinities
 *   e5m2    1 5 2                            15   2^-16, 2^-14, 57344     infinities and NaN as f16
 *   e2m1    1 2 1                             1   0.5, 1, 6
 *   e8m0    0 8 0                           127   2^-127 .. 2^127         255 is NaN; scales only
 *
 * Encoding, f32, one rounding a step, none fused; M: the grid's largest number, amax: of the row or the group:
 *
 *   S  row's scale     value (static) | f16(min(amax / M, 65504)) (token) | amax of the calibration's rows / M, for a layer, head and
 *                      side (head); with block=e4m3: amax / (448 M) for both.  scale=head takes twice that where it costs nothing: a
 *                      grid with exponents to spare does not feel a factor of two, and other texts have larger rows
 *   s  group's scale   none: 1 | e8m0: 2^(floor(log2 amax) - E), E the exponent of M (OCP MX 6.3), of x / S
 *                      e4m3: nearest e4m3 to (amax / M) / S; for codes of a byte the next
 *                      one up where that is too small and below 2^-6: the smallest e4m3 are far apart, and under 2^-10 is 0
 *   code               nearest grid number to x / (s S), ties to even, saturated to +-M; 0 where s S is 0
 *   value              grid number * (s S)
 *
 * Every finite input decodes to something finite.  Damaged codes may decode to NaN or infinity, as the formats say. */
#include <math.h>
#include "../calib.h"
#include "../vecmath.h"
#include "fp_device.h"
#include "fp_rows.h"

enum { P_GRID, P_BLOCK, P_GROUP, P_SCALE, P_VALUE };
enum { GRID_E4M3, GRID_E5M2, GRID_E2M1 };
enum { BLOCK_NONE, BLOCK_E8M0, BLOCK_E4M3 };
enum { SCALE_STATIC, SCALE_TOKEN, SCALE_HEAD };
#define FP_SCALE_MIN 0x1p-100f
#define FP_SCALE_MAX 0x1p100f

static const kv_param params[] = {
    { "grid",  "numbers that codes stand for", KV_PARAM_CHOICE, GRID_E4M3, 0, 2, "e4m3|e5m2|e2m1" },
    { "block", "scale of each group of channels: none, a power of two (OCP MX), or e4m3 (NVFP4)", KV_PARAM_CHOICE, BLOCK_NONE, 0, 2, "none|e8m0|e4m3" },
    { "group", "channels that share a block scale; a multiple of 16", KV_PARAM_INT, 32, 16, 128, NULL },
    { "scale", "scale of a whole row: the number `value`, its own in f16, or one for each layer and head from a calibration", KV_PARAM_CHOICE, SCALE_STATIC, 0, 2, "static|token|head" },
    { "value", "the static scale: what a code of 1 is worth", KV_PARAM_REAL, 1, 0x1p-20, 65536, NULL },
};

/* Rounding to a grid on the bits of |y|: below the smallest normal number adding `magic` leaves multiples of the smallest;
 * from there on the mantissa is cut to its bits and the exponent rebiased. */
typedef struct grid { uint32_t largest, normal, rebias; float magic, max; int shift, exponent, bits; } grid;

/* magic: 2^23 times the smallest number. */
static const grid grids[] = {
    [GRID_E4M3] = { .largest = 0x43e00000, .normal = (127 - 6) << 23,  .rebias = (127 - 7) << 3,  .magic = 0x1p14f, .max = 448,   .shift = 20, .exponent = 8,  .bits = 8 },
    [GRID_E5M2] = { .largest = 0x47600000, .normal = (127 - 14) << 23, .rebias = (127 - 15) << 2, .magic = 0x1p7f,  .max = 57344, .shift = 21, .exponent = 15, .bits = 8 },
    [GRID_E2M1] = { .largest = 0x40c00000, .normal = 127 << 23,        .rebias = (127 - 1) << 1,  .magic = 0x1p22f, .max = 6,     .shift = 22, .exponent = 2,  .bits = 4 },
};

typedef struct fp_state {
    fp_rows rows;
    grid    grid;
    int     block, scale, group, n_groups;          /* group: the whole row without blocks */
    float   value;
    size_t  groups_at, tokens_at;
} fp_state;

static inline const fp_state *state_of(const kv_codec *c) { return c->state; }

static int check(const kv_codec *c)
{
    static const char *const word[] = { "static", "token", "head" };
    const int group = (int)c->value[P_GROUP], scale = (int)c->value[P_SCALE];
    RETURN_ERROR_IF(group % 16 != 0, KV_E_PARAM, "codec 'fp': group=%d is not a multiple of 16", group);
    RETURN_ERROR_IF(c->value[P_BLOCK] == BLOCK_E8M0 && scale != SCALE_STATIC, KV_E_PARAM, "codec 'fp': scale=%s with block=e8m0 adds nothing (static)", word[scale]);
    RETURN_ERROR_IF(scale != SCALE_STATIC && c->value[P_VALUE] != 1, KV_E_PARAM, "codec 'fp': value=%g with scale=%s is not used (1)", c->value[P_VALUE], word[scale]);
    return KV_OK;
}

/* What a row of this largest element is divided by, so that all of the grid is used. */
static double whole_scale(const grid *g, int block, double amax) { return amax / (block == BLOCK_E4M3 ? 448.0 * (double)g->max : (double)g->max); }

static int fp_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes)
{
    *blob = NULL;
    *blob_bytes = 0;
    FORWARD_IF_ERROR(check(c));
    if (c->value[P_SCALE] != SCALE_HEAD) return KV_OK;
    FORWARD_IF_ERROR(kv_moments_need_rows(m, c->ops->name));
    const grid *g = &grids[(int)c->value[P_GRID]];
    const int block = (int)c->value[P_BLOCK], spare = g->bits == 8 || block != BLOCK_NONE;
    double amax = 0;
    for (size_t i = 0; i < (size_t)m->n_sample * (size_t)m->head_dim; i++) amax = fmax(amax, fabs((double)m->sample[i]));
    float *s = kv_alloc(sizeof *s);
    if (!s) return KV_E_NOMEM;
    *s = amax > 0 ? (float)fmin(fmax((spare ? 2 : 1) * whole_scale(g, block, amax), FP_SCALE_MIN), FP_SCALE_MAX) : 1;
    *blob = s;
    *blob_bytes = sizeof *s;
    return KV_OK;
}

static int read_table(const kv_codec *c, float *value)
{
    const int head = c->value[P_SCALE] == SCALE_HEAD;
    if (head && !c->blob) return kv_codec_needs_blob(c);
    RETURN_ERROR_IF(c->blob_bytes != (head ? sizeof *value : 0), KV_E_CORRUPT, "codec 'fp': %zu bytes of tables, %zu are needed", c->blob_bytes, head ? sizeof *value : 0);
    if (!head) return KV_OK;
    memcpy(value, c->blob, sizeof *value);
    RETURN_ERROR_IF(!(*value >= FP_SCALE_MIN && *value <= FP_SCALE_MAX), KV_E_CORRUPT, "codec 'fp': the tables' scale is %g, outside 2^-100..2^100", (double)*value);
    return KV_OK;
}

static int fp_init(kv_codec *c)
{
    static const int kind[] = { FP_E4M3, FP_E5M2, 4 };
    static const float e2m1[8] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
    fp_state *s = c->state;
    const int which = (int)c->value[P_GRID], group = (int)c->value[P_GROUP];
    FORWARD_IF_ERROR(check(c));
    s->block = (int)c->value[P_BLOCK];
    s->scale = (int)c->value[P_SCALE];
    s->value = (float)c->value[P_VALUE];
    s->grid = grids[which];
    FORWARD_IF_ERROR(read_table(c, &s->value));
    s->group = s->block == BLOCK_NONE ? c->head_dim : group;
    s->n_groups = (c->head_dim + s->group - 1) / s->group;
    s->rows = (fp_rows){ .kind = kind[which], .cols = c->head_dim, .group = s->group, .n_groups = s->n_groups, .row_bytes = fp_row_bytes(kind[which], c->head_dim) };
    for (int i = 0; i < 16; i++) s->rows.table[i] = i < 8 ? e2m1[i] : -e2m1[i - 8];
    const size_t tokens = (size_t)c->page_tokens, codes = tokens * s->rows.row_bytes, groups = s->block == BLOCK_NONE ? 0 : tokens * (size_t)s->n_groups;
    s->groups_at = codes;
    s->tokens_at = codes + groups;
    c->granule = 1;
    c->page.codes = (double)codes;
    c->page.scales = (double)(groups + (s->scale == SCALE_TOKEN ? 2 * tokens : 0));
    c->bits_nominal = s->grid.bits;
    c->space_dim = c->head_dim;
    c->query_bytes = kv_round_up((size_t)c->head_dim * sizeof(float), 64);
    return KV_OK;
}

/* ---- encoding: one source for every level; the compiler makes vectors of its loops ---------------------------------- */

#define INLINE static inline __attribute__((always_inline))

/* |y| as bits to its code without sign. */
INLINE uint32_t round_to(const grid *g, uint32_t a)
{
    a = a < g->largest ? a : g->largest;
    const uint32_t small = kv_f32_bits(kv_bits_f32(a) + g->magic) - kv_f32_bits(g->magic);
    const uint32_t wide = ((a + ((1u << g->shift) / 2 - 1) + (a >> g->shift & 1)) >> g->shift) - g->rebias;
    return a < g->normal ? small : wide;
}

INLINE uint32_t abs_max(const float *x, int n)
{
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        const uint32_t a = kv_f32_bits(x[i]) & 0x7fffffffu;
        most = most > a ? most : a;
    }
    return most;
}

/* Codes of 32 bits: with bytes the compiler takes 32 or 64 at a time, which groups of 16 never have. */
INLINE void put_codes(const grid *g, const float *x, float d, int n, uint32_t *code)
{
    const int top = g->bits - 1;
    for (int i = 0; i < n; i++) {
        const uint32_t u = kv_f32_bits(x[i] / d);
        code[i] = round_to(g, u & 0x7fffffffu) | (u >> 31) << top;
    }
}

/* The group's scale as its byte; row: the row's. */
INLINE uint8_t group_scale(const fp_state *s, uint32_t amax, float row)
{
    if (s->block == BLOCK_E8M0) {
        const int e = (int)(kv_f32_bits(kv_bits_f32(amax) / row) >> 23) - s->grid.exponent;
        return (uint8_t)(e < 0 ? 0 : e > 254 ? 254 : e);
    }
    const float want = kv_bits_f32(amax) / s->grid.max / row;
    const uint8_t b = (uint8_t)round_to(&grids[GRID_E4M3], kv_f32_bits(want));
    return (uint8_t)(b + (s->grid.bits == 8 && b < 8 && fp_e4m3_to_f32(b) < want));
}

INLINE void encode_rows(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const fp_state *s = state_of(c);
    const int d = c->head_dim;
    for (int t = tok0; t < tok0 + n; t++, x += ld) {
        uint32_t code[KV_MAX_HEAD_DIM + 1];
        uint8_t *row = page + (size_t)t * s->rows.row_bytes, *groups = page + s->groups_at + (size_t)t * (size_t)s->n_groups;
        float all = s->value;
        if (s->scale == SCALE_TOKEN) {
            const float least = kv_bits_f32(abs_max(x, d)) / (s->block == BLOCK_E4M3 ? 448 * s->grid.max : s->grid.max);
            const uint16_t h = kv_f32_to_f16(least < 65504 ? least : 65504);
            kv_store_u16(page + s->tokens_at + 2 * (size_t)t, h);
            all = kv_f16_to_f32(h);
        }
        for (int i = 0, k = 0; i < d; i += s->group, k++) {
            const int m = kv_min(s->group, d - i);
            float scale = all;
            if (s->block != BLOCK_NONE) {
                groups[k] = all > 0 ? group_scale(s, abs_max(x + i, m), all) : 0;
                scale = (s->block == BLOCK_E8M0 ? fp_e8m0_to_f32(groups[k]) : fp_e4m3_to_f32(groups[k])) * all;
            }
            if (scale > 0) put_codes(&s->grid, x + i, scale, m, code + i);
            else memset(code + i, 0, (size_t)m * sizeof *code);
        }
        if (s->grid.bits == 8) {
            for (int i = 0; i < d; i++) row[i] = (uint8_t)code[i];
            continue;
        }
        code[d] = 0;
        for (int i = 0; i < (d + 1) / 2; i++) row[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
    }
}

static void encode_c(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld) { encode_rows(c, page, tok0, n, x, ld); }
KV_AVX2 static void encode_avx2(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld) { encode_rows(c, page, tok0, n, x, ld); }
KV_AVX512 static void encode_avx512(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld) { encode_rows(c, page, tok0, n, x, ld); }

static void fp_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const int level = kv_cpu_simd();
    (level >= KV_SIMD_AVX512 ? encode_avx512 : level >= KV_SIMD_AVX2 ? encode_avx2 : encode_c)(c, page, tok0, n, x, ld);
}

/* ---- decoding and attention, FP_TILE tokens at a time ------------------------------------------------------------- */

typedef struct tile {
    const uint8_t *codes;
    int            n;
    float          group[FP_TILE * FP_MAX_GROUPS], token[FP_TILE];
} tile;

static void load_tile(const kv_codec *c, const uint8_t *page, int tok0, int n, tile *t)
{
    const fp_state *s = state_of(c);
    t->codes = page + (size_t)tok0 * s->rows.row_bytes;
    t->n = n;
    if (s->scale == SCALE_TOKEN) kv_vec_load(KV_F16, page + s->tokens_at + 2 * (size_t)tok0, t->token, n);
    else for (int i = 0; i < n; i++) t->token[i] = s->value;
    if (s->block != BLOCK_NONE) fp_values(s->block == BLOCK_E8M0 ? FP_E8M0 : FP_E4M3, page + s->groups_at + (size_t)tok0 * (size_t)s->n_groups, n * s->n_groups, t->group);
}

static void fp_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const fp_state *s = state_of(c);
    tile t;
    for (int i = 0; i < n; i += FP_TILE) {
        load_tile(c, page, tok0 + i, kv_min(FP_TILE, n - i), &t);
        for (int j = 0; j < t.n; j++)
            for (int k = 0; k < s->n_groups; k++) t.group[j * s->n_groups + k] = s->block != BLOCK_NONE ? t.group[j * s->n_groups + k] * t.token[j] : t.token[j];
        fp_rows_decode(&s->rows, t.codes, t.n, t.group, x + i * ld, ld);
    }
}

static void fp_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    for (int g = 0; g < n_q; g++) memcpy((uint8_t *)prepared + (size_t)g * c->query_bytes, q + g * ld, (size_t)c->head_dim * sizeof(float));
}

/* Queries from which decoding first is faster: codes are unpacked, and times their groups' scales, for every four of them. */
enum { MANY_SCALED = 5, MANY_BYTES = 6 /* sums; bytes cost more to unpack than an index */, MANY = 9 };

static void fp_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const fp_state *s = state_of(c);
    tile t;
    if (n_q >= (s->block != BLOCK_NONE ? MANY_SCALED : MANY)) {
        kv_decoded_dot(c, page, n_tokens, prepared, (int64_t)(c->query_bytes / sizeof(float)), n_q, scores, ld);
        return;
    }
    for (int i = 0; i < n_tokens; i += FP_TILE) {
        load_tile(c, page, i, kv_min(FP_TILE, n_tokens - i), &t);
        fp_rows_dot(&s->rows, t.codes, t.n, s->block != BLOCK_NONE ? t.group : NULL, t.token, prepared, (int64_t)(c->query_bytes / sizeof(float)), n_q, scores + i, ld);
    }
}

static void fp_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    const fp_state *s = state_of(c);
    tile t;
    if (n_q >= (fp_bits(s->rows.kind) == 8 ? MANY_BYTES : MANY)) {
        kv_decoded_accumulate(c, page, n_tokens, p, ld, n_q, acc);
        return;
    }
    for (int i = 0; i < n_tokens; i += FP_TILE) {
        load_tile(c, page, i, kv_min(FP_TILE, n_tokens - i), &t);
        fp_rows_accumulate(&s->rows, t.codes, t.n, s->block != BLOCK_NONE ? t.group : NULL, t.token, p + i, ld, n_q, acc, c->space_dim);
    }
}

static void fp_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int g = 0; g < n_q; g++) memcpy(out + g * ld, acc + g * c->space_dim, (size_t)c->head_dim * sizeof(float));
}

/* Four or eight bits, whichever page comes nearer; the wider is e5m2 where that was asked for. */
static int fp_fit_bits(kv_codec *c, double target)
{
    const double scales = (c->value[P_BLOCK] == BLOCK_NONE ? 0 : 8 / c->value[P_GROUP]) + (c->value[P_SCALE] == SCALE_TOKEN ? 16.0 / c->head_dim : 0);
    if (target - scales < 6) c->value[P_GRID] = GRID_E2M1;
    else if (c->value[P_GRID] == GRID_E2M1) c->value[P_GRID] = GRID_E4M3;
    return KV_OK;
}

static struct fp_device_grid grid_on_device(const grid *g)
{
    return (struct fp_device_grid){ g->largest, g->normal, g->rebias, g->magic, g->max, g->shift, g->exponent, g->bits };
}

static int fp_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    const fp_state *s = state_of(c);
    struct fp_device d = { .grid = grid_on_device(&s->grid), .e4m3 = grid_on_device(&grids[GRID_E4M3]), .kind = s->rows.kind, .block = s->block,
        .by_token = s->scale == SCALE_TOKEN, .group = s->group, .n_groups = s->n_groups, .row_bytes = (uint32_t)s->rows.row_bytes,
        .groups_at = (uint32_t)s->groups_at, .tokens_at = (uint32_t)s->tokens_at, .value = s->value };
    kv_pod pod = { 0 };
    uint32_t at;
    memcpy(d.table, s->rows.table, sizeof d.table);
    return kv_pod_done(&pod, kv_pod_add(&pod, &d, sizeof d, &at), out, bytes);
}

const kv_codec_ops kv_codec_fp = {
    .name = "fp", .about = "small floating-point numbers: FP8, and FP4 or FP8 with block scales (NVFP4, MXFP4, MXFP8)",
    .source = "OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) 1.0; NVFP4: e2m1, groups of 16, e4m3 scales",
    .params = params, .n_params = 5, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CALIBRATABLE,
    .state_size = sizeof(fp_state), .calibrate = fp_calibrate, .init = fp_init, .encode = fp_encode, .decode = fp_decode,
    .query = fp_query, .dot = fp_dot, .accumulate = fp_accumulate, .output = fp_output, .device = fp_on_device, .fit_bits = fp_fit_bits,
};
