"""One step of LAMB for all tensors of all groups, in two kernel launches.

The first launch moves both moments and writes the squared norms of chunks of weights and update; the second adds each
tensor's partial sums in a fixed order and moves the weights, computing the update again. Reads w, m, n twice and g
once, writes m, n and w: 40 bytes a parameter in float32. No atomic operation is used, so equal inputs give equal bits.
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
    """Tensors that move by the equations of `lamb_step_reference`; `momentum` is beta1.

    `step`, a 0-d float64 tensor, holds how many steps came before, and is counted up.
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
        """The row of the option table; its columns are named in `_lamb_triton.py`."""
        return [self.eps, self.trust_clip]


def lamb_step(groups: Sequence[LambGroup], *, tables: StepTables | None = None, backend: Backend = "auto") -> None:
    """Moves weights, both moments and 16-bit copies of all groups by one step, in place; arguments as `lars_step`.

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
    grid = (table.num_chunks + table.num_groups,)
    looked_up = (*ready.tables, table.scratch, table.partials, table.num_chunks)
    ready.kernels.norms_kernel[grid](*looked_up, **ready.options)
    options = {name: value for name, value in ready.options.items() if name != "gradient_type"}
    ready.kernels.update_kernel[grid](*looked_up, norm_block=NORM_BLOCK, copy_type=ready.copy_type, **options)


@torch.no_grad()
def lamb_step_reference(groups: Sequence[LambGroup]) -> None:
    """The same step, one tensor after another, as the equations stand (You et al. 2019, arXiv:1904.00962).

    m = beta1 m + (1 - beta1) g        n = beta2 n + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(n / (1 - beta2^t)) + eps) + beta w
    w -= lr (|w| / |u|) u              ratio 1 where a norm is 0 or the group does not adapt
    """
    for group in groups:
        if group.overflowed():
            continue
        group.step.add_(1)
        for w, g, m, n, copy in zip(
            group.weights, group.gradients, group.means, group.squares, group.copies, strict=True
        ):
            _reference_of_one(group, w, group.scaled(g.to(m.dtype)), m, n)
            if copy is not None:
                copy.copy_(w)


def _reference_of_one(group: LambGroup, weight: Tensor, g: Tensor, m: Tensor, n: Tensor) -> None:
    w = weight.to(m.dtype)
    m.mul_(group.momentum).add_((1 - group.momentum) * g)
    n.mul_(group.beta2).add_((1 - group.beta2) * g**2)
    mean, square = m / _correction(group.momentum, group.step), n / _correction(group.beta2, group.step)
    u = mean / (square.sqrt() + group.eps) + group.weight_decay * w
    rate = _reference_rate(group, w.norm(), u.norm()) if group.adapt else group.lr
    store(weight, w.sub_(rate * u))


def _correction(beta: Tensor, step: Tensor) -> Tensor:
    """In float64, since 1 - 0.999^t loses five of float32's seven digits."""
    return 1 - beta.double() ** step


def _reference_rate(group: LambGroup, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
    return group.lr * (ratio.clamp(max=1.0) if group.trust_clip else ratio)
