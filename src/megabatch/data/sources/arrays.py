"""Data sets that fit in memory as pixels: they live on the device, and a batch is one gather."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megabatch.errors import DataError


@dataclass(frozen=True)
class ArraySource:
    """Images [n, C, H, W] uint8 and labels [n] int64 on one device, all of one size.

    Raises:
        DataError: another type or shape, no images, or a label without a class name.
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
            raise DataError(f"labels lie in {lowest}..{highest}, class names cover 0..{len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> "ArraySource":
        """The same data set on `device`; no copy if it is there already."""
        return ArraySource(self.images.to(device), self.labels.to(device), self.class_names)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
