"""Memory layout of tensors, for kernels that address memory directly and ignore strides."""

from typing import NamedTuple

import torch
from torch import Tensor


def same_layout(one: Tensor, other: Tensor) -> bool:
    """True if both tensors have the same shape and place equal indices at equal offsets in memory."""
    if one.shape != other.shape:
        return False
    if one.stride() == other.stride() or not one.numel():
        return True
    # Strides of dimensions of size 1 are arbitrary: they are never multiplied by an index other than 0.
    return all(a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1)


def is_dense(tensor: Tensor) -> bool:
    """True if the elements fill one contiguous block of memory, with the dimensions in any order."""
    if not tensor.numel():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def rows_of(images: Tensor) -> Tensor:
    """Row-major matrix (N * H * W, C) of images (N, C, H, W): a view if they are channels_last, otherwise a copy."""
    count, channels, height, width = images.shape
    last = images.contiguous(memory_format=torch.channels_last)
    return last.permute(0, 2, 3, 1).reshape(count * height * width, channels)


def images_of(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `rows_of`: a channels_last view (N, C, H, W), with N, H and W of `like` and C of `rows`."""
    count, _, height, width = like.shape
    return rows.view(count, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class FilterLayout(NamedTuple):
    """Shape, strides and dtype of a 1x1 filter, which its gradient must have as well: DDP needs equal strides."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "FilterLayout":
        """The layout of this filter (K, C, 1, 1)."""
        return cls(weight.shape, weight.stride(), weight.dtype)

    def restore(self, values: Tensor) -> Tensor:
        """The gradient (K, C) or (K, C, 1, 1) in this layout."""
        matrix = values.reshape(self.shape[:2]).to(self.dtype)
        # In a 1x1 filter the strides of the last two axes are free, but differ between memory formats.
        in_rows = self.stride[:2] == (self.shape[1], 1)
        return matrix.as_strided(self.shape, self.stride) if in_rows else matrix.view(self.shape)
