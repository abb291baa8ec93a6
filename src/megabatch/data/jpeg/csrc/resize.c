/* Resizes the decoded planes with the filters of filter.c, then converts colour and interleaves bytes.
 *
 * Each component is resized from its own resolution; colour is converted for output pixels only. Samples are 16 bit, 64
 * times the 8-bit value; weights are fractions of 32768.
 */
#include "crop.h"

#include <string.h>

#define GROUP 8            /* columns resized before they are transposed together */
#define RUN 32             /* pixels per step of the colour conversion */
#define CENTRE (128 * 64)  /* chroma value of grey */

typedef int16_t S8 __attribute__((vector_size(16)));
typedef uint8_t B16 __attribute__((vector_size(16)));

/* sample * weight / 32768, rounded; compilers turn this form into one vector instruction (pmulhrsw) */
JC_INLINE int16_t part(int16_t sample, int16_t weight) {
    return (int16_t)(((((int32_t)sample * weight) >> 14) + 1) >> 1);
}

/* out[i] = sum over t of weight[t] * line[t * stride + i]. Up to four terms are added in one pass over `out`; most
 * filters have two to four. */
JC_CLONES static void weighted_sum(
    int16_t *restrict out, const int16_t *restrict line, size_t stride, const int16_t *weight, int count, int num) {
    const int16_t *restrict a = line, *restrict b = line + stride, *restrict c = b + stride, *restrict d = c + stride;
    int16_t wa = weight[0], wb = count > 1 ? weight[1] : 0, wc = count > 2 ? weight[2] : 0;
    if (count == 1) {
        memcpy(out, line, (size_t)num * sizeof *out);
    } else if (count == 2) {
        for (int i = 0; i < num; i++) out[i] = (int16_t)(part(a[i], wa) + part(b[i], wb));
    } else if (count == 3) {
        for (int i = 0; i < num; i++) out[i] = (int16_t)(part(a[i], wa) + part(b[i], wb) + part(c[i], wc));
    } else {
        int16_t wd = weight[3];
        for (int i = 0; i < num; i++)
            out[i] = (int16_t)((part(a[i], wa) + part(b[i], wb)) + (part(c[i], wc) + part(d[i], wd)));
        for (int t = 4; t < count; t++) {
            const int16_t *restrict more = line + (size_t)t * stride;
            int16_t w = weight[t];
            for (int i = 0; i < num; i++) out[i] = (int16_t)(out[i] + part(more[i], w));
        }
    }
}

/* Transposes 8 x 8 samples. */
JC_CLONES static void transpose8(const int16_t *restrict in, size_t in_stride, int16_t *restrict out, size_t stride) {
    const S8 low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
    S8 a[8], b[8];
    for (int x = 0; x < 8; x++) memcpy(&a[x], in + (size_t)x * in_stride, sizeof a[x]);
    for (int round = 0; round < 3; round++) { /* each interleaves lines x and x + 4; three such shuffles transpose */
        for (int x = 0; x < 4; x++) {
            b[2 * x] = __builtin_shuffle(a[x], a[x + 4], low);
            b[2 * x + 1] = __builtin_shuffle(a[x], a[x + 4], high);
        }
        memcpy(a, b, sizeof a);
    }
    for (int y = 0; y < 8; y++) memcpy(out + (size_t)y * stride, &a[y], sizeof a[y]);
}

/* Resizes a column-major plane to `columns` columns and transposes it to row-major order. `group` holds GROUP resized
 * columns, which are transposed in 8 x 8 tiles while they are in the cache. */
static void resize_width(
    const JcComponent *component, const JcFilter *filter, int columns, int16_t *group, int16_t *out, size_t stride) {
    size_t lines = ((size_t)component->num_y + 7) & ~(size_t)7;
    for (int j = 0; j < columns; j += GROUP) {
        for (int i = 0; i < GROUP && j + i < columns; i++) {
            const int16_t *plane = component->plane + (size_t)filter->first[j + i] * component->stride;
            const int16_t *weight = filter->weight + (size_t)(j + i) * (size_t)filter->max_count;
            weighted_sum(group + (size_t)i * lines, plane, component->stride, weight, filter->count[j + i], component->num_y);
        }
        for (size_t y = 0; y < lines; y += 8) transpose8(group + y, lines, out + y * stride + (size_t)j, stride);
    }
}

