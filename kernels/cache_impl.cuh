// cache_impl.cuh -- the inside of a device cache: cache.cu (storage, the table), cache_rows.cu (rows in), attend_tile.cu (attention for any
// codec) and attend_codes.cu (attention on fragments).  Positions, granules and boundaries are core/cache.h's.
//
// A slot (layer, head, side) has for each sequence
//
//   sink  [sink_rows] rows in the exact dtype     tail  ring of tail_rows rows; position p at (p - sink) % tail_rows
//   page  [n_pages]   encoded; all there from the start, contiguous
//
// What a step changes before its commit does not count: slots of pages past `encoded`, rows past `length`, and the ring, whose rows a chunk
// overwrites after a copy to `saved`.  A step's own rows are read from the caller's k and v.
//
// Slots of a layer that encode at the same times are of one kind (granule, sides and heads apart): `encoded` is [n_seqs][n_kinds].
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector>
#include "attend_codes.cuh"
#include "backend.h"
#include "cache.cuh"
#include "codec.cuh"
#include "status.cuh"

namespace kelvin {

struct dev_slot {
    dev_codec    codec;
    const float *mean;                          // [head_dim] or null
    const float *turn;                          // [n_pages][n_rot]: cosines, then sines, of a page's first position; or null
    uint8_t     *sink, *tail, *page;            // of sequence 0
    size_t       sink_stride, tail_stride, page_stride;       // bytes from sequence to sequence
    int          kind, never, sink_rows, tail_rows, n_pages, n_rot;
    int          raw;                           // rows as they are, of this dtype: they need no decoding; or -1
};

struct dev_layer {                              // by value, of one layer
    const dev_slot *slot;                       // [n_kv_heads][2]
    const int      *length, *encoded;           // [n_seqs], [n_seqs][n_kinds]
    int            *bad;                        // 1 + the layer whose rows were not finite or did not fit the exact dtype
    int             layer, n_kinds, n_seqs, n_heads, n_kv_heads, head_dim, page_tokens, sink, recent, dtype, window;
};

__host__ __device__ inline int ripe(int n_tokens, int sink, int recent, int granule, int never)
{
    const int r = n_tokens - sink - recent;
    return never || r <= 0 ? 0 : r - r % granule;
}
// Positions of a slot that are compressed once n_tokens are there.
__device__ inline int encoded_at(const dev_layer &a, const dev_slot &s, int seq, int n_tokens)
{
    return max(s.never ? 0 : a.encoded[seq * a.n_kinds + s.kind], ripe(n_tokens, a.sink, a.recent, s.codec.granule, s.never));
}
__host__ __device__ inline int first_seen(int window, int i) { return window > 0 && i - window + 1 > 0 ? i - window + 1 : 0; }

__device__ inline float round_to(int dtype, float x)
{
    return dtype == 1 ? __half2float(__float2half_rn(x)) : dtype == 2 ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}
__device__ inline float load_as(int dtype, const uint8_t *row, int i)
{
    return dtype == 1 ? __half2float(((const __half *)row)[i]) : dtype == 2 ? __bfloat162float(((const __nv_bfloat16 *)row)[i]) : ((const float *)row)[i];
}
__device__ inline void store_as(int dtype, uint8_t *row, int i, float x)
{
    if (dtype == 1) ((__half *)row)[i] = __float2half_rn(x);
    else if (dtype == 2) ((__nv_bfloat16 *)row)[i] = __float2bfloat16_rn(x);
    else ((float *)row)[i] = x;
}

// Where the exact row of position p lies: held (in the exact dtype) or new (floats, to be rounded).
struct exact_row { const uint8_t *held; const float *fresh; };
__device__ inline exact_row find_exact(const dev_layer &a, const dev_slot &s, int seq, int head, int p, int length, int n, const float *x)
{
    const size_t bytes = (size_t)a.head_dim * (a.dtype ? 2 : 4);
    if (p >= length) return { nullptr, x + (((size_t)seq * n + (p - length)) * a.n_kv_heads + head) * a.head_dim };
    if (p < a.sink) return { s.sink + seq * s.sink_stride + p * bytes, nullptr };
    return { s.tail + seq * s.tail_stride + (size_t)((p - a.sink) % s.tail_rows) * bytes, nullptr };
}
__device__ inline float exact_value(const exact_row &r, int dtype, int i) { return r.fresh ? round_to(dtype, r.fresh[i]) : load_as(dtype, r.held, i); }

// A row in shared or global memory turned by its page's angle; the warp's lanes share the pairs.
__device__ inline void turn_row(const dev_slot &s, int page, bool back, float *x, int lane)
{
    const int half = s.n_rot / 2;
    const float *cs = s.turn + (size_t)page * s.n_rot, *sn = cs + half;
    for (int i = lane; i < half; i += 32) {
        const float a = x[i], b = x[i + half], sine = back ? sn[i] : -sn[i];
        x[i] = a * cs[i] - b * sine;
        x[i + half] = b * cs[i] + a * sine;
    }
}

// Row of token u of a slot's pages as attention reads it: mean added, keys turned to their absolute positions.  Page g lies at pages + g * page_bytes.
template <class Decode> __device__ void decode_slot_row(const dev_layer &a, const dev_slot &s, const uint8_t *pages, int u, float *row, float *scratch, int lane, Decode decode)
{
    const int page = u / a.page_tokens;
    decode(s.codec, pages + (size_t)page * s.codec.page_bytes, u - page * a.page_tokens, row, scratch, lane);
    __syncwarp();
    if (s.mean)
        for (int i = lane; i < a.head_dim; i += 32) row[i] += s.mean[i];
    if (s.turn) {
        __syncwarp();
        turn_row(s, page, true, row, lane);
    }
}
__device__ inline const uint8_t *pages_of(const dev_slot &s, int seq) { return s.page + seq * s.page_stride; }

// What steps did since the path was set: how tokens were attended, in what arithmetic chunks were.
enum { DID_TILE = 1, DID_ROWS = 2, DID_FUSED = 4, DID_F32 = 8, DID_BF16 = 16 };

// Rows are few when a block's tile of 16 holds them, twice at most: then pages are decoded in the kernel that attends.
enum { FEW_ROWS = 32, ROWS_OF_FEW = 16, KEYS_STEP = 64 };

// How a layer's slots are kept and attended, chosen at cache_new.  The tile form is any codec's; fragments hold plain scalar codes of 2, 3 or 4
// bits, keys and values of a head together.
struct cache_form {
    const char *name;                           // in cache_paths
    // Encodes what ripens with n new tokens, from tail and k, v; n = 1 saves the row too.
    cudaError_t (*append)(kv_backend_cache *c, int layer, int n, const float *k, const float *v, cudaStream_t stream);
    // Decoded rows (mean added, turned back) of positions [p0, p1) that lie in pages once n new tokens are appended: rows [n_seqs][n_kv_heads][2][slab][ld].
    cudaError_t (*decode)(const kv_backend_cache *c, int layer, int n, int p0, int p1, float *rows, int slab, int ld, cudaStream_t stream);
    // n new tokens whose stacked query rows are few, decoding in the kernel.
    cudaError_t (*attend_few)(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream);
    // Rows [u1 - u0][head_dim] of one slot's tokens [u0, u1), as decode makes them.
    cudaError_t (*read)(const kv_backend_cache *c, int seq, int layer, int head, int side, int u0, int u1, float *rows, cudaStream_t stream);
    // A page's bytes in the CPU's order, from the device and back.
    cudaError_t (*get_page)(const kv_backend_cache *c, int seq, int layer, int head, int side, int page, uint8_t *host);
    cudaError_t (*put_page)(kv_backend_cache *c, int seq, int layer, int head, int side, int page, const uint8_t *host);
};
extern const cache_form tile_form, fragments_form;

// Of a layer whose codes lie in fragment order (fragments.cu); form null: it is none.
struct fragment_layer { const attend_form *form; codebook kb, vb; bool plain_k, plain_v; };
bool        fragments_fit(const kv_backend_plan *p, int layer, fragment_layer *out);
void        fragments_flag(void *pod);                                        // a description's codes lie in fragment order from here on
uint32_t    fragments_sign(const void *pod);                                  // offsets in a description: of its signs (0: none) ...
uint32_t    fragments_part(const void *pod);                                  // ... and of its part
cudaError_t fragments_room(const kv_backend_cache *c, size_t *parts /* floats */, size_t *rows);
std::vector<attend_slot> fragments_slots(const kv_backend_cache *c);

cudaError_t attend_few_tile(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream);
// One new token over rows as they are.
bool rows_as_they_are(const kv_backend_cache *c, int layer);
cudaError_t attend_rows(kv_backend_cache *c, int layer, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream);
// n new tokens of any number: slab after slab of decoded rows.
cudaError_t attend_chunk(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream);
cudaError_t cache_check(kv_backend_cache *c, int layer, int n, const float *k, const float *v, cudaStream_t stream);
cudaError_t cache_save(kv_backend_cache *c, int layer, int n, const float *k, const float *v, cudaStream_t stream);
cudaError_t cache_count(kv_backend_cache *c, int n, cudaStream_t stream);
// Rows, already of this kind, of positions [p0, p0 + n) of one slot into its ring; rounded to the exact dtype.
cudaError_t cache_put_tail(kv_backend_cache *c, int seq, int layer, int head, int side, int p0, int n, const float *rows, cudaStream_t stream);
int  family_of(const char *name);                                             // codecs.cuh's number
// The table's entries; cache.cu has the first four.
int  cache_new(int device, const kv_backend_plan *p, int n_seqs, int max_tokens, kv_backend_cache **out, char *err, size_t cap);
void cache_free(kv_backend_cache *c);
int  cache_fork(const kv_backend_cache *c, kv_backend_cache **out, char *err, size_t cap);
void cache_path(kv_backend_cache *c, int path);
// At least `need` bytes at *p; or false and a status.
bool cache_grow(void **p, size_t *have, size_t need, const char *what, char *err, size_t cap, int *status);
int  cache_restore(kv_backend_cache *c, int layer, cudaStream_t stream);      // a layer as of the last commit
int  cache_put_books(kv_backend_cache *c, char *err, size_t cap);             // the host's counts to the device
inline bool few(int n, int group) { return n == 1 || n * group <= FEW_ROWS; }

struct kind_books { int sink, recent, granule, never; };                // of a kind, in device memory
struct cache_kind { int layer, granule, never, tail_rows, count /* slots of a sequence */; };
// A sequence's books of one kind, as core/cache_impl.h's store has them.
struct cache_held { int encoded, first_page, sink_gone; };

}  // namespace kelvin

