"""RMSprop that turns into momentum SGD during the first epochs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.optim.momentum import MomentumOptimizer
from megabatch.optim.multi_tensor import Group, Number, TensorLists, check_number, plus_scaled, scaled
from megabatch.optim.schedule import sgd_share


class RMSpropWarmup(MomentumOptimizer):
    """Akiba et al. 2017, arXiv:1711.04325: RMSprop first, then momentum SGD, blended in between.

        u = g + beta w
        n = mu2 n + (1 - mu2) u^2                                          not bias-corrected, as published
        v = m v + (alpha + (1 - alpha) (rmsprop_lr / lr) / (sqrt(n) + eps)) u
        w -= lr v

    alpha is the group key `sgd_share`, set by `set_epoch` before a step. RMSprop's part moves the weights by
    (1 - alpha) rmsprop_lr, whatever `lr` is. Where alpha is 1 the step is that of `SGD` to the bit.

    Args:
        params: parameters or groups; their key `adapt` has no meaning here and is ignored.
        rmsprop_lr: eta_RMSprop.
        decay: mu2.

    Raises:
        UserError: a value out of range; or lr = 0 while alpha < 1, since RMSprop's share is relative to `lr`.
    """

    state_names = ("momentum_buffer", "mean_square")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rmsprop_lr: float = 3e-4,
        decay: float = 0.99,
        eps: float = 1e-8,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rmsprop_lr": rmsprop_lr,
            "decay": decay,
            "eps": eps,
            "sgd_share": sgd_share(0.0),
            "nesterov": False,
            "momentum_form": "outside",
            "foreach": foreach,
            "capturable": False,
            "previous_lr": 0.0,
        }
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Raises UserError for a group whose values cannot work."""
        super().check(group)
        check_number(group, "rmsprop_lr", low=0.0, example=3e-4)
        check_number(group, "decay", low=0.0, below=1.0, example=0.99)
        check_number(group, "eps", low=0.0, example=1e-8)

    def set_epoch(self, epoch: float, *, center_epoch: float = 10.0, period_epochs: float = 5.0) -> None:
        """Sets every group's `sgd_share` for steps at the fractional `epoch`."""
        share = sgd_share(epoch, center_epoch, period_epochs)
        for group in self.param_groups:
            group["sgd_share"] = share

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Moves weights, momentum and mean squares by one step."""
        if group["sgd_share"] >= 1:
            super().update(group, tensors)
            return
        lr = group["lr"]
        if not isinstance(lr, Tensor) and lr == 0:
            raise UserError(
                f"lr=0 with sgd_share={group['sgd_share']:g}: RMSprop's share is divided by lr; "
                "RMSprop warm-up needs no ramp of the rate, lr=0.1 works"
            )
        lists = (tensors.weights, tensors.gradients, tensors.states["momentum_buffer"], tensors.states["mean_square"])
        step = _blend_each if group["foreach"] is False else _blend_together
        step(group, *lists, adaptive_share=(1 - group["sgd_share"]) * group["rmsprop_lr"] / lr)


def _blend_together(
    group: Group,
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    mean_squares: list[Tensor],
    *,
    adaptive_share: Number,
) -> None:
    u = plus_scaled(gradients, weights, group["weight_decay"])
    torch._foreach_mul_(mean_squares, group["decay"])
    torch._foreach_addcmul_(mean_squares, u, u, value=1 - group["decay"])
    divisors = torch._foreach_sqrt(mean_squares)
    torch._foreach_add_(divisors, group["eps"])
    normalised = scaled(list(torch._foreach_div(u, divisors)), adaptive_share)
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, u, alpha=group["sgd_share"])
    torch._foreach_add_(buffers, normalised)
    torch._foreach_add_(weights, scaled(buffers, -group["lr"]))


def _blend_each(
    group: Group,
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    mean_squares: list[Tensor],
    *,
    adaptive_share: Number,
) -> None:
    for w, g, v, n in zip(weights, gradients, buffers, mean_squares, strict=True):
        u = g + group["weight_decay"] * w
        n.mul_(group["decay"]).add_((1 - group["decay"]) * u**2)
        factor = group["sgd_share"] + adaptive_share / (n.sqrt() + group["eps"])
        v.mul_(group["momentum"]).add_(factor * u)
        w.sub_(group["lr"] * v)
