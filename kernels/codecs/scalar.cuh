// scalar.cuh -- norm, rotation, a codebook per coordinate; sketches of the residual, outlier channels (core/codecs/scalar.c and scalar_parts.c,
// which have the page's picture and the arithmetic).
//
// A part's row is worked on in place: y in the first half of the scratch, codes (whole numbers) or the sketch's row in the second.
#pragma once
#include "codecs/scalar_device.h"
#include "codec_math.cuh"
#include "kelvin/fragment.cuh"

namespace kelvin {

struct scalar_codec {
    using part = scalar_device_part;
    enum { HALF = 512, KEYS = 0 /* KV_SIDE_K */, RAW = 0, MATCHED = 1, LSQ = 2 /* norms */, GAIN_LSQ = 1, GAIN_EXPECTED = 2 };

    template <class T> static __device__ __forceinline__ const T *at(const dev_codec &c, uint32_t offset) { return (const T *)((const uint8_t *)c.pod + offset); }
    static __device__ __forceinline__ const float *floats(const dev_codec &c, uint32_t offset) { return offset ? at<float>(c, offset) : nullptr; }

    // ---- codes in a page

    static __device__ __forceinline__ uint32_t *word_of(const scalar_device_plane &p, const uint8_t *page, int outer, int chunk)
    {
        return (uint32_t *)(page + p.offset + (size_t)(outer / 16) * p.tile_bytes + (size_t)chunk * p.rows * 64) + outer % 16;
    }

    // Slot and byte of a lane's words; rows are 16 words apart.
    static __device__ __forceinline__ uint32_t field(const uint32_t *w, int bits, int slot, int byte)
    {
        const int up = 8 * byte, top = slot - 6;
        if (bits != 3) return w[0] >> (bits * slot + up) & ((1u << bits) - 1);
        if (top < 0) return w[16 * (slot / 2)] >> (3 * (slot & 1) + up) & 7;
        return (w[32 * top] >> (6 + up) & 3) | (w[16] >> (6 + top + up) & 1) << 2;
    }

    // ---- codes in fragment order: a tile's side of 32 tokens after the other

    static __device__ __forceinline__ uint8_t *tile_of(const part &p, const uint8_t *page, int tok) { return (uint8_t *)page + (size_t)(tok / TILE_TOKENS) * (p.dim * p.bits * 4 + 2 * TILE_TOKENS); }
    static __device__ __forceinline__ place place_of(const part &p, bool keys, int tok, int i) { return keys ? key_place(p.dim / 32, tok % TILE_TOKENS, i) : value_place(tok % TILE_TOKENS, i); }
    static __device__ __forceinline__ uint16_t *norm_of(const part &p, const uint8_t *page, int tok) { return (uint16_t *)(tile_of(p, page, tok) + p.dim * p.bits * 4) + norm_place(tok % TILE_TOKENS); }
    static __device__ __forceinline__ void put_fragments(const part &p, bool keys, uint8_t *page, int tok, const int *code, int lane)
    {
        uint8_t *tile = tile_of(p, page, tok);
        for KV_ROW(i, p.dim)
            for (int k = 0; k < (p.bits == 3 ? 3 : 1); k++) {
                const code_bits b = bits_of_code(p.bits, p.dim * p.bits / 32, place_of(p, keys, tok, i), (uint32_t)code[i], k);
                if (b.mask) put_bits((uint32_t *)(tile + b.at), b.bits, b.mask);
            }
    }

    // The code of element i of a token in a plane.
    static __device__ __forceinline__ int get(const scalar_device_plane &q, const uint8_t *page, bool keys, int tok, int i)
    {
        const int inner = keys ? i : tok, outer = keys ? tok : i, in = inner & ((1 << q.log_chunk) - 1);
        return (int)field(word_of(q, page, outer, inner >> q.log_chunk), q.bits, in / 4, in % 4);
    }

