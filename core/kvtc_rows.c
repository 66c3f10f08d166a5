/* kvtc_rows.c -- rows of coefficients as codes: blocks of integers with a shift and a scale, or with calibrated steps.
 *
 *   header   | shift f16 = min | scale f16 = (max - shift) / (2^b - 1) |     code = (z - shift) / scale, z = shift + code scale
 *   fixed    code = floor(z / step) + 2^(b-1), z = (code - 2^(b-1) + 1/2) step
 *   e4m3     z itself, rounded to the nearest of FP8 (1-4-3, at most 448), without header
 *
 * A block of one component with a header holds its coefficient in the shift: that is what the published sizes allow. */
#include <math.h>
#include "kvtc.h"
#include "codecs/fp_rows.h"

void kvtc_plan_clear(kvtc_plan *p)
{
    kv_free(p->block);
    *p = (kvtc_plan){ 0 };
}

int kvtc_plan_copy(kvtc_plan *out, const kvtc_plan *p)
{
    *out = *p;
    out->block = NULL;
    if (!p->n_blocks) return KV_OK;
    if (!(out->block = kv_alloc_array((size_t)p->n_blocks, sizeof *p->block, false))) return KV_E_NOMEM;
    memcpy(out->block, p->block, (size_t)p->n_blocks * sizeof *p->block);
    return KV_OK;
}

int kvtc_plan_count(kvtc_plan *p, int max_rank)
{
    int at = 0;
    p->header_bits = p->code_bits = p->n_headers = p->n_codes = 0;
    for (int i = 0; i < p->n_blocks; i++) {
        const kvtc_block *b = &p->block[i];
        RETURN_ERROR_IF(b->start != at || b->size < 1 || b->size > max_rank - at || b->type < 0 || b->type >= KVTC_TYPES, KV_E_CORRUPT,
                        "kvtc: block %d of %d components of type %d from %d does not follow %d within %d", i + 1, b->size, b->type, b->start, at, max_rank);
        at += b->size;
        if (b->type == KVTC_NONE) continue;
        p->n_codes += b->size;
        p->code_bits += b->size * (b->type == KVTC_E4M3 ? 8 : b->type);
        p->n_headers += !p->fixed && b->type != KVTC_E4M3;
    }
    RETURN_ERROR_IF(p->n_blocks && p->block[p->n_blocks - 1].type == KVTC_NONE, KV_E_CORRUPT, "kvtc: block %d of %d ends the plan with nothing", p->n_blocks, p->n_blocks);
    p->rank = at;
    p->header_bits = KVTC_HEADER_BITS * p->n_headers;
    p->row_bytes = ((size_t)p->header_bits + (size_t)p->code_bits + 7) / 8;
    return KV_OK;
}

/* Nearest OCP e4m3, ties to even, saturating: 2^-9 apart below 2^-6, three bits of mantissa above. */
static uint8_t to_e4m3(float x)
{
    const uint32_t sign = kv_f32_bits(x) >> 24 & 0x80u;
    const float a = fabsf(x);
    if (!(a < 448.0f)) return (uint8_t)(sign | 0x7eu);
    if (a < 0x1p-6f) return (uint8_t)(sign | (uint32_t)rintf(a * 512.0f));
    uint32_t u = kv_f32_bits(a);
    u += 0x7ffffu + (u >> 20 & 1u);
    return (uint8_t)(sign | ((u >> 20) - (120u << 3)));
}
static float from_e4m3(uint8_t b) { return (b & 0x7f) == 0x7f ? 0.0f : fp_e4m3_to_f32(b); }

static inline uint8_t code_of(float z, float shift, float inverse, float top)
{
    const float v = (z - shift) * inverse;
    return v > 0 ? (uint8_t)(fminf(v, top) + 0.5f) : 0;      /* NaN is 0 too */
}

