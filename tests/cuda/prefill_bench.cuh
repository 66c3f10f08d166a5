// prefill_bench.cuh -- the speed of prefill_check: events, median of repeats, random data, inputs rotated past the L2.
#pragma once
#include <functional>

static __global__ void random_bytes(uint32_t *p, size_t n, uint32_t seed, int kind)      // 0: bits; 1: bf16 of about unit size; 2: f32 in -1..1
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
        x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9ull, x ^= x >> 29;
        const uint32_t r = (uint32_t)(x >> 16);
        p[i] = kind == 0 ? r : kind == 1 ? ((r & 0x80FF80FFu) | 0x3F003F00u) : __float_as_uint((float)(int32_t)r * 4.656612873e-10f);
    }
}
template <class T> static T *random_of(size_t bytes, int kind, uint32_t seed)
{
    T *p;
    CU(cudaMalloc((void **)&p, bytes));
    random_bytes<<<2048, 256>>>((uint32_t *)p, bytes / 4, seed, kind);
    CU(cudaDeviceSynchronize());
    return p;
}
static __global__ void set_norms(uint8_t *tiles, size_t n_tiles, int tile_bytes, int k_bytes, float k, float v)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n_tiles * 64; i += (size_t)gridDim.x * blockDim.x)
        ((__half *)(tiles + i / 64 * tile_bytes + (i % 64 < 32 ? k_bytes : tile_bytes) - 64))[i % 32] = __float2half(i % 64 < 32 ? k : v);
}
static double median_ms(const std::function<void(int)> &f, int repeats = 15)
{
    cudaEvent_t a, b;
    CU(cudaEventCreate(&a));
    CU(cudaEventCreate(&b));
    std::vector<double> t;
    for (int i = 0; i < repeats + 3; i++) {
        CU(cudaEventRecord(a));
        f(i);
        CU(cudaEventRecord(b));
        CU(cudaEventSynchronize(b));
        float ms;
        CU(cudaEventElapsedTime(&ms, a, b));
        if (i >= 3) t.push_back(ms);
    }
    CU(cudaGetLastError());
    std::sort(t.begin(), t.end());
    return t[t.size() / 2];
}

