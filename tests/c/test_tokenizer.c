/* test_tokenizer.c -- text to ids and back, chat turns, hostile vocabularies.
 *
 * Vectors of two models are here; they are checked when the model file is present (KELVIN_MODELS or the cache folder).
 * KELVIN_DATA names a folder with tokenizers/ (llama.cpp's ggml-vocab-*.gguf, .inp, .out), reference/ and text/: each
 * vocabulary found there is checked too. */
#include <string.h>
#include <time.h>
#include "check.h"
#include "tokenizer.h"

typedef struct vector { const char *text; int n; int32_t id[40]; } vector;
/* Made with llama.cpp (llama-cpp-python 0.3.36): llama_tokenize(vocab, text, len, ids, max, add_special = true, parse_special = true). */
static const vector smollm2[] = {
    { "The capital of France is", 5, { 504, 3575, 282, 4649, 314 } },
    { " Hello,  world!\n\n", 6, { 38699, 28, 216, 905, 17, 1116 } },
    { "I'm 42 years old; it's 3.14159 and 1,000,000.", 30, { 57, 5248, 216, 36, 34, 929, 1573, 43, 357, 506, 216, 35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 28, 32, 32, 32, 28, 32, 32, 32, 30 } },
    { "def f(x):\n    return x**2  # square\n", 14, { 1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 5222, 198 } },
    { "Ünïcödé naïve café — “quotes”…", 17, { 142, 246, 94, 25972, 83, 7466, 84, 2756, 15486, 46494, 37366, 1841, 619, 385, 2346, 573, 2829 } },
    { "東京 2026 한국어 нещо עברית", 28, { 30679, 126, 16736, 122, 216, 34, 32, 34, 38, 216, 33085, 246, 181, 130, 251, 183, 240, 129, 28050, 6643, 46438, 6485, 12960, 112, 37657, 30825, 28532, 120 } },
    { "🚀🎉 😶\xe2\x80\x8d" "🌫\xef\xb8\x8f" " emoji", 16, { 10813, 244, 218, 10813, 232, 227, 40303, 131, 321, 231, 10813, 230, 121, 31752, 649, 33777 } },
    { "<|im_start|>user\nHi<|im_end|>\n<bos><end_of_turn>", 15, { 1, 4093, 198, 26843, 2, 198, 44, 34761, 21198, 486, 79, 1714, 79, 20589, 46 } },
    { "\t\ttabs\r\n   and   runs      of spaces", 12, { 197, 197, 100, 7366, 2738, 256, 284, 256, 7313, 4444, 282, 5600 } },
    { "x\xc2\xa0" "y\xe3\x80\x80" "z\xe1\xa0\x8e" "1½²①", 15, { 104, 15442, 105, 12109, 218, 106, 172, 250, 232, 33, 16738, 19133, 173, 235, 250 } },
};
static const vector gemma[] = {
    { "The capital of France is", 6, { 2, 818, 5279, 529, 7001, 563 } },
    { " Hello,  world!\n\n", 7, { 2, 26352, 236764, 138, 12392, 236888, 108 } },
    { "I'm 42 years old; it's 3.14159 and 1,000,000.", 33, { 2, 236777, 236789, 236757, 236743, 236812, 236778, 1518, 2255, 236793, 625, 236789, 236751, 236743, 236800, 236761, 236770, 236812, 236770, 236810, 236819, 532, 236743, 236770, 236764, 236771, 236771, 236771, 236764, 236771, 236771, 236771, 236761 } },
    { "def f(x):\n    return x**2  # square\n", 16, { 2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 1018, 236778, 138, 236865, 6281, 107 } },
    { "Ünïcödé naïve café — “quotes”…", 13, { 2, 238194, 236749, 238527, 236755, 55515, 236859, 120362, 33443, 2192, 999, 52231, 177580 } },
    { "東京 2026 한국어 нещо עברית", 13, { 2, 31414, 236743, 236778, 236771, 236778, 236825, 50413, 237430, 210119, 11173, 104154, 237270 } },
    { "🚀🎉 😶\xe2\x80\x8d" "🌫\xef\xb8\x8f" " emoji", 9, { 2, 242015, 242061, 236743, 247717, 237243, 248989, 238178, 64334 } },
    { "<|im_start|>user\nHi<|im_end|>\n<bos><end_of_turn>", 19, { 2, 236820, 236909, 548, 236779, 3041, 111038, 2364, 107, 10979, 236820, 236909, 548, 236779, 643, 111038, 107, 2, 106 } },
    { "\t\ttabs\r\n   and   runs      of spaces", 12, { 2, 255969, 39218, 251, 107, 139, 624, 139, 85817, 142, 1340, 9952 } },
    { "x\xc2\xa0" "y\xe3\x80\x80" "z\xe1\xa0\x8e" "1½²①", 16, { 2, 236781, 432, 398, 236762, 465, 366, 366, 236802, 463, 398, 380, 236770, 238612, 238131, 240366 } },
};

