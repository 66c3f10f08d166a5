/* Philox against Random123's published vectors, and the sequences built on it. */
#include <math.h>
#include "check.h"
#include "internal.h"
#include "rng.h"

enum { N = 200000 };

static void known_answers(void)
{
    /* kat_vectors of Random123: philox4x32 10, counter, key, result */
    static const uint32_t kat[][10] = {
        { 0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 },
        { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd },
        { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 },
    };
    for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
        uint32_t out[4];
        kv_philox(kat[i], kat[i] + 4, out);
        CHECK(memcmp(out, kat[i] + 6, sizeof out) == 0, "vector %zu: %08x %08x %08x %08x", i, out[0], out[1], out[2], out[3]);
    }
}

static void sequences(void)
{
    static float u[N], piece[N], z[N];
    const double seed = 0x1234567890ab, start = 4294967296.0 * 4 - 6;    /* crosses into the block counter's second word */
    CHECK(kv_rng_uniform(seed, 7, start, 64, u) == KV_OK, "%s", kv_last_error());
    for (int i = 0; i < 64; i++) {
        const uint64_t at = (uint64_t)start + (uint64_t)i;
        const uint32_t counter[4] = { (uint32_t)(at / 4), (uint32_t)(at / 4 >> 32), 7, 0 }, key[2] = { 0x567890ab, 0x1234 };
        uint32_t x[4];
        kv_philox(counter, key, x);
        CHECK(u[i] == (float)(((double)x[at % 4] + 0.5) / 4294967296.0), "uniform %d", i);
    }
    uint32_t x[4];
    kv_rng_u32(0x567890ab, 0x1234, 7, 5, x);
    kv_rng_uniform(seed, 7, 20, 4, piece);
    for (int i = 0; i < 4; i++) CHECK(piece[i] == (float)((x[i] + 0.5) / 4294967296.0), "block 5, word %d", i);

    /* cut anywhere, the numbers stay */
    kv_rng_uniform(3, 1, 0, 1000, u);
    kv_rng_normal(3, 1, 0, 1000, z);
    for (int from = 0; from < 30; from++) {
        kv_rng_uniform(3, 1, from, 100, piece);
        CHECK(memcmp(piece, u + from, sizeof(float) * 100) == 0, "uniform from %d", from);
        kv_rng_normal(3, 1, from, 100, piece);
        CHECK(memcmp(piece, z + from, sizeof(float) * 100) == 0, "normal from %d", from);
    }
    for (int i = 0; i < 1000; i += 2) {       /* from the floats: within their rounding */
        const double r = sqrt(-2 * log(u[i])), a = 6.283185307179586 * u[i + 1];
        CHECK(fabs(z[i] - r * cos(a)) < 1e-4 && fabs(z[i + 1] - r * sin(a)) < 1e-4, "pair %d", i);
    }

    double outside = 0, sum = 0, sq = 0, m1 = 0, m2 = 0, m4 = 0, lag = 0;
    kv_rng_uniform(11, 0, 0, N, u);
    kv_rng_normal(11, 0, 0, N, z);
    for (int i = 0; i < N; i++) {
        outside += !(u[i] > 0 && u[i] < 1);
        sum += u[i];
        sq += u[i] * (double)u[i];
        m1 += z[i];
        m2 += z[i] * (double)z[i];
        m4 += pow(z[i], 4);
        if (i) lag += z[i] * (double)z[i - 1];
    }
    CHECK(outside == 0, "%g uniforms are outside (0, 1)", outside);
    const double s = 5 / sqrt(N);             /* five standard errors of a unit-variance mean */
    CHECK(fabs(sum / N - 0.5) < s * 0.29 && fabs(sq / N - 1 / 3.0) < s * 0.3, "uniform moments %g %g", sum / N, sq / N);
    CHECK(fabs(m1 / N) < s && fabs(m2 / N - 1) < s * 1.42 && fabs(m4 / N - 3) < s * 9.8 && fabs(lag / N) < s, "normal moments %g %g %g %g",
          m1 / N, m2 / N, m4 / N, lag / N);
}

static void refusals(void)
{
    float x[4] = { 9, 9, 9, 9 };
    static const double bad[] = { -1, 0.5, NAN, INFINITY, 1e17 };
    for (int i = 0; i < 5; i++) {
        CHECK(kv_rng_uniform(bad[i], 0, 0, 4, x) == KV_E_ARG, "seed %g", bad[i]);
        CHECK(kv_rng_normal(0, 0, bad[i], 4, x) == KV_E_ARG, "start %g", bad[i]);
    }
    CHECK(kv_rng_uniform(0, 0, 0, -1, x) == KV_E_ARG && kv_rng_uniform(0, 0, 0, 4, NULL) == KV_E_ARG, "n=-1 or NULL is accepted");
    CHECK(kv_rng_uniform(0, 0, 0, 0, NULL) == KV_OK, "nothing into NULL is fine");
    CHECK(x[0] == 9 && x[3] == 9, "a refused call wrote");
}

int main(void)
{
    known_answers();
    sequences();
    refusals();
    return check_end();
}
