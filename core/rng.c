/* rng.c -- the library's random numbers, defined so that C, Lua and CUDA make the same ones.
 *
 *   key     = { seed mod 2^32, floor(seed / 2^32) }
 *   block b = philox({ b mod 2^32, floor(b / 2^32), stream, 0 }, key), four 32-bit words
 *   x[i]    = word i mod 4 of block floor(i / 4)
 *
 * kv_rng_u32     block `counter` (below 2^32) as it is.
 * kv_rng_uniform out[j] = U(start + j) with U(i) = (x[i] + 0.5) / 2^32, computed in double and rounded once to float;
 *                what would round up to 1 becomes 1 - 2^-24, so the interval is open.
 * kv_rng_normal  out[j] = N(start + j) by Box-Muller on the pair U(2i), U(2i+1), kept in double until the end:
 *                N(2i) = sqrt(-2 ln U(2i)) cos(2 pi U(2i+1)),  N(2i+1) = sqrt(-2 ln U(2i)) sin(2 pi U(2i+1)).
 *                A block holds two such pairs.  The words are exact everywhere; N agrees to the rounding of the math
 *                library's log, cos and sin, which in double stays below one float ulp.
 * Any start is fine: a sequence cut into pieces anywhere gives the same numbers. */
#include <math.h>
#include "internal.h"
#include "rng.h"

#define MAX_INT 9007199254740992.0            /* 2^53: every integer up to here is a double */

static void block(const uint32_t key[2], uint32_t stream, uint64_t b, uint32_t out[4])
{
    const uint32_t counter[4] = { (uint32_t)b, (uint32_t)(b >> 32), stream, 0 };
    kv_philox(counter, key, out);
}

void kv_rng_u32(uint32_t seed_lo, uint32_t seed_hi, uint32_t stream, uint32_t counter, uint32_t *out4)
{
    const uint32_t key[2] = { seed_lo, seed_hi };
    block(key, stream, counter, out4);
}

static int check(const char *what, double seed, double start, int n, const float *out)
{
    RETURN_ERROR_IF(!(seed >= 0 && seed <= MAX_INT) || seed != floor(seed), KV_E_ARG, "%s: seed=%.17g is not an integer in 0..2^53", what, seed);
    RETURN_ERROR_IF(!(start >= 0 && start <= MAX_INT - 4294967296.0) || start != floor(start), KV_E_ARG,
                    "%s: start=%.17g is not an integer in 0..2^53-2^32", what, start);
    RETURN_ERROR_IF(n < 0, KV_E_ARG, "%s: n=%d is negative", what, n);
    RETURN_ERROR_IF(n > 0 && !out, KV_E_ARG, "%s: out is NULL", what);
    return KV_OK;
}

static double unit(uint32_t x) { return ((double)x + 0.5) * 0x1p-32; }

int kv_rng_uniform(double seed, int stream, double start, int n, float *out)
{
    FORWARD_IF_ERROR(check("kv_rng_uniform", seed, start, n, out));
    const uint64_t s = (uint64_t)seed, first = (uint64_t)start;
    const uint32_t key[2] = { (uint32_t)s, (uint32_t)(s >> 32) };
    uint32_t x[4];
    for (int j = 0; j < n; j++) {
        const uint64_t i = first + (uint64_t)j;
        if (j == 0 || i % 4 == 0) block(key, (uint32_t)stream, i / 4, x);
        out[j] = fminf((float)unit(x[i % 4]), 0x1.fffffep-1f);
    }
    return KV_OK;
}

int kv_rng_normal(double seed, int stream, double start, int n, float *out)
{
    FORWARD_IF_ERROR(check("kv_rng_normal", seed, start, n, out));
    const uint64_t s = (uint64_t)seed, first = (uint64_t)start;
    const uint32_t key[2] = { (uint32_t)s, (uint32_t)(s >> 32) };
    uint32_t x[4];
    double r = 0, angle = 0;
    for (int j = 0; j < n; j++) {
        const uint64_t i = first + (uint64_t)j;
        if (j == 0 || i % 4 == 0) block(key, (uint32_t)stream, i / 4, x);
        if (j == 0 || i % 2 == 0) {
            const uint64_t pair = i % 4 / 2 * 2;
            r = sqrt(-2.0 * log(unit(x[pair])));
            angle = 6.283185307179586476925 * unit(x[pair + 1]);
        }
        out[j] = (float)(r * (i % 2 ? sin(angle) : cos(angle)));
    }
    return KV_OK;
}
