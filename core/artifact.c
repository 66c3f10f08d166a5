/* artifact.c -- a calibration as a file: numbers with digests, never code.
 *
 *     0  "KVCALIB" 0 | version u32 | layers, K/V heads, query heads, head_dim, rows, blocks, notes, chunks, context, skip, left out u32
 *    56  positions f64 | payload bytes u64
 *    72  SHA-256 of: model (fingerprint) | RoPE | tokens | payload                                        32 bytes each
 *   200  zeros, 24 bytes
 *   224  SHA-256 of bytes 0 .. 223
 *   256  payload, without gaps; slot = layer * heads + head, D = head_dim, kinds k, k_pre, v, q, q_pre:
 *        (left out: 1, then q and q_pre are not there; 2, then rows is 0; 3, both)
 *        sum of (x-s)_i (x-s)_j, j <= i      f64  [kind][slot][D (D+1) / 2]
 *        sum of x-s                          f64  [kind][slot][D]
 *        hashes of the text's token runs     u64  [blocks]
 *        s, the first chunk's mean           f32  [kind][slot][D]
 *        positions of the rows               i32  [rows]
 *        rows less s                         f16  k_pre, then v: [slot][rows][D]
 *        notes                               JSON
 *
 * Little-endian.  The model's fingerprint covers every tensor's name, type and shape and 4 KiB from its start, middle and
 * end: another file differs there, and a file of gigabytes need not be read. */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>
#include "calib.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the artifact is written from memory");

enum { VERSION = 1, HEADER = 256, CHECKED = 224, MAX_BLOCKS = 1 << 24, MAX_SAMPLE = 1 << 20, PIECE = 4096 };
static const char magic[8] = "KVCALIB";

typedef struct header {
    char     magic[8];
    uint32_t version, n_layers, n_kv_heads, n_heads, head_dim, n_sample, n_block, n_notes, n_chunks, context, skip, without;
    double   count;
    uint64_t n_payload;
    uint8_t  model[32], rope[32], tokens[32], payload[32], zeros[24], check[32];
} header;
_Static_assert(sizeof(header) == HEADER && offsetof(header, check) == CHECKED, "no padding");

/* ---- digests */

static void sha_raw(const void *data, size_t n, uint8_t raw[32])
{
    char hex[65];
    kv_sha256(data, (double)n, hex);
    for (int i = 0; i < 32; i++) {
        unsigned byte;
        sscanf(hex + 2 * i, "%2x", &byte);
        raw[i] = (uint8_t)byte;
    }
}

static void to_raw(const char *hex, uint8_t raw[32])
{
    for (int i = 0; i < 32; i++) {
        unsigned byte = 0;
        sscanf(hex + 2 * i, "%2x", &byte);
        raw[i] = (uint8_t)byte;
    }
}

static void to_hex(const uint8_t raw[32], char *hex65)
{
    for (int i = 0; i < 32; i++) snprintf(hex65 + 2 * i, 3, "%02x", raw[i]);
}

/* Digest of the digest so far and more bytes. */
static void chain(char *hex65, const void *data, size_t n)
{
    char next[65];
    kv_sha256(data, (double)n, next);
    char both[128];
    memcpy(both, hex65, 64);
    memcpy(both + 64, next, 64);
    kv_sha256(both, 128, hex65);
}

