/* scalar_device.h -- what a device needs of a `scalar` codec.  Read by C11 and CUDA C++; scalar.c and scalar_parts.c say what it means.
 * `at_...` are bytes from the start of struct scalar_device, 0: there is none. */
#ifndef KV_SCALAR_DEVICE_H
#define KV_SCALAR_DEVICE_H
#include <stdint.h>

/* Words of a lane hold 1 << log_chunk elements in `rows` words, 64 bytes apart. */
struct scalar_device_plane { int32_t bits, log_chunk, rows, n_chunks; uint32_t offset, tile_bytes; };
struct scalar_device_part {
    int32_t  dim, bits, levels, norm, n_planes, n_tiles, n_tries;
    int32_t  fragments;                                /* a device's own: pages hold tiles' sides in fragment order (kernels/include/kelvin/fragment.cuh) */
    uint32_t scales;                                   /* offset in a page */
    uint32_t at_sign, at_matrix, at_inverse;           /* f32 [dim], [dim][dim] */
    struct scalar_device_plane plane[2];
    float    tries[33], centroid[256], bound[256];
};
struct scalar_device_group { int32_t dim; uint32_t at_code, at_sketch; };
struct scalar_device {
    int32_t  plain;                                    /* one part, all of the row */
    int32_t  n_groups, by_page, gain;
    uint32_t mask;                                     /* offset in a page of the choice of channels (by_page) */
    uint32_t at_order;                                 /* u16 [head_dim]: channels, outliers first */
    uint32_t at_scale, at_unscale;                     /* f32 [head_dim] */
    struct scalar_device_group group[2];
};
#endif
