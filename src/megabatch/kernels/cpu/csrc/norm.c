/* Batch norm over spans, residual and ReLU on a CPU, for float32 or bfloat16 channels_last images.
 *
 * With h = (x - mean) rstd and rstd = 1 / sqrt(biased variance + eps), per span of n rows and per channel:
 *
 *     y  = relu(weight h + bias + residual)
 *     dz = dy where y > 0;   dbias = sum dz;   dweight = sum dz h          over all spans
 *     dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)                sums over one span
 *
 * Images are a row-major matrix of rows (samples x pixels) and channels. Forward runs two passes over it: moments, then
 * normalise; backward too: sums, then gradient. Threads meet at a barrier between passes, where the sums of parts are
 * combined. A part has a fixed number of rows, and parts are added in a fixed order, so results depend on neither the
 * number of threads nor their timing. In the second pass a thread handles the parts that it had in the first, in
 * reverse order: the last ones are still in its cache. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Compiles a function once per instruction set (AVX-512, AVX2, baseline); the loader selects one at load time. */
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(NO_CLONES)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define PUBLIC __attribute__((visibility("default")))

/* Values of a part, which bounds cache use; and the row length, in values, from which loops over it run at full
 * speed. */
enum { PART_VALUES = 1 << 16, WIDE_ENOUGH = 256 };

/* How a matrix is divided into spans, and spans into parts. `fold` consecutive rows are treated as one row of
 * width = fold * channels values, since loops over as few as 16 channels would be too short to vectorise well. */
typedef struct {
    int64_t rows, span_rows, spans, part_rows, parts; /* in folded rows; `parts` is that of a whole span */
    int64_t channels, width;
} Cut;

static Cut cut_of(int64_t rows, int64_t span_rows, int64_t channels) {
    int64_t fold = 1; /* a power of two that divides every span, also a short last one */
    while (2 * fold * channels <= WIDE_ENOUGH && rows % (2 * fold) == 0 && span_rows % (2 * fold) == 0) fold *= 2;
    Cut cut = {.rows = rows / fold, .span_rows = span_rows / fold, .channels = channels, .width = fold * channels};
    cut.spans = (cut.rows + cut.span_rows - 1) / cut.span_rows;
    cut.part_rows = PART_VALUES / cut.width > 8 ? PART_VALUES / cut.width : 8;
    cut.parts = (cut.span_rows + cut.part_rows - 1) / cut.part_rows;
    return cut;
}

/* Rows of a part of a span; count is 0 for parts that a short last span does not have. */
typedef struct {
    int64_t first, count;
} Rows;

static Rows part_of(const Cut *cut, int64_t span, int64_t part) {
    int64_t first = span * cut->span_rows + part * cut->part_rows;
    int64_t end = span * cut->span_rows + (part + 1) * cut->part_rows;
    int64_t span_end = (span + 1) * cut->span_rows;
    if (end > span_end) end = span_end;
    if (end > cut->rows) end = cut->rows;
    return (Rows){first, end > first ? end - first : 0};
}

static Rows span_of(const Cut *cut, int64_t span) {
    int64_t first = span * cut->span_rows, left = cut->rows - first;
    return (Rows){first, left < cut->span_rows ? left : cut->span_rows};
}

static inline float wide_f32(float value) { return value; }
static inline float narrow_f32(float value) { return value; }

static inline float wide_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Rounds to nearest, ties to even: adds just under half a unit in the last place, or exactly half if the last kept bit
 * is 1, and truncates. NaN is handled apart, as the addition could carry into its sign. */
static inline uint16_t narrow_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

/* The passes, once for each type of values. */
#define TYPE float
#define NAMED(name) name##_f32
#define WIDE wide_f32
#define NARROW narrow_f32
#include "norm_passes.h"
#undef TYPE
#undef NAMED
#undef WIDE
#undef NARROW
#define TYPE uint16_t
#define NAMED(name) name##_bf16
#define WIDE wide_bf16
#define NARROW narrow_bf16
#include "norm_passes.h"

