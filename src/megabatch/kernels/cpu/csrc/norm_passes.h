/* The passes over one part, for one type of values. norm.c includes this file once per type, so there is no include
 * guard: TYPE is the type in memory, WIDE and NARROW convert to and from float, NAMED appends the type to a name.
 *
 * `affine` points to three rows of `width` floats, mean, scale and bias: batch norm is (x - mean) scale + bias, with
 * scale = weight rstd. Inner loops run over the `width` values of a row, which vectorises them. Sums take four rows at
 * a time, so that they are loaded and stored a quarter as often. */

/* Mean and sum of squared differences from it, `m2`, per column:
 *
 *     d = x - x_0;   mean = x_0 + sum(d) / n;   m2 = sum(d^2) - sum(d)^2 / n
 *
 * x_0 is the part's first row: without that shift, subtracting nearly equal numbers would cancel all digits where the
 * mean is many standard deviations from 0. */
FOR_EACH_CPU void NAMED(part_moments)(const TYPE *restrict x, Rows rows, int64_t width, float *restrict mean,
                                      float *restrict m2) {
    x += rows.first * width;
    memset(mean, 0, width * sizeof *mean);
    memset(m2, 0, width * sizeof *m2);
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
            m2[c] += squares;
        }
    for (; row < rows.count; row++) /* the last rows, fewer than four */
        for (int64_t c = 0; c < width; c++) {
            float value = WIDE(x[row * width + c]) - WIDE(x[c]);
            mean[c] += value;
            m2[c] += value * value;
        }
    for (int64_t c = 0; c < width && rows.count; c++) {
        float shifted_mean = mean[c] / (float)rows.count, left = m2[c] - shifted_mean * mean[c];
        mean[c] = WIDE(x[c]) + shifted_mean;
        m2[c] = left < 0 ? 0 : left; /* rounding may make it negative; NaN stays */
    }
}

/* y = max(floor, (x - mean) scale + bias + residual), rounded once. `residual` may be NULL. The comparison is written
 * so that NaN stays NaN. */
FOR_EACH_CPU void NAMED(part_normalise)(const TYPE *restrict x, const TYPE *restrict residual, TYPE *restrict y,
                                        Rows rows, int64_t width, const float *restrict affine, float floor) {
    const float *mean = affine, *scale = affine + width, *bias = affine + 2 * width;
    for (int64_t row = rows.first; row < rows.first + rows.count; row++) {
        const TYPE *from = x + row * width, *more = residual + row * width;
        TYPE *to = y + row * width;
        /* Two loops, so that neither has a branch inside, which would not vectorise. */
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

/* dz: dy where batch norm's output, recomputed from x, is above `floor`, else 0. Without ReLU, floor is minus infinity
 * and nothing is masked. `centred` is x - mean. */
static inline __attribute__((always_inline)) float NAMED(masked)(TYPE dy, float centred, float scale, float bias,
                                                                 float floor) {
    return centred * scale + bias <= floor ? 0 : WIDE(dy);
}

/* Sums of dz and of dz (x - mean) per column. */
FOR_EACH_CPU void NAMED(part_sums)(const TYPE *restrict dy, const TYPE *restrict x, Rows rows, int64_t width,
                                   const float *restrict affine, float floor, float *restrict sum_dz,
                                   float *restrict sum_product) {
    const float *mean = affine, *scale = affine + width, *bias = affine + 2 * width;
    memset(sum_dz, 0, width * sizeof *sum_dz);
    memset(sum_product, 0, width * sizeof *sum_product);
    int64_t row = rows.first, end = rows.first + rows.count;
    for (; row + 4 <= end; row += 4)
        for (int64_t c = 0; c < width; c++) {
            float sum = 0, product = 0;
#pragma GCC unroll 4
            for (int64_t next = 0; next < 4; next++) {
                int64_t at = (row + next) * width + c;
                float centred = WIDE(x[at]) - mean[c], dz = NAMED(masked)(dy[at], centred, scale[c], bias[c], floor);
                sum += dz;
                product += dz * centred;
            }
            sum_dz[c] += sum;
            sum_product[c] += product;
        }
    for (; row < end; row++)
        for (int64_t c = 0; c < width; c++) {
            int64_t at = row * width + c;
            float centred = WIDE(x[at]) - mean[c], dz = NAMED(masked)(dy[at], centred, scale[c], bias[c], floor);
            sum_dz[c] += dz;
            sum_product[c] += dz * centred;
        }
}

/* The same behind a residual join: `output`, saved by forward, gives ReLU's mask, and dz is written, as it is also the
 * residual's gradient. */
FOR_EACH_CPU void NAMED(part_sums_of_join)(const TYPE *restrict dy, const TYPE *restrict x,
                                           const TYPE *restrict output, TYPE *restrict dz, Rows rows, int64_t width,
                                           const float *restrict mean, float *restrict sum_dz,
                                           float *restrict sum_product) {
    memset(sum_dz, 0, width * sizeof *sum_dz);
    memset(sum_product, 0, width * sizeof *sum_product);
    int64_t row = rows.first, end = rows.first + rows.count;
    for (; row + 4 <= end; row += 4)
        for (int64_t c = 0; c < width; c++) {
            float sum = 0, product = 0;
#pragma GCC unroll 4
            for (int64_t next = 0; next < 4; next++) {
                int64_t at = (row + next) * width + c;
                /* Both are always read: a conditional read would not vectorise. */
                float value = WIDE(dy[at]), out = WIDE(output[at]);
                value = out <= 0 ? 0 : value;
                dz[at] = NARROW(value);
                sum += value;
                product += value * (WIDE(x[at]) - mean[c]);
            }
            sum_dz[c] += sum;
            sum_product[c] += product;
        }
    for (; row < end; row++)
        for (int64_t c = 0; c < width; c++) {
            int64_t at = row * width + c;
            float value = WIDE(dy[at]), out = WIDE(output[at]);
            value = out <= 0 ? 0 : value;
            dz[at] = NARROW(value);
            sum_dz[c] += value;
            sum_product[c] += value * (WIDE(x[at]) - mean[c]);
        }
}

/* dx = scale (dz - mean_dz - (x - mean) mean_product), with mean_dz = sum(dz) / n and
 * mean_product = sum(dz (x - mean)) rstd^2 / n, as norm.c computes them. */
FOR_EACH_CPU void NAMED(part_gradient)(const TYPE *restrict dy, const TYPE *restrict x, TYPE *restrict dx, Rows rows,
                                       int64_t width, const float *restrict affine, float floor,
                                       const float *restrict mean_dz, const float *restrict mean_product) {
    const float *mean = affine, *scale = affine + width, *bias = affine + 2 * width;
    for (int64_t row = rows.first; row < rows.first + rows.count; row++)
        for (int64_t c = 0; c < width; c++) {
            int64_t at = row * width + c;
            float centred = WIDE(x[at]) - mean[c], dz = NAMED(masked)(dy[at], centred, scale[c], bias[c], floor);
            dx[at] = NARROW(scale[c] * (dz - mean_dz[c] - centred * mean_product[c]));
        }
}
