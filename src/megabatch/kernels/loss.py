"""Fused softmax cross entropy with label smoothing and mixed labels: loss and gradient from one read of the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton

MAX_CLASSES = 16384
"""One program holds a whole row of logits in registers; with more classes the reference is used."""


def fused_cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mixed_labels: Tensor | None = None,
    mix_weight: Tensor | float | None = None,
    class_weights: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy summed over the samples (0-d, float32; float64 for float64 logits), differentiable in the logits.

        loss = -sum_i sum_k q_ik log softmax(logits_i)_k;   dlogits_ik = softmax(logits_i)_k - q_ik
        q_i = (1 - s) (w onehot(label_i) + (1 - w) onehot(mixed_i)) + s / K

    (Szegedy et al. 2016, arXiv:1512.00567, section 7; Zhang et al. 2018, arXiv:1710.09412.) The arguments are those of
    `cross_entropy_sum` in nn/loss.py. Forward also computes the gradient and saves it in float32; backward scales it
    and rounds it to the logits' dtype once, so that a loss scale is applied before rounding.

    Labels of -100 are ignored, as in torch. For a label outside [0, K) the reference raises torch's error; the kernel,
    which cannot raise, returns NaN. Under torch.compile, and with `class_weights`, the reference is used: the kernel
    has no factor for a row's loss.

    Shapes: logits (N, K), labels and mixed_labels (N,) class indices in [0, K), mix_weight 0-d, (N,) or a number.

    Raises:
        UserError: mixed_labels without mix_weight or the reverse, tensors of wrong shapes, or class_weights with
            backend="triton".
    """
    _check(logits, labels, mixed_labels, mix_weight)
    if class_weights is not None:
        _check_class_weights(logits, class_weights, backend)
        return cross_entropy_reference(logits, labels, label_smoothing, mixed_labels, mix_weight, class_weights)
    if not _fits(logits, backend):
        return cross_entropy_reference(logits, labels, label_smoothing, mixed_labels, mix_weight)
    loss: Tensor = _CrossEntropy.apply(logits, labels, label_smoothing, mixed_labels, mix_weight)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def cross_entropy_with_gradient(
    logits: Tensor,
    labels: Tensor,
    *,
    gradient_scale: Tensor | float = 1.0,
    label_smoothing: float = 0.0,
    mixed_labels: Tensor | None = None,
    mix_weight: Tensor | float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns `(loss sum, gradient)`, for a hand-written backward; no autograd.

    The gradient is multiplied by `gradient_scale` before it is rounded to the logits' dtype. With loss scale S and
    global batch B, `gradient_scale=S / B` gives the gradient of S times the mean loss. Equations, shapes and errors as
    in `fused_cross_entropy_sum`.
    """
    _check(logits, labels, mixed_labels, mix_weight)
    if not _fits(logits, backend):
        # The gradient is taken in the wide dtype and rounded once, after the scale, as in the kernel.
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            wide = leaf if leaf.dtype == torch.float64 else leaf.float()
            loss = cross_entropy_reference(wide, labels, label_smoothing, mixed_labels, mix_weight)
            (gradient,) = torch.autograd.grad(loss, wide)
        return loss.detach(), (gradient * gradient_scale).to(logits.dtype)
    return _launch(logits, labels, label_smoothing, mixed_labels, mix_weight, gradient_scale, logits.dtype)


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    mixed_labels: Tensor | None,
    mix_weight: Tensor | float | None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """`fused_cross_entropy_sum` in torch's own operations."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if mixed_labels is None or mix_weight is None:
        if class_weights is None:
            return functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return _losses(logits, labels, label_smoothing, class_weights).sum()
    # The loss is linear in the target, so that of a mixed target is the mixture of two losses.
    first = _losses(logits, labels, label_smoothing, class_weights)
    second = _losses(logits, mixed_labels, label_smoothing, class_weights)
    return (mix_weight * first + (1 - mix_weight) * second).sum()


def _losses(logits: Tensor, labels: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Cross entropy of each sample, times the weight of its label, (N,); 0 for labels of -100."""
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses if class_weights is None else losses * class_weights.to(logits.dtype)[labels.clamp(min=0)]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        label_smoothing: float,
        mixed_labels: Tensor | None,
        mix_weight: Tensor | float | None,
    ) -> Tensor:
        # The gradient for an upstream gradient of 1; saving it instead of the logits costs no second read of them.
        loss, gradient = _launch(logits, labels, label_smoothing, mixed_labels, mix_weight, 1.0, torch.float32)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None, None


def _launch(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    mixed_labels: Tensor | None,
    mix_weight: Tensor | float | None,
    gradient_scale: Tensor | float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    count, classes = logits.shape
    # The kernel takes the stride between rows, but within a row the logits must be contiguous.
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    losses = logits.new_empty(count, dtype=torch.float32)
    gradient = logits.new_empty(count, classes, dtype=dtype)
    weight = _on_device(1.0 if mix_weight is None else mix_weight, logits)
    if count:
        with on_device(logits):
            load("kernels._loss_triton").cross_entropy_kernel[(count,)](
                rows,
                labels.contiguous(),
                (labels if mixed_labels is None else mixed_labels).contiguous(),
                weight,
                losses,
                gradient,
                rows.stride(0),
                label_smoothing,
                _on_device(gradient_scale, logits),
                mixed=mixed_labels is not None,
                weight_per_row=weight.ndim == 1,
                classes=classes,
                # A program's block must be a power of two; wide rows get more warps, so that they stay in registers.
                block=max(16, 1 << (classes - 1).bit_length()),
                num_warps=4 if classes <= 2048 else 16,
            )
    return losses.sum(), gradient


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """Returns the value as a float32 tensor on the device of `like`; a number is filled in there, not copied over."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, torch.float32).contiguous()
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _fits(logits: Tensor, backend: Backend) -> bool:
    """True if the kernel runs: `backend` selects it, it is not being traced, and it supports dtype and classes."""
    if torch.compiler.is_compiling() or not use_triton(logits, backend):
        return False
    return logits.dtype != torch.float64 and 0 < logits.shape[1] <= MAX_CLASSES


def _check_class_weights(logits: Tensor, class_weights: Tensor, backend: Backend) -> None:
    if backend == "triton" or class_weights.shape != logits.shape[1:]:
        raise UserError(
            f"class_weights {tuple(class_weights.shape)}, logits {tuple(logits.shape)} and backend={backend} were "
            "given, needed: one weight per class, and backend=auto or reference; class_weights=None works"
        )


def _check(logits: Tensor, labels: Tensor, mixed_labels: Tensor | None, mix_weight: Tensor | float | None) -> None:
    count = len(logits)
    if logits.ndim != 2 or labels.shape != (count,) or (mixed_labels is not None and mixed_labels.shape != (count,)):
        raise UserError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} were given, needed: (N, K) and (N,); "
            "logits (32, 1000) and labels (32,) work"
        )
    if (mixed_labels is None) != (mix_weight is None):
        raise UserError("mixed_labels and mix_weight go together; mixed_labels=labels.flip(0), mix_weight=0.7 works")
    if isinstance(mix_weight, Tensor) and mix_weight.ndim and mix_weight.shape != (count,):
        raise UserError(f"mix_weight is {tuple(mix_weight.shape)}, needed: one number or ({count},); 0.7 works")
