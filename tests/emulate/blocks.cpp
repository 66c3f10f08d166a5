// blocks.cpp -- runs the blocks of a grid: fibers, collectives, OS threads.
//
// A fiber starts when it is first chosen and keeps its stack until its thread returns; a thread that never waits runs through on
// the stack that the one before it left.  `next` chooses who goes on: a ready lane of the same warp, else of another warp.
#include "blocks.h"
#include "bulk.h"
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define KV_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define KV_ASAN 0
#endif

// Saves what a call must keep, changes stacks.  The floating-point control words are the same everywhere.
extern "C" void kv_switch_stack(void **from, void *to);
asm(".text\n.hidden kv_switch_stack\n.globl kv_switch_stack\n.type kv_switch_stack,@function\n.p2align 4\n"
    "kv_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size kv_switch_stack,.-kv_switch_stack\n");

namespace kv_emulate {

__thread thread *self;
__thread int last_error;

namespace {

constexpr int    MAX_THREADS = 1024;
constexpr size_t STACK = (KV_ASAN ? 512 : 128) << 10, GUARD = 4096;

struct copy { void *to; const void *from; int n; };
struct bulk { void *to; const void *from; int n; mbarrier *barrier; };

struct machine;
struct fiber : thread {
    machine *m;
    int   id;
    void *sp;
    char *stack;                // null: not started
    const collective *waits;    // in the warp; null: in no warp collective
    uint32_t mask;
    void *payload;
    const mbarrier *polls;      // the bulk copies' barrier that it waits for, and the parity
    uint32_t parity;
    std::vector<copy> copies;   // asynchronous copies in order; a null `to` ends a group
    void *fake_stack;           // ASan's
};

struct warp { uint32_t living, ready, arrived; };      // arrived: in a collective of the warp

struct machine {                // an OS thread that runs blocks
    fiber fibers[MAX_THREADS];
    warp  warps[MAX_THREADS / 32];
    std::vector<char *> stacks;
    std::vector<bulk> bulks;    // on their way
    int    pollers;
    thread **self;              // where this OS thread keeps it: a look-up costs a call
    int    order;
    void  *home;                // the stack that starts blocks
    void  *home_fake;
    const void *home_bottom;
    size_t home_size;
    int    n, n_warps, living, at_barrier, barrier_what, votes, verdict;
    uint64_t random;
    char  *dynamic;
    char  *statics;             // __shared__ variables of this module, this OS thread's: its uninitialized thread-local memory
    size_t statics_size;
};
__thread machine *here;

struct grid_run {
    const char *name;
    dim3 grid, block;
    size_t shared, n_blocks;
    const std::function<void()> *one_thread;
    std::atomic<size_t> next;
};
grid_run *grid;

enum { FORWARD, REVERSE, RANDOM };
int order_of_environment()
{
    const char *e = getenv("KV_EMULATE_ORDER");
    if (!e || !strcmp(e, "forward")) return FORWARD;
    if (!strcmp(e, "reverse")) return REVERSE;
    if (!strcmp(e, "random")) return RANDOM;
    fail("KV_EMULATE_ORDER=%s is not forward, reverse or random", e);
}

uint32_t dice(machine *m) { return (uint32_t)((m->random = m->random * 6364136223846793005u + 1442695040888963407u) >> 33); }

int chosen(machine *m, uint32_t set)
{
    switch (m->order) {
    case FORWARD: return __builtin_ctz(set);
    case REVERSE: return 31 - __builtin_clz(set);
    }
    for (int skip = (int)(dice(m) % (unsigned)__builtin_popcount(set)); skip > 0; skip--) set &= set - 1;
    return __builtin_ctz(set);
}

const char *lanes(uint32_t set, char *out)
{
    char *p = out;
    *p = 0;
    for (int i = 0; i < 32; i++)
        if (set >> i & 1) {
            int j = i;
            while (j < 31 && set >> (j + 1) & 1) j++;
            p += sprintf(p, i == j ? "%s%d" : "%s%d-%d", p == out ? "" : " ", i, j);
            i = j;
        }
    return out;
}

[[noreturn]] void deadlock(const machine *m)
{
    char set[128];
    fprintf(stderr, "emulate: %s: block (%u, %u, %u): no thread can go on\n", grid->name, self->block.x, self->block.y, self->block.z);
    for (int i = 0; i < m->n; i++) {
        const fiber &f = m->fibers[i];
        const warp &w = m->warps[i / 32];
        if (!(w.living >> i % 32 & 1)) continue;
        const fiber &p = m->fibers[i ? i - 1 : 0];
        const bool again = i % 32 && w.living >> (i % 32 - 1) & 1 && p.waits == f.waits && p.mask == f.mask && p.polls == f.polls;
        if (again) continue;
        int last = i;
        while (last + 1 < m->n && (last + 1) % 32 && w.living >> (last + 1) % 32 & 1 && m->fibers[last + 1].waits == f.waits && m->fibers[last + 1].mask == f.mask && m->fibers[last + 1].polls == f.polls) last++;
        fprintf(stderr, "  threads %d-%d (warp %d, lanes %d-%d) ", i, last, i / 32, i % 32, last % 32);
        if (f.waits) fprintf(stderr, "wait in %s of mask 0x%08x", f.waits->name, f.mask);
        else if (f.polls) fprintf(stderr, "wait for parity %u of a barrier in phase %u with %d of %d arrivals and %u bytes missing", f.parity, f.polls->phase, f.polls->pending, f.polls->count, f.polls->bytes);
        else fprintf(stderr, "wait in __syncthreads (%d of %d threads are there)", m->at_barrier, m->living);
        if (f.waits) {
            uint32_t there = 0;
            for (int j = 0; j < 32; j++) if (w.arrived >> j & 1 && m->fibers[i / 32 * 32 + j].waits == f.waits && m->fibers[i / 32 * 32 + j].mask == f.mask) there |= 1u << j;
            fprintf(stderr, " for lanes %s", lanes(f.mask & w.living & ~there, set));
        }
        fprintf(stderr, "\n");
    }
    abort();
}

// The next fiber that can go on, or null: all are done.
fiber *next(machine *m, int warp_now)
{
    const int mode = m->order;
    if (mode != RANDOM && m->warps[warp_now].ready) return &m->fibers[warp_now * 32 + chosen(m, m->warps[warp_now].ready)];
    const int n = m->n_warps, start = mode == RANDOM ? (int)(dice(m) % (unsigned)n) : 0;
    for (int i = 0; i < n; i++) {
        const int w = mode == REVERSE ? n - 1 - i : (start + i) % n;
        if (m->warps[w].ready) return &m->fibers[w * 32 + chosen(m, m->warps[w].ready)];
    }
    if (m->living) deadlock(m);
    return nullptr;
}

char *take_stack(machine *m)
{
    if (!m->stacks.empty()) {
        char *s = m->stacks.back();
        m->stacks.pop_back();
#if KV_ASAN
        __asan_unpoison_memory_region(s + GUARD, STACK);    // of frames that were left for good
#endif
        return s;
    }
    char *s = (char *)mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s == MAP_FAILED || mprotect(s, GUARD, PROT_NONE) != 0) fail("no memory for a thread's stack");
    return s;
}

void run_thread();

// Leaves the running fiber (gone: for good; null: home) for another.
void go(machine *m, fiber *from, fiber *to, bool gone)
{
    *m->self = to;
    void **save = from ? &from->sp : &m->home, *next_sp = to ? to->sp : m->home;
    if (to && !to->stack) {
        // Stacks' tops lie in different cache sets.
        to->stack = take_stack(m);
        char *top = to->stack + GUARD + STACK - (size_t)(to->id % 32) * 320;
        void **p = (void **)((uintptr_t)top & ~(uintptr_t)63);
        *--p = nullptr;                             // the return address of run_thread: none
        *--p = (void *)run_thread;
        for (int i = 0; i < 6; i++) *--p = nullptr;
        next_sp = p;
    }
#if KV_ASAN
    void **fake = from ? &from->fake_stack : &m->home_fake;
    __sanitizer_start_switch_fiber(gone ? nullptr : fake, to ? (const void *)(to->stack + GUARD) : m->home_bottom, to ? STACK : m->home_size);
#else
    (void)gone;
#endif
    kv_switch_stack(save, next_sp);
#if KV_ASAN
    __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
}

// Completes the collective of `f` if every living lane of its mask is in it.
void try_complete(fiber *f)
{
    machine *const m = f->m;
    warp &w = m->warps[f->id / 32];
    const uint32_t members = f->mask & w.living;
    if (members & ~w.arrived) return;
    fiber *base = &m->fibers[f->id / 32 * 32];
    void *payload[32] = {};
    for (uint32_t s = members; s; s &= s - 1) {
        const int i = __builtin_ctz(s);
        if (base[i].waits != f->waits || base[i].mask != f->mask) return;
        payload[i] = base[i].payload;
    }
    f->waits->complete(payload, members);
    for (uint32_t s = members; s; s &= s - 1) base[__builtin_ctz(s)].waits = nullptr;
    w.arrived &= ~members;
    w.ready |= members;
}

void open_barrier(machine *m)
{
    m->verdict = m->barrier_what == AND ? m->votes == m->living : m->barrier_what == OR ? m->votes > 0 : m->votes;
    m->at_barrier = m->votes = 0;
    for (int i = 0; i < m->n_warps; i++) m->warps[i].ready = m->warps[i].living & ~m->warps[i].arrived;
}

void perform(fiber *f, int open_groups)
{
    int groups = 0;
    for (const copy &c : f->copies) groups += !c.to;
    size_t i = 0;
    for (; i < f->copies.size() && groups > open_groups; i++) {
        const copy &c = f->copies[i];
        if (c.to) memcpy(c.to, c.from, (size_t)c.n);
        else groups--;
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + (ptrdiff_t)i);
}

// On a fresh stack: the thread that was chosen, then, on the same stack, every other that has not begun.
void run_thread()
{
    machine *const m = here;
#if KV_ASAN
    const bool first = !m->home_bottom;
    __sanitizer_finish_switch_fiber(nullptr, first ? &m->home_bottom : nullptr, first ? &m->home_size : nullptr);
#endif
    for (;;) {
        (*grid->one_thread)();
        fiber *const f = (fiber *)*m->self;
        if (!f->copies.empty()) copy_commit(), perform(f, 0);
        warp &w = m->warps[f->id / 32];
        const uint32_t bit = 1u << f->lane;
        w.living &= ~bit;
        w.ready &= ~bit;
        m->living--;
        for (uint32_t s = w.arrived; s; s &= s - 1) {       // who waited for this thread alone
            const int i = __builtin_ctz(s);
            if (w.arrived >> i & 1) try_complete(&m->fibers[f->id / 32 * 32 + i]);
        }
        if (m->living && m->at_barrier == m->living) open_barrier(m);
        fiber *const to = next(m, f->id / 32);
        if (!to || to->stack) {
            m->stacks.push_back(f->stack);                  // nobody takes it before this fiber has left it
            go(m, f, to, true);
        }
        to->stack = f->stack;
        *m->self = to;
    }
}

void run_block(machine *m, size_t index)
{
    const dim3 g = grid->grid, b = grid->block;
    m->n = (int)(b.x * b.y * b.z);
    m->n_warps = (m->n + 31) / 32;
    m->living = m->n;
    m->at_barrier = m->votes = m->pollers = 0;
    m->bulks.clear();
    m->random = index * 2 + 1;
    if (grid->shared) memset(m->dynamic, 0xFF, grid->shared);
    const uint3 at = { (unsigned)(index % g.x), (unsigned)(index / g.x % g.y), (unsigned)(index / g.x / g.y) };
    for (int i = 0; i < m->n_warps; i++) {
        const int here = m->n - i * 32;
        m->warps[i].living = m->warps[i].ready = here >= 32 ? ~0u : (1u << here) - 1;
        m->warps[i].arrived = 0;
    }
    for (int i = 0; i < m->n; i++) {
        fiber &f = m->fibers[i];
        f.index = { (unsigned)i % b.x, (unsigned)i / b.x % b.y, (unsigned)i / b.x / b.y };
        f.block = at;
        f.block_dim = b;
        f.grid_dim = g;
        f.lane = i % 32;
        f.dynamic = m->dynamic;
        f.m = m;
        f.id = i;
        f.stack = nullptr;
        f.waits = nullptr;
        f.polls = nullptr;
        f.copies.clear();
    }
    go(m, nullptr, next(m, m->order == REVERSE ? m->n_warps - 1 : 0), false);
    if (!m->bulks.empty()) fail("block (%u, %u, %u) ends before %zu bulk copies to its shared memory have", at.x, at.y, at.z, m->bulks.size());
}

// Static shared memory begins as poison: the module's thread-local zeros hold nothing else but three variables of the emulator.
int find_statics(dl_phdr_info *module, size_t, void *machine_)
{
    machine *const m = (machine *)machine_;
    if (!module->dlpi_tls_data) return 0;
    for (int i = 0; i < module->dlpi_phnum; i++) {
        const ElfW(Phdr) &h = module->dlpi_phdr[i];
        char *start = (char *)module->dlpi_tls_data;
        if (h.p_type != PT_TLS || (char *)&self < start || (char *)&self >= start + h.p_memsz) continue;
        m->statics = start + h.p_filesz;
        m->statics_size = h.p_memsz - h.p_filesz;
        return 1;
    }
    return 0;
}
void poison_statics()
{
    machine *const m = here;
    thread *const keep_self = self;
    const int keep_error = last_error;
    memset(m->statics, 0xFF, m->statics_size);
    asm volatile("" : : "r"(&here), "r"(&self), "r"(&last_error) : "memory");     // g++ does not know that these lay there
    here = m;
    self = keep_self;
    last_error = keep_error;
}

void run_blocks()
{
    if (!here) {
        here = new machine();
        here->self = &self;
        here->order = order_of_environment();
        dl_iterate_phdr(find_statics, here);
        if (!here->statics_size) fail("the threads' own memory of this module is not found");
    }
    machine *const m = here;
    poison_statics();
    const size_t room = grid->shared ? grid->shared : 1;
    if (posix_memalign((void **)&m->dynamic, 128, room) != 0) fail("no memory for %zu bytes of shared memory", room);
    for (size_t i; (i = grid->next++) < grid->n_blocks;) run_block(m, m->order == REVERSE ? grid->n_blocks - 1 - i : i);
    free(m->dynamic);
}

// Workers wait for grids for the rest of the process; a forked child has none and starts its own.
struct workers {
    std::mutex lock;
    std::condition_variable start, done;
    int n = 0, running = 0;
    uint64_t generation = 0;
    void work()
    {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> hold(lock);
        for (;;) {
            start.wait(hold, [&] { return generation != seen; });
            seen = generation;
            hold.unlock();
            enter_device();
            run_blocks();
            hold.lock();
            if (--running == 0) done.notify_one();
        }
    }
};
workers *pool;

int processors()
{
    static const int n = [] {
        if (const char *e = getenv("KV_EMULATE_THREADS")) return atoi(e) < 1 ? 1 : atoi(e) > 64 ? 64 : atoi(e);
        cpu_set_t set;
        return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    }();
    return n;
}

}  // namespace

