/* fuzz.h -- what the targets share: the geometries that seeds.c writes files of, and a container's checksums made right.
 *
 * A target gets any bytes.  It must refuse them in one line or use what they hold; abort() is a broken promise, and everything
 * else is for the sanitizers to see. */
#ifndef KV_FUZZ_H
#define KV_FUZZ_H
#include <math.h>
#include <stdlib.h>
#include "cache.h"
#include "calib.h"
#include "container_impl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

enum { CACHE_D = 32, CALIB_D = 8, FUZZ_PAGE = 8 };

static const double fuzz_freq[CACHE_D / 2] = { 1, 0.5, 0.3, 0.1, 0.05, 0.03, 0.01, 0.005, 0.003, 0.001 };
static const kv_rope cache_rope = { CACHE_D, fuzz_freq }, calib_rope = { CALIB_D, fuzz_freq };
static const int fuzz_global[1];
/* One layer, one head: small files can hold its cache. */
static const kv_geometry cache_geometry = { .n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = CACHE_D, .rope = &cache_rope, .sliding = fuzz_global };
static const char fuzz_digest[] = "0000000000000000000000000000000000000000000000000000000000000000";

/* Geometry alone, never freed. */
static inline void calib_model(kv_model *m)
{
    *m = (kv_model){ .info = { .n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = CALIB_D }, .geo = { 1, 1, 1, CALIB_D, &calib_rope, fuzz_global } };
    atomic_init(&m->refs, 1 << 20);
}

static inline void refused(int status)          /* what every failure owes */
{
    if (status >= 0 || !*kv_last_error() || strchr(kv_last_error(), '\n')) abort();
}

static inline bool inside(size_t n, uint64_t at, uint64_t len) { return at <= n && len <= n - at; }

/* Checksums from the pages up to the header, where what they cover is inside the file. */
static inline void reseal(uint8_t *x, size_t n)
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

/* A resealed copy, parsed: *p, over bytes to be freed after it; NULL when it is refused. */
static inline uint8_t *parse_resealed(kv_pack **p, const uint8_t *data, size_t n)
{
    uint8_t *x = kv_alloc(n);
    if (n) memcpy(x, data, n);
    reseal(x, n);
    const int status = kv_pack_parse(p, x, n, "fuzz");
    if (status == KV_OK) return x;
    if (*p) abort();
    refused(status);
    kv_free(x);
    return NULL;
}
#endif
