// attend_check.cu -- decode attention on codes against double precision on the host.
//   attend_check check     every shape; exits 1 when one is wrong
//   attend_check small     the same with short sequences: 2 s on the emulator
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#include "kelvin/attend.cuh"
using namespace kelvin;

#define CU(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("%s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); exit(2); } } while (0)

static const std::vector<float> lloyd(int bits)
{
    static const std::vector<float> half[5] = { {}, {}, { 0.452780f, 1.510418f }, { 0.245094f, 0.756005f, 1.343909f, 2.151946f },
        { 0.128395f, 0.388048f, 0.656759f, 0.942341f, 1.256231f, 1.618046f, 2.069017f, 2.732590f } };
    std::vector<float> c;
    for (size_t i = half[bits].size(); i-- > 0;) c.push_back(-half[bits][i]);
    for (float x : half[bits]) c.push_back(x);
    return c;
}

typedef void (*kernel_fn)(const attend_args);
struct form { int kb, vb, d, g; kernel_fn fn; int tile_bytes, shared_bytes; };
#define FORM(kb, vb, d, g, blocks) { kb, vb, d, g, attend_kernel<kb, vb, d, g, blocks>, tile<kb, vb, d>::bytes, detail::ring_of<kb, vb, d, g, blocks>::bytes }
static const form forms[] = {
    FORM(4, 4, 128, 4, 3), FORM(3, 3, 128, 4, 4), FORM(2, 2, 128, 4, 4), FORM(4, 4, 128, 8, 3), FORM(3, 3, 128, 8, 3), FORM(2, 2, 128, 8, 3),
    FORM(4, 4, 64, 4, 4), FORM(3, 3, 64, 4, 4), FORM(2, 2, 64, 4, 4), FORM(4, 4, 64, 8, 4), FORM(2, 2, 64, 8, 4),
    FORM(4, 4, 256, 4, 2), FORM(3, 3, 256, 4, 2), FORM(2, 2, 256, 4, 2), FORM(4, 4, 256, 8, 2), FORM(2, 2, 256, 8, 2),
    FORM(4, 2, 128, 4, 4), FORM(3, 2, 64, 4, 4), FORM(2, 4, 256, 4, 2),
};
static const form *find(int kb, int vb, int d, int g)
{
    for (const form &f : forms) if (f.kb == kb && f.vb == vb && f.d == d && f.g == g) return &f;
    return nullptr;
}

static void fwht(std::vector<double> &v)
{
    const size_t n = v.size();
    for (size_t h = 1; h < n; h *= 2)
        for (size_t i = 0; i < n; i++)
            if (!(i & h)) { const double a = v[i], b = v[i + h]; v[i] = a + b; v[i + h] = a - b; }
    for (double &x : v) x /= std::sqrt((double)n);
}

