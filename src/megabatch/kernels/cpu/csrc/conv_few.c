/* Convolutions of images with fewer than 16 channels on a CPU, such as the first of a network.
 *
 * In channels_last, the pixels under one row of taps are adjacent in memory: a "window" of taps_across x inputs values.
 * So a row of taps is treated as a single tap with that many channels. Rows are first copied with zeros of padding at
 * both ends, so that windows at the border need no special case. */
#include "conv.h"

#ifdef HAS_DOT_PRODUCTS

#include <stdlib.h>
#include <string.h>

/* Channels of dy per tile; values of one thread's copy of x in forward, and pixels of dy packed at a time in the weight
 * gradient, which both bound cache use; tasks of the weight gradient, independent of the number of threads. */
enum { STRIP = 64, COPY_VALUES = 1 << 17, PIXELS_IN_BLOCK = 512, TASKS = 16 };

/* Values under one row of taps. */

static int64_t window_of(const Conv *conv) { return conv->taps_across * conv->inputs; }

/* Values of a copied row: with padding, and at least one more for the last pair of an odd window; a multiple of 32. */
static int64_t row_size(const Conv *conv) {
    return ceil_div((conv->width + 2 * conv->padding) * conv->inputs + 1, 32) * 32;
}

/* Rows of the images, from `first` up to `end`. */
typedef struct {
    int64_t first, end;
} Rows;

/* Rows of x that the output rows from `first` up to `end` read, without padding. */
static Rows rows_read(const Conv *conv, int64_t first, int64_t end) {
    int64_t last = max_of(0, min_of(conv->height, (end - 1) * conv->stride - conv->padding + conv->taps_down));
    return (Rows){min_of(last, max_of(0, first * conv->stride - conv->padding)), last};
}

/* ---- forward ---- */

/* Packs all weights as (blocks of lanes, rows of taps, pairs of the window, lanes, 2); an odd window ends with a 0. */
static void pack_weight(const Conv *conv, int64_t lanes, uint16_t *packed) {
    int64_t window = window_of(conv), outputs = conv->taps_down * window;
    for (int64_t block = 0; block < conv->outputs; block += lanes)
        for (int64_t down = 0; down < conv->taps_down; down++)
            for (int64_t at = 0; at < window; at += 2)
                for (int64_t lane = 0; lane < lanes; lane++, packed += 2) {
                    const uint16_t *from = conv->weight + (block + lane) * outputs + down * window + at;
                    packed[0] = from[0];
                    packed[1] = at + 1 < window ? from[1] : 0;
                }
}

/* Copies rows of an image, each between zeros of padding. */
static void copy_rows(const Conv *conv, int64_t image, Rows rows, uint16_t *copy) {
    int64_t length = conv->width * conv->inputs, size = row_size(conv), left = conv->padding * conv->inputs;
    for (int64_t row = rows.first; row < rows.end; row++, copy += size) {
        memset(copy, 0, size * sizeof *copy);
        memcpy(copy + left, conv->images + (image * conv->height + row) * length, length * sizeof *copy);
    }
}

/* A task: output rows of some images, computed from a copy of the rows of x that they read. */
typedef struct {
    int64_t image_first, image_end, row_first, row_end;
} Piece;

static void fill_piece(const Conv *conv, const Piece *piece, const uint16_t *packed, uint16_t *copy) {
    int64_t vectors = vectors_of(conv->outputs), lanes = vectors * VECTOR, window = ceil_div(window_of(conv), 2) * 2;
    int64_t size = row_size(conv), images = piece->image_end - piece->image_first;
    Rows rows = rows_read(conv, piece->row_first, piece->row_end);
    int64_t copy_image = (rows.end - rows.first) * size, to_row = conv->out_width * conv->outputs;
    Term terms[conv->taps_down]; /* one per row of taps */
    for (int64_t image = 0; image < images; image++)
        copy_rows(conv, piece->image_first + image, rows, copy + image * copy_image);
    for (int64_t row = piece->row_first; row < piece->row_end; row++)
        for (int64_t at = 0; at < to_row / lanes; at++) {
            int64_t block = at / conv->out_width, column = at % conv->out_width, found = 0;
            for (int64_t down = 0; down < conv->taps_down; down++) {
                int64_t y = row * conv->stride + down - conv->padding;
                if (y < 0 || y >= conv->height) continue; /* padding above or below */
                terms[found++] = (Term){packed + (block * conv->taps_down + down) * window * lanes,
                                        (y - rows.first) * size + column * conv->stride * conv->inputs};
            }
            int64_t place = (piece->image_first * conv->out_height + row) * to_row + column * conv->outputs;
            conv_add_tile(vectors, images, terms, found, copy, copy_image, window,
                          conv->result + place + block * lanes, conv->out_height * to_row);
        }
}

