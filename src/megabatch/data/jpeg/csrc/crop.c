/* Entry point: computes which blocks a crop needs, decodes those, resizes them. crop.h lists the stages. */
#include "crop.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RST0 = 0xD0, RST7 = 0xD7, EOI = 0xD9 };
enum { SMALL = 64 * 64 }; /* largest crop, in pixels, that crop_small decodes */

static _Thread_local JcTables tables; /* kept between images, so that equal Huffman tables are built once per thread */

/* Block size after the inverse DCT: the smallest at which the crop still has at least 1.5 times as many samples as
 * the output has pixels, in both directions. `surplus` is that ratio at 8 samples a side. A small transform cuts
 * frequencies off sharply; only with more samples than pixels does the resize filter hide this. */
static int side_of(double surplus) {
    return surplus >= 12 ? 1 : surplus >= 6 ? 2 : surplus >= 3 ? 4 : 8;
}

/* The plane's extent along one axis: whole blocks that cover the crop, and the pixels next to it if `smooth`, because
 * upsampling interpolates between samples. `ratio` is samples per pixel; `size` the component's samples, which the last
 * block may exceed. */
static void plan_axis(double start, double length, double ratio, int size, int side, int smooth, int *first, int *num) {
    int low = (int)floor(fmax(start - smooth, 0) * ratio) / side * side;
    int high = (int)ceil((start + length + smooth) * ratio);
    high = high < size ? high : size;
    *first = low;
    *num = (high - low + side - 1) / side * side;
}

/* True if libjpeg-turbo upsamples the component by interpolation: at the ratios (2, 1), (2, 2) and (1, 2). It repeats the
 * samples at all others, and of a component of one or two columns. */
static int is_smooth(const Jpeg *jpeg, const JcComponent *component) {
    int across = jpeg->h_max / component->h, down = jpeg->v_max / component->v;
    return (across == 2 && down <= 2 && component->width > 2) || (across == 1 && down == 2);
}

/* Sets block size, plane and scale of a component. The block size is chosen per component, because subsampled chroma
 * often needs a larger one than luma. */
static void plan_component(const Jpeg *jpeg, JcComponent *component, const JcBox *box, int rows, int columns) {
    double across = (double)component->h / jpeg->h_max, down = (double)component->v / jpeg->v_max;
    double surplus = fmin(box->width * across / columns, box->height * down / rows);
    int side = component->side = side_of(surplus);
    /* Dimensions are rounded up, first by subsampling (T.81, A.1.1), then by the reduced block size. */
    int samples_x = (jpeg->width * component->h + jpeg->h_max - 1) / jpeg->h_max;
    int samples_y = (jpeg->height * component->v + jpeg->v_max - 1) / jpeg->v_max;
    component->width = (samples_x * side + 7) / 8;
    component->height = (samples_y * side + 7) / 8;
    int smooth = component->smooth = side == 8 && is_smooth(jpeg, component);
    across *= side / 8.0, down *= side / 8.0;
    plan_axis(box->left, box->width, across, component->width, side, smooth, &component->first_x, &component->num_x);
    plan_axis(box->top, box->height, down, component->height, side, smooth, &component->first_y, &component->num_y);
    /* Columns are padded to 16 samples (32 bytes), so that all of them have the alignment of the first. */
    component->stride = ((size_t)component->num_y + 15) & ~(size_t)15;
    jc_idct_scale(component->scale, jpeg->quant[component->quant], side);
}

static size_t plane_bytes(const JcComponent *component) {
    return (size_t)component->num_x * component->stride * sizeof(int16_t);
}

/* The MCUs that the crop touches: columns [x0, x1), rows [y0, y1). `per_row` counts the MCUs of an image row. */
typedef struct {
    int x0, x1, y0, y1, per_row;
} Range;

/* Union over the components that are needed. */
static Range range_of(const Jpeg *jpeg, int num_wanted) {
    int width = 8 * jpeg->h_max;
    Range range = {.x0 = 1 << 20, .y0 = 1 << 20, .per_row = (jpeg->width + width - 1) / width};
    for (int i = 0; i < num_wanted; i++) {
        const JcComponent *c = &jpeg->component[i];
        /* An MCU holds h x v blocks of this component, `side` samples each. */
        int across = c->side * c->h, down = c->side * c->v;
        if (c->first_x / across < range.x0) range.x0 = c->first_x / across;
        if (c->first_y / down < range.y0) range.y0 = c->first_y / down;
        if ((c->first_x + c->num_x - 1) / across + 1 > range.x1) range.x1 = (c->first_x + c->num_x - 1) / across + 1;
        if ((c->first_y + c->num_y - 1) / down + 1 > range.y1) range.y1 = (c->first_y + c->num_y - 1) / down + 1;
    }
    return range;
}

