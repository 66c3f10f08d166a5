/* scalar_x86.h -- what the AVX2 and AVX-512 forms of `scalar` share: units of the fixed point, one function per code width
 * and number of queries. */
#ifndef KV_SCALAR_X86_H
#define KV_SCALAR_X86_H
#include <immintrin.h>
#include "scalar.h"

#define CHUNK_QUADS(bits) ((bits) == 4 ? 2 : (bits) == 2 ? 4 : 8)
#define CHUNK_BYTES(bits) ((bits) == 3 ? 192 : 64)
/* A unit: the fewest quads that are whole chunks of both planes. */
#define UNIT_QUADS(bits) ((bits) <= 4 ? CHUNK_QUADS(bits) : CHUNK_QUADS((bits) - 4))

/* Per query: the unit that lets weights of this maximum and sum use all bits and never overflow, and its inverse.  Both are
 * 0 when nothing weighs 2^-100 or the maximum is no number. */
typedef struct scalar_units { __m128 unit, per; } scalar_units;
KV_AVX2 static inline __attribute__((always_inline)) scalar_units scalar_units_of(const __m128 tops[SCALAR_QUERIES], const __m128 sums[SCALAR_QUERIES])
{
    const __m128 m01 = _mm_max_ps(_mm_unpacklo_ps(tops[0], tops[1]), _mm_unpackhi_ps(tops[0], tops[1]));
    const __m128 m23 = _mm_max_ps(_mm_unpacklo_ps(tops[2], tops[3]), _mm_unpackhi_ps(tops[2], tops[3]));
    const __m128 s01 = _mm_add_ps(_mm_unpacklo_ps(sums[0], sums[1]), _mm_unpackhi_ps(sums[0], sums[1]));
    const __m128 s23 = _mm_add_ps(_mm_unpacklo_ps(sums[2], sums[3]), _mm_unpackhi_ps(sums[2], sums[3]));
    const __m128 top = _mm_max_ps(_mm_movelh_ps(m01, m23), _mm_movehl_ps(m23, m01));
    const __m128 sum = _mm_add_ps(_mm_movelh_ps(s01, s23), _mm_movehl_ps(s23, s01));
    const __m128 usable = _mm_cmpge_ps(top, _mm_set1_ps(0x1p-100f));
    const __m128 unit = _mm_max_ps(_mm_mul_ps(top, _mm_set1_ps(1.0f / 32767)), _mm_mul_ps(sum, _mm_set1_ps(1.0f / SCALAR_SUM_MAX)));
    return (scalar_units){ _mm_and_ps(usable, unit), _mm_and_ps(usable, _mm_div_ps(_mm_set1_ps(1), unit)) };
}

/* The weights are in memory from here on.  Without this the compiler carries what was just stored in registers, makes a
 * broadcast of each and spills them: values then took 1.5 times as long as keys. */
static inline void scalar_settle(const void *weights) { __asm__ volatile("" : : "r"(weights) : "memory"); }

/* Asks for a page's lines at once.  A head's pages lie apart, so the processor's own prefetch starts anew in each: 90 heads of
 * 64 pages took 8 ms without this and 5 ms with it (4 bits, 3 queries, AVX-512). */
static inline void scalar_fetch(const scalar_state *s, const uint8_t *page)
{
    for (size_t at = 0; at < s->scales + 64 && at < 4096; at += 64) __builtin_prefetch(page + at);
}

typedef void scalar_dot_fn(int n_q, const kv_codec *c, const uint8_t *page, int n_tokens, const uint8_t *prepared, float *scores, int64_t ld);
typedef void scalar_accumulate_fn(int n_q, const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, float *acc);

/* g: queries that the copy is made for; up to 4 bits there is one for each number, and n_q is g. */
#define SCALAR_DEFINE(target, b, g) \
    target static void dot_##b##_##g(int n_q, const kv_codec *c, const uint8_t *page, int n, const uint8_t *q, float *s, int64_t ld) \
    { dot_block(b, g, b <= 4 || g == 1 ? g : n_q, c, page, n, q, s, ld); } \
    target static void acc_##b##_##g(int n_q, const kv_codec *c, const uint8_t *page, int n, const float *p, int64_t ld, float *a) \
    { accumulate_block(b, g, b <= 4 || g == 1 ? g : n_q, c, page, n, p, ld, a); }
#define SCALAR_DEFINE_ROW(target, b) SCALAR_DEFINE(target, b, 1) SCALAR_DEFINE(target, b, 2) SCALAR_DEFINE(target, b, 3) SCALAR_DEFINE(target, b, 4)
#define SCALAR_DEFINE_WIDE(target, b) SCALAR_DEFINE(target, b, 1) SCALAR_DEFINE(target, b, 4)
#define SCALAR_ROW(name, b) { name##_##b##_1, name##_##b##_2, name##_##b##_3, name##_##b##_4 }
#define SCALAR_WIDE(name, b) { name##_##b##_1, name##_##b##_4, name##_##b##_4, name##_##b##_4 }
#define SCALAR_ROWS(name) { SCALAR_ROW(name, 1), SCALAR_ROW(name, 2), SCALAR_ROW(name, 3), SCALAR_ROW(name, 4), \
                            SCALAR_WIDE(name, 5), SCALAR_WIDE(name, 6), SCALAR_WIDE(name, 7), SCALAR_WIDE(name, 8) }

/* dot and accumulate of a file that has dot_block and accumulate_block. */
#define SCALAR_DEFINE_ALL(target) \
    SCALAR_DEFINE_ROW(target, 1) SCALAR_DEFINE_ROW(target, 2) SCALAR_DEFINE_ROW(target, 3) SCALAR_DEFINE_ROW(target, 4) \
    SCALAR_DEFINE_WIDE(target, 5) SCALAR_DEFINE_WIDE(target, 6) SCALAR_DEFINE_WIDE(target, 7) SCALAR_DEFINE_WIDE(target, 8) \
    static scalar_dot_fn        *const dot_of[8][SCALAR_QUERIES] = SCALAR_ROWS(dot); \
    static scalar_accumulate_fn *const acc_of[8][SCALAR_QUERIES] = SCALAR_ROWS(acc); \
    static void dot(const kv_codec *c, const uint8_t *page, int n_tokens, const void *prepared, int n_q, float *scores, int64_t ld) \
    { \
        scalar_dot_fn *const *fn = dot_of[scalar_state_of(c)->bits - 1]; \
        for (int q = 0, n; q < n_q; q += n) \
            n = kv_min(n_q - q, SCALAR_QUERIES), fn[n - 1](n, c, page, n_tokens, (const uint8_t *)prepared + (size_t)q * c->query_bytes, scores + q * ld, ld); \
    } \
    static void accumulate(const kv_codec *c, const uint8_t *page, int n_tokens, const float *p, int64_t ld, int n_q, float *acc) \
    { \
        scalar_accumulate_fn *const *fn = acc_of[scalar_state_of(c)->bits - 1]; \
        for (int q = 0, n; q < n_q; q += n) \
            n = kv_min(n_q - q, SCALAR_QUERIES), fn[n - 1](n, c, page, n_tokens, p + q * ld, ld, acc + (size_t)q * (size_t)c->space_dim); \
    }
#endif
