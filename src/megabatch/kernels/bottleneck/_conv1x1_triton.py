# mypy: ignore-errors
"""Triton kernels of 1x1 convolutions as matrix products. Loaded by `conv1x1` alone, when one runs on a GPU.

Images with the channels last are matrices of rows (samples x pixels) and channels, cut into spans of `span_rows` rows,
the last of which may be short; a tile holds rows of one span. The convolution's input h is never in memory: it is
relu((x - mean) rstd weight + bias), computed from x as a tile is read. Loads go through tensor descriptors, which
a Hopper GPU serves by its copy engine; stores and what is read once go through pointers, as a tile may end in a span.
A launch has about as many programs as the GPU has multiprocessors, each of which takes tile after tile.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megabatch.kernels.norm._join_triton import _bits

__all__ = ["TensorDescriptor"]


@triton.jit
def _rows_of_tile(row_tile, tiles_per_span, num_rows, span_rows, block_rows: tl.constexpr):
    """Span of a tile, its first row, and how many of its rows are of that span."""
    span = row_tile // tiles_per_span
    inside = (row_tile % tiles_per_span) * block_rows
    first = span.to(tl.int64) * span_rows + inside
    count = tl.minimum(tl.minimum(num_rows - first, span_rows - inside), block_rows).to(tl.int32)
    return span, first, count


@triton.jit
def _normalised(x, mean, rstd, scale, bias, span, column, count, columns, block_rows: tl.constexpr):
    """relu((x - mean) rstd scale + bias) of one tile, in the type of x; 0 in rows that are not of the span."""
    inside = column < columns
    middle = tl.load(mean + span * columns + column, mask=inside, other=0.0)
    slope = tl.load(rstd + span * columns + column, mask=inside, other=0.0)
    slope *= tl.load(scale + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0)
    values = (x.to(tl.float32) - middle[None, :]) * slope[None, :] + shift[None, :]
    here = (tl.arange(0, block_rows) < count)[:, None]
    return tl.where(here & ~(values <= 0), values, 0.0).to(x.dtype)


@triton.jit
def _put_moments(partials, row_tile, values, column, count, columns, block_rows: tl.constexpr):
    """Mean and sum of squared differences from it of a tile's columns, to its two rows of (tiles, 2, columns)."""
    here = (tl.arange(0, block_rows) < count)[:, None]
    middle = tl.sum(tl.where(here, values, 0.0), axis=0) / tl.maximum(count, 1).to(tl.float32)
    away = tl.where(here, values - middle[None, :], 0.0)
    place = partials + row_tile * 2 * columns + column
    tl.store(place, middle, mask=column < columns)
    tl.store(place + columns, tl.sum(away * away, axis=0), mask=column < columns)


