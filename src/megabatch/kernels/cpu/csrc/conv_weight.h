/* Weight gradient of a convolution on a CPU.
 *
 *     dweight[k, tap, c] = sum over n, p of dy[n, p, k] x[n, p stride + tap - padding, c]
 *
 * A word of two values is the same pixel of two images. All taps can therefore read the same packed
 * copy of x, and pixels of padding are left out. A task is a tile of the gradient (a range of k, a range of c, all
 * taps) summed over a part of the images. Tiles and parts depend on the shapes alone, and parts are added in a fixed
 * order, so results do not depend on the number of threads. Within a task, x and dy are packed a block of pixels at a
 * time; the products of a block are summed in registers and then added to the tile. */

/* Bounds of the channels of a tile along one axis; values of a tile, and words of pixels packed at a time, which both
 * bound cache use. */
enum { NARROWEST = 64, WIDEST = 256, TILE_VALUES = 72 << 10, WORDS_IN_BLOCK = 512 };

/* How the work is divided. Images: `words` of them in `parts`; a block is `group` words of images and `rows` rows of
 * dy. Channels: tiles_in x tiles_out tiles of at most widest_in x widest_out. */
typedef struct {
    int64_t words, group, rows, parts, widest_in, widest_out, tiles_in, tiles_out;
    int64_t half_width;                 /* of a row of x, packed as `stride` runs of every stride-th pixel each */
    int64_t tile_size, x_size, dy_size; /* of one thread's memory: sums, then words */
} Cut;

/* `values` channels rounded and bounded. With fewer taps a packed value is used in fewer products per
 * channel; tiles then get more channels to make up for it. */
static int64_t widest(int64_t values) { return max_of(NARROWEST, min_of(WIDEST, values / NARROWEST * NARROWEST)); }

static Cut cut_of(const Conv *conv) {
    int64_t taps = conv->taps_down * conv->taps_across;
    Cut cut = {.words = ceil_div(conv->count, PER_WORD), .half_width = ceil_div(conv->width, conv->stride)};
    cut.group = min_of(cut.words, max_of(1, WORDS_IN_BLOCK / (conv->out_height * conv->out_width)));
    cut.rows = min_of(conv->out_height, max_of(1, WORDS_IN_BLOCK / (conv->out_width * cut.group)));
    cut.widest_out = min_of(conv->outputs, widest(TILE_VALUES / taps / NARROWEST));
    cut.widest_in = min_of(conv->inputs, widest(TILE_VALUES / taps / cut.widest_out));
    cut.tiles_in = ceil_div(conv->inputs, cut.widest_in), cut.tiles_out = ceil_div(conv->outputs, cut.widest_out);
    cut.parts = max_of(1, min_of(ceil_div(cut.words, cut.group), TASKS / (cut.tiles_in * cut.tiles_out)));
    int64_t x_rows = min_of(conv->height, (cut.rows - 1) * conv->stride + conv->taps_down);
    cut.tile_size = taps * cut.widest_out * cut.widest_in;
    cut.x_size = x_rows * conv->stride * cut.half_width * cut.group * min_of(conv->inputs, STRIP);
    cut.dy_size = cut.rows * conv->out_width * cut.group * cut.widest_out;
    return cut;
}

/* A task: its channels, its words of images, and its thread's memory. */
typedef struct {
    int64_t in_first, in_count, out_first, out_count, word_first, word_end;
    float *tile;      /* strip after strip: (taps, out_count, the strip's channels of x) */
    Value *x, *dy; /* packed: (row, pixel, word of images, channel, PER_WORD); x a strip at a time */
} Task;

static Task task_of(const Conv *conv, const Cut *cut, int64_t number, float *memory) {
    int64_t part = number % cut->parts, tile = number / cut->parts;
    Task task = {.in_first = tile % cut->tiles_in * cut->widest_in,
                 .out_first = tile / cut->tiles_in * cut->widest_out};
    task.in_count = min_of(cut->widest_in, conv->inputs - task.in_first);
    task.out_count = min_of(cut->widest_out, conv->outputs - task.out_first);
    task.word_first = cut->words * part / cut->parts, task.word_end = cut->words * (part + 1) / cut->parts;
    task.tile = memory;
    task.x = (Value *)(memory + cut->tile_size), task.dy = task.x + PER_WORD * cut->x_size;
    return task;
}