void kv_calib_fingerprint(const kv_model *m, char *model, char *rope)
{
    char text[400];
    memset(model, '0', 65);
    memset(rope, '0', 65);
    model[64] = rope[64] = 0;
    int n = snprintf(text, sizeof text, "%.64s %d %d %d %d %d %d %.9g", m->info.arch ? m->info.arch : "", m->info.n_layers, m->info.n_heads, m->info.n_kv_heads, m->info.head_dim,
                     m->info.n_embd, m->info.n_ff, m->info.norm_eps);
    chain(model, text, (size_t)n);
    for (int i = 0; m->gguf && i < kv_gguf_n_tensors(m->gguf); i++) {
        const kv_gguf_tensor *t = kv_gguf_tensor_at(m->gguf, i);
        n = snprintf(text, sizeof text, "%.200s %d %d %zu", t->name, t->type, t->n_dims, t->n_bytes);
        chain(model, text, (size_t)kv_min(n, (int)sizeof text - 1));
        const size_t piece = t->n_bytes < PIECE ? t->n_bytes : PIECE, last = t->n_bytes - piece;
        chain(model, t->data, piece);
        chain(model, t->data + last / 2, piece);
        chain(model, t->data + last, piece);
    }
    for (int l = 0; l < m->geo.n_layers; l++) {
        const kv_rope *r = &m->geo.rope[l];
        n = snprintf(text, sizeof text, "%d", r->n_rot);
        chain(rope, text, (size_t)n);
        for (int i = 0; i < r->n_rot / 2; i++) {
            n = snprintf(text, sizeof text, "%.9g", r->freq[i]);          /* not the last bit, which is the math library's */
            chain(rope, text, (size_t)n);
        }
    }
}

/* Runs of BLOCK tokens as polynomials modulo 2^64, so that a window over other tokens finds them at any offset. */
static const uint64_t base = 0x9e3779b97f4a7c15u;                          /* 2^64 over the golden ratio, odd */

