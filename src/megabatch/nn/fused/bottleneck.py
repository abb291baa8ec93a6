"""A chain of bottleneck blocks whose 1x1 convolutions include the batch norms around them.

Blocks exchange un-normalised convolution outputs plus their statistics (`PendingOutput`), not activations. The next
block's first convolution reads that: batch norm, residual sum, ReLU and the convolution are one differentiable
function (`join_conv1x1`), whose backward adds, masks and sums the gradient in one pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from megabatch.kernels.bottleneck.handover import Handover
from megabatch.kernels.bottleneck.residual import join_conv1x1, norm_conv1x1
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.norm.batch_norm import norm_act_of
from megabatch.kernels.norm.passes import Moments, Normalisation, measure
from megabatch.nn.fused.convolution import compute_type, convolve
from megabatch.nn.fused.gram import conv_norm_act, is_pointwise
from megabatch.nn.fused.norm_act import can_fuse, is_hooked, norm_act, sink_of, span_of
from megabatch.nn.resnet import Bottleneck


class FusedBottleneck(Bottleneck):
    """`Bottleneck` whose 1x1 convolutions include the batch norms around them, where the kernels support the block."""

    backend: Backend
    gram: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if _can_run(self, x):
            return _run(self, x).join()
        y = norm_act(self.bn1, convolve(self.conv1, x, self.backend), backend=self.backend)
        y = norm_act(self.bn2, convolve(self.conv2, y, self.backend), backend=self.backend)
        identity = run_shortcut(self.downsample, x, self.backend, gram=self.gram)
        return conv_norm_act(self.conv3, self.bn3, y, residual=identity, backend=self.backend, gram=self.gram)


class MeasuredOutput(NamedTuple):
    """A convolution's output y with its moments and the batch norm that follows; y is not yet normalised.

    With a `handover` that batch norm's backward defers its final pass to the convolution that wrote y.
    """

    y: Tensor
    moments: Moments
    norm: nn.BatchNorm2d
    handover: Handover | None = None

    def normalisation(self) -> Normalisation:
        """The batch norm's mean, rstd, weight and bias."""
        return Normalisation.of(self.moments, self.norm.weight, self.norm.bias)

    def normalised(self, backend: Backend, *, residual: Tensor | None = None, relu: bool) -> Tensor:
        """norm(y) + residual, through ReLU with `relu`."""
        return norm_act_of(
            self.y,
            self.moments,
            self.norm.weight,
            self.norm.bias,
            span=span_of(self.norm, self.y),
            residual=residual,
            relu=relu,
            defer_to=self.handover,
            backend=backend,
        )


class PendingOutput(NamedTuple):
    """A block's output before its last batch norm, residual sum and ReLU; a shortcut may be un-normalised as well."""

    branch: MeasuredOutput
    shortcut: Tensor | MeasuredOutput
    backend: Backend

    def join(self) -> Tensor:
        """The block's output."""
        shortcut = self.shortcut
        if isinstance(shortcut, MeasuredOutput):
            shortcut = shortcut.normalised(self.backend, relu=False)
        return self.branch.normalised(self.backend, residual=shortcut, relu=True)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Output of the last block. Fused bottlenecks pass their pending outputs on; other blocks are called as modules."""
    state: Tensor | PendingOutput = x
    for block in blocks:
        # A block's own hooks must see its complete output, so it is called and joins its pending output itself.
        if isinstance(block, FusedBottleneck) and not is_hooked(block) and _can_run(block, state):
            state = _run(block, state)
        else:
            state = block(_joined(state))
    return _joined(state)


def run_shortcut(downsample: nn.Sequential | None, x: Tensor, backend: Backend, *, gram: bool = False) -> Tensor:
    """Term that a block adds to its branch: x, or the shortcut's convolutions and norm of x."""
    if downsample is None:
        return x
    if is_hooked(downsample):
        y: Tensor = downsample(x)
        return y
    *layers, last, norm = downsample
    for layer in layers:
        x = convolve(layer, x, backend)
    return conv_norm_act(last, norm, x, relu=False, backend=backend, gram=gram)


