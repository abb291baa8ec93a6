# mypy: ignore-errors
"""Triton kernels of batch norm's statistics. Loaded by `norm_passes` and `statistics` alone, when one runs on a GPU.

Matrices, spans and parts are those of `_batch_norm_triton`. One launch gives the moments of parts, one combines them,
and what becomes of them is done by the latter, if there is one span, or by a launch of its own.
"""

import triton
import triton.language as tl

from megabatch.kernels.norm._batch_norm_triton import _columns_here, _put_pair, _rows_of_part, _tile


@triton.jit
def moments_kernel(
    x,
    partials,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    columns,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Mean and sum of squared differences from it, per channel, of each part of a span.

    Sums are of x minus the part's first row, so that no digits are lost where the mean is many deviations from 0.
    """
    column, inside = _columns_here(columns, block_columns)
    first, count = _rows_of_part(num_rows, span_rows, rows_per_part, columns, block_columns)
    base = x + first * columns
    shift = tl.load(base + column, mask=inside & (count > 0), other=0.0).to(tl.float32)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    squares = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        place, here = _tile(column, inside, done, count, columns, block_rows)
        values = tl.load(base + place, mask=here, other=0.0).to(tl.float32)
        values = tl.where(here, values - shift[None, :], 0.0)
        sums += values
        squares += values * values
    total = tl.sum(sums, axis=0)
    above = total / tl.maximum(count, 1).to(tl.float32)
    spread = tl.maximum(tl.sum(squares, axis=0) - above * total, 0.0)
    _put_pair(partials, num_parts, shift + above, spread, column, inside, columns, block_columns)


@triton.jit
def _rows_of_parts(part, num_parts, size, rows_per_part):
    """How many rows each of these parts of a span of `size` rows has, in float32."""
    rows = tl.minimum(tl.maximum(size - part * rows_per_part, 0), rows_per_part)
    return tl.where(part < num_parts, rows, 0).to(tl.float32)


@triton.jit
def _add_to_sums(first, total, mean, var, mean_of_first, var_of_first, spans, column, inside, columns):
    """Adds to `total`, and keeps the first span in the channels of `first` whose variance has no bit set."""
    empty = tl.load(first + columns + column, mask=inside, other=1.0).to(tl.int32, bitcast=True) == 0
    tl.store(first + column, mean_of_first, mask=empty)
    marked = tl.where(var_of_first == 0, -(2**31), var_of_first.to(tl.int32, bitcast=True))  # 0 by its sign bit
    tl.store(first + columns + column, marked.to(tl.float32, bitcast=True), mask=empty)
    tl.store(total + column, tl.load(total + column, mask=inside, other=0.0) + mean, mask=inside)
    tl.store(total + columns + column, tl.load(total + columns + column, mask=inside, other=0.0) + var, mask=inside)
    counts = column == 0
    tl.store(first + 2 * columns + column, tl.full(column.shape, 1.0, tl.float32), mask=counts)
    before = tl.load(total + 2 * columns + column, mask=counts, other=0.0)
    tl.store(total + 2 * columns + column, before + spans, mask=counts)


@triton.jit
def _move(running, new, momentum, column, inside):
    old = tl.load(running + column, mask=inside, other=0.0)
    tl.store(running + column, old + momentum * (new - old), mask=inside)


@triton.jit
def _keep(
    one,
    two,
    count,
    momentum,
    keep: tl.constexpr,
    mean,
    var,
    mean_of_first,
    var_of_first,
    spans,
    column,
    inside,
    columns,
):
    """Keeps statistics, of which `mean` and `var` are sums over spans, as `statistics` says of its kinds."""
    if keep == "sums":
        _add_to_sums(one, two, mean, var, mean_of_first, var_of_first, spans, column, inside, columns)
    if keep == "averages":
        _move(one, mean / spans, momentum, column, inside)
        _move(two, var / spans, momentum, column, inside)
        first = column == 0
        tl.store(count + column, tl.load(count + column, mask=first, other=0) + 1, mask=first)


@triton.jit
def statistics_kernel(
    partials,
    mean,
    unbiased,
    rstd,
    num_rows,
    span_rows,
    rows_per_part,
    num_parts,
    eps,
    one,
    two,
    count,
    momentum,
    keep: tl.constexpr,
    columns,
    block_parts: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One span's mean, unbiased variance and 1 / sqrt(variance + eps) from the moments of its parts, in one order.

    n = sum n_p,  m = sum n_p m_p / n,  M2 = sum M2_p + n_p (m_p - m)^2      (Chan, Golub and LeVeque 1979)

    A single span is kept as well.
    """
    column, inside = _columns_here(columns, block_columns)
    span = tl.program_id(1)
    size = tl.minimum(num_rows - span.to(tl.int64) * span_rows, span_rows).to(tl.int32)
    base = partials + span * num_parts * 2 * columns
    weighted = tl.zeros((block_parts, block_columns), dtype=tl.float32)
    for start in range(0, num_parts, block_parts):
        part = start + tl.arange(0, block_parts)
        rows = _rows_of_parts(part, num_parts, size, rows_per_part)
        here = (part < num_parts)[:, None] & inside[None, :]
        means = tl.load(base + part[:, None] * 2 * columns + column[None, :], mask=here, other=0.0)
        weighted += means * (rows / size)[:, None]
    middle = tl.sum(weighted, axis=0)
    spreads = tl.zeros((block_parts, block_columns), dtype=tl.float32)
    for start in range(0, num_parts, block_parts):
        part = start + tl.arange(0, block_parts)
        rows = _rows_of_parts(part, num_parts, size, rows_per_part)
        here = (part < num_parts)[:, None] & inside[None, :]
        place = base + part[:, None] * 2 * columns + column[None, :]
        away = tl.load(place, mask=here, other=0.0) - middle[None, :]
        spreads += tl.load(place + columns, mask=here, other=0.0) + rows[:, None] * away * away
    spread = tl.sum(spreads, axis=0)
    out = span * columns + column
    variance = spread / tl.maximum(size - 1, 1).to(tl.float32)
    tl.store(mean + out, middle, mask=inside)
    tl.store(unbiased + out, variance, mask=inside)
    inverse = 1.0 / tl.sqrt(spread / size.to(tl.float32) + eps)
    inverse = tl.where(spread < float("inf"), inverse, float("nan"))  # not 0, which would make a diverged net constant
    tl.store(rstd + out, inverse, mask=inside)
    _keep(one, two, count, momentum, keep, middle, variance, middle, variance, 1, column, inside, columns)


@triton.jit
def _totals(values, spans, column, inside, columns):
    """Sum over spans of (spans, columns), in one order; and the first."""
    first = tl.load(values + column, mask=inside, other=0.0)
    total = first
    for span in range(1, spans):
        total += tl.load(values + span * columns + column, mask=inside, other=0.0)
    return total, first


@triton.jit
def keep_kernel(mean, var, spans, columns, one, two, count, momentum, keep: tl.constexpr, block: tl.constexpr):
    """Keeps the statistics of several spans."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    inside = column < columns
    means, first_mean = _totals(mean, spans, column, inside, columns)
    variances, first_var = _totals(var, spans, column, inside, columns)
    _keep(one, two, count, momentum, keep, means, variances, first_mean, first_var, spans, column, inside, columns)
