/* Batch norm over spans, a residual and ReLU on a CPU: images as rows (samples x pixels) of channels, in float32 or bfloat16.
 *
 * Every sum is taken over parts of a fixed number of rows and then over parts in one order, so that a result depends on
 * neither the number of threads nor their timing. Each pass gives a thread the rows that it had in the pass before, last
 * ones first, which are in its cache still. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* One body for every kind of vector unit; the loader picks one when the library is loaded. */
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(NO_CLONES)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define PUBLIC __attribute__((visibility("default")))

enum { PART_VALUES = 1 << 16, WIDE_ENOUGH = 256 };

/* A matrix of rows in spans, and how both are cut. `fold` rows that follow each other are one row `fold` times as wide:
 * with 16 channels a loop over channels would end as soon as it began. */
typedef struct {
    int64_t rows, span_rows, spans, part_rows, parts; /* folded; parts of a whole span */
    int64_t channels, width;                          /* width = fold * channels */
} Cut;

static Cut cut_of(int64_t rows, int64_t span_rows, int64_t channels) {
    int64_t fold = 1;
    while (2 * fold * channels <= WIDE_ENOUGH && rows % (2 * fold) == 0 && span_rows % (2 * fold) == 0) fold *= 2;
    Cut cut = {.rows = rows / fold, .span_rows = span_rows / fold, .channels = channels, .width = fold * channels};
    cut.spans = (cut.rows + cut.span_rows - 1) / cut.span_rows;
    cut.part_rows = PART_VALUES / cut.width > 8 ? PART_VALUES / cut.width : 8;
    cut.parts = (cut.span_rows + cut.part_rows - 1) / cut.part_rows;
    return cut;
}

/* The rows of a part of a span; none where the last span is short. */
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

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t narrow_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

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


/* What is asked for; `megabatch.kernels.cpu.batch_norm` has the same list. NULL where there is none. */
typedef struct {
    int64_t is_bf16, rows, span_rows, channels, relu, threads;
    double eps;
    const void *x, *residual, *dy, *output; /* (rows, channels) */
    void *y, *dz, *dx;                      /* likewise */
    const float *weight, *bias;             /* (channels) */
    float *mean, *variance, *rstd;     /* (spans, channels): the unbiased variance, 1 / sqrt(biased + eps) */
    float *dweight, *dbias;                 /* (channels) */
    float *first, *total; /* (2 channels + 1): means, unbiased variances and their number; of the first span, of all */
} Norm;

/* A call's own memory: what each part sums, (spans, parts, 2, width), and what each span's passes read,
 * (spans, 5, width): mean, scale, bias, and two rows of mean sums. */
typedef struct {
    float *partials, *rows;
} Scratch;

static int take_scratch(Scratch *scratch, const Cut *cut) {
    scratch->partials = malloc(cut->spans * cut->parts * 2 * cut->width * sizeof(float));
    scratch->rows = malloc(cut->spans * 5 * cut->width * sizeof(float));
    return scratch->partials && scratch->rows;
}

static void free_scratch(Scratch *scratch) {
    free(scratch->partials);
    free(scratch->rows);
}

static float *partials_of(const Scratch *scratch, const Cut *cut, int64_t part) {
    return scratch->partials + part * 2 * cut->width;
}

static float *rows_read_by(const Scratch *scratch, const Cut *cut, int64_t span) {
    return scratch->rows + span * 5 * cut->width;
}

/* Writes a channel's value in every fold of a row. */
static void put(float *row, const Cut *cut, int64_t channel, float value) {
    for (int64_t at = channel; at < cut->width; at += cut->channels) row[at] = value;
}

/* mean, scale and bias of a channel as the passes read them. */
static void put_affine(const Norm *norm, const Cut *cut, float *rows, int64_t span, int64_t channel) {
    int64_t place = span * cut->channels + channel;
    put(rows, cut, channel, norm->mean[place]);
    put(rows + cut->width, cut, channel, norm->weight[channel] * norm->rstd[place]);
    put(rows + 2 * cut->width, cut, channel, norm->bias[channel]);
}

static double count_of(const Cut *cut, Rows rows) { return (double)rows.count * (double)(cut->width / cut->channels); }

