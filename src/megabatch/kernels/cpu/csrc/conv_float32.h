/* What convolutions of float32 images share: a word is one value. The including source has defined TARGET, FMA (sums,
 * a, b) and the sizes. */
typedef float Value;
enum { PER_WORD = 1 };
#include "conv_registers.h"

INLINE Sums add_products(Sums sums, Words words, Words word) { return FMA((Sums)words, (Sums)word, sums); }

INLINE void store_sums(Value *to, Sums sums) { *(SumsAnywhere *)to = sums; }

/* There is nothing to interleave: words are the values of one row. */
INLINE void interleave(const Value *even, const Value *odd, int64_t length, Value *words) {
    (void)odd;
    for (int64_t at = 0; at < length; at += VECTOR) store_sums(words + at, loaded_sums(even + at));
}
