"""Data sets that fit in memory as decoded pixels: kept on the device, so that a batch is one gather."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megabatch.errors import DataError


@dataclass(frozen=True)
class ArraySource:
    """A data set of decoded images of one size, as tensors on one device.

        images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100) % 2
        source = ArraySource(images, labels, class_names=("cat", "dog"))
        loader = TrainLoader(source, seed=0, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.25, 0.25, 0.25))

    Args:
        images: [n, channels, height, width] uint8 in 0..255, n at least 1.
        labels: [n] int64, each in 0 .. len(class_names) - 1.
        class_names: name of each class, in the order of the labels.

    Raises:
        DataError: another dtype or shape, no images, or a label without a class name.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DataError(f"images are {_kind(self.images)}; uint8 of shape [n, channels, height, width] is needed")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise DataError(f"labels are {_kind(self.labels)}; int64 of shape [{len(self.images)}] is needed")
        if not len(self.images):
            raise DataError("the data set holds no images; at least 1 is needed")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest >= len(self.class_names):
            raise DataError(f"labels are in {lowest}..{highest}, class names cover 0..{len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return self.images.device

    def to(self, device: torch.device | str) -> "ArraySource":
        """Returns the data set on `device`, without a copy if it is already there."""
        return ArraySource(self.images.to(device), self.labels.to(device), self.class_names)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
