"""The compiled batch norm, residual and ReLU for CPUs against torch's operations in float64."""

from typing import Any

import norm_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import Case, Run, error, in_float64, inputs, step_sums
from torch import Tensor, nn

from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.norm.batch_norm import batch_norm_act_reference, fused_bn_act
from megabatch.kernels.statistics import SpanSums, keep_statistics
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.fused.norm_act import norm_act
from megabatch.nn.small import resnet8

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}

needs_library = pytest.mark.skipif(not cpu_batch_norm.is_available(), reason="the CPU kernels are not compiled here")


CASES = (
    Case((5, 20, 3, 3), 2, residual=True, relu=True),  # two whole spans and a short one
    Case((4, 8, 5, 5), 4, residual=False, relu=True),  # folded: consecutive rows are treated as one
    Case((6, 130, 4, 4), 3, residual=True, relu=False),
    Case((8, 64, 40, 40), 9, residual=True, relu=True),  # a span longer than the batch; several parts
    Case((8, 64, 40, 40), 4, residual=False, relu=True),
    Case((3, 16, 1, 1), 1, residual=False, relu=False),  # one value per channel and span
    Case((2, 3000, 5, 7), 2, residual=False, relu=True),  # more channels than any known network
)


def run(given: dict[str, Any], case: Case, function: Any = cpu_batch_norm.norm_act) -> Run:
    return norm_cases.run(given, case, function=function, eps=1e-5)


def exact(given: dict[str, Any], case: Case) -> Run:
    return run(in_float64(given), case, batch_norm_act_reference)


@needs_library
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_gradients_match_float64(case, dtype):
    values = inputs(case, dtype)
    ours, expected = run(values, case), exact(values, case)
    assert error(ours.y, expected.y) < ROUNDING[dtype]
    assert error(ours.mean, expected.mean) < 2e-6
    assert error(ours.var, expected.var) < 2e-6
    if case.shape[2] * case.span == 1:  # one value per channel: the gradient of x is 0, so no relative error
        assert ours.gradients[0].abs().max() < 1e-3
        ours, expected = (Run(*found[:3], found.gradients[2:]) for found in (ours, expected))
    for gradient, right in zip(ours.gradients, expected.gradients, strict=True):
        assert gradient.dtype == (dtype if gradient.ndim == 4 else torch.float32)
        assert error(gradient, right) < ROUNDING[dtype]


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 9),
    channels=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(2, 9),
    span=st.integers(1, 10),
    residual=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_span_matches_float64(count, channels, height, width, span, residual, relu, seed):
    case = Case((count, channels, height, width), span, residual, relu)
    values = inputs(case, torch.float32, seed=seed)
    ours, expected = run(values, case), exact(values, case)
    assert error(ours.y, expected.y) < 1e-4  # two nearly equal values: cancellation
    assert error(ours.mean, expected.mean) < 1e-5
    torch.testing.assert_close(ours.var.double(), expected.var, rtol=1e-4, atol=1e-9)


@needs_library
def test_errors_in_bfloat16_are_no_larger_than_those_of_torch():
    case = Case((16, 64, 20, 20), 16, residual=True, relu=True)
    values = inputs(case, torch.bfloat16)
    expected = exact(values, case)
    ours, plain = run(values, case), run(values, case, batch_norm_act_reference)
    found = [(ours.y, plain.y, expected.y), *zip(ours.gradients, plain.gradients, expected.gradients, strict=True)]
    assert all(error(mine, right) <= 1.02 * error(theirs, right) for mine, theirs, right in found)
    assert error(ours.y, expected.y) < 0.8 * error(plain.y, expected.y)  # rounded once, not three times


@needs_library
def test_the_variance_stays_accurate_if_the_mean_is_a_thousand_standard_deviations():
    case = Case((8, 16, 16, 16), 8, residual=False, relu=False)
    values = inputs(case, torch.float32, offset=2000.0)
    assert error(run(values, case).var, exact(values, case).var) < 1e-3


