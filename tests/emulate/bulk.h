// bulk.h -- mbarriers and bulk copies (PTX ISA 9.7.13.15 and 9.7.9.25), for mma_host.h.
//
// A barrier is 8 bytes of shared memory.  A phase ends when `count` arrivals and all announced bytes are there; then the next one begins.
// Bytes land when somebody waits for them: until then their place is poison.
#pragma once
#include <cstdint>
namespace kv_emulate {
struct mbarrier { uint16_t count, pending; uint32_t bytes : 31, phase : 1; };
static_assert(sizeof(mbarrier) == 8, "as large as the hardware's");
void bulk_init(uint64_t *barrier, int count);
void bulk_arrive(uint64_t *barrier, int announced_bytes);
void bulk_copy(void *shared, const void *global, int n_bytes, uint64_t *barrier);       // after the arrival that announced its bytes
void bulk_wait(uint64_t *barrier, uint32_t parity);     // until the phase of that parity has ended
}
