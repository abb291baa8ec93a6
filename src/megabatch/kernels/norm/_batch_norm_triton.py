# mypy: ignore-errors
"""Triton kernels of batch norm over spans. Imported only by other modules of kernels, when one runs on a GPU.

Every kernel reads and writes row-major matrices of `num_rows` rows (samples x pixels) and `columns` channels: images
(N, C, H, W) with the channels last. A span is `span_rows` consecutive rows with statistics of their own; the last span
may be shorter. With h = (x - mean) rstd, and n the number of rows of a span:

    y  = relu(weight h + bias);   dz = dy where y > 0;   dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)

Grid: axis 1 is the span, so that no tile mixes rows of two spans. Axis 0 numbers the tiles or parts of a span, with the
blocks of channels varying fastest, so that neighbouring programs read the same rows. An elementwise kernel handles one
tile of block_rows x block_columns values. A reducing kernel walks down one part, `rows_per_part` rows, tile by tile,
and writes its sums to `partials`; a second launch adds the parts. Sums go through memory, not through atomic
operations, whose order changes from run to run: equal inputs give equal bits.

`columns` is not a compile-time constant, so that one compilation is used for all layers.
"""

import triton
import triton.language as tl


@triton.jit
def _part_index(columns, block_columns: tl.constexpr):
    """Index within its span of the part, or tile, that this program handles."""
    return tl.program_id(0) // ((columns + block_columns - 1) // block_columns)


@triton.jit
def _part_rows(num_rows, span_rows, rows_per_part, columns, block_columns: tl.constexpr):
    """First row of this program's part, and its number of rows: 0 where the last span is too short for this part."""
    start = tl.program_id(1).to(tl.int64) * span_rows  # int64: offsets of values may exceed 2^31
    size = tl.minimum(num_rows - start, span_rows).to(tl.int32)
    first = _part_index(columns, block_columns) * rows_per_part
    count = tl.maximum(tl.minimum(size - first, rows_per_part), 0)
    return start + first, count


