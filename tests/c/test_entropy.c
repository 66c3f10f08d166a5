/* Lossless stages: rANS against closed-form entropies, round trips, hostile bytes, CRC-32C against its published values. */
#include <math.h>
#include <time.h>
#include "check.h"
#include "entropy.h"
#include "rng.h"

static const double SEED = 20261122;
static double cpu_now(void)                                      /* this thread's time: the machine may be shared */
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static uint32_t word(int stream, uint32_t i)
{
    uint32_t u[4];
    kv_rng_u32((uint32_t)SEED, 7, (uint32_t)stream, i, u);
    return u[0];
}

/* ---- sources whose entropy is known in closed form */

typedef struct source { const char *name; int n; double p[256]; } source;

static void gaussian(source *s, const char *name, double step)       /* cells of a unit Gaussian, ends open */
{
    s->name = name;
    s->n = 256;
    for (int i = 0; i < 256; i++) {
        const double lo = i == 0 ? -INFINITY : (i - 128) * step, hi = i == 255 ? INFINITY : (i - 127) * step;
        s->p[i] = lo >= 0 ? 0.5 * (erfc(lo / sqrt(2)) - erfc(hi / sqrt(2))) : 0.5 * (erfc(-hi / sqrt(2)) - erfc(-lo / sqrt(2)));
    }
}
static void geometric(source *s, const char *name, double q)
{
    s->name = name;
    s->n = 256;
    for (int i = 0; i < 256; i++) s->p[i] = i < 255 ? (1 - q) * pow(q, i) : pow(q, 255);
}
static void zipf(source *s, const char *name)
{
    double sum = 0;
    s->name = name;
    s->n = 256;
    for (int i = 0; i < 256; i++) sum += 1.0 / (i + 1);
    for (int i = 0; i < 256; i++) s->p[i] = 1.0 / (i + 1) / sum;
}
static void flat(source *s, const char *name, int n)
{
    s->name = name;
    s->n = n;
    for (int i = 0; i < n; i++) s->p[i] = 1.0 / n;
}
static void coin(source *s, const char *name, double p)
{
    s->name = name;
    s->n = 2;
    s->p[0] = 1 - p;
    s->p[1] = p;
}

static double entropy(const source *s)
{
    double h = 0;
    for (int i = 0; i < s->n; i++) if (s->p[i] > 0) h -= s->p[i] * log2(s->p[i]);
    return h;
}

static void draw(const source *s, int stream, uint8_t *x, size_t n)
{
    double cdf[256], c = 0;
    float u[256];
    for (int i = 0; i < s->n; i++) cdf[i] = c += s->p[i];
    for (size_t i = 0; i < n; i++) {
        if (i % 256 == 0) kv_rng_uniform(SEED, stream, (double)i, 256, u);
        int lo = 0, hi = s->n - 1;
        while (lo < hi) {
            const int mid = (lo + hi) / 2;
            if ((double)u[i % 256] < cdf[mid]) hi = mid; else lo = mid + 1;
        }
        x[i] = (uint8_t)lo;
    }
}

