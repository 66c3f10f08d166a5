/* offload.c -- a session's tokens outside the cache: KVTC blocks between f16 sinks and an f16 window, and back.
 *
 *   tokens   | sink | block | block | ... | window |        block: a payload of each side and group of slots, readable alone
 *
 * A session that went on is taken up with kv_offload_extend: what has left the window since becomes blocks of its own, older
 * blocks stay as they are, so nothing is coded twice.  Sliding layers have groups of their own: blocks that they have let go of
 * hold nothing for them, and in a block that they still see in part the rows before hold the mean. */
#include <math.h>
#include "offload.h"

/* Between the rows of one head [n][d] and a group's rows [n][p]; keys leave their positions on the way in, and get them back. */
static int rows_in(const kvtc_basis *b, const kvtc_space *g, int side, int tok0, int n, const kv_session *s, float *x)
{
    const int d = b->m->info.head_dim, wide = g->h1 - g->h0;
    float *rows = kv_alloc_array((size_t)n, (size_t)d * sizeof *rows, false);
    int status = rows ? KV_OK : KV_E_NOMEM;
    for (int slot = 0; slot < g->n_layers * wide && status >= 0; slot++) {
        const int layer = g->layer[slot / wide], head = g->h0 + slot % wide, held = kv_min(n, kv_max(0, kv_session_first_held(s, layer) - tok0));
        float *const at = x + (size_t)slot * (size_t)d;
        for (int t = 0; t < held; t++) memcpy(at + (size_t)t * (size_t)g->p, g->mean + (size_t)slot * (size_t)d, (size_t)d * sizeof *at);
        if (held == n) continue;
        status = kv_session_read(s, layer, head, side, tok0 + held, tok0 + n, rows);
        if (status >= 0 && side == KV_SIDE_K && b->rope) kv_rope_rows(&b->m->geo.rope[layer], rows, d, n - held, -(int64_t)(tok0 + held), -1);
        for (int t = held; t < n && status >= 0; t++) memcpy(at + (size_t)t * (size_t)g->p, rows + (size_t)(t - held) * (size_t)d, (size_t)d * sizeof *at);
    }
    kv_free(rows);
    return status;
}

static void rows_out(const kvtc_basis *b, const kvtc_space *g, int side, int tok0, int n, const float *x, float *heads /* [layer][head][n][d] */)
{
    const int d = b->m->info.head_dim, nh = b->m->info.n_kv_heads, wide = g->h1 - g->h0;
    for (int slot = 0; slot < g->n_layers * wide; slot++) {
        const int layer = g->layer[slot / wide], head = g->h0 + slot % wide;
        float *rows = heads + (size_t)(layer * nh + head) * (size_t)n * (size_t)d;
        for (int t = 0; t < n; t++) memcpy(rows + (size_t)t * (size_t)d, x + (size_t)t * (size_t)g->p + (size_t)slot * (size_t)d, (size_t)d * sizeof *rows);
        if (side == KV_SIDE_K && b->rope) kv_rope_rows(&b->m->geo.rope[layer], rows, d, n, tok0, 1);
    }
}

/* ---- coding */

static size_t n_parts(const kv_offload *o) { return (size_t)o->n_blocks * 2 * (size_t)o->k->basis->n_groups; }

static int widest(const kvtc_basis *b)
{
    int p = 0;
    for (int i = 0; i < b->n_groups; i++) p = kv_max(p, b->space[0][i].p);
    return p;
}

/* Room for tokens up to sink + n_coded in blocks; those that are new have no payload yet. */
static int add_blocks(kv_offload *o, int n_coded)
{
    const int more = (n_coded - o->n_coded + o->block_tokens - 1) / o->block_tokens, groups = 2 * o->k->basis->n_groups;
    kvtc_payload *part = kv_alloc_array((size_t)(o->n_blocks + more), (size_t)groups * sizeof *part, true);
    offload_block *block = kv_alloc_array((size_t)(o->n_blocks + more), sizeof *block, true);
    if (!part || !block) {
        kv_free(part);
        kv_free(block);
        return KV_E_NOMEM;
    }
    if (o->n_blocks) {
        memcpy(part, o->part, n_parts(o) * sizeof *part);
        memcpy(block, o->block, (size_t)o->n_blocks * sizeof *block);
    }
    kv_free(o->part);
    kv_free(o->block);
    o->part = part;
    o->block = block;
    for (int at = o->n_coded; at < n_coded; at += o->block_tokens) o->block[o->n_blocks++] = (offload_block){ o->sink + at, kv_min(o->block_tokens, n_coded - at) };
    o->n_coded = n_coded;
    return KV_OK;
}

