"""Convolutions of bfloat16 images on a CPU: output and both gradients by compiled kernels that skip padding.

    y[n, k, p] = sum over c, tap of weight[k, c, tap] x[n, c, p stride + tap - padding]

Products are added in float32 and rounded once, as in oneDNN; nothing but the order of sums differs. The kernels need
AVX-512 BF16. Whether they or torch compute follows from shapes and processor alone, and no sum depends on the number of
threads, so a run that is continued, or cut among other workers, rounds as before. Measured shape by shape beside oneDNN
in benchmarks/records/2026-11-20_2cores_cpu_conv.
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
"""`Conv` in csrc/conv.h; packed, as filling in a ctypes structure takes as long as a small convolution."""

_PARTS = ("forward", "data_gradient", "weight_gradient")
_CHANNELS = 16
_FEWEST_IMAGES = 8
"""Images are what registers hold next to one another: with fewer of them additions wait for one another."""


def is_available() -> bool:
    """Whether the compiled kernels are there, and the processor has what they need."""
    return _functions() is not None


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernels take images x (N, C, H, W) and weight (K, C, R, S); groups and dilation they do not.

    They do from 8 bfloat16 images with the channels last, where K is a multiple of 16, and C too or less than 16.
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
    """`torch.nn.functional.conv2d` of images x (N, C, H, W) and weight (K, C, R, S), once differentiable.

    Takes the compiled kernels where they serve, and torch elsewhere; so errors are torch's.
    """
    if not supports(x, weight) or min(stride, padding + 1, *_output_size(x, weight, 1, padding)) < 1:
        return functional.conv2d(x, weight, stride=stride, padding=padding)
    y: Tensor = _Conv2d.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
    return y


def _output_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[int]:
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
            """Laid out as what it is the gradient of: DistributedDataParallel warns where it is not."""
            if not ctx.needs_input_grad[which]:
                return None
            if which == 0 and x.shape[1] % _CHANNELS:  # of a net's images, which nobody learns
                return _torchs_data_gradient(dy, x, weight, ctx.stride, ctx.padding)
            is_last = like.is_contiguous(memory_format=torch.channels_last)
            result = torch.empty_like(like, memory_format=torch.preserve_format if is_last else torch.channels_last)
            _call(1 + which, x, weight, dy, result, ctx.stride, ctx.padding)
            return result if is_last else result.contiguous()

        return gradient(0, x), gradient(1, weight), None, None


def _torchs_data_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    places = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    dx: Tensor = torch.ops.aten.convolution_backward(dy, x, weight, None, *places, [True, False, False])[0]
    return dx


def _call(which: int, x: Tensor, weight: Tensor, dy: Tensor, result: Tensor, stride: int, padding: int) -> None:
    """Output (0), data gradient (1) or weight gradient (2) into `result`, which has the channels last."""
    functions, (count, channels, height, width), (outputs, _, down, across) = _functions(), x.shape, weight.shape
    assert functions is not None, "what `supports` allows"
    weight = weight.contiguous(memory_format=torch.channels_last)
    sizes = (count, height, width, channels, outputs, down, across, *dy.shape[2:], stride, padding)
    arguments = _ARGUMENTS.pack(*sizes, torch.get_num_threads(), *(t.data_ptr() for t in (x, weight, dy, result)))
    if functions[which](arguments):
        raise MemoryError(f"a convolution of {tuple(x.shape)} with {tuple(weight.shape)} found no memory for its sums")


@functools.cache
def _functions() -> tuple[Any, ...] | None:
    runs_here = cpu_native.function("megabatch_conv_runs_here")
    if runs_here is None or not runs_here():
        return None
    return tuple(cpu_native.function(f"megabatch_conv_{part}") for part in _PARTS)
