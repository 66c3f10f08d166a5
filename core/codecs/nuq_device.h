/* nuq_device.h -- what a device needs of a `nuq` codec; nuq.c says what it means.  Read by C11 and CUDA C++.
 * `at_...` are bytes from the start of struct nuq_device, 0: values, which have none. */
#ifndef KV_NUQ_DEVICE_H
#define KV_NUQ_DEVICE_H
#include <stdint.h>
struct nuq_device {
    int32_t  bits, n_levels, span, cap;
    uint32_t row_bytes, zeros_at, scales_at, lists_at, list_bytes;
    uint32_t at_zero, at_scale, at_inverse;          /* f32 [head_dim] of keys */
    float    level[16], bound[16];
};
#endif
