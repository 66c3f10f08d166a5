// cache_rows.cu -- rows into a cache and out of it: what ripens is encoded, rings and sinks are saved, a commit counts, pages are decoded.
//
// A warp takes a granule.  Its rows, rounded, turned and without their mean, lie in the warp's shared memory when the granule is one row, else
// in `staging`, which has room for a fixed number of rows of each slot and sequence: warps walk over the granules that ripen.
// Compiled with --fmad=false: the arithmetic is core/cache.c's, so pages are the same bytes.
#include <algorithm>
#include "cache_impl.cuh"
#include "codecs.cuh"

namespace kelvin {
namespace {

enum { WARPS = 4 };

__device__ bool fits(int dtype, float x)
{
    const unsigned a = __float_as_uint(x) & 0x7fffffffu;
    return a < (dtype == 1 ? 0x477ff000u : dtype == 2 ? 0x7f7f8000u : 0x7f800000u);
}

// A new row of position p to where sinks and ring keep it, if they do once the step's rows are counted.
__device__ void save_row(const dev_layer &a, const dev_slot &s, int seq, int head, int p, int n, int length, int encoded, const float *x, int lane)
{
    const int end = length + n, tail0 = max(max(length, a.sink + encoded), end - s.tail_rows);
    const bool to_sink = p < a.sink;
    if (!to_sink && (p < tail0 || !s.tail_rows)) return;
    const size_t bytes = (size_t)a.head_dim * (a.dtype ? 2 : 4);
    uint8_t *row = to_sink ? s.sink + seq * s.sink_stride + p * bytes : s.tail + seq * s.tail_stride + (size_t)((p - a.sink) % s.tail_rows) * bytes;
    const float *src = x + (((size_t)seq * n + (p - length)) * a.n_kv_heads + head) * a.head_dim;
    for (int i = lane; i < a.head_dim; i += 32) store_as(a.dtype, row, i, src[i]);
}

// grid (warps of a slot / warps of a block, slots, sequences): slots whose granule is one row, or those whose is not.  save: n is 1, the launch has
// one warp a slot, which also checks and keeps the row.
__global__ void encode_rows(dev_layer a, int n, const float *k, const float *v, float *staging, int staging_rows, int single, int save)
{
    __shared__ float4 lent[WARPS][CODEC_SCRATCH / 4], mine[WARPS][512 / 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, head = blockIdx.y / 2, seq = blockIdx.z, d = a.head_dim;
    const dev_slot &s = a.slot[blockIdx.y];
    if ((s.codec.granule == 1) != (single != 0)) return;
    const float *x = blockIdx.y % 2 ? v : k;
    const int length = a.length[seq], from = encoded_at(a, s, seq, length), to = encoded_at(a, s, seq, length + n), g = s.codec.granule;
    float *row = single ? (float *)mine[warp] : staging + (((size_t)seq * gridDim.y + blockIdx.y) * staging_rows + (size_t)(blockIdx.x * warps + warp) * g) * d;
    for (int u = from + (blockIdx.x * warps + warp) * g; u < to; u += gridDim.x * warps * g) {
        const int page = u / a.page_tokens;
        for (int t = 0; t < g; t++) {
            const exact_row r = find_exact(a, s, seq, head, a.sink + u + t, length, n, x);
            for (int i = lane; i < d; i += 32) row[(size_t)t * d + i] = exact_value(r, a.dtype, i);
            __syncwarp();
            if (s.turn) {
                turn_row(s, page, false, row + (size_t)t * d, lane);
                __syncwarp();
            }
            if (s.mean)
                for (int i = lane; i < d; i += 32) row[(size_t)t * d + i] -= s.mean[i];
        }
        __syncwarp();
        codec_encode(s.codec, s.page + seq * s.page_stride + (size_t)page * s.codec.page_bytes, u % a.page_tokens, row, d, (float *)lent[warp], lane);
        __syncwarp();
    }
    if (!save) return;
    const float *fresh = x + ((size_t)seq * a.n_kv_heads + head) * d;
    bool good = true;
    for (int i = lane; i < d; i += 32) good = good && fits(a.dtype, fresh[i]);
    if (!good) atomicMax(a.bad, 1 + a.layer);
    save_row(a, s, seq, head, length, 1, length, to, x, lane);
}

// grid (new rows / WARPS, slots, sequences)
__global__ void save_rows(dev_layer a, int n, const float *k, const float *v)
{
    const int lane = threadIdx.x % 32, seq = blockIdx.z, j = blockIdx.x * WARPS + threadIdx.x / 32;
    if (j >= n) return;
    const dev_slot &s = a.slot[blockIdx.y];
    const int length = a.length[seq];
    save_row(a, s, seq, blockIdx.y / 2, length + j, n, length, encoded_at(a, s, seq, length + n), blockIdx.y % 2 ? v : k, lane);
}

__global__ void check_rows(dev_layer a, const float *k, const float *v, long long total)
{
    bool good = true;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (long long)gridDim.x * blockDim.x) good = good && fits(a.dtype, k[i]) && fits(a.dtype, v[i]);
    if (!good) atomicMax(a.bad, 1 + a.layer);
}

// Every kind's books, then the length.  A block a sequence.
__global__ void commit_books(int *length, int *encoded, const kind_books *kinds, int n_kinds, int n)
{
    int *e = encoded + (size_t)blockIdx.x * n_kinds;
    const int total = length[blockIdx.x] + n;
    for (int i = threadIdx.x; i < n_kinds; i += blockDim.x) {
        const kind_books k = kinds[i];
        e[i] = max(e[i], ripe(total, k.sink, k.recent, k.granule, k.never));
    }
    __syncthreads();
    if (threadIdx.x == 0) length[blockIdx.x] = total;
}

// grid (positions / WARPS, slots, sequences)
__global__ void decode_rows(dev_layer a, int n, int p0, int p1, float *rows, int slab, int ld)
{
    __shared__ float4 lent[WARPS][CODEC_SCRATCH / 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, seq = blockIdx.z, p = p0 + blockIdx.x * WARPS + warp;
    const dev_slot &s = a.slot[blockIdx.y];
    if (p >= p1 || p < a.sink || p >= a.sink + encoded_at(a, s, seq, a.length[seq] + n) || p < first_seen(a.window, a.length[seq])) return;
    decode_slot_row(a, s, pages_of(s, seq), p - a.sink, rows + (((size_t)seq * gridDim.y + blockIdx.y) * slab + (p - p0)) * ld, (float *)lent[warp], lane, codec_decode);
}

cudaError_t append(kv_backend_cache *c, int layer, int n, const float *k, const float *v, cudaStream_t stream)
{
    const dev_layer a = c->layer_args(layer);
    bool single = false, many = false;
    int granule = 1;
    for (int i = 0; i < c->n_kv_heads * 2; i++) {
        const int g = c->at(layer, i / 2, i % 2).codec.granule;
        single |= g == 1;
        many |= g > 1;
        granule = std::max(granule, g);
    }
    const int slots = c->n_kv_heads * 2, save = n == 1;
    if (single) {
        const int warps = std::min((n + WARPS - 1) / WARPS, 1024);
        KV_LAUNCH(encode_rows, dim3(warps, slots, c->n_seqs), n == 1 ? 32 : WARPS * 32, 0, stream, a, n, k, v, c->staging, c->staging_rows, 1, save);
    }
    if (many) KV_LAUNCH(encode_rows, dim3(n == 1 ? 1 : std::max(1, c->staging_rows / granule), slots, c->n_seqs), 32, 0, stream, a, n, k, v, c->staging, c->staging_rows, 0, save);
    return cudaGetLastError();
}

cudaError_t decode(const kv_backend_cache *c, int layer, int n, int p0, int p1, float *rows, int slab, int ld, cudaStream_t stream)
{
    KV_LAUNCH(decode_rows, dim3((p1 - p0 + WARPS - 1) / WARPS, c->n_kv_heads * 2, c->n_seqs), WARPS * 32, 0, stream, c->layer_args(layer), n, p0, p1, rows, slab, ld);
    return cudaGetLastError();
}

// A warp a row.
__global__ void read_rows(dev_layer a, int slot, int seq, int u0, int u1, float *rows)
{
    __shared__ float4 lent[WARPS][CODEC_SCRATCH / 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, u = u0 + blockIdx.x * WARPS + warp;
    if (u < u1) decode_slot_row(a, a.slot[slot], pages_of(a.slot[slot], seq), u, rows + (size_t)(u - u0) * a.head_dim, (float *)lent[warp], lane, codec_decode);
}
cudaError_t read(const kv_backend_cache *c, int seq, int layer, int head, int side, int u0, int u1, float *rows, cudaStream_t stream)
{
    KV_LAUNCH(read_rows, (u1 - u0 + WARPS - 1) / WARPS, WARPS * 32, 0, stream, c->layer_args(layer), head * 2 + side, seq, u0, u1, rows);
    return cudaGetLastError();
}

__global__ void put_tail(dev_layer a, int slot, int seq, int p0, int n, const float *rows)
{
    const dev_slot &s = a.slot[slot];
    const size_t bytes = (size_t)a.head_dim * (a.dtype ? 2 : 4);
    for (int j = blockIdx.x; j < n; j += gridDim.x) {
        uint8_t *row = s.tail + seq * s.tail_stride + (size_t)((p0 + j - a.sink) % s.tail_rows) * bytes;
        for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) store_as(a.dtype, row, i, rows[(size_t)j * a.head_dim + i]);
    }
}

uint8_t *page_at(const kv_backend_cache *c, int seq, int layer, int head, int side, int page)
{
    const dev_slot &s = c->at(layer, head, side);
    return s.page + seq * s.page_stride + (size_t)page * s.codec.page_bytes;
}
cudaError_t get_page(const kv_backend_cache *c, int seq, int layer, int head, int side, int page, uint8_t *host)
{
    return cudaMemcpy(host, page_at(c, seq, layer, head, side, page), c->at(layer, head, side).codec.page_bytes, cudaMemcpyDeviceToHost);
}
cudaError_t put_page(kv_backend_cache *c, int seq, int layer, int head, int side, int page, const uint8_t *host)
{
    return cudaMemcpy(page_at(c, seq, layer, head, side, page), host, c->at(layer, head, side).codec.page_bytes, cudaMemcpyHostToDevice);
}

}  // namespace

int family_of(const char *name) { return codec_family(name); }

const cache_form tile_form = { "tile", append, decode, attend_few_tile, read, get_page, put_page };

cudaError_t cache_put_tail(kv_backend_cache *c, int seq, int layer, int head, int side, int p0, int n, const float *rows, cudaStream_t stream)
{
    KV_LAUNCH(put_tail, n, 128, 0, stream, c->layer_args(layer), head * 2 + side, seq, p0, n, rows);
    return cudaGetLastError();
}
cudaError_t cache_check(kv_backend_cache *c, int layer, int n, const float *k, const float *v, cudaStream_t stream)
{
    const long long total = (long long)c->n_seqs * n * c->n_kv_heads * c->head_dim;
    KV_LAUNCH(check_rows, (int)std::min((total + 1023) / 1024, 512ll), 256, 0, stream, c->layer_args(layer), k, v, total);
    return cudaGetLastError();
}
cudaError_t cache_save(kv_backend_cache *c, int layer, int n, const float *k, const float *v, cudaStream_t stream)
{
    KV_LAUNCH(save_rows, dim3((n + WARPS - 1) / WARPS, c->n_kv_heads * 2, c->n_seqs), WARPS * 32, 0, stream, c->layer_args(layer), n, k, v);
    return cudaGetLastError();
}
cudaError_t cache_count(kv_backend_cache *c, int n, cudaStream_t stream)
{
    KV_LAUNCH(commit_books, c->n_seqs, 128, 0, stream, c->dev_length, c->dev_encoded, c->dev_kinds, c->n_kinds(), n);
    return cudaGetLastError();
}

}  // namespace kelvin
