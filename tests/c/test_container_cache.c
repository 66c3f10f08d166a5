/* Caches in files: save, load, and both go on alike, byte for byte; damage and forged counts are refused or salvaged. */
#include <math.h>
#include "cache_impl.h"
#include "check.h"
#include "container_impl.h"

static char path[256];
enum { LAYERS = 2, HEADS = 4, KV_HEADS = 2, D = 64, PAGE = 16 };
static double freq[D / 2];
static kv_rope rope[LAYERS];
static int sliding[LAYERS];
static kv_geometry geo = { .n_layers = LAYERS, .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = D, .rope = rope, .sliding = sliding };
static char model[65], wheel[65];

static void must(int status) { if (status < 0) { printf("FAIL setup: %s\n", kv_last_error()); exit(1); } }

typedef struct choice { const char *k, *kp, *v, *vp; int sink, recent, exact, window, mean, page_rope; } choice;
static const choice choices[] = {
    { "int", "bits=4,group=32", "int", "bits=4,group=32", 4, 8, KV_EXACT_F16, 0, 1, 0 },
    { "scalar", "bits=3", "scalar", "bits=2", 0, 0, KV_EXACT_F16, 0, 0, 1 },
    { "int", "bits=2,axis=token,group=8", "raw", "dtype=f32", 3, 20, KV_EXACT_F32, 24, 0, 0 },
    { "raw", "dtype=f32", "raw", "dtype=f32", 0, 0, KV_EXACT_F32, 0, 0, 0 },
    { "scalar", "bits=4", "int", "bits=8,group=32", 4, 64, KV_EXACT_BF16, 16, 1, 1 },     /* sliding layer all exact */
};
enum { N_CHOICES = sizeof choices / sizeof *choices };

static kv_plan *make_plan(const choice *ch)
{
    kv_plan *p;
    float mean[D];
    sliding[0] = ch->window;
    must(kv_plan_new(&p, LAYERS, KV_HEADS, D, PAGE));
    must(kv_plan_window(p, -1, ch->sink, ch->recent, ch->exact));
    for (int side = 0; side < 2; side++) {
        kv_codec *c;
        must(kv_codec_new(&c, side ? ch->v : ch->k, side ? ch->vp : ch->kp, D, PAGE, side));
        must(kv_plan_set(p, -1, -1, side, c));
        kv_codec_free(c);
        must(kv_rng_normal(5, side, 0, D, mean));
        if (ch->mean) must(kv_plan_mean(p, -1, 1, side, mean));
    }
    if (ch->page_rope) must(kv_plan_page_rope(p, -1, -1, 1));
    return p;
}

/* n tokens at the cache's end, drawn by position; out: the last layer's result, [n][HEADS][D]. */
static void feed(kv_cache *c, int n, float *out)
{
    static float q[64 * HEADS * D], k[64 * KV_HEADS * D], v[64 * KV_HEADS * D];
    const int at = kv_cache_n_tokens(c);
    for (int l = 0; l < LAYERS; l++) {
        must(kv_rng_normal(9, 10 * l, (double)at * HEADS * D, n * HEADS * D, q));
        must(kv_rng_normal(9, 10 * l + 1, (double)at * KV_HEADS * D, n * KV_HEADS * D, k));
        must(kv_rng_normal(9, 10 * l + 2, (double)at * KV_HEADS * D, n * KV_HEADS * D, v));
        must(kv_cache_attend(c, l, n, q, k, v, 0.125f, 0, out));
    }
    must(kv_cache_commit(c, n));
}

static void save(const kv_cache *c, int stage)
{
    static int32_t tokens[4096];
    kv_pack_writer *w = NULL;
    const kv_cache_extras x = { model, wheel, "{\"about\":\"a test\"}", tokens, NULL, 0 };
    must(kv_pack_create(&w, path));
    CHECK(kv_cache_save(c, w, &x, stage, KV_LEVEL_DEFAULT) == KV_OK && kv_pack_finish(w) == KV_OK, "%s", kv_last_error());
    kv_pack_abandon(w);
}

static int load(kv_cache **c, int max_tokens, int salvage)
{
    kv_pack *p = NULL;
    int n_logits;
    *c = NULL;
    int status = kv_pack_open(&p, path);
    if (status == KV_OK) status = kv_cache_load(c, &geo, p, &(kv_cache_extras){ .model = model, .rope = wheel }, max_tokens, salvage, &n_logits);
    kv_pack_free(p);
    return status;
}

