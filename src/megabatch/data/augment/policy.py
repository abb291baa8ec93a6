"""A recipe's augmentation: random numbers per (seed, epoch, sample), operations on whole batches."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.augment import automatic, crops
from megabatch.data.augment import ops as augment
from megabatch.data.augment.hashing import Stream, symmetric_beta, uniform
from megabatch.errors import DataError

Int64 = NDArray[np.int64]
AugmentationKind = Literal["none", "pad_crop", "random_resized_crop"]
AutoAugmentKind = Literal["none", "randaugment", "trivialaugment"]

STRENGTHS = 30
"""Largest strength of RandAugment and TrivialAugment; strengths are whole numbers from 0 to it."""


class Samples(NamedTuple):
    """Samples at consecutive stream positions; all arrays are [n]."""

    epochs: Int64
    indices: Int64
    augmented: NDArray[np.bool_]  # False after augmentation ended: only flips remain

    def part(self, chunk: slice | Int64) -> "Samples":
        return Samples(self.epochs[chunk], self.indices[chunk], self.augmented[chunk])


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Crop, flip, colour, cutout, mixup and cutmix of training images; `TrainLoader` documents each field."""

    seed: int
    augmentation: AugmentationKind = "none"
    crop_padding: int = 4
    min_crop_area: float = 0.08
    max_crop_area: float = 1.0
    min_crop_aspect: float = 0.75
    max_crop_aspect: float = 4 / 3
    center_crop_ratio: float = 0.875
    flip: bool = True
    alternate_flip: bool = False
    cutout_size: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    color_jitter: float = 0.0
    auto_augment: AutoAugmentKind = "none"
    rand_num_ops: int = 2
    rand_magnitude: float = 9
    random_erasing: float = 0.0

    @property
    def mixes(self) -> bool:
        """True if samples are mixed with partners, by mixup or cutmix."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def only_flips(self) -> bool:
        """True if a crop is only mirrored before normalisation: neither shifted nor recoloured."""
        moves = self.augmentation == "pad_crop" and self.crop_padding > 0
        return not moves and not self.color_jitter and self.auto_augment == "none"

    def boxes(self, samples: Samples, heights: Int64, widths: Int64) -> Int64:
        """Crop box of each image, [n, 4] = (top, left, height, width): random, or central without augmentation."""
        center = crops.center_boxes(heights, widths, crop_ratio=self.center_crop_ratio)
        if self.augmentation != "random_resized_crop":
            return center
        drawn = crops.random_resized_crop_boxes(
            heights,
            widths,
            seed=self.seed,
            epochs=samples.epochs,
            samples=samples.indices,
            min_area=self.min_crop_area,
            max_area=self.max_crop_area,
            min_aspect=self.min_crop_aspect,
            max_aspect=self.max_crop_aspect,
        )
        return np.where(samples.augmented[:, None], drawn, center)

    def flips(self, samples: Samples) -> NDArray[np.bool_]:
        """[n]: True for images to mirror."""
        if not self.flip:
            return np.zeros(len(samples.indices), dtype=np.bool_)
        if not self.alternate_flip:
            return np.asarray(self._uniform(samples, Stream.FLIP) < 0.5)
        first = uniform(self.seed, np.zeros_like(samples.epochs), samples.indices, Stream.FLIP) < 0.5
        return np.asarray(first ^ (samples.epochs % 2 == 1))

    def move_and_flip(self, images: Tensor, samples: Samples) -> Tensor:
        """Applies pad-and-crop, if it is the chosen augmentation, and flips; any dtype, may work in place.

        Raises:
            DataError: `crop_padding` is as large as the image.
        """
        if self.augmentation != "pad_crop" or not self.crop_padding:
            return augment.flip_some(images, np.flatnonzero(self.flips(samples)).tolist())
        if self.crop_padding >= min(images.shape[2:]):
            raise DataError(
                f"crop_padding={self.crop_padding} must be less than the image's size {min(images.shape[2:])}; 4 works"
            )
        rows, columns = crops.random_shifts(
            self.crop_padding, seed=self.seed, epochs=samples.epochs, samples=samples.indices
        )
        rows, columns = rows * samples.augmented, columns * samples.augmented
        moves = (_to(values, images) for values in (rows, columns, self.flips(samples)))
        return augment.shift_and_flip(images, *moves)

    def auto_augmented(self, images: Tensor, samples: Samples) -> Tensor:
        """Applies the operations of RandAugment or TrivialAugment to pixels in [0, 255], drawn per sample."""
        if self.auto_augment == "none":
            return images
        images = images.float().contiguous()
        is_rand = self.auto_augment == "randaugment"
        ranges = automatic.RANDAUGMENT if is_rand else automatic.TRIVIALAUGMENT
        for number in range(self.rand_num_ops if is_rand else 1):
            drawn = self._uniform(samples, Stream.AUTO_OPERATION + number) * len(automatic.OPERATIONS)
            chosen = np.where(samples.augmented, drawn.astype(np.int64), 0)
            level = np.full(len(chosen), float(self.rand_magnitude))
            if not is_rand:
                level = np.floor(self._uniform(samples, Stream.AUTO_STRENGTH + number) * (STRENGTHS + 1))
            sign = np.where(self._uniform(samples, Stream.AUTO_SIGN + number) < 0.5, -1, 1)
            strengths = (sign * level / STRENGTHS).astype(np.float32)
            images = automatic.apply_each(images, _to(chosen, images), _to(strengths, images), ranges)
        return images

    def recolor(self, images: Tensor, samples: Samples) -> Tensor:
        """Scales brightness and contrast of pixels in [0, 255] by `color_jitter`."""
        if not self.color_jitter:
            return images
        factors = []
        for stream in (Stream.BRIGHTNESS, Stream.CONTRAST):
            factor = 1 + self.color_jitter * (2 * self._uniform(samples, stream) - 1)
            factors.append(_to(np.where(samples.augmented, factor, 1.0).astype(np.float32), images))
        return augment.jitter(images.float(), *factors)

    def cut_out(self, images: Tensor, samples: Samples) -> Tensor:
        """Sets a square of each normalised image to zero, the mean, in place."""
        if not self.cutout_size:
            return images
        sides = np.where(samples.augmented, float(self.cutout_size), 0.0)
        tops, lefts = self._uniform(samples, Stream.CUTOUT_TOP), self._uniform(samples, Stream.CUTOUT_LEFT)
        return augment.erase(images, _to(crops.square_boxes(sides, images.shape[2], tops, lefts), images))

    def randomly_erased(self, images: Tensor, samples: Samples) -> Tensor:
        """Sets a rectangle of some normalised images to zero, the mean, in place."""
        if not self.random_erasing:
            return images
        erased = samples.augmented & (self._uniform(samples, Stream.ERASE) < self.random_erasing)
        numbers = [
            self._uniform(samples, stream)
            for stream in (Stream.ERASE_AREA, Stream.ERASE_ASPECT, Stream.ERASE_TOP, Stream.ERASE_LEFT)
        ]
        boxes = crops.erasing_boxes(images.shape[2], images.shape[3], *numbers)
        return augment.erase(images, _to(boxes * erased[:, None], images))

    def mix(self, images: Tensor, partners: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Returns images mixed with their partners by mixup or cutmix, and the weight [n] of each image's own label.

        If both are enabled, each sample uses either with probability 1/2. With cutmix the weight is the share of the
        image's own pixels after the box is clipped at the border.
        """
        use_cutmix = self._uses_cutmix(samples)
        mixup_weights = np.where(use_cutmix, 1.0, self._weights(samples, self.mixup_alpha))
        size = images.shape[2]
        # A square of side s = size * sqrt(1 - weight) covers the share 1 - weight; side 0 pastes nothing.
        sides = np.where(use_cutmix, size * np.sqrt(1 - self._weights(samples, self.cutmix_alpha)), 0.0)
        tops, lefts = self._uniform(samples, Stream.MIX_TOP), self._uniform(samples, Stream.MIX_LEFT)
        boxes = crops.square_boxes(sides, size, tops, lefts)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        weights = np.where(use_cutmix, 1 - areas / size**2, mixup_weights).astype(np.float32)
        mixed = images
        if self.mixup_alpha > 0:
            mixed = augment.mix(mixed, partners, _to(mixup_weights.astype(np.float32), images))
        if self.cutmix_alpha > 0:
            mixed = augment.paste(mixed, partners, _to(boxes, images))
        return mixed, _to(weights, images)

    def _uses_cutmix(self, samples: Samples) -> NDArray[np.bool_]:
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            return np.asarray(self._uniform(samples, Stream.MIX_KIND) < 0.5)
        return np.full(len(samples.indices), self.cutmix_alpha > 0)

    def _weights(self, samples: Samples, alpha: float) -> NDArray[np.float64]:
        if alpha <= 0:
            return np.ones(len(samples.indices))
        drawn = symmetric_beta(alpha, self.seed, samples.epochs, samples.indices, Stream.MIX_WEIGHT, Stream.MIX_ANGLE)
        return np.where(samples.augmented, drawn, 1.0)

    def _uniform(self, samples: Samples, stream: int) -> NDArray[np.float64]:
        return uniform(self.seed, samples.epochs, samples.indices, stream)


def _to(values: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)
