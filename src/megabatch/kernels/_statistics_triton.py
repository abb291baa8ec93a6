# mypy: ignore-errors
"""Triton kernels of batch norm's statistics. Imported only by `norm.passes` and `statistics`, when one runs on a GPU.

Matrices, spans, parts and the grid are those of `norm/_batch_norm_triton.py`. `moments_kernel` reduces each part of a
span and `statistics_kernel` combines the parts. The latter also accumulates the statistics into the sink if there is a
single span; `keep_kernel` does so for several.
"""

import triton
import triton.language as tl

from megabatch.kernels.norm._batch_norm_triton import _part_rows, _program_columns, _store_pair, _tile_offsets


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
    """Mean and sum of squared differences from it, per channel, of one part. One program walks down one part.

        d = x - x_0;   mean = x_0 + sum(d) / n;   M2 = sum(d^2) - sum(d)^2 / n

    x_0 is the part's first row. Without that shift, subtracting two nearly equal numbers would cancel all digits where
    the mean is many standard deviations from 0. x (num_rows, columns); partials (spans, parts, 2, columns), float32.
    """
    column, column_mask = _program_columns(columns, block_columns)
    first, count = _part_rows(num_rows, span_rows, rows_per_part, columns, block_columns)
    base = x + first * columns
    # A part without rows has no first row to read.
    shift = tl.load(base + column, mask=column_mask & (count > 0), other=0.0).to(tl.float32)
    sums = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    squares = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for done in range(0, rows_per_part, block_rows):
        offset, mask = _tile_offsets(column, column_mask, done, count, columns, block_rows)
        values = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
        # Masked positions must add 0, not (0 - x_0).
        values = tl.where(mask, values - shift[None, :], 0.0)
        sums += values
        squares += values * values
    total = tl.sum(sums, axis=0)
    shifted_mean = total / tl.maximum(count, 1).to(tl.float32)
    m2 = tl.maximum(tl.sum(squares, axis=0) - shifted_mean * total, 0.0)  # rounding may make it negative
    _store_pair(partials, num_parts, shift + shifted_mean, m2, column, column_mask, columns, block_columns)


@triton.jit
def _part_sizes(part, num_parts, size, rows_per_part):
    """Number of rows, as float32, of each of these parts of a span of `size` rows; 0 for parts that do not exist."""
    rows = tl.minimum(tl.maximum(size - part * rows_per_part, 0), rows_per_part)
    return tl.where(part < num_parts, rows, 0).to(tl.float32)


@triton.jit
def _add_to_sums(first, total, mean, var, mean_of_first, var_of_first, spans, column, column_mask, columns):
    """Accumulates into `statistics.SpanSums`: adds to `total`, and fills the channels of `first` that are empty.

    Both are (2 columns + 1): means, variances, count.
    """
    # A channel is empty if all bits of its variance are 0. The shared count cannot tell: programs run in any order.
    empty = tl.load(first + columns + column, mask=column_mask, other=1.0).to(tl.int32, bitcast=True) == 0
    tl.store(first + column, mean_of_first, mask=empty)
    # A variance of 0 is stored as -0 (only the sign bit set), so that the channel does not look empty.
    marked = tl.where(var_of_first == 0, -(2**31), var_of_first.to(tl.int32, bitcast=True))
    tl.store(first + columns + column, marked.to(tl.float32, bitcast=True), mask=empty)
    tl.store(total + column, tl.load(total + column, mask=column_mask, other=0.0) + mean, mask=column_mask)
    variances = total + columns + column
    tl.store(variances, tl.load(variances, mask=column_mask, other=0.0) + var, mask=column_mask)
    # Only the program with channel 0 updates the count, or it would be added once per program.
    counts = column == 0
    tl.store(first + 2 * columns + column, tl.full(column.shape, 1.0, tl.float32), mask=counts)
    before = tl.load(total + 2 * columns + column, mask=counts, other=0.0)
    tl.store(total + 2 * columns + column, before + spans, mask=counts)


@triton.jit
def _update_average(running, new, momentum, column, column_mask):
    """running = (1 - momentum) running + momentum new."""
    old = tl.load(running + column, mask=column_mask, other=0.0)
    tl.store(running + column, old + momentum * (new - old), mask=column_mask)


