/* Inverse DCT of a sparse block to 8, 4, 2 or 1 samples a side.
 *
 * For side n, only the coefficients X(u, v) with u, v < n are used:
 *   x(i, j) = 1/4 sum_u sum_v C(u) C(v) X(u, v) cos((2i + 1) u pi / 2n) cos((2j + 1) v pi / 2n),  C(0) = 1/sqrt 2
 * In photographs about one coefficient in eight is nonzero. The vertical sum therefore runs over the nonzero ones and
 * adds one vector of a column's samples for each; the horizontal sum then combines whole column vectors, so nothing
 * is transposed.
 */
#include "entropy.h"

#include <string.h>

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef int16_t S8 __attribute__((vector_size(16)));
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef int16_t S4 __attribute__((vector_size(8)));

#define FIXED_POINT 64.0f                    /* samples are stored as 64 times the 8-bit value */
#define MIDDLE (128.0f * FIXED_POINT + 0.5f) /* JPEG's level shift, and rounding */
#define WHITE (255 * 64)

/* cos(k pi / 16) */
#define C1 0.980785280f
#define C2 0.923879533f
#define C3 0.831469612f
#define C4 0.707106781f
#define C5 0.555570233f
#define C6 0.382683432f
#define C7 0.195090322f

/* basis[v][j] = cos((2j + 1) v pi / 2n): the samples of a column for vertical frequency v. */
static const F8 basis8[8] = {
    {1, 1, 1, 1, 1, 1, 1, 1},         {C1, C3, C5, C7, -C7, -C5, -C3, -C1},
    {C2, C6, -C6, -C2, -C2, -C6, C6, C2}, {C3, -C7, -C1, -C5, C5, C1, C7, -C3},
    {C4, -C4, -C4, C4, C4, -C4, -C4, C4}, {C5, -C1, C7, C3, -C3, -C7, C1, -C5},
    {C6, -C2, C2, -C6, -C6, C2, -C2, C6}, {C7, -C5, C3, -C1, C1, -C3, C5, -C7}};

static const F4 basis4[4] = {{1, 1, 1, 1}, {C2, C6, -C6, -C2}, {C4, -C4, -C4, C4}, {C6, -C2, C2, -C6}};

/* Folds C(u) C(v) / 4, the quantiser step and the fixed-point factor into one factor per coefficient. It is zero for
 * frequencies that the block size cuts off. */
void jc_idct_scale(float scale[64], const uint16_t quant[64], int side) {
    for (int k = 0; k < 64; k++) {
        int u = jc_zigzag[k] & 7, v = jc_zigzag[k] >> 3;
        float norm = 0.25f * (u ? 1.0f : C4) * (v ? 1.0f : C4) * FIXED_POINT;
        scale[k] = u < side && v < side ? norm * (float)quant[k] : 0.0f;
    }
}

/* Level shift, rounding, clamping to [0, WHITE] without branches, narrowing to 16 bits. The vector is passed by
 * address, because the calling convention for 32-byte vectors depends on the processor and compilers warn about it. */
JC_INLINE void store8(const F8 *sample, int16_t *out) {
    const I8 white = {WHITE, WHITE, WHITE, WHITE, WHITE, WHITE, WHITE, WHITE};
    I8 fixed = __builtin_convertvector(*sample + MIDDLE, I8);
    fixed &= ~(fixed >> 31); /* negative -> 0 */
    I8 dark = fixed < white; /* all ones where true, so it selects below */
    S8 narrow = __builtin_convertvector((fixed & dark) | (white & ~dark), S8);
    memcpy(out, &narrow, sizeof narrow);
}

JC_INLINE void store4(F4 sample, int16_t *out) {
    const I4 white = {WHITE, WHITE, WHITE, WHITE};
    I4 fixed = __builtin_convertvector(sample + MIDDLE, I4);
    fixed &= ~(fixed >> 31);
    I4 dark = fixed < white;
    S4 narrow = __builtin_convertvector((fixed & dark) | (white & ~dark), S4);
    memcpy(out, &narrow, sizeof narrow);
}

/* As store8, for a single sample. */
static int16_t clamp(float sample) {
    sample += MIDDLE;
    return (int16_t)(sample < 0.0f ? 0.0f : sample > WHITE ? WHITE : sample);
}

/* A block with only a DC value has one colour. */
static void flat(float dc, int side, int16_t *out, size_t stride) {
    int16_t sample = clamp(dc);
    for (int x = 0; x < side; x++)
        for (int y = 0; y < side; y++) out[x * stride + y] = sample;
}

