/* chat.c -- chat turns as the model's template writes them.
 *
 * Templates are Jinja programs; a handful of families covers the models at hand, told apart by what their template (or,
 * without one, their vocabulary) contains.  The text of a begin token at the very start is left to kv_tokenize's
 * add_special, which adds it when the model wants one; all other special tokens are in the text (parse_special).
 *
 * A conversation is formatted turn by turn.  Gemma, Llama 2 and Mistral have no system turn: the text goes in front of the
 * user's, inside its turn.  So `first` tells where a turn stands: 1 opens the conversation, 2 comes right after a
 * system turn that did, 0 is any other. */
#include "tokenizer.h"

const char *kv_tokenizer_template(const kv_tokenizer *t)
{
    static const char *const name[] = { "none", "chatml", "llama3", "gemma", "llama2", "mistral" };
    return name[t->chat];
}

static bool contains(const char *text, size_t n, const char *part) { return memmem(text, n, part, strlen(part)) != NULL; }
static bool has_token(const kv_tokenizer *t, const char *text) { return kv_token_find(t, text, strlen(text)) >= 0; }

/* Families whose template opens a conversation without a system turn by one of its own: its text stands in the template
 * between "<|im_start|>system\n" and "<|im_end|>", as a plain literal. */
static int find_system_default(kv_tokenizer *t, const char *text, size_t n)
{
    static const char open[] = "<|im_start|>system", close[] = "<|im_end|>";
    const char *const end = text + n;
    for (const char *p = text; (p = memmem(p, (size_t)(end - p), open, sizeof open - 1)) != NULL;) {
        p += sizeof open - 1;
        if (p < end && *p == '\n') p++;
        else if (end - p > 2 && p[0] == '\\' && p[1] == 'n') p += 2;
        else continue;
        const char *const stop = memmem(p, (size_t)(end - p), close, sizeof close - 1);
        if (!stop) break;
        const size_t len = (size_t)(stop - p);
        if (len == 0 || len > 4096 || memchr(p, '\'', len) || memchr(p, '"', len) || memchr(p, '{', len) || memchr(p, '\\', len)) continue;
        if (!(t->system_default = kv_zalloc(len + 1))) return KV_E_NOMEM;
        memcpy(t->system_default, p, len);
        break;
    }
    return KV_OK;
}

int kv_chat_detect(kv_tokenizer *t, const char *text, size_t n)
{
    if (n > 0) {
        t->chat = contains(text, n, "<|im_start|>") ? KV_CHAT_CHATML : contains(text, n, "<|start_header_id|>") ? KV_CHAT_LLAMA3
                : contains(text, n, "<start_of_turn>") ? KV_CHAT_GEMMA : contains(text, n, "<<SYS>>") ? KV_CHAT_LLAMA2
                : contains(text, n, "[INST]") ? KV_CHAT_MISTRAL : KV_CHAT_NONE;
        t->dated = t->chat == KV_CHAT_LLAMA3 && contains(text, n, "Cutting Knowledge Date: December 2023");
        t->inst[0] = contains(text, n, "[INST] ") ? "[INST] " : "[INST]";          /* Mistral's versions differ by these blanks */
        t->inst[1] = contains(text, n, " [/INST]") ? " [/INST]" : "[/INST]";
        return t->chat == KV_CHAT_CHATML ? find_system_default(t, text, n) : KV_OK;
    }
    t->chat = has_token(t, "<|im_start|>") && has_token(t, "<|im_end|>") ? KV_CHAT_CHATML
            : has_token(t, "<|start_header_id|>") && has_token(t, "<|eot_id|>") ? KV_CHAT_LLAMA3
            : has_token(t, "<start_of_turn>") && has_token(t, "<end_of_turn>") ? KV_CHAT_GEMMA : KV_CHAT_NONE;
    return KV_OK;
}

typedef struct page { char *buf; int64_t cap, n; } page;

static void put(page *o, const char *p, size_t n)
{
    if (o->buf && o->n + (int64_t)n <= o->cap) memcpy(o->buf + o->n, p, n);
    o->n += (int64_t)n;
}
static void put_text(page *o, const char *p) { put(o, p, strlen(p)); }

static const char blank[] = " \t\n\v\f\r";

static void put_right_trimmed(page *o, const char *p)
{
    size_t n = strlen(p);
    while (n > 0 && strchr(blank, p[n - 1])) n--;
    put(o, p, n);
}

/* Jinja's trim: white space off both ends (ASCII here). */
static void put_trimmed(page *o, const char *p) { put_right_trimmed(o, p + strspn(p, blank)); }

static void put_id(page *o, const kv_tokenizer *t, int id) { if (id >= 0) put(o, t->text[id], t->len[id]); }

enum role { SYSTEM, USER, ASSISTANT, OPEN };

