/* tokenizer.h -- what the tokenizer's files share: vocabulary, look-up tables, the sink of ids. */
#ifndef KV_TOKENIZER_H
#define KV_TOKENIZER_H
#include "internal.h"
#include "model.h"

enum { KV_TOK_BPE = 0, KV_TOK_SPM = 1 };
/* tokenizer.ggml.token_type */
enum { KV_TOKEN_NORMAL = 1, KV_TOKEN_UNKNOWN = 2, KV_TOKEN_CONTROL = 3, KV_TOKEN_USER = 4, KV_TOKEN_UNUSED = 5, KV_TOKEN_BYTE = 6 };
enum { KV_CHAT_NONE, KV_CHAT_CHATML, KV_CHAT_LLAMA3, KV_CHAT_GEMMA, KV_CHAT_LLAMA2, KV_CHAT_MISTRAL };
enum { KV_TOK_STAGES = 6,                   /* regexes of a pre-tokenizer, at most */
       KV_BYTE_CHARS = 324 };               /* GPT-2 writes bytes as characters below U+0144 */

typedef struct kv_merge { int32_t left, right, rank, id; } kv_merge;     /* id -1: an empty slot */

struct kv_tokenizer {
    int          kind, chat, n;
    const char **text;                      /* [n] into the file, not NUL-terminated */
    uint32_t    *len;
    uint8_t     *type;
    float       *score;                     /* SPM */
    uint32_t     longest;                   /* bytes of the longest token */
    int32_t     *slot;                      /* text -> lowest id; open addressing, -1 empty */
    uint32_t     slot_mask;
    kv_merge    *merge;                     /* BPE: (left, right) -> rank, id; open addressing */
    uint32_t     merge_mask;
    int32_t      byte_id[256];              /* the token of one byte, or -1 */
    int          bos, eos, unk, add_bos, add_eos, add_space_prefix, ignore_merges;
    uint8_t     *is_end;                    /* [n] */
    /* Tokens cut out before anything else: distinct lengths, longest first, and which first two bytes they can have. */
    uint32_t    *special_len;
    int          n_special_len;
    uint64_t     special_first[4], special_pair[1024];
    uint64_t    *bigram;                    /* SPM: bit set of hashed character pairs that occur inside tokens */
    int16_t      char_byte[KV_BYTE_CHARS];  /* BPE: the byte that a character stands for, or -1 */
    void        *stage[KV_TOK_STAGES];      /* pcre2_code */
    int          n_stages;
    char         name[64];
    char        *system_default;            /* system text that the chat template adds by itself, or NULL */
    bool         dated;                     /* the template (Llama 3.1 and later) opens its system turn by two dates */
    const char  *inst[2];                   /* Mistral: what stands before and after the user's text */
};

typedef struct kv_sink { int32_t *ids; int cap; int64_t n; } kv_sink;     /* counts on when full */
static inline void kv_emit(kv_sink *s, int32_t id)
{
    if (s->ids && s->n < s->cap) s->ids[s->n] = id;
    s->n++;
}

/* FNV-1a, 32 bits. */
static inline uint32_t kv_hash_bytes(const char *p, size_t n)
{
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)p[i]) * 16777619u;
    return h ^ h >> 15;
}
static inline uint32_t kv_hash_pair(uint32_t a, uint32_t b)
{
    const uint64_t h = ((uint64_t)a << 32 | b) * 0x9E3779B97F4A7C15ull;   /* 2^64 / golden ratio */
    return (uint32_t)(h >> 32);
}

/* The character at p < end: its length, and its code point in *c.  A byte that starts no well-formed sequence is a
 * character of its own, 0x110000 + byte. */
int     kv_utf8_next(const char *p, const char *end, uint32_t *c);
int32_t kv_token_find(const kv_tokenizer *t, const char *text, size_t n);    /* lowest id, or -1 */

/* tokenizer_split.c: pre-tokenization of byte-level BPE */
int  kv_split_compile(kv_tokenizer *t, const char *pre, size_t n);
void kv_split_free(kv_tokenizer *t);
typedef int (*kv_word_fn)(void *ctx, const char *word, size_t n);
int  kv_split(const kv_tokenizer *t, const char *text, size_t n, kv_word_fn fn, void *ctx);

/* tokenizer_merge.c: a piece of text without special tokens, to ids */
int  kv_byte_text(int b, char *out2);       /* BPE: the UTF-8 of the character that stands for a byte; its length, 1 or 2 */
enum { KV_BIGRAM_BITS = 22 };
void kv_bigram_add(kv_tokenizer *t, const char *text, size_t n);
const kv_merge *kv_merge_find(const kv_tokenizer *t, int32_t left, int32_t right);
int  kv_encode_bpe(const kv_tokenizer *t, const char *text, size_t n, kv_sink *out);
int  kv_encode_spm(const kv_tokenizer *t, const char *text, size_t n, bool space_first, kv_sink *out);

/* chat.c */
int  kv_chat_detect(kv_tokenizer *t, const char *template_text, size_t n);
#endif
