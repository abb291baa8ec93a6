"""One step of LAMB for all tensors of all groups, in two kernel launches.

The first launch updates both moments and writes the squared norms of weights and update, for chunks of `CHUNK` values.
The second adds each tensor's partial sums in a fixed order, computes the update again and updates the weights. No
atomic operation is used, so equal inputs give equal bits. In float32 the two launches move 40 bytes per parameter (w, m
and n read twice, g once; m, n and w written).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megabatch.kernels.dispatch import Backend
from megabatch.optim.kernels.launch import NORM_BLOCK, Launch, run
from megabatch.optim.kernels.tables import StepGroup, StepTables, store


@dataclass(frozen=True, kw_only=True)
class LambGroup(StepGroup):
    """Tensors to update by the equations of `lamb_step_reference`; `momentum` is beta1.

    `step`, a 0-d float64 tensor, is the number of steps before this one; a step increments it.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("means", "squares")
    value_fields: ClassVar[tuple[str, ...]] = ("beta2", "step")
    carried: ClassVar[str] = "step"
    option_fields: ClassVar[tuple[str, ...]] = ("adapt", "eps", "trust_clip")

    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    beta2: Tensor
    step: Tensor
    eps: float = 1e-6
    trust_clip: bool = False

    def options(self) -> list[float]:
        """Row of the option table; `_lamb_triton.py` names its columns."""
        return [self.eps, self.trust_clip]


def lamb_step(groups: Sequence[LambGroup], *, tables: StepTables | None = None, backend: Backend = "auto") -> None:
    """Updates weights, both moments and 16-bit copies of all groups, in place; arguments as for `lars_step`.

    Raises:
        UserError: tensors of other types or layouts, of several devices, or a capture without a step before.
    """
    run(
        groups,
        tables=tables,
        backend=backend,
        reference=lamb_step_reference,
        module="optim.kernels._lamb_triton",
        launch=_launch,
    )


def _launch(ready: Launch) -> None:
    table = ready.table
    # One program per chunk, then one per group: for its bias corrections in the first launch and its step count in the
    # second. The second launch reads no gradient, so it is not compiled for a gradient dtype.
    grid = (table.num_chunks + table.num_groups,)
    arguments = (*ready.tables, table.scratch, table.partials, table.num_chunks)
    ready.kernels.norms_kernel[grid](*arguments, **ready.options)
    options = {name: value for name, value in ready.options.items() if name != "gradient_type"}
    ready.kernels.update_kernel[grid](*arguments, norm_block=NORM_BLOCK, copy_type=ready.copy_type, **options)


@torch.no_grad()
def lamb_step_reference(groups: Sequence[LambGroup]) -> None:
    """The step in plain PyTorch, one tensor after another (You et al. 2019, arXiv:1904.00962).

    m = beta1 m + (1 - beta1) g        n = beta2 n + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(n / (1 - beta2^t)) + eps) + beta w
    w -= lr (|w| / |u|) u              ratio 1 if a norm is 0 or the group does not adapt
    """
    for group in groups:
        if group.overflowed():
            continue
        group.step.add_(1)
        for w, g, m, n, copy in zip(
            group.weights, group.gradients, group.means, group.squares, group.copies, strict=True
        ):
            _update_tensor(group, w, group.scaled(g.to(m.dtype)), m, n)
            if copy is not None:
                copy.copy_(w)


def _update_tensor(group: LambGroup, weight: Tensor, g: Tensor, m: Tensor, n: Tensor) -> None:
    w = weight.to(m.dtype)
    m.mul_(group.momentum).add_((1 - group.momentum) * g)
    n.mul_(group.beta2).add_((1 - group.beta2) * g**2)
    mean, square = m / _correction(group.momentum, group.step), n / _correction(group.beta2, group.step)
    # Decoupled weight decay: beta w is part of u, whose norm the ratio divides by, and of neither moment.
    u = mean / (square.sqrt() + group.eps) + group.weight_decay * w
    rate = group.lr * _trust_ratio(group, w.norm(), u.norm()) if group.adapt else group.lr
    store(weight, w.sub_(rate * u))


def _correction(beta: Tensor, step: Tensor) -> Tensor:
    """1 - beta^t, in float64, since 1 - 0.999^t loses five of float32's seven digits."""
    return 1 - beta.double() ** step


def _trust_ratio(group: LambGroup, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
    return ratio.clamp(max=1.0) if group.trust_clip else ratio
