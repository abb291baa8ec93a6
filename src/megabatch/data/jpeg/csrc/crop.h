/* Baseline JPEG decoder for crops: decodes only the blocks that a crop touches, then resizes them.
 *
 * Decoding has five stages, one C file each:
 *   header.c   markers and tables -> Jpeg; returns JC_UNSUPPORTED for all but plain baseline files
 *   entropy.c  Huffman codes -> the few nonzero coefficients of one block
 *   idct.c     coefficients -> 8, 4, 2 or 1 samples a side, stored in column-major planes
 *   filter.c   weights of the antialiased bilinear resize, chroma upsampling included
 *   resize.c   planes -> resized planes, colour conversion, interleaved bytes
 * crop.c calls them in order; sizes.c reads only the headers of many files. The input is untrusted: every read is bounded by the end of the data, every write by
 * sizes computed from the header. The only global state is one set of Huffman tables per thread.
 */
#ifndef MEGABATCH_JPEG_CROP_H
#define MEGABATCH_JPEG_CROP_H

#include <stddef.h>
#include <stdint.h>

/* On any status but JC_OK the caller falls back to a full decoder, which also decides whether the file is damaged. */
enum { JC_OK = 0, JC_UNSUPPORTED = 1, JC_DAMAGED = 2, JC_NO_MEMORY = 3, JC_BAD_BOX = 4 };

/* Huffman codes of up to this many bits are decoded by one table lookup. */
#define JC_LOOKUP_BITS 10

/* Hot loops are compiled once per x86-64 level (AVX-512, AVX2, baseline); the loader picks one for the processor. */
#if defined(JC_NO_CLONES) || !defined(__x86_64__) || !defined(__gnu_linux__) || defined(__clang__) || __GNUC__ < 12
#define JC_CLONES
#else
#define JC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

/* Rounds up to 64 bytes, so that every buffer keeps the alignment of the scratch memory. */
static inline size_t jc_rounded(size_t size) {
    return (size + 63) & ~(size_t)63;
}

/* Forced, because the AVX copies of a loop would otherwise call the baseline copy of the helper. */
#define JC_INLINE static inline __attribute__((always_inline))

typedef struct {
    uint32_t lookup[1 << JC_LOOKUP_BITS]; /* one symbol per entry; layout in entropy.c */
    uint32_t skip[1 << JC_LOOKUP_BITS];   /* several AC symbols per entry; layout in entropy.c */
    uint32_t limit[18];                   /* per code length: one past the last code, left-aligned in 16 bits */
    int32_t offset[17];                   /* per code length: index of the first symbol minus the first code */
    uint8_t spec[16 + 256];               /* number of codes per length, then the symbols, as in the file */
    int num_symbols;                      /* 0: not built */
} JcHuffman;

typedef struct {
    JcHuffman dc[4], ac[4];
} JcTables;

typedef struct {
    int h, v, id;             /* horizontal and vertical sampling factor, component identifier */
    int quant, dc, ac;        /* table numbers */
    int prediction;           /* last DC value */
    int side;                 /* block size after the inverse DCT: 8, 4, 2 or 1 samples; 0: component is skipped */
    int smooth;               /* 1: libjpeg upsamples this component by linear interpolation */
    int width, height;        /* of the whole component, in samples at that block size */
    int first_x, first_y;     /* coordinates of the plane's first sample within the component */
    int num_x, num_y;         /* samples in the plane */
    size_t stride;            /* samples from one column of the plane to the next */
    int16_t *plane;           /* column-major, 64 times the 8-bit value */
    float scale[64];          /* dequantisation and transform scale, in zigzag order */
} JcComponent;

typedef struct {
    const uint8_t *scan, *end; /* entropy-coded data */
    int width, height, num_components, h_max, v_max, restart_interval;
    int is_rgb;                /* the components are red, green and blue, not YCbCr */
    uint16_t quant[4][64];     /* in zigzag order */
    int has_quant[4];
    JcComponent component[3];
    JcTables *tables;
} Jpeg;

typedef struct {
    const uint8_t *end;
    int missing; /* zero bits supplied past the end of the data or past a marker */
} JcScan;

/* Bit reader. */
typedef struct {
    uint64_t bits;       /* the next bit is the most significant one */
    const uint8_t *next; /* first byte that is not in `bits` yet */
    int count;           /* valid bits in `bits` */
    JcScan *scan;
} JcBits;

/* The nonzero coefficients of one block; entry 0 is always the DC value, even if that is 0. */
typedef struct {
    int count;
    uint8_t position[64]; /* in zigzag order */
    int16_t value[64];
} JcBlock;

typedef struct {
    double top, left, height, width; /* in pixels of the whole image; edges may be fractional */
} JcBox;

/* One axis of a component's resize. A position is a pixel of the image, or, if the block size was reduced, a sample. */
typedef struct {
    double start, step, support; /* in positions: crop edge, output pixel, filter half-width */
    float inverse;               /* 1 / support */
    int most;                    /* upper bound of the positions under one triangle */
    int lowest, highest;         /* positions [lowest, highest) may be read */
    int factor, smooth;          /* positions per sample; 1: linear interpolation between samples */
    int first, end, last;        /* the plane's samples [first, end); the last sample of the whole component */
    int num;                     /* output pixels */
} JcAxis;

typedef struct {
    int *first;      /* first sample of each output pixel, counted from the plane's first */
    int *count;      /* number of samples of each output pixel */
    int16_t *weight; /* max_count weights per output pixel, fractions of 32768 */
    int max_count;
} JcFilter;

extern const uint8_t jc_zigzag[64];

int jc_read_header(Jpeg *jpeg, const uint8_t *data, size_t size, JcTables *tables);
int jc_huffman_build(JcHuffman *table, const uint8_t *spec, int num_symbols, int is_dc);

int jc_read_block(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, int *prediction, JcBlock *block);
int jc_skip_block(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, int *prediction);

void jc_idct_scale(float scale[64], const uint16_t quant[64], int side);
int jc_read_and_transform(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, JcComponent *component, int16_t *out);

JcAxis jc_axis_x(const Jpeg *jpeg, const JcComponent *component, const JcBox *box, int columns);
JcAxis jc_axis_y(const Jpeg *jpeg, const JcComponent *component, const JcBox *box, int rows);
size_t jc_filter_bytes(const JcAxis *axis);
size_t jc_exact_bytes(const JcAxis *axis);
char *jc_make_filter(JcFilter *filter, const JcAxis *axis, char *memory, float *exact);

size_t jc_resize_bytes(const Jpeg *jpeg, const JcBox *box, int rows, int columns);
void jc_resize(const Jpeg *jpeg, const JcBox *box, int rows, int columns, int channels, void *scratch, uint8_t *out);

#endif