/* Packs a row of pixels of a word of images, `step` values from one pixel to the next, in `stride` phases: first pixels
 * 0, stride, 2 stride, ..., then 1, stride + 1, ... Phases that no tap reads are left out. `odd_step` is 0 where `odd`
 * is a row of zeros. */
TARGET static void pack_row(const Conv *conv, const Value *even, const Value *odd, int64_t odd_step,
                            int64_t width, int64_t channels, int64_t count, int64_t stride, Value *packed,
                            int64_t step) {
    int64_t half_width = ceil_div(width, stride);
    for (int64_t phase = 0; phase < stride; phase++) {
        if ((phase + conv->padding) % stride >= conv->taps_across) continue;
        Value *to = packed + phase * half_width * step;
        for (int64_t w = phase; w < width; w += stride, to += step)
            interleave(even + w * channels, odd + w * odd_step, count, to);
    }
}

/* Packs rows from `first` up to `end` of `words` words of images as (row, pixel, word of images, channel, PER_WORD).
 * Pixel w is at w % stride * half_width + w / stride, so that a tap, which reads every stride-th pixel, reads adjacent
 * ones. An odd last image is paired with zeros. */
TARGET static void pack(const Value *images, const Conv *conv, int64_t height, int64_t width, int64_t channels,
                        int64_t channel_first, int64_t channel_count, int64_t stride, int64_t word_first, int64_t words,
                        int64_t first, int64_t end, Value *packed) {
    static const Value zeros[WIDEST];
    int64_t half_width = ceil_div(width, stride), image_size = height * width * channels;
    for (int64_t word = 0; word < words; word++)
        for (int64_t row = first; row < end; row++) {
            if ((row + conv->padding) % stride >= conv->taps_down) continue; /* no tap reads this row */
            int64_t image = PER_WORD * (word_first + word), is_last = image + 1 == conv->count;
            const Value *even = images + image * image_size + row * width * channels + channel_first;
            pack_row(conv, even, is_last ? zeros : even + image_size, is_last ? 0 : channels, width, channels,
                     channel_count, stride,
                     packed + ((row - first) * stride * half_width * words + word) * channel_count * PER_WORD,
                     words * channel_count * PER_WORD);
        }
}

/* Pixels that are packed at a time: `words` words of images from `word`, rows of dy from `first` up to `end`, and the
 * rows of x that those read. */
typedef struct {
    int64_t word, words, first, end, x_first, x_end;
} Block;

static Block block_of(const Conv *conv, const Cut *cut, const Task *task, int64_t number) {
    int64_t in_image = ceil_div(conv->out_height, cut->rows);
    Block block = {.word = task->word_first + number / in_image * cut->group, .first = number % in_image * cut->rows};
    block.words = min_of(cut->group, task->word_end - block.word);
    block.end = min_of(conv->out_height, block.first + cut->rows);
    block.x_first = max_of(0, block.first * conv->stride - conv->padding);
    block.x_end = min_of(conv->height, (block.end - 1) * conv->stride - conv->padding + conv->taps_down);
    return block;
}

/* At most STRIP of a task's channels of x. Strips are consecutive in the task's tile. */
typedef struct {
    int64_t first, count;
    float *tile;
} Strip;

static Strip strip_of(const Conv *conv, const Task *task, int64_t first) {
    int64_t before = conv->taps_down * conv->taps_across * task->out_count * first;
    return (Strip){first, min_of(STRIP, task->in_count - first), task->tile + before};
}