/* Arguments of a call; `_ARGUMENTS` in megabatch/kernels/cpu/batch_norm.py packs the same fields in the same order.
 * Optional pointers are NULL. `output` is y, given only where dy must be masked by it; `dz` is then written too. */
typedef struct {
    int64_t is_bf16, rows, span_rows, channels, relu, threads;
    double eps;
    const void *x, *residual, *dy, *output; /* (rows, channels) */
    void *y, *dz, *dx;                      /* likewise */
    const float *weight, *bias;             /* (channels) */
    float *mean, *variance, *rstd;          /* (spans, channels); `variance` is unbiased, rstd uses the biased one */
    float *dweight, *dbias;                 /* (channels) */
    float *first, *total; /* (2 channels + 1), `SpanSums`: means, variances, count; of the first span, of all spans */
} Norm;

/* Temporary memory of a call. `partials` (spans, parts, 2, width): the two sums of each part. `vectors` (spans, 5,
 * width): what the second pass reads per channel: mean, scale, bias, mean of dz, mean of dz (x - mean) rstd^2, each
 * repeated for every fold of a row. */
typedef struct {
    float *partials, *vectors;
} Scratch;

static int allocate_scratch(Scratch *scratch, const Cut *cut) {
    scratch->partials = malloc(cut->spans * cut->parts * 2 * cut->width * sizeof(float));
    scratch->vectors = malloc(cut->spans * 5 * cut->width * sizeof(float));
    return scratch->partials && scratch->vectors;
}

static void free_scratch(Scratch *scratch) {
    free(scratch->partials);
    free(scratch->vectors);
}

static float *partials_of(const Scratch *scratch, const Cut *cut, int64_t part) {
    return scratch->partials + part * 2 * cut->width;
}

static float *vectors_of_span(const Scratch *scratch, const Cut *cut, int64_t span) {
    return scratch->vectors + span * 5 * cut->width;
}

/* Writes a channel's value to every fold of a row. */
static void write_folded(float *row, const Cut *cut, int64_t channel, float value) {
    for (int64_t at = channel; at < cut->width; at += cut->channels) row[at] = value;
}

/* Writes a channel's mean, scale = weight rstd, and bias to the first three rows of a span's vectors. */
static void write_affine(const Norm *norm, const Cut *cut, float *vectors, int64_t span, int64_t channel) {
    int64_t target = span * cut->channels + channel;
    write_folded(vectors, cut, channel, norm->mean[target]);
    write_folded(vectors + cut->width, cut, channel, norm->weight[channel] * norm->rstd[target]);
    write_folded(vectors + 2 * cut->width, cut, channel, norm->bias[channel]);
}

/* n: values per channel in these rows. */
static double count_of(const Cut *cut, Rows rows) { return (double)rows.count * (double)(cut->width / cut->channels); }

/* Combines the moments of a span's parts, and of the folds of a row, for one channel, in float64:
 *
 *     n = sum n_p,  m = sum n_p m_p / n,  M2 = sum M2_p + n_p (m_p - m)^2     (Chan, Golub and LeVeque 1979) */
static void combine_moments(const Norm *norm, const Cut *cut, const float *partials, int64_t span, int64_t channel) {
    double count = count_of(cut, span_of(cut, span)), total = 0, m2 = 0;
    for (int64_t part = 0; part < cut->parts; part++)
        for (int64_t at = channel; at < cut->width; at += cut->channels)
            total += (double)part_of(cut, span, part).count * partials[part * 2 * cut->width + at];
    double mean = total / count;
    for (int64_t part = 0; part < cut->parts; part++)
        for (int64_t at = channel; at < cut->width; at += cut->channels) {
            const float *pair = partials + part * 2 * cut->width + at;
            double difference = pair[0] - mean;
            m2 += pair[cut->width] + (double)part_of(cut, span, part).count * difference * difference;
        }
    int64_t target = span * cut->channels + channel;
    norm->mean[target] = (float)mean;
    norm->variance[target] = (float)(m2 / (count > 1 ? count - 1 : 1));
    /* If squares overflowed, an rstd of 0 would turn a diverged network into a constant; NaN makes it visible. */
    norm->rstd[target] = isfinite(m2) ? (float)(1 / sqrt(m2 / count + norm->eps)) : NAN;
}

