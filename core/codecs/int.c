/* int.c -- group-wise uniform integers: ggml's q8_0, q5_1, q5_0, q4_1, q4_0, KIVI's 2 and 4 bits, and what lies between.
 *
 * A page is a matrix of rows.  axis=dim: a row is one token's head_dim channels.  axis=token: a row is one channel's run of
 * `group` tokens (KIVI keys, arXiv 2402.02750), head_dim rows to a granule of `group` tokens.  A row is a sequence of
 * groups (the last may be shorter), each with its scale, for zero-point modes its minimum, and its codes in blocks of 32
 * (the last may be shorter):
 *
 *   page   | row 0 | row 1 | ...        axis=dim: row = token;  axis=token: row = granule * head_dim + channel
 *   row    | group 0 | group 1 | ...
 *   group  | d f16 | m f16 (affine, ggml_1) | block 0 | block 1 | ...
 *   block  | 1-bit plane | 2-bit plane | 4-bit plane |            of n <= 32 codes; bits = 8: n bytes
 *
 * Code bits go into planes from the bottom: the low 4 into the 4-bit plane, the next 2, the last 1 (5 = 4 + 1, 3 = 2 + 1).
 * In the 1-bit plane code j is bit j%8 of byte j/8.  In a plane of w bits, s = ceil(n w / 8) bytes, byte i holds codes i,
 * i+s, i+2s, ... from its low bits up.  With group=32 this is ggml's block_q4_0 (d, nibbles), block_q5_1 (d, m, qh, nibbles)
 * and so on, byte for byte.
 *
 *   mode        stored                     code q                                                     value
 *   affine      m = f16(min)               rint((x - m) / d) in 0..2^b-1, half to even                d q + m
 *               d = f16((max - m) / L)     L = 2^b - 1; from the stored d and m
 *   symmetric   d = f16(amax / (z-1))      rint(x / d) in -(z-1)..z-1, stored + z;  z = 2^(b-1)       d (q - z)
 *   ggml_0      d = xmax / -z              trunc(x / d + z + 0.5) in 0..2z-1; xmax: the first of      d (q - z)
 *     bits=8    d = amax / 127             the largest |x|;  8 bits: round half away, int8            d q
 *   ggml_1      m = min, d = (max-min)/L   trunc((x - min) / d + 0.5) in 0..L; stored as f16          d q + m
 *
 * "/ d" is a product with 1/d, all steps are f32 with one rounding each, in the order written, none fused.  Scales and
 * minima past f16 saturate at +-65504 before codes are made, so every finite input decodes to something finite; a
 * constant group decodes to its value as f16 in affine mode.  order=interleaved puts channel pair (i, i + head_dim/2) at
 * (2i, 2i+1) before grouping: the order in which llama.cpp holds the keys of Llama models. */
#include <math.h>
#include "../codec.h"
#include "int_device.h"

enum { P_BITS, P_GROUP, P_AXIS, P_MODE, P_ORDER };
enum { AXIS_DIM, AXIS_TOKEN };
enum { AFFINE, SYMMETRIC, GGML_0, GGML_1 };
enum { BLOCK = 32 };                                       /* ggml's QK */
enum { TILE = 16, SHARE = 8 };                             /* rows unpacked at a time; queries that share the unpacking */
enum { MAX_GROUPS = KV_MAX_HEAD_DIM / 16 };                /* of a row whose groups are multiples of 16 */

static const kv_param params[] = {
    { "bits",  "bits of a code", KV_PARAM_INT, 4, 1, 8, NULL },
    { "group", "values that share a scale; a multiple of 8", KV_PARAM_INT, 32, 8, KV_MAX_PAGE, NULL },
    { "axis",  "groups run along a token's channels, or along the tokens of a channel", KV_PARAM_CHOICE, AXIS_DIM, 0, 1, "dim|token" },
    { "mode",  "minimum and scale, scale alone, or as ggml's _0 and _1 blocks", KV_PARAM_CHOICE, AFFINE, 0, 3, "affine|symmetric|ggml_0|ggml_1" },
    { "order", "channel order before grouping: interleaved is llama.cpp's for rotated keys", KV_PARAM_CHOICE, 0, 0, 1, "half|interleaved" },
};