struct kv_backend_cache {
    int device, n_layers, n_heads, n_kv_heads, head_dim, page_tokens, n_rot, n_seqs, max_tokens, group, ld;
    std::vector<int> sink, recent, dtype, window;                       // [n_layers]
    std::vector<kelvin::dev_slot>   slot;                               // [n_layers][n_kv_heads][2], pointers as the device's
    std::vector<size_t>             used_bytes;                         // [n_layers][n_kv_heads][2] of a page, without its padding
    std::vector<kelvin::cache_kind> kind;
    std::vector<kelvin::cache_held> held;                               // [n_seqs][n_kinds]
    std::vector<int>                length, pending;                    // [n_seqs]; [n_layers] tokens appended since the last commit
    std::vector<const kelvin::cache_form *> form;                       // [n_layers]
    std::vector<size_t>             tail_at, tail_bytes;                // [n_layers] in store, which begins with the rings, a layer's together

    uint8_t *books = nullptr, *store = nullptr;                         // the two allocations of a cache: descriptions, and what sequences keep
    size_t   books_bytes = 0, store_bytes = 0;
    kelvin::dev_slot *dev_slots = nullptr;                              // in books, as are the next
    kelvin::kind_books *dev_kinds = nullptr;
    std::vector<kelvin::fragment_layer> fragments;                      // [n_layers]
    std::vector<uint32_t> part_at, sign_at;                             // of fragments' slots
    kelvin::attend_slot *attend_slots = nullptr;                        // [n_layers][n_kv_heads][2], and what a launch needs
    float   *attend_parts = nullptr;
    int     *attend_arrivals = nullptr;
    int     *dev_length = nullptr, *dev_encoded = nullptr, *dev_bad = nullptr, *arrivals = nullptr;
    float   *parts = nullptr, *staging = nullptr;
    int      n_splits = 1, staging_rows = 0, shared_bytes = 48 << 10;  // shared memory that a block may have

