/* Containers: what is written is read, in every stage; damage is named by page and leaves the rest; versions are refused. */
#include <fcntl.h>
#include <sys/stat.h>
#include "check.h"
#include "container_impl.h"
#include "rng.h"

static char path[256];
static const uint32_t SEED = 20261122;

enum { N_PAGES = 9, PAGE = 2176 };
static const int stages[] = { KV_STAGE_RAW, KV_STAGE_ZLIB, KV_STAGE_LZMA, KV_STAGE_RANS, KV_STAGE_SMALLEST };
enum { N_STAGES = 5 };

/* Pages of skewed bytes, of noise, of zeros; the last is short and one is empty. */
static size_t make_page(int stage, int i, uint8_t *x)
{
    const size_t n = i == 5 ? 0 : i == N_PAGES - 1 ? 100 : PAGE;
    for (size_t k = 0; k < n; k++) {
        uint32_t u[4];
        kv_rng_u32(SEED, (uint32_t)stage, (uint32_t)i, (uint32_t)k, u);
        x[k] = (uint8_t)(i == 2 ? u[0] : i == 3 ? 0 : __builtin_popcount(u[0] & 0xffff));
    }
    return n;
}

static uint8_t *slurp(size_t *n)
{
    FILE *f = fopen(path, "rb");
    struct stat st;
    CHECK(f && fstat(fileno(f), &st) == 0, "%s is not there", path);
    uint8_t *x = kv_alloc(*n = (size_t)st.st_size);
    CHECK(fread(x, 1, *n, f) == *n, "%s cannot be read", path);
    fclose(f);
    return x;
}

static void write_file(void)
{
    kv_pack_writer *w = NULL;
    uint8_t x[PAGE];
    unlink(path);
    CHECK(kv_pack_create(&w, path) == KV_OK, "%s", kv_last_error());
    for (int s = 0; s < N_STAGES; s++) {
        char meta[64];
        const int n = snprintf(meta, sizeof meta, "{\"stage\":\"%s\"}", kv_stage_name(stages[s]));
        CHECK(kv_pack_section(w, s % 2 ? "odd" : "even", 1 + s, s == 4 ? KV_PACK_OPTIONAL : 0, meta, (size_t)n, stages[s], KV_LEVEL_DEFAULT) == KV_OK, "%s", kv_last_error());
        for (int i = 0; i < N_PAGES; i++) {
            const size_t size = make_page(s, i, x);
            CHECK(kv_pack_page(w, x, size) == KV_OK, "%s", kv_last_error());
        }
    }
    CHECK(kv_pack_section(w, "empty", 1, 0, NULL, 0, KV_STAGE_RANS, KV_LEVEL_DEFAULT) == KV_OK, "%s", kv_last_error());
    CHECK(access(path, F_OK) != 0, "the file is there before it is whole");
    CHECK(kv_pack_finish(w) == KV_OK, "%s", kv_last_error());
    kv_pack_abandon(w);
}

static void check_round_trip(void)
{
    kv_pack *p = NULL;
    uint8_t x[PAGE], y[PAGE + 1];
    write_file();
    CHECK(kv_pack_open(&p, path) == KV_OK, "%s", kv_last_error());
    CHECK(kv_pack_n_parts(p) == N_STAGES + 1, "%d sections", kv_pack_n_parts(p));
    CHECK(kv_pack_find(p, "odd", 0) == 1 && kv_pack_find(p, "odd", 2) == 3 && kv_pack_find(p, "odd", 4) == -1, "find");
    size_t best = SIZE_MAX;
    for (int s = 0; s < N_STAGES; s++) {
        const kv_pack_part *part = kv_pack_at(p, s);
        CHECK(part->version == 1 + s && part->n_pages == N_PAGES && strstr(part->meta, kv_stage_name(stages[s])), "section %d: version %d, %d pages, %s", s, part->version, part->n_pages, part->meta);
        for (int i = 0; i < N_PAGES; i++) {
            const size_t n = make_page(s, i, x);
            CHECK(kv_pack_page_bytes(p, s, i) == n, "section %d page %d: %zu bytes", s, i, kv_pack_page_bytes(p, s, i));
            CHECK(kv_pack_read(p, s, i, y, n) == KV_OK && memcmp(x, y, n) == 0, "section %d page %d: %s", s, i, kv_last_error());
            CHECK(kv_pack_read(p, s, i, y, n + 1) == KV_E_CORRUPT, "section %d page %d: read with a wrong length", s, i);
            CHECK(kv_pack_check(p, s, i) == KV_OK, "%s", kv_last_error());
            const uint8_t *m = kv_pack_map(p, s, i);
            if (s == 0 && n) CHECK(m && (uintptr_t)m % 64 == 0 && memcmp(m, x, n) == 0, "page %d is not mapped", i);
        }
        printf("container: %-8s %zu bytes stored of %zu\n", kv_stage_name(stages[s]), part->stored_bytes, part->raw_bytes);
        CHECK((s == 0) == (part->stored_bytes == part->raw_bytes), "stage %d stored %zu", s, part->stored_bytes);
        if (s == 4) CHECK(part->stored_bytes <= best, "smallest took %zu, another stage %zu", part->stored_bytes, best);
        best = part->stored_bytes < best ? part->stored_bytes : best;
    }
    CHECK(kv_pack_read(p, 0, N_PAGES, y, 0) == KV_E_ARG && kv_pack_read(p, 99, 0, y, 0) == KV_E_ARG && kv_pack_check(p, -1, 0) == KV_E_ARG, "a page that is not there was read");
    kv_pack_free(p);
    size_t n, m;
    uint8_t *a = slurp(&n);
    write_file();
    uint8_t *b = slurp(&m);
    CHECK(n == m && memcmp(a, b, n) == 0, "the same pages make other bytes");
    kv_free(a);
    kv_free(b);
}