typedef struct int_state {
    int    bits, group, mode, zero;                        /* zero: code that stands for 0, or 0 with a minimum */
    int    cols;                                           /* values of a row */
    bool   along_tokens, has_min, interleaved, s8;         /* s8: codes are int8 */
    bool   whole;                                          /* no register of 16 columns crosses a group or the row's end */
    bool   fixed;                                          /* 16-bit fixed point: one plane of codes, whole blocks */
    size_t block_bytes, group_bytes, row_bytes, granule_bytes;   /* block_bytes, group_bytes: of full ones */
    size_t query_fixed;                                    /* where fixed_row() is in a prepared query; 0: nowhere */
} int_state;

/* Offsets in what fixed_row() writes. */
typedef struct fixed_layout { size_t unit, sum, whole, bytes; } fixed_layout;

static inline fixed_layout fixed_layout_of(int cols, int group)
{
    const size_t pairs = 2 * (size_t)cols, n = 4 * (size_t)((cols + group - 1) / group);
    return (fixed_layout){ pairs, pairs + n, pairs + 2 * n, kv_round_up(pairs + 3 * n, 64) };
}

static inline const int_state *state_of(const kv_codec *c) { return c->state; }

static size_t codes_bytes(int bits, int n)
{
    if (bits == 8) return (size_t)n;
    size_t bytes = 0;
    for (int w = 4; w; w >>= 1)
        if (bits & w) bytes += (size_t)(n * w + 7) / 8;
    return bytes;
}

static int int_init(kv_codec *c)
{
    static const char *const mode_name[] = { "affine", "symmetric", "ggml_0", "ggml_1" };
    int_state *s = c->state;
    s->bits = (int)c->value[P_BITS];
    s->group = (int)c->value[P_GROUP];
    s->mode = (int)c->value[P_MODE];
    s->along_tokens = c->value[P_AXIS] == AXIS_TOKEN;
    s->interleaved = c->value[P_ORDER] == 1;
    const bool ggml = s->mode == GGML_0 || s->mode == GGML_1;
    RETURN_ERROR_IF(s->group % 8 != 0, KV_E_PARAM, "codec 'int': group=%d is not a multiple of 8", s->group);
    RETURN_ERROR_IF(s->mode == SYMMETRIC && s->bits == 1, KV_E_PARAM, "codec 'int': bits=1 with mode=symmetric has no levels (2..8; or mode=affine)");
    RETURN_ERROR_IF(s->mode == GGML_0 && s->bits != 4 && s->bits != 5 && s->bits != 8, KV_E_PARAM, "codec 'int': bits=%d with mode=ggml_0 is not one of 4, 5, 8", s->bits);
    RETURN_ERROR_IF(s->mode == GGML_1 && s->bits != 4 && s->bits != 5, KV_E_PARAM, "codec 'int': bits=%d with mode=ggml_1 is not one of 4, 5", s->bits);
    RETURN_ERROR_IF(ggml && s->group != BLOCK, KV_E_PARAM, "codec 'int': group=%d with mode=%s is not 32", s->group, mode_name[s->mode]);
    RETURN_ERROR_IF(s->interleaved && s->along_tokens, KV_E_PARAM, "codec 'int': order=interleaved with axis=token changes nothing (half)");
    RETURN_ERROR_IF(s->interleaved && c->head_dim % 2, KV_E_PARAM, "codec 'int': order=interleaved needs an even head_dim, got %d", c->head_dim);
    if (s->along_tokens) {
        RETURN_ERROR_IF(c->page_tokens % s->group != 0, KV_E_PARAM, "codec 'int': group=%d along tokens does not divide page_tokens=%d", s->group, c->page_tokens);
    } else {
        RETURN_ERROR_IF(ggml && c->head_dim % BLOCK != 0, KV_E_PARAM, "codec 'int': head_dim=%d with mode=%s is not a multiple of 32", c->head_dim, mode_name[s->mode]);
        RETURN_ERROR_IF(s->group > BLOCK && s->group > c->head_dim, KV_E_PARAM, "codec 'int': group=%d is more than head_dim=%d", s->group, c->head_dim);
    }
    s->cols = s->along_tokens ? s->group : c->head_dim;
    s->whole = s->cols % 16 == 0 && (s->group % 16 == 0 || s->group >= s->cols);
    s->has_min = s->mode == AFFINE || s->mode == GGML_1;
    s->s8 = s->mode == GGML_0 && s->bits == 8;
    s->zero = s->has_min || s->s8 ? 0 : 1 << (s->bits - 1);
    s->block_bytes = codes_bytes(s->bits, BLOCK);
    const int n_groups = (s->cols + s->group - 1) / s->group;
    size_t codes = 0;
    for (int i = 0; i < s->cols; i += s->group)
        for (int j = i; j < kv_min(i + s->group, s->cols); j += BLOCK)
            codes += codes_bytes(s->bits, kv_min(BLOCK, kv_min(i + s->group, s->cols) - j));
    const size_t scales = (size_t)n_groups * (s->has_min ? 4 : 2);
    s->row_bytes = codes + scales;
    c->granule = s->along_tokens ? s->group : 1;
    const int rows = s->along_tokens ? c->head_dim : 1;
    s->granule_bytes = s->row_bytes * (size_t)rows;
    const double n_rows = (double)rows * (c->page_tokens / c->granule);
    c->page.codes = n_rows * (double)codes;
    c->page.scales = n_rows * (double)scales;
    c->bits_nominal = s->bits;
    c->space_dim = c->head_dim;
    c->query_bytes = kv_round_up((size_t)c->head_dim * sizeof(float), 64);
    s->fixed = (s->bits == 2 || s->bits == 4 || s->bits == 8) && s->cols % BLOCK == 0 && s->group % BLOCK == 0;
    s->group_bytes = (s->has_min ? 4 : 2) + (size_t)(s->group / BLOCK) * s->block_bytes;
    if (s->fixed && !s->along_tokens) {
        s->query_fixed = c->query_bytes;
        c->query_bytes += fixed_layout_of(s->cols, s->group).bytes;
    }
    return KV_OK;
}