/* Horizontal sum: column[u] holds the samples of horizontal frequency u; writes eight columns of samples. Even
 * frequencies are symmetric about the middle and odd ones antisymmetric, so columns x and 7 - x share both halves. */
JC_INLINE void columns8(const F8 column[8], int16_t *out, size_t stride) {
    F8 middle = C4 * column[4], sum = column[0] + middle, difference = column[0] - middle;
    F8 wide = C2 * column[2] + C6 * column[6], narrow = C6 * column[2] - C2 * column[6];
    F8 even[4] = {sum + wide, difference + narrow, difference - narrow, sum - wide};
    F8 odd[4] = {C1 * column[1] + C3 * column[3] + C5 * column[5] + C7 * column[7],
                 C3 * column[1] - C7 * column[3] - C1 * column[5] - C5 * column[7],
                 C5 * column[1] - C1 * column[3] + C7 * column[5] + C3 * column[7],
                 C7 * column[1] - C5 * column[3] + C3 * column[5] - C1 * column[7]};
    for (int x = 0; x < 4; x++) {
        F8 near = even[x] + odd[x], far = even[x] - odd[x];
        store8(&near, out + (size_t)x * stride);
        store8(&far, out + (size_t)(7 - x) * stride);
    }
}

/* Decodes and transforms a block in one loop. Huffman decoding is latency-bound, since each symbol's position depends
 * on the one before; the vertical sum of the current coefficient overlaps with it and costs no extra time. */
JC_CLONES static int read_and_transform8(
    JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, JcComponent *component, int16_t *out) {
    JcBits local = *bits;
    const float *scale = component->scale;
    F8 column[8] = {0};
    int k = 0, value, more, lone = 1;
    if (read_dc(&local, dc, &component->prediction) != JC_OK) return JC_DAMAGED;
    float constant = (float)component->prediction * scale[0];
    column[0] = constant * basis8[0];
    for (; (more = read_ac(&local, ac, &k, &value)) == 0; lone = 0) {
        int natural = jc_zigzag[k]; /* 8 v + u */
        column[natural & 7] += ((float)value * scale[k]) * basis8[natural >> 3];
    }
    *bits = local;
    if (lone)
        flat(constant, 8, out, component->stride);
    else
        columns8(column, out, component->stride);
    return more < 0 ? JC_DAMAGED : JC_OK;
}

/* The scheme of the 8 x 8 transform with 4 x 4 coefficients. Columns 4..7 get the others, whose scale is 0. */
JC_CLONES static void idct4(const JcBlock *block, const float scale[64], int16_t *out, size_t stride) {
    F4 column[8] = {0};
    for (int i = 0; i < block->count; i++) {
        int k = block->position[i], natural = jc_zigzag[k];
        column[natural & 7] += ((float)block->value[i] * scale[k]) * basis4[natural >> 3 & 3];
    }
    F4 middle = C4 * column[2], sum = column[0] + middle, difference = column[0] - middle;
    F4 wide = C2 * column[1] + C6 * column[3], narrow = C6 * column[1] - C2 * column[3];
    store4(sum + wide, out);
    store4(difference + narrow, out + stride);
    store4(difference - narrow, out + 2 * stride);
    store4(sum - wide, out + 3 * stride);
}

static void idct2(const JcBlock *block, const float scale[64], int16_t *out, size_t stride) {
    float term[2][2] = {{0}}; /* [v][u] */
    for (int i = 0; i < block->count; i++) {
        int k = block->position[i], natural = jc_zigzag[k];
        if (scale[k] != 0.0f) term[natural >> 3][natural & 7] = (float)block->value[i] * scale[k];
    }
    for (int x = 0; x < 2; x++) {
        float sign = x ? -C4 : C4;
        float top = term[0][0] + sign * term[0][1], bottom = C4 * (term[1][0] + sign * term[1][1]);
        out[x * stride] = clamp(top + bottom);
        out[x * stride + 1] = clamp(top - bottom);
    }
}

/* Decodes one block and writes its side x side samples to `out`, a position in the component's plane. */
int jc_read_and_transform(JcBits *bits, const JcHuffman *dc, const JcHuffman *ac, JcComponent *component, int16_t *out) {
    if (component->side == 8) return read_and_transform8(bits, dc, ac, component, out);
    JcBlock block;
    if (jc_read_block(bits, dc, ac, &component->prediction, &block) != JC_OK) return JC_DAMAGED;
    if (block.count == 1 || component->side == 1)
        flat((float)block.value[0] * component->scale[0], component->side, out, component->stride);
    else if (component->side == 4)
        idct4(&block, component->scale, out, component->stride);
    else
        idct2(&block, component->scale, out, component->stride);
    return JC_OK;
}
