/* polar_device.h -- what a device needs of a `polar` codec; polar.c and polar.h say what it means.  Read by C11 and CUDA C++.
 * `at_...` are bytes from the start of struct polar_device, 0: there is none. */
#ifndef KV_POLAR_DEVICE_H
#define KV_POLAR_DEVICE_H
#include <stdint.h>
enum { POLAR_DEVICE_LEVELS = 9 };
struct polar_device_field { int32_t base, count, digits, width, fields, bytes; };
struct polar_device_level {
    struct polar_device_field field;
    uint32_t at;                                     /* offset in a row of angles */
    uint32_t at_table, at_bound;                     /* f32 (cos, sin) of the indices; of the boundaries (from level 2 on) */
};
struct polar_device {
    int32_t  levels, upper, mode, bits, count;       /* the last three of radii */
    uint32_t angle_bytes, norm_bytes, side_bytes, norm_at, side_at, at_sign;
    float    shrink;
    struct polar_device_field radii;
    struct polar_device_level level[POLAR_DEVICE_LEVELS];
    float    table[256], bound[256];
};
#endif
