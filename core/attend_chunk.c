/* attend_chunk.c -- n > 1 new tokens: every query sees what feeding the tokens one at a time would have shown it.
 *
 * All granules that ripen during the chunk are encoded, and two versions of the rows are laid out in f32, per head and side:
 *
 *   late    [T - from]   the row as the last query sees it: decoded from the pages, exact where not encoded
 *   early   [T - turn]   the row as an earlier query saw it: exact where this chunk encodes it, else the same as `late`
 *
 *   position    from ..  turn ..  first row encoded here     last row encoded here .. T-1
 *   late        decoded  decoded  decoded ........................ decoded  exact
 *   early                decoded  exact ............................ exact  exact
 *
 * They differ only in between, and there query i takes `late` below its boundary b(i) = sink + encoded(i + 1), `early` from it
 * on, for K and V apart.  Attention goes over tiles of QUERY_ROWS stacked queries of a head's group by KEY_TILE keys, each one
 * product for the scores and one for the values with a running maximum; a tile crossed by b does both versions' columns.
 * A tile's products have one shape whatever its rows are made of, and where both versions are the same bits (a lossless
 * codec) only one is used: equal rows give equal bits, whatever plan they came through.
 *
 * With AMX both versions are packed for its tiles once a layer, keys as rows and values as columns of the right side, in
 * blocks of 32 positions from `from` and `turn` on, which are multiples of 32.  Products then take whole blocks: scores
 * beside a tile's columns are not looked at, weights there are zero. */
#include <math.h>
#include "amx.h"
#include "cache_impl.h"
#include "model.h"

enum { QUERY_ROWS = 192, KEY_TILE = 256, /* scores of a tile: 192 KB, inside L2 with the rows they meet */ PIECE = 256 /* positions filled by one task */,
       AMX_QUERIES = 32 /* fewer new tokens do not pay for packing all rows */ };

struct kv_chunk {
    float     *rows;                  /* [n_kv_heads][2][late | early] */
    char      *packed;                /* the same for AMX; or NULL */
    float     *thread;                /* [n_threads][queries | scores | scores | acc | max | sum | packed queries | packed weights] */
    size_t     rows_cap, packed_cap;
    int        n_threads;
    atomic_int differs[];             /* [n_kv_heads][2] some row encoded in this chunk does not decode to itself */
};

typedef struct chunk_job {
    kv_cache    *c;
    int          layer, n, n0, total;             /* positions n0 .. total-1 are new */
    int          from, turn, lo;                  /* where late and early begin; no query sees positions below lo */
    int          piece, origin, n_pieces, n_tiles, tile_tokens;
    bool         amx;
    size_t       slot_floats, thread_floats, packed_at, slot_bytes;     /* packed_at: floats before the packed queries */
    const float *q, *k, *v;
    float        scale, softcap, *out;
} chunk_job;

void kv_chunk_free(kv_chunk *w)
{
    if (!w) return;
    kv_free(w->rows);
    kv_free(w->packed);
    kv_free(w->thread);
    kv_free(w);
}

static float *late_rows(const chunk_job *job, int slot) { return job->c->chunk->rows + (size_t)slot * job->slot_floats; }
static float *early_rows(const chunk_job *job, int slot) { return late_rows(job, slot) + (size_t)(job->total - job->from) * (size_t)job->c->geo.head_dim; }
static float *late_at(const chunk_job *job, int slot, int p) { return late_rows(job, slot) + (size_t)(p - job->from) * (size_t)job->c->geo.head_dim; }
static float *early_at(const chunk_job *job, int slot, int p) { return early_rows(job, slot) + (size_t)(p - job->turn) * (size_t)job->c->geo.head_dim; }
static int encoded_after(const chunk_job *job, int head, int side, int64_t n_tokens)
{
    return kv_encoded_at(job->c, job->layer, kv_cache_store(job->c, job->layer, head, side), kv_plan_slot(job->c->plan, job->layer, head, side)->codec, n_tokens);
}

