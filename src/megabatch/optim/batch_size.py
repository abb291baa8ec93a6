"""Batch-size control: a schedule by epoch, what follows a change, and growth by the measured noise scale."""

import math
from typing import Any, Literal

from megabatch.errors import UserError
from megabatch.optim.noise_scale import GradientNoiseScale
from megabatch.optim.schedule import ByEpoch, value_at

BatchSizeRule = Literal["fixed", "linear", "sqrt", "noise_scale"]


def batch_size_at(epoch: float, batch_sizes: ByEpoch, default: int = 0) -> int:
    """Global batch size of a step that starts at `epoch` (Mikami et al. 2018, 1811.05233; Smith et al. 1711.00489).

    Args:
        batch_sizes: pairs `(from_epoch, global_batch_size)`; may be empty.
        default: the answer without a schedule, and before its first entry.
    """
    reached = [pair for pair in batch_sizes if pair[0] <= epoch]
    size = int(value_at(reached, epoch)) if reached else default
    if size < 1:
        raise UserError(f"no batch size at epoch {epoch:g}; batch_sizes=((0, 2048), (30, 4096)) works")
    return size


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
    """Rate and momentum for a step of `batch` samples when both were given for `base_batch`.

        fixed        as they are
        linear       lr * B / B0                                       Goyal et al. 2017, arXiv:1706.02677
        sqrt         lr * sqrt(B / B0)
        noise_scale  M = 1 - lr n / (B NS), NS = lr n / (B0 (1 - m))   Smith and Le 2017, 1710.06451; Mikami et al.

    `noise_scale` keeps the noise of the updates, NS = lr n / (B (1 - M)), by raising the momentum instead of the rate:
    for B = 2 B0, momentum 0.9 becomes 0.95. M is clipped to [0, max_momentum]; beyond that NS is no longer kept.
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
        return lr, momentum  # such a step has no noise to keep
    noise_scale = lr * num_train_images / (base_batch * (1 - momentum))
    kept = 1 - lr * num_train_images / (batch * noise_scale)
    return lr, min(max_momentum, max(0.0, kept))


class NoiseScaleBatchPolicy:
    """Doubles the global batch when the gradient noise scale has outgrown it (McCandlish et al. 2018, 1812.06162).

    A batch near B_simple = tr(Sigma) / |G|^2 spends few more samples than small batches do and far fewer steps. The
    batch grows when the smoothed estimate exceeds the *next* batch by `hysteresis`, at most once in
    `min_steps_between` steps, and never shrinks: the noise scale grows as the loss falls, and a batch that goes back
    and forth would move the rate with it.

    Every worker must observe the same four numbers; then every worker takes the same decision at the same step.

    Args:
        global_batch_size: to start with.
        unit: every batch is a multiple of it (one batch-norm span).
        max_batch_size: never more than this.
        decay: of the two averages behind the estimate, per step.
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
                f"growth={growth}, hysteresis={hysteresis}: needed growth > 1, hysteresis >= 0; 2.0, 0.05 work"
            )
        self.global_batch_size = global_batch_size
        self.noise_scale = GradientNoiseScale(decay)
        self._unit, self._max, self._growth = unit, max_batch_size, growth
        self._hysteresis, self._min_steps = hysteresis, min_steps_between
        self._steps_since_change = 0

    def observe(self, mean_local_sq_norm: float, local_count: float, global_sq_norm: float, global_count: float) -> int:
        """One step's gradient norms (see `GradientNoiseScale.update`); the batch size from the next step on."""
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
        """Plain numbers."""
        return {
            "global_batch_size": self.global_batch_size,
            "steps_since_change": self._steps_since_change,
            "noise_scale": self.noise_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.global_batch_size = int(state["global_batch_size"])
        self._steps_since_change = int(state["steps_since_change"])
        self.noise_scale.load_state_dict(state["noise_scale"])