/* ---- codes of one block ------------------------------------------------------------------------------------------ */

static void pack(uint8_t *dst, const uint8_t *code, int n, int bits)
{
    if (bits == 8) { memcpy(dst, code, (size_t)n); return; }
    for (int w = 1; w <= 4; w <<= 1) {
        if (!(bits & w)) continue;
        const int shift = w == 4 ? 0 : w == 2 ? bits & 4 : bits & 6, s = (n * w + 7) / 8, mask = (1 << w) - 1;
        memset(dst, 0, (size_t)s);
        if (w == 1) for (int j = 0; j < n; j++) dst[j / 8] |= (uint8_t)((code[j] >> shift & 1) << j % 8);
        else for (int j = 0, up = 0; j < n; up += w)
            for (int i = 0; i < s && j < n; i++, j++) dst[i] |= (uint8_t)((code[j] >> shift & mask) << up);
        dst += s;
    }
}

static void unpack(const uint8_t *src, uint8_t *code, int n, int bits)
{
    if (bits == 8) { memcpy(code, src, (size_t)n); return; }
    memset(code, 0, (size_t)n);
    for (int w = 1; w <= 4; w <<= 1) {
        if (!(bits & w)) continue;
        const int shift = w == 4 ? 0 : w == 2 ? bits & 4 : bits & 6, s = (n * w + 7) / 8, mask = (1 << w) - 1;
        if (w == 1) for (int j = 0; j < n; j++) code[j] |= (uint8_t)((src[j / 8] >> j % 8 & 1) << shift);
        else for (int j = 0, up = 0; j < n; up += w)
            for (int i = 0; i < s && j < n; i++, j++) code[j] |= (uint8_t)((src[i] >> up & mask) << shift);
        src += s;
    }
}

/* ---- one group: the specification ---------------------------------------------------------------------------------- */

