/* rans.c -- interleaved rANS with static tables (Duda 2013, arXiv 1311.2540; range variant as in Giesen's ryg_rans).
 *
 * A state x is a number from 2^16 up to 2^32.  Coding a symbol of frequency f (of M = 2^14) that starts at c:
 *
 *   x' = (x / f) M + c + x % f             and back:   slot = x' % M,  x = f (x' / M) + slot - c
 *
 * Before coding, 16 low bits are put out when x' would pass 2^32; after decoding, 16 bits are taken in when x is below 2^16.
 * Symbol i belongs to lane i % lanes; all lanes share one stream of words, so a decoder reads forward, and several lanes at
 * once keep the processor's units busy.  The encoder runs backward.
 *
 *   block   | log2 lanes u8 (+ 8: with exceptions) | exceptions? | state u32 [lanes] | word u16 ...     little-endian
 *   exceptions  count v | gap v, symbol u8 | ...             v: 7 bits a byte, lowest first, the top bit set where more follow
 *   bank    | tables - 1 u8 | table | table ... |
 *   table   bits, lowest first: for each symbol from 0 a field k of 4 bits; k = 0: this symbol and the next r are not in it,
 *           with r in 8 bits after it; else the frequency is 2^(k-1) + the next k - 1 bits.  Padded to a byte.
 *
 * A table gives a symbol at least 1/M, which the others pay for: a hundred symbols that hardly ever come would cost all the
 * rest 0.009 bits each.  What comes less often than one in 8 M is therefore not in the table: it is coded as the likeliest symbol,
 * and an exception puts it right afterwards (about 3 bytes).  So any byte can be coded with any table.
 *
 * 14 bits: a table's 16 KiB of slots still fit the first-level cache, and whatever the source, at most 0.023 bits a symbol are
 * lost to symbols of frequency 1 (at 12 bits 0.09).  Each lane costs 2 bytes a block above the entropy, so a
 * block gets one lane for every KiB it takes, 32 at most. */
#include <math.h>
#include "entropy.h"

enum { M_BITS = KV_RANS_BITS, M = 1 << M_BITS, LANE_BYTES = 1024, MAX_LOG_LANES = 5, RARE = 8 /* of M */, EXCEPTED = 8 /* flag */ };
static const uint32_t LOW = 1u << 16;

typedef struct table {
    uint8_t  symbol[M];                       /* by slot */
    uint16_t freq[256], start[256];           /* freq 0: an exception */
    float    cost[256];
    uint8_t  likeliest;                       /* which stands for exceptions */
} table;

struct kv_rans { int n_tables; table *t; };

/* ---- tables ------------------------------------------------------------------------------------------------------ */

/* Frequencies that sum to M: rounded shares, then single steps where a step costs the least (gains the most) bits, which is
 * where count/frequency is least (most).  Integers alone, so that every machine makes the same table. */
static int normalize(const uint32_t *count, uint16_t *freq)
{
    uint64_t total = 0, sum = 0;
    for (int s = 0; s < 256; s++) total += count[s];
    RETURN_ERROR_IF(total == 0, KV_E_ARG, "rans: a table without a symbol");
    for (int s = 0; s < 256; s++) {
        const uint64_t share = count[s] * (uint64_t)M, f = (share + total / 2) / total;
        freq[s] = (uint16_t)(f ? f : share * RARE >= total);
        sum += freq[s];
    }
    for (; sum != M; sum += sum < M ? 1 : (uint64_t)-1) {
        int best = -1;
        for (int s = 0; s < 256; s++) {
            if (!freq[s] || (sum > M && freq[s] == 1)) continue;
            const uint64_t a = best < 0 ? 0 : (uint64_t)count[s] * freq[best], b = best < 0 ? 0 : (uint64_t)count[best] * freq[s];
            if (best < 0 || (sum < M ? a > b : a < b)) best = s;
        }
        freq[best] = (uint16_t)(sum < M ? freq[best] + 1 : freq[best] - 1);
    }
    return KV_OK;
}

