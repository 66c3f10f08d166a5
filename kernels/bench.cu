// bench.cu -- what the device can do, and what the kernels make of it: backend.h's `bench`.
//
//   read bytes=N [blocks=4]                                a stream of 16-byte loads, blocks an SM
//   copy bytes=N [blocks=4]                                N bytes read and N written, both counted; blocks=0: cudaMemcpyAsync
//   attend bits_k= bits_v= head_dim= n_kv_heads= group= batch= length= [exact=0] [ragged=0] [cold=]
//                                                          attention on codes; ragged=1: lengths lognormal around `length`, the same sum
//   encode family= tokens= head_dim= page_tokens= granule= side= page_bytes= pod=HEX [cold=]
//                                                          f32 rows to pages of a codec (kv_codec_bench_case writes the line); source and pages are counted
//   decode ...                                             and back
//
// Every case has its own random caches, as many as exceed the second-level cache several times over, and one CUDA graph that runs
// over all of them; the graphs of all cases take turns.  us is the median of the turns, for one launch.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>
#include "backend.h"
#include "codec.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "status.cuh"
#include "attend_codes.cuh"

namespace {

struct failure { int status; std::string text; };
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(int status, const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw failure{ status, text };
}
void need(cudaError_t e, const char *what)
{
    if (e == cudaSuccess) return;
    cudaGetLastError();
    fail(e == cudaErrorMemoryAllocation ? E_NOMEM : e == cudaErrorNotSupported ? E_UNSUPPORTED : E_DEVICE, "%s: %s", what, cudaGetErrorString(e));
}

// Device memory that frees itself.
template <class T> struct memory {
    T *p = nullptr;
    size_t n = 0;
    memory() = default;
    memory(const memory &) = delete;
    ~memory() { if (p) cudaFree(p); }
    void make(size_t count)
    {
        n = std::max<size_t>(count, 1);
        void *at = nullptr;
        const cudaError_t e = cudaMalloc(&at, n * sizeof(T));
        if (e != cudaSuccess) cudaGetLastError(), fail(E_NOMEM, "%.0f bytes: %s", (double)n * sizeof(T), cudaGetErrorString(e));
        p = (T *)at;
    }
    void from(const std::vector<T> &v)
    {
        make(v.size());
        need(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
    }
};

// ---- data

__global__ void fill_kernel(uint32_t *p, size_t n, uint32_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u ^ (uint32_t)(i >> 32) ^ seed;
        x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
        p[i] = x;
    }
}
// Norms of every tile, behind its keys' words and behind its values': about one, of keys times key_norm.  With queries of unit normals and
// key_norm = sqrt(head_dim) scores scatter by one: a kernel whose work depends on how weights differ does it here too.
__global__ void norms_kernel(uint8_t *p, size_t n_tiles, int tile_bytes, int k_bytes, float key_norm)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n_tiles * 64; i += (size_t)gridDim.x * blockDim.x) {
        const bool key = i % 64 < 32;
        ((__half *)(p + i / 64 * tile_bytes + (key ? k_bytes : tile_bytes) - 64))[i % 32] = __float2half((key ? key_norm : 1.0f) * (0.8f + 0.4f * (float)(i * 37 % 64) / 64));
    }
}
__global__ void halves_kernel(__half *p, size_t n)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        p[i] = __float2half((float)((uint32_t)i * 2654435761u >> 16) / 32768 - 1);
}

