/* fuzz_gguf.c -- any bytes through kv_gguf_parse, then every accessor of what parsed, then rows of every tensor. */
#include <stdlib.h>
#include <string.h>
#include "model.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static volatile size_t sink;                   /* so that reading every byte cannot be left out */
static void touch(const void *p, size_t n) { for (size_t i = 0; i < n; i++) sink += ((const uint8_t *)p)[i]; }

static void touch_tensor(const kv_gguf_tensor *t)
{
    int block, bytes;
    touch(t->name, strlen(t->name));
    touch(t->data, t->n_bytes);
    if (!kv_weight_block(t->type, &block, &bytes)) return;
    const kv_weight w = { .type = t->type, .n_in = t->dim[0], .n_out = (int64_t)(t->n_bytes / ((size_t)(t->dim[0] / block) * (size_t)bytes)),
                          .row_bytes = (size_t)(t->dim[0] / block) * (size_t)bytes, .data = t->data };
    float *const row = kv_alloc_array((size_t)w.n_in, sizeof *row, false), y[1];
    kv_act a = { 0 };
    if (row && kv_act_reserve(&a, w.n_in) == KV_OK) {
        kv_weight_rows(&w, w.n_out - 1, 1, row);
        for (int64_t i = 0; i < w.n_in; i++) row[i] = 1;
        kv_act_set(&a, row, w.n_in);
        kv_matvec(&(kv_weight){ .type = w.type, .n_in = w.n_in, .n_out = 1, .row_bytes = w.row_bytes, .data = w.data }, &a, 0, 1, y);
    }
    kv_act_free(&a);
    kv_free(row);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    kv_gguf *g;
    if (kv_gguf_parse(&g, bytes, n, "fuzz") < 0) {
        const char *const e = kv_last_error();
        if (g || !*e || strchr(e, '\n')) abort();
        return 0;
    }
    for (int i = 0; i < kv_gguf_n_keys(g); i++) {
        const char *const key = kv_gguf_key_at(g, i), *s, **list;
        double v;
        size_t count;
        int type;
        uint32_t *len;
        touch(kv_gguf_value_text(g, i), strlen(kv_gguf_value_text(g, i)));
        kv_gguf_number(g, key, &v);
        if (kv_gguf_string(g, key, &s, &count)) touch(s, count);
        if (kv_gguf_array(g, key, &type, &count)) {
            for (size_t k = 0; k < count; k++) kv_gguf_array_number(g, key, k, &v);
            if (kv_gguf_array_number(g, key, count, &v)) abort();
        }
        if (kv_gguf_array_strings(g, key, &list, &len, &count) > 0) {
            for (size_t k = 0; k < count; k++) touch(list[k], len[k]);
            kv_free(list);
            kv_free(len);
        }
    }
    for (int i = 0; i < kv_gguf_n_tensors(g); i++) {
        const kv_gguf_tensor *const t = kv_gguf_tensor_at(g, i);
        if (kv_gguf_find(g, t->name) != t) abort();
        touch_tensor(t);
    }
    if (kv_gguf_tensor_at(g, -1) || kv_gguf_key_at(g, kv_gguf_n_keys(g)) || kv_gguf_file_bytes(g) != n) abort();
    kv_gguf_close(g);
    return 0;
}
