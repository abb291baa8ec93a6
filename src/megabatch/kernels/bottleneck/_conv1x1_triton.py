# mypy: ignore-errors
"""Triton kernels of 1x1 convolutions as matrix products. `conv1x1` imports this module when a kernel first runs.

Layout: images (N, C, H, W) in channels_last format are row-major matrices of N H W rows (pixels) and C columns
(channels). The rows are cut into spans of `span_rows` rows, of which the last may be shorter, each span into parts of
`rows_per_part` rows, and those into tiles of `block_rows` rows; a tile never has rows of two spans. Statistics (mean,
rstd) are (spans, C); scale and bias are (C,). `inputs` and `outputs` count the input and output channels C and K of the
convolution.

The convolution's input h = relu((x - mean) rstd scale + bias) is never in memory: a kernel computes it from each tile
of x that it reads. Matrices that are read in tiles come as tensor descriptors, for the copy engine (TMA) of a Hopper
GPU; stores, and tensors that are read once, use pointers and masks, because a row tile may end inside a block.

A program of forward_kernel or data_gradient_kernel walks down one part of one span and adds up its sums over all tiles:
with about two programs per multiprocessor, few partial sums are left to add. Products are accumulated in float32.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megabatch.kernels.bottleneck._tiles_triton import _add_moments, _locate_part, _locate_rows, _normalise_relu
from megabatch.kernels.norm._join_triton import _bits

__all__ = ["TensorDescriptor"]


@triton.jit
def forward_kernel(
    x,
    weight,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    partials,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    normalise: tl.constexpr,
    inputs,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    """Forward: y = h weight^T, and the moments of each part of y after rounding.

    A program computes block_outputs columns of y in one part, tile by tile (block_rows, block_outputs), each summed
    over all input channels in steps of block_inputs. x (rows, inputs) and weight (outputs, inputs) are descriptors; y
    is (rows, outputs); partials (spans, parts, 2, outputs). Without `normalise` h is x.
    """
    blocks_across = (outputs + block_outputs - 1) // block_outputs
    first_output = (tl.program_id(0) % blocks_across) * block_outputs
    part, span, part_row, part_size = _locate_part(num_rows, span_rows, rows_per_part, num_parts, blocks_across)
    column = first_output + tl.arange(0, block_outputs)
    row = tl.arange(0, block_rows)
    mean = tl.zeros((block_outputs,), dtype=tl.float32)
    squares = tl.zeros((block_outputs,), dtype=tl.float32)
    for done in range(0, part_size, block_rows):
        first_row = part_row + done
        count = tl.minimum(part_size - done, block_rows)
        total = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
        for first_input in range(0, inputs, block_inputs):
            h = x.load([first_row.to(tl.int32), first_input])
            if normalise:
                channel = first_input + tl.arange(0, block_inputs)
                h = _normalise_relu(
                    h, mean_ptr, rstd_ptr, scale_ptr, bias_ptr, span, channel, count, inputs, block_rows
                )
            total = tl.dot(h, weight.load([first_output, first_input]).T, total, input_precision=precision)
        rounded = total.to(y_ptr.dtype.element_ty)
        target = y_ptr + first_row * outputs + row[:, None] * outputs + column[None, :]
        # The mask keeps rows of the next span, which the block also covers, from being overwritten.
        tl.store(target, rounded, mask=(row < count)[:, None] & (column < outputs)[None, :])
        # Moments of the rounded values: these are what the next batch norm reads.
        mean, squares = _add_moments(mean, squares, rounded.to(tl.float32), done, count, block_rows)
    target = partials + part * 2 * outputs + column
    tl.store(target, mean, mask=column < outputs)
    tl.store(target + outputs, squares, mask=column < outputs)


@triton.jit
def _apply_deferred(
    gradient,
    y,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    sums_ptr,
    span,
    span_size,
    column,
    count,
    columns,
    relu: tl.constexpr,
    block_rows: tl.constexpr,
):
    """Returns a tile of dy, the gradient of a batch norm's input y, from the gradient of its output.

        dy = scale rstd (dz - sum(dz) / n - (y - mean) rstd sum(dz (y - mean) rstd) / n)

    n is `span_size`, the rows of the span; `sums_ptr` points to both sums, (spans, 2, columns). With `relu` dz is
    `gradient` where the normalised y is positive, else dz is `gradient`. Rows of other spans are 0.
    """
    valid = column < columns
    mean = tl.load(mean_ptr + span * columns + column, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + span * columns + column, mask=valid, other=0.0)
    slope = rstd * tl.load(scale_ptr + column, mask=valid, other=0.0)
    centred = y.to(tl.float32) - mean[None, :]
    dz = gradient.to(tl.float32)
    if relu:
        bias = tl.load(bias_ptr + column, mask=valid, other=0.0)
        # Rounded to y's dtype first, as forward rounded it: the mask must be the one of forward.
        dz = tl.where((centred * slope[None, :] + bias[None, :]).to(y.dtype) <= 0, 0.0, dz)
    span_sums = sums_ptr + span * 2 * columns + column
    mean_dz = tl.load(span_sums, mask=valid, other=0.0) / span_size
    mean_product = tl.load(span_sums + columns, mask=valid, other=0.0) / span_size * rstd
    dy = (dz - mean_dz[None, :] - centred * mean_product[None, :]) * slope[None, :]
    # Rows of the next span, which the block also covers, must not enter the products.
    return tl.where((tl.arange(0, block_rows) < count)[:, None], dy, 0.0).to(y.dtype)


@triton.jit
def _store_sums(target, sums, products, rstd_ptr, span, column, columns):
    """Stores column sums of gradient, and of gradient (values - mean) times rstd, to two rows at `target`."""
    valid = column < columns
    tl.store(target + column, sums, mask=valid)
    rstd = tl.load(rstd_ptr + span * columns + column, mask=valid, other=0.0)
    tl.store(target + columns + column, products * rstd, mask=valid)


@triton.jit
def data_gradient_kernel(
    dy,
    weight,
    x_ptr,
    relu_mask,
    addend_ptr,
    residual_ptr,
    dz_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    other_mean_ptr,
    other_rstd_ptr,
    y,
    y_mean_ptr,
    y_rstd_ptr,
    y_scale_ptr,
    y_bias_ptr,
    y_sums_ptr,
    partials,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    behind_residual: tl.constexpr,
    has_addend: tl.constexpr,
    two_norms: tl.constexpr,
    deferred: tl.constexpr,
    deferred_relu: tl.constexpr,
    inputs,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    """Data gradient: dz = mask (dy weight + addend), and each part's sums of dz and dz (x - mean) rstd.

    A program computes block_inputs columns of dz in one part, tile by tile (block_rows, block_inputs), each summed over
    all output channels in steps of block_outputs. dy (rows, outputs) and weight (outputs, inputs) are descriptors; x,
    addend, residual and dz are (rows, inputs); the sums, of dz after rounding, go to `partials` (spans, parts, 2 or 4,
    inputs).

    - `behind_residual`: the mask is in the bits `relu_mask` (rows, inputs / 8); else it is h > 0, from x.
    - `two_norms`: partials has four rows; the last two are the same sums with the residual and its statistics
      other_mean, other_rstd instead of x and its own.
    - `deferred`: dy is the gradient of what a batch norm made of y (rows, outputs), a descriptor as well;
      `_apply_deferred` completes it.
    """
    blocks_across = (inputs + block_inputs - 1) // block_inputs
    first_input = (tl.program_id(0) % blocks_across) * block_inputs
    part, span, part_row, part_size = _locate_part(num_rows, span_rows, rows_per_part, num_parts, blocks_across)
    column = first_input + tl.arange(0, block_inputs)
    row = tl.arange(0, block_rows)
    mean = tl.load(mean_ptr + span * inputs + column, mask=column < inputs, other=0.0)
    sums = tl.zeros((block_inputs,), dtype=tl.float32)
    products = tl.zeros((block_inputs,), dtype=tl.float32)
    if two_norms:
        other_mean = tl.load(other_mean_ptr + span * inputs + column, mask=column < inputs, other=0.0)
        other_products = tl.zeros((block_inputs,), dtype=tl.float32)
    for done in range(0, part_size, block_rows):
        first_row = part_row + done
        count = tl.minimum(part_size - done, block_rows)
        total = tl.zeros((block_rows, block_inputs), dtype=tl.float32)
        for first_output in range(0, outputs, block_outputs):
            gradient = dy.load([first_row.to(tl.int32), first_output])
            if deferred:
                y_tile = y.load([first_row.to(tl.int32), first_output])
                # The last span may be shorter.
                span_size = tl.minimum(num_rows - span.to(tl.int64) * span_rows, span_rows).to(tl.float32)
                gradient = _apply_deferred(
                    gradient,
                    y_tile,
                    y_mean_ptr,
                    y_rstd_ptr,
                    y_scale_ptr,
                    y_bias_ptr,
                    y_sums_ptr,
                    span,
                    span_size,
                    first_output + tl.arange(0, block_outputs),
                    count,
                    outputs,
                    deferred_relu,
                    block_rows,
                )
            total = tl.dot(gradient, weight.load([first_output, first_input]), total, input_precision=precision)
        offset = first_row * inputs + row[:, None] * inputs + column[None, :]
        valid = (row < count)[:, None] & (column < inputs)[None, :]
        if has_addend:
            total += tl.load(addend_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0)
        if behind_residual:
            # Eight channels share a byte; block_inputs is a multiple of 8, so tiles begin at whole bytes.
            bits = relu_mask + first_row * ((inputs + 7) // 8)
            byte = first_input // 8 + tl.arange(0, block_inputs // 8)
            passes = _bits(bits, row, byte, count, inputs, block_rows, block_inputs)
        else:
            h = _normalise_relu(x, mean_ptr, rstd_ptr, scale_ptr, bias_ptr, span, column, count, inputs, block_rows)
            passes = ~(h <= 0)
        rounded = tl.where(passes, total, 0.0).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + offset, rounded, mask=valid)
        # Sums of the rounded values: these are what the pass that computes dx reads.
        gradient = tl.where(valid, rounded.to(tl.float32), 0.0)
        sums += tl.sum(gradient, axis=0)
        products += tl.sum(gradient * (x.to(tl.float32) - mean[None, :]), axis=0)
        if two_norms:
            residual = tl.load(residual_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            other_products += tl.sum(gradient * (residual - other_mean[None, :]), axis=0)
    num_pairs: tl.constexpr = 2 if two_norms else 1
    target = partials + part * num_pairs * 2 * inputs
    _store_sums(target, sums, products, rstd_ptr, span, column, inputs)
    if two_norms:
        _store_sums(target + 2 * inputs, sums, other_products, other_rstd_ptr, span, column, inputs)


@triton.jit
def weight_gradient_kernel(
    dy,
    x,
    partials,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    y,
    y_mean_ptr,
    y_rstd_ptr,
    y_scale_ptr,
    y_bias_ptr,
    y_sums_ptr,
    num_rows,
    span_rows,
    tiles_per_span,
    num_row_tiles,
    row_tiles_per_part,
    normalise: tl.constexpr,
    deferred: tl.constexpr,
    deferred_relu: tl.constexpr,
    inputs,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    """Weight gradient: dweight = dy^T h, summed over one part of the rows.

    Program (t, p) computes tile t (block_outputs, block_inputs) of dweight over the row tiles of part p, in order, and
    stores it to `partials` (parts, outputs, inputs). dy (rows, outputs) and x (rows, inputs) are descriptors. Without
    `normalise` h is x; `deferred` is as in data_gradient_kernel.
    """
    num_input_tiles = (inputs + block_inputs - 1) // block_inputs
    first_output = (tl.program_id(0) // num_input_tiles) * block_outputs
    first_input = (tl.program_id(0) % num_input_tiles) * block_inputs
    part = tl.program_id(1)
    column = first_input + tl.arange(0, block_inputs)
    total = tl.zeros((block_outputs, block_inputs), dtype=tl.float32)
    last = tl.minimum((part + 1) * row_tiles_per_part, num_row_tiles)
    for row_tile in range(part * row_tiles_per_part, last):
        span, first_row, count = _locate_rows(row_tile, tiles_per_span, num_rows, span_rows, block_rows)
        gradient = dy.load([first_row.to(tl.int32), first_output])
        if deferred:
            y_tile = y.load([first_row.to(tl.int32), first_output])
            span_size = tl.minimum(num_rows - span.to(tl.int64) * span_rows, span_rows).to(tl.float32)
            gradient = _apply_deferred(
                gradient,
                y_tile,
                y_mean_ptr,
                y_rstd_ptr,
                y_scale_ptr,
                y_bias_ptr,
                y_sums_ptr,
                span,
                span_size,
                first_output + tl.arange(0, block_outputs),
                count,
                outputs,
                deferred_relu,
                block_rows,
            )
        h = x.load([first_row.to(tl.int32), first_input])
        # Both branches set h to 0 in rows of other spans, which the next row tile reads again.
        if normalise:
            h = _normalise_relu(h, mean_ptr, rstd_ptr, scale_ptr, bias_ptr, span, column, count, inputs, block_rows)
        else:
            h = tl.where((tl.arange(0, block_rows) < count)[:, None], h, 0.0)
        total = tl.dot(gradient.T, h, total, input_precision=precision)
    row = first_output + tl.arange(0, block_outputs)
    target = partials + part.to(tl.int64) * outputs * inputs + row[:, None] * inputs + column[None, :]
    tl.store(target, total, mask=(row < outputs)[:, None] & (column < inputs)[None, :])