constexpr int LOADS = 8, WARPS = 8;      // loads in flight a thread, warps of a block
// A warp goes through its own stretch of `per` lines of 512 bytes: strides over the whole buffer cost a tenth.
__global__ void __launch_bounds__(WARPS * 32) read_kernel(const uint4 *p, size_t per, uint32_t *sink)
{
    const uint4 *q = p + ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * per * 32 + threadIdx.x % 32;
    uint32_t a = 0;
    for (size_t i = 0; i < per; i += LOADS) {
        uint4 v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) v[k] = __ldcs(q + (i + k) * 32);
#pragma unroll
        for (int k = 0; k < LOADS; k++) a ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (a == 123456789) sink[0] = 1;
}
__global__ void __launch_bounds__(WARPS * 32) copy_kernel(const uint4 *from, uint4 *to, size_t per)
{
    const size_t at = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * per * 32 + threadIdx.x % 32;
    for (size_t i = 0; i < per; i += LOADS) {
        uint4 v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) v[k] = __ldcs(from + at + (i + k) * 32);
#pragma unroll
        for (int k = 0; k < LOADS; k++) __stcs(to + at + (i + k) * 32, v[k]);
    }
}

// ---- cases

typedef std::vector<std::pair<std::string, std::string>> words;

const std::string *find(const words &w, const char *name)
{
    for (const auto &x : w) if (x.first == name) return &x.second;
    return nullptr;
}
const std::string &text(const words &w, const char *name)
{
    const std::string *s = find(w, name);
    if (!s) fail(E_ARG, "%s= is missing", name);
    return *s;
}
long long word(const words &w, const char *name, long long least, long long most)
{
    const std::string &s = text(w, name);
    char *end;
    const long long v = strtoll(s.c_str(), &end, 10);
    if (s.empty() || *end) fail(E_ARG, "%s=%.30s is no number", name, s.c_str());
    if (v < least || v > most) fail(E_ARG, "%s=%lld is outside %lld..%lld", name, v, least, most);
    return v;
}
long long word(const words &w, const char *name, long long least, long long most, long long or_else) { return find(w, name) ? word(w, name, least, most) : or_else; }

struct job {
    double bytes = 0;
    int copies = 4;
    std::string more;                   // of its JSON object
    std::vector<float> us;
    virtual ~job() {}
    virtual cudaError_t launch(int copy, cudaStream_t stream) = 0;
};

// Caches in rotation: as many as fill cold= bytes, several times any second-level cache; cold=0: one, for trials without a device.
constexpr long long COLD_BYTES = 512ll << 20;
int copies_of(const words &w, double bytes)
{
    const long long cold = word(w, "cold", 0, 64ll << 30, COLD_BYTES);
    return std::min(64, std::max(cold ? 4 : 1, (int)std::ceil((double)cold / std::max(bytes, 1.0))));
}
constexpr int THREADS = 256;
int blocks_for(size_t n) { return (int)std::min<size_t>(2048, (n + THREADS - 1) / THREADS); }
int sms()
{
    int device = 0, n = 1;
    need(cudaGetDevice(&device), "device");
    need(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device), "device");
    return n;
}

struct stream_job : job {
    memory<uint8_t> from, to;
    size_t per, n;                      // lines of a warp, bytes of a launch
    bool write;
    int grid;
    stream_job(const words &w, bool write) : write(write)
    {
        const long long blocks = word(w, "blocks", 0, 16, 4);
        grid = blocks ? sms() * (int)blocks : 1;
        const size_t warps = blocks ? (size_t)grid * WARPS : 1;
        per = std::max<size_t>(LOADS, (size_t)word(w, "bytes", 16, 64ll << 30) / 512 / warps / LOADS * LOADS);
        n = per * warps * 512;
        bytes = (double)n * (write ? 2 : 1);
        copies = 2;                     // of gigabytes: a launch finds nothing of the last one but its end
        from.make(n * copies);
        to.make(write ? n : 16);
        if (!write && !blocks) fail(E_ARG, "read needs blocks=1..16");
        if (!blocks) grid = 0;
        KV_LAUNCH(fill_kernel, blocks_for(n / 4), THREADS, 0, 0, (uint32_t *)from.p, n / 4 * copies, 3u);
        need(cudaGetLastError(), "fill");
    }
    cudaError_t launch(int copy, cudaStream_t s) override
    {
        const uint4 *p = (const uint4 *)(from.p + n * copy);
        if (!grid) return cudaMemcpyAsync(to.p, p, n, cudaMemcpyDeviceToDevice, s);
        if (write) KV_LAUNCH(copy_kernel, grid, WARPS * 32, 0, s, p, (uint4 *)to.p, per);
        else KV_LAUNCH(read_kernel, grid, WARPS * 32, 0, s, p, per, (uint32_t *)to.p);
        return cudaGetLastError();
    }
};