    // Keys: the token's own words, each put together by one lane.
    static __device__ __forceinline__ void put_key(const part &p, uint8_t *page, int tok, const int *code, int lane)
    {
        for (int k = 0; k < p.n_planes; k++) {
            const scalar_device_plane &q = p.plane[k];
            const uint32_t mask = (1u << q.bits) - 1;
            for KV_ROW(w, q.n_chunks * q.rows) {
                const int chunk = w / q.rows, row = w - chunk * q.rows, first = chunk << q.log_chunk;
                const int slot0 = q.bits == 3 ? 2 * row : 0, n_slots = q.bits == 3 ? 2 : 1 << (q.log_chunk - 2);
                uint32_t word = 0;
                for (int byte = 0; byte < 4; byte++) {
                    auto of = [&](int slot) { const int i = first + 4 * slot + byte; return i < p.dim ? (uint32_t)code[i] >> 4 * k & mask : 0u; };
                    for (int s = 0; s < n_slots; s++) word |= of(slot0 + s) << (q.bits * s + 8 * byte);
                    if (q.bits != 3) continue;
                    const uint32_t a = of(6), b = of(7);
                    word |= (row == 0 ? a & 3 : row == 2 ? b & 3 : a >> 2 | (b >> 2) << 1) << (6 + 8 * byte);
                }
                word_of(q, page, tok, chunk)[16 * row] = word;
            }
        }
    }

    // Values: bits of words that hold other tokens' too.
    static __device__ __forceinline__ void put_value(const part &p, uint8_t *page, int tok, const int *code, int lane)
    {
        for (int k = 0; k < p.n_planes; k++) {
            const scalar_device_plane &q = p.plane[k];
            const int in = tok & ((1 << q.log_chunk) - 1), slot = in / 4, up = in % 4 * 8, top = slot - 6;
            for KV_ROW(i, 16 * p.n_tiles) {
                uint32_t *w = word_of(q, page, i, tok >> q.log_chunk);
                const uint32_t v = i < p.dim ? (uint32_t)code[i] >> 4 * k & ((1u << q.bits) - 1) : 0;
                if (q.bits != 3) put_bits(w, v << (q.bits * slot + up), ((1u << q.bits) - 1) << (q.bits * slot + up));
                else if (top < 0) put_bits(w + 16 * (slot / 2), v << (3 * (slot & 1) + up), 7u << (3 * (slot & 1) + up));
                else {
                    put_bits(w + 32 * top, (v & 3) << (6 + up), 3u << (6 + up));
                    put_bits(w + 16, v >> 2 << (6 + top + up), 1u << (6 + top + up));
                }
            }
        }
    }

    static __device__ __forceinline__ void put(const dev_codec &c, const part &p, uint8_t *page, int tok, const int *code, int lane)
    {
        if (p.fragments) put_fragments(p, c.side == KEYS, page, tok, code, lane);
        else if (c.side == KEYS) put_key(p, page, tok, code, lane);
        else put_value(p, page, tok, code, lane);
        __syncwarp();
    }

    static __device__ __forceinline__ float scale_at(const part &p, const uint8_t *page, int tok) { return half_float(p.fragments ? *norm_of(p, page, tok) : *(const uint16_t *)(page + p.scales + 2 * (size_t)tok)); }
    static __device__ __forceinline__ void put_scale(const part &p, uint8_t *page, int tok, uint16_t half, int lane)
    {
        if (lane == 0) *(p.fragments ? norm_of(p, page, tok) : (uint16_t *)(page + p.scales + 2 * (size_t)tok)) = half;
    }

    // ---- rotations, in place

    // x = x m, sums in ascending order.
    static __device__ __noinline__ void dense(const float *m, float *x, int n, int lane)
    {
        float sum[HALF / 32];
#pragma unroll
        for (int k = 0; k < HALF / 32; k++) {
            const int i = lane + 32 * k;
            sum[k] = 0;
            if (i < n)
                for (int j = 0; j < n; j++) sum[k] += x[j] * m[(size_t)j * n + i];
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < HALF / 32; k++)
            if (lane + 32 * k < n) x[lane + 32 * k] = sum[k];
        __syncwarp();
    }

    static __device__ __forceinline__ void rotate(const dev_codec &c, const part &p, float *x, float by, int lane)
    {
        const float *sign = floats(c, p.at_sign);
        for KV_ROW(i, p.dim) x[i] *= sign ? sign[i] * by : by;
        __syncwarp();
        if (p.at_matrix) dense(at<float>(c, p.at_matrix), x, p.dim, lane);
        else if (sign) fwht(x, p.dim, lane);
    }

    // Up to the last product, with unturned(), which the caller does.
    static __device__ __forceinline__ void rotate_back(const dev_codec &c, const part &p, float *x, int lane)
    {
        if (p.at_matrix) dense(at<float>(c, p.at_inverse), x, p.dim, lane);
        else if (p.at_sign) fwht(x, p.dim, lane);
    }
    static __device__ __forceinline__ float unturned(const dev_codec &c, const part &p, const float *x, int i, float by)
    {
        return x[i] * (p.at_sign ? at<float>(c, p.at_sign)[i] * by : by);
    }