/* Adds a channel's statistics, summed over all spans, to `total`; copies those of the first span to an empty
 * `first`. */
static void add_to_sums(const Norm *norm, const Cut *cut, int first_is_empty, int64_t channel) {
    const float *statistics[] = {norm->mean + channel, norm->variance + channel};
    for (int which = 0; which < 2; which++) {
        float sum = 0;
        for (int64_t span = 0; span < cut->spans; span++) sum += statistics[which][span * cut->channels];
        norm->total[which * cut->channels + channel] += sum;
        if (first_is_empty) norm->first[which * cut->channels + channel] = *statistics[which];
    }
}

/* Combines a span's sums of dz and of dz (x - mean) over its parts, for one channel: adds them to dbias and dweight,
 * and writes their means to the last two vectors, for the second pass. dz h = dz (x - mean) rstd, and h in dx brings in
 * a second rstd. */
static void combine_sums(const Norm *norm, const Cut *cut, const float *partials, float *vectors, int64_t span,
                         int64_t channel) {
    double sum_dz = 0, sum_product = 0, count = count_of(cut, span_of(cut, span));
    double rstd = norm->rstd[span * cut->channels + channel];
    for (int64_t part = 0; part < cut->parts; part++)
        for (int64_t at = channel; at < cut->width; at += cut->channels) {
            sum_dz += partials[part * 2 * cut->width + at];
            sum_product += partials[(part * 2 + 1) * cut->width + at];
        }
    norm->dbias[channel] += (float)sum_dz;
    norm->dweight[channel] += (float)(sum_product * rstd);
    write_folded(vectors + 3 * cut->width, cut, channel, (float)(sum_dz / count));
    write_folded(vectors + 4 * cut->width, cut, channel, (float)(sum_product * rstd * rstd / count));
}

/* run_...: one pass over part number `at`, counted over all spans, for the type of values of this call. Without ReLU,
 * `floor`, the least value of y, is minus infinity. */
static void run_moments(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    float *mean = partials_of(scratch, cut, at), *m2 = mean + cut->width;
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    if (norm->is_bf16)
        part_moments_bf16(norm->x, rows, cut->width, mean, m2);
    else
        part_moments_f32(norm->x, rows, cut->width, mean, m2);
}

static void run_normalise(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    const float *affine = vectors_of_span(scratch, cut, at / cut->parts);
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    float floor = norm->relu ? 0 : -INFINITY;
    if (norm->is_bf16)
        part_normalise_bf16(norm->x, norm->residual, norm->y, rows, cut->width, affine, floor);
    else
        part_normalise_f32(norm->x, norm->residual, norm->y, rows, cut->width, affine, floor);
}

static void run_sums(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    const float *affine = vectors_of_span(scratch, cut, at / cut->parts);
    float *sum_dz = partials_of(scratch, cut, at), *sum_product = sum_dz + cut->width;
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    float floor = norm->relu ? 0 : -INFINITY;
    /* With a residual the sign of y cannot be recomputed from x alone: the mask comes from the saved output. */
    if (norm->output && norm->is_bf16)
        part_sums_of_join_bf16(norm->dy, norm->x, norm->output, norm->dz, rows, cut->width, affine, sum_dz,
                               sum_product);
    else if (norm->output)
        part_sums_of_join_f32(norm->dy, norm->x, norm->output, norm->dz, rows, cut->width, affine, sum_dz, sum_product);
    else if (norm->is_bf16)
        part_sums_bf16(norm->dy, norm->x, rows, cut->width, affine, floor, sum_dz, sum_product);
    else
        part_sums_f32(norm->dy, norm->x, rows, cut->width, affine, floor, sum_dz, sum_product);
}

