/* fuzz_model.c -- any bytes as a model file: refused in one line, or a model that says what it is and takes a prompt and a step
 * over an exact and a compressed cache. */
#include <sys/mman.h>
#include <stdio.h>
#include <unistd.h>
#include "fuzz.h"

static void feed(kv_model *m, kv_plan *plan)
{
    kv_session *s;
    const int32_t prompt[3] = { 0, m->info.n_vocab - 1, m->info.n_vocab / 2 };
    if (kv_session_new(&s, m, plan, 5) < 0) return;
    if (kv_session_feed(s, prompt, 3, 2) == KV_OK && kv_session_feed(s, prompt, 1, 1) == KV_OK && !kv_session_logits(s)) abort();
    kv_session_free(s);
}

static void use(kv_model *m)
{
    kv_model_info info;
    kv_layer_info layer;
    const char *key, *value;
    int n_dims, n;
    int32_t ids[64];
    double shape[4], bytes;
    kv_plan *plan;
    if (kv_model_get_info(m, &info) < 0 || !info.name || !info.path || !info.chat_template) abort();
    for (int l = 0; l < info.n_layers; l++) if (kv_model_layer(m, l, &layer) < 0) abort();
    for (int i = 0; kv_model_meta_at(m, i, &key, &value) == KV_OK; i++) if (!key || !value) abort();
    for (int i = 0; kv_model_tensor_at(m, i, &key, &value, &n_dims, shape, &bytes) == KV_OK; i++) if (!key || !value) abort();
    kv_tokenize(m, "a b<s>", 6, 1, 1, ids, 64, &n);
    if ((double)info.n_layers * info.n_embd * info.n_heads * info.head_dim > 1 << 20) return;      /* more than a seed's size: time */
    feed(m, NULL);
    if (kv_plan_new(&plan, info.n_layers, info.n_kv_heads, info.head_dim, 8) < 0) abort();
    for (int side = 0; side < 2; side++) {
        kv_codec *c;
        if (kv_codec_new(&c, "raw", "", info.head_dim, 8, side) < 0 || kv_plan_set(plan, -1, -1, side, c) < 0) abort();
        kv_codec_free(c);
    }
    feed(m, plan);
    kv_plan_free(plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char path[64];
    kv_model *m;
    kv_set_threads(1);
    const int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    const int status = kv_model_open(&m, path);
    close(fd);
    if (status < 0) refused(status);
    else use(m);
    kv_model_free(m);
    return 0;
}
