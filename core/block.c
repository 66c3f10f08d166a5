/* block.c -- encoded tokens outside a cache: encode, decode, attend, count.
 *
 *   pages  [head][page][page_bytes]            whole granules
 *   exact  [head][n_exact][head_dim] f16       the tokens past the last whole granule
 *
 * One page buffer and one tail buffer a block, so that the ledger is the allocation: what the last page has no tokens for
 * is slack, what alignment adds is padding. */
#include <math.h>
#include "vecmath.h"
#include "block.h"

static inline uint8_t *page_at(const kv_block *b, int head, int page)
{
    return b->pages + ((size_t)head * b->n_pages + page) * b->codec->page_bytes;
}
static inline uint16_t *exact_at(const kv_block *b, int head, int token)
{
    return b->exact + ((size_t)head * (b->n_tokens - b->n_coded) + (token - b->n_coded)) * b->codec->head_dim;
}
static inline int page_fill(const kv_block *b, int page) { return kv_min(b->codec->page_tokens, b->n_coded - page * b->codec->page_tokens); }

/* A view of f32 [n0, n1, n2], any strides, whose last dim is gathered row by row. */
static int check_view(const kv_tensor *t, const char *what, int n0, int n1, int n2)
{
    FORWARD_IF_ERROR(kv_tensor_check(t, what));
    RETURN_ERROR_IF(t->dtype != KV_F32 || t->device != 0 || t->ndim != 3, KV_E_ARG, "%s: not a 3-dimensional f32 tensor in host memory", what);
    const int want[3] = { n0, n1, n2 };
    for (int i = 0; i < 3; i++)
        RETURN_ERROR_IF(want[i] >= 0 && t->shape[i] != want[i], KV_E_ARG, "%s: shape [%d, %d, %d], dimension %d is not %d",
                        what, t->shape[0], t->shape[1], t->shape[2], i, want[i]);
    return KV_OK;
}
static inline float *at(const kv_tensor *t, int i, int j) { return (float *)t->data + i * t->stride[0] + j * t->stride[1]; }
/* Rows without gaps: read and written where they are. */
static inline bool dense_rows(const kv_tensor *t) { return t->stride[2] == 1; }
static void gather(const kv_tensor *t, int i, int j, float *row)
{
    const float *x = at(t, i, j);
    if (dense_rows(t)) memcpy(row, x, (size_t)t->shape[2] * sizeof *row);
    else for (int k = 0; k < t->shape[2]; k++) row[k] = x[k * t->stride[2]];
}
static void scatter(const kv_tensor *t, int i, int j, const float *row)
{
    float *x = at(t, i, j);
    if (dense_rows(t)) memcpy(x, row, (size_t)t->shape[2] * sizeof *row);
    else for (int k = 0; k < t->shape[2]; k++) x[k * t->stride[2]] = row[k];
}

static int check_finite(const kv_tensor *t, const char *what)
{
    for (int h = 0; h < t->shape[0]; h++) {
        if (dense_rows(t) && t->stride[1] == t->shape[2] && kv_vec_abs_bits(at(t, h, 0), (int64_t)t->shape[1] * t->shape[2]) < 0x7f800000) continue;
        for (int j = 0; j < t->shape[1]; j++) {
            const float *x = at(t, h, j);
            if (dense_rows(t) && kv_vec_abs_bits(x, t->shape[2]) < 0x7f800000) continue;
            for (int i = 0; i < t->shape[2]; i++)
                RETURN_ERROR_IF(!isfinite(x[i * t->stride[2]]), KV_E_ARG, "%s: head %d, token %d, channel %d is %s, not a finite number",
                                what, h, j, i, isnan(x[i * t->stride[2]]) ? "nan" : "inf");
        }
    }
    return KV_OK;
}

typedef struct encode_job { const kv_block *b; const kv_tensor *src; float *scratch; } encode_job;

static void encode_head(void *ctx, int head, int thread)
{
    const encode_job *job = ctx;
    const kv_block *b = job->b;
    const kv_codec *c = b->codec;
    float *tile = job->scratch + (size_t)thread * c->page_tokens * c->head_dim;
    for (int p = 0; p < b->n_pages; p++) {
        const int n = page_fill(b, p);
        if (dense_rows(job->src)) {
            c->ops->encode(c, page_at(b, head, p), 0, n, at(job->src, head, p * c->page_tokens), job->src->stride[1]);
            continue;
        }
        for (int t = 0; t < n; t++) gather(job->src, head, p * c->page_tokens + t, tile + (size_t)t * c->head_dim);
        c->ops->encode(c, page_at(b, head, p), 0, n, tile, c->head_dim);
    }
    for (int t = b->n_coded; t < b->n_tokens; t++) {
        gather(job->src, head, t, tile);
        for (int i = 0; i < c->head_dim; i++) exact_at(b, head, t)[i] = kv_f32_to_f16(fminf(fmaxf(tile[i], -65504.0f), 65504.0f));
    }
}