@triton.jit
def _program_columns(columns, block_columns: tl.constexpr):
    """The channels that this program handles, and the mask of those that exist."""
    block = tl.program_id(0) % ((columns + block_columns - 1) // block_columns)
    column = block * block_columns + tl.arange(0, block_columns)
    return column, column < columns


@triton.jit
def _tile_offsets(column, column_mask, done, count, columns, block_rows: tl.constexpr):
    """Offsets, from the part's first value, of the tile that begins `done` rows below it; and the tile's mask."""
    row = done + tl.arange(0, block_rows)
    return row[:, None] * columns + column[None, :], (row[:, None] < count) & column_mask[None, :]


@triton.jit
def _store_pair(
    partials,
    num_parts,
    one,
    two,
    column,
    column_mask,
    columns,
    block_columns: tl.constexpr,
    pairs: tl.constexpr = 1,
    pair: tl.constexpr = 0,
):
    """Writes two sums per channel of this part: rows 2 pair and 2 pair + 1 of its 2 `pairs` rows.

    Layout of `partials`: (spans, parts, 2 pairs, columns).
    """
    part = tl.program_id(1) * num_parts + _part_index(columns, block_columns)
    target = partials + (part * pairs + pair) * 2 * columns + column
    tl.store(target, one, mask=column_mask)
    tl.store(target + columns, two, mask=column_mask)


@triton.jit
def _affine(x, mu, scale, shift):
    """Batch norm of a tile, (x - mu) scale + shift.

    Every kernel uses this one expression, so that backward finds the same sign, and thus the same ReLU mask, as
    forward.
    """
    return (x - mu[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def normalise_kernel(
    x,
    y,
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
    """Batch norm and ReLU: y = relu((x - mean) rstd weight + bias). One program writes one tile.

    x, y (num_rows, columns); mean, rstd (spans, columns); weight, bias (columns,).
    """
    column, column_mask = _program_columns(columns, block_columns)
    # A tile is a part of block_rows rows.
    first, count = _part_rows(num_rows, span_rows, block_rows, columns, block_columns)
    offset, mask = _tile_offsets(column, column_mask, 0, count, columns, block_rows)
    values = tl.load(x + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    of_span = tl.program_id(1) * columns + column  # this span's row of mean and rstd
    scale = tl.load(weight + column, mask=column_mask, other=0.0) * tl.load(rstd + of_span, mask=column_mask, other=0.0)
    mu = tl.load(mean + of_span, mask=column_mask, other=0.0)
    values = _affine(values, mu, scale, tl.load(bias + column, mask=column_mask, other=0.0))
    if relu:
        # By default maximum(NaN, 0) is 0, which would hide a diverged network.
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + first * columns + offset, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gradient_sums_kernel(
    dy,
    x,
    partials,
    mean,
    rstd,
    weight,
    bias,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    relu: tl.constexpr,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Sums of dz and of dz h, per channel, over one part of a span. One program walks down one part.

        dz = dy where y > 0;   h = (x - mean) rstd

    dy, x (num_rows, columns); partials (spans, parts, 2, columns), float32; the other inputs as in `normalise_kernel`.
    The sign of y is recomputed from x, which is read for h anyway, so that y need not be read.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, rows_per_part, columns, block_columns)
    base = first * columns
    of_span = tl.program_id(1) * columns + column
    mu = tl.load(mean + of_span, mask=column_mask, other=0.0)
    inv_std = tl.load(rstd + of_span, mask=column_mask, other=0.0)
    scale = tl.load(weight + column, mask=column_mask, other=0.0) * inv_std
    shift = tl.load(bias + column, mask=column_mask, other=0.0)
    # One running sum per position in the tile; they are reduced over rows once, after the loop.
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    products = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        offset, mask = _tile_offsets(column, column_mask, done, count, columns, block_rows)
        gradient = tl.load(dy + base + offset, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + base + offset, mask=mask, other=0.0).to(tl.float32)
        if relu:
            # Rounded to y's dtype before the comparison, as y was: a tiny positive value may have become 0.
            output = _affine(values, mu, scale, shift).to(x.dtype.element_ty).to(tl.float32)
            gradient = tl.where(output <= 0, 0.0, gradient)  # NaN <= 0 is false: the gradient passes, as in forward
        sums += gradient
        # Masked positions loaded x = 0, whose h is -mean rstd; it must not be multiplied in where that is infinite.
        products += gradient * tl.where(mask, (values - mu[None, :]) * inv_std[None, :], 0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    _store_pair(partials, num_parts, total, product, column, column_mask, columns, block_columns)


@triton.jit
def add_parts_kernel(partials, sums, num_parts, columns, block_parts: tl.constexpr, block_columns: tl.constexpr):
    """Adds the parts of a span in a fixed order: sums[s, k, c] = sum_p partials[s, p, k, c].

    Grid: (blocks of channels, spans, K). partials (spans, parts, K, columns), float32; sums (spans, K, columns).
    """
    column, column_mask = _program_columns(columns, block_columns)
    span, which, rows = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    base = partials + (span * num_parts * rows + which) * columns
    total = tl.zeros((block_parts, block_columns), dtype=tl.float32)
    for start in range(0, num_parts, block_parts):
        part = start + tl.arange(0, block_parts)
        mask = (part < num_parts)[:, None] & column_mask[None, :]
        total += tl.load(base + part[:, None] * rows * columns + column[None, :], mask=mask, other=0.0)
    tl.store(sums + (span * rows + which) * columns + column, tl.sum(total, axis=0), mask=column_mask)


@triton.jit
def _input_gradient(gradient, values, mu, inv_std, scale, pair, size, column, column_mask, columns):
    """scale (dz - sum(dz) / n - h sum(dz h) / n) of a tile, with scale = weight rstd and n = `size`.

    `pair` points to this span's two rows of sums: of dz, then of dz h.
    """
    mean_dz = tl.load(pair + column, mask=column_mask, other=0.0) / size
    # h = (x - mu) rstd: the factor rstd is multiplied in per channel here, not per value below.
    mean_dz_h = tl.load(pair + columns + column, mask=column_mask, other=0.0) / size * inv_std
    return (gradient - mean_dz[None, :] - (values - mu[None, :]) * mean_dz_h[None, :]) * scale[None, :]


@triton.jit
def input_gradient_kernel(
    dz,
    x,
    dx,
    sums,
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
    """Batch norm's input gradient. One program writes one tile.

        dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)

    dz, x, dx (num_rows, columns); sums (spans, 2, columns), of dz and of dz h; the others as in `normalise_kernel`.
    With `relu`, `dz` is still dy: this kernel applies the ReLU mask while reading, so that dz is never written.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, block_rows, columns, block_columns)
    offset, mask = _tile_offsets(column, column_mask, 0, count, columns, block_rows)
    gradient = tl.load(dz + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    of_span = tl.program_id(1) * columns + column
    # n is the span's own number of rows: the last span may be shorter.
    start = tl.program_id(1).to(tl.int64) * span_rows
    size = tl.minimum(num_rows - start, span_rows).to(tl.float32)
    mu = tl.load(mean + of_span, mask=column_mask, other=0.0)
    inv_std = tl.load(rstd + of_span, mask=column_mask, other=0.0)
    scale = tl.load(weight + column, mask=column_mask, other=0.0) * inv_std
    if relu:
        # The mask exactly as in gradient_sums_kernel, or dx would not belong to these sums.
        shift = tl.load(bias + column, mask=column_mask, other=0.0)
        output = _affine(values, mu, scale, shift).to(x.dtype.element_ty).to(tl.float32)
        gradient = tl.where(output <= 0, 0.0, gradient)
    pair = sums + tl.program_id(1) * 2 * columns
    result = _input_gradient(gradient, values, mu, inv_std, scale, pair, size, column, column_mask, columns)
    tl.store(dx + first * columns + offset, result.to(dx.dtype.element_ty), mask=mask)
