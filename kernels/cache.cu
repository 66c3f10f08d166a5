// cache.cu -- a device cache's life: what it allocates, steps as the runner takes them, forks.  Rows in and out of it for a host: cache_table.cu.
//
// Two allocations, both whole from the start, so that a step never allocates and a captured one stays valid:
//   books   slots, codecs' descriptions, means, page angles, lengths, partial sums
//   store   rings (a layer's together), sinks, pages; zeros at first
// The host keeps the same counts (`length`, `held`) and moves them when the runner says that a step is over.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include "cache_impl.cuh"
#include "codecs/raw_device.h"
#include "prefill_cache.cuh"

using namespace kelvin;

namespace kelvin {
namespace {

#ifdef KV_EMULATE
enum { SLAB = 128 };                            // small, so that short tests cross slabs
#else
enum { SLAB = 8192 };
#endif
enum { MAX_SPLITS = 64, BLOCKS_A_SM = 8, STAGED_ROWS = 128 };
constexpr size_t SLAB_BYTES = (size_t)256 << 20;

// Offsets of parts of an allocation, each aligned for anything.
struct plan_of_bytes {
    size_t total = 0;
    bool   fits = true;
    size_t take(size_t n, size_t each)
    {
        size_t bytes = 0, end = 0;
        fits = fits && !__builtin_mul_overflow(n, each, &bytes) && !__builtin_add_overflow(total, bytes, &end) && end < (size_t)1 << 46;
        const size_t at = total;
        if (fits) total = (end + 255) / 256 * 256;
        return at;
    }
};

unsigned long long next_epoch()
{
    static std::atomic<unsigned long long> last;
    return ++last;
}

int refuse(int status, char *err, size_t cap, const char *text, long long value, long long allowed)
{
    snprintf(err, cap, text, value, allowed);
    return status;
}

int find_kind(kv_backend_cache *c, cache_kind k)
{
    for (size_t i = 0; i < c->kind.size(); i++) {
        cache_kind &have = c->kind[i];
        if (have.layer == k.layer && have.granule == k.granule) {
            have.count++;
            return (int)i;
        }
    }
    c->kind.push_back(k);
    return (int)c->kind.size() - 1;
}

// A description that appears in several places is stored once.
struct shared_bytes { const void *host; size_t bytes, at; bool fragments; };
size_t share(std::vector<shared_bytes> &all, plan_of_bytes &room, const void *host, size_t bytes, bool fragments = false)
{
    for (const shared_bytes &s : all)
        if (s.host == host && s.bytes == bytes && s.fragments == fragments) return s.at;
    all.push_back({ host, bytes, room.take(1, bytes ? bytes : 1), fragments });
    return all.back().at;
}

struct angles { const double *freq; int sink, n_pages; size_t at; };

// cos and sin of pages' first positions, as core/rope.c makes them.
void fill_angles(const angles &t, int n_rot, int page_tokens, float *cs)
{
    for (int g = 0; g < t.n_pages; g++, cs += n_rot)
        for (int i = 0; i < n_rot / 2; i++) {
            const double x = (double)(t.sink + (long long)g * page_tokens) * t.freq[i];
            cs[i] = (float)cos(x);
            cs[n_rot / 2 + i] = (float)sin(x);
        }
}

int attribute(cudaDeviceAttr what, int device, int least)
{
    int n = 0;
    if (cudaDeviceGetAttribute(&n, what, device) != cudaSuccess) cudaGetLastError();
    return std::max(n, least);
}

int allocate(kv_backend_cache *c, char *err, size_t cap)
{
    cudaError_t e = cudaMalloc((void **)&c->books, c->books_bytes);
    if (e == cudaSuccess) e = cudaMalloc((void **)&c->store, c->store_bytes);
    if (e == cudaSuccess) return 0;
    const int status = say(e, "cache", err, cap);
    if (status == E_NOMEM) snprintf(err, cap, "cache: %.1f MB for %d sequences of %d tokens do not fit the device", (double)(c->books_bytes + c->store_bytes) / 1e6, c->n_seqs, c->max_tokens);
    return status;
}

int check_plan(const kv_backend_plan *p, int n_seqs, int max_tokens, char *err, size_t cap)
{
    if (n_seqs < 1 || n_seqs > 65535) return refuse(E_ARG, err, cap, "cache: %lld sequences are outside 1..%lld", n_seqs, 65535);
    if (max_tokens < 1 || max_tokens > 1 << 24) return refuse(E_ARG, err, cap, "cache: max_tokens=%lld is outside 1..%lld", max_tokens, 1 << 24);
    if (p->n_kv_heads < 1 || p->n_kv_heads > 4096 || p->n_heads % p->n_kv_heads || p->n_heads / p->n_kv_heads > 64) return refuse(E_ARG, err, cap, "cache: n_heads=%lld is not 1..64 times n_kv_heads=%lld", p->n_heads, p->n_kv_heads);
    if (p->head_dim < 1 || p->head_dim > 512) return refuse(E_ARG, err, cap, "cache: head_dim=%lld is outside 1..%lld", p->head_dim, 512);
    for (int i = 0; i < p->n_layers * p->n_kv_heads * 2; i++)
        if (family_of(p->slot[i].codec->family) < 0) {
            snprintf(err, cap, "cache: layer %d head %d %s: codec '%s' has no form for this device", i / 2 / p->n_kv_heads, i / 2 % p->n_kv_heads, i % 2 ? "values" : "keys", p->slot[i].codec->family);
            return E_UNSUPPORTED;
        }
    return 0;
}

// The books as bytes, the slots' pointers against the two allocations.
void move_slots(kv_backend_cache *c, const uint8_t *books, const uint8_t *store)
{
    auto in_books = [&](auto *&p) { if (p) p = (std::remove_reference_t<decltype(p)>)(c->books + ((const uint8_t *)p - books)); };
    auto in_store = [&](uint8_t *&p) { p = c->store + (p - store); };
    for (dev_slot &s : c->slot) {
        in_books(s.codec.pod);
        in_books(s.mean);
        in_books(s.turn);
        in_store(s.sink);
        in_store(s.tail);
        in_store(s.page);
    }
}

}  // namespace

int cache_put_books(kv_backend_cache *c, char *err, size_t cap)
{
    std::vector<int> encoded(c->held.size());
    for (size_t i = 0; i < encoded.size(); i++) encoded[i] = c->held[i].encoded;
    int status = say(cudaMemcpy(c->dev_length, c->length.data(), sizeof(int) * c->length.size(), cudaMemcpyHostToDevice), "cache lengths", err, cap);
    if (status == 0) status = say(cudaMemcpy(c->dev_encoded, encoded.data(), sizeof(int) * encoded.size(), cudaMemcpyHostToDevice), "cache books", err, cap);
    return status == 0 ? say(cudaMemset(c->dev_bad, 0, sizeof(int)), "cache books", err, cap) : status;
}

int cache_restore(kv_backend_cache *c, int layer, cudaStream_t stream)
{
    const bool chunk = c->pending[layer] > 1;
    c->pending[layer] = 0;
    return chunk && c->tail_bytes[layer] ? (int)cudaMemcpyAsync(c->store + c->tail_at[layer], c->saved + c->tail_at[layer], c->tail_bytes[layer], cudaMemcpyDeviceToDevice, stream) : (int)cudaSuccess;
}

bool cache_grow(void **p, size_t *have, size_t need, const char *what, char *err, size_t cap, int *status)
{
    if (*have >= need) return true;
    cudaFree(*p);                                                       // waits for who uses it
    *p = nullptr;
    *have = 0;
    *status = say(cudaMalloc(p, need), what, err, cap);
    if (*status < 0) return false;
    *have = need;
    return true;
}

int cache_new(int device, const kv_backend_plan *p, int n_seqs, int max_tokens, kv_backend_cache **out, char *err, size_t cap)
{
    *out = nullptr;
    int status = check_plan(p, n_seqs, max_tokens, err, cap);
    if (status == 0) status = say(cudaSetDevice(device), "select device", err, cap);
    if (status < 0) return status;
    kv_backend_cache *c = new (std::nothrow) kv_backend_cache;
    if (!c) return refuse(E_NOMEM, err, cap, "cache: no memory for the books of %lld layers and %lld sequences", p->n_layers, n_seqs);
    const int n_layers = p->n_layers, n_kv = p->n_kv_heads, d = p->head_dim, pt = p->page_tokens;
    c->device = device;
    c->n_layers = n_layers;
    c->n_heads = p->n_heads;
    c->n_kv_heads = n_kv;
    c->head_dim = d;
    c->page_tokens = pt;
    c->n_rot = p->n_rot;
    c->n_seqs = n_seqs;
    c->max_tokens = max_tokens;
    c->group = p->n_heads / n_kv;
    c->ld = (d + 3) / 4 * 4;
    c->sink.assign(p->sink, p->sink + n_layers);
    c->recent.assign(p->recent, p->recent + n_layers);
    c->dtype.assign(p->exact_dtype, p->exact_dtype + n_layers);
    c->window.assign(n_layers, 0);
    if (p->sliding) c->window.assign(p->sliding, p->sliding + n_layers);
    for (int l = 0; l < n_layers; l++) c->turned.push_back(prefill_turned(p, l));
    c->length.assign(n_seqs, 0);
    c->pending.assign(n_layers, 0);
    c->form.assign(n_layers, &tile_form);
    c->fragments.assign(n_layers, fragment_layer{});
    for (int l = 0; l < n_layers; l++)
        if (fragments_fit(p, l, &c->fragments[l])) c->form[l] = &fragments_form;
        else c->fragments[l] = fragment_layer{};
    c->slot.resize((size_t)n_layers * n_kv * 2);
    c->part_at.assign(c->slot.size(), 0);
    c->sign_at.assign(c->slot.size(), 0);

    // Where everything lies.  Pointers are offsets, one more than they are, until the allocations are there.
    plan_of_bytes books, store;
    std::vector<shared_bytes> shared;
    std::vector<angles> turns;
    auto offset = [](size_t at) { return (uint8_t *)nullptr + at + 1; };
    int granules = 1;
    for (int l = 0; l < n_layers; l++) {
        c->tail_at.push_back(store.total);
        for (int i = 0; i < n_kv * 2; i++) {
            const kv_backend_slot &from = p->slot[(size_t)l * n_kv * 2 + i];
            const kv_backend_codec &codec = *from.codec;
            dev_slot &s = c->slot[(size_t)l * n_kv * 2 + i];
            s = {};
            const int window = c->window[l], g = codec.granule;
            s.never = window > 0 && c->recent[l] >= window;
            s.sink_rows = std::min(c->sink[l], max_tokens);
            const long long rows = s.never ? window : c->recent[l] == 0 ? g - 1 : (long long)c->recent[l] + g;
            s.tail_rows = (int)std::min(rows, (long long)max_tokens - s.sink_rows);
            s.n_pages = (ripe(max_tokens, c->sink[l], c->recent[l], g, s.never) + pt - 1) / pt;
            s.codec = { family_of(codec.family), d, pt, g, codec.side, codec.page_bytes, offset(share(shared, books, codec.pod, codec.pod_bytes, c->fragments[l].form)) };
            if (c->fragments[l].form) {
                c->part_at[&s - c->slot.data()] = fragments_part(codec.pod);
                c->sign_at[&s - c->slot.data()] = fragments_sign(codec.pod);
            }
            s.raw = strcmp(codec.family, "raw") ? -1 : ((const raw_device *)codec.pod)->dtype;
            if (from.mean) s.mean = (const float *)offset(share(shared, books, from.mean, sizeof(float) * d));
            s.kind = find_kind(c, { l, g, s.never, s.tail_rows, 1 });
            s.tail_stride = c->row_bytes(l) * s.tail_rows;
            s.tail = offset(store.take(n_seqs, s.tail_stride));
            c->used_bytes.push_back(codec.used_bytes ? codec.used_bytes : codec.page_bytes);
            granules = std::max(granules, g);
            if (i % 2 == 0 && from.page_rope && p->n_rot > 0 && s.n_pages > 0) {
                size_t t = 0;
                while (t < turns.size() && !(turns[t].freq == p->freq[l] && turns[t].sink == c->sink[l] && turns[t].n_pages >= s.n_pages)) t++;
                if (t == turns.size()) turns.push_back({ p->freq[l], c->sink[l], s.n_pages, books.take((size_t)s.n_pages * p->n_rot, sizeof(float)) });
                s.turn = (const float *)offset(turns[t].at);
                s.n_rot = p->n_rot;
            }
        }
        c->tail_bytes.push_back(store.total - c->tail_at[l]);
    }
    c->tails_bytes = store.total;
    for (int l = 0; l < n_layers; l++)
        for (int i = 0; i < n_kv * 2; i++) {
            dev_slot &s = c->at(l, i / 2, i % 2);
            s.sink_stride = c->row_bytes(l) * s.sink_rows;
            s.sink = offset(store.take(n_seqs, s.sink_stride));
            s.page_stride = s.codec.page_bytes * s.n_pages;
            s.page = offset(store.take(n_seqs, s.page_stride));
        }
    c->held.assign((size_t)n_seqs * c->kind.size(), cache_held{});
    const int row_tiles = std::max(FEW_ROWS / ROWS_OF_FEW, (c->group + ROWS_OF_FEW - 1) / ROWS_OF_FEW);
    c->n_splits = std::max(1, std::min((int)MAX_SPLITS, BLOCKS_A_SM * attribute(cudaDevAttrMultiProcessorCount, device, 1) / (n_seqs * n_kv)));
    c->shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, c->shared_bytes) - 1024;
    c->staging_rows = granules > 1 ? std::max((int)STAGED_ROWS, granules) : 0;
    const size_t rows_at_once = (size_t)n_seqs * n_kv * row_tiles;
    const size_t at_slots = books.take(c->slot.size(), sizeof(dev_slot)), at_length = books.take(n_seqs, sizeof(int)), at_encoded = books.take(c->held.size(), sizeof(int));
    const size_t at_kinds = books.take(c->kind.size(), sizeof(kind_books)), at_bad = books.take(1, sizeof(int)), at_arrivals = books.take(rows_at_once * 4, sizeof(int));
    size_t attend_parts = 0, attend_rows = 0;
    status = say(fragments_room(c, &attend_parts, &attend_rows), "attention on codes", err, cap);
    const size_t at_attend_rows = books.take(attend_rows, sizeof(int)), at_attend = books.take(attend_rows ? c->slot.size() : 0, sizeof(attend_slot)), zeroed = books.total;
    const size_t at_attend_parts = books.take(attend_parts, sizeof(float));
    const size_t at_parts = books.take(rows_at_once * c->n_splits * ROWS_OF_FEW, sizeof(float) * (d + 2));
    const size_t at_staging = books.take((size_t)n_seqs * n_kv * 2 * c->staging_rows, sizeof(float) * d);
    c->books_bytes = books.total;
    c->store_bytes = std::max(store.total, (size_t)256);
    if (status < 0) {
        cache_free(c);
        return status;
    }
    if (!books.fits || !store.fits) status = refuse(E_ARG, err, cap, "cache: %lld sequences of %lld tokens are more bytes than there are", n_seqs, max_tokens);
    else status = allocate(c, err, cap);
    if (status < 0) {
        cache_free(c);
        return status;
    }

