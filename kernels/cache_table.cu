// cache_table.cu -- the table's cache_* entries, from and to host memory: a layer's attention, truncation, rows and pages read back, the
// ledger, pairs, the mutation control.  Rules and messages are core/cache.c's; here a sequence is named where there are several.
#include <algorithm>
#include <cmath>
#include <cstring>
#include "cache_impl.cuh"
#include "kernels.cuh"
#include "rng.h"

#ifdef KV_EMULATE
#define DEVICE_NAME "emulated"
#else
#define DEVICE_NAME "cuda"
#endif

namespace kelvin {
namespace {

template <class... A> int refuse(int status, char *err, size_t cap, const char *text, A... a)
{
    snprintf(err, cap, text, a...);
    return status;
}

const cache_held &held(const kv_backend_cache *c, int seq, const dev_slot &s) { return c->held[(size_t)seq * c->n_kinds() + s.kind]; }

// The first position that a slot still counts as held.  Pages are never given back here, but what a window has passed is refused as core refuses it.
int first_held(const kv_backend_cache *c, int seq, int layer, const dev_slot &s)
{
    const cache_held &h = held(c, seq, s);
    const int sink = c->sink[layer], lost = s.never ? std::max(sink, c->length[seq] - s.tail_rows) : sink + std::min(h.first_page * c->page_tokens, h.encoded);
    return lost > sink || (sink > 0 && h.sink_gone) ? lost : 0;
}

int check_rows(const kv_backend_cache *c, int layer, int n, const float *k, const float *v, char *err, size_t cap)
{
    static const char *const name[] = { "f32", "f16", "bf16" };
    static const uint32_t limit[] = { 0x7f800000u, 0x477ff000u, 0x7f7f8000u };     // |x| from here on rounds to inf
    const int dtype = c->dtype[layer];
    for (int side = 0; side < 2; side++)
        for (size_t i = 0; i < (size_t)c->n_seqs * n * c->n_kv_heads * c->head_dim; i++) {
            uint32_t a;
            const float x = side ? v[i] : k[i];
            memcpy(&a, &x, sizeof a);
            a &= 0x7fffffffu;
            if (a < limit[dtype]) continue;
            const size_t row = i / c->head_dim;
            const int head = (int)(row % c->n_kv_heads), seq = (int)(row / c->n_kv_heads / n), pos = c->length[seq] + (int)(row / c->n_kv_heads % n), dim = (int)(i % c->head_dim);
            const char *what = side ? "value" : "key";
            if (a >= 0x7f800000u) return refuse(E_ARG, err, cap, "cache: layer %d head %d position %d: %s[%d] = %g is not finite", layer, head, pos, what, dim, (double)x);
            return refuse(E_ARG, err, cap, "cache: layer %d head %d position %d: %s[%d] = %g does not fit exact dtype %s", layer, head, pos, what, dim, (double)x, name[dtype]);
        }
    return 0;
}

int attend(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, char *err, size_t cap)
{
    if (layer < 0 || layer >= c->n_layers) return refuse(E_ARG, err, cap, "cache: layer %d is outside 0..%d", layer, c->n_layers - 1);
    int status = kv_dev_cache_reserve(c, n, err, cap);
    if (status == 0) status = check_rows(c, layer, n, k, v, err, cap);
    const size_t rows = (size_t)c->n_seqs * n * c->head_dim, queries = rows * c->n_heads, keys = rows * c->n_kv_heads;
    if (status < 0 || !cache_grow((void **)&c->io, &c->io_bytes, sizeof(float) * 2 * (queries + keys), "cache: rows of a step", err, cap, &status)) return status;
    float *dq = c->io, *dk = dq + queries, *dv = dk + keys, *dout = dv + keys;
    cudaError_t e = cudaMemcpy(dq, q, sizeof(float) * queries, cudaMemcpyHostToDevice);
    if (e == cudaSuccess) e = cudaMemcpy(dk, k, sizeof(float) * keys, cudaMemcpyHostToDevice);
    if (e == cudaSuccess) e = cudaMemcpy(dv, v, sizeof(float) * keys, cudaMemcpyHostToDevice);
    if (e == cudaSuccess) e = kv_dev_cache_attend(c, layer, n, dq, dk, dv, scale, softcap, dout, 0);
    if (e == cudaSuccess) e = cudaMemcpy(out, dout, sizeof(float) * queries, cudaMemcpyDeviceToHost);
    return say(e, "attention", err, cap);
}

// Tokens that no layer has attended to are zeros: benches fill caches so.
int commit(kv_backend_cache *c, int n, char *err, size_t cap)
{
    int status = kv_dev_cache_reserve(c, n, err, cap);
    const bool filled = std::all_of(c->pending.begin(), c->pending.end(), [](int p) { return p == 0; });
    for (int l = 0; status == 0 && !filled && l < c->n_layers; l++)
        if (c->pending[l] != n) status = refuse(E_ARG, err, cap, "cache: commit of %d tokens, but layer %d has attended to %d", n, l, c->pending[l]);
    if (status == 0) status = say(kv_dev_cache_commit(c, n, 0), "commit", err, cap);
    if (status == 0) status = say(cudaDeviceSynchronize(), "commit", err, cap);
    if (status == 0) kv_dev_cache_advance(c, n);
    return status;
}

int n_tokens(const kv_backend_cache *c, int seq) { return seq >= 0 && seq < c->n_seqs ? c->length[seq] : E_ARG; }

int truncate(kv_backend_cache *c, int seq, int n, char *err, size_t cap)
{
    if (seq < 0 || seq >= c->n_seqs) return refuse(E_ARG, err, cap, "cache: sequence %d is outside 0..%d", seq, c->n_seqs - 1);
    if (n < 0 || n > c->length[seq]) return refuse(E_ARG, err, cap, "cache: truncate to %d tokens is outside 0..%d", n, c->length[seq]);
    int status = say(cudaSetDevice(c->device), "select device", err, cap), granules = 1;
    if (status < 0) return status;
    kv_dev_cache_drop(c);
    if (n == c->length[seq]) return 0;
    for (int l = 0; n > 0 && l < c->n_layers; l++)
        for (int i = 0; i < c->n_kv_heads * 2; i++) {
            const int lost = first_held(c, seq, l, c->at(l, i / 2, i % 2)), seen = first_seen(c->window[l], n);
            if (lost > seen) return refuse(E_UNSUPPORTED, err, cap, "cache: truncate to %d tokens needs positions %d..%d of layer %d, which its sliding window of %d has dropped; feed the text again", n, seen, std::min(lost, n) - 1, l, c->window[l]);
        }
    for (const cache_kind &k : c->kind) granules = std::max(granules, k.granule);
    if (!cache_grow((void **)&c->io, &c->io_bytes, sizeof(float) * granules * c->head_dim, "cache: rows of a granule", err, cap, &status)) return status;
    auto kept = [&](int sink, int granule, const cache_held &h) { return std::min(h.encoded, std::max(0, n - sink) / granule * granule); };
    std::vector<std::pair<uint8_t *, size_t>> zeroed;
    // Rows of cut granules go back to the ring: they do not count before the books say so.
    cudaError_t e = cudaSuccess;
    for (int l = 0; l < c->n_layers; l++)
        for (int i = 0; i < c->n_kv_heads * 2; i++) {
            const dev_slot &s = c->at(l, i / 2, i % 2);
            const cache_held &h = held(c, seq, s);
            const int keep = kept(c->sink[l], s.codec.granule, h), cut = std::min(h.encoded, std::max(0, n - c->sink[l]));
            const size_t kept_bytes = (size_t)((keep + c->page_tokens - 1) / c->page_tokens) * s.codec.page_bytes;
            // What a page had before it is filled again would show in its bytes: zeros, as in core's new pages.
            if (e == cudaSuccess && kept_bytes < s.page_stride) zeroed.push_back({ s.page + seq * s.page_stride + kept_bytes, s.page_stride - kept_bytes });
            if (cut <= keep) continue;
            if (e == cudaSuccess) e = c->form[l]->read(c, seq, l, i / 2, i % 2, keep, cut, c->io, 0);
            if (e == cudaSuccess) e = cache_put_tail(c, seq, l, i / 2, i % 2, c->sink[l] + keep, cut - keep, c->io, 0);
        }
    for (size_t i = 0; e == cudaSuccess && i < zeroed.size(); i++) e = cudaMemsetAsync(zeroed[i].first, 0, zeroed[i].second, 0);
    status = say(e, "truncate", err, cap);
    if (status < 0) return status;
    for (int i = 0; i < c->n_kinds(); i++) {
        cache_held &h = c->held[(size_t)seq * c->n_kinds() + i];
        const int sink = c->sink[c->kind[i].layer];
        h.encoded = kept(sink, c->kind[i].granule, h);
        h.first_page = std::min(h.first_page, (h.encoded + c->page_tokens - 1) / c->page_tokens);
        if (n < std::min(sink, c->max_tokens)) h.sink_gone = 0;
    }
    c->length[seq] = n;
    return cache_put_books(c, err, cap);
}

int check_slot(const kv_backend_cache *c, int seq, int layer, int head, int side, char *err, size_t cap)
{
    if (seq < 0 || seq >= c->n_seqs) return refuse(E_ARG, err, cap, "cache: sequence %d is outside 0..%d", seq, c->n_seqs - 1);
    if (layer < 0 || layer >= c->n_layers) return refuse(E_ARG, err, cap, "cache: layer %d is outside 0..%d", layer, c->n_layers - 1);
    if (head < 0 || head >= c->n_kv_heads) return refuse(E_ARG, err, cap, "cache: head %d is outside 0..%d", head, c->n_kv_heads - 1);
    if (side != 0 && side != 1) return refuse(E_ARG, err, cap, "cache: side=%d is neither K (0) nor V (1)", side);
    if (c->pending[layer]) return refuse(E_ARG, err, cap, "cache: read in the middle of a step (layer %d has %d tokens not committed)", layer, c->pending[layer]);
    return say(cudaSetDevice(c->device), "select device", err, cap);
}

// Exact rows of positions [p0, p1), one after the other.
cudaError_t read_exact(const kv_backend_cache *c, int seq, int layer, const dev_slot &s, int p0, int p1, float *rows)
{
    const size_t bytes = c->row_bytes(layer);
    const int sink = c->sink[layer], dtype = c->dtype[layer];
    std::vector<uint8_t> held(bytes);
    for (int p = p0; p < p1; p++, rows += c->head_dim) {
        const uint8_t *src = p < sink ? s.sink + seq * s.sink_stride + p * bytes : s.tail + seq * s.tail_stride + (size_t)((p - sink) % s.tail_rows) * bytes;
        const cudaError_t e = cudaMemcpy(held.data(), src, bytes, cudaMemcpyDeviceToHost);
        if (e != cudaSuccess) return e;
        for (int i = 0; i < c->head_dim; i++) {
            if (dtype == 0) rows[i] = ((const float *)held.data())[i];
            else if (dtype == 1) rows[i] = __half2float(((const __half *)held.data())[i]);
            else rows[i] = __bfloat162float(((const __nv_bfloat16 *)held.data())[i]);
        }
    }
    return cudaSuccess;
}

int read(const kv_backend_cache *c, int seq, int layer, int head, int side, int tok0, int tok1, float *rows, char *err, size_t cap)
{
    int status = check_slot(c, seq, layer, head, side, err, cap);
    if (status < 0) return status;
    if (tok0 < 0 || tok1 < tok0 || tok1 > c->length[seq]) return refuse(E_ARG, err, cap, "cache: positions %d..%d are outside 0..%d", tok0, tok1 - 1, c->length[seq] - 1);
    const dev_slot &s = c->at(layer, head, side);
    const int sink = c->sink[layer], end = sink + held(c, seq, s).encoded, lost = first_held(c, seq, layer, s);
    if (tok0 < tok1 && tok0 < lost) return refuse(E_ARG, err, cap, "cache: layer %d no longer holds position %d, only %d..%d: its window has passed", layer, tok0, lost, c->length[seq] - 1);
    const size_t d = c->head_dim;
    const int s1 = std::min(tok1, sink), e0 = std::max(tok0, sink), e1 = std::min(tok1, end), t0 = std::max(tok0, end);
    cudaError_t e = tok0 < s1 ? read_exact(c, seq, layer, s, tok0, s1, rows) : cudaSuccess;
    if (e == cudaSuccess && e0 < e1) {
        float *dev = nullptr;
        e = cudaMalloc((void **)&dev, sizeof(float) * d * (e1 - e0));
        if (e == cudaSuccess) e = c->form[layer]->read(c, seq, layer, head, side, e0 - sink, e1 - sink, dev, 0);
        if (e == cudaSuccess) e = cudaMemcpy(rows + (e0 - tok0) * d, dev, sizeof(float) * d * (e1 - e0), cudaMemcpyDeviceToHost);
        cudaFree(dev);
    }
    if (e == cudaSuccess && t0 < tok1) e = read_exact(c, seq, layer, s, t0, tok1, rows + (t0 - tok0) * d);
    return say(e, "cache rows", err, cap);
}

int page(const kv_backend_cache *c, int seq, int layer, int head, int side, int number, uint8_t *host, char *err, size_t cap)
{
    const int status = check_slot(c, seq, layer, head, side, err, cap);
    if (status < 0) return status;
    const int n = (held(c, seq, c->at(layer, head, side)).encoded + c->page_tokens - 1) / c->page_tokens;
    if (number < 0 || number >= n) return refuse(E_ARG, err, cap, "cache: page %d is outside 0..%d", number, n - 1);
    return say(c->form[layer]->get_page(c, seq, layer, head, side, number, host), "cache page", err, cap);
}

int bytes(const kv_backend_cache *c, int layer, int side, double *codes, double *exact, double *slack, double *state)
{
    *codes = *exact = *slack = *state = 0;
    if (layer < -1 || layer >= c->n_layers || side < -1 || side > 1) return E_ARG;
    for (int l = layer < 0 ? 0 : layer; l <= (layer < 0 ? c->n_layers - 1 : layer); l++)
        for (int i = 0; i < c->n_kv_heads * 2; i++) {
            if (side >= 0 && i % 2 != side) continue;
            const dev_slot &s = c->at(l, i / 2, i % 2);
            double used = 0, kept = 0;
            for (int seq = 0; seq < c->n_seqs; seq++) {
                const int encoded = held(c, seq, s).encoded;
                used += (double)s.codec.page_bytes * encoded / c->page_tokens;
                kept += (double)c->row_bytes(l) * (std::min(c->length[seq], s.sink_rows) + std::min(s.tail_rows, std::max(0, c->length[seq] - c->sink[l] - encoded)));
            }
            *codes += used;
            *exact += kept;
            *slack += (double)c->n_seqs * (double)(s.page_stride + s.sink_stride + s.tail_stride) - used - kept;
            *state += (double)sizeof(dev_slot);
        }
    if (layer < 0 && side < 0) *state = (double)c->books_bytes + (double)c->store_bytes - *codes - *exact - *slack;
    return 0;
}

void pairs(const kv_backend_cache *c, double *compressed, double *total)
{
    *compressed = c->pairs_compressed;
    *total = c->pairs_total;
}
void count_from(kv_backend_cache *c, int first_query) { c->count_from = first_query; }

// Flips all bits of each byte of every page with probability share, a page's padding left alone; the first sequence's bytes are those that core's would be.
int mutate(kv_backend_cache *c, double seed, double share, double *n, char *err, size_t cap)
{
    const uint64_t s = (uint64_t)(int64_t)seed;
    const uint32_t key[2] = { (uint32_t)s, (uint32_t)(s >> 32) };
    const double below = (share < 0 ? 0 : share > 1 ? 1 : share) * 4294967296.0;
    std::vector<uint8_t> bytes;
    *n = 0;
    cudaError_t e = cudaSetDevice(c->device);
    for (int seq = 0; seq < c->n_seqs; seq++)
        for (size_t i = 0; i < c->slot.size(); i++) {
            const dev_slot &slot = c->slot[i];
            const int l = (int)(i / (c->n_kv_heads * 2)), head = (int)(i / 2 % c->n_kv_heads), side = (int)(i % 2);
            const cache_held &h = held(c, seq, slot);
            uint32_t counter[4] = { 0, 0, (uint32_t)(i + (size_t)seq * c->slot.size()), 0 }, r[4];
            bytes.resize(slot.codec.page_bytes);
            for (int g = h.first_page; e == cudaSuccess && g < (h.encoded + c->page_tokens - 1) / c->page_tokens; g++) {
                e = c->form[l]->get_page(c, seq, l, head, side, g, bytes.data());
                for (size_t k = 0; k < c->used_bytes[i]; k++) {
                    if (k % 4 == 0) {
                        kv_philox(counter, key, r);
                        counter[0]++;
                    }
                    if ((double)r[k % 4] >= below) continue;
                    bytes[k] ^= 0xff;
                    ++*n;
                }
                if (e == cudaSuccess) e = c->form[l]->put_page(c, seq, l, head, side, g, bytes.data());
            }
        }
    return say(e, "mutate", err, cap);
}

// As core's: what tokens' steps did to each side, then chunks.
const char *paths(const kv_backend_cache *cc)
{
    static const char *const name[] = { "tile", "rows", "fused" };
    kv_backend_cache *c = const_cast<kv_backend_cache *>(cc);
    char form[32] = "";
    size_t at = 0;
    for (int i = 0; i < 3; i++)
        if (c->did >> i & 1) at += (size_t)snprintf(form + at, sizeof form - at, "%s%s", at ? " + " : "", name[i]);
    int n = 0;
    c->paths[0] = 0;
    if (at) n = snprintf(c->paths, sizeof c->paths, "k: %s %s, v: %s %s", form, DEVICE_NAME, form, DEVICE_NAME);
    const bool f32 = c->did & DID_F32, bf16 = c->did & DID_BF16;
    if (f32 || bf16) snprintf(c->paths + n, sizeof c->paths - n, "%schunks: decoded, %s %s", n ? "; " : "", f32 ? bf16 ? "f32 + bf16" : "f32" : "bf16", DEVICE_NAME);
    return c->paths;
}

}  // namespace
}  // namespace kelvin

void kv_cache_entries(kv_backend *t)
{
    using namespace kelvin;
    t->cache_new = cache_new;
    t->cache_free = cache_free;
    t->cache_fork = cache_fork;
    t->cache_truncate = truncate;
    t->cache_n_tokens = n_tokens;
    t->cache_attend = attend;
    t->cache_commit = commit;
    t->cache_path = cache_path;
    t->cache_read = read;
    t->cache_page = page;
    t->cache_bytes = bytes;
    t->cache_pairs = pairs;
    t->cache_count_from = count_from;
    t->cache_mutate = mutate;
    t->cache_paths = paths;
}
