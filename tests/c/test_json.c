/* test_json.c -- the strict JSON reader, SHA-256, sampling. */
#include <math.h>
#include <string.h>
#include <unistd.h>
#include "check.h"
#include "internal.h"

static void refuses(const char *text, size_t n, const char *part)
{
    kv_json *d = (kv_json *)1;
    const int rc = kv_json_parse(&d, text, (double)n, "t.json");
    CHECK(rc == KV_E_CORRUPT && d == NULL && strstr(kv_last_error(), part), "'%.40s': status %d, '%s' without '%s'", text, rc, kv_last_error(), part);
    CHECK(!strchr(kv_last_error(), '\n'), "more than a line");
    kv_json_free(rc == KV_OK ? d : NULL);
}

static void test_refusals(void)
{
    static const struct { const char *text, *part; } bad[] = {
        { "", "t.json:1:1: a value is missing" }, { "  \n ", "t.json:2:2: a value is missing" }, { "{\"a\":1,\n \"b\" 2}", "t.json:2:6: ':' is missing" },
        { "[1,]", "1:4: not a value" }, { "[1 2]", "1:4: ',' or ']'" }, { "{\"a\":1", "1:7: ',' or '}'" }, { "{a:1}", "1:2: a key in quotes" }, { "{\"a\":1,}", "1:8: a key" },
        { "01", "starts with 0" }, { "-", "a digit is missing" }, { "1.", "after the point" }, { ".5", "not a value" }, { "+1", "not a value" }, { "1e", "in the exponent" }, { "0x10", "more text" },
        { "NaN", "not a value" }, { "Infinity", "not a value" }, { "nul", "an unknown word" }, { "true1", "more text" }, { "{} x", "1:4: more text" }, { "[] []", "more text" },
        { "\"a", "1:1: a string is not closed" }, { "\"a\\", "not closed" }, { "\"\\x\"", "an escape" }, { "\"\\u12g4\"", "four hex digits" }, { "\"\\ud800\"", "surrogate" }, { "\"\\udc00\"", "surrogate" },
        { "\"\\u0000\"", "\\u0000" }, { "\"a\nb\"", "control character" }, { "\"\xff\"", "not UTF-8" }, { "\"\xc0\x80\"", "not UTF-8" }, { "\"\xed\xa0\x80\"", "not UTF-8" },
        { "\xef\xbb\xbf{}", "not a value" }, { "{\"a\":1,\"b\":2,\"a\":3}", "'a' is given twice" }, { "1e999", "does not fit a double" }, { "'a'", "not a value" }, { "// c\n1", "not a value" },
        { "1234567890123456789012345678901234567890123456789012345678901234", "longer than 63" } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) refuses(bad[i].text, strlen(bad[i].text), bad[i].part);
    refuses("[1]\0", 4, "more text");
    char deep[400];
    memset(deep, '[', sizeof deep);
    refuses(deep, sizeof deep, "1:129: nested deeper than 128");
    memset(deep, ']', sizeof deep);
    memset(deep, '[', 128);
    kv_json *d;
    CHECK(kv_json_parse(&d, deep, 256, "deep") == KV_OK, "%s", kv_last_error());
    kv_json_free(d);
    CHECK(kv_json_parse(&d, NULL, 0, "x") == KV_E_ARG && kv_json_parse(&d, "1", -1, "x") == KV_E_ARG && kv_json_parse(&d, "1", NAN, NULL) == KV_E_ARG, "arguments");
    kv_json_free(NULL);
}