/* ---- files */

static char *slurp(const char *path, size_t *n)
{
    FILE *const f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    char *const buf = malloc(*n + 1);
    if (fread(buf, 1, *n, f) != *n) *n = 0;
    buf[*n] = '\0';
    fclose(f);
    return buf;
}

static bool open_model(kv_model *m, const char *path)
{
    *m = (kv_model){ 0 };
    FILE *const f = fopen(path, "rb");
    if (!f) return false;
    fclose(f);
    const bool ok = kv_gguf_open(&m->gguf, path) == KV_OK && kv_tokenizer_new(&m->tok, m->gguf) == KV_OK;
    CHECK(ok, "%s: %s", path, kv_last_error());
    return ok;
}

static bool find_model(kv_model *m, const char *name)
{
    char path[1024];
    const char *const models = getenv("KELVIN_MODELS"), *const cache = getenv("XDG_CACHE_HOME"), *const home = getenv("HOME");
    if (models) snprintf(path, sizeof path, "%s/%s.gguf", models, name);
    else if (cache) snprintf(path, sizeof path, "%s/kelvin/models/%s.gguf", cache, name);
    else snprintf(path, sizeof path, "%s/.cache/kelvin/models/%s.gguf", home ? home : "", name);
    const bool found = open_model(m, path);
    if (!found) SKIP("no model file %s.gguf in KELVIN_MODELS or the cache folder", name);
    return found;
}

static void close_model(kv_model *m)
{
    kv_tokenizer_free(m->tok);
    kv_gguf_close(m->gguf);
}

static void check_ids(const kv_model *m, const char *what, const char *text, size_t len, int add, int special, const int32_t *want, int n_want)
{
    int n = -1, counted = -1;
    const int cap = (int)(3 * len + 8);
    int32_t *const ids = malloc((size_t)cap * sizeof *ids);
    const int rc = kv_tokenize(m, text, (double)len, add, special, ids, cap, &n);
    bool same = rc == KV_OK && n == n_want;
    for (int i = 0; same && i < n; i++) same = ids[i] == want[i];
    CHECK(same, "%s: '%.40s': %d ids for %d (status %d)", what, text, n, n_want, rc);
    CHECK(kv_tokenize(m, text, (double)len, add, special, NULL, 0, &counted) == KV_OK && counted == n, "%s: counted %d, got %d", what, counted, n);
    free(ids);
}

/* Text -> ids -> text gives the bytes again, after at most one space in front. */
static void check_round_trip(const kv_model *m, const char *what, const char *text, size_t len)
{
    int n = 0, n_bytes = 0;
    const int cap = (int)(3 * len + 8);
    int32_t *const ids = malloc((size_t)cap * sizeof *ids);
    char *const back = malloc(len + 8);
    CHECK(kv_tokenize(m, text, (double)len, 0, 0, ids, cap, &n) == KV_OK, "%s: %s", what, kv_last_error());
    CHECK(kv_detokenize(m, ids, n, back, (int)len + 8, &n_bytes) == KV_OK, "%s: %s", what, kv_last_error());
    const size_t space = m->tok->add_space_prefix && len > 0;
    CHECK((size_t)n_bytes == len + space && memcmp(back + space, text, len) == 0, "%s: %d bytes back of %zu", what, n_bytes, len);
    free(back);
    free(ids);
}

