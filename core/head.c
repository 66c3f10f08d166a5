/* head.c -- the streaming head: reference and arms compared vocabulary block by vocabulary block.
 *
 * Logits of a chunk would be n_scored * n_vocab floats a lane (268 MB for Gemma's 262,144 words at 256 positions), so they
 * never exist.  For a tile of positions, each block of BLOCK vocabulary rows is dequantized once, multiplied with every
 * lane's hidden states, and folded into five numbers a (position, lane):
 *
 *   m = max z,  top = its lowest index,  s = sum exp(z - m),  a = sum exp(z_r - m_r) (z_r - z_a)      (a: arms only)
 *
 * Determinism.  Blocks run in parallel, but their numbers are merged in block order, lanes get the same matrix shapes, and
 * rows are summed in 8 fixed partial sums: the result depends neither on threads, nor on the SIMD level, nor on which
 * other arms run along.  Equal logits give d = 0 in every term, hence a = 0 and equal lse: kld is exactly 0.
 *
 * Precision.  kld = a/s_r - (lse_r - lse_a) cancels: with exp in f32 the difference of two lse carries 1e-7, which is the
 * size of an f16 cache's divergence (4e-7).  So exp and sums are double; against some 600 multiply-adds a logit it is
 * a tenth of the time. */
#include <float.h>
#include <math.h>
#include "amx.h"
#include "eval.h"

enum {
    BLOCK    = 256,                           /* vocabulary rows: 590 KB of f32 at n_embd 576, about an L2 */
    TILE     = 256,                           /* positions: with BLOCK the smallest square at which sgemm is near its peak */
    MAX_WAVE = 64,                            /* blocks between two merges: as many as there can be threads */
    MERGE    = 16,                            /* positions a merge task */
    LANES    = 16
};

typedef struct { double s, a; float m; int32_t top; } part;

struct kv_head {
    const kv_weight *w;
    float            softcap;
    int              n_arms, n_pos, wave_cap, n_scratch;
    const float    **hidden;                  /* [n_arms + 1] */
    const int32_t   *target;
    kv_score        *score;
    int              p0, tile;                /* first position and number of positions of the tile in work */
    int64_t          block, n_blocks;         /* next block */
    part            *total;                   /* [n_arms + 1][TILE], merged so far */
    part            *wave;                    /* [wave_cap][n_arms + 1][TILE] */
    float           *z_target;                /* [n_arms + 1][TILE] */
    float           *scratch;                 /* [n_scratch] threads: weights, z_ref, z_arm, e_ref (double), packed weights */
    size_t           scratch_floats;          /* a thread */
    char            *left;                    /* [n_arms + 1] the tile's hidden states, packed; NULL without AMX */
};

/* ---- rows.  One source for every SIMD level: vectors of fixed width that the compiler splits as the target needs; the
 * operations and their order are the same, so are the bits. */

typedef float   v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef float   v8f  __attribute__((vector_size(32)));
typedef double  v8d  __attribute__((vector_size(64)));
typedef int64_t v8i  __attribute__((vector_size(64)));
#define INLINE static inline __attribute__((always_inline))

/* exp of |x| <= 708, below that 0, NaN stays.  2^k times the Taylor sum to r^11/11!: |r| <= ln2/2 leaves 6e-15. */
INLINE void exp8(v8d *v)
{
    static const double inv_factorial[] = { 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                                            1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0 };
    const v8d x = *v, round = x * 1.4426950408889634074 + 0x1.8p52;      /* 1.5 * 2^52: the sum's low bits are round(x log2 e) */
    const v8d k = round - 0x1.8p52;
    const v8d r = (x - k * 0x1.62e42fefa0000p-1) - k * 0x1.cf79abc9e3b3ap-40;   /* ln 2 in two parts: k * high is exact */
    v8d y = r * inv_factorial[0] + inv_factorial[1];
    for (int i = 2; i < 12; i++) y = y * r + inv_factorial[i];
    const v8i scale = ((v8i)round << 52) + 0x3ff0000000000000, keep = ~(v8i)(x < -708.0);
    *v = (v8d)((v8i)(y * (v8d)scale) & keep);
}

