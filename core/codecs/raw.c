/* raw.c -- rows kept as they are: the baseline every codec is measured against, and the identity control.
 *
 *   page: | token 0: head_dim elements | token 1 | ...            f32, f16 or bf16, little-endian
 *
 * Narrowing rounds to nearest even.  Values past the type's range become its largest finite value: a cache must not
 * turn a large number into inf. */
#include "../codec.h"
#include "../vecmath.h"
#include "raw_device.h"

enum { P_DTYPE };

/* The choices stand in the order of KV_F32, KV_F16, KV_BF16. */
static const kv_param params[] = {
    { "dtype", "storage of one element", KV_PARAM_CHOICE, KV_F16, 0, 2, "f32|f16|bf16" },
};

static inline int raw_type(const kv_codec *c) { return (int)c->value[P_DTYPE]; }
static inline size_t elem(const kv_codec *c) { return raw_type(c) == KV_F32 ? 4 : 2; }

static int raw_init(kv_codec *c)
{
    if (raw_type(c) != KV_F32) c->caps &= ~KV_CAP_LOSSLESS;
    c->granule = 1;
    c->page.codes = (double)elem(c) * c->head_dim * c->page_tokens;
    c->bits_nominal = 8.0 * (double)elem(c);
    c->space_dim = c->head_dim;
    c->query_bytes = kv_round_up((size_t)c->head_dim * sizeof(float), 64);
    return KV_OK;
}

static void raw_encode(const kv_codec *c, uint8_t *page, int tok0, int n, const float *x, int64_t ld)
{
    const int dim = c->head_dim, type = raw_type(c);
    const uint32_t top = type == KV_F16 ? 0x477fe000u : 0x7f7f0000u;    /* 65504; the largest bf16 */
    const size_t row = elem(c) * (size_t)dim;
    float buf[KV_MAX_HEAD_DIM];
    if (ld == dim && (type == KV_F32 || kv_vec_abs_bits(x, (int64_t)n * dim) <= top)) {
        kv_vec_store(type, x, page + (size_t)tok0 * row, (int64_t)n * dim);
        return;
    }
    for (int t = 0; t < n; t++, x += ld) {
        const float *src = x;
        if (type != KV_F32 && kv_vec_abs_bits(x, dim) > top) {
            const float most = kv_bits_f32(top);
            for (int i = 0; i < dim; i++) buf[i] = x[i] > most ? most : x[i] < -most ? -most : x[i];
            src = buf;
        }
        kv_vec_store(type, src, page + (size_t)(tok0 + t) * row, dim);
    }
}

static void raw_decode(const kv_codec *c, const uint8_t *page, int tok0, int n, float *x, int64_t ld)
{
    const int dim = c->head_dim;
    const size_t row = elem(c) * (size_t)dim;
    page += (size_t)tok0 * row;
    if (ld == dim) kv_vec_load(raw_type(c), page, x, (int64_t)n * dim);
    else for (int t = 0; t < n; t++, x += ld, page += row) kv_vec_load(raw_type(c), page, x, dim);
}

static void raw_query(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared)
{
    for (int g = 0; g < n_q; g++)
        memcpy((uint8_t *)prepared + (size_t)g * c->query_bytes, q + g * ld, (size_t)c->head_dim * sizeof(float));
}

/* Queries from which 16-bit values are widened once for all of them, not for every four. */
static int many(const kv_codec *c) { return raw_type(c) == KV_F32 ? INT32_MAX : raw_type(c) == KV_F16 && c->head_dim < 128 ? 9 : 13; }

static void raw_dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld)
{
    if (n_q >= many(c)) {
        kv_decoded_dot(c, page, n_tokens, prepared, (int64_t)(c->query_bytes / sizeof(float)), n_q, scores, ld);
        return;
    }
    kv_rows_dot(raw_type(c), page, c->head_dim, n_tokens, c->head_dim, prepared, (int64_t)(c->query_bytes / sizeof(float)), n_q, scores, ld);
}

static void raw_accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc)
{
    if (n_q >= many(c)) {
        kv_decoded_accumulate(c, page, n_tokens, p, ld, n_q, acc);
        return;
    }
    kv_rows_accumulate(raw_type(c), page, c->head_dim, n_tokens, c->head_dim, p, ld, n_q, acc, c->head_dim);
}

static void raw_output(const kv_codec *c, const float *acc, int n_q, float *out, int64_t ld)
{
    for (int g = 0; g < n_q; g++) memcpy(out + g * ld, acc + (size_t)g * c->head_dim, (size_t)c->head_dim * sizeof(float));
}

static int raw_fit_bits(kv_codec *c, double target)
{
    if (target >= 24) c->value[P_DTYPE] = KV_F32;
    else if (raw_type(c) == KV_F32) c->value[P_DTYPE] = KV_F16;
    return KV_OK;
}

static int raw_on_device(const kv_codec *c, void **pod, size_t *bytes)
{
    const struct raw_device d = { raw_type(c) };
    kv_pod p = { 0 };
    uint32_t at;
    return kv_pod_done(&p, kv_pod_add(&p, &d, sizeof d, &at), pod, bytes);
}

const kv_codec_ops kv_codec_raw = {
    .name = "raw", .about = "rows as they are, in f16, f32 or bf16: the baseline and the identity control", .source = "IEEE 754",
    .params = params, .n_params = 1, .format = 1, .caps = KV_CAP_KEYS | KV_CAP_VALUES | KV_CAP_LOSSLESS,
    .init = raw_init, .encode = raw_encode, .decode = raw_decode,
    .query = raw_query, .dot = raw_dot, .accumulate = raw_accumulate, .output = raw_output, .device = raw_on_device, .fit_bits = raw_fit_bits,
};