@needs_library
def test_results_do_not_depend_on_the_number_of_threads():
    case = Case((32, 24, 17, 13), 12, residual=True, relu=True)
    values = inputs(case, torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(run(values, case))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip((*found[0][:3], *found[0].gradients), (*other[:3], *other.gradients), strict=True):
            assert torch.equal(one, two)


@needs_library
@pytest.mark.parametrize("dtype", ROUNDING)
def test_nan_propagates_to_outputs_and_gradients(dtype):
    case = Case((4, 8, 3, 3), 4, residual=True, relu=True)
    values = inputs(case, dtype)
    values["x"][1, 3, 2, 0] = float("nan")
    ours = run(values, case)
    assert ours.y[:, 3].isnan().all()
    assert not ours.y[:, :3].isnan().any()
    assert ours.gradients[0][:, 3].isnan().all()


@needs_library
def test_overflowing_squares_give_nan_not_a_constant_output():
    case = Case((4, 8, 3, 3), 4, residual=False, relu=True)
    values = inputs(case, torch.float32)
    values["x"][:, 2] *= 1e25
    ours = run(values, case)
    assert ours.y[:, 2].isnan().all()
    assert not ours.y[:, 3:].isnan().any()


@needs_library
@pytest.mark.parametrize("value", [3.0e38, -3.0e38, float("inf"), 0.0, -0.0, 1e-40])
def test_extreme_values_and_ties_round_as_in_torch(value):
    x = torch.tensor([value, 1.00390625, 1.01171875, -1.00390625]).repeat(16)  # ties, to even on either side
    residual = x.view(4, 16, 1, 1).expand(4, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    blank = torch.zeros_like(residual)
    one, nothing = torch.ones(16), torch.zeros(16)
    y, _, _ = cpu_batch_norm.norm_act(blank, one, nothing, span=4, eps=1.0, residual=residual, relu=False)
    assert torch.equal(y, residual)
    y, _, _ = cpu_batch_norm.norm_act(blank.bfloat16(), one, x[:16].clone(), span=4, eps=1.0, relu=False)
    assert torch.equal(y[0, :, 0, 0], x[:16].bfloat16())


@needs_library
def test_statistics_accumulate_as_keep_statistics_accumulates_them():
    case = Case((7, 12, 6, 6), 3, residual=False, relu=True)
    ours, theirs = ([torch.zeros(25), torch.zeros(25)] for _ in range(2))
    for seed in range(3):
        given = {name: t for name, t in inputs(case, torch.bfloat16, seed=seed).items() if name != "dy"}
        _, mean, var = cpu_batch_norm.norm_act(**given, span=3, eps=1e-5, sink=SpanSums(ours[0], ours[1]))
        keep_statistics(SpanSums(*theirs), mean, var, triton=False)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert ours[1][-1] == 9


@needs_library
@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(12), lambda: SpanBatchNorm2d(12, span=3)])
def test_a_fused_layer_accumulates_the_statistics_of_a_plain_one(make, collects):
    torch.manual_seed(0)
    fused, plain = make(), make()
    collect_statistics(fused, collects)
    collect_statistics(plain, collects)
    for _ in range(2):
        x = torch.randn(7, 12, 5, 5).contiguous(memory_format=torch.channels_last)
        ours = norm_act(fused, x, backend="auto")
        assert ours.grad_fn.name().startswith("_NormAct")
        torch.testing.assert_close(ours, torch.relu(plain(x.clone())), rtol=1e-5, atol=1e-5)
    ours, theirs = (dict(layer.named_buffers()) | step_sums(layer) for layer in (fused, plain))
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 8, 5, 5),  # channels first
        torch.randn(4, 8, 5, 5).half().contiguous(memory_format=torch.channels_last),
        torch.randn(4, 8, 5, 5).double().contiguous(memory_format=torch.channels_last),
    ],
)
def test_unsupported_images_use_torchs_operations(x):
    assert not cpu_batch_norm.supports(x)
    norm = nn.BatchNorm2d(8).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert not norm_act(norm, x, backend="auto").grad_fn.name().startswith("_NormAct")


def test_without_the_library_the_reference_is_used(monkeypatch):
    monkeypatch.setattr(cpu_batch_norm, "_functions", lambda: None)
    case = CASES[1]
    values = inputs(case, torch.float32)
    ours = run(values, case, fused_bn_act)
    assert error(ours.y, exact(values, case).y) < 2e-6


@needs_library
def test_a_training_step_of_a_whole_model_is_equal_up_to_rounding():
    def step(fusion: str) -> list[Tensor]:
        torch.manual_seed(1)
        model = resnet8(in_channels=3).to(memory_format=torch.channels_last)
        set_fusion(model, fusion)
        x = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
        return [*(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())]

    for ours, plain in zip(step("auto"), step("plain"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
