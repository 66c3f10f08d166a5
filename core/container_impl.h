/* container_impl.h -- the bytes of a container, for container.c and container_write.c only.  All little-endian.
 *
 *   file        | header | section | section | ... | directory |
 *   header      0 "KELVINKV" | 8 version u32 | 12 sections u32 | 16 directory at u64 | 24 file bytes u64 | 32 directory CRC u32 |
 *               36 zeros | 60 CRC of bytes 0..59 u32
 *   section     | meta | bank | page | page | ... | page table |         raw pages at multiples of 64
 *   directory   an entry a section:
 *               0 kind, NUL-padded [24] | 24 version u32 | 28 flags u32 | 32 meta at u64 | 40 meta bytes u32 | 44 bank bytes u32 |
 *               48 page table at u64 | 56 pages u32 | 60 wished stage u8 | 61 level i8 | 62 zeros |
 *               64 CRC of meta and bank u32 | 68 page table CRC u32 | 72 zeros
 *   page table  an entry a page:
 *               0 at u64 | 8 stored bytes u32 | 12 decoded bytes u32 | 16 CRC of the stored bytes u32 | 20 stage u8 | 21 zeros */
#ifndef KV_CONTAINER_IMPL_H
#define KV_CONTAINER_IMPL_H
#include "container.h"

enum { PACK_HEADER = 64, PACK_ENTRY = 80, PACK_PAGE = 24, PACK_ALIGN = 64, PACK_MAX_PARTS = 1 << 16, PACK_MAX_PAGES = 1 << 24, PACK_MAX_META = 1 << 26,
       PACK_RANS_BANK = 4 /* a page's stage: rANS with the section's bank */ };
#define PACK_MAGIC "KELVINKV"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are copied as they lie in memory");
static inline void kv_put_u32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }
static inline void kv_put_u64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }
#endif