    move_slots(c, (const uint8_t *)nullptr + 1, (const uint8_t *)nullptr + 1);
    c->dev_slots = (dev_slot *)(c->books + at_slots);
    c->dev_length = (int *)(c->books + at_length);
    c->dev_encoded = (int *)(c->books + at_encoded);
    c->dev_kinds = (kind_books *)(c->books + at_kinds);
    c->dev_bad = (int *)(c->books + at_bad);
    c->arrivals = (int *)(c->books + at_arrivals);
    c->parts = (float *)(c->books + at_parts);
    c->staging = (float *)(c->books + at_staging);
    c->attend_slots = (attend_slot *)(c->books + at_attend);
    c->attend_parts = (float *)(c->books + at_attend_parts);
    c->attend_arrivals = (int *)(c->books + at_attend_rows);
    std::vector<uint8_t> host(zeroed, 0);
    for (const shared_bytes &s : shared) {
        memcpy(&host[s.at], s.host, s.bytes);
        if (s.fragments) fragments_flag(&host[s.at]);
    }
    if (attend_rows) {
        const std::vector<attend_slot> slots = fragments_slots(c);
        memcpy(&host[at_attend], slots.data(), sizeof(attend_slot) * slots.size());
    }
    for (const angles &t : turns) fill_angles(t, p->n_rot, pt, (float *)&host[t.at]);
    memcpy(&host[at_slots], c->slot.data(), sizeof(dev_slot) * c->slot.size());
    for (size_t i = 0; i < c->kind.size(); i++) {
        const cache_kind &k = c->kind[i];
        ((kind_books *)&host[at_kinds])[i] = { c->sink[k.layer], c->recent[k.layer], k.granule, k.never };
    }
    status = say(cudaMemcpy(c->books, host.data(), host.size(), cudaMemcpyHostToDevice), "cache books", err, cap);
    if (status == 0) status = say(cudaMemset(c->store, 0, c->store_bytes), "cache", err, cap);
    if (status < 0) {
        cache_free(c);
        return status;
    }
    c->epoch = next_epoch();
    *out = c;
    return 0;
}

