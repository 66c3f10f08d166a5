/* levels.h -- includes LEVEL_FILE once per SIMD level, with
 *
 *   L(name)  the level's own name of a function       TARGET  the attribute of its functions       LANES  floats of a register
 *
 * and, where LEVEL_C is defined, first with plain C: LANES 4, which are independent sums.  The includer undefines both. */
#ifdef LEVEL_C
#define L(name) name##_c
#define TARGET
#define LANES 4
#include LEVEL_FILE
#undef L
#undef TARGET
#undef LANES
#endif

#define L(name) name##_avx2
#define TARGET KV_AVX2
#define LANES 8
#include LEVEL_FILE
#undef L
#undef TARGET
#undef LANES

#define L(name) name##_avx512
#define TARGET KV_AVX512
#define LANES 16
#include LEVEL_FILE
#undef L
#undef TARGET
#undef LANES
