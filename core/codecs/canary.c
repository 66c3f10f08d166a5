/* canary.c -- deliberately broken: 4-bit integers that lose the sign of every second channel.
 *
 *   page: | token 0 | token 1 | ...      token: | d f16 | ceil(head_dim / 2) bytes, channel 2i in the low nibble of byte i |
 *
 * d = f16(amax / 7), nibble = rint(x / d) + 8, in 1..15.  Odd channels store |x|.  Everything stays finite, sizes and errors
 * look like an honest 4-bit codec's: a measurement that does not fail it measures nothing. */
#include <math.h>
#include "../codec.h"
#include "canary_device.h"

static inline size_t row_bytes(const kv_codec *c) { return 2 + (size_t)(c->head_dim + 1) / 2; }

static int canary_init(kv_codec *c)
{
    c->granule = 1;
    c->page.codes = (double)(row_bytes(c) - 2) * c->page_tokens;
    c->page.scales = 2.0 * c->page_tokens;
    c->bits_nominal = 4;
    return KV_OK;
}

static void canary_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    for (int t = 0; t < n; t++, x += ld) {
        uint8_t *dst = page + (size_t)(tok0 + t) * row_bytes(c);
        float amax = 0;
        for (int i = 0; i < c->head_dim; i++) amax = fmaxf(amax, fabsf(x[i]));
        const uint16_t d = kv_f32_to_f16(fminf(amax / 7, 65504.0f));
        const float mul = d ? 1.0f / kv_f16_to_f32(d) : 0;
        memset(dst, 0, row_bytes(c));
        kv_store_u16(dst, d);
        for (int i = 0; i < c->head_dim; i++) {
            const float v = i % 2 ? fabsf(x[i]) : x[i];
            const int q = (int)rintf(fminf(fmaxf(v * mul, -7), 7)) + 8;
            dst[2 + i / 2] |= (uint8_t)(q << i % 2 * 4);
        }
    }
}

static void canary_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    for (int t = 0; t < n; t++, x += ld) {
        const uint8_t *src = page + (size_t)(tok0 + t) * row_bytes(c);
        const float d = kv_f16_to_f32(kv_load_u16(src));
        for (int i = 0; i < c->head_dim; i++) x[i] = d * (float)((src[2 + i / 2] >> i % 2 * 4 & 15) - 8);
    }
}

static int canary_on_device(const kv_codec *c, void **pod, size_t *bytes)
{
    const struct canary_device d = { (int32_t)row_bytes(c) };
    if (!(*pod = kv_alloc(sizeof d))) return KV_E_NOMEM;
    memcpy(*pod, &d, sizeof d);
    *bytes = sizeof d;
    return KV_OK;
}

const kv_codec_ops kv_codec_canary = {
    .name = "canary", .about = "deliberately broken: 4 bits, the sign of every second channel lost", .source = "a control, not a method",
    .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_CONTROL,
    .init = canary_init, .encode = canary_encode, .decode = canary_decode, .device = canary_on_device,
};
