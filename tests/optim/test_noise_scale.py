"""The two-batch estimator measures a known noise scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch.errors import UserError
from megabatch.optim.noise_scale import GradientNoiseScale

positive = st.floats(1e-3, 1e3)


@given(signal=positive, noise=positive, local=st.integers(1, 100), factor=st.integers(2, 100))
def test_expected_norms_give_the_exact_noise_scale(signal: float, noise: float, local: int, factor: int) -> None:
    """E|g_b|^2 = |G|^2 + tr(Sigma) / b, whatever the two batch sizes are."""
    scale = GradientNoiseScale(decay=0.9)
    large = local * factor
    value = scale.update(signal + noise / local, local, signal + noise / large, large)
    # The small batch's noise is a difference of two norms; where the signal dwarfs it, digits cancel.
    lost = 1e-9 * (1 + signal * local / noise + noise / (signal * local))
    assert value == pytest.approx(noise / signal, rel=lost)
    assert (scale.signal, scale.noise) == pytest.approx((signal, noise), rel=lost)


def test_synthetic_gradients_of_known_noise_scale_are_measured_within_a_few_percent() -> None:
    """Samples g_i = G + sigma e_i in 200 dimensions: tr(Sigma) = 200 sigma^2, |G|^2 = 1, over 1,500 steps."""
    generator = torch.Generator().manual_seed(0)
    dimensions, sigma, local, workers = 200, 0.8, 4, 8
    mean = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    mean /= mean.norm()
    scale = GradientNoiseScale(decay=0.999)
    for _ in range(1500):
        samples = mean + sigma * torch.randn(workers, local, dimensions, generator=generator, dtype=torch.float64)
        locals_ = samples.mean(dim=1)
        scale.update(locals_.square().sum(dim=1).mean().item(), local, locals_.mean(dim=0).square().sum().item(), 32)
    assert scale.value == pytest.approx(dimensions * sigma**2, rel=0.04)


def test_a_batch_that_grows_in_between_does_not_move_the_estimate() -> None:
    scale = GradientNoiseScale(decay=0.9)
    for large in (64, 128, 1024):
        assert scale.update(1 + 300 / 16, 16, 1 + 300 / large, large) == pytest.approx(300)


def test_the_averages_are_bias_corrected_and_averaged_before_the_division() -> None:
    """Two steps at decay 0.5 weigh 1 to 2: signal (1 + 2 * 4) / 3 = 3, noise (6 + 2 * 12) / 3 = 10."""
    scale = GradientNoiseScale(decay=0.5)
    assert scale.update(1 + 6 / 2, 2, 1 + 6 / 4, 4) == pytest.approx(6)
    assert scale.update(4 + 12 / 2, 2, 4 + 12 / 4, 4) == pytest.approx(10 / 3)


def test_without_a_positive_estimate_the_value_is_not_a_number() -> None:
    scale = GradientNoiseScale()
    assert math.isnan(scale.value)
    assert math.isnan(scale.update(1.0, 2, 1.5, 4))  # more norm in the larger batch: noise below 0
    assert math.isnan(GradientNoiseScale().update(9.0, 2, 1.0, 4))  # signal below 0


def test_a_step_that_overflowed_does_not_change_the_estimate() -> None:
    scale = GradientNoiseScale()
    scale.update(4.0, 2, 2.5, 4)
    before = scale.state_dict()
    scale.update(math.inf, 2, math.inf, 4)
    scale.update(math.nan, 2, 1.0, 4)
    assert scale.state_dict() == before


def test_save_and_load_keeps_the_averages() -> None:
    one, other = GradientNoiseScale(), GradientNoiseScale()
    one.update(4.0, 2, 2.5, 4)
    other.load_state_dict(one.state_dict())
    assert other.update(5.0, 2, 3.0, 4) == one.update(5.0, 2, 3.0, 4)


@pytest.mark.parametrize(("local", "large"), [(4, 4), (8, 4), (0, 4)])
def test_two_different_batch_sizes_are_needed(local: int, large: int) -> None:
    with pytest.raises(UserError, match="0 < local_count < global_count"):
        GradientNoiseScale().update(1.0, local, 1.0, large)


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"decay=0\.99"):
        GradientNoiseScale(decay=1.0)
