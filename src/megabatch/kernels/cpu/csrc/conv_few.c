/* Convolutions of images with few channels on a CPU, as the first of a net: their taps in a row are summed together.
 *
 * With the channels last, what the taps of one row meet follows each other in memory, wherever the pixel is, if the row
 * has zeros of padding at its ends; so rows are copied. A row of taps then is one tap with taps_across x inputs
 * channels. */
#include "conv.h"

#ifdef HAS_DOT_PRODUCTS

#include <stdlib.h>
#include <string.h>

enum { STRIP = 64, COPY_VALUES = 1 << 17, PIXELS_IN_BLOCK = 512, TASKS = 16 };

static int64_t window_of(const Conv *conv) { return conv->taps_across * conv->inputs; }

/* A row with its padding, and zeros for the last pair of the last window to read. */
static int64_t row_size(const Conv *conv) { return up((conv->width + 2 * conv->padding) * conv->inputs + 1, 32) * 32; }

/* Rows of images that rows of output from `first` to `end` meet. */
typedef struct {
    int64_t first, end;
} Rows;

static Rows rows_met(const Conv *conv, int64_t first, int64_t end) {
    int64_t last = most(0, least(conv->height, (end - 1) * conv->stride - conv->padding + conv->taps_down));
    return (Rows){least(last, most(0, first * conv->stride - conv->padding)), last};
}

/* ---- forward ---- */

/* All weights as (blocks of lanes, rows of taps, pairs of the window, lanes, 2), with zeros behind an odd window. */
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

/* Some rows of an image between zeros. */
static void copy_rows(const Conv *conv, int64_t image, Rows rows, uint16_t *copy) {
    int64_t length = conv->width * conv->inputs, size = row_size(conv), left = conv->padding * conv->inputs;
    for (int64_t row = rows.first; row < rows.end; row++, copy += size) {
        memset(copy, 0, size * sizeof *copy);
        memcpy(copy + left, conv->images + (image * conv->height + row) * length, length * sizeof *copy);
    }
}

/* Rows of output of some images, from a copy of the rows that they meet. */
typedef struct {
    int64_t image_first, image_end, row_first, row_end;
} Piece;

static void fill_piece(const Conv *conv, const Piece *piece, const uint16_t *packed, uint16_t *copy) {
    int64_t vectors = vectors_of(conv->outputs), lanes = vectors * VECTOR, window = up(window_of(conv), 2) * 2;
    int64_t size = row_size(conv), images = piece->image_end - piece->image_first;
    Rows rows = rows_met(conv, piece->row_first, piece->row_end);
    int64_t copy_image = (rows.end - rows.first) * size, to_row = conv->out_width * conv->outputs;
    Term terms[conv->taps_down];
    for (int64_t image = 0; image < images; image++)
        copy_rows(conv, piece->image_first + image, rows, copy + image * copy_image);
    for (int64_t row = piece->row_first; row < piece->row_end; row++)
        for (int64_t at = 0; at < to_row / lanes; at++) {
            int64_t block = at / conv->out_width, column = at % conv->out_width, found = 0;
            for (int64_t down = 0; down < conv->taps_down; down++) {
                int64_t y = row * conv->stride + down - conv->padding;
                if (y < 0 || y >= conv->height) continue;
                terms[found++] = (Term){packed + (block * conv->taps_down + down) * window * lanes,
                                        (y - rows.first) * size + column * conv->stride * conv->inputs};
            }
            int64_t place = (piece->image_first * conv->out_height + row) * to_row + column * conv->outputs;
            conv_add_tile(vectors, images, terms, found, copy, copy_image, window,
                          conv->result + place + block * lanes, conv->out_height * to_row);
        }
}

int conv_few_forward(const Conv *conv) {
    int64_t vectors = vectors_of(conv->outputs), images = most_images(vectors), tiles = up(conv->count, images);
    int64_t met = COPY_VALUES / (images * row_size(conv)); /* rows of x at a time */
    int64_t rows = least(conv->out_height, most(0, met - conv->taps_down) / conv->stride + 1);
    int64_t cuts = up(conv->out_height, rows);
    int64_t weights = up(conv->outputs * conv->taps_down * up(window_of(conv), 2) * 2, 32) * 32;
    int64_t own = images * ((rows - 1) * conv->stride + conv->taps_down) * row_size(conv);
    uint16_t *packed = aligned_alloc(64, (weights + conv->threads * own) * sizeof *packed);
    if (!packed) return 1;
    pack_weight(conv, vectors * VECTOR, packed);
#pragma omp parallel num_threads((int)conv->threads)
    {
        uint16_t *copy = packed + weights + conv_thread() * own;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tiles * cuts; task++) {
            int64_t tile = task / cuts, row = task % cuts * rows;
            Piece piece = {conv->count * tile / tiles, conv->count * (tile + 1) / tiles, row,
                           least(conv->out_height, row + rows)};
            fill_piece(conv, &piece, packed, copy);
        }
    }
    free(packed);
    return 0;
}

