/* fuzz_tokenizer.c -- a GGUF of any bytes gives an error or a tokenizer that takes any text and gives it back.
 *
 *   | n: first 2 bytes, little-endian | n bytes: the model file | the rest: a text | */
#include <stdlib.h>
#include "model.h"

enum { MAX_IDS = 1 << 14, MAX_TEXT = 4096 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int32_t ids[MAX_IDS];
    static char text[1 << 20];
    if (size < 2) return 0;
    size_t n_file = data[0] | (size_t)data[1] << 8;
    if (n_file > size - 2) n_file = size - 2;
    const size_t n_text = size - 2 - n_file < MAX_TEXT ? size - 2 - n_file : MAX_TEXT;
    kv_model m = { 0 };
    if (kv_gguf_parse(&m.gguf, data + 2, n_file, "fuzz") == KV_OK && kv_tokenizer_new(&m.tok, m.gguf) == KV_OK) {
        int n = 0, n_bytes = 0;
        if (kv_tokenize(&m, (const char *)data + 2 + n_file, (double)n_text, 1, 1, ids, MAX_IDS, &n) != KV_OK) abort();
        for (int i = 0; i < n; i++) if (ids[i] < 0 || ids[i] >= kv_tokenizer_n_vocab(m.tok)) abort();
        kv_detokenize(&m, ids, n, text, sizeof text, &n_bytes);
        kv_chat_format(&m, "user", "hi", 1, text, sizeof text, &n_bytes);
    }
    kv_tokenizer_free(m.tok);
    kv_gguf_close(m.gguf);
    return 0;
}