// Lengths of a ragged batch: lognormal (sigma 1), scaled to the sum of equal ones.
std::vector<int> lengths_of(int batch, int length, bool ragged)
{
    std::vector<int> n(batch, length);
    if (!ragged || batch < 2) return n;
    std::mt19937 rng(11);
    std::normal_distribution<double> normal;
    std::vector<double> x(batch);
    double sum = 0;
    for (double &v : x) sum += v = std::exp(normal(rng));
    long long left = (long long)batch * length;
    for (int i = 0; i < batch; i++) {
        n[i] = i + 1 == batch ? (int)std::min<long long>(left, 1 << 27) : (int)std::min<double>((double)left, std::max(1.0, x[i] / sum * batch * length));
        left -= n[i];
    }
    return n;
}

// Lloyd-Max levels of a unit normal, the positive half (J. Max, 1960).
const std::vector<float> levels(int bits, int head_dim)
{
    static const std::vector<float> half[5] = { {}, {}, { 0.452780f, 1.510418f }, { 0.245094f, 0.756005f, 1.343909f, 2.151946f },
        { 0.128395f, 0.388048f, 0.656759f, 0.942341f, 1.256231f, 1.618046f, 2.069017f, 2.732590f } };
    std::vector<float> c;
    for (size_t i = half[bits].size(); i-- > 0;) c.push_back(-half[bits][i]);
    for (float x : half[bits]) c.push_back(x);
    for (float &x : c) x /= std::sqrt((float)head_dim);
    return c;
}

