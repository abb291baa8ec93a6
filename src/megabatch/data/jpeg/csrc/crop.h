/* Baseline JPEG, decoded only where a crop needs it, and resized on the way.
 *
 * A file passes four stages, one C file each:
 *   header.c   markers and tables -> Jpeg; says "unsupported" to all but plain baseline files
 *   entropy.c  Huffman codes -> the few nonzero coefficients of one block
 *   idct.c     coefficients -> 8, 4, 2 or 1 samples a side, kept column by column
 *   resize.c   planes -> antialiased bilinear resize, colour, interleaved bytes
 * and crop.c drives them. The input is never trusted: every read is bounded by the end of the data, every
 * write by the plan made from the header. No global state except one set of tables for each thread.
 */
#ifndef MEGABATCH_JPEGCROP_H
#define MEGABATCH_JPEGCROP_H

#include <stddef.h>
#include <stdint.h>

/* The caller decodes everything but JC_OK with a full library, which also has the last word on damage. */
enum { JC_OK = 0, JC_UNSUPPORTED = 1, JC_DAMAGED = 2, JC_NO_MEMORY = 3, JC_BAD_BOX = 4 };

#define JC_LOOKUP_BITS 10

/* The loops that take the time are compiled for newer processors too, and chosen when the library is loaded. */
#if defined(JC_NO_CLONES) || !defined(__x86_64__) || !defined(__gnu_linux__) || defined(__clang__) || __GNUC__ < 12
#define JC_CLONES
#else
#define JC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

/* Without this the copies for newer processors would call the plain one. */
#define JC_INLINE static inline __attribute__((always_inline))

typedef struct {
    uint32_t lookup[1 << JC_LOOKUP_BITS]; /* both: see entropy.c */
    uint32_t skip[1 << JC_LOOKUP_BITS];
    uint32_t limit[18];                   /* by length: first code above, left-aligned in 16 bits */
    int32_t offset[17];                   /* by length: index of its first symbol minus its first code */
    uint8_t spec[16 + 256];               /* number of codes by length, then the symbols, as in the file */
    int num_symbols;                      /* 0: not built */
} JcHuffman;

typedef struct {
    JcHuffman dc[4], ac[4];
} JcTables;

typedef struct {
    int h, v, id;             /* sampling factors, identifier */
    int quant, dc, ac;        /* table numbers */
    int prediction;           /* last DC value */
    int side;                 /* samples a block gives in each direction: 8, 4, 2, 1; 0: component not wanted */
    int width, height;        /* samples of the whole component at that side */
    int first_x, first_y;     /* sample at the plane's origin */
    int num_x, num_y;         /* samples in the plane */
    size_t stride;            /* from one column of the plane to the next */
    int16_t *plane;           /* column after column, samples times 64 */
    float scale[64];          /* dequantisation and transform scale, in zigzag order */
} JcComponent;

typedef struct {
    const uint8_t *scan, *end; /* entropy-coded data */
    int width, height, num_components, h_max, v_max, restart_interval;
    uint16_t quant[4][64];     /* in zigzag order */
    int has_quant[4];
    JcComponent component[3];
    JcTables *tables;
} Jpeg;

typedef struct {
    const uint8_t *end;
    int missing; /* bits invented after the data ended */
} JcScan;

/* The next bits of the scan, the first one on top. */
typedef struct {
    uint64_t bits;
    const uint8_t *next;
    int count;
    JcScan *scan;
} JcBits;

/* The nonzero coefficients of one block; the first is the DC value, even where that is 0. */
typedef struct {
    int count;
    uint8_t position[64]; /* in zigzag order */
    int16_t value[64];
} JcBlock;

typedef struct {
    double top, left, height, width; /* in pixels of the whole image; edges may lie inside a pixel */
} JcBox;

extern const uint8_t jc_zigzag[64];

int jc_read_header(Jpeg *jpeg, const uint8_t *data, size_t size, JcTables *tables);
int jc_huffman_build(JcHuffman *table, const uint8_t *spec, int num_symbols, int is_dc);

int jc_read_block(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, int *prediction, JcBlock *block);
int jc_skip_block(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, int *prediction);

void jc_idct_scale(float scale[64], const uint16_t quant[64], int side);
int jc_read_and_transform(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, JcComponent *component, int16_t *out);

size_t jc_resize_bytes(const Jpeg *jpeg, const JcBox *box, int rows, int columns);
void jc_resize(const Jpeg *jpeg, const JcBox *box, int rows, int columns, int channels, void *scratch, uint8_t *out);

#endif
