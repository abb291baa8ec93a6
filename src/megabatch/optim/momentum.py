"""Momentum SGD with one learning rate for each tensor: the step that SGD and LARS share.

    u = g + beta w                                        weight decay, counted once
    outside            v = m v + u                        w -= s v
    inside             v = m v + s u                      w -= v
    inside_corrected   v = m (lr_t / lr_(t-1)) v + s u    w -= v

s is the learning rate lr, times the trust ratio under LARS. With a constant s all three forms agree. When the rate
changes, `outside` rescales the whole history at once and `inside` keeps the history at the old rate. The correction
(Goyal et al. 2017, arXiv:1706.02677, section 3; NVIDIA's LARS) rescales the history to the new global rate, while trust
ratios stay in the buffer.

Nesterov's step replaces v in the update of w by u + m v (`outside`) or s u + m v (the other two). m is not corrected
there: v is already at the rate lr_t.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.optim.engine.base import Group, MultiTensorOptimizer
from megabatch.optim.engine.checks import check_backend, check_choice, check_number
from megabatch.optim.engine.fused import Kernel
from megabatch.optim.engine.multi_tensor import Number, TensorLists, add_scaled_, is_flat, plus_scaled, scaled
from megabatch.optim.kernels.lars import LarsGroup, lars_step

MomentumForm = Literal["outside", "inside", "inside_corrected"]


class MomentumOptimizer(MultiTensorOptimizer):
    """Optimizer whose step is momentum SGD; a subclass may override `rates` to give each tensor its own rate."""

    state_names: tuple[str, ...] = ("momentum_buffer",)
    kernel = Kernel(LarsGroup, lars_step)

    def check(self, group: Group) -> None:
        """Raises UserError for a group with invalid values; makes the previous rate a tensor if the rate is one."""
        check_number(group, "lr", low=0.0, example=0.1)
        check_number(group, "momentum", low=0.0, below=1.0, example=0.9)
        check_number(group, "weight_decay", low=0.0, example=1e-4)
        check_choice(group, "momentum_form", ("outside", "inside", "inside_corrected"))
        check_backend(group)
        if group["nesterov"] and not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
            raise UserError("nesterov=True with momentum=0 does nothing; needed: momentum above 0; momentum=0.9 works")
        if isinstance(group["lr"], Tensor) and not isinstance(group["previous_lr"], Tensor):
            group["previous_lr"] = torch.full_like(group["lr"], group["previous_lr"], requires_grad=False)

    def rates(self, group: Group, tensors: TensorLists) -> Number | Tensor:
        """Step sizes s: one for all tensors (a float or a 0-d tensor), or a vector with one for each tensor."""
        del tensors
        rate: Number = group["lr"]
        return rate

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Updates weights and momentum, in multi-tensor operations or in torch's fused kernel for a CPU."""
        factors = _Factors(
            rates=self.rates(group, tensors),
            momentum=_corrected_momentum(group),
            weight_decay=group["weight_decay"],
            inside=group["momentum_form"] != "outside",
            lookahead=_number(group["momentum"]) if group["nesterov"] else None,
        )
        lists = (tensors.weights, tensors.gradients, tensors.states["momentum_buffer"])
        reads_rates = group["foreach"] is None and not group["capturable"]  # torch's CPU kernel takes numbers only
        if reads_rates and _fused_kernel_fits(*lists, factors):
            _update_fused(*lists, factors)
        else:
            _update_together(*lists, factors)

    def finish(self, group: Group) -> None:
        """Stores the rate for the next step's correction; a tensor in place, since a CUDA graph reads it there."""
        if group["momentum_form"] != "inside_corrected":
            return
        lr, previous = group["lr"], group["previous_lr"]
        if isinstance(lr, Tensor) and isinstance(previous, Tensor):
            previous.copy_(lr)
        else:
            group["previous_lr"] = lr.detach().clone() if isinstance(lr, Tensor) else lr


@dataclass(frozen=True)
class _Factors:
    """Numbers of one group's step."""

    rates: Number | Tensor
    """s: one for all tensors, or a vector."""
    momentum: Number
    """m, corrected for a change of the rate under `inside_corrected`."""
    weight_decay: Number
    inside: bool
    """s multiplies u on its way into the buffer; otherwise it multiplies v in the update of w."""
    lookahead: Number | None
    """m of Nesterov's step; None without it."""


def _corrected_momentum(group: Group) -> Number:
    """m, or m lr_t / lr_(t-1) for `inside_corrected`. After a step at rate 0 the buffer is all zeros, so m is used."""
    momentum, lr, previous = group["momentum"], group["lr"], group["previous_lr"]
    if group["momentum_form"] != "inside_corrected":
        return _number(momentum)
    if isinstance(previous, Tensor):
        corrected: Tensor = momentum * torch.where(previous > 0, lr / previous, 1.0)
        return corrected
    return _number(momentum * lr / previous if previous > 0 else momentum)


def _number(value: Any) -> Number:
    return value if isinstance(value, Tensor) else float(value)


def _update_together(weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], factors: _Factors) -> None:
    """The equations in multi-tensor operations; Python starts no operation per tensor."""
    u = plus_scaled(gradients, weights, factors.weight_decay)
    if factors.inside:
        u = scaled(u, _per_tensor(factors.rates))
    torch._foreach_mul_(buffers, factors.momentum)
    torch._foreach_add_(buffers, u)
    direction = buffers
    if factors.lookahead is not None:
        direction = plus_scaled(u, buffers, factors.lookahead)
    add_scaled_(weights, direction, -1.0 if factors.inside else _per_tensor(-factors.rates))


def _per_tensor(rates: Number) -> Number | list[Tensor]:
    """A vector of rates as a list of 0-d tensors, which multi-tensor operations take."""
    return list(rates.unbind()) if isinstance(rates, Tensor) and rates.ndim == 1 else rates


def _update_fused(weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], factors: _Factors) -> None:
    """The equations in torch's fused SGD kernel for CPUs, which passes over memory once.

    The kernel takes one rate for all tensors, so with a vector of rates it is called once per tensor. That costs
    microseconds; memory traffic dominates. For `inside`, the kernel gets rate 1 and gradients scaled beforehand.
    """
    rates = factors.rates
    lists = [(weights, gradients, buffers, rates)]
    if isinstance(rates, Tensor) and rates.ndim == 1:
        lists = [([w], [g], [v], r) for w, g, v, r in zip(weights, gradients, buffers, rates.tolist(), strict=True)]
    for w, g, v, rate in lists:
        if factors.inside:
            _fused_sgd(w, scaled(g, rate), v, 1.0, rate * factors.weight_decay, factors)
        else:
            _fused_sgd(w, g, v, rate, factors.weight_decay, factors)


def _fused_sgd(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    rate: Number,
    weight_decay: Number,
    factors: _Factors,
) -> None:
    torch._fused_sgd_(
        weights,
        gradients,
        buffers,
        lr=float(rate),
        momentum=float(factors.momentum),
        weight_decay=float(weight_decay),
        nesterov=factors.lookahead is not None,
        dampening=0.0,
        maximize=False,
        is_first_step=False,  # the buffers start as zeros
    )


def _fused_kernel_fits(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], factors: _Factors
) -> bool:
    """True if torch's fused kernel computes this step: on a CPU, for flat tensors, with one momentum other than 0."""
    if weights[0].device.type != "cpu" or float(factors.momentum) == 0:  # with momentum 0 it would skip the buffer
        return False
    if factors.lookahead is not None and float(factors.lookahead) != float(factors.momentum):
        return False
    return all(map(is_flat, itertools.chain(weights, gradients, buffers)))
