"""Batch norm, residual and ReLU of a model in one kernel: a choice of speed, made after building, that changes no key.

Every net of `megabatch.nn` asks `norm_act` for "norm, plus residual, through ReLU". By default that is torch's own
operations, one after the other; `set_fusion` lets the kernels of `megabatch.kernels` take the cases they serve.
"""

from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.dispatch import Backend, has_triton
from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.kernels.statistics import RunningAverages, SpanSums, StatisticsSink
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d

Fusion = Literal["plain", "auto", "triton", "reference"]
"""`plain`: torch's operations. `auto`: kernels on a GPU with Triton, compiled ones on a CPU, else torch's operations.
`triton` and `reference` force the GPU's kernels, or their equations in torch's operations, anywhere (for tests)."""

FUSIONS: tuple[Fusion, ...] = ("plain", "auto", "triton", "reference")
_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fusable(nn.Module):
    """A module whose forward may fuse what its `fusion` allows; parameters and state dict do not depend on it."""

    fusion: Fusion = "plain"


def set_fusion(model: nn.Module, fusion: Fusion = "auto") -> None:
    """Lets kernels take batch norm, ReLU and residual in every part of `model` that can, or gives them back.

    Weights, state dict and module tree stay as they are, so this may be called at any time, any number of times.
    Fused are training forwards through nn.BatchNorm2d or SpanBatchNorm2d with spans of its own, in float16, bfloat16 or
    float32; with `auto`, only those with the channels last, and on a CPU not float16. Everything else (evaluation,
    spans shared by ranks, other norms, float64, layers with hooks) runs as before, and so does what torch.compile
    traces, which fuses by itself. Gradients of gradients need "plain".

    Raises:
        UserError: an unknown choice, or a model without a part that can be fused.
    """
    if fusion not in FUSIONS:
        raise UserError(f"fusion={fusion!r} was given, needed one of {', '.join(FUSIONS)}; fusion='auto' works")
    parts = [module for module in model.modules() if isinstance(module, Fusable)]
    if not parts and fusion != "plain":
        raise UserError(
            f"{type(model).__name__} has no part that can be fused, needed: a model of megabatch.nn; resnet50() works"
        )
    for part in parts:
        part.fusion = fusion


def norm_act(
    norm: nn.Module, x: Tensor, *, fusion: Fusion, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """relu(norm(x) + residual), fused where `fusion` and the norm allow it; statistics are kept as the norm keeps them.

    Shapes: x and residual (N, C, H, W).
    """
    if not (_has_kernel(x, fusion) and _is_fusable(norm, x) and _agree(x, residual)):
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
        sink=sink_of(norm),
        backend=backend_of(fusion),
    )
    return y


def can_fuse(norm: nn.Module, x: Tensor, fusion: Fusion) -> TypeGuard[nn.BatchNorm2d]:
    """Whether the kernels of a GPU give what norm(x) gives, and `fusion` wants them to."""
    return fusion != "plain" and wants(x, fusion) and _is_fusable(norm, x)


def _is_fusable(norm: nn.Module, x: Tensor) -> TypeGuard[nn.BatchNorm2d]:
    return (
        _is_known(norm)
        and norm.training
        and norm.affine
        and not is_hooked(norm)
        and norm.running_mean is not None
        and norm.running_mean.dtype == torch.float32
        and x.numel() > x.shape[1]  # one value per channel is the norm's own error, or special case
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes in or comes out, which only a call of the module itself shows."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def span_of(norm: nn.BatchNorm2d, x: Tensor) -> int:
    """Samples per statistic of this forward."""
    return min(norm.span, len(x)) if isinstance(norm, SpanBatchNorm2d) else len(x)


def backend_of(fusion: Fusion) -> Backend:
    """What the kernels are asked for; never for "plain"."""
    assert fusion != "plain"
    return fusion


def sink_of(norm: nn.BatchNorm2d) -> StatisticsSink:
    """Where the statistics of a training forward go, as the norm's own forward would have them."""
    if isinstance(norm, SpanBatchNorm2d) and norm.accumulate_statistics:
        return SpanSums(norm.first_span, norm.span_sum)
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return RunningAverages(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)


def _has_kernel(x: Tensor, fusion: Fusion) -> bool:
    """Whether batch norm, residual and ReLU of such a tensor are one function, on a GPU or on a CPU."""
    if fusion == "plain" or torch.compiler.is_compiling():
        return False
    return wants(x, fusion) or (fusion == "auto" and cpu_batch_norm.supports(x))


def wants(x: Tensor, fusion: Fusion) -> bool:
    """Whether `fusion` fuses a tensor like this one."""
    if x.ndim != 4 or x.dtype not in _TYPES or torch.compiler.is_compiling():
        return False
    if fusion != "auto":
        return True
    return x.is_cuda and has_triton() and x.is_contiguous(memory_format=torch.channels_last)


def _is_known(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a batch norm over samples of this process alone, with an exponential running average."""
    if isinstance(norm, SpanBatchNorm2d):
        return norm.group_size == 1
    return type(norm) is nn.BatchNorm2d and norm.momentum is not None


def _agree(x: Tensor, residual: Tensor | None) -> bool:
    return residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
