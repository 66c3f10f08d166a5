// prefill.cu -- n new tokens of a cache by bf16 products (kelvin/prefill.cuh): for generation, where attend_tile.cu's f32 is not needed.
//
// Visibility is attend_tile.cu's and core/attend_chunk.c's: query i sees position p decoded if p < sink + encoded(i + 1), else exact, keys and values
// apart.  What differs is the arithmetic: queries, keys, values and weights are rounded to bf16, about 3e-3 of the output.
//
//   late    sinks and decoded rows of a slab of the prefix: [seq][head] images, overwritten slab after slab; no prefix is decoded as a whole
//   early   exact rows from the first one that is not encoded before the chunk (or that the window still shows) to the last new one
//
// Where all slots of a layer are plain scalar codes after signs and Hadamard (prefill_turned), everything stays as the codes lie: means taken off, keys
// and values turned; exact rows and queries are turned once each, the output is turned back and gets the values' mean.  The keys' mean adds the same
// to every score of a query, which only a softcap can tell.
//
// The grid of images starts so that codes begin where an image does.  Every slab is one launch, the last one takes the early rows along; its parts
// join the sum of those before.
#include <algorithm>
#include <cstring>
#include "cache_impl.cuh"
#include "codecs.cuh"
#include "kelvin/prefill_launch.cuh"
#include "kelvin/slab.cuh"
#include "prefill_cache.cuh"

