/* Sizes of many JPEGs, from their headers (ITU-T T.81, annex B): one call instead of several in Python per file.
 *
 * A size is given only for a file whose header libjpeg-turbo accepts without a warning, with one or three components of
 * 8 bits in grey or YCbCr, at usual sampling factors. Of every other file the size is 0 x 0, and the caller asks the
 * library. Baseline, extended and progressive files are known; nothing is decoded. */
#include "crop.h"

#include <string.h>

enum { SOF0 = 0xC0, SOF2 = 0xC2, DHT = 0xC4, RST0 = 0xD0, RST7 = 0xD7, SOI = 0xD8, EOI = 0xD9 };
enum { SOS = 0xDA, DQT = 0xDB, DRI = 0xDD, APP0 = 0xE0, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE };
enum { MAX_SIDE = 65500 }; /* of libjpeg, JPEG_MAX_DIMENSION */

typedef struct {
    int height, width, num_components; /* 0 before the frame's header */
    int restart_interval, num_scans;
    uint8_t id[3];
} Frame;

static int is_quant(const uint8_t *body, size_t size) {
    while (size > 0) {
        size_t needed = 1 + (body[0] >> 4 ? 128 : 64);
        if (body[0] >> 4 > 1 || (body[0] & 15) > 3 || size < needed) return 0;
        body += needed, size -= needed;
    }
    return 1;
}

static int is_huffman(const uint8_t *body, size_t size) {
    while (size > 0) {
        size_t symbols = 0;
        if (body[0] >> 4 > 1 || (body[0] & 15) > 3 || size < 17) return 0;
        for (int length = 1; length <= 16; length++) symbols += body[length];
        if (symbols > 256 || size < 17 + symbols) return 0;
        body += 17 + symbols, size -= 17 + symbols;
    }
    return 1;
}

/* SOF0 to SOF2. Of three components the last two have one sample where the first has 1, 2 x 1, 1 x 2, 2 x 2 or 4 x 1. */
static int read_frame(Frame *frame, const uint8_t *body, size_t size) {
    if (size < 6 || frame->num_components || body[0] != 8) return 0;
    int count = body[5];
    if ((count != 1 && count != 3) || size != 6 + 3 * (size_t)count) return 0;
    frame->height = body[1] << 8 | body[2];
    frame->width = body[3] << 8 | body[4];
    if (frame->height < 1 || frame->width < 1 || frame->height > MAX_SIDE || frame->width > MAX_SIDE) return 0;
    for (int i = 0; i < count; i++) {
        const uint8_t *entry = body + 6 + 3 * i;
        if (entry[2] > 3 || (entry[1] >> 4) < 1 || (entry[1] >> 4) > 4 || (entry[1] & 15) < 1 || (entry[1] & 15) > 4)
            return 0;
        for (int j = 0; j < i; j++)
            if (frame->id[j] == entry[0]) return 0;
        if (i > 0 && entry[1] != 0x11) return 0;
        frame->id[i] = entry[0];
    }
    int first = body[7];
    if (count == 3 && first != 0x11 && first != 0x21 && first != 0x12 && first != 0x22 && first != 0x41) return 0;
    frame->num_components = count;
    return count == 1 || frame->id[0] != 'R' || frame->id[1] != 'G' || frame->id[2] != 'B';
}

/* APP0 and APP14, of which the library warns if a version or a transform is unknown. */
static int is_usual_app(int marker, const uint8_t *body, size_t size) {
    if (marker == APP0 && size >= 14 && memcmp(body, "JFIF", 5) == 0) return body[5] == 1;
    if (marker == APP14 && size >= 12 && memcmp(body, "Adobe", 5) == 0) return body[11] == 1;
    return 1;
}

/* SOS: different components of the frame. */
static int is_scan(const Frame *frame, const uint8_t *body, size_t size) {
    if (size < 1 || body[0] < 1 || body[0] > frame->num_components || size != 4 + 2 * (size_t)body[0]) return 0;
    for (int i = 0; i < body[0]; i++) {
        int known = 0;
        for (int j = 0; j < frame->num_components; j++) known |= frame->id[j] == body[1 + 2 * i];
        for (int j = 0; j < i; j++) known &= body[1 + 2 * j] != body[1 + 2 * i];
        if (!known) return 0;
    }
    return 1;
}

static int read_segment(Frame *frame, int marker, const uint8_t *body, size_t size) {
    switch (marker) {
    case DQT: return is_quant(body, size);
    case DHT: return is_huffman(body, size);
    case SOS: return is_scan(frame, body, size);
    case DRI: frame->restart_interval = size == 2 ? body[0] << 8 | body[1] : 0; return size == 2;
    default:
        if (marker >= SOF0 && marker <= SOF2) return read_frame(frame, body, size);
        return marker == COM || (marker >= APP0 && marker <= APP15 && is_usual_app(marker, body, size));
    }
}

/* Passes entropy-coded data; returns the marker behind them, or the end. */
static const uint8_t *skip_scan(const Frame *frame, const uint8_t *at, const uint8_t *end) {
    while (end - at >= 2 && (at = memchr(at, 0xFF, (size_t)(end - at - 1))) != NULL) {
        int is_restart = frame->restart_interval && at[1] >= RST0 && at[1] <= RST7;
        if (at[1] != 0 && at[1] != 0xFF && !is_restart) return at;
        at += at[1] == 0xFF ? 1 : 2; /* FF FF: a fill byte */
    }
    return end;
}

/* Reads all segments up to the first SOS, or, if `whole`, up to the end marker. Returns 0 if any is unusual. */
static int read_sizes(Frame *frame, const uint8_t *data, size_t size, int whole) {
    const uint8_t *at = data + 2, *end = data + size;
    if (size < 4 || data[0] != 0xFF || data[1] != SOI) return 0;
    for (;;) {
        while (end - at >= 2 && at[0] == 0xFF && at[1] == 0xFF) at++; /* fill bytes */
        if (end - at < 2 || at[0] != 0xFF) return 0;
        int marker = at[1];
        if (marker == EOI) return frame->num_scans > 0;
        if (end - at < 4) return 0;
        size_t length = (size_t)(at[2] << 8 | at[3]);
        if (length < 2 || (size_t)(end - at) < 2 + length) return 0;
        if (!read_segment(frame, marker, at + 4, length - 2)) return 0;
        at += 2 + length;
        if (marker != SOS) continue;
        frame->num_scans++;
        if (!whole) return 1;
        at = skip_scan(frame, at, end);
    }
}

/* Writes height and width of each file to `out`, [count][2]: 0 and 0 if the header is not of the kind above, the image
 * has more than `max_pixels` pixels, or, with `whole`, the file has no end marker behind its scans. */
__attribute__((visibility("default"))) void megabatch_jpeg_sizes(
    const uint8_t *const *files, const size_t *sizes, int64_t count, int64_t max_pixels, int whole, int64_t *out) {
    for (int64_t i = 0; i < count; i++) {
        Frame frame = {0};
        int good = read_sizes(&frame, files[i], sizes[i], whole) && (int64_t)frame.height * frame.width <= max_pixels;
        out[2 * i] = good ? frame.height : 0;
        out[2 * i + 1] = good ? frame.width : 0;
    }
}