/* From frequencies that sum to M. */
static void fill(table *t)
{
    unsigned at = 0;
    for (int s = 0; s < 256; s++) {
        t->start[s] = (uint16_t)at;
        memset(t->symbol + at, s, t->freq[s]);
        at += t->freq[s];
        if (t->freq[s] > t->freq[t->likeliest]) t->likeliest = (uint8_t)s;
    }
    for (int s = 0; s < 256; s++)             /* an exception: two bytes of gap, one of symbol */
        t->cost[s] = (float)(M_BITS - log2(t->freq[s] ? t->freq[s] : t->freq[t->likeliest])) + (t->freq[s] ? 0 : 24);
}

static int bank(kv_rans **out, int n_tables)
{
    kv_rans *r = kv_zalloc(sizeof *r);
    if (!r) return KV_E_NOMEM;
    r->n_tables = n_tables;
    if (!(r->t = kv_alloc_array((size_t)n_tables, sizeof *r->t, true))) {
        kv_free(r);
        return KV_E_NOMEM;
    }
    *out = r;
    return KV_OK;
}

int kv_rans_new(kv_rans **out, const uint32_t *count, int n_tables)
{
    int status = KV_OK;
    kv_rans *r = NULL;
    RETURN_ERROR_IF(!out || !count, KV_E_ARG, "rans: NULL %s", out ? "counts" : "handle");
    *out = NULL;
    RETURN_ERROR_IF(n_tables < 1 || n_tables > KV_RANS_TABLES, KV_E_ARG, "rans: %d tables is outside 1..%d", n_tables, KV_RANS_TABLES);
    FORWARD_IF_ERROR(bank(&r, n_tables));
    for (int i = 0; i < n_tables; i++) {
        FAIL_IF_ERROR(normalize(count + (size_t)i * 256, r->t[i].freq));
        fill(&r->t[i]);
    }
    *out = r;
    return KV_OK;
fail:
    kv_rans_free(r);
    return status;
}

void kv_rans_free(kv_rans *r)
{
    if (!r) return;
    kv_free(r->t);
    kv_free(r);
}

int kv_rans_tables(const kv_rans *r) { return r->n_tables; }
double kv_rans_cost(const kv_rans *r, int i, int symbol) { return (double)r->t[i].cost[symbol]; }

/* Bits, lowest first.  Past the end nothing is written, and zeros are read. */
typedef struct bits { uint8_t *w; const uint8_t *r; size_t n, at; } bits;

static void put(bits *b, unsigned value, int count)
{
    for (int i = 0; i < count; i++, b->at++) {
        if (b->at / 8 >= b->n) continue;
        if (b->at % 8 == 0) b->w[b->at / 8] = 0;
        b->w[b->at / 8] |= (uint8_t)((value >> i & 1) << b->at % 8);
    }
}

static unsigned get(bits *b, int count)
{
    unsigned value = 0;
    for (int i = 0; i < count; i++, b->at++)
        if (b->at / 8 < b->n) value |= (unsigned)(b->r[b->at / 8] >> b->at % 8 & 1) << i;
    return value;
}

size_t kv_rans_write(const kv_rans *r, uint8_t *dst, size_t cap)
{
    size_t n = 1;
    if (cap) dst[0] = (uint8_t)(r->n_tables - 1);
    for (int i = 0; i < r->n_tables; i++) {
        const uint16_t *f = r->t[i].freq;
        bits b = { .w = cap > n ? dst + n : NULL, .n = cap > n ? cap - n : 0 };
        for (int s = 0; s < 256; s++) {
            if (f[s]) {
                const int k = 32 - __builtin_clz(f[s]);
                put(&b, (unsigned)k, 4);
                put(&b, f[s] & ((1u << (k - 1)) - 1), k - 1);
            } else {
                const int first = s;
                while (s < 255 && !f[s + 1]) s++;
                put(&b, (unsigned)(s - first) << 4, 12);
            }
        }
        n += (b.at + 7) / 8;
    }
    return n;
}

