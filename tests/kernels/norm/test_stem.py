"""Fused batch norm, ReLU and max pooling against torch's operations in float64, including ties within a window."""

from typing import Any, NamedTuple

import pytest
import torch
from slow import slow_except
from torch import Tensor
from torch.nn import functional

from megabatch.kernels.norm import passes as norm_passes
from megabatch.kernels.norm.stem import fused_bn_relu_pool

pytestmark = pytest.mark.usefixtures("interpreter")

ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
CASES = (((3, 16, 6, 8), 2), ((2, 8, 7, 5), 2), ((2, 16, 1, 3), 1), ((1, 72, 4, 4), 1), ((4, 24, 9, 3), 3))
"""Shapes and spans: even and odd sizes, an image of one row, more channels than a tile has, and a short last span."""


class Run(NamedTuple):
    """Outputs, statistics and gradients."""

    y: Tensor
    mean: Tensor
    var: Tensor
    gradients: tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small tensors are also divided into several parts."""
    monkeypatch.setattr(norm_passes, "TILE", 512)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, dy."""
    generator = torch.Generator().manual_seed(0)
    count, channels, height, width = shape
    x = (2 * torch.randn(shape, generator=generator) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=generator)
    pooled = (count, channels, (height + 1) // 2, (width + 1) // 2)
    return [x, weight, bias, torch.randn(pooled, generator=generator).to(dtype)]


def run(given: list[Tensor], span: int, backend: Any) -> Run:
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    y, mean, var = fused_bn_relu_pool(*leaves, span=span, backend=backend)
    return Run(y.detach(), mean, var, torch.autograd.grad(y, leaves, given[3]))


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-12))


def without_ties(given: list[Tensor], span: int) -> list[Tensor]:
    """Sets dy to 0 where rounding could make another value the maximum, which makes the gradient ambiguous."""
    x, weight, bias, dy = given
    h = torch.cat(
        [
            functional.batch_norm(part.double(), None, None, weight.double(), bias.double(), training=True)
            for part in torch.split(x, span)
        ]
    )
    windows = functional.unfold(functional.pad(h, (1, 1, 1, 1), value=-1e9), 3, stride=2)
    ordered = windows.view(len(x), x.shape[1], 9, -1).sort(2).values.view(*dy.shape[:2], 9, *dy.shape[2:])
    near = ordered[:, :, 8] - ordered[:, :, 7] < 4 * ROUNDING[x.dtype] * (1 + ordered[:, :, 8].abs())
    return [x, weight, bias, torch.where(near | (ordered[:, :, 8].abs() < 1e-2), 0.0, dy)]


@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize(("shape", "span"), CASES)
def test_outputs_and_gradients_match_float64(shape: tuple[int, ...], span: int, dtype: torch.dtype) -> None:
    given = without_ties(draw(shape, dtype), span)
    assert given[3].count_nonzero() > 0.3 * given[3].numel()
    exact = run([t.double() for t in given], span, "reference")
    ours = run(given, span, "triton")
    assert ours.y.dtype == dtype
    assert ours.y.is_contiguous(memory_format=torch.channels_last)
    assert error(ours.y, exact.y) < ROUNDING[dtype]
    assert error(ours.mean, exact.mean) < 1e-6
    assert error(ours.var, exact.var) < 1e-5
    for name, gradient, reference in zip("xwb", ours.gradients, exact.gradients, strict=True):
        assert error(gradient, reference) < (1e-5 if name in "wb" else max(ROUNDING[dtype], 1e-5)), name
    again = run(given, span, "triton")
    assert all(map(torch.equal, ours.gradients, again.gradients))


def test_of_equal_values_the_first_in_row_major_order_receives_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, 16, 7, 6), generator=generator).float()  # so most windows have several maxima
    given = [x, torch.rand(16, generator=generator) + 0.5, torch.ones(16), torch.randn(2, 16, 4, 3)]
    ours, torchs = run(given, 2, "triton"), run(given, 2, "reference")
    torch.testing.assert_close(ours.y, torchs.y)
    for mine, reference in zip(ours.gradients, torchs.gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_a_window_of_zeros_passes_no_gradient() -> None:
    given = draw((2, 8, 4, 4), torch.float32)
    given[1], given[2] = torch.zeros(8), torch.zeros(8)
    assert all(not gradient.any() for gradient in run(given, 2, "triton").gradients)


def test_nan_is_the_maximum_and_receives_the_gradient() -> None:
    given = draw((2, 8, 4, 4), torch.float32)
    given[0][1, 3, 2, 2] = torch.nan
    ours, torchs = run(given, 1, "triton"), run(given, 1, "reference")
    assert torch.equal(ours.y.isnan(), torchs.y.isnan())
    assert ours.y[1, 3].isnan().all()
    assert ours.gradients[0][1, 3].isnan().all()
    assert not ours.gradients[0][0].isnan().any()


@pytest.mark.slow
def test_inputs_of_any_memory_layout_give_equal_results() -> None:
    given = draw((3, 16, 6, 8), torch.float32)
    first, second = run(given, 2, "triton"), run([t.contiguous() for t in given], 2, "triton")
    assert torch.equal(first.y, second.y)
    assert all(map(torch.equal, first.gradients, second.gradients))