static void test_tree(void)
{
    static const char text[] = " {\"n\": -12.5e1, \"s\": \"\\u00e9\\ud83d\\ude80\\n\\/\", \"t\":true,\"f\":false,\"z\":null,\"a\":[1,[],{}],\"\":0.1} garbage past the end";
    kv_json *d = NULL;
    CHECK(kv_json_parse(&d, text, (double)(strlen(text) - 20), "tree") == KV_OK, "%s", kv_last_error());
    const kv_json_node *const root = kv_json_root(d), *n = kv_json_child(root);
    CHECK(kv_json_type(root) == KV_JSON_OBJECT && kv_json_key(root) == NULL && kv_json_next(root) == NULL, "root");
    CHECK(!strcmp(kv_json_key(n), "n") && kv_json_type(n) == KV_JSON_NUMBER && kv_json_number(n) == -125.0, "%g", kv_json_number(n));
    n = kv_json_next(n);
    CHECK(kv_json_type(n) == KV_JSON_STRING && !strcmp(kv_json_string(n), "\xc3\xa9\xf0\x9f\x9a\x80\n/"), "%s", kv_json_string(n));
    CHECK(kv_json_number(n) == 0 && kv_json_string(root) == NULL && kv_json_child(n) == NULL, "the wrong type has no value");
    n = kv_json_next(n);
    CHECK(kv_json_type(n) == KV_JSON_TRUE && kv_json_type(n = kv_json_next(n)) == KV_JSON_FALSE && kv_json_type(n = kv_json_next(n)) == KV_JSON_NULL, "words");
    n = kv_json_next(n);
    const kv_json_node *e = kv_json_child(n);
    CHECK(kv_json_type(n) == KV_JSON_ARRAY && kv_json_number(e) == 1 && kv_json_key(e) == NULL, "array");
    CHECK(kv_json_type(e = kv_json_next(e)) == KV_JSON_ARRAY && !kv_json_child(e) && kv_json_type(e = kv_json_next(e)) == KV_JSON_OBJECT && !kv_json_next(e), "nested");
    n = kv_json_next(n);
    CHECK(!strcmp(kv_json_key(n), "") && kv_json_number(n) == 0.1 && !kv_json_next(n), "last");
    kv_json_free(d);
    for (size_t cut = 0; cut < sizeof text - 20; cut++) {          /* every prefix is refused or parsed, never read past */
        char *const exact = malloc(cut ? cut : 1);
        memcpy(exact, text, cut);
        if (kv_json_parse(&d, exact, (double)cut, "cut") == KV_OK) kv_json_free(d);
        free(exact);
    }
}