/* Zeroed pages and rows for a shape. */
int kv_block_new(kv_block **out, kv_codec *c, int n_heads, int n_tokens)
{
    int status = KV_OK;
    size_t n;
    kv_block *b = kv_zalloc(sizeof *b);
    if (!b) return KV_E_NOMEM;
    b->codec = kv_codec_ref(c);
    b->n_heads = n_heads;
    b->n_tokens = n_tokens;
    b->n_coded = b->n_tokens / c->granule * c->granule;
    b->n_pages = b->n_coded / c->page_tokens + (b->n_coded % c->page_tokens != 0);
    FAIL_IF(!kv_mul((size_t)b->n_heads, (size_t)b->n_pages, &n) || !kv_mul(n, c->page_bytes, &b->pages_bytes) ||
            !kv_mul((size_t)b->n_heads * (size_t)(b->n_tokens - b->n_coded), (size_t)c->head_dim * 2, &n),
            KV_E_NOMEM, "block: %d heads of %d tokens do not fit in memory", b->n_heads, b->n_tokens);
    b->exact_bytes = kv_round_up(n, 64);
    if ((b->pages_bytes && !(b->pages = kv_zalloc(b->pages_bytes))) || (b->exact_bytes && !(b->exact = kv_zalloc(b->exact_bytes)))) {
        status = KV_E_NOMEM;
        goto fail;
    }
    *out = b;
    return KV_OK;
fail:
    kv_block_free(b);
    return status;
}

int kv_block_encode(kv_block **out, kv_codec *c, const kv_tensor *src)
{
    RETURN_ERROR_IF(!out || !c, KV_E_ARG, "block: NULL %s", out ? "codec" : "handle");
    *out = NULL;
    FORWARD_IF_ERROR(check_view(src, "block source", -1, -1, c->head_dim));
    FORWARD_IF_ERROR(check_finite(src, "block source"));
    kv_block *b;
    FORWARD_IF_ERROR(kv_block_new(&b, c, src->shape[0], src->shape[1]));
    float *scratch = kv_alloc_array((size_t)kv_threads() * c->page_tokens, (size_t)c->head_dim * sizeof(float), false);
    if (!scratch) {
        kv_block_free(b);
        return KV_E_NOMEM;
    }
    encode_job job = { b, src, scratch };
    kv_parallel(b->n_heads, encode_head, &job);
    kv_free(scratch);
    *out = b;
    return KV_OK;
}

/* Rows [tok0, tok1) of one head, all in one page or all in the tail. */
static void decode_rows(const kv_block *b, int head, int tok0, int tok1, float *x)
{
    const kv_codec *c = b->codec;
    if (tok0 >= b->n_coded) {
        const uint16_t *e = exact_at(b, head, tok0);
        for (int i = 0; i < (tok1 - tok0) * c->head_dim; i++) x[i] = kv_f16_to_f32(e[i]);
    } else {
        c->ops->decode(c, page_at(b, head, tok0 / c->page_tokens), tok0 % c->page_tokens, tok1 - tok0, x, c->head_dim);
    }
}
/* The end of the run that starts at tok: its page, the coded tokens, or the tail in page-sized pieces. */
static int run_end(const kv_block *b, int tok, int tok1)
{
    const int page_end = (tok / b->codec->page_tokens + 1) * b->codec->page_tokens;
    return kv_min(kv_min(page_end, tok1), tok < b->n_coded ? b->n_coded : tok1);
}

int kv_block_decode(const kv_block *b, int tok0, int tok1, kv_tensor *dst)
{
    RETURN_ERROR_IF(!b, KV_E_ARG, "block: NULL handle");
    RETURN_ERROR_IF(tok0 < 0 || tok1 <= tok0 || tok1 > b->n_tokens, KV_E_ARG, "block: tokens %d..%d are not a range within 0..%d", tok0, tok1, b->n_tokens);
    FORWARD_IF_ERROR(check_view(dst, "block destination", b->n_heads, tok1 - tok0, b->codec->head_dim));
    float *tile = kv_alloc_array((size_t)b->codec->page_tokens, (size_t)b->codec->head_dim * sizeof(float), false);
    if (!tile) return KV_E_NOMEM;
    for (int h = 0; h < b->n_heads; h++)
        for (int t = tok0, end; t < tok1; t = end) {
            end = run_end(b, t, tok1);
            if (dense_rows(dst) && t < b->n_coded) {
                const kv_codec *c = b->codec;
                c->ops->decode(c, page_at(b, h, t / c->page_tokens), t % c->page_tokens, end - t, at(dst, h, t - tok0), dst->stride[1]);
                continue;
            }
            decode_rows(b, h, t, end, tile);
            for (int i = t; i < end; i++) scatter(dst, h, i - tok0, tile + (size_t)(i - t) * b->codec->head_dim);
        }
    kv_free(tile);
    return KV_OK;
}

