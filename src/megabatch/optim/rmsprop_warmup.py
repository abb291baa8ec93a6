"""RMSprop warm-up: RMSprop that changes into momentum SGD during the first epochs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.optim.engine.base import Group
from megabatch.optim.engine.checks import check_number
from megabatch.optim.engine.fused import Kernel
from megabatch.optim.engine.multi_tensor import Number, TensorLists, add_scaled_, plus_scaled, scaled
from megabatch.optim.kernels.rmsprop import RmspropGroup, rmsprop_step
from megabatch.optim.momentum import MomentumOptimizer
from megabatch.optim.schedule import sgd_share


class RMSpropWarmup(MomentumOptimizer):
    """RMSprop first, then momentum SGD, with a gradual transition (Akiba et al. 2017, arXiv:1711.04325).

        u = g + beta w
        n = mu2 n + (1 - mu2) u^2                                          not bias-corrected, as published
        v = m v + (alpha + (1 - alpha) (rmsprop_lr / lr) / (sqrt(n) + eps)) u
        w -= lr v

    g is the mean gradient over the global batch and alpha the group key `sgd_share`, in [0, 1], which `set_epoch` sets
    before a step. RMSprop's part of the update has the rate (1 - alpha) rmsprop_lr, independent of `lr`. If alpha is
    the number 1 the step equals that of `SGD` bit for bit; if alpha is a tensor of value 1, it equals it to rounding.
    State is fp32 (float64 for float64 parameters) regardless of the parameters' dtype.

        optimizer = RMSpropWarmup(model.parameters(), lr=12.8, weight_decay=1e-4)
        for step in range(num_steps):
            optimizer.set_epoch(step * global_batch_size / num_train_images)
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()

    Args:
        params: parameters or parameter groups; their key `adapt`, as set by `param_groups`, is ignored.
        lr: a float or a 0-d tensor, as are momentum and weight decay. A CUDA graph reads tensors at every replay.
        rmsprop_lr: eta_RMSprop.
        decay: mu2.
        foreach, copies: as in `LARS`.
        fused: as in `LARS`, in one kernel launch.
        capturable: as in `LARS`; `sgd_share` is then a tensor too.

    Raises:
        UserError: a value out of range, a sparse or complex gradient, fused=True where the kernel cannot run, or the
            number lr = 0 while alpha < 1, since RMSprop's share is divided by `lr`. (Tensors are not read on the host;
            with a tensor lr of value 0 RMSprop's share is 0.)
    """

    state_names = ("momentum_buffer", "mean_square")
    kernel = Kernel(RmspropGroup, rmsprop_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.9,
        weight_decay: float | Tensor = 0.0,
        rmsprop_lr: float = 3e-4,
        decay: float = 0.99,
        eps: float = 1e-8,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
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
            "fused": fused,
            "capturable": capturable,
            "previous_lr": 0.0,
        }
        super().__init__(params, defaults, copies)

    def check(self, group: Group) -> None:
        """Raises UserError for a group with invalid values; makes the share a tensor for CUDA graphs."""
        super().check(group)
        check_number(group, "rmsprop_lr", low=0.0, example=3e-4)
        check_number(group, "decay", low=0.0, below=1.0, example=0.99)
        check_number(group, "eps", low=0.0, example=1e-8)
        if group["capturable"] and not isinstance(group["sgd_share"], Tensor):
            group["sgd_share"] = torch.full_like(group["lr"], group["sgd_share"])

    def set_epoch(self, epoch: float, *, center_epoch: float = 10.0, period_epochs: float = 5.0) -> None:
        """Sets every group's `sgd_share` for steps at the fractional `epoch`.

        Args:
            center_epoch: where the share is 1/2.
            period_epochs: time scale of the transition; see `megabatch.optim.schedule.sgd_share`.
        """
        share = sgd_share(epoch, center_epoch, period_epochs)
        for group in self.param_groups:
            if isinstance(group["sgd_share"], Tensor):
                group["sgd_share"].fill_(share)
            else:
                group["sgd_share"] = share

    def kernel_options(self, group: Group) -> dict[str, Any]:
        """Options of the kernel; raises UserError for the number lr = 0 while RMSprop has a share."""
        _check_share(group)
        return super().kernel_options(group)

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Updates weights, momentum and mean squares."""
        _check_share(group)
        share = group["sgd_share"]
        if not isinstance(share, Tensor) and share >= 1:
            super().update(group, tensors)
            return
        lists = (tensors.weights, tensors.gradients, tensors.states["momentum_buffer"], tensors.states["mean_square"])
        _blend(group, *lists, adaptive_share=_adaptive_share(group))


def _check_share(group: Group) -> None:
    lr, share = group["lr"], group["sgd_share"]
    if not isinstance(lr, Tensor) and lr == 0 and not isinstance(share, Tensor) and share < 1:
        raise UserError(
            f"lr=0 with sgd_share={share:g}: RMSprop's share is divided by lr; "
            "RMSprop warm-up needs no ramp of the rate, lr=0.1 works"
        )


def _adaptive_share(group: Group) -> Number:
    """(1 - alpha) rmsprop_lr / lr; 0 for a tensor lr of value 0."""
    lr = group["lr"]
    part: Number = (1 - group["sgd_share"]) * group["rmsprop_lr"]
    return torch.where(lr > 0, part / lr, 0.0) if isinstance(lr, Tensor) else part / lr


def _blend(
    group: Group,
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    mean_squares: list[Tensor],
    *,
    adaptive_share: Number,
) -> None:
    """The equations in multi-tensor operations."""
    u = plus_scaled(gradients, weights, group["weight_decay"])
    torch._foreach_mul_(mean_squares, group["decay"])
    torch._foreach_addcmul_(mean_squares, u, u, value=1 - group["decay"])
    divisors = torch._foreach_sqrt(mean_squares)
    torch._foreach_add_(divisors, group["eps"])
    normalised = scaled(list(torch._foreach_div(u, divisors)), adaptive_share)
    torch._foreach_mul_(buffers, group["momentum"])
    add_scaled_(buffers, u, group["sgd_share"])
    torch._foreach_add_(buffers, normalised)
    torch._foreach_add_(weights, scaled(buffers, -group["lr"]))
