/* fuzz_entropy.c -- any bytes through every lossless stage: as what a stage made, and as what it is to make.
 *
 *   | what u8 | decoded bytes u16 | bytes |       what: below 4 a stage; 4 a bank and a block by classes; else round trips */
#include "fuzz.h"
#include "entropy.h"

enum { PERIOD = 5 };

static void bank(const uint8_t *data, size_t n, uint8_t *dst, size_t n_dst)
{
    kv_rans *r;
    size_t used;
    uint8_t cls[PERIOD];
    const int status = kv_rans_read(&r, data, n, &used);
    if (status < 0) {
        refused(status);
        return;
    }
    if (used > n) abort();
    for (int i = 0; i < PERIOD; i++) cls[i] = (uint8_t)(i % kv_rans_tables(r));
    const int decoded = kv_rans_decode(r, cls, PERIOD, data + used, n - used, dst, n_dst);
    if (decoded < 0) refused(decoded);
    else {                                    /* what decodes is what the encoder can say again */
        const size_t cap = n_dst + 4096;
        uint8_t *again = kv_alloc(cap), *back = kv_alloc(n_dst);
        const size_t m = kv_rans_encode(r, cls, PERIOD, dst, n_dst, again, cap);
        if (m && (kv_rans_decode(r, cls, PERIOD, again, m, back, n_dst) < 0 || memcmp(back, dst, n_dst) != 0)) abort();
        kv_free(again);
        kv_free(back);
    }
    kv_rans_free(r);
}

static void round_trip(int stage, int level, const uint8_t *data, size_t n)
{
    uint8_t *coded = kv_alloc(n), *back = kv_alloc(n);
    size_t n_coded;
    const int used = kv_stage_encode(stage, level, data, n, coded, n, &n_coded);
    if (used < 0) refused(used);
    else if (n_coded > n || kv_stage_decode(used, coded, n_coded, back, n) < 0 || (n && memcmp(back, data, n) != 0)) abort();
    kv_free(coded);
    kv_free(back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 3) return 0;
    const int what = data[0];
    const size_t n_dst = data[1] | (size_t)data[2] << 8;
    uint8_t *dst = kv_alloc(n_dst);
    data += 3;
    n -= 3;
    if (what < 4) {
        const int status = kv_stage_decode(what, data, n, dst, n_dst);
        if (status < 0) refused(status);
    } else if (what == 4) bank(data, n, dst, n_dst);
    else round_trip(what % 5 == 4 ? KV_STAGE_SMALLEST : what % 5, what / 5 % 11 - 1, data, n);
    kv_free(dst);
    return 0;
}
