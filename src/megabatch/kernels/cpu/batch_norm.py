"""Fused batch norm over spans, residual and ReLU on a CPU: one compiled call forward and one backward.

Computes the equations of `norm.batch_norm`, for float32 and bfloat16 images in channels_last. torch needs three
operations in each direction; the compiled code makes two passes over the images in each and rounds once. Results depend
on neither the number of threads nor their timing. Timings of whole training steps are in benchmarks/records.
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
"""The struct `Norm` in csrc/norm.c. Filling in a ctypes structure would take as long as a small batch norm."""


def is_available() -> bool:
    """True if the library of compiled kernels exists and loads."""
    return _functions() is not None


def supports(x: Tensor, *vectors: Tensor) -> bool:
    """True if the compiled kernels support images x (N, C, H, W) and these vectors, by device, dtype and layout."""
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
    """Returns `(y, mean, var)` of `norm.batch_norm.fused_bn_act`, differentiable. `supports` must be true.

    Shapes are not checked here. The compiled call itself accumulates into `SpanSums`; torch accumulates into any other
    sink after it.
    """
    sums = sink if isinstance(sink, SpanSums) and has_kernel(sink) else None
    statistics = x.new_empty((3, -(-len(x) // span), len(weight)), dtype=torch.float32)
    # Allocated here and written by forward, as mean and variance are returned without going through autograd.
    y = _NormAct.apply(x, weight, bias, residual, statistics, sums, span, eps, relu)  # type: ignore[no-untyped-call]
    if sink is not None and sums is None:
        keep_statistics(sink, statistics[0], statistics[1], triton=False)
    return y, statistics[0], statistics[1]


class _NormAct(torch.autograd.Function):
    """Forward writes `statistics`: mean, unbiased variance and 1 / sqrt(biased variance + eps), each (spans, C)."""

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
        # With a residual, ReLU's mask comes from the sign of y; without one, backward recomputes it from x.
        has_output = relu and residual is not None
        ctx.save_for_backward(x, weight, bias, statistics, *([y] if has_output else []))
        ctx.span, ctx.relu, ctx.has_residual = span, relu, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, *kept = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        # Where y was saved, dz is written, as it is also the residual's gradient; otherwise dy is masked while read.
        output, dz = (kept[0], torch.empty_like(x)) if kept else (None, None)
        gradients = (dx, dweight, dbias)
        _call(1, x, weight, bias, statistics, ctx.span, ctx.relu, dy=dy, output=output, dz=dz, gradients=gradients)
        # Without ReLU nothing is masked: the residual's gradient is dy.
        of_residual = (dy if dz is None else dz) if ctx.has_residual else None
        return dx, dweight, dbias, of_residual, None, None, None, None, None


def _call(
    direction: int,
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
    """Runs the compiled forward (direction 0) or backward (direction 1)."""
    functions, (count, channels, height, width) = _functions(), x.shape
    assert functions is not None, "supports() must be true"
    dx, dweight, dbias = gradients
    first, total = sums[:2] if sums else (None, None)
    vectors = (weight, bias, *statistics.unbind(), dweight, dbias, first, total)
    # The fields of `Norm`, in its order; a NULL pointer stands for a tensor that is not given.
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
    if functions[direction](arguments):
        raise MemoryError(f"batch norm of {tuple(x.shape)} could not allocate memory for its sums")


@functools.cache
def _functions() -> tuple[Any, Any] | None:
    """The compiled forward and backward, or None without the library."""
    forward, backward = map(cpu_native.function, ("megabatch_norm_forward", "megabatch_norm_backward"))
    return None if forward is None or backward is None else (forward, backward)