int conv_few_forward(const Conv *conv) {
    int64_t vectors = vectors_of(conv->outputs), images = most_images(vectors), tiles = ceil_div(conv->count, images);
    /* As many output rows per task as keep its copy of x within COPY_VALUES, but at least one. */
    int64_t copied = COPY_VALUES / (images * row_size(conv));
    int64_t rows = min_of(conv->out_height, max_of(0, copied - conv->taps_down) / conv->stride + 1);
    int64_t cuts = ceil_div(conv->out_height, rows);
    int64_t weights = ceil_div(conv->outputs * conv->taps_down * ceil_div(window_of(conv), 2) * 2, 32) * 32;
    /* One allocation: the packed weights, then each thread's copy. */
    int64_t per_thread = images * ((rows - 1) * conv->stride + conv->taps_down) * row_size(conv);
    uint16_t *packed = aligned_alloc(64, (weights + conv->threads * per_thread) * sizeof *packed);
    if (!packed) return 1;
    pack_weight(conv, vectors * VECTOR, packed);
#pragma omp parallel num_threads((int)conv->threads)
    {
        uint16_t *copy = packed + weights + conv_thread() * per_thread;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tiles * cuts; task++) {
            int64_t tile = task / cuts, row = task % cuts * rows;
            Piece piece = {conv->count * tile / tiles, conv->count * (tile + 1) / tiles, row,
                           min_of(conv->out_height, row + rows)};
            fill_piece(conv, &piece, packed, copy);
        }
    }
    free(packed);
    return 0;
}

/* ---- weight gradient: the lanes of a tile are channels of dy, its rows are the values of a window ---- */

/* Packs rows of a pair of images as (row, value, 2), between zeros. An odd last image is paired with zeros. */
TARGET static void pack_pair(const Conv *conv, int64_t pair, Rows rows, uint16_t *packed) {
    int64_t length = conv->width * conv->inputs, size = 2 * row_size(conv), whole = length / VECTOR * VECTOR;
    int64_t has_odd = 2 * pair + 1 < conv->count;
    for (int64_t row = rows.first; row < rows.end; row++, packed += size) {
        const uint16_t *even = conv->images + (2 * pair * conv->height + row) * length;
        const uint16_t *odd = even + conv->height * length;
        uint16_t *to = packed + 2 * conv->padding * conv->inputs;
        memset(packed, 0, size * sizeof *packed);
        /* interleave takes multiples of 16; the loop packs the rest, or everything if there is no second image. */
        if (has_odd) interleave(even, odd, whole, to);
        for (int64_t at = has_odd ? whole : 0; at < length; at++) {
            to[2 * at] = even[at];
            if (has_odd) to[2 * at + 1] = odd[at];
        }
    }
}

/* Packs `channels` channels of rows of dy of a pair of images as (row, pixel, channel, 2). */
TARGET static void pack_gradient(const Conv *conv, int64_t pair, int64_t first, int64_t end, int64_t channel,
                                 int64_t channels, uint16_t *packed) {
    static const uint16_t zeros[STRIP];
    int64_t image = conv->out_height * conv->out_width * conv->outputs, has_odd = 2 * pair + 1 < conv->count;
    const uint16_t *even = conv->gradient + 2 * pair * image + first * conv->out_width * conv->outputs + channel;
    for (int64_t left = (end - first) * conv->out_width; left > 0; left--, even += conv->outputs) {
        interleave(even, has_odd ? even + image : zeros, channels, packed);
        packed += 2 * channels;
    }
}