void cache_free(kv_backend_cache *c)
{
    if (!c) return;
    cudaSetDevice(c->device);
    for (void *p : { (void *)c->books, (void *)c->store, (void *)c->saved, (void *)c->slab, (void *)c->state, (void *)c->io, (void *)c->prefill }) cudaFree(p);
    delete c;
}

// A deep copy as of the last commit.
int cache_fork(const kv_backend_cache *c, kv_backend_cache **out, char *err, size_t cap)
{
    *out = nullptr;
    for (int l = 0; l < c->n_layers; l++)
        if (c->pending[l]) return refuse(E_ARG, err, cap, "cache: fork in the middle of a step (layer %lld has %lld tokens not committed)", l, c->pending[l]);
    int status = say(cudaSetDevice(c->device), "select device", err, cap);
    if (status < 0) return status;
    kv_backend_cache *f = new (std::nothrow) kv_backend_cache(*c);
    if (!f) return refuse(E_NOMEM, err, cap, "cache: no memory for the books of %lld layers and %lld sequences", c->n_layers, c->n_seqs);
    f->books = f->store = f->saved = nullptr;
    f->slab = f->state = f->io = nullptr;
    f->prefill = nullptr;
    f->prefill_bytes = 0;
    f->saved_bytes = f->slab_bytes = f->state_bytes = f->io_bytes = 0;
    status = allocate(f, err, cap);
    if (status == 0) status = say(cudaMemcpy(f->books, c->books, c->books_bytes, cudaMemcpyDeviceToDevice), "cache fork", err, cap);
    if (status == 0) status = say(cudaMemcpy(f->store, c->store, c->store_bytes, cudaMemcpyDeviceToDevice), "cache fork", err, cap);
    if (status == 0) {
        auto moved = [&](auto *p) { return (decltype(p))(f->books + ((const uint8_t *)p - c->books)); };
        move_slots(f, c->books, c->store);
        f->dev_slots = moved(c->dev_slots);
        f->dev_length = moved(c->dev_length);
        f->dev_encoded = moved(c->dev_encoded);
        f->dev_kinds = moved(c->dev_kinds);
        f->dev_bad = moved(c->dev_bad);
        f->arrivals = moved(c->arrivals);
        f->parts = moved(c->parts);
        f->staging = moved(c->staging);
        f->attend_slots = moved(c->attend_slots);
        f->attend_parts = moved(c->attend_parts);
        f->attend_arrivals = moved(c->attend_arrivals);
        const std::vector<attend_slot> slots = fragments_slots(f);
        if (std::any_of(f->fragments.begin(), f->fragments.end(), [](const fragment_layer &l) { return l.form != nullptr; }))
            status = say(cudaMemcpy(f->attend_slots, slots.data(), sizeof(attend_slot) * slots.size(), cudaMemcpyHostToDevice), "cache fork", err, cap);
        if (status == 0) status = say(cudaMemcpy(f->dev_slots, f->slot.data(), sizeof(dev_slot) * f->slot.size(), cudaMemcpyHostToDevice), "cache fork", err, cap);
    }
    if (status < 0) {
        cache_free(f);
        return status;
    }
    f->epoch = next_epoch();
    *out = f;
    return 0;
}

