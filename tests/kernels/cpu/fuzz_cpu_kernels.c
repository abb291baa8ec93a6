/* Fuzzes the CPU kernels: `fuzz COUNT` calls them COUNT times with random shapes. test_library.py builds it with
 * sanitizers. Every buffer has exactly the size that the kernels expect; output buffers are filled with NaN first, and
 * every value must be overwritten. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { /* as megabatch/kernels/cpu/batch_norm.py packs it */
    int64_t is_bf16, rows, span_rows, channels, relu, threads;
    double eps;
    void *x, *residual, *dy, *output, *y, *dz, *dx;
    float *weight, *bias, *mean, *variance, *rstd, *dweight, *dbias, *first, *total;
} Norm;

typedef struct { /* as megabatch/kernels/cpu/conv.py packs it */
    int64_t count, height, width, inputs, outputs, down, across, out_height, out_width, stride, padding, threads;
    void *images, *weight, *gradient, *result;
} Conv;

int megabatch_norm_forward(const Norm *), megabatch_norm_backward(const Norm *);

typedef struct {
    int (*runs_here)(void), (*forward)(const Conv *), (*data_gradient)(const Conv *), (*weight_gradient)(const Conv *);
    int64_t is_bf16, lanes;
} Kernels;

#define DECLARE(name)                                                                           \
    int megabatch_conv_##name##_runs_here(void), megabatch_conv_##name##_forward(const Conv *); \
    int megabatch_conv_##name##_data_gradient(const Conv *), megabatch_conv_##name##_weight_gradient(const Conv *);
#define KERNELS(name, is_bf16, lanes)                                                                   \
    {megabatch_conv_##name##_runs_here, megabatch_conv_##name##_forward,                                \
     megabatch_conv_##name##_data_gradient, megabatch_conv_##name##_weight_gradient, is_bf16, lanes}

DECLARE(bf16) DECLARE(avx512) DECLARE(avx2)
static const Kernels all_kernels[] = {KERNELS(bf16, 1, 16), KERNELS(avx512, 0, 16), KERNELS(avx2, 0, 8)};

static uint64_t state = 88172645463325252u;

static int64_t below(int64_t limit) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)((state >> 33) % (uint64_t)limit);
}

static void *kept[32];
static int num_kept;

static void *keep(void *block) { return kept[num_kept++] = block; }

static void free_all(void) {
    while (num_kept) free(kept[--num_kept]);
}

/* Random values between -2 and 2. */
static void *drawn(int64_t count, int is_bf16) {
    float *values = keep(malloc(count * (is_bf16 ? 2 : 4)));
    for (int64_t at = 0; at < count; at++) {
        float value = (float)(below(1 << 16) - (1 << 15)) / (1 << 14);
        if (is_bf16)
            memcpy((uint16_t *)values + at, (char *)&value + 2, 2);
        else
            values[at] = value;
    }
    return values;
}

static void *blank(int64_t count, int is_bf16) {
    size_t size = count * (is_bf16 ? 2 : 4);
    return keep(memset(malloc(size), 0xFF, size)); /* NaN in either type */
}

static void must_be_written(const char *what, const void *values, int64_t count, int is_bf16) {
    for (int64_t at = 0; at < count; at++) {
        uint32_t bits = is_bf16 ? (uint32_t)((const uint16_t *)values)[at] << 16 : ((const uint32_t *)values)[at];
        if ((bits & 0x7FFFFFFF) <= 0x7F800000) continue;
        fprintf(stderr, "%s: value %lld of %lld is NaN\n", what, (long long)at, (long long)count);
        exit(2);
    }
}

static void fuzz_norm(void) {
    int64_t is_bf16 = below(2), pixels = 1 + below(30), images = 1 + below(9), span = 1 + below(images + 2);
    int64_t channels = 1 + below(below(4) ? 70 : 2100), rows = pixels * images, size = rows * channels;
    int64_t spans = (images + span - 1) / span, has_residual = below(2);
    if (span > images) span = images;
    Norm norm = {is_bf16, rows, span * pixels, channels, below(2), 1 + below(3), 1e-5};
    norm.x = drawn(size, is_bf16), norm.y = blank(size, is_bf16);
    norm.residual = has_residual ? drawn(size, is_bf16) : NULL;
    norm.weight = drawn(channels, 0), norm.bias = drawn(channels, 0);
    norm.mean = blank(spans * channels, 0), norm.variance = blank(spans * channels, 0);
    norm.rstd = blank(spans * channels, 0);
    if (below(2)) {
        norm.first = keep(calloc(2 * channels + 1, 4)), norm.total = keep(calloc(2 * channels + 1, 4));
    }
    if (megabatch_norm_forward(&norm)) exit(3);
    must_be_written("y", norm.y, size, is_bf16);
    norm.dy = drawn(size, is_bf16), norm.dx = blank(size, is_bf16);
    norm.dweight = blank(channels, 0), norm.dbias = blank(channels, 0);
    if (norm.relu && has_residual) norm.output = norm.y, norm.dz = blank(size, is_bf16);
    if (megabatch_norm_backward(&norm)) exit(3);
    must_be_written("dx", norm.dx, size, is_bf16);
    must_be_written("dweight", norm.dweight, channels, 0);
    if (norm.dz) must_be_written("dz", norm.dz, size, is_bf16);
}

static void fuzz_conv(const Kernels *kernels) {
    int64_t lanes = kernels->lanes, is_bf16 = kernels->is_bf16;
    Conv conv = {8 + below(30), 1 + below(12), 1 + below(12), lanes * (1 + below(6)), lanes * (1 + below(6))};
    conv.down = 1 + below(4), conv.across = 1 + below(4), conv.stride = 1 + below(3), conv.padding = below(4);
    if (below(8) == 0) conv.height = 30 + below(20), conv.width = 30 + below(20), conv.count = 8;
    if (below(3) == 0) conv.inputs = 1 + below(lanes - 1); /* few channels: conv_few.h */
    conv.threads = 1 + below(3);
    int64_t down = conv.height + 2 * conv.padding - conv.down, across = conv.width + 2 * conv.padding - conv.across;
    if (down < 0 || across < 0) return;
    conv.out_height = down / conv.stride + 1, conv.out_width = across / conv.stride + 1;
    int64_t in_size = conv.count * conv.height * conv.width * conv.inputs;
    int64_t out_size = conv.count * conv.out_height * conv.out_width * conv.outputs;
    int64_t weight_size = conv.outputs * conv.down * conv.across * conv.inputs, is_few = conv.inputs % lanes != 0;
    conv.images = drawn(in_size, is_bf16), conv.weight = drawn(weight_size, is_bf16);
    conv.result = blank(out_size, is_bf16);
    if (kernels->forward(&conv)) exit(3);
    must_be_written("convolution", conv.result, out_size, is_bf16);
    conv.gradient = drawn(out_size, is_bf16), conv.result = blank(in_size, is_bf16);
    if (!is_few && kernels->data_gradient(&conv)) exit(3);
    if (!is_few) must_be_written("data gradient", conv.result, in_size, is_bf16);
    conv.result = blank(weight_size, is_bf16);
    if (kernels->weight_gradient(&conv)) exit(3);
    must_be_written("weight gradient", conv.result, weight_size, is_bf16);
}

int main(int argc, char **argv) {
    int num_convs = 0;
    for (int round = atoi(argv[argc - 1]); round > 0; round--) {
        const Kernels *kernels = &all_kernels[round % 3];
        fuzz_norm();
        free_all();
        if (kernels->runs_here()) fuzz_conv(kernels), num_convs++;
        free_all();
    }
    printf("%d\n", num_convs);
    return 0;
}
