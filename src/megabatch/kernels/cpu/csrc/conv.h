/* Declarations shared by the convolution kernels for CPUs.
 *
 * Images are (N, H, W, C), that is channels_last; so are weights, (K, R, S, C) for K outputs, R x S taps and C inputs.
 * Values are bfloat16 or float32. Channels come in multiples of VECTOR, except in conv_few.h.
 *
 * A register has VECTOR float32 sums, its "lanes". Operands are words of 32 bits: PER_WORD values each, that is two
 * adjacent bfloat16 values or one float32 value. They are packed as words: (..., PER_WORD) in the layouts below. The
 * order of every sum depends on the shapes and on VECTOR, not on the number of threads.
 *
 * conv_kernels.h has all kernels. It is compiled once for each of conv_bf16.c, conv_avx512.c and conv_avx2.c, which
 * define the type of values, the registers and the arithmetic. */
#ifndef MEGABATCH_CPU_CONV_H
#define MEGABATCH_CPU_CONV_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define PUBLIC __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 10)
#define HAS_VECTORS 1
#include <immintrin.h>
#endif

typedef int32_t __attribute__((may_alias, aligned(2))) Word; /* at any address of a value */

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Memory for `words` words of 32 bits, at a multiple of 64 bytes as aligned_alloc wants sizes to be; or NULL. */
static inline void *allocate(int64_t words) { return aligned_alloc(64, ceil_div(words, 16) * 64); }

/* Index of the calling thread. */
static inline int64_t conv_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
#endif
