/* test_gguf.c -- a good file is read in full; each kind of broken file is refused in one line that names the thing. */
#include <string.h>
#include "check.h"
#include "model.h"

/* ---- a writer of little files */

typedef struct { uint8_t b[4096]; size_t n; } bytes;
static void put(bytes *o, const void *p, size_t n) { memcpy(o->b + o->n, p, n); o->n += n; }
static void put32(bytes *o, uint32_t v) { put(o, &v, 4); }
static void put64(bytes *o, uint64_t v) { put(o, &v, 8); }
static void put_str(bytes *o, const char *s) { put64(o, strlen(s)); put(o, s, strlen(s)); }
static void head(bytes *o, uint32_t version, uint64_t n_tensors, uint64_t n_keys) { o->n = 0; put(o, "GGUF", 4); put32(o, version); put64(o, n_tensors); put64(o, n_keys); }
static void key_u32(bytes *o, const char *key, uint32_t v) { put_str(o, key); put32(o, KV_GGUF_U32); put32(o, v); }
static void tensor(bytes *o, const char *name, int n_dims, const uint64_t *dim, uint32_t type, uint64_t offset)
{
    put_str(o, name);
    put32(o, (uint32_t)n_dims);
    for (int d = 0; d < n_dims; d++) put64(o, dim[d]);
    put32(o, type);
    put64(o, offset);
}
static void data(bytes *o, size_t n) { while (o->n % 32) o->b[o->n++] = 0; while (n--) o->b[o->n++] = 1; }

/* The bytes in memory of exactly their size, so that a sanitizer sees every read past the end. */
static int parse(const bytes *o, kv_gguf **g, uint8_t **copy)
{
    *copy = kv_alloc(o->n);
    memcpy(*copy, o->b, o->n);
    return kv_gguf_parse(g, *copy, o->n, "t");
}

static void refused(const bytes *o, int status, const char *says)
{
    kv_gguf *g;
    uint8_t *copy;
    const int got = parse(o, &g, &copy);
    CHECK(got == status && !g, "%s instead of %s for '%s'", kv_status_name(got), kv_status_name(status), says);
    CHECK(got >= 0 || (strstr(kv_last_error(), says) && strstr(kv_last_error(), "'t'") && !strchr(kv_last_error(), '\n')), "'%s' does not say '%s'", kv_last_error(), says);
    kv_gguf_close(g);
    kv_free(copy);
}

static void good_file(bytes *o, uint32_t version)
{
    head(o, version, 2, 6);
    key_u32(o, "n", 7);
    put_str(o, "f");   put32(o, KV_GGUF_F32); put32(o, kv_f32_bits(-1.5f));
    put_str(o, "yes"); put32(o, KV_GGUF_BOOL); put(o, "\1", 1);
    put_str(o, "s");   put32(o, KV_GGUF_STR); put_str(o, "a\nb");
    put_str(o, "list"); put32(o, KV_GGUF_ARR); put32(o, KV_GGUF_I32); put64(o, 10);
    for (int i = 0; i < 10; i++) put32(o, (uint32_t)-i);
    put_str(o, "words"); put32(o, KV_GGUF_ARR); put32(o, KV_GGUF_STR); put64(o, 2); put_str(o, "one"); put_str(o, "");
    tensor(o, "b", 2, (const uint64_t[]){ 32, 2 }, KV_W_Q8_0, 32);
    tensor(o, "a", 1, (const uint64_t[]){ 8 }, KV_W_F32, 0);
    data(o, 32 + 68);
}