/* Lists the runs of pixels at which this tap falls within the images, at most one per row of dy; returns how many. */
static int64_t find_runs(const Conv *conv, const Cut *cut, const Task *task, const Block *block, const Strip *strip,
                         int64_t tap, Run *runs) {
    /* Column w of dy reads column w stride - shift of x, which is inside for left <= w < right. */
    int64_t down = tap / conv->taps_across, shift = conv->padding - tap % conv->taps_across;
    int64_t last = conv->width - 1 + shift, left = ceil_div(max_of(0, shift), conv->stride), found = 0;
    int64_t right = last < 0 ? 0 : min_of(conv->out_width, last / conv->stride + 1);
    int64_t at = left * conv->stride - shift, x_pixel = at % conv->stride * cut->half_width + at / conv->stride;
    for (int64_t row = block->first; row < block->end && left < right; row++) {
        int64_t y = row * conv->stride + down - conv->padding;
        if (y < 0 || y >= conv->height) continue;
        int64_t x_place = (y - block->x_first) * conv->stride * cut->half_width + x_pixel;
        int64_t dy_place = (row - block->first) * conv->out_width + left;
        runs[found++] = (Run){task->x + x_place * block->words * strip->count * PER_WORD,
                              task->dy + dy_place * block->words * task->out_count * PER_WORD,
                              (right - left) * block->words};
    }
    return found;
}

/* Adds the products of a block for one tap and one strip to the tile. */
static void add_tap(const Conv *conv, const Cut *cut, const Task *task, const Block *block, const Strip *strip,
                    int64_t tap) {
    Run runs[cut->rows];
    int64_t num_runs = find_runs(conv, cut, task, block, strip, tap, runs);
    add_panels(strip->count, task->out_count, runs, num_runs, PER_WORD * strip->count, PER_WORD * task->out_count,
                    strip->tile + tap * task->out_count * strip->count);
}

/* Packs a block of dy once, and of x strip by strip, and adds its products to the tile. */
TARGET static void add_block(const Conv *conv, const Cut *cut, const Task *task, const Block *block) {
    pack(conv->gradient, conv, conv->out_height, conv->out_width, conv->outputs, task->out_first, task->out_count, 1,
         block->word, block->words, block->first, block->end, task->dy);
    for (int64_t first = 0; first < task->in_count; first += STRIP) {
        Strip strip = strip_of(conv, task, first);
        pack(conv->images, conv, conv->height, conv->width, conv->inputs, task->in_first + first, strip.count,
             conv->stride, block->word, block->words, block->x_first, block->x_end, task->x);
        for (int64_t tap = 0; tap < conv->taps_down * conv->taps_across; tap++)
            add_tap(conv, cut, task, block, &strip, tap);
    }
}

/* Computes a task's tile, block after block. */
static void add_part(const Conv *conv, const Cut *cut, const Task *task) {
    memset(task->tile, 0, cut->tile_size * sizeof(float));
    int64_t blocks = ceil_div(task->word_end - task->word_first, cut->group) * ceil_div(conv->out_height, cut->rows);
    for (int64_t number = 0; number < blocks; number++) {
        Block block = block_of(conv, cut, task, number);
        add_block(conv, cut, task, &block);
    }
}

/* Copies a tile to its place in `sums`, (outputs, taps, inputs). */
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

/* result = dweight. Returns 0, or 1 if memory cannot be allocated. */
static int weight_gradient(const Conv *conv) {
    Cut cut = cut_of(conv);
    int64_t size = conv->outputs * conv->taps_down * conv->taps_across * conv->inputs;
    /* One allocation: a copy of the gradient per part, then each thread's tile and packed blocks. */
    int64_t per_thread = cut.tile_size + cut.x_size + cut.dy_size;
    float *sums = allocate(cut.parts * size + conv->threads * per_thread);
    if (!sums) return 1;
#pragma omp parallel num_threads((int)conv->threads)
    {
        float *memory = sums + cut.parts * size + conv_thread() * per_thread;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < cut.tiles_in * cut.tiles_out * cut.parts; number++) {
            Task task = task_of(conv, &cut, number, memory);
            add_part(conv, &cut, &task);
            put_tile(conv, &task, sums + number % cut.parts * size);
        }
#pragma omp for
        for (int64_t at = 0; at < size; at += VECTOR) add_parts(sums + at, cut.parts, size, conv->result + at);
    }
    free(sums);
    return 0;
}