static int reserve_chunk(chunk_job *job)
{
    kv_cache *c = job->c;
    const size_t n_slots = (size_t)c->geo.n_kv_heads * 2, d = (size_t)c->geo.head_dim, need = n_slots * job->slot_floats;
    const size_t m = (size_t)job->tile_tokens * (size_t)c->group;
    job->packed_at = kv_round_up(m * (2 * d + 2 * KEY_TILE + 2), 16);
    job->thread_floats = job->packed_at + (job->amx ? (kv_amx_bytes((int64_t)m, c->geo.head_dim) + kv_amx_bytes((int64_t)m, KEY_TILE)) / sizeof(float) : 0);
    if (!c->chunk && !(c->chunk = kv_zalloc(sizeof *c->chunk + n_slots * sizeof(atomic_int)))) return KV_E_NOMEM;
    kv_chunk *w = c->chunk;
    if (w->rows_cap < need) {
        kv_free(w->rows);
        w->rows_cap = 0;
        if (!(w->rows = kv_alloc_array(need, sizeof(float), false))) return KV_E_NOMEM;
        w->rows_cap = need;
    }
    job->slot_bytes = job->amx ? kv_amx_bytes(job->total - job->from, c->geo.head_dim) + kv_amx_bytes(job->total - job->turn, c->geo.head_dim) : 0;
    if (w->packed_cap < n_slots * job->slot_bytes) {
        kv_free(w->packed);
        w->packed_cap = 0;
        if (!(w->packed = kv_alloc_array(n_slots, job->slot_bytes, false))) return KV_E_NOMEM;
        w->packed_cap = n_slots * job->slot_bytes;
    }
    const size_t encode_floats = kv_round_up((size_t)c->plan->page_tokens * d, 16);
    if (job->thread_floats < encode_floats) job->thread_floats = encode_floats;       /* the same memory while rows are filled */
    if (w->n_threads < kv_threads()) {
        kv_free(w->thread);
        w->n_threads = 0;
        if (!(w->thread = kv_alloc_array((size_t)kv_threads(), sizeof(float) * job->thread_floats, false))) return KV_E_NOMEM;
        w->n_threads = kv_threads();
    }
    for (size_t i = 0; i < n_slots; i++) {
        kv_store *st = kv_cache_store(c, job->layer, (int)i / 2, (int)i % 2);
        atomic_store(&w->differs[i], 0);
        if (!st->tail) continue;
        const size_t bytes = kv_row_bytes(c, job->layer) * (size_t)st->tail_rows;
        if (!st->saved && !(st->saved = kv_alloc(bytes))) return KV_E_NOMEM;
        memcpy(st->saved, st->tail, bytes);
    }
    return KV_OK;
}

/* ---- rows of one slot, positions of one piece (page-aligned, so that no page has two writers) */

static void copy_rows(const chunk_job *job, float *dst, const float *src, int n)
{
    if (n > 0) memcpy(dst, src, sizeof(float) * (size_t)n * (size_t)job->c->geo.head_dim);
}

