/* Entry point: plan what a crop needs, decode that much, resize it. See crop.h for the map. */
#include "crop.h"

#include <math.h>
#include <stdlib.h>

enum { RST0 = 0xD0 };

static _Thread_local JcTables tables; /* so that equal Huffman tables are built once, not once an image */

/* The smallest transform that still gives the crop half as many samples again as the output has pixels, each way:
 * a small transform cuts frequencies off sharply, and only with samples to spare does the resize hide it. */
static int side_of(double surplus) {
    return surplus >= 12 ? 1 : surplus >= 6 ? 2 : surplus >= 3 ? 4 : 8;
}

static void plan_axis(double start, double length, double ratio, int size, int side, int *first, int *num) {
    int low = (int)floor(start * ratio) / side * side;
    int high = (int)ceil((start + length) * ratio);
    high = high < size ? high : size;
    *first = low;
    *num = (high - low + side - 1) / side * side;
}

static void plan_component(const Jpeg *jpeg, JcComponent *component, const JcBox *box, int rows, int columns) {
    double across = (double)component->h / jpeg->h_max, down = (double)component->v / jpeg->v_max;
    double surplus = fmin(box->width * across / columns, box->height * down / rows);
    int side = component->side = side_of(surplus);
    int samples_x = (jpeg->width * component->h + jpeg->h_max - 1) / jpeg->h_max;
    int samples_y = (jpeg->height * component->v + jpeg->v_max - 1) / jpeg->v_max;
    component->width = (samples_x * side + 7) / 8;
    component->height = (samples_y * side + 7) / 8;
    plan_axis(box->left, box->width, across * side / 8, component->width, side, &component->first_x, &component->num_x);
    plan_axis(box->top, box->height, down * side / 8, component->height, side, &component->first_y, &component->num_y);
    component->stride = ((size_t)component->num_y + 15) & ~(size_t)15;
    jc_idct_scale(component->scale, jpeg->quant[component->quant], side);
}

static size_t plane_bytes(const JcComponent *component) {
    return (size_t)component->num_x * component->stride * sizeof(int16_t);
}

/* Whole MCUs that the crop touches: columns [x0, x1), rows [y0, y1). */
typedef struct {
    int x0, x1, y0, y1, per_row;
} Range;

static Range range_of(const Jpeg *jpeg, int num_wanted) {
    int width = 8 * jpeg->h_max;
    Range range = {.x0 = 1 << 20, .y0 = 1 << 20, .per_row = (jpeg->width + width - 1) / width};
    for (int i = 0; i < num_wanted; i++) {
        const JcComponent *c = &jpeg->component[i];
        int across = c->side * c->h, down = c->side * c->v;
        if (c->first_x / across < range.x0) range.x0 = c->first_x / across;
        if (c->first_y / down < range.y0) range.y0 = c->first_y / down;
        if ((c->first_x + c->num_x - 1) / across + 1 > range.x1) range.x1 = (c->first_x + c->num_x - 1) / across + 1;
        if ((c->first_y + c->num_y - 1) / down + 1 > range.y1) range.y1 = (c->first_y + c->num_y - 1) / down + 1;
    }
    return range;
}

static int decode_block(const Jpeg *jpeg, JcComponent *component, JcBits *bits, int block_x, int block_y) {
    const JcHuffman *dc = &jpeg->tables->dc[component->dc], *ac = &jpeg->tables->ac[component->ac];
    int x = block_x * component->side - component->first_x, y = block_y * component->side - component->first_y;
    if (component->side == 0 || x < 0 || y < 0 || x >= component->num_x || y >= component->num_y)
        return jc_skip_block(bits, dc, ac, &component->prediction);
    int16_t *out = component->plane + (size_t)x * component->stride + (size_t)y;
    return jc_read_and_transform(bits, dc, ac, component, out);
}

static int skip_mcu(Jpeg *jpeg, JcBits *bits) {
    for (int i = 0; i < jpeg->num_components; i++) {
        JcComponent *component = &jpeg->component[i];
        const JcHuffman *dc = &jpeg->tables->dc[component->dc], *ac = &jpeg->tables->ac[component->ac];
        for (int n = component->h * component->v; n > 0; n--)
            if (jc_skip_block(bits, dc, ac, &component->prediction) != JC_OK) return JC_DAMAGED;
    }
    return JC_OK;
}

