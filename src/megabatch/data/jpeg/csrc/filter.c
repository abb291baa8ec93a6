/* Weights of the antialiased bilinear resize of one component along one axis.
 *
 * The filter is a triangle whose half-width is one output pixel, and at least one position; it is cut off at the crop
 * and normalised, as in Pillow and in torch with `antialias=True`.
 *
 * libjpeg upsamples subsampled chroma to image pixels before anything is resized. Where the ratio is 2, it interpolates:
 *   p(2s) = 3/4 c(s) + 1/4 c(s - 1)      p(2s + 1) = 3/4 c(s) + 1/4 c(s + 1)      c beyond the edge: the last sample
 * and repeats samples for other ratios. Upsampling and resize are linear, so one filter on the samples does both: each
 * pixel's weight is spread over the samples that the pixel is made of. Planes of reduced blocks are not upsampled: they
 * have at least 1.5 samples per output pixel, and the resize hides the difference.
 */
#include "crop.h"

#include <math.h>
#include <string.h>

enum { MARGIN = 3 }; /* zeros on either side of a filter's pixel weights: a sample has up to four pixels */

/* floor, inline: without SSE4.1 the library's version is a function call. */
static int whole(double value) {
    int near = (int)value;
    return near - (value < near);
}

/* `sampling` and `most` are the sampling factors of the component and of the image. */
static JcAxis axis_of(double start, double length, int num, int sampling, int most, int side) {
    JcAxis axis = {.num = num, .factor = side == 8 ? most / sampling : 1};
    double ratio = side == 8 ? 1.0 : (double)(sampling * side) / (most * 8); /* positions per image pixel */
    axis.start = start * ratio;
    axis.step = length * ratio / num;
    axis.support = axis.step > 1.0 ? axis.step : 1.0;
    axis.inverse = (float)(1.0 / axis.support);
    axis.most = (int)ceil(axis.support) * 2 + 1;
    axis.lowest = whole(axis.start);
    axis.highest = (int)ceil((start + length) * ratio);
    return axis;
}

static void set_samples(JcAxis *axis, const JcComponent *component, int first, int num, int size, int pixels) {
    int limit = component->side == 8 ? pixels : size;
    if (axis->highest > limit) axis->highest = limit;
    axis->first = first;
    axis->end = first + num < size ? first + num : size; /* the last block may exceed the component */
    axis->last = size - 1;
    axis->smooth = component->smooth && axis->factor == 2;
}

JcAxis jc_axis_x(const Jpeg *jpeg, const JcComponent *c, const JcBox *box, int columns) {
    JcAxis axis = axis_of(box->left, box->width, columns, c->h, jpeg->h_max, c->side);
    set_samples(&axis, c, c->first_x, c->num_x, c->width, jpeg->width);
    return axis;
}

JcAxis jc_axis_y(const Jpeg *jpeg, const JcComponent *c, const JcBox *box, int rows) {
    JcAxis axis = axis_of(box->top, box->height, rows, c->v, jpeg->v_max, c->side);
    set_samples(&axis, c, c->first_y, c->num_y, c->height, jpeg->height);
    return axis;
}

/* Upper bound of the number of samples that the positions under one triangle are made of. */
static int max_count(const JcAxis *axis) {
    return axis->factor == 1 ? axis->most : axis->most / axis->factor + 3;
}

/* Size of `first`, `count` and `weight` of a filter. */
size_t jc_filter_bytes(const JcAxis *axis) {
    size_t num = (size_t)axis->num;
    return 2 * jc_rounded(num * sizeof(int)) + jc_rounded(num * (size_t)max_count(axis) * sizeof(int16_t));
}

/* Size of the buffer for the weights of one output pixel before they are rounded: on positions, then on samples. */
size_t jc_exact_bytes(const JcAxis *axis) {
    return jc_rounded((size_t)(axis->most + 2 * MARGIN + max_count(axis)) * sizeof(float));
}

/* Rounds weights to fractions of 32768 that sum to exactly 32768, so that flat areas keep their value; the one at `middle`,
 * a large one, absorbs the rounding error. A weight of 1 becomes 32767, the int16 maximum, which rounds to the same
 * sample. */
