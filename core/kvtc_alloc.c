/* kvtc_alloc.c -- bits for principal components: KVTC's dynamic program, and a Lagrangian one.
 *
 * Published (arXiv 2511.01815, B.17): best[i][b] is the least error with the first i components in b bits,
 *
 *   best[i][b] = min( best[i][b-1], min over sizes s, types t of best[i-s][b - cost(s,t)] + err(i-s, i, t) - energy(i-s, i) )
 *
 * with cost(s, nothing) = 0 and cost(s, t) = s bits(t) + 32, and err measured by quantizing calibration rows.  err does not depend on the
 * budget, so it is measured once per edge (start, size, type); what is left is the best path through a graph whose nodes are the
 * places where blocks may begin. */
#include <math.h>
#include "kvtc.h"

enum { FREE_STARTS = 64, START_STEP = 16, MAX_ROWS = 1024 /* of the sample that are quantized */, MAX_CELLS = 1 << 27 };

kvtc_menu kvtc_paper(void)
{
    return (kvtc_menu){ .n_sizes = 5, .size = { 1, 16, 64, 256, 1024 }, .n_types = 3, .type = { 2, 4, 8 } };
}

/* ---- what a block costs and gains */

float kvtc_fit_step(const float *z, int n, int64_t ld, int bits, double *error)
{
    /* Best uniform step for N(0,1), 1 to 8 bits: Max, Quantizing for Minimum Distortion (1960), continued. */
    static const double gauss[] = { 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308 };
    double energy = 0, best = INFINITY;
    for (int t = 0; t < n; t++) energy += (double)z[t * ld] * z[t * ld];
    const double sigma = sqrt(energy / n);
    float out = (float)fmax(gauss[bits - 1] * sigma, 1e-30);
    const float top = (float)((1 << bits) - 1), half = top * 0.5f;
    for (int k = -4; k <= 8; k++) {                      /* 0.66 to 2.3 times: tails heavier than a Gaussian's want more */
        const float step = (float)fmax(gauss[bits - 1] * sigma * pow(1.11, k), 1e-30), inverse = 1.0f / step;
        double e = 0;
        for (int t = 0; t < n; t++) {
            const float x = z[t * ld], v = fminf(fmaxf(x * inverse + half, 0.0f), top), back = (floorf(v + 0.5f) - half) * step;
            e += (double)(x - back) * (x - back);
        }
        if (e < best) best = e, out = step;
    }
    if (error) *error = best;
    return out;
}

typedef struct edge_job {
    const kvtc_menu *m;
    kvtc_edges      *e;
    const float     *z;
    const double    *energy;       /* [n_dims + 1], running sums */
    const double    *fixed_error;  /* [KVTC_TYPES][n_dims + 1], running sums, or NULL */
    int              n, n_dims;
    int64_t          ld;
} edge_job;

static void measure_edge(void *ctx, int task, int thread)
{
    (void)thread;
    const edge_job *j = ctx;
    kvtc_edge *e = &j->e->edge[task];
    const int start = j->e->node[e->from], size = j->e->node[e->to] - start;
    if (e->type == KVTC_NONE) return;
    const double energy = j->energy[start + size] - j->energy[start];
    if (j->fixed_error && e->type != KVTC_E4M3) {
        const double *sum = j->fixed_error + (size_t)e->type * ((size_t)j->n_dims + 1);
        e->gain = (energy - (sum[start + size] - sum[start])) / j->n;
        return;
    }
    kvtc_block b = { 0, size, e->type };
    kvtc_plan one = { .n_blocks = 1, .block = &b };
    uint8_t symbol[4 + 1024];
    float back[1024];
    double error = 0;
    if (kvtc_plan_count(&one, size) < 0) return;
    for (int t = 0; t < j->n; t++) {
        const float *x = j->z + t * j->ld + start;
        kvtc_quantize(&one, NULL, x, symbol);
        kvtc_dequantize(&one, NULL, symbol, back);
        for (int i = 0; i < size; i++) error += (double)(x[i] - back[i]) * (x[i] - back[i]);
    }
    e->gain = (energy - error) / j->n;
}

static int place_of(const kvtc_edges *e, int component)      /* node before a component, or -1 */
{
    int lo = 0, hi = e->n_nodes - 1;
    while (lo < hi) {
        const int mid = (lo + hi) / 2;
        if (e->node[mid] < component) lo = mid + 1;
        else hi = mid;
    }
    return e->node[lo] == component ? lo : -1;
}

static int edge_bits(const kvtc_menu *m, int size, int type)
{
    return type == KVTC_NONE ? 0 : type == KVTC_E4M3 ? 8 * size : type * size + (m->fixed ? 0 : KVTC_HEADER_BITS);
}

