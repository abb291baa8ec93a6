"""The parts of a bottleneck block that are more than one operation each: batch norms where 1x1 convolutions read.

Between a block's last convolution and the next block's first stand batch norm, a residual sum and ReLU
(`join_conv1x1`), and where the residual is a shortcut's, that one's batch norm too; between a block's 3x3 and its last
convolution stand batch norm and ReLU (`norm_conv1x1`). Each is one differentiable function, because each convolution's
gradients can do part of the batch norm's backward as they write.
How each part is computed (torch's convolution between passes, or a kernel of `conv1x1` in one of its tilings) is chosen
by measuring (`products`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.bottleneck import conv1x1, products
from megabatch.kernels.bottleneck.gradients import JoinGradients, NormGradients
from megabatch.kernels.bottleneck.handover import DeferredNormBackward, Handover
from megabatch.kernels.bottleneck.tiles import Tiling
from megabatch.kernels.dispatch import Backend, use_triton
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.batch_norm import check, over_spans
from megabatch.kernels.norm.passes import Moments, Normalisation
from megabatch.kernels.statistics import StatisticsSink

TASKS = tuple(f"{part} {what}" for part in ("norm_conv", "join_conv") for what in ("forward", "data", "weight"))
GRADIENTS = ("norm_conv gradients", "join_conv gradients")
"""What the table of `tuning` is asked about: forward, data gradient and weight gradient of each; and whether both
gradients together apply the backward of the batch norm behind."""


def norm_conv1x1(
    x: Tensor,
    moments: Moments,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    *,
    span: int,
    eps: float,
    sink: StatisticsSink | None = None,
    take: Handover | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """`(y, moments of y)`: y = weight relu(batch norm of x), where `moments` are those of x's spans.

    The gradient is that of all three, batch norm's statistics included. `eps` is that of the batch norm behind y. Where
    a kernel reads x through batch norm, its result is never in memory; backward computes it again. With `sink` the
    moments of y are kept there, as a layer keeps those of its forwards. What the batch norm behind y leaves of its
    backward at `take` is done here: in a pass, or as both gradients read.

    Shapes: x (N, C, H, W), weight (K, C, 1, 1), cast to x's type; norm_weight and norm_bias (C,) float32.

    Raises:
        UserError: tensors of shapes or types that do not agree.
    """
    _check(x, moments, norm_weight, norm_bias, None, weight, span)
    y, *found = _NormConv.apply(
        x,
        moments.mean,
        moments.rstd,
        norm_weight,
        norm_bias,
        weight,
        span,
        eps,
        sink,
        take,
        use_triton(x, backend),
    )  # type: ignore[no-untyped-call]
    return y, Moments(*found)


def join_conv1x1(
    x: Tensor,
    moments: Moments,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    span: int,
    eps: float,
    residual_norm: Normalisation | None = None,
    sink: StatisticsSink | None = None,
    leave: Handover | None = None,
    take: Handover | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Moments]:
    """`(z, y, moments of y)`: z = relu(batch norm of x + residual) and y = weight z; as `norm_conv1x1` otherwise.

    With a `residual_norm`, of the moments of the residual's spans, that batch norm of the residual is added, and its
    weight and bias have gradients too: a shortcut's, whose convolution's output is then read where it is needed.

    In backward the gradients that reach z through y and past it are added, masked and summed for the batch norm in one
    pass, which is the convolution's own where the kernel is faster. The rest of x's batch norm's backward is left at
    `leave`, where the convolution that wrote x takes it.

    Raises:
        UserError: tensors of shapes or types that do not agree.
    """
    _check(x, moments, norm_weight, norm_bias, residual, weight, span)
    if residual_norm is not None:
        conv1x1.check_normalisation(residual, residual_norm, span)
    other = residual_norm or (None,) * 4
    z, y, *found = _JoinConv.apply(
        x,
        norm_weight,
        norm_bias,
        residual,
        *other[2:],
        weight,
        _Statistics(moments.mean, moments.rstd, *other[:2]),
        span,
        eps,
        sink,
        leave if residual_norm is None else None,  # two batch norms' gradients come from one pass
        take,
        use_triton(x, backend),
    )  # type: ignore[no-untyped-call]
    return z, y, Moments(*found)


class _Statistics(NamedTuple):
    """Means and deviations of a join's two batch norms; gradients take them into account, but do not flow to them."""

    mean: Tensor
    rstd: Tensor
    other_mean: Tensor | None
    other_rstd: Tensor | None


