/* fuzz_container.c -- any bytes as a container, its checksums made right so that what lies behind them is reached: every page
 * is read, and what claims to be a block, a cache or an index is loaded and used.
 *
 *   make FLAVOUR=fuzz CC=clang fuzzers, then build/fuzz/bin/fuzz_container CORPUS */
#include <math.h>
#include <stdlib.h>
#include "cache.h"
#include "container_impl.h"
#include "index.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static bool inside(size_t n, uint64_t at, uint64_t len) { return at <= n && len <= n - at; }

/* Checksums from the pages up to the header, where what they cover is inside the file. */
static void reseal(uint8_t *x, size_t n)
{
    if (n < PACK_HEADER) return;
    memcpy(x, PACK_MAGIC, 8);
    kv_put_u32(x + 8, KV_PACK_VERSION);
    kv_put_u32(x + 12, kv_load_u32(x + 12) % 16);
    kv_put_u64(x + 24, n);
    const uint64_t directory = kv_load_u64(x + 16), n_parts = kv_load_u32(x + 12);
    if (inside(n, directory, n_parts * PACK_ENTRY)) {
        for (uint64_t i = 0; i < n_parts; i++) {
            uint8_t *e = x + directory + i * PACK_ENTRY;
            const uint64_t meta = kv_load_u64(e + 32), table = kv_load_u64(e + 48), n_meta = (uint64_t)kv_load_u32(e + 40) + kv_load_u32(e + 44), n_pages = kv_load_u32(e + 56);
            if (inside(n, table, n_pages * PACK_PAGE)) {
                for (uint64_t k = 0; k < n_pages && k < 64; k++) {
                    uint8_t *t = x + table + k * PACK_PAGE;
                    if (inside(n, kv_load_u64(t), kv_load_u32(t + 8))) kv_put_u32(t + 16, kv_crc32c(0, x + kv_load_u64(t), kv_load_u32(t + 8)));
                }
                kv_put_u32(e + 68, kv_crc32c(0, x + table, n_pages * PACK_PAGE));
            }
            if (inside(n, meta, n_meta)) kv_put_u32(e + 64, kv_crc32c(0, x + meta, n_meta));
        }
        kv_put_u32(x + 32, kv_crc32c(0, x + directory, n_parts * PACK_ENTRY));
    }
    kv_put_u32(x + 60, kv_crc32c(0, x, 60));
}

static void use_block(const kv_pack *p)
{
    kv_block *b;
    int heads, tokens, d;
    if (kv_block_load(&b, p, 1) < 0) return;
    kv_block_shape(b, &heads, &tokens, &d);
    if ((double)heads * d <= 4096) {
        float *x = kv_alloc((size_t)heads * (size_t)d * sizeof *x);
        kv_tensor t = { .data = x, .dtype = KV_F32, .ndim = 3, .shape = { heads, 1, d }, .stride = { d, d, 1 } };
        if (kv_block_decode(b, tokens - 1, tokens, &t) < 0) abort();
        kv_free(x);
    }
    kv_block_free(b);
}

/* A geometry of one layer, one head of 8 channels: small files can hold its cache. */
static void use_cache(const kv_pack *p)
{
    static double freq[4] = { 1, 0.1, 0.01, 0.001 };
    static const kv_rope rope = { .n_rot = 8, .freq = freq };
    static const int sliding = 0;
    static const float row[8] = { 1, -1, 0.5f, 2, 0, 3, 1, 1 };
    const kv_geometry g = { .n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 8, .rope = &rope, .sliding = &sliding };
    char zeros[65];
    kv_cache *c;
    int n_logits;
    float out[8];
    memset(zeros, '0', 64);
    zeros[64] = 0;
    if (kv_cache_load(&c, &g, p, &(kv_cache_extras){ .model = zeros, .rope = zeros }, 64, 1, &n_logits) < 0) return;
    for (int i = 0; i < 3 && kv_cache_n_tokens(c) < kv_cache_max_tokens(c); i++) {
        if (kv_cache_attend(c, 0, 1, row, row, row, 1, 0, out) < 0) break;
        if (kv_cache_commit(c, 1) < 0) abort();
    }
    kv_cache_free(c);
}

static void use_index(const uint8_t *x, size_t n)
{
    kv_pack *p;
    kv_index *ix;
    float q[64] = { 1, -1, 0.5f }, score[4];
    int32_t id[4];
    int first, removed;
    if (kv_pack_parse(&p, x, n, "fuzz") < 0 || kv_index_read(&ix, p) < 0) return;
    if (ix->dim <= 64) {
        const kv_tensor query = { .data = q, .dtype = KV_F32, .ndim = 2, .shape = { 1, ix->dim }, .stride = { ix->dim, 1 } };
        kv_tensor s = { .data = score, .dtype = KV_F32, .ndim = 2, .shape = { 1, 4 }, .stride = { 4, 1 } }, ids = { .data = id, .dtype = KV_I32, .ndim = 2, .shape = { 1, 4 }, .stride = { 4, 1 } };
        for (int round = 0; round < 2; round++) {
            if (kv_index_search(ix, &query, 4, ix->keep >= 0 ? 2 : 0, kv_codec_fused(ix->codec[0]), &s, &ids) == KV_OK && id[0] >= 0) kv_index_remove(ix, id, 1, &removed);
            if (kv_index_add(ix, &query, &first) < 0) break;
        }
    }
    kv_index_free(ix);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    kv_pack *p;
    uint8_t *x = kv_alloc(n);
    memcpy(x, bytes, n);
    reseal(x, n);
    if (kv_pack_parse(&p, x, n, "fuzz") < 0) {
        if (p || strchr(kv_last_error(), '\n')) abort();
        kv_free(x);
        return 0;
    }
    for (int i = 0; i < kv_pack_n_parts(p); i++)
        for (int k = 0; k < kv_pack_at(p, i)->n_pages && k < 64; k++)
            if (kv_pack_page_bytes(p, i, k) <= 1 << 20 && kv_pack_check(p, i, k) < 0 && strchr(kv_last_error(), '\n')) abort();
    use_block(p);
    use_cache(p);
    use_index(x, n);
    kv_pack_free(p);
    kv_free(x);
    return 0;
}
