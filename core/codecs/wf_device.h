/* wf_device.h -- what a device needs of a `wf` codec; wf.c and wf.h say what it means.  Read by C11 and CUDA C++.
 * `at_...` are bytes from the start of struct wf_device. */
#ifndef KV_WF_DEVICE_H
#define KV_WF_DEVICE_H
#include <stdint.h>
struct wf_device {
    int32_t  n, padded, unit, n_units, n_tiles, log8, search;
    uint32_t tile_bytes, n_rows, scales, row_ld;     /* tile_bytes, n_rows: of keys' tiles, in 64 bytes each */
    uint32_t at_sigma, at_analysis, at_rows;         /* f32 [padded], [head_dim][padded], [n][row_ld] */
    float    factor[15];
    uint8_t  width[128], first[128];                 /* of a unit; keys: unit in which bit 8 r of the stream lies */
    uint16_t bit[128];                               /* keys: where a unit's code begins in the stream */
    uint32_t tile[32];                               /* values: offset of a tile */
    float    scale[256], between[256];
    float    centroid[9][256], bound[9][256];        /* by width */
};
#endif
