// fragment.cuh -- how codes lie in device memory: in the order in which a tensor core's operand wants them.
//
// A tile holds 32 tokens of one KV head.  Keys are the A operand of m16n8k32 as they are (rows = tokens, k = dims), values
// transposed (rows = dims, k = tokens), so that a lane's own registers, looked up byte by byte, are the fragment: no shuffle,
// no shared memory.
//
//   side = | words | f16 norms: for g = 0..7  n[g] n[8+g] n[16+g] n[24+g] |         tile = | side of keys | side of values |
//
// A lane's words come 16 bytes at a time (the last two, where the count is 2 mod 4, 8 bytes at a time), each a full line for
// the warp.  Element (row, k) of fragment f of a side belongs to lane 4 (row % 8) + k % 16 / 4, register row / 8 + 2 (k / 16),
// byte k % 4.  Registers to words, b = byte, half = register % 2:
//
//   4 bits   word register / 2: the low 3 bits of nibble 4 half + b are a code below 8, or 15 - code, which the top bit of nibble
//            2 b + 1 - half says: it complements the looked-up byte v to -v - 1, centroids being (v + 1/2) unit and symmetric.
//   3 bits   two fragments in 3 words, R = 4 (f % 2) + register, slot R / 2: slots 0..2 are the low 3 bits of the words'
//            nibbles 4 half + b, slot 3 is made of their top bits.
//   2 bits   one word: nibble 4 half + b, its low pair for registers 0 and 1, its high pair for 2 and 3.
#pragma once
#include "mma.cuh"

namespace kelvin {

constexpr int TILE_TOKENS = 32;

template <int BITS, int D> struct side {
    static constexpr int fragments = D / 16;                    // of 16 x 32: two per 32 dims (keys), one per 16 dims (values)
    static constexpr int words = fragments * BITS / 2;          // of a lane
    static constexpr int quads = words / 4, pairs = words % 4 / 2;
    static constexpr int word_bytes = words * 128, bytes = word_bytes + TILE_TOKENS * 2;
    static_assert(words % 2 == 0, "a lane's words come in pairs");
};

template <int KB, int VB, int D> struct tile {
    static constexpr int k_bytes = side<KB, D>::bytes, v_bytes = side<VB, D>::bytes, bytes = k_bytes + v_bytes;
};

// Byte offset of word w of a lane inside a side of n words.
__host__ __device__ constexpr int word_offset(int n, int w, int lane)
{
    return w / 4 * 4 < n / 4 * 4 ? w / 4 * 512 + lane * 16 + w % 4 * 4 : n / 4 * 512 + lane * 8 + w % 4 * 4;
}

// A lane's words of a side in memory of any kind.
template <int BITS, int D> __device__ __forceinline__ void load_words(uint32_t *w, const uint8_t *at, int lane)
{
    using S = side<BITS, D>;
#pragma unroll
    for (int i = 0; i < S::quads; i++) {
        const uint4 v = *(const uint4 *)(at + i * 512 + lane * 16);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
    if constexpr (S::pairs) {
        const uint2 v = *(const uint2 *)(at + S::quads * 512 + lane * 8);
        w[4 * S::quads] = v.x, w[4 * S::quads + 1] = v.y;
    }
}

// The token that stands at k of the values' fragments: movmatrix hands out the weights' rows in this order.
__host__ __device__ constexpr int value_token(int k) { return k / 16 * 16 + k % 4 / 2 * 8 + k % 16 / 4 * 2 + k % 2; }

// Where the code of (token, dim) of a key, or of a value, lies: fragment, row and k.
struct place { int fragment, row, k; };
__host__ __device__ constexpr place key_place(int d_fragments, int token, int dim) { return { token / 16 * d_fragments + dim / 32, token % 16, dim % 32 }; }
__host__ __device__ constexpr place value_place(int token, int dim)
{
    // the inverse of value_token
    return { dim / 16, dim % 16, token / 16 * 16 + token % 8 / 2 * 4 + token % 16 / 8 * 2 + token % 2 };
}

// Where a token's norm lies behind the words, in halves.
__host__ __device__ constexpr int norm_place(int token) { return token % 8 * 4 + token / 8; }

// The bits of a code (0 = lowest centroid) in a side of n words: byte offset of a word, its bits and which of them are the code's.  3 bits:
// `part` 0..2, of which the first alone may be all; parts with no mask are none.
struct code_bits { int at; uint32_t bits, mask; };
__host__ __device__ inline code_bits bits_of_code(int bits, int n_words, place p, uint32_t code, int part)
{
    const int lane = p.row % 8 * 4 + p.k % 16 / 4, reg = p.row / 8 + 2 * (p.k / 16), b = p.k % 4, half = reg % 2, nibble = 4 * half + b;
    if (bits == 4) {
        const int sign = 4 * (2 * b + 1 - half) + 3;
        return { word_offset(n_words, p.fragment * 2 + reg / 2, lane), (code < 8 ? code : 15 - code) << (4 * nibble) | (code < 8 ? 0u : 1u) << sign, part ? 0 : 7u << (4 * nibble) | 1u << sign };
    }
    if (bits == 3) {
        const int slot = (4 * (p.fragment % 2) + reg) / 2, word = p.fragment / 2 * 3;
        if (slot < 3) return { word_offset(n_words, word + slot, lane), code << (4 * nibble), part ? 0 : 7u << (4 * nibble) };
        return { word_offset(n_words, word + part, lane), (code >> part & 1) << (4 * nibble + 3), 8u << (4 * nibble) };
    }
    return { word_offset(n_words, p.fragment, lane), code << (4 * nibble + 2 * (reg / 2)), part ? 0 : 3u << (4 * nibble + 2 * (reg / 2)) };
}

// Puts a code into a zeroed side of n words, and reads one; host and device.
__host__ __device__ inline void put_code(int bits, int n_words, uint8_t *base, place at, uint32_t code)
{
    for (int part = 0; part < (bits == 3 ? 3 : 1); part++) {
        const code_bits b = bits_of_code(bits, n_words, at, code, part);
        if (b.mask) *(uint32_t *)(base + b.at) |= b.bits;
    }
}
__host__ __device__ inline uint32_t get_code(int bits, int n_words, const uint8_t *base, place p)
{
    const int lane = p.row % 8 * 4 + p.k % 16 / 4, reg = p.row / 8 + 2 * (p.k / 16), b = p.k % 4, half = reg % 2, nibble = 4 * half + b;
    auto word = [&](int w) { return *(const uint32_t *)(base + word_offset(n_words, w, lane)); };
    if (bits == 4) {
        const uint32_t x = word(p.fragment * 2 + reg / 2), low = x >> (4 * nibble) & 7;
        return x >> (4 * (2 * b + 1 - half) + 3) & 1 ? 15 - low : low;
    }
    if (bits == 3) {
        const int slot = (4 * (p.fragment % 2) + reg) / 2, w = p.fragment / 2 * 3, top = 4 * nibble + 3;
        if (slot < 3) return word(w + slot) >> (4 * nibble) & 7;
        return (word(w) >> top & 1) | (word(w + 1) >> top & 1) << 1 | (word(w + 2) >> top & 1) << 2;
    }
    return word(p.fragment) >> (4 * nibble + 2 * (reg / 2)) & 3;
}

// Two fragments at a time: words of a lane to 8 registers of signed bytes.
template <int BITS> __device__ __forceinline__ void unpack_two(const uint32_t *w, uint32_t t0, uint32_t t1, uint32_t a[8]);

template <> __device__ __forceinline__ void unpack_two<4>(const uint32_t *w, uint32_t t0, uint32_t t1, uint32_t a[8])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t x = w[i], m = x & 0x77777777u;
        a[2 * i] = byte_lookup(t0, t1, m) ^ byte_lookup(x, 0, 0xBA98);              // 8 + byte: its top bit, eight times
        a[2 * i + 1] = byte_lookup(t0, t1, m >> 16) ^ byte_lookup(x << 4, 0, 0xBA98);
    }
}

