"""RMSprop warm-up: the share of SGD, the blended step, and exactly SGD afterwards."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megabatch.errors import UserError
from megabatch.optim.engine import multi_tensor
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.schedule import sgd_share
from megabatch.optim.sgd import SGD

BACKENDS = pytest.mark.parametrize("foreach", [None, True, False])


@pytest.mark.parametrize(
    ("epoch", "share"), [(0, 0.00916), (5, 0.0677), (7.5, 0.184), (10, 0.5), (11.25, 0.75), (12.5, 1), (40, 1)]
)
def test_the_share_of_sgd_has_the_published_values(epoch: float, share: float) -> None:
    assert sgd_share(epoch) == pytest.approx(share, rel=2e-3)


@given(epoch=st.floats(0, 90), center=st.floats(1, 30), period=st.floats(0.5, 20))
def test_the_share_never_falls_and_never_jumps(epoch: float, center: float, period: float) -> None:
    """Its slope is at most 1 / period; the branch as usually quoted overshoots to 1.5 and then drops to 1."""
    step = 1e-4
    here, next_ = (sgd_share(e, center, period) for e in (epoch, epoch + step))
    assert 0 < here <= next_ <= 1
    assert next_ - here <= step / period * (1 + 1e-9)


def test_the_slope_is_continuous_at_the_center() -> None:
    left = (sgd_share(10.0) - sgd_share(10.0 - 1e-6)) / 1e-6
    right = (sgd_share(10.0 + 1e-6) - sgd_share(10.0)) / 1e-6
    assert left == pytest.approx(right, rel=1e-4)
    assert right == pytest.approx(1 / 5)


@BACKENDS
def test_two_blended_steps_match_the_equation_without_bias_correction(foreach: bool | None) -> None:
    lr, m, decay, eps, mu2, eta = 0.5, 0.9, 0.1, 1e-3, 0.9, 0.02
    w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = RMSpropWarmup(
        [w], lr=lr, momentum=m, weight_decay=decay, rmsprop_lr=eta, decay=mu2, eps=eps, foreach=foreach
    )
    weight, v, n = 3.0, 0.0, 0.0
    for epoch, gradient in ((9.0, 1.5), (9.5, -0.5)):
        optimizer.set_epoch(epoch)
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        alpha = 0.5 * math.exp(2 * (epoch - 10) / 5)
        u = gradient + decay * weight
        n = mu2 * n + (1 - mu2) * u * u
        v = m * v + (alpha + (1 - alpha) * eta / lr / (math.sqrt(n) + eps)) * u
        weight -= lr * v
        assert w.item() == pytest.approx(weight, rel=1e-12)


@BACKENDS
def test_rmsprops_part_of_the_step_does_not_depend_on_the_rate(foreach: bool | None) -> None:
    """One step from rest at alpha = 0 moves each weight by rmsprop_lr / sqrt(1 - mu2), whatever lr is."""
    for lr in (0.01, 6.4):
        w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        optimizer = RMSpropWarmup([w], lr=lr, eps=0.0, foreach=foreach)
        optimizer.param_groups[0]["sgd_share"] = 0.0
        w.grad = torch.tensor([3.0, -0.01], dtype=torch.float64)
        optimizer.step()
        moved = torch.tensor([-1.0, 1.0], dtype=torch.float64) * 3e-4 / 0.1
        torch.testing.assert_close(w.data - 1, moved)


@BACKENDS
def test_once_the_share_is_one_it_is_sgd_to_the_bit(foreach: bool | None) -> None:
    """A model trained through the transition, and its copy continued by SGD from the same buffers."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(8, 600), nn.ReLU(), nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 3)) for _ in "ab"
    ]
    models[1].load_state_dict(models[0].state_dict())
    values: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "foreach": foreach}
    warmup = RMSpropWarmup(models[0].parameters(), **values)
    generator = torch.Generator().manual_seed(1)

    def gradients(model: nn.Module) -> None:
        inputs = torch.randn(16, 8, generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), torch.arange(16) % 3).backward()

    for epoch in range(10, 13):  # 12 < 12.5: still blended
        warmup.set_epoch(epoch)
        assert warmup.param_groups[0]["sgd_share"] < 1
        gradients(models[0])
        warmup.step()
    models[1].load_state_dict(models[0].state_dict())
    sgd = SGD(models[1].parameters(), **values)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        sgd.state[other]["momentum_buffer"] = warmup.state[one]["momentum_buffer"].clone()
    for step, epoch in enumerate((12.5, 13.0, 41.0, 71.0)):
        warmup.set_epoch(epoch)
        for optimizer in (warmup, sgd):
            optimizer.param_groups[0]["lr"] = (0.05, 0.05, 0.0075, 0.001)[step]
        state = generator.get_state()
        gradients(models[0])
        generator.set_state(state)
        gradients(models[1])
        warmup.step()
        sgd.step()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other)


def test_all_backends_agree_on_large_and_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "PART_ELEMENTS", 1000)
    finals = []
    for foreach in (False, True):
        generator = torch.Generator().manual_seed(0)
        shapes = [(70, 50), (8, 3, 3, 3), (5,)]
        tensors = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        optimizer = RMSpropWarmup(tensors, lr=0.1, weight_decay=0.01, foreach=foreach)
        for epoch in (0.0, 9.0, 11.0, 13.0):
            optimizer.set_epoch(epoch)
            for p in tensors:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        finals.append(tensors)
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_tensor_rate_gives_the_same_step_as_a_number() -> None:
    finals = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        optimizer = RMSpropWarmup([w], lr=lr)
        for epoch in (5.0, 20.0):
            optimizer.set_epoch(epoch)
            w.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
            optimizer.step()
        finals.append(w.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-12, atol=0)


def test_save_and_load_within_the_transition_changes_no_bit(tmp_path: Any) -> None:
    def run(w: nn.Parameter, optimizer: RMSpropWarmup, epochs: range) -> None:
        for epoch in epochs:
            optimizer.set_epoch(epoch)
            w.grad = torch.tensor([0.3 + epoch, -0.2])
            optimizer.step()

    def fresh() -> tuple[nn.Parameter, RMSpropWarmup]:
        w = nn.Parameter(torch.tensor([3.0, 4.0]))
        return w, RMSpropWarmup([w], lr=0.1)

    whole, optimizer = fresh()
    run(whole, optimizer, range(8, 15))
    first, optimizer = fresh()
    run(first, optimizer, range(8, 11))
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    second, optimizer = fresh()
    second.data.copy_(first.detach())
    optimizer.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    run(second, optimizer, range(11, 15))
    assert torch.equal(second, whole)


def test_a_rate_of_zero_is_refused_while_rmsprop_has_a_share() -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = RMSpropWarmup([w], lr=0.0)
    with pytest.raises(UserError, match=r"lr=0\.1 works"):
        optimizer.step()
    optimizer.set_epoch(13.0)
    optimizer.step()
    assert w.tolist() == [1, 1]


def test_a_period_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="period_epochs=0 was given"):
        sgd_share(3.0, period_epochs=0)
