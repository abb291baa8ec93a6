"""One step of LARS in two kernel launches, or of momentum SGD in one, for all tensors of all groups.

The first launch reads weights and gradients and writes the squared norms of chunks of `CHUNK` values. The second adds
each tensor's partial sums in a fixed order, computes its trust ratio and updates its momentum and weights. No atomic
operation is used, so equal inputs give equal bits. In float32 the two launches move 28 bytes per parameter (w and g
read twice, v once; w and v written). If no tensor adapts, the second launch is enough: 20 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megabatch.kernels.dispatch import Backend
from megabatch.optim.kernels.launch import NORM_BLOCK, Launch, run
from megabatch.optim.kernels.tables import StepGroup, StepTables, store


@dataclass(frozen=True, kw_only=True)
class LarsGroup(StepGroup):
    """Tensors to update by the equations of `lars_step_reference`; `adapt=False` means momentum SGD.

    Under `inside_corrected` a step overwrites `previous_lr` with `lr`.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("buffers",)
    value_fields: ClassVar[tuple[str, ...]] = ("previous_lr",)
    carried: ClassVar[str] = "previous_lr"
    option_fields: ClassVar[tuple[str, ...]] = (
        "adapt",
        "trust_coefficient",
        "eps",
        "momentum_form",
        "denominator",
        "trust_clip",
        "nesterov",
    )

    buffers: Sequence[Tensor]
    previous_lr: Tensor
    trust_coefficient: float = 0.001
    eps: float = 0.0
    momentum_form: Literal["outside", "inside", "inside_corrected"] = "outside"
    denominator: Literal["sum", "update", "gradient"] = "sum"
    trust_clip: bool = False
    nesterov: bool = False

    @property
    def is_corrected(self) -> bool:
        """True if the momentum is corrected for a change of the learning rate."""
        return self.momentum_form == "inside_corrected"

    def options(self) -> list[float]:
        """Row of the option table; `_lars_triton.py` names its columns."""
        flags = (self.momentum_form != "outside", self.is_corrected)
        denominators = (self.denominator == "sum", self.denominator == "update")
        return [self.trust_coefficient, self.eps, *flags, *denominators, self.trust_clip, self.nesterov]


def lars_step(groups: Sequence[LarsGroup], *, tables: StepTables | None = None, backend: Backend = "auto") -> None:
    """Updates weights, momentum buffers and 16-bit copies of all groups, in place.

    Weights and gradients are float32, float16 or bfloat16 and buffers float32; all arithmetic is float32.

    Args:
        tables: the kernels' lookup tables. Pass the same object at every step; for a CUDA graph, take one step with it
            before the capture.
        backend: `auto` uses the kernels on a GPU with Triton, and the reference elsewhere.

    Raises:
        UserError: tensors of other types or layouts, of several devices, or a capture without a step before.
    """
    # Without trust ratios and correction nothing has to be computed before the update: one launch is enough.
    prepares = any(group.adapt or group.is_corrected for group in groups)

    def launch(ready: Launch) -> None:
        _launch(ready, prepares=prepares)

    run(
        groups,
        tables=tables,
        backend=backend,
        reference=lars_step_reference,
        module="optim.kernels._lars_triton",
        launch=launch,
    )


def _launch(ready: Launch, *, prepares: bool) -> None:
    table = ready.table
    if prepares:  # one program per chunk with norms, then one per group
        ready.kernels.norms_kernel[(table.num_norm_chunks + table.num_groups,)](
            *ready.tables, table.scratch, table.partials, table.num_norm_chunks, table.num_chunks, **ready.options
        )
    ready.kernels.update_kernel[(table.num_chunks,)](
        *ready.tables,
        table.scratch,
        table.partials,
        table.num_chunks,
        prepared=prepares,
        norm_block=NORM_BLOCK,
        copy_type=ready.copy_type,
        **ready.options,
    )


@torch.no_grad()
def lars_step_reference(groups: Sequence[LarsGroup]) -> None:
    """The step in plain PyTorch, one tensor after another (You et al. 2017, arXiv:1708.03888).

    u = g + beta w;   rate = lr eta |w| / denominator, or lr if a norm is 0 or the group does not adapt
    outside            v = m v + u                          w -= rate v     nesterov: w -= rate (u + m v)
    inside             v = m v + rate u                     w -= v          nesterov: w -= rate u + m v
    inside_corrected   v = m lr_t/lr_(t-1) v + rate u       w -= v          nesterov: w -= rate u + m v
    denominator        sum: |g| + beta |w| + eps   update: |u| + eps   gradient: |g| + eps
    """
    for group in groups:
        if group.overflowed():
            continue
        momentum = group.momentum
        if group.is_corrected:  # after a step at rate 0 the buffer is all zeros, and any finite factor will do
            momentum = momentum * torch.where(group.previous_lr > 0, group.lr / group.previous_lr, 1.0)
        for w, g, v, copy in zip(group.weights, group.gradients, group.buffers, group.copies, strict=True):
            _update_tensor(group, w, group.scaled(g.to(v.dtype)), v, momentum)
            if copy is not None:
                copy.copy_(w)
        if group.is_corrected:
            group.previous_lr.copy_(group.lr)


def _update_tensor(group: LarsGroup, weight: Tensor, g: Tensor, v: Tensor, momentum: Tensor) -> None:
    w = weight.to(v.dtype)
    u = g + group.weight_decay * w
    rate = group.lr * _trust_ratio(group, w, g, u) if group.adapt else group.lr
    inside = group.momentum_form != "outside"
    added = rate * u if inside else u
    v.mul_(momentum).add_(added)
    # Nesterov looks ahead by the uncorrected m: v is already at the rate of this step.
    direction = added + group.momentum * v if group.nesterov else v
    store(weight, w.sub_(direction if inside else rate * direction))


def _trust_ratio(group: LarsGroup, w: Tensor, g: Tensor, u: Tensor) -> Tensor:
    weight_norm = torch.linalg.vector_norm(w)
    other_norm = torch.linalg.vector_norm(u if group.denominator == "update" else g)
    decay = group.weight_decay if group.denominator == "sum" else 0.0
    ratio = group.trust_coefficient * weight_norm / (other_norm + decay * weight_norm + group.eps)
    if group.trust_clip:
        # A ratio of 0 stays 0: at lr = 0 it would become 0 / 0.
        ratio = torch.where(ratio > 0, torch.clamp(ratio / group.lr, max=1.0), ratio)
    return torch.where((weight_norm > 0) & (other_norm > 0), ratio, 1.0)
