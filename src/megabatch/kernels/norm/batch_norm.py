"""Batch norm over spans, a residual and ReLU, each tensor read and written as few times as the arithmetic allows.

For 16-bit images with the channels last. Passes over the images, with the plain operations' in brackets: forward reads
2 and writes 1 (with a residual 3 and 1; plain 4 and 2, 6 and 3); backward reads 4 and writes 1 (with a residual 4 and
2; plain 6 and 2, 6 and 2), and with a residual one bit a value each way, ReLU's mask. Statistics and sums are float32,
added in one fixed order: equal inputs give equal bits.
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
    """`(y, mean, var)`: each `span` samples by their own statistics, plus a residual, through ReLU; differentiable.

        h = (x - mean) / sqrt(biased variance + eps);   y = relu(weight h + bias + residual)      per span and channel

    (Ioffe and Szegedy 2015, arXiv:1502.03167; the gradients are in `norm_passes`.) `mean` and `var` are (spans, C), in
    float32 and without gradient; `var` is the unbiased variance, which running averages want. The last span
    is short where N is no multiple of `span`. torch rounds between the three operations, the kernels only once. With
    `sink` the statistics are also kept there, as a layer keeps those of its forwards.

    Shapes: x and residual (N, C, H, W), float32, float16 or bfloat16, fastest with the channels last, in which y comes
    back from a GPU; weight and bias (C,), float32.

    Raises:
        UserError: no sample, a span below 1, or tensors of other shapes or types.
    """
    check(x, weight, bias, residual, span)
    if not use_triton(x, backend) or x.dtype not in passes.TYPES:
        if backend == "auto" and cpu_batch_norm.supports(x, weight, bias):
            return cpu_batch_norm.norm_act(x, weight, bias, span=span, eps=eps, residual=residual, relu=relu, sink=sink)
        y, mean, var = batch_norm_act_reference(x, weight, bias, span=span, eps=eps, residual=residual, relu=relu)
        if sink is not None:
            keep_statistics(sink, mean, var, triton=False)
        return y, mean, var
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
    """The same in torch's own operations, one batch norm per span; any floating-point type."""
    wide = weight.dtype
    statistics = torch.zeros(-(-len(x) // span), 2, len(weight), dtype=wide, device=x.device)
    outputs = [
        _reference_of_span(part, weight, bias, rows, eps)
        for part, rows in zip(torch.split(x, span), statistics, strict=True)
    ]
    y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    y = y if residual is None else y + residual
    return functional.relu(y) if relu else y, statistics[:, 0], statistics[:, 1]


def _reference_of_span(x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float) -> Tensor:
    mean, variance = statistics
    if x.numel() == len(weight):  # one value per channel, which torch refuses: its variance is 0
        mean.copy_(x.detach().flatten())
        return ((x - x) * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
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
    leave: Handover | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """y of `fused_bn_act` where the moments of x are known, as of a convolution that measured its output.

    Its gradient is that of batch norm whole, moments included. With `leave` the rest of it is left there to the
    convolution that wrote x (`residual`), and nobody else may read x.

    Raises:
        UserError: tensors of shapes or types that do not agree.
    """
    check(x, weight, bias, residual, span, moments)
    triton = use_triton(x, backend)
    y: Tensor = _NormAct.apply(x, moments, weight, bias, residual, span, relu, leave, triton)  # type: ignore[no-untyped-call]
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
        leave: Handover | None,
        triton: bool,
    ) -> Tensor:
        norm = Normalisation.of(moments, weight, bias)
        if residual is None:
            y, passed = passes.normalise(x, norm, span=span, relu=relu, triton=triton), None
        else:
            y, passed = join_passes.join(x, norm, residual, span=span, relu=relu, triton=triton)
        ctx.options, ctx.leave = {"span": span, "triton": triton}, leave
        ctx.relu, ctx.has_residual = relu, residual is not None
        ctx.save_for_backward(x, *norm, passed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, passed = ctx.saved_tensors
        norm = Normalisation(mean, rstd, weight, bias)
        relu = ctx.relu and passed is None
        if passed is None:
            dz, sums = dy, passes.gradient_sums(dy, x, norm, relu=relu, **ctx.options)
        else:
            dz, sums = join_passes.join_gradient(dy, x, norm, passed, **ctx.options)
        dx: Tensor | None = dz
        if ctx.leave:
            ctx.leave.leave(DeferredNormBackward(x, norm, sums, relu))
        else:
            dx = passes.input_gradient(dz, x, norm, sums, relu=relu, **ctx.options) if ctx.needs_input_grad[0] else None
        dbias, dweight = over_spans(sums)
        return dx, None, dweight, dbias, dz if ctx.has_residual else None, *(None,) * 4


def over_spans(sums: Tensor) -> Tensor:
    """(2, C): gradients of bias and weight from the sums of each span (spans, 2, C)."""
    return sums.sum(0) if len(sums) > 1 else sums[0]


def check(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, span: int, moments: Moments | None = None
) -> None:
    """Raises UserError for what a kernel, which knows no shapes, would read wrongly."""
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
            f"span={span}, needed: three of {(-(-len(x) // span), channels)}, as norm_passes.measure gives them"
        )
