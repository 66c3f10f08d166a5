/* weights.c -- ggml's block types in plain C: the specification of every SIMD variant.
 *
 * f16 fields are little-endian; element i of a block is named below.
 *   Q4_0  18 B/32   | d f16 | qs 16 |               d (q - 8); low nibbles are elements 0..15, high ones 16..31
 *   Q4_1  20 B/32   | d | m | qs 16 |               d q + m
 *   Q5_0  22 B/32   | d | qh u32 | qs 16 |          d (q - 16); bit i of qh is bit 4 of element i
 *   Q5_1  24 B/32   | d | m | qh u32 | qs 16 |      d q + m
 *   Q8_0  34 B/32   | d | qs i8 x 32 |              d q
 *   Q2_K  84 B/256  | sc 16 | qs 64 | d | dmin |    d (sc & 15) q - dmin (sc >> 4), a byte of sc per 16 elements
 *   Q3_K 110 B/256  | hm 32 | qs 64 | sc 12 | d |   d (sc - 32) (q - 4); sc 6 bits per 16 elements; hm bit j: chunk j of 32
 *   Q4_K 144 B/256  | d | dmin | sc 12 | qs 128 |   d sc q - dmin m; sc, m 6 bits per 32 elements
 *   Q5_K 176 B/256  | d | dmin | sc 12 | qh 32 | qs 128 |  the same, qh bit j is bit 4 of chunk j of 32
 *   Q6_K 210 B/256  | ql 128 | qh 64 | sc i8 x 16 | d |    d sc (q - 32), sc per 16 elements
 * Two-bit fields of Q2_K and Q3_K: a half of 128 elements takes 32 bytes, 32 elements at each of the shifts 0, 2, 4, 6. */
#include <math.h>
#include "panels.h"

enum { MAX_BLOCK = 256 };

static const struct { int type, block, bytes; const char *name; } types[] = {
    { KV_W_F32, 1, 4, "F32" },      { KV_W_F16, 1, 2, "F16" },      { KV_W_BF16, 1, 2, "BF16" },
    { KV_W_Q4_0, 32, 18, "Q4_0" },  { KV_W_Q4_1, 32, 20, "Q4_1" },  { KV_W_Q5_0, 32, 22, "Q5_0" },  { KV_W_Q5_1, 32, 24, "Q5_1" },
    { KV_W_Q8_0, 32, 34, "Q8_0" },  { KV_W_Q2_K, 256, 84, "Q2_K" }, { KV_W_Q3_K, 256, 110, "Q3_K" }, { KV_W_Q4_K, 256, 144, "Q4_K" },
    { KV_W_Q5_K, 256, 176, "Q5_K" }, { KV_W_Q6_K, 256, 210, "Q6_K" },
};

static int row_of(int type)
{
    for (int i = 0; i < (int)(sizeof types / sizeof *types); i++) if (types[i].type == type) return i;
    return -1;
}

const char *kv_weight_type_name(int type)
{
    const int i = row_of(type);
    return i < 0 ? NULL : types[i].name;
}

int kv_weight_block(int type, int *block, int *bytes)
{
    const int i = row_of(type);
    if (i < 0) return 0;
    *block = types[i].block;
    *bytes = types[i].bytes;
    return 1;
}

/* ---- one block each */

static float half_at(const uint8_t *p) { return kv_f16_to_f32(kv_load_u16(p)); }

static void nibbles(const uint8_t *qs, float d, float b, float *y)            /* y = d q + b */
{
    for (int i = 0; i < 16; i++) {
        y[i]      = d * (float)(qs[i] & 15) + b;
        y[i + 16] = d * (float)(qs[i] >> 4) + b;
    }
}

static void five_bits(const uint8_t *qh, const uint8_t *qs, float d, float b, float *y)
{
    const uint32_t high = kv_load_u32(qh);
    for (int i = 0; i < 16; i++) {
        y[i]      = d * (float)((qs[i] & 15) | (high >> i & 1) << 4) + b;
        y[i + 16] = d * (float)((qs[i] >> 4) | (high >> (i + 16) & 1) << 4) + b;
    }
}

static void q4_0(const uint8_t *p, float *y) { const float d = half_at(p); nibbles(p + 2, d, -8 * d, y); }
static void q4_1(const uint8_t *p, float *y) { nibbles(p + 4, half_at(p), half_at(p + 2), y); }
static void q5_0(const uint8_t *p, float *y) { const float d = half_at(p); five_bits(p + 2, p + 6, d, -16 * d, y); }
static void q5_1(const uint8_t *p, float *y) { five_bits(p + 4, p + 8, half_at(p), half_at(p + 2), y); }
static void q8_0(const uint8_t *p, float *y) { for (int i = 0; i < 32; i++) y[i] = half_at(p) * (float)(int8_t)p[2 + i]; }