    // ---- encode

    // How many boundaries y exceeds.
    static __device__ __forceinline__ int index(const part &p, float y)
    {
        int at = 0;
        for (int step = p.levels / 2; step; step /= 2) at += y > p.bound[at + step - 1] ? step : 0;
        return at;
    }
    static __device__ __forceinline__ void index_row(const part &p, const float *y, float by, int *code, int lane)
    {
        fill(code, p.dim, lane, [&](int i) { return index(p, y[i] * by); });
        __syncwarp();
    }

    // |x|, and 1/|x|; x is scaled when its squares need another exponent.
    static __device__ __forceinline__ float row_norm(float *x, int n, float *by, int lane)
    {
        const float sum = dot16(x, x, n, lane);
        if (sum >= 0x1p-100f && sum <= 0x1p120f) {
            const float norm = sqrtf(sum);
            *by = 1 / norm;
            return norm;
        }
        const float most = max_of(n, lane, [=](int i) { return fabsf(x[i]); });
        *by = 0;
        if (most == 0) return 0;
        int e;
        frexpf(most, &e);
        __syncwarp();
        for KV_ROW(i, n) x[i] = ldexpf(x[i], -e);
        __syncwarp();
        const float norm = sqrtf(dot16(x, x, n, lane));
        *by = 1 / norm;
        return ldexpf(norm, e);
    }

    // The factor whose code has the largest cosine.
    static __device__ __forceinline__ float choose(const part &p, const float *y, int *code, int lane)
    {
        float best = -1, factor = 1;
        for (int k = 0; k < p.n_tries; k++) {
            __syncwarp();
            index_row(p, y, p.tries[k], code, lane);
            const float yz = sum16(p.dim, lane, [&](int i) { return y[i] * p.centroid[code[i]]; });
            const float zz = sum16(p.dim, lane, [&](int i) { const float z = p.centroid[code[i]]; return z * z; });
            const float cosine = yz / sqrtf(zz);
            if (cosine > best) best = cosine, factor = p.tries[k];
        }
        __syncwarp();
        return factor;
    }

    // x in place becomes y; code gets the codes.  Returns the stored scale; *norm is |x|.
    static __device__ __forceinline__ float encode_part(const dev_codec &c, const part &p, uint8_t *page, int tok, float *x, int *code, float *norm, int lane)
    {
        float by, scale = 0, factor = 1;
        *norm = row_norm(x, p.dim, &by, lane);
        __syncwarp();
        if (by > 0) {
            rotate(c, p, x, by, lane);
            if (p.n_tries > 1) factor = choose(p, x, code, lane);
            index_row(p, x, p.n_tries > 1 ? factor : 1, code, lane);
            if (p.norm == RAW) scale = *norm / factor;
            else {
                const float zz = sum16(p.dim, lane, [&](int i) { const float z = p.centroid[code[i]]; return z * z; });
                if (p.norm == MATCHED) scale = *norm / sqrtf(zz);
                else {
                    const float yz = sum16(p.dim, lane, [&](int i) { return x[i] * p.centroid[code[i]]; });
                    scale = p.norm == LSQ ? *norm * (yz / zz) : *norm / yz;
                }
            }
            if (!(scale < 65504)) scale = 65504;
        } else {
            for KV_ROW(i, p.dim) code[i] = 0;
            __syncwarp();
        }
        put(c, p, page, tok, code, lane);
        const uint16_t half = float_half(scale);
        put_scale(p, page, tok, half, lane);
        return half_float(half);
    }

