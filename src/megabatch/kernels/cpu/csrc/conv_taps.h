/* Output and data gradient of a convolution on a CPU.
 *
 *     y[n, p, k]  = sum over c, tap of weight[k, tap, c] x[n, p stride + tap - padding, c]
 *     dx[n, p, c] = sum over k, tap of weight[k, tap, c] dy[n, (p + padding - tap) / stride, k]
 *
 * Taps that fall on padding are left out of the sum: at 4 x 4 pixels that saves a third of the arithmetic. A tile is
 * the same pixel of several images, which therefore all use the same taps, times one or two registers of channels; its
 * sums stay in registers from the first tap to the last. */

/* More tasks than threads, so that a thread that finishes early takes over work. */
enum { TASKS_PER_THREAD = 16 };

/* Both operations in the same terms: `to` has `lanes` channels, each a sum over taps and over the `depth` channels of
 * `from`. The lanes are divided into `blocks` of `vectors` registers. */
typedef struct {
    int64_t is_gradient, depth, lanes, vectors, blocks;
    int64_t from_height, from_width, to_height, to_width;
    const Value *from;
    Value *to;
} Product;

static Product product_of(const Conv *conv, int is_gradient) {
    Product product = {.is_gradient = is_gradient, .to = conv->result};
    if (is_gradient) {
        product.from = conv->gradient, product.depth = conv->outputs, product.lanes = conv->inputs;
        product.from_height = conv->out_height, product.from_width = conv->out_width;
        product.to_height = conv->height, product.to_width = conv->width;
    } else {
        product.from = conv->images, product.depth = conv->inputs, product.lanes = conv->outputs;
        product.from_height = conv->height, product.from_width = conv->width;
        product.to_height = conv->out_height, product.to_width = conv->out_width;
    }
    product.vectors = vectors_of(product.lanes);
    product.blocks = product.lanes / VECTOR / product.vectors;
    return product;
}

/* Packs the weights of one block of lanes as (taps, words of depth, lanes, PER_WORD). */
TARGET static void pack_block(const Conv *conv, const Product *product, int64_t block, Value *packed) {
    int64_t taps = conv->taps_down * conv->taps_across, row = taps * conv->inputs, lanes = VECTOR * product->vectors;
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t at = 0; at < product->depth; at += PER_WORD, packed += PER_WORD * lanes) {
            const Value *from = conv->weight + tap * conv->inputs;
            /* Data gradient: lanes are inputs, adjacent in memory; a word of two is outputs one `row` apart. */
            if (product->is_gradient) {
                from += at * row + block * lanes;
                interleave(from, from + row, lanes, packed);
                continue;
            }
            /* Output: words are adjacent inputs, of outputs that are one `row` apart each. */
            for (int64_t lane = 0; lane < lanes; lane++)
                *(Word *)(packed + PER_WORD * lane) = *(const Word *)(from + (block * lanes + lane) * row + at);
        }
}

/* Index along one axis of `from` that the tap multiplies for index `at` of `to`; -1 if it falls on padding or, in a
 * data gradient, between two strides. */
static int64_t source_index(const Conv *conv, const Product *product, int64_t at, int64_t tap, int64_t size) {
    int64_t place = product->is_gradient ? at + conv->padding - tap : at * conv->stride + tap - conv->padding;
    if (product->is_gradient) {
        if (place < 0 || place % conv->stride) return -1;
        place /= conv->stride;
    }
    return place < size ? place : -1;
}

/* Lists the taps that contribute to one pixel of `to`; returns how many there are. */
static int64_t find_terms(const Conv *conv, const Product *product, int64_t row, int64_t column,
                          const Value *weights, Term *terms) {
    int64_t found = 0, tap_size = product->depth * VECTOR * product->vectors;
    for (int64_t down = 0; down < conv->taps_down; down++) {
        int64_t y = source_index(conv, product, row, down, product->from_height);
        for (int64_t across = 0; y >= 0 && across < conv->taps_across; across++) {
            int64_t x = source_index(conv, product, column, across, product->from_width);
            const Value *of_tap = weights + (down * conv->taps_across + across) * tap_size;
            if (x >= 0) terms[found++] = (Term){of_tap, (y * product->from_width + x) * product->depth};
        }
    }
    return found;
}

/* Computes one row of pixels of `to`, all channels, for the images from `first` up to `end`. */
static void fill_row(const Conv *conv, const Product *product, const Value *packed, int64_t row, int64_t first,
                     int64_t end) {
    int64_t taps = conv->taps_down * conv->taps_across, lanes = VECTOR * product->vectors;
    int64_t from_image = product->from_height * product->from_width * product->depth;
    int64_t to_image = product->to_height * product->to_width * product->lanes;
    Term terms[taps];
    /* Blocks outermost: one block's packed weights stay in the cache for the whole row. */
    for (int64_t block = 0; block < product->blocks; block++)
        for (int64_t column = 0; column < product->to_width; column++) {
            const Value *weights = packed + block * taps * product->depth * lanes;
            int64_t num_terms = find_terms(conv, product, row, column, weights, terms);
            int64_t pixel = (row * product->to_width + column) * product->lanes + block * lanes;
            add_tile(product->vectors, end - first, terms, num_terms, product->from + first * from_image,
                          from_image, product->depth, product->to + first * to_image + pixel, to_image);
        }
}

/* Computes either operation. Returns 0, or 1 if memory cannot be allocated. */
static int run(const Conv *conv, int is_gradient) {
    Product product = product_of(conv, is_gradient);
    int64_t taps = conv->taps_down * conv->taps_across, block_size = taps * product.depth * VECTOR * product.vectors;
    /* A task is a group of images, as many as fit into registers, times a range of rows. */
    int64_t from_image = product.from_height * product.from_width * product.depth;
    int64_t tiles = ceil_div(conv->count, most_images(product.vectors, from_image));
    int64_t cuts = min_of(product.to_height, ceil_div(TASKS_PER_THREAD * conv->threads, tiles));
    Value *packed = allocate(product.blocks * block_size / PER_WORD);
    if (!packed) return 1;
#pragma omp parallel num_threads((int)conv->threads)
    {
#pragma omp for
        for (int64_t block = 0; block < product.blocks; block++)
            pack_block(conv, &product, block, packed + block * block_size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tiles * cuts; task++) {
            int64_t tile = task / cuts, cut = task % cuts;
            for (int64_t row = product.to_height * cut / cuts; row < product.to_height * (cut + 1) / cuts; row++)
                fill_row(conv, &product, packed, row, conv->count * tile / tiles, conv->count * (tile + 1) / tiles);
        }
    }
    free(packed);
    return 0;
}