def _check(
    x: Tensor,
    moments: Moments,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    span: int,
) -> None:
    check(x, norm_weight, norm_bias, residual, span, moments)
    if weight.shape != (len(weight), x.shape[1], 1, 1):
        raise UserError(
            f"the weight is {tuple(weight.shape)}, needed for x {tuple(x.shape)}: (K, {x.shape[1]}, 1, 1); "
            f"(64, {x.shape[1]}, 1, 1) works"
        )


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        span: int,
        eps: float,
        sink: StatisticsSink | None,
        take: Handover | None,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        norm = Normalisation(mean, rstd, norm_weight, norm_bias)
        small = weight.to(x.dtype)

        def plain(sink: StatisticsSink | None = None) -> tuple[Tensor | None, Tensor, Moments]:
            h = passes.normalise(x, norm, span=span, triton=triton)
            y = functional.conv2d(h, small)
            return h, y, passes.moments(y, span=span, eps=eps, triton=triton, sink=sink)

        def fused(tiling: Tiling, sink: StatisticsSink | None = None) -> tuple[Tensor | None, Tensor, Moments]:
            y, found = conv1x1.conv1x1_forward(
                x, small, span=span, eps=eps, normalisation=norm, sink=sink, tiling=tiling, backend="triton"
            )
            return None, y, found

        tilings = conv1x1.FORWARD_TILINGS
        h, y, found = products.take("norm_conv forward", x, small, plain, fused, tilings, triton=triton, sink=sink)
        ctx.save_for_backward(x, *norm, small, h)
        ctx.filter = products.Filter.of(weight)
        ctx.options, ctx.take = {"span": span, "triton": triton}, take
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)  # or zeros would be written for each of these
        return y, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, small, h = ctx.saved_tensors
        norm = Normalisation(mean, rstd, norm_weight, norm_bias)
        own = NormGradients(x, norm, small, h, ctx.filter, **ctx.options)
        rest = ctx.take.take() if ctx.take else None
        dx, sums, dweight = products.apart_or_together(GRADIENTS[0], x, small, dy, rest, own.of, **ctx.options)
        dbias, dscale = over_spans(sums)
        return dx, None, None, dscale, dbias, dweight, *(None,) * 5


class _JoinConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        residual: Tensor,
        other_weight: Tensor | None,
        other_bias: Tensor | None,
        weight: Tensor,
        statistics: _Statistics,
        span: int,
        eps: float,
        sink: StatisticsSink | None,
        leave: Handover | None,
        take: Handover | None,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        norm = Normalisation(statistics.mean, statistics.rstd, norm_weight, norm_bias)
        other = _normalisation(statistics.other_mean, statistics.other_rstd, other_weight, other_bias)
        small = weight.to(x.dtype)
        z, passed = join_passes.join(x, norm, residual, residual_norm=other, span=span, triton=triton)

        def plain(sink: StatisticsSink | None = None) -> tuple[Tensor, Moments]:
            y = functional.conv2d(z, small)
            return y, passes.moments(y, span=span, eps=eps, triton=triton, sink=sink)

        def fused(tiling: Tiling, sink: StatisticsSink | None = None) -> tuple[Tensor, Moments]:
            return conv1x1.conv1x1_forward(z, small, span=span, eps=eps, sink=sink, tiling=tiling, backend="triton")

        tilings = conv1x1.FORWARD_TILINGS
        y, found = products.take("join_conv forward", x, small, plain, fused, tilings, triton=triton, sink=sink)
        to_normalise = (None,) * 5 if other is None else (residual, *other)
        ctx.save_for_backward(x, *norm, passed, z, small, *to_normalise)
        ctx.filter = products.Filter.of(weight)
        ctx.options, ctx.leave, ctx.take = {"span": span, "triton": triton}, leave, take
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)  # or zeros would be written for each of these
        return z, y, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, passed, z, small, residual, *others = ctx.saved_tensors
        norm, other = Normalisation(mean, rstd, norm_weight, norm_bias), _normalisation(*others)
        through_y = z.new_zeros(len(z), len(small), *z.shape[2:]) if dy is None else dy
        own = JoinGradients(x, norm, small, z, passed, past, residual, other, ctx.filter, **ctx.options)
        rest = ctx.take.take() if ctx.take else None
        dz, sums, dweight = products.apart_or_together(GRADIENTS[1], x, small, through_y, rest, own.of, **ctx.options)
        dx, dresidual = dz, dz
        if other is not None:
            dx, dresidual = join_passes.two_input_gradients(dz, x, norm, residual, other, sums, **ctx.options)
        elif ctx.leave:
            ctx.leave.leave(DeferredNormBackward(x, norm, sums, relu=False))
        else:
            dx = passes.input_gradient(dz, x, norm, sums, relu=False, **ctx.options)
        dbias, dscale, *of_other = over_spans(sums)
        other_dbias, other_dscale = of_other or (None, None)
        return dx, dscale, dbias, dresidual, other_dscale, other_dbias, dweight, *(None,) * 7


def _normalisation(*values: Tensor | None) -> Normalisation | None:
    """Where all four are there."""
    given = [value for value in values if value is not None]
    return Normalisation(*given) if len(given) == len(values) else None
