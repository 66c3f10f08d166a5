/* tokenizer_merge.c -- from a piece of text to ids by merging neighbours, best pair first.
 *
 * Byte-level BPE and SentencePiece differ in what a pair is worth (the rank of a merge rule; the score of the joined
 * token) and share the rest.  Symbols are known by the byte where they start: next[] and prev[] link the living ones.  Pairs
 * wait in a binary heap, best key first and leftmost among equals; a pair whose symbols have changed since is dropped
 * when it surfaces.  n bytes cost O(n log n).
 *
 * SentencePiece has no pre-tokenizer, so a text is one long word.  It is cut where that cannot change the result:
 * between two characters that stand side by side in no token, because no merge can ever cross there.  (The set of pairs is
 * hashed to bits: a collision only leaves a cut out.) */
#include "tokenizer.h"

typedef struct pair { float key; int32_t at, mid, end, id; } pair;       /* text [at, mid) + [mid, end) = token id */

typedef struct word {
    const kv_tokenizer *t;
    const char *text;
    int32_t    *next, *prev, *id;           /* [cap + 1] by first byte; next -1: merged away */
    pair       *heap;
    size_t      cap, n_heap, heap_cap;
    int32_t     n;
    kv_sink    *out;
} word;

static void word_free(word *w)
{
    kv_free(w->next);
    kv_free(w->prev);
    kv_free(w->id);
    kv_free(w->heap);
}

static int word_reserve(word *w, size_t n)
{
    if (n <= w->cap && w->next) return KV_OK;
    const size_t cap = n < 256 ? 256 : n + n / 2;
    kv_free(w->next);
    kv_free(w->prev);
    kv_free(w->id);
    w->cap = 0;
    w->next = kv_alloc_array(cap + 1, sizeof *w->next, false);
    w->prev = kv_alloc_array(cap + 1, sizeof *w->prev, false);
    w->id = kv_alloc_array(cap + 1, sizeof *w->id, false);
    if (!w->next || !w->prev || !w->id) return KV_E_NOMEM;
    w->cap = cap;
    return KV_OK;
}

static bool better(const pair *a, const pair *b) { return a->key < b->key || (a->key == b->key && a->at < b->at); }

