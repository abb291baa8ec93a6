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
    blocks,
    check_capturable,
    check_number,
    plus_scaled,
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
            group["step"] = torch.full_like(group["lr"], float(group["step"]), dtype=torch.float32)

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Moves weights and both moments by one step."""
        time = group["step"] + 1
        corrections = 1 - group["momentum"] ** time, 1 - group["beta2"] ** time
        lists = (tensors.gradients, tensors.state("exp_avg"), tensors.state("exp_avg_sq"), tensors.weights)
        together = group["foreach"] is not False
        updates = (_updates_together if together else _updates_each)(group, corrections, *lists)
        rates = self._rates(group, tensors.weights, updates)
        if together:
            _apply_together(tensors.weights, updates, rates)
        else:
            _apply_each(tensors.weights, updates, rates)

    def finish(self, group: Group) -> None:
        """Counts the step."""
        group["step"] += 1

    def _rates(self, group: Group, weights: list[Tensor], updates: list[Tensor]) -> Number:
        lr: Number = group["lr"]
        if not group["adapt"]:
            return lr
        ratios = trust_ratios(norms(weights), norms(updates), trust_coefficient=1.0)
        return lr * (ratios.clamp(max=1.0) if group["trust_clip"] else ratios)


def _updates_together(
    group: Group,
    corrections: tuple[Number, Number],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
) -> list[Tensor]:
    torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
    torch._foreach_mul_(squares, group["beta2"])
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["beta2"])
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, corrections[1] ** 0.5)
    torch._foreach_add_(roots, group["eps"])
    updates = torch._foreach_div(means, corrections[0])
    torch._foreach_div_(updates, roots)
    return plus_scaled(list(updates), weights, group["weight_decay"])


def _updates_each(
    group: Group,
    corrections: tuple[Number, Number],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
) -> list[Tensor]:
    updates = []
    for g, m, n, w in zip(gradients, means, squares, weights, strict=True):
        m.mul_(group["momentum"]).add_((1 - group["momentum"]) * g)
        n.mul_(group["beta2"]).add_((1 - group["beta2"]) * g**2)
        adam = (m / corrections[0]) / ((n / corrections[1]).sqrt() + group["eps"])
        updates.append(adam + group["weight_decay"] * w)
    return updates


def _apply_together(weights: list[Tensor], updates: list[Tensor], rates: Number) -> None:
    negative = -rates
    if not isinstance(negative, Tensor) or negative.ndim == 0:
        add_scaled_(weights, updates, negative)
        return
    scales = list(negative.unbind())
    for indices, (w, u) in blocks(weights, updates):
        add_scaled_(w, u, [scales[i] for i in indices])


def _apply_each(weights: list[Tensor], updates: list[Tensor], rates: Number) -> None:
    each = list(rates.unbind()) if isinstance(rates, Tensor) and rates.ndim == 1 else [rates] * len(weights)
    for w, u, rate in zip(weights, updates, each, strict=True):
        w.sub_(rate * u)
