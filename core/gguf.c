/* gguf.c -- GGUF v2 and v3 (little-endian), mapped read-only and indexed once.
 *
 *   | "GGUF" | version u32 | n_tensors u64 | n_keys u64 |
 *   | n_keys x:    key string | type u32 | value |
 *   | n_tensors x: name string | n_dims u32 | dim u64 x n_dims | type u32 | offset u64 |
 *   | padding to general.alignment (32) | tensor data; offsets count from here |
 *
 *   string: | length u64 | bytes, no NUL |        array value: | type u32 | count u64 | elements |
 *
 * A file is hostile until proven otherwise: every count is held against the bytes that are left before anything is
 * allocated, so memory stays within a constant times the file size.  Lookup is a binary search over sorted names: a
 * hash table would let a crafted file make every name collide. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "model.h"

enum {
    MIN_KEY_BYTES = 8 + 1 + 4 + 1,             /* the shortest key: one letter and one byte of value */
    MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8,  /* the shortest tensor entry: one letter and one dim */
    MAX_NAME = 65535,                          /* bytes of a key or tensor name: the specification's limit for keys */
    MAX_ALIGNMENT = 1 << 20,
    SHOWN = 8,                                 /* elements of an array, and bytes/4 of its strings, in its text */
};

typedef struct { const char *name; int index; } named;
/* count: bytes of a string, elements of an array; text: where its text begins */
typedef struct { char *name; const uint8_t *value; int type, elem; size_t count, text; } key_entry;

struct kv_gguf {
    const uint8_t  *data;
    size_t          n;
    void           *map;                       /* NULL when the caller keeps the bytes */
    char           *what;
    key_entry      *key;
    kv_gguf_tensor *tensor;
    named          *key_order, *tensor_order;
    int             n_keys, n_tensors;
    char           *text;                      /* NUL-terminated texts of all values */
    size_t          n_text, cap_text;
};

typedef struct { const uint8_t *p; size_t n, at; const char *what; } cursor;
typedef struct { char s[96]; } shown;          /* a name cut and cleaned for a one-line message */

static shown show(const void *s, size_t n)
{
    shown r;
    const size_t keep = n < 64 ? n : 64;
    for (size_t i = 0; i < keep; i++) {
        const unsigned char c = ((const unsigned char *)s)[i];
        r.s[i] = (char)(c < 32 || c == 127 ? '?' : c);
    }
    strcpy(r.s + keep, n > keep ? "..." : "");
    return r;
}

