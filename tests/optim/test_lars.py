"""LARS against numbers computed by hand, its backends against each other, and its properties."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megabatch.errors import UserError
from megabatch.optim.engine import multi_tensor
from megabatch.optim.groups import param_groups
from megabatch.optim.lars import LARS
from megabatch.optim.sgd import SGD

BACKENDS = pytest.mark.parametrize("foreach", [None, True, False])
FORMS = ("outside", "inside", "inside_corrected")


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def step_with(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: tuple[float, ...], **rates: Any
) -> None:
    weight.grad = torch.tensor(gradient, dtype=weight.dtype)
    for group in optimizer.param_groups:
        group.update(rates)
    optimizer.step()


@BACKENDS
@pytest.mark.parametrize(
    ("form", "buffer", "weights"),
    [
        # Step 1, lr 10: |w| = 5, |g| = 2, beta |w| = 0.5, ratio = 0.01 * 5 / 2.5 = 0.02, u = (1.5, 2).
        # Step 2, lr 20: |w| = 4.5, |g| = 2.55, beta |w| = 0.45, ratio = 0.01 * 4.5 / 3 = 0.015, u = (1.8, 2.4).
        ("outside", (3.15, 4.2), (1.755, 2.34)),  # v = 0.9 (1.5, 2) + u; w = (2.7, 3.6) - 0.3 v
        ("inside", (0.81, 1.08), (1.89, 2.52)),  # v = 0.9 (0.3, 0.4) + 0.3 u; w = (2.7, 3.6) - v
        ("inside_corrected", (1.08, 1.44), (1.62, 2.16)),  # v = 0.9 (20 / 10) (0.3, 0.4) + 0.3 u
    ],
)
def test_two_steps_with_a_rate_that_doubles_match_the_equations(
    form: Any, buffer: tuple[float, ...], weights: tuple[float, ...], foreach: bool | None
) -> None:
    w = parameter(3, 4)
    optimizer = LARS(
        [w], lr=10.0, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01, momentum_form=form, foreach=foreach
    )
    step_with(optimizer, w, (1.2, 1.6))
    torch.testing.assert_close(w.data, torch.tensor([2.7, 3.6], dtype=torch.float64))
    step_with(optimizer, w, (1.53, 2.04), lr=20.0)
    torch.testing.assert_close(optimizer.state[w]["momentum_buffer"], torch.tensor(buffer, dtype=torch.float64))
    torch.testing.assert_close(w.data, torch.tensor(weights, dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize("form", ["outside", "inside"])
def test_nesterov_looks_one_momentum_ahead(form: Any, foreach: bool | None) -> None:
    w = parameter(3, 4)
    optimizer = LARS(
        [w], lr=10.0, momentum=0.5, trust_coefficient=0.01, nesterov=True, momentum_form=form, foreach=foreach
    )
    step_with(optimizer, w, (3.0, 4.0))  # ratio = 0.01; v = g, direction = g + 0.5 v = 1.5 g, w -= 0.1 * 1.5 g
    torch.testing.assert_close(w.data, torch.tensor([2.55, 3.4], dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize(
    ("denominator", "divisor"),
    [
        ("sum", math.hypot(6.5, 4) + 0.5 * 5 + 0.25),
        ("update", 10 + 0.25),  # u = (6.5, 4) + 0.5 (3, 4) = (8, 6)
        ("gradient", math.hypot(6.5, 4) + 0.25),
    ],
)
def test_each_denominator_divides_as_its_equation_says(denominator: Any, divisor: float, foreach: bool | None) -> None:
    w = parameter(3, 4)
    optimizer = LARS(
        [w], lr=2.0, weight_decay=0.5, trust_coefficient=0.01, eps=0.25, denominator=denominator, foreach=foreach
    )
    step_with(optimizer, w, (6.5, 4.0))
    rate = 2.0 * 0.01 * 5 / divisor
    torch.testing.assert_close(w.data, torch.tensor([3 - rate * 8, 4 - rate * 6], dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize("denominator", ["sum", "update", "gradient"])
def test_a_zero_weight_or_gradient_steps_as_plain_sgd(denominator: Any, foreach: bool | None) -> None:
    zero, still = parameter(0, 0), parameter(3, 4)
    optimizer = LARS([zero, still], lr=0.5, denominator=denominator, foreach=foreach)
    zero.grad, still.grad = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    assert zero.tolist() == [-0.5, -0.5]
    assert still.tolist() == [3, 4]


@BACKENDS
def test_the_clip_bounds_a_layers_rate_by_the_global_rate(foreach: bool | None) -> None:
    # |w| / |g| = 50, so ratio = 0.01 * 50 = 0.5: above lr = 0.1, below lr = 2.
    for lr, rate in ((0.1, 0.1), (2.0, 0.5)):
        w = parameter(30, 40)
        step_with(LARS([w], lr=lr, trust_coefficient=0.01, trust_clip=True, foreach=foreach), w, (0.6, 0.8))
        torch.testing.assert_close(w.data, torch.tensor([30 - rate * 0.6, 40 - rate * 0.8], dtype=torch.float64))


@BACKENDS
def test_the_clip_with_a_trust_coefficient_of_zero_at_rate_zero_moves_nothing(foreach: bool | None) -> None:
    w = parameter(3, 4)
    optimizer = LARS([w], lr=0.0, trust_coefficient=0.0, trust_clip=True, foreach=foreach)
    step_with(optimizer, w, (1, 1))
    assert w.tolist() == [3, 4]


def test_the_clip_leaves_layers_of_zero_norm_at_ratio_one() -> None:
    w = parameter(0, 0)
    step_with(LARS([w], lr=4.0, trust_clip=True), w, (1, 1))
    assert w.tolist() == [-4, -4]


@BACKENDS
def test_excluded_groups_are_plain_momentum_sgd_at_the_same_rate(foreach: bool | None) -> None:
    adapted, plain, reference = parameter(3, 4), parameter(1, 2), parameter(1, 2)
    groups = [{"params": [adapted]}, {"params": [plain], "adapt": False, "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=0.3, weight_decay=0.1, foreach=foreach)
    sgd = torch.optim.SGD([reference], lr=0.3, momentum=0.9)
    for scale in (1.0, -2.0, 0.5):
        for p in (adapted, plain, reference):
            p.grad = torch.tensor([1.0, 0.25], dtype=torch.float64) * scale
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(plain.data, reference.data, rtol=1e-14, atol=0)
    assert not torch.equal(adapted.data, plain.data)


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
def test_weight_decay_is_counted_once(form: Any, foreach: bool | None) -> None:
    """With |g| = 0 the ratio is 1, and a first step multiplies the weights by 1 - lr beta."""
    w = parameter(3, 4)
    step_with(LARS([w], lr=0.5, weight_decay=0.01, momentum_form=form, foreach=foreach), w, (0, 0))
    torch.testing.assert_close(w.data, torch.tensor([3, 4], dtype=torch.float64) * (1 - 0.5 * 0.01), rtol=1e-15, atol=0)


@BACKENDS
def test_the_corrected_momentum_is_finite_after_a_step_at_rate_zero(foreach: bool | None) -> None:
    """A warm-up from 0 makes lr_(t-1) = 0; the buffer then holds zeros and any finite factor is right."""
    w = parameter(3, 4)
    optimizer = LARS([w], lr=0.0, momentum_form="inside_corrected", trust_coefficient=0.01, foreach=foreach)
    step_with(optimizer, w, (3, 4))
    assert w.tolist() == [3, 4]
    step_with(optimizer, w, (3, 4), lr=10.0)
    torch.testing.assert_close(w.data, torch.tensor([2.7, 3.6], dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("denominator", ["sum", "update", "gradient"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_all_backends_compute_the_same_step(
    form: Any, denominator: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts and one larger tensor, both memory formats, a gradient of another layout, two dtypes."""
    monkeypatch.setattr(multi_tensor, "PART_ELEMENTS", 1000)
    finals = []
    for foreach in (False, True, None):
        tensors = _mixed_tensors()
        groups = [{"params": tensors[:-2]}, {"params": tensors[-2:], "adapt": False}]
        optimizer = LARS(
            groups,
            lr=3.0,
            weight_decay=1e-2,
            momentum_form=form,
            denominator=denominator,
            nesterov=nesterov,
            foreach=foreach,
        )
        for step in range(4):
            _fill_gradients(tensors, seed=step)
            for group in optimizer.param_groups:
                group["lr"] = 3.0 + step
            optimizer.step()
        finals.append([t.detach().clone() for t in tensors])
    for reference, together, fused in zip(*finals, strict=True):
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if reference.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(together, reference, **tolerance)
        torch.testing.assert_close(fused, reference, **tolerance)


