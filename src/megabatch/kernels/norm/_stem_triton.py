# mypy: ignore-errors
"""Triton kernels of batch norm, ReLU and max pooling in one. Imported only by `stem`, when it runs on a GPU.

    h = (x - mean) rstd;   y = max pooling of relu(weight h + bias) in 3x3 windows, stride 2, padding 1

Window (i, j) covers rows 2 i - 1 to 2 i + 1 and columns 2 j - 1 to 2 j + 1 of the image. Matrices, spans, parts,
partial sums and the grid are those of `_batch_norm_triton`. The number of a row gives its sample and its pixel:
row = (sample * height + i) * width + j.

Forward stores the position of each window's maximum as one byte: 3 (row in the window) + (column in the window), 0 to
8, or `NOWHERE` where the maximum is 0 and ReLU passes no gradient. Backward gathers: the pixel of x collects from the
windows whose stored position is that pixel, so that no two programs add to one value, and the order of sums is fixed.
"""

import triton
import triton.language as tl

from megabatch.kernels.norm._batch_norm_triton import (
    _affine,
    _part_rows,
    _program_columns,
    _store_pair,
    _tile_offsets,
)

NOWHERE = tl.constexpr(9)


@triton.jit
def _load_channels(mean, rstd, weight, bias, column, column_mask, columns):
    """Mean, rstd, weight rstd, and bias of this program's span and channels."""
    of_span = tl.program_id(1) * columns + column
    inv_std = tl.load(rstd + of_span, mask=column_mask, other=0.0)
    scale = tl.load(weight + column, mask=column_mask, other=0.0) * inv_std
    mu = tl.load(mean + of_span, mask=column_mask, other=0.0)
    return mu, inv_std, scale, tl.load(bias + column, mask=column_mask, other=0.0)


@triton.jit
def pool_kernel(
    x,
    pooled,
    positions,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    span_rows,
    height: tl.constexpr,
    width: tl.constexpr,
    pooled_height: tl.constexpr,
    pooled_width: tl.constexpr,
    columns: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Forward: maxima of the windows of relu((x - mean) rstd weight + bias), and their positions.

    One program handles one tile of `pooled`: num_rows, span_rows and the tile count rows of pooled images here. Of
    equal values of x the first in row-major order is the maximum, and NaN is larger than any number, as in torch;
    values that only rounding would make equal are told apart.

    x (N height width, columns); pooled and positions (N pooled_height pooled_width, columns), positions uint8; mean,
    rstd (spans, columns); weight, bias (columns,).
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, block_rows, columns, block_columns)
    mu, _, scale, shift = _load_channels(mean, rstd, weight, bias, column, column_mask, columns)
    # 32-bit division is much faster than 64-bit; `stem` checks that row numbers fit.
    row = (first + tl.arange(0, block_rows)).to(tl.int32)
    exists = tl.arange(0, block_rows) < count
    sample = row // (pooled_height * pooled_width)
    top = row // pooled_width % pooled_height * 2 - 1
    left = row % pooled_width * 2 - 1
    # Batch norm and ReLU keep the order of x, or turn it around, so x is compared and only the maximum normalised.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, scale * 0.0))
    # Finite, as rows that do not exist keep it: times 0 it must not become NaN.
    best = tl.full((block_rows, block_columns), -1e30, dtype=tl.float32)
    position = tl.full((block_rows, block_columns), NOWHERE, dtype=tl.int32)
    for number in tl.static_range(9):
        i, j = top + number // 3, left + number % 3
        inside = exists & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        padding = tl.where(inside, 0.0, float("-inf"))  # the padding is never a maximum
        mask = inside[:, None] & column_mask[None, :]
        source = ((sample * height + i) * width + j).to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(x + source, mask=mask, other=0.0).to(tl.float32) * sign[None, :] + padding[:, None]
        position = tl.where(values > best, number, position)
        best = tl.maximum(best, values, propagate_nan=tl.PropagateNan.ALL)
    best = _affine(best * sign[None, :], mu, scale, shift)
    best = tl.maximum(best, 0.0, propagate_nan=tl.PropagateNan.ALL).to(pooled.dtype.element_ty)
    # A NaN passes no gradient itself: it makes that of its whole span NaN, through the statistics.
    position = tl.where(best > 0, position, NOWHERE)
    target = row.to(tl.int64)[:, None] * columns + column[None, :]
    written = exists[:, None] & column_mask[None, :]
    tl.store(pooled + target, best, mask=written)
    tl.store(positions + target, position.to(tl.uint8), mask=written)


