/* fp_device.h -- what a device needs of an `fp` codec; fp.c says what it means.  Read by C11 and CUDA C++. */
#ifndef KV_FP_DEVICE_H
#define KV_FP_DEVICE_H
#include <stdint.h>
struct fp_device_grid { uint32_t largest, normal, rebias; float magic, max; int32_t shift, exponent, bits; };
struct fp_device {
    struct fp_device_grid grid, e4m3;                /* of codes; of groups' scales */
    int32_t  kind, block, by_token, group, n_groups; /* kind: FP_E4M3, FP_E5M2 or 4, an index into table */
    uint32_t row_bytes, groups_at, tokens_at;
    float    value, table[16];
};
#endif
