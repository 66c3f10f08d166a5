/* block.h -- the inside of a block, for block.c and container_block.c only: see block.c. */
#ifndef KV_BLOCK_H
#define KV_BLOCK_H
#include "codec.h"

struct kv_block {
    kv_codec *codec;
    int       n_heads, n_tokens, n_coded, n_pages;         /* n_coded: tokens in pages, of each head */
    size_t    pages_bytes, exact_bytes;                    /* allocated */
    uint8_t  *pages;
    uint16_t *exact;
};
int kv_block_new(kv_block **out, kv_codec *c, int n_heads, int n_tokens);      /* zeroed */
#endif