static void fill_piece(void *ctx, int task, int thread)
{
    const chunk_job *job = ctx;
    kv_cache *c = job->c;
    const int n_slots = c->geo.n_kv_heads * 2, slot = task % n_slots, head = slot / 2, side = slot % 2, i = task / n_slots;
    const int layer = job->layer, sink = c->plan->sink[layer], d = c->geo.head_dim, nh = c->geo.n_kv_heads;
    const int a = kv_max(job->from, i ? job->origin + i * job->piece : 0), b = kv_min(job->total, job->origin + (i + 1) * job->piece);
    if (a >= b) return;
    const kv_store *st = kv_cache_store(c, layer, head, side);
    const int old = sink + st->n_encoded, new = sink + encoded_after(job, head, side, job->total);
    const int split = kv_min(kv_max(a, job->turn), b);          /* early has the rows from here on */
    float *scratch = c->chunk->thread + (size_t)thread * job->thread_floats;

    /* Rows nobody sees stay zero: they meet weights of zero. */
    const int blind = kv_min(b, job->lo);
    if (a < blind) {
        memset(late_at(job, slot, a), 0, sizeof(float) * (size_t)(blind - a) * (size_t)d);
        if (split < blind) memset(early_at(job, slot, split), 0, sizeof(float) * (size_t)(blind - split) * (size_t)d);
    }
    /* Held before this chunk: sinks, pages, tail. */
    const int s0 = kv_max(a, job->lo), s1 = kv_min(kv_min(b, sink), job->n0);
    if (s0 < s1) kv_store_load_exact(c, layer, st, s0, s1, late_at(job, slot, s0));
    const int e0 = kv_max(kv_max(a, sink), job->lo), e1 = kv_min(b, old);
    if (e0 < e1) kv_store_decode(c, layer, head, side, e0 - sink, e1 - sink, late_at(job, slot, e0));
    const int h1 = kv_min(b, kv_min(old, job->n0));
    if (split < h1) copy_rows(job, early_at(job, slot, split), late_at(job, slot, split), h1 - split);
    const int t0 = kv_max(kv_max(a, old), st->never ? job->lo : 0), t1 = kv_min(b, job->n0);
    if (t0 < t1) kv_store_load_exact(c, layer, st, t0, t1, early_at(job, slot, t0));
    /* New: rounded as storage would. */
    for (int p = kv_max(a, job->n0); p < b; p++) {
        const float *x = (side == KV_SIDE_K ? job->k : job->v) + ((size_t)(p - job->n0) * (size_t)nh + (size_t)head) * (size_t)d;
        kv_vec_round(c->plan->exact_dtype[layer], x, early_at(job, slot, p), d);
    }
    const int r0 = kv_max(a, old), r1 = kv_min(b, new);         /* ripened */
    if (r0 < r1) {
        kv_store_encode(c, layer, head, side, r0 - sink, r1 - sink, early_at(job, slot, r0), scratch);
        kv_store_decode(c, layer, head, side, r0 - sink, r1 - sink, late_at(job, slot, r0));
        if (memcmp(early_at(job, slot, r0), late_at(job, slot, r0), sizeof(float) * (size_t)(r1 - r0) * (size_t)d) != 0) atomic_store(&c->chunk->differs[slot], 1);
    }
    const int x0 = kv_max(a, job->n0), x1 = kv_min(b, sink), y0 = kv_max(kv_max(a, new), kv_max(sink, st->never ? job->lo : 0));
    if (x0 < x1) copy_rows(job, late_at(job, slot, x0), early_at(job, slot, x0), x1 - x0);
    if (y0 < b) copy_rows(job, late_at(job, slot, y0), early_at(job, slot, y0), b - y0);
}

/* ---- rows packed for AMX: [late | early] of a slot, a task takes PIECE positions */

static char *packed_rows(const chunk_job *job, int slot, bool early)
{
    return job->c->chunk->packed + (size_t)slot * job->slot_bytes + (early ? kv_amx_bytes(job->total - job->from, job->c->geo.head_dim) : 0);
}

static void pack_piece(void *ctx, int task, int thread)
{
    (void)thread;
    const chunk_job *job = ctx;
    const int n_slots = job->c->geo.n_kv_heads * 2, slot = task % n_slots, d = job->c->geo.head_dim;
    for (int early = 0; early < 2; early++) {
        const int base = early ? job->turn : job->from, p0 = base + task / n_slots * PIECE, p1 = kv_min(p0 + PIECE, job->total);
        if (p0 >= p1 || (early && !atomic_load_explicit(&job->c->chunk->differs[slot], memory_order_relaxed))) continue;
        const float *const rows = early ? early_at(job, slot, p0) : late_at(job, slot, p0);
        char *const to = packed_rows(job, slot, early);
        if (slot % 2 == KV_SIDE_K) kv_amx_pack_right(rows, d, p1 - p0, d, to + kv_amx_bytes(p0 - base, d));
        else
            for (int i = 0; i < d; i += KV_AMX_BLOCK)
                kv_amx_pack_right_t(rows + i, d, kv_min(KV_AMX_BLOCK, d - i), p1 - p0, to + kv_amx_bytes(i, job->total - base) + kv_amx_bytes(KV_AMX_BLOCK, p0 - base));
    }
}

