"""Fused batch norm, residual and ReLU (Triton) against torch's operations in float64."""

from typing import Any

import pytest
import torch
from norm_cases import Case, error, in_float64, inputs, run
from slow import slow_except
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.norm import passes as module
from megabatch.kernels.norm.batch_norm import fused_bn_act

pytestmark = pytest.mark.usefixtures("interpreter")

# Relative error of a result that was rounded once: half a unit in the last place for float16, and a whole one for
# bfloat16, which Triton's interpreter rounds towards 0.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
HALVES = (torch.float16, torch.bfloat16)


CASES = (
    Case((5, 20, 3, 3), 2, residual=True, relu=True),  # two whole spans and a short one; fewer channels than a block
    Case((4, 8, 5, 5), 4, residual=False, relu=True),
    Case((6, 130, 4, 4), 3, residual=True, relu=False),  # more channels than a block
    Case((4, 64, 9, 9), 9, residual=True, relu=True),  # a span longer than the batch; several parts
    Case((3, 16, 1, 1), 1, residual=False, relu=False),  # one value per channel and span
)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small tensors are also divided into several parts."""
    monkeypatch.setattr(module, "TILE", 1024)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_gradients_match_float64(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    ours, exact = run(given, case, backend="triton"), run(in_float64(given), case, backend="reference")
    assert ours.y.dtype == dtype
    assert error(ours.y, exact.y) < ROUNDING[dtype]
    assert error(ours.mean, exact.mean) < 1e-6
    assert error(ours.var, exact.var) < 1e-5
    for name, gradient, reference in zip("xwbr", ours.gradients, exact.gradients, strict=False):
        assert gradient.dtype == given["weight" if name in "wb" else "x"].dtype
        assert error(gradient, reference) < (1e-5 if name in "wb" else ROUNDING[dtype]), name


@pytest.mark.parametrize("dtype", slow_except(HALVES, torch.bfloat16))
@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_errors_are_no_larger_than_those_of_torch(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    exact = run(in_float64(given), case, backend="reference")
    ours, plain = run(given, case, backend="triton"), run(given, case, backend="reference")
    slack = 1.05 if dtype == torch.float16 else 2.0  # rounding towards 0 doubles the error
    assert error(ours.y, exact.y) <= slack * error(plain.y, exact.y)
    for mine, torchs, reference in zip(ours.gradients, plain.gradients, exact.gradients, strict=True):
        assert error(mine, reference) <= slack * error(torchs, reference) + 1e-7


def test_statistics_are_the_mean_and_unbiased_variance_of_each_span() -> None:
    case = CASES[0]
    given = inputs(case, torch.float32)
    _, mean, var = fused_bn_act(given["x"], given["weight"], given["bias"], span=case.span, backend="triton")
    for number, part in enumerate(given["x"].double().split(case.span)):
        values = part.transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean[number].double(), values.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var[number].double(), values.var(1), rtol=4e-6, atol=1e-6)


def test_one_span_is_torchs_batch_norm_and_relu() -> None:
    case = Case((4, 8, 5, 5), 4, residual=False, relu=True)
    given = inputs(case, torch.float32)
    exact = functional.relu(
        functional.batch_norm(given["x"], None, None, given["weight"], given["bias"], training=True, eps=0.1)
    )
    y, _, _ = fused_bn_act(given["x"], given["weight"], given["bias"], span=4, eps=0.1, backend="triton")
    torch.testing.assert_close(y, exact)


@pytest.mark.usefixtures("many_parts")
def test_the_variance_stays_accurate_if_the_mean_is_a_thousand_standard_deviations() -> None:
    case = Case((4, 16, 9, 9), 4, residual=False, relu=False)
    given = inputs(case, torch.float32, offset=2000.0)
    _, _, var = fused_bn_act(given["x"], given["weight"], given["bias"], span=4, backend="triton")
    values = given["x"].double().permute(1, 0, 2, 3).reshape(16, -1)
    torch.testing.assert_close(var[0].double(), values.var(1), rtol=1e-4, atol=0)  # E[x^2] - m^2 would be off by 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("many_parts")
def test_equal_inputs_give_equal_bits() -> None:
    case = CASES[3]
    given = inputs(case, torch.float16)
    first, second = (run(given, case, backend="triton") for _ in range(2))
    for one, other in zip((*first[:3], *first.gradients), (*second[:3], *second.gradients), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("many_parts")
def test_samples_of_one_span_do_not_affect_another() -> None:
    case = Case((6, 8, 5, 5), 2, residual=True, relu=True)
    given = inputs(case, torch.float32)
    changed = {**given, "x": given["x"].clone(), "residual": given["residual"].clone(), "dy": given["dy"].clone()}
    for name in ("x", "residual", "dy"):
        changed[name][2:4] += 3.0
    before, after = run(given, case, backend="triton"), run(changed, case, backend="triton")
    for one, other in ((before.y, after.y), (before.gradients[0], after.gradients[0])):
        assert torch.equal(one[:2], other[:2])
        assert torch.equal(one[4:], other[4:])
        assert not torch.equal(one[2:4], other[2:4])


def test_relu_passes_no_gradient_where_the_output_is_0() -> None:
    case = Case((4, 8, 3, 3), 4, residual=False, relu=True)
    given = inputs(case, torch.float32)
    given["weight"], given["bias"] = torch.zeros(8), torch.zeros(8)  # so every output is exactly 0
    assert all(not gradient.any() for gradient in run(given, case, backend="triton").gradients)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # warnings of the interpreter
@pytest.mark.parametrize("value", [torch.nan, 1e25])  # whose square overflows
@pytest.mark.parametrize("residual", [False, True])
def test_nan_and_overflow_make_the_outputs_and_gradients_of_their_span_nan(residual: bool, value: float) -> None:
    case = Case((4, 8, 3, 3), 2, residual=residual, relu=True)
    given = inputs(case, torch.float32)
    given["x"][3, 5, 1, 1] = value
    ours = run(given, case, backend="triton")
    assert ours.y[2:, 5].isnan().all()
    assert ours.gradients[0][2:, 5].isnan().all()
    assert not ours.y[:2].isnan().any()


def test_inputs_of_any_memory_layout_give_equal_results() -> None:
    case = CASES[0]
    given = inputs(case, torch.float32)
    other = {name: t.contiguous() for name, t in given.items()}
    both = torch.stack([given["weight"], given["bias"]], dim=1)
    other |= {"weight": both[:, 0], "bias": both[:, 1]}
    first, second = run(given, case, backend="triton"), run(other, case, backend="triton")
    assert torch.equal(first.y, second.y)
    assert first.y.is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, first.gradients, second.gradients))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"span": 0}, "span=0"),
        ({"x": torch.ones(0, 8, 3, 3)}, "at least one"),
        ({"x": torch.ones(4, 8)}, r"needed: images \(N, C, H, W\)"),
        ({"weight": torch.ones(7)}, r"weight \(7,\)"),
        ({"residual": torch.ones(4, 8, 3, 2)}, "residual is"),
        ({"residual": torch.ones(4, 8, 3, 3, dtype=torch.float16)}, "residual is torch.float16"),
    ],
)
def test_mismatched_tensors_raise_errors_that_name_them(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(4, 8, 3, 3), "weight": torch.ones(8), "bias": torch.ones(8), "span": 4}
    with pytest.raises(UserError, match=message):
        fused_bn_act(**{**given, **changes})