static int same_pages(const kv_cache *a, const kv_cache *b)
{
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < 2 * KV_HEADS; i++) {
            const kv_store *x = kv_cache_store(a, l, i / 2, i % 2), *y = kv_cache_store(b, l, i / 2, i % 2);
            const size_t n = kv_plan_slot(a->plan, l, i / 2, i % 2)->codec->page_bytes;
            if (x->n_encoded != y->n_encoded || x->first_page != y->first_page || !x->sink != !y->sink) return 0;
            for (int g = x->first_page; g * PAGE < x->n_encoded; g++) if (memcmp(x->page[g], y->page[g], n)) return 0;
        }
    return 1;
}

static void check_goes_on(const choice *ch, int which)
{
    static float x[64 * HEADS * D], y[64 * HEADS * D];
    static const int lengths[] = { 0, 1, 3, 12, 40, 93 }, stages[] = { KV_STAGE_RAW, KV_STAGE_SMALLEST, KV_STAGE_RANS };
    for (int i = 0; i < 6; i++) {
        kv_plan *plan = make_plan(ch);
        kv_cache *a, *b, *roomy;
        must(kv_cache_new(&a, &geo, plan, 160));
        kv_plan_free(plan);
        for (int left = lengths[i]; left > 0; left -= 31) feed(a, left < 31 ? left : 31, x);
        if (i == 5 && !ch->window) must(kv_cache_truncate(a, 80));
        save(a, stages[i % 3]);
        CHECK(load(&b, 0, 0) == KV_OK && load(&roomy, 400, 0) == KV_OK, "choice %d, %d tokens: %s", which, lengths[i], kv_last_error());
        CHECK(kv_cache_n_tokens(b) == kv_cache_n_tokens(a) && kv_cache_max_tokens(b) == 160 && same_pages(a, b), "choice %d, %d tokens: other pages", which, lengths[i]);
        kv_bytes ba, bb;
        kv_cache_bytes(a, -1, -1, &ba);
        kv_cache_bytes(b, -1, -1, &bb);
        CHECK(ba.codes == bb.codes && ba.exact == bb.exact && ba.scales == bb.scales, "choice %d, %d tokens: %.0f bytes, loaded %.0f", which, lengths[i], ba.total, bb.total);
        for (int step = 0; step < 24; step++) {
            const int n = step == 10 ? 17 : 1;
            feed(a, n, x);
            feed(b, n, y);
            CHECK(memcmp(x, y, sizeof(float) * (size_t)n * HEADS * D) == 0, "choice %d, %d tokens, step %d: another result", which, lengths[i], step);
            feed(roomy, n, y);
            CHECK(memcmp(x, y, sizeof(float) * (size_t)n * HEADS * D) == 0, "choice %d, %d tokens, step %d: another result with more room", which, lengths[i], step);
        }
        CHECK(same_pages(a, b), "choice %d, %d tokens: other pages after going on", which, lengths[i]);
        kv_cache_free(a);
        kv_cache_free(b);
        kv_cache_free(roomy);
    }
}

static void check_refusals(void)
{
    static float x[64 * HEADS * D];
    kv_plan *plan = make_plan(&choices[0]);
    kv_cache *a, *b;
    must(kv_cache_new(&a, &geo, plan, 160));
    kv_plan_free(plan);
    feed(a, 60, x);
    save(a, KV_STAGE_RAW);
    CHECK(load(&b, 59, 0) == KV_E_ARG && strstr(kv_last_error(), "max_tokens=59, but it holds 60 tokens"), "%s", kv_last_error());
    model[0] = 'f';
    CHECK(load(&b, 0, 0) == KV_E_ARG && strstr(kv_last_error(), "model 0000000000000000, this model is f000000000000000"), "%s", kv_last_error());
    model[0] = '0';

    /* The third coded page of layer 0, head 0's keys: position 4 + 2 * 16 on. */
    kv_pack *p = NULL;
    must(kv_pack_open(&p, path));
    const int part = kv_pack_find(p, "cache.k", 0);
    const uint8_t *base = kv_pack_map(p, 0, 0), *page = kv_pack_map(p, part, 2 + 2);
    const long offset = (long)(page - base) + PACK_ALIGN * (long)((64 + 18 + PACK_ALIGN - 1) / PACK_ALIGN);       /* section 0: header, text of 18 bytes, page 0 */
    kv_pack_free(p);
    FILE *f = fopen(path, "r+b");
    fseek(f, offset + 5, SEEK_SET);
    const int byte = fgetc(f);
    fseek(f, offset + 5, SEEK_SET);
    fputc(byte ^ 1, f);
    fclose(f);
    CHECK(load(&b, 0, 0) == KV_E_CORRUPT && strstr(kv_last_error(), "page 4 of section") && strstr(kv_last_error(), "('cache.k') is damaged"), "%s", kv_last_error());
    CHECK(load(&b, 0, 1) == KV_OK && kv_cache_n_tokens(b) == 36, "salvaged %d tokens: %s", b ? kv_cache_n_tokens(b) : -1, kv_last_error());
    float rows[36 * D], want[36 * D];
    CHECK(b && kv_cache_read(b, 1, 1, 1, 0, 36, rows) == KV_OK && kv_cache_read(a, 1, 1, 1, 0, 36, want) == KV_OK && memcmp(rows, want, sizeof rows) == 0, "salvaged rows differ");
    kv_cache_free(b);
    kv_cache_free(a);
}

