/* polar_stages.c -- packed indices, codebooks of angles and radii, and attention on decoded tiles; see polar.h. */
#include <immintrin.h>
#include <math.h>
#include "../vecmath.h"
#include "polar.h"

/* ---- SIMD levels */

#define LEVEL_C
#define LEVEL_FILE "codecs/polar_level.h"
#include "../levels.h"
#undef LEVEL_FILE
#undef LEVEL_C

const polar_level *polar_at_level(void)
{
    static const polar_level *const by_simd[] = { &level_c, &level_avx2, &level_avx512 };
    return by_simd[kv_cpu_simd()];
}

/* ---- packed indices */

enum { WIDTH_MAX = 25, DIGITS_MAX = 25 };

static int bits_for(uint64_t values) { return values < 2 ? 0 : 64 - __builtin_clzll(values - 1); }
static int row_bytes(int count, int digits, int width) { return ((count + digits - 1) / digits * width + 7) / 8; }

static void choose(int base, int count, int *digits, int *width)
{
    uint64_t values = 1;
    int best = INT32_MAX;
    for (int g = 1; g <= DIGITS_MAX && g <= kv_max(count, 1); g++) {
        values *= (uint64_t)base;
        const int w = bits_for(values);
        if (w > WIDTH_MAX || w + bits_for((uint64_t)base) > 32) break;
        if (row_bytes(count, g, w) < best) {
            best = row_bytes(count, g, w);
            *digits = g;
            *width = w;
        }
    }
}

void polar_field_init(polar_field *f, int base, int count)
{
    *f = (polar_field){ .base = base, .count = count };
    choose(base, count, &f->digits, &f->width);
    f->fields = (count + f->digits - 1) / f->digits;
    f->bytes = row_bytes(count, f->digits, f->width);
    for (int j = 0; j < 8; j++) {             /* four fields from each load; the second starts at byte width / 2 */
        const int bit = j < 4 ? j * f->width : 4 * f->width % 8 + (j - 4) * f->width;
        for (int b = 0; b < 4; b++) f->shuffle[4 * j + b] = (uint8_t)(bit / 8 + b);
        f->shift[j] = bit % 8;
    }
}

double polar_field_bits(int base, int count)
{
    int digits = 1, width = 1;
    choose(base, count, &digits, &width);
    return 8.0 * row_bytes(count, digits, width) / count;
}

void polar_pack(const polar_field *f, const int32_t *index, uint8_t *dst)
{
    uint64_t hold = 0, values = 1;
    int held = 0;
    const uint8_t *end = dst + f->bytes;
    for (int g = 0; g < f->digits; g++) values *= (uint64_t)f->base;
    for (int j = 0; j < f->fields; j++) {
        uint64_t v = 0;
        for (int i = j, g = 0; g < f->digits; g++, i += f->fields) v = v * (uint64_t)f->base + (i < f->count ? (uint64_t)index[i] : 0);
        if (f->digits > 1) v = ((v << f->width) + values - 1) / values;
        hold |= v << held;
        for (held += f->width; held >= 8; held -= 8, hold >>= 8) *dst++ = (uint8_t)hold;
    }
    if (dst < end) *dst = (uint8_t)hold;
}

/* ---- codebooks */

int polar_circle(int n, float **table)
{
    const int all = 1 << bits_for((uint64_t)n);
    if (!(*table = kv_alloc_array(2 * (size_t)all, sizeof **table, false))) return KV_E_NOMEM;
    for (int k = 0; k < all; k++) {
        (*table)[2 * k] = (float)cos(2 * M_PI * k / n);
        (*table)[2 * k + 1] = (float)sin(2 * M_PI * k / n);
    }
    return KV_OK;
}

enum { GRID = 8192, LLOYD_STEPS = 300 };

static double density(int kind, int k, double limit, double x)
{
    if (kind == POLAR_ANGLE) return pow(sin(2 * x), k - 1);
    if (kind == POLAR_DISK) return exp(-0.5 * x * x) * erf(sqrt(0.5 * fmax(0, limit * limit - x * x)));
    if (x < limit) return 0;
    const double peak = 0.5 * (k - 1) * (log((k - 1.0) / k) - 1);
    return exp((k - 1) * log(x) - 0.5 * k * x * x - peak);
}

/* Mass and moment below x, from sums over whole cells of the grid. */
static void below(const double *mass, const double *moment, double step, double x, double *m0, double *m1)
{
    const int i = kv_min((int)(x / step), GRID - 1);
    const double part = x / step - i, m = (mass[i + 1] - mass[i]) * part;
    *m0 = mass[i] + m;
    *m1 = moment[i] + m * step * (i + 0.5 * part);
}

