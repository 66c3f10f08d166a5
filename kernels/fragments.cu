// fragments.cu -- slots of a cache whose codes lie in fragment order (kelvin/fragment.cuh), and decode attention on them.
//
// A layer qualifies when all its slots are `scalar` codecs of one part, 2, 3 or 4 bits, turned by Hadamard or not at all, one width and codebook
// for its keys and one for its values, in pages of whole tiles.  A page then holds tiles' sides one after the other, in as many bytes as
// the CPU's page of the same tokens; codec_encode and codec_decode know this order by the part's `fragments`, so rows go in and out as in any
// other form, and pages are permuted where the host wants or brings them.
#include <cstring>
#include "attend_codes.cuh"
#include "cache_impl.cuh"
#include "codecs/scalar_device.h"

namespace kelvin {
namespace {

const scalar_device_part *only_part(const void *pod)
{
    const scalar_device *d = (const scalar_device *)pod;
    return d->plain && !d->at_scale && d->n_groups == 1 && d->group[0].at_code && !d->group[0].at_sketch ? (const scalar_device_part *)((const uint8_t *)pod + d->group[0].at_code) : nullptr;
}

int side_bytes(int bits, int head_dim) { return head_dim * bits * 4 + TILE_TOKENS * 2; }

uint8_t *page_at(const kv_backend_cache *c, int seq, int layer, int head, int side, int page)
{
    const dev_slot &s = c->at(layer, head, side);
    return s.page + seq * s.page_stride + (size_t)page * s.codec.page_bytes;
}

// ---- the CPU's order of a page (core/codecs/scalar.c has the picture): field of the code of `inner` in a lane's words

struct plane_field { uint32_t *word[2]; int shift[2], width[2]; };
plane_field field_of(const scalar_device_plane &p, uint8_t *page, int inner, int outer)
{
    const int in = inner & ((1 << p.log_chunk) - 1), slot = in / 4, up = in % 4 * 8, top = slot - 6;
    uint32_t *w = (uint32_t *)(page + p.offset + (size_t)(outer / 16) * p.tile_bytes + (size_t)(inner >> p.log_chunk) * p.rows * 64) + outer % 16;
    if (p.bits != 3) return { { w, w }, { p.bits * slot + up, 0 }, { p.bits, 0 } };
    if (top < 0) return { { w + 16 * (slot / 2), w }, { 3 * (slot & 1) + up, 0 }, { 3, 0 } };
    return { { w + 32 * top, w + 16 }, { 6 + up, 6 + top + up }, { 2, 1 } };
}

// A page of n tokens from one order to the other; zeros are zeros in both.
void permute(const scalar_device_part &p, int side, int n, uint8_t *cpu, uint8_t *fragments, bool to_cpu)
{
    const int words = p.dim / 16 * p.bits / 2, bytes = side_bytes(p.bits, p.dim);
    for (int tok = 0; tok < n; tok++) {
        uint8_t *tile_at = fragments + (size_t)(tok / TILE_TOKENS) * bytes;
        const int t = tok % TILE_TOKENS;
        uint16_t *norm = (uint16_t *)(tile_at + words * 128) + norm_place(t), *cpu_norm = (uint16_t *)(cpu + p.scales) + tok;
        if (to_cpu) *cpu_norm = *norm;
        else *norm = *cpu_norm;
        for (int i = 0; i < p.dim; i++) {
            const place at = side ? value_place(t, i) : key_place(p.dim / 32, t, i);
            const plane_field f = field_of(p.plane[0], cpu, side ? tok : i, side ? i : tok);
            uint32_t code = to_cpu ? get_code(p.bits, words, tile_at, at) : 0;
            for (int k = 0, from = 0; k < 2; from += f.width[k++]) {
                const uint32_t mask = (1u << f.width[k]) - 1;
                if (to_cpu) *f.word[k] = (*f.word[k] & ~(mask << f.shift[k])) | (code >> from & mask) << f.shift[k];
                else code |= (*f.word[k] >> f.shift[k] & mask) << from;
            }
            if (!to_cpu) put_code(p.bits, words, tile_at, at, code);
        }
    }
}

cudaError_t get_page(const kv_backend_cache *c, int seq, int layer, int head, int side, int page, uint8_t *host)
{
    const dev_slot &s = c->at(layer, head, side);
    std::vector<uint8_t> held(s.codec.page_bytes);
    scalar_device_part part;
    cudaError_t e = cudaMemcpy(held.data(), page_at(c, seq, layer, head, side, page), held.size(), cudaMemcpyDeviceToHost);
    if (e == cudaSuccess) e = cudaMemcpy(&part, (const uint8_t *)s.codec.pod + c->part_at[&s - c->slot.data()], sizeof part, cudaMemcpyDeviceToHost);
    if (e != cudaSuccess) return e;
    memset(host, 0, s.codec.page_bytes);
    permute(part, side, c->page_tokens, host, held.data(), true);
    return cudaSuccess;
}

cudaError_t put_page(kv_backend_cache *c, int seq, int layer, int head, int side, int page, const uint8_t *host)
{
    const dev_slot &s = c->at(layer, head, side);
    std::vector<uint8_t> held(s.codec.page_bytes, 0), cpu(host, host + s.codec.page_bytes);
    scalar_device_part part;
    const cudaError_t e = cudaMemcpy(&part, (const uint8_t *)s.codec.pod + c->part_at[&s - c->slot.data()], sizeof part, cudaMemcpyDeviceToHost);
    if (e != cudaSuccess) return e;
    permute(part, side, c->page_tokens, cpu.data(), held.data(), false);
    return cudaMemcpy(page_at(c, seq, layer, head, side, page), held.data(), held.size(), cudaMemcpyHostToDevice);
}

// ---- one new token of every sequence

attend_args arguments(const kv_backend_cache *c, int layer)
{
    const dev_slot &s = c->at(layer, 0, 0);
    const fragment_layer &f = c->fragments[layer];
    attend_args a = {};
    a.slots = c->attend_slots + (size_t)layer * c->n_kv_heads * 2;
    a.books = { c->dev_length, c->dev_encoded, c->n_kinds(), s.kind, c->sink[layer], c->recent[layer], s.never, c->window[layer], s.tail_rows, c->dtype[layer] };
    a.partials = c->attend_parts, a.arrivals = c->attend_arrivals;
    a.n_seqs = c->n_seqs, a.n_heads = c->n_heads, a.n_kv_heads = c->n_kv_heads;
    a.kb = f.kb, a.vb = f.vb, a.plain_k = f.plain_k, a.plain_v = f.plain_v;
    return a;
}

cudaError_t attend_few(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, cudaStream_t stream)
{
    if (n > 1 || softcap != 0 || c->path != 0) return attend_few_tile(c, layer, n, q, k, v, scale, softcap, out, stream);
    c->did |= DID_FUSED;
    attend_args a = arguments(c, layer);
    a.q = q, a.out = out, a.scale = scale;
    return kv_cuda_attend_codes(c->fragments[layer].form, a, stream);
}

}  // namespace

bool fragments_fit(const kv_backend_plan *p, int layer, fragment_layer *out)
{
    const scalar_device_part *first[2] = {};
    for (int i = 0; i < p->n_kv_heads * 2; i++) {
        const kv_backend_slot &s = p->slot[(size_t)layer * p->n_kv_heads * 2 + i];
        if (strcmp(s.codec->family, "scalar") || s.page_rope || s.codec->granule != 1 || p->page_tokens % TILE_TOKENS) return false;
        const scalar_device_part *part = only_part(s.codec->pod), *&of_side = first[i % 2];
        if (!part || part->n_planes != 1 || part->bits < 2 || part->bits > 4 || part->at_matrix || part->dim != p->head_dim) return false;
        if (s.codec->page_bytes != (size_t)side_bytes(part->bits, p->head_dim) * (p->page_tokens / TILE_TOKENS)) return false;
        if (!of_side) of_side = part;
        if (part->bits != of_side->bits || !part->at_sign != !of_side->at_sign || memcmp(part->centroid, of_side->centroid, sizeof(float) << part->bits)) return false;
        const int levels = 1 << part->bits;
        for (int j = 0; j < levels; j++)
            if (part->centroid[j] != -part->centroid[levels - 1 - j]) return false;     // codebook_of takes a half of it
    }
    const attend_form *form = kv_cuda_attend_form(first[0]->bits, first[1]->bits, p->head_dim, p->n_heads / p->n_kv_heads);
    if (!form) return false;
    out->form = form;
    out->kb = codebook_of(first[0]->bits, first[0]->centroid), out->vb = codebook_of(first[1]->bits, first[1]->centroid);
    out->plain_k = !first[0]->at_sign, out->plain_v = !first[1]->at_sign;
    return true;
}

void fragments_flag(void *pod) { const_cast<scalar_device_part *>(only_part(pod))->fragments = 1; }

cudaError_t fragments_room(const kv_backend_cache *c, size_t *parts, size_t *rows)
{
    *parts = *rows = 0;
    for (int l = 0; l < c->n_layers; l++) {
        if (!c->fragments[l].form) continue;
        attend_args a = {};
        a.n_seqs = c->n_seqs, a.n_heads = c->n_heads, a.n_kv_heads = c->n_kv_heads;
        cudaError_t e;
        *parts = std::max(*parts, kv_cuda_attend_partials(c->fragments[l].form, a, &e));
        *rows = std::max(*rows, (size_t)kv_cuda_attend_rows(c->fragments[l].form, a));
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

// From the slots as they lie now; signs are in the codecs' descriptions.
std::vector<attend_slot> fragments_slots(const kv_backend_cache *c)
{
    std::vector<attend_slot> all(c->slot.size());
    for (size_t i = 0; i < all.size(); i++) {
        const dev_slot &s = c->slot[i];
        all[i] = { s.page, s.sink, s.tail, s.page_stride, s.sink_stride, s.tail_stride, c->sign_at[i] ? (const float *)((const uint8_t *)s.codec.pod + c->sign_at[i]) : nullptr, s.mean };
    }
    return all;
}

uint32_t fragments_sign(const void *pod) { return only_part(pod)->at_sign; }
uint32_t fragments_part(const void *pod) { return (uint32_t)((const uint8_t *)only_part(pod) - (const uint8_t *)pod); }

const cache_form fragments_form = { "fragments", tile_form.append, tile_form.decode, attend_few, tile_form.read, get_page, put_page };

}  // namespace kelvin
