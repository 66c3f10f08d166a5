// wgmma.cuh -- Hopper's own: products of a whole warpgroup from shared memory, bulk copies and the barriers they complete.  sm_90a.
#pragma once
#include "mma.cuh"

namespace kelvin {

// ---- barriers in shared memory: a phase ends when `count` arrivals and all announced bytes are there
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint64_t *b, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory"); }
__device__ __forceinline__ void barrier_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t *b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_address(b)) : "memory"); }
__device__ __forceinline__ void barrier_expect(uint64_t *b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_address(b)), "r"(bytes) : "memory"); }
__device__ __forceinline__ void barrier_wait(uint64_t *b, int parity)
{
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" :: "r"(shared_address(b)), "r"(parity) : "memory");
}
// Memory to shared memory, bytes a multiple of 16; announced on the barrier beforehand.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, uint64_t *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}

// Two warpgroups in turn: one waits at a number until the other has come by it.
__device__ __forceinline__ void turn_wait(int id) { asm volatile("bar.sync %0, 256;" :: "r"(id) : "memory"); }
__device__ __forceinline__ void turn_give(int id) { asm volatile("bar.arrive %0, 256;" :: "r"(id) : "memory"); }

// A warpgroup's registers a thread, from then on.
template <int N> __device__ __forceinline__ void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ __forceinline__ void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }

// ---- products.  Operands in lines of 128 bytes with exchanged pieces (prefill_image.cuh).
__device__ __forceinline__ void products_open() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
// Keeps reads and writes of accumulators on their side of a wait.
template <int N> __device__ __forceinline__ void products_hold(float d[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]) :: "memory");
}

// An operand in shared memory.  Rows along the product's inner axis (keys, queries): 8 lines 1024 bytes apart.  The inner axis along
// the lines' stack (values): `panel` bytes from one 64 columns to the next.
__device__ __forceinline__ uint64_t operand(const void *p, int panel = 16)
{
    return (uint64_t)(shared_address(p) >> 4 & 0x3FFF) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#define KV_D4(i)   "+f"(d[(i) / 4][0]), "+f"(d[(i) / 4][1]), "+f"(d[(i) / 4][2]), "+f"(d[(i) / 4][3])
#define KV_D16(i)  KV_D4(i), KV_D4((i) + 4), KV_D4((i) + 8), KV_D4((i) + 12)
#define KV_D32     KV_D16(0), KV_D16(16)
#define KV_D64     KV_D32, KV_D16(32), KV_D16(48)
#define KV_D128    KV_D64, KV_D16(64), KV_D16(80), KV_D16(96), KV_D16(112)
#define KV_R32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define KV_R64 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
    "%62,%63}"
#define KV_R128 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
    "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
    "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
    "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"

// d (+)= A B: 64 x N, 16 deep.  A and B with their inner axis along the lines.
template <int N> __device__ __forceinline__ void product_shared(float d[N / 8][4], uint64_t a, uint64_t b, int add);
// A in registers as m16n8k16 has it, B with its inner axis along the stack of lines.
template <int N> __device__ __forceinline__ void product_stacked(float d[N / 8][4], const uint32_t a[4], uint64_t b);

template <> __device__ __forceinline__ void product_shared<64>(float d[8][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " KV_R32 ", %32, %33, p, 1, 1, 0, 0;\n}"
        : KV_D32 : "l"(a), "l"(b), "r"(add));
}
template <> __device__ __forceinline__ void product_shared<128>(float d[16][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " KV_R64 ", %64, %65, p, 1, 1, 0, 0;\n}"
        : KV_D64 : "l"(a), "l"(b), "r"(add));
}
template <> __device__ __forceinline__ void product_stacked<64>(float d[8][4], const uint32_t a[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " KV_R32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
        : KV_D32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <> __device__ __forceinline__ void product_stacked<128>(float d[16][4], const uint32_t a[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " KV_R64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : KV_D64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <> __device__ __forceinline__ void product_stacked<256>(float d[32][4], const uint32_t a[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " KV_R128 ", {%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
        : KV_D128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef KV_D4
#undef KV_D16
#undef KV_D32
#undef KV_D64
#undef KV_D128
#undef KV_R32
#undef KV_R64
#undef KV_R128

}  // namespace kelvin
