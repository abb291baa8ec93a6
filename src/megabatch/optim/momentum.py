"""Momentum SGD with a rate per tensor: what SGD and LARS share.

    u = g + beta w                                        weight decay, counted once
    outside            v = m v + u                        w -= s v
    inside             v = m v + s u                      w -= v
    inside_corrected   v = m (lr_t / lr_(t-1)) v + s u    w -= v

with s the learning rate, times the trust ratio under LARS. Under a constant s all three agree. When the rate jumps,
`outside` rescales the whole history at once, `inside` keeps the history at the old rate, and the correction (Goyal
et al. 2017, arXiv:1706.02677, 3; NVIDIA's LARS) brings it to the new global rate while trust ratios stay in the buffer.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.optim.engine.base import Group, MultiTensorOptimizer
from megabatch.optim.engine.checks import check_choice, check_number, check_ways
from megabatch.optim.engine.fused import Kernel
from megabatch.optim.engine.multi_tensor import Number, TensorLists, add_scaled_, is_flat, plus_scaled, scaled
from megabatch.optim.kernels.lars import LarsGroup, lars_step

MomentumForm = Literal["outside", "inside", "inside_corrected"]


class MomentumOptimizer(MultiTensorOptimizer):
    """A step of momentum SGD; a subclass may give each tensor its own rate in `rates`."""

    state_names: tuple[str, ...] = ("momentum_buffer",)
    kernel = Kernel(LarsGroup, lars_step)

    def check(self, group: Group) -> None:
        """Raises UserError for a group whose values cannot work."""
        check_number(group, "lr", low=0.0, example=0.1)
        check_number(group, "momentum", low=0.0, below=1.0, example=0.9)
        check_number(group, "weight_decay", low=0.0, example=1e-4)
        check_choice(group, "momentum_form", ("outside", "inside", "inside_corrected"))
        check_ways(group)
        if group["nesterov"] and not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
            raise UserError("nesterov=True with momentum=0 does nothing; needed: momentum above 0; momentum=0.9 works")
        if isinstance(group["lr"], Tensor) and not isinstance(group["previous_lr"], Tensor):
            group["previous_lr"] = torch.full_like(group["lr"], group["previous_lr"], requires_grad=False)

    def rates(self, group: Group, weights: list[Tensor], gradients: list[Tensor]) -> Number | Tensor:
        """Step sizes: one for all (a float or a 0-d tensor), or a vector with one for each tensor."""
        del weights, gradients
        rate: Number = group["lr"]
        return rate

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Moves weights and momentum by one step, in multi-tensor operations or in torch's fused kernel for a CPU."""
        rates = self.rates(group, tensors.weights, tensors.gradients)
        options = _Options(
            momentum=corrected_momentum(group),
            weight_decay=group["weight_decay"],
            inside=group["momentum_form"] != "outside",
            nesterov=group["nesterov"],
        )
        lists = (tensors.weights, tensors.gradients, tensors.states["momentum_buffer"])
        reads_rates = group["foreach"] is None and not group["capturable"]  # as a CPU's kernel takes numbers alone
        if reads_rates and _fused_kernel_fits(*lists, options):
            _update_fused(*lists, rates, options)
        else:
            _update_together(*lists, rates, options)

    def finish(self, group: Group) -> None:
        """Remembers the rate for the next step's momentum correction."""
        if group["momentum_form"] == "inside_corrected":
            remember_rate(group)


def corrected_momentum(group: Group) -> Number:
    """m, or m lr_t / lr_(t-1) for `inside_corrected`; after a step at rate 0 the buffer holds zeros, and m will do."""
    momentum, lr, previous = group["momentum"], group["lr"], group["previous_lr"]
    if group["momentum_form"] != "inside_corrected":
        return _number(momentum)
    if isinstance(previous, Tensor):
        corrected: Tensor = momentum * torch.where(previous > 0, lr / previous, 1.0)
        return corrected
    return _number(momentum * lr / previous if previous > 0 else momentum)


def remember_rate(group: Group) -> None:
    """Stores this step's rate in the group; a tensor is overwritten in place, as a CUDA graph needs it."""
    lr, previous = group["lr"], group["previous_lr"]
    if isinstance(lr, Tensor) and isinstance(previous, Tensor):
        previous.copy_(lr)
    else:
        group["previous_lr"] = lr.detach().clone() if isinstance(lr, Tensor) else lr


def _number(value: Any) -> Number:
    return value if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True)
class _Options:
    momentum: Number
    weight_decay: Number
    inside: bool
    nesterov: bool


def _update_together(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], rates: Number, options: _Options
) -> None:
    """One step in multi-tensor operations; no operation is started per tensor from Python."""
    negative: list[Tensor] | Number = -rates
    if isinstance(negative, Tensor) and negative.ndim == 1:
        negative = list(negative.unbind())
    u = plus_scaled(gradients, weights, options.weight_decay)
    if options.inside:
        u = scaled(u, negative)
    torch._foreach_mul_(buffers, options.momentum)
    torch._foreach_add_(buffers, u, alpha=-1 if options.inside else 1)
    direction = buffers
    if options.nesterov:
        direction = plus_scaled(scaled(u, -1.0) if options.inside else u, buffers, options.momentum)
    add_scaled_(weights, direction, -1.0 if options.inside else negative)


def _update_fused(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], rates: Number, options: _Options
) -> None:
    """The same step in torch's fused SGD kernel, which passes over memory once; for a CPU.

    The kernel takes one rate, so tensors with rates of their own are handed to it one by one: that costs microseconds,
    and memory traffic is what counts. The rate inside is a kernel's rate of 1 with the decayed gradient scaled before.
    """
    lists = [(weights, gradients, buffers, rates)]
    if isinstance(rates, Tensor) and rates.ndim == 1:
        lists = [([w], [g], [v], r) for w, g, v, r in zip(weights, gradients, buffers, rates.tolist(), strict=True)]
    for w, g, v, rate in lists:
        if options.inside:
            _fused_sgd(w, scaled(g, rate), v, 1.0, rate * options.weight_decay, options)
        else:
            _fused_sgd(w, g, v, rate, options.weight_decay, options)


def _fused_sgd(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    rate: Number,
    weight_decay: Number,
    options: _Options,
) -> None:
    torch._fused_sgd_(
        weights,
        gradients,
        buffers,
        lr=float(rate),
        momentum=float(options.momentum),
        weight_decay=float(weight_decay),
        nesterov=options.nesterov,
        dampening=0.0,
        maximize=False,
        is_first_step=False,  # the buffers start as zeros
    )


def _fused_kernel_fits(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], options: _Options
) -> bool:
    """Whether torch's fused kernel computes this step: on a CPU, with momentum (else it skips the buffer), if flat."""
    if weights[0].device.type != "cpu" or float(options.momentum) == 0:
        return False
    return all(map(is_flat, itertools.chain(weights, gradients, buffers)))
