/* Convolutions of float32 images, for processors with AVX-512. */
#include "conv.h"

#define NAMED(part) megabatch_conv_avx512_##part
#ifdef HAS_VECTORS
#define TARGET __attribute__((target("avx512f")))
#define RUNS_HERE (__builtin_cpu_supports("avx512f") != 0)
#define FMA _mm512_fmadd_ps

enum { VECTOR = 16, NARROW_TILE = 24, WIDE_TILE = 13, ALIASED_TILE = 10, NARROW_AHEAD = 4, WIDE_AHEAD = 2 };
enum { PANEL = 24, PANEL_VECTORS = 4 };
#include "conv_float32.h"
#endif
#include "conv_kernels.h"