static void q2_k(const uint8_t *p, float *y)
{
    const float d = half_at(p + 80), dmin = half_at(p + 82);
    for (int i = 0; i < 256; i++) {
        const int sc = p[i / 16], q = p[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
        y[i] = d * (float)(sc & 15) * (float)q - dmin * (float)(sc >> 4);
    }
}

/* Scale j of 16: four low bits in byte j % 8, two high bits in byte 8 + j % 4. */
static int q3_scale(const uint8_t *sc, int j) { return (sc[j % 8] >> j / 8 * 4 & 15) | (sc[8 + j % 4] >> j / 4 * 2 & 3) << 4; }

static void q3_k(const uint8_t *p, float *y)
{
    const float d = half_at(p + 108);
    for (int i = 0; i < 256; i++) {
        const int low = p[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, high = p[i % 32] >> i / 32 & 1;
        y[i] = d * (float)(q3_scale(p + 96, i / 16) - 32) * (float)((low | high << 2) - 4);
    }
}

/* Scale and minimum j of 8: 0..3 whole in bytes j and 4 + j; 4..7 four low bits in byte 4 + j, two high ones atop bytes j - 4 and j. */
static void q4_scale(const uint8_t *sc, int j, int *scale, int *min)
{
    *scale = j < 4 ? sc[j] & 63 : (sc[j + 4] & 15) | sc[j - 4] >> 6 << 4;
    *min   = j < 4 ? sc[j + 4] & 63 : sc[j + 4] >> 4 | sc[j] >> 6 << 4;
}

static void q45_k(const uint8_t *p, const uint8_t *qh, const uint8_t *qs, float *y)
{
    const float d = half_at(p), dmin = half_at(p + 2);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        q4_scale(p + 4, j, &scale, &min);
        for (int i = 0; i < 32; i++) {
            const int q = (qs[j / 2 * 32 + i] >> j % 2 * 4 & 15) | (qh ? (qh[i] >> j & 1) << 4 : 0);
            y[32 * j + i] = d * (float)scale * (float)q - dmin * (float)min;
        }
    }
}
static void q4_k(const uint8_t *p, float *y) { q45_k(p, NULL, p + 16, y); }
static void q5_k(const uint8_t *p, float *y) { q45_k(p, p + 16, p + 48, y); }

static void q6_k(const uint8_t *p, float *y)
{
    const float d = half_at(p + 208);
    for (int i = 0; i < 256; i++) {
        const int half = i / 128, j = i % 128;
        const int low = p[64 * half + j % 64] >> j / 64 * 4 & 15, high = p[128 + 32 * half + j % 32] >> j / 32 * 2 & 3;
        y[i] = d * (float)(int8_t)p[192 + i / 16] * (float)((low | high << 4) - 32);
    }
}

static void f32(const uint8_t *p, float *y)  { memcpy(y, p, 4); }
static void f16(const uint8_t *p, float *y)  { *y = half_at(p); }
static void bf16(const uint8_t *p, float *y) { *y = kv_bf16_to_f32(kv_load_u16(p)); }

typedef void (*block_fn)(const uint8_t *p, float *y);

static block_fn block_of(int type)
{
    switch (type) {
    case KV_W_F32:  return f32;
    case KV_W_F16:  return f16;
    case KV_W_BF16: return bf16;
    case KV_W_Q4_0: return q4_0;
    case KV_W_Q4_1: return q4_1;
    case KV_W_Q5_0: return q5_0;
    case KV_W_Q5_1: return q5_1;
    case KV_W_Q8_0: return q8_0;
    case KV_W_Q2_K: return q2_k;
    case KV_W_Q3_K: return q3_k;
    case KV_W_Q4_K: return q4_k;
    case KV_W_Q5_K: return q5_k;
    default:        return q6_k;
    }
}

void kv_weight_rows_plain(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst)
{
    int block = 1, bytes = 1;
    kv_weight_block(w->type, &block, &bytes);
    const block_fn fn = block_of(w->type);
    for (int64_t r = 0; r < n_rows; r++, dst += w->n_in) {
        const uint8_t *p = w->data + (size_t)(row0 + r) * w->row_bytes;
        for (int64_t i = 0; i < w->n_in; i += block, p += bytes) fn(p, dst + i);
    }
}

/* The f32 activations times the dequantized weights, summed in double. */
void kv_matvec_plain(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    int block = 1, bytes = 1;
    kv_weight_block(w->type, &block, &bytes);
    const block_fn fn = block_of(w->type);
    for (int64_t r = row0; r < row1; r++) {
        const uint8_t *p = w->data + (size_t)r * w->row_bytes;
        double sum = 0;
        for (int64_t i = 0; i < w->n_in; i += block, p += bytes) {
            float v[MAX_BLOCK];
            fn(p, v);
            for (int j = 0; j < block; j++) sum += (double)v[j] * (double)a->x[i + j];
        }
        y[r] = (float)sum;
    }
}

void kv_weight_rows(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst)
{
    const int level = kv_cpu_simd();
    (level >= KV_SIMD_AVX2 ? kv_weight_rows_avx2 : kv_weight_rows_plain)(w, row0, n_rows, dst);
}

void kv_matvec(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y)
{
    const int level = kv_cpu_simd();
    if (w->panels && level >= KV_SIMD_AVX2 && row0 % KV_PANEL_ROWS == 0 && row1 % KV_PANEL_ROWS == 0)
        (level >= KV_SIMD_AVX512 ? kv_panels_avx512 : kv_panels_avx2)(w, a, row0, row1, y);
    else (level >= KV_SIMD_AVX512 ? kv_matvec_avx512 : level >= KV_SIMD_AVX2 ? kv_matvec_avx2 : kv_matvec_plain)(w, a, row0, row1, y);
}

/* ---- activations */

int kv_act_reserve(kv_act *a, int64_t n)
{
    RETURN_ERROR_IF(n < 1 || n > INT32_MAX, KV_E_ARG, "activations: n=%lld is outside 1..2^31-1", (long long)n);
    const size_t cap = kv_round_up((size_t)n, KV_ACT_PAD);
    if (cap <= a->cap) return KV_OK;
    float *const x = kv_alloc(cap * 11 + cap / 32 * 28);      /* x 4 bytes, q 2, digits 2, fine 3; scale, sum, their halves and sum24: 28 per 32 */
    if (!x) return KV_E_NOMEM;
    kv_act_free(a);
    a->x = x;
    a->q = (int16_t *)(x + cap);
    a->extra = a->q + cap;
    a->scale = (float *)((char *)a->extra + 2 * cap) + cap / 8;
    a->sum = a->scale + cap / 32;
    a->cap = cap;
    return KV_OK;
}

void kv_act_free(kv_act *a)
{
    kv_free(a->x);
    *a = (kv_act){ 0 };
}

static void quantize(kv_act *a, int64_t n)
{
    float *const scale16 = kv_act_scale16(a), *const sum16 = kv_act_sum16(a);
    for (int64_t g = 0; g < n / 32; g++) {
        const float *const x = a->x + 32 * g;
        int8_t *const digits = (int8_t *)a->extra + 64 * g;
        uint32_t top = 0;                                     /* of the bits: NaN is above inf, inf above all numbers */
        for (int i = 0; i < 32; i++) {
            const uint32_t u = kv_f32_bits(x[i]) & 0x7fffffffu;
            if (u > top) top = u;
        }
        const float amax = kv_bits_f32(top), inv = kv_act_inverse(amax), scale = amax / KV_ACT_MAX;
        int32_t sum[2] = { 0 }, fine_sum = 0;
        for (int i = 0; i < 32; i++) {
            const float exact = inv > 0 ? x[i] * inv : 0;
            const int q = (int)lrintf(exact), high = (q + 128) >> 8, fine = kv_min((int)lrintf((exact - (float)q) * 256), 127);
            kv_act_fine16(a)[32 * g + i] = (int16_t)fine;
            kv_act_fine8(a)[32 * g + i] = (int8_t)fine;
            fine_sum += fine;
            a->q[32 * g + i] = (int16_t)q;
            digits[i] = (int8_t)(q - 256 * high);
            digits[32 + i] = (int8_t)high;
            sum[i / 16] += q;
        }
        for (int h = 0; h < 2; h++) {
            scale16[2 * g + h] = scale;
            sum16[2 * g + h] = scale * (float)sum[h];
        }
        a->scale[g] = scale;
        a->sum[g] = sum16[2 * g] + sum16[2 * g + 1];
        kv_act_sum24(a)[g] = a->sum[g] + scale * ((float)fine_sum * (1.0f / 256));
    }
}

void kv_act_set(kv_act *a, const float *x, int64_t n)
{
    const size_t padded = kv_round_up((size_t)n, KV_ACT_PAD);
    a->n = n;
    memcpy(a->x, x, (size_t)n * sizeof *x);
    memset(a->x + n, 0, (padded - (size_t)n) * sizeof *x);
    (kv_cpu_simd() >= KV_SIMD_AVX2 ? kv_act_quantize_avx2 : quantize)(a, (int64_t)padded);
}