template <class T> T *device(const std::vector<T> &v)
{
    T *p;
    CU(cudaMalloc(&p, std::max<size_t>(1, v.size()) * sizeof(T)));
    CU(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static double value_of(const codebook &c, int bits, int code)
{
    const int i = bits == 4 && code >= 8 ? 15 - code : code;
    const double v = (double)(int8_t)((i < 4 ? c.t0 : c.t1) >> (i % 4 * 8) & 255u);
    return bits == 4 ? (code >= 8 ? -v - 0.5 : v + 0.5) * c.unit : v * c.unit;
}

struct shape { int kb, vb, d, group, kv_heads; std::vector<int> n_codes, n_exact, first; int needle; bool means, sign; int page_shift = 1; };

static bool check(const shape &s, unsigned seed)
{
    const int G = s.group > 4 ? 8 : 4, D = s.d, n_seqs = (int)s.n_codes.size(), n_heads = s.kv_heads * s.group, page_tiles = 1 << s.page_shift;
    const form *f = find(s.kb, s.vb, D, G);
    if (!f) { printf("no form %d %d %d %d\n", s.kb, s.vb, D, G); return false; }
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    auto scaled = [&](int bits) { std::vector<float> c = lloyd(bits); for (float &x : c) x /= std::sqrt((float)D); return c; };
    const codebook kb = codebook_of(s.kb, scaled(s.kb).data()), vb = codebook_of(s.vb, scaled(s.vb).data());
    int max_pages = 1, n_pages = 0, capacity = 1;
    for (int n : s.n_codes) max_pages = std::max(max_pages, (n + 32 * page_tiles - 1) / (32 * page_tiles));
    for (int n : s.n_exact) capacity = std::max(capacity, n);
    std::vector<int> pages((size_t)n_seqs * max_pages, 0x7fffffff);
    for (int b = 0; b < n_seqs; b++) for (int i = 0; i * 32 * page_tiles < s.n_codes[b]; i++) pages[(size_t)b * max_pages + i] = n_pages++;
    std::vector<int> order(n_pages);
    for (int i = 0; i < n_pages; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    for (int &p : pages) if (p != 0x7fffffff) p = order[p];
    const size_t tb = f->tile_bytes, page_bytes = (size_t)s.kv_heads * page_tiles * tb;
    std::vector<uint8_t> pool(std::max<size_t>(1, n_pages) * page_bytes);
    for (uint8_t &x : pool) x = 0xFF;                                   // poison: scales that are NaN
    std::vector<float> q((size_t)n_seqs * n_heads * D), sign, mk, mv;
    for (float &x : q) x = normal(rng) * 2;
    if (s.sign) for (int i = 0; i < 2 * s.kv_heads * D; i++) sign.push_back(rng() & 1 ? 1.0f : -1.0f);
    if (s.means) for (int i = 0; i < s.kv_heads * D; i++) { mk.push_back(normal(rng)); mv.push_back(normal(rng)); }
    std::vector<__half> ek((size_t)n_seqs * s.kv_heads * capacity * D), ev(ek.size());
    for (auto &x : ek) x = __float2half(NAN);
    for (auto &x : ev) x = __float2half(NAN);
    std::vector<double> want((size_t)n_seqs * n_heads * D), size((size_t)n_seqs * n_heads);
    for (int b = 0; b < n_seqs; b++)
        for (int h = 0; h < s.kv_heads; h++) {
            const int n = s.n_codes[b], ne = s.n_exact.empty() ? 0 : s.n_exact[b], first = s.first.empty() ? 0 : s.first[b];
            std::vector<uint8_t> kc((size_t)n * D), vc((size_t)n * D);
            std::vector<float> nk(n), nv(n);
            for (int t = 0; t < n; t++) {
                nk[t] = __half2float(__float2half(std::sqrt((float)D) * (0.5f + 0.001f * (rng() % 1000))));
                nv[t] = __half2float(__float2half(0.1f + 0.01f * (rng() % 1000)));
                if (t == s.needle) nk[t] = __half2float(__float2half(60 * std::sqrt((float)D)));
                for (int i = 0; i < D; i++) { kc[(size_t)t * D + i] = rng() % (1u << s.kb); vc[(size_t)t * D + i] = rng() % (1u << s.vb); }
            }
            for (int tile_i = 0; tile_i * 32 < n; tile_i++) {
                uint8_t *at = pool.data() + (size_t)pages[(size_t)b * max_pages + tile_i / page_tiles] * page_bytes + ((size_t)h * page_tiles + tile_i % page_tiles) * tb;
                const int kwords = D / 16 * s.kb / 2 * 128, kbytes = kwords + 64, vwords = D / 16 * s.vb / 2 * 128;
                memset(at, 0, kwords);
                memset(at + kbytes, 0, vwords);
                for (int j = 0; j < 32; j++) {
                    const int t = tile_i * 32 + j;
                    if (t >= n) continue;
                    for (int i = 0; i < D; i++) {
                        put_code(s.kb, D / 16 * s.kb / 2, at, key_place(D / 32, j, i), kc[(size_t)t * D + i]);
                        put_code(s.vb, D / 16 * s.vb / 2, at + kbytes, value_place(j, i), vc[(size_t)t * D + i]);
                    }
                    ((__half *)(at + kwords))[norm_place(j)] = __float2half(nk[t]);
                    ((__half *)(at + kbytes + vwords))[norm_place(j)] = __float2half(nv[t]);
                }
            }
            for (int t = 0; t < ne; t++)
                for (int i = 0; i < D; i++) {
                    const size_t at = (((size_t)b * s.kv_heads + h) * capacity + t) * D + i;
                    ek[at] = __float2half(normal(rng));
                    ev[at] = __float2half(normal(rng));
                }
            for (int j = 0; j < s.group; j++) {
                const int head = h * s.group + j;
                const float *qq = q.data() + ((size_t)b * n_heads + head) * D;
                std::vector<double> r(D);
                double qm = 0;
                for (int i = 0; i < D; i++) { r[i] = qq[i] * (s.sign ? sign[(size_t)h * D + i] : 1.0); if (s.means) qm += (double)qq[i] * mk[(size_t)h * D + i]; }
                fwht(r);
                std::vector<double> score;
                double top = -INFINITY;
                for (int t = first; t < n; t++) {
                    double x = 0;
                    for (int i = 0; i < D; i++) x += r[i] * value_of(kb, s.kb, kc[(size_t)t * D + i]);
                    score.push_back((x * nk[t] + qm) / std::sqrt((double)D));
                }
                for (int t = 0; t < ne; t++) {
                    double x = 0;
                    for (int i = 0; i < D; i++) x += (double)qq[i] * __half2float(ek[(((size_t)b * s.kv_heads + h) * capacity + t) * D + i]);
                    score.push_back(x / std::sqrt((double)D));
                }
                for (double x : score) top = std::max(top, x);
                std::vector<double> o(D, 0.0), e(D, 0.0);
                double l = 0, lc = 0;
                for (int t = first; t < n; t++) {
                    const double p = std::exp(score[t - first] - top);
                    l += p, lc += p;
                    for (int i = 0; i < D; i++) o[i] += p * nv[t] * value_of(vb, s.vb, vc[(size_t)t * D + i]);
                }
                for (int t = 0; t < ne; t++) {
                    const double p = std::exp(score[(size_t)(n - first) + t] - top);
                    l += p;
                    for (int i = 0; i < D; i++) e[i] += p * __half2float(ev[(((size_t)b * s.kv_heads + h) * capacity + t) * D + i]);
                }
                fwht(o);
                double norm = 0;
                for (int i = 0; i < D; i++) {
                    const double y = l > 0 ? (o[i] * (s.sign ? sign[(size_t)(s.kv_heads + h) * D + i] : 1.0) + (s.means ? lc * mv[(size_t)h * D + i] : 0.0) + e[i]) / l : 0;
                    want[((size_t)b * n_heads + head) * D + i] = y;
                    norm += y * y;
                }
                size[(size_t)b * n_heads + head] = std::sqrt(norm);
            }
        }
    int blocks, sms;
    CU(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    CU(cudaFuncSetAttribute(f->fn, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes));
    CU(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, f->fn, 128, f->shared_bytes));
    const int grid = blocks * sms, rows = n_seqs * s.kv_heads * ((s.group + G - 1) / G);
    attend_args a = {};
    float *out, *partials;
    int *arrivals;
    CU(cudaMalloc(&out, want.size() * 4));
    CU(cudaMemset(out, 0xFF, want.size() * 4));
    CU(cudaMalloc(&partials, attend_partials(grid, rows, G, D) * 4));
    CU(cudaMemset(partials, 0xFF, attend_partials(grid, rows, G, D) * 4));
    CU(cudaMalloc(&arrivals, rows * 4));
    CU(cudaMemset(arrivals, 0, rows * 4));
    a.q = device(q), a.out = out, a.pool = device(pool), a.pages = device(pages), a.n_codes = device(s.n_codes);
    a.first = s.first.empty() ? nullptr : device(s.first), a.sign = s.sign ? device(sign) : nullptr;
    a.exact_k = device(ek), a.exact_v = device(ev), a.n_exact = s.n_exact.empty() ? nullptr : device(s.n_exact);
    a.mean_k = s.means ? device(mk) : nullptr, a.mean_v = s.means ? device(mv) : nullptr;
    a.partials = partials, a.arrivals = arrivals;
    a.n_seqs = n_seqs, a.n_heads = n_heads, a.n_kv_heads = s.kv_heads, a.max_pages = max_pages, a.page_shift = s.page_shift, a.exact_capacity = capacity;
    a.scale = 1 / std::sqrt((float)D), a.kb = kb, a.vb = vb;
    std::vector<float> got(want.size()), again(want.size());
    for (int i = 0; i < 2; i++) {
        KV_LAUNCH(f->fn, grid, 128, f->shared_bytes, 0, a);
        CU(cudaGetLastError());
        CU(cudaDeviceSynchronize());
        CU(cudaMemcpy((i ? again : got).data(), out, got.size() * 4, cudaMemcpyDeviceToHost));
    }
    double worst = 0;
    size_t worst_at = 0;
    for (size_t x = 0; x < size.size(); x++) {
        double e = 0;
        for (int i = 0; i < D; i++) { const double d = got[x * D + i] - want[x * D + i]; e += d * d; }
        e = std::sqrt(e);
        const double rel = size[x] > 0 ? e / size[x] : e;
        if (!(rel <= worst) && worst == worst) worst = rel, worst_at = x;
    }
    const bool same = memcmp(got.data(), again.data(), got.size() * 4) == 0, good = worst <= 1e-3 && same;
    printf("%s K%d V%d D%d g%d Hkv%d seqs%d len%d exact%d %s%s: worst relative error %.2e (seq %zu head %zu)%s\n", good ? "ok  " : "FAIL", s.kb, s.vb, D, s.group, s.kv_heads, n_seqs, s.n_codes[0],
           s.n_exact.empty() ? 0 : s.n_exact[0], s.needle >= 0 ? "needle " : "", s.means ? "means" : "", worst, worst_at / n_heads, worst_at % n_heads, same ? "" : ", and differs between two launches");
    for (const void *p : { (const void *)a.q, (const void *)a.out, (const void *)a.pool, (const void *)a.pages, (const void *)a.n_codes, (const void *)a.first, (const void *)a.sign,
                           (const void *)a.exact_k, (const void *)a.exact_v, (const void *)a.n_exact, (const void *)a.mean_k, (const void *)a.mean_v, (const void *)partials, (const void *)arrivals })
        CU(cudaFree(const_cast<void *>(p)));
    return good;
}

// small: the same shapes with at most 1,024 tokens a sequence and 8 sequences, for the emulator and compute-sanitizer.
static int run_checks(bool small)
{
    int failed = 0, n = 0;
    auto one = [&](shape s) {
        if (small) {
            for (int &x : s.n_codes) x = x > 1024 ? x % 1024 : x;
            for (int &x : s.first) x = x > 512 ? 100 : x;
            if (s.needle >= s.n_codes[0]) s.needle = s.n_codes[0] / 2;
            if (s.n_codes.size() > 8) s.n_codes.resize(8);
        }
        n++;
        failed += !check(s, 1000u + n);
    };
    const int widths[][2] = { { 4, 4 }, { 3, 3 }, { 2, 2 } };
    for (int d : { 64, 128, 256 })
        for (auto &w : widths)
            for (int group : { 1, 3, 4 })
                one({ w[0], w[1], d, group, 2, { 100, 1, 4097, 0, 33, 32 }, {}, {}, -1, false, true });
    for (int d : { 64, 128, 256 })
        for (int w : { 4, 2 })
            for (int group : { 5, 7, 8, 16 })
                one({ w, w, d, group, 1, { 257, 31 }, {}, {}, -1, false, true });
    one({ 4, 4, 128, 4, 8, { 5000, 64, 700 }, { 36, 0, 5 }, {}, -1, true, true });
    one({ 3, 3, 128, 4, 2, { 5000, 64, 0 }, { 132, 1, 36 }, {}, 77, true, true });
    one({ 2, 2, 128, 4, 2, { 3000, 2990, 100 }, {}, { 1000, 2989, 100 }, -1, false, false });
    one({ 4, 2, 128, 2, 2, { 300, 5 }, { 4, 4 }, { 65, 0 }, 200, true, true });
    one({ 3, 2, 64, 3, 3, { 300, 5 }, { 4, 4 }, { 65, 0 }, 200, true, true });
    one({ 2, 4, 256, 1, 1, { 300, 5 }, { 4, 4 }, { 65, 0 }, 200, true, true });
    for (int shift : { 0, 2, 5 })                   // pages of 32, 128 and 1024 tokens
        for (int group : { 4, 8 }) one({ 4, 4, 128, group, 2, { 1500, 31, 1024, 0 }, { 3, 0, 0, 70 }, { 40, 0, 1000, 0 }, -1, false, true, shift });
    one({ 4, 4, 128, 4, 2, { 4096, 4096, 4096 }, {}, {}, 4000, false, true, 2 });
    one({ 4, 4, 128, 4, 1, { 200000 }, { 4 }, {}, 150000, false, true });
    one({ 4, 4, 128, 4, 1, { 4 }, { 500 }, {}, -1, false, true });
    std::vector<int> ragged;
    for (int i = 0; i < 60; i++) ragged.push_back(i * i % 977);
    one({ 4, 4, 128, 4, 2, ragged, {}, {}, -1, false, true });
    printf("%d checks, %d failed\n", n, failed);
    return failed != 0;
}

int main(int argc, char **argv) { return run_checks(argc > 1 && !strcmp(argv[1], "small")); }