void cache_path(kv_backend_cache *c, int path)
{
    c->path = path == 1;
    c->bf16_chunks = path == 2;
    c->did = 0;
    c->paths[0] = 0;
    c->epoch = next_epoch();
}

}  // namespace kelvin

// ---- as the runner uses it (cache.cuh)

int                kv_dev_cache_seqs(const kv_backend_cache *c) { return c->n_seqs; }
const int         *kv_dev_cache_lengths(const kv_backend_cache *c) { return c->dev_length; }
unsigned long long kv_dev_cache_epoch(const kv_backend_cache *c) { return c->epoch; }

int kv_dev_cache_room(const kv_backend_cache *c, int n, char *err, size_t cap)
{
    const int longest = *std::max_element(c->length.begin(), c->length.end());
    if (n < 1) return refuse(E_ARG, err, cap, "cache: %lld tokens to attend, at least %lld is needed", n, 1);
    if (n > c->max_tokens - longest) return refuse(E_ARG, err, cap, "cache: %lld tokens do not fit max_tokens=%lld", (long long)longest + n, c->max_tokens);
    return say(cudaSetDevice(c->device), "select device", err, cap);
}

int kv_dev_cache_reserve(kv_backend_cache *c, int n, char *err, size_t cap)
{
    const int longest = *std::max_element(c->length.begin(), c->length.end());
    int status = kv_dev_cache_room(c, n, err, cap);
    if (status < 0 || n == 1) return status;
    if (!cache_grow((void **)&c->saved, &c->saved_bytes, c->tails_bytes, "cache: rings of a chunk", err, cap, &status)) return status;
    if (few(n, c->group)) return 0;
    if (c->bf16_chunks && prefill_fits(c, n)) return cache_grow((void **)&c->prefill, &c->prefill_bytes, prefill_bytes(c, n), "cache: images of a chunk", err, cap, &status) ? 0 : status;
    const size_t row = (size_t)c->n_seqs * c->n_kv_heads * 2 * c->ld * sizeof(float);
    if (!c->slab_tokens) c->slab_tokens = (int)std::max((size_t)KEYS_STEP, std::min((size_t)std::min((int)SLAB, (c->max_tokens + KEYS_STEP - 1) / KEYS_STEP * KEYS_STEP), SLAB_BYTES / row / KEYS_STEP * KEYS_STEP));
    if (!c->slab) {                                                     // zeros: what a row has past head_dim is multiplied too
        if (!cache_grow((void **)&c->slab, &c->slab_bytes, row * c->slab_tokens, "cache: decoded rows of a chunk", err, cap, &status)) return status;
        status = say(cudaMemset(c->slab, 0, c->slab_bytes), "cache: decoded rows of a chunk", err, cap);
        if (status < 0) return status;
    }
    if (longest + n <= c->slab_tokens) return 0;
    return cache_grow((void **)&c->state, &c->state_bytes, (size_t)c->n_seqs * c->n_heads * n * (c->head_dim + 2) * sizeof(float), "cache: sums of a chunk", err, cap, &status) ? 0 : status;
}

