/* crc32c.c -- CRC-32C (Castagnoli polynomial 0x1edc6f41, reflected 0x82f63b78): what a page of a file is held against.
 *
 * Plain C takes a byte at a time from one table.  The processor's own instruction does 8 bytes in 3 cycles; three runs side
 * by side would hide that latency, but a page is read from memory once and 8 GB/s is not what a file waits for. */
#include <immintrin.h>
#include <pthread.h>
#include "entropy.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static uint32_t table[256];                   /* written once under `once` */

static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c >> 1 ^ (c & 1 ? 0x82f63b78u : 0);
        table[i] = c;
    }
}

static uint32_t crc_c(uint32_t c, const uint8_t *p, size_t n)
{
    pthread_once(&once, make_table);
    for (; n; n--) c = c >> 8 ^ table[(c ^ *p++) & 0xff];
    return c;
}

/* Every processor with AVX2 has SSE 4.2. */
__attribute__((target("sse4.2"))) static uint32_t crc_sse42(uint32_t c, const uint8_t *p, size_t n)
{
    uint64_t w = c;
    for (; n >= 8; p += 8, n -= 8) w = _mm_crc32_u64(w, kv_load_u64(p));
    c = (uint32_t)w;
    for (; n; n--) c = _mm_crc32_u8(c, *p++);
    return c;
}

uint32_t kv_crc32c(uint32_t crc, const void *data, size_t n)
{
    return ~(kv_cpu_simd() >= KV_SIMD_AVX2 ? crc_sse42 : crc_c)(~crc, data, n);
}
