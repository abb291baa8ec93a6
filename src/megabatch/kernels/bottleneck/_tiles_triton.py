# mypy: ignore-errors
"""Parts, tiles and their moments in the kernels of 1x1 convolutions; `_conv1x1_triton.py` explains the layout."""

import triton
import triton.language as tl


@triton.jit
def _locate_rows(row_tile, tiles_per_span, num_rows, span_rows, block_rows: tl.constexpr):
    """Returns the span of a row tile, its first row, and the number of its rows that belong to that span."""
    span = row_tile // tiles_per_span
    offset = (row_tile % tiles_per_span) * block_rows
    first_row = span.to(tl.int64) * span_rows + offset  # int64: times the channels it may exceed 2^31
    count = tl.minimum(tl.minimum(num_rows - first_row, span_rows - offset), block_rows).to(tl.int32)
    return span, first_row, count


@triton.jit
def _normalise_relu(x, mean_ptr, rstd_ptr, scale_ptr, bias_ptr, span, column, count, columns, block_rows: tl.constexpr):
    """Returns h = relu((x - mean) rstd scale + bias) of one tile, in the dtype of x; 0 in rows of other spans."""
    valid = column < columns
    mean = tl.load(mean_ptr + span * columns + column, mask=valid, other=0.0)
    slope = tl.load(rstd_ptr + span * columns + column, mask=valid, other=0.0)
    slope *= tl.load(scale_ptr + column, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + column, mask=valid, other=0.0)
    values = (x.to(tl.float32) - mean[None, :]) * slope[None, :] + bias[None, :]
    in_span = (tl.arange(0, block_rows) < count)[:, None]
    # ~(values <= 0) and not values > 0: NaN passes, as it does through torch.relu.
    return tl.where(in_span & ~(values <= 0), values, 0.0).to(x.dtype)


@triton.jit
def _locate_part(num_rows, span_rows, rows_per_part, num_parts, blocks_across):
    """Returns this program's part, counted over all spans, its span, first row and number of rows.

    The number is 0 where the last span is too short for this part.
    """
    # Neighbouring programs share their rows, so that those running at the same time find them in the L2 cache.
    part = tl.program_id(0) // blocks_across
    span = part // num_parts
    start = span.to(tl.int64) * span_rows  # int64: times the channels it may exceed 2^31
    offset = (part % num_parts) * rows_per_part
    size = tl.minimum(num_rows - start, span_rows).to(tl.int32)
    return part, span, start + offset, tl.maximum(tl.minimum(size - offset, rows_per_part), 0)


@triton.jit
def _add_moments(mean, squares, values, before, count, block_rows: tl.constexpr):
    """Adds a tile of `count` rows to each column's mean and sum of squared differences from it over `before` rows.

    With the tile's mean t and sum of squares S:  d = t - m;  m += d c / (b + c);  M2 += S + d^2 b c / (b + c)    (Chan,
    Golub and LeVeque 1979). Differences from the tile's own mean keep float32 sums accurate.
    """
    in_span = (tl.arange(0, block_rows) < count)[:, None]
    tile_mean = tl.sum(tl.where(in_span, values, 0.0), axis=0) / count.to(tl.float32)
    difference = tl.where(in_span, values - tile_mean[None, :], 0.0)
    share = count.to(tl.float32) / (before + count).to(tl.float32)
    between = tile_mean - mean
    squares += tl.sum(difference * difference, axis=0) + between * between * (share * before)
    return mean + between * share, squares
