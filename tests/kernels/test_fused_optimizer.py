"""The two-launch LARS against `megabatch.optim.LARS`: Triton's interpreter, and the reference that runs on a CPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.kernels import FusedLARS
from megabatch.kernels.optimizer_tables import CHUNK
from megabatch.optim import LARS

FORMS = ("outside", "inside", "inside_corrected")
DENOMINATORS = ("sum", "update", "gradient")
RAGGED = (1, 1025, CHUNK + 5)
RATES = (0.3, 0.6, 0.2)
DECAY = 0.01
Groups = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("interpreter")


def groups(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Groups:
    """Tensors that adapt and decay, and one that does neither."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))

    return [
        {"params": [parameter(size) for size in sizes], "weight_decay": DECAY},
        {"params": [parameter(257)], "weight_decay": 0.0, "adapt": False},
    ]


def parameters(own: Groups | torch.optim.Optimizer) -> list[nn.Parameter]:
    own = own.param_groups if isinstance(own, torch.optim.Optimizer) else own
    return [parameter for group in own for parameter in group["params"]]


def take_steps(optimizer: torch.optim.Optimizer, *, rates: tuple[float, ...] = RATES) -> None:
    """Steps on gradients that depend on the step and the place alone, in the parameters' type."""
    for number, rate in enumerate(rates):
        for place, parameter in enumerate(parameters(optimizer)):
            generator = torch.Generator().manual_seed(1000 * number + place)
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (0.1 * gradient).to(parameter.dtype)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        optimizer.step()