/* Starts where a density's cube root has equal shares (Panter and Dite), which is optimal for many levels. */
void polar_lloyd(int kind, int k, double limit, int levels, double *centroid)
{
    static const int n = GRID;
    double mass[GRID + 1], moment[GRID + 1];
    const double end = kind == POLAR_ANGLE ? M_PI_2 : kind == POLAR_DISK ? limit : 1 + 6 / sqrt((double)k), step = end / n;
    double total = 0;
    mass[0] = moment[0] = 0;
    for (int i = 0; i < n; i++) {
        const double x = step * (i + 0.5), f = density(kind, k, limit, x);
        mass[i + 1] = mass[i] + f;
        moment[i + 1] = moment[i] + f * x;
        total += cbrt(f);
    }
    double sum = 0;
    for (int i = 0, c = 0; i < n && c < levels; i++) {
        sum += cbrt(mass[i + 1] - mass[i]);
        while (c < levels && sum >= (c + 0.5) / levels * total) centroid[c++] = step * (i + 0.5);
    }
    for (int it = 0; it < LLOYD_STEPS; it++) {
        double m0 = 0, m1 = 0;
        for (int c = 0; c < levels; c++) {
            double n0 = mass[n], n1 = moment[n];
            if (c + 1 < levels) below(mass, moment, step, 0.5 * (centroid[c] + centroid[c + 1]), &n0, &n1);
            if (n0 > m0) centroid[c] = (n1 - m1) / (n0 - m0);
            m0 = n0;
            m1 = n1;
        }
    }
}

/* ---- radii */

int polar_exponent(const float *x, int n)
{
    float top = 0;
    int e;
    for (int i = 0; i < n; i++) top = fmaxf(top, fabsf(x[i]));
    if (top == 0 || (top > 0x1p-40f && top < 0x1p40f)) return 0;
    frexpf(top, &e);
    return e;
}

void polar_norms_init(polar_norms *s, int mode, int bits, int count, int k, int angles)
{
    *s = (polar_norms){ .mode = mode, .bits = bits, .count = count, .shrink = (float)(sin(M_PI / angles) / (M_PI / angles)) };
    s->side_bytes = mode == POLAR_LIN || mode == POLAR_LOG ? 4 : mode == POLAR_LLOYD ? 2 : 0;
    if (mode == POLAR_F32 || mode == POLAR_F16) {
        s->bytes = count * (mode == POLAR_F32 ? 4 : 2);
        return;
    }
    if (bits > 0) {
        polar_field_init(&s->field, 1 << bits, count);
        s->bytes = s->field.bytes;
    }
    if (mode != POLAR_LLOYD) return;
    double c[256];
    const int levels = 1 << bits;
    polar_lloyd(POLAR_CHI, k, 0, levels, c);
    for (int i = 0; i < 256; i++) {
        s->table[i] = (float)c[i % levels];
        s->bound[i] = i < levels - 1 ? (float)(0.5 * (c[i] + c[i + 1])) : INFINITY;
    }
}

/* lo and step as stored, so that codes are chosen for what will be decoded. */
static void put_steps(const polar_norms *s, const float *x, uint8_t *row, uint8_t *side)
{
    int32_t code[POLAR_ROW];
    float lo = x[0], hi = x[0];
    const int top = (1 << s->bits) - 1;
    for (int i = 1; i < s->count; i++) {
        lo = fminf(lo, x[i]);
        hi = fmaxf(hi, x[i]);
    }
    const uint16_t l = polar_f16(lo), step = polar_f16(fmaxf(0, hi - kv_f16_to_f32(l)) / (float)top);
    const float d = kv_f16_to_f32(step);
    polar_at_level()->steps(x, s->count, kv_f16_to_f32(l), d > 0 ? 1 / d : 0, top, code);
    polar_pack(&s->field, code, row);
    kv_store_u16(side, l);
    kv_store_u16(side + 2, step);
}

static void put_lloyd(const polar_norms *s, const float *r, int e, uint8_t *row, uint8_t *side)
{
    int32_t code[POLAR_ROW];
    float level[POLAR_ROW];
    const float rms = sqrtf(kv_sumsq(r, s->count) / (float)s->count), per = rms > 0 ? 1 / rms : 0;
    for (int i = 0; i < s->count; i++) {
        int at = 0;
        for (int step = 1 << s->bits >> 1; step; step /= 2) at += r[i] * per > s->bound[at + step - 1] ? step : 0;
        code[i] = at;
        level[i] = s->table[at];
    }
    if (s->bits) polar_pack(&s->field, code, row);
    kv_store_u16(side, polar_f16(ldexpf(s->shrink * (kv_dot16(r, level, s->count) / kv_sumsq(level, s->count)), e)));
}

