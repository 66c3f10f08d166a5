/* test_weights.c -- block types against golden values, SIMD against plain C, products against a double reference. */
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>
#include "amx.h"
#include "check.h"
#include "rng.h"
#include "weights.h"
#include "../golden/weights_golden.h"

enum { SEED = 4711 };

static const int all_types[] = { KV_W_F32, KV_W_F16, KV_W_BF16, KV_W_Q4_0, KV_W_Q4_1, KV_W_Q5_0, KV_W_Q5_1, KV_W_Q8_0, KV_W_Q2_K, KV_W_Q3_K, KV_W_Q4_K, KV_W_Q5_K, KV_W_Q6_K };
enum { N_TYPES = sizeof all_types / sizeof *all_types };
static const char *const level_name[] = { "plain", "avx2", "avx512" };

static uint32_t counter;
static uint32_t random_u32(void)
{
    uint32_t v[4];
    kv_rng_u32(SEED, 0, 1, counter++, v);
    return v[0];
}
static float random_normal(void)
{
    float s = -6;                                            /* twelve uniforms: near enough to a Gaussian for a test */
    for (int i = 0; i < 12; i++) s += ((float)(random_u32() >> 8) + 0.5f) * 0x1p-24f;
    return s;
}

/* Memory whose end is followed by a page that cannot be read: a read past the last row ends the test. */
typedef struct { uint8_t *map, *p; size_t map_bytes; } guarded;
static guarded guarded_alloc(size_t n)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = kv_round_up(n, page);
    guarded g = { .map_bytes = room + page };
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(g.map + room, page, PROT_NONE);
    g.p = g.map + room - n;
    return g;
}
static void guarded_free(guarded *g) { munmap(g->map, g->map_bytes); }

/* Random rows with finite scales of about 1e-2 / the largest code. */
static kv_weight random_weight(guarded *g, int type, int64_t n_in, int64_t n_out)
{
    static const struct { int type, at[2]; } halves[] = { { KV_W_Q4_0, { 0, -1 } }, { KV_W_Q4_1, { 0, 2 } }, { KV_W_Q5_0, { 0, -1 } }, { KV_W_Q5_1, { 0, 2 } }, { KV_W_Q8_0, { 0, -1 } },
        { KV_W_Q2_K, { 80, 82 } }, { KV_W_Q3_K, { 108, -1 } }, { KV_W_Q4_K, { 0, 2 } }, { KV_W_Q5_K, { 0, 2 } }, { KV_W_Q6_K, { 208, -1 } } };
    int block = 0, bytes = 0;
    kv_weight_block(type, &block, &bytes);
    kv_weight w = { .type = type, .n_in = n_in, .n_out = n_out, .row_bytes = (size_t)(n_in / block * bytes) };
    *g = guarded_alloc(w.row_bytes * (size_t)n_out);
    w.data = g->p;
    for (size_t i = 0; i < w.row_bytes * (size_t)n_out; i++) g->p[i] = (uint8_t)random_u32();
    for (int64_t b = 0; b < n_in / block * n_out; b++) {
        uint8_t *const p = g->p + b * bytes;
        if (type == KV_W_F32) memcpy(p, &(float){ random_normal() }, 4);
        if (type == KV_W_F16) kv_store_u16(p, kv_f32_to_f16(random_normal()));
        if (type == KV_W_BF16) kv_store_u16(p, kv_f32_to_bf16(random_normal()));
        for (int h = 0; h < (int)(sizeof halves / sizeof *halves); h++)
            for (int i = 0; halves[h].type == type && i < 2; i++)
                if (halves[h].at[i] >= 0) kv_store_u16(p + halves[h].at[i], kv_f32_to_f16(random_normal() * 0.01f));
    }
    return w;
}

/* Equal as numbers: plain C and an FMA may disagree on the sign of a zero. */
static int count_different(const float *a, const float *b, int64_t n)
{
    int wrong = 0;
    for (int64_t i = 0; i < n; i++) wrong += !(a[i] == b[i]);
    return wrong;
}