cudaError_t kv_dev_cache_attend(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    const cache_form &form = *c->form[layer];
    const bool bf16 = c->bf16_chunks && prefill_fits(c, n);
    cudaError_t e = (cudaError_t)cache_restore(c, layer, stream);           // a step that did not come to its commit is tried again
    if (e == cudaSuccess && n > 1) e = cache_check(c, layer, n, k, v, stream);
    if (e == cudaSuccess && n > 1 && c->tail_bytes[layer]) e = cudaMemcpyAsync(c->saved + c->tail_at[layer], c->store + c->tail_at[layer], c->tail_bytes[layer], cudaMemcpyDeviceToDevice, stream);
    if (e == cudaSuccess) e = form.append(c, layer, n, k, v, stream);
    if (e == cudaSuccess) e = few(n, c->group) ? form.attend_few(c, layer, n, q, k, v, scale, softcap, out, stream)
                            : (bf16 ? attend_prefill : attend_chunk)(c, layer, n, q, k, v, scale, softcap, out, stream);
    if (e != cudaSuccess) return e;
    c->pending[layer] = n;
    if (n > 1) c->did |= bf16 ? DID_BF16 : DID_F32;
    return n > 1 ? cache_save(c, layer, n, k, v, stream) : cudaSuccess;
}

cudaError_t kv_dev_cache_commit(kv_backend_cache *c, int n, cudaStream_t stream) { return cache_count(c, n, stream); }

