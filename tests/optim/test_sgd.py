"""SGD is torch's where the rate is outside, and Goyal's correction makes the inside form equal to it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megabatch.optim.param_groups import param_groups
from megabatch.optim.sgd import SGD


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, rates: list[float]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = torch.randn(16, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 10, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("foreach", "torch_path"), [(None, {"fused": True}), (True, {"foreach": True}), (False, {"foreach": False})]
)
def test_the_rate_outside_is_torchs_sgd(foreach: bool | None, torch_path: dict[str, bool], nesterov: bool) -> None:
    """To the bit on the same kernels; the reference path rounds w - lr v twice, torch's once."""
    models = small_model(), small_model()
    values = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    ours = train(models[0], SGD(models[0].parameters(), lr=0.1, foreach=foreach, **values), rates=[0.1, 0.3, 0.2, 0.05])
    theirs = train(
        models[1],
        torch.optim.SGD(models[1].parameters(), lr=0.1, **torch_path, **values),
        rates=[0.1, 0.3, 0.2, 0.05],
    )
    for own, their in zip(ours, theirs, strict=True):
        if foreach is False:
            torch.testing.assert_close(own, their, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(own, their)


@given(rates=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=8), foreach=st.sampled_from([None, True, False]))
def test_goyals_correction_makes_the_inside_form_the_outside_form(rates: list[float], foreach: bool | None) -> None:
    finals = []
    for form in ("outside", "inside_corrected"):
        w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = SGD([w], lr=rates[0], weight_decay=0.01, momentum_form=form, foreach=foreach)
        for step, lr in enumerate(rates):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.tensor([0.3 + step, -0.1 * step], dtype=torch.float64)
            optimizer.step()
        finals.append(w.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-9, atol=1e-9)


def test_without_correction_the_inside_form_keeps_the_old_rates_history() -> None:
    """lr 1, then 10, g = 1: outside v = 1.9, w -= 19; inside v = 0.9 * 1 + 10, w -= 10.9."""
    finals = {}
    for form in ("outside", "inside"):
        w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = SGD([w], lr=1.0, momentum_form=form)
        for lr in (1.0, 10.0):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        finals[form] = w.item()
    assert finals["outside"] == pytest.approx(-1 - 19)
    assert finals["inside"] == pytest.approx(-1 - 10.9)


def test_the_key_adapt_of_a_group_has_no_meaning() -> None:
    models = small_model(), small_model()
    with_key = train(models[0], SGD(param_groups(models[0], weight_decay=1e-3), lr=0.1), rates=[0.1] * 3)
    groups: list[dict[str, Any]] = [
        {key: value for key, value in group.items() if key != "adapt"}
        for group in param_groups(models[1], weight_decay=1e-3)
    ]
    without_key = train(models[1], SGD(groups, lr=0.1), rates=[0.1] * 3)
    assert all(torch.equal(a, b) for a, b in zip(with_key, without_key, strict=True))


def test_no_momentum_is_plain_gradient_descent() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = SGD([w], lr=0.5, momentum=0.0)
    for _ in range(2):
        w.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
        optimizer.step()
    assert w.tolist() == [0.0, 3.0]
