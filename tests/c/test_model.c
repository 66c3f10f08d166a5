/* test_model.c -- hostile model files: the tiny models of tests/golden with a byte changed or an end cut off either open and
 * run, or are refused in one line; never more than that.  What whole ones compute is tests/unit/tiny_models_spec.lua's. */
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include "check.h"
#include "model.h"
#include "ops.h"

static const char *const family[] = { "qwen2", "qwen3", "llama3", "llama", "mistral", "gemma2", "gemma3", "gemma3-listed" };
enum { CHANGES = 100, CUTS = 40, HEAD = 17000 /* bytes: keys, vocabulary and tensor descriptions of every one */ };

static uint32_t state = 20261122;
static uint32_t random_below(uint32_t n)
{
    state = state * 1664525u + 1013904223u;                /* Numerical Recipes */
    return (uint32_t)((uint64_t)(state >> 8) * n >> 24);
}

static bool one_line(const char *text) { return *text && !strchr(text, '\n'); }

/* Opens it and, when that works, runs some tokens: 1 opened and ran, 0 refused somewhere. */
static int try(const char *path, const char *what, long at)
{
    kv_model *m = NULL;
    kv_session *s = NULL;
    int status = kv_model_open(&m, path);
    if (status == KV_OK) {
        kv_model_info info;
        kv_model_get_info(m, &info);
        const int32_t token[4] = { 0, info.n_vocab - 1, info.n_vocab / 2, 1 % info.n_vocab };
        status = kv_session_new(&s, m, NULL, 8);
        if (status == KV_OK) status = kv_session_feed(s, token, 3, 1);
        if (status == KV_OK) status = kv_session_feed(s, token + 3, 1, 1);
    }
    if (status < 0) CHECK(one_line(kv_last_error()), "%s at %ld: '%s'", what, at, kv_last_error());
    kv_session_free(s);
    kv_model_free(m);
    return status == KV_OK;
}

static void hostile(const char *name)
{
    char path[256], copy[] = "/tmp/kelvin-model-XXXXXX";
    snprintf(path, sizeof path, "tests/golden/tiny/%s.gguf", name);
    FILE *f = fopen(path, "rb");
    if (!f) { SKIP("%s is not here: run from the root of the tree", path); return; }
    struct stat st;
    fstat(fileno(f), &st);
    const size_t n = (size_t)st.st_size;
    uint8_t *bytes = malloc(n);
    const int fd = mkstemp(copy);
    CHECK(bytes && fd >= 0 && fread(bytes, 1, n, f) == n && pwrite(fd, bytes, n, 0) == (ssize_t)n, "%s", path);
    fclose(f);
    CHECK(try(copy, name, 0), "%s: %s", name, kv_last_error());
    int opened = 0;
    for (int i = 0; i < CHANGES; i++) {
        const long at = random_below(HEAD);
        const uint8_t changed = (uint8_t)(bytes[at] ^ (1u + random_below(255)));
        if (pwrite(fd, &changed, 1, at) != 1) abort();
        opened += try(copy, name, at);
        if (pwrite(fd, bytes + at, 1, at) != 1) abort();
    }
    CHECK(opened < CHANGES, "%s: no changed byte was noticed", name);
    for (int i = 0; i < CUTS; i++) {
        const long at = i < CUTS / 2 ? (long)random_below(HEAD) : (long)random_below((uint32_t)n);
        if (ftruncate(fd, at) || pwrite(fd, bytes, (size_t)at, 0) != at) abort();
        CHECK(!try(copy, name, at), "%s cut to %ld bytes is taken", name, at);
    }
    printf("%s: %d of %d changed files run, the others are refused\n", name, opened, CHANGES);
    close(fd);
    unlink(copy);
    free(bytes);
}

/* Weights may be anything, so activations can: NaN stays NaN, the rest stays a number of some kind, alike at every level. */
static void test_gates(void)
{
    enum { N = 20 };
    static const float odd[N] = { NAN, -NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, 0.0f, -0.0f, 88, -88, 1, -1 };
    for (int activation = KV_ACT_SILU; activation <= KV_ACT_GELU_TANH; activation++) {
        float plain[N], up[N];
        for (int level = KV_SIMD_C; level <= kv_cpu_simd_max(); level++) {
            float x[N];
            kv_cpu_limit(level);
            memcpy(x, odd, sizeof x);
            for (int i = 0; i < N; i++) up[i] = 1;
            kv_gate(x, up, N, activation);
            if (level == KV_SIMD_C) memcpy(plain, x, sizeof x);
            for (int i = 0; i < N; i++) CHECK(isnan(odd[i]) ? isnan(x[i]) : x[i] == plain[i] || (isnan(x[i]) && isnan(plain[i])), "activation %d of %g at level %d: %g, plain %g", activation, (double)odd[i], level, (double)x[i], (double)plain[i]);
        }
        CHECK(plain[11] > 0.7f && plain[11] < 0.9f && plain[7] == 0, "activation %d: f(1)=%g, f(0)=%g", activation, (double)plain[11], (double)plain[7]);
    }
    kv_cpu_limit(kv_cpu_simd_max());
}

int main(void)
{
    printf("seed %u\n", state);
    test_gates();
    for (size_t i = 0; i < sizeof family / sizeof *family; i++) hostile(family[i]);
    return check_end();
}