/* Static tables from the probabilities themselves: what is measured is the coder, with its tables' rounding, lanes and flush. */
static void check_entropy(void)
{
    enum { N = 1 << 20, SOURCES = 11 };
    static source s[SOURCES];
    gaussian(&s[0], "gaussian, step 0.05", 0.05);
    gaussian(&s[1], "gaussian, step 0.3", 0.3);
    gaussian(&s[2], "gaussian, step 1", 1);
    gaussian(&s[3], "gaussian, step 3", 3);
    geometric(&s[4], "geometric 0.9", 0.9);
    geometric(&s[5], "geometric 0.5", 0.5);
    zipf(&s[6], "zipf");
    flat(&s[7], "flat 3", 3);
    flat(&s[8], "flat 256", 256);
    coin(&s[9], "coin 0.1", 0.1);
    coin(&s[10], "coin 0.01", 0.01);
    uint8_t *x = kv_alloc(N), *y = kv_alloc(2 * N), *z = kv_alloc(N);
    for (int k = 0; k < SOURCES; k++) {
        uint32_t count[256] = { 0 };
        kv_rans *r = NULL;
        draw(&s[k], k, x, N);
        for (int i = 0; i < s[k].n; i++) count[i] = (uint32_t)(s[k].p[i] * 0x1p31);
        CHECK(kv_rans_new(&r, count, 1) == KV_OK, "%s", kv_last_error());
        double sampled = 0;                                      /* -sum log2 p of what was drawn: no luck of the draw */
        for (size_t i = 0; i < N; i++) sampled -= log2(s[k].p[x[i]]);
        const size_t n = kv_rans_encode(r, NULL, 1, x, N, y, 2 * N);
        const double t0 = cpu_now();
        CHECK(n && kv_rans_decode(r, NULL, 1, y, n, z, N) == KV_OK && memcmp(x, z, N) == 0, "%s: round trip of %zu bytes: %s", s[k].name, n, kv_last_error());
        const double t1 = cpu_now(), above = 8.0 * (double)n / sampled - 1;
        CHECK(above <= 0.005 && above > -1e-4, "%s: %.3f %% above the ideal code length", s[k].name, 100 * above);
        CHECK(fabs(sampled / N / entropy(&s[k]) - 1) < 0.02, "%s: drew %.4f bits a symbol, entropy %.4f", s[k].name, sampled / N, entropy(&s[k]));
        uint8_t tables[1024];
        const size_t blob = kv_rans_write(r, tables, sizeof tables);
        printf("rans: %-20s entropy %.5f, coded %.5f bits/symbol (%+.3f %%), table %zu bytes, decode %.0f MB/s\n", s[k].name, entropy(&s[k]), 8.0 * (double)n / N,
            100 * above, blob, N / (t1 - t0) / 1e6);
        kv_rans_free(r);
    }
    kv_free(x);
    kv_free(y);
    kv_free(z);
}

/* What a packed page looks like, from nothing to noise: 0 zeros, 1 noise, 2 two bits a byte, 3 repeats, 4 a peak, 5 text-like. */
enum { KINDS = 6 };
static void make_bytes(int kind, uint8_t *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = word(100 + kind, (uint32_t)i);
        x[i] = (uint8_t)(kind == 0 ? 0 : kind == 1 ? u : kind == 2 ? u & 3 : kind == 3 ? i % 67 * 3 : kind == 4 ? (u % 300 ? 128 : u >> 16) : 'a' + (u & 7) * (u >> 8 & 3));
    }
}

