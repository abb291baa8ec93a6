"""Batch norm over spans, a residual and ReLU on a CPU, in one compiled call forward and one backward.

The same equations as `batch_norm`, for float32 and bfloat16 images with the channels last. torch takes three
operations forward and three backward; this takes as few passes over memory as the arithmetic needs, and rounds once.
Results depend on neither the number of threads nor their timing. Whole steps with it and without it are in
benchmarks/records.
"""

import functools
import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabatch.kernels.cpu import library as cpu_native
from megabatch.kernels.statistics import SpanSums, StatisticsSink, has_kernel, keep_statistics

_ARGUMENTS = struct.Struct("6qd16P")
"""`Norm` in csrc/norm.c; packed, as filling in a ctypes structure takes as long as a small batch norm."""


def is_available() -> bool:
    """Whether the compiled kernels are there and load."""
    return _functions() is not None


def supports(x: Tensor, *vectors: Tensor) -> bool:
    """Whether the compiled kernels take such images (N, C, H, W), and these vectors, as they lie in memory."""
    return (
        x.device.type == "cpu"
        and x.dtype in {torch.bfloat16, torch.float32}
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(vector.dtype == torch.float32 and vector.is_contiguous() for vector in vectors)
        and is_available()
    )


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = True,
    sink: StatisticsSink | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean, var)` of `batch_norm.fused_bn_act`, which checks shapes, for what `supports` allows; differentiable.

    `SpanSums` are kept by the same call, other statistics after it.
    """
    sums = sink if isinstance(sink, SpanSums) and has_kernel(sink) else None
    statistics = x.new_empty((3, -(-len(x) // span), len(weight)), dtype=torch.float32)
    y = _NormAct.apply(x, weight, bias, residual, statistics, sums, span, eps, relu)  # type: ignore[no-untyped-call]
    if sink is not None and sums is None:
        keep_statistics(sink, statistics[0], statistics[1], triton=False)
    return y, statistics[0], statistics[1]


class _NormAct(torch.autograd.Function):
    """`statistics` are written: mean, unbiased variance, 1 / sqrt(biased variance + eps), each (spans, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        statistics: Tensor,
        sums: SpanSums | None,
        span: int,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        given = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        _call(0, x, weight, bias, statistics, span, relu, eps, residual=given, y=y, sums=sums)
        has_output = relu and residual is not None  # whose sign is ReLU's mask; otherwise x tells it
        ctx.save_for_backward(x, weight, bias, statistics, *([y] if has_output else []))
        ctx.span, ctx.relu, ctx.has_residual = span, relu, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, *kept = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        output, dz = (kept[0], torch.empty_like(x)) if kept else (None, None)
        gradients = (dx, dweight, dbias)
        _call(1, x, weight, bias, statistics, ctx.span, ctx.relu, dy=dy, output=output, dz=dz, gradients=gradients)
        of_residual = (dy if dz is None else dz) if ctx.has_residual else None
        return dx, dweight, dbias, of_residual, None, None, None, None, None


def _call(
    which: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    span: int,
    relu: bool,
    eps: float = 0.0,
    *,
    residual: Tensor | None = None,
    dy: Tensor | None = None,
    output: Tensor | None = None,
    y: Tensor | None = None,
    dz: Tensor | None = None,
    gradients: tuple[Tensor | None, ...] = (None, None, None),
    sums: SpanSums | None = None,
) -> None:
    """Forward (0) or backward (1)."""
    functions, (count, channels, height, width) = _functions(), x.shape
    assert functions is not None, "what `supports` allows"
    dx, dweight, dbias = gradients
    first, total = sums or (None, None)
    vectors = (weight, bias, *statistics.unbind(), dweight, dbias, first, total)
    arguments = _ARGUMENTS.pack(
        x.dtype == torch.bfloat16,
        count * height * width,
        min(span, count) * height * width,
        channels,
        relu,
        torch.get_num_threads(),
        eps,
        *[0 if t is None else t.data_ptr() for t in (x, residual, dy, output, y, dz, dx, *vectors)],
    )
    if functions[which](arguments):
        raise MemoryError(f"batch norm of {tuple(x.shape)} found no memory for its sums")


@functools.cache
def _functions() -> tuple[Any, Any] | None:
    forward, backward = map(cpu_native.function, ("megabatch_norm_forward", "megabatch_norm_backward"))
    return None if forward is None or backward is None else (forward, backward)