static void chatml(page *o, const kv_tokenizer *t, enum role role, const char *text, int first)
{
    static const char *const name[] = { "system", "user", "assistant", "assistant" };
    if (first == 1 && role != SYSTEM && role != OPEN && t->system_default) chatml(o, t, SYSTEM, t->system_default, first);
    put_text(o, "<|im_start|>");
    put_text(o, name[role]);
    put_text(o, "\n");
    if (role == OPEN) return;
    put_text(o, text);
    put_text(o, "<|im_end|>\n");
}

/* The day that the templates write when they are told none; those that could ask the clock would make runs differ. */
static const char dates[] = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

static void llama3(page *o, const kv_tokenizer *t, enum role role, const char *text, int first)
{
    static const char *const name[] = { "system", "user", "assistant", "assistant" };
    const bool opens = t->dated && first == 1 && role != OPEN;
    if (opens && role != SYSTEM) llama3(o, t, SYSTEM, "", first);
    put_text(o, "<|start_header_id|>");
    put_text(o, name[role]);
    put_text(o, "<|end_header_id|>\n\n");
    if (role == OPEN) return;
    if (opens && role == SYSTEM) put_text(o, dates);
    put_trimmed(o, text);
    put_text(o, "<|eot_id|>");
}

static void gemma(page *o, enum role role, const char *text, int first)
{
    const bool after_system = role == USER && first == 2;
    if (!after_system) put_text(o, role == SYSTEM || role == USER ? "<start_of_turn>user\n" : "<start_of_turn>model\n");
    if (role == OPEN) return;
    if (role == SYSTEM) {
        put_text(o, text);
        put_text(o, "\n\n");
        return;
    }
    put_trimmed(o, text);
    put_text(o, "<end_of_turn>\n");
}

static void inst(page *o, const kv_tokenizer *t, enum role role, const char *text, int first)
{
    const bool llama2 = t->chat == KV_CHAT_LLAMA2;
    if (role == OPEN) return;
    if (role == ASSISTANT) {
        if (llama2) put_text(o, " "), put_trimmed(o, text), put_text(o, " ");
        else put_text(o, text);
        put_id(o, t, t->eos);
        return;
    }
    if (!(role == USER && first == 2)) {
        if (llama2 && first == 0) put_id(o, t, t->bos);
        put_text(o, llama2 ? "[INST] " : t->inst[0]);
    }
    if (role == SYSTEM) {
        if (llama2) put_text(o, "<<SYS>>\n");
        put_text(o, text);
        put_text(o, llama2 ? "\n<</SYS>>\n\n" : "\n\n");
        return;
    }
    if (!llama2) put_text(o, text);
    else if (first == 2) put_right_trimmed(o, text);     /* the template trims the system text and this as one */
    else put_trimmed(o, text);
    put_text(o, llama2 ? " [/INST]" : t->inst[1]);
}

/* Not NUL-terminated.  buf NULL counts; cap too small is KV_E_ARG with the need in *n_bytes. */
int kv_chat_format(const kv_model *m, const char *role, const char *text, int first, char *buf, int cap, int *n_bytes)
{
    RETURN_ERROR_IF(!m || !n_bytes || (role && !text), KV_E_ARG, "kv_chat_format: %s is NULL", !m ? "model" : !n_bytes ? "n_bytes" : "text");
    RETURN_ERROR_IF(!m->tok || m->tok->chat == KV_CHAT_NONE, KV_E_UNSUPPORTED, "chat: the model has no chat template of a known kind: chatml, llama3, gemma, llama2, mistral");
    RETURN_ERROR_IF(buf && cap < 0, KV_E_ARG, "kv_chat_format: cap=%d is negative", cap);
    RETURN_ERROR_IF(first < 0 || first > 2, KV_E_ARG, "kv_chat_format: first=%d is outside 0..2", first);
    const kv_tokenizer *const t = m->tok;
    const enum role who = !role ? OPEN : strcmp(role, "system") == 0 ? SYSTEM : strcmp(role, "user") == 0 ? USER : ASSISTANT;
    RETURN_ERROR_IF(who == ASSISTANT && strcmp(role, "assistant") != 0, KV_E_ARG, "chat: role '%.40s' is none of system, user, assistant", role);
    page o = { .buf = buf, .cap = cap };
    switch (t->chat) {
    case KV_CHAT_CHATML: chatml(&o, t, who, text, first); break;
    case KV_CHAT_LLAMA3: llama3(&o, t, who, text, first); break;
    case KV_CHAT_GEMMA:  gemma(&o, who, text, first); break;
    default:             inst(&o, t, who, text, first);
    }
    RETURN_ERROR_IF(o.n > INT32_MAX, KV_E_ARG, "chat: a turn of %g bytes is too long", (double)o.n);
    *n_bytes = (int)o.n;
    RETURN_ERROR_IF(buf && o.n > cap, KV_E_ARG, "kv_chat_format: cap=%d is too small for %d bytes", cap, *n_bytes);
    return KV_OK;
}