static int decode_mcu(Jpeg *jpeg, JcBits *bits, int mcu_x, int mcu_y) {
    for (int i = 0; i < jpeg->num_components; i++) {
        JcComponent *component = &jpeg->component[i];
        for (int y = 0; y < component->v; y++)
            for (int x = 0; x < component->h; x++)
                if (decode_block(jpeg, component, bits, mcu_x * component->h + x, mcu_y * component->v + y) != JC_OK)
                    return JC_DAMAGED;
    }
    return JC_OK;
}

/* A restart marker: predictions and bits begin anew. Anything but the expected one is left to the full library. */
static int restart(Jpeg *jpeg, JcBits *bits, int number) {
    const uint8_t *at = bits->next, *end = jpeg->end;
    if (bits->count - bits->scan->missing >= 8) return JC_DAMAGED;
    while (end - at >= 2 && at[0] == 0xFF && at[1] == 0xFF) at++;
    if (end - at < 2 || at[0] != 0xFF || at[1] != RST0 + (number & 7)) return JC_DAMAGED;
    bits->scan->missing = 0;
    *bits = (JcBits){.next = at + 2, .scan = bits->scan};
    for (int i = 0; i < jpeg->num_components; i++) jpeg->component[i].prediction = 0;
    return JC_OK;
}

static int decode_scan(Jpeg *jpeg, Range range) {
    JcScan scan = {.end = jpeg->end};
    JcBits bits = {.next = jpeg->scan, .scan = &scan};
    int left = jpeg->restart_interval, number = 0;
    for (int y = 0; y < range.y1; y++) {
        for (int x = 0; x < range.per_row; x++) {
            if (jpeg->restart_interval && left-- == 0) {
                if (restart(jpeg, &bits, number++) != JC_OK) return JC_DAMAGED;
                left = jpeg->restart_interval - 1;
            }
            int inside = y >= range.y0 && x >= range.x0 && x < range.x1;
            int status = inside ? decode_mcu(jpeg, &bits, x, y) : skip_mcu(jpeg, &bits);
            if (status != JC_OK) return status;
        }
        if (scan.missing > bits.count) return JC_DAMAGED; /* some of these rows' bits were invented */
    }
    return JC_OK;
}

static int is_inside(const JcBox *box, const Jpeg *jpeg) {
    double slack = 1e-6;
    return box->top >= 0 && box->left >= 0 && box->height > 0 && box->width > 0 &&
           box->top + box->height <= jpeg->height + slack && box->left + box->width <= jpeg->width + slack;
}

/* Write the crop `box` of the JPEG in `data`, resized to rows x columns x channels (1 or 3), to `out`. */
__attribute__((visibility("default"))) int megabatch_jpeg_crop(
    const uint8_t *data, size_t size, double top, double left, double height, double width, int rows, int columns,
    int channels, int64_t max_pixels, uint8_t *out) {
    Jpeg jpeg;
    JcBox box = {top, left, height, width};
    int status = jc_read_header(&jpeg, data, size, &tables);
    if (status != JC_OK) return status;
    if ((int64_t)jpeg.width * jpeg.height > max_pixels) return JC_UNSUPPORTED;
    if (!is_inside(&box, &jpeg) || rows < 1 || columns < 1) return JC_BAD_BOX;
    int num_wanted = channels == 1 ? 1 : jpeg.num_components;
    size_t planes = 0;
    for (int i = 0; i < num_wanted; i++) {
        plan_component(&jpeg, &jpeg.component[i], &box, rows, columns);
        planes += plane_bytes(&jpeg.component[i]);
    }
    char *memory = malloc(planes + jc_resize_bytes(&jpeg, &box, rows, columns) + 64);
    if (memory == NULL) return JC_NO_MEMORY;
    char *plane = memory;
    for (int i = 0; i < num_wanted; i++) {
        jpeg.component[i].plane = (int16_t *)plane;
        plane += plane_bytes(&jpeg.component[i]);
    }
    status = decode_scan(&jpeg, range_of(&jpeg, num_wanted));
    if (status == JC_OK) jc_resize(&jpeg, &box, rows, columns, channels, plane, out);
    free(memory);
    return status;
}