static void list_edges(kvtc_edges *e, const kvtc_menu *m)
{
    e->n = 0;
    for (int to = 1; to < e->n_nodes; to++) {
        e->edge[e->n++] = (kvtc_edge){ to - 1, to, KVTC_NONE, 0, 0 };
        for (int s = 0; s < m->n_sizes; s++) {
            const int from = e->node[to] >= m->size[s] ? place_of(e, e->node[to] - m->size[s]) : -1;
            for (int t = 0; from >= 0 && t < m->n_types; t++) e->edge[e->n++] = (kvtc_edge){ from, to, m->type[t], edge_bits(m, m->size[s], m->type[t]), 0 };
        }
    }
}

static void fixed_errors(const edge_job *j, double *sum)
{
    for (int k = 0; k < j->m->n_types; k++) {
        double *to = sum + (size_t)j->m->type[k] * ((size_t)j->n_dims + 1), e = 0;
        to[0] = 0;
        for (int i = 0; i < j->n_dims && j->m->type[k] <= 8; i++) {
            kvtc_fit_step(j->z + i, j->n, j->ld, j->m->type[k], &e);
            to[i + 1] = to[i] + e;
        }
    }
}

int kvtc_edges_new(kvtc_edges **out, const kvtc_menu *m, const float *z, int n, int n_dims, int64_t ld)
{
    int status = KV_OK;
    double *energy = NULL, *fixed = NULL;
    *out = NULL;
    RETURN_ERROR_IF(n < 1 || n_dims < 1 || n_dims > KVTC_MAX_DIMS, KV_E_ARG, "kvtc: %d rows of %d components are outside 1.. and 1..%d", n, n_dims, KVTC_MAX_DIMS);
    for (int s = 0; s < m->n_sizes; s++) RETURN_ERROR_IF(m->size[s] < 1 || m->size[s] > 1024, KV_E_ARG, "kvtc: a block of %d components is outside 1..1024", m->size[s]);
    n = kv_min(n, MAX_ROWS);
    kvtc_edges *e = kv_zalloc(sizeof *e);
    if (!e) return KV_E_NOMEM;
    const size_t nodes = (size_t)kv_min(n_dims, FREE_STARTS) + (size_t)n_dims / START_STEP + 3;
    if (!(e->node = kv_alloc_array(nodes, sizeof *e->node, true)) || !(e->edge = kv_alloc_array(nodes * (size_t)(m->n_sizes * m->n_types + 1), sizeof *e->edge, true)) ||
        !(energy = kv_alloc_array((size_t)n_dims + 1, sizeof *energy, true)) ||
        (m->fixed && !(fixed = kv_alloc_array(KVTC_TYPES * ((size_t)n_dims + 1), sizeof *fixed, true)))) {
        status = KV_E_NOMEM;
        goto fail;
    }
    for (int i = 0; i <= n_dims; i++)
        if (i <= FREE_STARTS || i % START_STEP == 0 || i == n_dims) e->node[e->n_nodes++] = i;
    for (int i = 0; i < n_dims; i++) {
        double sum = 0;
        for (int t = 0; t < n; t++) sum += (double)z[t * ld + i] * z[t * ld + i];
        energy[i + 1] = energy[i] + sum;
    }
    e->energy = energy[n_dims] / n;
    e->fixed = m->fixed;
    list_edges(e, m);
    edge_job job = { m, e, z, energy, fixed, n, n_dims, ld };
    if (fixed) fixed_errors(&job, fixed);
    kv_parallel(e->n, measure_edge, &job);
    *out = e;
    e = NULL;
fail:
    kvtc_edges_free(e);
    kv_free(energy);
    kv_free(fixed);
    return status;
}

void kvtc_edges_free(kvtc_edges *e)
{
    if (!e) return;
    kv_free(e->node);
    kv_free(e->edge);
    kv_free(e);
}

/* ---- the best path */

/* Blocks from a path given as the edge that enters each node of it; trailing nothing is dropped, neighbours of nothing join. */
static int plan_of(kvtc_plan *out, const kvtc_edges *e, const int *taken, int n_taken)      /* taken: from the end to the start */
{
    *out = (kvtc_plan){ .fixed = e->fixed };
    if (!(out->block = kv_alloc_array((size_t)kv_max(n_taken, 1), sizeof *out->block, false))) return KV_E_NOMEM;
    for (int i = n_taken - 1; i >= 0; i--) {
        const kvtc_edge *x = &e->edge[taken[i]];
        const kvtc_block b = { e->node[x->from], e->node[x->to] - e->node[x->from], x->type };
        kvtc_block *last = out->n_blocks ? &out->block[out->n_blocks - 1] : NULL;
        if (last && last->type == KVTC_NONE && b.type == KVTC_NONE) last->size += b.size;
        else out->block[out->n_blocks++] = b;
        out->gain += x->gain;
    }
    if (out->n_blocks && out->block[out->n_blocks - 1].type == KVTC_NONE) out->n_blocks--;
    return kvtc_plan_count(out, e->node[e->n_nodes - 1]);
}