struct attend_job : job {
    static constexpr int PAGE_SHIFT = 1;        // pages of 64 tokens
    memory<uint8_t> pool;
    memory<float> q, out, sign, partials;
    memory<int> pages, n_codes, n_exact, arrivals;
    memory<__half> exact_k, exact_v;
    kelvin::attend_args a = {};
    int bits_k, bits_v, head_dim;
    size_t copy_bytes;
    const attend_form *f = nullptr;
    explicit attend_job(const words &w)
    {
        bits_k = (int)word(w, "bits_k", 2, 4), bits_v = (int)word(w, "bits_v", 2, 4), head_dim = (int)word(w, "head_dim", 1, 256);
        const int n_kv = (int)word(w, "n_kv_heads", 1, 128), group = (int)word(w, "group", 1, 16), batch = (int)word(w, "batch", 1, 4096);
        const int length = (int)word(w, "length", 1, 1 << 24), exact = (int)word(w, "exact", 0, 4096, 0);
        f = kv_cuda_attend_form(bits_k, bits_v, head_dim, group);
        if (!f) fail(E_UNSUPPORTED, "no kernel for bits_k=%d bits_v=%d head_dim=%d group=%d", bits_k, bits_v, head_dim, group);
        const std::vector<int> n = lengths_of(batch, length, word(w, "ragged", 0, 1, 0));
        const int page_tokens = kelvin::TILE_TOKENS << PAGE_SHIFT, tile_bytes = f->tile_bytes;
        int max_pages = 1, n_pages = 0;
        double tiles = 0;
        for (int t : n) max_pages = std::max(max_pages, (t + page_tokens - 1) / page_tokens), tiles += (t + kelvin::TILE_TOKENS - 1) / kelvin::TILE_TOKENS;
        std::vector<int> table((size_t)batch * max_pages, 0);
        for (int b = 0; b < batch; b++) n_pages += (n[b] + page_tokens - 1) / page_tokens;
        std::vector<int> order(n_pages);
        for (int i = 0; i < n_pages; i++) order[i] = i;
        std::shuffle(order.begin(), order.end(), std::mt19937(5));
        for (int b = 0, i = 0; b < batch; b++) for (int j = 0; j * page_tokens < n[b]; j++) table[(size_t)b * max_pages + j] = order[i++];
        bytes = tiles * n_kv * tile_bytes + (double)batch * n_kv * exact * head_dim * 4;
        copies = copies_of(w, bytes);
        copy_bytes = (size_t)n_pages * n_kv * (tile_bytes << PAGE_SHIFT);
        pool.make(copy_bytes * copies);
        KV_LAUNCH(fill_kernel, blocks_for(copy_bytes / 4), THREADS, 0, 0, (uint32_t *)pool.p, copy_bytes / 4 * copies, 7u);
        KV_LAUNCH(norms_kernel, blocks_for(copy_bytes / tile_bytes * 64), THREADS, 0, 0, pool.p, copy_bytes / tile_bytes * copies, tile_bytes, head_dim * 4 * bits_k + 64,
                  std::sqrt((float)head_dim));
        need(cudaGetLastError(), "fill");
        std::vector<float> hq((size_t)batch * n_kv * group * head_dim), hs((size_t)2 * n_kv * head_dim);
        std::mt19937 rng(9);
        std::normal_distribution<float> normal;
        for (float &x : hq) x = normal(rng);
        for (float &x : hs) x = rng() & 1 ? 1.0f : -1.0f;
        q.from(hq), sign.from(hs), pages.from(table), n_codes.from(n);
        out.make(hq.size());
        a.q = q.p, a.out = out.p, a.pages = pages.p, a.n_codes = n_codes.p, a.sign = sign.p;
        if (exact) {
            const size_t count = (size_t)batch * n_kv * exact * head_dim;
            exact_k.make(count), exact_v.make(count);
            n_exact.from(std::vector<int>(batch, exact));
            KV_LAUNCH(halves_kernel, blocks_for(count), THREADS, 0, 0, exact_k.p, count);
            KV_LAUNCH(halves_kernel, blocks_for(count), THREADS, 0, 0, exact_v.p, count);
            need(cudaGetLastError(), "fill");
            a.exact_k = exact_k.p, a.exact_v = exact_v.p, a.n_exact = n_exact.p, a.exact_capacity = exact;
        }
        a.n_seqs = batch, a.n_heads = n_kv * group, a.n_kv_heads = n_kv, a.max_pages = max_pages, a.page_shift = PAGE_SHIFT;
        a.scale = 1 / std::sqrt((float)head_dim);
        a.kb = kelvin::codebook_of(bits_k, levels(bits_k, head_dim).data()), a.vb = kelvin::codebook_of(bits_v, levels(bits_v, head_dim).data());
        cudaError_t status = cudaSuccess;
        partials.make(kv_cuda_attend_partials(f, a, &status));
        need(status, "kernel");
        arrivals.from(std::vector<int>(kv_cuda_attend_rows(f, a), 0));
        a.partials = partials.p, a.arrivals = arrivals.p;
    }
    cudaError_t launch(int copy, cudaStream_t s) override
    {
        a.pool = pool.p + copy_bytes * copy;
        return kv_cuda_attend_codes(f, a, s);
    }
};