/* Whether no layer of a group still has rows of a block. */
static bool gone(const kvtc_space *g, offload_block at, const kv_session *s)
{
    for (int i = 0; i < g->n_layers; i++)
        if (kv_session_first_held(s, g->layer[i]) < at.tok0 + at.n) return false;
    return true;
}

static int hold_nothing(kvtc_payload *part)
{
    uint8_t *none = kv_alloc(1);
    if (!none) return KV_E_NOMEM;
    kv_free(part->data);
    *part = (kvtc_payload){ none, 0, OFFLOAD_NOTHING };
    return KV_OK;
}

static int encode_blocks(kv_offload *o, const kv_session *s, int from)
{
    const kvtc_basis *b = o->k->basis;
    int status = KV_OK;
    float *x = kv_alloc_array((size_t)o->block_tokens, (size_t)widest(b) * sizeof *x, false);
    if (!x) status = KV_E_NOMEM;
    for (int i = from * 2 * b->n_groups; i < o->n_blocks * 2 * b->n_groups && status >= 0; i++) {
        const offload_block at = o->block[i / (2 * b->n_groups)];
        const int side = i / b->n_groups % 2;
        const kvtc_group *g = &o->k->group[side][i % b->n_groups];
        if (gone(g->space, at, s)) {
            status = hold_nothing(&o->part[i]);
            continue;
        }
        status = rows_in(b, g->space, side, at.tok0, at.n, s, x);
        if (status >= 0) status = kvtc_encode_rows(g, x, at.n, o->stage, o->level, &o->part[i]);
    }
    kv_free(x);
    return status;
}

/* ---- exact rows: before the coded ones and after them */

/* Runs of neighbouring exact rows: row e is token *at, and *n of them follow. */
static void exact_run(const kv_offload *o, int e, int *at, int *n)
{
    *at = e < o->sink ? e : e + o->n_coded;
    *n = e < o->sink ? kv_min(o->sink, o->n_exact) - e : o->n_exact - e;
}

static int keep_exact(kv_offload *o, const kv_session *s)
{
    const kv_model_info *info = &o->k->basis->m->info;
    const size_t d = (size_t)info->head_dim;
    const int slots = info->n_layers * info->n_kv_heads, n_exact = o->n_tokens - o->n_coded;
    uint16_t *exact = kv_alloc_array((size_t)n_exact * 2 + 1, (size_t)slots * d * sizeof *exact, true);
    float *rows = kv_alloc_array((size_t)n_exact + 1, d * sizeof *rows, false);
    int status = exact && rows ? KV_OK : KV_E_NOMEM;
    if (status >= 0) {
        kv_free(o->exact);
        o->exact = exact;
        o->n_exact = n_exact;
        exact = NULL;
    }
    for (int i = 0; i < 2 * slots && status >= 0; i++) {
        const int layer = i % slots / info->n_kv_heads, held = kv_session_first_held(s, layer);
        uint16_t *half = o->exact + (size_t)i * (size_t)n_exact * d;
        for (int e = 0, n, at; e < n_exact && status >= 0; e += n) {
            exact_run(o, e, &at, &n);
            const int skip = kv_min(n, kv_max(0, held - at));
            if (skip == n) continue;
            status = kv_session_read(s, layer, i % info->n_kv_heads, i / slots, at + skip, at + n, rows);
            for (size_t j = 0; j < (size_t)(n - skip) * d && status >= 0; j++) half[(size_t)(e + skip) * d + j] = kv_f32_to_f16(fminf(fmaxf(rows[j], -65504.0f), 65504.0f));
        }
    }
    kv_free(exact);
    kv_free(rows);
    return status;
}

static int write_exact(const kv_offload *o, kv_session *s, int n_tokens)
{
    const kv_model_info *info = &o->k->basis->m->info;
    const size_t d = (size_t)info->head_dim;
    const int slots = info->n_layers * info->n_kv_heads;
    float *rows = kv_alloc_array((size_t)o->n_exact + 1, d * sizeof *rows, false);
    int status = rows ? KV_OK : KV_E_NOMEM;
    for (int i = 0; i < 2 * slots && status >= 0; i++)
        for (int e = 0, n, at; e < o->n_exact && status >= 0; e += n) {
            exact_run(o, e, &at, &n);
            if (at >= n_tokens) break;
            const uint16_t *half = o->exact + ((size_t)i * (size_t)o->n_exact + (size_t)e) * d;
            for (size_t j = 0; j < (size_t)n * d; j++) rows[j] = kv_f16_to_f32(half[j]);
            status = kv_session_write(s, i % slots / info->n_kv_heads, i % info->n_kv_heads, i / slots, at, at + n, rows);
        }
    kv_free(rows);
    return status;
}

/* ---- life */

