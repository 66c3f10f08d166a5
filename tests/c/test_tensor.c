/* Views: hostile shapes, strided copies against a direct loop, conversions bit by bit, statistics against long double. */
#include <math.h>
#include "check.h"
#include "internal.h"

static kv_tensor view(void *data, int dtype, int a, int b, int c)
{
    return (kv_tensor){ .data = data, .dtype = dtype, .ndim = 3, .shape = { a, b, c }, .stride = { (int64_t)b * c, c, 1 } };
}

static void refusals(void)
{
    float x[8];
    kv_tensor ok = view(x, KV_F32, 2, 2, 2), t;
    CHECK(kv_tensor_check(&ok, "x") == KV_OK, "%s", kv_last_error());
    CHECK(kv_tensor_check(NULL, "x") == KV_E_ARG && kv_tensor_check(NULL, NULL) == KV_E_ARG, "NULL");
    t = ok; t.data = NULL;            CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "no data");
    t = ok; t.dtype = 5;              CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "dtype 5");
    t = ok; t.ndim = 0;               CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "ndim 0");
    t = ok; t.ndim = 6;               CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "ndim 6");
    t = ok; t.shape[1] = 0;           CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "shape 0");
    t = ok; t.shape[1] = -1;          CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "shape -1");
    t = ok; t.stride[0] = INT64_MAX;  CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "stride 2^63-1");
    t = ok; t.stride[0] = INT64_MIN;  CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "stride -2^63");
    t = ok; for (int d = 0; d < 3; d++) t.shape[d] = INT32_MAX;
    CHECK(kv_tensor_check(&t, "x") == KV_E_ARG, "2^93 elements");
    t = ok; t.device = 1;             CHECK(kv_tensor_copy(&t, &ok) == KV_E_UNSUPPORTED, "device 1");
    t = ok; t.shape[2] = 1;           CHECK(kv_tensor_copy(&t, &ok) == KV_E_ARG, "other shape");
    t = ok; t.dtype = KV_I32;         CHECK(kv_tensor_copy(&t, &ok) == KV_E_UNSUPPORTED, "i32 to f32");
    t = ok; t.stride[1] = 0;          CHECK(kv_tensor_copy(&ok, &t) == KV_E_ARG, "dst stride 0");
    CHECK(kv_dtype_size(KV_BF16) == 2 && kv_dtype_size(KV_U8) == 1 && kv_dtype_size(9) == KV_E_ARG, "sizes");
}

static void copies(void)
{
    enum { A = 3, B = 4, C = 5, ROOM = 400 };
    float src[ROOM], dst[ROOM];
    CHECK(kv_rng_normal(1, 0, 0, ROOM, src) == KV_OK, "%s", kv_last_error());
    static const int64_t strides[][3] = { { 20, 5, 1 }, { 1, 3, 12 }, { -20, 5, 1 }, { 100, -7, 1 }, { 40, 10, 2 }, { 0, 0, 1 }, { 20, 5, -1 } };
    const int n = (int)(sizeof strides / sizeof *strides);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            kv_tensor s = view(src + 150, KV_F32, A, B, C), d = view(dst + 150, KV_F32, A, B, C);
            memcpy(s.stride, strides[i], sizeof strides[i]);
            memcpy(d.stride, strides[j], sizeof strides[j]);
            for (int k = 0; k < ROOM; k++) dst[k] = 1e30f;
            const int status = kv_tensor_copy(&s, &d);
            if (j == 5) { CHECK(status == KV_E_ARG, "a write through stride 0 is accepted"); continue; }
            CHECK(status == KV_OK, "%s", kv_last_error());
            int wrong = 0, touched = 0;
            for (int a = 0; a < A; a++)
                for (int b = 0; b < B; b++)
                    for (int c = 0; c < C; c++)
                        wrong += dst[150 + a * strides[j][0] + b * strides[j][1] + c * strides[j][2]] != src[150 + a * strides[i][0] + b * strides[i][1] + c * strides[i][2]];
            for (int k = 0; k < ROOM; k++) touched += dst[k] != 1e30f;
            CHECK(!wrong && touched == A * B * C, "strides %d to %d: %d wrong, %d touched", i, j, wrong, touched);
        }

    /* every half, there and back; then floats near and between halves */
    static uint16_t h[65536], back[65536];
    static float f[65536];
    for (int i = 0; i < 65536; i++) h[i] = (uint16_t)i;
    for (int type = KV_F16; type <= KV_BF16; type++) {
        kv_tensor th = view(h, type, 1, 256, 256), tf = view(f, KV_F32, 1, 256, 256), tb = view(back, type, 1, 256, 256);
        CHECK(kv_tensor_copy(&th, &tf) == KV_OK && kv_tensor_copy(&tf, &tb) == KV_OK, "%s", kv_last_error());
        int wrong = 0;
        for (int i = 0; i < 65536; i++) wrong += isnan(f[i]) ? type == KV_F16 ? (back[i] & 0x7fff) <= 0x7c00 : (back[i] & 0x7fff) <= 0x7f80 : back[i] != h[i];
        CHECK(wrong == 0, "dtype %d: %d values change on the way there and back", type, wrong);
    }
    float edge[] = { 65519.9f, 65520.0f, 1.0f + 0x1p-11f, 1.0f + 0x1.8p-10f, 0x1p-25f, 0x1.8p-25f };
    uint16_t got[6], want[] = { 0x7bff, 0x7c00, 0x3c00, 0x3c02, 0x0000, 0x0001 };
    kv_tensor te = view(edge, KV_F32, 1, 1, 6), tg = view(got, KV_F16, 1, 1, 6);
    CHECK(kv_tensor_copy(&te, &tg) == KV_OK && memcmp(got, want, sizeof got) == 0, "f16 rounding: %04x %04x %04x %04x %04x %04x", got[0], got[1], got[2], got[3], got[4], got[5]);
}

