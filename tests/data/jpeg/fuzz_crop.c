/* Fuzzer of the compiled decoder: `fuzz COUNT FILE...` decodes COUNT randomly damaged copies of the JPEG files and
 * prints how many were decoded and how many rejected. test_library.py builds it with sanitizers; every buffer is
 * allocated with exactly the size that the decoder is given, so any access out of bounds is reported. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int megabatch_jpeg_crop(
    const uint8_t *data, size_t size, double top, double left, double height, double width, int rows, int columns,
    int channels, int64_t max_pixels, uint8_t *out);

void megabatch_jpeg_sizes(
    const uint8_t *const *files, const size_t *sizes, int64_t count, int64_t max_pixels, int whole, int64_t *out);

static uint64_t state = 88172645463325252u;

/* Pseudorandom number in [0, limit), from a xorshift generator: the same sequence in every run. */
static uint32_t below(uint32_t limit) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32) % limit;
}

static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) exit(9);
    uint8_t *data = malloc(1 << 20);
    *size = fread(data, 1, 1 << 20, file);
    fclose(file);
    return data;
}

/* Changes up to five bytes, half of them in the header, where one byte does most. */
static void break_bytes(uint8_t *data, size_t size) {
    for (uint32_t n = below(6); n > 0; n--) {
        uint8_t *at = data + below((uint32_t)(below(2) && size > 700 ? 700 : size));
        uint8_t choices[4] = {0, 0xFF, (uint8_t)below(256), (uint8_t)(*at ^ 1u << below(8))};
        *at = choices[below(4)];
    }
}

int main(int argc, char **argv) {
    int decoded = 0, rejected = 0;
    for (int round = atoi(argv[1]); round > 0; round--) {
        size_t full, size;
        uint8_t *file = read_file(argv[2 + below((uint32_t)(argc - 2))], &full);
        size = below(3) ? full : 2 + below((uint32_t)full - 2);
        uint8_t *data = malloc(size);
        memcpy(data, file, size);
        break_bytes(data, size);
        /* Mostly with an end marker, so that truncation is detected only while decoding. */
        if (below(4)) data[size - 2] = 0xFF, data[size - 1] = 0xD9;
        /* Outputs both smaller and larger than the box, fractional boxes, and now and then an invalid one. */
        int rows = 1 + (int)below(below(4) ? 40 : 300), columns = 1 + (int)below(below(4) ? 40 : 300);
        int channels = below(2) ? 1 : 3;
        double top = below(96), left = below(128), height = 1 + below(96 - (int)top), width = 1 + below(128 - (int)left);
        if (below(3) == 0) top = 0, left = 0, height = 96, width = 128; /* more than 64 x 64 */
        if (below(3) == 0) top *= 0.97, left *= 0.97, height *= 0.97, width *= 0.97;
        if (below(100) == 0) width = below(2) ? NAN : 1e300;
        uint8_t *out = malloc((size_t)rows * columns * channels);
        int status = megabatch_jpeg_crop(data, size, top, left, height, width, rows, columns, channels, 1 << 22, out);
        int64_t found[4];
        const uint8_t *files[2] = {data, data};
        size_t sizes[2] = {size, size / 2};
        megabatch_jpeg_sizes(files, sizes, 2, 1 << 22, (int)below(2), found);
        *(status == 0 ? &decoded : &rejected) += 1;
        free(out), free(data), free(file);
    }
    printf("%d %d\n", decoded, rejected);
    return 0;
}