/* n = sum n_p,  m = sum n_p m_p / n,  M2 = sum M2_p + n_p (m_p - m)^2     (Chan, Golub and LeVeque 1979) */
static void combine_moments(const Norm *norm, const Cut *cut, const float *partials, int64_t span, int64_t channel) {
    double count = count_of(cut, span_of(cut, span)), total = 0, spread = 0;
    for (int64_t part = 0; part < cut->parts; part++)
        for (int64_t at = channel; at < cut->width; at += cut->channels)
            total += (double)part_of(cut, span, part).count * partials[part * 2 * cut->width + at];
    double mean = total / count;
    for (int64_t part = 0; part < cut->parts; part++)
        for (int64_t at = channel; at < cut->width; at += cut->channels) {
            const float *pair = partials + part * 2 * cut->width + at;
            double apart = pair[0] - mean;
            spread += pair[cut->width] + (double)part_of(cut, span, part).count * apart * apart;
        }
    int64_t place = span * cut->channels + channel;
    norm->mean[place] = (float)mean;
    norm->variance[place] = (float)(spread / (count > 1 ? count - 1 : 1));
    /* Squares that overflow must not pass as an rstd of 0, which turns a diverged net into a constant. */
    norm->rstd[place] = isfinite(spread) ? (float)(1 / sqrt(spread / count + norm->eps)) : NAN;
}

/* Adds a channel's statistics of all spans to `total`, and puts those of the first into an empty `first`. */
static void collect(const Norm *norm, const Cut *cut, int first_is_empty, int64_t channel) {
    const float *statistics[] = {norm->mean + channel, norm->variance + channel};
    for (int which = 0; which < 2; which++) {
        float sum = 0;
        for (int64_t span = 0; span < cut->spans; span++) sum += statistics[which][span * cut->channels];
        norm->total[which * cut->channels + channel] += sum;
        if (first_is_empty) norm->first[which * cut->channels + channel] = *statistics[which];
    }
}

/* A span's sums of dz and of dz (x - mean) over its parts: added to the gradients, their means put where dx reads. */
static void combine_sums(const Norm *norm, const Cut *cut, const float *partials, float *rows, int64_t span,
                         int64_t channel) {
    double of_dz = 0, of_product = 0, count = count_of(cut, span_of(cut, span));
    double rstd = norm->rstd[span * cut->channels + channel];
    for (int64_t part = 0; part < cut->parts; part++)
        for (int64_t at = channel; at < cut->width; at += cut->channels) {
            of_dz += partials[part * 2 * cut->width + at];
            of_product += partials[(part * 2 + 1) * cut->width + at];
        }
    norm->dbias[channel] += (float)of_dz;
    norm->dweight[channel] += (float)(of_product * rstd);
    put(rows + 3 * cut->width, cut, channel, (float)(of_dz / count));
    put(rows + 4 * cut->width, cut, channel, (float)(of_product * rstd * rstd / count));
}

static void moments_of(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    float *mean = partials_of(scratch, cut, at), *spread = mean + cut->width;
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    if (norm->is_bf16)
        part_moments_bf16(norm->x, rows, cut->width, mean, spread);
    else
        part_moments_f32(norm->x, rows, cut->width, mean, spread);
}

static void normalise_part(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    const float *affine = rows_read_by(scratch, cut, at / cut->parts);
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    float floor = norm->relu ? 0 : -INFINITY;
    if (norm->is_bf16)
        part_normalise_bf16(norm->x, norm->residual, norm->y, rows, cut->width, affine, floor);
    else
        part_normalise_f32(norm->x, norm->residual, norm->y, rows, cut->width, affine, floor);
}

static void sums_of(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    const float *affine = rows_read_by(scratch, cut, at / cut->parts);
    float *of_dz = partials_of(scratch, cut, at), *of_product = of_dz + cut->width;
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    float floor = norm->relu ? 0 : -INFINITY;
    if (norm->output && norm->is_bf16)
        part_sums_of_join_bf16(norm->dy, norm->x, norm->output, norm->dz, rows, cut->width, affine, of_dz, of_product);
    else if (norm->output)
        part_sums_of_join_f32(norm->dy, norm->x, norm->output, norm->dz, rows, cut->width, affine, of_dz, of_product);
    else if (norm->is_bf16)
        part_sums_bf16(norm->dy, norm->x, rows, cut->width, affine, floor, of_dz, of_product);
    else
        part_sums_f32(norm->dy, norm->x, rows, cut->width, affine, floor, of_dz, of_product);
}

