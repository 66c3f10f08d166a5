/* eigen.c -- eigenvalues of symmetric matrices, by LAPACK's divide and conquer (dsyevd), which is part of OpenBLAS.
 *
 * LAPACK gives eigenvalues ascending and vectors in columns of a column-major matrix, which are rows of ours.  Signs are its
 * own business, so they are fixed here: tables made twice from the same figures are the same bytes. */
#include <math.h>
#include "eigen.h"
#include "model.h"

void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work, const int *lwork, int *iwork, const int *liwork, int *info, size_t, size_t);

static void swap_rows(double *a, double *b, int n)
{
    for (int i = 0; i < n; i++) {
        const double t = a[i];
        a[i] = b[i];
        b[i] = t;
    }
}

int kv_eigen_symmetric(double *a, int n, double *value)
{
    RETURN_ERROR_IF(!a || !value || n < 1 || n > 1 << 14, KV_E_ARG, "eigenvalues: a matrix of order %d is outside 1..%d", n, 1 << 14);
    for (size_t i = 0; i < (size_t)n * (size_t)n; i++)
        RETURN_ERROR_IF(!isfinite(a[i]), KV_E_ARG, "eigenvalues: element %zu of a matrix of order %d is %g", i, n, a[i]);
    int info = 0, n_iwork = 3 + 5 * n;
    const size_t doubles = 1 + 6 * (size_t)n + 2 * (size_t)n * (size_t)n;          /* dsyevd's documented need */
    const int n_work = (int)doubles;
    double *work = kv_alloc_array(doubles, sizeof *work, false);
    int *iwork = kv_alloc_array((size_t)n_iwork, sizeof *iwork, false);
    if (work && iwork) {
        kv_blas_single_thread();
        dsyevd_("V", "U", &n, a, &n, value, work, &n_work, iwork, &n_iwork, &info, 1, 1);
    }
    const bool got = work && iwork;
    kv_free(work);
    kv_free(iwork);
    if (!got) return KV_E_NOMEM;
    RETURN_ERROR_IF(info != 0, KV_E_ARG, "eigenvalues: a matrix of order %d does not converge (dsyevd: %d)", n, info);
    for (int i = 0; i < n / 2; i++) {
        swap_rows(a + (size_t)i * (size_t)n, a + (size_t)(n - 1 - i) * (size_t)n, n);
        swap_rows(value + i, value + n - 1 - i, 1);
    }
    for (int i = 0; i < n; i++) {
        double *v = a + (size_t)i * (size_t)n, top = 0;
        for (int k = 0; k < n; k++)
            if (fabs(v[k]) > fabs(top)) top = v[k];
        for (int k = 0; top < 0 && k < n; k++) v[k] = -v[k];
    }
    return KV_OK;
}
