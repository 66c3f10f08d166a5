/* canary_device.h -- what a device needs of a `canary` codec.  Read by C11 and CUDA C++. */
#ifndef KV_CANARY_DEVICE_H
#define KV_CANARY_DEVICE_H
#include <stdint.h>
struct canary_device { int32_t row_bytes; };
#endif