def _mixed_tensors() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (70, 50), (16, 8, 1, 1), (16, 10, 4, 4), (5,), (7,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    tensors[0] = tensors[0].float()
    return [nn.Parameter(t) for t in tensors]


def _fill_gradients(tensors: list[nn.Parameter], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in tensors:
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = gradient  # contiguous, also where the parameter is channels_last


class CountOperations(TorchDispatchMode):
    """Counts operations started from Python, except views, which do not touch memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.view.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_multi_tensor_steps_start_as_many_operations_for_a_hundred_tensors_as_for_ten(form: Any) -> None:
    def operations(num_tensors: int) -> int:
        tensors = [nn.Parameter(torch.ones(4, 4)) for _ in range(num_tensors)]
        optimizer = LARS(tensors, lr=1.0, weight_decay=0.1, momentum_form=form, foreach=True)
        for p in tensors:
            p.grad = torch.ones(4, 4)
        optimizer.step()  # makes the state
        with CountOperations() as counter:
            optimizer.step()
        return counter.count

    assert operations(100) == operations(10)


@given(
    scale=st.floats(1e-3, 1e3),
    weights=st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=5),
    gradient_seed=st.integers(0, 1000),
)
def test_the_adapted_step_does_not_depend_on_the_gradients_scale(
    scale: float, weights: list[float], gradient_seed: int
) -> None:
    """Without decay, lr eta |w| / |c g| * c g does not depend on c."""
    gradient = torch.randn(len(weights), generator=torch.Generator().manual_seed(gradient_seed), dtype=torch.float64)
    moved = []
    for factor in (1.0, scale):
        w = parameter(*weights)
        step_with(LARS([w], lr=2.0, foreach=True), w, tuple((factor * gradient).tolist()))
        moved.append(w.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-10, atol=1e-12)


@given(scale=st.floats(1e-3, 1e3), decay=st.floats(0, 0.1))
def test_the_relative_step_does_not_depend_on_the_weights_scale(scale: float, decay: float) -> None:
    """Before a batch norm g(c w) = g(w) / c; with beta / c^2 the step is the same share of w for every c."""
    moved = []
    for c in (1.0, scale):
        w = parameter(3 * c, 4 * c)
        step_with(LARS([w], lr=2.0, weight_decay=decay / c**2, foreach=True), w, (0.4 / c, -0.3 / c))
        moved.append(w.detach() / c)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-10, atol=1e-12)


@given(decay=st.floats(0, 1), gradient=st.floats(-1, 1))
def test_excluded_groups_never_decay(decay: float, gradient: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    optimizer = LARS(param_groups(model, weight_decay=decay), lr=0.5)
    before = model[1].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.data, before - 0.5 * gradient, rtol=1e-12, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_have_fp32_norms_and_state(dtype: torch.dtype, foreach: bool | None) -> None:
    """|g| = 64 * 2000 overflows fp16 (65,504); the fp32 norm gives the exact ratio."""
    w = nn.Parameter(torch.full((64, 64), 0.5, dtype=dtype))
    optimizer = LARS([w], lr=100.0, trust_coefficient=0.001, foreach=foreach)
    w.grad = torch.full((64, 64), 2000.0, dtype=dtype)
    optimizer.step()
    assert optimizer.state[w]["momentum_buffer"].dtype == torch.float32
    expected = 0.5 - 100.0 * 0.001 * (0.5 / 2000.0) * 2000.0
    assert w.dtype == dtype
    torch.testing.assert_close(w.data, torch.full((64, 64), expected).to(dtype))


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_rate_gives_the_same_step_as_a_number(form: Any, foreach: bool | None) -> None:
    finals = []
    for tensor in (False, True):
        w = parameter(3, 4)
        lr: Any = torch.tensor(2.0, dtype=torch.float64) if tensor else 2.0
        optimizer = LARS([w], lr=lr, weight_decay=0.1, momentum_form=form, foreach=foreach)
        for step in range(1, 4):
            if tensor:
                lr.fill_(2.0 * step)
                step_with(optimizer, w, (0.3, -0.2))
            else:
                step_with(optimizer, w, (0.3, -0.2), lr=2.0 * step)
        finals.append(w.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-12, atol=0)


def test_momentum_and_weight_decay_may_be_tensors_too() -> None:
    one, other = parameter(3, 4), parameter(3, 4)
    numbers = LARS([one], lr=2.0, momentum=0.8, weight_decay=0.1)
    tensors = LARS(
        [other],
        lr=2.0,
        momentum=torch.tensor(0.8, dtype=torch.float64),
        weight_decay=torch.tensor(0.1, dtype=torch.float64),
    )
    for gradient in ((0.3, -0.2), (0.1, 0.5)):
        step_with(numbers, one, gradient)
        step_with(tensors, other, gradient)
    torch.testing.assert_close(other.data, one.data, rtol=1e-14, atol=0)


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_three_steps_save_load_and_three_more_are_six_steps_to_the_bit(
    form: Any, dtype: torch.dtype, foreach: bool | None, tmp_path: Any
) -> None:
    def run(w: nn.Parameter, optimizer: LARS, steps: range) -> None:
        for step in steps:
            step_with(optimizer, w, (0.3 + step, -0.2), lr=1.0 + step)

    def fresh() -> tuple[nn.Parameter, LARS]:
        w = parameter(3, 4, dtype=dtype)
        return w, LARS([w], lr=1.0, weight_decay=0.1, momentum_form=form, foreach=foreach)

    whole, optimizer = fresh()
    run(whole, optimizer, range(6))
    first, optimizer = fresh()
    run(first, optimizer, range(3))
    torch.save({"w": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second, optimizer = fresh()
    second.data.copy_(saved["w"])
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, range(3, 6))
    assert torch.equal(second, whole)


def test_loaded_state_is_a_copy_and_keeps_fp32_for_bf16_parameters() -> None:
    w = parameter(3, 4, dtype=torch.bfloat16)
    optimizer = LARS([w], lr=1.0)
    step_with(optimizer, w, (1.001, 2.003))
    saved = optimizer.state_dict()
    kept = saved["state"][0]["momentum_buffer"].clone()
    other = LARS([w], lr=1.0)
    other.load_state_dict(saved)
    assert other.state[w]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(other.state[w]["momentum_buffer"], kept)
    step_with(other, w, (1.0, 1.0))
    assert torch.equal(saved["state"][0]["momentum_buffer"], kept)


def test_loading_overwrites_a_rate_tensor_in_place() -> None:
    w = parameter(3, 4)
    lr = torch.tensor(1.0)
    optimizer = LARS([w], lr=lr, momentum_form="inside_corrected")
    saved = LARS([parameter(3, 4)], lr=7.0, momentum_form="inside_corrected").state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 7.0


def test_a_parameter_without_gradient_is_left_alone() -> None:
    moving, still = parameter(3, 4), parameter(1, 2)
    optimizer = LARS([moving, still], lr=1.0, weight_decay=0.1)
    step_with(optimizer, moving, (1, 1))
    assert still.tolist() == [1, 2]
    assert still not in optimizer.state


def test_a_closure_gives_its_loss_and_gradients() -> None:
    w = parameter(3, 4)
    optimizer = LARS([w], lr=1.0, trust_coefficient=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == 12.5
    torch.testing.assert_close(w.data, torch.tensor([2.97, 3.96], dtype=torch.float64))


def test_the_gradients_are_not_modified() -> None:
    for foreach in (None, True, False):
        for form in FORMS:
            w = parameter(3, 4)
            step_with(LARS([w], lr=1.0, weight_decay=0.1, momentum_form=form, foreach=foreach), w, (1, 2))
            assert w.grad is not None
            assert w.grad.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 was given"),
        ({"momentum": 1.0}, "momentum=1.0 was given"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 was given"),
        ({"eps": -1e-9}, "eps=-1e-09 was given"),
        ({"trust_coefficient": -1.0}, "trust_coefficient=-1.0 was given"),
        ({"momentum_form": "upside"}, "needed one of outside, inside, inside_corrected"),
        ({"denominator": "product"}, "needed one of sum, update, gradient"),
        ({"nesterov": True, "momentum": 0.0}, "momentum=0.9 works"),
        ({"capturable": True}, "capturable=True was given with a float rate"),
        ({"lr": torch.ones(2)}, "lr has 2 elements"),
    ],
)
def test_invalid_values_are_refused_with_an_example(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LARS([parameter(1, 2)], **{"lr": 0.1, **values})


def test_values_of_a_single_group_are_checked_too() -> None:
    with pytest.raises(UserError, match=r"momentum=2\.0 was given"):
        LARS([{"params": [parameter(1, 2)], "momentum": 2.0}], lr=0.1)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    first, second = parameter(1, 2), parameter(3, 4)
    optimizer = LARS([first], lr=0.1)
    with pytest.raises(UserError, match=r"momentum=2\.0 was given"):
        optimizer.add_param_group({"params": [second], "momentum": 2.0})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]
    optimizer.add_param_group({"params": [second], "momentum": 0.5})
    assert optimizer.param_groups[1]["params"] == [second]


def test_sparse_and_complex_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="dense real gradients"):
        LARS(table.parameters(), lr=0.1).step()
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with pytest.raises(UserError, match="dense real gradients"):
        LARS([w], lr=0.1).step()


def test_with_all_ratios_one_it_is_sgd_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(40, 30, generator=generator)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    lars = LARS([{"params": [one], "adapt": False}], lr=0.1, weight_decay=1e-3)
    sgd = SGD([other], lr=0.1, weight_decay=1e-3)
    for _ in range(5):
        gradient = torch.randn(40, 30, generator=generator)
        one.grad, other.grad = gradient, gradient.clone()
        lars.step()
        sgd.step()
    assert torch.equal(one, other)