#define F16_MAX 65504.0f
static inline float clampf(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }
/* Below 2^-126 the reciprocal leaves f32, and d is 0 in f16 anyway. */
static inline float inverse(float d) { return fabsf(d) >= 0x1p-126f ? 1.0f / d : 0.0f; }

/* Scale and minimum as codes are made with (mul = 1/d, off) and as stored.  Inlined, so that the AVX2 caller does not run SSE
 * code with dirty upper halves: that cost 7 of 8 ns a value. */
typedef struct group_scale { float mul, off; uint16_t d, m; } group_scale;

static inline __attribute__((always_inline)) group_scale scale_of(const int_state *s, float lo, float hi, float extreme)
{
    lo += 0.0f;                                                       /* -0 becomes 0: which of them a minimum returns is no one's business */
    hi += 0.0f;
    const float levels = (float)((1 << s->bits) - 1), zero = (float)(1 << (s->bits - 1)), amax = fabsf(extreme);
    group_scale g = { 0 };
    float d;
    switch (s->mode) {
    case AFFINE:
        g.m = kv_f32_to_f16(clampf(lo, -F16_MAX, F16_MAX));
        g.off = kv_f16_to_f32(g.m);
        d = clampf((hi - g.off) / levels, 0, F16_MAX);
        g.d = kv_f32_to_f16(d);
        g.mul = inverse(kv_f16_to_f32(g.d));
        return g;
    case SYMMETRIC:
        g.d = kv_f32_to_f16(clampf(amax / (zero - 1), 0, F16_MAX));
        g.mul = inverse(kv_f16_to_f32(g.d));
        return g;
    case GGML_0:
        d = clampf(s->bits == 8 ? amax / 127 : extreme / -zero, -F16_MAX, F16_MAX);
        g.d = kv_f32_to_f16(d);
        g.mul = inverse(d);
        return g;
    default:
        g.off = clampf(lo, -F16_MAX, F16_MAX);
        g.m = kv_f32_to_f16(g.off);
        d = clampf((hi - g.off) / levels, 0, F16_MAX);
        g.d = kv_f32_to_f16(d);
        g.mul = inverse(d);
        return g;
    }
}

static inline uint8_t code_of(const int_state *s, const group_scale *g, float x)
{
    const float levels = (float)((1 << s->bits) - 1), zero = (float)(1 << (s->bits - 1));
    switch (s->mode) {
    case AFFINE:    return (uint8_t)(int)rintf(clampf((x - g->off) * g->mul, 0, levels));
    case SYMMETRIC: return (uint8_t)(int)(rintf(clampf(x * g->mul, 1 - zero, zero - 1)) + zero);
    case GGML_0:
        if (s->bits == 8) return (uint8_t)(int8_t)roundf(clampf(x * g->mul, -127, 127));
        return (uint8_t)(int)clampf(x * g->mul + (zero + 0.5f), 0, levels);
    default:        return (uint8_t)(int)clampf((x - g->off) * g->mul + 0.5f, 0, levels);
    }
}

static inline uint8_t *store_scale(const int_state *s, const group_scale *g, uint8_t *dst)
{
    kv_store_u16(dst, g->d);
    if (s->has_min) kv_store_u16(dst + 2, g->m);
    return dst + (s->has_min ? 4 : 2);
}

static uint8_t *encode_group(const int_state *s, const float *x, int n, uint8_t *dst)
{
    uint8_t code[KV_MAX_PAGE];
    float lo = x[0], hi = x[0], extreme = 0;
    for (int i = 0; i < n; i++) {
        if (x[i] < lo) lo = x[i];
        if (x[i] > hi) hi = x[i];
        if (fabsf(x[i]) > fabsf(extreme)) extreme = x[i];
    }
    const group_scale g = scale_of(s, lo, hi, extreme);
    for (int i = 0; i < n; i++) code[i] = code_of(s, &g, x[i]);
    dst = store_scale(s, &g, dst);
    for (int i = 0; i < n; i += BLOCK) {
        const int m = kv_min(BLOCK, n - i);
        pack(dst, code + i, m, s->bits);
        dst += codes_bytes(s->bits, m);
    }
    return dst;
}