/* log: radii below 2^-10 of the largest count as that, or one of them would stretch the range of all. */
void polar_norms_put(const polar_norms *s, float *r, int e, uint8_t *row, uint8_t *side)
{
    const int n = s->count;
    float top = 0;
    switch (s->mode) {
    case POLAR_LLOYD:
        put_lloyd(s, r, e, row, side);
        return;
    case POLAR_LOG:
        for (int i = 0; i < n; i++) top = fmaxf(top, r[i]);
        for (int i = 0; i < n; i++) r[i] = fmaxf(r[i], top * 0x1p-10f);
        if (top > 0) {
            polar_at_level()->log2(r, n);
            for (int i = 0; i < n; i++) r[i] += (float)e;
        } else for (int i = 0; i < n; i++) r[i] = -65504;
        put_steps(s, r, row, side);
        return;
    default:
        if (e) for (int i = 0; i < n; i++) r[i] = fminf(ldexpf(r[i], e), 0x1.fffffep127f);
    }
    if (s->mode == POLAR_LIN) put_steps(s, r, row, side);
    else if (s->mode == POLAR_F32) memcpy(row, r, (size_t)n * 4);
    else for (int i = 0; i < n; i++) kv_store_u16(row + 2 * i, polar_f16(r[i]));
}

/* ---- on a device */

struct polar_device_field polar_field_device(const polar_field *f)
{
    return (struct polar_device_field){ f->base, f->count, f->digits, f->width, f->fields, f->bytes };
}

void polar_form_device(const polar_form *f, struct polar_device *d)
{
    *d = (struct polar_device){ .levels = f->levels, .mode = f->norms.mode, .bits = f->norms.bits, .count = f->norms.count,
        .angle_bytes = (uint32_t)f->angle_bytes, .norm_bytes = (uint32_t)f->norms.bytes, .side_bytes = (uint32_t)f->norms.side_bytes,
        .norm_at = (uint32_t)f->norm_at, .side_at = (uint32_t)f->side_at, .shrink = f->norms.shrink, .radii = polar_field_device(&f->norms.field) };
    for (int l = 0; l < f->levels; l++) {
        d->level[l].field = polar_field_device(&f->field[l]);
        d->level[l].at = (uint32_t)f->at[l];
    }
    memcpy(d->table, f->norms.table, sizeof d->table);
    memcpy(d->bound, f->norms.bound, sizeof d->bound);
}

/* ---- rotation */

void polar_rotate(const float *sign, int d, const float *x, float by, float *out)
{
    polar_at_level()->scale_row(x, sign, by, out, d);
    if (sign) kv_fwht_blocks(out, d);
}

void polar_rotate_back(const float *sign, int d, float *z, float *out)
{
    if (sign) kv_fwht_blocks(z, d);
    polar_at_level()->scale_row(z, sign, 1, out, d);
}

/* ---- attention: a tile of rows stays in the first cache level */

enum { TILE_FLOATS = 4096, TILE_ROWS = 16, TILE_MAX = TILE_ROWS * 2 * KV_MAX_HEAD_DIM };

void polar_dot_rows(const kv_codec *c, polar_rows_fn rows, int dim, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    _Alignas(64) float tile[TILE_MAX + POLAR_PAD];
    const int step = kv_max(TILE_FLOATS / dim, TILE_ROWS);
    for (int t = 0; t < n_tokens; t += step) {
        const int n = kv_min(step, n_tokens - t);
        rows(c, page, t, n, tile, dim);
        kv_rows_dot(KV_F32, tile, dim, n, dim, prepared, (int64_t)(c->query_bytes / 4), n_q, scores + t, ld);
    }
}

void polar_accumulate_rows(const kv_codec *c, polar_rows_fn rows, int dim, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    _Alignas(64) float tile[TILE_MAX + POLAR_PAD];
    const int step = kv_max(TILE_FLOATS / dim, TILE_ROWS);
    for (int t = 0; t < n_tokens; t += step) {
        const int n = kv_min(step, n_tokens - t);
        rows(c, page, t, n, tile, dim);
        kv_rows_accumulate(KV_F32, tile, dim, n, dim, p + t, ld, n_q, acc, c->space_dim);
    }
}
