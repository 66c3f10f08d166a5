/* scalar_codes.c -- codes of the `scalar` codec in a page, and plain C for what scalar_avx2.c and scalar_avx512.c do faster.
 * scalar.c has the page's byte picture. */
#include <math.h>
#include "scalar.h"

#define F(row, shift, width, from) { row, shift, width, from }
const scalar_field scalar_fields[4][8][2] = {
    { { F(0, 0, 1, 0) }, { F(0, 1, 1, 0) }, { F(0, 2, 1, 0) }, { F(0, 3, 1, 0) }, { F(0, 4, 1, 0) }, { F(0, 5, 1, 0) }, { F(0, 6, 1, 0) }, { F(0, 7, 1, 0) } },
    { { F(0, 0, 2, 0) }, { F(0, 2, 2, 0) }, { F(0, 4, 2, 0) }, { F(0, 6, 2, 0) } },
    { { F(0, 0, 3, 0) }, { F(0, 3, 3, 0) }, { F(1, 0, 3, 0) }, { F(1, 3, 3, 0) }, { F(2, 0, 3, 0) }, { F(2, 3, 3, 0) },
      { F(0, 6, 2, 0), F(1, 6, 1, 2) }, { F(2, 6, 2, 0), F(1, 7, 1, 2) } },
    { { F(0, 0, 4, 0) }, { F(0, 4, 4, 0) } },
};
#undef F

size_t scalar_lay_out(scalar_plane *p, int bits, int inner, int n_tiles, size_t offset)
{
    static const struct { int chunk, rows; } shape[4] = { { 32, 1 }, { 16, 1 }, { 32, 3 }, { 8, 1 } };
    *p = (scalar_plane){ .bits = bits, .chunk = shape[bits - 1].chunk, .rows = shape[bits - 1].rows, .offset = offset };
    p->n_chunks = (inner + p->chunk - 1) / p->chunk;
    return offset + (size_t)n_tiles * scalar_plane_tile(p);
}

static inline uint8_t *words(const scalar_plane *p, const uint8_t *page, int tile, int chunk)
{
    return (uint8_t *)page + p->offset + (size_t)tile * scalar_plane_tile(p) + (size_t)chunk * (size_t)p->rows * 64;
}

static inline uint32_t in_each_byte(int width) { return 0x01010101u * ((1u << width) - 1); }

/* code: head_dim codes, zeros up to the next multiple of 32. */
void scalar_put_key(const kv_codec *c, uint8_t *page, int token, const uint8_t *code)
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
float scalar_get_row(const kv_codec *c, const uint8_t *page, int token, float *z)
{
    const scalar_state *s = c->state;
    uint8_t code[KV_MAX_HEAD_DIM];            /* whole chunks: head_dim rounded up to 32 at most */
    (c->side == KV_SIDE_K ? get_key : get_value)(c, page, token, code);
    for (int i = 0; i < c->head_dim; i++) z[i] = s->centroid[code[i]];
    return kv_f16_to_f32(kv_load_u16(page + s->scales + 2 * (size_t)token));
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
        const float scale = scalar_get_row(c, page, t, z);
        for (int q = 0; q < n_q; q++)
            scores[q * ld + t] = scale * kv_dot16(scalar_query_f32((uint8_t *)prepared + (size_t)q * c->query_bytes), z, c->head_dim);
    }
}

static void accumulate_c(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    for (int t = 0; t < n_tokens; t++) {
        float z[KV_MAX_HEAD_DIM];
        const float scale = scalar_get_row(c, page, t, z);
        for (int q = 0; q < n_q; q++) {
            const float w = p[q * ld + t] * scale;
            for (int i = 0; i < c->head_dim; i++) acc[(size_t)q * (size_t)c->space_dim + (size_t)i] += w * z[i];
        }
    }
}

const scalar_level scalar_c = { scale_row_c, dense_c, index_c, put_value_c, prepare_c, dot_c, accumulate_c };