/* Every stage gives back what it got, never takes more, and stays inside its buffers. */
static void check_stages(void)
{
    static const size_t sizes[] = { 0, 1, 2, 3, 31, 64, 100, 1000, 2176, 4096, 70001 };
    static const int stages[] = { KV_STAGE_RAW, KV_STAGE_ZLIB, KV_STAGE_LZMA, KV_STAGE_RANS, KV_STAGE_SMALLEST };
    enum { GUARD = 16 };
    uint8_t *x = kv_alloc(70001), *y = kv_alloc(70001 + GUARD), *z = kv_alloc(70001 + GUARD);
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            const size_t n = sizes[k];
            size_t got[5], used;
            make_bytes(kind, x, n);
            for (int s = 0; s < 5; s++) {
                for (int level = s == 1 || s == 2 ? 1 : KV_LEVEL_DEFAULT; level <= (s == 1 || s == 2 ? 9 : KV_LEVEL_DEFAULT); level += 4) {
                    memset(y, 0xaa, n + GUARD);
                    memset(z, 0xaa, n + GUARD);
                    const int stage = kv_stage_encode(stages[s], level, x, n, y, n, &got[s]);
                    CHECK(stage >= 0 && stage <= 3 && (stage == stages[s] || stage == 0 || s == 4), "kind %d, %zu bytes, stage %s: %d %s", kind, n, kv_stage_name(stages[s]), stage, kv_last_error());
                    CHECK(got[s] <= n && (stage == 0) == (got[s] == n), "kind %d, %zu bytes, stage %s: %zu as %d", kind, n, kv_stage_name(stages[s]), got[s], stage);
                    CHECK(kv_stage_decode(stage, y, got[s], z, n) == KV_OK && memcmp(x, z, n) == 0, "kind %d, %zu bytes, stage %s level %d: %s", kind, n, kv_stage_name(stages[s]), level, kv_last_error());
                    bool kept = true;
                    for (int i = 0; i < GUARD; i++) kept = kept && y[n + (size_t)i] == 0xaa && z[n + (size_t)i] == 0xaa;
                    CHECK(kept, "kind %d, %zu bytes, stage %s: written past the end", kind, n, kv_stage_name(stages[s]));
                    if (n && got[s] && !(stage == KV_STAGE_RANS && (kind == 0 || kind == 4))) CHECK(kv_stage_decode(stage, y, got[s] - 1, z, n) == KV_E_CORRUPT && kv_stage_decode(stage, y, got[s], z, n - 1) == KV_E_CORRUPT, "kind %d, %zu bytes, stage %d: a wrong length passed", kind, n, stage);
                }
            }
            used = got[0];
            for (int s = 1; s < 4; s++) used = got[s] < used ? got[s] : used;
            CHECK(got[4] <= got[0] && got[4] <= got[3], "kind %d, %zu bytes: smallest took %zu, rans %zu", kind, n, got[4], got[3]);
            if (n == 2176) printf("stages: kind %d, %zu bytes: zlib %zu, lzma %zu, rans %zu, smallest %zu\n", kind, n, got[1], got[2], got[3], got[4]);
        }
    kv_free(x);
    kv_free(y);
    kv_free(z);
    size_t n;
    uint8_t b[4] = { 0 };
    CHECK(kv_stage_encode(9, KV_LEVEL_DEFAULT, b, 4, b, 4, &n) == KV_E_ARG, "stage 9 was taken");
    CHECK(kv_stage_encode(KV_STAGE_ZLIB, 10, b, 4, b, 4, &n) == KV_E_ARG && strstr(kv_last_error(), "level=10 is outside 1..9"), "%s", kv_last_error());
    CHECK(kv_stage_encode(KV_STAGE_RANS, 1, b, 4, b, 4, &n) == KV_E_ARG, "rans took a level");
    CHECK(kv_stage_decode(KV_STAGE_SMALLEST, b, 4, b, 4) == KV_E_CORRUPT, "smallest was decoded");
}

/* Any bytes, flipped bits and cut ends are refused or decode to something, inside the buffers (ASan watches). */
static void check_hostile(void)
{
    enum { N = 3000, TRIALS = 3000 };
    uint8_t *x = kv_alloc(N), *y = kv_alloc(N), *z = kv_alloc(N);
    int refused = 0;
    for (int stage = KV_STAGE_ZLIB; stage <= KV_STAGE_RANS; stage++) {
        size_t n;
        make_bytes(2, x, N);
        CHECK(kv_stage_encode(stage, KV_LEVEL_DEFAULT, x, N, y, N, &n) == stage, "stage %d kept raw", stage);
        for (uint32_t t = 0; t < TRIALS; t++) {
            const uint32_t at = word(200 + stage, t) % (uint32_t)(t % 3 ? n : 16);
            const uint8_t was = y[at];
            y[at] ^= (uint8_t)(1u << t % 8);
            const size_t cut = t % 7 ? n : at, want = t % 5 ? N : at;
            uint8_t *copy = kv_alloc(cut);                        /* of its own, so that a read past the end is seen */
            memcpy(copy, y, cut);
            refused += kv_stage_decode(stage, copy, cut, z, want) < 0;
            kv_free(copy);
            y[at] = was;
        }
        for (uint32_t t = 0; t < TRIALS; t++) {
            const size_t len = word(210 + stage, t) % 64;
            for (uint32_t i = 0; i < len; i++) y[i] = (uint8_t)word(220 + stage, t * 64 + i);
            refused += kv_stage_decode(stage, y, len, z, N) < 0;
        }
    }
    printf("hostile: %d of %d refused\n", refused, 6 * TRIALS);
    CHECK(refused > 5 * TRIALS, "only %d of %d refused", refused, 6 * TRIALS);
    kv_free(x);
    kv_free(y);
    kv_free(z);
}