static int extend(kv_offload *o, const kv_session *s, int window)
{
    const int n = kv_session_n_tokens(s), from = o->n_blocks;
    RETURN_ERROR_IF(kv_session_model(s) != o->k->basis->m, KV_E_ARG, "offload: the session is of another model than the tables");
    RETURN_ERROR_IF(window < 0 || n < o->n_tokens || n - o->sink - window < o->n_coded, KV_E_ARG, "offload: of %d tokens, %d coded ones, sink=%d and window=%d do not leave", n, o->n_coded, o->sink, window);
    FORWARD_IF_ERROR(add_blocks(o, n - o->sink - window));
    o->n_tokens = n;
    FORWARD_IF_ERROR(encode_blocks(o, s, from));
    FORWARD_IF_ERROR(keep_exact(o, s));
    for (int i = 0; i < from * 2 * o->k->basis->n_groups; i++) {
        const kvtc_space *g = &o->k->basis->space[0][i % o->k->basis->n_groups];
        if (o->part[i].stage != OFFLOAD_NOTHING && gone(g, o->block[i / (2 * o->k->basis->n_groups)], s)) FORWARD_IF_ERROR(hold_nothing(&o->part[i]));
    }
    return KV_OK;
}

int kv_offload_new(kv_offload **out, kv_kvtc *k, const kv_session *s, int sink, int window, int block_tokens, const char *stage_name, int level)
{
    RETURN_ERROR_IF(!out || !k || !s || !stage_name, KV_E_ARG, "offload: NULL argument");
    *out = NULL;
    int status, stage;
    FORWARD_IF_ERROR(kv_stage_find(stage_name, &stage));
    FORWARD_IF_ERROR(kv_stage_check(stage, level));
    const int n = kv_session_n_tokens(s);
    RETURN_ERROR_IF(sink < 0 || window < 0 || block_tokens < 1 || block_tokens > OFFLOAD_MAX_BLOCK, KV_E_ARG, "offload: sink=%d, window=%d and block_tokens=%d are outside 0.., 0.. and 1..%d", sink, window, block_tokens, OFFLOAD_MAX_BLOCK);
    RETURN_ERROR_IF(n - sink - window < 1, KV_E_ARG, "offload: of %d tokens none lies between sink=%d and window=%d", n, sink, window);
    kv_offload *o = kv_zalloc(sizeof *o);
    if (!o) return KV_E_NOMEM;
    atomic_fetch_add(&k->refs, 1);
    *o = (kv_offload){ .k = k, .sink = sink, .block_tokens = block_tokens, .stage = stage, .level = level };
    FAIL_IF_ERROR(extend(o, s, window));
    *out = o;
    return KV_OK;
fail:
    kv_offload_free(o);
    return status;
}

/* What fails leaves the offload as it was, but for memory. */
int kv_offload_extend(kv_offload *o, const kv_session *s, int window)
{
    RETURN_ERROR_IF(!o || !s, KV_E_ARG, "offload: NULL argument");
    for (size_t i = 0; i < n_parts(o); i++) RETURN_ERROR_IF(!o->part[i].data, KV_E_CORRUPT, "offload: it lacks blocks that were damaged in the file, and cannot go on");
    const int n_tokens = o->n_tokens, n_coded = o->n_coded, n_blocks = o->n_blocks, status = extend(o, s, window);
    if (status < 0 && o->n_coded != n_coded) {
        for (size_t i = (size_t)n_blocks * 2 * (size_t)o->k->basis->n_groups; i < n_parts(o); i++) kv_free(o->part[i].data);
        o->n_blocks = n_blocks;
        o->n_coded = n_coded;
    }
    if (status < 0) o->n_tokens = n_tokens;
    return status;
}

void kv_offload_free(kv_offload *o)
{
    if (!o) return;
    for (size_t i = 0; o->part && i < n_parts(o); i++) kv_free(o->part[i].data);
    kv_free(o->part);
    kv_free(o->block);
    kv_free(o->exact);
    kv_kvtc_free(o->k);
    kv_free(o);
}

/* ---- what is there */

kv_kvtc *kv_offload_tables(const kv_offload *o)
{
    if (!o) return NULL;
    atomic_fetch_add(&o->k->refs, 1);
    return o->k;
}

int kv_offload_shape(const kv_offload *o, int *n_tokens, int *n_coded, int *n_blocks)
{
    RETURN_ERROR_IF(!o || !n_tokens || !n_coded || !n_blocks, KV_E_ARG, "offload: NULL argument");
    *n_tokens = o->n_tokens;
    *n_coded = o->n_coded;
    *n_blocks = o->n_blocks;
    return KV_OK;
}

static int check_block(const kv_offload *o, int block)
{
    RETURN_ERROR_IF(block < 0 || block >= o->n_blocks, KV_E_ARG, "offload: block %d is outside 1..%d", block + 1, o->n_blocks);
    return KV_OK;
}

