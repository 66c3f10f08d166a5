// bench.cu -- what the device can do, and what the kernels make of it: backend.h's `bench`.
//
//   read bytes=N                                           a stream of 16-byte loads, many in flight
//   copy bytes=N                                           N bytes read and N written; both are counted
//   decode bits_k= bits_v= head_dim= n_kv_heads= group= batch= length= [exact=0] [ragged=0] [cold=]
//                                                          attention on codes; ragged=1: lengths lognormal around `length`, the same sum
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
#include "kernels.cuh"
#include "launch.cuh"
#include "status.cuh"
#include "kelvin/attend.cuh"

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
// Norms of every tile: finite and about one.
__global__ void norms_kernel(uint8_t *p, size_t n_tiles, int tile_bytes)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n_tiles * 64; i += (size_t)gridDim.x * blockDim.x)
        ((__half *)(p + (i / 64 + 1) * tile_bytes - 128))[i % 64] = __float2half(0.8f + 0.4f * (float)(i * 37 % 64) / 64);
}
__global__ void halves_kernel(__half *p, size_t n)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        p[i] = __float2half((float)((uint32_t)i * 2654435761u >> 16) / 32768 - 1);
}

constexpr int LOADS = 8;       // in flight a thread: with 16 to 64 warps an SM the H200 gives 4.54 to 4.58 TB/s, see docs/gpu.md
__global__ void read_kernel(const uint4 *p, size_t n, uint32_t *sink)
{
    const size_t threads = (size_t)gridDim.x * blockDim.x, at = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    uint32_t a = 0;
    for (size_t i = at; i + (LOADS - 1) * threads < n; i += LOADS * threads) {
        uint4 v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) v[k] = __ldcs(p + i + k * threads);
#pragma unroll
        for (int k = 0; k < LOADS; k++) a ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (a == 123456789) sink[0] = 1;
}
__global__ void copy_kernel(const uint4 *from, uint4 *to, size_t n)
{
    const size_t threads = (size_t)gridDim.x * blockDim.x, at = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    for (size_t i = at; i + (LOADS - 1) * threads < n; i += LOADS * threads) {
        uint4 v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) v[k] = __ldcs(from + i + k * threads);
#pragma unroll
        for (int k = 0; k < LOADS; k++) to[i + k * threads] = v[k];
    }
}

// ---- cases

typedef std::vector<std::pair<std::string, long long>> words;

