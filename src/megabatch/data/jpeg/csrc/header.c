/* Parses the markers and tables of a baseline JPEG (ITU-T T.81, annex B). */
#include "crop.h"

#include <string.h>

/* Zigzag index -> row-major index 8 v + u of the coefficient. */
const uint8_t jc_zigzag[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

enum { SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, SOI = 0xD8, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD };
enum { APP0 = 0xE0, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE };

/* DQT, which may define several tables: a byte with precision and slot, then 64 values of 8 or 16 bits. */
static int read_quant(Jpeg *jpeg, const uint8_t *body, size_t size) {
    while (size > 0) {
        int wide = body[0] >> 4, slot = body[0] & 15;
        size_t needed = 1 + (wide ? 128 : 64);
        if (wide > 1 || slot > 3 || size < needed) return JC_DAMAGED;
        for (int k = 0; k < 64; k++)
            jpeg->quant[slot][k] = wide ? (uint16_t)(body[1 + 2 * k] << 8 | body[2 + 2 * k]) : body[1 + k];
        jpeg->has_quant[slot] = 1;
        body += needed;
        size -= needed;
    }
    return JC_OK;
}

/* DHT, which may define several tables: a byte with class and slot, 16 counts by code length, then the symbols.
 * `defined` gets one bit per table, because `tables` may still hold those of an earlier image. */
static int read_huffman(Jpeg *jpeg, const uint8_t *body, size_t size, unsigned *defined) {
    while (size > 0) {
        int is_dc = body[0] >> 4 == 0, slot = body[0] & 15, num_symbols = 0;
        if (body[0] >> 4 > 1 || slot > 3 || size < 17) return JC_DAMAGED;
        for (int length = 1; length <= 16; length++) num_symbols += body[length];
        /* `spec` has room for 256 symbols, and the symbols must lie within the segment. */
        if (num_symbols > 256 || size < 17 + (size_t)num_symbols) return JC_DAMAGED;
        JcHuffman *table = is_dc ? &jpeg->tables->dc[slot] : &jpeg->tables->ac[slot];
        if (jc_huffman_build(table, body + 1, num_symbols, is_dc) != JC_OK) return JC_DAMAGED;
        *defined |= 1u << (is_dc ? slot : 4 + slot);
        body += 17 + num_symbols;
        size -= 17 + (size_t)num_symbols;
    }
    return JC_OK;
}

/* SOF0 or SOF1: precision, height, width, number of components, then 3 bytes per component. */
static int read_frame(Jpeg *jpeg, const uint8_t *body, size_t size) {
    if (size < 6 || jpeg->num_components) return JC_DAMAGED; /* too short, or a second frame */
    int count = body[5];
    jpeg->height = body[1] << 8 | body[2];
    jpeg->width = body[3] << 8 | body[4];
    if (body[0] != 8 || (count != 1 && count != 3)) return JC_UNSUPPORTED;
    if (jpeg->height == 0 || jpeg->width == 0) return JC_UNSUPPORTED; /* height 0: a DNL marker gives it later */
    if (size != 6 + 3 * (size_t)count) return JC_DAMAGED;
    jpeg->num_components = count;
    for (int i = 0; i < count; i++) {
        JcComponent *component = &jpeg->component[i];
        const uint8_t *entry = body + 6 + 3 * i;
        component->id = entry[0];
        component->h = entry[1] >> 4;
        component->v = entry[1] & 15;
        component->quant = entry[2];
        if (component->h < 1 || component->h > 4 || component->v < 1 || component->v > 4) return JC_DAMAGED;
        if (component->quant > 3) return JC_DAMAGED;
        /* A single component is never interleaved: its blocks are in raster order and its factors do not matter. */
        if (count == 1) component->h = component->v = 1;
        if (component->h > jpeg->h_max) jpeg->h_max = component->h;
        if (component->v > jpeg->v_max) jpeg->v_max = component->v;
    }
    return JC_OK;
}

/* Accepts grey and YCbCr with integer subsampling ratios. A file is RGB if Adobe's APP14 segment gives transform 0, or
 * if the component identifiers spell RGB. */
static int check_frame(const Jpeg *jpeg, int adobe_transform) {
    const JcComponent *component = jpeg->component;
    for (int i = 0; i < jpeg->num_components; i++)
        if (jpeg->h_max % component[i].h || jpeg->v_max % component[i].v) return JC_UNSUPPORTED;
    if (jpeg->num_components == 1) return JC_OK;
    int ids_say_rgb = component[0].id == 'R' && component[1].id == 'G' && component[2].id == 'B';
    return adobe_transform == 0 || ids_say_rgb ? JC_UNSUPPORTED : JC_OK;
}

/* DRI: MCUs between restart markers, or 0 for none. */
static int read_interval(Jpeg *jpeg, const uint8_t *body, size_t size) {
    if (size != 2) return JC_DAMAGED;
    jpeg->restart_interval = body[0] << 8 | body[1];
    return JC_OK;
}

/* SOS: which Huffman tables each component uses. The entropy-coded data follow it. */
static int read_scan(Jpeg *jpeg, const uint8_t *body, size_t size, unsigned defined) {
    int count = jpeg->num_components;
    if (count == 0 || size < 1) return JC_DAMAGED;
    if (body[0] != count) return JC_UNSUPPORTED; /* one scan per component, not interleaved */
    if (size != 4 + 2 * (size_t)count) return JC_DAMAGED;
    /* First and last coefficient and bit positions: fixed in baseline files. */
    const uint8_t *spectrum = body + 1 + 2 * count;
    if (spectrum[0] != 0 || spectrum[1] != 63 || spectrum[2] != 0) return JC_UNSUPPORTED;
    for (int i = 0; i < count; i++) {
        JcComponent *component = &jpeg->component[i];
        if (body[1 + 2 * i] != component->id) return JC_UNSUPPORTED;
        component->dc = body[2 + 2 * i] >> 4;
        component->ac = body[2 + 2 * i] & 15;
        if (component->dc > 3 || component->ac > 3) return JC_DAMAGED;
        /* Every table in use must come from this file: those of an earlier image would decode to noise. */
        unsigned needed = 1u << component->dc | 1u << (4 + component->ac);
        if ((defined & needed) != needed || !jpeg->has_quant[component->quant]) return JC_DAMAGED;
    }
    jpeg->scan = body + size;
    return JC_OK;
}

/* Segments of a baseline file. The others are reserved, or belong to progressive, lossless and arithmetic coding. */
static int is_baseline(int marker) {
    return marker == SOF0 || marker == SOF1 || marker == DHT || (marker >= SOS && marker <= DRI) ||
           (marker >= APP0 && marker <= APP15) || marker == COM;
}

/* FF FF is a fill byte before a marker, FF 00 is no marker. */
static int is_marker(const uint8_t *at) {
    return at[0] == 0xFF && at[1] != 0xFF && at[1] != 0;
}

/* Reads all segments up to and including SOS. `tables` persists between calls; see jc_huffman_build. */
int jc_read_header(Jpeg *jpeg, const uint8_t *data, size_t size, JcTables *tables) {
    const uint8_t *next = data + 2, *end = data + size;
    int adobe_transform = -1; /* no APP14 segment seen */
    unsigned defined = 0;     /* bits 0..3: DC tables, 4..7: AC tables */
    memset(jpeg, 0, sizeof *jpeg);
    jpeg->tables = tables;
    if (size < 4 || data[0] != 0xFF || data[1] != SOI) return JC_UNSUPPORTED;
    for (;;) {
        /* Skip fill bytes, and stray bytes between segments, which are harmless. */
        while (end - next >= 4 && !is_marker(next)) next++;
        if (end - next < 4) return JC_DAMAGED;
        int marker = next[1];
        size_t length = (size_t)(next[2] << 8 | next[3]);
        if (!is_baseline(marker)) return JC_UNSUPPORTED;
        /* The length counts its own two bytes, and the segment must lie within the data. */
        if (length < 2 || (size_t)(end - next) < 2 + length) return JC_DAMAGED;
        const uint8_t *body = next + 4;
        size_t body_size = length - 2;
        int status = JC_OK;
        if (marker == DQT) status = read_quant(jpeg, body, body_size);
        if (marker == DHT) status = read_huffman(jpeg, body, body_size, &defined);
        if (marker == SOF0 || marker == SOF1) status = read_frame(jpeg, body, body_size);
        if (marker == DRI) status = read_interval(jpeg, body, body_size);
        if (marker == APP14 && body_size >= 12 && memcmp(body, "Adobe", 5) == 0) adobe_transform = body[11];
        if (marker == SOS) status = read_scan(jpeg, body, body_size, defined);
        if (status != JC_OK) return status;
        if (marker == SOS) break;
        next += 2 + length;
    }
    jpeg->end = end;
    return check_frame(jpeg, adobe_transform);
}