/* A task: a strip of dy's channels, summed over a part of the pairs of images; and its thread's memory. */
typedef struct {
    int64_t channel, channels, pair_first, pair_end, rows; /* rows of dy that are packed at a time */
    float *tile;                                           /* (rows of taps, window, channels) */
    uint16_t *x, *dy;
} Share;

/* Adds the products of dy's rows from `first` up to `end`, of one pair of images, to the tile. */
static void add_rows(const Conv *conv, const Share *share, int64_t pair, int64_t first, int64_t end) {
    Rows x_rows = rows_read(conv, first, end);
    Run runs[end - first];
    pack_pair(conv, pair, x_rows, share->x);
    pack_gradient(conv, pair, first, end, share->channel, share->channels, share->dy);
    for (int64_t down = 0; down < conv->taps_down; down++) {
        int64_t found = 0;
        for (int64_t row = first; row < end; row++) {
            int64_t y = row * conv->stride + down - conv->padding;
            if (y < 0 || y >= conv->height) continue; /* this row of taps falls on padding */
            /* Consecutive pixels of dy meet windows that are `stride` pixels apart and may overlap. */
            runs[found++] = (Run){share->dy + (row - first) * conv->out_width * share->channels * 2,
                                  share->x + (y - x_rows.first) * row_size(conv) * 2, conv->out_width};
        }
        conv_add_panels(share->channels, window_of(conv), runs, found, 2 * share->channels,
                        2 * conv->stride * conv->inputs, share->tile + down * window_of(conv) * share->channels);
    }
}

/* Computes a task's sums and writes them, transposed, into `sums` (outputs, taps and inputs). */
static void add_share(const Conv *conv, const Share *share, float *sums) {
    int64_t values = conv->taps_down * window_of(conv);
    memset(share->tile, 0, values * share->channels * sizeof(float));
    for (int64_t pair = share->pair_first; pair < share->pair_end; pair++)
        for (int64_t row = 0; row < conv->out_height; row += share->rows)
            add_rows(conv, share, pair, row, min_of(conv->out_height, row + share->rows));
    for (int64_t channel = 0; channel < share->channels; channel++)
        for (int64_t at = 0; at < values; at++)
            sums[(share->channel + channel) * values + at] = share->tile[at * share->channels + channel];
}

int conv_few_weight_gradient(const Conv *conv) {
    int64_t strips = ceil_div(conv->outputs, STRIP), pairs = ceil_div(conv->count, 2);
    /* Parts of the images are summed separately and added at the end. Their number depends on the shapes alone. */
    int64_t parts = max_of(1, min_of(pairs, TASKS / strips));
    int64_t rows = min_of(conv->out_height, max_of(1, PIXELS_IN_BLOCK / conv->out_width));
    int64_t values = conv->taps_down * window_of(conv), size = conv->outputs * values;
    int64_t x_size = ((rows - 1) * conv->stride + conv->taps_down) * row_size(conv);
    int64_t dy_size = rows * conv->out_width * STRIP, per_thread = values * STRIP + x_size + dy_size;
    float *sums = aligned_alloc(64, (parts * size + conv->threads * per_thread) * sizeof *sums);
    if (!sums) return 1;
#pragma omp parallel num_threads((int)conv->threads)
    {
        float *memory = sums + parts * size + conv_thread() * per_thread;
        uint16_t *dy = (uint16_t *)(memory + values * STRIP);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * parts; task++) {
            int64_t part = task % parts, channel = task / parts * STRIP;
            Share share = {channel, min_of(STRIP, conv->outputs - channel), pairs * part / parts,
                           pairs * (part + 1) / parts, rows, memory, dy + 2 * dy_size, dy};
            add_share(conv, &share, sums + part * size);
        }
#pragma omp for
        for (int64_t at = 0; at < size; at += VECTOR) conv_add_parts(sums + at, parts, size, conv->result + at);
    }
    free(sums);
    return 0;
}
#endif
