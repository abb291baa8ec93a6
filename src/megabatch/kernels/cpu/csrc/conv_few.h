/* Convolutions of images with fewer channels than a register has lanes on a CPU, such as the first of a network.
 *
 * In channels_last, the pixels under one row of taps are adjacent in memory: a "window" of taps_across x inputs values.
 * So a row of taps is treated as a single tap with that many channels. Rows are first copied with zeros of padding at
 * both ends, so that windows at the border need no special case. */

/* Values of one thread's copy of x in forward, and pixels of dy packed at a time in the weight
 * gradient, which both bound cache use. */
enum { COPY_VALUES = 1 << 17, PIXELS_IN_BLOCK = 512 };

/* Values under one row of taps; and the same as whole words. */
static int64_t window_of(const Conv *conv) { return conv->taps_across * conv->inputs; }
static int64_t packed_window(const Conv *conv) { return ceil_div(window_of(conv), PER_WORD) * PER_WORD; }

/* Values of a copied row: with padding, and at least one more for the last word of an odd window; a multiple of 32. */
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

/* Packs all weights as (blocks of lanes, rows of taps, words of the window, lanes, PER_WORD); an odd window of bfloat16
 * ends with a 0. */
static void pack_weight(const Conv *conv, int64_t lanes, Value *packed) {
    int64_t window = window_of(conv), outputs = conv->taps_down * window;
    for (int64_t block = 0; block < conv->outputs; block += lanes)
        for (int64_t down = 0; down < conv->taps_down; down++)
            for (int64_t at = 0; at < window; at += PER_WORD)
                for (int64_t lane = 0; lane < lanes; lane++, packed += PER_WORD) {
                    const Value *from = conv->weight + (block + lane) * outputs + down * window + at;
                    for (int64_t value = 0; value < PER_WORD; value++)
                        packed[value] = at + value < window ? from[value] : 0;
                }
}

/* Copies rows of an image, each between zeros of padding. */
static void copy_rows(const Conv *conv, int64_t image, Rows rows, Value *copy) {
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

static void fill_piece(const Conv *conv, const Piece *piece, const Value *packed, Value *copy) {
    int64_t vectors = vectors_of(conv->outputs), lanes = vectors * VECTOR, window = packed_window(conv);
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
            add_tile(vectors, images, terms, found, copy, copy_image, window,
                          conv->result + place + block * lanes, conv->out_height * to_row);
        }
}

