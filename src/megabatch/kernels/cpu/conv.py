"""Compiled convolutions of bfloat16 and float32 images on a CPU, with gradients, without arithmetic on padding.

    y[n, k, p] = sum over c, tap of weight[k, c, tap] x[n, c, p stride + tap - padding]

Products are added in float32 and rounded once, as in oneDNN; only the order of sums differs. Kernels for bfloat16 need
AVX-512 BF16, those for float32 AVX2 or AVX-512. The choice between them and torch depends on shapes and processor
alone, and no sum depends on the number of threads, so a run that resumes, or is divided among other workers, rounds as
before. Timings per shape beside oneDNN are in benchmarks/records/2026-11-20_2cores_cpu_conv (bfloat16) and
2026-11-28_2cores_cpu_conv_fp32.
"""

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.kernels.cpu import library as cpu_native

_ARGUMENTS = struct.Struct("12q4P")
"""The struct `Conv` in csrc/conv.h. Filling in a ctypes structure would take as long as a small convolution."""

_PARTS = ("forward", "data_gradient", "weight_gradient")
_LANES = {"bf16": 16, "avx512": 16, "avx2": 8}
"""Channels per register of each kind of kernels; the last two are for float32."""
_FEWEST_IMAGES = 8
"""A tile holds the sums of several images; with fewer than 8, each addition would wait for the one before it."""


class _Kernels(NamedTuple):
    lanes: int  # channels per register
    functions: tuple[Any, ...]  # in the order of `_PARTS`


def is_available(dtype: torch.dtype = torch.bfloat16) -> bool:
    """True if the library of compiled kernels exists and the processor has the instructions for images of `dtype`."""
    return _kernels(dtype) is not None