static uint32_t rng_state = 20261122;
static uint32_t rnd(uint32_t below) { return (uint32_t)((uint64_t)(rng_state = rng_state * 1664525u + 1013904223u) * below >> 32); }

/* Random texts, well-formed and not; bytes in `missing` are left out because the vocabulary has no token for them. */
static void check_random(const kv_model *m, const char *what)
{
    static const char *const part[] = { "the", " quick", "  ", "\n\n", "\t", "é", "東京", "🚀", "1234", "'ll", "<|im_end|>", "</s>", "\xe2\x96\x81", "\xff", "\xc3", "\xe2\x82", "\xed\xa0\x80" };
    for (int round = 0; round < 200; round++) {
        char text[512];
        size_t n = 0;
        const bool bytes = m->tok->kind == KV_TOK_SPM || m->tok->byte_id[0xff] >= 0;
        while (n < 400 && rnd(24)) {
            const char *p = part[rnd(bytes ? 17 : 12)];
            if (m->tok->kind == KV_TOK_SPM && !strcmp(p, "\xe2\x96\x81")) p = "_";     /* U+2581 is a space there, and comes back as one */
            n += (size_t)sprintf(text + n, "%s", p);
            if (rnd(4) == 0) text[n++] = (char)(bytes ? rnd(256) : 32 + rnd(95));
        }
        check_round_trip(m, what, text, n);
    }
}

/* A quarter MiB of one thing over and over: merging is O(n log n), and no regex may go quadratic. */
static void check_long(const kv_model *m, const char *what)
{
    static const char *const unit[] = { "a", " ", "\n", "ab ", "\xff", "é", "1", "<", "." };
    const size_t len = 1 << 18;
    char *const text = malloc(len + 8);
    for (size_t u = 0; u < sizeof unit / sizeof *unit; u++) {
        const size_t step = strlen(unit[u]);
        for (size_t i = 0; i + step <= len; i += step) memcpy(text + i, unit[u], step);
        int n;
        const clock_t t0 = clock();
        CHECK(kv_tokenize(m, text, (double)(len / step * step), 1, 1, NULL, 0, &n) == KV_OK, "%s: %s", what, kv_last_error());
        const double seconds = (double)(clock() - t0) / CLOCKS_PER_SEC;
        CHECK(seconds < 5, "%s: unit %zu took %.1f s", what, u, seconds);
    }
    free(text);
}

static void test_model(const char *name, const vector *v, int n_vectors, const char *tokenizer, const char *chat)
{
    kv_model m;
    if (!find_model(&m, name)) return;
    CHECK(!strcmp(kv_tokenizer_name(m.tok), tokenizer), "%s: %s", name, kv_tokenizer_name(m.tok));
    CHECK(!strcmp(kv_tokenizer_template(m.tok), chat), "%s: %s", name, kv_tokenizer_template(m.tok));
    for (int i = 0; i < n_vectors; i++) check_ids(&m, name, v[i].text, strlen(v[i].text), 1, 1, v[i].id, v[i].n);
    check_random(&m, name);
    check_long(&m, name);
    close_model(&m);
}

/* ---- llama.cpp's vectors: texts between marker lines, ids a line each */