static void dequantizes_like_the_golden_values(void)
{
    for (int level = 0; level <= kv_cpu_simd_max(); level++) {
        kv_cpu_limit(level);
        for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
            float y[512];
            const kv_weight w = { .type = golden[i].type, .n_in = golden[i].n, .n_out = 1, .data = golden[i].bytes };
            kv_weight_rows(&w, 0, 1, y);
            float want[512];
            memcpy(want, golden[i].bits, (size_t)golden[i].n * 4);
            const int wrong = count_different(y, want, golden[i].n);
            CHECK(!wrong, "%s at %s: %d of %d values differ", kv_weight_type_name(w.type), level_name[level], wrong, golden[i].n);
        }
    }
}

static void simd_dequantizes_like_plain_c(void)
{
    for (int t = 0; t < N_TYPES; t++) {
        int block = 0, bytes = 0;
        kv_weight_block(all_types[t], &block, &bytes);
        for (int n = 1; n <= 4; n++) {
            const int64_t n_in = n == 4 ? 2048 + 256 : block * (block == 1 ? n * 13 : n);
            guarded g;
            const kv_weight w = random_weight(&g, all_types[t], n_in, 3);
            guarded out = guarded_alloc((size_t)n_in * 2 * sizeof(float));
            float *const want = kv_alloc_array((size_t)n_in, 2 * sizeof(float), false);
            kv_weight_rows_plain(&w, 1, 2, want);
            for (int level = 0; level <= kv_cpu_simd_max(); level++) {
                kv_cpu_limit(level);
                memset(out.p, 0xff, (size_t)n_in * 2 * sizeof(float));
                kv_weight_rows(&w, 1, 2, (float *)(void *)out.p);
                CHECK(count_different((const float *)(void *)out.p, want, 2 * n_in) == 0, "%s n_in=%d at %s", kv_weight_type_name(w.type), (int)n_in, level_name[level]);
            }
            kv_free(want);
            guarded_free(&out);
            guarded_free(&g);
        }
    }
}

static void quantizes_activations_to_the_same_bytes(void)
{
    kv_act a = { 0 }, b = { 0 };
    float x[1000];
    for (int i = 0; i < 1000; i++) x[i] = random_normal() * (i / 100 == 3 ? 1e-30f : i / 100 == 4 ? 0 : i / 100 == 5 ? 1e30f : i / 100 == 6 ? 1e-40f : 1);
    for (int hostile = 0; hostile < 2; hostile++) {
        if (hostile) {
            x[7] = NAN;
            x[40] = INFINITY;
            x[999] = -INFINITY;
        }
        CHECK(kv_act_reserve(&a, 1000) == KV_OK && kv_act_reserve(&b, 1000) == KV_OK, "%s", kv_last_error());
        kv_cpu_limit(KV_SIMD_C);
        kv_act_set(&a, x, 1000);
        kv_cpu_limit(KV_SIMD_AMX);
        kv_act_set(&b, x, 1000);
        CHECK(memcmp(a.q, b.q, 2 * a.cap) == 0 && memcmp(a.extra, b.extra, 2 * a.cap) == 0, "q or digits differ, hostile=%d", hostile);
        CHECK(memcmp(kv_act_scale16(&a), kv_act_scale16(&b), a.cap / 32 * 24) == 0, "scales or sums differ, hostile=%d", hostile);
        CHECK(memcmp(kv_act_fine16(&a), kv_act_fine16(&b), a.cap * 3 + a.cap / 8) == 0, "fine parts or their sums differ, hostile=%d", hostile);
        for (int i = 0; i < 1024; i++) {
            const int8_t *const d = kv_act_digits(&a) + i / 32 * 64 + i % 32;
            if (256 * d[32] + d[0] != a.q[i]) CHECK(0, "digits %d %d are not q=%d at %d", d[32], d[0], a.q[i], i);
            if (!hostile && i < 1000 && !(fabs((double)a.q[i] * (double)a.scale[i / 32] - (double)x[i]) <= 0.51 * (double)a.scale[i / 32] + 1e-30)) CHECK(0, "q=%d times %g is not %g", a.q[i], (double)a.scale[i / 32], (double)x[i]);
        }
    }
    kv_act_free(&a);
    kv_act_free(&b);
}

