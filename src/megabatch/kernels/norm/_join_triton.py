# mypy: ignore-errors
"""Triton kernels of a residual join: batch norm, sum and ReLU. Imported by `join` and `bottleneck` kernels on a GPU.

    z = relu(batch norm of x + r);   dz = dy where z > 0;   dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)

Matrices, spans, parts, partial sums and the grid are those of `_batch_norm_triton`.

`relu_mask` holds one bit per value of z, 1 where z > 0 or z is NaN: uint8 (num_rows, ceil(columns / 8)), where bit i
of byte j is channel 8 j + i. It takes a sixteenth of the memory traffic of a 16-bit z, which would tell the same.
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


@triton.jit
def _load_statistics(mean, rstd, column, column_mask, columns):
    """Mean and rstd of this program's span and channels."""
    of_span = tl.program_id(1) * columns + column
    return tl.load(mean + of_span, mask=column_mask, other=0.0), tl.load(rstd + of_span, mask=column_mask, other=0.0)


@triton.jit
def _byte_offsets(row, byte, count, columns):
    """Offsets of bytes of the ReLU mask from the part's first byte, and the mask of those that exist."""
    across = (columns + 7) // 8  # bytes per row
    return row[:, None] * across + byte[None, :], (row[:, None] < count) & (byte[None, :] < across)


@triton.jit
def _program_bytes(columns, block_columns: tl.constexpr):
    """Indices within a row of the bytes that hold the bits of this program's channels; block_columns is 8 or more."""
    block = tl.program_id(0) % ((columns + block_columns - 1) // block_columns)
    return block * (block_columns // 8) + tl.arange(0, block_columns // 8)


@triton.jit
def _store_bits(bits, values, row, byte, count, columns, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Packs a tile of booleans into bytes and writes them; `bits` points to the part's first byte."""
    # (rows, bytes, 8): each value is shifted to its bit, and the sum over the last axis is the bitwise or.
    apart = tl.reshape(values.to(tl.int32), (block_rows, block_columns // 8, 8)) << tl.arange(0, 8)[None, None, :]
    offset, mask = _byte_offsets(row, byte, count, columns)
    tl.store(bits + offset, tl.sum(apart, axis=2).to(tl.uint8), mask=mask)


@triton.jit
def _bits(bits, row, byte, count, columns, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Loads a tile of bits as booleans (block_rows, block_columns); `bits` points to the part's first byte."""
    offset, mask = _byte_offsets(row, byte, count, columns)
    together = tl.load(bits + offset, mask=mask, other=0).to(tl.int32)
    apart = (together[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(apart, (block_rows, block_columns)) != 0


@triton.jit
def join_kernel(
    x,
    residual,
    y,
    relu_mask,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    span_rows,
    relu: tl.constexpr,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Join, forward: y = relu((x - mean) rstd weight + bias + r), and its ReLU mask. One program writes one tile.

    x, residual, y (num_rows, columns); mean, rstd (spans, columns); weight, bias (columns,). Without `relu`,
    `relu_mask` is not written.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, block_rows, columns, block_columns)
    offset, mask = _tile_offsets(column, column_mask, 0, count, columns, block_rows)
    values = tl.load(x + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(residual + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    mu, inv_std = _load_statistics(mean, rstd, column, column_mask, columns)
    scale = tl.load(weight + column, mask=column_mask, other=0.0) * inv_std
    values = _affine(values, mu, scale, tl.load(bias + column, mask=column_mask, other=0.0))
    # Both terms are float32 here: the sum is rounded once, to y's dtype.
    values += added
    if relu:
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = values.to(y.dtype.element_ty)
    tl.store(y + first * columns + offset, rounded, mask=mask)
    if relu:
        # The mask of the rounded values: a tiny positive value that became 0 in y passes no gradient. NaN passes it.
        row, byte = tl.arange(0, block_rows), _program_bytes(columns, block_columns)
        passes = mask & ~(rounded <= 0)
        bits = relu_mask + first * ((columns + 7) // 8)
        _store_bits(bits, passes, row, byte, count, columns, block_rows, block_columns)


@triton.jit
def join_gradient_kernel(
    dy,
    x,
    relu_mask,
    dz,
    partials,
    mean,
    rstd,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Join, backward: dz, and sums of dz and of dz h over one part of a span. One program walks down one part.

        dz = dy where relu_mask is set, else 0;   h = (x - mean) rstd

    dy, x, dz (num_rows, columns); partials (spans, parts, 2, columns), float32.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, rows_per_part, columns, block_columns)
    base = first * columns
    bits, byte = relu_mask + first * ((columns + 7) // 8), _program_bytes(columns, block_columns)
    mu, inv_std = _load_statistics(mean, rstd, column, column_mask, columns)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    products = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        offset, mask = _tile_offsets(column, column_mask, done, count, columns, block_rows)
        gradient = tl.load(dy + base + offset, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + base + offset, mask=mask, other=0.0).to(tl.float32)
        row = done + tl.arange(0, block_rows)
        passes = _bits(bits, row, byte, count, columns, block_rows, block_columns)
        rounded = tl.where(passes, gradient, 0.0).to(dz.dtype.element_ty)
        tl.store(dz + base + offset, rounded, mask=mask)
        # The sums are of dz as it was stored, rounded: dx is computed from the stored values.
        gradient = rounded.to(tl.float32)
        sums += gradient
        products += gradient * tl.where(mask, (values - mu[None, :]) * inv_std[None, :], 0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    _store_pair(partials, num_parts, total, product, column, column_mask, columns, block_columns)