def supports(x: Tensor, weight: Tensor) -> bool:
    """True if the compiled kernels support images x (N, C, H, W) and weight (K, C, R, S).

    They need at least 8 bfloat16 or float32 images in channels_last, K a multiple of the float32 values in a register
    (8 with AVX2, 16 with AVX-512 and for bfloat16), and C such a multiple or less than one register. Groups and
    dilation are not supported, nor autocast to another type.
    """
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
        return False
    kernels = _kernels(x.dtype)
    return (
        kernels is not None
        and x.ndim == weight.ndim == 4
        and len(x) >= _FEWEST_IMAGES
        and x.shape[1] == weight.shape[1]
        and x.numel() > 0
        and (x.shape[1] < kernels.lanes or x.shape[1] % kernels.lanes == 0)
        and len(weight) % kernels.lanes == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Returns `torch.nn.functional.conv2d` of images x (N, C, H, W) and weight (K, C, R, S), once differentiable.

    Uses the compiled kernels if they support the arguments and are faster for one of the three parts at least, and
    torch otherwise, which also raises all errors.
    """
    # An output without pixels, a stride below 1 and a negative padding go to torch, whose errors and results they get.
    if supports(x, weight) and min(stride, padding + 1, *_output_size(x, weight, 1, padding)) >= 1:
        parts = _faster_parts(x, weight, stride, padding)
        if any(parts):
            y: Tensor = _Conv2d.apply(x, weight, stride, padding, parts)  # type: ignore[no-untyped-call]
            return y
    return functional.conv2d(x, weight, stride=stride, padding=padding)


def _faster_parts(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[bool, ...]:
    """For each of `_PARTS`, True where the compiled kernel computes it: by shape and processor alone.

    In bfloat16 that is every part that is compiled, in float32 every such part that is faster. The data gradient of few
    channels is not compiled, as such an x is usually a network's input, which needs no gradient.
    """
    kernels = _kernels(x.dtype)
    assert kernels is not None, "supports() must be true"
    is_compiled = (True, x.shape[1] % kernels.lanes == 0, True)
    return tuple(
        is_compiled[which]
        and (x.dtype == torch.bfloat16 or _is_faster(which, kernels.lanes, x, weight, stride, padding))
        for which in range(len(_PARTS))
    )


def _is_faster(which: int, lanes: int, x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """True for shapes whose float32 kernel for this part measured about 1.2 times as fast as oneDNN's, or faster.

    Padding is a large share of small images, oneDNN computes zeros in strided data gradients, and its loops are short
    where there are few channels.
    """
    (outputs, inputs, *taps), size = weight.shape, max(_output_size(x, weight, stride, padding))
    if inputs % lanes:
        return _is_faster_for_few(which, lanes, inputs, outputs, size)
    if which == 2:
        return _is_faster_weight_gradient(lanes, x, weight, stride, size)
    depth, is_wide = (inputs, outputs)[which], lanes == _LANES["avx512"]
    if which == 1 and stride > 1:
        return (
            size <= (8 if is_wide else 4)
            or (inputs <= 64 and (is_wide or size <= 8))
            or (max(taps) == 1 and size <= 16)
        )
    if max(taps) == 1:
        return stride > 1 and size <= (14 if is_wide else 8) and inputs <= (256 if is_wide else 128)
    return (size <= 4 and (is_wide or depth <= 128)) or (size <= 7 and depth <= 64) or (size <= 14 and depth <= 16)


def _is_faster_for_few(which: int, lanes: int, inputs: int, outputs: int, size: int) -> bool:
    """`_is_faster` for images with fewer channels than a register has lanes; `size` is that of the output."""
    if which == 2:
        return inputs == 1
    return inputs == 1 or size <= 8 or (outputs <= lanes * 2 and (lanes == _LANES["avx512"] or size <= 16))


def _is_faster_weight_gradient(lanes: int, x: Tensor, weight: Tensor, stride: int, size: int) -> bool:
    (outputs, inputs, *taps), is_wide = weight.shape, lanes == _LANES["avx512"]
    if max(taps) == 1:  # oneDNN is slow where rows do not divide into strides
        return stride > 1 and size <= 4 and x.shape[3] % stride != 0 and (outputs >= 64 or not is_wide)
    if size <= 4:
        return inputs >= 32 and outputs >= 64
    return is_wide and stride > 1 and size <= 8 and inputs >= 64


def _output_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[int]:
    """Height and width of the output; below 1 if the weight does not fit into the padded images."""
    pairs = zip(x.shape[2:], weight.shape[2:], strict=True)
    return [(size + 2 * padding - taps) // stride + 1 for size, taps in pairs]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, parts: tuple[bool, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.parts = stride, padding, parts
        if not parts[0]:
            return functional.conv2d(x, weight, stride=stride, padding=padding)
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
            if not ctx.parts[1 + which]:
                return _reference_gradient(which, dy, x, weight, ctx.stride, ctx.padding)
            # The kernel writes channels_last; a `like` in another layout gets a copy of that.
            is_last = like.is_contiguous(memory_format=torch.channels_last)
            result = torch.empty_like(like, memory_format=torch.preserve_format if is_last else torch.channels_last)
            _call(1 + which, x, weight, dy, result, ctx.stride, ctx.padding)
            return result if is_last else result.contiguous()

        return gradient(0, x), gradient(1, weight), None, None, None


def _reference_gradient(which: int, dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """torch's gradient of x (which 0) or of weight (1)."""
    options = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    mask = [which == 0, which == 1, False]
    result: Tensor = torch.ops.aten.convolution_backward(dy, x, weight, None, *options, mask)[which]
    return result


def _call(which: int, x: Tensor, weight: Tensor, dy: Tensor, result: Tensor, stride: int, padding: int) -> None:
    """Computes output (which 0), data gradient (1) or weight gradient (2) into `result`, which is channels_last.

    For the output, `dy` only gives the shape.
    """
    kernels, (count, channels, height, width), (outputs, _, down, across) = _kernels(x.dtype), x.shape, weight.shape
    assert kernels is not None, "supports() must be true"
    weight = weight.contiguous(memory_format=torch.channels_last)
    # The fields of `Conv`, in its order.
    sizes = (count, height, width, channels, outputs, down, across, *dy.shape[2:], stride, padding)
    arguments = _ARGUMENTS.pack(*sizes, torch.get_num_threads(), *(t.data_ptr() for t in (x, weight, dy, result)))
    if kernels.functions[which](arguments):
        raise MemoryError(
            f"a convolution of {tuple(x.shape)} with {tuple(weight.shape)} could not allocate memory for its sums"
        )


@functools.cache
def _kernels(dtype: torch.dtype) -> _Kernels | None:
    """Kernels for images of `dtype`, or None if the library is missing or cannot run them on this processor.

    For float32 they use the instructions that torch uses, which ATEN_CPU_CAPABILITY=avx2 restricts.
    """
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return _open({torch.bfloat16: "bf16", torch.float32: capability}.get(dtype, ""))


def _open(name: str) -> _Kernels | None:
    """The kernels with this key of `_LANES`, or None if they are missing or cannot run on this processor."""
    runs_here = cpu_native.function(f"megabatch_conv_{name}_runs_here")
    if name not in _LANES or runs_here is None or not runs_here():
        return None
    return _Kernels(_LANES[name], tuple(cpu_native.function(f"megabatch_conv_{name}_{part}") for part in _PARTS))