static int type_size(int type)
{
    static const uint8_t size[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return type >= 0 && type <= KV_GGUF_F64 ? size[type] : 0;
}

static const char *type_name(int type)
{
    static const char *const name[] = { "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64" };
    return name[type];
}

static double load_number(const uint8_t *p, int type)
{
    switch (type) {
    case KV_GGUF_U8:  return *p;
    case KV_GGUF_I8:  return (int8_t)*p;
    case KV_GGUF_U16: return kv_load_u16(p);
    case KV_GGUF_I16: return (int16_t)kv_load_u16(p);
    case KV_GGUF_U32: return kv_load_u32(p);
    case KV_GGUF_I32: return (int32_t)kv_load_u32(p);
    case KV_GGUF_F32: return kv_bits_f32(kv_load_u32(p));
    case KV_GGUF_BOOL: return *p != 0;
    case KV_GGUF_U64: return (double)kv_load_u64(p);
    case KV_GGUF_I64: return (double)(int64_t)kv_load_u64(p);
    default: {
        double d;
        memcpy(&d, p, 8);
        return d;
    } }
}

/* ---- reading */

static int take(cursor *c, size_t n, const uint8_t **p, const char *thing)
{
    *p = c->p + c->at;
    RETURN_ERROR_IF(n > c->n - c->at, KV_E_CORRUPT, "gguf '%s': %s at byte %zu needs %zu bytes, the file has %zu left",
                    c->what, thing, c->at, n, c->n - c->at);
    c->at += n;
    return KV_OK;
}

static int take_u32(cursor *c, uint32_t *v, const char *thing)
{
    const uint8_t *p;
    FORWARD_IF_ERROR(take(c, 4, &p, thing));
    *v = kv_load_u32(p);
    return KV_OK;
}

static int take_u64(cursor *c, uint64_t *v, const char *thing)
{
    const uint8_t *p;
    FORWARD_IF_ERROR(take(c, 8, &p, thing));
    *v = kv_load_u64(p);
    return KV_OK;
}

static int take_string(cursor *c, const char **s, size_t *n, const char *thing)
{
    uint64_t len;
    const uint8_t *p;
    FORWARD_IF_ERROR(take_u64(c, &len, thing));
    FORWARD_IF_ERROR(take(c, (size_t)len, &p, thing));
    *s = (const char *)p;
    *n = (size_t)len;
    return KV_OK;
}

/* A name, copied with a NUL; the caller frees it. */
static int take_name(cursor *c, char **copy, const char *thing)
{
    const char *s;
    size_t n;
    FORWARD_IF_ERROR(take_string(c, &s, &n, thing));
    RETURN_ERROR_IF(n == 0 || n > MAX_NAME, KV_E_CORRUPT, "gguf '%s': a %s of %zu bytes; 1..%d are allowed", c->what, thing, n, MAX_NAME);
    RETURN_ERROR_IF(memchr(s, 0, n), KV_E_CORRUPT, "gguf '%s': %s '%s' holds a NUL byte", c->what, thing, show(s, n).s);
    if (!(*copy = kv_alloc(n + 1))) return KV_E_NOMEM;
    memcpy(*copy, s, n);
    (*copy)[n] = 0;
    return KV_OK;
}

static int take_value(cursor *c, key_entry *k)
{
    uint32_t type;
    const uint8_t *p;
    const shown name = show(k->name, strlen(k->name));
    FORWARD_IF_ERROR(take_u32(c, &type, name.s));
    RETURN_ERROR_IF(type > KV_GGUF_F64, KV_E_CORRUPT, "gguf '%s': key '%s' has type %u; 0..12 are known", c->what, name.s, type);
    k->type = (int)type;
    if (type == KV_GGUF_STR) {
        const char *s;
        FORWARD_IF_ERROR(take_string(c, &s, &k->count, name.s));
        k->value = (const uint8_t *)s;
        return KV_OK;
    }
    if (type == KV_GGUF_ARR) {
        uint32_t elem;
        uint64_t count;
        FORWARD_IF_ERROR(take_u32(c, &elem, name.s));
        FORWARD_IF_ERROR(take_u64(c, &count, name.s));
        RETURN_ERROR_IF(elem > KV_GGUF_F64 || elem == KV_GGUF_ARR, KV_E_CORRUPT, "gguf '%s': key '%s' is an array of type %u; numbers, bools and strings are allowed",
                        c->what, name.s, elem);
        const size_t least = elem == KV_GGUF_STR ? 8 : (size_t)type_size((int)elem), left = c->n - c->at;
        RETURN_ERROR_IF(count > left / least, KV_E_CORRUPT, "gguf '%s': key '%s' is an array of %llu elements; the %zu bytes left hold at most %zu",
                        c->what, name.s, (unsigned long long)count, left, left / least);
        k->elem = (int)elem;
        k->count = (size_t)count;
        k->value = c->p + c->at;
        if (elem != KV_GGUF_STR) return take(c, (size_t)count * least, &p, name.s);
        for (uint64_t i = 0; i < count; i++) {
            const char *s;
            size_t n;
            FORWARD_IF_ERROR(take_string(c, &s, &n, name.s));
        }
        return KV_OK;
    }
    FORWARD_IF_ERROR(take(c, (size_t)type_size(k->type), &p, name.s));
    k->value = p;
    return KV_OK;
}

/* t->name is made already. */
static int take_tensor(cursor *c, kv_gguf_tensor *t, uint64_t *offset)
{
    uint32_t n_dims, type;
    const shown name = show(t->name, strlen(t->name));
    FORWARD_IF_ERROR(take_u32(c, &n_dims, name.s));
    RETURN_ERROR_IF(n_dims < 1 || n_dims > 4, KV_E_CORRUPT, "gguf '%s': tensor '%s' has %u dims; 1..4 are allowed", c->what, name.s, n_dims);
    t->n_dims = (int)n_dims;
    uint64_t count = 1;
    for (uint32_t d = 0; d < 4; d++) {
        uint64_t v = 1;
        if (d < n_dims) FORWARD_IF_ERROR(take_u64(c, &v, name.s));
        RETURN_ERROR_IF(v < 1 || v > INT64_MAX, KV_E_CORRUPT, "gguf '%s': tensor '%s' has dim %u = %llu; 1..2^63-1 are allowed", c->what, name.s, d, (unsigned long long)v);
        RETURN_ERROR_IF(__builtin_mul_overflow(count, v, &count) || count > INT64_MAX, KV_E_CORRUPT,
                        "gguf '%s': tensor '%s' has more than 2^63-1 elements at dim %u = %llu", c->what, name.s, d, (unsigned long long)v);
        t->dim[d] = (int64_t)v;
    }
    FORWARD_IF_ERROR(take_u32(c, &type, name.s));
    RETURN_ERROR_IF(type > INT32_MAX, KV_E_CORRUPT, "gguf '%s': tensor '%s' has type %u; 0..2^31-1 are allowed", c->what, name.s, type);
    t->type = (int)type;
    FORWARD_IF_ERROR(take_u64(c, offset, name.s));
    int block, bytes;
    if (!kv_weight_block(t->type, &block, &bytes)) return KV_OK;       /* its size is unknown: whoever uses it says so */
    RETURN_ERROR_IF(t->dim[0] % block, KV_E_CORRUPT, "gguf '%s': tensor '%s' has rows of %lld values; %s needs a multiple of %d",
                    c->what, name.s, (long long)t->dim[0], kv_weight_type_name(t->type), block);
    RETURN_ERROR_IF(!kv_mul((size_t)(count / (uint64_t)block), (size_t)bytes, &t->n_bytes), KV_E_CORRUPT,
                    "gguf '%s': tensor '%s' has %llu values, more bytes than a size holds", c->what, name.s, (unsigned long long)count);
    return KV_OK;
}

/* ---- the index */

static int by_name(const void *a, const void *b) { return strcmp(((const named *)a)->name, ((const named *)b)->name); }
static int by_data(const void *a, const void *b)
{
    const kv_gguf_tensor *const x = *(const kv_gguf_tensor *const *)a, *const y = *(const kv_gguf_tensor *const *)b;
    return x->data != y->data ? (x->data < y->data ? -1 : 1) : (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes);
}

static int sort_names(const kv_gguf *g, named *order, int n, const char *thing)
{
    qsort(order, (size_t)n, sizeof *order, by_name);
    for (int i = 1; i < n; i++)
        RETURN_ERROR_IF(strcmp(order[i - 1].name, order[i].name) == 0, KV_E_CORRUPT, "gguf '%s': %s '%s' is there twice", g->what, thing,
                        show(order[i].name, strlen(order[i].name)).s);
    return KV_OK;
}

static int find(const named *order, int n, const char *name)
{
    const named wanted = { name, 0 };
    const named *const hit = n ? bsearch(&wanted, order, (size_t)n, sizeof *order, by_name) : NULL;
    return hit ? hit->index : -1;
}

static const key_entry *find_key(const kv_gguf *g, const char *key)
{
    const int i = find(g->key_order, g->n_keys, key);
    return i < 0 ? NULL : &g->key[i];
}

static int check_overlap(const kv_gguf *g)
{
    const kv_gguf_tensor **order = kv_alloc_array((size_t)g->n_tensors, sizeof *order, false);
    if (!order) return KV_E_NOMEM;
    for (int i = 0; i < g->n_tensors; i++) order[i] = &g->tensor[i];
    qsort(order, (size_t)g->n_tensors, sizeof *order, by_data);
    int status = KV_OK;
    for (int i = 1; i < g->n_tensors && status == KV_OK; i++)
        if (order[i - 1]->n_bytes > (size_t)(order[i]->data - order[i - 1]->data))
            status = kv_set_error(KV_E_CORRUPT, "gguf '%s': tensors '%s' and '%s' overlap", g->what, show(order[i - 1]->name, strlen(order[i - 1]->name)).s,
                                  show(order[i]->name, strlen(order[i]->name)).s);
    kv_free(order);
    return status;
}

/* ---- values as text, made once so that reading them needs no lock */

static int text_put(kv_gguf *g, const char *s, size_t n)
{
    if (g->cap_text - g->n_text < n) {
        const size_t cap = (g->n_text + n) * 2 + 256;
        char *const bigger = kv_alloc(cap);
        if (!bigger) return KV_E_NOMEM;
        if (g->n_text) memcpy(bigger, g->text, g->n_text);
        kv_free(g->text);
        g->text = bigger;
        g->cap_text = cap;
    }
    memcpy(g->text + g->n_text, s, n);
    g->n_text += n;
    return KV_OK;
}

static int text_string(kv_gguf *g, const uint8_t *s, size_t n, size_t most)
{
    size_t keep = n < most ? n : most;
    if (keep < n) while (keep && (s[keep] & 0xc0) == 0x80) keep--;      /* never half a UTF-8 letter */
    for (size_t i = 0; i < keep; i++) {
        char esc[5];
        const int len = s[i] == '\n' ? snprintf(esc, sizeof esc, "\\n") : s[i] == '\t' ? snprintf(esc, sizeof esc, "\\t")
                      : s[i] < 32 || s[i] == 127 ? snprintf(esc, sizeof esc, "\\x%02x", s[i]) : snprintf(esc, sizeof esc, "%c", s[i]);
        FORWARD_IF_ERROR(text_put(g, esc, (size_t)len));
    }
    return keep < n ? text_put(g, "...", 3) : KV_OK;
}

static int text_number(kv_gguf *g, const uint8_t *p, int type)
{
    char s[40];
    int n;
    if (type == KV_GGUF_BOOL) n = snprintf(s, sizeof s, "%s", *p ? "true" : "false");
    else if (type == KV_GGUF_U64) n = snprintf(s, sizeof s, "%llu", (unsigned long long)kv_load_u64(p));
    else if (type == KV_GGUF_I64) n = snprintf(s, sizeof s, "%lld", (long long)kv_load_u64(p));
    else n = snprintf(s, sizeof s, type == KV_GGUF_F32 ? "%.9g" : "%.17g", load_number(p, type));
    return text_put(g, s, (size_t)n);
}

static int text_value(kv_gguf *g, key_entry *k)
{
    k->text = g->n_text;
    if (k->type == KV_GGUF_STR) FORWARD_IF_ERROR(text_string(g, k->value, k->count, k->count));
    else if (k->type != KV_GGUF_ARR) FORWARD_IF_ERROR(text_number(g, k->value, k->type));
    else {
        char head[64];
        const uint8_t *p = k->value;
        FORWARD_IF_ERROR(text_put(g, head, (size_t)snprintf(head, sizeof head, "%s x %zu: [", type_name(k->elem), k->count)));
        for (size_t i = 0; i < k->count && i < SHOWN; i++) {
            if (i) FORWARD_IF_ERROR(text_put(g, ", ", 2));
            if (k->elem == KV_GGUF_STR) {
                const size_t n = (size_t)kv_load_u64(p);
                FORWARD_IF_ERROR(text_string(g, p + 8, n, 4 * SHOWN));
                p += 8 + n;
            } else {
                FORWARD_IF_ERROR(text_number(g, p, k->elem));
                p += type_size(k->elem);
            }
        }
        FORWARD_IF_ERROR(k->count > SHOWN ? text_put(g, ", ...]", 6) : text_put(g, "]", 1));
    }
    return text_put(g, "", 1);
}

/* ---- parse */

static int parse_keys(kv_gguf *g, cursor *c, int n_keys)
{
    for (int i = 0; i < n_keys; i++) {
        key_entry *const k = &g->key[i];
        FORWARD_IF_ERROR(take_name(c, &k->name, "key"));
        g->n_keys = i + 1;
        g->key_order[i] = (named){ k->name, i };
        FORWARD_IF_ERROR(take_value(c, k));
        FORWARD_IF_ERROR(text_value(g, k));
    }
    return sort_names(g, g->key_order, n_keys, "key");
}

static int parse_tensors(kv_gguf *g, cursor *c, int n_tensors, size_t alignment)
{
    uint64_t *const offset = kv_alloc_array((size_t)n_tensors, sizeof *offset, false);
    if (!offset) return KV_E_NOMEM;
    int status = KV_OK;
    for (int i = 0; i < n_tensors; i++) {
        char *name;
        FAIL_IF_ERROR(take_name(c, &name, "tensor name"));
        g->tensor[i].name = name;
        g->n_tensors = i + 1;
        g->tensor_order[i] = (named){ name, i };
        FAIL_IF_ERROR(take_tensor(c, &g->tensor[i], &offset[i]));
    }
    FAIL_IF_ERROR(sort_names(g, g->tensor_order, n_tensors, "tensor"));
    const size_t base = kv_round_up(c->at, alignment), room = base <= g->n ? g->n - base : 0;
    for (int i = 0; i < n_tensors; i++) {
        kv_gguf_tensor *const t = &g->tensor[i];
        const shown name = show(t->name, strlen(t->name));
        FAIL_IF(offset[i] % alignment, KV_E_CORRUPT, "gguf '%s': tensor '%s' has offset %llu, not a multiple of the alignment %zu", g->what, name.s,
                (unsigned long long)offset[i], alignment);
        FAIL_IF(offset[i] > room || t->n_bytes > room - offset[i] || base > g->n, KV_E_CORRUPT, "gguf '%s': tensor '%s' has %zu bytes at offset %llu; the data has %zu",
                g->what, name.s, t->n_bytes, (unsigned long long)offset[i], room);
        t->data = g->data + base + offset[i];
    }
    status = check_overlap(g);
fail:
    kv_free(offset);
    return status;
}

static int parse(kv_gguf *g)
{
    cursor c = { g->data, g->n, 0, g->what };
    const uint8_t *magic;
    uint32_t version;
    uint64_t n_tensors, n_keys;
    RETURN_ERROR_IF(g->n < 4 || memcmp(g->data, "GGUF", 4) != 0, KV_E_CORRUPT, "gguf '%s': the file does not begin with 'GGUF'", g->what);
    FORWARD_IF_ERROR(take(&c, 4, &magic, "magic"));
    FORWARD_IF_ERROR(take_u32(&c, &version, "version"));
    RETURN_ERROR_IF((version & 0xffff) == 0 && version, KV_E_UNSUPPORTED, "gguf '%s': version 0x%08x is a big-endian file; little-endian 2 and 3 are read", g->what, version);
    RETURN_ERROR_IF(version == 1, KV_E_UNSUPPORTED, "gguf '%s': version 1 is not read; 2 and 3 are", g->what);
    RETURN_ERROR_IF(version < 2 || version > 3, KV_E_CORRUPT, "gguf '%s': version %u is outside 2..3", g->what, version);
    FORWARD_IF_ERROR(take_u64(&c, &n_tensors, "tensor count"));
    FORWARD_IF_ERROR(take_u64(&c, &n_keys, "key count"));
    const size_t left = c.n - c.at;
    RETURN_ERROR_IF(n_keys > left / MIN_KEY_BYTES || n_keys > INT32_MAX, KV_E_CORRUPT, "gguf '%s': %llu keys; the %zu bytes left hold at most %zu", g->what,
                    (unsigned long long)n_keys, left, left / MIN_KEY_BYTES);
    RETURN_ERROR_IF(n_tensors > left / MIN_TENSOR_BYTES || n_tensors > INT32_MAX, KV_E_CORRUPT, "gguf '%s': %llu tensors; the %zu bytes left hold at most %zu", g->what,
                    (unsigned long long)n_tensors, left, left / MIN_TENSOR_BYTES);
    g->key = kv_alloc_array((size_t)n_keys, sizeof *g->key, true);
    g->key_order = kv_alloc_array((size_t)n_keys, sizeof *g->key_order, false);
    g->tensor = kv_alloc_array((size_t)n_tensors, sizeof *g->tensor, true);
    g->tensor_order = kv_alloc_array((size_t)n_tensors, sizeof *g->tensor_order, false);
    if (!g->key || !g->key_order || !g->tensor || !g->tensor_order) return KV_E_NOMEM;

    FORWARD_IF_ERROR(parse_keys(g, &c, (int)n_keys));
    double alignment = 32;
    if (kv_gguf_number(g, "general.alignment", &alignment))
        RETURN_ERROR_IF(!(alignment >= 8 && alignment <= MAX_ALIGNMENT) || ((int)alignment & ((int)alignment - 1)) || alignment != (int)alignment, KV_E_CORRUPT,
                        "gguf '%s': general.alignment=%g is not a power of two in 8..%d", g->what, alignment, MAX_ALIGNMENT);
    return parse_tensors(g, &c, (int)n_tensors, (size_t)alignment);
}

static int finish(kv_gguf **out, kv_gguf *g)
{
    const int status = g->what ? parse(g) : KV_E_NOMEM;
    if (status < 0) {
        kv_gguf_close(g);
        return status;
    }
    *out = g;
    return KV_OK;
}

static char *copy_text(const char *s)
{
    char *const copy = kv_alloc(strlen(s) + 1);
    return copy ? strcpy(copy, s) : NULL;
}

int kv_gguf_parse(kv_gguf **out, const uint8_t *data, size_t n, const char *what)
{
    *out = NULL;
    kv_gguf *const g = kv_zalloc(sizeof *g);
    if (!g) return KV_E_NOMEM;
    g->data = data;
    g->n = n;
    g->what = copy_text(what);
    return finish(out, g);
}

int kv_gguf_open(kv_gguf **out, const char *path)
{
    *out = NULL;
    char why[96];
    struct stat st;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    RETURN_ERROR_IF(fd < 0, KV_E_IO, "gguf '%s': %s", path, strerror_r(errno, why, sizeof why));
    int status = KV_OK;
    if (fstat(fd, &st) != 0) status = kv_set_error(KV_E_IO, "gguf '%s': %s", path, strerror_r(errno, why, sizeof why));
    else if (!S_ISREG(st.st_mode)) status = kv_set_error(KV_E_IO, "gguf '%s': not a regular file", path);
    else if (st.st_size < 4) status = kv_set_error(KV_E_CORRUPT, "gguf '%s': %lld bytes; the header alone has 24", path, (long long)st.st_size);
    void *const map = status < 0 ? MAP_FAILED : mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (status == KV_OK && map == MAP_FAILED) status = kv_set_error(KV_E_IO, "gguf '%s': mmap: %s", path, strerror_r(errno, why, sizeof why));
    close(fd);
    if (status < 0) return status;
    kv_gguf *const g = kv_zalloc(sizeof *g);
    if (!g) {
        munmap(map, (size_t)st.st_size);
        return KV_E_NOMEM;
    }
    g->data = g->map = map;
    g->n = (size_t)st.st_size;
    g->what = copy_text(path);
    return finish(out, g);
}

void kv_gguf_close(kv_gguf *g)
{
    if (!g) return;
    for (int i = 0; i < g->n_keys; i++) kv_free(g->key[i].name);
    for (int i = 0; i < g->n_tensors; i++) kv_free((void *)g->tensor[i].name);
    kv_free(g->key);
    kv_free(g->key_order);
    kv_free(g->tensor);
    kv_free(g->tensor_order);
    kv_free(g->text);
    kv_free(g->what);
    if (g->map) munmap(g->map, g->n);
    kv_free(g);
}

/* ---- reading the index */

size_t kv_gguf_file_bytes(const kv_gguf *g) { return g->n; }
int    kv_gguf_n_tensors(const kv_gguf *g)  { return g->n_tensors; }
int    kv_gguf_n_keys(const kv_gguf *g)     { return g->n_keys; }

const kv_gguf_tensor *kv_gguf_tensor_at(const kv_gguf *g, int i) { return i >= 0 && i < g->n_tensors ? &g->tensor[i] : NULL; }
const char *kv_gguf_key_at(const kv_gguf *g, int i)     { return i >= 0 && i < g->n_keys ? g->key[i].name : NULL; }
const char *kv_gguf_value_text(const kv_gguf *g, int i) { return i >= 0 && i < g->n_keys ? g->text + g->key[i].text : NULL; }

const kv_gguf_tensor *kv_gguf_find(const kv_gguf *g, const char *name)
{
    const int i = find(g->tensor_order, g->n_tensors, name);
    return i < 0 ? NULL : &g->tensor[i];
}

int kv_gguf_number(const kv_gguf *g, const char *key, double *v)
{
    const key_entry *const k = find_key(g, key);
    if (!k || !type_size(k->type)) return 0;
    *v = load_number(k->value, k->type);
    return 1;
}

int kv_gguf_string(const kv_gguf *g, const char *key, const char **s, size_t *n)
{
    const key_entry *const k = find_key(g, key);
    if (!k || k->type != KV_GGUF_STR) return 0;
    *s = (const char *)k->value;
    *n = k->count;
    return 1;
}

int kv_gguf_array(const kv_gguf *g, const char *key, int *type, size_t *n)
{
    const key_entry *const k = find_key(g, key);
    if (!k || k->type != KV_GGUF_ARR) return 0;
    *type = k->elem;
    *n = k->count;
    return 1;
}

int kv_gguf_array_number(const kv_gguf *g, const char *key, size_t i, double *v)
{
    const key_entry *const k = find_key(g, key);
    if (!k || k->type != KV_GGUF_ARR || !type_size(k->elem) || i >= k->count) return 0;
    *v = load_number(k->value + i * (size_t)type_size(k->elem), k->elem);
    return 1;
}

int kv_gguf_array_strings(const kv_gguf *g, const char *key, const char ***s, uint32_t **len, size_t *n)
{
    const key_entry *const k = find_key(g, key);
    if (!k || k->type != KV_GGUF_ARR || k->elem != KV_GGUF_STR) return 0;
    const char **const at = kv_alloc_array(k->count, sizeof *at, false);
    uint32_t *const bytes = kv_alloc_array(k->count, sizeof *bytes, false);
    int status = at && bytes ? 1 : KV_E_NOMEM;
    const uint8_t *p = k->value;
    for (size_t i = 0; i < k->count && status == 1; i++) {
        const uint64_t size = kv_load_u64(p);
        if (size > UINT32_MAX) status = kv_set_error(KV_E_CORRUPT, "gguf '%s': string %zu of key '%s' has %llu bytes; 2^32-1 are allowed", g->what, i,
                                                     show(k->name, strlen(k->name)).s, (unsigned long long)size);
        else {
            at[i] = (const char *)p + 8;
            bytes[i] = (uint32_t)size;
            p += 8 + size;
        }
    }
    if (status < 0) {
        kv_free(at);
        kv_free(bytes);
        return status;
    }
    *s = at;
    *len = bytes;
    *n = k->count;
    return 1;
}
