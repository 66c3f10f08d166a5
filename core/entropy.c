/* entropy.c -- the lossless stages behind one pair of calls.
 *
 *   raw     the bytes
 *   zlib    raw deflate (RFC 1951): no zlib header and no Adler-32, since pages carry a CRC-32C
 *   lzma    a raw LZMA2 stream, lc=0 lp=0 pb=0 (codes are not text), dictionary of the data's size
 *   rans    | bank of one table | block |       order-0 bytes; see rans.c
 *
 * The picker tries them all; where two are equally short, the one that is listed first. */
#include <lzma.h>
#include <zlib.h>
#include "entropy.h"

enum { LEVEL = 6 };
static const size_t MAX_BYTES = (size_t)1 << 30;          /* zlib counts in 32 bits */

static const char *const names[] = { "raw", "zlib", "lzma", "rans" };

const char *kv_stage_name(int stage)
{
    return stage == KV_STAGE_SMALLEST ? "smallest" : stage >= 0 && stage <= KV_STAGE_RANS ? names[stage] : NULL;
}

int kv_stage_check(int stage, int level)
{
    RETURN_ERROR_IF(!kv_stage_name(stage), KV_E_ARG, "stage %d is none of 0 (raw), 1 (zlib), 2 (lzma), 3 (rans), 15 (smallest)", stage);
    if (level == KV_LEVEL_DEFAULT) return KV_OK;
    const int lo = stage == KV_STAGE_LZMA ? 0 : 1;
    RETURN_ERROR_IF(stage == KV_STAGE_RAW || stage == KV_STAGE_RANS, KV_E_ARG, "stage '%s': level=%d, but it has no levels", kv_stage_name(stage), level);
    RETURN_ERROR_IF(level < lo || level > 9, KV_E_ARG, "stage '%s': level=%d is outside %d..9", kv_stage_name(stage), level, lo);
    return KV_OK;
}

/* Each of these returns KV_OK with *n_out 0 when the result does not fit cap. */

static int zlib_encode(int level, const uint8_t *src, size_t n, uint8_t *dst, size_t cap, size_t *n_out)
{
    z_stream z = { 0 };
    *n_out = 0;
    RETURN_ERROR_IF(deflateInit2(&z, level, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY) != Z_OK, KV_E_NOMEM, "zlib: out of memory");
    z.next_in = (Bytef *)(uintptr_t)src;
    z.avail_in = (uInt)n;
    z.next_out = dst;
    z.avail_out = (uInt)cap;
    if (deflate(&z, Z_FINISH) == Z_STREAM_END) *n_out = cap - z.avail_out;
    deflateEnd(&z);
    return KV_OK;
}

static int zlib_decode(const uint8_t *src, size_t n, uint8_t *dst, size_t n_dst)
{
    z_stream z = { 0 };
    uint8_t none;                                         /* zlib wants somewhere to point */
    RETURN_ERROR_IF(inflateInit2(&z, -15) != Z_OK, KV_E_NOMEM, "zlib: out of memory");
    z.next_in = (Bytef *)(uintptr_t)src;
    z.avail_in = (uInt)n;
    z.next_out = n_dst ? dst : &none;
    z.avail_out = (uInt)n_dst;
    const int code = inflate(&z, Z_FINISH);
    const bool whole = code == Z_STREAM_END && z.avail_in == 0 && z.avail_out == 0;
    inflateEnd(&z);
    RETURN_ERROR_IF(code == Z_MEM_ERROR, KV_E_NOMEM, "zlib: out of memory");
    RETURN_ERROR_IF(!whole, KV_E_CORRUPT, "zlib: %zu bytes do not decode to %zu", n, n_dst);
    return KV_OK;
}

/* The decoder needs a dictionary no longer than what it writes, so that nothing about it is stored. */
static void lzma_chain(lzma_options_lzma *o, lzma_filter *chain, size_t n)
{
    o->lc = o->lp = o->pb = 0;
    o->dict_size = (uint32_t)(n < LZMA_DICT_SIZE_MIN ? LZMA_DICT_SIZE_MIN : n);
    chain[0] = (lzma_filter){ LZMA_FILTER_LZMA2, o };
    chain[1] = (lzma_filter){ LZMA_VLI_UNKNOWN, NULL };
}

static int lzma_encode(int level, const uint8_t *src, size_t n, uint8_t *dst, size_t cap, size_t *n_out)
{
    lzma_options_lzma o;
    lzma_filter chain[2];
    *n_out = 0;
    RETURN_ERROR_IF(lzma_lzma_preset(&o, (uint32_t)level), KV_E_INTERNAL, "lzma: no preset %d", level);
    lzma_chain(&o, chain, n);
    size_t at = 0;
    const lzma_ret code = lzma_raw_buffer_encode(chain, NULL, src, n, dst, &at, cap);
    RETURN_ERROR_IF(code != LZMA_OK && code != LZMA_BUF_ERROR, code == LZMA_MEM_ERROR ? KV_E_NOMEM : KV_E_INTERNAL, "lzma: encoder says %d", (int)code);
    if (code == LZMA_OK) *n_out = at;
    return KV_OK;
}