    // r: what the codes leave of y; both halves of the scratch are spent.
    static __device__ __forceinline__ void encode_sketch(const dev_codec &c, const part &p, int gain_mode, bool has_code, uint8_t *page, int tok, float *r, float *u, float norm, int lane)
    {
        float gain = 0;
        int *code = (int *)u;
        const float length = sqrtf(dot16(r, r, p.dim, lane));
        __syncwarp();
        for KV_ROW(i, p.dim) u[i] = length > 0 ? r[i] : 0;
        __syncwarp();
        if (length > 0) {
            rotate(c, p, u, 1 / length, lane);
            for KV_ROW(i, p.dim) code[i] = index(p, u[i]);
            gain = length;
        } else for KV_ROW(i, p.dim) code[i] = 0;
        __syncwarp();
        put(c, p, page, tok, code, lane);
        if (length > 0) {
            if (gain_mode == GAIN_LSQ) {
                for KV_ROW(i, p.dim) u[i] = p.centroid[code[i]];
                __syncwarp();
                rotate_back(c, p, u, lane);
                __syncwarp();
                for KV_ROW(i, p.dim) u[i] = unturned(c, p, u, i, 1);
                __syncwarp();
                gain = dot16(r, u, p.dim, lane) / dot16(u, u, p.dim, lane);
            }
            gain *= norm;
            if (!(gain < 65504)) gain = 65504;
        }
        if (gain_mode != GAIN_EXPECTED || !has_code) put_scale(p, page, tok, float_half(gain), lane);
        __syncwarp();
    }

    // ---- which channels are outliers

    static __device__ __forceinline__ uint32_t mask_word(const scalar_device *d, const uint8_t *page, int k, int dim)
    {
        uint32_t w = 0;
        for (int b = 0; b < 4; b++) {
            const int i = 4 * k + b;
            if (8 * i < dim) w |= (uint32_t)page[d->mask + i] << 8 * b;
        }
        return 32 * (k + 1) > dim ? w & ((1u << (dim - 32 * k)) - 1) : w;
    }

    // f(channel, place) for a lane's channels: places of outliers, then the others.  Any mask gives an order: too many bits are cut, too few filled up.
    template <class F> static __device__ __forceinline__ void by_place(const dev_codec &c, const uint8_t *page, int lane, F f)
    {
        const scalar_device *d = (const scalar_device *)c.pod;
        const int n = d->group[0].dim, dim = c.head_dim;
        if (d->n_groups == 1) {
            for KV_ROW(i, dim) f(i, i);
        } else if (!d->by_page) {
            const uint16_t *order = at<uint16_t>(c, d->at_order);
            for KV_ROW(i, dim) f(order[i], i);
        } else {
            int total = 0, before = 0;
            for (int k = 0; 32 * k < dim; k++) total += __popc(mask_word(d, page, k, dim));
            for (int k = 0; 32 * k < dim; k++) {
                const uint32_t word = mask_word(d, page, k, dim);
                const int i = lane + 32 * k, rank = before + __popc(word & ((1u << lane) - 1));
                const bool high = (word >> lane & 1) && rank < n;
                if (i < dim) f(i, high ? rank : min(total, n) + i - min(rank, n));
                before += __popc(word);
            }
        }
    }

    // The channels of the largest sum of squares over the page; of equals the lower one.
    static __device__ __noinline__ void choose_outliers(const dev_codec &c, uint8_t *page, const float *x, long long ld, double *sum, int lane)
    {
        const scalar_device *d = (const scalar_device *)c.pod;
        const int dim = c.head_dim;
        for KV_ROW(i, dim) {
            double s = 0;
            for (int t = 0; t < c.page_tokens; t++) s += (double)x[t * ld + i] * x[t * ld + i];
            sum[i] = s;
        }
        __syncwarp();
        for (int k = 0; 32 * k < dim; k++) {
            const int i = lane + 32 * k;
            int before = 0;
            for (int j = 0; j < dim && i < dim; j++) before += sum[j] > sum[i] || (sum[j] == sum[i] && j < i);
            const uint32_t word = __ballot_sync(~0u, i < dim && before < d->group[0].dim);
            if (lane < 4 && 8 * (4 * k + lane) < dim) page[d->mask + 4 * k + lane] = (uint8_t)(word >> 8 * lane);
        }
        __syncwarp();
    }

