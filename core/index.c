/* index.c -- vectors in and out of an index: make, add, remove, decode, count.
 *
 * Adding and removing change the index and must not run beside anything else on it; searches may share it. */
#include <math.h>
#include "index.h"
#include "vecmath.h"

static const char *const metric_names[] = { "ip", "l2", "cosine" };

int kv_index_check_rows(const kv_tensor *t, const char *what, int dim, float most)
{
    FORWARD_IF_ERROR(kv_tensor_check(t, what));
    RETURN_ERROR_IF(t->dtype != KV_F32 || t->device != 0 || t->ndim != 2, KV_E_ARG, "%s: not a 2-dimensional f32 tensor in host memory", what);
    RETURN_ERROR_IF(t->shape[1] != dim, KV_E_ARG, "%s: %d dimensions given, the index has %d", what, t->shape[1], dim);
    for (int i = 0; i < t->shape[0]; i++) {
        const float *x = (const float *)t->data + i * t->stride[0];
        for (int j = 0; j < dim; j++, x += t->stride[1]) {
            RETURN_ERROR_IF(!isfinite(*x), KV_E_ARG, "%s: row %d, dimension %d is %s, not a finite number", what, i, j, isnan(*x) ? "nan" : "inf");
            RETURN_ERROR_IF(fabsf(*x) > most, KV_E_ARG, "%s: row %d, dimension %d is %g, more than f16 originals hold (%g): keep f32", what, i, j, (double)*x, (double)most);
        }
    }
    return KV_OK;
}

void kv_index_gather(const kv_index *ix, const kv_tensor *t, int row, float *dst)
{
    const float *x = (const float *)t->data + row * t->stride[0];
    double sum = 0;
    for (int j = 0; j < ix->dim; j++) {
        dst[j] = x[j * t->stride[1]];
        sum += (double)dst[j] * dst[j];
    }
    if (ix->metric != KV_METRIC_COSINE || sum == 0) return;   /* 0 has no direction: it stays, at cosine 0 to everything */
    const double scale = 1 / sqrt(sum);
    for (int j = 0; j < ix->dim; j++) dst[j] = (float)(dst[j] * scale);
}

/* ---- making ------------------------------------------------------------------------------------------------------- */

/* The fewest equal parts that codecs take. */
static int parts_of(int dim)
{
    for (int n = (dim + KV_MAX_HEAD_DIM - 1) / KV_MAX_HEAD_DIM; n <= KV_INDEX_MAX_PARTS; n++)
        if (dim % n == 0) return n;
    return 0;
}

int kv_index_set_up(kv_index *ix)
{
    const kv_codec *c = ix->codec[0];
    size_t bytes;
    ix->code_bytes = (size_t)ix->n_parts * c->page_bytes;
    ix->record_bytes = ix->code_bytes + (ix->metric == KV_METRIC_L2 ? kv_round_up((size_t)ix->page_rows * sizeof(float), 64) : 0);
    ix->row_bytes = ix->keep < 0 ? 0 : (size_t)ix->page_rows * (size_t)ix->dim * (size_t)kv_dtype_size(ix->keep);
    RETURN_ERROR_IF(ix->record_bytes > KV_PACK_MAX_PAGE || !kv_mul((size_t)c->granule, (size_t)ix->dim * sizeof(float), &bytes), KV_E_ARG, "index: a page of %zu bytes is over %d", ix->record_bytes, KV_PACK_MAX_PAGE);
    if (c->granule > 1 && !(ix->tail = kv_zalloc(bytes))) return KV_E_NOMEM;
    return KV_OK;
}

