"""LAMB against its equations."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from megabatch.errors import UserError
from megabatch.optim.engine import multi_tensor
from megabatch.optim.lamb import LAMB

BACKENDS = pytest.mark.parametrize("foreach", [None, True, False])


@BACKENDS
def test_the_first_step_is_the_gradients_sign_with_decay_normalised_to_the_weights_norm(foreach: bool | None) -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    w.grad = torch.tensor([2.0, -5.0], dtype=torch.float64)
    LAMB([w], lr=0.1, eps=0.0, weight_decay=0.1, foreach=foreach).step()
    u = (1.3, -0.6)  # sign(g) + 0.1 w
    rate = 0.1 * 5 / math.hypot(*u)
    torch.testing.assert_close(w.data, torch.tensor([3 - rate * u[0], 4 - rate * u[1]], dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize("adapt", [True, False])
def test_three_steps_match_the_equations(adapt: bool, foreach: bool | None) -> None:
    """Two beta, a rate and a decay that all differ, written out with plain floats."""
    beta1, beta2, eps, decay = 0.8, 0.95, 0.01, 0.1
    weights, m, n = [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]
    w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    optimizer = LAMB(
        [{"params": [w], "adapt": adapt}],
        lr=1.0,
        momentum=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=decay,
        foreach=foreach,
    )
    for time, (gradient, lr) in enumerate([((2.0, -5.0), 0.1), ((0.5, 1.0), 0.2), ((-1.0, 3.0), 0.05)], start=1):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, gradient, strict=True)]
        n = [beta2 * a + (1 - beta2) * g * g for a, g in zip(n, gradient, strict=True)]
        u = [
            (a / (1 - beta1**time)) / (math.sqrt(b / (1 - beta2**time)) + eps) + decay * x
            for a, b, x in zip(m, n, weights, strict=True)
        ]
        ratio = math.hypot(*weights) / math.hypot(*u) if adapt else 1.0
        weights = [x - lr * ratio * y for x, y in zip(weights, u, strict=True)]
    torch.testing.assert_close(w.data, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=0)


@BACKENDS
def test_the_clip_bounds_the_ratio_by_one(foreach: bool | None) -> None:
    for norm, ratio in ((5.0, 1.0), (0.5, 0.5 / math.sqrt(2))):  # |u| = sqrt 2
        w = nn.Parameter(torch.tensor([0.6 * norm, 0.8 * norm], dtype=torch.float64))
        before = w.detach().clone()
        w.grad = torch.tensor([2.0, 3.0], dtype=torch.float64)
        LAMB([w], lr=0.1, eps=0.0, trust_clip=True, foreach=foreach).step()
        torch.testing.assert_close(before - w.data, torch.full((2,), 0.1 * ratio, dtype=torch.float64))


@BACKENDS
def test_a_layer_that_starts_at_zero_moves(foreach: bool | None) -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    w.grad = torch.tensor([2.0, -3.0], dtype=torch.float64)
    LAMB([w], lr=0.1, eps=0.0, foreach=foreach).step()
    torch.testing.assert_close(w.data, torch.tensor([-0.1, 0.1], dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_and_load_in_mid_run_changes_no_bit(dtype: torch.dtype, foreach: bool | None, tmp_path: Any) -> None:
    def run(w: nn.Parameter, optimizer: LAMB, steps: range) -> None:
        for step in steps:
            w.grad = torch.tensor([0.3 + step, -0.2], dtype=dtype)
            optimizer.step()

    def fresh() -> tuple[nn.Parameter, LAMB]:
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
        return w, LAMB([w], lr=0.03, weight_decay=0.1, foreach=foreach)

    whole, optimizer = fresh()
    run(whole, optimizer, range(6))
    first, optimizer = fresh()
    run(first, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    second, optimizer = fresh()
    second.data.copy_(first.detach())
    optimizer.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    run(second, optimizer, range(3, 6))
    assert optimizer.state[second]["exp_avg_sq"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(second, whole)


@BACKENDS
def test_a_tensor_rate_gives_the_same_step_as_a_number(foreach: bool | None) -> None:
    finals = []
    tensor = torch.tensor(0.05, dtype=torch.float64)
    for lr, capturable in ((0.05, False), (tensor, False), (tensor, True)):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        groups = [w, nn.Parameter(torch.ones(1))]
        optimizer = LAMB(groups, lr=lr, weight_decay=0.1, foreach=foreach, capturable=capturable)
        for gradient in (1.0, -0.5):
            w.grad = torch.full((2,), gradient, dtype=torch.float64)
            optimizer.step()
        finals.append(w.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(finals[2], finals[0], rtol=1e-12, atol=0)


def test_all_backends_agree_on_large_and_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "PART_ELEMENTS", 1000)
    finals = []
    for foreach in (False, True):
        generator = torch.Generator().manual_seed(0)
        shapes = [(70, 50), (8, 3, 3, 3), (5,)]
        tensors = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        optimizer = LAMB(tensors, lr=0.1, weight_decay=0.01, foreach=foreach)
        for _ in range(3):
            for p in tensors:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        finals.append(tensors)
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentum": 1.0}, "momentum=1.0 was given"),
        ({"beta2": 1.0}, "beta2=1.0 was given"),
        ({"eps": -1.0}, "eps=-1.0 was given"),
        ({"lr": -1.0}, "lr=-1.0 was given"),
        ({"capturable": True}, "capturable=True was given with a float rate"),
    ],
)
def test_invalid_values_are_refused_with_an_example(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LAMB([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **values})