static void figures(void)
{
    enum { R = 100, C = 37 };
    static float a[R * C], b[R * C];
    kv_rng_normal(5, 0, 0, R * C, a);
    kv_rng_normal(5, 1, 0, R * C, b);
    for (int i = 0; i < R * C; i++) b[i] = a[i] + 0.1f * b[i];
    long double err = 0, ref = 0, sum = 0, cos_sum = 0, cos_min = 9, far = 0;
    for (int r = 0; r < R; r++) {
        long double aa = 0, bb = 0, ab = 0;
        for (int c = r * C; c < (r + 1) * C; c++) {
            const long double d = (long double)a[c] - b[c];
            err += d * d;
            ref += (long double)a[c] * a[c];
            sum += a[c];
            aa += (long double)a[c] * a[c];
            bb += (long double)b[c] * b[c];
            ab += (long double)a[c] * b[c];
            far = fabsl(d) > far ? fabsl(d) : far;
        }
        const long double cosine = ab / sqrtl(aa * bb);
        cos_sum += cosine;
        cos_min = cosine < cos_min ? cosine : cos_min;
    }
    kv_tensor ta = view(a, KV_F32, 4, 25, C), tb = view(b, KV_F32, 4, 25, C);
    kv_diff d;
    kv_stats s;
    CHECK(kv_tensor_diff(&ta, &tb, &d) == KV_OK && kv_tensor_stats(&ta, &s) == KV_OK, "%s", kv_last_error());
    CHECK(fabsl(d.rel_mse - err / ref) < 1e-12L && fabsl(d.cosine_mean - cos_sum / R) < 1e-12L && fabsl(d.cosine_min - cos_min) < 1e-12L &&
          fabsl(d.max_abs - far) < 1e-12L && d.n == R * C, "diff %g %g %g %g", d.rel_mse, d.cosine_mean, d.cosine_min, d.max_abs);
    CHECK(fabsl(s.mean - sum / (R * C)) < 1e-12L && fabsl(s.rms - sqrtl(ref / (R * C))) < 1e-12L && s.n == R * C && s.n_nonfinite == 0, "stats %g %g", s.mean, s.rms);

    CHECK(kv_tensor_diff(&ta, &ta, &d) == KV_OK && d.rel_mse == 0 && d.max_abs == 0 && fabs(d.cosine_min - 1) < 1e-12, "a tensor differs from itself");
    a[7] = NAN;
    a[9] = INFINITY;
    CHECK(kv_tensor_stats(&ta, &s) == KV_OK && s.n_nonfinite == 2 && isfinite(s.rms) && isfinite(s.max), "nonfinite: %g", s.n_nonfinite);
    CHECK(kv_tensor_diff(&ta, &tb, &d) == KV_OK && isnan(d.max_abs) && isnan(d.cosine_min) && isnan(d.rel_mse), "NaN is hidden: %g %g %g", d.max_abs, d.cosine_min, d.rel_mse);
    float zero[2] = { 0, 0 }, one[2] = { 1, 0 };
    kv_tensor tz = view(zero, KV_F32, 1, 1, 2), to = view(one, KV_F32, 1, 1, 2);
    CHECK(kv_tensor_diff(&tz, &tz, &d) == KV_OK && d.rel_mse == 0 && d.cosine_mean == 1, "zero against zero: %g %g", d.rel_mse, d.cosine_mean);
    CHECK(kv_tensor_diff(&tz, &to, &d) == KV_OK && isinf(d.rel_mse) && d.cosine_mean == 0, "zero against one: %g %g", d.rel_mse, d.cosine_mean);
}

static void layout(void)
{
    int structs = 0, fields = 0;
    for (int i = 0; kv_layout_at(i); i++) strchr(kv_layout_at(i)->name, '.') ? fields++ : structs++;
    CHECK(structs >= 14 && fields >= 100 && kv_layout_at(-1) == NULL, "%d structs, %d fields", structs, fields);
}

static void cpu(void)
{
    const int max = kv_cpu_simd_max();
    CHECK(kv_cpu_limit(KV_SIMD_C) == KV_SIMD_C && kv_cpu_simd() == KV_SIMD_C, "limit 0");
    CHECK(kv_cpu_limit(KV_SIMD_AVX512) == max && kv_cpu_limit(-5) == KV_SIMD_C && kv_cpu_limit(99) == max, "limits");
    CHECK(kv_cpu_name()[0] != 0, "no name");
    double gbs = 0;
    CHECK(kv_bench_read(0, 1, &gbs) == KV_E_ARG && kv_bench_memcpy(4, 65, &gbs) == KV_E_ARG && kv_bench_sgemm(0, 1, 1, &gbs) == KV_E_ARG, "bad sizes");
    CHECK(kv_bench_read(4, 1, &gbs) == KV_OK && gbs > 0.1, "%g GB/s", gbs);
}

int main(void)
{
    refusals();
    copies();
    figures();
    layout();
    cpu();
    return check_end();
}
