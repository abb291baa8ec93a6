/* Inner loops of outputs and data gradients on a CPU.
 *
 *     to[image, lane] = sum over terms and channels of from[image, term's pixel, channel] weights[term, channel, lane]
 *
 * A tile is one pixel of `images` images times `vectors` registers of lanes. Its sums stay in registers from the first
 * term to the last and are rounded once. */

/* One term of an output pixel's sum, a tap: its weights (words of channels, lanes, PER_WORD), and the offset within an
 * image of the pixel that it multiplies. */
typedef struct {
    const Value *weights;
    int64_t offset;
} Term;

/* Number of registers across the lanes of a tile: 2, or 1 where the lanes are an odd multiple of VECTOR. */
static inline int64_t vectors_of(int64_t lanes) { return lanes % (2 * VECTOR) ? 1 : 2; }

/* Most images of a tile whose images are `from_image` values apart. All sums stay in registers. At multiples of 4 KiB,
 * one pixel of every image has its place in the same 8 or 12 lines of a first-level cache. */
static inline int64_t most_images(int64_t vectors, int64_t from_image) {
    int64_t images = vectors == 1 ? NARROW_TILE : WIDE_TILE;
    return from_image * sizeof(Value) % 4096 ? images : min_of(images, ALIASED_TILE);
}

/* `vectors`, `images` and `ahead` must be compile-time constants, so that the loops unroll and `sums` stays in
 * registers; TILE provides them. Weights are loaded for `ahead` words of channels at a time, so that the address of an
 * image is computed once for all of them. */
INLINE void add_terms(int vectors, int images, int ahead, const Term *terms, int64_t num_terms, const Value *from,
                      int64_t from_image, int64_t depth, Value *to, int64_t to_image) {
    Sums sums[32];
#pragma GCC unroll 32
    for (int at = 0; at < images * vectors; at++) sums[at] = (Sums){0};
    for (const Term *term = terms; term < terms + num_terms; term++) {
        const Value *weights = term->weights, *first = from + term->offset;
        for (int64_t left = depth; left > 0; left -= PER_WORD * ahead) {
            Words lanes[8];
#pragma GCC unroll 8
            for (int at = 0; at < vectors * ahead; at++) lanes[at] = loaded(weights + PER_WORD * VECTOR * at);
            const Value *image = first;
#pragma GCC unroll 32
            for (int row = 0; row < images; row++) {
#pragma GCC unroll 4
                for (int next = 0; next < ahead; next++) {
                    Words word = repeated(image + PER_WORD * next);
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; v++)
                        sums[row * vectors + v] =
                            add_products(sums[row * vectors + v], lanes[next * vectors + v], word);
                }
                image += from_image;
                __asm__("" : "+r"(image)); /* hides the value: else GCC precomputes all addresses, which spill */
            }
            weights += PER_WORD * VECTOR * vectors * ahead;
            first += PER_WORD * ahead;
        }
    }
#pragma GCC unroll 32
    for (int row = 0; row < images; row++, to += to_image)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            store_sums(to + VECTOR * v, sums[row * vectors + v]);
}

/* A switch over all sizes of a tile: `narrow` and `wide` are `ahead` for 1 and 2 registers of lanes. */
#define TILE(vectors, images, ahead)                                                                       \
    case 100 * vectors + images:                                                                           \
        if (images <= (vectors == 1 ? NARROW_TILE : WIDE_TILE))                                            \
            add_terms(vectors, images, ahead, terms, num_terms, from, from_image, depth, to, to_image);    \
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
    int64_t vectors, int64_t images, const Term *terms, int64_t num_terms, const Value *from, int64_t from_image, \
        int64_t depth, Value *to, int64_t to_image

TARGET static void add_tile_ahead(ARGUMENTS) {
    switch (100 * vectors + images) { EACH_TILE(NARROW_AHEAD, WIDE_AHEAD) }
}

TARGET static void add_tile_word_by_word(ARGUMENTS) {
    switch (100 * vectors + images) { EACH_TILE(1, 1) }
}

/* Writes one output pixel of `images` images, for `vectors` registers of lanes, as the sum over all terms. Consecutive
 * images are `from_image` and `to_image` values apart; `depth` channels are summed per term. Depths that are not a
 * multiple of 8 channels, which `ahead` = 4 words needs, go word by word. */
static void add_tile(ARGUMENTS) {
    (depth % 8 ? add_tile_word_by_word : add_tile_ahead)(vectors, images, terms, num_terms, from, from_image, depth, to,
                                                         to_image);
}
