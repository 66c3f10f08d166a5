/* tensor.c -- views of caller's memory: checked, copied between float types, summarised, compared.
 *
 * Element (i0, i1, ...) of a view lies at data + i0*stride[0] + i1*stride[1] + ...; strides are in elements and may be
 * zero or negative.  Everything here walks rows of the last dimension, so a contiguous view costs one odometer step a row. */
#include <math.h>
#include "internal.h"

static const char *const dtype_name[] = { "f32", "f16", "bf16", "i32", "u8" };

int kv_dtype_size(int dtype)
{
    static const int size[] = { 4, 2, 2, 4, 1 };
    RETURN_ERROR_IF(dtype < KV_F32 || dtype > KV_U8, KV_E_ARG, "dtype=%d is outside 0..4 (f32, f16, bf16, i32, u8)", dtype);
    return size[dtype];
}

int kv_tensor_check(const kv_tensor *t, const char *what)
{
    if (!what) what = "tensor";
    RETURN_ERROR_IF(!t, KV_E_ARG, "%s: the tensor is NULL", what);
    RETURN_ERROR_IF(!t->data, KV_E_ARG, "%s: data is NULL", what);
    RETURN_ERROR_IF(t->dtype < KV_F32 || t->dtype > KV_U8, KV_E_ARG, "%s: dtype=%d is outside 0..4 (f32, f16, bf16, i32, u8)", what, t->dtype);
    RETURN_ERROR_IF(t->ndim < 1 || t->ndim > KV_MAX_DIMS, KV_E_ARG, "%s: ndim=%d is outside 1..%d", what, t->ndim, KV_MAX_DIMS);
    int64_t count = 1, low = 0, high = 0;     /* elements, and the furthest offsets either way */
    for (int d = 0; d < t->ndim; d++) {
        RETURN_ERROR_IF(t->shape[d] < 1, KV_E_ARG, "%s: shape[%d]=%d is not positive", what, d, t->shape[d]);
        int64_t reach;
        const bool over = __builtin_mul_overflow(count, (int64_t)t->shape[d], &count) ||
                          __builtin_mul_overflow(t->stride[d], (int64_t)t->shape[d] - 1, &reach) ||
                          __builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high);
        RETURN_ERROR_IF(over || count > INT64_MAX / 8 || high > INT64_MAX / 16 || low < -(INT64_MAX / 16), KV_E_ARG,
                        "%s: shape[%d]=%d with stride %lld overflows", what, d, t->shape[d], (long long)t->stride[d]);
    }
    return KV_OK;
}

/* Rows of the last dimension.  The n-th row's offset, n counted in row-major order. */
static int64_t n_rows(const kv_tensor *t)
{
    int64_t n = 1;
    for (int d = 0; d < t->ndim - 1; d++) n *= t->shape[d];
    return n;
}

static int64_t row_offset(const kv_tensor *t, int64_t n)
{
    int64_t off = 0;
    for (int d = t->ndim - 2; d >= 0; n /= t->shape[d], d--) off += n % t->shape[d] * t->stride[d];
    return off;
}

static double load(const kv_tensor *t, int64_t off)
{
    switch (t->dtype) {
    case KV_F32:  return ((const float *)t->data)[off];
    case KV_F16:  return kv_f16_to_f32(((const uint16_t *)t->data)[off]);
    case KV_BF16: return kv_bf16_to_f32(((const uint16_t *)t->data)[off]);
    case KV_I32:  return ((const int32_t *)t->data)[off];
    default:      return ((const uint8_t *)t->data)[off];
    }
}

static bool is_float(int dtype) { return dtype <= KV_BF16; }

static int same_shape(const kv_tensor *a, const kv_tensor *b, const char *what)
{
    RETURN_ERROR_IF(a->ndim != b->ndim, KV_E_ARG, "%s: %d dimensions against %d", what, a->ndim, b->ndim);
    for (int d = 0; d < a->ndim; d++)
        RETURN_ERROR_IF(a->shape[d] != b->shape[d], KV_E_ARG, "%s: shape[%d] is %d against %d", what, d, a->shape[d], b->shape[d]);
    return KV_OK;
}

static int on_host(const kv_tensor *t, const char *what)
{
    FORWARD_IF_ERROR(kv_tensor_check(t, what));
    RETURN_ERROR_IF(t->device != 0, KV_E_UNSUPPORTED, "%s: device=%d, only host memory (0) can be read here", what, t->device);
    return KV_OK;
}