void kvtc_quantize(const kvtc_plan *p, const float *step, const float *z, uint8_t *symbol)
{
    uint8_t *header = symbol, *code = symbol + 4 * p->n_headers;
    for (int i = 0; i < p->n_blocks; i++) {
        const kvtc_block b = p->block[i];
        const float *x = z + b.start;
        if (b.type == KVTC_NONE) continue;
        const float top = (float)((1 << b.type) - 1), half = (float)(1 << b.type) * 0.5f - 0.5f;
        if (b.type == KVTC_E4M3) {
            for (int k = 0; k < b.size; k++) code[k] = to_e4m3(x[k]);
        } else if (p->fixed) {
            for (int k = 0; k < b.size; k++) code[k] = code_of(x[k], -half * step[b.start + k], 1.0f / step[b.start + k], top);
        } else {
            float lo = INFINITY, hi = -INFINITY;
            for (int k = 0; k < b.size; k++) {
                lo = fminf(lo, x[k]);
                hi = fmaxf(hi, x[k]);
            }
            const uint16_t h = kv_f32_to_f16(fminf(fmaxf(lo, -65504.0f), 65504.0f));
            const float shift = kv_f16_to_f32(h);
            const uint16_t s = kv_f32_to_f16(fminf(fmaxf((hi - shift) / top, 0.0f), 65504.0f));
            const float scale = kv_f16_to_f32(s);
            kv_store_u16(header, h);
            kv_store_u16(header + 2, s);
            header += 4;
            for (int k = 0; k < b.size; k++) code[k] = scale > 0 ? code_of(x[k], shift, 1.0f / scale, top) : 0;
        }
        code += b.size;
    }
}

void kvtc_dequantize(const kvtc_plan *p, const float *step, const uint8_t *symbol, float *z)
{
    const uint8_t *header = symbol, *code = symbol + 4 * p->n_headers;
    for (int i = 0; i < p->n_blocks; i++) {
        const kvtc_block b = p->block[i];
        float *x = z + b.start;
        if (b.type == KVTC_NONE) {
            memset(x, 0, (size_t)b.size * sizeof *x);
            continue;
        }
        const float half = (float)(1 << b.type) * 0.5f - 0.5f;
        if (b.type == KVTC_E4M3) {
            for (int k = 0; k < b.size; k++) x[k] = from_e4m3(code[k]);
        } else if (p->fixed) {
            for (int k = 0; k < b.size; k++) x[k] = ((float)code[k] - half) * step[b.start + k];
        } else {
            const float shift = kv_f16_to_f32(kv_load_u16(header)), scale = kv_f16_to_f32(kv_load_u16(header + 2));
            header += 4;
            for (int k = 0; k < b.size; k++) x[k] = shift + (float)code[k] * scale;
        }
        code += b.size;
    }
}

void kvtc_pack(const kvtc_plan *p, const uint8_t *symbol, uint8_t *row)
{
    const uint8_t *code = symbol + 4 * p->n_headers;
    uint32_t acc = 0;
    int have = 0;
    memcpy(row, symbol, 4 * (size_t)p->n_headers);
    row += 4 * p->n_headers;
    for (int i = 0; i < p->n_blocks; i++) {
        const int bits = p->block[i].type == KVTC_E4M3 ? 8 : p->block[i].type;
        for (int k = 0; bits && k < p->block[i].size; k++) {
            acc |= (uint32_t)*code++ << have;
            for (have += bits; have >= 8; have -= 8, acc >>= 8) *row++ = (uint8_t)acc;
        }
    }
    if (have) *row = (uint8_t)acc;
}

void kvtc_unpack(const kvtc_plan *p, const uint8_t *row, uint8_t *symbol)
{
    uint8_t *code = symbol + 4 * p->n_headers;
    uint32_t acc = 0;
    int have = 0;
    memcpy(symbol, row, 4 * (size_t)p->n_headers);
    row += 4 * p->n_headers;
    for (int i = 0; i < p->n_blocks; i++) {
        const int bits = p->block[i].type == KVTC_E4M3 ? 8 : p->block[i].type;
        for (int k = 0; bits && k < p->block[i].size; k++) {
            if (have < bits) {
                acc |= (uint32_t)*row++ << have;
                have += 8;
            }
            *code++ = (uint8_t)(acc & ((1u << bits) - 1));
            acc >>= bits;
            have -= bits;
        }
    }
}