@triton.jit
def _accumulate(
    sink_a,
    sink_b,
    sink_count,
    momentum,
    sink_kind: tl.constexpr,
    mean,
    var,
    mean_of_first,
    var_of_first,
    spans,
    column,
    column_mask,
    columns,
):
    """Accumulates statistics into a sink; `mean` and `var` are sums over `spans` spans.

    The sink's arguments are those of `statistics.kernel_arguments`: `first`, `total`, `total` for "sums", and the two
    averages and the counter for "averages"; "none" accumulates nothing.
    """
    if sink_kind == "sums":
        _add_to_sums(sink_a, sink_b, mean, var, mean_of_first, var_of_first, spans, column, column_mask, columns)
    if sink_kind == "averages":
        _update_average(sink_a, mean / spans, momentum, column, column_mask)
        _update_average(sink_b, var / spans, momentum, column, column_mask)
        first = column == 0
        tl.store(sink_count + column, tl.load(sink_count + column, mask=first, other=0) + 1, mask=first)


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
    sink_a,
    sink_b,
    sink_count,
    momentum,
    sink_kind: tl.constexpr,
    columns,
    block_parts: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Mean, unbiased variance and rstd of a span from the moments of its parts, combined in a fixed order.

        n = sum n_p;   m = sum n_p m_p / n;   M2 = sum M2_p + n_p (m_p - m)^2      (Chan, Golub and LeVeque 1979)
        unbiased = M2 / (n - 1);   rstd = 1 / sqrt(M2 / n + eps)

    Grid: (blocks of channels, spans). partials (spans, parts, 2, columns): m_p, M2_p; the outputs (spans, columns).
    With a sink, which requires a single span, the statistics are also accumulated there.
    """
    column, column_mask = _program_columns(columns, block_columns)
    span = tl.program_id(1)
    size = tl.minimum(num_rows - span.to(tl.int64) * span_rows, span_rows).to(tl.int32)
    base = partials + span * num_parts * 2 * columns
    # Pass 1: the span's mean. Dividing by n before summing keeps the sum in the range of the values.
    weighted = tl.zeros((block_parts, block_columns), dtype=tl.float32)
    for start in range(0, num_parts, block_parts):
        part = start + tl.arange(0, block_parts)
        rows = _part_sizes(part, num_parts, size, rows_per_part)
        mask = (part < num_parts)[:, None] & column_mask[None, :]
        means = tl.load(base + part[:, None] * 2 * columns + column[None, :], mask=mask, other=0.0)
        weighted += means * (rows / size)[:, None]
    mu = tl.sum(weighted, axis=0)
    # Pass 2: M2, which needs that mean.
    squares = tl.zeros((block_parts, block_columns), dtype=tl.float32)
    for start in range(0, num_parts, block_parts):
        part = start + tl.arange(0, block_parts)
        rows = _part_sizes(part, num_parts, size, rows_per_part)
        mask = (part < num_parts)[:, None] & column_mask[None, :]
        source = base + part[:, None] * 2 * columns + column[None, :]
        difference = tl.load(source, mask=mask, other=0.0) - mu[None, :]
        squares += tl.load(source + columns, mask=mask, other=0.0) + rows[:, None] * difference * difference
    m2 = tl.sum(squares, axis=0)
    out = span * columns + column
    variance = m2 / tl.maximum(size - 1, 1).to(tl.float32)
    tl.store(mean + out, mu, mask=column_mask)
    tl.store(unbiased + out, variance, mask=column_mask)
    inverse = 1.0 / tl.sqrt(m2 / size.to(tl.float32) + eps)
    # If squares overflowed, 1 / sqrt(inf) = 0 would turn a diverged network into a constant; NaN makes it visible.
    inverse = tl.where(m2 < float("inf"), inverse, float("nan"))
    tl.store(rstd + out, inverse, mask=column_mask)
    _accumulate(
        sink_a, sink_b, sink_count, momentum, sink_kind, mu, variance, mu, variance, 1, column, column_mask, columns
    )


@triton.jit
def _sum_over_spans(values, spans, column, column_mask, columns):
    """Sum over spans of `values` (spans, columns), in a fixed order; and the first span's values."""
    first = tl.load(values + column, mask=column_mask, other=0.0)
    total = first
    for span in range(1, spans):
        total += tl.load(values + span * columns + column, mask=column_mask, other=0.0)
    return total, first


