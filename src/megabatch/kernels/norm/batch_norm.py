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
    y = _NormAct.apply(x, found, weight.float(), bias.float(), residual, span, relu)  # type: ignore[no-untyped-call]
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
    ) -> Tensor:
        norm = Normalisation.of(moments, weight, bias)
        ctx.options = {"span": span, "triton": True}
        if residual is None:
            y, relu_mask = passes.normalise(x, norm, relu=relu, **ctx.options), None
        else:
            y, relu_mask = join_passes.join(x, norm, residual, relu=relu, **ctx.options)
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
        # Second pass: dx from dz, x and those sums.
        dx = passes.input_gradient(dz, x, norm, sums, relu=relu, **ctx.options) if ctx.needs_input_grad[0] else None
        dbias, dweight = over_spans(sums)
        return dx, None, dweight, dbias, dz if ctx.has_residual else None, None, None


def over_spans(sums: Tensor) -> Tensor:
    """Gradients of bias and weight, (2, C), from the sums of each span, (spans, 2, C)."""
    return sums.sum(0) if len(sums) > 1 else sums[0]


def check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, span: int) -> None:
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