[[noreturn]] void fail(const char *format, ...)
{
    va_list a;
    va_start(a, format);
    fprintf(stderr, "emulate: %s: ", grid ? grid->name : "outside a kernel");
    if (self) fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", self->block.x, self->block.y, self->block.z, self->index.x, self->index.y, self->index.z);
    vfprintf(stderr, format, a);
    fprintf(stderr, "\n");
    va_end(a);
    abort();
}

void in_warp(uint32_t mask, const collective *what, void *payload)
{
    fiber *const f = (fiber *)self;
    machine *const m = f->m;
    warp &w = m->warps[f->id / 32];
    if (!(mask >> f->lane & 1)) fail("%s of mask 0x%08x is called by lane %d, which is not in it", what->name, mask, f->lane);
    f->waits = what;
    f->mask = mask;
    f->payload = payload;
    w.arrived |= 1u << f->lane;
    w.ready &= ~(1u << f->lane);
    try_complete(f);
    if (!f->waits && m->order == FORWARD) return;        // the last to come goes on at once
    fiber *const to = next(m, f->id / 32);
    if (to != f) go(m, f, to, false);
}

int in_block(int what, int predicate)
{
    fiber *const f = (fiber *)self;
    machine *const m = f->m;
    if (m->at_barrier && m->barrier_what != what) fail("__syncthreads of two kinds meet");
    m->barrier_what = what;
    m->votes += predicate != 0;
    m->warps[f->id / 32].ready &= ~(1u << f->lane);
    if (++m->at_barrier == m->living) open_barrier(m);
    fiber *const to = next(m, f->id / 32);
    if (to != f) go(m, f, to, false);
    return m->verdict;
}

