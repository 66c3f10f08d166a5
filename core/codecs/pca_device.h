/* pca_device.h -- what a device needs of a `pca` codec; pca.c says what it means.  Read by C11 and CUDA C++.
 * `at_...` are bytes from the start of struct pca_device. */
#ifndef KV_PCA_DEVICE_H
#define KV_PCA_DEVICE_H
#include <stdint.h>
enum { PCA_DEVICE_HEADERS = 128 };                   /* more blocks with headers no budget pays for */
struct pca_device_block { int32_t start, size, type, header; };      /* header: its number, -1: none */
struct pca_device_component { float step; int32_t type, header, bit; };    /* bit: of its code behind the headers */
struct pca_device {
    int32_t  rank, n_blocks, n_headers, fixed, code_bits;
    uint32_t row_bytes, forward_ld, back_ld;
    uint32_t at_mean, at_block, at_component, at_forward, at_back;   /* f32 [head_dim]; ...; f32 [head_dim][forward_ld], [rank][back_ld] */
};
#endif
