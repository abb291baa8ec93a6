"""Compiled convolutions of bfloat16 images on a CPU: output and both gradients, without arithmetic on padding.

    y[n, k, p] = sum over c, tap of weight[k, c, tap] x[n, c, p stride + tap - padding]

Products are added in float32 and rounded once, as in oneDNN; only the order of sums differs. The kernels need AVX-512
BF16. The choice between them and torch depends on shapes and processor alone, and no sum depends on the number of
threads, so a run that resumes, or is divided among other workers, rounds as before. Timings per shape beside oneDNN
are in benchmarks/records/2026-11-20_2cores_cpu_conv.
"""

import functools
import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.kernels.cpu import library as cpu_native

_ARGUMENTS = struct.Struct("12q4P")
"""The struct `Conv` in csrc/conv.h. Filling in a ctypes structure would take as long as a small convolution."""

_PARTS = ("forward", "data_gradient", "weight_gradient")
_CHANNELS = 16
"""The kernels compute 16 channels per register."""
_FEWEST_IMAGES = 8
"""A tile holds the sums of several images; with fewer than 8, each addition would wait for the one before it."""


def is_available() -> bool:
    """True if the library of compiled kernels exists and the processor supports AVX-512 BF16."""
    return _functions() is not None


def supports(x: Tensor, weight: Tensor) -> bool:
    """True if the compiled kernels support images x (N, C, H, W) and weight (K, C, R, S).

    They need at least 8 bfloat16 images in channels_last, K a multiple of 16, and C a multiple of 16 or less than 16.
    Groups and dilation are not supported.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and x.ndim == weight.ndim == 4
        and len(x) >= _FEWEST_IMAGES
        and x.shape[1] == weight.shape[1]
        and x.numel() > 0
        and (x.shape[1] < _CHANNELS or x.shape[1] % _CHANNELS == 0)
        and len(weight) % _CHANNELS == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and is_available()
    )


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Returns `torch.nn.functional.conv2d` of images x (N, C, H, W) and weight (K, C, R, S), once differentiable.

    Uses the compiled kernels if they support the arguments, and torch otherwise, which also raises all errors.
    """
    # An output without pixels, a stride below 1 and a negative padding go to torch, whose errors and results they get.
    if not supports(x, weight) or min(stride, padding + 1, *_output_size(x, weight, 1, padding)) < 1:
        return functional.conv2d(x, weight, stride=stride, padding=padding)
    y: Tensor = _Conv2d.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
    return y


def _output_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[int]:
    """Height and width of the output; below 1 if the weight does not fit into the padded images."""
    pairs = zip(x.shape[2:], weight.shape[2:], strict=True)
    return [(size + 2 * padding - taps) // stride + 1 for size, taps in pairs]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        shape = (len(x), len(weight), *_output_size(x, weight, stride, padding))
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _call(0, x, weight, y, y, stride, padding)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)

        def gradient(which: int, like: Tensor) -> Tensor | None:
            """The gradient of `like`, in its memory layout, as DistributedDataParallel expects."""
            if not ctx.needs_input_grad[which]:
                return None
            # Not compiled for few channels: such an x is usually a network's input, which needs no gradient.
            if which == 0 and x.shape[1] % _CHANNELS:
                return _data_gradient_reference(dy, x, weight, ctx.stride, ctx.padding)
            # The kernel writes channels_last; a `like` in another layout gets a copy of that.
            is_last = like.is_contiguous(memory_format=torch.channels_last)
            result = torch.empty_like(like, memory_format=torch.preserve_format if is_last else torch.channels_last)
            _call(1 + which, x, weight, dy, result, ctx.stride, ctx.padding)
            return result if is_last else result.contiguous()

        return gradient(0, x), gradient(1, weight), None, None


def _data_gradient_reference(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    options = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    dx: Tensor = torch.ops.aten.convolution_backward(dy, x, weight, None, *options, [True, False, False])[0]
    return dx


def _call(which: int, x: Tensor, weight: Tensor, dy: Tensor, result: Tensor, stride: int, padding: int) -> None:
    """Computes output (which 0), data gradient (1) or weight gradient (2) into `result`, which is channels_last.

    For the output, `dy` only gives the shape.
    """
    functions, (count, channels, height, width), (outputs, _, down, across) = _functions(), x.shape, weight.shape
    assert functions is not None, "supports() must be true"
    weight = weight.contiguous(memory_format=torch.channels_last)
    # The fields of `Conv`, in its order.
    sizes = (count, height, width, channels, outputs, down, across, *dy.shape[2:], stride, padding)
    arguments = _ARGUMENTS.pack(*sizes, torch.get_num_threads(), *(t.data_ptr() for t in (x, weight, dy, result)))
    if functions[which](arguments):
        raise MemoryError(
            f"a convolution of {tuple(x.shape)} with {tuple(weight.shape)} could not allocate memory for its sums"
        )


@functools.cache
def _functions() -> tuple[Any, ...] | None:
    """The compiled functions, in the order of `_PARTS`, or None if they are missing or cannot run on this processor."""
    runs_here = cpu_native.function("megabatch_conv_runs_here")
    if runs_here is None or not runs_here():
        return None
    return tuple(cpu_native.function(f"megabatch_conv_{part}") for part in _PARTS)
