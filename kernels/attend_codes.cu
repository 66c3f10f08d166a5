// attend_codes.cu -- decode attention on codes: choosing the form, its grid, its launch.
#include <atomic>
#include "attend_codes.cuh"

extern const attend_form kv_attend_forms_64[ATTEND_N_FORMS], kv_attend_forms_128[ATTEND_N_FORMS], kv_attend_forms_256[ATTEND_N_FORMS];
static const attend_form *const forms[] = { kv_attend_forms_64, kv_attend_forms_128, kv_attend_forms_256 };
enum { N_FORMS = ATTEND_N_FORMS, MAX_DEVICES = 64 };

const attend_form *kv_cuda_attend_form(int bits_k, int bits_v, int head_dim, int group)
{
    const int heads = group <= 4 ? 4 : 8;
    for (const attend_form *of_dim : forms)
        for (int i = 0; i < N_FORMS; i++) {
            const attend_form &f = of_dim[i];
            if (f.bits_k == bits_k && f.bits_v == bits_v && f.head_dim == head_dim && f.heads == heads) return &f;
        }
    return nullptr;
}

int kv_cuda_attend_rows(const attend_form *f, const kelvin::attend_args &a)
{
    return a.n_seqs * a.n_kv_heads * ((a.n_heads / a.n_kv_heads + f->heads - 1) / f->heads);
}

// What a launch needs to know of a form on a device: blocks that run at once, and whether launches may overlap.  Asked for once.
struct known { int grid; bool overlap; };
static cudaError_t known_of(const attend_form *f, known *out)
{
    static std::atomic<int> all[3][N_FORMS][MAX_DEVICES];              // the grid, its sign: no overlap
    int device, blocks, sms, major;
    cudaError_t e = cudaGetDevice(&device);
    if (e != cudaSuccess) return e;
    if (device >= MAX_DEVICES) return cudaErrorInvalidDevice;
    const int of_dim = f->head_dim == 64 ? 0 : f->head_dim == 128 ? 1 : 2;
    std::atomic<int> &slot = all[of_dim][f - forms[of_dim]][device];
    int have = slot.load();
    if (!have) {
        if ((e = cudaFuncSetAttribute((const void *)f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes)) != cudaSuccess) return e;
        if ((e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return e;
        if ((e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != cudaSuccess) return e;
        if ((e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, f->kernel, kelvin::detail::WARPS * 32, f->shared_bytes)) != cudaSuccess) return e;
        if (blocks < 1) return cudaErrorInvalidConfiguration;
        have = major >= 9 ? blocks * sms : -blocks * sms;
        slot.store(have);
    }
    *out = { have < 0 ? -have : have, have > 0 };
    return cudaSuccess;
}

size_t kv_cuda_attend_partials(const attend_form *f, const kelvin::attend_args &a, cudaError_t *status)
{
    known k;
    *status = known_of(f, &k);
    return *status == cudaSuccess ? kelvin::attend_partials(k.grid, kv_cuda_attend_rows(f, a), f->heads, f->head_dim) : 0;
}

cudaError_t kv_cuda_attend_codes(const attend_form *f, const kelvin::attend_args &a, cudaStream_t stream)
{
    known k;
    const cudaError_t e = known_of(f, &k);
    if (e != cudaSuccess) return e;
#ifndef KV_EMULATE
    if (k.overlap) {
        cudaLaunchAttribute overlap = {};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t launch = {};
        launch.gridDim = k.grid, launch.blockDim = kelvin::detail::WARPS * 32, launch.dynamicSmemBytes = f->shared_bytes, launch.stream = stream;
        launch.attrs = &overlap, launch.numAttrs = 1;
        return cudaLaunchKernelEx(&launch, f->kernel, a);
    }
#endif
    KV_LAUNCH(f->kernel, k.grid, kelvin::detail::WARPS * 32, f->shared_bytes, stream, a);
    return cudaGetLastError();
}
