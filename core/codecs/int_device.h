/* int_device.h -- what a device needs of an `int` codec; int.c says what it means.  Read by C11 and CUDA C++. */
#ifndef KV_INT_DEVICE_H
#define KV_INT_DEVICE_H
#include <stdint.h>
struct int_device {
    int32_t  bits, group, mode, zero, cols, along_tokens, has_min, interleaved, s8;
    uint32_t block_bytes, group_bytes, row_bytes, granule_bytes;      /* block_bytes, group_bytes: of full ones */
};
#endif
