"""Crop boxes (top, left, height, width) in whole pixels, drawn per (seed, epoch, sample)."""

import math

import numpy as np
from numpy.typing import NDArray

from megabatch.data.augment.hashing import Float64, Stream, uniform

Int64 = NDArray[np.int64]

MAX_ATTEMPTS = 10


def random_resized_crop_boxes(
    heights: Int64,
    widths: Int64,
    *,
    seed: int,
    epochs: Int64,
    samples: Int64,
    min_area: float = 0.08,
    max_area: float = 1.0,
    min_aspect: float = 0.75,
    max_aspect: float = 4 / 3,
) -> Int64:
    """One box [n, 4] per image, of random area and aspect ratio (Szegedy et al. 2014, arXiv:1409.4842, section 6).

    The area is a uniform share of the image's, in [min_area, max_area]; the aspect ratio (width / height) is
    log-uniform in [min_aspect, max_aspect]. The first of at most ten draws that fits inside the image is used, at a
    uniform position (Ying et al. 2018, arXiv:1811.06992, have the same limit on the host). If no draw fits, the box
    is the largest central one within the aspect bounds, as torchvision's. Draws depend on (seed, epoch, sample) only.

    Args:
        heights, widths: size of each image in pixels, [n].
        epochs, samples: coordinates of each image's random numbers, [n].
    """
    crop_heights, crop_widths = _first_fit(
        heights, widths, seed, epochs, samples, (min_area, max_area), (min_aspect, max_aspect)
    )
    tops = np.floor(uniform(seed, epochs, samples, Stream.CROP_TOP) * (heights - crop_heights + 1))
    lefts = np.floor(uniform(seed, epochs, samples, Stream.CROP_LEFT) * (widths - crop_widths + 1))
    drawn = np.stack([tops.astype(np.int64), lefts.astype(np.int64), crop_heights, crop_widths], axis=1)
    fallback = _central_boxes(heights, widths, min_aspect, max_aspect)
    boxes: Int64 = np.where((crop_heights > 0)[:, None], drawn, fallback)
    return boxes


def _first_fit(
    heights: Int64,
    widths: Int64,
    seed: int,
    epochs: Int64,
    samples: Int64,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> tuple[Int64, Int64]:
    """Height and width of the first draw that fits; 0 if none of the ten fits. Most images need one draw."""
    chosen_heights, chosen_widths = np.zeros_like(heights), np.zeros_like(widths)
    pending = np.arange(len(heights))
    for attempt in range(MAX_ATTEMPTS):
        epoch, sample, height, width = epochs[pending], samples[pending], heights[pending], widths[pending]
        # Only images without a fitting draw so far are drawn again.
        area = _between(*areas, uniform(seed, epoch, sample, Stream.CROP_AREA + attempt)) * height * width
        log_aspects = (math.log(aspects[0]), math.log(aspects[1]))
        aspect = np.exp(_between(*log_aspects, uniform(seed, epoch, sample, Stream.CROP_ASPECT + attempt)))
        crop_height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        crop_width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        fits = (crop_height > 0) & (crop_width > 0) & (crop_height <= height) & (crop_width <= width)
        chosen_heights[pending[fits]], chosen_widths[pending[fits]] = crop_height[fits], crop_width[fits]
        pending = pending[~fits]
        if not len(pending):
            break
    return chosen_heights, chosen_widths


def _central_boxes(heights: Int64, widths: Int64, min_aspect: float, max_aspect: float) -> Int64:
    """Largest central boxes with an aspect ratio in [min_aspect, max_aspect]."""
    crop_widths = np.minimum(widths, np.maximum(1, np.rint(heights * max_aspect))).astype(np.int64)
    crop_heights = np.minimum(heights, np.maximum(1, np.rint(widths / min_aspect))).astype(np.int64)
    return np.stack([(heights - crop_heights) // 2, (widths - crop_widths) // 2, crop_heights, crop_widths], axis=1)


def center_boxes(heights: Int64, widths: Int64, *, crop_ratio: float) -> Int64:
    """Central squares [n, 4], of `crop_ratio` times the shorter side: "resize to 256, crop 224" as one box."""
    sides = np.maximum(1, np.rint(np.minimum(heights, widths) * crop_ratio)).astype(np.int64)
    return np.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], axis=1)


def random_shifts(padding: int, *, seed: int, epochs: Int64, samples: Int64) -> tuple[Int64, Int64]:
    """Vertical and horizontal shift of each image in pad-and-crop, [n] each, uniform in -padding .. padding pixels."""
    span = 2 * padding + 1
    rows = np.floor(uniform(seed, epochs, samples, Stream.CROP_TOP) * span).astype(np.int64) - padding
    columns = np.floor(uniform(seed, epochs, samples, Stream.CROP_LEFT) * span).astype(np.int64) - padding
    return rows, columns


def square_boxes(sides: Float64, size: int, tops: Float64, lefts: Float64) -> Int64:
    """Squares [n, 4] = (top, left, bottom, right) around random centres, clipped to a `size` x `size` image.

    The centre is pixel (tops * size, lefts * size), for `tops` and `lefts` in [0, 1). Squares at the border are
    therefore clipped, as in cutout (DeVries and Taylor 2017, arXiv:1708.04552) and cutmix (Yun et al. 2019,
    arXiv:1905.04899). `sides` are in pixels, [n], and are rounded.
    """
    sides = np.rint(sides).astype(np.int64)
    first_rows = np.floor(tops * size).astype(np.int64) - sides // 2
    first_columns = np.floor(lefts * size).astype(np.int64) - sides // 2
    edges = [first_rows, first_columns, first_rows + sides, first_columns + sides]
    boxes: Int64 = np.stack([np.clip(edge, 0, size) for edge in edges], axis=1)
    return boxes


def _between(low: float, high: float, fraction: Float64) -> Float64:
    return low + (high - low) * fraction


def erasing_boxes(height: int, width: int, area: Float64, aspect: Float64, top: Float64, left: Float64) -> Int64:
    """Boxes [n, 4] = (top, left, bottom, right) of random erasing, from four uniform numbers [n] in [0, 1) each.

    The area is uniform in [0.02, 1/3] of the image, the logarithm of height / width in that of [0.3, 1 / 0.3] (Zhong et
    al. 2017, arXiv:1708.04896, algorithm 1); sides are cut to the image's instead of drawn again.
    """
    areas = (0.02 + area * (1 / 3 - 0.02)) * height * width
    ratios = np.exp((2 * aspect - 1) * math.log(1 / 0.3))
    rows = np.clip(np.rint(np.sqrt(areas * ratios)), 1, height)
    columns = np.clip(np.rint(np.sqrt(areas / ratios)), 1, width)
    tops, lefts = np.floor(top * (height - rows + 1)), np.floor(left * (width - columns + 1))
    return np.stack([tops, lefts, tops + rows, lefts + columns], axis=1).astype(np.int64)