static int lzma_decode(const uint8_t *src, size_t n, uint8_t *dst, size_t n_dst)
{
    lzma_options_lzma o = { 0 };
    lzma_filter chain[2];
    lzma_chain(&o, chain, n_dst);
    size_t in = 0, out = 0;
    const lzma_ret code = lzma_raw_buffer_decode(chain, NULL, src, &in, n, dst, &out, n_dst);
    RETURN_ERROR_IF(code == LZMA_MEM_ERROR, KV_E_NOMEM, "lzma: out of memory");
    RETURN_ERROR_IF(code != LZMA_OK || in != n || out != n_dst, KV_E_CORRUPT, "lzma: %zu bytes do not decode to %zu", n, n_dst);
    return KV_OK;
}

static int rans_encode(const uint8_t *src, size_t n, uint8_t *dst, size_t cap, size_t *n_out)
{
    uint32_t count[256] = { 0 };
    kv_rans *r;
    *n_out = 0;
    for (size_t i = 0; i < n; i++) count[src[i]]++;
    FORWARD_IF_ERROR(kv_rans_new(&r, count, 1));
    const size_t head = kv_rans_write(r, dst, cap), block = head < cap ? kv_rans_encode(r, NULL, 1, src, n, dst + head, cap - head) : 0;
    if (block) *n_out = head + block;
    kv_rans_free(r);
    return KV_OK;
}

static int rans_decode(const uint8_t *src, size_t n, uint8_t *dst, size_t n_dst)
{
    kv_rans *r;
    size_t used;
    FORWARD_IF_ERROR(kv_rans_read(&r, src, n, &used));
    const int status = kv_rans_decode(r, NULL, 1, src + used, n - used, dst, n_dst);
    kv_rans_free(r);
    return status;
}

static int encode(int stage, int level, const uint8_t *src, size_t n, uint8_t *dst, size_t cap, size_t *n_out)
{
    if (stage == KV_STAGE_ZLIB) return zlib_encode(level, src, n, dst, cap, n_out);
    if (stage == KV_STAGE_LZMA) return lzma_encode(level, src, n, dst, cap, n_out);
    return rans_encode(src, n, dst, cap, n_out);
}

int kv_stage_encode(int stage, int level, const void *src, size_t n, void *dst, size_t cap, size_t *n_out)
{
    RETURN_ERROR_IF(!n_out || (n && (!src || !dst)), KV_E_ARG, "stage: NULL argument");
    FORWARD_IF_ERROR(kv_stage_check(stage, level));
    RETURN_ERROR_IF(n > MAX_BYTES, KV_E_ARG, "stage '%s': %zu bytes at once, at most %zu", kv_stage_name(stage), n, MAX_BYTES);
    RETURN_ERROR_IF(cap < n, KV_E_ARG, "stage '%s': room for %zu bytes, %zu may be needed", kv_stage_name(stage), cap, n);
    if (level == KV_LEVEL_DEFAULT) level = LEVEL;
    int used = KV_STAGE_RAW;
    size_t best = n, got;
    uint8_t *trial = dst, *spare = NULL;
    if (stage == KV_STAGE_SMALLEST && n > 1 && !(spare = trial = kv_alloc(n))) return KV_E_NOMEM;
    for (int s = KV_STAGE_ZLIB; s <= KV_STAGE_RANS && n > 1; s++) {
        if (stage != s && stage != KV_STAGE_SMALLEST) continue;
        const int status = encode(s, level, src, n, trial, best - 1, &got);      /* best - 1: shorter, or not at all */
        if (status < 0) {
            kv_free(spare);
            return status;
        }
        if (!got) continue;
        if (spare) memcpy(dst, trial, got);
        best = got;
        used = s;
    }
    kv_free(spare);
    if (used == KV_STAGE_RAW && n) memcpy(dst, src, n);
    *n_out = best;
    return used;
}

int kv_stage_decode(int stage, const void *src, size_t n, void *dst, size_t n_dst)
{
    RETURN_ERROR_IF((n && !src) || (n_dst && !dst), KV_E_ARG, "stage: NULL argument");
    RETURN_ERROR_IF(n > MAX_BYTES || n_dst > MAX_BYTES, KV_E_CORRUPT, "stage: %zu bytes from %zu, at most %zu at once", n_dst, n, MAX_BYTES);
    switch (stage) {
    case KV_STAGE_RAW:
        RETURN_ERROR_IF(n != n_dst, KV_E_CORRUPT, "raw: %zu bytes where %zu are wanted", n, n_dst);
        if (n) memcpy(dst, src, n);
        return KV_OK;
    case KV_STAGE_ZLIB: return zlib_decode(src, n, dst, n_dst);
    case KV_STAGE_LZMA: return lzma_decode(src, n, dst, n_dst);
    case KV_STAGE_RANS: return rans_decode(src, n, dst, n_dst);
    default: return kv_set_error(KV_E_CORRUPT, "stage %d is unknown here (have: raw, zlib, lzma, rans)", stage);
    }
}
