"""Published implementations on the same inputs: the forms in which they agree with ours, and the differences."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megabatch.optim.groups import param_groups
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS

RATES = [2.0, 4.0, 3.0, 1.0]


def timm_optim(name: str) -> Any:
    """A module of timm.optim by its ours_optimizer name; timm's `__init__` is not run, since it imports torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    package = types.ModuleType("timm_optim_alone")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "optim")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)).double()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float] = RATES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs = torch.randn(20, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (20,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def lars(net: nn.Module, **values: Any) -> LARS:
    return LARS(param_groups(net, weight_decay=1e-2), lr=1.0, trust_coefficient=0.02, **values)


def timm_lars(net: nn.Module, **values: Any) -> torch.optim.Optimizer:
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in param_groups(net, weight_decay=1e-2)]
    values = {"momentum": 0.9, "trust_coeff": 0.02, "eps": 0.0, **values}
    optimizer: torch.optim.Optimizer = timm_optim("lars").Lars(groups, lr=1.0, **values)
    return optimizer


def published_lars(net: nn.Module) -> torch.optim.Optimizer:
    package = pytest.importorskip("pytorch_optimizer")
    optimizer: torch.optim.Optimizer = package.LARS(
        net.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-2, trust_coefficient=0.02
    )
    return optimizer


@pytest.mark.parametrize("foreach", [False, True])
def test_timms_lars_is_our_inside_corrected_form(foreach: bool) -> None:
    """v = m v + ratio u, w -= lr v: multiplying v by lr_t gives m lr_t / lr_(t-1) and lr_t ratio u."""
    ours, theirs = model(), model()
    assert equal(
        train(ours, lars(ours, momentum_form="inside_corrected")), train(theirs, timm_lars(theirs, foreach=foreach))
    )


def test_pytorch_optimizers_lars_is_our_inside_corrected_form() -> None:
    ours, theirs = model(), model()
    assert equal(train(ours, lars(ours, momentum_form="inside_corrected")), train(theirs, published_lars(theirs)))


@pytest.mark.parametrize("form", ["outside", "inside"])
@pytest.mark.parametrize("make", [timm_lars, published_lars])
def test_neither_has_the_other_two_forms(make: Any, form: Any) -> None:
    """`outside`: the ratio moves the whole history. `inside`: a rate that jumps leaves the history alone."""
    ours, theirs = model(), model()
    assert not equal(train(ours, lars(ours, momentum_form=form)), train(theirs, make(theirs)))


@pytest.mark.parametrize("make", [timm_lars, published_lars])
def test_at_a_constant_rate_both_are_our_inside_form(make: Any) -> None:
    ours, theirs = model(), model()
    rates = [2.0] * 4
    assert equal(train(ours, lars(ours, momentum_form="inside"), rates), train(theirs, make(theirs), rates))


def test_timm_scales_its_clipped_rate_down_again_for_layers_of_zero_norm() -> None:
    """Its clip divides the fallback ratio 1 by lr too, so a fresh layer moves by at most |g| at any rate."""
    moved = []
    for make in (lambda w: LARS([w], lr=4.0, trust_clip=True), _timm_clipped):
        w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        w.grad = torch.ones(2, dtype=torch.float64)
        make(w).step()
        moved.append(w[0].item())
    assert moved == [-4.0, -1.0]


def _timm_clipped(w: nn.Parameter) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = timm_optim("lars").Lars([w], lr=4.0, trust_clip=True, always_adapt=True)
    return optimizer


def test_timm_does_not_adapt_a_group_without_weight_decay() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    timm_optim("lars").Lars([w], lr=0.5, weight_decay=0.0).step()
    assert w.tolist() == [1.5, 2.0]  # ours, with eta = 0.02: 3 - 0.5 * 0.02 * 3


def test_pytorch_optimizer_overwrites_the_gradients_and_ours_does_not() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    kept = []
    for make in (lambda p: LARS(p, lr=0.1, weight_decay=0.1), lambda p: package.LARS(p, lr=0.1, weight_decay=0.1)):
        w = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        w.grad = torch.full((2, 2), 3.0, dtype=torch.float64)
        make([w]).step()
        kept.append(bool((w.grad == 3.0).all()))
    assert kept == [True, False]


@pytest.mark.parametrize("trust_clip", [False, True])
def test_timms_lamb_without_gradient_clipping_is_ours(trust_clip: bool) -> None:
    ours, theirs = model(), model()
    groups = [{**g, "always_adapt": g["adapt"]} for g in param_groups(theirs, weight_decay=1e-2)]
    timm = timm_optim("lamb").Lamb(groups, lr=1.0, eps=1e-6, max_grad_norm=None, trust_clip=trust_clip)
    ours_optimizer = LAMB(param_groups(ours, weight_decay=1e-2), lr=1.0, eps=1e-6, trust_clip=trust_clip)
    rates = [0.02, 0.05, 0.03, 0.01]
    assert equal(train(ours, ours_optimizer, rates), train(theirs, timm, rates))


def test_pytorch_optimizers_lamb_differs_in_bias_correction() -> None:
    """Its first step has m = 0.1 g, n = 0.001 g^2, so u = 3.16 sign(g) and not sign(g); both are then normalised."""
    package = pytest.importorskip("pytorch_optimizer")
    ours, theirs = model(), model()
    ours_optimizer = LAMB(param_groups(ours, weight_decay=1e-2), lr=1.0)
    published = package.Lamb(theirs.parameters(), lr=1.0, weight_decay=1e-2, weight_decouple=False)
    rates = [0.02, 0.05, 0.03, 0.01]
    assert not equal(train(ours, ours_optimizer, rates), train(theirs, published, rates))