/* ---- one tile of queries of one head over all its keys */

/* s[m][KEY_TILE] = queries times the keys of positions [p0, p1); position p in column p - column0, a multiple of 32. */
static void score(const chunk_job *job, int head, bool early, int p0, int p1, int column0, int m, const float *q, const void *packed, float *s)
{
    const int d = job->c->geo.head_dim, slot = head * 2 + KV_SIDE_K, b0 = p0 / KV_AMX_BLOCK * KV_AMX_BLOCK;
    if (p0 >= p1) return;
    if (job->amx) {
        const char *const rows = packed_rows(job, slot, early) + kv_amx_bytes(b0 - (early ? job->turn : job->from), d);
        kv_amx_multiply(packed, d, m, rows, d, (int)kv_round_up((size_t)(p1 - b0), KV_AMX_BLOCK), d, false, s + (b0 - column0), KEY_TILE);
    } else kv_sgemm_nt(m, p1 - p0, d, job->softcap > 0 ? 1.0f : job->scale, q, d, early ? early_at(job, slot, p0) : late_at(job, slot, p0), d, 0, s + (p0 - column0), KEY_TILE);
}

/* acc[m][d] += weights times the values of positions [p0, p1); weights from the block that holds p0 on are there. */
static void gather(const chunk_job *job, int head, bool early, int p0, int p1, int column0, int m, const float *s, void *packed, float *acc)
{
    const int d = job->c->geo.head_dim, slot = head * 2 + KV_SIDE_V, b0 = p0 / KV_AMX_BLOCK * KV_AMX_BLOCK, base = early ? job->turn : job->from;
    if (p0 >= p1) return;
    if (job->amx) {
        kv_amx_pack_left(s + (b0 - column0), KEY_TILE, m, p1 - b0, 1, packed);
        kv_amx_multiply(packed, p1 - b0, m, packed_rows(job, slot, early) + kv_amx_bytes(KV_AMX_BLOCK, b0 - base), job->total - base, d, p1 - b0, true, acc, d);
    } else kv_sgemm_nn(m, d, p1 - p0, 1, s + (p0 - column0), KEY_TILE, early ? early_at(job, slot, p0) : late_at(job, slot, p0), d, 1, acc, d);
}

typedef struct versions { int late0, late1, early0, early1, mixed; } versions;   /* columns taken from each; mixed: rows differ in where they change over */

/* How the tile of keys [j0, j1) splits for queries whose boundaries run from b0 to b1. */
static versions split_tile(const chunk_job *job, int head, int side, int j0, int j1, int b0, int b1)
{
    const int sink = job->c->plan->sink[job->layer], old = sink + kv_cache_store(job->c, job->layer, head, side)->n_before;
    const int lo = kv_max(j0, old), hi = kv_min(j1, sink + encoded_after(job, head, side, job->total));
    const int differs = atomic_load_explicit(&job->c->chunk->differs[head * 2 + side], memory_order_relaxed);
    if (!differs || lo >= hi || b0 >= hi) return (versions){ .late0 = j0, .late1 = j1 };
    if (b1 <= lo) return (versions){ .early0 = j0, .early1 = j1 };
    return (versions){ .late0 = j0, .late1 = kv_min(b1, j1), .early0 = kv_max(b0, j0), .early1 = j1, .mixed = 1 };
}

