/* amx.c -- products of f32 matrices on AMX's bf16 tiles, for processors that have them (Intel from Sapphire Rapids on).
 *
 * A value is split into two bf16, x = hi + lo + 2^-17 x at most, and a product is
 *
 *   a b = a_hi b_lo + a_hi b_hi + a_lo b_hi           each product exact, summed in f32
 *
 * What is left out is 2^-18 of a product, of either sign: in a dot product of 576 terms 2e-6 of its terms' norm, where f32
 * sgemm's own rounding is 1e-6.  Three tile products of 16 x 16 x 32 take the time of one and a half f32 FMAs of each of the
 * 16 rows, so this is some five times as fast as AVX-512.
 *
 * Packed operands are sequences of blocks, 32 rows by 32 inner positions, 4 KB, inner positions first; a block is four
 * tiles of 16 rows of 64 bytes:
 *
 *   left    | hi of rows 0..15 | hi of 16..31 | lo of 0..15 | lo of 16..31 |    tile row r, word i: row r, position i
 *   right   | the same ...                                                 |    tile row p, words 2 c, 2 c + 1: row c, positions 2 p, 2 p + 1
 *
 * Subnormals count as zero.  An inf becomes NaN: its lo is inf - inf. */
#include <immintrin.h>
#include "amx.h"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f")))
#define INLINE WIDE static inline __attribute__((always_inline))

enum { HALF = 16, TILE_BYTES = 1024, LO = 2 * TILE_BYTES, BLOCK_BYTES = 4 * TILE_BYTES };

static int64_t blocks(int64_t n) { return (n + KV_AMX_BLOCK - 1) / KV_AMX_BLOCK; }

size_t kv_amx_bytes(int64_t n, int64_t k) { return (size_t)blocks(n) * (size_t)blocks(k) * BLOCK_BYTES; }

/* ---- packing */

typedef struct { __m512i hi, lo; } split;     /* 32 bf16 each */

/* a: positions 0..15, b: 16..31 */
INLINE split split32(__m512 a, __m512 b)
{
    const __m512i hi = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 back_a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(hi)), 16));
    const __m512 back_b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 1)), 16));
    return (split){ hi, (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(b, back_b), _mm512_sub_ps(a, back_a)) };
}

INLINE __m512 load_first(const float *p, int n) { return n >= 16 ? _mm512_loadu_ps(p) : n > 0 ? _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p) : _mm512_setzero_ps(); }

WIDE void kv_amx_pack_left(const float *x, int64_t ld, int n, int k, float scale, void *dst)
{
    const __m512 s = _mm512_set1_ps(scale);
    char *block = dst;
    for (int r0 = 0; r0 < n; r0 += KV_AMX_BLOCK)
        for (int i = 0; i < k; i += KV_AMX_BLOCK, block += BLOCK_BYTES)
            for (int r = 0; r < KV_AMX_BLOCK; r++) {
                const float *row = x + (r0 + r) * ld + i;
                const int left = r0 + r < n ? k - i : 0;
                const split v = split32(_mm512_mul_ps(load_first(row, left), s), _mm512_mul_ps(load_first(row + 16, left - 16), s));
                _mm512_store_si512(block + r * 64, v.hi);
                _mm512_store_si512(block + LO + r * 64, v.lo);
            }
}

/* 16 x 16 dwords, row r at m + r. */
INLINE void transpose(__m512i *m)
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            m[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            m[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    for (int i = 0; i < 4; i++)                /* m[4 g + i]: column 4 q + i of rows 4 g .. 4 g + 3 in quarter q */
        for (int h = 0; h < 2; h++) {
            t[8 * h + i] = _mm512_shuffle_i32x4(m[8 * h + i], m[8 * h + 4 + i], 0x88);
            t[8 * h + 4 + i] = _mm512_shuffle_i32x4(m[8 * h + i], m[8 * h + 4 + i], 0xdd);
        }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {          /* quarters 0, 2 from t[i], 1, 3 from t[4 + i] */
            m[4 * h + i] = _mm512_shuffle_i32x4(t[4 * h + i], t[8 + 4 * h + i], 0x88);
            m[8 + 4 * h + i] = _mm512_shuffle_i32x4(t[4 * h + i], t[8 + 4 * h + i], 0xdd);
        }
}

WIDE void kv_amx_pack_right(const float *x, int64_t ld, int n, int k, void *dst)
{
    char *block = dst;
    for (int r0 = 0; r0 < n; r0 += KV_AMX_BLOCK)
        for (int i = 0; i < k; i += KV_AMX_BLOCK, block += BLOCK_BYTES)
            for (int half = 0; half < 2; half++) {
                __m512i hi[16], lo[16];
                for (int r = 0; r < HALF; r++) {
                    const int at = r0 + half * HALF + r, left = at < n ? k - i : 0;
                    const float *row = x + at * ld + i;
                    const split v = split32(load_first(row, left), load_first(row + 16, left - 16));
                    hi[r] = v.hi;
                    lo[r] = v.lo;
                }
                transpose(hi);
                transpose(lo);
                for (int r = 0; r < HALF; r++) {
                    _mm512_store_si512(block + half * TILE_BYTES + r * 64, hi[r]);
                    _mm512_store_si512(block + LO + half * TILE_BYTES + r * 64, lo[r]);
                }
            }
}

/* Words of two rows side by side: position 2 p in the low word of each dword, 2 p + 1 in the high one. */
INLINE __m512i interleave(__m512i pair)
{
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair)), high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