static void reads_a_good_file(uint32_t version)
{
    bytes o;
    kv_gguf *g;
    uint8_t *copy, *cut;
    good_file(&o, version);
    CHECK(parse(&o, &g, &copy) == KV_OK, "%s", kv_last_error());
    double v = 0;
    const char *s = NULL, **list = NULL;
    size_t n = 0;
    int type = -1;
    uint32_t *len = NULL;
    CHECK(kv_gguf_n_keys(g) == 6 && kv_gguf_n_tensors(g) == 2 && kv_gguf_file_bytes(g) == o.n, "counts");
    CHECK(kv_gguf_number(g, "n", &v) && v == 7 && kv_gguf_number(g, "f", &v) && v == -1.5 && kv_gguf_number(g, "yes", &v) && v == 1, "numbers");
    v = 3;
    CHECK(!kv_gguf_number(g, "none", &v) && !kv_gguf_number(g, "s", &v) && v == 3, "what is absent or text is not a number");
    CHECK(kv_gguf_string(g, "s", &s, &n) && n == 3 && memcmp(s, "a\nb", 3) == 0 && !kv_gguf_string(g, "n", &s, &n), "string");
    CHECK(kv_gguf_array(g, "list", &type, &n) && type == KV_GGUF_I32 && n == 10 && kv_gguf_array_number(g, "list", 9, &v) && v == -9 && !kv_gguf_array_number(g, "list", 10, &v), "array");
    CHECK(kv_gguf_array_strings(g, "words", &list, &len, &n) == 1 && n == 2 && len[0] == 3 && memcmp(list[0], "one", 3) == 0 && len[1] == 0, "array of strings");
    CHECK(strcmp(kv_gguf_value_text(g, 3), "a\\nb") == 0 && strcmp(kv_gguf_value_text(g, 4), "i32 x 10: [0, -1, -2, -3, -4, -5, -6, -7, ...]") == 0, "texts: %s, %s", kv_gguf_value_text(g, 3), kv_gguf_value_text(g, 4));
    const kv_gguf_tensor *const b = kv_gguf_find(g, "b");
    CHECK(b && b == kv_gguf_tensor_at(g, 0) && b->n_bytes == 68 && b->n_dims == 2 && b->dim[1] == 2 && b->dim[2] == 1 && b->data == copy + o.n - 68 && !kv_gguf_find(g, "c"), "tensors");
    kv_free(list);
    kv_free(len);
    kv_gguf_close(g);
    kv_free(copy);
    for (size_t keep = 0; keep < o.n; keep++) {               /* cut anywhere, it is refused */
        cut = kv_alloc(keep);
        memcpy(cut, o.b, keep);
        const int status = kv_gguf_parse(&g, cut, keep, "t");
        CHECK(status == KV_E_CORRUPT, "cut at %zu of %zu: %s", keep, o.n, kv_status_name(status));
        kv_gguf_close(g);
        kv_free(cut);
    }
}

