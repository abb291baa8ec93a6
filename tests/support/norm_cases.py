"""Helpers for tests of fused batch norms: cases, inputs, one forward and backward, relative errors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.nn.batch_norm.evaluation_statistics import span_layers


class Case(NamedTuple):
    """Shape of x, samples per span, and whether there is a residual and a ReLU."""

    shape: tuple[int, int, int, int]
    span: int
    residual: bool
    relu: bool


class Run(NamedTuple):
    """Outputs, statistics and gradients of one forward and backward."""

    y: Tensor
    mean: Tensor
    var: Tensor
    gradients: tuple[Tensor, ...]


def step_sums(model: nn.Module) -> dict[str, Tensor]:
    """Statistics that the span layers of `model` collected since the last `finish_step`, by layer and kind."""
    kinds = ("span_sum", "first_span")
    return {
        f"{number}.{kind}": getattr(layer, kind) for number, layer in enumerate(span_layers(model)) for kind in kinds
    }


def inputs(case: Case, dtype: torch.dtype, *, offset: float = 0.5, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels = case.shape[1]
    x = (2 * draw(*case.shape) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    return {
        "x": x,
        "weight": draw(channels) + 1,
        "bias": draw(channels),
        "residual": draw(*case.shape).to(dtype) if case.residual else None,
        "dy": draw(*case.shape).to(dtype),
    }


def run(given: dict[str, Any], case: Case, *, function: Any = fused_bn_act, **options: Any) -> Run:
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items() if name != "dy"}
    y, mean, var = function(**leaves, span=case.span, relu=case.relu, **options)
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    return Run(y.detach(), mean, var, torch.autograd.grad(y, wanted, given["dy"]))


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {name: None if t is None else t.double() for name, t in given.items()}


def error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|."""
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-12))