/* Undoes the factor 64, rounds and clamps. Colour sums lie within [-14,600, 30,800], so nothing overflows. */
JC_INLINE uint8_t to_byte(int16_t sample) {
    int16_t value = (int16_t)((int16_t)(sample + 32) >> 6);
    value = value > 0 ? value : 0; /* two plain selections: compilers turn each into one vector instruction */
    value = value < 255 ? value : 255;
    return (uint8_t)value;
}

/* Interleaves 16 bytes each of red, green and blue to 48 bytes. For each third of the output, `rg` merges red and
 * green, leaving gaps that `rgb` fills with blue. Indices from 16 on select from the second operand. */
JC_INLINE void interleave(const uint8_t *r, const uint8_t *g, const uint8_t *b, uint8_t *out) {
    static const B16 rg[3] = {{0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5},
                              {21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26},
                              {0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0}};
    static const B16 rgb[3] = {{0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15},
                               {0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15},
                               {26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31}};
    B16 red, green, blue;
    memcpy(&red, r, 16), memcpy(&green, g, 16), memcpy(&blue, b, 16);
    for (int i = 0; i < 3; i++) {
        B16 mixed = __builtin_shuffle(__builtin_shuffle(red, green, rg[i]), blue, rgb[i]);
        memcpy(out + 16 * i, &mixed, 16);
    }
}

/* Fractions of 32768. Volatile, because compilers expand a product with a known constant to several instructions, and use
 * one (pmulhrsw) if the weight is unknown: all in all, crops take 10 % less time. */
static const volatile int16_t red_cr = 13173, green_cb = 11277, green_cr = 23401, blue_cb = 7471;

/* Converts RUN samples from JFIF's YCbCr (ITU-R BT.601, full range) to RGB. Of weights of 1 and more, the integer part is
 * added separately. */
JC_INLINE void to_rgb(const int16_t *luma, const int16_t *blue, const int16_t *red, uint8_t *r, uint8_t *g, uint8_t *b) {
    int16_t r_cr = red_cr, g_cb = green_cb, g_cr = green_cr, b_cb = blue_cb;
    for (int i = 0; i < RUN; i++) {
        int16_t y = luma[i], cb = (int16_t)(blue[i] - CENTRE), cr = (int16_t)(red[i] - CENTRE);
        r[i] = to_byte((int16_t)(y + cr + part(cr, r_cr)));                /* y + 1.402 cr */
        g[i] = to_byte((int16_t)(y - part(cb, g_cb) - part(cr, g_cr)));    /* y - 0.344136 cb - 0.714136 cr */
        b[i] = to_byte((int16_t)(y + (int16_t)(cb - part(cb, b_cb)) + cb)); /* y + 1.772 cb */
    }
}

/* Writes a row of colour pixels; `row` holds the samples of each component. */
JC_CLONES static void colour_row(int16_t *const row[3], int is_rgb, int num, uint8_t *restrict out) {
    uint8_t r[RUN], g[RUN], b[RUN], rest[3 * RUN];
    for (int x = 0; x < num; x += RUN) { /* the input rows are padded to whole runs, the output is not */
        if (is_rgb)
            for (int i = 0; i < RUN; i++)
                r[i] = to_byte(row[0][x + i]), g[i] = to_byte(row[1][x + i]), b[i] = to_byte(row[2][x + i]);
        else
            to_rgb(row[0] + x, row[1] + x, row[2] + x, r, g, b);
        uint8_t *to = num - x >= RUN ? out + 3 * x : rest;
        for (int i = 0; i < RUN; i += 16) interleave(r + i, g + i, b + i, to + 3 * i);
    }
    if (num % RUN) memcpy(out + 3 * (num - num % RUN), rest, (size_t)(3 * (num % RUN)));
}

JC_CLONES static void grey_row(const int16_t *restrict luma, int num, int channels, uint8_t *restrict out) {
    if (channels == 1) {
        for (int x = 0; x < num; x++) out[x] = to_byte(luma[x]);
    } else {
        for (int x = 0; x < num; x++) out[3 * x] = out[3 * x + 1] = out[3 * x + 2] = to_byte(luma[x]);
    }
}