static const uint8_t *decode_group(const int_state *s, const uint8_t *src, int n, float *x)
{
    uint8_t code[BLOCK];
    const float d = kv_f16_to_f32(kv_load_u16(src)), m = s->has_min ? kv_f16_to_f32(kv_load_u16(src + 2)) : 0;
    src += s->has_min ? 4 : 2;
    for (int i = 0; i < n; i += BLOCK) {
        const int k = kv_min(BLOCK, n - i);
        unpack(src, code, k, s->bits);
        for (int j = 0; j < k; j++) {
            const float v = d * (float)((s->s8 ? (int8_t)code[j] : code[j]) - s->zero);
            x[i + j] = s->has_min ? v + m : v;
        }
        src += codes_bytes(s->bits, k);
    }
    return src;
}

#include "int_simd.h"

static void encode_row(const int_state *s, const float *x, uint8_t *dst)
{
    const bool simd = kv_cpu_simd() >= KV_SIMD_AVX2;
    for (int i = 0; i < s->cols; i += s->group) {
        const int n = kv_min(s->group, s->cols - i);
        dst = (simd && n % BLOCK == 0 ? encode_group_avx2 : encode_group)(s, x + i, n, dst);
    }
}
static void decode_row(const int_state *s, const uint8_t *src, float *x)
{
    const bool simd = kv_cpu_simd() >= KV_SIMD_AVX2;
    for (int i = 0; i < s->cols; i += s->group) {
        const int n = kv_min(s->group, s->cols - i);
        src = (simd && n % BLOCK == 0 ? decode_group_avx2 : decode_group)(s, src, n, x + i);
    }
}

/* ---- pages --------------------------------------------------------------------------------------------------------- */

static void interleave(const float *x, float *y, int n)
{
    for (int i = 0; i < n / 2; i++) y[2 * i] = x[i], y[2 * i + 1] = x[i + n / 2];
}
static void deinterleave(const float *y, float *x, int n)
{
    for (int i = 0; i < n / 2; i++) x[i] = y[2 * i], x[i + n / 2] = y[2 * i + 1];
}

/* dst[j*dst_ld + i] = src[i*src_ld + j] for n x m. */
static void transpose(const float *src, int64_t src_ld, int n, int m, float *dst, int64_t dst_ld)
{
    const int m8 = kv_cpu_simd() >= KV_SIMD_AVX2 && n % 8 == 0 ? m / 8 * 8 : 0;
    for (int i = 0; i < n && m8; i += 8)
        for (int j = 0; j < m8; j += 8) transpose8(src + i * src_ld + j, src_ld, dst + j * dst_ld + i, dst_ld);
    for (int i = 0; i < n; i++)
        for (int j = m8; j < m; j++) dst[j * dst_ld + i] = src[i * src_ld + j];
}

enum { STRIP = 16 };                                       /* channels transposed at a time: a cache line of each token */

static void int_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const int_state *s = state_of(c);
    float buf[STRIP * KV_MAX_PAGE];
    if (!s->along_tokens) {
        for (int t = 0; t < n; t++, x += ld) {
            if (s->interleaved) interleave(x, buf, s->cols);
            encode_row(s, s->interleaved ? buf : x, page + (size_t)(tok0 + t) * s->row_bytes);
        }
        return;
    }
    for (int t = 0; t < n; t += s->group, x += s->group * ld) {
        uint8_t *granule = page + (size_t)((tok0 + t) / s->group) * s->granule_bytes;
        for (int i = 0; i < c->head_dim; i += STRIP) {
            const int m = kv_min(STRIP, c->head_dim - i);
            transpose(x + i, ld, s->group, m, buf, s->group);
            for (int j = 0; j < m; j++) encode_row(s, buf + j * s->group, granule + (size_t)(i + j) * s->row_bytes);
        }
    }
}