int kv_block_bytes(const kv_block *b, kv_bytes *out)
{
    RETURN_ERROR_IF(!b || !out, KV_E_ARG, "block: NULL %s", b ? "ledger" : "handle");
    const kv_bytes *p = &b->codec->page;
    const double pages = (double)b->n_heads * b->n_pages;
    /* Granules are alike, so a page's bytes belong to its tokens in equal shares. */
    const double share = b->n_pages ? (double)b->n_coded / ((double)b->n_pages * b->codec->page_tokens) : 0;
    *out = (kv_bytes){ .codes = floor(p->codes * pages * share + 0.5), .scales = floor(p->scales * pages * share + 0.5),
        .outliers = floor(p->outliers * pages * share + 0.5), .exact = floor(p->exact * pages * share + 0.5), .state = p->state * pages, .shared = p->shared * pages };
    out->padding = (p->padding + p->slack) * pages;
    out->slack = (double)b->pages_bytes - (out->codes + out->scales + out->outliers + out->exact + out->state + out->shared + out->padding);
    const double tail = (double)b->n_heads * (b->n_tokens - b->n_coded) * b->codec->head_dim * 2;
    out->exact += tail;
    out->padding += (double)b->exact_bytes - tail;
    const double tables = (double)kv_round_up(b->codec->blob_bytes, 64);
    out->shared += tables;
    out->total = (double)b->pages_bytes + (double)b->exact_bytes + tables;
    return KV_OK;
}

int kv_block_shape(const kv_block *b, int *n_heads, int *n_tokens, int *head_dim)
{
    RETURN_ERROR_IF(!b || !n_heads || !n_tokens || !head_dim, KV_E_ARG, "block: NULL %s", b ? "result" : "handle");
    *n_heads = b->n_heads;
    *n_tokens = b->n_tokens;
    *head_dim = b->codec->head_dim;
    return KV_OK;
}

int kv_block_page(const kv_block *b, int head, int page, uint8_t **data, double *bytes)
{
    RETURN_ERROR_IF(!b || !data || !bytes, KV_E_ARG, "block: NULL %s", b ? "result" : "handle");
    RETURN_ERROR_IF(head < 0 || head >= b->n_heads, KV_E_ARG, "block: head %d is outside 0..%d", head, b->n_heads - 1);
    RETURN_ERROR_IF(page < 0 || page >= b->n_pages, KV_E_ARG, "block: page %d of %d", page, b->n_pages);
    *data = page_at(b, head, page);
    *bytes = (double)b->codec->page_bytes;
    return KV_OK;
}

void kv_block_free(kv_block *b)
{
    if (!b) return;
    kv_codec_free(b->codec);
    kv_free(b->pages);
    kv_free(b->exact);
    kv_free(b);
}

/* ---- attention pieces ---------------------------------------------------------------------------------------------- */

static int check_fused(const kv_block *b, int fused, int side)
{
    const kv_codec *c = b->codec;
    RETURN_ERROR_IF(fused && !kv_codec_fused(c), KV_E_UNSUPPORTED, "codec '%s' has no attention on codes (fused=0 decodes tiles)", c->ops->name);
    RETURN_ERROR_IF(fused && c->side != side, KV_E_UNSUPPORTED, "codec '%s' was made for %s: %s on its codes needs one for %s (fused=0 decodes tiles)",
                    c->ops->name, c->side == KV_SIDE_K ? "keys" : "values", side == KV_SIDE_K ? "dot" : "accumulate", side == KV_SIDE_K ? "keys" : "values");
    return KV_OK;
}

/* Buffers for up to KV_MAX_GROUP query rows: in (queries or weights), prepared queries, work (scores or accumulators), a tile. */
typedef struct scratch { float *in, *work, *tile; uint8_t *prepared; } scratch;

static int scratch_new(scratch *s, const kv_block *b, size_t n_in, size_t n_work)
{
    const kv_codec *c = b->codec;
    s->in = kv_alloc_array(KV_MAX_GROUP, n_in * sizeof(float), false);
    s->work = kv_alloc_array(KV_MAX_GROUP, n_work * sizeof(float), false);
    s->tile = kv_alloc_array((size_t)c->page_tokens, (size_t)c->head_dim * sizeof(float), false);
    s->prepared = kv_alloc_array(KV_MAX_GROUP, kv_round_up(c->query_bytes, 64), false);
    return s->in && s->work && s->tile && s->prepared ? KV_OK : KV_E_NOMEM;
}
static void scratch_free(scratch *s)
{
    kv_free(s->in);
    kv_free(s->work);
    kv_free(s->tile);
    kv_free(s->prepared);
}

