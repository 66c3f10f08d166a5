/* fuzz_kvtc.c -- any bytes as a file of KVTC tables or of an offloaded session, its checksums and the digest of its tables made right:
 * tables that load code rows and get them back, blocks that load are read, restored and extended, alone and with others damaged. */
#include "fuzz.h"
#include "offload.h"

enum { DIGEST_AT = 32 /* of page 0 of "offload" */, MOST = 1 << 12 /* tokens that are restored */ };

/* The tables that were just loaded are those that the offload names. */
static void name_tables(const kv_kvtc *k, const kv_pack *p, uint8_t *x, size_t n)
{
    char hex[65];
    const int part = kv_pack_find(p, "offload", 0);
    const uint8_t *counts = kv_pack_map(p, part, 0);
    if (!counts || kv_pack_page_bytes(p, part, 0) < DIGEST_AT + 64) return;
    if (kv_kvtc_digest(k, hex) < 0) abort();
    memcpy(x + (counts - x) + DIGEST_AT, hex, 64);
    reseal(x, n);
}

static void use_tables(const kv_kvtc *k)
{
    char hex[65];
    double bytes;
    int rank_k, rank_v;
    if (kv_kvtc_digest(k, hex) < 0 || kv_kvtc_tables(k, &bytes, &rank_k, &rank_v) < 0 || !(bytes > 0)) abort();
    for (int side = 0; side < 2; side++)
        for (int stage = KV_STAGE_RAW; stage <= KV_STAGE_RANS; stage++) {
            float x[3 * CALIB_D], back[3 * CALIB_D];
            kvtc_payload part = { 0 };
            for (int i = 0; i < 3 * CALIB_D; i++) x[i] = (float)(i * 7 % 11) - 5;
            if (kvtc_encode_rows(&k->group[side][0], x, 3, stage, KV_LEVEL_DEFAULT, &part) < 0 || kvtc_decode_rows(&k->group[side][0], &part, 3, back) < 0) abort();
            kv_free(part.data);
        }
}

static void use_offload(kv_offload *o, kv_model *m)
{
    int back;
    kv_session *s;
    kv_bytes bytes;
    if (kv_offload_bytes(o, &bytes) < 0 || !(bytes.total >= 0)) abort();
    for (int b = 0; b < o->n_blocks && b < 16; b++) {
        float *x = kv_alloc((size_t)o->block[b].n * CALIB_D * sizeof *x);
        for (int side = 0; x && side < 2; side++) {
            const int status = kv_offload_read(o, side, b, x);
            if (status < 0) refused(status);
        }
        kv_free(x);
    }
    if (o->n_tokens > MOST) return;
    if (kv_session_new(&s, m, NULL, o->n_tokens) < 0) abort();
    const int status = kv_offload_restore(o, s, &back);
    if (status < 0) refused(status);
    else if (back < 0 || back > o->n_tokens || kv_session_n_tokens(s) != back) abort();
    if (status == KV_OK && back == o->n_tokens && kv_offload_extend(o, s, 0) < 0) refused(KV_E_ARG);
    kv_session_free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    kv_model m;
    kv_pack *p;
    kv_kvtc *k = NULL;
    calib_model(&m);
    uint8_t *x = parse_resealed(&p, data, n);
    if (x) {
        const int status = kv_kvtc_load(&k, &m, p);
        if (status < 0) refused(status);
        else {
            use_tables(k);
            name_tables(k, p, x, n);
        }
    }
    for (int salvage = 0; x && salvage < 2; salvage++) {
        kv_offload *o;
        const int status = kv_offload_load(&o, &m, p, salvage ? k : NULL, salvage);
        if (status < 0) refused(status);
        else use_offload(o, &m);
        kv_offload_free(o);
    }
    kv_kvtc_free(k);
    kv_pack_free(p);
    kv_free(x);
    return 0;
}