def _run(block: FusedBottleneck, state: Tensor | PendingOutput) -> PendingOutput:
    """The whole block up to its third convolution, whose output is measured and not yet normalised."""
    x, h = _run_first(block, state)
    norm = _batch_norm(block.bn3)
    second = _measured(block.bn2, block.conv2(h), block.backend)
    # One function for bn2, ReLU and conv3: its backward does the elementwise pass that bn3's backward defers to it.
    y, moments = norm_conv1x1(
        second.y,
        second.moments,
        second.norm.weight,
        second.norm.bias,
        block.conv3.weight,
        span=span_of(norm, second.y),
        eps=norm.eps,
        sink=sink_of(norm, second.y),
        deferred_from=(handover := Handover()),
        backend=block.backend,
    )
    shortcut = _pending_shortcut(block, x, norm, y)
    return PendingOutput(MeasuredOutput(y, moments, norm, handover), shortcut, block.backend)


def _run_first(block: FusedBottleneck, state: Tensor | PendingOutput) -> tuple[Tensor, Tensor]:
    """The block's input, and the input of its 3x3 convolution."""
    norm = _batch_norm(block.bn1)
    if not isinstance(state, PendingOutput):
        return state, norm_act(norm, block.conv1(state), backend=block.backend)
    branch, shortcut, shortcut_norm = state.branch, state.shortcut, None
    if isinstance(shortcut, MeasuredOutput):
        shortcut_norm, shortcut = shortcut.normalisation(), shortcut.y
    # Finishes the block before (bn3, sum, ReLU) together with conv1 of this block, which reads the result.
    x, y, moments = join_conv1x1(
        branch.y,
        branch.moments,
        branch.norm.weight,
        branch.norm.bias,
        shortcut,
        block.conv1.weight,
        span=span_of(norm, branch.y),
        eps=norm.eps,
        residual_norm=shortcut_norm,
        sink=sink_of(norm, branch.y),
        defer_to=branch.handover,
        deferred_from=(handover := Handover()),
        backend=block.backend,
    )
    return x, MeasuredOutput(y, moments, norm, handover).normalised(block.backend, relu=True)


def _pending_shortcut(block: FusedBottleneck, x: Tensor, last: nn.BatchNorm2d, y: Tensor) -> Tensor | MeasuredOutput:
    """Term that is added to last(y); un-normalised where the shortcut's batch norm can run together with `last`."""
    if block.downsample is None or is_hooked(block.downsample):
        return run_shortcut(block.downsample, x, block.backend)
    *layers, norm = block.downsample
    for layer in layers:
        x = layer(x)
    # Both norms of a join use one cut of rows into spans, and one dtype.
    if can_fuse(norm, x, block.backend) and x.dtype == y.dtype and span_of(norm, x) == span_of(last, y):
        return _measured(norm, x, block.backend)
    return norm_act(norm, x, relu=False, backend=block.backend)


def _measured(norm: nn.Module, y: Tensor, backend: Backend) -> MeasuredOutput:
    """Measures the output of a convolution that does not do so itself: one more read of y."""
    norm = _batch_norm(norm)
    moments = measure(y.detach(), span=span_of(norm, y), eps=norm.eps, sink=sink_of(norm, y), backend=backend)
    return MeasuredOutput(y, moments, norm)


def _batch_norm(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.BatchNorm2d), "_can_run has checked it"
    return norm


def _joined(state: Tensor | PendingOutput) -> Tensor:
    return state.join() if isinstance(state, PendingOutput) else state


def _can_run(block: FusedBottleneck, state: Tensor | PendingOutput) -> bool:
    """True if the kernels, or their reference, support all of the block's norms and 1x1 convolutions on this input."""
    x = state.branch.y if isinstance(state, PendingOutput) else state
    norms = (block.bn1, block.bn2, block.bn3)
    return (
        not block.gram
        and len(x) > 1  # so that there are two values per channel whatever the resolution
        and all(can_fuse(norm, x, block.backend) for norm in norms)
        and len({span_of(norm, x) for norm in norms if isinstance(norm, nn.BatchNorm2d)} | _span_of_state(state)) == 1
        and _is_product(block.conv1)
        and _is_product(block.conv3)
        and x.dtype == compute_type(block.conv3.weight)
    )


def _span_of_state(state: Tensor | PendingOutput) -> set[int]:
    return {span_of(state.branch.norm, state.branch.y)} if isinstance(state, PendingOutput) else set()


def _is_product(conv: nn.Module) -> bool:
    """True for a 1x1 convolution of stride 1, without bias or hooks, which is one matrix product."""
    return is_pointwise(conv) and conv.stride == (1, 1)
