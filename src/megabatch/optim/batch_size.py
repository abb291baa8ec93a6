"""Batch-size control: a schedule by epoch, adjusting lr or momentum, and growth by the measured noise scale."""

import math
from typing import Any, Literal

from megabatch.errors import UserError
from megabatch.optim.noise_scale import GradientNoiseScale

BatchSizeRule = Literal["fixed", "linear", "sqrt", "noise_scale"]


def adjusted(
    lr: float,
    momentum: float,
    *,
    batch: int,
    base_batch: int,
    rule: BatchSizeRule,
    num_train_images: int,
    max_momentum: float = 0.99,
) -> tuple[float, float]:
    """Learning rate and momentum for a step of `batch` samples, from values given for `base_batch` samples.

        fixed        both unchanged
        linear       lr * B / B0                                       Goyal et al. 2017, arXiv:1706.02677
        sqrt         lr * sqrt(B / B0)
        noise_scale  M = 1 - lr n / (B NS), NS = lr n / (B0 (1 - m))   Smith and Le 2017, 1710.06451; Mikami et al.

    `noise_scale` keeps the noise of the updates, NS = lr n / (B (1 - M)), by raising the momentum instead of the rate:
    for B = 2 B0, momentum 0.9 becomes 0.95. M is clipped to [0, max_momentum], and NS is not kept if M is clipped. n is
    `num_train_images`.

    Raises:
        UserError: an unknown rule.
    """
    ratio = batch / base_batch
    if rule == "fixed":
        return lr, momentum
    if rule == "linear":
        return lr * ratio, momentum
    if rule == "sqrt":
        return lr * math.sqrt(ratio), momentum
    if rule != "noise_scale":
        raise UserError(f"rule={rule} was given, needed one of fixed, linear, sqrt, noise_scale; rule=linear works")
    if lr == 0:
        return lr, momentum  # a step at rate 0 has no noise
    noise_scale = lr * num_train_images / (base_batch * (1 - momentum))
    kept = 1 - lr * num_train_images / (batch * noise_scale)
    return lr, min(max_momentum, max(0.0, kept))


class NoiseScaleBatchPolicy:
    """Grows the global batch size as the gradient noise scale grows (McCandlish et al. 2018, arXiv:1812.06162).

    A batch near B_simple = tr(Sigma) / |G|^2 needs few more samples than small batches do, and far fewer steps. With B
    the present batch size, a step changes it to

        B' = min(growth B, max_batch_size), rounded down to a multiple of unit

    if the smoothed estimate of B_simple is at least (1 + hysteresis) B' and at least `min_steps_between` steps have
    passed since the last change. The batch size never shrinks: the noise scale grows as the loss falls, and a batch
    size that alternates would make the learning rate alternate.

    All workers must observe the same four numbers; then they all make the same decision at the same step.

        policy = NoiseScaleBatchPolicy(4096, unit=256, max_batch_size=65536)
        batch_size = policy.observe(mean_local_sq_norm, 64, global_sq_norm, batch_size)

    Args:
        global_batch_size: initial value, in samples; a multiple of `unit`.
        unit: every batch size is a multiple of it (one batch-norm span), in samples.
        max_batch_size: upper limit, in samples.
        growth: factor of one change, above 1.
        hysteresis: relative margin of the estimate over the next batch size, 0 or more.
        min_steps_between: steps between two changes.
        decay: decay per step of the two averages in the estimate; see `GradientNoiseScale`.

    Attributes:
        global_batch_size: the present value.
        noise_scale: the `GradientNoiseScale`.

    Raises:
        UserError: a batch size that is no multiple of `unit`, growth of 1 or less, hysteresis below 0, or a decay
            outside [0, 1).
    """

    def __init__(
        self,
        global_batch_size: int,
        *,
        unit: int = 1,
        max_batch_size: int,
        growth: float = 2.0,
        hysteresis: float = 0.05,
        min_steps_between: int = 100,
        decay: float = 0.99,
    ) -> None:
        if global_batch_size % unit or global_batch_size < unit:
            raise UserError(
                f"global_batch_size={global_batch_size} is not a multiple of unit={unit}; "
                f"global_batch_size={unit * max(1, global_batch_size // unit)} works"
            )
        if growth <= 1 or hysteresis < 0:
            raise UserError(
                f"growth={growth}, hysteresis={hysteresis} were given, needed: growth > 1 and hysteresis >= 0; "
                "growth=2.0, hysteresis=0.05 work"
            )
        self.global_batch_size = global_batch_size
        self.noise_scale = GradientNoiseScale(decay)
        self._unit, self._max, self._growth = unit, max_batch_size, growth
        self._hysteresis, self._min_steps = hysteresis, min_steps_between
        self._steps_since_change = 0

    def observe(self, mean_local_sq_norm: float, local_count: float, global_sq_norm: float, global_count: float) -> int:
        """Adds one step's gradient norms (see `GradientNoiseScale.update`); returns the next step's batch size."""
        self.noise_scale.update(mean_local_sq_norm, local_count, global_sq_norm, global_count)
        self._steps_since_change += 1
        larger = self._next_size()
        outgrown = self.noise_scale.value >= larger * (1 + self._hysteresis)
        if larger > self.global_batch_size and outgrown and self._steps_since_change >= self._min_steps:
            self.global_batch_size = larger
            self._steps_since_change = 0
        return self.global_batch_size

    def _next_size(self) -> int:
        wanted = min(self.global_batch_size * self._growth, self._max)
        return max(self.global_batch_size, int(wanted) // self._unit * self._unit)

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers."""
        return {
            "global_batch_size": self.global_batch_size,
            "steps_since_change": self._steps_since_change,
            "noise_scale": self.noise_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.global_batch_size = int(state["global_batch_size"])
        self._steps_since_change = int(state["steps_since_change"])
        self.noise_scale.load_state_dict(state["noise_scale"])
