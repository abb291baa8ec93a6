"""SGD equals torch's with the rate outside, and Goyal's correction makes the inside form equal to it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megabatch.errors import UserError
from megabatch.optim.groups import param_groups
from megabatch.optim.sgd import SGD


def conv_model() -> nn.Module:
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
def test_with_the_rate_outside_it_is_torchs_sgd(
    foreach: bool | None, torch_path: dict[str, bool], nesterov: bool
) -> None:
    """Bit for bit on the same kernels; the reference rounds w - lr v twice, torch once."""
    models = conv_model(), conv_model()
    values = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    ours = train(models[0], SGD(models[0].parameters(), lr=0.1, foreach=foreach, **values), rates=[0.1, 0.3, 0.2, 0.05])
    theirs = train(
        models[1],
        torch.optim.SGD(models[1].parameters(), lr=0.1, **torch_path, **values),
        rates=[0.1, 0.3, 0.2, 0.05],
    )
    for our, their in zip(ours, theirs, strict=True):
        if foreach is False:
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(our, their)


@given(
    rates=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=8),
    foreach=st.sampled_from([None, True, False]),
    nesterov=st.booleans(),
)
def test_goyals_correction_makes_the_inside_form_the_outside_form(
    rates: list[float], foreach: bool | None, nesterov: bool
) -> None:
    finals = []
    for form in ("outside", "inside_corrected"):
        w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = SGD([w], lr=rates[0], weight_decay=0.01, momentum_form=form, foreach=foreach, nesterov=nesterov)
        for step, lr in enumerate(rates):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.tensor([0.3 + step, -0.1 * step], dtype=torch.float64)
            optimizer.step()
        finals.append(w.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("form", ["outside", "inside_corrected"])
def test_nesterov_looks_ahead_by_the_uncorrected_momentum(form: Any, foreach: bool | None) -> None:
    """Outside: v = 0.9 v + g, w -= lr (g + 0.9 v). The third rate is ten times the second."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([w], lr=0.1, nesterov=True, momentum_form=form, foreach=foreach)
    weights = []
    for lr, gradient in zip([0.1, 0.1, 1.0, 1.0, 0.1], [1.0, 0.5, -0.2, 0.3, 0.1], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
        weights.append(w.item())
    assert weights == pytest.approx([0.81, 0.634, -0.12, -1.5486, -1.669174], rel=1e-12)


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


def test_the_key_adapt_of_a_group_is_ignored() -> None:
    models = conv_model(), conv_model()
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


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("foreach", [None, True])
def test_it_continues_from_the_state_of_torchs_sgd(steps_before: int, foreach: bool | None) -> None:
    models = conv_model(), conv_model()
    theirs = torch.optim.SGD(models[0].parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, foreach=True)
    train(models[0], theirs, rates=[0.1] * steps_before)
    models[1].load_state_dict(models[0].state_dict())
    ours = SGD(models[1].parameters(), lr=1.0, foreach=foreach)
    ours.load_state_dict(theirs.state_dict())
    pairs = zip(train(models[0], theirs, rates=[0.2, 0.1]), train(models[1], ours, rates=[0.2, 0.1]), strict=True)
    for their, our in pairs:
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-7)
    assert ours.param_groups[0]["momentum_form"] == "outside"
    assert ours.param_groups[0]["foreach"] is foreach


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"dampening": 0.5}, {}, "needed: dampening=0.0"),
        ({"maximize": True}, {}, "needed: maximize=False"),
        ({}, {"momentum_form": "inside"}, "momentum_form='outside' works"),
    ],
)
def test_a_state_of_torchs_sgd_that_means_something_else_is_refused_before_anything_is_loaded(
    theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    saved = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.8, **theirs).state_dict()
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.5, **ours)
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.5, 0.9)
