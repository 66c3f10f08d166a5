/* fused_device.h -- what a device needs of a `fused` codec; fused.c says what it means.  Read by C11 and CUDA C++.
 * `at_...` are bytes from the start of struct fused_device. */
#ifndef KV_FUSED_DEVICE_H
#define KV_FUSED_DEVICE_H
#include "polar_device.h"
struct fused_device {
    struct polar_device       base;                  /* residual: radii, with the pages' offsets */
    struct polar_device_field angle, sign, map, radius, code;
    int32_t  subspace, pairs, unbiased;
    uint32_t row_bytes, angle_at, radius_at, code_at, sign_at, scale_at;
    uint32_t at_circle, at_first, at_second;         /* (cos, sin); signs of both rotations */
    float    tail[256], tail_bound[256], disk[256], disk_bound[256];
};
#endif
