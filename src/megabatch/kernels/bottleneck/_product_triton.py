# mypy: ignore-errors
"""Triton kernels of the products of 16-bit matrices in `products`, which imports this module when one first runs.

Matrices are row-major with a row per pixel and a column per channel. Rows are cut into spans of `span_rows` rows, of
which the last may be shorter; a tile never has rows of two spans. Matrices that are read in tiles come as tensor
descriptors, for the copy engine (TMA) of a Hopper GPU, which reads zeros outside of them. Sums are float32.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megabatch.kernels.norm._batch_norm_triton import _part_rows, _program_columns, _tile_offsets
from megabatch.kernels.norm._join_triton import _bits, _program_bytes, _store_bits

__all__ = ["TensorDescriptor"]


@triton.jit
def _add_product(total, a, b, row, first_column, inner, columns, inner_major: tl.constexpr, block_inner: tl.constexpr):
    """total + a b of this program's rows, span and columns; `block_inner` divides `inner`, the length of the sum."""
    span = tl.program_id(1)
    for first in range(0, inner, block_inner):
        left = a.load([row, first])
        if inner_major:
            total = tl.dot(left, b.load([span * inner + first, first_column]), total)
        else:
            total = tl.dot(left, b.load([span * columns + first_column, first]).T, total)
    return total


@triton.jit
def product_kernel(
    a,
    b,
    other_a,
    other_b,
    bias,
    addend,
    relu_mask,
    out,
    num_rows,
    span_rows,
    inner,
    other_inner,
    inner_major: tl.constexpr,
    has_other: tl.constexpr,
    has_bias: tl.constexpr,
    has_addend: tl.constexpr,
    relu: tl.constexpr,
    masked: tl.constexpr,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_inner: tl.constexpr,
    other_block_inner: tl.constexpr,
):
    """out = epilogue(a b + other_a other_b + bias + addend), rounded once. One program writes one tile.

    a (num_rows, inner) is a descriptor, and b of (spans inner, columns), or of (spans columns, inner) without
    `inner_major`; other_a and other_b alike, with `other_inner`. bias (spans, columns) is float32; addend and out are
    (num_rows, columns). With `relu` the epilogue is ReLU, whose mask is written as bits (`_join_triton`); with
    `masked` the mask is read, and values are 0 where it is not set.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first_column = (tl.program_id(0) % ((columns + block_columns - 1) // block_columns)) * block_columns
    first, count = _part_rows(num_rows, span_rows, block_rows, columns, block_columns)
    row = first.to(tl.int32)  # the copy engine counts rows in 32 bits
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    total = _add_product(total, a, b, row, first_column, inner, columns, inner_major, block_inner)
    if has_other:
        total = _add_product(
            total, other_a, other_b, row, first_column, other_inner, columns, inner_major, other_block_inner
        )
    offset, mask = _tile_offsets(column, column_mask, 0, count, columns, block_rows)
    if has_bias:
        total += tl.load(bias + tl.program_id(1) * columns + column, mask=column_mask, other=0.0)[None, :]
    if has_addend:
        total += tl.load(addend + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    tile_bits, byte = relu_mask + first * ((columns + 7) // 8), _program_bytes(columns, block_columns)
    tile_row = tl.arange(0, block_rows)
    if relu:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if masked:
        passes = _bits(tile_bits, tile_row, byte, count, columns, block_rows, block_columns)
        total = tl.where(passes, total, 0.0)
    rounded = total.to(out.dtype.element_ty)
    # The mask keeps rows of the next span, which the tile also covers, from being overwritten.
    tl.store(out + first * columns + offset, rounded, mask=mask)
    if relu:
        written = mask & ~(rounded <= 0)
        _store_bits(tile_bits, written, tile_row, byte, count, columns, block_rows, block_columns)


@triton.jit
def gram_kernel(
    a,
    b,
    partials,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    outputs,
    inputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    """a^T b and the sums of a's columns, over one part of a span.

    Grid (tiles of the product, parts, spans); a program adds up one tile over a part's rows, in order. a (num_rows,
    outputs) and b (num_rows, inputs) are descriptors; partials (spans, parts, outputs (inputs + 1)): the product, then
    the sums.
    """
    across = (inputs + block_inputs - 1) // block_inputs
    first_output = (tl.program_id(0) // across) * block_outputs
    first_input = (tl.program_id(0) % across) * block_inputs
    part, span = tl.program_id(1), tl.program_id(2)
    start = span.to(tl.int64) * span_rows  # int64: times the channels it may exceed 2^31
    size = tl.minimum(num_rows - start, span_rows).to(tl.int32)
    total = tl.zeros((block_outputs, block_inputs), dtype=tl.float32)
    sums = tl.zeros((block_outputs,), dtype=tl.float32)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, size)
    for done in range(begin, end, block_rows):
        row = (start + done).to(tl.int32)
        # A tile also covers rows of the next part or span, which must not count.
        inside = (done + tl.arange(0, block_rows) < end)[:, None]
        left = a.load([row, first_output])
        right = tl.where(inside, b.load([row, first_input]), 0.0)
        total = tl.dot(left.T, right, total)
        sums += tl.sum(tl.where(inside, left.to(tl.float32), 0.0), axis=0)
    output, column = first_output + tl.arange(0, block_outputs), first_input + tl.arange(0, block_inputs)
    base = partials + (span.to(tl.int64) * num_parts + part) * outputs * (inputs + 1)
    written = (output < outputs)[:, None] & (column < inputs)[None, :]
    tl.store(base + output[:, None] * inputs + column[None, :], total, mask=written)
    if first_input == 0:
        tl.store(base + outputs * inputs + output, sums, mask=output < outputs)