static int few_forward(const Conv *conv) {
    int64_t vectors = vectors_of(conv->outputs), images = most_images(vectors, row_size(conv));
    int64_t tiles = ceil_div(conv->count, images);
    /* As many output rows per task as keep its copy of x within COPY_VALUES, but at least one. */
    int64_t copied = COPY_VALUES / (images * row_size(conv));
    int64_t rows = min_of(conv->out_height, max_of(0, copied - conv->taps_down) / conv->stride + 1);
    int64_t cuts = ceil_div(conv->out_height, rows);
    int64_t weights = ceil_div(conv->outputs * conv->taps_down * packed_window(conv), 32) * 32;
    /* One allocation: the packed weights, then each thread's copy. */
    int64_t per_thread = images * ((rows - 1) * conv->stride + conv->taps_down) * row_size(conv);
    Value *packed = allocate((weights + conv->threads * per_thread) / PER_WORD);
    if (!packed) return 1;
    pack_weight(conv, vectors * VECTOR, packed);
#pragma omp parallel num_threads((int)conv->threads)
    {
        Value *copy = packed + weights + conv_thread() * per_thread;
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

/* Packs rows of a word of images as (row, value, PER_WORD), between zeros. An odd last image is paired with zeros. */
TARGET static void pack_images(const Conv *conv, int64_t word, Rows rows, Value *packed) {
    int64_t length = conv->width * conv->inputs, size = PER_WORD * row_size(conv), whole = length / VECTOR * VECTOR;
    int64_t has_odd = PER_WORD * (word + 1) <= conv->count;
    for (int64_t row = rows.first; row < rows.end; row++, packed += size) {
        const Value *even = conv->images + (PER_WORD * word * conv->height + row) * length;
        const Value *odd = even + conv->height * length;
        Value *to = packed + PER_WORD * conv->padding * conv->inputs;
        memset(packed, 0, size * sizeof *packed);
        /* interleave takes multiples of VECTOR; the loop packs the rest, or everything if there is no second image. */
        if (has_odd) interleave(even, odd, whole, to);
        for (int64_t at = has_odd ? whole : 0; at < length; at++) {
            to[PER_WORD * at] = even[at];
            if (has_odd && PER_WORD == 2) to[2 * at + 1] = odd[at];
        }
    }
}

/* Packs `channels` channels of rows of dy of a word of images as (row, pixel, channel, PER_WORD). */
TARGET static void pack_gradient(const Conv *conv, int64_t word, int64_t first, int64_t end, int64_t channel,
                                 int64_t channels, Value *packed) {
    static const Value zeros[STRIP];
    int64_t image = conv->out_height * conv->out_width * conv->outputs, has_odd = PER_WORD * (word + 1) <= conv->count;
    const Value *even = conv->gradient + PER_WORD * word * image + first * conv->out_width * conv->outputs + channel;
    for (int64_t left = (end - first) * conv->out_width; left > 0; left--, even += conv->outputs) {
        interleave(even, has_odd ? even + image : zeros, channels, packed);
        packed += PER_WORD * channels;
    }
}

/* A task: a strip of dy's channels, summed over a part of the words of images; and its thread's memory. */
typedef struct {
    int64_t channel, channels, word_first, word_end, rows; /* rows of dy that are packed at a time */
    float *tile;                                           /* (rows of taps, window, channels) */
    Value *x, *dy;
} Share;

/* Adds the products of dy's rows from `first` up to `end`, of one word of images, to the tile. */
static void add_rows(const Conv *conv, const Share *share, int64_t word, int64_t first, int64_t end) {
    Rows x_rows = rows_read(conv, first, end);
    Run runs[end - first];
    pack_images(conv, word, x_rows, share->x);
    pack_gradient(conv, word, first, end, share->channel, share->channels, share->dy);
    for (int64_t down = 0; down < conv->taps_down; down++) {
        int64_t found = 0;
        for (int64_t row = first; row < end; row++) {
            int64_t y = row * conv->stride + down - conv->padding;
            if (y < 0 || y >= conv->height) continue; /* this row of taps falls on padding */
            /* Consecutive pixels of dy meet windows that are `stride` pixels apart and may overlap. */
            runs[found++] = (Run){share->dy + (row - first) * conv->out_width * share->channels * PER_WORD,
                                  share->x + (y - x_rows.first) * row_size(conv) * PER_WORD, conv->out_width};
        }
        add_panels(share->channels, window_of(conv), runs, found, PER_WORD * share->channels,
                   PER_WORD * conv->stride * conv->inputs, share->tile + down * window_of(conv) * share->channels);
    }
}

/* Computes a task's sums and writes them, transposed, into `sums` (outputs, taps and inputs). */
static void add_share(const Conv *conv, const Share *share, float *sums) {
    int64_t values = conv->taps_down * window_of(conv);
    memset(share->tile, 0, values * share->channels * sizeof(float));
    for (int64_t word = share->word_first; word < share->word_end; word++)
        for (int64_t row = 0; row < conv->out_height; row += share->rows)
            add_rows(conv, share, word, row, min_of(conv->out_height, row + share->rows));
    for (int64_t channel = 0; channel < share->channels; channel++)
        for (int64_t at = 0; at < values; at++)
            sums[(share->channel + channel) * values + at] = share->tile[at * share->channels + channel];
}

static int few_weight_gradient(const Conv *conv) {
    int64_t strips = ceil_div(conv->outputs, STRIP), words = ceil_div(conv->count, PER_WORD);
    /* Parts of the images are summed separately and added at the end. Their number depends on the shapes alone. */
    int64_t parts = max_of(1, min_of(words, TASKS / strips));
    int64_t rows = min_of(conv->out_height, max_of(1, PIXELS_IN_BLOCK / conv->out_width));
    int64_t values = conv->taps_down * window_of(conv), size = conv->outputs * values;
    int64_t x_size = ((rows - 1) * conv->stride + conv->taps_down) * row_size(conv);
    int64_t dy_size = rows * conv->out_width * STRIP, per_thread = values * STRIP + x_size + dy_size;
    float *sums = allocate(parts * size + conv->threads * per_thread);
    if (!sums) return 1;
#pragma omp parallel num_threads((int)conv->threads)
    {
        float *memory = sums + parts * size + conv_thread() * per_thread;
        Value *dy = (Value *)(memory + values * STRIP);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * parts; task++) {
            int64_t part = task % parts, channel = task / parts * STRIP;
            Share share = {channel, min_of(STRIP, conv->outputs - channel), words * part / parts,
                           words * (part + 1) / parts, rows, memory, dy + PER_WORD * dy_size, dy};
            add_share(conv, &share, sums + part * size);
        }
#pragma omp for
        for (int64_t at = 0; at < size; at += VECTOR) add_parts(sums + at, parts, size, conv->result + at);
    }
    free(sums);
    return 0;
}