static int check_config(const kv_index_config *cfg)
{
    RETURN_ERROR_IF(cfg->dim < 1 || cfg->dim > KV_INDEX_MAX_DIM, KV_E_ARG, "index: dim=%d is outside 1..%d", cfg->dim, KV_INDEX_MAX_DIM);
    const int n_parts = parts_of(cfg->dim);
    RETURN_ERROR_IF(!n_parts || (n_parts > 1 && cfg->dim / n_parts < 64), KV_E_ARG,
        "index: dim=%d is over %d and not a whole number of parts of 64..%d dimensions: pad the vectors with zeros", cfg->dim, KV_MAX_HEAD_DIM, KV_MAX_HEAD_DIM);
    RETURN_ERROR_IF(cfg->metric < KV_METRIC_IP || cfg->metric > KV_METRIC_COSINE, KV_E_ARG, "index: metric=%d is none of 0 (ip), 1 (l2), 2 (cosine)", cfg->metric);
    RETURN_ERROR_IF(cfg->keep != -1 && cfg->keep != KV_F32 && cfg->keep != KV_F16, KV_E_ARG, "index: keep=%d is none of -1 (no originals), %d (f32), %d (f16)", cfg->keep, KV_F32, KV_F16);
    return KV_OK;
}

/* Training rows as they will be compared, their mean, and that removed. */
static int train_rows(kv_index *ix, const kv_tensor *train, int centre, float **rows)
{
    const int n = train->shape[0], dim = ix->dim;
    double *sum = NULL;
    if (!(*rows = kv_alloc_array((size_t)n, (size_t)dim * sizeof(float), false))) return KV_E_NOMEM;
    for (int i = 0; i < n; i++) kv_index_gather(ix, train, i, *rows + (size_t)i * dim);
    if (!centre) return KV_OK;
    if (!(ix->mean = kv_alloc_array((size_t)dim, sizeof(float), true)) || !(sum = kv_alloc_array((size_t)dim, sizeof(double), true))) {
        kv_free(sum);
        return KV_E_NOMEM;
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < dim; j++) sum[j] += (*rows)[(size_t)i * dim + j];
    for (int j = 0; j < dim; j++) ix->mean[j] = (float)(sum[j] / n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < dim; j++) (*rows)[(size_t)i * dim + j] -= ix->mean[j];
    kv_free(sum);
    return KV_OK;
}

static int make_codecs(kv_index *ix, const kv_index_config *cfg, const float *rows, int n)
{
    for (int p = 0; p < ix->n_parts; p++) {
        if (p && !ix->codec[0]->blob_bytes) {
            ix->codec[p] = kv_codec_ref(ix->codec[0]);
        } else if (rows) {
            const kv_tensor x = { .data = (void *)(uintptr_t)(rows + (size_t)p * ix->part_dim), .dtype = KV_F32, .ndim = 2, .shape = { n, ix->part_dim }, .stride = { ix->dim, 1 } };
            FORWARD_IF_ERROR(kv_codec_fit(&ix->codec[p], cfg->family, cfg->params, ix->part_dim, cfg->page_rows, KV_SIDE_K, &x, NULL));
        } else {
            const int status = kv_codec_new(&ix->codec[p], cfg->family, cfg->params, ix->part_dim, cfg->page_rows, KV_SIDE_K);
            RETURN_ERROR_IF(status == KV_E_UNCALIBRATED, status, "index: codec '%s' has calibrated tables: give vectors to train on", cfg->family);
            if (status < 0) return status;
        }
    }
    return KV_OK;
}

int kv_index_new(kv_index **out, const kv_index_config *cfg, const kv_tensor *train)
{
    int status;
    float *rows = NULL;
    RETURN_ERROR_IF(!out || !cfg, KV_E_ARG, "index: NULL %s", out ? "settings" : "handle");
    *out = NULL;
    FORWARD_IF_ERROR(check_config(cfg));
    RETURN_ERROR_IF(cfg->centre && !train, KV_E_ARG, "index: a mean is to be removed and there are no vectors to train on");
    if (train) FORWARD_IF_ERROR(kv_index_check_rows(train, "index training vectors", cfg->dim, INFINITY));
    kv_index *ix = kv_zalloc(sizeof *ix);
    if (!ix) return KV_E_NOMEM;
    ix->dim = cfg->dim;
    ix->n_parts = parts_of(cfg->dim);
    ix->part_dim = cfg->dim / ix->n_parts;
    ix->page_rows = cfg->page_rows;
    ix->metric = cfg->metric;
    ix->keep = cfg->keep;
    if (train) FAIL_IF_ERROR(train_rows(ix, train, cfg->centre, &rows));
    FAIL_IF_ERROR(make_codecs(ix, cfg, rows, train ? train->shape[0] : 0));
    FAIL_IF_ERROR(kv_index_set_up(ix));
    kv_free(rows);
    *out = ix;
    return KV_OK;
fail:
    kv_free(rows);
    kv_index_free(ix);
    return status;
}