namespace kelvin {
namespace {

enum { SLAB_POSITIONS = 32768, WARPS_OF_ROWS = 4 };
constexpr size_t SLAB_LIMIT = (size_t)512 << 20;        // bytes of late images

__host__ __device__ const scalar_device_part *plain_part(const scalar_device *d) { return (const scalar_device_part *)((const uint8_t *)d + d->group[0].at_code); }

// Rows of images first .. of the late version, keys and values; a warp a row.  grid: (rows / 4, 2 n_kv_heads, n_seqs)
template <int D, bool TURNED> __global__ void late_images(dev_layer a, int n, const float *k, const float *v, prefill_turn turn_k, prefill_turn turn_v, uint8_t *images, size_t stride, int first, int shift)
{
    constexpr int KEYS = IMAGE_KEYS<D>, V = D / 32;
    __shared__ float row[WARPS_OF_ROWS][D], lent[TURNED ? 1 : WARPS_OF_ROWS][CODEC_SCRATCH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = blockIdx.x * WARPS_OF_ROWS + warp, slot = blockIdx.y, seq = blockIdx.z;
    const int p = first * KEYS + line - shift, length = a.length[seq];
    const dev_slot &s = a.slot[slot];
    float x[V];
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = 0;
    if (p >= 0 && p < a.sink && p < length + n) {
        const exact_row e = find_exact(a, s, seq, slot / 2, p, length, n, slot % 2 ? v : k);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = exact_value(e, a.dtype, lane * V + i);
        if (TURNED) detail::center_and_turn<D>(slot % 2 ? turn_v : turn_k, slot / 2, x, lane);
    } else if (p >= a.sink && p >= first_seen(a.window, length) && p - a.sink < encoded_at(a, s, seq, length + n)) {
        const int u = p - a.sink;
        if (TURNED) {
            const scalar_device_part &part = *plain_part((const scalar_device *)s.codec.pod);
            const uint8_t *page = pages_of(s, seq) + (size_t)(u / a.page_tokens) * s.codec.page_bytes;
            scalar_codec::get_row(s.codec, part, page, u % a.page_tokens, true, row[warp], lane);
        } else decode_slot_row(a, s, pages_of(s, seq), u, row[warp], lent[warp], lane, codec_decode);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = row[warp][lane * V + i];
    }
    put_row<D>(images + ((size_t)(slot % 2 * gridDim.z + seq) * a.n_kv_heads + slot / 2) * stride + (size_t)(line / KEYS) * IMAGE_BYTES<D>, KEYS, line % KEYS, x, lane);
}

// The same of images that hold codes in fragment order alone: a block an image, a warp a tile of 32 tokens.  grid: (images, n_kv_heads, n_seqs)
template <int BITS, int D, bool KEYS> __global__ void __launch_bounds__(128) late_tiles(dev_layer a, int n, codebook book, uint8_t *images, size_t stride, int first, int shift)
{
    constexpr int ROWS = IMAGE_KEYS<D>, TILES = ROWS / TILE_TOKENS;
    __shared__ uint4 stages[TILES][256];                        // 32 lines of 128 bytes a warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, seq = blockIdx.z;
    if (warp >= TILES) return;
    const dev_slot &s = a.slot[2 * head + !KEYS];
    const int u0 = (first + blockIdx.x) * ROWS - shift - a.sink + warp * TILE_TOKENS, held = encoded_at(a, s, seq, a.length[seq] + n);
    uint8_t *const image = images + ((size_t)seq * a.n_kv_heads + head) * stride + (size_t)blockIdx.x * IMAGE_BYTES<D>;
    if (u0 >= held) {                                           // finite, of weight 0
        for (int i = lane; i < D / 64 * 256; i += 32) *(uint4 *)(image + i / 256 * ROWS * 128 + warp * TILE_TOKENS * 128 + i % 256 * 16) = make_uint4(0, 0, 0, 0);
        return;
    }
    const uint8_t *from = pages_of(s, seq) + (size_t)(u0 / TILE_TOKENS) * side<BITS, D>::bytes;
    const float norm = u0 + lane < held ? __half2float(((const __half *)(from + side<BITS, D>::word_bytes))[norm_place(lane)]) : 0.0f;
    detail::tile_to_image<BITS, D, KEYS>(from, norm, book.unit, book.half, book.t0, book.t1, (uint8_t *)stages[warp], image, warp * TILE_TOKENS, lane);
}

template <int D, bool KEYS> cudaError_t put_tiles(const kv_backend_cache *c, int layer, int n, const codebook &book, int bits, uint8_t *images, size_t stride, int first, int n_images, int shift, cudaStream_t stream)
{
    const dim3 grid(n_images, c->n_kv_heads, c->n_seqs);
    const dev_layer a = c->layer_args(layer);
    if (bits == 4) KV_LAUNCH((late_tiles<4, D, KEYS>), grid, 128, 0, stream, a, n, book, images, stride, first, shift);
    else if (bits == 3) KV_LAUNCH((late_tiles<3, D, KEYS>), grid, 128, 0, stream, a, n, book, images, stride, first, shift);
    else KV_LAUNCH((late_tiles<2, D, KEYS>), grid, 128, 0, stream, a, n, book, images, stride, first, shift);
    return cudaGetLastError();
}

// Where the early rows of a sequence begin: 0 <= p.
__device__ inline int turn_of(const dev_layer &a, int seq)
{
    int held = 0x7fffffff;
    for (int slot = 0; slot < 2 * a.n_kv_heads; slot++) held = min(held, a.slot[slot].never ? 0 : a.encoded[seq * a.n_kinds + a.slot[slot].kind]);
    return max(a.sink + held, first_seen(a.window, a.length[seq]));
}

// bound [n_seqs][n_kv_heads][2][n], origin [n_seqs] in images.  grid: (n / 128, 2 n_kv_heads, n_seqs)
__global__ void chunk_bounds(dev_layer a, int n, int keys, int shift, int *bound, int *origin)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, slot = blockIdx.y, seq = blockIdx.z;
    if (i < n) bound[((size_t)seq * gridDim.y + slot) * n + i] = a.sink + encoded_at(a, a.slot[slot], seq, a.length[seq] + i + 1);
    if (i == 0 && slot == 0) origin[seq] = (turn_of(a, seq) + shift) / keys;
}

// Signs and means of a layer, [2][n_kv_heads][head_dim] each.
__global__ void gather_turns(dev_layer a, float *sign, float *mean)
{
    const dev_slot &s = a.slot[blockIdx.x];
    const scalar_device *d = (const scalar_device *)s.codec.pod;
    const float *from = (const float *)((const uint8_t *)d + plain_part(d)->at_sign);
    const size_t to = ((size_t)blockIdx.x % 2 * a.n_kv_heads + blockIdx.x / 2) * a.head_dim;
    for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
        sign[to + i] = from[i];
        mean[to + i] = s.mean ? s.mean[i] : 0.0f;
    }
}

template <int D> struct early_rows {
    dev_layer    a;
    const float *fresh;
    int          n, side;
    __device__ bool load(int seq, int head, int p, float *x, int lane) const
    {
        constexpr int V = D / 32;
        const dev_slot &s = a.slot[2 * head + side];
        const int length = a.length[seq];
        if (p < 0 || p >= length + n || p < first_seen(a.window, length)) return false;
        if (p < length && p >= a.sink && !s.never && p - a.sink < a.encoded[seq * a.n_kinds + s.kind]) return false;      // no longer in the ring
        const exact_row e = find_exact(a, s, seq, head, p, length, n, fresh);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = exact_value(e, a.dtype, lane * V + i);
        return true;
    }
};

// Sizes and places of a chunk's working memory.
struct plan {
    int    shift, first, late_end /* position */, slab_images, late_images, early_images, splits, n_slabs, middle;
    size_t query, late, late_stride, early, early_stride, sums, tops, bound, origin, turns, bias, bytes;
};

template <int D> plan plan_chunk(const kv_backend_cache *c, int layer, int n, int n_sm)
{
    constexpr int KEYS = IMAGE_KEYS<D>;
    plan p = {};
    const int sink = c->sink[layer], window = c->window[layer], shortest = *std::min_element(c->length.begin(), c->length.end()), longest = *std::max_element(c->length.begin(), c->length.end()) + n;
    int early = 1, granule = 0;
    p.shift = (KEYS - sink % KEYS) % KEYS;
    p.late_end = std::min(sink, longest);
    for (int seq = 0; seq < c->n_seqs; seq++) {
        int held = 0x7fffffff, last = 0;
        for (int i = 0; i < c->n_kinds(); i++) {
            const cache_kind &k = c->kind[i];
            if (k.layer != layer) continue;
            const int now = k.never ? 0 : c->held[(size_t)seq * c->n_kinds() + i].encoded, then = std::max(now, ripe(c->length[seq] + n, sink, c->recent[layer], k.granule, k.never));
            held = std::min(held, now);
            p.late_end = std::max(p.late_end, then > 0 ? sink + then : 0);
            p.middle |= last && granule && (k.granule != granule || now != last - 1);
            granule = k.granule, last = now + 1;
        }
        const int turn = std::max(sink + held, first_seen(window, c->length[seq]));
        early = std::max(early, (c->length[seq] + n - 1 + p.shift) / KEYS - (turn + p.shift) / KEYS + 1);
    }
    const size_t pairs = (size_t)c->n_seqs * c->n_kv_heads, rows = (size_t)c->n_seqs * n * c->n_heads;
    // Sinks lie in the images before the first that the window shows; without sinks in view the slabs begin there.
    p.first = sink > 0 && first_seen(window, shortest) < sink ? 0 : (first_seen(window, shortest) + p.shift) / KEYS;
    p.late_images = std::max(0, (p.late_end + p.shift + KEYS - 1) / KEYS - p.first);
    p.slab_images = (int)std::max<size_t>(1, std::min<size_t>({ SLAB_POSITIONS / KEYS, SLAB_LIMIT / (2 * pairs * IMAGE_BYTES<D>), (size_t)std::max(1, p.late_images) }));
    p.n_slabs = std::max(1, (p.late_images + p.slab_images - 1) / p.slab_images);
    p.early_images = early;
    p.splits = prefill_splits(c->n_seqs, n, c->group, c->n_kv_heads, std::min(longest, p.slab_images * KEYS), n_sm);
    auto take = [&](size_t bytes) { const size_t at = p.bytes; p.bytes += (bytes + 255) / 256 * 256; return at; };
    p.query = take(prefill_query_bytes<D>(c->n_seqs, n, c->n_heads, c->n_kv_heads));
    p.late_stride = (size_t)p.slab_images * IMAGE_BYTES<D>;
    p.late = take(2 * pairs * p.late_stride);
    p.early_stride = (size_t)early * IMAGE_BYTES<D>;
    p.early = take(2 * pairs * p.early_stride);
    const size_t parts = (size_t)p.splits + (p.n_slabs > 1);
    p.sums = take(parts * rows * D * sizeof(float));
    p.tops = take(parts * rows * sizeof(float2));
    p.bound = take(2 * pairs * n * sizeof(int));
    p.origin = take((size_t)c->n_seqs * sizeof(int));
    if (c->turned[layer]) {
        p.turns = take(4 * (size_t)c->n_kv_heads * D * sizeof(float));
        p.bias = take(rows * sizeof(float));
    }
    return p;
}

int n_sm_of(int device)
{
    int n = 0;
    return cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? n : 1;
}

template <int D> cudaError_t attend(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    constexpr int KEYS = IMAGE_KEYS<D>;
    const plan p = plan_chunk<D>(c, layer, n, n_sm_of(c->device));
    if (p.bytes > c->prefill_bytes) return cudaErrorInvalidValue;               // reserve was not asked
    const dev_layer layer_now = c->layer_args(layer);
    const size_t pairs = (size_t)c->n_seqs * c->n_kv_heads;
    uint8_t *const at = c->prefill, *const late = at + p.late, *const early = at + p.early;
    int *const bound = (int *)(at + p.bound), *const origin = (int *)(at + p.origin);
    const bool turned = c->turned[layer] != 0;
    prefill_turn turn[2] = {};
    if (turned) {
        float *const sign = (float *)(at + p.turns), *const mean = sign + 2 * (size_t)c->n_kv_heads * D;
        for (int side = 0; side < 2; side++) turn[side] = { sign + (size_t)side * c->n_kv_heads * D, mean + (size_t)side * c->n_kv_heads * D, 1 };
        KV_LAUNCH(gather_turns, 2 * c->n_kv_heads, 64, 0, stream, layer_now, sign, mean);
    }
    float *const bias = turned && softcap > 0 ? (float *)(at + p.bias) : nullptr;
    KV_LAUNCH(chunk_bounds, dim3((n + 127) / 128, 2 * c->n_kv_heads, c->n_seqs), 128, 0, stream, layer_now, n, KEYS, p.shift, bound, origin);
    cudaError_t e = prefill_prepare<D>(q, turn[0], scale, c->n_seqs, n, c->n_heads, c->n_kv_heads, at + p.query, bias, stream);
    for (int side = 0; side < 2 && e == cudaSuccess; side++)
        e = prefill_put<D>(early_rows<D>{ layer_now, side ? v : k, n, side }, turn[side], early + side * pairs * p.early_stride, p.early_stride, origin, 0, p.early_images, p.shift, 0, c->n_seqs, c->n_kv_heads, stream);
    if (e != cudaSuccess) return e;

    prefill_args a = {};
    a.q = at + p.query;
    a.bias = bias;
    a.lengths = c->dev_length;
    a.bound = bound;
    a.sums = (float *)(at + p.sums);
    a.tops = (float2 *)(at + p.tops);
    a.n_seqs = c->n_seqs, a.n = n, a.n_heads = c->n_heads, a.n_kv_heads = c->n_kv_heads, a.window = c->window[layer], a.causal = 1, a.splits = p.splits, a.shift = p.shift;
    a.softcap = softcap * 1.4426950408889634f;
    const int all = 0x40000000;
    for (int slab = 0; slab < p.n_slabs; slab++) {
        const int image = p.first + slab * p.slab_images, images = std::min(p.slab_images, p.late_images - slab * p.slab_images);
        const bool last = slab == p.n_slabs - 1;
        a.n_sources = 0;
        const fragment_layer &tiles = c->fragments[layer];
        const int by_tile = turned && tiles.form ? std::max(0, image + images - std::max(image, (c->sink[layer] + p.shift) / KEYS)) : 0, by_row = images - by_tile;
        if (by_tile > 0) {
            uint8_t *const to = late + (size_t)by_row * IMAGE_BYTES<D>;
            e = put_tiles<D, true>(c, layer, n, tiles.kb, tiles.form->bits_k, to, p.late_stride, image + by_row, by_tile, p.shift, stream);
            if (e == cudaSuccess) e = put_tiles<D, false>(c, layer, n, tiles.vb, tiles.form->bits_v, to + pairs * p.late_stride, p.late_stride, image + by_row, by_tile, p.shift, stream);
            if (e != cudaSuccess) return e;
        }
        if (by_row > 0) {
            const dim3 grid(by_row * KEYS / WARPS_OF_ROWS, 2 * c->n_kv_heads, c->n_seqs);
            if (turned) KV_LAUNCH((late_images<D, true>), grid, WARPS_OF_ROWS * 32, 0, stream, layer_now, n, k, v, turn[0], turn[1], late, p.late_stride, image, p.shift);
            else KV_LAUNCH((late_images<D, false>), grid, WARPS_OF_ROWS * 32, 0, stream, layer_now, n, k, v, turn[0], turn[1], late, p.late_stride, image, p.shift);
            if ((e = cudaGetLastError()) != cudaSuccess) return e;
        }
        const prefill_source l = { late, late + pairs * p.late_stride, p.late_stride, p.late_stride, nullptr, nullptr, image, image, std::max(0, image * KEYS - p.shift), (image + std::max(0, images)) * KEYS - p.shift, SOURCE_LATE };
        prefill_source both = l;
        if (images > 0) a.source[a.n_sources++] = l;
        if (images > 0 && p.middle) {                   // late of one side with early of the other: only where a slab has the late rows
            both.kind = SOURCE_KEYS_LATE, both.v = early + pairs * p.early_stride, both.v_stride = p.early_stride, both.v_origin = origin;
            a.source[a.n_sources++] = both;
            both = l;
            both.kind = SOURCE_VALUES_LATE, both.k = early, both.k_stride = p.early_stride, both.k_origin = origin;
            a.source[a.n_sources++] = both;
        }
        if (last) a.source[a.n_sources++] = { early, early + pairs * p.early_stride, p.early_stride, p.early_stride, origin, origin, 0, 0, 0, all, SOURCE_EARLY };
        a.part0 = slab ? 1 : 0;
        if ((e = prefill_launch<D>(a, PREFILL_AUTO, stream)) != cudaSuccess) return e;
        if (last || slab || p.splits > 1) e = prefill_join<D>(a.sums, a.tops, a.part0 + p.splits, turn[1], c->n_seqs, n, c->n_heads, c->n_kv_heads, last ? out : nullptr, stream);
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

}  // namespace

bool prefill_turned(const kv_backend_plan *p, int layer)
{
    for (int i = 0; i < 2 * p->n_kv_heads; i++) {
        const kv_backend_slot &s = p->slot[(size_t)layer * p->n_kv_heads * 2 + i];
        if (strcmp(s.codec->family, "scalar") != 0 || s.page_rope) return false;
        const scalar_device *d = (const scalar_device *)s.codec->pod;
        if (!d->plain || d->at_scale || !plain_part(d)->at_sign || plain_part(d)->at_matrix) return false;
    }
    return true;
}

bool prefill_fits(const kv_backend_cache *c, int n) { return !few(n, c->group) && (c->head_dim == 64 || c->head_dim == 128 || c->head_dim == 256); }

size_t prefill_bytes(const kv_backend_cache *c, int n)
{
    const int n_sm = n_sm_of(c->device);
    size_t most = 0;
    for (int l = 0; l < c->n_layers; l++)
        most = std::max(most, (c->head_dim == 64 ? plan_chunk<64>(c, l, n, n_sm) : c->head_dim == 128 ? plan_chunk<128>(c, l, n, n_sm) : plan_chunk<256>(c, l, n, n_sm)).bytes);
    return most;
}

cudaError_t attend_prefill(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    return c->head_dim == 64 ? attend<64>(c, layer, n, q, k, v, scale, softcap, out, stream)
         : c->head_dim == 128 ? attend<128>(c, layer, n, q, k, v, scale, softcap, out, stream) : attend<256>(c, layer, n, q, k, v, scale, softcap, out, stream);
}

}  // namespace kelvin
