"""Muon: momentum whose matrices are orthogonalised before the step.

    v = m v + g;   u = g + m v (Nesterov) or v
    O = nearly U V^T of u = U S V^T, as a matrix out x (in k k)
    W -= lr beta W + lr s O

All directions of a matrix move by the same distance, lr s, in a step. The iteration that computes O is in
`megabatch.optim.engine.newton_schulz`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.errors import UserError
from megabatch.optim.engine.base import Group
from megabatch.optim.engine.checks import check_choice
from megabatch.optim.engine.matrices import MatrixOptimizer
from megabatch.optim.engine.multi_tensor import TensorLists, add_scaled_, plus_scaled
from megabatch.optim.engine.newton_schulz import JORDAN, Quintic, minimax_coefficients, orthogonalize
from megabatch.optim.engine.sharing import Shape
from megabatch.optim.engine.trust import norms, one_where_a_norm_is_zero

Scale = Literal["spectral", "rms", "none"]


class Muon(MatrixOptimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for hidden matrices and filter banks.

        v = m v + g;   u = g + m v if nesterov, else v;   O = nearly U V^T of u = U S V^T
        W = W sqrt(out) / |W|                  first, with normalize_weights (airbench94_muon)
        W -= lr beta W + lr s O

        scale      spectral: s = sqrt(max(1, out / in))     Jordan et al., torch.optim.Muon
                   rms: s = 0.2 sqrt(max(out, in))          Liu et al. 2025, arXiv:2502.16982: rates of AdamW
                   none: s = 1                              airbench94_muon

    A tensor (out, in, k, k) is the matrix out x (in k k); |W| is its Frobenius norm. g is the mean gradient over the
    global batch. Weight decay is decoupled; with `normalize_weights` it has no lasting effect. Groups with
    `adapt=False` step as in `SGD`, with coupled weight decay, at the rate sgd_lr_factor lr, so one schedule of `lr`
    serves all groups. Jordan et al. leave vectors, the first layer and the last to another rule; so does
    `param_groups(..., separate_ends=True)`. State is fp32 (float64 for float64 parameters).

    torch.optim.Muon averages, v = m v + (1 - m) g, which gives the same O, and takes two-dimensional tensors only.

        optimizer = Muon(param_groups(model, weight_decay=0.0, separate_ends=True), lr=0.1, normalize_weights=True)
        loss(model).backward()
        optimizer.step()

    With `process_group` every worker orthogonalises its share of the matrices and receives the others' results, 4 bytes
    per element (2 in bfloat16). All workers of the group must step together, with equal gradients. Weights are bitwise
    equal on all workers, and on any number of workers with equal devices and numbers of threads.

    Args:
        params: parameter groups. A group may override any argument below except `process_group` and `copies`.
        lr: a float or a 0-d tensor, as are momentum and weight decay. A CUDA graph reads tensors at every replay.
        scale: s, above.
        normalize_weights: for layers followed by a normalisation, whose output a scaled weight does not change.
        steps: number of iterations.
        coefficients: "jordan": (3.4445, -4.7750, 2.0315) in each step. Five steps take singular values between 0.01
            |u| and |u| to between 0.68 and 1.14. "minimax": those of `minimax_coefficients`, from 0.001 |u| to between
            0.86 and 1.12 in five steps, 0.99 and 1.01 in six.
        iteration_dtype: dtype of the iteration, such as torch.bfloat16; None: float32 (float64 for float64 parameters).
        sgd_lr_factor: rate of groups with `adapt=False`, relative to lr.
        process_group: workers that share the work; None: this process does all of it.
        capturable, copies: as in `LARS`. Across several workers a step cannot be captured.

    Raises:
        UserError: a value out of range, a vector in a group with `adapt=True`, or a sparse or complex gradient.
    """

    short_side_first = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.95,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = True,
        scale: Scale = "spectral",
        normalize_weights: bool = False,
        steps: int = 5,
        coefficients: Literal["jordan", "minimax"] = "jordan",
        iteration_dtype: torch.dtype | None = None,
        sgd_lr_factor: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "momentum_form": "outside",
            "scale": scale,
            "normalize_weights": normalize_weights,
            "steps": steps,
            "coefficients": coefficients,
            "iteration_dtype": iteration_dtype,
            "sgd_lr_factor": sgd_lr_factor,
            "capturable": capturable,
        }
        super().__init__(params, defaults, copies, process_group)

    def check(self, group: Group) -> None:
        """Raises UserError for a group with invalid values."""
        super().check(group)
        check_choice(group, "momentum_form", ("outside",))
        check_choice(group, "scale", ("spectral", "rms", "none"))
        check_choice(group, "coefficients", ("jordan", "minimax"))
        if group["steps"] < 1:
            raise UserError(f"steps={group['steps']} was given, needed: at least 1; steps=5 works")

    def flops(self, group: Group) -> "NewtonSchulzFlops":
        """4 m^2 n + 2 m^3 per iteration."""
        return NewtonSchulzFlops(group["steps"])

    def result_dtype(self, group: Group, dtype: torch.dtype) -> torch.dtype:
        """The iteration's dtype."""
        wanted: torch.dtype | None = group["iteration_dtype"]
        return wanted or super().result_dtype(group, dtype)

    def inputs(self, group: Group, tensors: TensorLists) -> list[Tensor]:
        """u; updates v."""
        buffers = tensors.states["momentum_buffer"]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, tensors.gradients)
        return plus_scaled(tensors.gradients, buffers, group["momentum"]) if group["nesterov"] else buffers

    def transform(self, group: Group, matrices: Tensor, homes: list[tuple[Tensor, int]]) -> Tensor:
        """O."""
        del homes
        return orthogonalize(matrices, _coefficients(group), self.result_dtype(group, matrices.dtype))

    def move(self, group: Group, tensors: TensorLists, results: list[Tensor]) -> None:
        """Normalises, decays and moves the weights."""
        weights = tensors.weights
        if group["normalize_weights"]:
            torch._foreach_mul_(weights, _normalizing(weights))
        if isinstance(group["weight_decay"], Tensor) or group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        scales = [_scale(group["scale"], w) for w in weights]
        add_scaled_(weights, list(torch._foreach_mul(results, scales)), -group["lr"])


@dataclass(frozen=True)
class NewtonSchulzFlops:
    """Flops of `orthogonalize` for a matrix (m, n), m <= n."""

    steps: int

    def __call__(self, shape: Shape) -> float:
        m, n = shape
        return float(self.steps * (4 * m * m * n + 2 * m**3))


def _coefficients(group: Group) -> tuple[Quintic, ...]:
    steps: int = group["steps"]
    return minimax_coefficients(steps) if group["coefficients"] == "minimax" else (JORDAN,) * steps


def _normalizing(weights: list[Tensor]) -> list[Tensor]:
    """sqrt(out) / |W| of each weight; 1 for a weight of zeros."""
    lengths = norms(weights)
    inverses = one_where_a_norm_is_zero(1 / lengths, lengths, lengths)
    return list(torch._foreach_mul(list(inverses.unbind()), [math.sqrt(len(w)) for w in weights]))


def _scale(kind: Scale, weight: Tensor) -> float:
    """s of a weight (out, ...)."""
    rows, columns = len(weight), weight[0].numel()
    square = {"spectral": max(1.0, rows / columns), "rms": 0.04 * max(rows, columns), "none": 1.0}[kind]
    return math.sqrt(square)
