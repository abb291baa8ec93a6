/* A convolution's weight gradient on a CPU: dweight[k, tap, c] = sum over pixels of dy[pixel, k] x[pixel met, c].
 *
 * The dot product takes pairs, and a pair here is the same pixel of two images, so that every tap reads the same packed
 * copy of x, and none meets padding. A task is a tile of the gradient, all its taps, over a part of the images; how
 * both are cut depends on the shapes alone, and parts are added in one order. Within a task x and dy are packed a block
 * of pixels at a time, whose products are summed in registers and then added to the tile. */
#include "conv.h"

#ifdef HAS_DOT_PRODUCTS

#include <stdlib.h>
#include <string.h>

enum { STRIP = 64, WIDEST = 256, TILE_VALUES = 72 << 10, PAIRS_IN_BLOCK = 512, TASKS = 16 };

/* How images are cut: `group` pairs of images, `rows` rows of dy, are packed at a time; and how channels are. */
typedef struct {
    int64_t pairs, group, rows, parts, widest_in, widest_out, tiles_in, tiles_out;
    int64_t half_width;                 /* of a row of x, packed as `stride` runs of every stride-th pixel */
    int64_t tile_size, x_size, dy_size; /* of a thread's own memory: floats, then pairs of bfloat16 */
} Cut;

/* The fewer taps, the fewer products there are for a packed value, and the more channels a tile has. */
static int64_t widest(int64_t values) { return most(STRIP, least(WIDEST, values / STRIP * STRIP)); }

static Cut cut_of(const Conv *conv) {
    int64_t taps = conv->taps_down * conv->taps_across;
    Cut cut = {.pairs = up(conv->count, 2), .half_width = up(conv->width, conv->stride)};
    cut.group = least(cut.pairs, most(1, PAIRS_IN_BLOCK / (conv->out_height * conv->out_width)));
    cut.rows = least(conv->out_height, most(1, PAIRS_IN_BLOCK / (conv->out_width * cut.group)));
    cut.widest_out = least(conv->outputs, widest(TILE_VALUES / taps / STRIP));
    cut.widest_in = least(conv->inputs, widest(TILE_VALUES / taps / cut.widest_out));
    cut.tiles_in = up(conv->inputs, cut.widest_in), cut.tiles_out = up(conv->outputs, cut.widest_out);
    cut.parts = most(1, least(up(cut.pairs, cut.group), TASKS / (cut.tiles_in * cut.tiles_out)));
    int64_t x_rows = least(conv->height, (cut.rows - 1) * conv->stride + conv->taps_down);
    cut.tile_size = taps * cut.widest_out * cut.widest_in;
    cut.x_size = x_rows * conv->stride * cut.half_width * cut.group * least(conv->inputs, STRIP);
    cut.dy_size = cut.rows * conv->out_width * cut.group * cut.widest_out;
    return cut;
}

/* A task's channels, its pairs of images, and its thread's memory. */
typedef struct {
    int64_t in_first, in_count, out_first, out_count, pair_first, pair_end;
    float *tile;      /* strip after strip: (taps, out_count, the strip's channels of x) */
    uint16_t *x, *dy; /* packed: (row, pixel, pair of images, channel, 2); x a strip at a time */
} Task;

static Task task_of(const Conv *conv, const Cut *cut, int64_t number, float *memory) {
    int64_t part = number % cut->parts, tile = number / cut->parts;
    Task task = {.in_first = tile % cut->tiles_in * cut->widest_in,
                 .out_first = tile / cut->tiles_in * cut->widest_out};
    task.in_count = least(cut->widest_in, conv->inputs - task.in_first);
    task.out_count = least(cut->widest_out, conv->outputs - task.out_first);
    task.pair_first = cut->pairs * part / cut->parts, task.pair_end = cut->pairs * (part + 1) / cut->parts;
    task.tile = memory;
    task.x = (uint16_t *)(memory + cut->tile_size), task.dy = task.x + 2 * cut->x_size;
    return task;
}