// Rows of unit normals (Box and Muller) to pages, or pages that were made of such rows back to rows.
__global__ void normal_kernel(float *p, size_t n, uint32_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u ^ seed, y = x ^ 0x9e3779b9u;
        x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
        y ^= y >> 16, y *= 0x7feb352du, y ^= y >> 15, y *= 0x846ca68bu, y ^= y >> 16;
        p[i] = sqrtf(-2 * logf(((float)(x >> 8) + 0.5f) * 0x1p-24f)) * cosf(6.2831853f * ((float)(y >> 8) * 0x1p-24f));
    }
}
struct codec_job : job {
    memory<float> rows;
    memory<uint8_t> pages, pod;
    kelvin::dev_codec c = {};
    int n;
    size_t row_floats, pages_bytes;
    bool encode;
    codec_job(const words &w, bool encode) : encode(encode)
    {
        const std::string &family = text(w, "family"), &hex = text(w, "pod");
        c.family = kv_cuda_codec_family(family.c_str());
        if (c.family < 0) fail(E_UNSUPPORTED, "codec '%.40s' is not one that this device knows", family.c_str());
        c.head_dim = (int)word(w, "head_dim", 1, 1024), c.page_tokens = (int)word(w, "page_tokens", 1, 1 << 16), c.granule = (int)word(w, "granule", 1, c.page_tokens);
        c.side = (int)word(w, "side", 0, 1), c.page_bytes = (size_t)word(w, "page_bytes", 1, 1 << 30);
        n = (int)word(w, "tokens", 1, 1 << 24) / c.page_tokens * c.page_tokens;
        if (!n || c.page_tokens % c.granule) fail(E_ARG, "tokens=%lld are no page of %d, or that is no multiple of granule=%d", word(w, "tokens", 1, 1 << 24), c.page_tokens, c.granule);
        std::vector<uint8_t> bytes(hex.size() / 2);
        for (size_t i = 0; i < bytes.size(); i++) {
            unsigned v = 0;
            if (sscanf(hex.c_str() + 2 * i, "%2x", &v) != 1) fail(E_ARG, "pod= is not hexadecimal");
            bytes[i] = (uint8_t)v;
        }
        pod.from(bytes);
        c.pod = pod.p;
        row_floats = (size_t)n * c.head_dim, pages_bytes = (size_t)n / c.page_tokens * c.page_bytes;
        this->bytes = (double)row_floats * 4 + (double)pages_bytes;
        copies = copies_of(w, this->bytes);
        rows.make(row_floats * copies), pages.make(pages_bytes * copies);
        need(cudaMemset(pages.p, 0, pages_bytes * copies), "fill");
        KV_LAUNCH(normal_kernel, blocks_for(row_floats), THREADS, 0, 0, rows.p, row_floats * copies, 17u);
        need(cudaGetLastError(), "fill");
        if (!encode)
            for (int i = 0; i < copies; i++) need(kv_cuda_encode_rows(c, rows.p + row_floats * i, n, pages.p + pages_bytes * i, 0), "encode");
    }
    cudaError_t launch(int copy, cudaStream_t s) override
    {
        return encode ? kv_cuda_encode_rows(c, rows.p + row_floats * copy, n, pages.p + pages_bytes * copy, s) : kv_cuda_decode_rows(c, pages.p + pages_bytes * copy, 0, n, rows.p + row_floats * copy, s);
    }
};

const struct kind { const char *name; job *(*make)(const words &w); } kinds[] = {
    { "read", [](const words &w) -> job * { return new stream_job(w, false); } },
    { "copy", [](const words &w) -> job * { return new stream_job(w, true); } },
    { "attend", [](const words &w) -> job * { return new attend_job(w); } },
    { "encode", [](const words &w) -> job * { return new codec_job(w, true); } },
    { "decode", [](const words &w) -> job * { return new codec_job(w, false); } },
};

job *make_job(const std::string &line)
{
    char name[32] = "";
    int at = 0;
    sscanf(line.c_str(), " %31s%n", name, &at);
    words w;
    for (size_t p = at; (p = line.find_first_not_of(" \t", p)) != std::string::npos;) {
        const size_t end = std::min(line.find_first_of(" \t", p), line.size()), equals = line.find('=', p);
        if (equals >= end || equals == p) fail(E_ARG, "'%.60s' is not key=value", line.substr(p, end - p).c_str());
        w.push_back({ line.substr(p, equals - p), line.substr(equals + 1, end - equals - 1) });
        p = end;
    }
    std::string known;
    for (const kind &k : kinds) {
        if (!strcmp(k.name, name)) return k.make(w);
        known += (known.empty() ? "" : ", ") + std::string(k.name);
    }
    fail(E_ARG, "'%s' is none of %s", name, known.c_str());
}

// ---- time