static int allocate_exact(kvtc_plan *out, const kvtc_edges *e, int budget, int *taken)
{
    size_t cells;
    const size_t width = (size_t)budget + 1;
    RETURN_ERROR_IF(!kv_mul((size_t)e->n_nodes, width, &cells) || cells > MAX_CELLS, KV_E_ARG, "kvtc: %d places times %d bits are more than %d cells; allocate=lagrange has no table", e->n_nodes, budget, MAX_CELLS);
    double *best = kv_alloc_array(cells, sizeof *best, true);
    int *by = kv_alloc_array(cells, sizeof *by, true);
    int n_taken = 0, status = KV_E_NOMEM;
    if (!best || !by) goto done;
    for (int i = 0; i < e->n;) {
        const int to = e->edge[i].to;
        double *row = best + (size_t)to * width;
        int *mark = by + (size_t)to * width;
        for (size_t b = 0; b < width; b++) row[b] = -INFINITY;
        for (; i < e->n && e->edge[i].to == to; i++) {
            const kvtc_edge *x = &e->edge[i];
            const double *from = best + (size_t)x->from * width;
            for (int b = x->cost; b <= budget; b++)
                if (from[b - x->cost] + x->gain > row[b]) row[b] = from[b - x->cost] + x->gain, mark[b] = i;
        }
    }
    for (int at = e->n_nodes - 1, b = budget; at > 0; n_taken++) {
        taken[n_taken] = by[(size_t)at * width + (size_t)b];
        b -= e->edge[taken[n_taken]].cost;
        at = e->edge[taken[n_taken]].from;
    }
    status = plan_of(out, e, taken, n_taken);
done:
    kv_free(best);
    kv_free(by);
    return status;
}

/* Best path at a price per bit; returns its bits. */
static int64_t path_at(const kvtc_edges *e, double price, double *best, int *by, int *taken, int *n_taken)
{
    int64_t bits = 0;
    best[0] = 0;
    for (int i = 0; i < e->n; i++) {
        const kvtc_edge *x = &e->edge[i];
        const double v = best[x->from] + x->gain - price * x->cost;
        if (x->type == KVTC_NONE || v > best[x->to]) best[x->to] = v, by[x->to] = i;
    }
    *n_taken = 0;
    for (int at = e->n_nodes - 1; at > 0; at = e->edge[taken[*n_taken - 1]].from) {
        taken[(*n_taken)++] = by[at];
        bits += e->edge[by[at]].cost;
    }
    return bits;
}

static int allocate_lagrange(kvtc_plan *out, const kvtc_edges *e, int budget, int *taken)
{
    double *best = kv_alloc_array((size_t)e->n_nodes, sizeof *best, true);
    int *by = kv_alloc_array((size_t)e->n_nodes, sizeof *by, true), n_taken = 0, status = KV_E_NOMEM;
    if (!best || !by) goto done;
    double lo = 0, hi = 1;                               /* over the budget, and within */
    for (int i = 0; i < e->n; i++) hi = fmax(hi, e->edge[i].gain + 1);
    if (path_at(e, lo, best, by, taken, &n_taken) > budget) {
        lo = hi * 1e-18;
        for (int k = 0; k < 100; k++) {
            const double mid = sqrt(lo * hi);
            if (path_at(e, mid, best, by, taken, &n_taken) > budget) lo = mid;
            else hi = mid;
        }
        path_at(e, hi, best, by, taken, &n_taken);
    }
    status = plan_of(out, e, taken, n_taken);
done:
    kv_free(best);
    kv_free(by);
    return status;
}

int kvtc_allocate(kvtc_plan *out, const kvtc_edges *e, int budget, int exact)
{
    *out = (kvtc_plan){ 0 };
    RETURN_ERROR_IF(budget < 0 || budget > 1 << 24, KV_E_ARG, "kvtc: a budget of %d bits a token is outside 0..%d", budget, 1 << 24);
    int *taken = kv_alloc_array((size_t)e->n_nodes, sizeof *taken, false);
    if (!taken) return KV_E_NOMEM;
    const int status = exact ? allocate_exact(out, e, budget, taken) : allocate_lagrange(out, e, budget, taken);
    kv_free(taken);
    if (status < 0) kvtc_plan_clear(out);
    return status;
}
