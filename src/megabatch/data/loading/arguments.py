"""Ranges of the loaders' arguments, checked before a loader starts a thread or reads a file."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple, get_args

import torch

from megabatch.data.augment.policy import AugmentationKind
from megabatch.errors import UserError

_KINDS = get_args(AugmentationKind)


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    needed: str
    example: object


# Comparisons with NaN are false, so a rule that compares also refuses NaN.
def _is_positive_share(value: float) -> bool:
    return 0 < value <= 1


def _is_nonnegative(value: float) -> bool:
    return 0 <= value < math.inf


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 1


def _is_pixel_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


_RULES = {
    "seed": _Rule(lambda value: isinstance(value, Integral), "a whole number", 0),
    "augmentation": _Rule(lambda value: value in _KINDS, f"one of {', '.join(_KINDS)}", "pad_crop"),
    "crop_padding": _Rule(_is_pixel_count, "a whole number of pixels, 0 or more", 4),
    "min_crop_area": _Rule(_is_positive_share, "a share of the image's area in (0, 1]", 0.08),
    "max_crop_area": _Rule(_is_positive_share, "a share of the image's area in (0, 1]", 1.0),
    "min_crop_aspect": _Rule(_is_positive, "a finite ratio width / height above 0", 0.75),
    "max_crop_aspect": _Rule(_is_positive, "a finite ratio width / height above 0", 1.333),
    "center_crop_ratio": _Rule(_is_positive_share, "a share of the shorter side in (0, 1]", 0.875),
    "crop_ratio": _Rule(_is_positive_share, "a share of the shorter side in (0, 1]", 0.875),
    "cutout_size": _Rule(_is_pixel_count, "a whole number of pixels, 0 or more", 8),
    "mixup_alpha": _Rule(_is_nonnegative, "a finite number, 0 or more", 0.2),
    "cutmix_alpha": _Rule(_is_nonnegative, "a finite number, 0 or more", 1.0),
    "color_jitter": _Rule(lambda value: 0 <= value < 1, "a number in [0, 1)", 0.4),
    "auto_augment": _Rule(
        lambda value: value in {"none", "randaugment", "trivialaugment"}, "none, randaugment or trivialaugment", "none"
    ),
    "rand_num_ops": _Rule(lambda value: value in range(1, 9), "a whole number from 1 to 8", 2),
    "rand_magnitude": _Rule(lambda value: 0 <= value <= 30, "a number from 0 to 30", 9),
    "random_erasing": _Rule(lambda value: 0 <= value <= 1, "a probability in [0, 1]", 0.25),
    "augmentation_ends_epoch": _Rule(
        lambda value: value is None or _is_nonnegative(value), "None or a finite number of epochs, 0 or more", None
    ),
    "image_channels": _Rule(_is_count, "a whole number, 1 or more", 3),
    "dtype": _Rule(lambda value: value.is_floating_point, "a floating-point dtype", torch.float32),
    "padded_channels": _Rule(lambda value: value is None or _is_count(value), "None or a whole number, 1 or more", 4),
    "decode_threads": _Rule(lambda value: value is None or _is_count(value), "None or a whole number, 1 or more", 4),
    "prefetch_batches": _Rule(_is_count, "a whole number, 1 or more", 4),
    "max_bad_share": _Rule(lambda value: 0 <= value <= 1, "a share of the data set in [0, 1]", 0.01),
    "resolution": _Rule(_is_count, "a whole number of pixels, 1 or more", 224),
    "local_batch_size": _Rule(lambda value: value is None or _is_count(value), "None or a whole number, 1 or more", 64),
    "world_size": _Rule(_is_count, "a whole number, 1 or more", 1),
    "batch_size": _Rule(_is_count, "a whole number, 1 or more", 64),
}
_PAIRS = (("min_crop_area", "max_crop_area"), ("min_crop_aspect", "max_crop_aspect"))


def check_arguments(**given: object) -> None:
    """Refuses the first loader argument that is out of its range. Arguments without a rule pass.

    Raises:
        UserError: states the value, the allowed range and a value that works.
    """
    for name, value in given.items():
        rule = _RULES.get(name)
        if rule is not None and not rule.holds(value):
            _refuse(name, value, rule.needed, rule.example)
    for low, high in _PAIRS:
        if low in given and given[low] > given[high]:  # type: ignore[operator]
            _refuse(low, given[low], f"at most {high}={given[high]}", given[high])


def check_pixel_statistics(pixel_mean: Sequence[float], pixel_std: Sequence[float], image_channels: int) -> None:
    """Refuses a mean outside [0, 1] or a standard deviation outside (0, 1]: pixels are divided by 255 before both.

    Raises:
        UserError: such a value, NaN, or not one value per channel. Suggests the values divided by 255 if all of them
            are in the range of bytes.
    """
    for name, values, holds, needed in (
        ("pixel_mean", pixel_mean, lambda value: 0 <= value <= 1, "[0, 1]"),
        ("pixel_std", pixel_std, _is_positive_share, "(0, 1]"),
    ):
        if len(values) != image_channels:
            _refuse(name, values, f"one value for each of the {image_channels} channels", (0.5,) * image_channels)
        if not all(holds(value) for value in values):
            are_bytes = all(0 < value <= 255 for value in values)
            example = tuple(round(value / 255, 3) for value in values) if are_bytes else (0.5,) * image_channels
            _refuse(name, values, f"values in {needed}, as pixels are divided by 255 first", example)


def check_range(name: str, indices: range, *, end: float = math.inf) -> None:
    """Refuses a range that has gaps, runs backwards, or leaves [0, end).

    Raises:
        UserError: states the range that is allowed.
    """
    if indices.step != 1 or not 0 <= indices.start <= indices.stop <= end:
        needed = "consecutive numbers, 0 or more" + (f" and below {end}" if end < math.inf else "")
        _refuse(name, indices, needed, range(int(min(8, end))))


def _refuse(name: str, value: object, needed: str, example: object) -> None:
    raise UserError(f"{name}={value} was given, needed: {needed}; for example {name}={example}")
