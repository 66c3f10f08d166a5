/* fuzz_container.c -- any bytes as a container, as they are and with its checksums made right so that what lies behind them is
 * reached: every page is read.  What the sections hold is for fuzz_block, fuzz_cache and fuzz_index. */
#include "fuzz.h"

static void read_all(const kv_pack *p)
{
    for (int i = 0; i < kv_pack_n_parts(p); i++) {
        kv_pack_section_info s;
        if (kv_pack_section_at(p, i, &s) < 0 || strlen(s.meta) > kv_pack_at(p, i)->n_meta) abort();
        for (int k = 0; k < s.n_pages && k < 64; k++) {
            const size_t n = kv_pack_page_bytes(p, i, k);
            if (n > 1 << 20) continue;
            const int status = kv_pack_check(p, i, k);
            if (status < 0) refused(status);
            const uint8_t *raw = kv_pack_map(p, i, k);
            uint8_t *copy = kv_alloc(n);
            if (status == KV_OK && (kv_pack_copy(p, i, k, copy, (double)n) < 0 || (raw && n && memcmp(raw, copy, n) != 0))) abort();
            kv_free(copy);
        }
        refused(kv_pack_check(p, i, s.n_pages));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    kv_pack *p;
    const int status = kv_pack_parse(&p, data, n, "fuzz");
    if (status < 0) refused(status);
    else read_all(p);
    kv_pack_free(p);
    uint8_t *x = parse_resealed(&p, data, n);
    if (x) read_all(p);
    kv_pack_free(p);
    kv_free(x);
    return 0;
}
