/* Convolutions of float32 images, for processors with AVX2 and FMA. */
#include "conv.h"

#define NAMED(part) megabatch_conv_avx2_##part
#ifdef HAS_VECTORS
#define TARGET __attribute__((target("avx2,fma")))
#define RUNS_HERE (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define FMA _mm256_fmadd_ps

/* 16 registers: 12 sums, 2 of lanes, and one word. */
enum { VECTOR = 8, NARROW_TILE = 12, WIDE_TILE = 6, ALIASED_TILE = 6, NARROW_AHEAD = 2, WIDE_AHEAD = 1 };
enum { PANEL = 12, PANEL_VECTORS = 2 };
#include "conv_float32.h"
#endif
#include "conv_kernels.h"
