"""Norms of all tensors as one vector, and the trust ratios of LARS."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch.optim.engine.trust import norms
from megabatch.optim.lars import trust_ratios

positive = st.floats(1e-6, 1e6)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_norms_are_of_all_tensors_in_one_vector() -> None:
    assert norms([vector(3, 4), vector(5, 12, 0).view(3, 1)]).tolist() == [5, 13]


@pytest.mark.parametrize("shape", [(64 * 1024,), (65537,), (64, 64, 4, 4)])
def test_norms_of_large_tensors_are_accurate(shape: tuple[int, ...]) -> None:
    tensor = 0.3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = tensor.double().square().sum().sqrt()
    torch.testing.assert_close(norms([tensor])[0].double(), expected, rtol=1e-5, atol=0)


def test_ratios_match_the_equation_layer_by_layer() -> None:
    ratios = trust_ratios(vector(5, 8), vector(2, 3), trust_coefficient=0.01, weight_decay=0.1, eps=0.5)
    torch.testing.assert_close(ratios, vector(0.05 / 3, 0.08 / 4.3))


@given(weight_norm=positive, gradient_norm=positive, scale=st.floats(1e-3, 1e3))
def test_ratio_times_gradient_does_not_depend_on_the_gradients_scale(
    weight_norm: float, gradient_norm: float, scale: float
) -> None:
    one = trust_ratios(vector(weight_norm), vector(gradient_norm), trust_coefficient=0.001)
    other = trust_ratios(vector(weight_norm), vector(scale * gradient_norm), trust_coefficient=0.001)
    torch.testing.assert_close(one * gradient_norm, other * scale * gradient_norm, rtol=1e-12, atol=0)


@given(norm=st.floats(0, 1e6), coefficient=st.floats(1e-4, 1), decay=st.floats(0, 1))
def test_a_zero_norm_gives_ratio_one(norm: float, coefficient: float, decay: float) -> None:
    ratios = trust_ratios(vector(0, norm), vector(norm, 0), trust_coefficient=coefficient, weight_decay=decay)
    assert ratios.tolist() == [1, 1]


@given(ratio=positive, lr=positive)
def test_the_clip_gives_a_layer_at_most_the_global_rate(ratio: float, lr: float) -> None:
    clipped = trust_ratios(vector(ratio), vector(1), trust_coefficient=1.0, max_rate=lr)
    torch.testing.assert_close(clipped * lr, vector(min(ratio, lr)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_the_clip_keeps_a_ratio_of_zero_at_rate_zero(lr: float | torch.Tensor) -> None:
    assert trust_ratios(vector(5), vector(2), trust_coefficient=0.0, max_rate=lr).tolist() == [0]