static uint64_t mix(uint64_t h)
{
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

int kv_calib_remember(kv_calib *c, const int32_t *tokens, int n, int skip)
{
    chain(c->tokens_sha, tokens, (size_t)n * sizeof *tokens);
    c->n_chunks++;
    c->context = n;
    c->skip = skip;
    const int more = (n - 1) / KV_CALIB_BLOCK;                             /* from token 1: the first may be the model's begin token */
    RETURN_ERROR_IF(c->n_block + more > MAX_BLOCKS, KV_E_ARG, "calibration: more than %d tokens", MAX_BLOCKS * KV_CALIB_BLOCK);
    if (c->n_block + more > c->cap_block) {
        const int cap = kv_min(MAX_BLOCKS, kv_max(c->n_block + more, 2 * c->cap_block));
        uint64_t *block = kv_alloc_array((size_t)cap, sizeof *block, false);
        if (!block) return KV_E_NOMEM;
        if (c->n_block) memcpy(block, c->block, (size_t)c->n_block * sizeof *block);
        kv_free(c->block);
        c->block = block;
        c->cap_block = cap;
    }
    for (int b = 0; b < more; b++) {
        uint64_t h = 0;
        for (int i = 0; i < KV_CALIB_BLOCK; i++) h = h * base + (uint32_t)tokens[1 + b * KV_CALIB_BLOCK + i];
        c->block[c->n_block++] = mix(h);
    }
    return KV_OK;
}

int kv_calib_overlap(const kv_calib *c, const int32_t *tokens, int n, int *found, int *of)
{
    RETURN_ERROR_IF(!c || (!tokens && n) || n < 0 || !found || !of, KV_E_ARG, "kv_calib_overlap: NULL argument");
    *found = 0;
    *of = c->n_block;
    if (!c->n_block || n < KV_CALIB_BLOCK) return KV_OK;
    /* Open addressing by hash, at most half full; a value of 0 is an empty place. */
    size_t cap = 64;
    while (cap < 2 * (size_t)c->n_block) cap *= 2;
    uint64_t *table = kv_alloc_array(cap, sizeof *table, true);
    if (!table) return KV_E_NOMEM;
    int distinct = 0;
    for (int b = 0; b < c->n_block; b++) {
        size_t at = c->block[b] & (cap - 1);
        while (table[at] && table[at] != c->block[b]) at = (at + 1) & (cap - 1);
        distinct += !table[at];
        table[at] = c->block[b];
    }
    uint64_t h = 0, top = 1;
    for (int i = 0; i < KV_CALIB_BLOCK; i++) top *= base;
    for (int t = 0; t < n; t++) {
        h = h * base + (uint32_t)tokens[t];
        if (t >= KV_CALIB_BLOCK) h -= top * (uint32_t)tokens[t - KV_CALIB_BLOCK];
        if (t < KV_CALIB_BLOCK - 1) continue;
        const uint64_t key = mix(h);
        size_t at = key & (cap - 1);
        while (table[at] && table[at] != key) at = (at + 1) & (cap - 1);
        if (key && table[at]) {
            (*found)++;
            table[at] = UINT64_MAX - (uint64_t)at;                         /* counted; such a value keeps the place taken */
        }
    }
    *of = distinct;
    kv_free(table);
    return KV_OK;
}

int kv_calib_note(kv_calib *c, const char *json)
{
    RETURN_ERROR_IF(!c || !json, KV_E_ARG, "kv_calib_note: NULL argument");
    const size_t n = strlen(json);
    RETURN_ERROR_IF(n > KV_CALIB_NOTES, KV_E_ARG, "calibration: notes of %zu bytes are more than %d", n, KV_CALIB_NOTES);
    char *copy = kv_alloc(n + 1);
    if (!copy) return KV_E_NOMEM;
    memcpy(copy, json, n + 1);
    kv_free(c->notes);
    c->notes = copy;
    return KV_OK;
}

int kv_calib_get_info(const kv_calib *c, kv_calib_info *out)
{
    RETURN_ERROR_IF(!c || !out, KV_E_ARG, "kv_calib_get_info: NULL argument");
    *out = (kv_calib_info){ .model = c->model_sha, .rope = c->rope_sha, .tokens = c->tokens_sha, .notes = c->notes ? c->notes : "", .count = c->count,
        .n_tokens = c->count + (double)c->n_chunks * c->skip, .n_chunks = c->n_chunks, .context = c->context, .skip = c->skip, .n_sample = c->n_sample, .without = c->without };
    return KV_OK;
}

/* ---- the file */

static int kinds_of(uint32_t without) { return without & KV_CALIB_NO_QUERIES ? KV_CALIB_Q : KV_CALIB_KINDS; }

/* Every region of the payload in its order; copy says where to. */
typedef void (*region_fn)(uint8_t **at, void *data, size_t n);
static void region_out(uint8_t **at, void *data, size_t n) { if (n) memcpy(*at, data, n); *at += n; }
static void region_in(uint8_t **at, void *data, size_t n) { if (n) memcpy(data, *at, n); *at += n; }

static void regions(const kv_calib *c, uint8_t *at, size_t n_notes, region_fn f)
{
    const size_t slots = (size_t)c->n_slots, d = (size_t)c->m->info.head_dim, rows = (size_t)c->n_sample;
    const int kinds = kinds_of((uint32_t)c->without);
    for (int k = 0; k < kinds; k++) f(&at, c->product[k], slots * kv_calib_triangle(c) * sizeof(double));
    for (int k = 0; k < kinds; k++) f(&at, c->sum[k], slots * d * sizeof(double));
    f(&at, c->block, (size_t)c->n_block * sizeof(uint64_t));
    for (int k = 0; k < kinds; k++) f(&at, c->shift[k], slots * d * sizeof(float));
    f(&at, c->position, rows * sizeof(int32_t));
    for (int i = 0; i < 2; i++)
        for (size_t s = 0; s < slots; s++) f(&at, c->sample[i] + s * (size_t)c->max_sample * d, rows * d * sizeof(uint16_t));
    f(&at, c->notes, n_notes);
}

/* No overflow: slots and D come from a model in memory, the counts have bounds. */
static uint64_t payload_bytes(const kv_model *m, uint64_t n_sample, uint64_t n_block, uint64_t n_notes, uint32_t without)
{
    const uint64_t slots = (uint64_t)m->info.n_layers * (uint64_t)m->info.n_kv_heads, d = (uint64_t)m->info.head_dim;
    return (uint64_t)kinds_of(without) * slots * (4 * d * (d + 1) + 12 * d) + 8 * n_block + 4 * n_sample + 4 * slots * n_sample * d + n_notes;
}

int kv_calib_write(const kv_calib *c, uint8_t **image, size_t *n_bytes)
{
    RETURN_ERROR_IF(!c || !image || !n_bytes, KV_E_ARG, "kv_calib_write: NULL argument");
    RETURN_ERROR_IF(c->work || c->broken || c->count == 0, KV_E_UNCALIBRATED, "calibration: %s", c->work || c->broken ? "a chunk is not finished" : "no text was seen");
    const kv_model_info *m = &c->m->info;
    const size_t n_notes = c->notes ? strlen(c->notes) : 0, n_payload = (size_t)payload_bytes(c->m, (uint64_t)c->n_sample, (uint64_t)c->n_block, n_notes, (uint32_t)c->without);
    uint8_t *to = kv_alloc(HEADER + n_payload);
    if (!to) return KV_E_NOMEM;
    header h = { .version = VERSION, .n_layers = (uint32_t)m->n_layers, .n_kv_heads = (uint32_t)m->n_kv_heads, .n_heads = (uint32_t)m->n_heads, .head_dim = (uint32_t)m->head_dim,
        .n_sample = (uint32_t)c->n_sample, .n_block = (uint32_t)c->n_block, .n_notes = (uint32_t)n_notes, .n_chunks = (uint32_t)c->n_chunks, .context = (uint32_t)c->context,
        .skip = (uint32_t)c->skip, .without = (uint32_t)c->without, .count = c->count, .n_payload = n_payload };
    memcpy(h.magic, magic, sizeof magic);
    to_raw(c->model_sha, h.model);
    to_raw(c->rope_sha, h.rope);
    to_raw(c->tokens_sha, h.tokens);
    regions(c, to + HEADER, n_notes, region_out);
    sha_raw(to + HEADER, n_payload, h.payload);
    sha_raw(&h, CHECKED, h.check);
    memcpy(to, &h, HEADER);
    *image = to;
    *n_bytes = HEADER + n_payload;
    return KV_OK;
}

int kv_calib_digest(const kv_calib *c, char *hex65)
{
    uint8_t *image;
    size_t n;
    RETURN_ERROR_IF(!hex65, KV_E_ARG, "kv_calib_digest: NULL argument");
    FORWARD_IF_ERROR(kv_calib_write(c, &image, &n));
    const int status = kv_sha256(image + HEADER, (double)(n - HEADER - (c->notes ? strlen(c->notes) : 0)), hex65);    /* notes are not data */
    kv_free(image);
    return status;
}

static int check_numbers(const kv_calib *c, const char *what)
{
    const size_t slots = (size_t)c->n_slots, d = (size_t)c->m->info.head_dim;
    /* 1e60: sums over 2^29 positions of squares of floats fit below; what is computed from them stays finite. */
    for (int k = 0; k < KV_CALIB_KINDS; k++) {
        for (size_t i = 0; i < slots * kv_calib_triangle(c); i++) RETURN_ERROR_IF(!(fabs(c->product[k][i]) <= 1e60), KV_E_CORRUPT, "artifact '%s': a second moment is %g", what, c->product[k][i]);
        for (size_t i = 0; i < slots * d; i++) RETURN_ERROR_IF(!(fabs(c->sum[k][i]) <= 1e60), KV_E_CORRUPT, "artifact '%s': a sum is %g", what, c->sum[k][i]);
        for (size_t i = 0; i < slots * d; i++) RETURN_ERROR_IF(!(fabsf(c->shift[k][i]) <= 1e30f), KV_E_CORRUPT, "artifact '%s': a mean is %g", what, (double)c->shift[k][i]);
    }
    for (int t = 0; t < c->n_sample; t++)
        RETURN_ERROR_IF(c->position[t] < 0 || c->position[t] >= 1 << 14, KV_E_CORRUPT, "artifact '%s': position %d of row %d is outside 0..%d", what, c->position[t], t, (1 << 14) - 1);
    for (int i = 0; i < 2; i++)
        for (size_t k = 0; k < slots * (size_t)c->n_sample * d; k++)
            RETURN_ERROR_IF((c->sample[i][k] & 0x7c00) == 0x7c00, KV_E_CORRUPT, "artifact '%s': a row is not finite", what);
    return KV_OK;
}

static int check_header(const header *h, const kv_model *model, size_t n, const char *what)
{
    const kv_model_info *m = &model->info;
    uint8_t check[32];
    char other[65], model_sha[65], rope_sha[65];
    sha_raw(h, CHECKED, check);
    RETURN_ERROR_IF(memcmp(h->magic, magic, sizeof magic) != 0, KV_E_CORRUPT, "artifact '%s': not a calibration of kelvin", what);
    RETURN_ERROR_IF(h->version != VERSION, KV_E_UNSUPPORTED, "artifact '%s': version %u, this build reads %d", what, h->version, VERSION);
    RETURN_ERROR_IF(memcmp(check, h->check, 32) != 0, KV_E_CORRUPT, "artifact '%s': the header's checksum does not fit", what);
    RETURN_ERROR_IF(h->n_layers != (uint32_t)m->n_layers || h->n_kv_heads != (uint32_t)m->n_kv_heads || h->n_heads != (uint32_t)m->n_heads || h->head_dim != (uint32_t)m->head_dim, KV_E_ARG,
        "artifact '%s': made for %u layers, %u K/V heads, %u heads, head_dim %u; model '%s' has %d, %d, %d, %d", what, h->n_layers, h->n_kv_heads, h->n_heads, h->head_dim,
        m->name ? m->name : "", m->n_layers, m->n_kv_heads, m->n_heads, m->head_dim);
    kv_calib_fingerprint(model, model_sha, rope_sha);
    to_hex(h->model, other);
    RETURN_ERROR_IF(strcmp(other, model_sha) != 0, KV_E_ARG, "artifact '%s': made for model %.16s, this model is %.16s: calibrate again", what, other, model_sha);
    to_hex(h->rope, other);
    RETURN_ERROR_IF(strcmp(other, rope_sha) != 0, KV_E_ARG, "artifact '%s': made for RoPE %.16s, this model has %.16s: calibrate again", what, other, rope_sha);
    RETURN_ERROR_IF(h->without > (KV_CALIB_NO_QUERIES | KV_CALIB_NO_ROWS), KV_E_UNSUPPORTED, "artifact '%s': leaves out %u, this build knows 0 to 3", what, h->without);
    RETURN_ERROR_IF((h->n_sample < 1) != !!(h->without & KV_CALIB_NO_ROWS) || h->n_sample > MAX_SAMPLE || h->n_block > MAX_BLOCKS || h->n_notes > KV_CALIB_NOTES || h->n_chunks < 1 || h->n_chunks > 1 << 30 ||
        h->context < 1 || h->context > 1 << 14 || h->skip >= h->context, KV_E_CORRUPT, "artifact '%s': a count is out of its range", what);
    RETURN_ERROR_IF(!(h->count >= h->n_sample && h->count <= 0x1p53) || h->count != floor(h->count), KV_E_CORRUPT, "artifact '%s': %g positions behind %u rows", what, h->count, h->n_sample);
    const uint64_t want = payload_bytes(model, h->n_sample, h->n_block, h->n_notes, h->without);
    RETURN_ERROR_IF(h->n_payload != want || n - HEADER != want, KV_E_CORRUPT, "artifact '%s': %zu bytes of payload, its header makes %llu", what, n - HEADER, (unsigned long long)want);
    return KV_OK;
}

int kv_calib_parse(kv_calib **out, kv_model *m, const uint8_t *data, size_t n, const char *what)
{
    int status;
    header h;
    uint8_t digest[32];
    kv_calib *c = NULL;
    RETURN_ERROR_IF(!out || !m || !data || !what, KV_E_ARG, "kv_calib_parse: NULL argument");
    *out = NULL;
    RETURN_ERROR_IF(n < HEADER, KV_E_CORRUPT, "artifact '%s': %zu bytes are less than a header's %d", what, n, HEADER);
    memcpy(&h, data, HEADER);
    FORWARD_IF_ERROR(check_header(&h, m, n, what));
    sha_raw(data + HEADER, n - HEADER, digest);
    FAIL_IF(memcmp(digest, h.payload, 32) != 0, KV_E_CORRUPT, "artifact '%s': the payload's checksum does not fit", what);
    FAIL_IF_ERROR(kv_calib_alloc(&c, m, kv_max(1, (int)h.n_sample)));
    c->n_sample = (int)h.n_sample;
    c->n_block = c->cap_block = (int)h.n_block;
    c->n_chunks = (int)h.n_chunks;
    c->context = (int)h.context;
    c->skip = (int)h.skip;
    c->without = (int)h.without;
    c->count = h.count;
    to_hex(h.tokens, c->tokens_sha);
    if (h.n_block && !(c->block = kv_alloc_array(h.n_block, sizeof *c->block, false))) { status = KV_E_NOMEM; goto fail; }
    if (h.n_notes && !(c->notes = kv_zalloc((size_t)h.n_notes + 1))) { status = KV_E_NOMEM; goto fail; }
    regions(c, (uint8_t *)data + HEADER, h.n_notes, region_in);
    FAIL_IF_ERROR(check_numbers(c, what));
    *out = c;
    return KV_OK;
fail:
    kv_calib_free(c);
    return status;
}

/* A file that was not written whole never has the name. */
int kv_calib_save(const kv_calib *c, const char *path)
{
    int status = KV_OK;
    uint8_t *image = NULL;
    size_t n;
    char part[4096];
    FILE *f = NULL;
    RETURN_ERROR_IF(!path, KV_E_ARG, "kv_calib_save: NULL argument");
    RETURN_ERROR_IF(snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part, KV_E_ARG, "artifact: a path of %zu bytes is too long", strlen(path));
    FORWARD_IF_ERROR(kv_calib_write(c, &image, &n));
    FAIL_IF(!(f = fopen(part, "wb")), KV_E_IO, "artifact '%s': %s", part, strerror(errno));
    FAIL_IF(fwrite(image, 1, n, f) != n || fflush(f) != 0, KV_E_IO, "artifact '%s': %s", part, strerror(errno));
    FAIL_IF(rename(part, path) != 0, KV_E_IO, "artifact '%s': %s", path, strerror(errno));
fail:
    if (f) {
        fclose(f);
        if (status < 0) unlink(part);
    }
    kv_free(image);
    return status;
}

int kv_calib_load(kv_calib **out, kv_model *m, const char *path)
{
    int status = KV_OK;
    uint8_t *image = NULL;
    RETURN_ERROR_IF(!out || !m || !path, KV_E_ARG, "kv_calib_load: NULL argument");
    *out = NULL;
    FILE *f = fopen(path, "rb");
    FAIL_IF(!f, KV_E_IO, "artifact '%s': %s", path, strerror(errno));
    FAIL_IF(fseek(f, 0, SEEK_END) != 0, KV_E_IO, "artifact '%s': %s", path, strerror(errno));
    const long n = ftell(f);
    FAIL_IF(n < 0 || n == LONG_MAX, KV_E_IO, "artifact '%s': not a plain file", path);
    rewind(f);
    FAIL_IF(!(image = kv_alloc((size_t)n + 1)), KV_E_NOMEM, "artifact '%s': %ld bytes do not fit in memory", path, n);
    FAIL_IF(fread(image, 1, (size_t)n, f) != (size_t)n, KV_E_IO, "artifact '%s': cannot be read", path);
    status = kv_calib_parse(out, m, image, (size_t)n, path);
fail:
    if (f) fclose(f);
    kv_free(image);
    return status;
}
