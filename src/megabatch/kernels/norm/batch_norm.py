"""Fused batch norm over spans, residual and ReLU, with few reads and writes of each tensor.

Fastest for 16-bit channels_last images. Image-sized tensors read + written:

                         fused    torch's operations
    forward              2 + 1    4 + 2
    forward, residual    3 + 1    6 + 3
    backward             4 + 1    6 + 2
    backward, residual   4 + 2    6 + 2

With a residual, forward also writes and backward reads the ReLU mask, one bit per value. Statistics and sums are
float32 in a fixed order: equal inputs give equal bits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.bottleneck.handover import DeferredNormBackward, Handover
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.dispatch import Backend, use_triton
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Moments, Normalisation
from megabatch.kernels.statistics import StatisticsSink, keep_statistics


def fused_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    sink: StatisticsSink | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, mean, var)`: batch norm with statistics per `span` samples, residual sum and ReLU; differentiable.

        h = (x - mean) / sqrt(biased variance + eps);   y = relu(weight h + bias + residual)      per span and channel

    (Ioffe and Szegedy 2015, arXiv:1502.03167; the gradients are in `norm.passes`.) `mean` and `var` are (spans, C),
    float32, without gradient; `var` is the unbiased variance, the one that running averages use. The last span is
    shorter if N is not a multiple of `span`. torch rounds after each of the three operations, the kernels only once.
    With `sink`, the statistics are also accumulated there, e.g. into a layer's running averages.

    Shapes: x and residual (N, C, H, W), float32, float16 or bfloat16, fastest in channels_last, which is also y's
    layout on a GPU; weight and bias (C,), float32.

    Raises:
        UserError: no sample, a span below 1, or tensors of wrong shapes or dtypes.
    """
    check(x, weight, bias, residual, span)
    if not use_triton(x, backend) or x.dtype not in passes.TYPES:
        if backend == "auto" and cpu_batch_norm.supports(x, weight, bias):
            return cpu_batch_norm.norm_act(x, weight, bias, span=span, eps=eps, residual=residual, relu=relu, sink=sink)
        y, mean, var = batch_norm_act_reference(x, weight, bias, span=span, eps=eps, residual=residual, relu=relu)
        if sink is not None:
            keep_statistics(sink, mean, var, triton=False)
        return y, mean, var
    # Moments are measured outside autograd; the gradient through them is part of `_NormAct`'s backward.
    found = passes.moments(x.detach(), span=span, eps=eps, triton=True, sink=sink)
    y = norm_act_of(x, found, weight.float(), bias.float(), span=span, residual=residual, relu=relu, backend="triton")
    return y, found.mean, found.var


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_bn_act` in torch's own operations, one batch norm per span; any floating-point dtype."""
    statistics = torch.zeros(-(-len(x) // span), 2, len(weight), dtype=weight.dtype, device=x.device)
    outputs = [
        _reference_of_span(part, weight, bias, rows, eps)
        for part, rows in zip(torch.split(x, span), statistics, strict=True)
    ]
    y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    y = y if residual is None else y + residual
    return functional.relu(y) if relu else y, statistics[:, 0], statistics[:, 1]


def _reference_of_span(x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float) -> Tensor:
    """Batch norm of one span; writes mean and unbiased variance into `statistics`, (2, C)."""
    mean, variance = statistics
    if x.numel() == len(weight):  # one value per channel, variance 0: torch raises an error
        mean.copy_(x.detach().flatten())
        return ((x - x) * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
    # With momentum 1 the running averages become the statistics of this span.
    return functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps)


def norm_act_of(
    x: Tensor,
    moments: Moments,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    residual: Tensor | None = None,
    relu: bool = True,
    defer_to: Handover | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns y of `fused_bn_act` for known moments of x, e.g. from a convolution that measured its output.

    The gradient is that of the whole batch norm, through the moments too. With `defer_to`, backward defers its final
    elementwise pass, dz to dx, to the convolution that wrote x (see `bottleneck.residual`); no other operation may
    then use x.

    Raises:
        UserError: tensors of shapes or dtypes that do not agree.
    """
    check(x, weight, bias, residual, span, moments)
    triton = use_triton(x, backend)
    y: Tensor = _NormAct.apply(x, moments, weight, bias, residual, span, relu, defer_to, triton)  # type: ignore[no-untyped-call]
    return y


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        moments: Moments,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        span: int,
        relu: bool,
        defer_to: Handover | None,
        triton: bool,
    ) -> Tensor:
        norm = Normalisation.of(moments, weight, bias)
        if residual is None:
            y, relu_mask = passes.normalise(x, norm, span=span, relu=relu, triton=triton), None
        else:
            y, relu_mask = join_passes.join(x, norm, residual, span=span, relu=relu, triton=triton)
        ctx.options, ctx.defer_to = {"span": span, "triton": triton}, defer_to
        ctx.relu, ctx.has_residual = relu, residual is not None
        # Without a residual, backward recomputes ReLU's mask from x; with one, it would have to read the residual.
        ctx.save_for_backward(x, *norm, relu_mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, relu_mask = ctx.saved_tensors
        norm = Normalisation(mean, rstd, weight, bias)
        relu = ctx.relu and relu_mask is None
        # First pass: the sums of dz and dz h. A join writes dz, which is also the residual's gradient.
        if relu_mask is None:
            dz, sums = dy, passes.gradient_sums(dy, x, norm, relu=relu, **ctx.options)
        else:
            dz, sums = join_passes.join_gradient(dy, x, norm, relu_mask, **ctx.options)
        dx: Tensor | None = dz
        # Second pass: dx from dz, x and those sums.
        if ctx.defer_to:
            # `dx` is then still dz (or dy): the convolution before applies the last pass as it reads it.
            ctx.defer_to.put(DeferredNormBackward(x, norm, sums, relu))
        else:
            dx = passes.input_gradient(dz, x, norm, sums, relu=relu, **ctx.options) if ctx.needs_input_grad[0] else None
        dbias, dweight = over_spans(sums)
        return dx, None, dweight, dbias, dz if ctx.has_residual else None, *(None,) * 4


def over_spans(sums: Tensor) -> Tensor:
    """Gradients of bias and weight, (2, C), from the sums of each span, (spans, 2, C)."""
    return sums.sum(0) if len(sums) > 1 else sums[0]


def check(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, span: int, moments: Moments | None = None
) -> None:
    """Raises UserError for tensors that a kernel, which checks no shapes, would read wrongly."""
    channels = x.shape[1] if x.ndim == 4 else None
    if channels is None or weight.shape != (channels,) or bias.shape != (channels,) or not x.numel():
        raise UserError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} were given, needed: images "
            "(N, C, H, W), at least one, and two vectors of C; x (32, 64, 56, 56) and vectors of 64 work"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise UserError(
            f"the residual is {residual.dtype} {tuple(residual.shape)}, needed: as x, {x.dtype} {tuple(x.shape)}"
        )
    if span < 1:
        raise UserError(f"span={span} was given, needed: 1 or more; span=32 works")
    if moments is not None and any(values.shape != (-(-len(x) // span), channels) for values in moments):
        raise UserError(
            f"moments of {[tuple(values.shape) for values in moments]} were given with x {tuple(x.shape)} and "
            f"span={span}, needed: three of {(-(-len(x) // span), channels)}, as norm.passes.measure returns them"
        )
