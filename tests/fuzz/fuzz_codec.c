/* fuzz_codec.c -- every codec: any text as its parameters, any bytes as its tables and as a page.  What is made decodes any page
 * without leaving it, to the same numbers at every SIMD level; what it encodes is finite again.
 *
 *   | codec u8 | head_dim: 4 bits, page_tokens: 2, side: 1, tables too: 1 | length u8 | parameters | bytes of the page |
 *   with tables: | at u16 | n u8 | n bytes XORed into those of white noise from `at` on | bytes of the page |               */
#include <stdio.h>
#include "fuzz.h"

enum { N_Q = 3, KEPT = 64 };
static const int dims[16] = { 32, 8, 16, 64, 7, 1, 24, 40, 128, 12, 33, 2, 80, 48, 4, 96 }, pages[4] = { 8, 16, 32, 64 };

/* Of white noise, which takes its time: instances are kept. */
static int nominal(kv_codec **out, const char *family, const char *params, int dim, int page, int side)
{
    static struct { char key[192]; kv_codec *c; } kept[KEPT];
    static unsigned next;
    char key[192];
    snprintf(key, sizeof key, "%s %d %d %d %s", family, dim, page, side, params);
    for (int i = 0; i < KEPT; i++)
        if (kept[i].c && strcmp(kept[i].key, key) == 0) {
            *out = kv_codec_ref(kept[i].c);
            return KV_OK;
        }
    const int status = kv_codec_new_nominal(out, family, params, dim, page, side);
    if (status < 0) return status;
    kv_codec_free(kept[next % KEPT].c);
    memcpy(kept[next % KEPT].key, key, sizeof key);
    kept[next++ % KEPT].c = kv_codec_ref(*out);
    return KV_OK;
}

static kv_codec *make(const kv_codec_desc *d, const char *params, int dim, int page, int side, const uint8_t **data, size_t *n, bool tables)
{
    kv_codec *c, *forged;
    const void *blob;
    double n_blob;
    const int status = nominal(&c, d->name, params, dim, page, side);
    if (status < 0) {
        refused(status);
        return NULL;
    }
    kv_codec_blob(c, &blob, &n_blob);
    if (!tables || !n_blob || *n < 3) return c;
    const size_t n_table = (size_t)n_blob, at = (*data)[0] | (size_t)(*data)[1] << 8, n_xor = kv_min((*data)[2], (int)(*n - 3));
    uint8_t *copy = kv_alloc(n_table);
    memcpy(copy, blob, n_table);
    for (size_t i = 0; i < n_xor; i++) copy[(at + i) % n_table] ^= (*data)[3 + i];
    *data += 3 + n_xor;
    *n -= 3 + n_xor;
    const int again = kv_codec_new_calibrated(&forged, d->name, params, dim, page, side, copy, (double)(at == 0xffff ? n_table / 2 : n_table));
    if (again < 0) refused(again);
    kv_free(copy);
    kv_codec_free(c);
    return forged;
}

static bool same(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++) if (memcmp(&a[i], &b[i], 4) != 0 && !(isnan(a[i]) && isnan(b[i])) && a[i] != b[i]) return false;
    return true;
}

static void use(const kv_codec *c, const uint8_t *data, size_t n)
{
    const int d = c->head_dim, P = c->page_tokens, best = kv_cpu_simd_max();
    const size_t rows = (size_t)P * (size_t)d;
    uint8_t *page = kv_alloc(c->page_bytes);
    float *x = kv_alloc(rows * sizeof *x), *y = kv_alloc(rows * sizeof *y), *s = kv_alloc((size_t)(N_Q * P) * sizeof *s), *q = kv_alloc((size_t)(N_Q * d) * sizeof *q);
    for (size_t i = 0; i < c->page_bytes; i++) page[i] = n ? data[i % n] : 0;
    c->ops->decode(c, page, 0, P, x, d);
    kv_cpu_limit(KV_SIMD_C);
    c->ops->decode(c, page, 0, P, y, d);
    kv_cpu_limit(best);
    if (!same(x, y, rows)) abort();
    c->ops->decode(c, page, P / 2, P - P / 2, y, d);
    if (!same(x + (size_t)(P / 2) * (size_t)d, y, (size_t)(P - P / 2) * (size_t)d)) abort();
    for (int i = 0; i < N_Q * d; i++) q[i] = (float)((i * 7 + (n ? data[(size_t)i % n] : 0)) % 13) - 6;
    if (kv_codec_fused(c)) {
        void *prepared = kv_alloc((size_t)N_Q * c->query_bytes);
        float *acc = kv_zalloc((size_t)N_Q * (size_t)c->space_dim * sizeof *acc);
        for (int level = 0; level <= best; level++) {
            kv_cpu_limit(level);
            if (c->side == KV_SIDE_K) {
                c->ops->query(c, q, d, N_Q, prepared);
                c->ops->dot(c, page, P, prepared, N_Q, s, P);
            } else {
                for (int i = 0; i < N_Q * P; i++) s[i] = 1.0f / (float)P;
                c->ops->accumulate(c, page, P - 1, s, P, N_Q, acc);
                c->ops->output(c, acc, N_Q, q, d);
            }
        }
        kv_cpu_limit(best);
        kv_free(prepared);
        kv_free(acc);
    }
    /* Rows of the fuzzer's choice over whatever the page held. */
    for (size_t i = 0; i < rows; i++) {
        uint32_t bits = (uint32_t)i * 2654435761u;
        for (size_t k = 0; k < 4 && n; k++) bits = bits << 8 ^ data[(4 * i + k) % n];
        memcpy(&x[i], &bits, 4);
        if (!isfinite(x[i]) || fabsf(x[i]) > 1e15f) x[i] = (float)(i % 5);
    }
    memset(page, 0, c->page_bytes);
    c->ops->encode(c, page, 0, P, x, d);
    c->ops->decode(c, page, 0, P, y, d);
    for (size_t i = 0; i < rows; i++) if (!isfinite(y[i])) abort();
    kv_free(page);
    kv_free(x);
    kv_free(y);
    kv_free(s);
    kv_free(q);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char params[128];
    kv_codec_desc d;
    if (n < 3) return 0;
    const int shape = data[1], n_params = data[2] % 128;
    kv_codec_describe(data[0] % kv_codec_count(), &d);
    data += 3;
    n -= 3;
    const size_t len = kv_min(n_params, (int)(n < 127 ? n : 127));
    if (len) memcpy(params, data, len);
    params[len] = 0;
    data += len;
    n -= len;
    kv_codec *c = make(&d, params, dims[shape & 15], pages[shape >> 4 & 3], shape >> 6 & 1, &data, &n, shape >> 7);
    if (c) use(c, data, n);
    kv_codec_free(c);
    return 0;
}