    // Working memory, grown by kv_dev_cache_reserve.
    uint8_t *saved = nullptr;                                           // rings as of the last commit, at tail_at of their layers
    float   *slab = nullptr, *state = nullptr, *io = nullptr;
    size_t   saved_bytes = 0, slab_bytes = 0, state_bytes = 0, io_bytes = 0, tails_bytes = 0;
    int      slab_tokens = 0;
    uint8_t *prefill = nullptr;                                         // prefill.cu's
    size_t   prefill_bytes = 0;
    bool     bf16_chunks = false;
    std::vector<char> turned;                                           // [n_layers] prefill_turned

    unsigned long long epoch = 0;
    int    path = 0, count_from = 0, did = 0;
    double pairs_compressed = 0, pairs_total = 0;
    char   paths[128] = "";

    int  n_kinds() const { return (int)kind.size(); }
    kelvin::dev_slot &at(int layer, int head, int side) { return slot[((size_t)layer * n_kv_heads + head) * 2 + side]; }
    const kelvin::dev_slot &at(int layer, int head, int side) const { return slot[((size_t)layer * n_kv_heads + head) * 2 + side]; }
    size_t row_bytes(int layer) const { return (size_t)head_dim * (dtype[layer] ? 2 : 4); }
    kelvin::dev_layer layer_args(int l) const
    {
        return { dev_slots + (size_t)l * n_kv_heads * 2, dev_length, dev_encoded, dev_bad, l, n_kinds(), n_seqs, n_heads, n_kv_heads, head_dim, page_tokens, sink[l], recent[l], dtype[l], window[l] };
    }
};