/* A row of pixels of a pair of images, each `step` after the one before; pixels that no tap meets are left out. */
TARGET static void pack_row(const Conv *conv, const uint16_t *even, const uint16_t *odd, int64_t odd_step,
                            int64_t width, int64_t channels, int64_t count, int64_t stride, uint16_t *packed,
                            int64_t step) {
    int64_t half_width = up(width, stride);
    for (int64_t phase = 0; phase < stride; phase++) {
        if ((phase + conv->padding) % stride >= conv->taps_across) continue;
        uint16_t *to = packed + phase * half_width * step;
        for (int64_t w = phase; w < width; w += stride, to += step)
            interleave(even + w * channels, odd + w * odd_step, count, to);
    }
}

/* Rows from `first` to `end` of `pairs` pairs of images: pixel w at w % stride * (width / stride) + w / stride, so that
 * a tap meets pixels that follow each other. A last image without another has zeros beside it. */
TARGET static void pack(const uint16_t *images, const Conv *conv, int64_t height, int64_t width, int64_t channels,
                        int64_t channel_first, int64_t channel_count, int64_t stride, int64_t pair_first, int64_t pairs,
                        int64_t first, int64_t end, uint16_t *packed) {
    static const uint16_t zeros[WIDEST];
    int64_t half_width = up(width, stride), image_size = height * width * channels;
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t row = first; row < end; row++) {
            if ((row + conv->padding) % stride >= conv->taps_down) continue; /* no tap meets it */
            int64_t image = 2 * (pair_first + pair), is_last = image + 1 == conv->count;
            const uint16_t *even = images + image * image_size + row * width * channels + channel_first;
            pack_row(conv, even, is_last ? zeros : even + image_size, is_last ? 0 : channels, width, channels,
                     channel_count, stride,
                     packed + ((row - first) * stride * half_width * pairs + pair) * channel_count * 2,
                     pairs * channel_count * 2);
        }
}

/* Pixels that are packed at a time: `pairs` pairs of images from `pair`, rows of dy from `first` to `end`, and the rows
 * of x that they meet. */
typedef struct {
    int64_t pair, pairs, first, end, x_first, x_end;
} Block;

static Block block_of(const Conv *conv, const Cut *cut, const Task *task, int64_t number) {
    int64_t in_image = up(conv->out_height, cut->rows);
    Block block = {.pair = task->pair_first + number / in_image * cut->group, .first = number % in_image * cut->rows};
    block.pairs = least(cut->group, task->pair_end - block.pair);
    block.end = least(conv->out_height, block.first + cut->rows);
    block.x_first = most(0, block.first * conv->stride - conv->padding);
    block.x_end = least(conv->height, (block.end - 1) * conv->stride - conv->padding + conv->taps_down);
    return block;
}

/* At most 64 of a task's channels of x, which fill registers side by side. */
typedef struct {
    int64_t first, count;
    float *tile;
} Strip;

static Strip strip_of(const Conv *conv, const Task *task, int64_t first) {
    int64_t before = conv->taps_down * conv->taps_across * task->out_count * first;
    return (Strip){first, least(STRIP, task->in_count - first), task->tile + before};
}

/* Where the tap meets pixels within the images; returns the number of runs, at most one a row. */
static int64_t find_runs(const Conv *conv, const Cut *cut, const Task *task, const Block *block, const Strip *strip,
                         int64_t tap, Run *runs) {
    int64_t down = tap / conv->taps_across, shift = conv->padding - tap % conv->taps_across;
    int64_t last = conv->width - 1 + shift, left = up(most(0, shift), conv->stride), found = 0;
    int64_t right = last < 0 ? 0 : least(conv->out_width, last / conv->stride + 1);
    int64_t at = left * conv->stride - shift, x_pixel = at % conv->stride * cut->half_width + at / conv->stride;
    for (int64_t row = block->first; row < block->end && left < right; row++) {
        int64_t y = row * conv->stride + down - conv->padding;
        if (y < 0 || y >= conv->height) continue;
        int64_t x_place = (y - block->x_first) * conv->stride * cut->half_width + x_pixel;
        int64_t dy_place = (row - block->first) * conv->out_width + left;
        runs[found++] = (Run){task->x + x_place * block->pairs * strip->count * 2,
                              task->dy + dy_place * block->pairs * task->out_count * 2, (right - left) * block->pairs};
    }
    return found;
}

