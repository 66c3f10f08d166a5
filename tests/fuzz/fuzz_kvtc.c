/* fuzz_kvtc.c -- any bytes as a file of KVTC tables or of an offloaded session, its checksums made right: tables that load code rows
 * and get them back, blocks that load are read, alone and with others damaged. */
#include "fuzz.h"
#include "offload.h"

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

static void use_offload(const kv_offload *o)
{
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
        else use_tables(k);
    }
    for (int salvage = 0; x && salvage < 2; salvage++) {
        kv_offload *o;
        const int status = kv_offload_load(&o, &m, p, salvage ? k : NULL, salvage);
        if (status < 0) refused(status);
        else use_offload(o);
        kv_offload_free(o);
    }
    kv_kvtc_free(k);
    kv_pack_free(p);
    kv_free(x);
    return 0;
}