static void drop_page(kv_index_page *p)
{
    if (p->own_record) kv_free((void *)(uintptr_t)p->record);
    if (p->own_rows) kv_free((void *)(uintptr_t)p->rows);
    p->record = p->rows = NULL;
    p->own_record = p->own_rows = false;
}

void kv_index_free(kv_index *ix)
{
    if (!ix) return;
    for (int p = 0; p < ix->n_pages; p++) drop_page(&ix->pages[p]);
    for (int p = 0; p < ix->n_parts; p++) kv_codec_free(ix->codec[p]);
    kv_pack_free(ix->file);
    kv_free(ix->pages);
    kv_free(ix->dead);
    kv_free(ix->tail);
    kv_free(ix->mean);
    kv_free(ix);
}

/* ---- pages -------------------------------------------------------------------------------------------------------- */

bool kv_index_seen(const kv_index *ix, int page, int what)
{
    kv_index_page *p = &ix->pages[page];
    if (atomic_load_explicit(&p->seen, memory_order_relaxed) & what) return true;
    if (kv_pack_check(ix->file, what == KV_INDEX_CODES_SEEN ? ix->codes_part : ix->rows_part, page) < 0) return false;
    atomic_fetch_or_explicit(&p->seen, what, memory_order_relaxed);
    return true;
}

int kv_index_damage(const kv_index *ix, int page, int what)
{
    const int status = kv_pack_check(ix->file, what == KV_INDEX_CODES_SEEN ? ix->codes_part : ix->rows_part, page), from = page * ix->page_rows;
    return status == KV_E_CORRUPT ? kv_set_error(KV_E_CORRUPT, "index '%s': page %d of the %s is damaged: vectors %d to %d, counted from 0; the others can be searched once these are removed",
        kv_pack_name(ix->file), page, what == KV_INDEX_CODES_SEEN ? "codes" : "originals", from, from + kv_index_fill(ix, page) - 1) : status;
}

/* At least twice what there was, so that adding one at a time stays linear. */
static int grow(void **p, size_t *cap, size_t want, size_t size, size_t used)
{
    if (want <= *cap) return KV_OK;
    const size_t n = want > 2 * *cap ? want : 2 * *cap;
    void *q = kv_alloc_array(n, size, true);
    if (!q) return KV_E_NOMEM;
    if (used) memcpy(q, *p, used * size);
    kv_free(*p);
    *p = q;
    *cap = n;
    return KV_OK;
}

int kv_index_reserve(kv_index *ix, int n_rows)
{
    size_t cap = (size_t)ix->cap_pages;
    void *pages = ix->pages, *dead = ix->dead;
    int status = grow(&pages, &cap, ((size_t)n_rows + (size_t)ix->page_rows - 1) / (size_t)ix->page_rows, sizeof *ix->pages, (size_t)ix->n_pages);
    ix->pages = pages;
    ix->cap_pages = (int)cap;
    if (status == KV_OK) status = grow(&dead, &ix->cap_dead, ((size_t)n_rows + 7) / 8, 1, ((size_t)ix->n_rows + 7) / 8);
    ix->dead = dead;
    return status;
}

/* Memory of our own that has the old bytes, in place of those of a mapped file. */
static int own(const uint8_t **p, bool *is_own, size_t bytes)
{
    if (!bytes || *is_own) return KV_OK;
    uint8_t *mine = kv_zalloc(bytes);
    if (!mine) return KV_E_NOMEM;
    if (*p) memcpy(mine, *p, bytes);
    *p = mine;
    *is_own = true;
    return KV_OK;
}

