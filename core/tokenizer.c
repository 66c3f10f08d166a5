/* tokenizer.c -- the tokenizer of a model file: vocabulary, special tokens, text to ids and back.
 *
 *   tokenizer.ggml.model "gpt2"   byte-level BPE: regexes make words, merge rules join bytes (tokenizer_split.c, _merge.c)
 *   tokenizer.ggml.model "llama"  SentencePiece: scores join characters, what is left over falls to byte tokens
 *
 * Tokens of type control (3), unknown (2) and user-defined (4) are found in the text first, the longest at the leftmost
 * place, and what lies between is tokenized by itself; control and unknown ones only when asked for (parse_special).
 * Any bytes are accepted: those that are not UTF-8 become byte tokens.  Back to text, every id gives its bytes, control
 * tokens their name; a SentencePiece text that got a space in front keeps it, so that pieces join to the whole.  Bytes
 * that a BPE vocabulary has no token for (SmolLM2: 21 of them, all control characters or no UTF-8) are left out.
 *
 * The texts of tokens stay in the file: a tokenizer must not outlive its kv_gguf. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "tokenizer.h"

enum { MAX_TOKENS = 1 << 24, MAX_SPECIAL_LENGTHS = 256 };
static const double MAX_TEXT = 536870912.0;      /* 2^29 bytes: positions fit int32 after a space became three bytes */

int kv_utf8_next(const char *p, const char *end, uint32_t *c)
{
    const uint8_t b = (uint8_t)*p;
    if (b < 0x80) { *c = b; return 1; }
    const int n = b >= 0xC2 && b < 0xE0 ? 2 : b >= 0xE0 && b < 0xF0 ? 3 : b >= 0xF0 && b < 0xF5 ? 4 : 0;
    *c = 0x110000u + b;
    if (n == 0 || end - p < n) return 1;
    uint32_t v = b & (0x7Fu >> n);
    for (int i = 1; i < n; i++) {
        if (((uint8_t)p[i] & 0xC0) != 0x80) return 1;
        v = v << 6 | ((uint8_t)p[i] & 0x3Fu);
    }
    if ((n == 3 && (v < 0x800 || (v >= 0xD800 && v < 0xE000))) || (n == 4 && (v < 0x10000 || v > 0x10FFFF))) return 1;
    *c = v;
    return n;
}

/* ---- tables */

int32_t kv_token_find(const kv_tokenizer *t, const char *text, size_t n)
{
    if (n > t->longest) return -1;
    for (uint32_t i = kv_hash_bytes(text, n) & t->slot_mask; t->slot[i] >= 0; i = (i + 1) & t->slot_mask) {
        const int32_t id = t->slot[i];
        if (t->len[id] == n && memcmp(t->text[id], text, n) == 0) return id;
    }
    return -1;
}

static size_t table_size(size_t n)               /* a power of two with at most half of it filled */
{
    size_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
}

static int index_tokens(kv_tokenizer *t)
{
    const size_t size = table_size((size_t)t->n);
    if (!(t->slot = kv_alloc_array(size, sizeof *t->slot, false))) return KV_E_NOMEM;
    memset(t->slot, 0xff, size * sizeof *t->slot);
    t->slot_mask = (uint32_t)(size - 1);
    for (int32_t id = 0; id < t->n; id++) {
        if (t->len[id] > t->longest) t->longest = t->len[id];
        if (t->len[id] == 0 || kv_token_find(t, t->text[id], t->len[id]) >= 0) continue;     /* a duplicate: the lowest id stands */
        uint32_t i = kv_hash_bytes(t->text[id], t->len[id]) & t->slot_mask;
        while (t->slot[i] >= 0) i = (i + 1) & t->slot_mask;
        t->slot[i] = id;
    }
    return KV_OK;
}

