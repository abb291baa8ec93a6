"""A chain of bottleneck blocks whose 1x1 convolutions read through batch norm, block after block.

Between blocks goes not a block's output but what it is made of (`Pending`), because the next block's first convolution
is what reads it: batch norm, residual sum, ReLU and that convolution are one differentiable function, whose backward
adds, masks and sums the join's gradient in one pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megabatch.kernels.bottleneck.handover import Handover
from megabatch.kernels.bottleneck.residual import join_conv1x1, norm_conv1x1
from megabatch.kernels.norm.batch_norm import norm_act_of
from megabatch.kernels.norm.passes import Moments, Normalisation, measure
from megabatch.nn.fused.fuse import Fusable, Fusion, backend_of, can_fuse, is_hooked, norm_act, sink_of, span_of


class FusableBottleneck(Fusable):
    """What is asked of a block: its layers, its shortcut, and its forward for where they cannot be fused."""

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    downsample: nn.Sequential | None

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the branch of x."""
        raise NotImplementedError


class Measured(NamedTuple):
    """A convolution's output before its batch norm, and where that may leave the rest of its backward."""

    y: Tensor
    moments: Moments
    norm: nn.BatchNorm2d
    handover: Handover | None = None

    def normalisation(self) -> Normalisation:
        """What the batch norm does to it."""
        return Normalisation.of(self.moments, self.norm.weight, self.norm.bias)

    def normalised(self, fusion: Fusion, *, residual: Tensor | None = None, relu: bool) -> Tensor:
        """What comes out of batch norm, sum and ReLU."""
        return norm_act_of(
            self.y,
            self.moments,
            self.norm.weight,
            self.norm.bias,
            span=span_of(self.norm, self.y),
            residual=residual,
            relu=relu,
            leave=self.handover,
            backend=backend_of(fusion),
        )


class Pending(NamedTuple):
    """A block's output before its last batch norm, the residual sum and ReLU; the residual may wait for its own."""

    branch: Measured
    residual: Tensor | Measured
    fusion: Fusion

    def join(self) -> Tensor:
        """The block's output."""
        residual = self.residual
        if isinstance(residual, Measured):
            residual = residual.normalised(self.fusion, relu=False)
        return self.branch.normalised(self.fusion, residual=residual, relu=True)


def run_bottlenecks(blocks: Iterable[FusableBottleneck], x: Tensor) -> Tensor:
    """The last block's output; blocks that cannot be fused run as they are."""
    state: Tensor | Pending = x
    for block in blocks:
        fused = fits(block, state) and not is_hooked(block)
        state = _run(block, state) if fused else block(_joined(state))
    return _joined(state)


def _run(block: FusableBottleneck, state: Tensor | Pending) -> Pending:
    x, h = _enter(block, state)
    third = _batch_norm(block.bn3)
    second = _measured(block.bn2, block.conv2(h), block.fusion)
    span, backend = span_of(third, second.y), backend_of(block.fusion)
    y, found = norm_conv1x1(
        second.y,
        second.moments,
        second.norm.weight,
        second.norm.bias,
        block.conv3.weight,
        span=span,
        eps=third.eps,
        sink=sink_of(third),
        take=(handover := Handover()),
        backend=backend,
    )
    return Pending(Measured(y, found, third, handover), _shortcut(block, x, third, y), block.fusion)


def _enter(block: FusableBottleneck, state: Tensor | Pending) -> tuple[Tensor, Tensor]:
    """The block's input, and what its 3x3 convolution reads."""
    norm = _batch_norm(block.bn1)
    if not isinstance(state, Pending):
        return state, norm_act(norm, block.conv1(state), fusion=block.fusion)
    (branch, residual, _), other = state, None
    if isinstance(residual, Measured):
        other, residual = residual.normalisation(), residual.y
    x, y, found = join_conv1x1(
        branch.y,
        branch.moments,
        branch.norm.weight,
        branch.norm.bias,
        residual,
        block.conv1.weight,
        span=span_of(norm, branch.y),
        eps=norm.eps,
        residual_norm=other,
        sink=sink_of(norm),
        leave=branch.handover,
        take=(handover := Handover()),
        backend=backend_of(block.fusion),
    )
    return x, Measured(y, found, norm, handover).normalised(block.fusion, relu=True)


def _shortcut(block: FusableBottleneck, x: Tensor, last: nn.BatchNorm2d, y: Tensor) -> Tensor | Measured:
    """What is added to y by batch norm `last`; where a batch norm ends it that can be fused, what that is to read."""
    if block.downsample is None or is_hooked(block.downsample):
        return block.shortcut(x)
    *layers, norm = block.downsample
    for layer in layers:
        x = layer(x)
    if can_fuse(norm, x, block.fusion) and x.dtype == y.dtype and span_of(norm, x) == span_of(last, y):
        return _measured(norm, x, block.fusion)
    return norm_act(norm, x, relu=False, fusion=block.fusion)


def _measured(norm: nn.Module, y: Tensor, fusion: Fusion) -> Measured:
    """The output of a convolution that does not measure what it writes."""
    norm = _batch_norm(norm)
    span, backend = span_of(norm, y), backend_of(fusion)
    return Measured(y, measure(y.detach(), span=span, eps=norm.eps, sink=sink_of(norm), backend=backend), norm)


def _batch_norm(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.BatchNorm2d), "of a block that fits"
    return norm


def _joined(state: Tensor | Pending) -> Tensor:
    return state.join() if isinstance(state, Pending) else state


def fits(block: FusableBottleneck, state: Tensor | Pending) -> bool:
    """Whether the block can be fused behind this state, its input or what that is made of."""
    x = state.branch.y if isinstance(state, Pending) else state
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
    return {span_of(state.branch.norm, state.branch.y)} if isinstance(state, Pending) else set()


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