WIDE void kv_amx_pack_right_t(const float *x, int64_t ld, int n, int k, void *dst)
{
    char *block = dst;
    for (int r0 = 0; r0 < n; r0 += KV_AMX_BLOCK)
        for (int i = 0; i < k; i += KV_AMX_BLOCK, block += BLOCK_BYTES)
            for (int half = 0; half < 2; half++)
                for (int p = 0; p < HALF; p++) {
                    const int at = i + 2 * p, left = n - r0 - half * HALF;
                    const float *row = x + at * ld + r0 + half * HALF;
                    const split v = split32(load_first(row, at < k ? left : 0), load_first(row + ld, at + 1 < k ? left : 0));
                    _mm512_store_si512(block + half * TILE_BYTES + p * 64, interleave(v.hi));
                    _mm512_store_si512(block + LO + half * TILE_BYTES + p * 64, interleave(v.lo));
                }
}

/* ---- the product of 32 x 32: tiles 0..3 sum, 4 and 5 hold the left rows, 6 and 7 the right ones */

TILES static void start_tiles(void)
{
    static const struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t n_rows[16]; } shape
        __attribute__((aligned(64))) = { 1, 0, { 0 }, { 64, 64, 64, 64, 64, 64, 64, 64 }, { 16, 16, 16, 16, 16, 16, 16, 16 } };
    _tile_loadconfig(&shape);
}

TILES static void square(const char *a, const char *b, int n_blocks, bool add, float *c, int64_t ldc)
{
    const int64_t stride = ldc * (int64_t)sizeof *c;
    __asm__ volatile("" ::: "memory");         /* the tile loads' operands do not tell the compiler what they read */
    if (add) {
        _tile_loadd(0, c, stride);
        _tile_loadd(1, c + HALF, stride);
        _tile_loadd(2, c + HALF * ldc, stride);
        _tile_loadd(3, c + HALF * ldc + HALF, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < n_blocks; i++, a += BLOCK_BYTES, b += BLOCK_BYTES) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b + LO, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + LO + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE_BYTES, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, a + LO, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + LO + TILE_BYTES, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + HALF, stride);
    _tile_stored(2, c + HALF * ldc, stride);
    _tile_stored(3, c + HALF * ldc + HALF, stride);
    __asm__ volatile("" ::: "memory");
}

static void copy_square(float *dst, int64_t dst_ld, const float *src, int64_t src_ld, int m, int n)
{
    for (int r = 0; r < m; r++) memcpy(dst + r * dst_ld, src + r * src_ld, sizeof *dst * (size_t)n);
}

/* A block of right rows stays in the nearest caches while the left ones go by. */
TILES void kv_amx_multiply(const void *left, int64_t k_left, int m, const void *right, int64_t k_right, int n, int k, bool add, float *c, int64_t ldc)
{
    const int64_t left_bytes = blocks(k_left) * BLOCK_BYTES, right_bytes = blocks(k_right) * BLOCK_BYTES;
    float edge[KV_AMX_BLOCK * KV_AMX_BLOCK];
    start_tiles();
    for (int j = 0; j < n; j += KV_AMX_BLOCK)
        for (int i = 0; i < m; i += KV_AMX_BLOCK) {
            const char *a = (const char *)left + i / KV_AMX_BLOCK * left_bytes, *b = (const char *)right + j / KV_AMX_BLOCK * right_bytes;
            const int rows = kv_min(KV_AMX_BLOCK, m - i), columns = kv_min(KV_AMX_BLOCK, n - j);
            float *const to = c + i * ldc + j;
            if (rows == KV_AMX_BLOCK && columns == KV_AMX_BLOCK) {
                square(a, b, (int)blocks(k), add, to, ldc);
                continue;
            }
            if (add) copy_square(edge, KV_AMX_BLOCK, to, ldc, rows, columns);
            square(a, b, (int)blocks(k), add, edge, KV_AMX_BLOCK);
            copy_square(to, ldc, edge, KV_AMX_BLOCK, rows, columns);
        }
    _tile_release();
}