@triton.jit
def forward_kernel(
    x,
    weight,
    y,
    mean,
    rstd,
    scale,
    bias,
    partials,
    num_rows,
    span_rows,
    tiles_per_span,
    num_row_tiles,
    normalise: tl.constexpr,
    inputs,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    """y = h weight^T, and the moments of y as it is rounded. Programs side by side share rows, which stay in cache."""
    across = (outputs + block_outputs - 1) // block_outputs
    for tile in range(tl.program_id(0), num_row_tiles * across, tl.num_programs(0)):
        row_tile = tile // across
        left = (tile % across) * block_outputs
        span, first, count = _rows_of_tile(row_tile, tiles_per_span, num_rows, span_rows, block_rows)
        sums = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
        for begin in range(0, inputs, block_inputs):
            h = x.load([first.to(tl.int32), begin])
            if normalise:
                column = begin + tl.arange(0, block_inputs)
                h = _normalised(h, mean, rstd, scale, bias, span, column, count, inputs, block_rows)
            sums = tl.dot(h, weight.load([left, begin]).T, sums, input_precision=precision)
        column = left + tl.arange(0, block_outputs)
        row = tl.arange(0, block_rows)
        rounded = sums.to(y.dtype.element_ty)
        place = y + first * outputs + row[:, None] * outputs + column[None, :]
        tl.store(place, rounded, mask=(row < count)[:, None] & (column < outputs)[None, :])
        _put_moments(partials, row_tile, rounded.to(tl.float32), column, count, outputs, block_rows)


@triton.jit
def _applied(
    gradient,
    y,
    mean,
    rstd,
    scale,
    bias,
    sums,
    span,
    size,
    column,
    count,
    columns,
    relu: tl.constexpr,
    block_rows: tl.constexpr,
):
    """Batch norm's gradient of a tile of its input y, from that of its output; 0 in rows that are not of the span.

    scale rstd (dz - sum(dz) / n - h sum(dz h) / n); with `relu` dz is that where batch norm of y is above 0.
    """
    inside = column < columns
    middle = tl.load(mean + span * columns + column, mask=inside, other=0.0)
    own = tl.load(rstd + span * columns + column, mask=inside, other=0.0)
    slope = own * tl.load(scale + column, mask=inside, other=0.0)
    away = y.to(tl.float32) - middle[None, :]
    dz = gradient.to(tl.float32)
    if relu:
        shift = tl.load(bias + column, mask=inside, other=0.0)
        dz = tl.where((away * slope[None, :] + shift[None, :]).to(y.dtype) <= 0, 0.0, dz)
    pair = sums + span * 2 * columns + column
    of_gradient = tl.load(pair, mask=inside, other=0.0) / size
    of_product = tl.load(pair + columns, mask=inside, other=0.0) / size * own
    dy = (dz - of_gradient[None, :] - away * of_product[None, :]) * slope[None, :]
    return tl.where((tl.arange(0, block_rows) < count)[:, None], dy, 0.0).to(y.dtype)


@triton.jit
def _put_sums(pair, gradient, values, mean, rstd, span, column, columns):
    """The sums of a tile's gradient and of the gradient times (values - mean) rstd, to two rows at `pair`."""
    inside = column < columns
    middle = tl.load(mean + span * columns + column, mask=inside, other=0.0)
    slope = tl.load(rstd + span * columns + column, mask=inside, other=0.0)
    product = gradient * (values.to(tl.float32) - middle[None, :])
    tl.store(pair + column, tl.sum(gradient, axis=0), mask=inside)
    tl.store(pair + columns + column, tl.sum(product, axis=0) * slope, mask=inside)


@triton.jit
def data_gradient_kernel(
    dy,
    weight,
    x,
    passed,
    addend,
    residual,
    dz,
    mean,
    rstd,
    scale,
    bias,
    other_mean,
    other_rstd,
    y,
    y_mean,
    y_deviation,
    y_scale,
    y_bias,
    y_sums,
    partials,
    num_rows,
    span_rows,
    tiles_per_span,
    num_row_tiles,
    behind_residual: tl.constexpr,
    has_addend: tl.constexpr,
    two_norms: tl.constexpr,
    rest: tl.constexpr,
    rest_relu: tl.constexpr,
    inputs,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    """dz = dy weight + addend where ReLU passes, and each tile's sums of dz and dz (x - mean) rstd, of dz rounded.

    ReLU passes where the bits `passed` say so behind a residual, else where h is above 0. With `two_norms` the sums of
    the residual's batch norm stand behind: the first of these is the same sum again. With `rest` dy is the gradient of
    what batch norm made of the convolution's output y.
    """
    across = (inputs + block_inputs - 1) // block_inputs
    for tile in range(tl.program_id(0), num_row_tiles * across, tl.num_programs(0)):
        row_tile = tile // across
        left = (tile % across) * block_inputs
        span, first, count = _rows_of_tile(row_tile, tiles_per_span, num_rows, span_rows, block_rows)
        sums = tl.zeros((block_rows, block_inputs), dtype=tl.float32)
        for begin in range(0, outputs, block_outputs):
            gradient = dy.load([first.to(tl.int32), begin])
            if rest:
                behind = y.load([first.to(tl.int32), begin])
                size = tl.minimum(num_rows - span.to(tl.int64) * span_rows, span_rows).to(tl.float32)
                across_y = begin + tl.arange(0, block_outputs)
                gradient = _applied(
                    gradient,
                    behind,
                    y_mean,
                    y_deviation,
                    y_scale,
                    y_bias,
                    y_sums,
                    span,
                    size,
                    across_y,
                    count,
                    outputs,
                    rest_relu,
                    block_rows,
                )
            sums = tl.dot(gradient, weight.load([begin, left]), sums, input_precision=precision)
        column = left + tl.arange(0, block_inputs)
        row = tl.arange(0, block_rows)
        place = first * inputs + row[:, None] * inputs + column[None, :]
        here = (row < count)[:, None] & (column < inputs)[None, :]
        if has_addend:
            sums += tl.load(addend + place, mask=here, other=0.0).to(tl.float32)
        values = tl.load(x + place, mask=here, other=0.0)
        if behind_residual:
            bits = passed + first * ((inputs + 7) // 8)
            byte = left // 8 + tl.arange(0, block_inputs // 8)
            passes = _bits(bits, row, byte, count, inputs, block_rows, block_inputs)
        else:
            h = _normalised(values, mean, rstd, scale, bias, span, column, count, inputs, block_rows)
            passes = ~(h <= 0)
        rounded = tl.where(passes, sums, 0.0).to(dz.dtype.element_ty)
        tl.store(dz + place, rounded, mask=here)
        gradient = tl.where(here, rounded.to(tl.float32), 0.0)
        pairs: tl.constexpr = 2 if two_norms else 1
        pair = partials + row_tile * pairs * 2 * inputs
        _put_sums(pair, gradient, values, mean, rstd, span, column, inputs)
        if two_norms:
            added = tl.load(residual + place, mask=here, other=0.0)
            _put_sums(pair + 2 * inputs, gradient, added, other_mean, other_rstd, span, column, inputs)


@triton.jit
def weight_gradient_kernel(
    dy,
    x,
    partials,
    mean,
    rstd,
    scale,
    bias,
    y,
    y_mean,
    y_deviation,
    y_scale,
    y_bias,
    y_sums,
    num_rows,
    span_rows,
    tiles_per_span,
    num_row_tiles,
    row_tiles_per_part,
    normalise: tl.constexpr,
    rest: tl.constexpr,
    rest_relu: tl.constexpr,
    inputs,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    """dweight = dy^T h over one part of the rows, to `partials` (parts, outputs, inputs) in float32.

    With `rest` dy is the gradient of what batch norm made of the convolution's output y.
    """
    across = (inputs + block_inputs - 1) // block_inputs
    top = (tl.program_id(0) // across) * block_outputs
    left = (tl.program_id(0) % across) * block_inputs
    part = tl.program_id(1)
    column = left + tl.arange(0, block_inputs)
    sums = tl.zeros((block_outputs, block_inputs), dtype=tl.float32)
    last = tl.minimum((part + 1) * row_tiles_per_part, num_row_tiles)
    for row_tile in range(part * row_tiles_per_part, last):
        span, first, count = _rows_of_tile(row_tile, tiles_per_span, num_rows, span_rows, block_rows)
        gradient = dy.load([first.to(tl.int32), top])
        if rest:
            behind = y.load([first.to(tl.int32), top])
            size = tl.minimum(num_rows - span.to(tl.int64) * span_rows, span_rows).to(tl.float32)
            gradient = _applied(
                gradient,
                behind,
                y_mean,
                y_deviation,
                y_scale,
                y_bias,
                y_sums,
                span,
                size,
                top + tl.arange(0, block_outputs),
                count,
                outputs,
                rest_relu,
                block_rows,
            )
        h = x.load([first.to(tl.int32), left])
        if normalise:
            h = _normalised(h, mean, rstd, scale, bias, span, column, count, inputs, block_rows)
        else:
            h = tl.where((tl.arange(0, block_rows) < count)[:, None], h, 0.0)
        sums = tl.dot(gradient.T, h, sums, input_precision=precision)
    row = top + tl.arange(0, block_outputs)
    place = partials + part.to(tl.int64) * outputs * inputs + row[:, None] * inputs + column[None, :]
    tl.store(place, sums, mask=(row < outputs)[:, None] & (column < inputs)[None, :])
