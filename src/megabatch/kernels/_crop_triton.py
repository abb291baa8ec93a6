# mypy: ignore-errors
"""Triton kernel that crops and resizes a batch of images. Imported only by `crop_resize`, when it runs on a GPU."""

import triton
import triton.language as tl

# The two tables that `crop_resize` fills, one row per image: first the length of a row, then its columns.
PLACES = tl.constexpr(5)  # int64: where the image is in memory
ADDRESS, ROW_STRIDE, COLUMN_STRIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CHANNEL_STRIDE, FLIP = tl.constexpr(3), tl.constexpr(4)
BOXES = tl.constexpr(8)  # float32: four values for the vertical axis, then the same four for the horizontal one
START, SCALE, LOWEST, HIGHEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _taps(box, index):
    """Input pixels that contribute to each output index of one axis; `box` points to that axis' four values.

    Returns the first input index, the distance of its centre from the output's centre, 1 / support, and the number of
    input pixels.
    """
    scale = tl.load(box + SCALE)
    support = tl.maximum(scale, 1.0)
    centre = tl.load(box + START) + (index.to(tl.float32) + 0.5) * scale
    lowest, highest = tl.load(box + LOWEST), tl.load(box + HIGHEST)
    first = tl.maximum(tl.floor(centre - support + 0.5), lowest)
    last = tl.minimum(tl.floor(centre + support + 0.5), highest)
    return first.to(tl.int32), first + 0.5 - centre, 1.0 / support, (last - first).to(tl.int32)


@triton.jit
def _triangle(distance, inverse_support, tap, count):
    """Weight of input pixel number `tap` of an output: max(0, 1 - |distance| / support), or 0 beyond the last."""
    weight = tl.maximum(1.0 - tl.abs((distance + tap) * inverse_support), 0.0)
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
    """Crop, bilinear resize, flip, normalisation and padding of a batch; one program writes one tile of one image.

        out[i, j] = (sum_kl u_ik v_jl image[k, l] / sum_kl u_ik v_jl - mean) factor,    u and v triangular weights

    Grid: (tiles of block_rows x block_columns output pixels, images). Output: out (N, rows, columns, padded),
    contiguous. Inputs: the tables `places` (N, 5) and `boxes` (N, 8), whose columns are named above; means and factors
    (channels,). Images are read through the addresses in `places`, at any strides.
    """
    image = tl.program_id(1)
    place = places + image * PLACES
    box = boxes + image * BOXES
    source = tl.load(place + ADDRESS).to(tl.pointer_type(tl.uint8))
    row_stride, column_stride = tl.load(place + ROW_STRIDE), tl.load(place + COLUMN_STRIDE)
    channel_stride = tl.load(place + CHANNEL_STRIDE)
    # Tiles are numbered in row-major order of the output image.
    across = (columns + block_columns - 1) // block_columns
    row = tl.program_id(0) // across * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(0) % across * block_columns + tl.arange(0, block_columns)
    # A mirrored image computes at column j what the unmirrored one has at columns - 1 - j.
    unflipped = tl.where(tl.load(place + FLIP) > 0, columns - 1 - column, column)
    first_row, row_distance, row_inverse, row_taps = _taps(box, row)
    first_column, column_distance, column_inverse, column_taps = _taps(box + 4, unflipped)
    # Output pixels beyond the image have no taps, so that they do not lengthen the loops below.
    row_taps = tl.where(row < rows, row_taps, 0)
    column_taps = tl.where(column < columns, column_taps, 0)
    channel = tl.arange(0, block_channels)
    sums = tl.zeros((block_rows, block_columns, block_channels), dtype=tl.float32)
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    # The loops run to the largest number of taps in the tile; _triangle gives 0 to pixels with fewer.
    for tap_row in range(tl.max(row_taps, axis=0)):
        row_weight = _triangle(row_distance, row_inverse, tap_row, row_taps)
        line = (first_row + tap_row).to(tl.int64) * row_stride
        for tap_column in range(tl.max(column_taps, axis=0)):
            column_weight = _triangle(column_distance, column_inverse, tap_column, column_taps)
            weight = row_weight[:, None] * column_weight[None, :]
            pixel = line[:, None] + ((first_column + tap_column) * column_stride)[None, :]
            address = source + pixel[:, :, None] + (channel * channel_stride)[None, None, :]
            # Pixels of weight 0 are not read: they may lie outside the image.
            here = (weight > 0)[:, :, None] & (channel < channels)[None, None, :]
            sums += weight[:, :, None] * tl.load(address, mask=here, other=0).to(tl.float32)
            total += weight
    # Padding channels load mean 0 and factor 0, and their sums are 0: they are written as 0.
    mean = tl.load(means + channel, mask=channel < channels, other=0.0)
    factor = tl.load(factors + channel, mask=channel < channels, other=0.0)
    values = (sums / tl.where(total > 0, total, 1.0)[:, :, None] - mean[None, None, :]) * factor[None, None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    pixel = (image.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    target = out + pixel[:, :, None] * padded + channel[None, None, :]
    written = inside[:, :, None] & (channel < padded)[None, None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=written)
