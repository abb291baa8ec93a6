"""Shared cases of the optimizer kernels' tests: every kind of step, tensors of odd sizes, gradients from seeds."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from slow import slow_except
from torch import Tensor, nn

from megabatch.optim.kernels.tables import CHUNK
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD

Optimizer = torch.optim.Optimizer
FORMS = ("outside", "inside", "inside_corrected")
RAGGED = (1, 3, 1025, CHUNK + 5)
STEPS: list[dict[str, float]] = [
    {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "beta2": 0.99, "sgd_share": 0.3},
    {"lr": 0.6, "momentum": 0.8, "weight_decay": 0.02, "beta2": 0.98, "sgd_share": 0.8},
    {"lr": 0.2, "momentum": 0.95, "weight_decay": 0.01, "beta2": 0.95, "sgd_share": 1.0},
]
"""Values that a schedule changes from step to step."""


def cases() -> Iterator[tuple[str, type[Optimizer], dict[str, Any]]]:
    for form, denominator in itertools.product(FORMS, ("sum", "update", "gradient")):
        values = {"momentum_form": form, "denominator": denominator, "trust_coefficient": 0.02, "eps": 1e-3}
        yield f"lars {form} {denominator}", LARS, values
    for form in FORMS:
        yield f"lars {form} nesterov", LARS, {"momentum_form": form, "nesterov": True, "trust_coefficient": 0.02}
        yield f"sgd {form}", SGD, {"momentum_form": form}
    yield "lars clip", LARS, {"trust_clip": True, "trust_coefficient": 4.0}
    yield "sgd nesterov", SGD, {"nesterov": True}
    yield "sgd inside_corrected nesterov", SGD, {"momentum_form": "inside_corrected", "nesterov": True}
    yield "lamb", LAMB, {}
    yield "lamb clip", LAMB, {"trust_clip": True, "eps": 1e-3}
    yield "rmsprop", RMSpropWarmup, {"eps": 1e-3, "rmsprop_lr": 0.01}


CASES = {name: (kind, values) for name, kind, values in cases()}
EVERY = pytest.mark.parametrize("case", CASES)
_ONE_OF_EACH = ["lars inside_corrected sum", "sgd outside", "lamb", "rmsprop"]
ONE_OF_EACH = pytest.mark.parametrize("case", slow_except(_ONE_OF_EACH, "lars inside_corrected sum"))
TENSOR_CASES = ("lars inside_corrected sum", "lars clip", "sgd inside_corrected", "lamb", "rmsprop")
FAST_CASES = {
    ("lars inside_corrected sum", True),
    ("lars outside update", False),
    ("lars clip", False),
    ("sgd outside", False),
    ("lamb", True),
    ("rmsprop", False),
}
WITH_NUMBERS_AND_TENSORS = pytest.mark.parametrize(
    ("case", "in_tensors"),
    [
        pytest.param(*values, marks=[] if values in FAST_CASES else pytest.mark.slow)
        for values in [*((case, False) for case in CASES), *((case, True) for case in TENSOR_CASES)]
    ],
)
RATES = pytest.mark.parametrize("in_tensors", [False, True])


def groups(*sizes: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """A group of tensors that adapt and one with a tensor that does not; the values are exact in float32."""
    generator = torch.Generator().manual_seed(0)

    def parameter(size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(size, generator=generator).to(dtype))

    return [{"params": [parameter(size) for size in sizes]}, {"params": [parameter(257)], "adapt": False}]


def make(case: str, param_groups: list[dict[str, Any]], *, in_tensors: bool = False, **backend: Any) -> Optimizer:
    kind, values = CASES[case]
    if in_tensors:
        dtype = torch.float64 if param_groups[0]["params"][0].dtype == torch.float64 else torch.float32
        rates: dict[str, Any] = {name: torch.tensor(0.5, dtype=dtype) for name in ("lr", "momentum", "weight_decay")}
        rates |= {"beta2": torch.tensor(0.5, dtype=dtype)} if kind is LAMB else {}
        return kind(param_groups, **rates, **values, capturable=True, **backend)
    return kind(param_groups, lr=0.5, **values, **backend)


def reference(case: str, *sizes: int) -> Optimizer:
    return make(case, groups(*sizes, dtype=torch.float64), foreach=False)


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(optimizer: Optimizer, steps: list[dict[str, float]] = STEPS, *, first: int = 0) -> None:
    """Takes steps on gradients that depend only on step and position, rounded to float16 so that all dtypes agree."""
    for number, values in enumerate(steps, start=first):
        for position, parameter in enumerate(parameters(optimizer)):
            generator = torch.Generator().manual_seed(1000 * number + position)
            gradient = (0.1 * torch.randn(parameter.shape, generator=generator)).half()
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        set_rates(optimizer, values)
        optimizer.step()


def set_rates(optimizer: Optimizer, values: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        for name, value in values.items():
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)
            elif name in group:
                group[name] = value


def states(optimizer: Optimizer) -> list[Tensor]:
    return [value for p in parameters(optimizer) for value in optimizer.state.get(p, {}).values()]


def assert_close(one: Optimizer, other: Optimizer, *, rtol: float = 3e-6, atol: float = 1e-6) -> None:
    pairs = list(zip(parameters(one), parameters(other), strict=True)) + list(
        zip(states(one), states(other), strict=True)
    )
    for p, q in pairs:
        torch.testing.assert_close(p.detach(), q.detach().to(p.dtype), rtol=rtol, atol=atol)
