"""LAMB: Adam with one trust ratio for each layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megabatch.optim.engine.base import Group, MultiTensorOptimizer
from megabatch.optim.engine.checks import check_backend, check_number
from megabatch.optim.engine.fused import Kernel
from megabatch.optim.engine.multi_tensor import Number, TensorLists, add_number_, add_scaled_, scaled
from megabatch.optim.engine.shards import refuse_flattened
from megabatch.optim.engine.trust import one_where_a_norm_is_zero, whole_norms
from megabatch.optim.kernels.lamb import LambGroup, lamb_step


class LAMB(MultiTensorOptimizer):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2, with bias correction).

        m = beta1 m + (1 - beta1) g        n = beta2 n + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(n / (1 - beta2^t)) + eps) + beta w
        w -= lr (|w| / |u|) u              ratio 1 where a norm is 0

    g is the mean gradient over the global batch and t counts steps from 1. Norms, state and update are fp32 (float64
    for float64 parameters) regardless of the parameters' dtype. LAMB does not clip the gradient; NVIDIA's and timm's
    `Lamb` do by default (`max_grad_norm`). pytorch_optimizer's `Lamb` does not correct the bias and limits |w| to 10.

        optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=1e-3)
        loss(model).backward()
        optimizer.step()

    Args:
        params: parameters or parameter groups; `param_groups(model, weight_decay=...)` makes the usual two. A group
            may override any argument below except `copies`, and may set `adapt`: False means ratio 1, which is Adam
            with decoupled weight decay.
        lr: a float or a 0-d tensor, as are momentum, beta2 and weight decay. A CUDA graph reads tensors at every
            replay.
        momentum: beta1.
        trust_clip: limits the ratio to 1 (LAMBC).
        foreach: False updates one tensor after another (the reference). True updates all tensors together in
            multi-tensor operations. None does the same; on a GPU see `fused`.
        fused, copies: as in `LARS`.
        capturable: as in `LARS`; the step count is then a tensor too.

    Raises:
        UserError: as in `LARS`.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    kernel = Kernel(LambGroup, lamb_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.9,
        beta2: float | Tensor = 0.999,
        eps: float = 1e-6,
        weight_decay: float | Tensor = 0.0,
        trust_clip: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_clip": trust_clip,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "adapt": True,
            "step": 0,
        }
        super().__init__(params, defaults, copies)

    def check(self, group: Group) -> None:
        """Raises UserError for a group with invalid values; makes the step count a tensor for CUDA graphs."""
        check_number(group, "lr", low=0.0, example=0.01)
        check_number(group, "momentum", low=0.0, below=1.0, example=0.9)
        check_number(group, "beta2", low=0.0, below=1.0, example=0.999)
        check_number(group, "eps", low=0.0, example=1e-6)
        check_number(group, "weight_decay", low=0.0, example=0.01)
        check_backend(group)
        refuse_flattened(group["params"])
        if group["capturable"] and not isinstance(group["step"], Tensor):
            # float64, since 1 - 0.999^t loses five of fp32's seven digits
            group["step"] = torch.full_like(group["lr"], float(group["step"]), dtype=torch.float64)

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Updates weights and both moments."""
        lists = (tensors.weights, tensors.gradients, tensors.states["exp_avg"], tensors.states["exp_avg_sq"])
        updates = _updates(group, *lists)
        negative = -group["lr"]
        if group["adapt"]:
            found = whole_norms(tensors.weights, updates, groups=tensors.shard_groups)
            negative = list((-_rates(group, *found)).unbind())
        add_scaled_(tensors.weights, updates, negative)

    def finish(self, group: Group) -> None:
        """Counts the step."""
        group["step"] += 1


def _rates(group: Group, weight_norms: Tensor, update_norms: Tensor) -> Tensor:
    """lr |w| / |u| of each tensor, as one vector."""
    ratios = one_where_a_norm_is_zero(weight_norms / update_norms, weight_norms, update_norms)
    rates: Tensor = group["lr"] * (ratios.clamp(max=1.0) if group["trust_clip"] else ratios)
    return rates


def _updates(
    group: Group, weights: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor]
) -> list[Tensor]:
    """Updates both moments and returns u.

    With c1 = 1 - beta1^t and c = sqrt(1 - beta2^t), u = (m / (sqrt(n) + eps c)) (c / c1) + beta w. In this form both
    bias corrections are scalars, so no pass over a tensor is spent on them.
    """
    root = _correction(group, "beta2") ** 0.5
    factor = root / _correction(group, "momentum")
    _move_average(means, gradients, group["momentum"])
    _move_average_of_squares(squares, gradients, group["beta2"])
    divisors = list(torch._foreach_sqrt(squares))
    add_number_(divisors, _in_dtype_of(weights[0], group["eps"] * root))
    updates = list(torch._foreach_div(means, divisors))
    torch._foreach_mul_(updates, _in_dtype_of(weights[0], factor))
    if isinstance(group["weight_decay"], Tensor) or group["weight_decay"]:
        add_scaled_(updates, weights, group["weight_decay"])
    return updates


def _correction(group: Group, name: str) -> Number:
    """1 - beta^t; for a tensor in float64, since 1 - 0.999^t loses five of fp32's seven digits."""
    beta = group[name]
    corrected: Number = 1 - (beta.double() if isinstance(beta, Tensor) else beta) ** (group["step"] + 1)
    return corrected


def _move_average(averages: list[Tensor], values: list[Tensor], beta: Number) -> None:
    """beta a + (1 - beta) x, in place; torch's lerp takes beta only as a number."""
    if isinstance(beta, Tensor):
        torch._foreach_mul_(averages, beta)
        add_scaled_(averages, values, 1 - beta)
    else:
        torch._foreach_lerp_(averages, values, 1 - beta)


def _move_average_of_squares(averages: list[Tensor], values: list[Tensor], beta: Number) -> None:
    """beta a + (1 - beta) x^2, in place."""
    torch._foreach_mul_(averages, beta)
    if isinstance(beta, Tensor):
        torch._foreach_add_(averages, torch._foreach_mul(scaled(values, 1 - beta), values))
    else:
        torch._foreach_addcmul_(averages, values, values, value=1 - beta)


def _in_dtype_of(tensor: Tensor, number: Number) -> Number:
    """The number; a 0-d tensor in the lists' dtype, since with another one torch loops over the list on a GPU."""
    return number.to(tensor.dtype) if isinstance(number, Tensor) else number
