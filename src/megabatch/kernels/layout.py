"""How tensors lie in memory, for kernels that walk memory and not indices."""

import torch
from torch import Tensor


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether element i in memory is the same element of both. Strides of dimensions of size 1 say nothing."""
    if one.shape != other.shape:
        return False
    if one.stride() == other.stride():
        return True
    return all(a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def rows_of(images: Tensor) -> Tensor:
    """(N, C, H, W) with the channels last, as a matrix of (N * H * W, C) in row-major order; copies other layouts."""
    count, channels, height, width = images.shape
    last = images.contiguous(memory_format=torch.channels_last)
    return last.permute(0, 2, 3, 1).reshape(count * height * width, channels)


def images_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows_of`: a view of shape (N, C, H, W) with the channels last; C may differ from `like`'s."""
    count, _, height, width = like.shape
    return rows.view(count, height, width, rows.shape[1]).permute(0, 3, 1, 2)
