/* Antialiased bilinear resize of the decoded planes, then colour, then interleaved bytes.
 *
 * The filter is a triangle as wide as one output pixel, and at least as wide as one sample, cut off at the crop
 * and normalised (Pillow's and torch's `antialias=True`). Each component is resized from its own resolution, so
 * subsampled chroma is never blown up first, and colour is computed for output pixels alone.
 * Samples are 16 bit, 64 times the 8-bit value; weights are fractions of 32768.
 */
#include "crop.h"

#include <math.h>
#include <string.h>

#define GROUP 8
#define RUN 32
#define CENTRE (128 * 64)

typedef int16_t S8 __attribute__((vector_size(16)));
typedef uint8_t B16 __attribute__((vector_size(16)));

typedef struct {
    double start, step, support; /* in samples from the plane's origin */
    int lowest, highest, num;    /* samples that may be read; output positions */
} Axis;

typedef struct {
    int *first;       /* first sample of each output position */
    int *count;       /* how many samples it takes */
    int16_t *weight;  /* max_count for each position */
    int max_count;
} Filter;

static size_t rounded(size_t size) {
    return (size + 63) & ~(size_t)63;
}

static int whole(double value) { /* floor, without a call where the processor lacks the instruction */
    int near = (int)value;
    return near - (value < near);
}

static Axis axis_of(double start, double length, int origin, int limit, int num) {
    Axis axis = {.num = num, .step = length / num};
    axis.start = start - origin;
    axis.support = axis.step > 1.0 ? axis.step : 1.0;
    axis.lowest = (int)floor(start) - origin;
    axis.highest = (int)ceil(start + length);
    axis.highest = (axis.highest < limit ? axis.highest : limit) - origin;
    return axis;
}

static Axis horizontal(const Jpeg *jpeg, const JcComponent *component, const JcBox *box, int columns) {
    double ratio = (double)(component->h * component->side) / (jpeg->h_max * 8);
    return axis_of(box->left * ratio, box->width * ratio, component->first_x, component->width, columns);
}

static Axis vertical(const Jpeg *jpeg, const JcComponent *component, const JcBox *box, int rows) {
    double ratio = (double)(component->v * component->side) / (jpeg->v_max * 8);
    return axis_of(box->top * ratio, box->height * ratio, component->first_y, component->height, rows);
}

static int max_count(const Axis *axis) {
    return (int)ceil(axis->support) * 2 + 1;
}

static size_t filter_bytes(const Axis *axis) {
    size_t num = (size_t)axis->num;
    return 2 * rounded(num * sizeof(int)) + rounded(num * (size_t)max_count(axis) * sizeof(int16_t));
}

/* Fractions of 32768 that sum to it exactly; a lone weight is 32767, which rounds to the same sample. */
static void quantise(const float *exact, float total, int count, int16_t *weight) {
    int sum = 0, largest = 0;
    float unit = 32767.0f / total;
    for (int t = 0; t < count; t++) {
        weight[t] = (int16_t)(exact[t] * unit + 0.5f);
        sum += weight[t];
        if (weight[t] > weight[largest]) largest = t;
    }
    int rest = (count == 1 ? 32767 : 32768) - sum + weight[largest];
    weight[largest] = (int16_t)(rest < 32767 ? rest : 32767);
}

static char *make_filter(Filter *filter, const Axis *axis, char *memory, float *exact) {
    size_t num = (size_t)axis->num;
    filter->max_count = max_count(axis);
    filter->first = (int *)memory;
    filter->count = (int *)(memory + rounded(num * sizeof(int)));
    filter->weight = (int16_t *)(memory + 2 * rounded(num * sizeof(int)));
    for (int j = 0; j < axis->num; j++) {
        double centre = axis->start + (j + 0.5) * axis->step;
        int first = whole(centre - axis->support + 0.5), last = whole(centre + axis->support + 0.5);
        if (first < axis->lowest) first = axis->lowest;
        if (last > axis->highest) last = axis->highest;
        if (first >= axis->highest) first = axis->highest - 1;
        if (last <= first) last = first + 1;
        int count = last - first < filter->max_count ? last - first : filter->max_count;
        float total = 0.0f, offset = (float)(first + 0.5 - centre), inverse = (float)(1.0 / axis->support);
        for (int t = 0; t < count; t++) {
            float distance = fabsf(offset + (float)t) * inverse;
            exact[t] = distance < 1.0f ? 1.0f - distance : 0.0f;
            total += exact[t];
        }
        if (total <= 0.0f) exact[0] = total = 1.0f;
        filter->first[j] = first;
        filter->count[j] = count;
        quantise(exact, total, count, filter->weight + (size_t)j * (size_t)filter->max_count);
    }
    return memory + filter_bytes(axis);
}

/* sample * weight / 32768, rounded; compilers know this form as one vector instruction */
JC_INLINE int16_t part(int16_t sample, int16_t weight) {
    return (int16_t)(((((int32_t)sample * weight) >> 14) + 1) >> 1);
}

/* out[i] = sum over t of weight[t] * line[t * stride + i] */
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

JC_CLONES static void transpose8(const int16_t *restrict in, size_t in_stride, int16_t *restrict out, size_t stride) {
    const S8 low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
    S8 a[8], b[8];
    for (int x = 0; x < 8; x++) memcpy(&a[x], in + (size_t)x * in_stride, sizeof a[x]);
    for (int round = 0; round < 3; round++) { /* each interleaves lines 4 apart: three perfect shuffles transpose */
        for (int x = 0; x < 4; x++) {
            b[2 * x] = __builtin_shuffle(a[x], a[x + 4], low);
            b[2 * x + 1] = __builtin_shuffle(a[x], a[x + 4], high);
        }
        memcpy(a, b, sizeof a);
    }
    for (int y = 0; y < 8; y++) memcpy(out + (size_t)y * stride, &a[y], sizeof a[y]);
}