static void attend_tile(void *ctx, int task, int thread)
{
    const chunk_job *job = ctx;
    kv_cache *c = job->c;
    const int nh = c->geo.n_kv_heads, head = task % nh, tile = job->n_tiles - 1 - task / nh;      /* longest first */
    const int d = c->geo.head_dim, group = c->group, sink = c->plan->sink[job->layer];
    const int i0 = job->n0 + tile * job->tile_tokens, i1 = kv_min(job->total, i0 + job->tile_tokens), m = (i1 - i0) * group;
    float *q = c->chunk->thread + (size_t)thread * job->thread_floats, *s = q + (size_t)m * (size_t)d, *s2 = s + (size_t)m * KEY_TILE;
    float *acc = s2 + (size_t)m * KEY_TILE, *top = acc + (size_t)m * (size_t)d, *sum = top + m;
    char *packed_q = (char *)(q + job->packed_at), *packed_w = packed_q + (job->amx ? kv_amx_bytes(m, d) : 0);
    const size_t q_row = (size_t)c->geo.n_heads * (size_t)d, q_head = (size_t)head * (size_t)group * (size_t)d;
    for (int i = i0; i < i1; i++) memcpy(q + (size_t)(i - i0) * (size_t)group * (size_t)d, job->q + (size_t)(i - job->n0) * q_row + q_head, sizeof(float) * (size_t)group * (size_t)d);
    if (job->amx) kv_amx_pack_left(q, d, m, d, job->softcap > 0 ? 1.0f : job->scale, packed_q);
    memset(acc, 0, sizeof(float) * (size_t)m * (size_t)d);
    for (int r = 0; r < m; r++) {
        top[r] = -INFINITY;
        sum[r] = 0;
    }
    int bound[2][2];
    for (int side = 0; side < 2; side++) {
        bound[side][0] = sink + encoded_after(job, head, side, (int64_t)i0 + 1);
        bound[side][1] = sink + encoded_after(job, head, side, i1);
    }
    const int first = kv_first_seen(c, job->layer, i0);
    for (int t = first / KEY_TILE * KEY_TILE; t < i1; t += KEY_TILE) {
        const int j0 = kv_max(t, first), j1 = kv_min(t + KEY_TILE, i1), cols = j1 - j0, column0 = j0 / KV_AMX_BLOCK * KV_AMX_BLOCK, margin = j0 - column0;
        const versions kv = split_tile(job, head, KV_SIDE_K, j0, j1, bound[0][0], bound[0][1]);
        const versions vv = split_tile(job, head, KV_SIDE_V, j0, j1, bound[1][0], bound[1][1]);
        score(job, head, false, kv.late0, kv.late1, column0, m, q, packed_q, s);
        score(job, head, true, kv.early0, kv.early1, column0, m, q, packed_q, kv.mixed ? s2 : s);
        for (int r = 0; r < m; r++) {
            const int i = i0 + r / group, seen = kv_max(0, kv_first_seen(c, job->layer, i) - j0), end = kv_min(cols, i + 1 - j0);
            float *row = s + (size_t)r * KEY_TILE + margin, *other = s2 + (size_t)r * KEY_TILE + margin;
            if (kv.mixed) {
                const int b = kv_min(kv_max(sink + encoded_after(job, head, KV_SIDE_K, (int64_t)i + 1), kv.early0), j1);
                memcpy(row + (b - j0), other + (b - j0), sizeof(float) * (size_t)(j1 - b));
            }
            if (seen < end) {
                if (job->softcap > 0) kv_vec_scale_cap(row + seen, end - seen, job->scale, job->softcap);
                const float best = fmaxf(top[r], kv_vec_max(row + seen, end - seen));
                if (best != top[r]) {
                    const float shrink = expf(top[r] - best);
                    sum[r] *= shrink;
                    kv_vec_scale(shrink, acc + (size_t)r * (size_t)d, d);
                    top[r] = best;
                }
                sum[r] += kv_vec_exp_sum(row + seen, end - seen, best);
            }
            for (int j = -margin; j < kv_min(seen, cols); j++) row[j] = 0;
            for (int j = kv_max(end, 0); j < cols; j++) row[j] = 0;
            if (vv.mixed) {                                     /* weights of the two versions apart, zero in the other's columns */
                const int b = kv_min(kv_max(sink + encoded_after(job, head, KV_SIDE_V, (int64_t)i + 1), vv.early0), j1);
                for (int j = kv_max(column0, vv.early0 / KV_AMX_BLOCK * KV_AMX_BLOCK); j < b; j++) other[j - j0] = 0;
                memcpy(other + (b - j0), row + (b - j0), sizeof(float) * (size_t)(j1 - b));
                for (int j = b; j < vv.late1; j++) row[j - j0] = 0;
            }
        }
        gather(job, head, false, vv.late0, vv.late1, column0, m, s, packed_w, acc);
        gather(job, head, true, vv.early0, vv.early1, column0, m, vv.mixed ? s2 : s, packed_w, acc);
    }
    for (int r = 0; r < m; r++) {
        float *o = job->out + (size_t)(i0 - job->n0 + r / group) * q_row + q_head + (size_t)(r % group) * (size_t)d;
        memcpy(o, acc + (size_t)r * (size_t)d, sizeof(float) * (size_t)d);
        kv_vec_scale(1.0f / sum[r], o, d);
    }
}