/* Every number of the counts, layers and slots replaced by hostile ones, checksums made right: refused, or a cache that works. */
static void check_forged(void)
{
    static const int32_t forged[] = { -1, 0, 1, 7, 16, 1 << 20, INT32_MAX, INT32_MIN };
    static float x[64 * HEADS * D];
    kv_plan *plan = make_plan(&choices[2]);
    kv_cache *a, *b;
    must(kv_cache_new(&a, &geo, plan, 160));
    kv_plan_free(plan);
    feed(a, 60, x);
    save(a, KV_STAGE_RAW);
    kv_cache_free(a);
    FILE *f = fopen(path, "rb");
    static uint8_t file[1 << 20];
    const size_t n = fread(file, 1, sizeof file, f);
    fclose(f);
    uint8_t *entry = file + kv_load_u64(file + 16), *table = file + kv_load_u64(entry + 48);
    int refused = 0, taken = 0;
    for (int page = 0; page < 3; page++) {
        uint8_t *data = file + kv_load_u64(table + page * PACK_PAGE);
        const size_t size = page == 0 ? 48 : kv_load_u32(table + page * PACK_PAGE + 8);
        for (size_t at = 0; at < size; at += 4)
            for (size_t k = 0; k < sizeof forged / sizeof *forged; k++) {
                uint8_t was[4];
                memcpy(was, data + at, 4);
                memcpy(data + at, &forged[k], 4);
                kv_put_u32(table + page * PACK_PAGE + 16, kv_crc32c(0, data, kv_load_u32(table + page * PACK_PAGE + 8)));
                kv_put_u32(entry + 68, kv_crc32c(0, table, 6 * PACK_PAGE));
                kv_put_u32(file + 32, kv_crc32c(0, entry, kv_load_u32(file + 12) * (size_t)PACK_ENTRY));
                kv_put_u32(file + 60, kv_crc32c(0, file, 60));
                kv_pack *p = NULL;
                int n_logits;
                must(kv_pack_parse(&p, file, n, "forged"));
                if (kv_cache_load(&b, &geo, p, &(kv_cache_extras){ .model = model, .rope = wheel }, 0, (int)(k & 1), &n_logits) < 0) refused++;
                else {
                    taken++;
                    if (kv_cache_max_tokens(b) - kv_cache_n_tokens(b) >= 18) {
                        feed(b, 1, x);
                        feed(b, 17, x);
                    }
                    kv_cache_free(b);
                }
                kv_pack_free(p);
                memcpy(data + at, was, 4);
                kv_put_u32(table + page * PACK_PAGE + 16, kv_crc32c(0, data, kv_load_u32(table + page * PACK_PAGE + 8)));
            }
    }
    printf("forged: %d refused, %d taken and fed\n", refused, taken);
    CHECK(refused > 0 && taken > 0, "%d refused, %d taken", refused, taken);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/kelvin-test-cache-%ld.kv", tmp ? tmp : "/tmp", (long)getpid());
    memset(model, '0', 64);
    memset(wheel, '0', 64);
    for (int i = 0; i < D / 2; i++) freq[i] = pow(10000.0, -2.0 * i / D);
    for (int l = 0; l < LAYERS; l++) rope[l] = (kv_rope){ .n_rot = D, .freq = freq };
    for (int i = 0; i < N_CHOICES; i++) check_goes_on(&choices[i], i);
    check_refusals();
    check_forged();
    unlink(path);
    return check_end();
}
