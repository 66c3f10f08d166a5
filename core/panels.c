/* panels.c -- the weights of the decode step, 16 rows side by side.
 *
 * A row of blocks makes a product end in a sum across a register and its scales come one by one.  In a panel a register's
 * 32-bit lanes are rows, so one multiplication by four broadcast activations serves 16 rows, sums stay in their lanes and
 * scales are loaded 16 at a time; and a panel is one stream of memory.  The same bytes as ggml's blocks, in another order:
 *
 *   16 rows x 32 values   | d f16 x 16 | m f16 x 16 (Q4_1) | codes |
 *   Q4_0, Q4_1   codes    4 x 64 bytes: byte 4 r + b of vector v is byte 4 v + b of row r's block (values 4v+b and 16+4v+b)
 *   Q8_0         codes    8 x 64 bytes: byte 4 r + b of vector v is value 4 v + b of row r, plus 128
 *
 * Made once, when a model first decodes; other types and row counts that 16 does not divide go by rows (weights_avx*.c). */
#include <sys/mman.h>
#include "panels.h"

size_t kv_panel_block_bytes(const kv_weight *w)
{
    int block, bytes;
    if (w->type != KV_W_Q4_0 && w->type != KV_W_Q4_1 && w->type != KV_W_Q8_0) return 0;
    if (w->n_out % KV_PANEL_ROWS || w->n_in % 32 || !kv_weight_block(w->type, &block, &bytes)) return 0;
    return (size_t)(KV_PANEL_ROWS * bytes);
}

static void pack_block(int type, const uint8_t *const *row, uint8_t *p)
{
    const int head = type == KV_W_Q4_1 ? 4 : 2, n_vectors = type == KV_W_Q8_0 ? 8 : 4;
    uint8_t *const codes = p + KV_PANEL_ROWS * head;
    for (int r = 0; r < KV_PANEL_ROWS; r++) {
        memcpy(p + 2 * r, row[r], 2);
        if (head == 4) memcpy(p + 2 * KV_PANEL_ROWS + 2 * r, row[r] + 2, 2);
        for (int v = 0; v < n_vectors; v++)
            for (int b = 0; b < 4; b++) codes[64 * v + 4 * r + b] = (uint8_t)(row[r][head + 4 * v + b] ^ (type == KV_W_Q8_0 ? 0x80 : 0));
    }
}

typedef struct pack_job { const kv_weight *w; uint8_t *panels; size_t block_bytes; } pack_job;

static void pack_panel(void *ctx, int task, int thread)
{
    (void)thread;
    const pack_job *const j = ctx;
    const int64_t n_blocks = j->w->n_in / 32;
    const size_t row_block = j->block_bytes / KV_PANEL_ROWS;
    uint8_t *p = j->panels + (size_t)task * (size_t)n_blocks * j->block_bytes;
    const uint8_t *row[KV_PANEL_ROWS];
    for (int r = 0; r < KV_PANEL_ROWS; r++) row[r] = j->w->data + ((size_t)task * KV_PANEL_ROWS + (size_t)r) * j->w->row_bytes;
    for (int64_t i = 0; i < n_blocks; i++, p += j->block_bytes) {
        pack_block(j->w->type, row, p);
        for (int r = 0; r < KV_PANEL_ROWS; r++) row[r] += row_block;
    }
}

bool kv_weight_pack(kv_weight *w)
{
    const size_t block_bytes = kv_panel_block_bytes(w);
    if (w->panels || !block_bytes) return true;
    const size_t n = (size_t)(w->n_out / KV_PANEL_ROWS) * (size_t)(w->n_in / 32) * block_bytes;
    uint8_t *const panels = kv_alloc(n);
    if (!panels) return false;
    madvise((void *)(((uintptr_t)panels + 4095) & ~(uintptr_t)4095), n & ~(size_t)4095, MADV_HUGEPAGE);      /* a hint: fewer page walks */
    pack_job j = { w, panels, block_bytes };
    kv_parallel((int)(w->n_out / KV_PANEL_ROWS), pack_panel, &j);
    w->panels = panels;
    return true;
}
