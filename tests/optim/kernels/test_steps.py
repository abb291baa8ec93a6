"""The optimizers' kernels, in Triton's interpreter, against the float64 reference."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimizer_cases import (
    ONE_OF_EACH,
    RAGGED,
    RATES,
    STEPS,
    WITH_NUMBERS_AND_TENSORS,
    assert_close,
    groups,
    make,
    parameters,
    reference,
    states,
    take_steps,
)
from torch import Tensor, nn

from megabatch.optim.kernels import launch as optimizer_launch
from megabatch.optim.kernels.lamb import LambGroup, lamb_step
from megabatch.optim.kernels.lars import LarsGroup, lars_step
from megabatch.optim.kernels.rmsprop import RmspropGroup, rmsprop_step
from megabatch.optim.kernels.tables import CHUNK
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.sgd import SGD

pytestmark = pytest.mark.usefixtures("interpreter")


@WITH_NUMBERS_AND_TENSORS
def test_three_steps_on_ragged_tensors_are_those_of_the_equations(case: str, in_tensors: bool) -> None:
    sizes = RAGGED[1:3] if in_tensors else RAGGED
    fused, exact = make(case, groups(*sizes), in_tensors=in_tensors, fused=True), reference(case, *sizes)
    for optimizer in (fused, exact):
        take_steps(optimizer)
    assert_close(fused, exact)
    for name in ("step", "previous_lr"):
        if name in exact.param_groups[0]:
            assert float(fused.param_groups[0][name]) == pytest.approx(exact.param_groups[0][name])


def test_the_clip_with_a_trust_coefficient_of_zero_at_rate_zero_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(5))
    weight.grad = torch.ones(5)
    LARS([weight], lr=0.0, trust_coefficient=0.0, trust_clip=True, fused=True).step()
    assert weight.tolist() == [1.0] * 5


@ONE_OF_EACH
def test_equal_inputs_give_equal_bits(case: str) -> None:
    first, second = (make(case, groups(1025, 2 * CHUNK + 5), fused=True) for _ in range(2))
    for optimizer in (first, second):
        take_steps(optimizer)
    assert all(map(torch.equal, parameters(first) + states(first), parameters(second) + states(second)))


@ONE_OF_EACH
def test_zero_weights_zero_gradients_and_missing_gradients_step_as_the_equations_say(case: str) -> None:
    finals = []
    for dtype, backend in ((torch.float32, {"fused": True}), (torch.float64, {"foreach": False})):
        zero, still, untouched = (nn.Parameter(torch.full((5,), value, dtype=dtype)) for value in (0.0, 3.0, 7.0))
        zero.grad, still.grad = torch.ones_like(zero), torch.zeros_like(still)
        optimizer = make(
            case, [{"params": [zero, still, untouched]}, {"params": [nn.Parameter(torch.ones(2))]}], **backend
        )
        optimizer.step()
        assert untouched.tolist() == [7.0] * 5
        assert untouched not in optimizer.state
        finals.append([zero.detach(), still.detach()])
    for one, other in zip(*finals, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other.float())


def test_lamb_without_eps_is_not_affected_by_the_padding_past_a_tensor() -> None:
    fused, exact = (LAMB(groups(3, 1025, dtype=d), lr=0.1, eps=0.0, **backend) for d, backend in _ways())
    for optimizer in (fused, exact):
        take_steps(optimizer, STEPS[:1])
    assert_close(fused, exact)


def _ways() -> tuple[tuple[torch.dtype, dict[str, Any]], ...]:
    return (torch.float32, {"fused": True}), (torch.float64, {"foreach": False})


@ONE_OF_EACH
def test_16_bit_copies_are_the_rounded_weights_and_do_not_change_the_weights(case: str) -> None:
    param_groups = groups(3, 1025)
    copies = {
        p: torch.empty_like(p, dtype=torch.float16)
        for p in [*param_groups[0]["params"][1:], *param_groups[1]["params"]]
    }
    with_copies, without = make(case, param_groups, fused=True, copies=copies), make(case, groups(3, 1025), fused=True)
    for optimizer in (with_copies, without):
        take_steps(optimizer)
    assert all(map(torch.equal, parameters(with_copies), parameters(without)))
    for p, written in copies.items():
        assert torch.equal(written, p.half())


@ONE_OF_EACH
def test_16_bit_parameters_keep_their_state_in_float32(case: str) -> None:
    fused, plain = (make(case, groups(3, 1025, dtype=torch.float16), **w) for w in ({"fused": True}, {"foreach": True}))
    for optimizer in (fused, plain):
        take_steps(optimizer, STEPS[:2])
    assert {state.dtype for state in states(fused)} == {torch.float32}
    for p, q in zip(parameters(fused), parameters(plain), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-3, atol=1e-6)  # one unit in the last place


@ONE_OF_EACH
@RATES
def test_with_parameters_of_three_dtypes_in_two_groups_each_group_counts_the_step_once(
    case: str, in_tensors: bool
) -> None:
    """Only the last launch of a group, which need not be the last launch of all, overwrites the carried value."""

    def mixed() -> list[dict[str, Any]]:
        types = (torch.float32, torch.float16, torch.bfloat16)
        a, b, c = (groups(7, dtype=dtype)[0]["params"][0] for dtype in types)
        return [{"params": [a, b]}, {"params": [c]}]

    fused, plain = make(case, mixed(), in_tensors=in_tensors, fused=True), make(case, mixed(), foreach=False)
    for optimizer in (fused, plain):
        take_steps(optimizer)
    for name in ("step", "previous_lr"):
        for one, other in zip(fused.param_groups, plain.param_groups, strict=True):
            assert float(one.get(name, 0)) == pytest.approx(float(other.get(name, 0)))
    for p, q in zip(states(fused), states(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)  # gradients and weights are rounded to 8 bits


@ONE_OF_EACH
def test_memory_layouts_of_weight_and_gradient_may_differ_and_change_in_mid_run(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, first, second = torch.randn(3, 5, 3, 3, 3, generator=generator)
    last = torch.channels_last
    apart = torch.empty(136)[1:].view(5, 3, 3, 3).copy_(first)  # not at a multiple of 16 bytes
    results = []
    for layout, gradient in (
        (torch.contiguous_format, first),
        (last, first),
        (last, first.contiguous(memory_format=last)),
        (torch.contiguous_format, apart),
    ):
        parameter = nn.Parameter(weight.clone(memory_format=layout))
        optimizer = make(case, [{"params": [parameter]}], fused=True)
        parameter.grad = gradient
        optimizer.step()
        parameter.data = parameter.data.contiguous(memory_format=last)
        parameter.grad = second.contiguous()
        optimizer.step()
        results.append(parameter.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-7)


def test_gradients_at_new_addresses_are_read_from_there() -> None:
    parameter = nn.Parameter(torch.zeros(40))
    optimizer = SGD([parameter], lr=1.0, momentum=0.0, fused=True)
    kept = []
    for value in (1.0, 2.0):
        kept.append(torch.full((40,), value))
        parameter.grad = kept[-1]
        parameter.data.zero_()
        optimizer.step()
        assert parameter.tolist() == [-value] * 40


@ONE_OF_EACH
def test_a_state_dict_moves_a_run_between_backends(case: str) -> None:
    unbroken = make(case, groups(3, 1025), foreach=True)
    take_steps(unbroken, STEPS[:2])
    fused = make(case, groups(3, 1025), in_tensors=True, fused=True)
    back = make(case, groups(3, 1025), foreach=False)
    for other, saved in ((fused, unbroken), (back, fused)):
        for p, q in zip(parameters(other), parameters(unbroken), strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert fused.param_groups[0]["fused"]
    assert back.param_groups[0]["foreach"] is False
    for optimizer in (unbroken, fused, back):
        take_steps(optimizer, STEPS[2:], first=2)
    assert_close(fused, unbroken)
    assert_close(back, unbroken)


@ONE_OF_EACH
@RATES
def test_a_step_repeated_after_loading_the_state_before_it_gives_the_same_bits(case: str, in_tensors: bool) -> None:
    """Loading overwrites state in place, and resets values that the kernel updates on the device."""
    optimizer = make(case, groups(3, 1025), in_tensors=in_tensors, fused=True)
    take_steps(optimizer, STEPS[:2])
    saved = copy.deepcopy(optimizer.state_dict())
    weights, places = [p.detach().clone() for p in parameters(optimizer)], [s.data_ptr() for s in states(optimizer)]
    take_steps(optimizer, STEPS[2:], first=2)
    expected = [t.clone() for t in parameters(optimizer) + states(optimizer)]
    optimizer.load_state_dict(saved)
    for p, before in zip(parameters(optimizer), weights, strict=True):
        p.data.copy_(before)
    take_steps(optimizer, STEPS[2:], first=2)
    assert all(map(torch.equal, parameters(optimizer) + states(optimizer), expected))
    assert [s.data_ptr() for s in states(optimizer)] == places


def test_a_deep_copy_of_the_optimizer_is_independent() -> None:
    ours = LARS(groups(3), lr=1.0, fused=True)
    take_steps(ours, STEPS[:1])
    twin = copy.deepcopy(ours)
    before = [p.detach().clone() for p in parameters(ours)]
    take_steps(twin, STEPS[:1])
    assert all(map(torch.equal, parameters(ours), before))
    assert not any(map(torch.equal, parameters(twin), before))


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        ("lars outside sum", ["norms_kernel", "update_kernel"]),
        ("sgd outside", ["update_kernel"]),
        ("sgd inside", ["update_kernel"]),
        ("sgd inside_corrected", ["norms_kernel", "update_kernel"]),
        ("lamb", ["norms_kernel", "update_kernel"]),
        ("rmsprop", ["update_kernel"]),
    ],
)
def test_all_tensors_of_all_groups_are_updated_in_one_or_two_launches(
    case: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    load = optimizer_launch.load

    def counted(name: str) -> Any:
        module = load(name)

        class Counted:
            def __init__(self, kernel: str) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: Any) -> Callable[..., Any]:
                seen.append(self.kernel)
                return getattr(module, self.kernel)[grid]

        return SimpleNamespace(
            tl=module.tl, **{name: Counted(name) for name in ("norms_kernel", "update_kernel") if hasattr(module, name)}
        )

    monkeypatch.setattr(optimizer_launch, "load", counted)
    optimizer = make(case, groups(*RAGGED), in_tensors=True, fused=True)
    take_steps(optimizer, STEPS[:1])
    assert seen == launches


STEP_OF: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lars": (LarsGroup, lars_step, {}),
    "lamb": (LambGroup, lamb_step, {}),
    "rmsprop": (RmspropGroup, rmsprop_step, {"rmsprop_lr": 3e-4, "decay": 0.99, "eps": 1e-8}),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", STEP_OF)
def test_the_step_divides_16_bit_gradients_by_their_loss_scale(kind: str, backend: Any) -> None:
    """Gradients of another dtype than the weights, which torch.optim does not support."""
    kind_of_group, step, options = STEP_OF[kind]
    generator = torch.Generator().manual_seed(0)
    scaled = (1024 * 1e-2 * torch.randn(1025, generator=generator)).half()
    tensors = torch.rand(3, 1025, generator=generator)

    def group(gradient: Tensor, scale: Tensor | None, found_inf: Tensor | None = None) -> Any:
        rates = {name: torch.tensor(0.5) for name in (*kind_of_group.rates(), kind_of_group.carried) if name}
        rates |= {"step": torch.tensor(3.0, dtype=torch.float64)} if "step" in rates else {}
        lists = dict(zip(("weights", *kind_of_group.state_fields), ([t.clone()] for t in tensors), strict=False))
        return kind_of_group(
            gradients=[gradient], copies=[None], gradient_scale=scale, found_inf=found_inf, **lists, **rates, **options
        )

    carried, divided = group(scaled, torch.tensor(1 / 1024)), group(scaled.float() / 1024, None)
    step([carried], backend=backend)
    step([divided], backend="reference")
    for one, other in zip([carried.weights, *carried.states()], [divided.weights, *divided.states()], strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=5e-7)
    left_out = group(scaled, None, torch.ones(()))
    step([left_out], backend=backend)
    lists = [left_out.weights, *left_out.states()]
    assert all(torch.equal(one[0], other) for one, other in zip(lists, tensors, strict=False))


@ONE_OF_EACH
def test_a_tensor_without_elements_may_have_any_strides(case: str) -> None:
    empty, parameter = nn.Parameter(torch.empty_strided((2, 0), (5, 3))), nn.Parameter(torch.ones(3))
    optimizer = make(case, [{"params": [empty, parameter]}], fused=True)
    empty.grad, parameter.grad = torch.empty(2, 0), torch.ones(3)
    optimizer.step()
    assert bool((parameter < 1).all())