/* |y - W x| <= tolerance |w_r| |x| for every row, and rows are the same alone and in company. */
static void products_agree_with_double(void)
{
    static const double tolerance[] = { 1e-6, 3e-5, 3e-5 };                 /* 1.5e-5 measured, on rows of 32 with an outlier */
    double worst[3][N_TYPES] = { 0 };
    for (int t = 0; t < N_TYPES; t++) {
        int block = 0, bytes = 0;
        kv_weight_block(all_types[t], &block, &bytes);
        const int64_t sizes[] = { block, 3 * block, block == 256 ? 768 : 576, block == 256 ? 2304 : 2080, block == 1 ? 77 : block * 17 };
        for (int s = 0; s < 5; s++) {
            const int64_t n_in = sizes[s], n_out = 11;
            guarded g;
            const kv_weight w = random_weight(&g, all_types[t], n_in, n_out);
            float *const v = kv_alloc_array((size_t)(n_in * n_out), sizeof *v, false), *const x = kv_alloc_array((size_t)n_in, sizeof *x, false);
            kv_weight_rows_plain(&w, 0, n_out, v);
            for (int64_t i = 0; i < n_in; i++) x[i] = random_normal() * (random_u32() % 50 ? 1 : 20) + 0.3f;      /* outliers and a mean, as activations have */
            kv_act a = { 0 };
            CHECK(kv_act_reserve(&a, n_in) == KV_OK, "%s", kv_last_error());
            for (int level = 0; level <= kv_cpu_simd_max(); level++) {
                kv_cpu_limit(level);
                kv_act_set(&a, x, n_in);
                float y[11], alone[11];
                memset(y, 0xff, sizeof y);
                kv_matvec(&w, &a, 0, n_out, y);
                for (int r = 0; r < n_out; r++) kv_matvec(&w, &a, r, r + 1, alone);
                CHECK(memcmp(y, alone, sizeof y) == 0, "%s n_in=%d at %s: a row alone differs from the same row among others", kv_weight_type_name(w.type), (int)n_in, level_name[level]);
                for (int64_t r = 0; r < n_out; r++) {
                    double sum = 0, ww = 0, xx = 0;
                    for (int64_t i = 0; i < n_in; i++) {
                        const double wi = (double)v[r * n_in + i], xi = (double)x[i];
                        sum += wi * xi;
                        ww += wi * wi;
                        xx += xi * xi;
                    }
                    const double e = fabs((double)y[r] - sum) / sqrt(ww * xx);
                    CHECK(e <= tolerance[level], "%s n_in=%d row %d at %s: %.9g instead of %.9g, %.2g of |w||x|", kv_weight_type_name(w.type), (int)n_in, (int)r, level_name[level], (double)y[r], sum, e);
                    worst[level][t] = fmax(worst[level][t], e);
                }
            }
            kv_act_free(&a);
            kv_free(v);
            kv_free(x);
            guarded_free(&g);
        }
    }
    for (int level = 0; level <= kv_cpu_simd_max(); level++) {
        printf("worst error of a product, share of |w||x|, %s:", level_name[level]);
        for (int t = 0; t < N_TYPES; t++) printf(" %s %.1e", kv_weight_type_name(all_types[t]), worst[level][t]);
        printf("\n");
    }
}