static void complete_shuffle(void *const payload[32], uint32_t members)
{
    for (uint32_t s = members; s; s &= s - 1) {
        const int i = __builtin_ctz(s);
        word *w = (word *)payload[i];
        if (w->from < 0) w->result = w->value;
        else if (members >> w->from & 1) w->result = ((word *)payload[w->from])->value;
    }
}
static void complete_vote(void *const payload[32], uint32_t members)
{
    uint32_t r = 0;
    for (uint32_t s = members; s; s &= s - 1) r |= ((ballot *)payload[__builtin_ctz(s)])->predicate << __builtin_ctz(s);
    for (uint32_t s = members; s; s &= s - 1) ((ballot *)payload[__builtin_ctz(s)])->result = r;
}
static void complete_match(void *const payload[32], uint32_t members)
{
    for (uint32_t s = members; s; s &= s - 1) {
        word *w = (word *)payload[__builtin_ctz(s)];
        w->result = 0;
        for (uint32_t t = members; t; t &= t - 1) w->result |= (uint64_t)(((word *)payload[__builtin_ctz(t)])->value == w->value) << __builtin_ctz(t);
    }
}
const collective shuffle = { "a shuffle", complete_shuffle }, vote = { "a vote", complete_vote }, match = { "__match_any_sync", complete_match },
    barrier = { "__syncwarp", [](void *const *, uint32_t) {} };