INLINE double sum8(const v8d *v)
{
    const v8d s = *v;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

INLINE void load8(const float *p, v8d *out)
{
    v8f x;
    memcpy(&x, p, sizeof x);
    *out = __builtin_convertvector(x, v8d);
}

INLINE void row_max(const float *z, int n, part *p)
{
    v16f best = (v16f){ 0 } - INFINITY;
    v16i at = { 0 };
    for (int j = 0; j < n; j += LANES) {
        v16f x;
        memcpy(&x, z + j, sizeof x);
        const v16i gt = x > best;
        best = (v16f)((gt & (v16i)x) | (~gt & (v16i)best));
        at = (gt & ((v16i){ 0 } + j)) | (~gt & at);
    }
    p->m = best[0];
    p->top = at[0];
    for (int l = 1; l < LANES; l++)
        if (best[l] > p->m || (best[l] == p->m && at[l] + l < p->top)) { p->m = best[l]; p->top = at[l] + l; }
}

/* z: tile rows of n logits, BLOCK apart, n a multiple of LANES; e: exp(z - m) of the reference, kept for the arms. */
INLINE void rows_ref(const float *z, int n_pos, int n, double *e, part *p)
{
    for (int i = 0; i < n_pos; i++, z += BLOCK, e += BLOCK, p++) {
        row_max(z, n, p);
        const double m = p->m;
        v8d s[2] = { { 0 }, { 0 } };
        for (int j = 0; j < n; j += LANES)
            for (int h = 0; h < 2; h++) {
                v8d x;
                load8(z + j + 8 * h, &x);
                x -= m;
                exp8(&x);
                memcpy(e + j + 8 * h, &x, sizeof x);
                s[h] += x;
            }
        s[0] += s[1];
        p->s = sum8(&s[0]);
        p->a = 0;
    }
}

INLINE void rows_arm(const float *z, const float *zr, int n_pos, int n, const double *er, part *p)
{
    for (int i = 0; i < n_pos; i++, z += BLOCK, zr += BLOCK, er += BLOCK, p++) {
        row_max(z, n, p);
        const double m = p->m;
        v8d s[2] = { { 0 }, { 0 } }, a[2] = { { 0 }, { 0 } };
        for (int j = 0; j < n; j += LANES)
            for (int h = 0; h < 2; h++) {
                v8d x, r, e;
                load8(z + j + 8 * h, &x);
                load8(zr + j + 8 * h, &r);
                memcpy(&e, er + j + 8 * h, sizeof e);
                a[h] += e * (r - x);
                x -= m;
                exp8(&x);
                s[h] += x;
            }
        s[0] += s[1];
        a[0] += a[1];
        p->s = sum8(&s[0]);
        p->a = sum8(&a[0]);
    }
}

/* z = cap tanh(z / cap), by tanh(x) = 1 - 2 / (exp(2x) + 1); 2x is held within exp8's domain, where tanh is 1 anyway. */
INLINE void rows_cap(float *z, int n_pos, int n, float cap)
{
    const double twice = 2.0 / cap;
    for (int i = 0; i < n_pos; i++, z += BLOCK)
        for (int j = 0; j < n; j += 8) {
            v8d x;
            load8(z + j, &x);
            x *= twice;
            const v8i big = x > 100.0;
            x = (v8d)((big & (v8i)((v8d){ 0 } + 100.0)) | (~big & (v8i)x));
            exp8(&x);
            const v8f y = __builtin_convertvector(cap * (1.0 - 2.0 / (x + 1.0)), v8f);
            memcpy(z + j, &y, sizeof y);
        }
}

#define ROWS(level, target) \
    target static void rows_ref_##level(const float *z, int n_pos, int n, double *e, part *p) { rows_ref(z, n_pos, n, e, p); } \
    target static void rows_arm_##level(const float *z, const float *zr, int n_pos, int n, const double *er, part *p) { rows_arm(z, zr, n_pos, n, er, p); } \
    target static void rows_cap_##level(float *z, int n_pos, int n, float cap) { rows_cap(z, n_pos, n, cap); }
ROWS(c, )
ROWS(avx2, KV_AVX2)
ROWS(avx512, KV_AVX512)

static const struct {
    void (*ref)(const float *, int, int, double *, part *);
    void (*arm)(const float *, const float *, int, int, const double *, part *);
    void (*cap)(float *, int, int, float);
} rows[] = { { rows_ref_c, rows_arm_c, rows_cap_c }, { rows_ref_avx2, rows_arm_avx2, rows_cap_avx2 }, { rows_ref_avx512, rows_arm_avx512, rows_cap_avx512 } };

/* ---- blocks */

static void block_task(void *ctx, int task, int thread)
{
    kv_head         *h = ctx;
    const kv_weight *w = h->w;
    const int64_t    row0 = (h->block + task) * BLOCK;
    const int        n = (int)kv_min64(BLOCK, w->n_out - row0), padded = (int)kv_round_up((size_t)n, LANES), level = kv_cpu_simd();
    const int        k = (int)w->n_in, n_lanes = h->n_arms + 1;
    float  *weights = h->scratch + (size_t)thread * h->scratch_floats;
    float  *z_ref = weights + kv_round_up((size_t)BLOCK * (size_t)k, 16), *z_arm = z_ref + (size_t)TILE * BLOCK;
    double *e_ref = (double *)(z_arm + (size_t)TILE * BLOCK);

    void *right = e_ref + (size_t)TILE * BLOCK;

    kv_weight_rows(w, row0, n, weights);
    if (h->left) kv_amx_pack_right(weights, k, n, k, right);
    for (int lane = 0; lane < n_lanes; lane++) {
        float *z = lane ? z_arm : z_ref;
        part  *p = h->wave + ((size_t)task * (size_t)n_lanes + (size_t)lane) * TILE;
        if (h->left) kv_amx_multiply(h->left + (size_t)lane * kv_amx_bytes(TILE, k), k, h->tile, right, k, n, k, false, z, BLOCK);
        else kv_sgemm_nt(h->tile, n, k, 1.0f, h->hidden[lane] + (size_t)h->p0 * (size_t)k, k, weights, k, 0.0f, z, BLOCK);
        if (h->softcap > 0) {
            if (padded > n) for (int i = 0; i < h->tile; i++) memset(z + (size_t)i * BLOCK + n, 0, (size_t)(padded - n) * sizeof *z);
            rows[level].cap(z, h->tile, padded, h->softcap);
        }
        for (int i = 0; i < h->tile; i++)     /* the pad's exp is 0, its difference is 0 */
            for (int j = n; j < padded; j++) z[(size_t)i * BLOCK + (size_t)j] = -FLT_MAX;
        if (lane == 0) rows[level].ref(z, h->tile, padded, e_ref, p);
        else rows[level].arm(z, z_ref, h->tile, padded, e_ref, p);
        for (int i = 0; i < h->tile; i++) {
            p[i].top += (int32_t)row0;
            const int64_t t = h->target[h->p0 + i] - row0;
            if (t >= 0 && t < n) h->z_target[(size_t)lane * TILE + (size_t)i] = z[(size_t)i * BLOCK + (size_t)t];
        }
    }
}

/* The factors that bring two sums to their common maximum. */
static void rescale(float m_total, float m_block, double *f_total, double *f_block)
{
    *f_total = m_block > m_total ? exp((double)m_total - m_block) : 1.0;
    *f_block = m_block < m_total ? exp((double)m_block - m_total) : 1.0;
}

static void merge_task(void *ctx, int task, int thread)
{
    (void)thread;
    kv_head  *h = ctx;
    const int n_lanes = h->n_arms + 1, from = task * MERGE, to = kv_min(from + MERGE, h->tile);
    const int n_wave = (int)kv_min64(h->wave_cap, h->n_blocks - h->block);
    for (int b = 0; b < n_wave; b++)
        for (int i = from; i < to; i++) {
            double ref_total = 1, ref_block = 1;
            for (int lane = 0; lane < n_lanes; lane++) {
                part       *t = &h->total[(size_t)lane * TILE + (size_t)i];
                const part *p = &h->wave[((size_t)b * (size_t)n_lanes + (size_t)lane) * TILE + (size_t)i];
                double ft, fb;
                rescale(t->m, p->m, &ft, &fb);
                if (lane == 0) { ref_total = ft; ref_block = fb; }
                t->s = t->s * ft + p->s * fb;
                t->a = t->a * ref_total + p->a * ref_block;
                if (p->m > t->m) { t->m = p->m; t->top = p->top; }
            }
        }
}

static void finish_tile(kv_head *h)
{
    for (int i = 0; i < h->tile; i++) {
        const part  *r = &h->total[i];
        const double lse_ref = r->m + log(r->s), nll_ref = lse_ref - h->z_target[i];
        for (int arm = 0; arm < h->n_arms; arm++) {
            const size_t lane = (size_t)arm + 1;
            const part  *a = &h->total[lane * TILE + (size_t)i];
            const double lse = a->m + log(a->s), nll = lse - h->z_target[lane * TILE + (size_t)i];
            h->score[(size_t)arm * (size_t)h->n_pos + (size_t)(h->p0 + i)] = (kv_score){
                .kld = (float)(a->a / r->s - (lse_ref - lse)), .nll = (float)nll, .nll_ref = (float)nll_ref,
                .dp = (float)(exp(-nll) - exp(-nll_ref)), .same_top1 = a->top == r->top };
        }
    }
}

static void pack_task(void *ctx, int task, int thread)
{
    (void)thread;
    kv_head     *h = ctx;
    const int    blocks = TILE / KV_AMX_BLOCK, lane = task / blocks, from = task % blocks * KV_AMX_BLOCK, n = kv_min(KV_AMX_BLOCK, h->tile - from), k = (int)h->w->n_in;
    const size_t at = (size_t)lane * kv_amx_bytes(TILE, k) + kv_amx_bytes(from, k);
    if (n > 0) kv_amx_pack_left(h->hidden[lane] + (size_t)(h->p0 + from) * (size_t)k, k, n, k, 1, h->left + at);
}

static void start_tile(kv_head *h, int p0)
{
    h->p0 = p0;
    h->tile = kv_min(TILE, h->n_pos - p0);
    h->block = 0;
    for (size_t i = 0; i < (size_t)(h->n_arms + 1) * TILE; i++) h->total[i] = (part){ .m = -INFINITY };
    if (h->left) kv_parallel((h->n_arms + 1) * (TILE / KV_AMX_BLOCK), pack_task, h);
}

int kv_head_step(kv_head *h, int *more)
{
    *more = h->p0 < h->n_pos;
    if (!*more) return KV_OK;
    if (h->n_scratch < kv_threads()) {        /* more threads than when the last step ran */
        kv_free(h->scratch);
        h->n_scratch = 0;
        h->scratch = kv_alloc_array((size_t)kv_threads(), h->scratch_floats * sizeof(float), false);
        if (!h->scratch) return KV_E_NOMEM;
        h->n_scratch = kv_threads();
    }
    const int n_wave = (int)kv_min64(h->wave_cap, h->n_blocks - h->block);
    kv_parallel(n_wave, block_task, h);
    kv_parallel((h->tile + MERGE - 1) / MERGE, merge_task, h);
    h->block += n_wave;
    if (h->block == h->n_blocks) {
        finish_tile(h);
        start_tile(h, h->p0 + h->tile);
        *more = h->p0 < h->n_pos;
    }
    return KV_OK;
}

int kv_head_begin(kv_head *h, int n_pos, const float *const *hidden, const int32_t *target, kv_score *score)
{
    for (int i = 0; i < n_pos; i++)
        RETURN_ERROR_IF(target[i] < 0 || target[i] >= h->w->n_out, KV_E_ARG, "head: target %d is outside 0..%lld", target[i], (long long)h->w->n_out - 1);
    memcpy(h->hidden, hidden, (size_t)(h->n_arms + 1) * sizeof *hidden);
    h->n_pos = n_pos;
    h->target = target;
    h->score = score;
    start_tile(h, 0);
    return KV_OK;
}

int kv_head_new(kv_head **out, const kv_weight *w, float softcap, int n_arms)
{
    *out = NULL;
    RETURN_ERROR_IF(w->n_in < 1 || w->n_in > 1 << 20 || w->n_out < 1 || w->n_out > INT32_MAX - BLOCK, KV_E_UNSUPPORTED,
                    "head: %lld x %lld weights are outside 1..2^20 by 1..2^31-257", (long long)w->n_out, (long long)w->n_in);
    kv_head *h = kv_zalloc(sizeof *h);
    if (!h) return KV_E_NOMEM;
    const size_t lanes = (size_t)n_arms + 1;
    h->w = w;
    h->softcap = softcap;
    h->n_arms = n_arms;
    h->n_blocks = (w->n_out + BLOCK - 1) / BLOCK;
    h->wave_cap = kv_max(1, kv_min(MAX_WAVE, 4 * kv_threads()));    /* four blocks a thread: the barrier waits for little */
    const size_t right = kv_amx() ? kv_amx_bytes(BLOCK, w->n_in) / sizeof(float) : 0;
    h->scratch_floats = kv_round_up((size_t)BLOCK * (size_t)w->n_in, 16) + 4 * (size_t)TILE * BLOCK + right;
    h->hidden = kv_alloc_array(lanes, sizeof *h->hidden, true);
    h->total = kv_alloc_array(lanes * TILE, sizeof *h->total, true);
    h->wave = kv_alloc_array(lanes * TILE * (size_t)h->wave_cap, sizeof *h->wave, true);
    h->z_target = kv_alloc_array(lanes * TILE, sizeof *h->z_target, true);
    if (right) h->left = kv_alloc_array(lanes, kv_amx_bytes(TILE, w->n_in), false);
    if (!h->hidden || !h->total || !h->wave || !h->z_target || (right && !h->left)) {
        kv_head_free(h);
        return KV_E_NOMEM;
    }
    *out = h;
    return KV_OK;
}

void kv_head_free(kv_head *h)
{
    if (!h) return;
    kv_free((void *)h->hidden);
    kv_free(h->total);
    kv_free(h->wave);
    kv_free(h->z_target);
    kv_free(h->scratch);
    kv_free(h->left);
    kv_free(h);
}