/* One byte of each page flipped: that page is named, all others read; elsewhere: refused, or nothing but padding was hit. */
static void check_damage(void)
{
    size_t n;
    uint8_t *x = slurp(&n), y[PAGE];
    kv_pack *p = NULL;
    char want[64];
    CHECK(kv_pack_parse(&p, x, n, "mem") == KV_OK, "%s", kv_last_error());
    for (int s = 0; s < N_STAGES; s++)
        for (int i = 0; i < N_PAGES; i++) {
            if (i == 5) continue;
            const uint8_t *t = kv_load_u64(x + 16) + x + (size_t)s * PACK_ENTRY;       /* the directory's entry, then the page's */
            t = x + kv_load_u64(t + 48) + (size_t)i * PACK_PAGE;
            uint8_t *byte = x + kv_load_u64(t) + kv_load_u32(t + 8) / 2;
            *byte ^= 0x10;
            for (int j = 0; j < N_PAGES; j++) {
                const int status = kv_pack_check(p, s, j);
                snprintf(want, sizeof want, "file 'mem': page %d of section %d (", i, s);
                CHECK(j == i ? status == KV_E_CORRUPT && strstr(kv_last_error(), want) : status == KV_OK, "section %d: page %d damaged, page %d: %d %s", s, i, j, status, kv_last_error());
            }
            *byte ^= 0x10;
        }
    kv_pack_free(p);
    int refused = 0, tried = 0;
    for (size_t at = 0; at < n; at += at < PACK_HEADER ? 1 : 7, tried++) {
        x[at] ^= 0x81;
        if (kv_pack_parse(&p, x, n, "mem") < 0) {
            refused++;
            CHECK(!p && strncmp(kv_last_error(), "file 'mem'", 10) == 0 && !strchr(kv_last_error(), '\n'), "%s", kv_last_error());
        } else CHECK(at >= PACK_HEADER, "byte %zu of the header flipped and taken", at);
        for (int s = 0; p && s < kv_pack_n_parts(p); s++)
            for (int i = 0; i < kv_pack_at(p, s)->n_pages; i++)
                if (kv_pack_page_bytes(p, s, i) <= PAGE) kv_pack_read(p, s, i, y, kv_pack_page_bytes(p, s, i));
        kv_pack_free(p);
        x[at] ^= 0x81;
    }
    printf("container: %d of %d flipped bytes refused at opening, the rest are pages and padding\n", refused, tried);
    for (size_t cut = 0; cut < n; cut += 97) CHECK(kv_pack_parse(&p, x, cut, "mem") == KV_E_CORRUPT, "cut to %zu bytes and taken", cut);
    kv_free(x);
}

