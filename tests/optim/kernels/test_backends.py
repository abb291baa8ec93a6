"""Choice of a step's backend, reasons against the kernel, and steps that a GradScaler skips on the device."""

from typing import Any

import pytest
import torch
from optimizer_cases import (
    ONE_OF_EACH,
    STEPS,
    Optimizer,
    assert_close,
    groups,
    make,
    parameters,
    set_rates,
    states,
    take_steps,
)
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.optim.sgd import SGD

pytestmark = pytest.mark.usefixtures("interpreter")


@ONE_OF_EACH
def test_a_step_that_overflowed_changes_nothing_and_does_not_affect_the_next(case: str) -> None:
    """Under torch.amp.GradScaler: gradients contain the loss scale; one of them is infinite in the second step."""
    ours = make(case, groups(3, 1025), in_tensors=True, fused=True)
    without = make(case, groups(3, 1025), in_tensors=True, fused=True)
    take_steps(without)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10000)
    for number, values in enumerate([STEPS[0], STEPS[0], *STEPS[1:]]):
        overflows = number == 1
        set_rates(ours, {**values, "lr": 9.0} if overflows else values)
        before = [t.clone() for t in watched(ours)]
        for place, p in enumerate(parameters(ours)):
            generator = torch.Generator().manual_seed(1000 * max(0, number - 1) + place)
            p.grad = scaler.get_scale() * (0.1 * torch.randn(p.shape, generator=generator)).half().float()
        if overflows:
            parameters(ours)[1].grad[-1] = torch.inf
        scaler.scale(torch.zeros(()))  # creates the scale
        scaler.step(ours)
        scaler.update()
        unchanged = [torch.equal(*pair) for pair in zip(before, watched(ours), strict=False)]
        assert all(unchanged) is overflows
        assert scaler.get_scale() == (1024 if number == 0 else 512)
    assert not hasattr(ours, "found_inf")
    assert_close(ours, without, rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, watched(ours), watched(without))) or "previous_lr" not in ours.param_groups[0]


def watched(optimizer: Optimizer) -> list[Tensor]:
    """Weights, values that a step updates for the next, and state."""
    carried = [g[name] for g in optimizer.param_groups for name in ("step", "previous_lr") if name in g]
    return [*parameters(optimizer), *carried, *states(optimizer)]


def test_a_fused_step_does_not_divide_unscaled_gradients_by_the_scale_again() -> None:
    ours, plain = (SGD(groups(3, 1025), lr=torch.tensor(0.5), capturable=True, fused=True) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        p.grad, q.grad = torch.full_like(p, 8.0), torch.ones_like(q)
    scaler.unscale_(ours)
    scaler.step(ours)
    plain.step()
    assert all(map(torch.equal, parameters(ours), parameters(plain)))


def test_amp_scaling_is_supported_only_where_the_step_can_be_skipped_on_the_device() -> None:
    rate = torch.tensor(0.5)
    for values, able in (
        ({"lr": rate, "capturable": True, "fused": True}, True),
        ({"lr": rate, "capturable": True}, False),
        ({"lr": rate, "fused": True}, False),
        ({"lr": 0.5, "foreach": False}, False),
    ):
        optimizer = SGD(groups(3), **values)
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
        assert optimizer._step_supports_amp_scaling is able
    optimizer.found_inf = torch.ones(())
    with pytest.raises(UserError, match="cannot skip a step"):
        optimizer.step()


def weight(**values: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(4, **values))
    parameter.grad = torch.ones_like(parameter)
    return parameter


def gapped() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(6)[::2])
    parameter.grad = torch.ones(3)
    return parameter


@pytest.mark.parametrize(
    ("parameters_of", "values", "message"),
    [
        (lambda: [weight(dtype=torch.float64)], {}, r"a parameter is torch\.float64"),
        (lambda: [weight(), weight(dtype=torch.float64)], {}, r"a parameter is torch\.float64"),
        (lambda: [gapped()], {}, "has gaps"),
        (lambda: [weight()], {"lr": torch.tensor(0.1, dtype=torch.float64)}, r"lr is a torch\.float64 tensor"),
        (lambda: [weight()], {"momentum": torch.tensor(0.1).double()}, r"momentum is a torch\.float64 tensor"),
    ],
)
def test_the_error_names_the_reason_against_the_kernel(
    parameters_of: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SGD(parameters_of(), **{"lr": 0.1, **values}, fused=True).step()
    SGD(parameters_of(), **{"lr": 0.1, **values}).step()  # fused=None uses another backend


def test_selecting_two_backends_is_refused() -> None:
    with pytest.raises(UserError, match="select two backends"):
        SGD([weight()], lr=0.1, fused=True, foreach=True)


def test_the_error_names_a_cpu_without_the_interpreter_and_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from megabatch.optim.engine import fused

    monkeypatch.setattr(fused, "interprets", lambda: False)
    with pytest.raises(UserError, match="only under TRITON_INTERPRET=1"):
        SGD([weight()], lr=0.1, fused=True).step()
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    with pytest.raises(UserError, match="not installed"):
        SGD([weight()], lr=0.1, fused=True).step()


def test_a_copy_of_another_memory_layout_than_its_weight_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2, 3, 4, 5))
    parameter.grad = torch.ones_like(parameter)
    written = torch.ones(2, 3, 4, 5, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="different memory layouts"):
        SGD([parameter], lr=0.1, fused=True, copies={parameter: written}).step()
