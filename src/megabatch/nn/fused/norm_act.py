"""Batch norm, residual sum and ReLU of a layer as one operation, where the kernels support the layer."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.dispatch import Backend, has_triton
from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.kernels.statistics import RunningAverages, SpanSums, StatisticsSink
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d

TYPES = (torch.float16, torch.bfloat16, torch.float32)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def norm_act(
    norm: nn.Module, x: Tensor, *, backend: Backend, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """relu(norm(x) + residual), as one operation where a kernel supports the norm and x, else by torch's operations.

    Running statistics are updated as by norm(x). Shapes: x and residual (N, C, H, W).
    """
    if not (_has_kernel(x, backend) and is_fusable(norm, x) and _matches(x, residual)):
        # In place, as in the plain forwards: the norm's output is needed by no backward.
        y: Tensor = norm(x)
        if residual is not None:
            y += residual
        return functional.relu(y, inplace=True) if relu else y
    y, *_ = fused_bn_act(
        x,
        norm.weight,
        norm.bias,
        span=span_of(norm, x),
        eps=norm.eps,
        residual=residual,
        relu=relu,
        sink=sink_of(norm, x),
        backend=backend,
    )
    return y


def can_fuse(norm: nn.Module, x: Tensor, backend: Backend) -> TypeGuard[nn.BatchNorm2d]:
    """True if the GPU kernels, or their reference, compute norm(x) under this backend."""
    return supports(x, backend) and is_fusable(norm, x)


def supports(x: Tensor, backend: Backend) -> bool:
    """True if the GPU kernels, or their reference, accept images like x under this backend."""
    if x.ndim != 4 or x.dtype not in TYPES or torch.compiler.is_compiling():
        return False
    if backend != "auto":
        return True
    # Other memory formats would be copied to channels_last and back, which costs more than fusing saves.
    return x.is_cuda and has_triton() and x.is_contiguous(memory_format=torch.channels_last)


def is_hooked(module: nn.Module) -> bool:
    """True if the module has forward or backward hooks, which run only when the module itself is called."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def span_of(norm: nn.BatchNorm2d, x: Tensor) -> int:
    """Number of samples per statistic when norm(x) runs in training."""
    return min(norm.span, len(x)) if isinstance(norm, SpanBatchNorm2d) else len(x)


def sink_of(norm: nn.BatchNorm2d, x: Tensor) -> StatisticsSink:
    """Tensors of the norm that a training forward of images like x updates with its statistics."""
    last_weight = norm.last_span_weight(x) if isinstance(norm, SpanBatchNorm2d) else 1.0
    if isinstance(norm, SpanBatchNorm2d) and norm.accumulate_statistics:
        return SpanSums(norm.first_span, norm.span_sum, last_weight)
    # is_fusable has checked these, in a form that a type checker does not see.
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    if span_of(norm, x) == len(x):
        last_weight = 1.0  # the mean over a single span is that span
    return RunningAverages(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, last_weight)


def _has_kernel(x: Tensor, backend: Backend) -> bool:
    """True if one operation computes batch norm, residual and ReLU of images like x, on a GPU or on a CPU."""
    if torch.compiler.is_compiling():
        return False  # the compiler fuses these operations itself
    return supports(x, backend) or (backend == "auto" and cpu_batch_norm.supports(x))


def is_fusable(norm: nn.Module, x: Tensor, *, shared: bool = False) -> TypeGuard[nn.BatchNorm2d]:
    """True if norm(x) normalises by statistics of x that can be computed and stored by other code.

    With `shared` also if its spans are shared by several ranks; then also for ranks without samples.
    """
    return (
        _is_batch_norm(norm)
        and (shared or getattr(norm, "group_size", 1) == 1)
        and norm.training
        and norm.affine
        and not is_hooked(norm)
        and norm.running_mean is not None
        and norm.running_mean.dtype == torch.float32
        and (
            shared or x.numel() > x.shape[1]
        )  # with one value per channel the norm raises an error or has a special case
    )


def _is_batch_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """True for batch norm with exponential running averages. A subclass may do more in its forward."""
    return type(norm) in {nn.BatchNorm2d, SpanBatchNorm2d} and norm.momentum is not None


def _matches(x: Tensor, residual: Tensor | None) -> bool:
    return residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
