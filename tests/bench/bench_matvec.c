/* bench_matvec.c -- a token's weight reads: every matrix of a model once by kv_matvec, against a plain read of as many bytes.
 *
 *   make && cc -O2 -std=c11 -D_GNU_SOURCE -Icore -Ibuild/release -o build/bench_matvec tests/bench/bench_matvec.c $(find build/release/core -name '*.o') \
 *       $(pkg-config --libs openblas libcjson libpcre2-8 libedit) -lm -ldl -pthread && build/bench_matvec MODEL.gguf [threads] [level]
 *
 * Prints milliseconds and GB/s in all and by type: the median of repeats over the file, which no cache but a big L3 holds. */
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

enum { REPEATS = 25, TASK_ROWS = 64 };
typedef struct { const kv_weight *w; const kv_act *a; float *y; } job;

static void task(void *ctx, int t, int thread)
{
    (void)thread;
    const job *j = ctx;
    kv_matvec(j->w, j->a, (int64_t)t * TASK_ROWS, kv_min64((int64_t)(t + 1) * TASK_ROWS, j->w->n_out), j->y);
}

static int by_value(const void *a, const void *b) { const double x = *(const double *)a, y = *(const double *)b; return (x > y) - (x < y); }

int main(int argc, char **argv)
{
    kv_gguf *g;
    if (argc < 2 || kv_gguf_open(&g, argv[1]) < 0) {
        printf("%s\n", argc < 2 ? "usage: bench_matvec MODEL.gguf [threads] [level]" : kv_last_error());
        return 1;
    }
    if (argc > 2) kv_set_threads(atoi(argv[2]));
    if (argc > 3) kv_cpu_limit(atoi(argv[3]));
    static kv_weight w[4096];
    int n = 0;
    int64_t widest = 1, tallest = 1;
    for (int i = 0; i < kv_gguf_n_tensors(g) && n < 4096; i++) {
        const kv_gguf_tensor *const t = kv_gguf_tensor_at(g, i);
        int block, bytes;
        if (t->n_dims != 2 || !kv_weight_block(t->type, &block, &bytes)) continue;
        w[n++] = (kv_weight){ t->type, t->dim[0], t->dim[1], (size_t)(t->dim[0] / block) * (size_t)bytes, t->data, NULL };
        widest = kv_max64(widest, t->dim[0]);
        tallest = kv_max64(tallest, t->dim[1]);
    }
    float *const x = kv_alloc((size_t)widest * 4), *const y = kv_alloc((size_t)tallest * 4);
    kv_act a = { 0 };
    for (int64_t i = 0; i < widest; i++) x[i] = (float)(i * 7919 % 997) / 500 - 1;
    kv_act_reserve(&a, widest);
    static double total[REPEATS], part[64][REPEATS], bytes[64], set[REPEATS];
    for (int r = -1; r < REPEATS; r++) {                      /* the first pass maps the pages */
        double sum = 0, by[64] = { 0 }, setting = 0;
        for (int i = 0; i < n; i++) {
            const double t0 = kv_now();
            kv_act_set(&a, x, w[i].n_in);
            const double t1 = kv_now();
            job j = { &w[i], &a, y };
            kv_parallel((int)((w[i].n_out + TASK_ROWS - 1) / TASK_ROWS), task, &j);
            const double t = kv_now() - t1;
            setting += t1 - t0;
            sum += t;
            by[w[i].type] += t;
            if (r < 0) bytes[w[i].type] += (double)w[i].row_bytes * (double)w[i].n_out;
        }
        for (int k = 0; r >= 0 && k < 64; k++) part[k][r] = by[k];
        if (r >= 0) {
            total[r] = sum;
            set[r] = setting;
        }
    }
    double all = 0, read_rate = 0;
    for (int k = 0; k < 64; k++) all += bytes[k];
    kv_bench_read(all / 1048576, kv_threads(), &read_rate);
    qsort(total, REPEATS, sizeof *total, by_value);
    qsort(set, REPEATS, sizeof *set, by_value);
    printf("%d threads, level %d: %.1f MB in %.2f ms, %.1f GB/s; plain read %.1f GB/s; activations %.2f ms\n", kv_threads(), kv_cpu_simd(), all / 1e6, total[REPEATS / 2] * 1e3,
           all / total[REPEATS / 2] / 1e9, read_rate, set[REPEATS / 2] * 1e3);
    for (int k = 0; k < 64; k++)
        if (bytes[k] > 0) {
            qsort(part[k], REPEATS, sizeof *part[k], by_value);
            printf("  %-5s %7.1f MB %7.3f ms %6.1f GB/s\n", kv_weight_type_name(k), bytes[k] / 1e6, part[k][REPEATS / 2] * 1e3, bytes[k] / part[k][REPEATS / 2] / 1e9);
        }
    kv_act_free(&a);
    kv_free(x);
    kv_free(y);
    kv_gguf_close(g);
    return 0;
}