long long word(const words &w, const char *name, long long least, long long most, long long or_else = -1)
{
    for (const auto &x : w)
        if (x.first == name) {
            if (x.second < least || x.second > most) fail(E_ARG, "%s=%lld is outside %lld..%lld", name, x.second, least, most);
            return x.second;
        }
    if (or_else < 0) fail(E_ARG, "%s= is missing", name);
    return or_else;
}

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
    size_t n;                           // 16-byte words of a launch
    bool write;
    int grid;
    stream_job(const words &w, bool write) : write(write)
    {
        grid = sms() * 8;
        const size_t step = (size_t)grid * THREADS * LOADS;
        n = (size_t)word(w, "bytes", 16, 64ll << 30) / 16 / step * step;
        if (!n) n = step;
        bytes = (double)n * 16 * (write ? 2 : 1);
        copies = 2;                     // of gigabytes: a launch finds nothing of the last one but its end
        from.make(n * 16 * copies);
        if (write) to.make(n * 16);
        else to.make(16);
        KV_LAUNCH(fill_kernel, blocks_for(n), THREADS, 0, 0, (uint32_t *)from.p, n * 4 * copies, 3u);
        need(cudaGetLastError(), "fill");
    }
    cudaError_t launch(int copy, cudaStream_t s) override
    {
        const uint4 *p = (const uint4 *)from.p + n * copy;
        if (write) KV_LAUNCH(copy_kernel, grid, THREADS, 0, s, p, (uint4 *)to.p, n);
        else KV_LAUNCH(read_kernel, grid, THREADS, 0, s, p, n, (uint32_t *)to.p);
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

// The forms that are measured, until the launcher of kernels/attend_codes.cu chooses among all.
typedef void (*attend_form)(const kelvin::attend_args);
struct form { int bits_k, bits_v, head_dim, g, shared_bytes; attend_form fn; };
#define FORM(kb, vb, d, g, blocks) { kb, vb, d, g, kelvin::detail::ring_of<kb, vb, d, g, blocks>::bytes, kelvin::attend_kernel<kb, vb, d, g, blocks> }
const form forms[] = { FORM(4, 4, 128, 4, 3), FORM(3, 3, 128, 4, 4), FORM(2, 2, 128, 4, 4) };

struct decode_job : job {
    static constexpr int PAGE_SHIFT = 1;        // pages of 64 tokens
    memory<uint8_t> pool;
    memory<float> q, out, sign, partials;
    memory<int> pages, n_codes, n_exact, arrivals;
    memory<__half> exact_k, exact_v;
    kelvin::attend_args a = {};
    int bits_k, bits_v, head_dim;
    size_t copy_bytes;
    const form *f = nullptr;
    int grid = 1;
    explicit decode_job(const words &w)
    {
        bits_k = (int)word(w, "bits_k", 2, 4), bits_v = (int)word(w, "bits_v", 2, 4), head_dim = (int)word(w, "head_dim", 64, 256);
        const int n_kv = (int)word(w, "n_kv_heads", 1, 128), group = (int)word(w, "group", 1, 16), batch = (int)word(w, "batch", 1, 4096);
        const int length = (int)word(w, "length", 1, 1 << 24), exact = (int)word(w, "exact", 0, 4096, 0);
        if (head_dim != 64 && head_dim != 128 && head_dim != 256) fail(E_ARG, "head_dim=%d is none of 64, 128, 256", head_dim);
        const std::vector<int> n = lengths_of(batch, length, word(w, "ragged", 0, 1, 0));
        const int page_tokens = kelvin::TILE_TOKENS << PAGE_SHIFT, tile_bytes = head_dim * 4 * (bits_k + bits_v) + 128;
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
        KV_LAUNCH(norms_kernel, blocks_for(copy_bytes / tile_bytes * 64), THREADS, 0, 0, pool.p, copy_bytes / tile_bytes * copies, tile_bytes);
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
        for (const form &x : forms)
            if (x.bits_k == bits_k && x.bits_v == bits_v && x.head_dim == head_dim && x.g == (group > 4 ? 8 : 4)) f = &x;
        if (!f) fail(E_UNSUPPORTED, "no kernel for bits_k=%d bits_v=%d head_dim=%d group=%d", bits_k, bits_v, head_dim, group);
        int blocks = 1;
        need(cudaFuncSetAttribute(f->fn, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes), "kernel");
        need(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, f->fn, 128, f->shared_bytes), "kernel");
        grid = blocks * sms();
        const int rows = batch * n_kv * ((group + f->g - 1) / f->g);
        partials.make(kelvin::attend_partials(grid, rows, f->g, head_dim));
        arrivals.from(std::vector<int>(rows, 0));
        a.partials = partials.p, a.arrivals = arrivals.p;
    }
    cudaError_t launch(int copy, cudaStream_t s) override
    {
        a.pool = pool.p + copy_bytes * copy;
        KV_LAUNCH(f->fn, grid, 128, f->shared_bytes, s, a);
        return cudaGetLastError();
    }
};

const struct kind { const char *name; job *(*make)(const words &w); } kinds[] = {
    { "read", [](const words &w) -> job * { return new stream_job(w, false); } },
    { "copy", [](const words &w) -> job * { return new stream_job(w, true); } },
    { "decode", [](const words &w) -> job * { return new decode_job(w); } },
};

job *make_job(const std::string &line)
{
    char name[32] = "";
    int at = 0;
    sscanf(line.c_str(), " %31s%n", name, &at);
    words w;
    for (const char *p = line.c_str() + at;;) {
        char key[32];
        long long value;
        int used = 0;
        if (sscanf(p, " %31[a-z_]=%lld%n", key, &value, &used) == 2) w.push_back({ key, value }), p += used;
        else if (p[strspn(p, " \t")] == 0) break;
        else fail(E_ARG, "'%.60s' is not key=number", p);
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