/* ---- weight gradient: lanes are channels of dy, rows of the tile are what a row of taps meets ---- */

/* Some rows of a pair of images, (row, value, 2), between zeros; the second image may be missing. */
TARGET static void pack_pair(const Conv *conv, int64_t pair, Rows rows, uint16_t *packed) {
    int64_t length = conv->width * conv->inputs, size = 2 * row_size(conv), whole = length / VECTOR * VECTOR;
    int64_t has_odd = 2 * pair + 1 < conv->count;
    for (int64_t row = rows.first; row < rows.end; row++, packed += size) {
        const uint16_t *even = conv->images + (2 * pair * conv->height + row) * length;
        const uint16_t *odd = even + conv->height * length;
        uint16_t *to = packed + 2 * conv->padding * conv->inputs;
        memset(packed, 0, size * sizeof *packed);
        if (has_odd) interleave(even, odd, whole, to);
        for (int64_t at = has_odd ? whole : 0; at < length; at++) {
            to[2 * at] = even[at];
            if (has_odd) to[2 * at + 1] = odd[at];
        }
    }
}

/* Some channels of rows of dy of a pair of images: (row, pixel, channel, 2). */
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

/* A strip of dy's channels, and a part of the pairs of images. */
typedef struct {
    int64_t channel, channels, pair_first, pair_end, rows; /* rows of dy that are packed at a time */
    float *tile;                                           /* (rows of taps, window, channels) */
    uint16_t *x, *dy;
} Share;

static void add_rows(const Conv *conv, const Share *share, int64_t pair, int64_t first, int64_t end) {
    Rows met = rows_met(conv, first, end);
    Run runs[end - first];
    pack_pair(conv, pair, met, share->x);
    pack_gradient(conv, pair, first, end, share->channel, share->channels, share->dy);
    for (int64_t down = 0; down < conv->taps_down; down++) {
        int64_t found = 0;
        for (int64_t row = first; row < end; row++) {
            int64_t y = row * conv->stride + down - conv->padding;
            if (y < 0 || y >= conv->height) continue;
            runs[found++] = (Run){share->dy + (row - first) * conv->out_width * share->channels * 2,
                                  share->x + (y - met.first) * row_size(conv) * 2, conv->out_width};
        }
        conv_add_panels(share->channels, window_of(conv), runs, found, 2 * share->channels,
                        2 * conv->stride * conv->inputs, share->tile + down * window_of(conv) * share->channels);
    }
}

/* Sums over the share, put where they belong in (outputs, taps and inputs). */
static void add_share(const Conv *conv, const Share *share, float *sums) {
    int64_t values = conv->taps_down * window_of(conv);
    memset(share->tile, 0, values * share->channels * sizeof(float));
    for (int64_t pair = share->pair_first; pair < share->pair_end; pair++)
        for (int64_t row = 0; row < conv->out_height; row += share->rows)
            add_rows(conv, share, pair, row, least(conv->out_height, row + share->rows));
    for (int64_t channel = 0; channel < share->channels; channel++)
        for (int64_t at = 0; at < values; at++)
            sums[(share->channel + channel) * values + at] = share->tile[at * share->channels + channel];
}

int conv_few_weight_gradient(const Conv *conv) {
    int64_t strips = up(conv->outputs, STRIP), pairs = up(conv->count, 2);
    int64_t parts = most(1, least(pairs, TASKS / strips));
    int64_t rows = least(conv->out_height, most(1, PIXELS_IN_BLOCK / conv->out_width));
    int64_t values = conv->taps_down * window_of(conv), size = conv->outputs * values;
    int64_t x_size = ((rows - 1) * conv->stride + conv->taps_down) * row_size(conv);
    int64_t dy_size = rows * conv->out_width * STRIP, own = values * STRIP + x_size + dy_size;
    float *sums = aligned_alloc(64, (parts * size + conv->threads * own) * sizeof *sums);
    if (!sums) return 1;
#pragma omp parallel num_threads((int)conv->threads)
    {
        float *memory = sums + parts * size + conv_thread() * own;
        uint16_t *dy = (uint16_t *)(memory + values * STRIP);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * parts; task++) {
            int64_t part = task % parts, channel = task / parts * STRIP;
            Share share = {channel, least(STRIP, conv->outputs - channel), pairs * part / parts,
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
