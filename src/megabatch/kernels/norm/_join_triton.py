# mypy: ignore-errors
"""Triton kernels of a residual join: batch norm, sum and ReLU. Loaded by `join_passes` alone, when one runs on a GPU.

Matrices, spans, parts and partial sums are those of `_batch_norm_triton`. The residual may be a convolution's output
that is still to be normalised by a batch norm of its own (`two_norms`). Where ReLU passes is kept as one bit a value:
a matrix of bytes beside that of values, bit i of byte j in a row for column 8 j + i.
"""

import triton
import triton.language as tl

from megabatch.kernels.norm._batch_norm_triton import (
    _columns_here,
    _input_gradient,
    _normalised,
    _put_pair,
    _rows_of_part,
    _tile,
)


@triton.jit
def _of_span(mean, rstd, column, inside, columns):
    """Mean and rstd of this span's channels."""
    own = tl.program_id(1) * columns + column
    return tl.load(mean + own, mask=inside, other=0.0), tl.load(rstd + own, mask=inside, other=0.0)


@triton.jit
def _bytes_of(row, byte, count, columns):
    """Offsets of these bytes of these rows' bits from those of the part's first row, and which of them exist."""
    across = (columns + 7) // 8
    return row[:, None] * across + byte[None, :], (row[:, None] < count) & (byte[None, :] < across)


