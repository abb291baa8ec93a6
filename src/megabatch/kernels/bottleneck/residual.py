"""The two differentiable functions that a fused bottleneck is made of: batch norm and the 1x1 convolution behind it.

- `norm_conv1x1`: batch norm, ReLU, 1x1 convolution; from a block's 3x3 convolution to its last.
- `join_conv1x1`: batch norm, residual sum, ReLU, 1x1 convolution; from a block's last convolution to the first of the
  next block. Where the residual is a shortcut's convolution, its batch norm is part of the function too.

Each is one function because the gradient kernels of the convolution can do part of the batch norm's backward as they
write. Each part is computed by torch's convolution between passes or by a kernel of `conv1x1`, whichever was measured
to be faster (`products`).
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
"""Keys in the tuning table for forward, data gradient and weight gradient of each function."""
GRADIENTS = ("norm_conv gradients", "join_conv gradients")
"""Keys for the choice between applying a deferred norm backward in a separate pass and in both gradients' kernels."""


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
    deferred_from: Handover | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """Returns y = weight relu(norm_weight (x - mean) rstd + norm_bias) and the moments of y; differentiable.

    `moments` are those of x's spans; gradients include their dependence on x. Where a kernel normalises x as it reads
    it, relu(...) is never in memory, and backward computes it again.

    Args:
        eps: of the batch norm behind y, for the rstd in the moments of y.
        sink: where the moments of y are also stored, as buffers of that batch norm.
        deferred_from: slot in which the backward of the batch norm behind y leaves its final pass, which backward
            here then does: in a separate pass, or as both gradients read dy.

    Shapes: x (N, C, H, W); weight (K, C, 1, 1), cast to x's dtype; norm_weight and norm_bias (C,) float32.

    Raises:
        UserError: tensors whose shapes or dtypes do not agree.
    """
    _check(x, moments, norm_weight, norm_bias, None, weight, span)
    y, *y_moments = _NormConv.apply(
        x,
        moments.mean,
        moments.rstd,
        norm_weight,
        norm_bias,
        weight,
        span,
        eps,
        sink,
        deferred_from,
        use_triton(x, backend),
    )  # type: ignore[no-untyped-call]
    return y, Moments(*y_moments)


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
    defer_to: Handover | None = None,
    deferred_from: Handover | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Moments]:
    """Returns z = relu(norm(x) + residual), y = weight z and the moments of y; otherwise as `norm_conv1x1`.

    With `residual_norm` the sum is norm(x) + residual_norm(residual): `residual` is then the output of a shortcut's
    convolution, and `residual_norm`, with the moments of its spans, has gradients of weight and bias too.

    Backward adds the gradients of z through y and through the next residual sum, applies ReLU's mask and computes the
    batch norm's sums in one pass, or in the data-gradient kernel where that is faster. The final pass of norm(x)'s
    backward is put into `defer_to`, from which the convolution that wrote x pops it. With `residual_norm` nothing is
    deferred, as one pass computes both input gradients.

    Raises:
        UserError: tensors whose shapes or dtypes do not agree.
    """
    _check(x, moments, norm_weight, norm_bias, residual, weight, span)
    if residual_norm is not None:
        conv1x1.check_normalisation(residual, residual_norm, span)
    # Weight and bias of the shortcut's norm are arguments of their own, because they have gradients.
    other = residual_norm or (None,) * 4
    z, y, *y_moments = _JoinConv.apply(
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
        defer_to if residual_norm is None else None,  # else one pass computes the input gradients of both norms
        deferred_from,
        use_triton(x, backend),
    )  # type: ignore[no-untyped-call]
    return z, y, Moments(*y_moments)


