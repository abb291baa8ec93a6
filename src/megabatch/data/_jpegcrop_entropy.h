/* Reading Huffman symbols, inlined where they are used: the decoder spends most of its time here. */
#ifndef MEGABATCH_JPEGCROP_ENTROPY_H
#define MEGABATCH_JPEGCROP_ENTROPY_H

#include "_jpegcrop.h"

#include <string.h>

#define END_OF_BLOCK 64

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FROM_BIG_ENDIAN(word) __builtin_bswap64(word)
#else
#define FROM_BIG_ENDIAN(word) (word)
#endif

/* By value: a JcBits whose address is never taken stays in registers. */
JcBits jc_refill_slowly(JcBits bits);
uint32_t jc_long_code(uint64_t bits, const JcHuffman *table, int is_dc);

/* A value of `size` bits: those below half the range stand for negative numbers. */
JC_INLINE int extend(uint32_t raw, int size) {
    return raw < 1u << (size - 1) ? (int)raw - (1 << size) + 1 : (int)raw;
}

JC_INLINE void refill(JcBits *bits) {
    if (bits->end - bits->next >= 8) {
        uint64_t word;
        memcpy(&word, bits->next, 8);
        int has_ff = ((~word - 0x0101010101010101u) & word & 0x8080808080808080u) != 0;
        if (!has_ff) {
            bits->bits |= FROM_BIG_ENDIAN(word) >> bits->count;
            bits->next += (63 - bits->count) >> 3;
            bits->count |= 56;
            return;
        }
    }
    *bits = jc_refill_slowly(*bits);
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
    int size = entry >> 8 & 15;
    drop(bits, entry & 255);
    *advance = entry >> 12 & 127;
    *value = (int32_t)entry >> 19;
    if (size > 0) {
        *value = extend((uint32_t)(bits->bits >> (64 - size)), size);
        drop(bits, size);
    }
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
