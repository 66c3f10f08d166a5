/* json.c -- strict JSON, read through cJSON (this is the only file that knows it).
 *
 * cJSON takes more than JSON: control characters as blanks and inside strings, "01", bytes that are not UTF-8; and it
 * says only where it stopped.  So a text is first checked against RFC 8259 here, which gives the line, the column and
 * the reason, and cJSON then builds the tree of a text known to be good.  Beyond the RFC, refused because something
 * would be lost in silence: a key given twice in an object, \u0000 (strings here end at NUL), a number past a double. */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include "internal.h"

enum { MAX_DEPTH = 128,                 /* containers in containers; below cJSON's own 1000 */
       MAX_NUMBER = 63 };               /* characters: what cJSON copies to parse one */

struct kv_json { cJSON *root; };

typedef struct checker { const char *text, *p, *end, *why; int depth; } checker;

static bool refuse(checker *c, const char *at, const char *why) { c->p = at; c->why = why; return false; }

static void skip_blanks(checker *c)
{
    while (c->p < c->end && (*c->p == ' ' || *c->p == '\t' || *c->p == '\n' || *c->p == '\r')) c->p++;
}

static bool is_digit(const checker *c) { return c->p < c->end && *c->p >= '0' && *c->p <= '9'; }

static bool check_number(checker *c)
{
    const char *const start = c->p;
    if (*c->p == '-') c->p++;
    if (!is_digit(c)) return refuse(c, c->p, "a digit is missing");
    if (*c->p++ == '0' && is_digit(c)) return refuse(c, start, "a number starts with 0");
    while (is_digit(c)) c->p++;
    if (c->p < c->end && *c->p == '.') {
        c->p++;
        if (!is_digit(c)) return refuse(c, c->p, "a digit is missing after the point");
        while (is_digit(c)) c->p++;
    }
    if (c->p < c->end && (*c->p == 'e' || *c->p == 'E')) {
        c->p++;
        if (c->p < c->end && (*c->p == '+' || *c->p == '-')) c->p++;
        if (!is_digit(c)) return refuse(c, c->p, "a digit is missing in the exponent");
        while (is_digit(c)) c->p++;
    }
    if (c->p - start > MAX_NUMBER) return refuse(c, start, "a number is longer than 63 characters");
    return true;
}

