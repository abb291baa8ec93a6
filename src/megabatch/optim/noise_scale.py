"""Gradient noise scale from the norms of a small and a large batch's gradient. No torch."""

import math
from typing import Any

from megabatch.errors import UserError


class GradientNoiseScale:
    """B_simple = tr(Sigma) / |G|^2, in samples (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    Sigma is the covariance of one sample's gradient and G the true gradient. A mean over b samples has
    E|g_b|^2 = |G|^2 + tr(Sigma) / b, so two batch sizes give both without bias:

        |G|^2     ~ (B |g_B|^2 - b |g_b|^2) / (B - b)
        tr(Sigma) ~ (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    One step's values are noisy and may be negative; each is averaged over steps, with bias correction, before the
    division (a mean of ratios would be biased).

    Args:
        decay: weight of the past in the averages, per step; 0.99 looks back about 100 steps.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay={decay} was given, needed: in [0, 1); for example decay=0.99")
        self._decay = decay
        self._signal_sum = self._noise_sum = self._weight = 0.0

    def update(
        self, mean_local_sq_norm: float, local_count: float, global_sq_norm: float, global_count: float
    ) -> float:
        """Takes one step's measurement; the new `value`.

        Args:
            mean_local_sq_norm: mean over the small batches of |g_b|^2, each gradient a mean over its samples.
            local_count: b.
            global_sq_norm: |g_B|^2 of the mean gradient over all samples.
            global_count: B, more than b.
        """
        if not 0 < local_count < global_count:
            raise UserError(
                f"local_count={local_count}, global_count={global_count}: the noise scale needs two batch sizes with "
                "0 < local_count < global_count; for example 32 and 256"
            )
        signal = (global_count * global_sq_norm - local_count * mean_local_sq_norm) / (global_count - local_count)
        noise = (mean_local_sq_norm - global_sq_norm) / (1 / local_count - 1 / global_count)
        if math.isfinite(signal) and math.isfinite(noise):  # a step whose gradient overflowed teaches nothing
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
        """Plain numbers."""
        return {"signal_sum": self._signal_sum, "noise_sum": self._noise_sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._signal_sum, self._noise_sum = float(state["signal_sum"]), float(state["noise_sum"])
        self._weight = float(state["weight"])
