/* Reading Huffman symbols, inlined where they are used: the decoder spends most of its time here. */
#ifndef MEGABATCH_JPEGCROP_ENTROPY_H
#define MEGABATCH_JPEGCROP_ENTROPY_H

#include "crop.h"

#include <string.h>

#define END_OF_BLOCK 64

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FROM_BIG_ENDIAN(word) __builtin_bswap64(word)
#else
#define FROM_BIG_ENDIAN(word) (word)
#endif

typedef struct {
    uint64_t bits;
    const uint8_t *next;
} JcRefilled;

/* All by value: a JcBits whose address is never taken stays in registers. */
JcRefilled jc_refill_slowly(uint64_t bits, int count, const uint8_t *next, JcScan *scan);
uint32_t jc_long_code(uint64_t bits, const JcHuffman *table, int is_dc);

/* At least 56 bits at hand, of which those after the data's end are zeros. */
JC_INLINE void refill(JcBits *bits) {
    uint64_t word = ~(uint64_t)0;
    if (bits->scan->end - bits->next >= 8) memcpy(&word, bits->next, 8);
    int has_ff = ((~word - 0x0101010101010101u) & word & 0x8080808080808080u) != 0;
    if (__builtin_expect(has_ff, 0)) {
        JcRefilled refilled = jc_refill_slowly(bits->bits, bits->count, bits->next, bits->scan);
        bits->bits = refilled.bits;
        bits->next = refilled.next;
    } else {
        bits->bits |= FROM_BIG_ENDIAN(word) >> bits->count;
        bits->next += (63 - bits->count) >> 3;
    }
    bits->count |= 56; /* whole bytes were added until no more went in */
}

JC_INLINE void drop(JcBits *bits, int count) {
    bits->bits <<= count;
    bits->count -= count;
}

/* The next symbol and its value; -1 on a code that is not in the table. Needs 32 bits at hand. */
JC_INLINE int read_symbol(JcBits *bits, const JcHuffman *table, int is_dc, int *advance, int *value) {
    uint32_t entry = table->lookup[bits->bits >> (64 - JC_LOOKUP_BITS)];
    if (__builtin_expect(entry == 0, 0)) {
        entry = jc_long_code(bits->bits, table, is_dc);
        if (entry == 0) return -1;
    }
    int length = entry & 255, size = entry >> 8 & 15;
    *value = (int32_t)entry >> 19;
    if (size > 0) {
        uint64_t raw = bits->bits << (length - size);
        int least = (int64_t)raw < 0 ? 0 : 1 - (1 << size); /* those below half the range stand for negative numbers */
        *value = (int)(raw >> (64 - size)) + least;
    }
    *advance = entry >> 12 & 127;
    drop(bits, length);
    return 0;
}

/* The DC value, which is coded as the difference from the last one. */
JC_INLINE int read_dc(JcBits *bits, const JcHuffman *table, int *prediction) {
    int advance, value;
    refill(bits);
    if (read_symbol(bits, table, 1, &advance, &value) < 0) return JC_DAMAGED;
    *prediction = (int16_t)(*prediction + value);
    return JC_OK;
}

/* The next coefficient: moves *k to it and gives its value, which is 0 only for a run of 16 zeros.
 * 1 at the block's end, -1 on damage. */
JC_INLINE int read_ac(JcBits *bits, const JcHuffman *table, int *k, int *value) {
    int advance;
    if (*k >= 63) return 1;
    if (bits->count < 32) refill(bits);
    if (read_symbol(bits, table, 0, &advance, value) < 0) return -1;
    *k += advance;
    if (*k < END_OF_BLOCK) return 0;
    return advance < END_OF_BLOCK ? -1 : 1; /* a run past the last coefficient is damage */
}

#endif
