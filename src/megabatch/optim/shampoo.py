"""Shampoo: gradients preconditioned by the inverse roots of their second moments, at the rates of SGD or LARS.

    L = beta2 L + (1 - beta2) G G^T        R = beta2 R + (1 - beta2) G^T G        each step
    A = (L + eps max(L) I)^(-1/4)          B = (R + eps max(R) I)^(-1/4)          every `root_every` steps
    D = A G B |G| / |A G B|                                                       grafting

G is a gradient as a matrix out x (in k k), or a block of it, and max the largest eigenvalue. D replaces G in the step
of SGD or LARS. Its norm is that of G, so scales of L and R cancel: they need no bias correction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.float64 import in_float64
from megabatch.optim.engine.base import Group
from megabatch.optim.engine.checks import check_choice, check_number
from megabatch.optim.engine.matrices import MatrixOptimizer
from megabatch.optim.engine.multi_tensor import Number, TensorLists
from megabatch.optim.engine.sharing import Shape
from megabatch.optim.engine.trust import norms, one_where_a_norm_is_zero
from megabatch.optim.lars import trust_ratios
from megabatch.optim.momentum import MomentumForm


class Shampoo(MatrixOptimizer):
    """Shampoo with blocks and grafting (Gupta et al. 2018, 1802.09568; Shi et al. 2023, arXiv:2309.06497).

        L = beta2 L + (1 - beta2) G G^T;   R = beta2 R + (1 - beta2) G^T G
        D = (L + eps max(L) I)^(-1/4) G (R + eps max(R) I)^(-1/4), scaled to |D| = |G|
        the step of SGD or LARS (`graft`), with D in place of the gradient G

    A tensor (out, in, k, k) is the matrix out x (in k k), cut into blocks of at most `block_size` rows and columns;
    each block has its own L and R, and norms are those of the whole tensor. max is the largest eigenvalue. Roots come
    from an eigendecomposition in float64, every `root_every` steps. Since |D| = |G|, learning rates, momentum, coupled
    weight decay and schedules of SGD or LARS carry over. Shi et al. also offer grafting to Adam's norm. State is fp32
    (float64 for float64 parameters) and takes 2 (m^2 + n^2) values per block in addition to the momentum.

        optimizer = Shampoo(param_groups(model, weight_decay=5e-5), lr=0.1)
        loss(model).backward()
        optimizer.step()

    With `process_group` every worker keeps L and R of its share of the blocks, computes D there, and receives the other
    workers' D, 4 bytes per element. All workers must step together, with equal gradients, and must call `state_dict`
    together: it gathers the factors, so a checkpoint does not depend on the number of workers. Weights are bitwise
    equal on all workers, and on any number of workers with equal devices and numbers of threads.

    Args:
        params: parameter groups. A group may override any argument below except `process_group` and `copies`, and may
            set `adapt`: False means the step of `SGD`, at the rate sgd_lr_factor lr.
        lr: a float or a 0-d tensor, as are momentum and weight decay.
        eps: relative to the largest eigenvalue.
        graft: "sgd", or "lars" with `trust_coefficient`, for batches of thousands of samples.
        momentum_form, nesterov: as in `SGD`.
        process_group: workers that share the work; None: this process does all of it.
        copies: as in `LARS`.

    Raises:
        UserError: a value out of range, a vector in a group with `adapt=True`, or a sparse or complex gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.9,
        weight_decay: float | Tensor = 0.0,
        beta2: float = 0.95,
        eps: float = 1e-6,
        block_size: int = 1024,
        root_every: int = 10,
        graft: Literal["sgd", "lars"] = "sgd",
        trust_coefficient: float = 0.001,
        momentum_form: MomentumForm = "outside",
        nesterov: bool = False,
        sgd_lr_factor: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "beta2": beta2,
            "eps": eps,
            "block_size": block_size,
            "root_every": root_every,
            "graft": graft,
            "trust_coefficient": trust_coefficient,
            "momentum_form": momentum_form,
            "nesterov": nesterov,
            "sgd_lr_factor": sgd_lr_factor,
            "capturable": False,
            "step": 0,
        }
        super().__init__(params, defaults, copies, process_group)

    def check(self, group: Group) -> None:
        """Raises UserError for a group with invalid values."""
        super().check(group)
        check_number(group, "beta2", low=0.0, below=1.0, example=0.95)
        check_number(group, "eps", low=0.0, example=1e-6)
        check_number(group, "trust_coefficient", low=0.0, example=0.001)
        check_choice(group, "graft", ("sgd", "lars"))
        for name, example in (("block_size", 1024), ("root_every", 10)):
            if group[name] < 1:
                raise UserError(f"{name}={group[name]} was given, needed: at least 1; {name}={example} works")
        if group["capturable"]:
            raise UserError("capturable=True was given, but roots are computed every few steps; capturable=False works")

    def flops(self, group: Group) -> "ShampooFlops":
        """Products of every step, and eigendecompositions divided by `root_every`."""
        return ShampooFlops(group["root_every"])

    def block_size(self, group: Group) -> int | None:
        """As given."""
        size: int = group["block_size"]
        return size

    def inputs(self, group: Group, tensors: TensorLists) -> list[Tensor]:
        """The gradients."""
        del group
        return tensors.gradients

    def transform(self, group: Group, matrices: Tensor, homes: list[tuple[Tensor, int]]) -> Tensor:
        """Updates the factors and returns A G B."""
        states = [self._factors_of(parameter, number) for parameter, number in homes]
        computes_roots = group["step"] % group["root_every"] == 0 or any("left_root" not in s for s in states)
        roots = []
        for side, square in (("left", matrices @ matrices.mT), ("right", matrices.mT @ matrices)):
            before = torch.stack([s.get(side, torch.zeros_like(square[0])) for s in states])
            factors = before.mul_(group["beta2"]).add_(square, alpha=1 - group["beta2"])
            _keep(states, side, factors)
            if computes_roots:
                _keep(states, f"{side}_root", inverse_fourth_root(factors, group["eps"]))
            roots.append(torch.stack([s[f"{side}_root"] for s in states]))
        return roots[0] @ matrices @ roots[1]

    def move(self, group: Group, tensors: TensorLists, results: list[Tensor]) -> None:
        """Grafts D and takes the step of SGD or LARS with it."""
        wanted, found = norms(tensors.gradients), norms(results)
        factors = one_where_a_norm_is_zero(wanted / found, wanted, found)
        directions = list(torch._foreach_mul(results, list(factors.unbind())))
        self.update(group, TensorLists(tensors.weights, directions, tensors.states))

    def rates(self, group: Group, tensors: TensorLists) -> Number | Tensor:
        """lr, times the trust ratios of LARS with graft="lars"."""
        rate = super().rates(group, tensors)
        if not group["adapt"] or group["graft"] == "sgd":
            return rate
        ratios = trust_ratios(
            norms(tensors.weights),
            norms(tensors.gradients),
            trust_coefficient=group["trust_coefficient"],
            weight_decay=group["weight_decay"],
        )
        return ratios * rate

    def finish(self, group: Group) -> None:
        """Counts the step."""
        super().finish(group)
        group["step"] += 1

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the factors of all workers; every worker of the process group must call it."""
        saved = super().state_dict()
        workers = self._num_workers()
        if workers > 1:
            own = {index: _on_cpu(state["factors"]) for index, state in saved["state"].items() if "factors" in state}
            shares: list[Any] = [None] * workers
            dist.all_gather_object(shares, own, group=self.process_group)
            for index, state in saved["state"].items():
                blocks = {number: block for share in shares for number, block in share.get(index, {}).items()}
                saved["state"][index] = state | ({"factors": dict(sorted(blocks.items()))} if blocks else {})
        return saved

    def _load_states(self, state_dict: dict[str, Any], previous_states: dict[Tensor, dict[str, Tensor]]) -> None:
        super()._load_states(state_dict, previous_states)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        owned = self._owned()
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {}).get("factors", {})
            kept = {block: matrices for block, matrices in saved.items() if (parameter, block) in owned}
            self.state[parameter].pop("factors", None)  # torch has rounded them to the parameter's dtype
            for block, matrices in kept.items():
                for name, matrix in matrices.items():
                    self._factors_of(parameter, block)[name] = matrix.to(parameter.device, copy=True)

    def _owned(self) -> set[tuple[Tensor, int]]:
        """Blocks whose factors this worker keeps: parameter and number."""
        workers = self._num_workers()
        rank = dist.get_rank(self.process_group) if workers > 1 else 0
        return {
            (members[plan.blocks[m].tensor], plan.blocks[m].number)
            for group, members in self._matrices()
            for plan in [self._plan(group, members, workers)]
            for unit in plan.shares[rank]
            for m in unit.members
        }

    def _factors_of(self, parameter: Tensor, number: int) -> dict[str, Tensor]:
        """State of a block: left, right, left_root and right_root, once they are computed."""
        factors: dict[str, Tensor] = self.state[parameter].setdefault("factors", {}).setdefault(number, {})
        return factors


@dataclass(frozen=True)
class ShampooFlops:
    """Flops of a block (m, n) per step: two products for the factors, two for D, and the roots.

    A root counts as 11 m^3: 9 m^3 for a symmetric eigendecomposition with vectors (Golub and Van Loan, 8.3) and 2 m^3
    for the product.
    """

    root_every: int

    def __call__(self, shape: Shape) -> float:
        m, n = shape
        return 4.0 * m * n * (m + n) + 11.0 * (m**3 + n**3) / self.root_every


def inverse_fourth_root(factors: Tensor, eps: float) -> Tensor:
    """(F + eps max(F) I)^(-1/4) of symmetric matrices (b, m, m), max(F) being the largest eigenvalue; I for F = 0.

    Computed by an eigendecomposition in float64; it waits for a GPU. A factor that is not finite gives NaN.
    """
    try:
        values, vectors = torch.linalg.eigh(in_float64(factors))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if factors.isfinite().all():
            raise
        return torch.full_like(factors, float("nan"))  # the run then reports a loss that is not finite
    largest = values[:, -1:]
    ridge = torch.where(largest > 0, eps * largest, 1.0)
    powers = (values.clamp(min=0.0) + ridge) ** -0.25
    root: Tensor = ((vectors * powers.unsqueeze(1)) @ vectors.mT).to(factors)
    return root


def _keep(states: list[dict[str, Tensor]], name: str, matrices: Tensor) -> None:
    for state, matrix in zip(states, matrices, strict=True):
        state[name] = matrix


def _on_cpu(factors: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Copies that hold no memory besides their own, as they are pickled with their whole storage."""
    return {
        number: {name: matrix.to("cpu", copy=True) for name, matrix in block.items()}
        for number, block in factors.items()
    }