static void test_vectors(const char *data, const char *vocab)
{
    char path[1024];
    size_t n_in = 0, n_out = 0;
    snprintf(path, sizeof path, "%s/tokenizers/ggml-vocab-%s.gguf.inp", data, vocab);
    char *const in = slurp(path, &n_in);
    snprintf(path, sizeof path, "%s/tokenizers/ggml-vocab-%s.gguf.out", data, vocab);
    char *const out = slurp(path, &n_out);
    snprintf(path, sizeof path, "%s/tokenizers/ggml-vocab-%s.gguf", data, vocab);
    kv_model m;
    if (!in || !out || !open_model(&m, path)) {
        SKIP("no ggml-vocab-%s.gguf with .inp and .out in KELVIN_DATA/tokenizers", vocab);
    } else {
        static const char mark[] = "\n__ggml_vocab_test__\n";
        int count = 0;
        char *line = out;
        for (char *p = in, *stop; (stop = strstr(p, mark)) != NULL; p = stop + sizeof mark - 1, count++) {
            int32_t want[4096];
            int n = 0;
            while (n < 4096 && *line && *line != '\n') {
                char *after;
                want[n] = (int32_t)strtol(line, &after, 10);
                if (after == line) { line++; continue; }
                n++;
                line = after;
            }
            if (*line == '\n') line++;
            check_ids(&m, vocab, p, (size_t)(stop - p), 0, 0, want, n);
            check_round_trip(&m, vocab, p, (size_t)(stop - p));
        }
        CHECK(count > 20, "%s: only %d vectors", vocab, count);
        check_random(&m, vocab);
        check_long(&m, vocab);
        close_model(&m);
    }
    free(in);
    free(out);
}

static const kv_json_node *member(const kv_json_node *n, const char *key)
{
    for (const kv_json_node *c = kv_json_child(n); c; c = kv_json_next(c)) if (kv_json_key(c) && !strcmp(kv_json_key(c), key)) return c;
    return NULL;
}

static int ids_of(const kv_json_node *array, int32_t *ids, int cap)
{
    int n = 0;
    for (const kv_json_node *c = kv_json_child(array); c && n < cap; c = kv_json_next(c)) ids[n++] = (int32_t)kv_json_number(c);
    return n;
}

/* A whole text by count, first ids and SHA-256 of all; prompts by ids. */
static void test_reference(const char *data, const char *model, const char *file)
{
    kv_model m;
    char path[1024];
    size_t n_text = 0, n_json = 0;
    if (!find_model(&m, model)) return;
    snprintf(path, sizeof path, "%s/reference/%s", data, file);
    char *const json = slurp(path, &n_json), *text = NULL;
    kv_json *d = NULL;
    if (!json) SKIP("no %s", path);
    else CHECK(kv_json_parse(&d, json, (double)n_json, file) == KV_OK, "%s", kv_last_error());
    static int32_t ids[1 << 20], want[1 << 16];
    const kv_json_node *const prompts = member(kv_json_root(d), "prompts");
    for (const kv_json_node *p = kv_json_child(prompts); p; p = kv_json_next(p)) {
        const char *const s = kv_json_string(member(p, "text"));
        check_ids(&m, file, s, strlen(s), 1, 0, want, ids_of(member(p, "tokens"), want, 1 << 16));
    }
    if (d && !prompts) {
        snprintf(path, sizeof path, "%s/text/%s", data, kv_json_string(member(kv_json_root(d), "text")));
        text = slurp(path, &n_text);
        if (!text) SKIP("no %s", path);
    }
    if (text) {
        int n = 0;
        char hex[65];
        const double t0 = kv_now();
        CHECK(kv_tokenize(&m, text, (double)n_text, 1, 0, ids, 1 << 20, &n) == KV_OK, "%s: %s", file, kv_last_error());
        printf("%s: %d tokens of %zu bytes in %.3f s\n", file, n, n_text, kv_now() - t0);
        CHECK(n == (int)kv_json_number(member(kv_json_root(d), "tokens_total")), "%s: %d tokens", file, n);
        const int n_first = ids_of(member(kv_json_root(d), "first"), want, 1 << 16);
        int same = 0;
        while (same < n_first && ids[same] == want[same]) same++;
        CHECK(same == n_first, "%s: id %d is %d, not %d", file, same, (int)ids[same], (int)want[same]);
        kv_sha256(ids, 4.0 * n, hex);
        CHECK(!strcmp(hex, kv_json_string(member(kv_json_root(d), "sha256_int32le"))), "%s: %s", file, hex);
        check_round_trip(&m, file, text, n_text);
    }
    kv_json_free(d);
    free(json);
    free(text);
    close_model(&m);
}