    static __device__ __forceinline__ void encode_row(const dev_codec &c, uint8_t *page, int tok, const float *x, float *y, float *z, int lane)
    {
        const scalar_device *d = (const scalar_device *)c.pod;
        const float *scale = floats(c, d->at_scale);
        int first = 0;
        for (int g = 0; g < d->n_groups; first += d->group[g++].dim) {
            const scalar_device_group &group = d->group[g];
            by_place(c, page, lane, [&](int channel, int place) {
                if (place >= first && place < first + group.dim) y[place - first] = scale ? x[channel] * scale[channel] : x[channel];
            });
            __syncwarp();
            float norm, by, stored = 0;
            int *code = (int *)z;
            if (group.at_code) stored = encode_part(c, *at<part>(c, group.at_code), page, tok, y, code, &norm, lane);
            else {
                norm = row_norm(y, group.dim, &by, lane);
                __syncwarp();
                for KV_ROW(i, group.dim) y[i] *= by;
            }
            if (!group.at_sketch) continue;
            const float share = norm > 0 ? stored / norm : 0;
            const part *coded = group.at_code ? at<part>(c, group.at_code) : nullptr;
            for KV_ROW(i, group.dim) y[i] = norm > 0 ? y[i] - (coded ? share * coded->centroid[code[i]] : 0) : 0;
            __syncwarp();
            encode_sketch(c, *at<part>(c, group.at_sketch), d->gain, coded != nullptr, page, tok, y, z, norm, lane);
        }
        __syncwarp();
    }

    static __device__ void encode(const dev_codec &c, uint8_t *page, int tok0, const float *x, long long ld, float *scratch, int lane)
    {
        if (((const scalar_device *)c.pod)->by_page) choose_outliers(c, page, x, ld, (double *)scratch, lane);
        for (int t = 0; t < c.granule; t++) encode_row(c, page, tok0 + t, x + t * ld, scratch, scratch + HALF, lane);
    }

    // ---- decode

    // Centroids of a token, times its scale or not; returns the scale.
    static __device__ __forceinline__ float get_row(const dev_codec &c, const part &p, const uint8_t *page, int tok, bool scaled, float *z, int lane)
    {
        const float scale = scale_at(p, page, tok), by = scaled ? scale : 1;
        const bool keys = c.side == KEYS, two = p.n_planes == 2;
        const scalar_device_plane low = p.plane[0], high = p.plane[1];
        const float *centroid = p.centroid;
        if (p.fragments) {
            const int bits = p.bits, words = p.dim * bits / 32, per_row = p.dim / 32;
            const uint8_t *tile = tile_of(p, page, tok);
            fill(z, p.dim, lane, [=](int i) { return centroid[get_code(bits, words, tile, keys ? key_place(per_row, tok % TILE_TOKENS, i) : value_place(tok % TILE_TOKENS, i))] * by; });
            __syncwarp();
            return scale;
        }
        fill(z, p.dim, lane, [=](int i) {
            const int code = get(low, page, keys, tok, i);
            return centroid[two ? code | get(high, page, keys, tok, i) << 4 : code] * by;
        });
        __syncwarp();
        return scale;
    }

    static __device__ void decode(const dev_codec &c, const uint8_t *page, int tok, float *row, float *scratch, int lane)
    {
        const scalar_device *d = (const scalar_device *)c.pod;
        const float *unscale = floats(c, d->at_unscale);
        float *z = scratch, *r = scratch + HALF;
        __syncwarp();
        if (d->plain) {
            const part &p = *at<part>(c, d->group[0].at_code);
            const float scale = get_row(c, p, page, tok, false, z, lane);
            rotate_back(c, p, z, lane);
            const float *sign = floats(c, p.at_sign);
            fill(row, p.dim, lane, [=](int i) {
                const float v = z[i] * (sign ? sign[i] * scale : scale);
                return unscale ? v * unscale[i] : v;
            });
            __syncwarp();
            return;
        }
        int first = 0;
        for (int g = 0; g < d->n_groups; first += d->group[g++].dim) {
            const scalar_device_group &group = d->group[g];
            const part *code = group.at_code ? at<part>(c, group.at_code) : nullptr, *sketch = group.at_sketch ? at<part>(c, group.at_sketch) : nullptr, *last = code ? code : sketch;
            if (code) get_row(c, *code, page, tok, true, z, lane);
            if (sketch) {
                float *at = code ? r : z;
                get_row(c, *sketch, page, tok, true, at, lane);
                rotate_back(c, *sketch, at, lane);
                if (code)
                    for KV_ROW(i, group.dim) z[i] += unturned(c, *sketch, r, i, 1);
                __syncwarp();
            }
            if (code) rotate_back(c, *code, z, lane);
            by_place(c, page, lane, [&](int channel, int place) {
                if (place < first || place >= first + group.dim) return;
                const float v = unturned(c, *last, z, place - first, 1);
                row[channel] = unscale ? v * unscale[channel] : v;
            });
            __syncwarp();
        }
    }
};

}  // namespace kelvin
