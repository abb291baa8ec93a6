# mypy: ignore-errors
"""Triton kernels of batch norm over spans. Loaded by `batch_norm` alone, when it runs on a GPU.

All take a matrix of rows (samples x pixels) and `columns` channels, cut into spans of `span_rows` rows, the last of
which may be short. A launch's second axis is the span, so that no tile holds rows of two spans; on its first, programs
that take different channels of the same rows stand side by side. The number of channels is no compile-time constant,
so that one compilation serves all layers.
"""

import triton
import triton.language as tl


@triton.jit
def _part_here(columns, block_columns: tl.constexpr):
    """Which part of its span this program takes."""
    return tl.program_id(0) // ((columns + block_columns - 1) // block_columns)


@triton.jit
def _rows_of_part(num_rows, span_rows, rows_per_part, columns, block_columns: tl.constexpr):
    """First row of this program's part of its span, and how many rows the part has, which may be none."""
    start = tl.program_id(1).to(tl.int64) * span_rows
    size = tl.minimum(num_rows - start, span_rows).to(tl.int32)
    first = _part_here(columns, block_columns) * rows_per_part
    count = tl.maximum(tl.minimum(size - first, rows_per_part), 0)
    return start + first, count


@triton.jit
def _columns_here(columns, block_columns: tl.constexpr):
    block = tl.program_id(0) % ((columns + block_columns - 1) // block_columns)
    column = block * block_columns + tl.arange(0, block_columns)
    return column, column < columns


@triton.jit
def _tile(column, inside, done, count, columns, block_rows: tl.constexpr):
    """Offsets from the part's first row of `block_rows` rows after the first `done`, and which of them exist."""
    row = done + tl.arange(0, block_rows)
    return row[:, None] * columns + column[None, :], (row[:, None] < count) & inside[None, :]


@triton.jit
def _put_pair(
    partials,
    num_parts,
    one,
    two,
    column,
    inside,
    columns,
    block_columns: tl.constexpr,
    pairs: tl.constexpr = 1,
    pair: tl.constexpr = 0,
):
    """Writes two rows of this part's 2 `pairs` in `partials` (spans, parts, 2 pairs, columns)."""
    part = tl.program_id(1) * num_parts + _part_here(columns, block_columns)
    place = partials + (part * pairs + pair) * 2 * columns + column
    tl.store(place, one, mask=inside)
    tl.store(place + columns, two, mask=inside)


@triton.jit
def _normalised(x, middle, slope, shift):
    """The same expression wherever it is needed, so that the sign in backward is the one of forward."""
    return (x - middle[None, :]) * slope[None, :] + shift[None, :]


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
    """y = relu(weight (x - mean) rstd + bias) in one pass."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, block_rows, columns, block_columns)
    place, here = _tile(column, inside, 0, count, columns, block_rows)
    values = tl.load(x + first * columns + place, mask=here, other=0.0).to(tl.float32)
    own = tl.program_id(1) * columns + column
    slope = tl.load(weight + column, mask=inside, other=0.0) * tl.load(rstd + own, mask=inside, other=0.0)
    middle = tl.load(mean + own, mask=inside, other=0.0)
    values = _normalised(values, middle, slope, tl.load(bias + column, mask=inside, other=0.0))
    if relu:
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + first * columns + place, values.to(y.dtype.element_ty), mask=here)


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
    """Sums of dz and dz * h over each part of a span; dz is dy where y > 0, h = (x - mean) rstd.

    The sign of y is computed again from x, which is read anyway.
    """
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, rows_per_part, columns, block_columns)
    base = first * columns
    own = tl.program_id(1) * columns + column
    middle = tl.load(mean + own, mask=inside, other=0.0)
    scale = tl.load(rstd + own, mask=inside, other=0.0)
    slope = tl.load(weight + column, mask=inside, other=0.0) * scale
    shift = tl.load(bias + column, mask=inside, other=0.0)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    products = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        place, here = _tile(column, inside, done, count, columns, block_rows)
        gradient = tl.load(dy + base + place, mask=here, other=0.0).to(tl.float32)
        values = tl.load(x + base + place, mask=here, other=0.0).to(tl.float32)
        if relu:
            output = _normalised(values, middle, slope, shift).to(x.dtype.element_ty).to(tl.float32)
            gradient = tl.where(output <= 0, 0.0, gradient)
        sums += gradient
        products += gradient * tl.where(here, (values - middle[None, :]) * scale[None, :], 0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    _put_pair(partials, num_parts, total, product, column, inside, columns, block_columns)


@triton.jit
def add_parts_kernel(partials, sums, num_parts, columns, block_parts: tl.constexpr, block_columns: tl.constexpr):
    """Adds a span's parts row by row, in one order, to `sums` (spans, rows, columns); the third axis counts rows."""
    column, inside = _columns_here(columns, block_columns)
    span, which, rows = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    base = partials + (span * num_parts * rows + which) * columns
    total = tl.zeros((block_parts, block_columns), dtype=tl.float32)
    for start in range(0, num_parts, block_parts):
        part = start + tl.arange(0, block_parts)
        here = (part < num_parts)[:, None] & inside[None, :]
        total += tl.load(base + part[:, None] * rows * columns + column[None, :], mask=here, other=0.0)
    tl.store(sums + (span * rows + which) * columns + column, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _input_gradient(gradient, values, middle, scale, slope, pair, size, column, inside, columns):
    """slope (dz - sum(dz) / n - h sum(dz h) / n), of which `pair` holds the sums of this span."""
    of_gradient = tl.load(pair + column, mask=inside, other=0.0) / size
    of_product = tl.load(pair + columns + column, mask=inside, other=0.0) / size * scale
    return (gradient - of_gradient[None, :] - (values - middle[None, :]) * of_product[None, :]) * slope[None, :]


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
    """dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n) in one pass; with `relu`, dy is given for dz."""
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, block_rows, columns, block_columns)
    place, here = _tile(column, inside, 0, count, columns, block_rows)
    gradient = tl.load(dz + first * columns + place, mask=here, other=0.0).to(tl.float32)
    values = tl.load(x + first * columns + place, mask=here, other=0.0).to(tl.float32)
    own = tl.program_id(1) * columns + column
    start = tl.program_id(1).to(tl.int64) * span_rows
    size = tl.minimum(num_rows - start, span_rows).to(tl.float32)
    middle = tl.load(mean + own, mask=inside, other=0.0)
    scale = tl.load(rstd + own, mask=inside, other=0.0)
    slope = tl.load(weight + column, mask=inside, other=0.0) * scale
    if relu:
        shift = tl.load(bias + column, mask=inside, other=0.0)
        output = _normalised(values, middle, slope, shift).to(x.dtype.element_ty).to(tl.float32)
        gradient = tl.where(output <= 0, 0.0, gradient)
    pair = sums + tl.program_id(1) * 2 * columns
    result = _input_gradient(gradient, values, middle, scale, slope, pair, size, column, inside, columns)
    tl.store(dx + first * columns + place, result.to(dx.dtype.element_ty), mask=here)
