/* fuzz_block.c -- any bytes as a file of an encoded block, its checksums made right: what loads has rows to decode, products to
 * form and a file of its own. */
#include "fuzz.h"

enum { MOST = 1 << 14 };                      /* numbers decoded of a block */

static void use(const kv_block *b)
{
    int heads, tokens, d;
    kv_bytes bytes;
    if (kv_block_shape(b, &heads, &tokens, &d) < 0 || kv_block_bytes(b, &bytes) < 0) abort();
    const int n = kv_min(tokens, 16);
    if ((double)heads * d * n > MOST || (double)heads * tokens > MOST) return;
    float *x = kv_alloc((size_t)heads * (size_t)n * (size_t)d * sizeof *x), *q = kv_zalloc((size_t)heads * (size_t)d * sizeof *q);
    float *s = kv_zalloc((size_t)heads * (size_t)tokens * sizeof *s);
    kv_tensor rows = { .data = x, .dtype = KV_F32, .ndim = 3, .shape = { heads, n, d }, .stride = { n * d, d, 1 } };
    kv_tensor one = { .data = q, .dtype = KV_F32, .ndim = 3, .shape = { heads, 1, d }, .stride = { d, d, 1 } };
    kv_tensor scores = { .data = s, .dtype = KV_F32, .ndim = 3, .shape = { heads, 1, tokens }, .stride = { tokens, tokens, 1 } };
    for (int i = 0; i < heads * d; i++) q[i] = (float)(i % 7) - 3;
    if (kv_block_decode(b, tokens - n, tokens, &rows) < 0 || kv_block_decode(b, 0, n, &rows) < 0) abort();
    for (int fused = 0; fused < 2; fused++) {
        int status = kv_block_dot(b, &one, fused, &scores);
        if (status < 0) refused(status);
        for (int i = 0; i < heads * tokens; i++) s[i] = 1.0f / (float)tokens;
        status = kv_block_accumulate(b, &scores, fused, &one);
        if (status < 0) refused(status);
    }
    kv_free(x);
    kv_free(q);
    kv_free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    kv_pack *p;
    uint8_t *x = parse_resealed(&p, data, n);
    for (int salvage = 0; x && salvage < 2; salvage++) {
        kv_block *b;
        const int status = kv_block_load(&b, p, salvage);
        if (status < 0) refused(status);
        else use(b);
        kv_block_free(b);
    }
    kv_pack_free(p);
    kv_free(x);
    return 0;
}