// The destination is poison until the thread that copies has waited: it may change at any time in between.
void copy_async(void *shared, const void *global, int n_bytes)
{
    if ((uintptr_t)shared % (unsigned)n_bytes || (uintptr_t)global % (unsigned)n_bytes) fail("an asynchronous copy of %d bytes from %p to %p is not aligned", n_bytes, global, shared);
    memset(shared, 0xFF, (size_t)n_bytes);
    ((fiber *)self)->copies.push_back({ shared, global, n_bytes });
}
void copy_commit() { ((fiber *)self)->copies.push_back({ nullptr, nullptr, 0 }); }
void copy_wait(int open_groups) { perform((fiber *)self, open_groups); }

// Ends the phase of a barrier that has all, and wakes who waited for it.
static void turn(machine *m, mbarrier *b)
{
    if (b->pending || b->bytes) return;
    b->phase ^= 1u;
    b->pending = b->count;
    for (int i = 0; m->pollers && i < m->n; i++) {
        fiber &f = m->fibers[i];
        if (f.polls != b || f.parity == b->phase) continue;
        f.polls = nullptr;
        m->pollers--;
        m->warps[i / 32].ready |= 1u << i % 32;
    }
}
static void land(machine *m, mbarrier *b)
{
    size_t kept = 0;
    for (size_t i = 0; i < m->bulks.size(); i++) {
        const bulk c = m->bulks[i];
        if (c.barrier != b) {
            m->bulks[kept++] = c;
            continue;
        }
        memcpy(c.to, c.from, (size_t)c.n);
        b->bytes -= (uint32_t)c.n;
    }
    const bool any = kept < m->bulks.size();
    m->bulks.resize(kept);
    if (any) turn(m, b);
}
static mbarrier *barrier_at(uint64_t *p)
{
    mbarrier *const b = (mbarrier *)p;
    if ((uintptr_t)p % 8 || b->count == 0xFFFF) fail("the barrier of bulk copies at %p was not begun", (void *)p);
    return b;
}
void bulk_init(uint64_t *p, int count)
{
    if (count < 1 || count >= 0xFFFF) fail("a barrier of %d arrivals", count);
    const mbarrier b = { (uint16_t)count, (uint16_t)count, 0, 0 };
    memcpy(p, &b, sizeof b);
}
void bulk_arrive(uint64_t *p, int announced_bytes)
{
    mbarrier *const b = barrier_at(p);
    machine *const m = ((fiber *)self)->m;
    if (!b->pending) land(m, b);
    if (!b->pending) fail("more than %d arrivals in a phase of a barrier, %u bytes missing", b->count, b->bytes);
    b->pending--;
    b->bytes += (uint32_t)announced_bytes;
    if (announced_bytes == 0) {
        turn(m, b);
        if (m->pollers) land(m, b);
    }
}
void bulk_copy(void *shared, const void *global, int n, uint64_t *p)
{
    mbarrier *const b = barrier_at(p);
    machine *const m = ((fiber *)self)->m;
    if (n < 16 || n % 16 || (uintptr_t)shared % 16 || (uintptr_t)global % 16) fail("a bulk copy of %d bytes from %p to %p: sizes and places are multiples of 16", n, global, shared);
    memset(shared, 0xFF, (size_t)n);
    m->bulks.push_back({ shared, global, n, b });
    if (m->pollers && !b->pending) land(m, b);
}
void bulk_wait(uint64_t *p, uint32_t parity)
{
    fiber *const f = (fiber *)self;
    machine *const m = f->m;
    mbarrier *const b = barrier_at(p);
    land(m, b);
    if (b->phase != (parity & 1)) return;
    f->polls = b;
    f->parity = parity & 1;
    m->pollers++;
    m->warps[f->id / 32].ready &= ~(1u << f->lane);
    go(m, f, next(m, f->id / 32), false);
}

