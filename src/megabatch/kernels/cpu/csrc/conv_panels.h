/* Inner loops of the weight gradients on a CPU: sums of outer products over pixels.
 *
 *     tile[row, lane] += sum over pixels of rows[pixel, row] lanes[pixel, lane]
 *
 * A panel is as many rows of a tile as PANEL registers hold sums for; the others hold operands. */

/* `length` pixels that are adjacent in two packed matrices, whose products are summed over them: `lanes` has the
 * channels that fill registers, `rows` the channels of which one at a time is broadcast to all lanes. */
typedef struct {
    const Value *lanes, *rows;
    int64_t length;
} Run;

/* One panel. `vectors` and `rows` must be compile-time constants, so that the loops unroll and `sums` stays in
 * registers; CASE provides them. `row_first` is the offset of the panel's first row within a pixel. */
INLINE void add_runs(int vectors, int rows, const Run *runs, int64_t num_runs, int64_t lanes_step, int64_t row_first,
                     int64_t rows_step, float *tile) {
    Sums sums[PANEL];
#pragma GCC unroll 24
    for (int at = 0; at < rows * vectors; at++) {
        sums[at] = (Sums){0};
        /* The tile is needed only at the end: by then it has arrived in the cache. */
        _mm_prefetch((const char *)(tile + at * VECTOR), _MM_HINT_T0);
    }
    for (const Run *run = runs; run < runs + num_runs; run++) {
        const Value *lanes = run->lanes, *values = run->rows + row_first;
        for (int64_t left = run->length; left > 0; left--, lanes += lanes_step, values += rows_step) {
            Words words[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) words[v] = loaded(lanes + PER_WORD * VECTOR * v);
#pragma GCC unroll 24
            for (int row = 0; row < rows; row++) {
                Words word = repeated(values + PER_WORD * row);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    sums[row * vectors + v] = add_products(sums[row * vectors + v], words[v], word);
            }
        }
    }
#pragma GCC unroll 24
    for (int at = 0; at < rows * vectors; at++) {
        float *to = tile + at * VECTOR;
        *(SumsAnywhere *)to = loaded_sums(to) + sums[at];
    }
}

#define CASE(vectors, rows)                                                                   \
    case 100 * vectors + rows:                                                                \
        if (vectors * rows <= PANEL && vectors <= PANEL_VECTORS)                              \
            add_runs(vectors, rows, runs, num_runs, lanes_step, row_first, rows_step, tile);  \
        break;

TARGET static void add_panel(int64_t vectors, int64_t rows, const Run *runs, int64_t num_runs, int64_t lanes_step,
                             int64_t row_first, int64_t rows_step, float *tile) {
    switch (100 * vectors + rows) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8) CASE(1, 9)
        CASE(1, 10) CASE(1, 11) CASE(1, 12) CASE(1, 13) CASE(1, 14) CASE(1, 15) CASE(1, 16) CASE(2, 1) CASE(2, 2)
        CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6) CASE(2, 7) CASE(2, 8) CASE(2, 9) CASE(2, 10) CASE(2, 11)
        CASE(2, 12) CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(3, 4) CASE(3, 5) CASE(3, 6) CASE(3, 7) CASE(3, 8)
        CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4) CASE(4, 5) CASE(4, 6)
    }
}

/* tile[row, lane] += sum over the pixels of all runs of rows[pixel, row] lanes[pixel, lane]. `lanes_step` and
 * `rows_step` are the values from one pixel to the next; panels are of nearly equal size. */
static void add_panels(int64_t lanes, int64_t rows, const Run *runs, int64_t num_runs, int64_t lanes_step,
                     int64_t rows_step, float *tile) {
    int64_t vectors = lanes / VECTOR, panels = ceil_div(rows, min_of(16, PANEL / vectors));
    for (int64_t panel = 0; num_runs && panel < panels; panel++) {
        int64_t first = rows * panel / panels, count = rows * (panel + 1) / panels - first;
        add_panel(vectors, count, runs, num_runs, lanes_step, PER_WORD * first, rows_step, tile + first * lanes);
    }
}

/* result[0:VECTOR] = the sum of `parts` vectors that are `size` values apart, in ascending order, rounded once. */
TARGET static void add_parts(const float *sums, int64_t parts, int64_t size, Value *result) {
    Sums sum = loaded_sums(sums);
    for (int64_t part = 1; part < parts; part++) sum += loaded_sums(sums + part * size);
    store_sums(result, sum);
}
