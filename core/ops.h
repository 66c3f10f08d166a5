/* ops.h -- the elementwise pieces of the forward pass, one row each. */
#ifndef KV_OPS_H
#define KV_OPS_H
#include "internal.h"
/* out = x / rms(x) * weight; the mean square is summed in double.  out may be x. */
void kv_rmsnorm(float *out, const float *x, const float *weight, int n, float eps);
void kv_add_to(float *x, const float *y, int n);
/* gate = act(gate) * up; activation: KV_ACT_SILU or KV_ACT_GELU_TANH. */
void kv_gate(float *gate, const float *up, int n, int activation);
#endif