static void add_tap(const Conv *conv, const Cut *cut, const Task *task, const Block *block, const Strip *strip,
                    int64_t tap) {
    Run runs[cut->rows];
    int64_t num_runs = find_runs(conv, cut, task, block, strip, tap, runs);
    conv_add_panels(strip->count, task->out_count, runs, num_runs, 2 * strip->count, 2 * task->out_count,
                    strip->tile + tap * task->out_count * strip->count);
}

TARGET static void add_block(const Conv *conv, const Cut *cut, const Task *task, const Block *block) {
    pack(conv->gradient, conv, conv->out_height, conv->out_width, conv->outputs, task->out_first, task->out_count, 1,
         block->pair, block->pairs, block->first, block->end, task->dy);
    for (int64_t first = 0; first < task->in_count; first += STRIP) {
        Strip strip = strip_of(conv, task, first);
        pack(conv->images, conv, conv->height, conv->width, conv->inputs, task->in_first + first, strip.count,
             conv->stride, block->pair, block->pairs, block->x_first, block->x_end, task->x);
        for (int64_t tap = 0; tap < conv->taps_down * conv->taps_across; tap++)
            add_tap(conv, cut, task, block, &strip, tap);
    }
}

static void add_part(const Conv *conv, const Cut *cut, const Task *task) {
    memset(task->tile, 0, cut->tile_size * sizeof(float));
    int64_t blocks = up(task->pair_end - task->pair_first, cut->group) * up(conv->out_height, cut->rows);
    for (int64_t number = 0; number < blocks; number++) {
        Block block = block_of(conv, cut, task, number);
        add_block(conv, cut, task, &block);
    }
}

/* Puts a tile where it belongs in (outputs, taps, inputs). */
static void put_tile(const Conv *conv, const Task *task, float *sums) {
    int64_t taps = conv->taps_down * conv->taps_across;
    for (int64_t first = 0; first < task->in_count; first += STRIP) {
        Strip strip = strip_of(conv, task, first);
        for (int64_t out = 0; out < task->out_count; out++)
            for (int64_t tap = 0; tap < taps; tap++)
                memcpy(sums + ((task->out_first + out) * taps + tap) * conv->inputs + task->in_first + first,
                       strip.tile + (tap * task->out_count + out) * strip.count, strip.count * sizeof(float));
    }
}

/* dweight of `images` and `gradient`. 0, or 1 without memory. */
PUBLIC int megabatch_conv_weight_gradient(const Conv *conv) {
    if (conv->inputs % VECTOR) return conv_few_weight_gradient(conv);
    Cut cut = cut_of(conv);
    int64_t size = conv->outputs * conv->taps_down * conv->taps_across * conv->inputs;
    int64_t own = cut.tile_size + cut.x_size + cut.dy_size;
    float *sums = aligned_alloc(64, (cut.parts * size + conv->threads * own) * sizeof *sums);
    if (!sums) return 1;
#pragma omp parallel num_threads((int)conv->threads)
    {
        float *memory = sums + cut.parts * size + conv_thread() * own;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < cut.tiles_in * cut.tiles_out * cut.parts; number++) {
            Task task = task_of(conv, &cut, number, memory);
            add_part(conv, &cut, &task);
            put_tile(conv, &task, sums + number % cut.parts * size);
        }
#pragma omp for
        for (int64_t at = 0; at < size; at += VECTOR) conv_add_parts(sums + at, cut.parts, size, conv->result + at);
    }
    free(sums);
    return 0;
}
#endif