/* A bank: symbol i with table cls[i % period]; its bytes read back; symbols that no table was made for; every count of lanes. */
static void check_bank(void)
{
    enum { N = 200000, PERIOD = 5 };
    static uint32_t count[3][256];
    static const uint8_t cls[PERIOD] = { 0, 2, 1, 1, 2 };
    uint8_t *x = kv_alloc(N), *y = kv_alloc(2 * N), *z = kv_alloc(N), blob[2048];
    kv_rans *r = NULL, *back = NULL;
    for (int s = 0; s < 16; s++) count[0][s] = count[1][s * 16] = 1u << (s / 2);
    for (int s = 0; s < 256; s++) count[2][s] = 1;
    for (uint32_t i = 0; i < N; i++) {
        const uint32_t u = word(300, i), k = 15 - (uint32_t)__builtin_ctz(u | 1u << 15);
        x[i] = (uint8_t)(cls[i % PERIOD] == 0 ? k : cls[i % PERIOD] == 1 ? k * 16 : u >> 16);
        if (i % 5000 == 77) x[i] = (uint8_t)(u >> 24);             /* now and then something that its table does not know */
    }
    CHECK(kv_rans_new(&r, count[0], 3) == KV_OK, "%s", kv_last_error());
    const size_t size = kv_rans_write(r, blob, sizeof blob);
    size_t used = 0;
    CHECK(size < sizeof blob && kv_rans_write(r, NULL, 0) == size && kv_rans_read(&back, blob, size, &used) == KV_OK && used == size, "bank of %zu bytes, %zu read: %s", size, used, kv_last_error());
    for (int i = 0; i < 3; i++)
        for (int s = 0; s < 256; s++) CHECK(kv_rans_cost(r, i, s) == kv_rans_cost(back, i, s), "table %d symbol %d costs %g and %g", i, s, kv_rans_cost(r, i, s), kv_rans_cost(back, i, s));
    for (size_t n = 0; n <= N; n = n < 40 ? n + 1 : n * 3 + 1) {
        const size_t len = kv_rans_encode(r, cls, PERIOD, x, n, y, 2 * N);
        CHECK(len > 0, "%zu symbols did not fit", n);
        CHECK(kv_rans_encode(back, cls, PERIOD, x, n, y + N, len) == len && memcmp(y, y + N, len) == 0, "%zu symbols: the bank that was read codes otherwise", n);
        CHECK(kv_rans_encode(r, cls, PERIOD, x, n, y + N, len - 1) == 0, "%zu symbols fit %zu bytes less one", n, len);
        memset(z, 0x55, N);
        CHECK(kv_rans_decode(back, cls, PERIOD, y, len, z, n) == KV_OK && memcmp(x, z, n) == 0, "%zu symbols in %zu bytes: %s", n, len, kv_last_error());
    }
    kv_rans_free(r);
    kv_rans_free(back);
    memset(count, 0, sizeof count);
    CHECK(kv_rans_new(&r, count[0], 1) == KV_E_ARG, "a table without symbols was made");
    kv_free(x);
    kv_free(y);
    kv_free(z);
}

static void check_crc(void)
{
    uint8_t x[64];
    for (int level = KV_SIMD_C; level <= kv_cpu_simd_max(); level++) {
        kv_cpu_limit(level);
        CHECK(kv_crc32c(0, "123456789", 9) == 0xe3069283u, "level %d: check value", level);
        memset(x, 0, 32);
        CHECK(kv_crc32c(0, x, 32) == 0x8a9136aau, "level %d: 32 zeros (RFC 3720, B.4)", level);
        memset(x, 0xff, 32);
        CHECK(kv_crc32c(0, x, 32) == 0x62a8ab43u, "level %d: 32 ones", level);
        for (int i = 0; i < 32; i++) x[i] = (uint8_t)i;
        CHECK(kv_crc32c(0, x, 32) == 0x46dd794eu, "level %d: 0..31", level);
        CHECK(kv_crc32c(kv_crc32c(0, x, 13), x + 13, 19) == 0x46dd794eu, "level %d: in two parts", level);
    }
    kv_cpu_limit(KV_SIMD_AMX);
}

int main(void)
{
    printf("test_entropy: seed %.0f, %s\n", SEED, kv_cpu_name());
    check_crc();
    check_entropy();
    check_bank();
    check_stages();
    check_hostile();
    return check_end();
}
