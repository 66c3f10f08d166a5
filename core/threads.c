/* threads.c -- one pool for the whole library.
 *
 * Decode makes some 200 short parallel regions a token, so workers spin for a moment before they sleep, and the caller
 * works too.  Tasks are handed out by one atomic counter.  A region that starts inside another runs inline. */
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#include "internal.h"

enum {
    MAX_THREADS = 64,
    PATIENCE = 2000,                          /* pauses before the core is offered to others */
    SPIN = 4000                               /* pauses and offers before a worker sleeps: longer than the gap between two regions of a token */
};

static struct pool {
    pthread_mutex_t lock, user;               /* lock: sleeping; user: one region at a time */
    pthread_cond_t  wake;
    pthread_t       thread[MAX_THREADS];
    int             n_workers;                /* besides the caller */
    atomic_uint     generation;               /* of work: raised once per region */
    atomic_int      next, busy, quit, sleepers;
    int             n_tasks;
    kv_task_fn      fn;
    void           *ctx;
} pool = { .lock = PTHREAD_MUTEX_INITIALIZER, .user = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER };

static atomic_int wanted;                     /* 0: not decided */
static _Thread_local int inside;              /* 1 + this thread's index while it runs a task, else 0 */

static void relax(void) { __builtin_ia32_pause(); }

static void run_tasks(int thread)
{
    inside = thread + 1;
    for (int t; (t = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.n_tasks;) pool.fn(pool.ctx, t, thread);
    inside = 0;
}

static void *worker(void *arg)
{
    const int thread = (int)(intptr_t)arg;
    unsigned seen = 0;
    for (;;) {
        int spin = 0;
        while (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen) {
            if (++spin < PATIENCE) { relax(); continue; }
            if (spin < SPIN) { sched_yield(); continue; }
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load_explicit(&pool.generation, memory_order_acquire);
        if (atomic_load(&pool.quit)) return NULL;
        run_tasks(thread);
        atomic_fetch_sub_explicit(&pool.busy, 1, memory_order_release);
    }
}

static void publish(void)                     /* caller holds pool.user */
{
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void resize(int n_workers)             /* caller holds pool.user */
{
    if (n_workers == pool.n_workers) return;
    if (pool.n_workers) {
        atomic_store(&pool.quit, 1);
        publish();
        for (int i = 0; i < pool.n_workers; i++) pthread_join(pool.thread[i], NULL);
        atomic_store(&pool.quit, 0);
        atomic_store(&pool.generation, 0);
    }
    pool.n_workers = 0;
    for (int i = 0; i < n_workers; i++) {
        if (pthread_create(&pool.thread[i], NULL, worker, (void *)(intptr_t)(i + 1)) != 0) break;
        pool.n_workers++;
    }
}

/* A forked child has none of the workers: it starts its own when it needs them. */
static void after_fork(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_mutex_init(&pool.user, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.n_workers = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.generation, 0);
    inside = 0;
}

__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(NULL, NULL, after_fork); }

static int default_threads(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    const int n = CPU_COUNT(&set);
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

int kv_threads(void)
{
    int n = atomic_load(&wanted);
    if (n == 0) atomic_store(&wanted, n = default_threads());
    return n;
}

int kv_set_threads(int n)
{
    RETURN_ERROR_IF(n < 0 || n > MAX_THREADS, KV_E_ARG, "threads=%d is outside 0..%d", n, MAX_THREADS);
    atomic_store(&wanted, n ? n : default_threads());
    return KV_OK;
}

void kv_parallel(int n_tasks, kv_task_fn fn, void *ctx)
{
    const int n_threads = kv_threads();
    if (n_tasks <= 1 || n_threads == 1 || inside) {
        const int outer = inside, thread = outer ? outer - 1 : 0;
        inside = thread + 1;
        for (int t = 0; t < n_tasks; t++) fn(ctx, t, thread);
        inside = outer;
        return;
    }
    pthread_mutex_lock(&pool.user);
    resize(n_threads - 1);
    pool.fn = fn;
    pool.ctx = ctx;
    pool.n_tasks = n_tasks;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.busy, pool.n_workers, memory_order_relaxed);
    publish();
    run_tasks(0);
    for (int spin = 0; atomic_load_explicit(&pool.busy, memory_order_acquire);)
        if (++spin < PATIENCE) relax();
        else sched_yield();                   /* a worker lost its core to another process: do not keep this one from it */
    pthread_mutex_unlock(&pool.user);
}