static void test_sha256(void)
{
    /* FIPS 180-4 examples, and a million of 'a'. */
    static const struct { const char *text, *hex; } known[] = {
        { "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" },
        { "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
        { "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1" } };
    char hex[65], of_file[65], path[] = P_tmpdir "/kelvin-test-XXXXXX";
    for (size_t i = 0; i < 3; i++)
        CHECK(kv_sha256(known[i].text, (double)strlen(known[i].text), hex) == KV_OK && !strcmp(hex, known[i].hex), "'%s': %s", known[i].text, hex);
    char *const million = malloc(1000000);
    memset(million, 'a', 1000000);
    CHECK(kv_sha256(million, 1e6, hex) == KV_OK && !strcmp(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"), "%s", hex);
    const int fd = mkstemp(path);
    for (int n = 0; fd >= 0 && n < 200; n += 7) {
        CHECK(ftruncate(fd, 0) == 0 && pwrite(fd, million, (size_t)n, 0) == n, "write");
        kv_sha256(million, n, hex);
        CHECK(kv_sha256_file(path, of_file) == KV_OK && !strcmp(hex, of_file), "%d bytes: %s, as a file %s", n, hex, of_file);
    }
    close(fd);
    unlink(path);
    free(million);
    CHECK(kv_sha256_file("/nonexistent/x", hex) == KV_E_IO && strstr(kv_last_error(), "'/nonexistent/x'"), "%s", kv_last_error());
    CHECK(kv_sha256_file("/", hex) == KV_E_IO, "a folder");
    CHECK(kv_sha256(NULL, 1, hex) == KV_E_ARG && kv_sha256("a", NAN, hex) == KV_E_ARG && kv_sha256_file(NULL, hex) == KV_E_ARG, "arguments");
}

static int draw(const float *logits, int n, double temperature, int top_k, double top_p, double counter)
{
    int token = -1;
    const int rc = kv_sample(logits, n, &(kv_sampler_params){ .temperature = temperature, .top_k = top_k, .top_p = top_p, .seed = 7 }, counter, &token);
    CHECK(rc == KV_OK, "%s", kv_last_error());
    return token;
}

static void test_sample(void)
{
    enum { N = 50, DRAWS = 20000 };
    float x[N];
    int token;
    for (int i = 0; i < N; i++) x[i] = (float)sin(i * 1.7) * 3;
    x[11] = x[31] = 4;
    CHECK(draw(x, N, 0, 0, 0, 1) == 11 && draw(x, N, 1, 1, 1, 1) == 11, "greedy: the lowest id among equals");
    CHECK(draw(x, N, 0.8, 0, 1, 5) == draw(x, N, 0.8, 0, 1, 5), "a draw is a function of seed and counter");

    /* Shares against the definition, in double, of every setting of the three limits. */
    static const struct { double temperature, top_p; int top_k; } setting[] = { { 1, 1, 0 }, { 0.7, 0.9, 0 }, { 1.5, 0, 10 }, { 1, 0.5, 10 }, { 2, 0.95, 49 }, { 0.01, 1, 0 }, { 1, 1e-9, 0 } };
    for (size_t s = 0; s < sizeof setting / sizeof *setting; s++) {
        int order[N], count[N] = { 0 }, m = setting[s].top_k ? setting[s].top_k : N;
        double p[N], total = 0, kept = 0;
        for (int i = 0; i < N; i++) order[i] = i;
        for (int i = 0; i < N; i++) for (int j = i + 1; j < N; j++)
            if (x[order[j]] > x[order[i]] || (x[order[j]] == x[order[i]] && order[j] < order[i])) { const int swap = order[i]; order[i] = order[j]; order[j] = swap; }
        for (int i = 0; i < m; i++) total += p[i] = exp((x[order[i]] - 4) / setting[s].temperature);
        int kept_n = 0;
        const double limit = setting[s].top_p > 0 ? setting[s].top_p : 1;
        while (kept_n < m && kept < limit * total) kept += p[kept_n++];
        for (int d = 0; d < DRAWS; d++) count[draw(x, N, setting[s].temperature, setting[s].top_k, setting[s].top_p, d)]++;
        for (int i = 0; i < N; i++) {
            const double want = i < kept_n ? p[i] / kept * DRAWS : 0, slack = 5 * sqrt(want) + (want > 0);
            CHECK(fabs(count[order[i]] - want) <= slack, "setting %zu, candidate %d: %d draws for %.1f", s, i, count[order[i]], want);
        }
    }
    const kv_sampler_params ok = { .temperature = 1, .top_p = 1 };
    float bad[3] = { 0, NAN, 1 };
    CHECK(kv_sample(bad, 3, &ok, 0, &token) == KV_E_ARG && strstr(kv_last_error(), "logit 1 of 3 is NaN"), "%s", kv_last_error());
    bad[1] = INFINITY;
    CHECK(kv_sample(bad, 3, &ok, 0, &token) == KV_E_ARG && strstr(kv_last_error(), "+inf"), "%s", kv_last_error());
    bad[0] = bad[1] = bad[2] = -INFINITY;
    CHECK(kv_sample(bad, 3, &ok, 0, &token) == KV_E_ARG && strstr(kv_last_error(), "all 3"), "%s", kv_last_error());
    bad[2] = 1;
    for (int d = 0; d < 100; d++) CHECK(draw(bad, 3, 3, 0, 1, d) == 2, "-inf is never drawn");
    CHECK(kv_sample(bad, 0, &ok, 0, &token) == KV_E_ARG && kv_sample(bad, 3, &(kv_sampler_params){ .temperature = -1 }, 0, &token) == KV_E_ARG
          && kv_sample(bad, 3, &(kv_sampler_params){ .temperature = 1, .top_p = 1.5 }, 0, &token) == KV_E_ARG
          && kv_sample(bad, 3, &(kv_sampler_params){ .temperature = 1, .top_k = -1 }, 0, &token) == KV_E_ARG, "parameters out of range");
}

int main(void)
{
    test_refusals();
    test_tree();
    test_sha256();
    test_sample();
    return check_end();
}