@triton.jit
def pool_gradient_sums_kernel(
    dpooled,
    positions,
    x,
    partials,
    mean,
    rstd,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    height: tl.constexpr,
    width: tl.constexpr,
    pooled_height: tl.constexpr,
    pooled_width: tl.constexpr,
    columns: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Backward, first pass: sums of dz and of dz (x - mean) rstd over one part. One program walks down one part.

    dz is dpooled at the pixels that are their windows' maxima, so both sums run over windows: a quarter of the pixels,
    with x read at the stored position. partials (spans, parts, 2, columns), float32; the others, also num_rows,
    span_rows and parts, as in `pool_kernel`.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, rows_per_part, columns, block_columns)
    of_span = tl.program_id(1) * columns + column
    mu = tl.load(mean + of_span, mask=column_mask, other=0.0)
    inv_std = tl.load(rstd + of_span, mask=column_mask, other=0.0)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    products = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        offset, mask = _tile_offsets(column, column_mask, done, count, columns, block_rows)
        position = tl.load(positions + first * columns + offset, mask=mask, other=NOWHERE).to(tl.int32)
        has_gradient = position != NOWHERE
        gradient = tl.load(dpooled + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.where(has_gradient, gradient, 0.0)
        row = (first + done + tl.arange(0, block_rows)).to(tl.int32)
        top = row // pooled_width % pooled_height * 2 - 1
        corner = (row // (pooled_height * pooled_width) * height + top) * width + row % pooled_width * 2 - 1
        pixel = corner[:, None] + position // 3 * width + position % 3
        values = tl.load(x + pixel.to(tl.int64) * columns + column[None, :], mask=has_gradient, other=0.0)
        sums += gradient
        products += gradient * (values.to(tl.float32) - mu[None, :])
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0) * inv_std
    _store_pair(partials, num_parts, total, product, column, column_mask, columns, block_columns)


@triton.jit
def _load_windows(dpooled, positions, source, mask):
    """Gradients, float32, and positions of a tile of windows; a window that does not exist matches no position."""
    gradient = tl.load(dpooled + source, mask=mask, other=0.0).to(tl.float32)
    return gradient, tl.load(positions + source, mask=mask, other=NOWHERE)


@triton.jit
def pool_input_gradient_kernel(
    dpooled,
    positions,
    x,
    dx,
    sums,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    span_rows,
    height: tl.constexpr,
    width: tl.constexpr,
    pooled_height: tl.constexpr,
    pooled_width: tl.constexpr,
    columns: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Backward, second pass: dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n).

    dz is gathered a second time: reading the pooled gradient, a quarter of x's size, costs less than writing and
    reading dz. sums (spans, 2, columns); the others as in `pool_kernel`.

    One program handles one tile of windows. Window (i, j) writes the pixels (2 i, 2 j) to (2 i + 1, 2 j + 1), which
    receive from it and from its neighbours to the right, below, and both, in this order. So each window is loaded four
    times for four pixels, and the positions compared with are constants.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, block_rows, columns, block_columns)
    mu, inv_std, scale, _ = _load_channels(mean, rstd, weight, bias, column, column_mask, columns)
    # One division per program, not one per channel.
    windows = tl.minimum(num_rows - tl.program_id(1).to(tl.int64) * span_rows, span_rows)
    share = scale * (pooled_height * pooled_width / (height * width) / windows.to(tl.float32))
    # dx = scale dz - (offset + slope (x - mean)); rstd of h is multiplied in per channel.
    pair = sums + tl.program_id(1) * 2 * columns + column
    offset = share * tl.load(pair, mask=column_mask, other=0.0)
    slope = share * inv_std * tl.load(pair + columns, mask=column_mask, other=0.0)

    row = (first + tl.arange(0, block_rows)).to(tl.int32)
    i, j = row // pooled_width % pooled_height, row % pooled_width
    exists = (tl.arange(0, block_rows) < count)[:, None] & column_mask[None, :]
    right, below = exists & (j < pooled_width - 1)[:, None], exists & (i < pooled_height - 1)[:, None]
    window = row.to(tl.int64)[:, None] * columns + column[None, :]
    own, own_at = _load_windows(dpooled, positions, window, exists)
    beside, beside_at = _load_windows(dpooled, positions, window + columns, right)
    lower, lower_at = _load_windows(dpooled, positions, window + pooled_width * columns, below)
    both, both_at = _load_windows(dpooled, positions, window + (pooled_width + 1) * columns, right & below)
    corner = (row // (pooled_height * pooled_width) * height + 2 * i) * width + 2 * j
    pixel = corner.to(tl.int64)[:, None] * columns + column[None, :]
    for number in tl.static_range(4):
        down, across = number // 2, number % 2
        gradient = tl.where(own_at == 3 * down + across + 4, own, 0.0)
        if across:
            gradient += tl.where(beside_at == 3 * down + 3, beside, 0.0)
        if down:
            gradient += tl.where(lower_at == across + 1, lower, 0.0)
        if number == 3:
            gradient += tl.where(both_at == 0, both, 0.0)
        # The last row and column of windows of an image with an odd size have no second pixel.
        mask = exists & (2 * i + down < height)[:, None] & (2 * j + across < width)[:, None]
        target = pixel + (down * width + across) * columns
        values = tl.load(x + target, mask=mask, other=0.0).to(tl.float32)
        result = gradient * scale[None, :] - ((values - mu[None, :]) * slope[None, :] + offset[None, :])
        tl.store(dx + target, result.to(dx.dtype.element_ty), mask=mask)