int kv_rans_read(kv_rans **out, const uint8_t *src, size_t n, size_t *used)
{
    int status = KV_OK;
    kv_rans *r = NULL;
    *out = NULL;
    RETURN_ERROR_IF(n < 1, KV_E_CORRUPT, "rans: no tables where some should be");
    FORWARD_IF_ERROR(bank(&r, src[0] + 1));
    *used = 1;
    for (int i = 0; i < r->n_tables; i++) {
        table *t = &r->t[i];
        bits b = { .r = src + *used, .n = n - *used };
        unsigned sum = 0;
        int s = 0;
        while (s < 256 && b.at < 8 * b.n) {
            const int k = (int)get(&b, 4);
            if (k == 0) {
                s += 1 + (int)get(&b, 8);
                continue;
            }
            const unsigned f = 1u << (k - 1) | get(&b, k - 1);
            t->freq[s++] = (uint16_t)f;
            sum += f;
        }
        FAIL_IF(s != 256 || sum != M || b.at > 8 * b.n, KV_E_CORRUPT, "rans: table %d has %d symbols whose frequencies sum to %u, not 256 and %d", i, s, sum, M);
        fill(t);
        *used += (b.at + 7) / 8;
    }
    *out = r;
    return KV_OK;
fail:
    kv_rans_free(r);
    return status;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* Position i of a block modulo its period, stepped. */
static inline size_t next(size_t at, size_t period) { return at + 1 == period ? 0 : at + 1; }

static uint8_t *put_number(uint8_t *w, const uint8_t *end, size_t v)          /* NULL in, or no room: NULL out */
{
    for (; w && w < end; v >>= 7) {
        *w++ = (uint8_t)((v & 127) | (v > 127 ? 128 : 0));
        if (v < 128) return w;
    }
    return NULL;
}

static const uint8_t *get_number(const uint8_t *p, const uint8_t *end, size_t *v)
{
    *v = 0;
    for (int shift = 0; p && p < end && shift < 63; shift += 7) {
        *v |= (size_t)(*p & 127) << shift;
        if (!(*p++ & 128)) return p;
    }
    return NULL;
}

/* Exceptions of a block from w on; returns their end, or NULL when they do not fit. */
static uint8_t *put_exceptions(const kv_rans *r, const uint8_t *cls, size_t period, const uint8_t *src, size_t n, size_t n_exceptions, uint8_t *w, const uint8_t *end)
{
    w = put_number(w, end, n_exceptions);
    for (size_t i = 0, at = 0, from = 0; w && i < n; i++, at = next(at, period)) {
        if (r->t[cls ? cls[at] : 0].freq[src[i]]) continue;
        if (!(w = put_number(w, end, i - from)) || w == end) return NULL;
        *w++ = src[i];
        from = i + 1;
    }
    return w;
}

size_t kv_rans_encode(const kv_rans *r, const uint8_t *cls, size_t period, const uint8_t *src, size_t n, uint8_t *dst, size_t cap)
{
    double cost = 0;
    size_t n_exceptions = 0;
    for (size_t i = 0, at = 0; i < n; i++, at = next(at, period)) {
        const table *t = &r->t[cls ? cls[at] : 0];
        cost += (double)t->cost[src[i]];
        n_exceptions += !t->freq[src[i]];
    }
    if (cap < 1 || cost > 8 * (double)cap) return 0;
    int log_lanes = 0;
    while (log_lanes < MAX_LOG_LANES && cost / 8 >= (double)(LANE_BYTES << (log_lanes + 1))) log_lanes++;
    const size_t lanes = (size_t)1 << log_lanes;
    dst[0] = (uint8_t)(log_lanes | (n_exceptions ? EXCEPTED : 0));
    uint8_t *const states = n_exceptions ? put_exceptions(r, cls, period, src, n, n_exceptions, dst + 1, dst + cap) : dst + 1;
    if (!states || (size_t)(dst + cap - states) < 4 * lanes) return 0;
    uint32_t state[KV_RANS_LANES];
    for (size_t l = 0; l < lanes; l++) state[l] = LOW;
    uint8_t *w = dst + cap, *const first = states + 4 * lanes;
    size_t at = n ? (n - 1) % period : 0;
    for (size_t i = n; i-- > 0; at = at ? at - 1 : period - 1) {
        const table *t = &r->t[cls ? cls[at] : 0];
        const uint8_t s = t->freq[src[i]] ? src[i] : t->likeliest;
        const uint32_t f = t->freq[s];
        uint32_t x = state[i & (lanes - 1)];
        if (x >= (uint64_t)f << (32 - M_BITS)) {
            if (w - first < 2) return 0;
            w -= 2;
            kv_store_u16(w, (uint16_t)x);
            x >>= 16;
        }
        state[i & (lanes - 1)] = (x / f << M_BITS) + t->start[s] + x % f;
    }
    const size_t words = (size_t)(dst + cap - w);
    memcpy(states, state, 4 * lanes);
    memmove(first, w, words);
    return (size_t)(first + words - dst);
}

/* One symbol of one lane.  A frequency is at least 1 in every slot, so no byte makes this leave its table. */
static inline uint8_t step(const table *t, uint32_t *state)
{
    const uint32_t slot = *state & (M - 1);
    const uint8_t s = t->symbol[slot];
    *state = t->freq[s] * (*state >> M_BITS) + slot - t->start[s];
    return s;
}

/* Whole rounds of `lanes` symbols while each lane may still take a word in; returns how many symbols. */
static inline size_t rounds(const kv_rans *r, const uint8_t *cls, size_t period, size_t lanes, uint32_t *state, const uint8_t **words, const uint8_t *end, uint8_t *dst, size_t n)
{
    size_t i = 0, at = 0;
    const uint8_t *w = *words;
    for (; n - i >= lanes && (size_t)(end - w) >= 2 * lanes; i += lanes)
        for (size_t l = 0; l < lanes; l++, at = next(at, period)) {
            uint32_t x = state[l];
            dst[i + l] = step(&r->t[cls ? cls[at] : 0], &x);
            const uint32_t low = x < LOW;                  /* half of the time, so no branch */
            state[l] = x << (16 * low) | (kv_load_u16(w) & -low);
            w += 2 * low;
        }
    *words = w;
    return i;
}

int kv_rans_decode(const kv_rans *r, const uint8_t *cls, size_t period, const uint8_t *src, size_t n, uint8_t *dst, size_t n_dst)
{
    const uint8_t *w = src + 1, *const end = src + n, *exception = NULL;
    const int head = n ? src[0] : 0;
    size_t n_exceptions = 0, gap;
    RETURN_ERROR_IF(n < 1 || head > (MAX_LOG_LANES | EXCEPTED) || (head & 7) > MAX_LOG_LANES, KV_E_CORRUPT, "rans: a block of %zu bytes begins with %d, not 0..5 or 8..13", n, head);
    if (head & EXCEPTED) {
        exception = w = get_number(w, end, &n_exceptions);
        RETURN_ERROR_IF(n_exceptions > n_dst, KV_E_CORRUPT, "rans: %zu exceptions in %zu symbols", n_exceptions, n_dst);
        for (size_t i = 0; w && i < n_exceptions; i++) w = (w = get_number(w, end, &gap)) && w < end ? w + 1 : NULL;
    }
    const size_t lanes = (size_t)1 << (head & 7);
    RETURN_ERROR_IF(!w || (size_t)(end - w) < 4 * lanes, KV_E_CORRUPT, "rans: a block of %zu bytes ends before its states", n);
    uint32_t state[KV_RANS_LANES];
    memcpy(state, w, 4 * lanes);
    w += 4 * lanes;
    size_t i = lanes == 32 ? rounds(r, cls, period, 32, state, &w, end, dst, n_dst) : rounds(r, cls, period, lanes, state, &w, end, dst, n_dst);
    for (size_t at = i % period; i < n_dst; i++, at = next(at, period)) {
        uint32_t *x = &state[i & (lanes - 1)];
        dst[i] = step(&r->t[cls ? cls[at] : 0], x);
        if (*x < LOW) {
            RETURN_ERROR_IF(end - w < 2, KV_E_CORRUPT, "rans: the words end at symbol %zu of %zu", i, n_dst);
            *x = *x << 16 | kv_load_u16(w);
            w += 2;
        }
    }
    bool whole = w == end;
    for (size_t l = 0; l < lanes; l++) whole = whole && state[l] == LOW;
    RETURN_ERROR_IF(!whole, KV_E_CORRUPT, "rans: %zu symbols do not end where the encoder began", n_dst);
    for (size_t at = 0; n_exceptions; n_exceptions--, at++) {
        exception = get_number(exception, end, &gap);
        RETURN_ERROR_IF(gap >= n_dst || at + gap >= n_dst, KV_E_CORRUPT, "rans: an exception at symbol %zu of %zu", at + gap, n_dst);
        dst[at += gap] = *exception++;
    }
    return KV_OK;
}