/* Sizes of the buffers in the scratch memory, in bytes. */
typedef struct {
    size_t lines[3], filters[3], exact, group, rows, total;
} Layout;

/* Number of components to resize: chroma that was not planned has side 0. */
static int wanted(const Jpeg *jpeg) {
    return jpeg->num_components == 3 && jpeg->component[1].side == 0 ? 1 : jpeg->num_components;
}

static Layout layout_of(const Jpeg *jpeg, const JcBox *box, int rows, int columns) {
    Layout layout = {0};
    size_t width = jc_rounded((size_t)columns), lines = 0;
    for (int i = 0; i < wanted(jpeg); i++) {
        const JcComponent *component = &jpeg->component[i];
        JcAxis across = jc_axis_x(jpeg, component, box, columns), down = jc_axis_y(jpeg, component, box, rows);
        size_t num_y = ((size_t)component->num_y + 7) & ~(size_t)7; /* transposed in tiles of 8 */
        size_t exact_x = jc_exact_bytes(&across), exact_y = jc_exact_bytes(&down);
        layout.lines[i] = jc_rounded(width * num_y * sizeof(int16_t));
        layout.filters[i] = jc_filter_bytes(&across) + jc_filter_bytes(&down);
        layout.exact = exact_x > layout.exact ? exact_x : layout.exact;
        layout.exact = exact_y > layout.exact ? exact_y : layout.exact;
        lines = num_y > lines ? num_y : lines;
        layout.total += layout.lines[i] + layout.filters[i];
    }
    /* Shared by all components, hence the largest of each; `rows` holds one output row per component. */
    layout.group = jc_rounded(GROUP * lines * sizeof(int16_t));
    layout.rows = 3 * width * sizeof(int16_t);
    layout.total += layout.exact + layout.group + layout.rows;
    return layout;
}

/* Bytes of scratch memory that jc_resize needs. */
size_t jc_resize_bytes(const Jpeg *jpeg, const JcBox *box, int rows, int columns) {
    return layout_of(jpeg, box, rows, columns).total;
}

/* True if a component has the sampling factors of the one before it, as Cr has those of Cb: they share a filter. */
static int is_like_last(const Jpeg *jpeg, int i) {
    const JcComponent *component = &jpeg->component[i], *last = component - 1;
    return i > 0 && component->h == last->h && component->v == last->v;
}

/* Resizes all planes to `columns` first; then makes the output row by row: vertical filter, colour, interleaving. */
void jc_resize(const Jpeg *jpeg, const JcBox *box, int rows, int columns, int channels, void *scratch, uint8_t *out) {
    Layout layout = layout_of(jpeg, box, rows, columns);
    size_t width = jc_rounded((size_t)columns);
    float *exact = scratch;
    int16_t *group = (int16_t *)((char *)scratch + layout.exact), *lines[3], *row[3];
    char *memory = (char *)group + layout.group; /* next free byte of the scratch memory */
    JcFilter across[3], down[3];
    for (int i = 0; i < 3; i++, memory += width * sizeof(int16_t)) row[i] = (int16_t *)memory;
    for (int i = 0; i < wanted(jpeg); i++) {
        const JcComponent *component = &jpeg->component[i];
        JcAxis x_axis = jc_axis_x(jpeg, component, box, columns), y_axis = jc_axis_y(jpeg, component, box, rows);
        lines[i] = (int16_t *)memory;
        memory += layout.lines[i];
        if (is_like_last(jpeg, i)) {
            across[i] = across[i - 1];
            down[i] = down[i - 1];
        } else {
            memory = jc_make_filter(&across[i], &x_axis, memory, exact);
            memory = jc_make_filter(&down[i], &y_axis, memory, exact);
        }
        resize_width(component, &across[i], columns, group, lines[i], width);
    }
    for (int y = 0; y < rows; y++, out += (size_t)columns * (size_t)channels) {
        for (int i = 0; i < wanted(jpeg); i++) {
            const int16_t *weight = down[i].weight + (size_t)y * (size_t)down[i].max_count;
            weighted_sum(row[i], lines[i] + (size_t)down[i].first[y] * width, width, weight, down[i].count[y], columns);
        }
        if (wanted(jpeg) == 3)
            colour_row(row, jpeg->is_rgb, columns, out);
        else
            grey_row(row[0], columns, channels, out);
    }
}