// A chunk of n tokens on a prefix: what the attention alone takes, and with all that goes around it.  bits 0: the prefix is bf16 images already.
template <int D> struct run_of {
    int n, prefix, heads, kv_heads, slab;
    uint8_t *q, *ck, *cv, *sk, *sv;
    float *qf, *kf, *vf, *out, *sums, *sign;
    float2 *tops;
    int *length, *codes_n, *pages;
    size_t stride_c, stride_s;
    int parts;
    run_of(int n, int prefix, int heads, int kv_heads) : n(n), prefix(prefix), heads(heads), kv_heads(kv_heads), slab(32768)
    {
        const int chunk_images = (n + IMAGE_KEYS<D> - 1) / IMAGE_KEYS<D> + 1, slab_images = std::min(prefix, slab) / IMAGE_KEYS<D>;
        stride_c = (size_t)chunk_images * IMAGE_BYTES<D>, stride_s = (size_t)std::max(1, slab_images) * IMAGE_BYTES<D>;
        q = empty<uint8_t>(prefill_query_bytes<D>(1, n, heads, kv_heads), 0);
        ck = random_of<uint8_t>(stride_c * kv_heads, 1, 1), cv = random_of<uint8_t>(stride_c * kv_heads, 1, 2);
        sk = random_of<uint8_t>(stride_s * kv_heads, 1, 3), sv = random_of<uint8_t>(stride_s * kv_heads, 1, 4);
        qf = random_of<float>((size_t)n * heads * D * 4, 2, 5), kf = random_of<float>((size_t)n * kv_heads * D * 4, 2, 6), vf = random_of<float>((size_t)n * kv_heads * D * 4, 2, 7);
        sign = device(std::vector<float>((size_t)kv_heads * D, 1.0f));
        parts = std::max(1, (prefix + slab - 1) / slab) + 1;
        sums = empty<float>((size_t)parts * n * heads * D), tops = empty<float2>((size_t)parts * n * heads), out = empty<float>((size_t)n * heads * D);
        length = device(std::vector<int>{ prefix }), codes_n = device(std::vector<int>{ prefix });
        std::vector<int> p(prefix / 64 + 1);
        for (size_t i = 0; i < p.size(); i++) p[i] = (int)i;
        std::shuffle(p.begin(), p.end(), std::mt19937(3));
        pages = device(p);
    }
    ~run_of() { for (void *p : { (void *)q, (void *)ck, (void *)cv, (void *)sk, (void *)sv, (void *)qf, (void *)kf, (void *)vf, (void *)out, (void *)sums, (void *)tops, (void *)length, (void *)codes_n, (void *)pages, (void *)sign }) cudaFree(p); }
    prefill_args args() const
    {
        prefill_args a = {};
        a.q = q, a.lengths = length, a.sums = sums, a.tops = tops, a.n_seqs = 1, a.n = n, a.n_heads = heads, a.n_kv_heads = kv_heads, a.causal = 1, a.splits = 1;
        return a;
    }
    void around_before() { prefill_turn t = { sign, nullptr, 1 };
        CU(prefill_prepare<D>(qf, t, 0.0883883f, 1, n, heads, kv_heads, q, nullptr, 0));
        CU((prefill_put<D>(chunk_rows<D>{ kf, length, n, kv_heads }, t, ck, stride_c, nullptr, prefix / IMAGE_KEYS<D>, (int)(stride_c / IMAGE_BYTES<D>), 0, 0, 1, kv_heads, 0)));
        CU((prefill_put<D>(chunk_rows<D>{ vf, length, n, kv_heads }, t, cv, stride_c, nullptr, prefix / IMAGE_KEYS<D>, (int)(stride_c / IMAGE_BYTES<D>), 0, 0, 1, kv_heads, 0)));
    }
    void after(int n_parts) { CU(prefill_join<D>(sums, tops, n_parts, { sign, nullptr, 1 }, 1, n, heads, kv_heads, out, 0)); }
    // slab(first position, images): fills sk, sv.
    void attend(int form, const std::function<void(int, int)> &fill)
    {
        prefill_args a = args();
        for (int p = 0; p < prefix; p += slab) {
            const int to = std::min(prefix, p + slab);
            fill(p, (to - p) / IMAGE_KEYS<D>);
            a.n_sources = 1;
            a.source[0] = { sk, sv, stride_s, stride_s, nullptr, nullptr, p / IMAGE_KEYS<D>, p / IMAGE_KEYS<D>, p, to, SOURCE_WHOLE };
            a.part0 = p / slab;
            if (to == prefix) a.source[a.n_sources++] = { ck, cv, stride_c, stride_c, nullptr, nullptr, prefix / IMAGE_KEYS<D>, prefix / IMAGE_KEYS<D>, prefix, prefix + n, SOURCE_WHOLE };
            CU(prefill_launch<D>(a, form, 0));
        }
        if (!prefix) {
            a.n_sources = 1;
            a.source[0] = { ck, cv, stride_c, stride_c, nullptr, nullptr, 0, 0, 0, n, SOURCE_WHOLE };
            CU(prefill_launch<D>(a, form, 0));
        }
    }
    double flops() const { return 4.0 * heads * D * ((double)n * prefix + 0.5 * (double)n * (n + 1)); }
};

template <int BITS, int D> static void fill_codes(run_of<D> &r, uint8_t *pool, int p, int images)
{
    slab_args a = {};
    a.pool = pool, a.pages = r.pages, a.n_codes = r.codes_n, a.k = r.sk, a.v = r.sv, a.k_stride = a.v_stride = r.stride_s;
    a.n_kv_heads = r.kv_heads, a.max_pages = r.prefix / 64 + 1, a.page_shift = 1, a.first = p / 32, a.kb = book(BITS, D), a.vb = book(BITS, D);
    slab_fragments<BITS, BITS, D><<<dim3(images, r.kv_heads, 1), 128>>>(a);
}