/* Decodes a block into its component's plane, or skips it if it lies outside. This check keeps every write within the
 * plane, whatever the header says. */
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

/* Passes a restart marker, at which predictions and the bit buffer are reset. Returns JC_DAMAGED for anything but the
 * expected marker; the full decoder then takes over. */
static int restart(Jpeg *jpeg, JcBits *bits, int number) {
    const uint8_t *at = bits->next, *end = jpeg->end;
    /* Real bits left in the buffer: only the padding before the marker, less than a byte, is allowed. Fewer than none means
     * that blocks were made of missing bits. */
    int real = bits->count - bits->scan->missing;
    if (real < 0 || real >= 8) return JC_DAMAGED;
    while (end - at >= 2 && at[0] == 0xFF && at[1] == 0xFF) at++; /* fill bytes */
    if (end - at < 2 || at[0] != 0xFF || at[1] != RST0 + (number & 7)) return JC_DAMAGED;
    bits->scan->missing = 0;
    *bits = (JcBits){.next = at + 2, .scan = bits->scan};
    for (int i = 0; i < jpeg->num_components; i++) jpeg->component[i].prediction = 0;
    return JC_OK;
}

/* Looks for the marker that ends the scan, from `at` on. Any but the end marker means that the image was truncated, even
 * if the crop is complete, or has more scans. Bytes after the end marker belong to another image, or to none. */
static int find_end(const Jpeg *jpeg, const uint8_t *at) {
    while (jpeg->end - at >= 2 && (at = memchr(at, 0xFF, (size_t)(jpeg->end - at - 1))) != NULL) {
        int is_restart = jpeg->restart_interval && at[1] >= RST0 && at[1] <= RST7;
        if (at[1] == EOI) return JC_OK;
        if (at[1] != 0 && at[1] != 0xFF && !is_restart) return JC_DAMAGED;
        at += at[1] == 0xFF ? 1 : 2; /* FF FF: a fill byte */
    }
    return JC_DAMAGED;
}

/* Decodes the MCUs in `range` and skips those before them; of rows below the crop, only the end marker is looked for. */
static int decode_scan(Jpeg *jpeg, Range range) {
    JcScan scan = {.end = jpeg->end};
    JcBits bits = {.next = jpeg->scan, .scan = &scan};
    int left = jpeg->restart_interval, number = 0; /* MCUs before the next restart marker, and that marker's number */
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
        /* More bits were supplied than are left in the buffer, so some of these blocks were made of them. */
        if (scan.missing > bits.count) return JC_DAMAGED;
    }
    return find_end(jpeg, bits.next);
}

/* True for a non-empty box inside the image; false for NaN, because every comparison with it is. */
static int is_inside(const JcBox *box, const Jpeg *jpeg) {
    double slack = 1e-6; /* for boxes computed in floating point */
    return box->top >= 0 && box->top < jpeg->height && box->left >= 0 && box->left < jpeg->width &&
           box->height > 0 && box->width > 0 &&
           box->top + box->height <= jpeg->height + slack && box->left + box->width <= jpeg->width + slack;
}

/* The box of whole pixels around a box, at least one. */
static JcBox outward(const JcBox *box) {
    double top = floor(box->top), left = floor(box->left), slack = 1e-6;
    double bottom = ceil(box->top + box->height - slack), right = ceil(box->left + box->width - slack);
    return (JcBox){top, left, fmax(bottom - top, 1), fmax(right - left, 1)};
}

/* Decodes the box of the JPEG and resizes it to rows x columns x channels. */
static int crop(Jpeg *jpeg, const JcBox *box, int rows, int columns, int channels, uint8_t *out) {
    int num_wanted = channels == 1 ? 1 : jpeg->num_components; /* grey output needs luma only */
    size_t planes = 0;
    for (int i = 0; i < num_wanted; i++) {
        plan_component(jpeg, &jpeg->component[i], box, rows, columns);
        planes += plane_bytes(&jpeg->component[i]);
    }
    /* One allocation: the planes, then the resize buffers. */
    char *memory = malloc(planes + jc_resize_bytes(jpeg, box, rows, columns) + 64);
    if (memory == NULL) return JC_NO_MEMORY;
    char *plane = memory;
    for (int i = 0; i < num_wanted; i++) {
        jpeg->component[i].plane = (int16_t *)plane;
        plane += plane_bytes(&jpeg->component[i]);
    }
    int status = decode_scan(jpeg, range_of(jpeg, num_wanted));
    if (status == JC_OK) jc_resize(jpeg, box, rows, columns, channels, plane, out);
    free(memory);
    return status;
}

