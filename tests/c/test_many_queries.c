/* test_many_queries.c -- codecs that decode first when many queries come together give each query what it gets alone. */
#include <math.h>
#include "check.h"
#include "codec.h"

enum { PAGE = 64, MANY = 25, TOKENS = 59 };

static void compare(const char *family, const char *params, int dim, int side)
{
    static float x[256 * 128], q[MANY * 128], p[MANY * PAGE], s[MANY * PAGE], one[PAGE], acc[MANY * 128], out[MANY * 128], alone[128];
    kv_codec *c;
    kv_rng_normal(11, dim, 0, 256 * dim, x);
    kv_rng_normal(12, dim, 0, MANY * dim, q);
    kv_rng_uniform(13, dim, 0, MANY * PAGE, p);
    const kv_tensor rows = { .data = x, .dtype = KV_F32, .ndim = 2, .shape = { 256, dim }, .stride = { dim, 1 } };
    if (kv_codec_fit(&c, family, params, dim, PAGE, side, &rows, NULL) < 0) { CHECK(0, "%s", kv_last_error()); return; }
    CHECK(c->space_dim == dim, "%s %s: space of %d", family, params, c->space_dim);
    uint8_t *page = kv_zalloc(c->page_bytes), *prepared = kv_alloc(MANY * kv_round_up(c->query_bytes, 64));
    c->ops->encode(c, page, 0, PAGE, x, dim);
    for (int level = 0; level <= kv_cpu_simd_max(); level++) {
        if (kv_cpu_limit(level) != level) continue;
        for (int n_q = 4; n_q <= MANY; n_q += n_q < 10 ? 1 : 5) {
            double worst = 0;
            memset(s, 0xff, sizeof s);
            memset(acc, 0, sizeof acc);
            if (side == KV_SIDE_K) {
                c->ops->query(c, q, dim, n_q, prepared);
                c->ops->dot(c, page, TOKENS, prepared, n_q, s, PAGE);
            } else {
                c->ops->accumulate(c, page, TOKENS, p, PAGE, n_q, acc);
                c->ops->output(c, acc, n_q, out, dim);
            }
            for (int g = 0; g < n_q; g++) {
                if (side == KV_SIDE_K) {
                    c->ops->query(c, q + g * dim, dim, 1, prepared);
                    c->ops->dot(c, page, TOKENS, prepared, 1, one, PAGE);
                    for (int t = 0; t < TOKENS; t++) worst = fmax(worst, fabs((double)one[t] - s[g * PAGE + t]) / dim);
                    for (int t = TOKENS; t < PAGE; t++) CHECK(isnan(s[g * PAGE + t]), "%s %s: a score past the tokens", family, params);
                } else {
                    memset(acc, 0, sizeof acc);
                    c->ops->accumulate(c, page, TOKENS, p + g * PAGE, PAGE, 1, acc);
                    c->ops->output(c, acc, 1, alone, dim);
                    for (int i = 0; i < dim; i++) worst = fmax(worst, fabs((double)alone[i] - out[g * dim + i]) / TOKENS);
                }
            }
            CHECK(worst < 2e-5, "%s %s d=%d side=%d simd=%d: %d queries differ from each alone by %g", family, params, dim, side, level, n_q, worst);
        }
    }
    kv_cpu_limit(kv_cpu_simd_max());
    kv_free(page);
    kv_free(prepared);
    kv_codec_free(c);
}

int main(void)
{
    static const char *const setting[][2] = { { "fp", "grid=e4m3" }, { "fp", "grid=e2m1,block=e4m3,group=16,scale=token" }, { "fp", "grid=e5m2,block=e8m0,group=32" },
        { "int", "bits=8,mode=ggml_0" }, { "int", "bits=5,mode=ggml_1" }, { "int", "bits=3,mode=affine,axis=token" }, { "int", "bits=4,mode=affine,axis=token" },
        { "int", "bits=5,mode=ggml_0,order=interleaved" }, { "nuq", "bits=3,outliers=1" }, { "nuq", "bits=4,outliers=0" }, { "raw", "dtype=f16" } };
    static const int dims[] = { 64, 96, 128 };
    printf("seeds 11, 12, 13; simd up to %d\n", kv_cpu_simd_max());
    for (unsigned i = 0; i < sizeof setting / sizeof *setting; i++)
        for (unsigned k = 0; k < sizeof dims / sizeof *dims; k++)
            for (int side = 0; side < 2; side++) compare(setting[i][0], setting[i][1], dims[k], side);
    return check_end();
}
