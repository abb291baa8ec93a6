"""Rates as pure functions of the fractional epoch; no torch, no state.

    epochs   0 ........ warmup_epochs ............ decay's end .... total_epochs
    rate     warm-up -> peak_lr -> decay -> end_lr ---------------> end_lr

Epochs rather than steps, so that a batch size that changes in mid-run moves nothing (Mikami et al. 2018,
arXiv:1811.05233). A step uses the epoch at its start.
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
"""Akiba et al. 2017, arXiv:1711.04325, section 3: factors of the linearly scaled rate over a run of 90 epochs."""


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
    """The learning rate of a step that starts at `epoch`.

    With x the share of the decay that has passed, in [0, 1]:

        warm-up     start + (peak - start) epoch / warmup_epochs, or start throughout    Goyal et al. 2017, 1706.02677
        poly        end + (peak - end) (1 - x)^power           You et al. 2017, arXiv:1709.05011
        cosine      end + (peak - end) (1 + cos(pi x)) / 2     Loshchilov and Hutter 2016, arXiv:1608.03983
        step        peak * factor of the last entry reached
        piecewise   peak * factor, entries joined by straight lines
        slow_start  Akiba et al. 2017, arXiv:1711.04325, boundaries scaled by total_epochs / 90

    Args:
        warmup: "none" ignores `warmup_epochs` altogether.
        decay_epochs: length of poly and cosine after warm-up; None: to `total_epochs`. Afterwards the rate is `end_lr`.
        decay_counts_warmup: x counts from epoch 0 (Caffe: the rate falls at the end of warm-up) or from the end of
            warm-up (TensorFlow and MLPerf: continuous). The decay ends at the same epoch either way.
        lr_factors: needed for step and piecewise.

    Raises:
        UserError: a negative epoch, an unknown name, or factors that are missing.
    """
    _require(epoch >= 0, f"epoch={epoch} was given, needed: 0 or more; for example epoch=0.0")
    ramp_epochs = _ramp_epochs(warmup, warmup_epochs)
    if epoch < ramp_epochs:
        share = epoch / ramp_epochs if warmup == "linear" else 0.0
        return warmup_start_lr + (peak_lr - warmup_start_lr) * share
    if decay in {"poly", "cosine"}:
        end = total_epochs if decay_epochs is None else ramp_epochs + decay_epochs
        passed = _share(epoch, 0.0 if decay_counts_warmup else ramp_epochs, end)
        remaining = (1 - passed) ** poly_power if decay == "poly" else (1 + math.cos(math.pi * passed)) / 2
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
    """`peak_lr`, given for `reference_batch_size`, carried to `global_batch_size`.

    none    peak_lr
    linear  peak_lr * B / B_ref          Goyal et al. 2017, arXiv:1706.02677, 2.1
    sqrt    peak_lr * sqrt(B / B_ref)    Krizhevsky 2014, arXiv:1404.5997; with 4.0 for 512 it is `lars_sqrt_peak_lr`
    """
    ratio = global_batch_size / reference_batch_size
    factors = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    _require(scaling in factors, f"scaling={scaling} was given, needed one of none, linear, sqrt; scaling=linear works")
    return peak_lr * factors[scaling]


def lars_sqrt_peak_lr(global_batch_size: float) -> float:
    """Peak rate of LARS with the rate outside the momentum buffer: 4 sqrt(B / 512).

    What the LARS authors' group published for ResNet-50 from 512 to 32,768 (NUS-HPC, LARS-ImageNet-PyTorch).
    """
    return 4.0 * math.sqrt(global_batch_size / 512)


def weight_decay_at(lr: float, peak_lr: float, weight_decay: float) -> float:
    """A coefficient that follows the rate, weight_decay * lr / peak_lr, where the update takes lr once more.

    No recipe here does that. Fujitsu's code (MLPerf v0.6) schedules weight_decay * peak_lr and leaves lr out of the
    update, which is ordinary weight decay: there the coefficient stays constant (docs/decisions/0007).
    """
    _require(peak_lr > 0, f"peak_lr={peak_lr} was given, needed: above 0; for example peak_lr=0.1")
    return weight_decay * lr / peak_lr


def resolution_at(epoch: float, resolution: ByEpoch, ramp: bool = False, multiple: int = 32) -> int:
    """Training pixels at `epoch`, the same on every worker.

    Without `ramp` the last entry reached. With it, straight lines between entries, rounded to the nearest multiple of
    `multiple` (progressive resizing; Karras et al. 2018, arXiv:1710.10196, and FFCV's ImageNet recipe); entries
    themselves, and all after the last, are kept as written.
    """
    _require(len(resolution) > 0, "resolution is empty; resolution=((0, 224),) works")
    entry = value_at(resolution, epoch)
    if not ramp or epoch >= resolution[-1][0] or any(epoch == start for start, _ in resolution):
        return round(entry)
    sizes = [size for _, size in resolution]
    rounded = multiple * math.floor(line_at(resolution, epoch) / multiple + 0.5)
    return round(min(max(sizes), max(min(sizes), rounded)))


def sgd_share(epoch: float, center_epoch: float = 10.0, period_epochs: float = 5.0) -> float:
    """alpha_SGD, the share of SGD in the update: from nearly 0 to 1, continuous with its slope.

        epoch < center                          exp(2 (epoch - center) / period) / 2
        center <= epoch < center + period / 2   1/2 + (epoch - center) / period
        after                                   1                    Akiba et al. 2017, arXiv:1711.04325, section 3.1

    The middle branch as it is usually quoted has twice this slope; it overshoots to 1.5 and then drops to 1. The slope
    here is the one that joins both neighbours: (1 + ELU(2 (epoch - center) / period)) / 2, cut at 1.
    """
    _require(period_epochs > 0, f"period_epochs={period_epochs} was given, needed: above 0; for example 5.0")
    if epoch < center_epoch:
        return 0.5 * math.exp(2 * (epoch - center_epoch) / period_epochs)
    return min(1.0, 0.5 + (epoch - center_epoch) / period_epochs)


def value_at(by_epoch: ByEpoch, epoch: float) -> float:
    """The value of the last entry that starts at or before `epoch`; of the first one before that."""
    value = by_epoch[0][1]
    for start, entry in by_epoch:
        if start <= epoch:
            value = entry
    return value


def line_at(by_epoch: ByEpoch, epoch: float) -> float:
    """Straight lines through the entries; constant before the first and after the last."""
    for (start, low), (end, high) in itertools.pairwise(by_epoch):
        if start <= epoch < end:
            return low + (high - low) * (epoch - start) / (end - start)
    return value_at(by_epoch, epoch)


def _share(epoch: float, start: float, end: float) -> float:
    """How much of [start, end] has passed, in [0, 1]; 1 where the interval is empty."""
    return min(1.0, max(0.0, (epoch - start) / (end - start))) if end > start else 1.0


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