template <int BITS, int D> static void codes_row(run_of<D> &r, int form, double bf16)
{
    using T = tile<BITS, BITS, D>;
    const size_t tiles = (size_t)(r.prefix / 64 + 1) * 2 * r.kv_heads;
    uint8_t *pool = random_of<uint8_t>(tiles * T::bytes, 0, 9);
    set_norms<<<1024, 256>>>(pool, tiles, T::bytes, T::k_bytes, sqrtf((float)D), sqrtf((float)D));
    const int images = std::min(r.prefix, r.slab) / IMAGE_KEYS<D>;
    const double slab = median_ms([&](int) { fill_codes<BITS, D>(r, pool, 0, images); });
    const double moved = (double)images * IMAGE_KEYS<D> * r.kv_heads * (4.0 * D + T::bytes / 32.0);
    const double all = median_ms([&](int) { r.around_before(); r.attend(form, [&](int p, int n) { fill_codes<BITS, D>(r, pool, p, n); }); r.after(std::max(1, (r.prefix + r.slab - 1) / r.slab)); });
    printf("BENCH {\"what\":\"chunk on codes\",\"form\":\"%s\",\"bits\":%d,\"D\":%d,\"chunk\":%d,\"prefix\":%d,\"heads\":%d,\"kv_heads\":%d,\"ms\":%.4f,\"bf16_ms\":%.4f,\"ratio\":%.4f,\"slab_ms\":%.4f,\"slab_TBps\":%.3f}\n",
        form == PREFILL_WIDE ? "wide" : "plain", BITS, D, r.n, r.prefix, r.heads, r.kv_heads, all, bf16, all / bf16, slab, moved / slab * 1e-9);
    fflush(stdout);
    CU(cudaFree(pool));
}

template <int D> static void bench_shape(int n, int prefix, int heads, int kv_heads, int form, bool codes)
{
    run_of<D> r(n, prefix, heads, kv_heads);
    r.around_before();
    const double alone = median_ms([&](int) { r.attend(form, [](int, int) {}); });
    const double all = median_ms([&](int) { r.around_before(); r.attend(form, [](int, int) {}); r.after(std::max(1, (prefix + r.slab - 1) / r.slab)); });
    printf("BENCH {\"what\":\"bf16\",\"form\":\"%s\",\"D\":%d,\"chunk\":%d,\"prefix\":%d,\"heads\":%d,\"kv_heads\":%d,\"ms\":%.4f,\"TFLOPs\":%.1f,\"around_ms\":%.4f}\n", form == PREFILL_WIDE ? "wide" : "plain", D, n, prefix, heads, kv_heads,
        alone, r.flops() / alone * 1e-9, all);
    fflush(stdout);
    if (!codes) return;
    codes_row<4, D>(r, form, all);
    codes_row<3, D>(r, form, all);
    codes_row<2, D>(r, form, all);
}

static int bench(const char *which)
{
    for (int form : { PREFILL_WIDE, PREFILL_PLAIN }) {
        if (!strcmp(which, form == PREFILL_WIDE ? "plain" : "wide") || (form == PREFILL_WIDE && !prefill_has_wide<128>())) continue;
        bench_shape<128>(32768, 0, 32, 8, form, false);
        bench_shape<128>(2048, 32768, 32, 8, form, true);
        if (form == PREFILL_PLAIN) break;
        bench_shape<128>(2048, 131072, 32, 8, form, true);
        bench_shape<128>(512, 32768, 32, 8, form, true);
        bench_shape<64>(2048, 32768, 32, 8, form, true);
        bench_shape<256>(2048, 32768, 16, 4, form, true);
    }
    return 0;
}