int kv_block_dot(const kv_block *b, const kv_tensor *q, int fused, kv_tensor *scores)
{
    RETURN_ERROR_IF(!b, KV_E_ARG, "block: NULL handle");
    const kv_codec *c = b->codec;
    const int dim = c->head_dim;
    FORWARD_IF_ERROR(check_view(q, "block queries", b->n_heads, -1, dim));
    FORWARD_IF_ERROR(check_view(scores, "block scores", b->n_heads, q->shape[1], b->n_tokens));
    FORWARD_IF_ERROR(check_fused(b, fused, KV_SIDE_K));
    scratch s = { 0 };
    int status;
    FAIL_IF_ERROR(scratch_new(&s, b, (size_t)dim, (size_t)b->n_tokens));
    for (int h = 0; h < b->n_heads; h++)
        for (int q0 = 0; q0 < q->shape[1]; q0 += KV_MAX_GROUP) {
            const int n_q = kv_min(KV_MAX_GROUP, q->shape[1] - q0);
            for (int g = 0; g < n_q; g++) gather(q, h, q0 + g, s.in + g * dim);
            if (fused) c->ops->query(c, s.in, dim, n_q, s.prepared);
            for (int t = 0, end; t < b->n_tokens; t = end) {
                end = run_end(b, t, b->n_tokens);
                if (t < b->n_coded && fused) {
                    c->ops->dot(c, page_at(b, h, t / c->page_tokens), end - t, s.prepared, n_q, s.work + t, b->n_tokens);
                } else if (t < b->n_coded) {
                    kv_tile_dot(c, page_at(b, h, t / c->page_tokens), end - t, s.in, dim, n_q, s.work + t, b->n_tokens, s.tile);
                } else {
                    decode_rows(b, h, t, end, s.tile);
                    kv_rows_dot(KV_F32, s.tile, dim, end - t, dim, s.in, dim, n_q, s.work + t, b->n_tokens);
                }
            }
            for (int g = 0; g < n_q; g++) scatter(scores, h, q0 + g, s.work + (size_t)g * b->n_tokens);
        }
fail:
    scratch_free(&s);
    return status;
}

int kv_block_accumulate(const kv_block *b, const kv_tensor *p, int fused, kv_tensor *out)
{
    RETURN_ERROR_IF(!b, KV_E_ARG, "block: NULL handle");
    const kv_codec *c = b->codec;
    const int dim = c->head_dim, space = fused ? c->space_dim : dim;
    FORWARD_IF_ERROR(check_view(p, "block weights", b->n_heads, -1, b->n_tokens));
    FORWARD_IF_ERROR(check_view(out, "block output", b->n_heads, p->shape[1], dim));
    FORWARD_IF_ERROR(check_fused(b, fused, KV_SIDE_V));
    scratch s = { 0 };
    float *y = NULL;
    int status;
    FAIL_IF_ERROR(scratch_new(&s, b, (size_t)b->n_tokens, (size_t)space));
    if (!(y = kv_alloc_array(KV_MAX_GROUP, (size_t)dim * sizeof(float), false))) { status = KV_E_NOMEM; goto fail; }
    for (int h = 0; h < b->n_heads; h++)
        for (int q0 = 0; q0 < p->shape[1]; q0 += KV_MAX_GROUP) {
            const int n_q = kv_min(KV_MAX_GROUP, p->shape[1] - q0);
            for (int g = 0; g < n_q; g++) gather(p, h, q0 + g, s.in + (size_t)g * b->n_tokens);
            memset(s.work, 0, (size_t)n_q * space * sizeof(float));
            for (int t = 0, end; t < b->n_coded; t = end) {
                end = run_end(b, t, b->n_coded);
                if (fused) c->ops->accumulate(c, page_at(b, h, t / c->page_tokens), end - t, s.in + t, b->n_tokens, n_q, s.work);
                else kv_tile_accumulate(c, page_at(b, h, t / c->page_tokens), end - t, s.in + t, b->n_tokens, n_q, s.work, s.tile);
            }
            if (fused) c->ops->output(c, s.work, n_q, y, dim);
            else memcpy(y, s.work, (size_t)n_q * dim * sizeof(float));
            for (int t = b->n_coded, end; t < b->n_tokens; t = end) {
                end = run_end(b, t, b->n_tokens);
                decode_rows(b, h, t, end, s.tile);
                kv_rows_accumulate(KV_F32, s.tile, dim, end - t, dim, s.in + t, b->n_tokens, n_q, y, dim);
            }
            for (int g = 0; g < n_q; g++) scatter(out, h, q0 + g, y + (size_t)g * dim);
        }
fail:
    kv_free(y);
    scratch_free(&s);
    return status;
}
