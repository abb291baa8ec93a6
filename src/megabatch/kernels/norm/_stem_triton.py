# mypy: ignore-errors
"""Triton kernels of batch norm, ReLU and max pooling in one. Loaded by `stem` alone, when it runs on a GPU.

The pooling is 3x3 with stride 2 and a border of 1. Images are matrices of rows and columns as in `_batch_norm_triton`,
whose parts and partial sums these kernels use; a row's place in its image follows from its number. The place of each
maximum in its window is kept as one byte, from 0 to 8, or `NOWHERE` if ReLU lets no gradient through.
"""

import triton
import triton.language as tl

from megabatch.kernels.norm._batch_norm_triton import _columns_here, _normalised, _put_pair, _rows_of_part, _tile

NOWHERE = tl.constexpr(9)


@triton.jit
def _channels(mean, rstd, weight, bias, column, inside, columns):
    """Mean, rstd, rstd times weight, and bias of this span's channels."""
    own = tl.program_id(1) * columns + column
    scale = tl.load(rstd + own, mask=inside, other=0.0)
    slope = tl.load(weight + column, mask=inside, other=0.0) * scale
    middle = tl.load(mean + own, mask=inside, other=0.0)
    return middle, scale, slope, tl.load(bias + column, mask=inside, other=0.0)


@triton.jit
def pool_kernel(
    x,
    pooled,
    places,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    span_rows,
    height,
    width,
    pooled_height,
    pooled_width,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """The first maximum of each window of relu(batch norm of x), in the order of rows; rows here are those pooled."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, block_rows, columns, block_columns)
    middle, _, slope, shift = _channels(mean, rstd, weight, bias, column, inside, columns)
    row = (first + tl.arange(0, block_rows)).to(tl.int32)
    exists = tl.arange(0, block_rows) < count
    sample = row // (pooled_height * pooled_width)
    top = row // pooled_width % pooled_height * 2 - 1
    left = row % pooled_width * 2 - 1
    best = tl.full((block_rows, block_columns), float("-inf"), dtype=tl.float32)
    place = tl.full((block_rows, block_columns), NOWHERE, dtype=tl.int32)
    for number in tl.static_range(9):
        i, j = top + number // 3, left + number % 3
        here = exists & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        here = here[:, None] & inside[None, :]
        source = ((sample * height + i) * width + j).to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(x + source, mask=here, other=0.0).to(tl.float32)
        values = tl.maximum(_normalised(values, middle, slope, shift), 0.0, propagate_nan=tl.PropagateNan.ALL)
        values = values.to(pooled.dtype.element_ty).to(tl.float32)
        ahead = here & ((values > best) | (values != values))  # noqa: PLR0124  # not a number
        best = tl.where(ahead, values, best)
        place = tl.where(ahead, number, place)
    place = tl.where(best <= 0, NOWHERE, place)
    target = row.to(tl.int64)[:, None] * columns + column[None, :]
    kept = exists[:, None] & inside[None, :]
    tl.store(pooled + target, best.to(pooled.dtype.element_ty), mask=kept)
    tl.store(places + target, place.to(tl.uint8), mask=kept)


@triton.jit
def _gathered(
    dpooled, places, row, here, column, height, width, pooled_height, pooled_width, columns, block_rows: tl.constexpr
):
    """Sum of the gradients of the windows whose maximum is at each row's pixel: up to two rows and two columns of them.

    Summed window by window in the order of rows, as float32.
    """
    sample = row // (height * width)
    i, j = row // width % height, row % width
    total = tl.zeros((block_rows, column.shape[0]), dtype=tl.float32)
    for number in tl.static_range(4):
        window_row, window_column = i // 2 + number // 2, j // 2 + number % 2
        down, right = i - 2 * window_row + 1, j - 2 * window_column + 1
        there = (down >= 0) & (right >= 0) & (window_row < pooled_height) & (window_column < pooled_width)
        source = ((sample * pooled_height + window_row) * pooled_width + window_column).to(tl.int64)[:, None]
        source = source * columns + column[None, :]
        there = there[:, None] & here
        place = tl.load(places + source, mask=there, other=NOWHERE).to(tl.int32)
        gradient = tl.load(dpooled + source, mask=there, other=0.0).to(tl.float32)
        total += tl.where(place == (3 * down + right)[:, None], gradient, 0.0)
    return total


@triton.jit
def pool_gradient_sums_kernel(
    dpooled,
    places,
    x,
    partials,
    mean,
    rstd,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    height,
    width,
    pooled_height,
    pooled_width,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Sums of dz and of dz (x - mean) rstd over each part of a span, dz gathered from the windows."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, rows_per_part, columns, block_columns)
    own = tl.program_id(1) * columns + column
    middle = tl.load(mean + own, mask=inside, other=0.0)
    scale = tl.load(rstd + own, mask=inside, other=0.0)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    products = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        place, here = _tile(column, inside, done, count, columns, block_rows)
        row = (first + done + tl.arange(0, block_rows)).to(tl.int32)
        gradient = _gathered(
            dpooled, places, row, here, column, height, width, pooled_height, pooled_width, columns, block_rows
        )
        values = tl.load(x + first * columns + place, mask=here, other=0.0).to(tl.float32)
        sums += gradient
        products += gradient * tl.where(here, (values - middle[None, :]) * scale[None, :], 0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    _put_pair(partials, num_parts, total, product, column, inside, columns, block_columns)


@triton.jit
def pool_input_gradient_kernel(
    dpooled,
    places,
    x,
    dx,
    sums,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    span_rows,
    height,
    width,
    pooled_height,
    pooled_width,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n), dz gathered from the windows again."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, block_rows, columns, block_columns)
    place, here = _tile(column, inside, 0, count, columns, block_rows)
    gradient = _gathered(
        dpooled,
        places,
        (first + tl.arange(0, block_rows)).to(tl.int32),
        here,
        column,
        height,
        width,
        pooled_height,
        pooled_width,
        columns,
        block_rows,
    )
    values = tl.load(x + first * columns + place, mask=here, other=0.0).to(tl.float32)
    middle, scale, slope, _ = _channels(mean, rstd, weight, bias, column, inside, columns)
    size = tl.minimum(num_rows - tl.program_id(1).to(tl.int64) * span_rows, span_rows).to(tl.float32)
    pair = sums + tl.program_id(1) * 2 * columns + column
    of_gradient = tl.load(pair, mask=inside, other=0.0) / size
    of_product = tl.load(pair + columns, mask=inside, other=0.0) / size * scale
    gradient = gradient - of_gradient[None, :] - (values - middle[None, :]) * of_product[None, :]
    tl.store(dx + first * columns + place, (gradient * slope[None, :]).to(dx.dtype.element_ty), mask=here)