int kv_offload_block(const kv_offload *o, int block, int *tok0, int *n)
{
    RETURN_ERROR_IF(!o || !tok0 || !n, KV_E_ARG, "offload: NULL argument");
    FORWARD_IF_ERROR(check_block(o, block));
    *tok0 = o->block[block].tok0;
    *n = o->block[block].n;
    return KV_OK;
}

int kv_offload_bytes(const kv_offload *o, kv_bytes *out)
{
    RETURN_ERROR_IF(!o || !out, KV_E_ARG, "offload: NULL argument");
    const kv_model_info *info = &o->k->basis->m->info;
    int rank_k, rank_v;
    *out = (kv_bytes){ .exact = 4.0 * o->n_exact * info->n_layers * info->n_kv_heads * info->head_dim, .state = (double)OFFLOAD_INDEX_BYTES * (double)n_parts(o) };
    for (size_t i = 0; i < n_parts(o); i++) out->codes += (double)o->part[i].n;
    FORWARD_IF_ERROR(kv_kvtc_tables(o->k, &out->shared, &rank_k, &rank_v));
    out->total = out->codes + out->exact + out->state + out->shared;
    return KV_OK;
}

/* ---- back */

int kv_offload_read(const kv_offload *o, int side, int block, float *dst)
{
    RETURN_ERROR_IF(!o || !dst, KV_E_ARG, "offload: NULL argument");
    RETURN_ERROR_IF(side != KV_SIDE_K && side != KV_SIDE_V, KV_E_ARG, "side %d is not 0 (k) or 1 (v)", side);
    FORWARD_IF_ERROR(check_block(o, block));
    const kvtc_basis *b = o->k->basis;
    const offload_block at = o->block[block];
    float *x = kv_alloc_array((size_t)at.n, (size_t)widest(b) * sizeof *x, false);
    int status = x ? KV_OK : KV_E_NOMEM;
    for (int i = 0; i < b->n_groups && status >= 0; i++) {
        const kvtc_group *g = &o->k->group[side][i];
        const kvtc_payload *part = &o->part[((size_t)block * 2 + (size_t)side) * (size_t)b->n_groups + (size_t)i];
        for (int t = 0; t < at.n && part->stage == OFFLOAD_NOTHING; t++) memcpy(x + (size_t)t * (size_t)g->space->p, g->space->mean, (size_t)g->space->p * sizeof *x);
        if (!part->data) status = kv_set_error(KV_E_CORRUPT, "offload: block %d (tokens %d..%d) was damaged in the file", block + 1, at.tok0 + 1, at.tok0 + at.n);
        else if (part->stage != OFFLOAD_NOTHING) status = kvtc_decode_rows(g, part, at.n, x);
        if (status >= 0) rows_out(b, g->space, side, at.tok0, at.n, x, dst);
    }
    kv_free(x);
    return status;
}

/* Tokens before the first block that a damaged file did not give. */
static int whole_tokens(const kv_offload *o)
{
    const size_t groups = 2 * (size_t)o->k->basis->n_groups;
    for (size_t i = 0; i < n_parts(o); i++)
        if (!o->part[i].data) return o->block[i / groups].tok0;
    return o->n_tokens;
}

int kv_offload_restore(const kv_offload *o, kv_session *s, int *n_tokens)
{
    RETURN_ERROR_IF(!o || !s || !n_tokens, KV_E_ARG, "offload: NULL argument");
    RETURN_ERROR_IF(kv_session_model(s) != o->k->basis->m, KV_E_ARG, "offload: the session is of another model than what was offloaded");
    const kv_model_info *info = &o->k->basis->m->info;
    const int slots = info->n_layers * info->n_kv_heads, d = info->head_dim, whole = whole_tokens(o);
    RETURN_ERROR_IF(whole < 1, KV_E_CORRUPT, "offload: its first block is damaged, and no token before it is whole");
    int status = KV_OK;
    FORWARD_IF_ERROR(kv_session_import(s, whole));
    float *rows = kv_alloc_array((size_t)o->block_tokens * (size_t)slots, (size_t)d * sizeof *rows, false);
    if (!rows) return KV_E_NOMEM;
    for (int i = 0; i < 2 * o->n_blocks && status >= 0; i++) {
        const offload_block at = o->block[i / 2];
        if (at.tok0 >= whole) break;
        status = kv_offload_read(o, i % 2, i / 2, rows);
        for (int slot = 0; slot < slots && status >= 0; slot++)
            status = kv_session_write(s, slot / info->n_kv_heads, slot % info->n_kv_heads, i % 2, at.tok0, at.tok0 + at.n, rows + (size_t)slot * (size_t)at.n * (size_t)d);
    }
    kv_free(rows);
    *n_tokens = whole;
    return status < 0 ? status : write_exact(o, s, whole);
}