/* Rules "left right" in order of rank.  One that names a token the vocabulary lacks can never apply and is passed over. */
static int load_merges(kv_tokenizer *t, const kv_gguf *g)
{
    const char **rule = NULL;
    uint32_t *len = NULL;
    size_t n = 0;
    int status = KV_OK;
    char *joined = NULL;
    if (!kv_gguf_array_strings(g, "tokenizer.ggml.merges", &rule, &len, &n)) n = 0;
    FAIL_IF(n == 0, KV_E_CORRUPT, "tokenizer: tokenizer.ggml.merges is missing, empty or no list of texts");
    FAIL_IF(n > MAX_TOKENS, KV_E_CORRUPT, "tokenizer: %zu merges are more than %d", n, MAX_TOKENS);
    const size_t size = table_size(n);
    FAIL_IF(!(t->merge = kv_alloc_array(size, sizeof *t->merge, false)), KV_E_NOMEM, "tokenizer: out of memory");
    FAIL_IF(!(joined = kv_alloc((size_t)t->longest + 1)), KV_E_NOMEM, "tokenizer: out of memory");
    memset(t->merge, 0xff, size * sizeof *t->merge);
    t->merge_mask = (uint32_t)(size - 1);
    for (size_t r = 0; r < n; r++) {
        const char *const space = len[r] > 1 ? memchr(rule[r] + 1, ' ', len[r] - 1) : NULL;
        if (!space) continue;
        const size_t a = (size_t)(space - rule[r]), b = len[r] - a - 1;
        if (a + b > t->longest) continue;
        memcpy(joined, rule[r], a);
        memcpy(joined + a, space + 1, b);
        const int32_t left = kv_token_find(t, rule[r], a), right = kv_token_find(t, space + 1, b), id = kv_token_find(t, joined, a + b);
        if (left < 0 || right < 0 || id < 0 || kv_merge_find(t, left, right)) continue;
        uint32_t i = kv_hash_pair((uint32_t)left, (uint32_t)right) & t->merge_mask;
        while (t->merge[i].id >= 0) i = (i + 1) & t->merge_mask;
        t->merge[i] = (kv_merge){ left, right, (int32_t)r, id };
    }
fail:
    kv_free(joined);
    kv_free(rule);
    kv_free(len);
    return status;
}

static bool is_special(int type) { return type == KV_TOKEN_CONTROL || type == KV_TOKEN_USER || type == KV_TOKEN_UNKNOWN; }

