"""Bottleneck blocks whose last 1x1 convolution includes the batch norm, sum and ReLU behind it on a GPU.

That operation also computes the first convolution of the next block, so that its backward adds both gradients of the
block's output and applies ReLU's mask in one pass (`megabatch.kernels.gram`).
"""

import itertools
from collections.abc import Iterable
from typing import TypeGuard

from torch import Tensor, nn

from megabatch.kernels.dispatch import Backend
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.gram import conv_norm_act
from megabatch.nn.fused.norm_act import is_hooked, norm_act
from megabatch.nn.resnet import Bottleneck


class FusedBottleneck(Bottleneck):
    """`Bottleneck` by the fused operations that the backend has for its layers."""

    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, None, None)[0]

    def run(self, x: Tensor, y: Tensor | None, following: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """The output for the input x, and, if it was computed with it, the output of the convolution `following`.

        y is the output of the first convolution, or None if it is still to be computed.
        """
        y = convolve(self.conv1, x, self.backend) if y is None else y
        y = norm_act(self.bn1, y, backend=self.backend)
        y = norm_act(self.bn2, convolve(self.conv2, y, self.backend), backend=self.backend)
        identity = run_shortcut(self.downsample, x, self.backend)
        return conv_norm_act(self.conv3, self.bn3, y, residual=identity, following=following, backend=self.backend)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Output of the last block. Fused bottlenecks run as a chain; other blocks are called as modules."""
    y = None
    for block, following in itertools.zip_longest(chain := list(blocks), chain[1:]):
        # Hooks of a block run only if it is called.
        if _is_chained(block):
            following_conv = following.conv1 if _is_chained(following) else None
            x, y = block.run(x, y, following_conv)
        else:
            x, y = block(x), None
    return x


def run_shortcut(downsample: nn.Sequential | None, x: Tensor, backend: Backend) -> Tensor:
    """Term that a block adds to its branch: x, or the shortcut's convolutions and norm of x."""
    if downsample is None:
        return x
    if is_hooked(downsample):
        y: Tensor = downsample(x)
        return y
    *layers, last, norm = downsample
    for layer in layers:
        x = convolve(layer, x, backend)
    return conv_norm_act(last, norm, x, relu=False, backend=backend)[0]


def _is_chained(block: nn.Module | None) -> TypeGuard[FusedBottleneck]:
    return isinstance(block, FusedBottleneck) and not is_hooked(block)
