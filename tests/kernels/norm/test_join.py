"""Passes of a residual join against float64, and the ReLU mask as bits."""

import pytest
import torch
from slow import slow_except
from torch import Tensor

from megabatch.kernels.norm import passes as norm_passes
from megabatch.kernels.norm.join import bits_of, images_of_bits, join, join_gradient
from megabatch.kernels.norm.passes import Moments, Normalisation, moments

pytestmark = pytest.mark.usefixtures("interpreter")

EPS = 1e-3
CASES = [((5, 20, 3, 3), 2), ((4, 130, 4, 3), 4), ((3, 8, 5, 5), 1)]
"""Shapes and spans: a short last span; channels that do not fill a byte or a block; one block of a single byte."""
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small tensors are also divided into several parts."""
    monkeypatch.setattr(norm_passes, "TILE", 512)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(x: Tensor, span: int, seed: int) -> Normalisation:
    weight, bias = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(seed))
    found = Moments(*(t.float() for t in moments(x.double(), span=span, eps=EPS, triton=False)))
    return Normalisation.of(found, weight + 1, bias)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def doubled(norm: Normalisation) -> Normalisation:
    return Normalisation(*(values.double() for values in norm))


@pytest.mark.parametrize("columns", [8, 16, 20, 130])
def test_bits_and_booleans_round_trip(columns: int) -> None:
    images = draw((2, columns, 3, 2), torch.float32, seed=1)
    images[0, 3, 1, 1], images[1, 5, 2, 0] = torch.nan, 0.0
    bits = bits_of(images)
    assert bits.shape == (12, -(-columns // 8))
    assert int(bits.reshape(2, 3, 2, -1)[1, 2, 0, 0]) >> 5 & 1 == 0
    back = images_of_bits(bits, images)
    assert torch.equal(back, ~(images <= 0))
    assert back[0, 3, 1, 1]


@pytest.mark.parametrize("dtype", slow_except(ROUNDING, torch.float16))
@pytest.mark.parametrize(("shape", "span"), CASES)
def test_the_join_and_its_gradients_match_float64(shape: tuple[int, ...], span: int, dtype: torch.dtype) -> None:
    x, residual, dy = (draw(shape, dtype, seed) for seed in range(3))
    norm = norm_of(x, span, 5)
    z, relu_mask = join(x, norm, residual, span=span, triton=True)
    assert relu_mask is not None
    assert torch.equal(relu_mask, bits_of(z))
    exact = doubled(norm)
    expected, _ = join(x.double(), exact, residual.double(), span=span, triton=False)
    assert error(z, expected) < ROUNDING[dtype]
    results = join_gradient(dy, x, norm, relu_mask, span=span, triton=True)
    references = join_gradient(dy.double(), x.double(), exact, relu_mask, span=span, triton=False)
    for mine, reference in zip(results, references, strict=True):
        assert error(mine, reference) < ROUNDING[dtype]


def test_without_relu_nothing_is_masked() -> None:
    x, residual = (draw((4, 8, 3, 3), torch.float32, seed) for seed in range(2))
    norm = norm_of(x, 4, 5)
    z, relu_mask = join(x, norm, residual, span=4, triton=True, relu=False)
    assert relu_mask is None
    assert (z < 0).any()


def test_the_bit_of_a_nan_is_set() -> None:
    x, residual = (draw((4, 8, 3, 3), torch.float32, seed) for seed in range(2))
    residual[2, 3, 1, 1] = torch.nan
    z, relu_mask = join(x, norm_of(x, 4, 5), residual, span=4, triton=True)
    assert relu_mask is not None
    assert z[2, 3, 1, 1].isnan()
    assert images_of_bits(relu_mask, x)[2, 3, 1, 1]