/* Resizes a box of interleaved pixels. */
static int resize_pixels(
    const uint8_t *pixels, int height, int width, const JcBox *box, int rows, int columns, int channels, uint8_t *out) {
    Jpeg image = {.width = width, .height = height, .num_components = channels, .h_max = 1, .v_max = 1, .is_rgb = 1};
    JcComponent plane = {.h = 1, .v = 1, .side = 8, .width = width, .height = height, .num_x = width, .num_y = height};
    plane.stride = ((size_t)height + 15) & ~(size_t)15;
    for (int i = 0; i < channels; i++) image.component[i] = plane;
    size_t bytes = jc_rounded(plane_bytes(&plane));
    char *memory = malloc((size_t)channels * bytes + jc_resize_bytes(&image, box, rows, columns) + 64);
    if (memory == NULL) return JC_NO_MEMORY;
    for (int i = 0; i < channels; i++) {
        int16_t *column = image.component[i].plane = (int16_t *)(memory + (size_t)i * bytes);
        for (int x = 0; x < width; x++, column += plane.stride) {
            const uint8_t *pixel = pixels + x * channels + i;
            for (int y = 0; y < height; y++, pixel += width * channels) column[y] = (int16_t)(*pixel << 6);
        }
    }
    jc_resize(&image, box, rows, columns, channels, memory + (size_t)channels * bytes, out);
    free(memory);
    return JC_OK;
}

/* Decodes a small box without resizing it, then resizes its pixels, so that saturated colours are clamped before they are
 * averaged, as in a full decoder. The smaller an image, the more of its pixels lie at edges, where that matters. */
static int crop_small(Jpeg *jpeg, const JcBox *box, int rows, int columns, int channels, uint8_t *out) {
    uint8_t pixels[3 * SMALL];
    JcBox whole = outward(box);
    int height = (int)whole.height, width = (int)whole.width;
    int status = crop(jpeg, &whole, height, width, channels, pixels);
    if (status != JC_OK) return status;
    JcBox inner = {box->top - whole.top, box->left - whole.left, box->height, box->width};
    return resize_pixels(pixels, height, width, &inner, rows, columns, channels, out);
}

/* Decodes the box (top, left, height, width) of the JPEG in `data`, resized to rows x columns x channels (1 or 3),
 * into `out`. Returns a JC_ status; `out` is undefined unless that is JC_OK. */
__attribute__((visibility("default"))) int megabatch_jpeg_crop(
    const uint8_t *data, size_t size, double top, double left, double height, double width, int rows, int columns,
    int channels, int64_t max_pixels, uint8_t *out) {
    Jpeg jpeg;
    JcBox box = {top, left, height, width};
    int status = jc_read_header(&jpeg, data, size, &tables);
    if (status != JC_OK) return status;
    if ((int64_t)jpeg.width * jpeg.height > max_pixels) return JC_UNSUPPORTED;
    if (!is_inside(&box, &jpeg) || rows < 1 || columns < 1) return JC_BAD_BOX;
    JcBox whole = outward(&box);
    int is_unscaled = whole.height == rows && whole.width == columns;
    if (whole.height * whole.width > SMALL || is_unscaled) return crop(&jpeg, &box, rows, columns, channels, out);
    return crop_small(&jpeg, &box, rows, columns, channels, out);
}

/* As megabatch_jpeg_crop for `count` files, boxes [count][4] and outputs behind each other; `done`: 1 where JC_OK. */
__attribute__((visibility("default"))) void megabatch_jpeg_crop_many(
    const uint8_t *const *files, const size_t *sizes, int64_t count, const double *boxes, int rows, int columns,
    int channels, int64_t max_pixels, uint8_t *out, uint8_t *done) {
    size_t bytes = (size_t)rows * (size_t)columns * (size_t)channels;
    for (int64_t i = 0; i < count; i++, boxes += 4, out += bytes)
        done[i] = megabatch_jpeg_crop(
                      files[i], sizes[i], boxes[0], boxes[1], boxes[2], boxes[3], rows, columns, channels, max_pixels,
                      out) == JC_OK;
}