static int heap_push(word *w, pair p)
{
    if (w->n_heap == w->heap_cap) {
        const size_t cap = w->heap_cap ? 2 * w->heap_cap : 256;
        pair *const grown = kv_alloc_array(cap, sizeof *grown, false);
        if (!grown) return KV_E_NOMEM;
        if (w->n_heap) memcpy(grown, w->heap, w->n_heap * sizeof *grown);
        kv_free(w->heap);
        w->heap = grown;
        w->heap_cap = cap;
    }
    size_t i = w->n_heap++;
    for (; i > 0 && better(&p, &w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = p;
    return KV_OK;
}

static pair heap_pop(word *w)
{
    const pair top = w->heap[0], last = w->heap[--w->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < w->n_heap; i = child) {
        if (child + 1 < w->n_heap && better(&w->heap[child + 1], &w->heap[child])) child++;
        if (!better(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

const kv_merge *kv_merge_find(const kv_tokenizer *t, int32_t left, int32_t right)
{
    if (left < 0 || right < 0 || !t->merge) return NULL;
    for (uint32_t i = kv_hash_pair((uint32_t)left, (uint32_t)right) & t->merge_mask; t->merge[i].id >= 0; i = (i + 1) & t->merge_mask)
        if (t->merge[i].left == left && t->merge[i].right == right) return &t->merge[i];
    return NULL;
}

/* Puts the pair that starts at byte `at` on the heap, if its two symbols can merge. */
static int offer(word *w, int32_t at)
{
    const kv_tokenizer *const t = w->t;
    const int32_t mid = w->next[at];
    if (mid >= w->n) return KV_OK;
    pair p = { .at = at, .mid = mid, .end = w->next[mid] };
    if (t->kind == KV_TOK_BPE) {
        const kv_merge *const m = kv_merge_find(t, w->id[at], w->id[mid]);
        if (!m) return KV_OK;
        p.key = (float)m->rank;             /* ranks are below 2^24: exact */
        p.id = m->id;
    } else {
        p.id = kv_token_find(t, w->text + at, (size_t)(p.end - at));
        if (p.id < 0) return KV_OK;
        p.key = -t->score[p.id];
    }
    return heap_push(w, p);
}

/* A symbol that is no token: its bytes one by one; a byte without a token is the unknown token, or nothing. */
static void emit_bytes(const word *w, int32_t at, int32_t end)
{
    for (int32_t i = at; i < end; i++) {
        const int32_t id = w->t->byte_id[(uint8_t)w->text[i]];
        if (id >= 0) kv_emit(w->out, id);
        else if (w->t->kind == KV_TOK_SPM && w->t->unk >= 0) { kv_emit(w->out, w->t->unk); break; }
    }
}

/* Merges the symbols that next[] and id[] hold and emits them. */
static int merge_word(word *w)
{
    w->n_heap = 0;
    for (int32_t i = 0, before = -1; i < w->n; before = i, i = w->next[i]) w->prev[i] = before;
    w->prev[w->n] = -1;
    for (int32_t i = 0; i < w->n; i = w->next[i]) FORWARD_IF_ERROR(offer(w, i));
    while (w->n_heap > 0) {
        const pair p = heap_pop(w);
        if (w->next[p.at] != p.mid || w->next[p.mid] != p.end) continue;
        w->id[p.at] = p.id;
        w->next[p.at] = p.end;
        w->next[p.mid] = -1;
        w->prev[p.end] = p.at;
        if (w->prev[p.at] >= 0) FORWARD_IF_ERROR(offer(w, w->prev[p.at]));
        FORWARD_IF_ERROR(offer(w, p.at));
    }
    for (int32_t i = 0; i < w->n; i = w->next[i])
        if (w->id[i] >= 0) kv_emit(w->out, w->id[i]);
        else emit_bytes(w, i, w->next[i]);
    return KV_OK;
}

/* ---- byte-level BPE: the symbols at first are bytes */

enum { WHOLE_WORD = 256 };                  /* bytes: a longer word is not looked for whole; no vocabulary has such tokens */

/* A byte as GPT-2 writes it: printable Latin-1 as it is, the rest from U+0100 on. */
static uint32_t byte_char(int b)
{
    static const struct { int lo, hi; } plain[3] = { { 33, 126 }, { 161, 172 }, { 174, 255 } };
    int before = 0;                         /* plain bytes below b */
    for (int i = 0; i < 3; i++) {
        if (b >= plain[i].lo && b <= plain[i].hi) return (uint32_t)b;
        if (b > plain[i].hi) before += plain[i].hi - plain[i].lo + 1;
    }
    return (uint32_t)(256 + b - before);
}

int kv_byte_text(int b, char *out2)
{
    const uint32_t c = byte_char(b);
    if (c < 0x80) { out2[0] = (char)c; return 1; }
    out2[0] = (char)(0xC0 | c >> 6);
    out2[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

static int encode_word(void *ctx, const char *text, size_t n)
{
    word *const w = ctx;
    if (n == 0) return KV_OK;
    if (w->t->ignore_merges && n <= WHOLE_WORD) {
        char whole[2 * WHOLE_WORD];
        size_t len = 0;
        for (size_t i = 0; i < n; i++) len += (size_t)kv_byte_text((uint8_t)text[i], whole + len);
        const int32_t id = kv_token_find(w->t, whole, len);
        if (id >= 0) { kv_emit(w->out, id); return KV_OK; }
    }
    FORWARD_IF_ERROR(word_reserve(w, n));
    w->text = text;
    w->n = (int32_t)n;
    for (int32_t i = 0; i < w->n; i++) {
        w->next[i] = i + 1;
        w->id[i] = w->t->byte_id[(uint8_t)text[i]];
    }
    return merge_word(w);
}

int kv_encode_bpe(const kv_tokenizer *t, const char *text, size_t n, kv_sink *out)
{
    word w = { .t = t, .out = out };
    const int status = kv_split(t, text, n, encode_word, &w);
    word_free(&w);
    return status;
}

/* ---- SentencePiece: the symbols at first are characters; a space is U+2581 */

static const char SPACE[3] = { '\xe2', '\x96', '\x81' };

static uint32_t bigram_bit(uint32_t a, uint32_t b) { return kv_hash_pair(a, b) >> (32 - KV_BIGRAM_BITS); }

void kv_bigram_add(kv_tokenizer *t, const char *text, size_t n)
{
    uint32_t c, before = 0;
    for (const char *p = text, *const end = text + n; p < end; before = c) {
        const bool first = p == text;
        p += kv_utf8_next(p, end, &c);
        if (first) continue;
        const uint32_t bit = bigram_bit(before, c);
        t->bigram[bit / 64] |= 1ull << bit % 64;
    }
}

static int merge_cut(word *w, const char *buf, size_t n)
{
    if (n == 0) return KV_OK;
    w->text = buf;
    w->n = (int32_t)n;
    FORWARD_IF_ERROR(word_reserve(w, n));
    uint32_t c;
    for (int32_t i = 0; i < w->n; i = w->next[i]) {
        w->next[i] = i + kv_utf8_next(buf + i, buf + n, &c);
        w->id[i] = kv_token_find(w->t, buf + i, (size_t)(w->next[i] - i));
    }
    return merge_word(w);
}

/* space_first: as if the text began with a space. */
int kv_encode_spm(const kv_tokenizer *t, const char *text, size_t n, bool space_first, kv_sink *out)
{
    word w = { .t = t, .out = out };
    int status = KV_OK;
    size_t cap = 3 * n + 3, len = 0;        /* n is below 2^29: see kv_tokenize */
    uint32_t c = 0, before = 0;
    char *const buf = kv_alloc(cap);
    if (!buf) return KV_E_NOMEM;
    const char *p = text, *const end = text + n;
    size_t start = 0;                       /* of the piece since the last cut */
    while (p < end || space_first) {
        const bool space = space_first || *p == ' ';
        const char *const from = space ? SPACE : p;
        size_t step = space ? 3 : (size_t)kv_utf8_next(p, end, &c);
        if (space) c = 0x2581;
        if (!space_first) p += space ? 1 : step;
        space_first = false;
        if (len > start) {
            const uint32_t bit = bigram_bit(before, c);
            if (!(t->bigram[bit / 64] >> bit % 64 & 1)) {
                FAIL_IF_ERROR(merge_cut(&w, buf + start, len - start));
                start = len;
            }
        }
        memcpy(buf + len, from, step);
        len += step;
        before = c;
    }
    FAIL_IF_ERROR(merge_cut(&w, buf + start, len - start));
fail:
    word_free(&w);
    kv_free(buf);
    return status;
}
