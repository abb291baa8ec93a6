/* The passes over one part, for one type of values; included by norm.c once for each. No include guard: on purpose.
 *
 * `affine` is three rows of `width`: mean, scale, bias of (x - mean) scale + bias, which is batch norm where
 * scale = weight / sqrt(variance + eps). Rows are taken four at a time, so that sums are loaded and stored a quarter as
 * often. */

/* Mean and sum of squared differences from it. Sums are of x minus the part's first row, so that no digits are lost
 * where the mean is many deviations from 0. */
FOR_EACH_CPU void NAMED(part_moments)(const TYPE *restrict x, Rows rows, int64_t width, float *restrict mean,
                                      float *restrict spread) {
    x += rows.first * width;
    memset(mean, 0, width * sizeof *mean);
    memset(spread, 0, width * sizeof *spread);
    int64_t row = 0;
    for (; row + 4 <= rows.count; row += 4)
        for (int64_t c = 0; c < width; c++) {
            const TYPE *at = x + row * width + c;
            float shift = WIDE(x[c]), sum = 0, squares = 0;
#pragma GCC unroll 4
            for (int64_t next = 0; next < 4; next++) {
                float value = WIDE(at[next * width]) - shift;
                sum += value;
                squares += value * value;
            }
            mean[c] += sum;
            spread[c] += squares;
        }
    for (; row < rows.count; row++)
        for (int64_t c = 0; c < width; c++) {
            float value = WIDE(x[row * width + c]) - WIDE(x[c]);
            mean[c] += value;
            spread[c] += value * value;
        }
    for (int64_t c = 0; c < width && rows.count; c++) {
        float above = mean[c] / (float)rows.count, left = spread[c] - above * mean[c];
        mean[c] = WIDE(x[c]) + above;
        spread[c] = left < 0 ? 0 : left; /* NaN stays */
    }
}

/* y = max(floor, (x - mean) scale + bias + residual); NaN stays NaN. */
FOR_EACH_CPU void NAMED(part_normalise)(const TYPE *restrict x, const TYPE *restrict residual, TYPE *restrict y,
                                        Rows rows, int64_t width, const float *restrict affine, float floor) {
    const float *mean = affine, *scale = affine + width, *bias = affine + 2 * width;
    for (int64_t row = rows.first; row < rows.first + rows.count; row++) {
        const TYPE *from = x + row * width, *more = residual + row * width;
        TYPE *to = y + row * width;
        if (residual)
            for (int64_t c = 0; c < width; c++) {
                float value = (WIDE(from[c]) - mean[c]) * scale[c] + bias[c] + WIDE(more[c]);
                to[c] = NARROW(value < floor ? floor : value);
            }
        else
            for (int64_t c = 0; c < width; c++) {
                float value = (WIDE(from[c]) - mean[c]) * scale[c] + bias[c];
                to[c] = NARROW(value < floor ? floor : value);
            }
    }
}

/* Sums of dz and of dz (x - mean), where dz is dy where ReLU's output was above 0: `mask` is that output, or NULL; then
 * it is computed from x again (without ReLU, floor is minus infinity and nothing is masked). dz is written if there is
 * a place for it, which needs `mask` or no ReLU. */
static inline __attribute__((always_inline)) float NAMED(masked)(TYPE dy, float above_mean, float scale, float bias,
                                                                 float floor) {
    return above_mean * scale + bias <= floor ? 0 : WIDE(dy);
}

FOR_EACH_CPU void NAMED(part_sums)(const TYPE *restrict dy, const TYPE *restrict x, Rows rows, int64_t width,
                                   const float *restrict affine, float floor, float *restrict of_dz,
                                   float *restrict of_product) {
    const float *mean = affine, *scale = affine + width, *bias = affine + 2 * width;
    memset(of_dz, 0, width * sizeof *of_dz);
    memset(of_product, 0, width * sizeof *of_product);
    int64_t row = rows.first, end = rows.first + rows.count;
    for (; row + 4 <= end; row += 4)
        for (int64_t c = 0; c < width; c++) {
            float sum = 0, product = 0;
#pragma GCC unroll 4
            for (int64_t next = 0; next < 4; next++) {
                int64_t at = (row + next) * width + c;
                float above = WIDE(x[at]) - mean[c], dz = NAMED(masked)(dy[at], above, scale[c], bias[c], floor);
                sum += dz;
                product += dz * above;
            }
            of_dz[c] += sum;
            of_product[c] += product;
        }
    for (; row < end; row++)
        for (int64_t c = 0; c < width; c++) {
            int64_t at = row * width + c;
            float above = WIDE(x[at]) - mean[c], dz = NAMED(masked)(dy[at], above, scale[c], bias[c], floor);
            of_dz[c] += dz;
            of_product[c] += dz * above;
        }
}

/* The same where `output` says what was masked, and dz is written: it is the residual's gradient too. */
FOR_EACH_CPU void NAMED(part_sums_of_join)(const TYPE *restrict dy, const TYPE *restrict x,
                                           const TYPE *restrict output, TYPE *restrict dz, Rows rows, int64_t width,
                                           const float *restrict mean, float *restrict of_dz,
                                           float *restrict of_product) {
    memset(of_dz, 0, width * sizeof *of_dz);
    memset(of_product, 0, width * sizeof *of_product);
    int64_t row = rows.first, end = rows.first + rows.count;
    for (; row + 4 <= end; row += 4)
        for (int64_t c = 0; c < width; c++) {
            float sum = 0, product = 0;
#pragma GCC unroll 4
            for (int64_t next = 0; next < 4; next++) {
                int64_t at = (row + next) * width + c;
                float value = WIDE(dy[at]), out = WIDE(output[at]); /* both read, or the loop is no vector loop */
                value = out <= 0 ? 0 : value;
                dz[at] = NARROW(value);
                sum += value;
                product += value * (WIDE(x[at]) - mean[c]);
            }
            of_dz[c] += sum;
            of_product[c] += product;
        }
    for (; row < end; row++)
        for (int64_t c = 0; c < width; c++) {
            int64_t at = row * width + c;
            float value = WIDE(dy[at]), out = WIDE(output[at]);
            value = out <= 0 ? 0 : value;
            dz[at] = NARROW(value);
            of_dz[c] += value;
            of_product[c] += value * (WIDE(x[at]) - mean[c]);
        }
}

/* dx = scale (dz - of_dz - (x - mean) of_product), with the means of the sums in the last two. */
FOR_EACH_CPU void NAMED(part_gradient)(const TYPE *restrict dy, const TYPE *restrict x, TYPE *restrict dx, Rows rows,
                                       int64_t width, const float *restrict affine, float floor,
                                       const float *restrict of_dz, const float *restrict of_product) {
    const float *mean = affine, *scale = affine + width, *bias = affine + 2 * width;
    for (int64_t row = rows.first; row < rows.first + rows.count; row++)
        for (int64_t c = 0; c < width; c++) {
            int64_t at = row * width + c;
            float above = WIDE(x[at]) - mean[c], dz = NAMED(masked)(dy[at], above, scale[c], bias[c], floor);
            dx[at] = NARROW(scale[c] * (dz - of_dz[c] - above * of_product[c]));
        }
}