int kv_attend_chunk(kv_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out)
{
    const int sink = c->plan->sink[layer], nh = c->geo.n_kv_heads, n0 = c->n_tokens, pt = c->plan->page_tokens;
    chunk_job job = { .c = c, .layer = layer, .n = n, .n0 = n0, .total = n0 + n, .q = q, .k = k, .v = v, .scale = scale, .softcap = softcap, .out = out };
    job.lo = job.from = kv_first_seen(c, layer, n0);
    int turn = n0;
    for (int i = 0; i < nh * 2; i++) {
        const kv_store *st = kv_cache_store(c, layer, i / 2, i % 2);
        turn = kv_min(turn, st->never ? kv_max(sink, job.lo) : sink + st->n_encoded);
        if (!st->never) job.from = kv_min(job.from, sink + st->n_encoded);        /* a granule begun out of sight still needs its rows */
    }
    job.from = job.from / KV_AMX_BLOCK * KV_AMX_BLOCK;
    job.turn = kv_max(job.from, turn / KEY_TILE * KEY_TILE);
    job.amx = kv_amx() && n >= AMX_QUERIES;
    job.slot_floats = kv_round_up(((size_t)(job.total - job.from) + (size_t)(job.total - job.turn)) * (size_t)c->geo.head_dim, 16);
    job.tile_tokens = kv_max(1, QUERY_ROWS / c->group);
    job.n_tiles = (n + job.tile_tokens - 1) / job.tile_tokens;
    job.piece = (int)kv_round_up(PIECE, (size_t)pt);
    job.origin = sink % job.piece;
    job.n_pieces = kv_max(1, (job.total - job.origin + job.piece - 1) / job.piece);
    FORWARD_IF_ERROR(reserve_chunk(&job));
    kv_parallel(nh * 2 * job.n_pieces, fill_piece, &job);
    if (job.amx) kv_parallel(nh * 2 * ((job.total - job.from + PIECE - 1) / PIECE), pack_piece, &job);
    for (int i = 0; i < nh * 2; i++) {
        kv_store *st = kv_cache_store(c, layer, i / 2, i % 2);
        const int encoded = encoded_after(&job, i / 2, i % 2, job.total);
        const int t0 = kv_max(kv_max(n0, sink + encoded), job.total - st->tail_rows), s1 = kv_min(sink, job.total);
        if (n0 < s1) kv_store_save_exact(c, layer, st, n0, s1, early_at(&job, i, n0));
        if (kv_max(t0, sink) < job.total) kv_store_save_exact(c, layer, st, kv_max(t0, sink), job.total, early_at(&job, i, kv_max(t0, sink)));
        st->n_encoded = encoded;
    }
    kv_parallel(nh * job.n_tiles, attend_tile, &job);
    kv_cache_describe(c, 2);
    return KV_OK;
}
