/* wf.h -- what the files of the `wf` codec share.  wf.c has the page's byte picture, wf_basis.c makes the tables. */
#ifndef KV_WF_H
#define KV_WF_H
#include "scalar.h"

enum { WF_MAX_BITS = 8, WF_MAX_SEARCH = 15, WF_MAX_UNITS = KV_MAX_HEAD_DIM / 4, WF_MAGIC = 0x3146574b /* "KWF1" */ };

/* Parameters, in the order of kv_codec_wf.params. */
enum { WF_P_BITS, WF_P_SCALE, WF_P_BASIS, WF_P_RIDGE, WF_P_MIX, WF_P_SEARCH };
enum { WF_SCALE_LOG8, WF_SCALE_F16 };
enum { WF_BASIS_QUERY, WF_BASIS_ROWS, WF_BASIS_CHANNELS };
enum { WF_MIX_ROTATION, WF_MIX_NONE };

/* The tables of one slot.  A unit is 4 components (keys) or 16 (values) of one width, in the order in which a page holds them;
 * n components are coded, the rest of head_dim has no bits.  Behind the header, from multiples of 64 bytes on:
 *
 *   sigma     f32 [padded]             deviation of each component; padded: n rounded up to 32, zeros past n
 *   analysis  f32 [head_dim][padded]   component i of row x is sum_j x_j analysis[j][i], of deviation about 1
 *   synthesis f32 [head_dim][padded]   x_j = sum_i synthesis[j][i] component_i; analysis^T synthesis = 1 on the n components */
typedef struct wf_blob {
    uint32_t magic, head_dim, side, n_units;
    uint8_t  reserved[48];
    uint8_t  width[WF_MAX_UNITS];          /* 1..8 for n_units units, then 0 */
} wf_blob;

static inline int wf_unit(int side) { return side == KV_SIDE_K ? 4 : SCALAR_LANES; }
static inline size_t wf_padded(int n) { return kv_round_up((size_t)n, 32); }
static inline size_t wf_blob_bytes(int head_dim, int n) { return sizeof(wf_blob) + wf_padded(n) * sizeof(float) * (1 + 2 * (size_t)head_dim); }
static inline const float *wf_sigma(const wf_blob *b) { return (const float *)(b + 1); }
/* Widths of all units add up to this: a lane's bytes are filled to whole ones. */
int wf_budget(const kv_codec *c);

/* Lloyd-Max codebooks of N(0,1), on a 14-bit grid: centroid = unit * fixed.  Made once. */
typedef struct wf_codebook {
    _Alignas(64) int16_t fixed[256];       /* repeated to the end, so bits above a code may be junk */
    _Alignas(64) uint8_t byte_lo[16][16], byte_hi[16][16];   /* of fixed, for byte shuffles */
    _Alignas(64) float   centroid[256];    /* repeated */
    float                bound[256];       /* between i and i + 1; past the last +inf */
    float                unit;
    double               distortion;
} wf_codebook;
typedef struct wf_tables {
    wf_codebook book[WF_MAX_BITS + 1];     /* by width; 0 is empty, distortion 1 */
    float       scale[256];                /* of log8: 0, then 2^((k - 128) / 24) */
    float       between[256];              /* a scale is at least code k + 1 from between[k] on; past the last +inf */
} wf_tables;
const wf_tables *wf_tables_get(void);

/* Four components (keys) of a lane's words, or four tokens (values): `width` bits of each of four bytes, from bit `shift` of
 * row `row`; what does not fit goes on in the next row's low bits. */
typedef struct wf_slot { uint32_t offset, even, odd; uint8_t width, low, shift; } wf_slot;   /* offset: 64 row; even, odd: shift, shift + 8 in both halves; low: bits in the first row */

typedef struct wf_state {
    const wf_tables *tables;
    const float     *sigma, *analysis, *synthesis;     /* in the blob */
    float           *rows;                             /* [n][round_up(head_dim, 16)]: synthesis, a component a row */
    int              n, padded, n_tiles, scale_mode, search;
    float            factor[WF_MAX_SEARCH];            /* of a vector's root mean square, in the order they are tried */
    uint8_t          width[WF_MAX_UNITS];
    size_t           tile[KV_MAX_HEAD_DIM / SCALAR_LANES], tile_bytes;   /* values: offset of each tile; keys: all tiles alike */
    size_t           scales;
    wf_slot          slot[WF_MAX_UNITS];               /* keys */
    _Alignas(64) float unit[KV_MAX_HEAD_DIM];          /* of each component's codebook; 0 past n */
} wf_state;

static inline const wf_state *wf_state_of(const kv_codec *c) { return c->state; }
static inline int wf_width(const wf_state *s, const kv_codec *c, int i) { return s->width[i / wf_unit(c->side)]; }

/* A prepared query is laid out as scalar's: its f32 row times the components' units. */
typedef struct wf_level {
    /* out[i] = sum_j x[j] m[j][i], j ascending, product and sum rounded apart; ld and n_out multiples of 16 */
    void (*dense)(const float *m, size_t ld, const float *x, float *out, int n_in, int n_out);
    void (*query)(const kv_codec *c, const float *q, int64_t ld, int n_q, void *prepared);
    void (*dot)(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld);
    void (*accumulate)(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc);
} wf_level;
extern const wf_level wf_c, wf_avx2, wf_avx512;

static inline void wf_load_scales(const wf_state *s, const uint8_t *page, int tok0, int n, float *out)
{
    for (int i = 0; i < n; i++)
        out[i] = s->scale_mode == WF_SCALE_LOG8 ? s->tables->scale[page[s->scales + (size_t)(tok0 + i)]] : kv_f16_to_f32(kv_load_u16(page + s->scales + 2 * (size_t)(tok0 + i)));
}

/* wf_basis.c */
int wf_calibrate(const kv_codec *c, const kv_moments *m, void **blob, size_t *blob_bytes);
/* Widths of units of variance v (any order), at most 8 each, that add up to budget with the least sum v * distortion[width]. */
void wf_fill(const double *v, int n_units, int budget, const wf_tables *t, uint8_t *width);
#endif