static int page_for_writing(kv_index *ix, int page)
{
    kv_index_page *p = &ix->pages[page];
    if (page < ix->n_pages && p->n_live == 0) {
        atomic_store(&p->seen, KV_INDEX_CODES_SEEN | KV_INDEX_ROWS_SEEN);     /* nobody reads what is there */
    } else if (page < ix->n_pages) {
        if (!kv_index_seen(ix, page, KV_INDEX_CODES_SEEN)) return kv_index_damage(ix, page, KV_INDEX_CODES_SEEN);
        if (ix->row_bytes && !kv_index_seen(ix, page, KV_INDEX_ROWS_SEEN)) return kv_index_damage(ix, page, KV_INDEX_ROWS_SEEN);
    } else {
        *p = (kv_index_page){ .record = NULL };
        atomic_init(&p->seen, KV_INDEX_CODES_SEEN | KV_INDEX_ROWS_SEEN);
        ix->n_pages = page + 1;
    }
    FORWARD_IF_ERROR(own(&p->record, &p->own_record, ix->record_bytes));
    return own(&p->rows, &p->own_rows, ix->row_bytes);
}

static void drop_if_empty(kv_index *ix, int page)
{
    if (ix->pages[page].n_live == 0 && kv_index_fill(ix, page) == ix->page_rows) drop_page(&ix->pages[page]);
}

/* ---- adding ------------------------------------------------------------------------------------------------------- */

typedef struct add_job {
    kv_index        *ix;
    const kv_tensor *x;
    int              old_rows, old_coded, new_coded, first_page;
    float           *scratch;                 /* a thread: a page's rows, and one decoded row */
} add_job;

/* Vector `id` as it is compared: from the tail, or from what is being added. */
static void take(const add_job *j, int id, float *dst)
{
    const kv_index *ix = j->ix;
    if (id < j->old_rows) memcpy(dst, ix->tail + (size_t)(id - j->old_coded) * ix->dim, (size_t)ix->dim * sizeof(float));
    else kv_index_gather(ix, j->x, id - j->old_rows, dst);
}

static void encode_page(void *ctx, int task, int thread)
{
    const add_job *j = ctx;
    kv_index *ix = j->ix;
    const int page = j->first_page + task, dim = ix->dim, base = page * ix->page_rows;
    const int from = kv_max(base, j->old_coded), n = kv_min(base + ix->page_rows, j->new_coded) - from;
    kv_index_page *p = &ix->pages[page];
    uint8_t *record = (uint8_t *)(uintptr_t)p->record, *rows = (uint8_t *)(uintptr_t)p->rows;
    float *tile = j->scratch + (size_t)thread * (size_t)(ix->page_rows + 1) * (size_t)dim, *one = tile + (size_t)ix->page_rows * dim;
    for (int i = 0; i < n; i++) {
        float *x = tile + (size_t)i * dim;
        take(j, from + i, x);
        if (rows) kv_vec_store(ix->keep, x, rows + ((size_t)(from - base + i) * dim) * (size_t)kv_dtype_size(ix->keep), dim);
        for (int k = 0; ix->mean && k < dim; k++) x[k] -= ix->mean[k];
    }
    for (int q = 0; q < ix->n_parts; q++) {
        const kv_codec *c = ix->codec[q];
        c->ops->encode(c, record + (size_t)q * c->page_bytes, from - base, n, tile + (size_t)q * ix->part_dim, dim);
    }
    for (int i = 0; ix->metric == KV_METRIC_L2 && i < n; i++) {
        double sum = 0;
        for (int q = 0; q < ix->n_parts; q++) {
            const kv_codec *c = ix->codec[q];
            c->ops->decode(c, record + (size_t)q * c->page_bytes, from - base + i, 1, one, ix->part_dim);
            sum += (double)kv_sumsq(one, ix->part_dim);
        }
        ((float *)(void *)(record + ix->code_bytes))[from - base + i] = (float)sum;
    }
    for (int i = 0; i < n; i++) p->n_live += !kv_index_dead(ix, from + i);
}