static void int_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const int_state *s = state_of(c);
    float buf[STRIP * KV_MAX_PAGE];
    if (!s->along_tokens) {
        for (int t = 0; t < n; t++, x += ld) {
            decode_row(s, page + (size_t)(tok0 + t) * s->row_bytes, s->interleaved ? buf : x);
            if (s->interleaved) deinterleave(buf, x, s->cols);
        }
        return;
    }
    for (int t = tok0; t < tok0 + n;) {
        const int first = t % s->group, m = kv_min(s->group - first, tok0 + n - t);
        const uint8_t *granule = page + (size_t)(t / s->group) * s->granule_bytes;
        for (int i = 0; i < c->head_dim; i += STRIP) {
            const int w = kv_min(STRIP, c->head_dim - i);
            for (int j = 0; j < w; j++) decode_row(s, granule + (size_t)(i + j) * s->row_bytes, buf + j * s->group);
            transpose(buf + first, s->group, w, m, x + i, ld);
        }
        t += m;
        x += m * ld;
    }
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

/* 16-bit fixed point (int_fixed.h): a row of weights x as the dot product takes it, by group of columns, from `base` on:
 *
 *   | pairs of int16 [cols/2], 16 a block, in the order of the codes' dwords | unit f32 [n_groups] | sum f32 | whole int32 |
 *
 * unit: what 1 is worth; sum: of x; whole: of the integers.  Pair (j, k, parity) of a block of codes of b bits holds its elements
 * e and e + 2, e = 4j + 32/(8/b) k + parity: those that a dword's shift by b k + 8 parity brings into its 16-bit halves. */
enum { FIXED_ROWS = 64, FIXED_SUM = 8300000 /* of |integers|: times 255 under 2^31 */ };
static void fixed_row(const int_state *s, const float *x, uint8_t *base)
{
    const fixed_layout f = fixed_layout_of(s->cols, s->group);
    const int stride = s->bits * 4, per = 8 / s->bits;                    /* elements from shift to shift; shifts a byte */
    for (int k = 0, i = 0; i < s->cols; k++) {
        const int first = i, end = kv_min(i + s->group, s->cols);
        float most = 0, size = 0, sum = 0;
        int32_t whole = 0;
        for (; i < end; i++) {
            most = fmaxf(most, fabsf(x[i]));
            size += fabsf(x[i]);
            sum += x[i];
        }
        const bool usable = most >= 0x1p-100f && size < 0x1p100f;
        const float by = usable ? fminf(32767 / most, FIXED_SUM / size) : 0, unit = usable ? 1 / by : size >= 0x1p100f ? NAN : 0;
        for (int b = first; b < end; b += BLOCK) {
            int16_t *pair = (int16_t *)base + b;
            for (int j = 0; j < s->bits; j++)                             /* dwords */
                for (int n = 0; n < 2 * per; n++, pair += 2) {
                    const int e = b + 4 * j + n / 2 * stride + n % 2;
                    pair[0] = (int16_t)lrintf(x[e] * by);
                    pair[1] = (int16_t)lrintf(x[e + 2] * by);
                    whole += pair[0] + pair[1];
                }
        }
        memcpy(base + f.unit + 4 * (size_t)k, &unit, 4);
        memcpy(base + f.sum + 4 * (size_t)k, &sum, 4);
        memcpy(base + f.whole + 4 * (size_t)k, &whole, 4);
    }
}

#define LEVEL_FILE "codecs/int_level.h"
#include "../levels.h"
#undef LEVEL_FILE

/* Dot products with rows that fixed_row() made. */
static void mat_dot_fixed(const int_state *s, const uint8_t *rows, int n_rows, const uint8_t *x, size_t x_ld, int n_q, float *y, int64_t y_ld)
{
    for (int q = 0; q < n_q; q += 4)
        (kv_cpu_simd() >= KV_SIMD_AVX512 ? fixed_dot_avx512 : fixed_dot_avx2)(s, rows, n_rows, x + (size_t)q * x_ld, x_ld, kv_min(4, n_q - q), y + q * y_ld, y_ld);
}

/* The two products of a matrix of rows, for up to SHARE queries.  y[q*y_ld + r] = <x_q, row r>;  y[q*y_ld + col] += sum_r w_q[r] row r.
 * Plain C, and shapes that the kernels leave out, decode TILE rows and attend to those. */
