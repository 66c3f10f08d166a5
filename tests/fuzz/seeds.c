/* seeds.c -- small whole files for the targets to start from: blocks, caches, indexes, KVTC, an artifact, pages and streams.
 *
 *   seeds FOLDER      writes FOLDER/fuzz_NAME/...; models come from make_gguf_seeds.lua */
#include <stdio.h>
#include <sys/stat.h>
#include "fuzz.h"
#include "index.h"
#include "offload.h"

enum { N = 19, HEADS = 2 };
static const char *const stages[] = { "raw", "zlib", "lzma", "rans", "smallest" };
static const char *folder;
static float rows[HEADS * N * CACHE_D];

static const char *seed(const char *target, const char *family, const char *what, int i)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, target);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/%s-%s%d", folder, target, family, what, i);
    return path;
}

static void must(int status)
{
    if (status >= 0) return;
    printf("seeds: %s\n", kv_last_error());
    exit(1);
}

static void put(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0) {
        printf("seeds: cannot write %s\n", path);
        exit(1);
    }
}

static void block(kv_codec *c, int i)
{
    kv_block *b;
    const kv_tensor x = { .data = rows, .dtype = KV_F32, .ndim = 3, .shape = { HEADS, N, CACHE_D }, .stride = { N * CACHE_D, CACHE_D, 1 } };
    must(kv_block_encode(&b, c, &x));
    must(kv_block_save(b, seed("fuzz_block", c->ops->name, c->side ? "v" : "k", 0), "{\"a\":1}", stages[i % 5], -1));
    must(kv_block_save(b, seed("fuzz_container", c->ops->name, c->side ? "v" : "k", 0), "{\"a\":1}", stages[(i + 2) % 5], -1));
    kv_block_free(b);
}

static void cache(kv_codec *k, kv_codec *v, int i)
{
    kv_plan *plan;
    kv_cache *c;
    kv_pack_writer *w;
    int32_t tokens[N] = { 1, 2, 3 };
    float out[CACHE_D];
    must(kv_plan_new(&plan, 1, 1, CACHE_D, FUZZ_PAGE));
    must(kv_plan_window(plan, -1, i % 4, i % 3 * 2, i % 3));
    must(kv_plan_set(plan, -1, -1, KV_SIDE_K, k));
    must(kv_plan_set(plan, -1, -1, KV_SIDE_V, v));
    if (i % 2) must(kv_plan_mean(plan, -1, -1, KV_SIDE_K, rows));
    must(kv_cache_new(&c, &cache_geometry, plan, 40));
    for (int t = 0; t < N; t++) {
        must(kv_cache_attend(c, 0, 1, rows + t * CACHE_D, rows + t * CACHE_D, rows + (N - t) * CACHE_D, 0.2f, 0, out));
        must(kv_cache_commit(c, 1));
    }
    const kv_cache_extras x = { fuzz_digest, fuzz_digest, "{}", tokens, rows, i % 4 };
    must(kv_pack_create(&w, seed("fuzz_cache", k->ops->name, v->ops->name, i)));
    must(kv_cache_save(c, w, &x, i % 2 ? KV_STAGE_SMALLEST : KV_STAGE_RAW, KV_LEVEL_DEFAULT));
    must(kv_pack_finish(w));
    kv_pack_abandon(w);
    kv_cache_free(c);
    kv_plan_free(plan);
}

static void index_of(const kv_codec *c, int i)
{
    kv_index *ix;
    int first, removed;
    const int32_t gone[] = { 0, 1, 2, 3, 4, 5, 6, 7, 10 };
    const kv_tensor x = { .data = rows, .dtype = KV_F32, .ndim = 2, .shape = { HEADS * N, CACHE_D }, .stride = { CACHE_D, 1 } };
    const kv_index_config cfg = { c->ops->name, c->text, CACHE_D, FUZZ_PAGE, i % 3, i % 3 - 1, i % 2, 0 };
    must(kv_index_new(&ix, &cfg, &x));
    must(kv_index_add(ix, &x, &first));
    must(kv_index_remove(ix, gone, i % 2 ? 9 : 3, &removed));
    must(kv_index_save(ix, seed("fuzz_index", c->ops->name, "", i), stages[i % 5], -1));
    kv_index_free(ix);
}

/* A request as fuzz_codec reads it: no tables, then tables a little off. */
static void page(const kv_codec *c, int i)
{
    uint8_t x[256] = { (uint8_t)i, (uint8_t)((c->side ? 0x40 : 0)), (uint8_t)strlen(c->text) };
    if (x[2] != strlen(c->text) || x[2] > 127) return;
    memcpy(x + 3, c->text, x[2]);
    memcpy(x + 3 + x[2], rows, 64);
    put(seed("fuzz_codec", c->ops->name, c->side ? "v" : "k", 0), x, (size_t)x[2] + 67);
    x[1] |= 0x80;
    memcpy(x + 3 + x[2], "\5\0\3\1\2\3", 6);
    put(seed("fuzz_codec", c->ops->name, c->side ? "v" : "k", 1), x, (size_t)x[2] + 67);
}

static void artifact(void)
{
    static kv_model m;
    kv_calib *c;
    uint8_t *image;
    size_t n;
    int32_t tokens[70];
    calib_model(&m);
    must(kv_calib_alloc(&c, &m, 4));
    c->count = 70;
    c->n_sample = 4;
    for (int i = 0; i < 70; i++) tokens[i] = i;
    for (int kind = 0; kind < KV_CALIB_KINDS; kind++)
        for (int i = 0, at = 0; i < CALIB_D; i++) {
            c->shift[kind][i] = rows[i];
            c->sum[kind][i] = (double)rows[20 + i];
            for (int k = 0; k <= i; k++) c->product[kind][at++] = i == k ? 70 : (double)rows[40 + k];
        }
    for (int i = 0; i < 4; i++) c->position[i] = i * 5;
    for (int i = 0; i < 4 * CALIB_D; i++) c->sample[0][i] = c->sample[1][i] = kv_f32_to_f16(rows[i]);
    must(kv_calib_remember(c, tokens, 70, 0));
    must(kv_calib_write(c, &image, &n));
    put(seed("fuzz_calib", "artifact", "", 0), image, n);
    kv_free(image);
    kv_calib_free(c);
}