/* Columns of the plane to rows of `columns` samples, kept row after row. */
static void resize_width(
    const JcComponent *component, const Filter *filter, int columns, int16_t *group, int16_t *out, size_t stride) {
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

JC_INLINE uint8_t to_byte(int16_t sample) {
    int16_t value = (int16_t)((int16_t)(sample + 32) >> 6);
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Three runs of 16 bytes to one of 48. */
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

/* JFIF's YCbCr (ITU-R BT.601, full range) to RGB. */
JC_CLONES static void colour_row(
    const int16_t *restrict luma, const int16_t *restrict blue, const int16_t *restrict red, int num, uint8_t *restrict out) {
    uint8_t r[RUN], g[RUN], b[RUN], rest[3 * RUN];
    for (int x = 0; x < num; x += RUN) { /* the lines are padded to whole runs */
        for (int i = 0; i < RUN; i++) {
            int16_t y = luma[x + i], cb = (int16_t)(blue[x + i] - CENTRE), cr = (int16_t)(red[x + i] - CENTRE);
            r[i] = to_byte((int16_t)(y + cr + part(cr, 13173)));              /* y + 1.402 cr */
            g[i] = to_byte((int16_t)(y - part(cb, 11277) - part(cr, 23401))); /* y - 0.344136 cb - 0.714136 cr */
            b[i] = to_byte((int16_t)(y + (int16_t)(cb - part(cb, 7471)) + cb)); /* y + 1.772 cb */
        }
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

typedef struct {
    size_t lines[3], filters[3], exact, group, rows, total;
} Layout;

static int wanted(const Jpeg *jpeg) {
    return jpeg->num_components == 3 && jpeg->component[1].side == 0 ? 1 : jpeg->num_components;
}

static Layout layout_of(const Jpeg *jpeg, const JcBox *box, int rows, int columns) {
    Layout layout = {0};
    size_t width = rounded((size_t)columns), most = 0, lines = 0;
    for (int i = 0; i < wanted(jpeg); i++) {
        const JcComponent *component = &jpeg->component[i];
        Axis across = horizontal(jpeg, component, box, columns), down = vertical(jpeg, component, box, rows);
        size_t num_y = ((size_t)component->num_y + 7) & ~(size_t)7;
        size_t taps = (size_t)(max_count(&across) > max_count(&down) ? max_count(&across) : max_count(&down));
        layout.lines[i] = rounded(width * num_y * sizeof(int16_t));
        layout.filters[i] = filter_bytes(&across) + filter_bytes(&down);
        most = taps > most ? taps : most;
        lines = num_y > lines ? num_y : lines;
        layout.total += layout.lines[i] + layout.filters[i];
    }
    layout.exact = rounded(most * sizeof(float));
    layout.group = rounded(GROUP * lines * sizeof(int16_t));
    layout.rows = 3 * width * sizeof(int16_t);
    layout.total += layout.exact + layout.group + layout.rows;
    return layout;
}

size_t jc_resize_bytes(const Jpeg *jpeg, const JcBox *box, int rows, int columns) {
    return layout_of(jpeg, box, rows, columns).total;
}

static int is_like_last(const Jpeg *jpeg, int i) {
    const JcComponent *component = &jpeg->component[i], *last = component - 1;
    return i > 0 && component->h == last->h && component->v == last->v;
}

void jc_resize(const Jpeg *jpeg, const JcBox *box, int rows, int columns, int channels, void *scratch, uint8_t *out) {
    Layout layout = layout_of(jpeg, box, rows, columns);
    size_t width = rounded((size_t)columns);
    float *exact = scratch;
    int16_t *group = (int16_t *)((char *)scratch + layout.exact), *lines[3], *row[3];
    char *memory = (char *)group + layout.group;
    Filter across[3], down[3];
    for (int i = 0; i < 3; i++, memory += width * sizeof(int16_t)) row[i] = (int16_t *)memory;
    for (int i = 0; i < wanted(jpeg); i++) {
        const JcComponent *component = &jpeg->component[i];
        Axis x_axis = horizontal(jpeg, component, box, columns), y_axis = vertical(jpeg, component, box, rows);
        lines[i] = (int16_t *)memory;
        memory += layout.lines[i];
        if (is_like_last(jpeg, i)) {
            across[i] = across[i - 1];
            down[i] = down[i - 1];
        } else {
            memory = make_filter(&across[i], &x_axis, memory, exact);
            memory = make_filter(&down[i], &y_axis, memory, exact);
        }
        resize_width(component, &across[i], columns, group, lines[i], width);
    }
    for (int y = 0; y < rows; y++, out += (size_t)columns * (size_t)channels) {
        for (int i = 0; i < wanted(jpeg); i++) {
            const int16_t *weight = down[i].weight + (size_t)y * (size_t)down[i].max_count;
            weighted_sum(row[i], lines[i] + (size_t)down[i].first[y] * width, width, weight, down[i].count[y], columns);
        }
        if (wanted(jpeg) == 3)
            colour_row(row[0], row[1], row[2], columns, out);
        else
            grey_row(row[0], columns, channels, out);
    }
}