int kv_dev_cache_verdict(kv_backend_cache *c, char *err, size_t cap)
{
    static const char *const name[] = { "f32", "f16", "bf16" };
    int bad = 0;
    const int status = say(cudaMemcpy(&bad, c->dev_bad, sizeof bad, cudaMemcpyDeviceToHost), "cache", err, cap);
    if (status < 0 || bad < 1 || bad > c->n_layers) return status;
    snprintf(err, cap, "cache: layer %d: a key or value is not finite or does not fit exact dtype %s", bad - 1, name[c->dtype[bad - 1]]);
    return E_ARG;
}

void kv_dev_cache_drop(kv_backend_cache *c)
{
    char err[160];
    cudaSetDevice(c->device);
    for (int l = 0; l < c->n_layers; l++) cache_restore(c, l, 0);
    cache_put_books(c, err, sizeof err);
}

// Pairs as core/cache_count.c counts them, then the books as its commit leaves them.
void kv_dev_cache_advance(kv_backend_cache *c, int n)
{
    for (int seq = 0; seq < c->n_seqs; seq++) {
        const int n0 = c->length[seq];
        for (int i = 0; i < c->n_kinds(); i++) {
            const cache_kind &k = c->kind[i];
            cache_held &h = c->held[(size_t)seq * c->n_kinds() + i];
            const int sink = c->sink[k.layer], recent = c->recent[k.layer], window = c->window[k.layer], pt = c->page_tokens;
            for (int t = std::max(n0, c->count_from); t < n0 + n; t++) {
                const int first = first_seen(window, t), encoded = std::max(h.encoded, ripe(t + 1, sink, recent, k.granule, k.never));
                c->pairs_total += (double)k.count * (t + 1 - first);
                c->pairs_compressed += (double)k.count * std::max(0, sink + encoded - std::max(first, sink));
            }
            h.encoded = std::max(h.encoded, ripe(n0 + n, sink, recent, k.granule, k.never));
            const int first = first_seen(window, n0 + n), pages = (h.encoded + pt - 1) / pt;
            if (first == 0) continue;
            h.sink_gone |= first >= sink;
            while (h.first_page < pages && (long long)sink + (long long)(h.first_page + 1) * pt <= first) h.first_page++;
        }
        c->length[seq] = n0 + n;
    }
    std::fill(c->pending.begin(), c->pending.end(), 0);
}