void run_grid(const char *name, dim3 g, dim3 block, size_t shared, const std::function<void()> &one_thread)
{
    grid_run run = { name, g, block, shared, (size_t)g.x * g.y * g.z, &one_thread, { 0 } };
    grid = &run;
    const size_t threads = run.n_blocks * block.x * block.y * block.z;
    int helpers = (int)(run.n_blocks < (size_t)processors() ? run.n_blocks : (size_t)processors()) - 1;
    if (threads < 512) helpers = 0;
    if (helpers) {
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        pthread_once(&once, [] { pthread_atfork(nullptr, nullptr, [] { pool = nullptr; }); });
        if (!pool) pool = new workers();
        std::unique_lock<std::mutex> hold(pool->lock);
        for (; pool->n < processors() - 1; pool->n++) std::thread([] { pool->work(); }).detach();
        pool->running = pool->n;
        pool->generation++;
        pool->start.notify_all();
        hold.unlock();
        run_blocks();
        hold.lock();
        pool->done.wait(hold, [] { return pool->running == 0; });
    } else {
        run_blocks();
    }
    grid = nullptr;
    self = nullptr;
}

}  // namespace kv_emulate

unsigned __activemask()
{
    using namespace kv_emulate;
    const fiber *const f = (fiber *)self;
    return f->m->warps[f->id / 32].ready;
}