static void survives_every_flipped_bit(void)
{
    bytes o;
    good_file(&o, 3);
    for (size_t bit = 0; bit < 8 * o.n; bit++) {
        kv_gguf *g;
        uint8_t *copy;
        o.b[bit / 8] ^= (uint8_t)(1 << bit % 8);
        const int status = parse(&o, &g, &copy);
        CHECK(status == KV_OK || status == KV_E_CORRUPT || status == KV_E_UNSUPPORTED, "bit %zu: %s", bit, kv_last_error());
        kv_gguf_close(g);
        kv_free(copy);
        o.b[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
}

static void refuses_hostile_files(void)
{
    bytes o = { .n = 0 };
    refused(&o, KV_E_CORRUPT, "GGUF");
    head(&o, 3, 0, 0); o.b[0] = 'X';              refused(&o, KV_E_CORRUPT, "GGUF");
    head(&o, 1, 0, 0);                            refused(&o, KV_E_UNSUPPORTED, "version 1");
    head(&o, 4, 0, 0);                            refused(&o, KV_E_CORRUPT, "version 4");
    head(&o, 0x03000000, 0, 0);                   refused(&o, KV_E_UNSUPPORTED, "big-endian");
    head(&o, 3, 0, UINT64_MAX);                   refused(&o, KV_E_CORRUPT, "18446744073709551615 keys");
    head(&o, 3, UINT64_MAX / 8, 0);               refused(&o, KV_E_CORRUPT, "tensors");
    head(&o, 3, 0, 1); put64(&o, UINT64_MAX); put(&o, "abcdefgh", 8);                         refused(&o, KV_E_CORRUPT, "key");
    head(&o, 3, 0, 1); put_str(&o, ""); put32(&o, 0); put64(&o, 0);                           refused(&o, KV_E_CORRUPT, "key of 0 bytes");
    head(&o, 3, 0, 1); put_str(&o, "k"); put32(&o, 13); put64(&o, 0);                         refused(&o, KV_E_CORRUPT, "type 13");
    head(&o, 3, 0, 1); put_str(&o, "k"); put32(&o, KV_GGUF_STR); put64(&o, UINT64_MAX - 3);   refused(&o, KV_E_CORRUPT, "'t': k");
    head(&o, 3, 0, 1); put_str(&o, "k\nk"); put32(&o, KV_GGUF_U64); put32(&o, 1);              refused(&o, KV_E_CORRUPT, "k?k");     /* found by fuzzing */
    head(&o, 3, 0, 1); put_str(&o, "k"); put32(&o, KV_GGUF_ARR); put32(&o, KV_GGUF_ARR); put64(&o, 1); put64(&o, 0);   refused(&o, KV_E_CORRUPT, "array of type 9");
    head(&o, 3, 0, 1); put_str(&o, "k"); put32(&o, KV_GGUF_ARR); put32(&o, KV_GGUF_F64); put64(&o, (uint64_t)1 << 61); refused(&o, KV_E_CORRUPT, "array of 2305843009213693952");
    head(&o, 3, 0, 2); key_u32(&o, "twice", 1); key_u32(&o, "twice", 2);                      refused(&o, KV_E_CORRUPT, "'twice' is there twice");
    for (int i = 0; i < 4; i++) {
        const uint32_t align[] = { 0, 3, 4, 1u << 21 };
        head(&o, 3, 0, 1); key_u32(&o, "general.alignment", align[i]);                        refused(&o, KV_E_CORRUPT, "general.alignment");
    }
    const uint64_t d8[] = { 8, 1, 1, 1, 1 }, zero[] = { 0 }, huge[] = { (uint64_t)1 << 32, (uint64_t)1 << 32 }, big[] = { INT64_MAX }, d33[] = { 33 };
    head(&o, 3, 1, 0); tensor(&o, "x", 0, d8, 0, 0); data(&o, 32);                            refused(&o, KV_E_CORRUPT, "has 0 dims");
    head(&o, 3, 1, 0); tensor(&o, "x", 5, d8, 0, 0); data(&o, 32);                            refused(&o, KV_E_CORRUPT, "has 5 dims");
    head(&o, 3, 1, 0); tensor(&o, "x", 1, zero, 0, 0); data(&o, 32);                          refused(&o, KV_E_CORRUPT, "dim 0 = 0");
    head(&o, 3, 1, 0); tensor(&o, "x", 2, huge, 0, 0); data(&o, 32);                          refused(&o, KV_E_CORRUPT, "more than 2^63-1");
    head(&o, 3, 1, 0); tensor(&o, "x", 1, big, 0, 0); data(&o, 32);                           refused(&o, KV_E_CORRUPT, "more bytes than");
    head(&o, 3, 1, 0); tensor(&o, "x", 1, d33, KV_W_Q8_0, 0); data(&o, 68);                   refused(&o, KV_E_CORRUPT, "multiple of 32");
    head(&o, 3, 1, 0); tensor(&o, "x", 1, d8, 0, 8); data(&o, 64);                            refused(&o, KV_E_CORRUPT, "not a multiple of the alignment");
    head(&o, 3, 1, 0); tensor(&o, "x", 1, d8, 0, UINT64_MAX - 31); data(&o, 32);              refused(&o, KV_E_CORRUPT, "offset 18446744073709551584");
    head(&o, 3, 2, 0); tensor(&o, "x", 1, d8, 0, 0); tensor(&o, "x", 1, d8, 0, 32); data(&o, 64); refused(&o, KV_E_CORRUPT, "'x' is there twice");
    head(&o, 3, 2, 0); tensor(&o, "x", 1, d8, 0, 0); tensor(&o, "y", 1, d8, 0, 0); data(&o, 64);  refused(&o, KV_E_CORRUPT, "overlap");
    head(&o, 3, 1, 0); tensor(&o, "bad\n\1name", 0, d8, 0, 0); data(&o, 32);                  refused(&o, KV_E_CORRUPT, "bad??name");
}

int main(void)
{
    kv_gguf *g;
    reads_a_good_file(2);
    reads_a_good_file(3);
    survives_every_flipped_bit();
    refuses_hostile_files();
    CHECK(kv_gguf_open(&g, "/nonexistent/x.gguf") == KV_E_IO && strstr(kv_last_error(), "/nonexistent/x.gguf"), "%s", kv_last_error());
    CHECK(kv_gguf_open(&g, "/") == KV_E_IO && strstr(kv_last_error(), "regular"), "%s", kv_last_error());
    bytes o;
    uint8_t *copy;
    head(&o, 3, 1, 0);
    tensor(&o, "x", 1, (const uint64_t[]){ 8 }, 77, 0);       /* an unknown type is refused by whoever uses it */
    data(&o, 32);
    CHECK(parse(&o, &g, &copy) == KV_OK && kv_gguf_find(g, "x")->n_bytes == 0, "%s", kv_last_error());
    kv_gguf_close(g);
    kv_free(copy);
    return check_end();
}
