/* entropy.h -- lossless stages over encoded bytes: raw, zlib, lzma, rANS, and the smallest of them.
 *
 * A stage never makes bytes larger: what it cannot shrink stays raw, and kv_stage_encode says so in what it returns.  Which
 * stage was used is kept by the caller, beside the length; a stage's bytes carry no tag of their own.
 *
 * rANS works on symbols of one byte with static tables.  Tables made once, from calibration or from a whole section, leave
 * every block of symbols its own random access at no cost but the lanes' states.  Several tables form a bank: symbol i of a
 * block is coded with table `cls[i % period]`, so that each component, head or width class may have a table of its own. */
#ifndef KV_ENTROPY_H
#define KV_ENTROPY_H
#include "internal.h"

/* ---- stages (entropy.c) */
enum { KV_STAGE_RAW = 0, KV_STAGE_ZLIB = 1, KV_STAGE_LZMA = 2, KV_STAGE_RANS = 3,
       KV_STAGE_SMALLEST = 15 /* a wish: never what bytes were stored as */ };
enum { KV_LEVEL_DEFAULT = -1 };
const char *kv_stage_name(int stage);                     /* "zlib"; NULL if unknown */
/* level: zlib 1..9, lzma 0..9, KV_LEVEL_DEFAULT for 6; raw and rans have none. */
int  kv_stage_check(int stage, int level);
/* Returns the stage used (0..3), or an error; *n_out bytes in dst, at most n.  cap is n at least.  n = 0 is raw. */
int  kv_stage_encode(int stage, int level, const void *src, size_t n, void *dst, size_t cap, size_t *n_out);
/* Exactly n_dst bytes come out of all n of src, or it is KV_E_CORRUPT; any bytes are safe. */
int  kv_stage_decode(int stage, const void *src, size_t n, void *dst, size_t n_dst);

/* ---- rANS (rans.c) */
enum { KV_RANS_BITS = 14, KV_RANS_LANES = 32, KV_RANS_TABLES = 256 };
typedef struct kv_rans kv_rans;                           /* a bank of tables, immutable: threads share it */
/* count: [n_tables][256], how often each symbol comes.  What never came (or nearly so) can be coded too, at about 3 bytes. */
int  kv_rans_new(kv_rans **out, const uint32_t *count, int n_tables);
void kv_rans_free(kv_rans *r);
int  kv_rans_tables(const kv_rans *r);
double kv_rans_cost(const kv_rans *r, int table, int symbol);  /* bits that the symbol takes */
/* The bank as bytes: kv_rans_write returns how many, and writes them when they fit cap. */
size_t kv_rans_write(const kv_rans *r, uint8_t *dst, size_t cap);
int  kv_rans_read(kv_rans **out, const uint8_t *src, size_t n, size_t *used);
/* A block of n symbols.  Returns its bytes, or 0 when they do not fit cap: keep it raw.
 * cls: [period] tables by position, each below kv_rans_tables(); NULL with period 1: table 0. */
size_t kv_rans_encode(const kv_rans *r, const uint8_t *cls, size_t period, const uint8_t *src, size_t n, uint8_t *dst, size_t cap);
/* Exactly n_dst symbols out of all n bytes, or KV_E_CORRUPT; symbols that cost nothing (a table of one) are not counted. */
int  kv_rans_decode(const kv_rans *r, const uint8_t *cls, size_t period, const uint8_t *src, size_t n, uint8_t *dst, size_t n_dst);

/* ---- CRC-32C (crc32c.c): Castagnoli, reflected, as iSCSI and ext4 use it; kv_crc32c(0, "123456789", 9) = 0xe3069283.
 * A running sum goes on where it stopped: kv_crc32c(kv_crc32c(0, a, n), b, m). */
uint32_t kv_crc32c(uint32_t crc, const void *data, size_t n);
#endif
