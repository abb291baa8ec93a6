/* Inner loops of outputs and data gradients on a CPU.
 *
 *     to[image, lane] = sum over terms and channels of from[image, term's pixel, channel] weights[term, channel, lane]
 *
 * A tile is one pixel of `images` images times `vectors` registers of lanes. Its sums stay in registers from the first
 * term to the last and are rounded once. */
#include "conv.h"

#ifdef HAS_DOT_PRODUCTS

/* `vectors`, `images` and `ahead` must be compile-time constants, so that the loops unroll and `sums` stays in
 * registers; TILE provides them. Weights are loaded for `ahead` pairs of channels at a time, so that the address of an
 * image is computed once for all of them. */
INLINE void add_terms(int vectors, int images, int ahead, const Term *terms, int64_t num_terms, const uint16_t *from,
                      int64_t from_image, int64_t depth, uint16_t *to, int64_t to_image) {
    __m512 sums[32];
#pragma GCC unroll 32
    for (int at = 0; at < images * vectors; at++) sums[at] = _mm512_setzero_ps();
    for (const Term *term = terms; term < terms + num_terms; term++) {
        const uint16_t *weights = term->weights, *first = from + term->offset;
        for (int64_t left = depth; left > 0; left -= 2 * ahead) {
            __m512i pairs[8];
#pragma GCC unroll 8
            for (int at = 0; at < vectors * ahead; at++) pairs[at] = _mm512_loadu_si512(weights + 2 * VECTOR * at);
            const uint16_t *image = first;
#pragma GCC unroll 32
            for (int row = 0; row < images; row++) {
#pragma GCC unroll 4
                for (int next = 0; next < ahead; next++) {
                    /* Two adjacent channels of this image, broadcast to all lanes. */
                    __m512i pair = _mm512_set1_epi32(*(const Pair *)(image + 2 * next));
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; v++)
                        sums[row * vectors + v] =
                            add_products(sums[row * vectors + v], pairs[next * vectors + v], pair);
                }
                image += from_image;
                __asm__("" : "+r"(image)); /* hides the value: else GCC precomputes all addresses, which spill */
            }
            weights += 2 * VECTOR * vectors * ahead;
            first += 2 * ahead;
        }
    }
#pragma GCC unroll 32
    for (int row = 0; row < images; row++, to += to_image)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            _mm256_storeu_si256((void *)(to + VECTOR * v), (__m256i)_mm512_cvtneps_pbh(sums[row * vectors + v]));
}

/* A switch over all sizes of a tile: `narrow` and `wide` are `ahead` for 1 and 2 registers of lanes. */
#define TILE(vectors, images, ahead)                                                                       \
    case 100 * vectors + images:                                                                           \
        add_terms(vectors, images, ahead, terms, num_terms, from, from_image, depth, to, to_image);        \
        break;
#define EACH_TILE(narrow, wide)                                                                                    \
    TILE(1, 1, narrow) TILE(1, 2, narrow) TILE(1, 3, narrow) TILE(1, 4, narrow) TILE(1, 5, narrow)                 \
    TILE(1, 6, narrow) TILE(1, 7, narrow) TILE(1, 8, narrow) TILE(1, 9, narrow) TILE(1, 10, narrow)                \
    TILE(1, 11, narrow) TILE(1, 12, narrow) TILE(1, 13, narrow) TILE(1, 14, narrow) TILE(1, 15, narrow)            \
    TILE(1, 16, narrow) TILE(1, 17, narrow) TILE(1, 18, narrow) TILE(1, 19, narrow) TILE(1, 20, narrow)            \
    TILE(1, 21, narrow) TILE(1, 22, narrow) TILE(1, 23, narrow) TILE(1, 24, narrow) TILE(2, 1, wide)               \
    TILE(2, 2, wide) TILE(2, 3, wide) TILE(2, 4, wide) TILE(2, 5, wide) TILE(2, 6, wide) TILE(2, 7, wide)          \
    TILE(2, 8, wide) TILE(2, 9, wide) TILE(2, 10, wide) TILE(2, 11, wide) TILE(2, 12, wide) TILE(2, 13, wide)
#define ARGUMENTS                                                                                                \
    int64_t vectors, int64_t images, const Term *terms, int64_t num_terms, const uint16_t *from, int64_t from_image, \
        int64_t depth, uint16_t *to, int64_t to_image

TARGET static void add_tile(ARGUMENTS) {
    switch (100 * vectors + images) { EACH_TILE(4, 2) }
}

TARGET static void add_tile_pair_by_pair(ARGUMENTS) {
    switch (100 * vectors + images) { EACH_TILE(1, 1) }
}

/* See conv.h. Depths that are not a multiple of 8 channels, which `ahead` = 4 pairs needs, go pair by pair. */
void conv_add_tile(ARGUMENTS) {
    (depth % 8 ? add_tile_pair_by_pair : add_tile)(vectors, images, terms, num_terms, from, from_image, depth, to,
                                                   to_image);
}
#endif