def assert_alike(one: torch.optim.Optimizer, other: torch.optim.Optimizer, *, rtol: float, atol: float) -> None:
    for p, q in zip(parameters(one), parameters(other), strict=True):
        torch.testing.assert_close(p.detach(), q.detach().to(p.dtype), rtol=rtol, atol=atol)
        buffers = one.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        torch.testing.assert_close(buffers[0], buffers[1].to(buffers[0].dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("form", "denominator"), list(zip(FORMS, DENOMINATORS, strict=True)))
def test_three_steps_on_ragged_tensors_are_those_of_lars(form: Any, denominator: Any) -> None:
    values = {"momentum_form": form, "denominator": denominator, "trust_coefficient": 0.02, "eps": 1e-3}
    plain, exact = groups(*RAGGED), groups(*RAGGED, dtype=torch.float64)
    ours = FusedLARS(copy.deepcopy(plain), lr=1.0, backend="triton", **values)
    lars, reference = LARS(plain, lr=1.0, **values), LARS(exact, lr=1.0, **values)
    for q, p in zip(parameters(exact), parameters(plain), strict=True):
        q.data.copy_(p.data)
    for optimizer in (ours, lars, reference):
        take_steps(optimizer)
    assert_alike(ours, lars, rtol=2e-6, atol=1e-6)
    assert_alike(ours, reference, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_a_rate_in_a_tensor_is_read_by_the_step_and_remembered_in_place(form: Any, backend: Any) -> None:
    own = groups(3, 1025)
    rate = torch.tensor(1.0)
    ours = FusedLARS(copy.deepcopy(own), lr=rate, momentum_form=form, trust_coefficient=0.02, backend=backend)
    remembered = ours.param_groups[0]["previous_lr"]
    lars = LARS(own, lr=torch.tensor(1.0), momentum_form=form, trust_coefficient=0.02)
    for optimizer in (ours, lars):
        take_steps(optimizer)
    assert_alike(ours, lars, rtol=2e-6, atol=1e-6)
    assert ours.param_groups[0]["previous_lr"] is remembered
    assert float(remembered) == pytest.approx(RATES[-1] if form == "inside_corrected" else 0.0)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_16_bit_copies_are_the_rounded_weights_and_the_weights_are_not_changed_by_them(backend: Any) -> None:
    own = groups(3, 1025)
    copies = {p: torch.empty_like(p, dtype=torch.float16) for p in parameters(own)[1:]}
    with_copies = FusedLARS(own, lr=1.0, copies=copies, backend=backend)
    without = FusedLARS(groups(3, 1025), lr=1.0, backend=backend)
    for optimizer in (with_copies, without):
        take_steps(optimizer)
    for p, q in zip(parameters(with_copies), parameters(without), strict=True):
        assert torch.equal(p, q)
    for p, written in copies.items():
        assert torch.equal(written, p.half())


@pytest.mark.parametrize("form", FORMS)
def test_a_run_moves_between_lars_and_ours_by_its_state_dict(form: Any) -> None:
    values = {"momentum_form": form, "trust_coefficient": 0.02}
    unbroken = LARS(groups(3, 1025), lr=1.0, **values)
    take_steps(unbroken, rates=(0.3, 0.6))
    before = copy.deepcopy(unbroken.state_dict())
    for backend in ("triton", "reference"):
        own = groups(3, 1025)
        for p, q in zip(parameters(own), parameters(unbroken), strict=True):
            p.data.copy_(q.data)
        ours = FusedLARS(own, lr=1.0, backend=backend, **values)
        ours.load_state_dict(before)
        back = LARS(copy.deepcopy(own), lr=1.0, **values)
        back.load_state_dict(ours.state_dict())
        take_steps(ours, rates=(0.2,))
        take_steps(back, rates=(0.2,))
        assert_alike(ours, back, rtol=2e-6, atol=1e-6)
        assert ours.state_dict()["param_groups"] == back.state_dict()["param_groups"]


def test_loading_overwrites_a_rate_in_place_and_keeps_momentum_in_float32() -> None:
    own = groups(3, dtype=torch.bfloat16)
    rate = torch.tensor(1.0)
    ours = FusedLARS(own, lr=rate)
    take_steps(ours, rates=(0.3,))
    saved = copy.deepcopy(ours.state_dict())
    take_steps(ours, rates=(0.7,))
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.3)
    for number, p in enumerate(parameters(ours)):
        assert torch.equal(ours.state[p]["momentum_buffer"], saved["state"][number]["momentum_buffer"])
        assert ours.state[p]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_on_a_cpu_the_reference_is_lars_also_in_float64(form: Any) -> None:
    own = groups(3, 1025, dtype=torch.float64)
    values = {"momentum_form": form, "nesterov": True, "denominator": "update", "trust_coefficient": 0.02}
    ours, lars = FusedLARS(copy.deepcopy(own), lr=1.0, **values), LARS(own, lr=1.0, **values)
    for optimizer in (ours, lars):
        take_steps(optimizer)
    assert_alike(ours, lars, rtol=1e-12, atol=1e-14)


def test_a_copy_of_the_optimizer_goes_on_alone() -> None:
    ours = FusedLARS(groups(3), lr=1.0, backend="triton")
    take_steps(ours, rates=(0.3,))
    twin = copy.deepcopy(ours)
    before = [p.detach().clone() for p in parameters(ours)]
    take_steps(twin, rates=(0.3,))
    assert all(map(torch.equal, parameters(ours), before))
    assert not any(map(torch.equal, parameters(twin), before))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": torch.ones(2)}, "lr has 2 elements"),
        ({"lr": 1.0, "momentum": 1.0}, "momentum=1.0"),
        ({"lr": 1.0, "momentum_form": "middle"}, "needed one of outside"),
        ({"lr": 1.0, "denominator": "none"}, "needed one of sum"),
        ({"lr": 1.0, "capturable": True}, "float rate"),
        ({"lr": 1.0, "nesterov": True, "momentum": 0.0}, "does nothing"),
    ],
)
def test_values_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FusedLARS([nn.Parameter(torch.ones(3))], **values)


def test_tensors_the_kernel_cannot_take_are_named() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with pytest.raises(UserError, match=r"lr is a torch.float64 tensor"):
        FusedLARS([weight], lr=torch.tensor(0.1, dtype=torch.float64), backend="triton").step()
    gapped = nn.Parameter(torch.ones(6)[::2])
    gapped.grad = torch.ones(3)
    with pytest.raises(UserError, match="with gaps"):
        FusedLARS([gapped], lr=0.1, backend="triton").step()
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="dense real gradients"):
        FusedLARS(embedding.parameters(), lr=0.1).step()