/* ---- vocabularies made here: a GGUF without tensors, in memory */

typedef struct gguf { uint8_t buf[1 << 16]; size_t n; uint64_t keys; } gguf;
static void raw(gguf *g, const void *p, size_t n) { memcpy(g->buf + g->n, p, n); g->n += n; }
static void u32(gguf *g, uint32_t v) { raw(g, &v, 4); }
static void u64(gguf *g, uint64_t v) { raw(g, &v, 8); }
static void text_n(gguf *g, const char *s, size_t n) { u64(g, n); raw(g, s, n); }
static void text(gguf *g, const char *s) { text_n(g, s, strlen(s)); }
static void begin(gguf *g) { g->n = 0; g->keys = 0; raw(g, "GGUF", 4); u32(g, 3); u64(g, 0); u64(g, 0); }
static void key(gguf *g, const char *name, uint32_t type) { text(g, name); u32(g, type); g->keys++; }
static void key_text(gguf *g, const char *name, const char *s) { key(g, name, KV_GGUF_STR); text(g, s); }
static void key_u32(gguf *g, const char *name, uint32_t v) { key(g, name, KV_GGUF_U32); u32(g, v); }
static void key_texts(gguf *g, const char *name, const char *const *s, size_t n)
{
    key(g, name, KV_GGUF_ARR); u32(g, KV_GGUF_STR); u64(g, n);
    for (size_t i = 0; i < n; i++) text(g, s[i]);
}
static void key_floats(gguf *g, const char *name, const float *v, size_t n)
{
    key(g, name, KV_GGUF_ARR); u32(g, KV_GGUF_F32); u64(g, n); raw(g, v, 4 * n);
}
static void key_ints(gguf *g, const char *name, const int32_t *v, size_t n)
{
    key(g, name, KV_GGUF_ARR); u32(g, KV_GGUF_I32); u64(g, n); raw(g, v, 4 * n);
}

/* Status of making a tokenizer of it; m holds it when KV_OK. */
static int finish(gguf *g, kv_model *m)
{
    *m = (kv_model){ 0 };
    memcpy(g->buf + 16, &g->keys, 8);
    const int rc = kv_gguf_parse(&m->gguf, g->buf, g->n, "made here");
    CHECK(rc == KV_OK, "parse: %s", kv_last_error());
    return rc == KV_OK ? kv_tokenizer_new(&m->tok, m->gguf) : rc;
}

static void expect_error(gguf *g, int status, const char *part)
{
    kv_model m;
    const int rc = finish(g, &m);
    CHECK(rc == status && strstr(kv_last_error(), part), "status %d for %d, text '%s' without '%s'", rc, status, kv_last_error(), part);
    CHECK(!strchr(kv_last_error(), '\n'), "more than a line: %s", kv_last_error());
    close_model(&m);
}

static const char *const letters[] = { "<unk>", "a", "b", "ab", "ba", "Ġ", "abab", "Ġab", "<end>", "ab" };
enum { N_LETTERS = sizeof letters / sizeof *letters };
static const int32_t kinds[N_LETTERS] = { 2, 1, 1, 1, 1, 1, 1, 1, 3, 1 };
static const char *const rules[] = { "a b", "nothing here", "b a", "ab ab", "Ġ ab", "a b", "ab", " a", "a ", "", "a zz" };

