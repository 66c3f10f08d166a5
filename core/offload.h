/* offload.h -- the inside of an offload, for offload.c and offload_file.c only. */
#ifndef KV_OFFLOAD_H
#define KV_OFFLOAD_H
#include "container.h"
#include "kvtc_impl.h"

enum { OFFLOAD_MAX_BLOCK = 1 << 14, OFFLOAD_INDEX_BYTES = 16 /* of a payload: address, length, stage */,
       OFFLOAD_NOTHING = 4 /* a payload's stage: rows that sliding layers had let go of, they come back as the mean */ };

typedef struct offload_block { int tok0, n; } offload_block;
struct kv_offload {
    kv_kvtc       *k;
    int            n_tokens, sink, n_coded, block_tokens, n_blocks, n_exact, stage, level;
    offload_block *block;                  /* [n_blocks], one after the other from token `sink` on */
    kvtc_payload  *part;                   /* [block][side][group]; data NULL: damaged in the file that it came from */
    uint16_t      *exact;                  /* [side][layer][head][n_exact][head_dim]: sinks, then the window */
};
#endif
