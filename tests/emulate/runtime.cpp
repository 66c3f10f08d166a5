// runtime.cpp -- the runtime API of the emulator: memory that knows its owner, one queue for all streams, graphs as lists of operations.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>
#include "blocks.h"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

using operation = std::function<void()>;

struct kv_emulated_graph {
    std::vector<operation> operations;
    bool invalid = false;
};
struct kv_emulated_stream {
    kv_emulated_graph *capture = nullptr;
    bool origin = false;                // capture began here
};
struct kv_emulated_event {
    double time = 0;
    bool recorded = false, pending = false;
    kv_emulated_graph *capture = nullptr;
};

namespace {

constexpr size_t SHARED = 48 << 10, SHARED_OPTIN = 227 << 10, SHARED_SM = 228 << 10;
constexpr int SMS = 4;                  // few, so that grids made for the device stay small

enum { DEVICE, PINNED };
struct area { size_t n; int kind; };
struct state {
    std::recursive_mutex lock;
    std::map<uintptr_t, area> areas;
    std::deque<operation> queue;
    std::unordered_map<const void *, int> shared_limit;
    std::map<cudaStream_t, bool> streams;
    size_t used = 0, memory = (size_t)4 << 30;
    // Device memory: one mapping with a protection key, which only what runs on the device unlocks.
    char  *arena = nullptr;
    size_t arena_size = 0;
    int    key = -1;                    // -1: the processor or the kernel has none, the host may touch everything
    int    opened = 0;
    struct sigaction before = {};
    int captures = 0, strict_captures = 0;
    bool eager = false;
    state()
    {
        if (const char *e = getenv("KV_EMULATE_MEMORY")) memory = strtoull(e, nullptr, 10);
        if (const char *e = getenv("KV_EMULATE_EAGER")) eager = atoi(e) != 0;
    }
};
state &st() { static state *s = new state(); return *s; }       // never destroyed: threads may still be here at exit
using guard = std::lock_guard<std::recursive_mutex>;

using kv_emulate::last_error;
cudaError_t say(cudaError_t e)
{
    if (e != cudaSuccess) last_error = e;
    return e;
}

void drain();

cudaError_t enqueue(cudaStream_t stream, operation op)
{
    state &s = st();
    if (stream && !s.streams.count(stream)) return say(cudaErrorInvalidResourceHandle);
    if (stream && stream->capture) {
        if (stream->capture->invalid) return say(cudaErrorStreamCaptureInvalidated);
        stream->capture->operations.push_back(std::move(op));
        return cudaSuccess;
    }
    if (!stream && s.strict_captures) return say(cudaErrorStreamCaptureImplicit);
    s.queue.push_back(std::move(op));
    if (s.eager) drain();
    return cudaSuccess;
}

// What waits, or changes memory under everybody, has no place in a capture and spoils it.
cudaError_t not_captured()
{
    if (!st().strict_captures) return cudaSuccess;
    for (auto &x : st().streams) if (x.first->capture) x.first->capture->invalid = true;
    return say(cudaErrorStreamCaptureUnsupported);
}
cudaError_t wait_all()
{
    const cudaError_t e = not_captured();
    if (e != cudaSuccess) return e;
    drain();
    return cudaSuccess;
}

const area *find(const void *p, uintptr_t *start)
{
    auto &a = st().areas;
    auto it = a.upper_bound((uintptr_t)p);
    if (it == a.begin()) return nullptr;
    --it;
    if ((uintptr_t)p >= it->first + it->second.n) return nullptr;
    *start = it->first;
    return &it->second;
}
bool on_device(const void *p)
{
    uintptr_t start;
    const area *a = find(p, &start);
    return a && a->kind == DEVICE;
}
bool pinned(const void *p)
{
    uintptr_t start;
    const area *a = find(p, &start);
    return a && a->kind == PINNED;
}
// [p, p + n) lies on the side that is said, and, where that is known, inside one allocation.
bool lies(const void *p, size_t n, bool device)
{
    uintptr_t start;
    const area *a = find(p, &start);
    if (!a) return !device;
    return (a->kind == DEVICE) == device && (uintptr_t)p + n <= start + a->n;
}

// The host that reads or writes device memory dies of it, with a word.
void on_fault(int sig, siginfo_t *info, void *)
{
    state &s = st();
    const char *at = (const char *)info->si_addr;
    if (s.arena && at >= s.arena && at < s.arena + s.arena_size) {
        static const char said[] = "emulate: the host touches device memory outside of a copy\n";
        if (write(2, said, sizeof said - 1) < 0) _exit(2);
    }
    sigaction(sig, &s.before, nullptr);                 // and again, as it would have been
}

void unlock(bool open)
{
    const int key = st().key;
    if (key >= 0) pkey_set(key, open ? 0 : PKEY_DISABLE_ACCESS);       // of this OS thread, without a system call
}
struct device_open {
    device_open() { if (st().opened++ == 0) unlock(true); }
    ~device_open() { if (--st().opened == 0) unlock(false); }
};

constexpr size_t GAP = 256, PAGE = 4096;
size_t room_of(size_t n) { return (n + GAP - 1) / GAP * GAP + GAP; }

// First fit; null when the arena has no such hole.
char *device_room(size_t n)
{
    state &s = st();
    if (!s.arena) {
        s.arena_size = 4 * s.memory;
        void *p = mmap(nullptr, s.arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return nullptr;
        s.arena = (char *)p;
        s.key = pkey_alloc(0, s.opened ? 0 : PKEY_DISABLE_ACCESS);
        if (s.key >= 0 && pkey_mprotect(p, s.arena_size, PROT_READ | PROT_WRITE, s.key) != 0) s.key = -1;
        if (s.key >= 0) {
            struct sigaction act = {};
            act.sa_sigaction = on_fault;
            act.sa_flags = SA_SIGINFO | SA_NODEFER;
            sigaction(SIGSEGV, &act, &s.before);
        }
    }
    char *at = s.arena;
    for (auto it = s.areas.lower_bound((uintptr_t)s.arena); it != s.areas.end() && it->first < (uintptr_t)s.arena + s.arena_size; ++it) {
        if ((size_t)(it->first - (uintptr_t)at) >= room_of(n)) return at;
        at = (char *)it->first + room_of(it->second.n);
    }
    return room_of(n) <= (size_t)(s.arena + s.arena_size - at) ? at : nullptr;
}

cudaError_t allocate(void **p, size_t n, int kind)
{
    state &s = st();
    *p = nullptr;
    if (n == 0) return cudaSuccess;
    if (kind == PINNED) {
        if (posix_memalign(p, 256, n) != 0) return say(cudaErrorMemoryAllocation);
        memset(*p, 0xFF, n);
        s.areas[(uintptr_t)*p] = { n, kind };
        return cudaSuccess;
    }
    if (n > s.memory || s.used > s.memory - n) return say(cudaErrorMemoryAllocation);
    char *at = device_room(n);
    if (!at) return say(cudaErrorMemoryAllocation);
    const device_open open;
    ASAN_UNPOISON_MEMORY_REGION(at, room_of(n));
    memset(at, 0xFF, n);
    ASAN_POISON_MEMORY_REGION(at + n, room_of(n) - n);
    s.areas[(uintptr_t)at] = { n, kind };
    s.used += n;
    *p = at;
    return cudaSuccess;
}
cudaError_t release(void *p, int kind)
{
    state &s = st();
    if (!p) return cudaSuccess;
    const auto it = s.areas.find((uintptr_t)p);
    if (it == s.areas.end() || it->second.kind != kind) return say(cudaErrorInvalidValue);
    const size_t n = it->second.n;
    s.areas.erase(it);
    if (kind == PINNED) {
        free(p);
        return cudaSuccess;
    }
    s.used -= n;
    ASAN_POISON_MEMORY_REGION(p, n);
    const uintptr_t first = ((uintptr_t)p + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)p + n) / PAGE * PAGE;
    if (last > first + (1 << 20)) madvise((void *)first, last - first, MADV_DONTNEED);
    return cudaSuccess;
}

void drain()
{
    state &s = st();
    if (s.queue.empty()) return;
    const device_open open;
    while (!s.queue.empty()) {
        const operation op = std::move(s.queue.front());
        s.queue.pop_front();
        op();
    }
}

double now_ms()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

const struct { cudaError_t e; const char *name, *text; } errors[] = {
    { cudaSuccess, "cudaSuccess", "no error" },
    { cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument" },
    { cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory" },
    { cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument" },
    { cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy" },
    { cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal" },
    { cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle" },
    { cudaErrorNotReady, "cudaErrorNotReady", "device not ready" },
    { cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch" },
    { cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported" },
    { cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing" },
    { cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture" },
    { cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched", "capture was not ended in the same stream as it began" },
    { cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit", "operation would make the legacy stream depend on a capturing blocking stream" },
};

}  // namespace

cudaError_t cudaGetLastError() { const cudaError_t e = (cudaError_t)last_error; last_error = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError() { return (cudaError_t)last_error; }
const char *cudaGetErrorName(cudaError_t e)
{
    for (auto &x : errors) if (x.e == e) return x.name;
    return "cudaErrorUnknown";
}
const char *cudaGetErrorString(cudaError_t e)
{
    for (auto &x : errors) if (x.e == e) return x.text;
    return "unknown error";
}
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : say(cudaErrorInvalidDevice); }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device)
{
    if (device != 0) return say(cudaErrorInvalidDevice);
    *p = {};
    snprintf(p->name, sizeof p->name, "Emulated on the CPU");
    p->totalGlobalMem = st().memory;
    p->sharedMemPerBlock = SHARED, p->sharedMemPerBlockOptin = SHARED_OPTIN, p->sharedMemPerMultiprocessor = SHARED_SM;
    p->major = 9, p->minor = 0, p->multiProcessorCount = SMS, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = 65536, p->l2CacheSize = 1 << 20, p->memoryBusWidth = 64;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr what, int device)
{
    if (device != 0) return say(cudaErrorInvalidDevice);
    switch (what) {
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = (int)SHARED; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMultiProcessorCount: *v = SMS; break;
    case cudaDevAttrL2CacheSize: *v = 1 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *v = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = (int)SHARED_SM; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = (int)SHARED_OPTIN; break;
    case cudaDevAttrMemoryPoolsSupported: *v = 1; break;
    default: return say(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { guard g(st().lock); return wait_all(); }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    guard g(st().lock);
    *total = st().memory;
    *free_bytes = st().memory - st().used;
    return cudaSuccess;
}

// ---- memory
cudaError_t kv_malloc(void **p, size_t n)
{
    guard g(st().lock);
    const cudaError_t e = not_captured();
    return e != cudaSuccess ? e : allocate(p, n, DEVICE);
}
cudaError_t kv_malloc_host(void **p, size_t n)
{
    guard g(st().lock);
    const cudaError_t e = not_captured();
    return e != cudaSuccess ? e : allocate(p, n, PINNED);
}
cudaError_t kv_malloc_async(void **p, size_t n, cudaStream_t s)
{
    guard g(st().lock);
    return s && s->capture ? say(cudaErrorStreamCaptureUnsupported) : allocate(p, n, DEVICE);
}
cudaError_t cudaFree(void *p)
{
    guard g(st().lock);
    const cudaError_t e = wait_all();
    return e != cudaSuccess ? e : release(p, DEVICE);
}
cudaError_t cudaFreeHost(void *p)
{
    guard g(st().lock);
    const cudaError_t e = wait_all();
    return e != cudaSuccess ? e : release(p, PINNED);
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t s)
{
    guard g(st().lock);
    if (s && s->capture) return say(cudaErrorStreamCaptureUnsupported);
    if (p && !on_device(p)) return say(cudaErrorInvalidValue);
    return enqueue(s, [p] { release(p, DEVICE); });
}

static cudaError_t copy_check(const void *dst, const void *src, size_t dst_span, size_t src_span, cudaMemcpyKind kind)
{
    const bool to = kind == cudaMemcpyDefault ? on_device(dst) : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from = kind == cudaMemcpyDefault ? on_device(src) : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    return lies(dst, dst_span, to) && lies(src, src_span, from) ? cudaSuccess : say(cudaErrorInvalidValue);
}
static void copy_rows(char *dst, size_t dst_pitch, const char *src, size_t src_pitch, size_t width, size_t height)
{
    for (size_t i = 0; i < height; i++) memmove(dst + i * dst_pitch, src + i * src_pitch, width);
}
static cudaError_t copy(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t s, bool blocking)
{
    guard g(st().lock);
    if (!width || !height) return cudaSuccess;
    if (height > 1 && (dst_pitch < width || src_pitch < width)) return say(cudaErrorInvalidValue);
    const size_t dst_span = (height - 1) * dst_pitch + width, src_span = (height - 1) * src_pitch + width;
    cudaError_t e = copy_check(dst, src, dst_span, src_span, kind);
    if (e != cudaSuccess) return e;
    if (blocking) {
        if ((e = wait_all()) != cudaSuccess) return e;
        const device_open open;
        copy_rows((char *)dst, dst_pitch, (const char *)src, src_pitch, width, height);
        return cudaSuccess;
    }
    const bool captured = s && s->capture;
    if (!captured && !on_device(src) && !pinned(src)) {         // pageable memory is read before the call returns
        const std::vector<char> now((const char *)src, (const char *)src + src_span);
        return enqueue(s, [=] { copy_rows((char *)dst, dst_pitch, now.data(), src_pitch, width, height); });
    }
    e = enqueue(s, [=] { copy_rows((char *)dst, dst_pitch, (const char *)src, src_pitch, width, height); });
    if (e == cudaSuccess && !captured && !on_device(dst) && !pinned(dst)) drain();     // and written before it returns
    return e;
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t n, cudaMemcpyKind kind) { return copy(dst, n, src, n, n, 1, kind, nullptr, true); }
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t n, cudaMemcpyKind kind, cudaStream_t s) { return copy(dst, n, src, n, n, 1, kind, s, false); }
cudaError_t cudaMemcpy2D(void *dst, size_t dp, const void *src, size_t sp, size_t w, size_t h, cudaMemcpyKind kind) { return copy(dst, dp, src, sp, w, h, kind, nullptr, true); }
cudaError_t cudaMemcpy2DAsync(void *dst, size_t dp, const void *src, size_t sp, size_t w, size_t h, cudaMemcpyKind kind, cudaStream_t s) { return copy(dst, dp, src, sp, w, h, kind, s, false); }
cudaError_t cudaMemsetAsync(void *dst, int value, size_t n, cudaStream_t s)
{
    guard g(st().lock);
    if (!n) return cudaSuccess;
    if (!lies(dst, n, true)) return say(cudaErrorInvalidValue);
    return enqueue(s, [=] { memset(dst, value, n); });
}
cudaError_t cudaMemset(void *dst, int value, size_t n) { return cudaMemsetAsync(dst, value, n, nullptr); }
cudaError_t kv_memcpy_symbol(void *symbol, void *other, size_t n, bool to_symbol)
{
    guard g(st().lock);
    const cudaError_t e = wait_all();
    if (e == cudaSuccess) memcpy(to_symbol ? symbol : other, to_symbol ? other : symbol, n);
    return e;
}

// ---- streams and events
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    guard g(st().lock);
    st().streams[*s = new kv_emulated_stream()] = true;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    guard g(st().lock);
    if (!s || !st().streams.erase(s)) return say(cudaErrorInvalidResourceHandle);
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    guard g(st().lock);
    if (s && !st().streams.count(s)) return say(cudaErrorInvalidResourceHandle);
    return wait_all();
}
cudaError_t cudaStreamQuery(cudaStream_t)
{
    guard g(st().lock);
    const bool busy = !st().queue.empty();
    const cudaError_t e = wait_all();
    return e != cudaSuccess ? e : busy ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    guard g(st().lock);
    if (s && e->capture) s->capture = e->capture;       // joins the capture
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { *e = new kv_emulated_event(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    guard g(st().lock);
    if (e->pending) drain();
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    guard g(st().lock);
    e->capture = s ? s->capture : nullptr;
    if (e->capture) return cudaSuccess;
    e->pending = true;
    return enqueue(s, [e] { e->time = now_ms(), e->recorded = true, e->pending = false; });
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    guard g(st().lock);
    return e->pending ? wait_all() : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e)
{
    guard g(st().lock);
    const bool pending = e->pending;
    if (pending) drain();
    return pending ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    guard g(st().lock);
    if (!from->recorded || !to->recorded) return say(from->pending || to->pending ? cudaErrorNotReady : cudaErrorInvalidResourceHandle);
    if (from->pending || to->pending) return say(cudaErrorNotReady);
    *ms = (float)(to->time - from->time);
    return cudaSuccess;
}

// ---- graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode)
{
    guard g(st().lock);
    if (!s || s->capture) return say(cudaErrorStreamCaptureUnsupported);
    s->capture = new kv_emulated_graph();
    s->origin = true;
    st().captures++;
    if (mode != cudaStreamCaptureModeRelaxed) st().strict_captures = st().captures;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out)
{
    guard g(st().lock);
    *out = nullptr;
    if (!s || !s->capture || !s->origin) return say(cudaErrorStreamCaptureUnmatched);
    *out = s->capture;
    for (auto &x : st().streams) if (x.first->capture == *out) x.first->capture = nullptr;
    s->origin = false;
    if (--st().captures == 0) st().strict_captures = 0;
    if ((*out)->invalid) {
        delete *out;
        *out = nullptr;
        return say(cudaErrorStreamCaptureInvalidated);
    }
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus *status)
{
    guard g(st().lock);
    *status = s && s->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long) { *x = new kv_emulated_graph(*g); return cudaSuccess; }
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s)
{
    guard g(st().lock);
    cudaError_t e = cudaSuccess;
    for (const operation &op : x->operations) if ((e = enqueue(s, op)) != cudaSuccess) break;
    return e;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, void **, size_t *n) { *n = g->operations.size(); return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) { delete x; return cudaSuccess; }

// ---- kernels
namespace kv_emulate {

void enter_device() { unlock(true); }
bool host_is_kept_out() { return st().key >= 0; }

cudaError_t enqueue_kernel(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, std::function<void()> one_thread)
{
    guard g(st().lock);
    if (!kernel) return say(cudaErrorInvalidDeviceFunction);
    const unsigned long long threads = (unsigned long long)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 || !threads || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024)
        return say(cudaErrorInvalidValue);              // as CUDA 13.0 on driver 580 says
    const auto it = st().shared_limit.find(kernel);
    if (shared > (it == st().shared_limit.end() ? SHARED : (size_t)it->second)) return say(cudaErrorInvalidValue);
    return enqueue(stream, [=] { run_grid(name, grid, block, shared, one_thread); });
}
cudaError_t set_attribute(const void *kernel, cudaFuncAttribute what, int value)
{
    guard g(st().lock);
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > SHARED_OPTIN) return say(cudaErrorInvalidValue);
    st().shared_limit[kernel] = value;
    return cudaSuccess;
}
cudaError_t attributes(cudaFuncAttributes *out, const void *kernel)
{
    guard g(st().lock);
    *out = {};
    const auto it = st().shared_limit.find(kernel);
    out->maxThreadsPerBlock = 1024;
    out->maxDynamicSharedSizeBytes = it == st().shared_limit.end() ? (int)SHARED : it->second;
    return cudaSuccess;
}
cudaError_t blocks_per_sm(int *out, const void *kernel, int threads, size_t shared)
{
    guard g(st().lock);
    const auto it = st().shared_limit.find(kernel);
    if (threads < 1 || threads > 1024 || shared > (it == st().shared_limit.end() ? SHARED : (size_t)it->second)) { *out = 0; return cudaSuccess; }
    const int by_threads = 2048 / ((threads + 31) / 32 * 32), by_shared = (int)(SHARED_SM / (shared + 1024));
    *out = by_threads < by_shared ? by_threads : by_shared;
    return cudaSuccess;
}

}  // namespace kv_emulate