static void gradient_of(const Norm *norm, const Cut *cut, const Scratch *scratch, int64_t at) {
    const float *affine = rows_read_by(scratch, cut, at / cut->parts);
    const float *of_dz = affine + 3 * cut->width, *of_product = of_dz + cut->width;
    Rows rows = part_of(cut, at / cut->parts, at % cut->parts);
    float floor = norm->relu && !norm->output ? 0 : -INFINITY;
    const void *dz = norm->output ? norm->dz : norm->dy;
    if (norm->is_bf16)
        part_gradient_bf16(dz, norm->x, norm->dx, rows, cut->width, affine, floor, of_dz, of_product);
    else
        part_gradient_f32(dz, norm->x, norm->dx, rows, cut->width, affine, floor, of_dz, of_product);
}

/* This thread's share of `count` pieces: from `first` up to `end`. */
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

/* y and the statistics. 0, or 1 without memory. */
PUBLIC int megabatch_norm_forward(const Norm *norm) {
    Cut cut = cut_of(norm->rows, norm->span_rows, norm->channels);
    Scratch scratch;
    int ready = take_scratch(&scratch, &cut);
    int first_is_empty = norm->first && norm->first[2 * cut.channels] == 0;
    if (ready)
#pragma omp parallel num_threads((int)norm->threads)
    {
        Share parts = share_of(cut.spans * cut.parts), channels = share_of(cut.channels);
        for (int64_t at = parts.first; at < parts.end; at++) moments_of(norm, &cut, &scratch, at);
#pragma omp barrier
        for (int64_t span = 0; span < cut.spans; span++)
            for (int64_t channel = channels.first; channel < channels.end; channel++) {
                combine_moments(norm, &cut, partials_of(&scratch, &cut, span * cut.parts), span, channel);
                put_affine(norm, &cut, rows_read_by(&scratch, &cut, span), span, channel);
            }
        for (int64_t channel = channels.first; norm->total && channel < channels.end; channel++)
            collect(norm, &cut, first_is_empty, channel);
#pragma omp barrier
        for (int64_t at = parts.end - 1; at >= parts.first; at--) normalise_part(norm, &cut, &scratch, at);
    }
    if (first_is_empty) norm->first[2 * cut.channels] = 1;
    if (norm->total) norm->total[2 * cut.channels] += (float)cut.spans;
    free_scratch(&scratch);
    return !ready;
}

/* dx, the gradients of weight and bias, and dz where there is an output. 0, or 1 without memory. */
PUBLIC int megabatch_norm_backward(const Norm *norm) {
    Cut cut = cut_of(norm->rows, norm->span_rows, norm->channels);
    Scratch scratch;
    int ready = take_scratch(&scratch, &cut);
    if (ready)
#pragma omp parallel num_threads((int)norm->threads)
    {
        Share parts = share_of(cut.spans * cut.parts), channels = share_of(cut.channels);
        for (int64_t channel = channels.first; channel < channels.end; channel++) {
            norm->dweight[channel] = norm->dbias[channel] = 0;
            for (int64_t span = 0; span < cut.spans; span++)
                put_affine(norm, &cut, rows_read_by(&scratch, &cut, span), span, channel);
        }
#pragma omp barrier
        for (int64_t at = parts.first; at < parts.end; at++) sums_of(norm, &cut, &scratch, at);
#pragma omp barrier
        for (int64_t span = 0; span < cut.spans; span++)
            for (int64_t channel = channels.first; channel < channels.end; channel++)
                combine_sums(norm, &cut, partials_of(&scratch, &cut, span * cut.parts),
                             rows_read_by(&scratch, &cut, span), span, channel);
#pragma omp barrier
        for (int64_t at = parts.end - 1; at >= parts.first; at--) gradient_of(norm, &cut, &scratch, at);
    }
    free_scratch(&scratch);
    return !ready;
}