class _Statistics(NamedTuple):
    """Mean and rstd of a join's two batch norms, in a tuple because autograd is to return no gradients for them."""

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
        deferred_from: Handover | None,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        norm = Normalisation(mean, rstd, norm_weight, norm_bias)
        # The product computes in x's dtype (16 bit under autocast); the gradient returns in the parameter's.
        weight_cast = weight.to(x.dtype)

        def plain(sink: StatisticsSink | None = None) -> tuple[Tensor | None, Tensor, Moments]:
            h = passes.normalise(x, norm, span=span, triton=triton)
            y = functional.conv2d(h, weight_cast)
            return h, y, passes.moments(y, span=span, eps=eps, triton=triton, sink=sink)

        def fused(tiling: Tiling, sink: StatisticsSink | None = None) -> tuple[Tensor | None, Tensor, Moments]:
            y, y_moments = conv1x1.conv1x1_forward(
                x, weight_cast, span=span, eps=eps, normalisation=norm, sink=sink, tiling=tiling, backend="triton"
            )
            return None, y, y_moments

        tilings = conv1x1.FORWARD_TILINGS
        h, y, y_moments = products.run_fastest(
            "norm_conv forward", x, weight_cast, plain, fused, tilings, triton=triton, sink=sink
        )
        # h is None where a kernel computed it on the fly; then backward does so as well.
        ctx.save_for_backward(x, *norm, weight_cast, h)
        ctx.layout = products.FilterLayout.of(weight)
        ctx.options, ctx.deferred_from = {"span": span, "triton": triton}, deferred_from
        ctx.mark_non_differentiable(*y_moments)
        ctx.set_materialize_grads(False)  # else backward would receive a tensor of zeros for each of the moments
        return y, *y_moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight_cast, h = ctx.saved_tensors
        norm = Normalisation(mean, rstd, norm_weight, norm_bias)
        gradients = NormGradients(x, norm, weight_cast, h, ctx.layout, **ctx.options)
        # With `deferred`, the dy from autograd is still the gradient behind the next batch norm.
        deferred = ctx.deferred_from.pop() if ctx.deferred_from else None
        dx, sums, dweight = products.run_with_deferred(
            GRADIENTS[0], x, weight_cast, dy, deferred, gradients.compute, **ctx.options
        )
        # The sums of a batch norm's backward, added over all spans, are the gradients of its bias and weight.
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
        defer_to: Handover | None,
        deferred_from: Handover | None,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        norm = Normalisation(statistics.mean, statistics.rstd, norm_weight, norm_bias)
        other = _normalisation(statistics.other_mean, statistics.other_rstd, other_weight, other_bias)
        weight_cast = weight.to(x.dtype)
        # z is written in any case: the next block's shortcut reads it as well as this convolution.
        z, relu_mask = join_passes.join(x, norm, residual, residual_norm=other, span=span, triton=triton)

        def plain(sink: StatisticsSink | None = None) -> tuple[Tensor, Moments]:
            y = functional.conv2d(z, weight_cast)
            return y, passes.moments(y, span=span, eps=eps, triton=triton, sink=sink)

        def fused(tiling: Tiling, sink: StatisticsSink | None = None) -> tuple[Tensor, Moments]:
            return conv1x1.conv1x1_forward(
                z, weight_cast, span=span, eps=eps, sink=sink, tiling=tiling, backend="triton"
            )

        tilings = conv1x1.FORWARD_TILINGS
        y, y_moments = products.run_fastest(
            "join_conv forward", x, weight_cast, plain, fused, tilings, triton=triton, sink=sink
        )
        # A residual without a norm is not needed in backward: its gradient depends on ReLU's mask alone.
        saved_residual = (None,) * 5 if other is None else (residual, *other)
        ctx.save_for_backward(x, *norm, relu_mask, z, weight_cast, *saved_residual)
        ctx.layout = products.FilterLayout.of(weight)
        ctx.options = {"span": span, "triton": triton}
        ctx.defer_to, ctx.deferred_from = defer_to, deferred_from
        ctx.mark_non_differentiable(*y_moments)
        ctx.set_materialize_grads(False)  # else backward would receive a tensor of zeros for each of the moments
        return z, y, *y_moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual_grad: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, relu_mask, z, weight_cast, residual, *others = ctx.saved_tensors
        norm, other = Normalisation(mean, rstd, norm_weight, norm_bias), _normalisation(*others)
        dy = z.new_zeros(len(z), len(weight_cast), *z.shape[2:]) if dy is None else dy
        gradients = JoinGradients(
            x, norm, weight_cast, z, relu_mask, residual_grad, residual, other, ctx.layout, **ctx.options
        )
        # dz is the gradient of ReLU's input, that is, of norm(x) and of the residual alike.
        deferred = ctx.deferred_from.pop() if ctx.deferred_from else None
        dz, sums, dweight = products.run_with_deferred(
            GRADIENTS[1], x, weight_cast, dy, deferred, gradients.compute, **ctx.options
        )
        dx, dresidual = dz, dz  # without a norm of its own the residual has the gradient of the sum
        if other is not None:
            dx, dresidual = join_passes.two_input_gradients(dz, x, norm, residual, other, sums, **ctx.options)
        # dz is returned as the gradient of x. With a slot, that is correct only for the convolution that pops it.
        elif ctx.defer_to:
            ctx.defer_to.put(DeferredNormBackward(x, norm, sums, relu=False))
        else:
            dx = passes.input_gradient(dz, x, norm, sums, relu=False, **ctx.options)
        dbias, dscale, *of_other = over_spans(sums)
        other_dbias, other_dscale = of_other or (None, None)
        return dx, dscale, dbias, dresidual, other_dscale, other_dbias, dweight, *(None,) * 7


def _normalisation(*values: Tensor | None) -> Normalisation | None:
    """Normalisation of these four tensors, or None if any is None."""
    given = [value for value in values if value is not None]
    return Normalisation(*given) if len(given) == len(values) else None