template <> __device__ __forceinline__ void unpack_two<3>(const uint32_t *w, uint32_t t0, uint32_t t1, uint32_t a[8])
{
    const uint32_t top = and_or(w[2] >> 1, 0x44444444u, and_or(w[1] >> 2, 0x22222222u, w[0] >> 3 & 0x11111111u));
    const uint32_t s[4] = { w[0] & 0x77777777u, w[1] & 0x77777777u, w[2] & 0x77777777u, top };
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[2 * i] = byte_lookup(t0, t1, s[i]);
        a[2 * i + 1] = byte_lookup(t0, t1, s[i] >> 16);
    }
}

template <> __device__ __forceinline__ void unpack_two<2>(const uint32_t *w, uint32_t t0, uint32_t, uint32_t a[8])
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t low = w[i] & 0x33333333u, high = w[i] >> 2 & 0x33333333u;
        a[4 * i] = byte_lookup(t0, t0, low);
        a[4 * i + 1] = byte_lookup(t0, t0, low >> 16);
        a[4 * i + 2] = byte_lookup(t0, t0, high);
        a[4 * i + 3] = byte_lookup(t0, t0, high >> 16);
    }
}

// The bytes that codes look up, and what one of them is worth.  4 bits: value = (v + 1/2) unit with the sign's complement.
struct codebook { uint32_t t0, t1; float unit, half; };

inline codebook codebook_of(int bits, const float *centroid /* [1 << bits], ascending, symmetric */)
{
    const int n = 1 << bits, n_bytes = bits == 2 ? 4 : 8;
    const float half = bits == 4 ? 0.5f : 0.0f, top = centroid[n - 1];
    codebook best = { 0, 0, 0, half };
    float least = 0;
    for (int largest = 4 * 96; largest <= 4 * 127; largest++) {            // the worth of a one by which all levels round best
        codebook c = { 0, 0, top / (0.25f * (float)largest + half), half };
        float err = 0;
        for (int i = 0; i < n_bytes; i++) {
            const float x = centroid[i] / c.unit - half;
            const int byte = (int)(x < 0 ? x - 0.5f : x + 0.5f);
            const float off = ((float)byte - x) * c.unit;
            err += off * off;
            (i < 4 ? c.t0 : c.t1) |= ((uint32_t)byte & 255u) << (i % 4 * 8);
        }
        if (best.unit == 0 || err < least) least = err, best = c;
    }
    return best;
}

}  // namespace kelvin