/* Tables of every kind, and a session of 30 tokens as it would lie in a file: 2 sinks, blocks of 7, a window. */
static void kvtc(int i)
{
    static kv_model m;
    enum { ROWS = 64, TOKENS = 30, SINK = 2, CODED = 20, BLOCK = 7 };
    kv_calib *c;
    kv_kvtc *k;
    int32_t tokens[TOKENS] = { 1, 2, 3 };
    uint16_t exact[2 * (TOKENS - CODED) * CALIB_D] = { 0 };
    offload_block block[3] = { { 2, 7 }, { 9, 7 }, { 16, 6 } };
    kvtc_payload part[6] = { 0 };
    calib_model(&m);
    must(kv_calib_alloc(&c, &m, ROWS));
    c->count = c->n_sample = ROWS;
    for (int side = 0; side < 2; side++)
        for (int n = 0; n < ROWS * CALIB_D; n++) c->sample[side][n] = kv_f32_to_f16(rows[n % (HEADS * N * CACHE_D)] * (float)(1 + n % CALIB_D));
    must(kv_kvtc_new(&k, c, NULL, &(kv_kvtc_options){ .ratio_k = 2, .ratio_v = 3, .types = i, .bits = 4, .equal = i % 2, .keep_rope = i == 1, .randomized = i == 2, .lagrange = i == 3 }));
    must(kv_kvtc_save(k, seed("fuzz_kvtc", "tables", "", i), "{}", stages[i % 5], -1));
    for (int b = 0; b < 6; b++) {
        float x[BLOCK * CALIB_D];
        memcpy(x, rows + b * BLOCK * CALIB_D, sizeof x);
        must(kvtc_encode_rows(&k->group[b % 2][0], x, block[b / 2].n, b % 4, KV_LEVEL_DEFAULT, &part[b]));
    }
    const kv_offload o = { k, TOKENS, SINK, CODED, BLOCK, 3, TOKENS - CODED, KV_STAGE_ZLIB, KV_LEVEL_DEFAULT, block, part, exact };
    must(kv_offload_save(&o, seed("fuzz_kvtc", "offload", "", i), tokens, "{}", i % 2 ? "{}" : NULL));
    must(kv_offload_save(&o, seed("fuzz_container", "offload", "", i), tokens, "{}", "{}"));
    for (int b = 0; b < 6; b++) kv_free(part[b].data);
    kv_kvtc_free(k);
    kv_calib_free(c);
}

static void streams(void)
{
    static uint8_t src[3000], x[8192];
    uint32_t count[256] = { 0 };
    uint8_t cls[5] = { 0, 1, 0, 1, 0 };
    size_t n;
    kv_rans *r;
    for (int i = 0; i < 3000; i++) src[i] = (uint8_t)(fabsf(rows[i % (N * CACHE_D)]) * 4);
    x[1] = 3000 & 255;
    x[2] = 3000 >> 8;
    for (int stage = 0; stage < 4; stage++) {
        must(kv_stage_encode(stage, KV_LEVEL_DEFAULT, src, sizeof src, x + 3, sizeof x - 3, &n));
        x[0] = (uint8_t)stage;
        put(seed("fuzz_entropy", stages[stage], "", 0), x, n + 3);
        x[0] = (uint8_t)(5 + stage);
        memcpy(x + 3, src, 200);
        put(seed("fuzz_entropy", stages[stage], "round", 0), x, 203);
    }
    for (int i = 0; i < 3000; i++) count[src[i]]++;
    uint32_t two[512];
    memcpy(two, count, sizeof count);
    memcpy(two + 256, count, sizeof count);
    must(kv_rans_new(&r, two, 2));
    n = kv_rans_write(r, x + 3, sizeof x - 3);
    n += kv_rans_encode(r, cls, 5, src, sizeof src, x + 3 + n, sizeof x - 3 - n);
    x[0] = 4;
    put(seed("fuzz_entropy", "bank", "", 0), x, n + 3);
    kv_rans_free(r);
    put(seed("fuzz_json", "row", "", 0), "{\"a\":[1,-2.5e3,null,true],\"b\":{\"c\":\"\\u00e4\\n\"}}", 46);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        printf("usage: seeds FOLDER\n");
        return 2;
    }
    folder = argv[1];
    mkdir(folder, 0777);
    must(kv_rng_normal(1, 0, 0, HEADS * N * CACHE_D, rows));
    for (int i = 0; i < kv_codec_count(); i++) {
        kv_codec_desc d;
        kv_codec *c[2] = { NULL, NULL };
        kv_codec_describe(i, &d);
        for (int side = 0; side < 2; side++) {
            if (kv_codec_new_nominal(&c[side], d.name, "", CACHE_D, FUZZ_PAGE, side) < 0) continue;
            block(c[side], i);
            page(c[side], i);
        }
        if (c[0] && c[1]) cache(c[0], c[1], i);
        if (c[0] && !(d.caps & KV_CAP_CONTROL)) index_of(c[0], i);
        kv_codec_free(c[0]);
        kv_codec_free(c[1]);
    }
    artifact();
    for (int i = 0; i < 4; i++) kvtc(i);
    streams();
    return 0;
}
