/* Registers of VECTOR lanes of 32 bits. The including source has defined TARGET, Value and VECTOR. */
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float Sums __attribute__((vector_size(4 * VECTOR)));
typedef int32_t Words __attribute__((vector_size(4 * VECTOR)));
typedef Words __attribute__((may_alias, aligned(2))) WordsAnywhere;
typedef Sums __attribute__((may_alias, aligned(4))) SumsAnywhere;

/* One word, repeated in all lanes. */
INLINE Words repeated(const Value *from) { return (Words){0} + *(const Word *)from; }
INLINE Words loaded(const Value *from) { return *(const WordsAnywhere *)from; }
INLINE Sums loaded_sums(const float *from) { return *(const SumsAnywhere *)from; }