struct timer {
    cudaStream_t stream = nullptr;
    cudaEvent_t from = nullptr, to = nullptr;
    std::vector<cudaGraphExec_t> graphs;
    timer()
    {
        need(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
        need(cudaEventCreate(&from), "event");
        need(cudaEventCreate(&to), "event");
    }
    ~timer()
    {
        for (cudaGraphExec_t g : graphs) cudaGraphExecDestroy(g);
        if (from) cudaEventDestroy(from);
        if (to) cudaEventDestroy(to);
        if (stream) cudaStreamDestroy(stream);
    }
    void add(job &j)
    {
        need(j.launch(0, stream), "launch");        // outside the graph: what fails says so, and attributes are set
        need(cudaStreamSynchronize(stream), "launch");
        cudaGraph_t graph = nullptr;
        need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        cudaError_t e = cudaSuccess;
        for (int c = 0; c < j.copies && e == cudaSuccess; c++) e = j.launch(c, stream);
        const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
        cudaGraphExec_t exec = nullptr;
        if (e == cudaSuccess) e = ended;
        if (e == cudaSuccess) e = cudaGraphInstantiate(&exec, graph, 0);
        if (graph) cudaGraphDestroy(graph);
        need(e, "capture");
        graphs.push_back(exec);
    }
    float us(job &j, size_t i)
    {
        float ms = 0;
        need(cudaEventRecord(from, stream), "event");
        need(cudaGraphLaunch(graphs[i], stream), "graph");
        need(cudaEventRecord(to, stream), "event");
        need(cudaEventSynchronize(to), "run");
        need(cudaEventElapsedTime(&ms, from, to), "event");
        return ms * 1e3f / (float)j.copies;
    }
};

float quantile(std::vector<float> v, double p)
{
    std::sort(v.begin(), v.end());
    const double at = p * (double)(v.size() - 1);
    const size_t i = (size_t)at;
    return i + 1 < v.size() ? v[i] + (float)(at - (double)i) * (v[i + 1] - v[i]) : v[i];
}

constexpr int WARM_TURNS = 3;

std::string run(const char *cases, int repeats)
{
    std::vector<std::unique_ptr<job>> jobs;
    for (const char *p = cases; *p;) {
        const size_t n = strcspn(p, "\n");
        if (n && p[strspn(p, " ")] != '\n') jobs.emplace_back(make_job(std::string(p, n)));
        p += n + (p[n] == '\n');
    }
    need(cudaDeviceSynchronize(), "prepare");
    timer t;
    for (auto &j : jobs) t.add(*j);
    for (int r = -WARM_TURNS; r < repeats; r++)
        for (size_t i = 0; i < jobs.size(); i++) {
            const float us = t.us(*jobs[i], i);
            if (r >= 0) jobs[i]->us.push_back(us);
        }
    std::string json;
    for (auto &j : jobs) {
        char line[400];
        snprintf(line, sizeof line, "{\"bytes\":%.0f,\"copies\":%d,\"us\":%.4f,\"us_q1\":%.4f,\"us_q3\":%.4f%s}\n", j->bytes, j->copies, quantile(j->us, 0.5), quantile(j->us, 0.25), quantile(j->us, 0.75),
            j->more.c_str());
        json += line;
    }
    return json;
}

}  // namespace

int kv_cuda_bench(int device, const char *cases, int repeats, char *json, size_t json_cap, char *err, size_t err_cap)
{
    try {
        need(cudaSetDevice(device), "select device");
        const std::string text = run(cases, repeats);
        if (text.size() >= json_cap) fail(E_ARG, "%zu bytes of rows do not fit into %zu", text.size(), json_cap);
        memcpy(json, text.c_str(), text.size() + 1);
        if (err_cap) err[0] = 0;
        return 0;
    } catch (const failure &f) {
        snprintf(err, err_cap, "%s", f.text.c_str());
        return f.status;
    } catch (const std::bad_alloc &) {
        snprintf(err, err_cap, "out of memory");
        return E_NOMEM;
    }
}