static void mat_dot(const int_state *s, const uint8_t *rows, int n_rows, const float *x, int64_t x_ld, int n_q, float *y, int64_t y_ld)
{
    const int level = kv_cpu_simd();
    if (level >= KV_SIMD_AVX2 && s->fixed) {
        const size_t bytes = fixed_layout_of(s->cols, s->group).bytes;
        _Alignas(64) uint8_t fixed[SHARE * (2 * KV_MAX_PAGE + 12 * MAX_GROUPS + 64)];
        for (int q = 0; q < n_q; q++) fixed_row(s, x + q * x_ld, fixed + (size_t)q * bytes);
        mat_dot_fixed(s, rows, n_rows, fixed, bytes, n_q, y, y_ld);
        return;
    }
    if (level >= KV_SIMD_AVX2 && s->whole) {
        (level >= KV_SIMD_AVX512 ? mat_dot_avx512 : mat_dot_avx2)(s, rows, n_rows, x, x_ld, n_q, y, y_ld);
        return;
    }
    float buf[TILE * KV_MAX_PAGE];
    for (int r = 0; r < n_rows; r += TILE) {
        const int n = kv_min(TILE, n_rows - r);
        for (int i = 0; i < n; i++) decode_row(s, rows + (size_t)(r + i) * s->row_bytes, buf + i * s->cols);
        kv_rows_dot(KV_F32, buf, s->cols, n, s->cols, x, x_ld, n_q, y + r, y_ld);
    }
}

static void mat_accumulate(const int_state *s, const uint8_t *rows, int n_rows, const float *w, int64_t w_ld, int n_q, float *y, int64_t y_ld)
{
    const int level = kv_cpu_simd();
    if (level >= KV_SIMD_AVX2 && s->fixed) {
        for (int q = 0; q < n_q; q += 4)
            (level >= KV_SIMD_AVX512 ? fixed_accumulate_avx512 : fixed_accumulate_avx2)(s, rows, n_rows, w + q * w_ld, w_ld, kv_min(4, n_q - q), y + q * y_ld, y_ld);
        return;
    }
    if (level >= KV_SIMD_AVX2 && s->whole) {
        (level >= KV_SIMD_AVX512 ? mat_accumulate_avx512 : mat_accumulate_avx2)(s, rows, n_rows, w, w_ld, n_q, y, y_ld);
        return;
    }
    float buf[TILE * KV_MAX_PAGE];
    for (int r = 0; r < n_rows; r += TILE) {
        const int n = kv_min(TILE, n_rows - r);
        for (int i = 0; i < n; i++) decode_row(s, rows + (size_t)(r + i) * s->row_bytes, buf + i * s->cols);
        kv_rows_accumulate(KV_F32, buf, s->cols, n, s->cols, w + r, w_ld, n_q, y, y_ld);
    }
}

static void int_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    for (int g = 0; g < n_q; g++) {
        float *dst = (float *)((uint8_t *)prepared + (size_t)g * c->query_bytes);
        if (state_of(c)->interleaved) interleave(q + g * ld, dst, c->head_dim);
        else memcpy(dst, q + g * ld, (size_t)c->head_dim * sizeof(float));
        if (state_of(c)->query_fixed) fixed_row(state_of(c), dst, (uint8_t *)dst + state_of(c)->query_fixed);
    }
}

/* Queries from which decoding first is faster: the kernels unpack for every four (fixed point) or multiply widened bytes; decoding
 * groups along tokens has rows to transpose. */
static int many_dot(const int_state *s) { return s->interleaved || s->fixed ? INT32_MAX : s->along_tokens ? 17 : 9; }
static int many_accumulate(const int_state *s) { return s->interleaved ? INT32_MAX : s->fixed ? 13 : 9; }

/* Along tokens the roles change: a granule's scores are sums over its rows (channels) weighted by the query, and its
 * output channels are dot products of rows with the weights of its tokens. */
