/* What the convolutions of a CPU share. Images are bfloat16 with the channels last; so are weights: (K, R, S, C).
 *
 * All arithmetic is the processor's dot product of bfloat16 pairs, which adds two products to each of 16 float32 sums,
 * and no sum depends on how many threads there are. Channels come in multiples of 16. */
#ifndef MEGABATCH_CPU_CONV_H
#define MEGABATCH_CPU_CONV_H

#include <stdint.h>

#define PUBLIC __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 10)
#define HAS_DOT_PRODUCTS 1
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#endif

typedef int32_t __attribute__((may_alias, aligned(2))) Pair; /* two bfloat16 values that follow each other */

/* What is asked for; `megabatch.kernels.cpu.conv` has the same list. */
typedef struct {
    int64_t count, height, width, inputs, outputs, taps_down, taps_across, out_height, out_width, stride, padding;
    int64_t threads;
    const uint16_t *images, *weight, *gradient; /* x (count, height, width, inputs), weight, dy (count, ..., outputs) */
    uint16_t *result;                           /* y, dx or dweight */
} Conv;

enum { VECTOR = 16 }; /* float32 sums in a register */

/* Registers of lanes in a tile. */
static inline int64_t vectors_of(int64_t lanes) { return lanes % (2 * VECTOR) ? 1 : 2; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef HAS_DOT_PRODUCTS
/* Each of 16 sums plus the two products of its pair with one pair that all have. */
INLINE __m512 add_products(__m512 sums, __m512i pairs, __m512i pair) {
    return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)pair);
}

/* Puts the values of two rows side by side, as pairs; rows are a multiple of 16 long. */
INLINE void interleave(const uint16_t *even, const uint16_t *odd, int64_t length, uint16_t *pairs) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; length >= 32; length -= 32, even += 32, odd += 32, pairs += 64) {
        __m512i first = _mm512_loadu_si512(even), second = _mm512_loadu_si512(odd);
        _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(first, high, second));
    }
    if (length) {
        __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)even));
        __m512i second = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)odd));
        _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(first, low, second));
    }
}

/* One tap at one pixel: its weights, (pairs of channels, lanes, 2), and where in an image it meets channels. */
typedef struct {
    const uint16_t *weights;
    int64_t offset;
} Term;

/* In conv_tiles.c: the sums over all terms for one pixel of some images, times `vectors` registers of lanes. */
static inline int64_t most_images(int64_t vectors) { return vectors == 1 ? 24 : 13; }
void conv_add_tile(int64_t vectors, int64_t images, const Term *terms, int64_t num_terms, const uint16_t *from,
                   int64_t from_image, int64_t depth, uint16_t *to, int64_t to_image);

/* Pixels that follow each other in both packed copies of images: lanes are channels beside each other in registers. */
typedef struct {
    const uint16_t *lanes, *rows;
    int64_t length;
} Run;

/* In conv_panels.c: tile[rows, lanes] += sums over runs; 16 values of the sum of parts; this thread's number. */
void conv_add_panels(int64_t lanes, int64_t rows, const Run *runs, int64_t num_runs, int64_t lanes_step,
                     int64_t rows_step, float *tile);
void conv_add_parts(const float *sums, int64_t parts, int64_t size, uint16_t *result);
int64_t conv_thread(void);

/* In conv_few.c: for images of few channels. */
int conv_few_forward(const Conv *conv);
int conv_few_weight_gradient(const Conv *conv);
#endif
#endif
