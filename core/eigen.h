/* eigen.h -- eigenvalues of symmetric matrices.  Not part of the public header. */
#ifndef KV_EIGEN_H
#define KV_EIGEN_H
#include "internal.h"

/* a [n][n] symmetric = sum_i value[i] v_i v_i^T, value descending; row i of a becomes v_i, whose entry of
 * largest magnitude is positive.  KV_E_NOMEM, or KV_E_ARG when the matrix is not finite or does not converge. */
int kv_eigen_symmetric(double *a, int n, double *value);
#endif
