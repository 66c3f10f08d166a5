/* sha256.c -- SHA-256 (FIPS 180-4), for naming models, texts and rows by their content. */
#include <errno.h>
#include <stdio.h>
#include "internal.h"

typedef struct sha256 { uint32_t h[8]; uint8_t block[64]; size_t fill; uint64_t n_bytes; } sha256;

/* First 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2). */
static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2 };

static uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void compress(uint32_t h[8], const uint8_t *p)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        const uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotr(a, 7) ^ rotr(a, 18) ^ a >> 3) + w[i - 7] + (rotr(b, 17) ^ rotr(b, 19) ^ b >> 10);
    }
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        const uint32_t e = s[4], a = s[0];
        const uint32_t t1 = s[7] + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + K[i] + w[i];
        const uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

static void begin(sha256 *c)
{
    /* Fractional parts of the square roots of the first 8 primes (5.3.3). */
    *c = (sha256){ .h = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 } };
}

static void update(sha256 *c, const uint8_t *p, size_t n)
{
    c->n_bytes += n;
    if (c->fill > 0) {
        const size_t take = n < 64 - c->fill ? n : 64 - c->fill;
        memcpy(c->block + c->fill, p, take);
        c->fill += take; p += take; n -= take;
        if (c->fill < 64) return;
        compress(c->h, c->block);
        c->fill = 0;
    }
    for (; n >= 64; p += 64, n -= 64) compress(c->h, p);
    if (n > 0) memcpy(c->block, p, n);
    c->fill = n;
}

static void finish(sha256 *c, char *hex65)
{
    const uint64_t bits = c->n_bytes * 8;
    uint8_t tail[72] = { 0x80 };                    /* 0x80, zeros, the length in bits big-endian, to a whole block */
    const size_t pad = (c->fill < 56 ? 56 : 120) - c->fill;
    for (int i = 0; i < 8; i++) tail[pad + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
    update(c, tail, pad + 8);
    for (int i = 0; i < 32; i++) snprintf(hex65 + 2 * i, 3, "%02x", (unsigned)(c->h[i / 4] >> (24 - 8 * (i % 4)) & 0xff));
}

/* 64 hex digits and a NUL into hex65. */
int kv_sha256(const void *data, double n_bytes, char *hex65)
{
    RETURN_ERROR_IF(!hex65 || (!data && n_bytes != 0), KV_E_ARG, "sha256: %s is NULL", hex65 ? "data" : "hex65");
    RETURN_ERROR_IF(!(n_bytes >= 0 && n_bytes <= 9007199254740992.0), KV_E_ARG, "sha256: n_bytes=%g is outside 0..2^53", n_bytes);
    sha256 c;
    begin(&c);
    if (n_bytes > 0) update(&c, data, (size_t)n_bytes);
    finish(&c, hex65);
    return KV_OK;
}

int kv_sha256_file(const char *path, char *hex65)
{
    enum { CHUNK = 1 << 16 };
    RETURN_ERROR_IF(!path || !hex65, KV_E_ARG, "sha256: %s is NULL", path ? "hex65" : "path");
    int status = KV_OK;
    sha256 c;
    size_t n;
    uint8_t *buf = NULL;
    FILE *const f = fopen(path, "rb");
    FAIL_IF(!f, KV_E_IO, "file '%s': %s", path, strerror(errno));
    FAIL_IF(!(buf = kv_alloc(CHUNK)), KV_E_NOMEM, "file '%s': out of memory", path);
    begin(&c);
    while ((n = fread(buf, 1, CHUNK, f)) > 0) update(&c, buf, n);
    FAIL_IF(ferror(f), KV_E_IO, "file '%s': %s", path, strerror(errno));
    finish(&c, hex65);
fail:
    if (f) fclose(f);
    kv_free(buf);
    return status;
}
