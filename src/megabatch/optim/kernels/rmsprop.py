"""One step of RMSprop warm-up for all tensors of all groups, in one kernel launch.

In float32 it moves 28 bytes per parameter (w, g, v and n read; w, v and n written), and 20 once the share of SGD is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megabatch.kernels.dispatch import Backend
from megabatch.optim.kernels.launch import Launch, run
from megabatch.optim.kernels.tables import StepGroup, StepTables, store


@dataclass(frozen=True, kw_only=True)
class RmspropGroup(StepGroup):
    """Tensors to update by the equations of `rmsprop_step_reference`; `sgd_share` is alpha, `decay` mu2."""

    state_fields: ClassVar[tuple[str, ...]] = ("buffers", "squares")
    value_fields: ClassVar[tuple[str, ...]] = ("sgd_share",)
    option_fields: ClassVar[tuple[str, ...]] = ("rmsprop_lr", "decay", "eps")

    buffers: Sequence[Tensor]
    squares: Sequence[Tensor]
    sgd_share: Tensor
    rmsprop_lr: float
    decay: float
    eps: float

    def options(self) -> list[float]:
        """Row of the option table; `_rmsprop_triton.py` names its columns."""
        return [self.rmsprop_lr, self.decay, self.eps]


def rmsprop_step(
    groups: Sequence[RmspropGroup], *, tables: StepTables | None = None, backend: Backend = "auto"
) -> None:
    """Updates weights, momentum, mean squares and 16-bit copies, in place; arguments as for `lars_step`.

    Raises:
        UserError: tensors of other types or layouts, of several devices, or a capture without a step before.
    """
    run(
        groups,
        tables=tables,
        backend=backend,
        reference=rmsprop_step_reference,
        module="optim.kernels._rmsprop_triton",
        launch=_launch,
    )


def _launch(ready: Launch) -> None:
    grid = (ready.table.num_chunks,)  # one program per chunk; no norms, so one launch
    ready.kernels.update_kernel[grid](*ready.tables, copy_type=ready.copy_type, **ready.options)


@torch.no_grad()
def rmsprop_step_reference(groups: Sequence[RmspropGroup]) -> None:
    """The step in plain PyTorch, one tensor after another (Akiba et al. 2017, arXiv:1711.04325).

    u = g + beta w;   n = mu2 n + (1 - mu2) u^2
    v = m v + (alpha + (1 - alpha) (rmsprop_lr / lr) / (sqrt(n) + eps)) u;   w -= lr v

    When alpha is 1, n is not updated. At lr = 0, where RMSprop's share would be infinite, the share is 0.
    """
    for group in groups:
        if group.overflowed():
            continue
        for w, g, v, n, copy in zip(
            group.weights, group.gradients, group.buffers, group.squares, group.copies, strict=True
        ):
            _update_tensor(group, w, group.scaled(g.to(v.dtype)), v, n)
            if copy is not None:
                copy.copy_(w)


def _update_tensor(group: RmspropGroup, weight: Tensor, g: Tensor, v: Tensor, n: Tensor) -> None:
    w = weight.to(v.dtype)
    u = g + group.weight_decay * w
    # The share is a tensor, so both cases are computed and selected by factors 0 and 1, without a host copy.
    blends = (group.sgd_share < 1).to(v.dtype)
    n.add_(blends * ((group.decay - 1) * n + (1 - group.decay) * u**2))
    adaptive = torch.where(group.lr > 0, (1 - group.sgd_share) * group.rmsprop_lr / group.lr, 0.0)
    factor = blends * (group.sgd_share + adaptive / (n.sqrt() + group.eps)) + (1 - blends)
    v.mul_(group.momentum).add_(factor * u)
    store(weight, w.sub_(group.lr * v))
