"""A chain of bottleneck blocks whose 1x1 convolutions read through batch norm, block after block.

Between blocks goes not a block's output but what it is made of (`Pending`), because the next block's first convolution
is what reads it: batch norm, residual sum, ReLU and that convolution are one differentiable function, whose backward
adds, masks and sums the join's gradient in one pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megabatch.kernels import Moments
from megabatch.kernels.batch_norm import norm_act_of
from megabatch.kernels.norm_passes import measure
from megabatch.kernels.residual import join_conv1x1, norm_conv1x1
from megabatch.nn.fusion import Fusable, Fusion, backend_of, can_fuse, is_hooked, keep_statistics, norm_act, span_of


class FusableBottleneck(Fusable):
    """What is asked of a block: its layers, its shortcut, and its forward for where they cannot be fused."""

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the branch of x."""
        raise NotImplementedError


class Pending(NamedTuple):
    """A block's output before its last batch norm, the residual sum and ReLU."""

    y: Tensor
    moments: Moments
    norm: nn.BatchNorm2d
    residual: Tensor
    fusion: Fusion

    def join(self) -> Tensor:
        """The block's output."""
        return norm_act_of(
            self.y,
            self.moments,
            self.norm.weight,
            self.norm.bias,
            span=span_of(self.norm, self.y),
            residual=self.residual,
            backend=backend_of(self.fusion),
        )


def run_bottlenecks(blocks: Iterable[FusableBottleneck], x: Tensor) -> Tensor:
    """The last block's output; blocks that cannot be fused run as they are."""
    state: Tensor | Pending = x
    for block in blocks:
        fused = fits(block, state) and not is_hooked(block)
        state = _run(block, state) if fused else block(_joined(state))
    return _joined(state)


def _run(block: FusableBottleneck, state: Tensor | Pending) -> Pending:
    x, h = _enter(block, state)
    y = block.conv2(h)
    second, third = _batch_norm(block.bn2), _batch_norm(block.bn3)
    span, backend = span_of(second, y), backend_of(block.fusion)
    found = measure(y.detach(), span=span, eps=second.eps, backend=backend)
    keep_statistics(second, found.mean, found.var, block.fusion)
    y, found = norm_conv1x1(
        y, found, second.weight, second.bias, block.conv3.weight, span=span, eps=third.eps, backend=backend
    )
    keep_statistics(third, found.mean, found.var, block.fusion)
    return Pending(y, found, third, block.shortcut(x), block.fusion)


def _enter(block: FusableBottleneck, state: Tensor | Pending) -> tuple[Tensor, Tensor]:
    """The block's input, and what its 3x3 convolution reads."""
    norm, backend = _batch_norm(block.bn1), backend_of(block.fusion)
    if not isinstance(state, Pending):
        return state, norm_act(norm, block.conv1(state), fusion=block.fusion)
    span = span_of(norm, state.y)
    x, y, found = join_conv1x1(
        state.y,
        state.moments,
        state.norm.weight,
        state.norm.bias,
        state.residual,
        block.conv1.weight,
        span=span,
        eps=norm.eps,
        backend=backend,
    )
    keep_statistics(norm, found.mean, found.var, block.fusion)
    return x, norm_act_of(y, found, norm.weight, norm.bias, span=span, backend=backend)


def _batch_norm(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.BatchNorm2d), "of a block that fits"
    return norm


def _joined(state: Tensor | Pending) -> Tensor:
    return state.join() if isinstance(state, Pending) else state


def fits(block: FusableBottleneck, state: Tensor | Pending) -> bool:
    """Whether the block can be fused behind this state, its input or what that is made of."""
    x = state.y if isinstance(state, Pending) else state
    norms = (block.bn1, block.bn2, block.bn3)
    return (
        len(x) > 1  # so that there are two values per channel whatever the resolution
        and all(can_fuse(norm, x, block.fusion) for norm in norms)
        and len({span_of(norm, x) for norm in norms if isinstance(norm, nn.BatchNorm2d)} | _span_of_state(state)) == 1
        and _is_pointwise(block.conv1)
        and _is_pointwise(block.conv3)
        and x.dtype == _compute_type(block.conv3.weight)
    )


def _span_of_state(state: Tensor | Pending) -> set[int]:
    return {span_of(state.norm, state.y)} if isinstance(state, Pending) else set()


def _is_pointwise(conv: nn.Module) -> bool:
    """Whether it is a product with its weight, pixel by pixel, and nothing else."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and conv.bias is None
        and not is_hooked(conv)
    )


def _compute_type(weight: Tensor) -> torch.dtype:
    """In which a convolution with this weight computes here."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
