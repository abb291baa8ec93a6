"""LAMB: Adam with a trust ratio per layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megabatch.optim.multi_tensor import (
    Group,
    MultiTensorOptimizer,
    Number,
    TensorLists,
    add_scaled_,
    check_capturable,
    check_number,
)
from megabatch.optim.trust import norms, trust_ratios


class LAMB(MultiTensorOptimizer):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2, with bias correction).

        m = beta1 m + (1 - beta1) g        n = beta2 n + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(n / (1 - beta2^t)) + eps) + beta w
        w -= lr (|w| / |u|) u              ratio 1 where a norm is 0

    Norms, state and update are fp32 (float64 for float64) whatever the parameters' dtype. The gradient is not clipped,
    as NVIDIA's and timm's `Lamb` do by default (`max_grad_norm`); pytorch_optimizer's `Lamb` does not correct the bias
    and limits |w| to 10.

    Args:
        params: parameters or groups; `param_groups(model, weight_decay=...)` makes the usual two. A group may set any
            of the values below, and `adapt`: False means ratio 1, that is Adam with decoupled weight decay.
        momentum: beta1.
        trust_clip: ratios of at most 1 (LAMBC).
        foreach: False takes one tensor after another, as reference; None and True work on all together.
        capturable: the step may be captured in a CUDA graph; `lr` must be a tensor then.

    Raises:
        UserError: a value out of range, a sparse or complex gradient.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: float | Tensor = 0.0,
        trust_clip: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_clip": trust_clip,
            "foreach": foreach,
            "capturable": capturable,
            "adapt": True,
            "step": 0,
        }
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Raises UserError for a group whose values cannot work; makes the step count a tensor for CUDA graphs."""
        check_number(group, "lr", low=0.0, example=0.01)
        check_number(group, "momentum", low=0.0, below=1.0, example=0.9)
        check_number(group, "beta2", low=0.0, below=1.0, example=0.999)
        check_number(group, "eps", low=0.0, example=1e-6)
        check_number(group, "weight_decay", low=0.0, example=0.01)
        check_capturable(group)
        if group["capturable"] and not isinstance(group["step"], Tensor):
            # float64, since 1 - 0.999^t loses five of fp32's seven digits
            group["step"] = torch.full_like(group["lr"], float(group["step"]), dtype=torch.float64)

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Moves weights and both moments by one step."""
        time = group["step"] + 1
        corrections = 1 - group["momentum"] ** time, 1 - group["beta2"] ** time
        lists = (tensors.weights, tensors.gradients, tensors.states["exp_avg"], tensors.states["exp_avg_sq"])
        step = _step_each if group["foreach"] is False else _step_together
        step(group, corrections, *lists)

    def finish(self, group: Group) -> None:
        """Counts the step."""
        group["step"] += 1


def _rates(group: Group, weight_norms: Tensor, update_norms: Tensor) -> Tensor:
    """lr * ratio of each tensor, as one vector."""
    ratios = trust_ratios(weight_norms, update_norms, trust_coefficient=1.0)
    rates: Tensor = group["lr"] * (ratios.clamp(max=1.0) if group["trust_clip"] else ratios)
    return rates


def _step_together(
    group: Group,
    corrections: tuple[Number, Number],
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
) -> None:
    """One step in multi-tensor operations; no operation is started per tensor from Python."""
    updates = _updates_together(group, corrections, weights, gradients, means, squares)
    negative = -group["lr"]
    if group["adapt"]:
        negative = list((-_rates(group, norms(weights), norms(updates))).unbind())
    add_scaled_(weights, updates, negative)


def _updates_together(
    group: Group,
    corrections: tuple[Number, Number],
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
) -> list[Tensor]:
    """u, corrections moved to where they cost least: (m / (sqrt(n) + eps c)) (c / c1) + beta w with c = sqrt(c2)."""
    root = corrections[1] ** 0.5
    offset, factor = (_in_dtype_of(weights[0], number) for number in (group["eps"] * root, root / corrections[0]))
    torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
    torch._foreach_mul_(squares, group["beta2"])
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["beta2"])
    divisors = torch._foreach_sqrt(squares)
    torch._foreach_add_(divisors, offset)
    updates = list(torch._foreach_div(means, divisors))
    torch._foreach_mul_(updates, factor)
    if isinstance(group["weight_decay"], Tensor) or group["weight_decay"]:
        add_scaled_(updates, weights, group["weight_decay"])
    return updates


def _in_dtype_of(tensor: Tensor, number: Number) -> Number:
    """A 0-d tensor in the lists' dtype, without which a GPU would take one tensor after another."""
    return number.to(tensor.dtype) if isinstance(number, Tensor) else number


def _step_each(
    group: Group,
    corrections: tuple[Number, Number],
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
) -> None:
    """The same step, one tensor after another, as the equations stand: the reference for the multi-tensor path."""
    for w, g, m, n in zip(weights, gradients, means, squares, strict=True):
        m.mul_(group["momentum"]).add_((1 - group["momentum"]) * g)
        n.mul_(group["beta2"]).add_((1 - group["beta2"]) * g**2)
        adam = (m / corrections[0]) / ((n / corrections[1]).sqrt() + group["eps"])
        u = adam + group["weight_decay"] * w
        rate = _rates(group, w.norm(), u.norm()) if group["adapt"] else group["lr"]
        w.sub_(rate * u)
