/* Huffman decoding of baseline blocks (ITU-T T.81, annex F.2), most symbols by one table lookup.
 *
 * The lookup table is indexed by the next 10 bits. An entry holds
 *   bits 0..7    number of bits to drop: those of the code and of the value
 *   bits 8..11   size: how many of them belong to the value (0: the value is in the entry)
 *   bits 12..18  advance: how far the coefficient index moves; 64 or more ends the block
 *   bits 19..31  the value, signed
 * An entry of 0 means that the code is longer than 10 bits or invalid: see jc_long_code.
 *
 * Blocks outside the crop need no values, so a second table skips several symbols at once. Its entry holds
 *   bits 0..7    number of bits to drop
 *   bits 8..15   advance of all the symbols together
 *   bits 16..    advance of all but the last: if that already ends the block, the entry does not apply
 */
#include "entropy.h"

#include <string.h>

static uint32_t entry_of(int drop, int size, int advance, int value) {
    return (uint32_t)drop | (uint32_t)size << 8 | (uint32_t)advance << 12 | (uint32_t)value << 19;
}

static int advance_of(int symbol, int is_dc) {
    if (is_dc) return 1;
    if ((symbol & 15) == 0 && symbol != 0xF0) return END_OF_BLOCK;
    return (symbol >> 4) + 1; /* a run of zeros, then the coefficient; 0xF0 is a run of 16 zeros */
}

/* Value bits to a signed value (T.81, F.2.2.1): those below 2^(size - 1) stand for negative values. */
static int extend(uint32_t raw, int size) {
    return raw < 1u << (size - 1) ? (int)raw - (1 << size) + 1 : (int)raw;
}

/* Sets all entries whose index begins with `code`. If the value's bits fit into the index too, the entry holds the
 * value; otherwise read_symbol takes them from the stream. */
static void fill_lookup(JcHuffman *table, uint32_t code, int length, int symbol, int is_dc) {
    int size = is_dc ? symbol : symbol & 15, free_bits = JC_LOOKUP_BITS - length;
    int advance = advance_of(symbol, is_dc);
    for (uint32_t rest = 0; rest < 1u << free_bits; rest++) {
        uint32_t entry = entry_of(length + size, size, advance, 0);
        if (size > 0 && size <= free_bits)
            entry = entry_of(length + size, 0, advance, extend(rest >> (free_bits - size), size));
        table->lookup[code << free_bits | rest] = entry;
    }
}

/* Combines all symbols that lie completely within the index bits, values included. */
static uint32_t skip_entry(const JcHuffman *table, uint32_t index) {
    uint32_t bits = 0, advance = 0, before = 0;
    while (bits < JC_LOOKUP_BITS && advance < END_OF_BLOCK) {
        /* The bits shifted in from the right are unknown; a symbol that would need them ends the loop. */
        uint32_t entry = table->lookup[index << bits & ((1 << JC_LOOKUP_BITS) - 1)];
        uint32_t length = entry & 255;
        if (entry == 0 || bits + length > JC_LOOKUP_BITS) break;
        before = advance;
        bits += length;
        advance += entry >> 12 & 127;
    }
    return bits | advance << 8 | before << 16;
}

/* Builds the decoding tables of one Huffman table. Consecutive images mostly have the same tables, so a table that
 * was built from an equal `spec` is reused. */
int jc_huffman_build(JcHuffman *table, const uint8_t *spec, int num_symbols, int is_dc) {
    size_t spec_size = 16 + (size_t)num_symbols;
    if (table->num_symbols == num_symbols && memcmp(table->spec, spec, spec_size) == 0) return JC_OK;
    table->num_symbols = 0; /* not valid until the end, so an error below cannot leave half a table in use */
    memset(table->spec, 0, sizeof table->spec);
    memcpy(table->spec, spec, spec_size);
    memset(table->lookup, 0, sizeof table->lookup);
    /* Canonical codes: consecutive within a length, and doubled from one length to the next (T.81, annex C). */
    uint32_t code = 0;
    int index = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->offset[length] = index - (int32_t)code;
        for (int i = 0; i < spec[length - 1]; i++, code++, index++) {
            int symbol = spec[16 + index];
            /* More codes than the length allows, or a DC difference of more than 11 bits. */
            if (code >= 1u << length || (is_dc && symbol > 11)) return JC_DAMAGED;
            if (length <= JC_LOOKUP_BITS) fill_lookup(table, code, length, symbol, is_dc);
        }
        table->limit[length] = code << (16 - length);
    }
    for (uint32_t index = 0; !is_dc && index < 1 << JC_LOOKUP_BITS; index++)
        table->skip[index] = skip_entry(table, index);
    table->num_symbols = num_symbols;
    return JC_OK;
}

