# mypy: ignore-errors
"""Triton kernel that cuts and resizes a batch of images. Loaded by `crop_resize` alone, when it runs on a GPU."""

import triton
import triton.language as tl

# Tables that `crop_resize` fills: row lengths, then columns.
PLACES = tl.constexpr(5)  # int64, one row per image
ADDRESS, ROW_STRIDE, COLUMN_STRIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CHANNEL_STRIDE, FLIP = tl.constexpr(3), tl.constexpr(4)
BOXES = tl.constexpr(8)  # float32, one row per image: four values of its rows, then the same of its columns
START, SCALE, LOWEST, HIGHEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _taps(box, index):
    """Of each output index: the first input index, its distance from the centre, one over the support, how many."""
    scale = tl.load(box + SCALE)
    support = tl.maximum(scale, 1.0)
    centre = tl.load(box + START) + (index.to(tl.float32) + 0.5) * scale
    lowest, highest = tl.load(box + LOWEST), tl.load(box + HIGHEST)
    first = tl.maximum(tl.floor(centre - support + 0.5), lowest)
    last = tl.minimum(tl.floor(centre + support + 0.5), highest)
    return first.to(tl.int32), first + 0.5 - centre, 1.0 / support, (last - first).to(tl.int32)


@triton.jit
def _triangle(distance, inverse, tap, count):
    """Weight of tap number `tap`: 1 - |distance| / support, and none past the last."""
    weight = tl.maximum(1.0 - tl.abs((distance + tap) * inverse), 0.0)
    return tl.where(tap < count, weight, 0.0)


@triton.jit
def crop_resize_kernel(
    out,
    places,
    boxes,
    means,
    factors,
    rows: tl.constexpr,
    columns: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    block_channels: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One tile of one output image: its pixels gathered, weighted, flipped, normalised and written; padding is 0."""
    image = tl.program_id(1)
    place = places + image * PLACES
    box = boxes + image * BOXES
    source = tl.load(place + ADDRESS).to(tl.pointer_type(tl.uint8))
    row_stride, column_stride = tl.load(place + ROW_STRIDE), tl.load(place + COLUMN_STRIDE)
    channel_stride = tl.load(place + CHANNEL_STRIDE)
    across = (columns + block_columns - 1) // block_columns
    row = tl.program_id(0) // across * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(0) % across * block_columns + tl.arange(0, block_columns)
    shown = tl.where(tl.load(place + FLIP) > 0, columns - 1 - column, column)
    first_row, row_distance, row_inverse, row_taps = _taps(box, row)
    first_column, column_distance, column_inverse, column_taps = _taps(box + 4, shown)
    row_taps = tl.where(row < rows, row_taps, 0)
    column_taps = tl.where(column < columns, column_taps, 0)
    channel = tl.arange(0, block_channels)
    sums = tl.zeros((block_rows, block_columns, block_channels), dtype=tl.float32)
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for tap_row in range(tl.max(row_taps, axis=0)):
        of_row = _triangle(row_distance, row_inverse, tap_row, row_taps)
        line = (first_row + tap_row).to(tl.int64) * row_stride
        for tap_column in range(tl.max(column_taps, axis=0)):
            of_column = _triangle(column_distance, column_inverse, tap_column, column_taps)
            weight = of_row[:, None] * of_column[None, :]
            pixel = line[:, None] + ((first_column + tap_column) * column_stride)[None, :]
            where = source + pixel[:, :, None] + (channel * channel_stride)[None, None, :]
            here = (weight > 0)[:, :, None] & (channel < channels)[None, None, :]
            sums += weight[:, :, None] * tl.load(where, mask=here, other=0).to(tl.float32)
            total += weight
    mean = tl.load(means + channel, mask=channel < channels, other=0.0)
    factor = tl.load(factors + channel, mask=channel < channels, other=0.0)
    values = (sums / tl.where(total > 0, total, 1.0)[:, :, None] - mean[None, None, :]) * factor[None, None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    pixel = (image.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    target = out + pixel[:, :, None] * padded + channel[None, None, :]
    written = inside[:, :, None] & (channel < padded)[None, None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=written)
