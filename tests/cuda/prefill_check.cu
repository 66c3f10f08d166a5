// prefill_check.cu -- attention of many queries over bf16 images and over codes, against double precision on the host, then its speed.
//   prefill_check check [plain | wide | both [all | small [SEED]]]     every shape; exits 1 when one is wrong
//   prefill_check bench [plain | wide]     TFLOP/s; a chunk on a prefix from bf16 and from codes
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#include "kelvin/prefill_launch.cuh"
#include "kelvin/slab.cuh"
using namespace kelvin;

#define CU(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("FAIL %s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); exit(2); } } while (0)

template <class T> static T *device(const std::vector<T> &v)
{
    T *p;
    CU(cudaMalloc((void **)&p, std::max<size_t>(1, v.size()) * sizeof(T)));
    CU(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> static T *empty(size_t n, int fill = 0xFF)
{
    T *p;
    CU(cudaMalloc((void **)&p, std::max<size_t>(1, n) * sizeof(T)));
    CU(cudaMemset(p, fill, n * sizeof(T)));
    return p;
}

struct shape {
    int              d, group, kv_heads, n;
    std::vector<int> before;                                    // tokens before the chunk
    int              window, sink, recent, granule_k, granule_v, splits;
    bool             codes, means, sign, needle;
    float            softcap;
};

static int encoded(int tokens, int sink, int recent, int granule)
{
    const int ripe = tokens - sink - recent;
    return ripe > 0 ? ripe - ripe % granule : 0;
}

// Late rows differ from early ones: what a lossy codec does.  Both are given in f32; the reference takes each where core/attend_chunk.c would.
template <int D> static bool check(const shape &s, int form, unsigned seed)
{
    const int n_seqs = (int)s.before.size(), n_heads = s.group * s.kv_heads, KEYS = IMAGE_KEYS<D>;
    int longest = 0;
    for (int b : s.before) longest = std::max(longest, b + s.n);
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    auto fill = [&](size_t n, float by) { std::vector<float> v(n); for (float &x : v) x = normal(rng) * by; return v; };
    const std::vector<float> q = fill((size_t)n_seqs * s.n * n_heads * D, 1.5f);
    const size_t rows = (size_t)n_seqs * longest * s.kv_heads;
    std::vector<float> early[2] = { fill(rows * D, 1), fill(rows * D, 1) }, late[2], sign[2], mean[2];
    const float scale = 1 / std::sqrt((float)D);
    for (int side = 0; side < 2; side++) {
        late[side] = early[side];
        if (s.codes) for (float &x : late[side]) x += normal(rng) * 0.3f;
        if (s.sign) for (int i = 0; i < s.kv_heads * D; i++) sign[side].push_back(rng() & 1 ? 1.0f : -1.0f);
        if (s.means) for (int i = 0; i < s.kv_heads * D; i++) mean[side].push_back(normal(rng) * 2);
        if (s.means) for (size_t r = 0; r < rows; r++) for (int i = 0; i < D; i++) {
            early[side][r * D + i] += mean[side][r % s.kv_heads * D + i];
            late[side][r * D + i] += mean[side][r % s.kv_heads * D + i];
        }
    }
    if (s.needle)                                               // one key that every query of head 0 meets hard
        for (int b = 0; b < n_seqs; b++)
            for (int i = 0; i < D; i++) late[0][((size_t)b * longest + s.before[b] / 2) * s.kv_heads * D + i] = early[0][((size_t)b * longest + s.before[b] / 2) * s.kv_heads * D + i] = 6 * q[(size_t)b * s.n * n_heads * D + i];

    const int shift = s.codes ? (KEYS - s.sink % KEYS) % KEYS : 0, images = (longest + shift + KEYS - 1) / KEYS;
    const size_t stride = (size_t)images * IMAGE_BYTES<D>;
    std::vector<int> bound;
    for (int b = 0; b < n_seqs; b++) for (int h = 0; h < s.kv_heads; h++) for (int side = 0; side < 2; side++)
        for (int i = 0; i < s.n; i++) bound.push_back(s.sink + encoded(s.before[b] + i + 1, s.sink, s.recent, side ? s.granule_v : s.granule_k));
    int *const zeros = device(std::vector<int>(n_seqs, 0)), *const before = device(s.before), *const bounds = device(bound);
    uint8_t *k[2], *v[2];                                       // late, early
    prefill_turn turn[2] = { { nullptr, nullptr, s.sign }, { nullptr, nullptr, s.sign } };
    for (int side = 0; side < 2; side++) {
        if (s.sign) turn[side].sign = device(sign[side]);
        if (s.means) turn[side].mean = device(mean[side]);
        for (int which = 0; which < 2; which++) {
            uint8_t *&to = (side ? v : k)[which];
            to = empty<uint8_t>((size_t)n_seqs * s.kv_heads * stride);
            float *const x = device(which ? early[side] : late[side]);
            CU((prefill_put<D>(chunk_rows<D>{ x, zeros, longest, s.kv_heads }, turn[side], to, stride, nullptr, 0, images, shift, 0, n_seqs, s.kv_heads, 0)));
        }
    }
    prefill_args a = {};
    const size_t out_rows = (size_t)n_seqs * s.n * n_heads, parts = s.codes ? 2 * s.splits : s.splits;
    uint8_t *const qi = empty<uint8_t>(prefill_query_bytes<D>(n_seqs, s.n, n_heads, s.kv_heads));
    float *const bias = empty<float>(out_rows), *const out = empty<float>(out_rows * D), *const qd = device(q);
    CU(prefill_prepare<D>(qd, turn[0], scale, n_seqs, s.n, n_heads, s.kv_heads, qi, bias, 0));
    a.q = qi;
    a.bias = bias;
    a.lengths = before;
    a.bound = s.codes ? bounds : nullptr;
    a.sums = empty<float>(parts * out_rows * D);
    a.tops = empty<float2>(parts * out_rows);
    a.n_seqs = n_seqs, a.n = s.n, a.n_heads = n_heads, a.n_kv_heads = s.kv_heads, a.window = s.window, a.causal = 1, a.splits = s.splits, a.shift = shift;
    a.softcap = s.softcap * 1.4426950408889634f;
    auto source = [&](int kl, int vl, int begin, int end, int kind) { return prefill_source{ k[kl], v[vl], stride, stride, nullptr, nullptr, 0, 0, begin, end, kind }; };
    if (!s.codes) {
        a.source[a.n_sources++] = source(0, 0, 0, longest, SOURCE_WHOLE);
        CU(prefill_launch<D>(a, form, 0));
    } else {                                                    // two slabs, then everything that is left, in the same launch as the second
        const int cut = std::max(0, longest / 2 / KEYS * KEYS - shift);
        a.source[a.n_sources++] = source(0, 0, 0, cut, SOURCE_LATE);
        CU(prefill_launch<D>(a, form, 0));
        a.part0 = s.splits;
        a.source[0].begin = cut, a.source[0].end = longest;
        a.source[a.n_sources++] = source(1, 1, 0, longest, SOURCE_EARLY);
        if (s.granule_k != s.granule_v) {
            a.source[a.n_sources++] = source(0, 1, 0, longest, SOURCE_KEYS_LATE);
            a.source[a.n_sources++] = source(1, 0, 0, longest, SOURCE_VALUES_LATE);
        }
        CU(prefill_launch<D>(a, form, 0));
    }
    CU(prefill_join<D>(a.sums, a.tops, (int)parts, turn[1], n_seqs, s.n, n_heads, s.kv_heads, out, 0));
    std::vector<float> got(out_rows * D);
    CU(cudaDeviceSynchronize());
    CU(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost));
    std::vector<float> again(got.size());
    CU(cudaMemset(out, 0xFF, got.size() * 4));
    CU(prefill_join<D>(a.sums, a.tops, (int)parts, turn[1], n_seqs, s.n, n_heads, s.kv_heads, nullptr, 0));
    CU(prefill_join<D>(a.sums, a.tops, 1, turn[1], n_seqs, s.n, n_heads, s.kv_heads, out, 0));
    CU(cudaDeviceSynchronize());
    CU(cudaMemcpy(again.data(), out, again.size() * 4, cudaMemcpyDeviceToHost));

    // Values minus their mean are what is rounded, so errors are measured against the outputs' distance from the mean.
    double worst = 0, joined = 0, sq = 0, err2 = 0;
    std::vector<double> p(longest), o(D);
    for (int b = 0; b < n_seqs; b++)
        for (int i = 0; i < s.n; i++)
            for (int h = 0; h < n_heads; h++) {
                const int at = s.before[b] + i, kh = h / s.group;
                const float *qr = &q[(((size_t)b * s.n + i) * n_heads + h) * D];
                const int *bd = &bound[((size_t)b * s.kv_heads + kh) * 2 * s.n + i], lo = s.window && at - s.window + 1 > 0 ? at - s.window + 1 : 0;
                double top = -1e300, sum = 0;
                for (int t = lo; t <= at; t++) {
                    const float *kr = &(s.codes && t >= bd[0] ? early : late)[0][(((size_t)b * longest + t) * s.kv_heads + kh) * D];
                    double x = 0;
                    for (int j = 0; j < D; j++) x += (double)qr[j] * kr[j];
                    x *= scale;
                    p[t] = s.softcap > 0 ? s.softcap * std::tanh(x / s.softcap) : x;
                    top = std::max(top, p[t]);
                }
                std::fill(o.begin(), o.end(), 0);
                for (int t = lo; t <= at; t++) {
                    const float *vr = &(s.codes && t >= bd[s.n] ? early : late)[1][(((size_t)b * longest + t) * s.kv_heads + kh) * D];
                    const double e = std::exp(p[t] - top);
                    sum += e;
                    for (int j = 0; j < D; j++) o[j] += e * vr[j];
                }
                double err = 0, norm = 0, off = 0;
                for (int j = 0; j < D; j++) {
                    const double want = o[j] / sum, m = s.means ? mean[1][kh * D + j] : 0;
                    const size_t x = (((size_t)b * s.n + i) * n_heads + h) * D + j;
                    err += (got[x] - want) * (got[x] - want);
                    off += (again[x] - got[x]) * (double)(again[x] - got[x]);
                    norm += (want - m) * (want - m);
                }
                sq += norm, err2 += err;
                worst = std::max(worst, std::isfinite(err) ? std::sqrt(err / norm) : INFINITY);
                joined = std::max(joined, std::isfinite(off) ? std::sqrt(off / norm) : INFINITY);
            }
    const double all = std::sqrt(err2 / sq);
    // bf16 operands (2^-9 of a value each: q, k, weights, v): 0.3 % of an output of independent rows; scores of 1.5 sqrt(D) terms move by as much again.
    // A needle is six queries long: its scores are off by 0.02 (1.6e-3 of |q| |k| / sqrt(D) times the scale), by four times that in the worst of a thousand
    // rows, and a row which the needle dominates by its weight follows.
    const bool ok = all < 6e-3 && worst < (s.needle ? 1e-1 : 2.5e-2) && joined < 1e-5;
    printf("%s D%d g%d heads %d n %d before %d..%d window %d splits %d%s%s%s%s%s: error %.2e, worst row %.2e\n", ok ? "ok  " : "FAIL", D, s.group, s.kv_heads, s.n, s.before.front(), s.before.back(), s.window, s.splits,
        s.codes ? " early/late" : "", s.means ? " means" : "", s.sign ? " sign" : "", s.needle ? " needle" : "", s.softcap > 0 ? " softcap" : "", all, worst);
    fflush(stdout);
    return ok;
}

// Slab from random fragment tiles against the host's reading of the same codes.
static double value_of(const codebook &c, int bits, int code)
{
    const int i = bits == 4 && code >= 8 ? 15 - code : code;
    const double v = (double)(int8_t)((i < 4 ? c.t0 : c.t1) >> (i % 4 * 8) & 255u);
    return bits == 4 ? (code >= 8 ? -v - 0.5 : v + 0.5) * c.unit : v * c.unit;
}
static codebook book(int bits, int d)
{
    static const std::vector<float> half[5] = { {}, {}, { 0.452780f, 1.510418f }, { 0.245094f, 0.756005f, 1.343909f, 2.151946f },
        { 0.128395f, 0.388048f, 0.656759f, 0.942341f, 1.256231f, 1.618046f, 2.069017f, 2.732590f } };
    std::vector<float> c;
    for (size_t i = half[bits].size(); i-- > 0;) c.push_back(-half[bits][i] / std::sqrt((float)d));
    for (float x : half[bits]) c.push_back(x / std::sqrt((float)d));
    return codebook_of(bits, c.data());
}
static float of_bf16(const uint8_t *p) { uint32_t w = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24; float f; memcpy(&f, &w, 4); return f; }

template <int KB, int VB, int D> static bool check_slab(unsigned seed)
{
    using T = tile<KB, VB, D>;
    const int heads = 2, n_seqs = 2, n[2] = { IMAGE_KEYS<D> * 2 + 45, 31 }, images = 3, tiles = images * IMAGE_KEYS<D> / 32, shift = 1, page_tiles = 2, max_pages = tiles / page_tiles;
    std::mt19937 rng(seed);
    std::vector<int> pages(n_seqs * max_pages);
    for (size_t i = 0; i < pages.size(); i++) pages[i] = (int)i;
    std::shuffle(pages.begin(), pages.end(), rng);
    std::vector<uint8_t> pool(pages.size() * heads * page_tiles * T::bytes, 0xFF);
    const codebook kb = book(KB, D), vb = book(VB, D);
    std::vector<float> want[2];
    for (auto &w : want) w.assign((size_t)n_seqs * heads * images * IMAGE_KEYS<D> * D, 0);
    for (int b = 0; b < n_seqs; b++) for (int h = 0; h < heads; h++) for (int t = 0; t < tiles; t++) {
        if (t * 32 >= n[b]) continue;
        uint8_t *at = pool.data() + (((size_t)pages[b * max_pages + t / page_tiles] * heads + h) * page_tiles + t % page_tiles) * T::bytes;
        memset(at, 0, T::k_bytes + T::v_bytes);
        for (int j = 0; j < 32 && t * 32 + j < n[b]; j++) for (int side = 0; side < 2; side++) {
            const float norm = __half2float(__float2half(0.5f + 0.01f * (rng() % 300)));
            ((__half *)(at + (side ? T::k_bytes + kelvin::side<VB, D>::word_bytes : kelvin::side<KB, D>::word_bytes)))[norm_place(j)] = __float2half(norm);
            for (int i = 0; i < D; i++) {
                const int bits = side ? VB : KB, code = (int)(rng() % (1u << bits));
                if (side) put_code(VB, kelvin::side<VB, D>::words, at + T::k_bytes, value_place(j, i), (uint32_t)code);
                else put_code(KB, kelvin::side<KB, D>::words, at, key_place(D / 32, j, i), (uint32_t)code);
                want[side][(((size_t)b * heads + h) * images * IMAGE_KEYS<D> + t * 32 + j) * D + i] = (float)(value_of(side ? vb : kb, bits, code) * norm);
            }
        }
    }
    slab_args a = {};
    const size_t bytes = (size_t)n_seqs * heads * images * IMAGE_BYTES<D>;
    a.pool = device(pool), a.pages = device(pages), a.n_codes = device(std::vector<int>{ n[0], n[1] });
    a.k = empty<uint8_t>(bytes), a.v = empty<uint8_t>(bytes);
    a.k_stride = a.v_stride = (size_t)images * IMAGE_BYTES<D>;
    a.n_kv_heads = heads, a.max_pages = max_pages, a.page_shift = shift, a.kb = kb, a.vb = vb;
    KV_LAUNCH((slab_fragments<KB, VB, D>), dim3(images, heads, n_seqs), dim3(128), 0, 0, a);
    CU(cudaGetLastError());
    CU(cudaDeviceSynchronize());
    double worst = 0;
    std::vector<uint8_t> got(bytes);
    for (int side = 0; side < 2; side++) {
        CU(cudaMemcpy(got.data(), side ? a.v : a.k, bytes, cudaMemcpyDeviceToHost));
        for (size_t row = 0; row < want[side].size() / D; row++)
            for (int i = 0; i < D; i++) {
                const double w = want[side][row * D + i], x = of_bf16(got.data() + row / IMAGE_KEYS<D> * IMAGE_BYTES<D> + image_byte(IMAGE_KEYS<D>, (int)(row % IMAGE_KEYS<D>), i));
                const double off = std::fabs(x - w) / (std::fabs(w) + 1e-9);
                worst = off == off ? std::max(worst, off) : INFINITY;
            }
    }
    const bool ok = worst < 0.00392;                            // 2^-8: one rounding to bf16
    printf("%s slab D%d %d/%d bits: worst value %.2e\n", ok ? "ok  " : "FAIL", D, KB, VB, worst);
    return ok;
}

#ifndef KV_EMULATE
#include "prefill_bench.cuh"
#endif

int main(int argc, char **argv)
{
#ifndef KV_EMULATE
    if (argc > 1 && !strcmp(argv[1], "bench")) return bench(argc > 2 ? argv[2] : "both");
#endif
    const bool small = argc > 3 && !strcmp(argv[3], "small");
    int failed = 0, done = 0;
    unsigned seed = argc > 4 ? (unsigned)atoi(argv[4]) : 1;
    for (int form : { PREFILL_PLAIN, PREFILL_WIDE }) {
        if (argc > 2 && strcmp(argv[2], form == PREFILL_PLAIN ? "plain" : "wide") && strcmp(argv[2], "both")) continue;
        if (form == PREFILL_WIDE && !prefill_has_wide<128>()) { printf("no wide form here\n"); continue; }
        printf("%s form\n", form == PREFILL_PLAIN ? "plain" : "wide");
        const shape shapes[] = {
            { 128, 1, 1, 1, { 0 }, 0, 0, 0, 1, 1, 1, false, false, false, false, 0 },
            { 128, 4, 2, 70, { 0 }, 0, 0, 0, 1, 1, 1, false, false, false, false, 0 },
            { 64, 3, 1, 33, { 7, 100 }, 0, 0, 0, 1, 1, 1, false, false, true, false, 0 },
            { 256, 1, 1, 45, { 30 }, 0, 0, 0, 1, 1, 1, false, false, true, false, 0 },
            { 128, 8, 1, 19, { 130 }, 0, 4, 8, 32, 32, 1, true, true, true, true, 0 },
            { 64, 2, 1, 90, { 61 }, 50, 4, 8, 1, 16, 1, true, true, true, false, 20 },
            { 256, 4, 1, 21, { 0, 111 }, 40, 5, 3, 16, 32, 2, true, true, true, false, 0 },
            { 128, 4, 2, 300, { 0 }, 0, 0, 0, 1, 1, 1, false, false, false, false, 0 },
            { 128, 4, 2, 129, { 299, 0, 1 }, 0, 4, 64, 32, 32, 1, true, true, true, true, 0 },
            { 128, 5, 1, 257, { 300 }, 100, 4, 0, 128, 32, 3, true, false, true, false, 0 },
            { 128, 7, 1, 97, { 555, 64 }, 0, 0, 32, 32, 128, 4, true, true, true, false, 30 },
            { 64, 8, 2, 65, { 1000 }, 0, 4, 16, 32, 32, 4, true, true, true, true, 0 },
            { 64, 1, 4, 200, { 77, 0 }, 64, 0, 0, 1, 1, 1, false, false, false, false, 50 },
            { 256, 8, 1, 133, { 300 }, 0, 128, 8, 16, 16, 2, true, true, true, true, 0 },
            { 256, 2, 2, 64, { 64, 128 }, 33, 0, 0, 1, 1, 3, false, true, true, false, 0 },
        };
        for (size_t i = 0; i < (small ? 7 : sizeof shapes / sizeof *shapes); i++) {
            const shape &s = shapes[i];
            const bool ok = s.d == 64 ? check<64>(s, form, seed) : s.d == 128 ? check<128>(s, form, seed) : check<256>(s, form, seed);
            failed += !ok, done++, seed++;
        }
        if (!small)
            for (int n = 1; n <= 300; n += n < 20 ? 3 : 47)             // odd tails
                for (int g : { 1, 2, 6 }) {
                    const shape s = { 128, g, 1, n, { (int)(seed * 37 % 200) }, 0, 4, 5, 16, 16, 1 + n % 2, true, true, true, false, 0 };
                    failed += !check<128>(s, form, seed), done++, seed++;
                }
    }
    for (bool ok : { check_slab<4, 4, 128>(11), check_slab<3, 3, 128>(12), check_slab<2, 2, 128>(13), check_slab<4, 2, 64>(14), check_slab<3, 4, 64>(15), check_slab<2, 3, 256>(16), check_slab<4, 4, 256>(17) }) failed += !ok, done++;
    printf("%d checks, %d failed\n", done, failed);
    return failed != 0;
}