static void bpe_head(gguf *g)
{
    begin(g);
    key_text(g, "tokenizer.ggml.model", "gpt2");
    key_text(g, "tokenizer.ggml.pre", "gpt-2");
    key_texts(g, "tokenizer.ggml.tokens", letters, N_LETTERS);
}

static void test_made(void)
{
    static gguf g;
    kv_model m;
    /* duplicate tokens, rules that name unknown ones: harmless */
    bpe_head(&g);
    key_ints(&g, "tokenizer.ggml.token_type", kinds, N_LETTERS);
    key_texts(&g, "tokenizer.ggml.merges", rules, sizeof rules / sizeof *rules);
    key_u32(&g, "tokenizer.ggml.eos_token_id", 8);
    CHECK(finish(&g, &m) == KV_OK, "%s", kv_last_error());
    check_ids(&m, "made", "abab ab<end>b", 13, 0, 1, (int32_t[]){ 6, 7, 8, 2 }, 4);
    check_ids(&m, "made", "aab", 3, 0, 0, (int32_t[]){ 1, 3 }, 2);
    check_ids(&m, "made", "a\xff" "b", 3, 0, 0, (int32_t[]){ 1, 2 }, 2);              /* a byte without a token is left out */
    CHECK(kv_token_is_end(&m, 8) && !kv_token_is_end(&m, 7) && !kv_token_is_end(&m, -1) && !kv_token_is_end(&m, 99), "ends");
    int n, rc;
    int32_t ids[2];
    char buf[4];
    rc = kv_tokenize(&m, "a a a", 5, 0, 0, ids, 2, &n);
    CHECK(rc == KV_E_ARG && n == 5 && strstr(kv_last_error(), "cap=2"), "%d %d %s", rc, n, kv_last_error());
    rc = kv_detokenize(&m, (int32_t[]){ 6, 10 }, 2, buf, 4, &n);
    CHECK(rc == KV_E_ARG && strstr(kv_last_error(), "id 10 at 1"), "%s", kv_last_error());
    rc = kv_detokenize(&m, (int32_t[]){ 6, 6 }, 2, buf, 4, &n);
    CHECK(rc == KV_E_ARG && n == 8 && strstr(kv_last_error(), "cap=4"), "%s", kv_last_error());
    CHECK(kv_tokenize(&m, NULL, 0, 1, 1, NULL, 0, &n) == KV_OK && n == 0, "empty text: %d", n);
    CHECK(kv_tokenize(&m, "a", -1, 0, 0, NULL, 0, &n) == KV_E_ARG && kv_tokenize(&m, "a", 1e18, 0, 0, NULL, 0, &n) == KV_E_ARG, "sizes");
    CHECK(kv_chat_format(&m, "user", "hi", 1, NULL, 0, &n) == KV_E_UNSUPPORTED, "no chat template here");
    close_model(&m);

    bpe_head(&g);
    expect_error(&g, KV_E_CORRUPT, "merges");
    bpe_head(&g);
    key_texts(&g, "tokenizer.ggml.merges", rules, 3);
    key_ints(&g, "tokenizer.ggml.token_type", kinds, 3);
    expect_error(&g, KV_E_CORRUPT, "token_type has 3 entries for 10 tokens");
    bpe_head(&g);
    key_texts(&g, "tokenizer.ggml.merges", rules, 3);
    key_u32(&g, "tokenizer.ggml.bos_token_id", 10);
    expect_error(&g, KV_E_CORRUPT, "bos_token_id=10 is outside 0..9");
    begin(&g);
    key_text(&g, "tokenizer.ggml.model", "gpt2");
    expect_error(&g, KV_E_CORRUPT, "tokens is missing");
    begin(&g);
    key_text(&g, "tokenizer.ggml.model", "bert");
    expect_error(&g, KV_E_UNSUPPORTED, "'bert'");
    begin(&g);
    expect_error(&g, KV_E_CORRUPT, "tokenizer.ggml.model is missing");
    begin(&g);
    key_text(&g, "tokenizer.ggml.model", "gpt2");
    key_text(&g, "tokenizer.ggml.pre", "klingon");
    key_texts(&g, "tokenizer.ggml.tokens", letters, N_LETTERS);
    expect_error(&g, KV_E_UNSUPPORTED, "'klingon'");
    begin(&g);
    key_text(&g, "tokenizer.ggml.model", "llama");
    key_texts(&g, "tokenizer.ggml.tokens", letters, N_LETTERS);
    key_floats(&g, "tokenizer.ggml.scores", (float[]){ 0, 1, 2 }, 3);
    expect_error(&g, KV_E_CORRUPT, "scores has 3 entries for 10 tokens");
    begin(&g);
    key_text(&g, "tokenizer.ggml.model", "llama");
    key_texts(&g, "tokenizer.ggml.tokens", letters, 2);
    key_floats(&g, "tokenizer.ggml.scores", (float[]){ 0, __builtin_nanf("") }, 2);
    expect_error(&g, KV_E_CORRUPT, "score of token 1 is NaN");

    /* SentencePiece: best score first, leftmost among equals; no byte tokens: the unknown token */
    static const char *const pieces[] = { "<unk>", "<s>", "</s>", "a", "b", "ab", "ba", "\xe2\x96\x81", "\xe2\x96\x81" "a", "\xff\xfe" };
    begin(&g);
    key_text(&g, "tokenizer.ggml.model", "llama");
    key_texts(&g, "tokenizer.ggml.tokens", pieces, 10);
    key_ints(&g, "tokenizer.ggml.token_type", (int32_t[]){ 2, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, 10);
    key_floats(&g, "tokenizer.ggml.scores", (float[]){ 0, 0, 0, -9, -9, -1, -1, -9, -2, -3 }, 10);
    CHECK(finish(&g, &m) == KV_OK, "%s", kv_last_error());
    check_ids(&m, "made spm", "aba", 3, 1, 0, (int32_t[]){ 1, 7, 5, 3 }, 4);
    check_ids(&m, "made spm", "ac</s>a", 7, 1, 1, (int32_t[]){ 1, 8, 0, 2, 8 }, 5);
    check_ids(&m, "made spm", "\xff\xfe", 2, 0, 0, (int32_t[]){ 7, 9 }, 2);
    close_model(&m);
}

/* ---- chat turns.  Expected texts: the families' own Jinja templates rendered by transformers 5.23 */

static void check_chat(const kv_model *m, const char *what, bool with_system, const char *want)
{
    static const struct { const char *role, *text; } turn[] = { { "system", "Be brief." }, { "user", " Hi there \n" }, { "assistant", "Hello." }, { "user", "Bye" }, { NULL, NULL } };
    char buf[1024];
    int total = 0, n = 0;
    for (int i = with_system ? 0 : 1; i < 5; i++) {
        const int first = i == (with_system ? 0 : 1) ? 1 : with_system && i == 1 ? 2 : 0;
        CHECK(kv_chat_format(m, turn[i].role, turn[i].text, first, buf + total, (int)sizeof buf - total, &n) == KV_OK, "%s: %s", what, kv_last_error());
        total += n;
    }
    CHECK((size_t)total == strlen(want) && memcmp(buf, want, (size_t)total) == 0, "%s:\n%.*s\n-- for --\n%s", what, total, buf, want);
    CHECK(kv_chat_format(m, "robot", "x", 0, buf, 9, &n) == KV_E_ARG && strstr(kv_last_error(), "'robot'"), "%s", kv_last_error());
    CHECK(kv_chat_format(m, "user", "x", 0, buf, 1, &n) == KV_E_ARG && n > 1, "%s: cap", what);
}

#define DATES "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

static void test_chat(void)
{
    static gguf g;
    kv_model m;
    static const struct { const char *marker, *name, *plain, *with_system; } family[] = {
        { "{{'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'}}", "chatml",
          "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n Hi there \n<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
          "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi there \n<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n" },
        { "{{'<|im_start|>system\\n'}}{{'<|im_start|>' + role}}", "chatml",
          "<|im_start|>user\n Hi there \n<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", NULL },
        { "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0]['role'] == 'system' %}\n        {{- messages[0]['content'] }}\n    {%- else %}\n        {{- 'You are Qwen, created by Alibaba Cloud. "
          "You are a helpful assistant.' }}\n    {%- endif %}\n    {{- \"\\n</tool_call><|im_end|>\\n\" }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
          "    {%- else %}\n        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}", "chatml",
          "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n Hi there \n<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
          "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi there \n<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n" },
        { "<|start_header_id|>", "llama3",
          "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
          "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n" },
        { "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n{{- \"Cutting Knowledge Date: December 2023\\n\" }}\n{{- \"Today Date: \" + date_string + \"\\n\\n\" }}", "llama3",
          "<|start_header_id|>system<|end_header_id|>\n\n" DATES "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
          "<|start_header_id|>system<|end_header_id|>\n\n" DATES "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n" },
        { "<start_of_turn>", "gemma",
          "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
          "<start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n" },
        { "[INST] <<SYS>>", "llama2", "[INST] Hi there [/INST] Hello. </s><s>[INST] Bye [/INST]",
          "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi there [/INST] Hello. </s><s>[INST] Bye [/INST]" },
        { "{{ '[INST] ' + message['content'] + ' [/INST]' }}", "mistral", "[INST]  Hi there \n [/INST]Hello.</s>[INST] Bye [/INST]", NULL },
        { "{{- \"[INST]\" + message[\"content\"] + \"[/INST]\" }}", "mistral", "[INST] Hi there \n[/INST]Hello.</s>[INST]Bye[/INST]", NULL },
    };
    for (size_t i = 0; i < sizeof family / sizeof *family; i++) {
        begin(&g);
        key_text(&g, "tokenizer.ggml.model", "llama");
        key_texts(&g, "tokenizer.ggml.tokens", (const char *const[]){ "<unk>", "<s>", "</s>" }, 3);
        key_floats(&g, "tokenizer.ggml.scores", (float[]){ 0, 0, 0 }, 3);
        key_text(&g, "tokenizer.chat_template", family[i].marker);
        CHECK(finish(&g, &m) == KV_OK, "%s", kv_last_error());
        CHECK(!strcmp(kv_tokenizer_template(m.tok), family[i].name), "%s is taken for %s", family[i].name, kv_tokenizer_template(m.tok));
        check_chat(&m, family[i].name, false, family[i].plain);
        if (family[i].with_system) check_chat(&m, family[i].name, true, family[i].with_system);
        close_model(&m);
    }
}

int main(void)
{
    printf("seed %u\n", rng_state);
    test_made();
    test_chat();
    test_model("smollm2-135m", smollm2, sizeof smollm2 / sizeof *smollm2, "bpe smollm", "chatml");
    test_model("gemma-3-270m", gemma, sizeof gemma / sizeof *gemma, "spm", "gemma");
    const char *const data = getenv("KELVIN_DATA");
    if (!data) SKIP("KELVIN_DATA is not set: llama.cpp's vectors and whole texts");
    else {
        static const char *const vocab[] = { "gpt-2", "llama-bpe", "llama-spm", "qwen2", "deepseek-llm", "phi-3" };
        static const char *const file[] = { "wiki_test_", "wiki_valid_", "logits_" };
        for (size_t i = 0; i < sizeof vocab / sizeof *vocab; i++) test_vectors(data, vocab[i]);
        for (size_t i = 0; i < sizeof file / sizeof *file; i++) {
            char name[64];
            snprintf(name, sizeof name, "%ssmollm2.json", file[i]);
            test_reference(data, "smollm2-135m", name);
            snprintf(name, sizeof name, "%sgemma3.json", file[i]);
            test_reference(data, "gemma-3-270m", name);
        }
    }
    return check_end();
}
