/* raw_device.h -- what a device needs of a `raw` codec.  Read by C11 and CUDA C++. */
#ifndef KV_RAW_DEVICE_H
#define KV_RAW_DEVICE_H
#include <stdint.h>
struct raw_device { int32_t dtype; };      /* KV_F32, KV_F16 or KV_BF16 */
#endif
