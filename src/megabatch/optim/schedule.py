"""Schedules as pure functions of the fractional epoch; they need no torch and keep no state.

    epochs   0 ........ warmup_epochs ............ decay's end .... total_epochs
    rate     warm-up -> peak_lr -> decay -> end_lr ---------------> end_lr

Schedules count epochs rather than steps, so that a change of the batch size in mid-run does not shift them (Mikami et
al. 2018, arXiv:1811.05233). A step uses the epoch at its start.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from megabatch.errors import UserError

ByEpoch = Sequence[tuple[float, float]]
"""Pairs `(from_epoch, value)`, epochs ascending."""

Warmup = Literal["none", "linear", "constant"]
Decay = Literal["constant", "poly", "cosine", "step", "piecewise", "slow_start"]
Scaling = Literal["none", "linear", "sqrt"]

SLOW_START_EPOCHS = 90.0
SLOW_START_FACTORS: ByEpoch = ((0.0, 0.5), (40.0, 0.075), (70.0, 0.01), (85.0, 0.001))
"""Factors of the linearly scaled rate over a run of 90 epochs (Akiba et al. 2017, arXiv:1711.04325, section 3)."""


def learning_rate(
    epoch: float,
    *,
    peak_lr: float,
    total_epochs: float,
    warmup: Warmup = "none",
    warmup_epochs: float = 0.0,
    warmup_start_lr: float = 0.0,
    decay: Decay = "constant",
    poly_power: float = 2.0,
    end_lr: float = 0.0,
    decay_epochs: float | None = None,
    decay_counts_warmup: bool = False,
    lr_factors: ByEpoch = (),
) -> float:
    """Learning rate of a step that starts at `epoch`.

    With x the fraction of the decay that has passed, in [0, 1]:

        warm-up     start + (peak - start) epoch / warmup_epochs, or start throughout    Goyal et al. 2017, 1706.02677
        poly        end + (peak - end) (1 - x)^power           You et al. 2017, arXiv:1709.05011
        cosine      end + (peak - end) (1 + cos(pi x)) / 2     Loshchilov and Hutter 2016, arXiv:1608.03983
        step        peak * factor of the last entry reached
        piecewise   peak * factor, interpolated linearly between entries
        slow_start  Akiba et al. 2017, arXiv:1711.04325, boundaries scaled by total_epochs / 90

        lr = learning_rate(
            2.5, peak_lr=32.0, total_epochs=90, warmup="linear", warmup_epochs=5, decay="poly"
        )  # 16.0

    Args:
        epoch: fractional epoch, 0 or more.
        warmup: with "none", `warmup_epochs` is ignored.
        warmup_start_lr: rate at epoch 0, or throughout a constant warm-up.
        decay_epochs: length of poly and cosine after warm-up; None means up to `total_epochs`. Afterwards the rate is
            `end_lr`.
        decay_counts_warmup: True counts x from epoch 0 (Caffe: the rate drops at the end of warm-up), False from the
            end of warm-up (TensorFlow and MLPerf: continuous). The decay ends at the same epoch in both cases.
        lr_factors: pairs `(from_epoch, factor)`, required for step and piecewise.

    Raises:
        UserError: a negative epoch, an unknown name, or missing factors.
    """
    _require(epoch >= 0, f"epoch={epoch} was given, needed: 0 or more; for example epoch=0.0")
    ramp_epochs = _ramp_epochs(warmup, warmup_epochs)
    if epoch < ramp_epochs:
        fraction = epoch / ramp_epochs if warmup == "linear" else 0.0
        return warmup_start_lr + (peak_lr - warmup_start_lr) * fraction
    if decay in {"poly", "cosine"}:
        end = total_epochs if decay_epochs is None else ramp_epochs + decay_epochs
        x = _fraction(epoch, 0.0 if decay_counts_warmup else ramp_epochs, end)
        remaining = (1 - x) ** poly_power if decay == "poly" else (1 + math.cos(math.pi * x)) / 2
        return end_lr + (peak_lr - end_lr) * remaining
    return peak_lr * _factor(epoch, decay, total_epochs, lr_factors)


def _ramp_epochs(warmup: str, warmup_epochs: float) -> float:
    names = {"none", "linear", "constant"}
    _require(
        warmup in names, f"warmup={warmup} was given, needed one of {', '.join(sorted(names))}; warmup=linear works"
    )
    return 0.0 if warmup == "none" else warmup_epochs


def _factor(epoch: float, decay: str, total_epochs: float, lr_factors: ByEpoch) -> float:
    if decay == "constant":
        return 1.0
    if decay == "slow_start":
        return value_at(SLOW_START_FACTORS, epoch * SLOW_START_EPOCHS / total_epochs)
    names = "constant, poly, cosine, step, piecewise, slow_start"
    _require(decay in {"step", "piecewise"}, f"decay={decay} was given, needed one of {names}; decay=poly works")
    _require(len(lr_factors) > 0, f"decay={decay} needs lr_factors; for example lr_factors=((0, 1.0), (30, 0.1))")
    return value_at(lr_factors, epoch) if decay == "step" else line_at(lr_factors, epoch)


def scaled_peak_lr(peak_lr: float, *, scaling: Scaling, global_batch_size: float, reference_batch_size: float) -> float:
    """Peak rate for `global_batch_size`, scaled from a `peak_lr` given for `reference_batch_size`.

    none    peak_lr
    linear  peak_lr * B / B_ref          Goyal et al. 2017, arXiv:1706.02677, 2.1
    sqrt    peak_lr * sqrt(B / B_ref)    Krizhevsky 2014, arXiv:1404.5997

    For ResNet-50 under LARS with B from 512 to 32,768, the LARS authors' group published 4 sqrt(B / 512), which is
    `sqrt` with peak_lr 4.0 for 512 (NUS-HPC, LARS-ImageNet-PyTorch).

    Raises:
        UserError: an unknown scaling.
    """
    ratio = global_batch_size / reference_batch_size
    factors = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    _require(scaling in factors, f"scaling={scaling} was given, needed one of none, linear, sqrt; scaling=linear works")
    return peak_lr * factors[scaling]


def resolution_at(epoch: float, resolution: ByEpoch, ramp: bool = False, multiple: int = 32) -> int:
    """Training resolution at `epoch`, in pixels; the same on every worker.

    Without `ramp` it is that of the last entry reached. With `ramp` it is interpolated linearly between entries and
    rounded to the nearest multiple of `multiple` (progressive resizing; Karras et al. 2018, arXiv:1710.10196, and
    FFCV's ImageNet recipe). The resolutions of the entries themselves, and after the last one, are not rounded.
    """
    _require(len(resolution) > 0, "resolution is empty; resolution=((0, 224),) works")
    entry = value_at(resolution, epoch)
    if not ramp or epoch >= resolution[-1][0] or any(epoch == start for start, _ in resolution):
        return round(entry)
    sizes = [size for _, size in resolution]
    rounded = multiple * math.floor(line_at(resolution, epoch) / multiple + 0.5)
    return round(min(max(sizes), max(min(sizes), rounded)))


def sgd_share(epoch: float, center_epoch: float = 10.0, period_epochs: float = 5.0) -> float:
    """alpha_SGD, the share of SGD in the update: grows from nearly 0 to 1, with a continuous slope up to its end.

        epoch < center                          exp(2 (epoch - center) / period) / 2
        center <= epoch < center + period / 2   1/2 + (epoch - center) / period
        after                                   1                    Akiba et al. 2017, arXiv:1711.04325, section 3.1

    The middle branch as it is usually quoted has twice this slope: it overshoots to 1.5 and then drops to 1. With the
    slope used here the branches join: (1 + ELU(2 (epoch - center) / period)) / 2, limited to 1.
    """
    _require(period_epochs > 0, f"period_epochs={period_epochs} was given, needed: above 0; for example 5.0")
    if epoch < center_epoch:
        return 0.5 * math.exp(2 * (epoch - center_epoch) / period_epochs)
    return min(1.0, 0.5 + (epoch - center_epoch) / period_epochs)


def value_at(by_epoch: ByEpoch, epoch: float) -> float:
    """Value of the last entry that starts at or before `epoch`; of the first entry if there is none."""
    value = by_epoch[0][1]
    for start, entry in by_epoch:
        if start <= epoch:
            value = entry
    return value


def line_at(by_epoch: ByEpoch, epoch: float) -> float:
    """Linear interpolation between the entries; constant before the first and after the last."""
    for (start, low), (end, high) in itertools.pairwise(by_epoch):
        if start <= epoch < end:
            return low + (high - low) * (epoch - start) / (end - start)
    return value_at(by_epoch, epoch)


def _fraction(epoch: float, start: float, end: float) -> float:
    """Fraction of [start, end] that has passed at `epoch`, in [0, 1]; 1 for an empty interval."""
    return min(1.0, max(0.0, (epoch - start) / (end - start))) if end > start else 1.0


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