int kv_index_add(kv_index *ix, const kv_tensor *x, int *first)
{
    RETURN_ERROR_IF(!ix || !first, KV_E_ARG, "index: NULL %s", ix ? "result" : "handle");
    FORWARD_IF_ERROR(kv_index_check_rows(x, "index vectors", ix->dim, ix->keep == KV_F16 && ix->metric != KV_METRIC_COSINE ? 65504.0f : INFINITY));
    const int n = x->shape[0], old = ix->n_rows, g = kv_index_granule(ix);
    RETURN_ERROR_IF(n > INT32_MAX - KV_MAX_PAGE - old, KV_E_ARG, "index: %d vectors after %d are more than %d", n, old, INT32_MAX - KV_MAX_PAGE);
    FORWARD_IF_ERROR(kv_index_reserve(ix, old + n));
    const int coded = (old + n) / g * g, old_pages = ix->n_pages;
    add_job j = { ix, x, old, ix->n_coded, coded, ix->n_coded / ix->page_rows, NULL };
    const int n_tasks = (coded + ix->page_rows - 1) / ix->page_rows - j.first_page;
    float *tail = NULL;
    int status = KV_OK;
    if (coded > ix->n_coded) {
        for (int p = 0; p < n_tasks; p++) FAIL_IF_ERROR(page_for_writing(ix, j.first_page + p));
        j.scratch = kv_alloc_array((size_t)kv_threads() * (size_t)(ix->page_rows + 1), (size_t)ix->dim * sizeof(float), false);
        if (!j.scratch) FAIL_IF_ERROR(KV_E_NOMEM);
    }
    if (g > 1 && !(tail = kv_zalloc((size_t)g * (size_t)ix->dim * sizeof(float)))) FAIL_IF_ERROR(KV_E_NOMEM);
    for (int i = coded; i < old + n; i++) take(&j, i, tail + (size_t)(i - coded) * ix->dim);
    if (coded > ix->n_coded) kv_parallel(n_tasks, encode_page, &j);
    kv_free(ix->tail);
    ix->tail = tail;
    ix->n_rows = old + n;
    ix->n_coded = coded;
    ix->n_live += n;
    for (int p = 0; p < n_tasks; p++) drop_if_empty(ix, j.first_page + p);
    *first = old;
    kv_free(j.scratch);
    return KV_OK;
fail:
    for (int p = old_pages; p < ix->n_pages; p++) drop_page(&ix->pages[p]);
    ix->n_pages = old_pages;
    kv_free(j.scratch);
    return status;
}

int kv_index_remove(kv_index *ix, const int32_t *ids, int n, int *n_removed)
{
    RETURN_ERROR_IF(!ix || !n_removed || n < 0 || (n && !ids), KV_E_ARG, "index: %s", ix ? "no numbers to remove" : "NULL handle");
    for (int i = 0; i < n; i++) RETURN_ERROR_IF(ids[i] < 0 || ids[i] >= ix->n_rows, KV_E_ARG, "index: vector %d is outside 0..%d", ids[i], ix->n_rows - 1);
    *n_removed = 0;
    for (int i = 0; i < n; i++) {
        if (kv_index_dead(ix, ids[i])) continue;
        ix->dead[ids[i] >> 3] |= (uint8_t)(1u << (ids[i] & 7));
        ix->n_live--;
        ++*n_removed;
        if (ids[i] >= ix->n_coded) continue;
        ix->pages[ids[i] / ix->page_rows].n_live--;
        drop_if_empty(ix, ids[i] / ix->page_rows);
    }
    return KV_OK;
}

/* ---- out ---------------------------------------------------------------------------------------------------------- */