static void int_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    const int_state *s = state_of(c);
    const int64_t q_ld = (int64_t)(c->query_bytes / sizeof(float));
    const float *q = prepared;
    if (n_q >= many_dot(s)) {
        kv_decoded_dot(c, page, n_tokens, q, q_ld, n_q, scores, ld);
        return;
    }
    for (int n; n_q > 0; n_q -= n, q += n * q_ld, scores += n * ld) {
        n = kv_min(n_q, SHARE);
        if (!s->along_tokens) {
            if (s->fixed && kv_cpu_simd() >= KV_SIMD_AVX2) mat_dot_fixed(s, page, n_tokens, (const uint8_t *)q + s->query_fixed, c->query_bytes, n, scores, ld);
            else mat_dot(s, page, n_tokens, q, q_ld, n, scores, ld);
            continue;
        }
        float buf[SHARE * KV_MAX_PAGE];
        for (int t = 0; t < n_tokens; t += s->group) {
            const int m = kv_min(s->group, n_tokens - t);
            memset(buf, 0, (size_t)n * s->group * sizeof(float));
            mat_accumulate(s, page + (size_t)(t / s->group) * s->granule_bytes, c->head_dim, q, q_ld, n, buf, s->group);
            for (int g = 0; g < n; g++) memcpy(scores + g * ld + t, buf + g * s->group, (size_t)m * sizeof(float));
        }
    }
}

static void int_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    const int_state *s = state_of(c);
    if (n_q >= many_accumulate(s)) {
        kv_decoded_accumulate(c, page, n_tokens, p, ld, n_q, acc);
        return;
    }
    for (int n; n_q > 0; n_q -= n, p += n * ld, acc += n * c->space_dim) {
        n = kv_min(n_q, SHARE);
        if (!s->along_tokens) {
            mat_accumulate(s, page, n_tokens, p, ld, n, acc, c->space_dim);
            continue;
        }
        float w[SHARE * KV_MAX_PAGE], y[SHARE * KV_MAX_HEAD_DIM];
        for (int t = 0; t < n_tokens; t += s->group) {
            const int m = kv_min(s->group, n_tokens - t);
            for (int g = 0; g < n; g++) {
                memcpy(w + g * s->group, p + g * ld + t, (size_t)m * sizeof(float));
                memset(w + g * s->group + m, 0, (size_t)(s->group - m) * sizeof(float));
            }
            mat_dot(s, page + (size_t)(t / s->group) * s->granule_bytes, c->head_dim, w, s->group, n, y, c->head_dim);
            for (int i = 0; i < n * c->head_dim; i++) acc[i] += y[i];
        }
    }
}

static void int_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int g = 0; g < n_q; g++, acc += c->space_dim) {
        if (state_of(c)->interleaved) deinterleave(acc, out + g * ld, c->head_dim);
        else memcpy(out + g * ld, acc, (size_t)c->head_dim * sizeof(float));
    }
}

static int int_on_device(const kv_codec *c, void **out, size_t *bytes)
{
    const int_state *s = state_of(c);
    size_t group_bytes = s->has_min ? 4 : 2;
    for (int j = 0; j < s->group; j += BLOCK) group_bytes += codes_bytes(s->bits, kv_min(BLOCK, s->group - j));
    const struct int_device d = { .bits = s->bits, .group = s->group, .mode = s->mode, .zero = s->zero, .cols = s->cols, .along_tokens = s->along_tokens,
        .has_min = s->has_min, .interleaved = s->interleaved, .s8 = s->s8, .block_bytes = (uint32_t)s->block_bytes, .group_bytes = (uint32_t)group_bytes,
        .row_bytes = (uint32_t)s->row_bytes, .granule_bytes = (uint32_t)s->granule_bytes };
    kv_pod pod = { 0 };
    uint32_t at;
    return kv_pod_done(&pod, kv_pod_add(&pod, &d, sizeof d, &at), out, bytes);
}

const kv_codec_ops kv_codec_int = {
    .name = "int", .about = "group-wise uniform integers, along channels or along tokens",
    .source = "ggml block formats q8_0, q5_1, q5_0, q4_1, q4_0; KIVI, arXiv 2402.02750",
    .params = params, .n_params = 5, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES, .state_size = sizeof(int_state),
    .init = int_init, .encode = int_encode, .decode = int_decode,
    .query = int_query, .dot = int_dot, .accumulate = int_accumulate, .output = int_output, .device = int_on_device,
};
