/* Bit reader and Huffman symbols. All inlined: the decoder spends most of its time here. */
#ifndef MEGABATCH_JPEG_ENTROPY_H
#define MEGABATCH_JPEG_ENTROPY_H

#include "crop.h"

#include <string.h>

/* An advance of at least this many coefficients ends the block. */
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

/* These take and return values: a JcBits whose address never reaches a function call stays in registers. */
JcRefilled jc_refill_slowly(uint64_t bits, int count, const uint8_t *next, JcScan *scan);
uint32_t jc_long_code(uint64_t bits, const JcHuffman *table, int is_dc);

/* Fills the buffer to at least 56 bits; past the end of the data they are zeros. */
JC_INLINE void refill(JcBits *bits) {
    /* All ones stands for "fewer than 8 bytes left": it contains FF, so the slow path handles it. */
    uint64_t word = ~(uint64_t)0;
    if (bits->scan->end - bits->next >= 8) memcpy(&word, bits->next, 8);
    /* Byte-parallel test for FF: a byte of ~word is zero where the byte of word is FF. An FF needs the slow path
     * because it is followed by a stuffed 00 or starts a marker. */
    int has_ff = ((~word - 0x0101010101010101u) & word & 0x8080808080808080u) != 0;
    if (__builtin_expect(has_ff, 0)) {
        JcRefilled refilled = jc_refill_slowly(bits->bits, bits->count, bits->next, bits->scan);
        bits->bits = refilled.bits;
        bits->next = refilled.next;
    } else {
        /* Part of the last byte may go in too; it is not counted, and the next refill writes the same bits again. */
        bits->bits |= FROM_BIG_ENDIAN(word) >> bits->count;
        bits->next += (63 - bits->count) >> 3;
    }
    bits->count |= 56; /* only whole bytes were added, so count modulo 8 is unchanged and count is now 56..63 */
}

/* Consumes `count` bits. */
JC_INLINE void drop(JcBits *bits, int count) {
    bits->bits <<= count;
    bits->count -= count;
}

/* Reads the next symbol and its value; returns -1 for a code that is not in the table. Needs 32 bits in the buffer:
 * 16 for the longest code, up to 15 for its value. */
JC_INLINE int read_symbol(JcBits *bits, const JcHuffman *table, int is_dc, int *advance, int *value) {
    uint32_t entry = table->lookup[bits->bits >> (64 - JC_LOOKUP_BITS)];
    if (__builtin_expect(entry == 0, 0)) {
        entry = jc_long_code(bits->bits, table, is_dc);
        if (entry == 0) return -1;
    }
    int length = entry & 255, size = entry >> 8 & 15;
    *value = (int32_t)entry >> 19;
    if (size > 0) { /* the value is not in the entry: its `size` bits follow the code */
        uint64_t raw = bits->bits << (length - size);
        /* A leading 0 bit marks a negative value, stored as value + 2^size - 1 (T.81, F.2.2.1, EXTEND). */
        int least = (int64_t)raw < 0 ? 0 : 1 - (1 << size);
        *value = (int)(raw >> (64 - size)) + least;
    }
    *advance = entry >> 12 & 127;
    drop(bits, length);
    return 0;
}

/* Reads a DC value, which is coded as the difference from that of the component's previous block. */
JC_INLINE int read_dc(JcBits *bits, const JcHuffman *table, int *prediction) {
    int advance, value;
    refill(bits);
    if (read_symbol(bits, table, 1, &advance, &value) < 0) return JC_DAMAGED;
    *prediction = (int16_t)(*prediction + value);
    return JC_OK;
}

/* Reads the next AC coefficient: moves *k to its index and sets its value, which is 0 only for a run of 16 zeros.
 * Returns 0, 1 at the end of the block, or -1 on damage. */
JC_INLINE int read_ac(JcBits *bits, const JcHuffman *table, int *k, int *value) {
    int advance;
    if (*k >= 63) return 1;
    if (bits->count < 32) refill(bits);
    if (read_symbol(bits, table, 0, &advance, value) < 0) return -1;
    *k += advance;
    if (*k < END_OF_BLOCK) return 0;
    return advance < END_OF_BLOCK ? -1 : 1; /* a run of zeros past the last coefficient is damage */
}

#endif
