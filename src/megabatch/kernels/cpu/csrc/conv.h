/* Declarations shared by the convolution kernels for CPUs.
 *
 * Images are bfloat16 (N, H, W, C), that is channels_last; so are weights, (K, R, S, C) for K outputs, R x S taps and C
 * inputs. Channels come in multiples of 16, except in conv_few.c.
 *
 * All arithmetic uses the AVX-512 BF16 instruction VDPBF16PS: each of 16 float32 sums s becomes s + a0 b0 + a1 b1,
 * where (a0, a1) and (b0, b1) are pairs of adjacent bfloat16 values. Operands are therefore packed as pairs: (..., 2)
 * in the layouts below. A "lane" is one of the 16 sums of a register. The order of every sum depends on the shapes
 * alone, not on the number of threads. */
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

typedef int32_t __attribute__((may_alias, aligned(2))) Pair; /* two adjacent bfloat16 values, at any address */

/* Arguments of a call; `_ARGUMENTS` in megabatch/kernels/cpu/conv.py packs the same fields in the same order. */
typedef struct {
    int64_t count, height, width, inputs, outputs, taps_down, taps_across, out_height, out_width, stride, padding;
    int64_t threads;
    const uint16_t *images, *weight, *gradient; /* x (count, height, width, inputs), weight, dy (count, ..., outputs) */
    uint16_t *result;                           /* y, dx or dweight */
} Conv;

enum { VECTOR = 16 }; /* float32 sums in a register */

/* Number of registers across the lanes of a tile: 2, or 1 where the lanes are an odd multiple of 16. */
static inline int64_t vectors_of(int64_t lanes) { return lanes % (2 * VECTOR) ? 1 : 2; }

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef HAS_DOT_PRODUCTS
/* Adds to each of 16 sums the two products of its own pair in `pairs` with the one pair that `pair` repeats. */
INLINE __m512 add_products(__m512 sums, __m512i pairs, __m512i pair) {
    return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)pair);
}

/* Packs two rows into pairs (even[i], odd[i]); `length` is a multiple of 16. */
INLINE void interleave(const uint16_t *even, const uint16_t *odd, int64_t length, uint16_t *pairs) {
    /* Indices into the 64 values of both registers: 0 to 31 select from `first`, 32 to 63 from `second`. `low` pairs up
     * values 0 to 15 of each row, `high` values 16 to 31. */
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

/* One term of an output pixel's sum, a tap: its weights (pairs of channels, lanes, 2), and the offset within an image
 * of the pixel that it multiplies. */
typedef struct {
    const uint16_t *weights;
    int64_t offset;
} Term;

/* In conv_tiles.c: writes one output pixel of `images` images, for `vectors` registers of lanes, as the sum over all
 * terms. Consecutive images are `from_image` and `to_image` values apart; `depth` channels are summed per term. All
 * sums stay in the 32 registers, which limits the number of images. */
static inline int64_t most_images(int64_t vectors) { return vectors == 1 ? 24 : 13; }
void conv_add_tile(int64_t vectors, int64_t images, const Term *terms, int64_t num_terms, const uint16_t *from,
                   int64_t from_image, int64_t depth, uint16_t *to, int64_t to_image);

/* `length` pixels that are adjacent in two packed matrices, whose products are summed over them: `lanes` has the
 * channels that fill registers, `rows` the channels of which one at a time is broadcast to all lanes. */
typedef struct {
    const uint16_t *lanes, *rows;
    int64_t length;
} Run;

/* In conv_panels.c: tile[row, lane] += sum over the pixels of all runs of rows[pixel, row] lanes[pixel, lane]. */
void conv_add_panels(int64_t lanes, int64_t rows, const Run *runs, int64_t num_runs, int64_t lanes_step,
                     int64_t rows_step, float *tile);
/* result[0:16] = the sum of `parts` vectors that are `size` values apart, rounded to bfloat16. */
void conv_add_parts(const float *sums, int64_t parts, int64_t size, uint16_t *result);
/* Index of the calling thread. */
int64_t conv_thread(void);

/* In conv_few.c: the same operations for images with fewer than 16 channels. */
int conv_few_forward(const Conv *conv);
int conv_few_weight_gradient(const Conv *conv);
#endif
#endif