@triton.jit
def keep_kernel(
    mean, var, spans, columns, sink_a, sink_b, sink_count, momentum, sink_kind: tl.constexpr, block: tl.constexpr
):
    """Accumulates mean and unbiased variance of several spans, each (spans, columns). One program: `block` channels."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    mask = column < columns
    means, first_mean = _sum_over_spans(mean, spans, column, mask, columns)
    variances, first_var = _sum_over_spans(var, spans, column, mask, columns)
    _accumulate(
        sink_a,
        sink_b,
        sink_count,
        momentum,
        sink_kind,
        means,
        variances,
        first_mean,
        first_var,
        spans,
        column,
        mask,
        columns,
    )


# Columns of the table of `step_averages.StepAverages`, one row of seven int64 values per layer.
_FIRST = tl.constexpr(0)
_TOTAL = tl.constexpr(1)
_MEAN = tl.constexpr(2)
_VAR = tl.constexpr(3)
_COUNTER = tl.constexpr(4)
_CHANNELS = tl.constexpr(5)
_START = tl.constexpr(6)
_ROW = tl.constexpr(7)


@triton.jit
def _vector(table, column: tl.constexpr):
    """Pointer to a float32 vector of this program's layer."""
    return tl.load(table + tl.program_id(0) * _ROW + column).to(tl.pointer_type(tl.float32))


@triton.jit
def take_sums_kernel(table, taken, first: tl.constexpr, block: tl.constexpr):
    """Copies the sums of each layer, `first` or else `total`, to its place in `taken`, and zeroes both.

    Grid: (layers, blocks of the 2C + 1 values of the widest layer).
    """
    row = table + tl.program_id(0) * _ROW
    value = tl.program_id(1) * block + tl.arange(0, block)
    mask = value < 2 * tl.load(row + _CHANNELS) + 1
    firsts, totals = _vector(table, _FIRST), _vector(table, _TOTAL)
    source = firsts if first else totals
    tl.store(taken + tl.load(row + _START) + value, tl.load(source + value, mask=mask), mask=mask)
    zeros = tl.zeros((block,), dtype=tl.float32)
    tl.store(firsts + value, zeros, mask=mask)
    tl.store(totals + value, zeros, mask=mask)


@triton.jit
def _lerp(running, total, count, momentum, column, mask):
    """As torch.lerp, which gives exactly the new value where momentum is 1; without spans nothing changes."""
    old = tl.load(running + column, mask=mask, other=0.0)
    new = tl.load(total + column, mask=mask, other=0.0) / tl.where(count > 0, count, 1.0)
    new = tl.where(count > 0, new, old)
    moved = tl.where(momentum < 0.5, old + momentum * (new - old), new - (new - old) * (1 - momentum))
    tl.store(running + column, moved, mask=mask)


@triton.jit
def move_averages_kernel(table, taken, momentum, overflow, skips: tl.constexpr, block: tl.constexpr):
    """Moves the running averages of each layer towards the mean over its spans. Grid as in `take_sums_kernel`.

    With `skips`, nothing changes if the number at `overflow` is not 0.
    """
    row = table + tl.program_id(0) * _ROW
    channels = tl.load(row + _CHANNELS)
    sums = taken + tl.load(row + _START)
    column = tl.program_id(1) * block + tl.arange(0, block)
    moved = channels
    if skips:
        moved = tl.where(tl.load(overflow) == 0, channels, 0)
    mask = column < moved
    count = tl.load(sums + 2 * channels)
    _lerp(_vector(table, _MEAN), sums, count, momentum, column, mask)
    _lerp(_vector(table, _VAR), sums + channels, count, momentum, column, mask)
    # Only the program with channel 0 updates the counter.
    counter = tl.load(row + _COUNTER).to(tl.pointer_type(tl.int64)) + column
    first = mask & (column == 0)
    tl.store(counter, tl.load(counter, mask=first, other=0) + 1, mask=first)