int kv_index_decode(const kv_index *ix, int first, int last, kv_tensor *dst)
{
    RETURN_ERROR_IF(!ix, KV_E_ARG, "index: NULL handle");
    RETURN_ERROR_IF(first < 0 || last <= first || last > ix->n_rows, KV_E_ARG, "index: vectors %d..%d are not a range within 0..%d", first, last, ix->n_rows);
    FORWARD_IF_ERROR(kv_tensor_check(dst, "index destination"));
    RETURN_ERROR_IF(dst->dtype != KV_F32 || dst->device != 0 || dst->ndim != 2 || dst->shape[0] != last - first || dst->shape[1] != ix->dim, KV_E_ARG,
        "index destination: f32 [%d, %d] in host memory is needed", last - first, ix->dim);
    for (int i = first; i < last; i++) {
        RETURN_ERROR_IF(kv_index_dead(ix, i), KV_E_ARG, "index: vector %d was removed", i);
        if (i < ix->n_coded && !kv_index_seen(ix, i / ix->page_rows, KV_INDEX_CODES_SEEN)) return kv_index_damage(ix, i / ix->page_rows, KV_INDEX_CODES_SEEN);
    }
    float *row = kv_alloc_array((size_t)ix->dim, sizeof(float), false);
    if (!row) return KV_E_NOMEM;
    for (int i = first; i < last; i++) {
        float *d = (float *)dst->data + (i - first) * dst->stride[0];
        const bool coded = i < ix->n_coded;
        for (int q = 0; coded && q < ix->n_parts; q++) {
            const kv_codec *c = ix->codec[q];
            c->ops->decode(c, ix->pages[i / ix->page_rows].record + (size_t)q * c->page_bytes, i % ix->page_rows, 1, row + (size_t)q * ix->part_dim, ix->part_dim);
        }
        if (!coded) memcpy(row, ix->tail + (size_t)(i - ix->n_coded) * ix->dim, (size_t)ix->dim * sizeof(float));
        for (int k = 0; k < ix->dim; k++) d[k * dst->stride[1]] = row[k] + (coded && ix->mean ? ix->mean[k] : 0);
    }
    kv_free(row);
    return KV_OK;
}

int kv_index_bytes(const kv_index *ix, kv_bytes *out)
{
    RETURN_ERROR_IF(!ix || !out, KV_E_ARG, "index: NULL %s", ix ? "ledger" : "handle");
    double n_pages = 0, n_live = 0;
    for (int p = 0; p < ix->n_pages; p++) {
        n_pages += ix->pages[p].record != NULL;
        n_live += ix->pages[p].n_live;
    }
    /* Granules are alike, so a page's bytes belong to its vectors in equal shares; what nobody living holds is slack. */
    const kv_bytes *b = &ix->codec[0]->page;
    const double parts = n_pages * ix->n_parts, share = n_pages ? n_live / (n_pages * ix->page_rows) : 0;
    const double tail = ix->tail ? (double)kv_index_granule(ix) * ix->dim * sizeof(float) : 0;
    *out = (kv_bytes){ .codes = floor(b->codes * parts * share + 0.5), .scales = floor(b->scales * parts * share + 0.5), .outliers = floor(b->outliers * parts * share + 0.5),
        .exact = floor((b->exact * parts + n_pages * (double)ix->row_bytes) * share + 0.5), .padding = (b->padding + b->slack) * parts, .shared = b->shared * parts };
    out->state = b->state * parts + n_pages * (double)(ix->record_bytes - ix->code_bytes) + (double)ix->cap_dead;
    const double pages = n_pages * (double)(ix->record_bytes + ix->row_bytes);
    out->slack = pages + (double)ix->cap_dead - (out->codes + out->scales + out->outliers + out->exact + out->padding + out->state + out->shared);
    out->exact += tail;
    double tables = ix->mean ? (double)ix->dim * sizeof(float) : 0;
    for (int q = 0; q < ix->n_parts; q++) tables += (double)kv_round_up(ix->codec[q]->blob_bytes, 64);
    out->shared += tables;
    out->total = pages + (double)ix->cap_dead + tail + tables;
    return KV_OK;
}

int kv_index_get_info(const kv_index *ix, kv_index_info *out)
{
    RETURN_ERROR_IF(!ix || !out, KV_E_ARG, "index: NULL %s", ix ? "info" : "handle");
    const kv_codec *c = ix->codec[0];
    *out = (kv_index_info){ .family = c->ops->name, .params = c->text, .metric = metric_names[ix->metric], .dim = ix->dim, .page_rows = ix->page_rows, .keep = ix->keep,
        .centre = ix->mean != NULL, .n_parts = ix->n_parts, .n_rows = ix->n_rows, .n_live = ix->n_live, .fused = kv_codec_fused(c), .mapped = ix->file != NULL,
        .granule = c->granule, .vector_bytes = (double)ix->record_bytes / ix->page_rows };
    return KV_OK;
}