/* Refills byte by byte: near the end of the data, and where there is an FF (FF 00 is the byte FF, anything else is a
 * marker). From a marker or the end on it supplies zeros and counts them in `missing`. */
JcRefilled jc_refill_slowly(uint64_t bits, int count, const uint8_t *next, JcScan *scan) {
    for (; count < 56; count += 8) {
        uint64_t byte = 0;
        int at_marker = next < scan->end && next[0] == 0xFF && (scan->end - next < 2 || next[1] != 0);
        if (next >= scan->end || at_marker) {
            scan->missing += 8;
        } else {
            byte = next[0];
            next += byte == 0xFF ? 2 : 1;
        }
        bits |= byte << (56 - count);
    }
    return (JcRefilled){bits, next};
}

/* Decodes a code of more than 10 bits; returns a lookup entry, or 0 if there is no such code. */
uint32_t jc_long_code(uint64_t bits, const JcHuffman *table, int is_dc) {
    uint32_t top = (uint32_t)(bits >> 48);
    for (int length = JC_LOOKUP_BITS + 1; length <= 16; length++) {
        if (top >= table->limit[length]) continue;
        /* The mask keeps the index within `spec` for any input. */
        int symbol = table->spec[16 + ((table->offset[length] + (int32_t)(top >> (16 - length))) & 255)];
        int size = is_dc ? symbol : symbol & 15;
        return entry_of(length + size, size, advance_of(symbol, is_dc), 0);
    }
    return 0;
}

/* Decodes the nonzero coefficients of one block. */
int jc_read_block(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, int *prediction, JcBlock *block) {
    JcBits local = *bits; /* a local copy can stay in registers */
    int k = 0, value, more, count = 1;
    if (read_dc(&local, dc, prediction) != JC_OK) return JC_DAMAGED;
    block->position[0] = 0;
    block->value[0] = (int16_t)*prediction;
    while ((more = read_ac(&local, ac, &k, &value)) == 0) {
        block->position[count] = (uint8_t)k;
        block->value[count] = (int16_t)value;
        count += value != 0; /* without a branch: a run of 16 zeros is overwritten by the next coefficient */
    }
    block->count = count;
    *bits = local;
    return more < 0 ? JC_DAMAGED : JC_OK;
}

/* Skips one AC symbol; returns how far it moves the coefficient index, or -1 for an invalid code. */
JC_INLINE int skip_symbol(JcBits *bits, const JcHuffman *table) {
    int advance, value;
    return read_symbol(bits, table, 0, &advance, &value) < 0 ? -1 : advance;
}

/* Steps over one block. Only the DC value is decoded, because later blocks are predicted from it. */
int jc_skip_block(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, int *prediction) {
    JcBits local = *bits;
    if (read_dc(&local, dc, prediction) != JC_OK) return JC_DAMAGED;
    for (int k = 0, advance; k < 63; k += advance) {
        if (local.count < 32) refill(&local);
        uint32_t run = ac->skip[local.bits >> (64 - JC_LOOKUP_BITS)];
        /* Take the whole run only if all its symbols belong to this block; a full block has no end-of-block code. */
        if (run != 0 && k + (int)(run >> 16) < 63) {
            drop(&local, run & 255);
            advance = run >> 8 & 255;
        } else {
            advance = skip_symbol(&local, ac);
            if (advance < 0) return JC_DAMAGED;
        }
        if (k + advance > 63 && advance < END_OF_BLOCK) return JC_DAMAGED;
    }
    *bits = local;
    return JC_OK;
}
