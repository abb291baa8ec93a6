"""Operations of RandAugment and TrivialAugment on whole batches. Deterministic: callers pass in all random numbers.

Images are [n, C, H, W] float in [0, 255]; strengths are [n] in [0, 1], signed where an operation has two directions.
Pixels that a geometric operation moves in from outside are mid-grey, as in the authors' code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megabatch.data.augment.ops import grey_of, mean_grey

_GREY = 128.0


@dataclass(frozen=True)
class Ranges:
    """Largest strength of each operation; shifts are a share of the image's side, or pixels where `shift_px` is set."""

    shear: float
    shift: float
    shift_px: bool
    rotate_deg: float
    enhance: float
    posterize_bits: int  # removed of 8


RANDAUGMENT = Ranges(shear=0.3, shift=150 / 331, shift_px=False, rotate_deg=30, enhance=0.9, posterize_bits=4)
"""Cubuk et al. 2019, arXiv:1909.13719, with the ranges that torchvision uses for it."""

TRIVIALAUGMENT = Ranges(shear=0.99, shift=32, shift_px=True, rotate_deg=135, enhance=0.99, posterize_bits=6)
"""Mueller and Hutter 2021, arXiv:2103.10158: the wide space of its table 6."""

Operation = Callable[[Tensor, Tensor, Ranges], Tensor]


def apply_each(images: Tensor, chosen: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Applies operation `chosen[i]`, an index of `OPERATIONS`, to image i; returns a new batch."""
    result = images.clone()
    for number in sorted(set(chosen.tolist())):
        rows = (chosen == number).nonzero()[:, 0]
        result[rows] = OPERATIONS[number](images[rows], strengths[rows], ranges)
    return result


def identity(images: Tensor, _: Tensor, __: Ranges) -> Tensor:
    """The images themselves."""
    return images


def shear_x(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Output (y, x) is input (y, x + s y), with y from the centre."""
    return _warped(images, x_of_y=ranges.shear * strengths)


def shear_y(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Output (y, x) is input (y + s x, x), with x from the centre."""
    return _warped(images, y_of_x=ranges.shear * strengths)


def translate_x(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Output (y, x) is input (y, x + s)."""
    return _warped(images, x_shift=_shift(strengths, ranges, images.shape[3]))


def translate_y(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Output (y, x) is input (y + s, x)."""
    return _warped(images, y_shift=_shift(strengths, ranges, images.shape[2]))


def rotate(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Rotates around the centre."""
    angles = strengths * math.radians(ranges.rotate_deg)
    sine = angles.sin()
    return _warped(images, x_of_x=angles.cos(), x_of_y=-sine, y_of_x=sine, y_of_y=angles.cos())


def brightness(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Blends with black, or away from it."""
    return _blended(torch.zeros_like(images), images, strengths, ranges)


def color(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Blends with the grey image, or away from it."""
    return _blended(grey_of(images), images, strengths, ranges)


def contrast(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Blends with the mean grey, or away from it."""
    return _blended(mean_grey(images), images, strengths, ranges)


def sharpness(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Blends with a 3x3 smoothed image, or away from it; the outermost pixels stay."""
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        smooth[:, :, 1:-1, 1:-1] = functional.conv2d(images, kernel / 13, groups=channels)
    return _blended(smooth, images, strengths, ranges)


def posterize(images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """Keeps the upper bits of each value."""
    step = 2 ** (strengths.abs() * ranges.posterize_bits).round().view(-1, 1, 1, 1)
    return (images / step).floor() * step


def solarize(images: Tensor, strengths: Tensor, _: Ranges) -> Tensor:
    """Inverts values from a threshold on, which falls from 255 to 0."""
    threshold = 255 * (1 - strengths.abs()).view(-1, 1, 1, 1)
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Tensor, _: Tensor, __: Ranges) -> Tensor:
    """Stretches each channel to [0, 255]; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * (255 / (high - low).clamp(min=1e-6)), images)


def equalize(images: Tensor, _: Tensor, __: Ranges) -> Tensor:
    """Makes the histogram of each channel as flat as possible (Pillow's rule)."""
    flat = images.round().long().flatten(2).flatten(0, 1)
    counts = torch.zeros(len(flat), 256, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    last = counts.gather(1, flat.amax(1, keepdim=True))
    step = (flat.shape[1] - last) // 255
    table = ((counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, flat), flat).view(images.shape).to(images.dtype)


OPERATIONS: tuple[Operation, ...] = (
    identity,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    rotate,
    brightness,
    color,
    contrast,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
)
"""The fourteen operations; the order is part of the arithmetic."""


def _shift(strengths: Tensor, ranges: Ranges, side: int) -> Tensor:
    return strengths * ranges.shift * (1 if ranges.shift_px else side)


def _blended(other: Tensor, images: Tensor, strengths: Tensor, ranges: Ranges) -> Tensor:
    """other + (1 + s) (image - other), clamped."""
    return torch.lerp(other, images, (1 + ranges.enhance * strengths).view(-1, 1, 1, 1)).clamp_(0, 255)


def _warped(images: Tensor, **changes: Tensor) -> Tensor:
    """Samples each image, bilinear, at an affine function of the output pixel, in pixels from the centre."""
    count, _, height, width = images.shape
    parts = {"x_of_x": 1.0, "x_of_y": 0.0, "x_shift": 0.0, "y_of_x": 0.0, "y_of_y": 1.0, "y_shift": 0.0}
    values = {name: changes.get(name, images.new_full((count,), value)) for name, value in parts.items()}
    y, x = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in (height, width))
    y, x = y.view(1, -1, 1), x.view(1, 1, -1)
    at = {name: value.view(-1, 1, 1) for name, value in values.items()}
    columns = at["x_of_x"] * x + at["x_of_y"] * y + at["x_shift"]
    rows = at["y_of_x"] * x + at["y_of_y"] * y + at["y_shift"]
    grid = torch.stack([columns * 2 / width, rows * 2 / height], dim=3)
    return functional.grid_sample(images - _GREY, grid, align_corners=False) + _GREY
