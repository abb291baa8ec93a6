"""Crops, resizes, flips, normalises and pads decoded images of different sizes into one 16-bit batch, in one launch."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton

BLOCK_ROWS, BLOCK_COLUMNS = 8, 32
"""Output pixels of one program's tile."""
_ROUNDING = 1e-6  # pixels: a box that ends by less than this beyond a pixel's edge ends at that edge
_AXES = {"HWC": (0, 1, 2), "CHW": (1, 2, 0)}


def crop_and_resize(
    images: Sequence[Tensor],
    boxes: Tensor,
    *,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    flip: Tensor | None = None,
    padded_channels: int = 4,
    dtype: torch.dtype = torch.float16,
    layout: Literal["HWC", "CHW"] = "HWC",
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns a channels_last batch (N, padded_channels, rows, columns) from N decoded images and one box of each.

        out = (resized(image[box]) / 255 - mean) / std,    mirrored where `flip` is true, 0 in the padding channels

    Resizing is bilinear, antialiased when it shrinks: output i of an axis is the mean of the input pixels k weighted by
    max(0, 1 - |k + 1/2 - c| / max(s, 1)), where s is the box's length over the output's and c = start + (i + 1/2) s.
    This is Pillow's BILINEAR, as in `data/jpeg/decode.py`, without its rounding to 8 bits after each axis. No pixel
    outside the box is read; a pixel that an edge of the box cuts through is read whole.

    Shapes: images uint8, each (H, W, C) or, with `layout="CHW"` as nvJPEG gives it, (C, H, W), any strides, on one
    device; boxes (N, 4) = (top, left, height, width) in pixels, integer or fractional, and flip (N,) bool, both on the
    CPU; mean and std of pixels scaled to [0, 1], one per channel. The caller must keep the images alive until the
    kernel has run. With `out`, of the result's shape, dtype and memory layout, the batch is written there.

    Raises:
        UserError: no image, a dtype other than uint8, a box that is not inside its image, or sizes that do not agree.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    _check(images, boxes, flip, layout, channels=len(mean), padded=padded_channels, size=(rows, columns))
    if len(std) != len(mean) or min(std) <= 0:
        raise UserError(
            f"mean={mean} and std={std} were given, needed: one each per channel; std=(0.2, 0.2, 0.2) works"
        )
    flips = torch.zeros(len(images), dtype=torch.bool) if flip is None else flip
    target = _Target(rows, columns, padded_channels, tuple(mean), tuple(std), dtype)
    written = _written(out, (len(images), rows, columns, padded_channels), dtype, images[0].device)
    if use_triton(images[0], backend):
        _launch(images, boxes.double(), flips, target, _AXES[layout], written)
    else:
        crop_resize_reference(images, boxes, flips, target, layout, written)
    return written.permute(0, 3, 1, 2)


class _Target(NamedTuple):
    rows: int
    columns: int
    padded: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype


def _written(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the memory of the batch, `out` or new, as (N, rows, columns, channels)."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    lines = out.permute(0, 2, 3, 1)
    if lines.shape != shape or not lines.is_contiguous() or out.dtype != dtype or out.device != device:
        raise UserError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, needed: {dtype}, {shape[0]} x {shape[3]} x "
            f"{shape[1]} x {shape[2]} with the channels last in memory, on {device}; out=None works"
        )
    return lines


def crop_resize_reference(
    images: Sequence[Tensor], boxes: Tensor, flip: Tensor, target: _Target, layout: str, out: Tensor
) -> None:
    """`crop_and_resize` in torch's operations: two matrix products per image, in float32."""
    device = images[0].device
    out[..., len(target.mean) :] = 0
    mean, std = (torch.tensor(values, device=device) for values in (target.mean, target.std))
    for image, box, mirrored, written in zip(images, boxes.double(), flip, out, strict=True):
        pixels = image.permute(*_AXES[layout]).float()
        top, left, height, width = box.tolist()
        by_row = _weights(top, height, pixels.shape[0], target.rows).to(device)
        by_column = _weights(left, width, pixels.shape[1], target.columns).to(device)
        # Bilinear weights are separable: one (rows out, rows in) matrix and one (columns out, columns in) matrix.
        resized = torch.einsum("ih,hwc,jw->ijc", by_row, pixels, by_column)
        resized = resized.flip(1) if mirrored else resized
        written[..., : len(mean)] = (resized / 255 - mean) / std


def _weights(start: float, length: float, num_in: int, num_out: int) -> Tensor:
    """Returns (num_out, num_in), float32: the weight of each input pixel of one axis in each output pixel."""
    scale = length / num_out
    # The triangle spans the two nearest pixels when enlarging; when shrinking it widens with the scale (antialiasing).
    support = max(scale, 1.0)
    lowest, highest = _bounds(start, length, num_in)
    centres = start + (torch.arange(num_out, dtype=torch.float64)[:, None] + 0.5) * scale
    index = torch.arange(num_in, dtype=torch.float64)
    # The first and the end of the pixels with centres within `support`, clamped to those that the box touches.
    first = (centres - support + 0.5).floor().clamp(min=lowest)
    last = (centres + support + 0.5).floor().clamp(max=highest)
    weights = (1 - (index + 0.5 - centres).abs() / support).clamp(min=0)
    weights = weights * ((index >= first) & (index < last))
    # Normalised per output, as the weights of a clamped triangle do not sum to 1.
    return (weights / weights.sum(1, keepdim=True)).float()


def _bounds(start: float, length: float, num_in: int) -> tuple[int, int]:
    """Returns the half-open range of input pixels that the box touches along one axis."""
    return math.floor(start), min(num_in, math.ceil(start + length - _ROUNDING))


def _tables(
    images: Sequence[Tensor], boxes: Tensor, flip: Tensor, target: _Target, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Two tables with one row per image: its address and strides, and the sides of its box."""
    places = torch.empty(len(images), 5, dtype=torch.int64)
    places[:, 0] = torch.tensor([image.data_ptr() for image in images])
    places[:, 1:4] = torch.tensor([image.stride() for image in images])[:, axes]
    places[:, 4] = flip
    shapes = torch.tensor([image.shape for image in images])[:, axes[:2]].double()
    # Both axes of a box at once, [n, 2]: the columns of a row of the box table, which `_crop_triton.py` names.
    starts, lengths = boxes.double().view(-1, 2, 2).unbind(1)
    scales = lengths / torch.tensor([target.rows, target.columns], dtype=torch.float64)
    highest = torch.minimum(shapes, (starts + lengths - _ROUNDING).ceil())
    sides = torch.stack([starts, scales, starts.floor(), highest], dim=2)
    return places, sides.flatten(1).float()


def _launch(
    images: Sequence[Tensor], boxes: Tensor, flip: Tensor, target: _Target, axes: tuple[int, ...], out: Tensor
) -> None:
    device = images[0].device
    places, sides = _tables(images, boxes, flip, target, axes)
    tiles = -(-target.rows // BLOCK_ROWS) * -(-target.columns // BLOCK_COLUMNS)
    with on_device(out):
        load("kernels._crop_triton").crop_resize_kernel[(tiles, len(images))](
            out,
            _sent(places, device),
            _sent(sides, device),
            _sent(255 * torch.tensor(target.mean), device),
            # (v / 255 - mean) / std = (v - 255 mean) (1 / (255 std)): one subtraction and one product per pixel.
            _sent(1 / (255 * torch.tensor(target.std)), device),
            rows=target.rows,
            columns=target.columns,
            channels=len(target.mean),
            padded=target.padded,
            block_channels=1 << (target.padded - 1).bit_length(),
            block_rows=BLOCK_ROWS,
            block_columns=BLOCK_COLUMNS,
            num_warps=4,
        )


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Copies to the device asynchronously; torch keeps the pinned memory alive until the copy has finished."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _check(
    images: Sequence[Tensor],
    boxes: Tensor,
    flip: Tensor | None,
    layout: str,
    *,
    channels: int,
    padded: int,
    size: tuple[int, int],
) -> None:
    if layout not in _AXES:
        raise UserError(f"layout={layout!r} was given, needed HWC or CHW; layout='HWC' works")
    if not images or boxes.shape != (len(images), 4) or (flip is not None and flip.shape != (len(images),)):
        raise UserError(
            f"{len(images)} images and boxes {tuple(boxes.shape)} were given, needed: at least one image, and for each "
            "one box (top, left, height, width) and one flip; boxes=torch.tensor([[0, 0, 224, 224]]) works for one"
        )
    if padded < channels or min(size) < 1:
        raise UserError(f"padded_channels={padded}, size={size} were given for {channels} channels; 4 and 224 work")
    device = images[0].device
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.device != device:
            raise UserError(f"an image is {image.dtype} {tuple(image.shape)}, needed: uint8 {layout} on one device")
    shapes = torch.tensor([image.shape for image in images])[:, _AXES[layout]]
    starts, lengths = boxes.double().view(-1, 2, 2).unbind(1)
    inside = (starts >= 0) & (starts + lengths <= shapes[:, :2] + _ROUNDING) & (lengths > 0)
    bad = torch.nonzero(~(inside.all(1) & (shapes[:, 2] == channels)))
    if len(bad):
        first = int(bad[0])
        shape = shapes[first].tolist()
        raise UserError(
            f"the box {tuple(boxes[first].tolist())} was given for an image of {shape} rows, columns and channels, "
            f"needed: a box inside it and {channels} channels; box (0, 0, {shape[0]}, {shape[1]}) works"
        )
