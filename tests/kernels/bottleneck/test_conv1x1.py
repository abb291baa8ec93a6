"""1x1 convolution kernels that normalise their input and measure their output, against float64 and autograd."""

from typing import Any, NamedTuple

import pytest
import torch
from slow import slow_except
from torch import Tensor
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.bottleneck.conv1x1 import conv1x1_data_gradient, conv1x1_forward, conv1x1_weight_gradient
from megabatch.kernels.bottleneck.handover import DeferredNormBackward
from megabatch.kernels.bottleneck.tiles import Tiling
from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.kernels.norm.join import bits_of
from megabatch.kernels.norm.passes import Normalisation, input_gradient

pytestmark = pytest.mark.usefixtures("interpreter")

TILING = Tiling(rows=32, outputs=16, inputs=16, num_warps=4, num_stages=3)
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11}
EPS = 1e-5


class Case(NamedTuple):
    """Shape of the images, output channels, span; spans are no multiple of a tile, and the last span is shorter."""

    shape: tuple[int, int, int, int]
    outputs: int
    span: int


CASES = (Case((5, 32, 3, 3), 48, 2), Case((3, 16, 5, 5), 16, 3))


class Given(NamedTuple):
    """Inputs of one layer."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    normalisation: Normalisation

    def double(self) -> "Given":
        return Given(
            self.x.double(),
            self.weight.double(),
            self.dy.double(),
            Normalisation(*(t.double() for t in self.normalisation)),
        )


def draw(case: Case, dtype: torch.dtype, *, seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count, inputs, height, width = case.shape
    spans = -(-count // case.span)
    return Given(
        x=(2 * normal(*case.shape) + 1).to(dtype),
        weight=(normal(case.outputs, inputs) / inputs**0.5).to(dtype),
        dy=normal(count, case.outputs, height, width).to(dtype),
        normalisation=Normalisation(
            normal(spans, inputs), normal(spans, inputs).abs() + 0.5, normal(inputs), normal(inputs)
        ),
    )


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalised", slow_except([True, False], True))
def test_output_moments_and_gradients_are_those_of_float64(normalised: bool, case: Case, dtype: torch.dtype) -> None:
    given = draw(case, dtype)
    exact = given.double()
    options: dict[str, Any] = {"span": case.span, "tiling": TILING, "backend": "triton"}
    norms = (given.normalisation, exact.normalisation) if normalised else (None, None)
    ours = conv1x1_forward(given.x, given.weight, normalisation=norms[0], **options)
    expected = conv1x1_forward(exact.x, exact.weight, normalisation=norms[1], span=case.span)
    # both h and y are rounded
    assert error(ours[0], expected[0]) < 2 * ROUNDING[dtype]
    for mine, reference in zip(ours[1], expected[1], strict=True):
        assert error(mine, reference) < 2 * ROUNDING[dtype]
    of_weight = conv1x1_weight_gradient(given.dy, given.x, normalisation=norms[0], **options)
    assert of_weight.dtype == torch.float32
    expected_of_weight = conv1x1_weight_gradient(exact.dy, exact.x, normalisation=norms[1], span=case.span)
    assert error(of_weight, expected_of_weight) < 2 * ROUNDING[dtype]
    in_half = conv1x1_weight_gradient(given.dy, given.x, normalisation=norms[0], dtype=torch.float16, **options)
    assert torch.equal(in_half, of_weight.half())  # rounded once


@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize("case", CASES)
def test_the_data_gradient_and_its_sums_are_those_of_float64(case: Case, dtype: torch.dtype) -> None:
    given = draw(case, dtype)
    exact = given.double()
    dz, sums = conv1x1_data_gradient(
        given.dy, given.weight, given.x, given.normalisation, span=case.span, tiling=TILING, backend="triton"
    )
    expected = conv1x1_data_gradient(exact.dy, exact.weight, exact.x, exact.normalisation, span=case.span)
    assert error(dz, expected[0]) < 2 * ROUNDING[dtype]
    assert error(sums, expected[1]) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize("two_norms", [False, True])
@pytest.mark.parametrize("with_addend", [False, True])
def test_the_data_gradient_behind_a_residual_adds_the_addend_and_applies_the_relu_mask(
    with_addend: bool, two_norms: bool, dtype: torch.dtype
) -> None:
    case = CASES[0]
    given, other, third = (draw(case, dtype, seed=seed) for seed in range(3))
    exact, wide = given.double(), other.double()
    z = torch.relu(other.x)  # stands for the output of the join
    behind: dict[str, Any] = {"relu_mask": bits_of(z), "addend": third.x if with_addend else None}
    if two_norms:
        behind |= {"residual": other.x, "residual_norm": other.normalisation}
    dz, sums = conv1x1_data_gradient(
        given.dy,
        given.weight,
        given.x,
        given.normalisation,
        span=case.span,
        tiling=TILING,
        backend="triton",
        **behind,
    )
    product = torch.einsum("nkhw,kc->nchw", exact.dy, exact.weight) + (third.x.double() if with_addend else 0.0)
    expected = torch.where(z > 0, product, 0.0)
    assert error(dz, expected) < 2 * ROUNDING[dtype]
    products = [expected, expected * hat(exact, case), expected, expected * hat(wide, case)]
    assert sums.shape[1] == (4 if two_norms else 2)
    for number in range(sums.shape[1]):
        by_span = torch.stack([part.sum((0, 2, 3)) for part in torch.split(products[number], case.span)])
        assert error(sums[:, number], by_span) < 2 * ROUNDING[dtype]


def hat(given: Given, case: Case) -> Tensor:
    """(x - mean) rstd."""
    mean, rstd = (t.repeat_interleave(case.span, 0)[: case.shape[0], :, None, None] for t in given.normalisation[:2])
    return (given.x - mean) * rstd


@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_both_gradients_apply_a_deferred_norm_backward(case: Case, relu: bool, dtype: torch.dtype) -> None:
    given = draw(case, dtype)
    exact = given.double()
    behind = draw(Case((case.shape[0], case.outputs, *case.shape[2:]), 16, case.span), dtype, seed=1)
    sums = torch.randn(len(behind.normalisation.mean), 2, case.outputs, generator=torch.Generator().manual_seed(2))
    deferred = DeferredNormBackward(behind.x, behind.normalisation, 9 * sums, relu)
    wide = DeferredNormBackward(behind.x.double(), behind.double().normalisation, 9 * sums.double(), relu)
    whole = wide.apply(exact.dy, span=case.span, triton=False)
    assert error(whole, exact.dy) > 0.5
    options: dict[str, Any] = {"span": case.span, "deferred": deferred, "tiling": TILING, "backend": "triton"}
    ours = conv1x1_data_gradient(given.dy, given.weight, given.x, given.normalisation, **options)
    expected = conv1x1_data_gradient(whole, exact.weight, exact.x, exact.normalisation, span=case.span)
    for mine, reference in zip(ours, expected, strict=True):
        assert error(mine, reference) < 4 * ROUNDING[dtype]
    of_weight = conv1x1_weight_gradient(given.dy, given.x, normalisation=given.normalisation, **options)
    expected_of_weight = conv1x1_weight_gradient(whole, exact.x, normalisation=exact.normalisation, span=case.span)
    assert error(of_weight, expected_of_weight) < 4 * ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_fused_batch_norm_relu_and_convolution_have_the_gradients_of_autograd(backend: Any) -> None:
    case = CASES[0]
    given = draw(case, torch.float32)
    scale, shift = (values.requires_grad_() for values in torch.rand(2, case.shape[1]).unbind())
    x, weight = given.x.clone().requires_grad_(), given.weight.clone().requires_grad_()
    h, mean, var = fused_bn_act(x, scale, shift, span=case.span, eps=EPS)
    y = functional.conv2d(h, weight[:, :, None, None])
    dx, dscale, dshift, dweight = torch.autograd.grad(y, (x, scale, shift, weight), given.dy)

    sizes = torch.tensor([part.numel() // case.shape[1] for part in torch.split(given.x, case.span)])[:, None]
    rstd = 1 / torch.sqrt(var * (sizes - 1) / sizes + EPS)
    normalisation = Normalisation(mean, rstd, scale.detach(), shift.detach())
    options: dict[str, Any] = {"span": case.span, "tiling": TILING, "backend": backend}
    ours, _ = conv1x1_forward(given.x, given.weight, normalisation=normalisation, **options)
    torch.testing.assert_close(ours, y.detach(), rtol=1e-4, atol=1e-4)
    dz, sums = conv1x1_data_gradient(given.dy, given.weight, given.x, normalisation, **options)
    torch.testing.assert_close(sums[:, 0].sum(0), dshift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums[:, 1].sum(0), dscale, rtol=1e-4, atol=1e-4)
    mine = conv1x1_weight_gradient(given.dy, given.x, normalisation=normalisation, **options)
    torch.testing.assert_close(mine, dweight, rtol=1e-4, atol=1e-4)
    of_input = input_gradient(dz, given.x, normalisation, sums, span=case.span, triton=backend == "triton", relu=False)
    torch.testing.assert_close(of_input, dx, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_tilings_agree_up_to_the_order_of_sums() -> None:
    case = CASES[0]
    given = draw(case, torch.float32)
    results = [
        conv1x1_weight_gradient(
            given.dy, given.x, normalisation=given.normalisation, span=case.span, tiling=tiling, backend="triton"
        )
        for tiling in (TILING, Tiling(16, 32, 32, 4, 3), Tiling(64, 16, 32, 4, 3))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_equal_inputs_give_equal_bits() -> None:
    case = CASES[0]
    given = draw(case, torch.float16)
    options: dict[str, Any] = {"span": case.span, "tiling": TILING, "backend": "triton"}
    for _ in range(2):
        first, second = (
            conv1x1_forward(given.x, given.weight, normalisation=given.normalisation, **options) for _ in range(2)
        )
        assert all(map(torch.equal, (first[0], *first[1]), (second[0], *second[1])))


def test_channels_that_are_no_multiple_of_16_go_to_the_reference() -> None:
    x, weight = torch.randn(2, 10, 3, 3), torch.randn(7, 10)
    ours = conv1x1_forward(x, weight, span=2, backend="triton")
    assert torch.equal(ours[0], functional.conv2d(x, weight[:, :, None, None]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(48, 31)}, r"weight torch.float32 \(48, 31\)"),
        ({"weight": torch.ones(48, 32, dtype=torch.float16)}, "weight torch.float16"),
        ({"weight": torch.ones(48, 32, 3, 3)}, r"needed: \(N, C, H, W\)"),
        ({"span": 0}, "span=0"),
        ({"span": 5}, r"needed for these images and span: \[\(1, 32\), \(1, 32\), \(32,\), \(32,\)\]"),
    ],
)
def test_mismatched_tensors_raise_errors_that_name_them(changes: dict[str, Any], message: str) -> None:
    given = draw(CASES[0], torch.float32)
    arguments: dict[str, Any] = {"x": given.x, "weight": given.weight, "span": 2, "normalisation": given.normalisation}
    with pytest.raises(UserError, match=message):
        conv1x1_forward(**{**arguments, **changes})
