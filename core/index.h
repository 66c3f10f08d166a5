/* index.h -- nearest vectors on codes: what index.c (storage), index_search.c and index_file.c share.
 *
 * Vectors get numbers 0, 1, 2 ... in the order they are added; a number is never used again, so it is also where the vector
 * lies: page number / page_rows, slot number % page_rows.  A page is one record, in memory and in a file:
 *
 *   record   | codec page of part 0 | part 1 | ... | |x|^2 f32 [page_rows], to 64 bytes (l2) |
 *   rows     | f32 or f16 [page_rows][dim] |                                    originals, when they are kept
 *
 * A vector longer than a codec's head_dim is cut into equal parts, each coded by itself.  Vectors past the last whole
 * granule of the codec wait as f32 in the tail.  What is coded is x - mean; with cosine x has length 1 first.  |x|^2 is of the
 * decoded x - mean, so that l2 is the distance to what was stored and not to a mixture.
 *
 * Removing sets a bit; a page goes when none of its vectors is left. */
#ifndef KV_INDEX_H
#define KV_INDEX_H
#include "codec.h"
#include "container.h"

enum { KV_INDEX_MAX_DIM = 8192, KV_INDEX_MAX_PARTS = KV_INDEX_MAX_DIM / 64, KV_INDEX_VERSION = 1 };
enum { KV_INDEX_CODES_SEEN = 1, KV_INDEX_ROWS_SEEN = 2 };  /* held against the file's checksum, or ours */

typedef struct kv_index_page {
    const uint8_t *record, *rows;              /* record NULL: all vectors are gone */
    bool           own_record, own_rows;       /* else in the mapped file */
    int            n_live;
    atomic_int     seen;
} kv_index_page;

struct kv_index {
    kv_codec      *codec[KV_INDEX_MAX_PARTS];  /* alike but for calibrated tables */
    int            dim, n_parts, part_dim, page_rows, metric, keep;
    float         *mean;                       /* [dim] or NULL */
    size_t         code_bytes, record_bytes, row_bytes;   /* of a page; row_bytes 0: no originals */
    int            n_rows, n_coded, n_live, n_pages, cap_pages;
    kv_index_page *pages;
    uint8_t       *dead;                       /* a bit a vector, room for cap_dead */
    size_t         cap_dead;
    float         *tail;                       /* [granule][dim]: vectors n_coded .. n_rows-1, mean not removed; NULL for granule 1 */
    kv_pack       *file;
    int            codes_part, rows_part;      /* of the file */
};

static inline bool kv_index_dead(const kv_index *ix, int id) { return ix->dead[id >> 3] >> (id & 7) & 1; }
static inline int kv_index_granule(const kv_index *ix) { return ix->codec[0]->granule; }
static inline int kv_index_fill(const kv_index *ix, int page) { return kv_min(ix->page_rows, ix->n_coded - page * ix->page_rows); }
static inline const float *kv_index_norms(const kv_index *ix, const uint8_t *record) { return (const float *)(const void *)(record + ix->code_bytes); }

/* A page of a mapped file is held against its checksum when it is first used.  false: damaged; kv_index_damage then says which. */
bool kv_index_seen(const kv_index *ix, int page, int what);
int  kv_index_damage(const kv_index *ix, int page, int what);
/* Everything but codecs, mean and vectors from ix's dim, page_rows, metric, keep and codecs. */
int  kv_index_set_up(kv_index *ix);
int  kv_index_reserve(kv_index *ix, int n_rows);           /* page entries and bits for so many vectors */
void kv_index_gather(const kv_index *ix, const kv_tensor *t, int row, float *dst);    /* a row as it is compared: cosine has length 1 */
int  kv_index_check_rows(const kv_tensor *t, const char *what, int dim, float most);  /* f32 [n, dim], |x| <= most */
int  kv_index_read(kv_index **out, kv_pack *file);         /* takes the file over, and frees it when it holds no index */
#endif
