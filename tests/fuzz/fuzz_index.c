/* fuzz_index.c -- any bytes as a file of an index, its checksums made right: what loads is searched, added to and removed from. */
#include "fuzz.h"
#include "index.h"

enum { DIM = 64, K = 4 };

static void use(kv_index *ix)
{
    float q[DIM] = { 1, -1, 0.5f }, score[K];
    int32_t id[K];
    int first, removed;
    if (ix->dim > DIM) return;
    const kv_tensor query = { .data = q, .dtype = KV_F32, .ndim = 2, .shape = { 1, ix->dim }, .stride = { ix->dim, 1 } };
    kv_tensor s = { .data = score, .dtype = KV_F32, .ndim = 2, .shape = { 1, K }, .stride = { K, 1 } }, ids = { .data = id, .dtype = KV_I32, .ndim = 2, .shape = { 1, K }, .stride = { K, 1 } };
    for (int round = 0; round < 2; round++) {
        const int status = kv_index_search(ix, &query, K, ix->keep >= 0 ? 2 : 0, kv_codec_fused(ix->codec[0]), &s, &ids);
        if (status < 0) refused(status);
        for (int i = 0; status == KV_OK && i < K; i++) if (id[i] < -1 || id[i] >= ix->n_rows) abort();
        if (status == KV_OK && id[0] >= 0 && kv_index_remove(ix, id, 1, &removed) == KV_OK && removed != 1) abort();
        if (kv_index_add(ix, &query, &first) < 0) break;
    }
    kv_tensor row = { .data = q, .dtype = KV_F32, .ndim = 2, .shape = { 1, ix->dim }, .stride = { ix->dim, 1 } };
    if (ix->n_rows && kv_index_decode(ix, ix->n_rows - 1, ix->n_rows, &row) < 0 && !*kv_last_error()) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    kv_pack *p;
    kv_index *ix;
    uint8_t *x = parse_resealed(&p, data, n);
    if (!x) return 0;
    const int status = kv_index_read(&ix, p);          /* takes p over */
    if (status < 0) refused(status);
    else use(ix);
    kv_index_free(ix);
    kv_free(x);
    return 0;
}