/* The panels hold the same weights: as exact as by rows, the same bits for any cut at multiples of 16, and nothing is read past them. */
static void panels_agree_with_rows_and_are_finer(void)
{
    static const int types[] = { KV_W_Q4_0, KV_W_Q4_1, KV_W_Q8_0 };
    enum { N_OUT = 48 };
    for (int t = 0; t < 3; t++)
        for (int64_t n_in = 32; n_in <= 2080; n_in = n_in * 3 + 64) {
            guarded g;
            kv_weight w = random_weight(&g, types[t], n_in, N_OUT);
            float *const x = kv_alloc_array((size_t)n_in, sizeof *x, false);
            kv_act a = { 0 };
            CHECK(kv_act_reserve(&a, n_in) == KV_OK, "%s", kv_last_error());
            for (int hostile = 0; hostile < 2; hostile++) {
                for (int64_t i = 0; i < n_in; i++) x[i] = hostile ? (random_u32() % 2 ? 1.0f : -1.0f) : random_normal() * (random_u32() % 50 ? 1 : 20) + 0.3f;
                for (int64_t i = 0; hostile && i < 32 && i < n_in; i++) x[i] = n_in % 3 ? -1.0f : 1.0f;      /* every digit at its end, one sign: the largest sums */
                for (int level = KV_SIMD_AVX2; level <= kv_cpu_simd_max(); level++) {
                    kv_cpu_limit(level);
                    kv_act_set(&a, x, n_in);
                    float by_rows[N_OUT], whole[N_OUT], cut[N_OUT];
                    memset(whole, 0xff, sizeof whole);
                    uint8_t *const panels = w.panels;
                    w.panels = NULL;
                    kv_matvec(&w, &a, 0, N_OUT, by_rows);
                    w.panels = panels;
                    CHECK(kv_weight_pack(&w) && w.panels, "%s: no panels", kv_weight_type_name(w.type));
                    kv_matvec(&w, &a, 0, N_OUT, whole);
                    for (int r = 0; r < N_OUT; r += 16) kv_matvec(&w, &a, r, r + 16, cut);
                    CHECK(memcmp(whole, cut, sizeof whole) == 0, "%s n_in=%d at %s: a panel alone differs", kv_weight_type_name(w.type), (int)n_in, level_name[level]);
                    float *const v = kv_alloc_array((size_t)(n_in * N_OUT), sizeof *v, false);
                    kv_weight_rows_plain(&w, 0, N_OUT, v);
                    for (int64_t r = 0; r < N_OUT; r++) {
                        double ww = 0, xx = 0, sum = 0;
                        for (int64_t i = 0; i < n_in; i++) {
                            sum += (double)v[r * n_in + i] * (double)x[i];
                            ww += (double)v[r * n_in + i] * (double)v[r * n_in + i];
                            xx += (double)x[i] * (double)x[i];
                        }
                        const double e = fabs((double)whole[r] - (double)by_rows[r]) / sqrt(ww * xx), exact = fabs((double)whole[r] - sum) / sqrt(ww * xx);
                        CHECK(exact <= 1e-6, "%s n_in=%d row %d at %s: %.9g by panels instead of %.9g, %.2g of |w||x|", kv_weight_type_name(w.type), (int)n_in, (int)r, level_name[level], (double)whole[r], sum, exact);
                        CHECK(e <= 3e-5, "%s n_in=%d row %d at %s: %.9g by panels, %.9g by rows, %.2g of |w||x|", kv_weight_type_name(w.type), (int)n_in, (int)r, level_name[level], (double)whole[r], (double)by_rows[r], e);
                    }
                    kv_free(v);
                }
            }
            kv_act_free(&a);
            kv_free(x);
            kv_free(w.panels);
            guarded_free(&g);
        }
    guarded g;
    kv_weight odd = random_weight(&g, KV_W_Q4_1, 64, 24);
    CHECK(kv_weight_pack(&odd) && !odd.panels, "24 rows are not whole panels");
    guarded_free(&g);
}

