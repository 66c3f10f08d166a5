/* rng.h -- Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), inline
 * and dependency-free: also for kernels/.
 *
 * A counter-based generator is a function, not a state: any thread, device or language makes number i directly. */
#ifndef KV_RNG_H
#define KV_RNG_H
#include <stdint.h>
#if defined(__CUDACC__)
#define KV_RNG_FN static inline __host__ __device__
#else
#define KV_RNG_FN static inline
#endif

KV_RNG_FN void kv_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;                    /* Weyl steps: golden ratio and sqrt(3) - 1, times 2^32 */
        k1 += 0xBB67AE85u;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}
#endif
