/* tokenizer_split.c -- pre-tokenization: a text into the words that byte-level BPE merges within.
 *
 * A pre-tokenizer is a list of regular expressions.  Each splits what the one before left, as if every piece were a text
 * of its own: matches are pieces, and so is what lies between them.  PCRE2 runs them with Unicode classes.  Bytes that
 * are not UTF-8 are shown to it as U+0001, a symbol like any other, and come out as the bytes they were. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include "tokenizer.h"

/* White_Space of Unicode, spelled out: PCRE2's \s also takes U+180E, which has not been white space since Unicode 6.3. */
#define WS "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define S "[" WS "]"
#define NOT_S "[^" WS "]"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" WS "\\p{L}\\p{N}]+|" S "+(?!" NOT_S ")"
#define LLAMA3(digits) "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits \
    "| ?[^" WS "\\p{L}\\p{N}]+[\\r\\n]*|" S "*[\\r\\n]+|" S "+(?!" NOT_S ")|" S "+"
/* Letters with case, as DeepSeek's tokenizer.json lists them. */
#define CASED "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥ" \
    "ῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"

static const struct {
    const char *name, *aliases;             /* values of tokenizer.ggml.pre, each between blanks */
    int         whole_words;                /* a word that is a token is taken as it is, whatever the merges say */
    const char *stage[KV_TOK_STAGES];
} pre_tokenizers[] = {
    { "gpt-2", " gpt-2 phi-2 mpt olmo jais roberta-bpe ", 0, { GPT2 } },
    { "llama-bpe", " llama-bpe llama3 llama-v3 falcon3 ", 1, { LLAMA3("\\p{N}{1,3}") } },
    { "smaug-bpe", " smaug-bpe dbrx ", 0, { LLAMA3("\\p{N}{1,3}") } },
    { "qwen2", " qwen2 stablelm2 deepseek-r1-qwen megrez ", 0, { LLAMA3("\\p{N}") } },
    { "smollm", " smollm starcoder refact command-r codeshell exaone ", 0, { "\\p{N}", GPT2 } },
    { "deepseek-llm", " deepseek-llm ", 0, { "[\\r\\n]", S "?[" CASED "]+", S "?[!-/:-~！-／：-～‘-‟\\x{3000}-。]+", "(?<!" S ")" S "+\\z",
                                             "[一-龥\\x{800}-一가-\\x{d7ff}]+", "\\p{N}+" } },
    { "default", " default ", 0, { "[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]" } },
};
enum { N_PRE = sizeof pre_tokenizers / sizeof *pre_tokenizers };

int kv_split_compile(kv_tokenizer *t, const char *pre, size_t n)
{
    char key[40];
    RETURN_ERROR_IF(n > 30 || memchr(pre, ' ', n) || memchr(pre, '\0', n), KV_E_CORRUPT, "tokenizer: tokenizer.ggml.pre is not a name");
    snprintf(key, sizeof key, " %.*s ", (int)n, pre);
    int i = 0;
    while (i < N_PRE && (n == 0 || !strstr(pre_tokenizers[i].aliases, key))) i++;
    RETURN_ERROR_IF(i == N_PRE, KV_E_UNSUPPORTED, "tokenizer: pre-tokenizer '%.*s' is none of gpt-2, llama-bpe, smaug-bpe, qwen2, smollm, deepseek-llm, default", (int)n, pre);
    for (int k = 0; k < KV_TOK_STAGES && pre_tokenizers[i].stage[k]; k++) {
        int error;
        PCRE2_SIZE at;
        pcre2_code *const code = pcre2_compile((PCRE2_SPTR)pre_tokenizers[i].stage[k], PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &at, NULL);
        RETURN_ERROR_IF(!code, KV_E_INTERNAL, "tokenizer: regex %d of '%s' fails with PCRE2 error %d at %d", k + 1, pre_tokenizers[i].name, error, (int)at);
        pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);    /* without JIT the interpreter gives the same matches */
        t->stage[t->n_stages++] = code;
    }
    t->ignore_merges = pre_tokenizers[i].whole_words;
    snprintf(t->name, sizeof t->name, "bpe %s", pre_tokenizers[i].name);
    return KV_OK;
}

void kv_split_free(kv_tokenizer *t)
{
    for (int i = 0; i < t->n_stages; i++) pcre2_code_free(t->stage[i]);
    t->n_stages = 0;
}

typedef struct splitter {
    const kv_tokenizer *t;
    const char *bytes, *shown;              /* the text, and the text as PCRE2 sees it */
    pcre2_match_data *match;
    kv_word_fn  fn;
    void       *ctx;
} splitter;

static int split_stage(const splitter *s, int stage, size_t at, size_t end)
{
    if (at == end) return KV_OK;
    if (stage == s->t->n_stages) return s->fn(s->ctx, s->bytes + at, end - at);
    const PCRE2_SPTR subject = (PCRE2_SPTR)s->shown + at;
    const PCRE2_SIZE *const span = pcre2_get_ovector_pointer(s->match);
    const size_t n = end - at;
    size_t done = 0;                        /* bytes of the piece that are handed on */
    for (size_t from = 0; from < n;) {
        int rc = pcre2_match(s->t->stage[stage], subject, n, from, PCRE2_NO_UTF_CHECK, s->match, NULL);
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = pcre2_match(s->t->stage[stage], subject, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, s->match, NULL);
        if (rc == PCRE2_ERROR_NOMATCH) break;
        RETURN_ERROR_IF(rc < 0, rc == PCRE2_ERROR_NOMEMORY ? KV_E_NOMEM : KV_E_INTERNAL, "tokenizer: PCRE2 error %d in %s, regex %d", rc, s->t->name, stage + 1);
        const size_t lo = span[0], hi = span[1];          /* later stages share the match data */
        RETURN_ERROR_IF(hi <= lo, KV_E_INTERNAL, "tokenizer: an empty match in %s, regex %d", s->t->name, stage + 1);
        FORWARD_IF_ERROR(split_stage(s, stage + 1, at + done, at + lo));
        FORWARD_IF_ERROR(split_stage(s, stage + 1, at + lo, at + hi));
        done = from = hi;
    }
    return split_stage(s, stage + 1, at + done, end);
}

/* Calls fn for each word of the text, in order; their concatenation is the text. */
int kv_split(const kv_tokenizer *t, const char *text, size_t n, kv_word_fn fn, void *ctx)
{
    int status = KV_OK;
    char *copy = NULL;
    splitter s = { .t = t, .bytes = text, .shown = text, .fn = fn, .ctx = ctx };
    uint32_t c;
    for (const char *p = text, *const end = text + n; p < end;) {
        const int step = kv_utf8_next(p, end, &c);
        if (c >= 0x110000) {
            if (!copy) {
                FAIL_IF(!(copy = kv_alloc(n)), KV_E_NOMEM, "tokenizer: out of memory: %zu bytes asked for", n);
                memcpy(copy, text, n);
                s.shown = copy;
            }
            copy[p - text] = '\x01';
        }
        p += step;
    }
    FAIL_IF(!(s.match = pcre2_match_data_create(1, NULL)), KV_E_NOMEM, "tokenizer: out of memory");
    FAIL_IF_ERROR(split_stage(&s, 0, 0, n));
fail:
    if (s.match) pcre2_match_data_free(s.match);
    kv_free(copy);
    return status;
}