static int longest_first(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static int index_special(kv_tokenizer *t)
{
    uint32_t length[MAX_SPECIAL_LENGTHS];
    int n = 0;
    for (int32_t id = 0; id < t->n; id++) {
        if (!is_special(t->type[id]) || t->len[id] == 0) continue;
        const uint8_t a = (uint8_t)t->text[id][0], b = t->len[id] > 1 ? (uint8_t)t->text[id][1] : 0;
        if (t->len[id] == 1) t->special_first[a / 64] |= 1ull << a % 64;
        else t->special_pair[(a << 8 | b) / 64] |= 1ull << b % 64;
        int i = 0;
        while (i < n && length[i] != t->len[id]) i++;
        if (i < n) continue;
        RETURN_ERROR_IF(n == MAX_SPECIAL_LENGTHS, KV_E_CORRUPT, "tokenizer: special tokens have more than %d different lengths", MAX_SPECIAL_LENGTHS);
        length[n++] = t->len[id];
    }
    if (!(t->special_len = kv_alloc_array((size_t)n, sizeof *t->special_len, false))) return KV_E_NOMEM;
    if (n > 0) memcpy(t->special_len, length, (size_t)n * sizeof *length);
    qsort(t->special_len, (size_t)n, sizeof *t->special_len, longest_first);
    t->n_special_len = n;
    return KV_OK;
}

/* ---- loading */

/* An id that the file names, or `absent` when it names none. */
static int special_id(const kv_tokenizer *t, const kv_gguf *g, const char *key, int absent, int *id)
{
    double v = absent;
    char full[64];
    snprintf(full, sizeof full, "tokenizer.ggml.%s_token_id", key);
    *id = -1;
    if (!kv_gguf_number(g, full, &v)) v = absent < t->n ? absent : -1;
    else if (v == 4294967295.0) v = -1;          /* 2^32 - 1: "none" */
    RETURN_ERROR_IF(!(v >= -1 && v < t->n) || v != floor(v), KV_E_CORRUPT, "tokenizer: %s=%g is outside 0..%d", full, v, t->n - 1);
    *id = (int)v;
    return KV_OK;
}

static int flag(const kv_gguf *g, const char *key, int absent)
{
    double v = absent;
    char full[64];
    snprintf(full, sizeof full, "tokenizer.ggml.%s", key);
    kv_gguf_number(g, full, &v);
    return v != 0;
}

static int load_vocabulary(kv_tokenizer *t, const kv_gguf *g)
{
    size_t n = 0, n_types = 0, n_scores = 0;
    int type;
    RETURN_ERROR_IF(!kv_gguf_array_strings(g, "tokenizer.ggml.tokens", &t->text, &t->len, &n), KV_E_CORRUPT, "tokenizer: tokenizer.ggml.tokens is missing or no list of texts");
    RETURN_ERROR_IF(n < 1 || n > MAX_TOKENS, KV_E_CORRUPT, "tokenizer: %zu tokens are outside 1..%d", n, MAX_TOKENS);
    t->n = (int)n;
    if (!(t->type = kv_zalloc(n)) || !(t->is_end = kv_zalloc(n))) return KV_E_NOMEM;
    const bool has_types = kv_gguf_array(g, "tokenizer.ggml.token_type", &type, &n_types) && n_types > 0;
    RETURN_ERROR_IF(has_types && n_types < n, KV_E_CORRUPT, "tokenizer: tokenizer.ggml.token_type has %zu entries for %zu tokens", n_types, n);
    for (size_t i = 0; i < n; i++) {
        double v = KV_TOKEN_NORMAL;
        if (has_types) kv_gguf_array_number(g, "tokenizer.ggml.token_type", i, &v);
        t->type[i] = v >= 0 && v <= KV_TOKEN_BYTE ? (uint8_t)v : KV_TOKEN_NORMAL;
    }
    if (t->kind == KV_TOK_SPM) {
        const bool has_scores = kv_gguf_array(g, "tokenizer.ggml.scores", &type, &n_scores);
        RETURN_ERROR_IF(!has_scores || n_scores < n, KV_E_CORRUPT, "tokenizer: tokenizer.ggml.scores has %zu entries for %zu tokens", n_scores, n);
        if (!(t->score = kv_alloc_array(n, sizeof *t->score, false))) return KV_E_NOMEM;
        for (size_t i = 0; i < n; i++) {
            double v = 0;
            kv_gguf_array_number(g, "tokenizer.ggml.scores", i, &v);
            RETURN_ERROR_IF(isnan(v), KV_E_CORRUPT, "tokenizer: the score of token %zu is NaN", i);
            t->score[i] = (float)v;
        }
    }
    return index_tokens(t);
}

static int load_bpe(kv_tokenizer *t, const kv_gguf *g)
{
    const char *pre = "default";
    size_t n = 7;
    kv_gguf_string(g, "tokenizer.ggml.pre", &pre, &n);
    FORWARD_IF_ERROR(kv_split_compile(t, pre, n));
    FORWARD_IF_ERROR(load_merges(t, g));
    for (int i = 0; i < KV_BYTE_CHARS; i++) t->char_byte[i] = -1;
    for (int b = 0; b < 256; b++) {
        char utf8[2];
        uint32_t c;
        const int len = kv_byte_text(b, utf8);
        t->byte_id[b] = kv_token_find(t, utf8, (size_t)len);
        kv_utf8_next(utf8, utf8 + len, &c);
        t->char_byte[c] = (int16_t)b;
    }
    return KV_OK;
}

static int load_spm(kv_tokenizer *t)
{
    snprintf(t->name, sizeof t->name, "spm");
    for (int b = 0; b < 256; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
        t->byte_id[b] = kv_token_find(t, name, 6);
    }
    if (!(t->bigram = kv_zalloc(((size_t)1 << KV_BIGRAM_BITS) / 8))) return KV_E_NOMEM;
    for (int32_t id = 0; id < t->n; id++) kv_bigram_add(t, t->text[id], t->len[id]);
    return KV_OK;
}

/* Tokens that end a turn or a text: by the file's word, or by the names that model families use. */
static int load_ends(kv_tokenizer *t, const kv_gguf *g)
{
    static const char *const key[] = { "eos", "eot", "eom" };
    static const char *const name[] = { "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>",
        "<end_of_turn>", "<eos>", "</s>", "<EOT>", "<|EOT|>", "<｜end▁of▁sentence｜>" };
    for (size_t i = 0; i < sizeof key / sizeof *key; i++) {
        int id;
        FORWARD_IF_ERROR(special_id(t, g, key[i], -1, &id));
        if (id >= 0) t->is_end[id] = 1;
    }
    for (size_t i = 0; i < sizeof name / sizeof *name; i++) {
        const int32_t id = kv_token_find(t, name[i], strlen(name[i]));
        /* Gemma's user-defined "</s>" is HTML; a user-defined "<|im_end|>" still ends a turn. */
        if (id >= 0 && (t->type[id] == KV_TOKEN_CONTROL || (t->type[id] == KV_TOKEN_USER && name[i][1] == '|'))) t->is_end[id] = 1;
    }
    if (t->eos >= 0) t->is_end[t->eos] = 1;
    return KV_OK;
}

int kv_tokenizer_new(kv_tokenizer **out, const kv_gguf *g)
{
    const char *model = "", *chat = "";
    size_t n_model = 0, n_chat = 0;
    RETURN_ERROR_IF(!out || !g, KV_E_ARG, "kv_tokenizer_new: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(!kv_gguf_string(g, "tokenizer.ggml.model", &model, &n_model), KV_E_CORRUPT, "tokenizer: tokenizer.ggml.model is missing");
    const bool bpe = n_model == 4 && memcmp(model, "gpt2", 4) == 0, spm = n_model == 5 && memcmp(model, "llama", 5) == 0;
    RETURN_ERROR_IF(!bpe && !spm, KV_E_UNSUPPORTED, "tokenizer: model '%.*s' is neither gpt2 nor llama", (int)kv_min64((int64_t)n_model, 40), model);
    kv_tokenizer *const t = kv_zalloc(sizeof *t);
    if (!t) return KV_E_NOMEM;
    int status = KV_OK;
    t->kind = bpe ? KV_TOK_BPE : KV_TOK_SPM;
    FAIL_IF_ERROR(load_vocabulary(t, g));
    FAIL_IF_ERROR(bpe ? load_bpe(t, g) : load_spm(t));
    FAIL_IF_ERROR(index_special(t));
    /* What a file leaves unsaid: SentencePiece models have 0 unknown, 1 begin, 2 end, and begin with it. */
    FAIL_IF_ERROR(special_id(t, g, "bos", spm ? 1 : -1, &t->bos));
    FAIL_IF_ERROR(special_id(t, g, "eos", spm ? 2 : -1, &t->eos));
    FAIL_IF_ERROR(special_id(t, g, "unknown", spm ? 0 : -1, &t->unk));
    t->add_bos = flag(g, "add_bos_token", spm || t->ignore_merges) && t->bos >= 0;
    t->add_eos = flag(g, "add_eos_token", 0) && t->eos >= 0;
    t->add_space_prefix = spm && flag(g, "add_space_prefix", 1);
    FAIL_IF_ERROR(load_ends(t, g));
    kv_gguf_string(g, "tokenizer.chat_template", &chat, &n_chat);
    FAIL_IF_ERROR(kv_chat_detect(t, chat, n_chat));
    *out = t;
    return KV_OK;
fail:
    kv_tokenizer_free(t);
    return status;
}

void kv_tokenizer_free(kv_tokenizer *t)
{
    if (!t) return;
    kv_split_free(t);
    kv_free(t->text);
    kv_free(t->len);
    kv_free(t->type);
    kv_free(t->score);
    kv_free(t->slot);
    kv_free(t->merge);
    kv_free(t->is_end);
    kv_free(t->special_len);
    kv_free(t->bigram);
    kv_free(t->system_default);
    kv_free(t);
}

const char *kv_tokenizer_name(const kv_tokenizer *t) { return t->name; }
int kv_tokenizer_n_vocab(const kv_tokenizer *t) { return t->n; }

void kv_tokenizer_special(const kv_tokenizer *t, int *bos, int *eos, int *add_bos)
{
    *bos = t->bos;
    *eos = t->eos;
    *add_bos = t->add_bos;
}

/* ---- text to ids */

/* The special token at p, longest first, or -1. */
static int32_t special_at(const kv_tokenizer *t, const char *p, const char *end, bool parse_special)
{
    const uint8_t a = (uint8_t)*p, b = end - p > 1 ? (uint8_t)p[1] : 0;
    const bool one = t->special_first[a / 64] >> a % 64 & 1, more = end - p > 1 && t->special_pair[(a << 8 | b) / 64] >> b % 64 & 1;
    if (!one && !more) return -1;
    for (int i = 0; i < t->n_special_len; i++) {
        const uint32_t len = t->special_len[i];
        if ((size_t)(end - p) < len) continue;
        const int32_t id = kv_token_find(t, p, len);
        if (id < 0 || !is_special(t->type[id]) || (t->type[id] != KV_TOKEN_USER && !parse_special)) continue;
        return id;
    }
    return -1;
}

static int encode(const kv_tokenizer *t, const char *text, size_t n, bool add_special, bool parse_special, kv_sink *out)
{
    const char *const end = text + n, *start = text, *p = text;
    bool after_special = true;
    if (add_special && t->add_bos) kv_emit(out, t->bos);
    for (;;) {
        const int32_t id = p < end ? special_at(t, p, end, parse_special) : -1;
        if (p < end && id < 0) { p++; continue; }
        if (p > start) {
            const size_t len = (size_t)(p - start);
            FORWARD_IF_ERROR(t->kind == KV_TOK_BPE ? kv_encode_bpe(t, start, len, out)
                                                   : kv_encode_spm(t, start, len, t->add_space_prefix && after_special, out));
            after_special = false;
        }
        if (p == end) break;
        kv_emit(out, id);
        after_special = true;
        start = p += t->len[id];
    }
    if (add_special && t->add_eos) kv_emit(out, t->eos);
    return KV_OK;
}

int kv_tokenize(const kv_model *m, const char *text, double n_bytes, int add_special, int parse_special, int32_t *ids, int cap, int *n)
{
    RETURN_ERROR_IF(!m || !n || (!text && n_bytes != 0), KV_E_ARG, "kv_tokenize: %s is NULL", !m ? "model" : !n ? "n" : "text");
    RETURN_ERROR_IF(!m->tok, KV_E_UNSUPPORTED, "kv_tokenize: the model has no tokenizer");
    RETURN_ERROR_IF(!(n_bytes >= 0 && n_bytes <= MAX_TEXT), KV_E_ARG, "kv_tokenize: n_bytes=%g is outside 0..2^29", n_bytes);
    RETURN_ERROR_IF(ids && cap < 0, KV_E_ARG, "kv_tokenize: cap=%d is negative", cap);
    kv_sink out = { .ids = ids, .cap = cap };
    FORWARD_IF_ERROR(encode(m->tok, n_bytes > 0 ? text : "", (size_t)n_bytes, add_special != 0, parse_special != 0, &out));
    *n = (int)out.n;                             /* at most three tokens a byte */
    RETURN_ERROR_IF(ids && out.n > cap, KV_E_ARG, "kv_tokenize: cap=%d is too small for %d tokens", cap, *n);
    return KV_OK;
}

/* ---- ids to text */

typedef struct text_sink { char *buf; int64_t cap, n; } text_sink;

static void put(text_sink *s, const char *p, size_t n)
{
    if (s->buf && s->n + (int64_t)n <= s->cap) memcpy(s->buf + s->n, p, n);
    s->n += (int64_t)n;
}

static void put_token(const kv_tokenizer *t, int32_t id, text_sink *s)
{
    const char *p = t->text[id], *const end = p + t->len[id];
    const int type = t->type[id];
    if (is_special(type)) { put(s, p, t->len[id]); return; }
    if (t->kind == KV_TOK_SPM && type == KV_TOKEN_BYTE) {
        for (int b = 0; b < 256; b++) if (t->byte_id[b] == id) { const char byte = (char)b; put(s, &byte, 1); return; }
    }
    while (p < end) {
        uint32_t c;
        const int n = kv_utf8_next(p, end, &c);
        if (t->kind == KV_TOK_BPE && c < KV_BYTE_CHARS && t->char_byte[c] >= 0) put(s, &(char){ (char)t->char_byte[c] }, 1);
        else if (t->kind == KV_TOK_SPM && c == 0x2581) put(s, " ", 1);
        else put(s, p, (size_t)n);
        p += n;
    }
}

/* Not NUL-terminated.  buf NULL counts; cap too small is KV_E_ARG with the need in *n_bytes. */
int kv_detokenize(const kv_model *m, const int32_t *ids, int n, char *buf, int cap, int *n_bytes)
{
    RETURN_ERROR_IF(!m || !n_bytes || (!ids && n != 0), KV_E_ARG, "kv_detokenize: %s is NULL", !m ? "model" : !n_bytes ? "n_bytes" : "ids");
    RETURN_ERROR_IF(!m->tok, KV_E_UNSUPPORTED, "kv_detokenize: the model has no tokenizer");
    RETURN_ERROR_IF(n < 0 || (buf && cap < 0), KV_E_ARG, "kv_detokenize: %s=%d is negative", n < 0 ? "n" : "cap", n < 0 ? n : cap);
    text_sink out = { .buf = buf, .cap = cap };
    for (int i = 0; i < n; i++) {
        RETURN_ERROR_IF(ids[i] < 0 || ids[i] >= m->tok->n, KV_E_ARG, "kv_detokenize: id %d at %d is outside 0..%d", (int)ids[i], i, m->tok->n - 1);
        put_token(m->tok, ids[i], &out);
    }
    RETURN_ERROR_IF(out.n > INT32_MAX, KV_E_ARG, "kv_detokenize: %g bytes are more than 2^31 - 1", (double)out.n);
    *n_bytes = (int)out.n;
    RETURN_ERROR_IF(buf && out.n > cap, KV_E_ARG, "kv_detokenize: cap=%d is too small for %d bytes", cap, *n_bytes);
    return KV_OK;
}

int kv_token_is_end(const kv_model *m, int id) { return m && m->tok && id >= 0 && id < m->tok->n ? m->tok->is_end[id] : 0; }