/* The views must not overlap.  A conversion rounds once, to nearest even; f16 overflow becomes inf and NaN stays NaN. */
int kv_tensor_copy(const kv_tensor *src, kv_tensor *dst)
{
    FORWARD_IF_ERROR(on_host(src, "kv_tensor_copy: src"));
    FORWARD_IF_ERROR(on_host(dst, "kv_tensor_copy: dst"));
    FORWARD_IF_ERROR(same_shape(src, dst, "kv_tensor_copy"));
    RETURN_ERROR_IF(src->dtype != dst->dtype && !(is_float(src->dtype) && is_float(dst->dtype)), KV_E_UNSUPPORTED,
                    "kv_tensor_copy: %s to %s; only f32, f16 and bf16 are converted", dtype_name[src->dtype], dtype_name[dst->dtype]);
    for (int d = 0; d < dst->ndim; d++)
        RETURN_ERROR_IF(dst->shape[d] > 1 && dst->stride[d] == 0, KV_E_ARG, "kv_tensor_copy: dst stride[%d]=0 would write one element %d times", d, dst->shape[d]);

    const int     last = src->ndim - 1, n = src->shape[last];
    const int64_t rows = n_rows(src), ss = src->stride[last], ds = dst->stride[last];
    const int     size = kv_dtype_size(src->dtype);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t so = row_offset(src, r), to = row_offset(dst, r);
        if (src->dtype == dst->dtype) {
            const uint8_t *from = (const uint8_t *)src->data + so * size;
            uint8_t       *into = (uint8_t *)dst->data + to * size;
            if (ss == 1 && ds == 1) memcpy(into, from, (size_t)n * (size_t)size);
            else for (int i = 0; i < n; i++) memcpy(into + i * ds * size, from + i * ss * size, (size_t)size);
            continue;
        }
        for (int i = 0; i < n; i++) {
            const float   v = (float)load(src, so + i * ss);
            const int64_t o = to + i * ds;
            if (dst->dtype == KV_F32) ((float *)dst->data)[o] = v;
            else ((uint16_t *)dst->data)[o] = dst->dtype == KV_F16 ? kv_f32_to_f16(v) : kv_f32_to_bf16(v);
        }
    }
    return KV_OK;
}

/* n counts all elements; the rest describes the finite ones, and is NaN when there are none. */
int kv_tensor_stats(const kv_tensor *t, kv_stats *out)
{
    RETURN_ERROR_IF(!out, KV_E_ARG, "kv_tensor_stats: out is NULL");
    FORWARD_IF_ERROR(on_host(t, "kv_tensor_stats"));
    const int     last = t->ndim - 1;
    const int64_t rows = n_rows(t);
    double lo = INFINITY, hi = -INFINITY, sum = 0, sq = 0, bad = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t off = row_offset(t, r);
        double row_sum = 0, row_sq = 0;       /* row by row: a partial sum per row keeps the rounding small */
        for (int i = 0; i < t->shape[last]; i++) {
            const double v = load(t, off + i * t->stride[last]);
            if (!isfinite(v)) { bad++; continue; }
            lo = v < lo ? v : lo;
            hi = v > hi ? v : hi;
            row_sum += v;
            row_sq += v * v;
        }
        sum += row_sum;
        sq += row_sq;
    }
    const double n = (double)rows * t->shape[last], good = n - bad;
    *out = good > 0 ? (kv_stats){ lo, hi, sum / good, sqrt(sq / good), bad, n } : (kv_stats){ NAN, NAN, NAN, NAN, bad, n };
    return KV_OK;
}

/* Two zero rows have cosine 1, one zero row 0.  rel_mse of a zero `a` is 0 if b is zero too, else inf.  NaN spreads. */
int kv_tensor_diff(const kv_tensor *a, const kv_tensor *b, kv_diff *out)
{
    RETURN_ERROR_IF(!out, KV_E_ARG, "kv_tensor_diff: out is NULL");
    FORWARD_IF_ERROR(on_host(a, "kv_tensor_diff: a"));
    FORWARD_IF_ERROR(on_host(b, "kv_tensor_diff: b"));
    FORWARD_IF_ERROR(same_shape(a, b, "kv_tensor_diff"));
    const int     last = a->ndim - 1;
    const int64_t rows = n_rows(a);
    double err = 0, ref = 0, cos_sum = 0, cos_min = INFINITY, far = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t ao = row_offset(a, r), bo = row_offset(b, r);
        double aa = 0, bb = 0, ab = 0, dd = 0;
        for (int i = 0; i < a->shape[last]; i++) {
            const double x = load(a, ao + i * a->stride[last]), y = load(b, bo + i * b->stride[last]), d = fabs(x - y);
            aa += x * x;
            bb += y * y;
            ab += x * y;
            dd += d * d;
            if (d > far || isnan(d)) far = d;             /* once NaN it stays: nothing is greater */
        }
        /* sqrt of each, not of the product: squares of subnormal rows stay representable */
        const double c = aa > 0 && bb > 0 ? ab / (sqrt(aa) * sqrt(bb)) : isnan(aa + bb) ? NAN : aa == bb ? 1 : 0;
        cos_sum += c;
        if (c < cos_min || isnan(c)) cos_min = c;
        err += dd;
        ref += aa;
    }
    *out = (kv_diff){ ref > 0 || isnan(ref) || isnan(err) ? err / ref : err > 0 ? INFINITY : 0, cos_sum / (double)rows, cos_min, far,
                      (double)rows * a->shape[last] };
    return KV_OK;
}
