/* fuzz_cache.c -- any bytes as a file of a session's cache, its checksums made right: what loads goes on, forks, is cut and
 * read. */
#include "fuzz.h"

static void use(kv_cache *c)
{
    static const float row[CACHE_D] = { 1, -1, 0.5f, 2, 0, 3, 1, 1, -4 };
    float out[CACHE_D];
    kv_bytes bytes;
    kv_pairs pairs;
    kv_cache *fork;
    if (kv_cache_bytes(c, -1, -1, &bytes) < 0 || !(bytes.total >= 0)) abort();
    kv_cache_pairs(c, &pairs);
    if (kv_cache_fork(&fork, c) == KV_OK && kv_cache_n_tokens(fork) > 1) kv_cache_truncate(fork, kv_cache_n_tokens(fork) / 2);
    for (int k = 0; k < 2; k++) {
        kv_cache *of = k ? c : fork;
        if (!of) continue;
        for (int i = 0; i < 3 && kv_cache_n_tokens(of) < kv_cache_max_tokens(of); i++) {
            if (kv_cache_attend(of, 0, 1, row, row, row, 0.2f, 0, out) < 0) break;
            if (kv_cache_commit(of, 1) < 0) abort();
        }
        const int n = kv_cache_n_tokens(of);
        if (n > 0 && kv_cache_read(of, 0, 0, k, n - 1, n, out) < 0 && !strstr(kv_last_error(), "window")) refused(kv_cache_read(of, 0, 0, k, n - 1, n, out));
    }
    kv_cache_free(fork);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    kv_pack *p;
    uint8_t *x = parse_resealed(&p, data, n);
    for (int salvage = 0; x && salvage < 2; salvage++) {
        kv_cache *c;
        int n_logits;
        const int status = kv_cache_load(&c, &cache_geometry, p, &(kv_cache_extras){ .model = fuzz_digest, .rope = fuzz_digest }, 64, salvage, &n_logits);
        if (status < 0) refused(status);
        else use(c);
        kv_cache_free(c);
    }
    kv_pack_free(p);
    kv_free(x);
    return 0;
}