static void linear_agrees_and_ignores_lanes_and_threads(void)
{
    for (int t = 0; t < N_TYPES; t++) {
        const int64_t n_in = 512, n_out = 200;
        enum { N = 7, LANES = 3 };
        guarded g;
        const kv_weight w = random_weight(&g, all_types[t], n_in, n_out);
        float *const v = kv_alloc((size_t)(n_in * n_out) * 4), *const x = kv_alloc((size_t)n_in * N * LANES * 4), *const y = kv_alloc((size_t)n_out * N * LANES * 4), *const one = kv_alloc((size_t)n_out * N * 4);
        float *const z = kv_alloc((size_t)n_out * N * LANES * 4);
        float bias[200];
        const float *in[LANES];
        float *out[LANES], *unbiased[LANES];
        kv_weight_rows_plain(&w, 0, n_out, v);
        for (int64_t i = 0; i < n_in * N * LANES; i++) x[i] = random_normal();
        for (int i = 0; i < n_out; i++) bias[i] = random_normal();
        for (int l = 0; l < LANES; l++) {
            in[l] = x + (size_t)l * N * (size_t)n_in;
            out[l] = y + (size_t)l * N * (size_t)n_out;
            unbiased[l] = z + (size_t)l * N * (size_t)n_out;
        }
        memset(y, 0xff, (size_t)n_out * N * LANES * 4);
        kv_set_threads(2);
        const kv_product all[] = { { &w, NULL, unbiased }, { &w, bias, out } };
        CHECK(kv_linear(all, 2, LANES, N, in) == KV_OK, "%s", kv_last_error());
        double worst = 0;
        for (int l = 0; l < LANES; l++)
            for (int i = 0; i < N; i++)
                for (int64_t r = 0; r < n_out; r++) {
                    double sum = (double)bias[r], ww = 0, xx = 0;
                    for (int64_t k = 0; k < n_in; k++) {
                        sum += (double)v[r * n_in + k] * (double)in[l][i * n_in + k];
                        ww += (double)v[r * n_in + k] * (double)v[r * n_in + k];
                        xx += (double)in[l][i * n_in + k] * (double)in[l][i * n_in + k];
                    }
                    worst = fmax(worst, fabs(sum - (double)out[l][i * n_out + r]) / (1 + sqrt(ww * xx)));
                }
        CHECK(worst < (kv_amx() ? 4e-6 : 1e-6), "%s: off by %g of |w||x|", kv_weight_type_name(w.type), worst);
        int second = 0;
        for (int64_t i = 0; i < n_out * N * LANES; i++) second += z[i] + bias[i % n_out] != y[i];
        CHECK(second == 0, "%s: %d values differ between two products in one call", kv_weight_type_name(w.type), second);
        kv_set_threads(1);
        for (int l = 0; l < LANES; l++) {
            float *const alone[] = { one };
            const kv_product single = { &w, bias, alone };
            kv_linear(&single, 1, 1, N, &in[l]);
            CHECK(memcmp(one, out[l], (size_t)n_out * N * 4) == 0, "%s: lane %d alone on one thread differs", kv_weight_type_name(w.type), l);
        }
        kv_set_threads(0);
        kv_free(v);
        kv_free(x);
        kv_free(y);
        kv_free(one);
        kv_free(z);
        guarded_free(&g);
    }
}

static void a_broken_activation_reaches_the_result(void)
{
    for (int t = 0; t < N_TYPES; t++)
        for (int bad = 0; bad < 2; bad++)
            for (int level = 0; level <= kv_cpu_simd_max(); level++) {
                guarded g;
                const kv_weight w = random_weight(&g, all_types[t], 256, 1);
                float x[256], y = 0;
                for (int i = 0; i < 256; i++) x[i] = 1;
                x[100] = bad ? NAN : INFINITY;
                kv_act a = { 0 };
                kv_cpu_limit(level);
                CHECK(kv_act_reserve(&a, 256) == KV_OK, "%s", kv_last_error());
                kv_act_set(&a, x, 256);
                kv_matvec(&w, &a, 0, 1, &y);
                CHECK(!isfinite(y), "%s at %s: %g from an activation that is %g", kv_weight_type_name(w.type), level_name[level], (double)y, (double)x[100]);
                kv_act_free(&a);
                guarded_free(&g);
            }
}

int main(void)
{
    printf("seed %d\n", SEED);
    CHECK(!kv_weight_type_name(4) && !kv_weight_block(-1, &(int){ 0 }, &(int){ 0 }), "unknown types are known");
    dequantizes_like_the_golden_values();
    simd_dequantizes_like_plain_c();
    quantizes_activations_to_the_same_bytes();
    products_agree_with_double();
    kv_cpu_limit(KV_SIMD_AMX);
    linear_agrees_and_ignores_lanes_and_threads();
    kv_cpu_limit(KV_SIMD_AVX512);
    panels_agree_with_rows_and_are_finer();
    linear_agrees_and_ignores_lanes_and_threads();
    kv_cpu_limit(KV_SIMD_AMX);
    a_broken_activation_reaches_the_result();
    kv_act a = { 0 };
    CHECK(kv_act_reserve(&a, 0) == KV_E_ARG && kv_act_reserve(&a, (int64_t)1 << 40) == KV_E_ARG, "a length out of range is taken");
    return check_end();
}
