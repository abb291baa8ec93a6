/* Convolutions of bfloat16 images, for processors with AVX-512 BF16. Its instruction VDPBF16PS adds a0 b0 + a1 b1 to
 * each of 16 float32 sums, for two words (a0, a1) and (b0, b1). */
#include "conv.h"

#define NAMED(part) megabatch_conv_bf16_##part
#ifdef HAS_VECTORS
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define RUNS_HERE                                                                          \
    (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&         \
     __builtin_cpu_supports("avx512vl"))

typedef uint16_t Value;
enum { PER_WORD = 2, VECTOR = 16, NARROW_TILE = 24, WIDE_TILE = 13, ALIASED_TILE = 24, NARROW_AHEAD = 4 };
enum { WIDE_AHEAD = 2, PANEL = 24, PANEL_VECTORS = 4 };
#include "conv_registers.h"

INLINE Sums add_products(Sums sums, Words words, Words word) {
    return _mm512_dpbf16_ps(sums, (__m512bh)words, (__m512bh)word);
}

INLINE void store_sums(Value *to, Sums sums) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(sums)); }

/* Packs two rows into words (even[i], odd[i]); `length` is a multiple of 16. */
INLINE void interleave(const Value *even, const Value *odd, int64_t length, Value *words) {
    /* Indices into the 64 values of both registers: 0 to 31 select from `first`, 32 to 63 from `second`. `low` pairs up
     * values 0 to 15 of each row, `high` values 16 to 31. */
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; length >= 32; length -= 32, even += 32, odd += 32, words += 64) {
        __m512i first = _mm512_loadu_si512(even), second = _mm512_loadu_si512(odd);
        _mm512_storeu_si512(words, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(words + 32, _mm512_permutex2var_epi16(first, high, second));
    }
    if (length) {
        __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)even));
        __m512i second = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)odd));
        _mm512_storeu_si512(words, _mm512_permutex2var_epi16(first, low, second));
    }
}
#endif
#include "conv_kernels.h"