/* Four hex digits at p, or -1. */
static int hex4(const char *p, const char *end)
{
    int v = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        const char ch = p[i];
        const int d = ch >= '0' && ch <= '9' ? ch - '0' : ch >= 'a' && ch <= 'f' ? ch - 'a' + 10 : ch >= 'A' && ch <= 'F' ? ch - 'A' + 10 : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

/* Bytes of the well-formed UTF-8 sequence at p, or 0. */
static int utf8_length(const unsigned char *p, const unsigned char *end)
{
    const int n = *p < 0x80 ? 1 : *p >= 0xC2 && *p < 0xE0 ? 2 : *p >= 0xE0 && *p < 0xF0 ? 3 : *p >= 0xF0 && *p < 0xF5 ? 4 : 0;
    if (n == 0 || end - p < n) return 0;
    for (int i = 1; i < n; i++) if ((p[i] & 0xC0) != 0x80) return 0;
    if ((*p == 0xE0 && p[1] < 0xA0) || (*p == 0xED && p[1] > 0x9F) || (*p == 0xF0 && p[1] < 0x90) || (*p == 0xF4 && p[1] > 0x8F)) return 0;
    return n;
}

static bool check_escape(checker *c)
{
    const char *const start = c->p++;
    if (c->p == c->end) return refuse(c, start, "a string is not closed");
    const char kind = *c->p++;
    if (kind != 'u') return strchr("\"\\/bfnrt", kind) && kind ? true : refuse(c, start, "an escape is none of \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX");
    const int v = hex4(c->p, c->end);
    if (v < 0) return refuse(c, start, "\\u wants four hex digits");
    if (v == 0) return refuse(c, start, "\\u0000 is not allowed");
    c->p += 4;
    if (v < 0xD800 || v > 0xDFFF) return true;
    const int low = v < 0xDC00 && c->end - c->p >= 6 && c->p[0] == '\\' && c->p[1] == 'u' ? hex4(c->p + 2, c->end) : -1;
    if (low < 0xDC00 || low > 0xDFFF) return refuse(c, start, "half of a surrogate pair");
    c->p += 6;
    return true;
}

static bool check_string(checker *c)
{
    const char *const start = c->p++;
    while (c->p < c->end && *c->p != '"') {
        if (*c->p == '\\') {
            if (!check_escape(c)) return false;
            continue;
        }
        if ((unsigned char)*c->p < 0x20) return refuse(c, c->p, "a control character in a string");
        const int n = utf8_length((const unsigned char *)c->p, (const unsigned char *)c->end);
        if (n == 0) return refuse(c, c->p, "bytes that are not UTF-8");
        c->p += n;
    }
    if (c->p == c->end) return refuse(c, start, "a string is not closed");
    c->p++;
    return true;
}

static bool check_value(checker *c);

static bool check_container(checker *c)
{
    const char *const start = c->p;
    const bool object = *c->p++ == '{';
    const char close = object ? '}' : ']';
    if (++c->depth > MAX_DEPTH) return refuse(c, start, "nested deeper than 128");
    skip_blanks(c);
    if (c->p < c->end && *c->p == close) goto closed;
    for (;;) {
        if (object) {
            skip_blanks(c);
            if (c->p == c->end || *c->p != '"') return refuse(c, c->p, "a key in quotes is missing");
            if (!check_string(c)) return false;
            skip_blanks(c);
            if (c->p == c->end || *c->p != ':') return refuse(c, c->p, "':' is missing after a key");
            c->p++;
        }
        if (!check_value(c)) return false;
        if (c->p < c->end && *c->p == close) break;
        if (c->p == c->end || *c->p != ',') return refuse(c, c->p, object ? "',' or '}' is missing" : "',' or ']' is missing");
        c->p++;
    }
closed:
    c->p++;
    c->depth--;
    return true;
}

/* A value and the blanks around it. */
static bool check_value(checker *c)
{
    skip_blanks(c);
    if (c->p == c->end) return refuse(c, c->p, "a value is missing");
    bool ok;
    const size_t left = (size_t)(c->end - c->p);
    switch (*c->p) {
    case '{': case '[': ok = check_container(c); break;
    case '"': ok = check_string(c); break;
    case 't': ok = left >= 4 && !memcmp(c->p, "true", 4) ? (c->p += 4, true) : refuse(c, c->p, "an unknown word"); break;
    case 'n': ok = left >= 4 && !memcmp(c->p, "null", 4) ? (c->p += 4, true) : refuse(c, c->p, "an unknown word"); break;
    case 'f': ok = left >= 5 && !memcmp(c->p, "false", 5) ? (c->p += 5, true) : refuse(c, c->p, "an unknown word"); break;
    default:  ok = *c->p == '-' || is_digit(c) ? check_number(c) : refuse(c, c->p, "not a value");
    }
    if (ok) skip_blanks(c);
    return ok;
}

static int by_key(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* What the checker cannot see without a table: keys given twice, numbers that became infinite. */
static int check_tree(const cJSON *n, const char *what)
{
    if (cJSON_IsNumber(n))
        RETURN_ERROR_IF(!isfinite(n->valuedouble), KV_E_CORRUPT, "%s: the number%s%s does not fit a double", what, n->string ? " of key " : "", n->string ? n->string : "");
    size_t count = 0;
    for (const cJSON *k = n->child; k; k = k->next, count++) FORWARD_IF_ERROR(check_tree(k, what));
    if (!cJSON_IsObject(n) || count < 2) return KV_OK;
    const char **const key = kv_alloc_array(count, sizeof *key, false);
    if (!key) return KV_E_NOMEM;
    int status = KV_OK;
    count = 0;
    for (const cJSON *k = n->child; k; k = k->next) key[count++] = k->string;
    qsort(key, count, sizeof *key, by_key);
    for (size_t i = 1; i < count && status == KV_OK; i++)
        if (strcmp(key[i - 1], key[i]) == 0) status = kv_set_error(KV_E_CORRUPT, "%s: key '%.100s' is given twice in one object", what, key[i]);
    kv_free(key);
    return status;
}

/* Reads n_bytes of text; what names the source in errors: "config.json:3:14: ',' or '}' is missing".  Columns count bytes from 1. */
int kv_json_parse(kv_json **out, const char *text, double n_bytes, const char *what)
{
    if (!what) what = "json";
    RETURN_ERROR_IF(!out || !text, KV_E_ARG, "%s: %s is NULL", what, out ? "text" : "out");
    *out = NULL;
    RETURN_ERROR_IF(!(n_bytes >= 0 && n_bytes <= 4294967296.0), KV_E_ARG, "%s: n_bytes=%g is outside 0..2^32", what, n_bytes);
    const size_t n = (size_t)n_bytes;
    checker c = { .text = text, .p = text, .end = text + n };
    bool ok = check_value(&c);
    if (ok && c.p < c.end) ok = refuse(&c, c.p, "more text after the value");
    const char *stop = c.p;
    cJSON *root = NULL;
    if (ok && !(root = cJSON_ParseWithLengthOpts(text, n, &stop, false))) c.why = "cJSON gave up: out of memory";
    if (!root) {
        int line = 1;
        const char *line_start = text;
        for (const char *p = text; p < stop && p < c.end; p++) if (*p == '\n') line++, line_start = p + 1;
        return kv_set_error(ok ? KV_E_NOMEM : KV_E_CORRUPT, "%s:%d:%d: %s", what, line, (int)kv_min64(stop - line_start + 1, INT32_MAX), c.why);
    }
    int status = check_tree(root, what);
    kv_json *const d = status == KV_OK ? kv_alloc(sizeof *d) : NULL;
    if (!d) {
        cJSON_Delete(root);
        return status == KV_OK ? KV_E_NOMEM : status;
    }
    d->root = root;
    *out = d;
    return KV_OK;
}

static const cJSON *item(const kv_json_node *n) { return (const cJSON *)(const void *)n; }
static const kv_json_node *node(const cJSON *n) { return (const kv_json_node *)(const void *)n; }

const kv_json_node *kv_json_root(const kv_json *d) { return d ? node(d->root) : NULL; }

int kv_json_type(const kv_json_node *n)
{
    const cJSON *const i = item(n);
    return cJSON_IsFalse(i) ? KV_JSON_FALSE : cJSON_IsTrue(i) ? KV_JSON_TRUE : cJSON_IsNumber(i) ? KV_JSON_NUMBER
         : cJSON_IsString(i) ? KV_JSON_STRING : cJSON_IsArray(i) ? KV_JSON_ARRAY : cJSON_IsObject(i) ? KV_JSON_OBJECT : KV_JSON_NULL;
}

double      kv_json_number(const kv_json_node *n) { return cJSON_IsNumber(item(n)) ? item(n)->valuedouble : 0.0; }
const char *kv_json_string(const kv_json_node *n) { return cJSON_IsString(item(n)) ? item(n)->valuestring : NULL; }
const char *kv_json_key(const kv_json_node *n)    { return n ? item(n)->string : NULL; }
const kv_json_node *kv_json_child(const kv_json_node *n) { return n ? node(item(n)->child) : NULL; }
const kv_json_node *kv_json_next(const kv_json_node *n)  { return n ? node(item(n)->next) : NULL; }

void kv_json_free(kv_json *d)
{
    if (!d) return;
    cJSON_Delete(d->root);
    kv_free(d);
}