static void quantise(const float *exact, float total, int count, int middle, int16_t *weight) {
    int sum = 0;
    float unit = 32767.0f / total;
    for (int t = 0; t < count; t++) sum += weight[t] = (int16_t)(exact[t] * unit + 0.5f);
    int rest = 32768 - sum + weight[middle];
    weight[middle] = (int16_t)(rest < 32767 ? rest : 32767);
}

/* Triangle weights of an output pixel; sets the first position and their number, and returns their sum. */
static float triangle(const JcAxis *axis, double centre, float *weight, int *first, int *num) {
    int low = whole(centre - axis->support + 0.5), high = whole(centre + axis->support + 0.5);
    /* Cut off at the crop; at least one position stays, so that every index is valid. */
    if (low < axis->lowest) low = axis->lowest;
    if (high > axis->highest) high = axis->highest;
    if (low >= axis->highest) low = axis->highest - 1;
    if (high <= low) high = low + 1;
    if (high > low + axis->most) high = low + axis->most;
    float total = 0.0f, offset = (float)(low + 0.5 - centre);
    for (int t = 0; t < high - low; t++) {
        float height = 1.0f - fabsf(offset + (float)t) * axis->inverse;
        weight[t] = height > 0.0f ? height : 0.0f;
        total += weight[t];
    }
    *first = low, *num = high - low;
    if (total > 0.0f) return total;
    return weight[0] = 1.0f; /* no position under the triangle: take the nearest */
}

/* Turns weights of `num` pixels from `first` on into weights of samples. Returns the number of samples, and sets `first`
 * to the first of them. */
static int to_samples(const JcAxis *axis, float *pixel, int *first, int num, float *exact) {
    memset(pixel - MARGIN, 0, MARGIN * sizeof *pixel);
    memset(pixel + num, 0, MARGIN * sizeof *pixel);
    int low = (*first - axis->smooth) / axis->factor, high = (*first + num - 1 + axis->smooth) / axis->factor + 1;
    if (low < axis->first) low = axis->first;
    if (high > axis->end) high = axis->end;
    const float *own = pixel + (axis->factor * low - *first); /* pixels of the sample */
    for (int s = 0; s < high - low; s++, own += axis->factor) {
        float sum = own[0] + own[1];
        for (int i = 2; i < axis->factor; i++) sum += own[i];
        exact[s] = axis->smooth ? 0.75f * sum + 0.25f * (own[-1] + own[2]) : sum;
    }
    /* The image's first and last pixel have no sample beyond the edge; theirs takes that part too. */
    if (axis->smooth && low == 0) exact[0] += 0.25f * pixel[-*first];
    if (axis->smooth && high > axis->last) exact[axis->last - low] += 0.25f * own[-1];
    *first = low;
    return high - low;
}

/* Computes a filter into `memory` and returns the first byte after it. `exact` is a buffer of jc_exact_bytes. */
char *jc_make_filter(JcFilter *filter, const JcAxis *axis, char *memory, float *exact) {
    size_t num = (size_t)axis->num;
    float *pixel = exact + max_count(axis) + MARGIN;
    filter->max_count = max_count(axis);
    filter->first = (int *)memory;
    filter->count = (int *)(memory + jc_rounded(num * sizeof(int)));
    filter->weight = (int16_t *)(memory + 2 * jc_rounded(num * sizeof(int)));
    for (int j = 0; j < axis->num; j++) {
        int first, count;
        double centre = axis->start + (j + 0.5) * axis->step;
        float total = triangle(axis, centre, pixel, &first, &count);
        if (axis->factor > 1) count = to_samples(axis, pixel, &first, count, exact);
        int16_t *weight = filter->weight + (size_t)j * (size_t)filter->max_count;
        quantise(axis->factor > 1 ? exact : pixel, total, count, count / 2, weight);
        filter->first[j] = first - axis->first;
        filter->count[j] = count;
    }
    return memory + jc_filter_bytes(axis);
}