static void run_gradient(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    const float *affine = vectors_of_span(scratch, cut, at / cut->parts);
    const float *mean_dz = affine + 3 * cut->width, *mean_product = mean_dz + cut->width;
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    /* dz, if it was written, is already masked. */
    float floor = norm->relu && !norm->output ? 0 : -INFINITY;
    const void *dz = norm->output ? norm->dz : norm->dy;
    if (norm->is_bf16)
        part_gradient_bf16(dz, norm->x, norm->dx, rows, cut->width, affine, floor, mean_dz, mean_product);
    else
        part_gradient_f32(dz, norm->x, norm->dx, rows, cut->width, affine, floor, mean_dz, mean_product);
}

/* The calling thread's share of `count` items: from `first` up to `end`. It is the same in every pass, for the
 * cache. */
typedef struct {
    int64_t first, end;
} Share;

static Share share_of(int64_t count) {
#ifdef _OPENMP
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Share){count * thread / threads, count * (thread + 1) / threads};
#else
    return (Share){0, count};
#endif
}

/* Writes y and the statistics, and adds these to `first` and `total`. Returns 0, or 1 if memory cannot be allocated. */
PUBLIC int megabatch_norm_forward(const Norm *norm) {
    Cut cut = cut_of(norm->rows, norm->span_rows, norm->channels);
    Scratch scratch;
    int ready = allocate_scratch(&scratch, &cut);
    /* Read before the threads start, and updated after they have ended. */
    int first_is_empty = norm->first && norm->first[2 * cut.channels] == 0;
    if (ready)
#pragma omp parallel num_threads((int)norm->threads)
    {
        Share parts = share_of(cut.spans * cut.parts), channels = share_of(cut.channels);
        for (int64_t at = parts.first; at < parts.end; at++) run_moments(norm, &cut, &scratch, at);
        /* All parts are summed: threads now divide the channels. */
#pragma omp barrier
        for (int64_t span = 0; span < cut.spans; span++)
            for (int64_t channel = channels.first; channel < channels.end; channel++) {
                combine_moments(norm, &cut, partials_of(&scratch, &cut, span * cut.parts), span, channel);
                write_affine(norm, &cut, vectors_of_span(&scratch, &cut, span), span, channel);
            }
        for (int64_t channel = channels.first; norm->total && channel < channels.end; channel++)
            add_to_sums(norm, &cut, first_is_empty, channel);
        /* A part needs the vectors of all channels, which other threads wrote. */
#pragma omp barrier
        for (int64_t at = parts.end - 1; at >= parts.first; at--) run_normalise(norm, &cut, &scratch, at);
    }
    if (first_is_empty) norm->first[2 * cut.channels] = 1;
    if (norm->total) norm->total[2 * cut.channels] += (float)cut.spans;
    free_scratch(&scratch);
    return !ready;
}

/* Writes dx, dweight and dbias, and dz if `output` is given. Returns 0, or 1 if memory cannot be allocated. */
PUBLIC int megabatch_norm_backward(const Norm *norm) {
    Cut cut = cut_of(norm->rows, norm->span_rows, norm->channels);
    Scratch scratch;
    int ready = allocate_scratch(&scratch, &cut);
    if (ready)
#pragma omp parallel num_threads((int)norm->threads)
    {
        Share parts = share_of(cut.spans * cut.parts), channels = share_of(cut.channels);
        for (int64_t channel = channels.first; channel < channels.end; channel++) {
            norm->dweight[channel] = norm->dbias[channel] = 0;
            for (int64_t span = 0; span < cut.spans; span++)
                write_affine(norm, &cut, vectors_of_span(&scratch, &cut, span), span, channel);
        }
        /* mean, scale and bias are written; sums are taken part by part. */
#pragma omp barrier
        for (int64_t at = parts.first; at < parts.end; at++) run_sums(norm, &cut, &scratch, at);
        /* All parts are summed: threads divide the channels again. */
#pragma omp barrier
        for (int64_t span = 0; span < cut.spans; span++)
            for (int64_t channel = channels.first; channel < channels.end; channel++)
                combine_sums(norm, &cut, partials_of(&scratch, &cut, span * cut.parts),
                             vectors_of_span(&scratch, &cut, span), span, channel);
#pragma omp barrier
        for (int64_t at = parts.end - 1; at >= parts.first; at--) run_gradient(norm, &cut, &scratch, at);
    }
    free_scratch(&scratch);
    return !ready;
}
