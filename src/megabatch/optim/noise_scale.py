"""Gradient noise scale from the gradient norms of a small and a large batch; needs no torch."""

import math
from typing import Any

from megabatch.errors import UserError


class GradientNoiseScale:
    """Estimates B_simple = tr(Sigma) / |G|^2, in samples (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    Sigma is the covariance of one sample's gradient and G the true gradient. The mean gradient g_b of b samples has
    E|g_b|^2 = |G|^2 + tr(Sigma) / b, so two batch sizes b < B give unbiased estimates of both:

        |G|^2     ~ (B |g_B|^2 - b |g_b|^2) / (B - b)
        tr(Sigma) ~ (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    One step's values are noisy and may be negative. Each is averaged over steps, with bias correction, before the
    division, since a mean of ratios would be biased.

        noise_scale = GradientNoiseScale()
        noise_scale.update(mean_local_sq_norm, 32, global_sq_norm, 4096)
        noise_scale.value

    Args:
        decay: decay per step of the averages, in [0, 1); 0.99 averages over about 100 steps.

    Raises:
        UserError: a decay outside [0, 1); in `update`, batch sizes other than 0 < b < B.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay={decay} was given, needed: in [0, 1); for example decay=0.99")
        self._decay = decay
        self._signal_sum = self._noise_sum = self._weight = 0.0

    def update(
        self, mean_local_sq_norm: float, local_count: float, global_sq_norm: float, global_count: float
    ) -> float:
        """Adds one step's measurement; returns the new `value`.

        Args:
            mean_local_sq_norm: mean of |g_b|^2 over the small batches, each g_b a mean over its samples.
            local_count: b, in samples.
            global_sq_norm: |g_B|^2, with g_B the mean gradient over all samples.
            global_count: B, in samples, more than b.
        """
        if not 0 < local_count < global_count:
            raise UserError(
                f"local_count={local_count}, global_count={global_count} were given, needed: two batch sizes with "
                "0 < local_count < global_count; local_count=32, global_count=256 work"
            )
        signal = (global_count * global_sq_norm - local_count * mean_local_sq_norm) / (global_count - local_count)
        noise = (mean_local_sq_norm - global_sq_norm) / (1 / local_count - 1 / global_count)
        if math.isfinite(signal) and math.isfinite(noise):  # skips a step whose gradient overflowed
            rate = 1 - self._decay
            self._signal_sum += rate * (signal - self._signal_sum)
            self._noise_sum += rate * (noise - self._noise_sum)
            self._weight += rate * (1 - self._weight)
        return self.value

    @property
    def signal(self) -> float:
        """Smoothed estimate of |G|^2; NaN before the first update."""
        return self._signal_sum / self._weight if self._weight else math.nan

    @property
    def noise(self) -> float:
        """Smoothed estimate of tr(Sigma); NaN before the first update."""
        return self._noise_sum / self._weight if self._weight else math.nan

    @property
    def value(self) -> float:
        """B_simple in samples; NaN before the first update and while either average is not above 0."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers."""
        return {"signal_sum": self._signal_sum, "noise_sum": self._noise_sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._signal_sum, self._noise_sum = float(state["signal_sum"]), float(state["noise_sum"])
        self._weight = float(state["weight"])