@triton.jit
def _bytes_here(columns, block_columns: tl.constexpr):
    """The bytes that hold this program's columns."""
    block = tl.program_id(0) % ((columns + block_columns - 1) // block_columns)
    return block * (block_columns // 8) + tl.arange(0, block_columns // 8)


@triton.jit
def _put_bits(bits, values, row, byte, count, columns, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Writes where `values` are 1 and not 0; `bits` begins with the part's first row."""
    apart = tl.reshape(values.to(tl.int32), (block_rows, block_columns // 8, 8)) << tl.arange(0, 8)[None, None, :]
    place, here = _bytes_of(row, byte, count, columns)
    tl.store(bits + place, tl.sum(apart, axis=2).to(tl.uint8), mask=here)


@triton.jit
def _bits(bits, row, byte, count, columns, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Which of a tile's bits are set; `bits` begins with the part's first row."""
    place, here = _bytes_of(row, byte, count, columns)
    together = tl.load(bits + place, mask=here, other=0).to(tl.int32)
    apart = (together[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(apart, (block_rows, block_columns)) != 0


@triton.jit
def join_kernel(
    x,
    residual,
    y,
    passed,
    mean,
    rstd,
    weight,
    bias,
    other_mean,
    other_rstd,
    other_weight,
    other_bias,
    num_rows,
    span_rows,
    two_norms: tl.constexpr,
    relu: tl.constexpr,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """y = relu(weight (x - mean) rstd + bias + residual) in one pass, and with `relu` where y is not 0."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, block_rows, columns, block_columns)
    place, here = _tile(column, inside, 0, count, columns, block_rows)
    values = tl.load(x + first * columns + place, mask=here, other=0.0).to(tl.float32)
    added = tl.load(residual + first * columns + place, mask=here, other=0.0).to(tl.float32)
    middle, scale = _of_span(mean, rstd, column, inside, columns)
    slope = tl.load(weight + column, mask=inside, other=0.0) * scale
    values = _normalised(values, middle, slope, tl.load(bias + column, mask=inside, other=0.0))
    if two_norms:
        middle, scale = _of_span(other_mean, other_rstd, column, inside, columns)
        slope = tl.load(other_weight + column, mask=inside, other=0.0) * scale
        added = _normalised(added, middle, slope, tl.load(other_bias + column, mask=inside, other=0.0))
    values += added
    if relu:
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = values.to(y.dtype.element_ty)
    tl.store(y + first * columns + place, rounded, mask=here)
    if relu:
        row, byte = tl.arange(0, block_rows), _bytes_here(columns, block_columns)
        passes = here & ~(rounded <= 0)
        bits = passed + first * ((columns + 7) // 8)
        _put_bits(bits, passes, row, byte, count, columns, block_rows, block_columns)


@triton.jit
def join_gradient_kernel(
    dy,
    addend,
    x,
    residual,
    passed,
    dz,
    partials,
    mean,
    rstd,
    other_mean,
    other_rstd,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    has_addend: tl.constexpr,
    two_norms: tl.constexpr,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """dz = dy + addend where ReLU passed, and over each part of a span the sums of dz and of dz (x - mean) rstd.

    With `two_norms` also those of the residual's batch norm, behind them: the first of these is the same sum again.
    """
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, rows_per_part, columns, block_columns)
    base = first * columns
    bits, byte = passed + first * ((columns + 7) // 8), _bytes_here(columns, block_columns)
    middle, scale = _of_span(mean, rstd, column, inside, columns)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    products = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    if two_norms:
        other_middle, other_scale = _of_span(other_mean, other_rstd, column, inside, columns)
        others = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        place, here = _tile(column, inside, done, count, columns, block_rows)
        gradient = tl.load(dy + base + place, mask=here, other=0.0).to(tl.float32)
        values = tl.load(x + base + place, mask=here, other=0.0).to(tl.float32)
        if has_addend:
            gradient += tl.load(addend + base + place, mask=here, other=0.0).to(tl.float32)
        row = done + tl.arange(0, block_rows)
        passes = _bits(bits, row, byte, count, columns, block_rows, block_columns)
        rounded = tl.where(passes, gradient, 0.0).to(dz.dtype.element_ty)
        tl.store(dz + base + place, rounded, mask=here)
        gradient = rounded.to(tl.float32)
        sums += gradient
        products += gradient * tl.where(here, (values - middle[None, :]) * scale[None, :], 0.0)
        if two_norms:
            added = tl.load(residual + base + place, mask=here, other=0.0).to(tl.float32)
            others += gradient * tl.where(here, (added - other_middle[None, :]) * other_scale[None, :], 0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    pairs: tl.constexpr = 2 if two_norms else 1
    _put_pair(partials, num_parts, total, product, column, inside, columns, block_columns, pairs, 0)
    if two_norms:
        product = tl.sum(others, axis=0)
        _put_pair(partials, num_parts, total, product, column, inside, columns, block_columns, pairs, 1)


@triton.jit
def two_input_gradients_kernel(
    dz,
    x,
    residual,
    dx,
    dresidual,
    sums,
    mean,
    rstd,
    weight,
    other_mean,
    other_rstd,
    other_weight,
    num_rows,
    span_rows,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n) of both batch norms of a join, from one read of dz."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, block_rows, columns, block_columns)
    place, here = _tile(column, inside, 0, count, columns, block_rows)
    base = first * columns
    gradient = tl.load(dz + base + place, mask=here, other=0.0).to(tl.float32)
    start = tl.program_id(1).to(tl.int64) * span_rows
    size = tl.minimum(num_rows - start, span_rows).to(tl.float32)
    pairs = sums + tl.program_id(1) * 4 * columns
    values = tl.load(x + base + place, mask=here, other=0.0).to(tl.float32)
    middle, scale = _of_span(mean, rstd, column, inside, columns)
    slope = tl.load(weight + column, mask=inside, other=0.0) * scale
    result = _input_gradient(gradient, values, middle, scale, slope, pairs, size, column, inside, columns)
    tl.store(dx + base + place, result.to(dx.dtype.element_ty), mask=here)
    values = tl.load(residual + base + place, mask=here, other=0.0).to(tl.float32)
    middle, scale = _of_span(other_mean, other_rstd, column, inside, columns)
    slope = tl.load(other_weight + column, mask=inside, other=0.0) * scale
    pairs += 2 * columns
    result = _input_gradient(gradient, values, middle, scale, slope, pairs, size, column, inside, columns)
    tl.store(dresidual + base + place, result.to(dresidual.dtype.element_ty), mask=here)