static void check_refusals(void)
{
    static const kv_pack_kind known[] = { { "even", 3 }, { "odd", 4 }, { "empty", 1 } }, old[] = { { "even", 3 }, { "odd", 3 }, { "empty", 1 } };
    size_t n;
    uint8_t *x = slurp(&n);
    kv_pack *p = NULL;
    CHECK(kv_pack_parse(&p, x, n, "mem") == KV_OK, "%s", kv_last_error());
    CHECK(kv_pack_known(p, known, 3) == KV_OK, "%s", kv_last_error());          /* "even" of version 5 may be passed over */
    CHECK(kv_pack_known(p, old, 3) == KV_E_UNSUPPORTED && strstr(kv_last_error(), "section 3 ('odd') has version 4, this library reads up to 3"), "%s", kv_last_error());
    CHECK(kv_pack_known(p, known, 2) == KV_E_UNSUPPORTED && strstr(kv_last_error(), "section 5 is of kind 'empty'"), "%s", kv_last_error());
    kv_pack_free(p);
    kv_put_u32(x + 8, 2);
    kv_put_u32(x + 60, kv_crc32c(0, x, 60));
    CHECK(kv_pack_parse(&p, x, n, "mem") == KV_E_UNSUPPORTED && strstr(kv_last_error(), "container version 2, this library reads up to 1"), "%s", kv_last_error());
    kv_free(x);
    kv_pack_writer *w = NULL;
    CHECK(kv_pack_open(&p, "/no/such/file") == KV_E_IO && kv_pack_open(&p, "/") == KV_E_CORRUPT, "%s", kv_last_error());
    CHECK(kv_pack_create(&w, "/no/such/folder/x") == KV_E_IO && !w, "%s", kv_last_error());
    CHECK(kv_pack_create(&w, path) == KV_OK && kv_pack_page(w, "x", 1) == KV_E_ARG, "a page outside a section");
    CHECK(kv_pack_section(w, "a name that is longer than it may be", 1, 0, NULL, 0, 0, -1) == KV_E_ARG, "a long name");
    CHECK(kv_pack_section(w, "x", 1, 0, NULL, 0, KV_STAGE_LZMA, 12) == KV_E_ARG, "level 12");
    kv_pack_abandon(w);
    char part[300];
    snprintf(part, sizeof part, "%s.part", path);
    CHECK(access(part, F_OK) != 0, "an abandoned file is still there");
}

/* A block whose tokens are all coded keeps no exact rows: their page has no bytes, and can still have a wrong checksum. */
static void check_empty_page(void)
{
    enum { T = 64, D = 32 };
    static float rows[T * D];
    const kv_tensor t = { .data = rows, .dtype = KV_F32, .ndim = 3, .shape = { 1, T, D }, .stride = { T * D, D, 1 } };
    kv_codec *c = NULL;
    kv_block *b = NULL, *loaded = NULL;
    kv_pack *p = NULL;
    size_t n;
    CHECK(kv_codec_new(&c, "int", "", D, T, KV_SIDE_K) == KV_OK && kv_block_encode(&b, c, &t) == KV_OK && kv_block_save(b, path, "{}", "raw", -1) == KV_OK, "%s", kv_last_error());
    uint8_t *x = slurp(&n), *e = x + kv_load_u64(x + 16) + 2 * PACK_ENTRY, *table = x + kv_load_u64(e + 48);
    CHECK(kv_load_u32(x + 12) == 3 && kv_load_u32(e + 56) == 2 && kv_load_u32(table + PACK_PAGE + 12) == 0, "block.pages: a page of codes, a page of nothing");
    kv_put_u32(table + PACK_PAGE + 16, 1);
    kv_put_u32(e + 68, kv_crc32c(0, table, 2 * PACK_PAGE));
    kv_put_u32(x + 32, kv_crc32c(0, x + kv_load_u64(x + 16), 3 * PACK_ENTRY));
    kv_put_u32(x + 60, kv_crc32c(0, x, 60));
    CHECK(kv_pack_parse(&p, x, n, "mem") == KV_OK, "%s", kv_last_error());
    CHECK(kv_block_load(&loaded, p, 0) == KV_E_CORRUPT && strstr(kv_last_error(), "page 1 of section 2 ('block.pages') is damaged"), "%s", kv_last_error());
    CHECK(kv_block_load(&loaded, p, 1) == KV_OK, "%s", kv_last_error());
    kv_block_free(loaded);
    kv_block_free(b);
    kv_codec_free(c);
    kv_pack_free(p);
    kv_free(x);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/kelvin-test-%ld.kv", tmp ? tmp : "/tmp", (long)getpid());
    printf("test_container: seed %u\n", SEED);
    check_round_trip();
    check_damage();
    check_refusals();
    check_empty_page();
    unlink(path);
    return check_end();
}
