/* All convolution kernels, for one type of values and one kind of registers. The including source defines:
 *
 *     TARGET                 attribute that compiles a function for the instructions used
 *     RUNS_HERE              1 if this processor supports them, else 0
 *     NAMED(part)            name of a public function
 *     Value, PER_WORD        type of values, and how many of them make a word of 32 bits
 *     VECTOR                 float32 sums in a register
 *     NARROW_TILE, WIDE_TILE most images of a tile with 1 and with 2 registers of lanes
 *     NARROW_AHEAD, WIDE_AHEAD  words of channels whose weights are in registers together, likewise
 *     ALIASED_TILE           most images at addresses that share lines of the first-level cache
 *     PANEL, PANEL_VECTORS   most sums, in registers, of a panel of the weight gradient, and most registers of lanes
 *     add_products(sums, words, word)        sums + products of each lane's word with the word that all lanes have
 *     interleave(even, odd, length, words)   packs `length` values, a multiple of VECTOR, of one or two rows as words
 *     store_sums(to, sums)                   rounds to Value */
#include "conv.h"

#ifdef HAS_VECTORS

/* Arguments of a call; `_ARGUMENTS` in megabatch/kernels/cpu/conv.py packs the same fields in the same order. */
typedef struct {
    int64_t count, height, width, inputs, outputs, taps_down, taps_across, out_height, out_width, stride, padding;
    int64_t threads;
    const Value *images, *weight, *gradient; /* x (count, height, width, inputs), weight, dy (count, ..., outputs) */
    Value *result;                           /* y, dx or dweight */
} Conv;

/* Channels side by side in the registers of a weight gradient; its number of tasks aimed at, the same for any number of
 * threads. */
enum { STRIP = PANEL_VECTORS * VECTOR, TASKS = 16 };

#include "conv_tiles.h"
#include "conv_panels.h"
#include "conv_taps.h"
#include "conv_weight.h"
#include "conv_few.h"

/* 1 if this processor supports the instructions used here, else 0. */
PUBLIC int NAMED(runs_here)(void) { return RUNS_HERE; }

/* result = y. Returns 0, or 1 if memory cannot be allocated. */
PUBLIC int NAMED(forward)(const Conv *conv) {
    return conv->inputs % VECTOR ? few_forward(conv) : run(conv, 0);
}

/* result = dx. Returns 0, or 1 if memory cannot be allocated. */
PUBLIC int NAMED(data_gradient)(const Conv *conv) { return run(conv, 1); }

/* result = dweight. Returns 0, or 1 if memory cannot be allocated. */
PUBLIC int NAMED(weight_gradient)(const Conv *conv) {
    return conv->inputs % VECTOR ? few_weight_gradient(conv) : weight_gradient(conv);
}

#else
PUBLIC int NAMED(runs_here)(void) { return 0; }
#endif
