"""Is a run on the published curve? Compares an evaluation with accuracies that others published by epoch."""

import itertools
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["on", "above", "below"]
Curve = Sequence[tuple[float, float]]
"""Pairs `(epoch, top1)` with ascending epochs."""

TOLERANCE = 0.005
"""Half a point: wider than the spread of a finished run's top-1 over seeds, narrower than a wrong recipe's loss."""


def published_at(published_curve: Curve, epoch: float) -> float | None:
    """The published top-1 at `epoch`, linear between the published points and level after the last.

    None before the first point, where nothing is known.
    """
    if not published_curve or epoch < published_curve[0][0]:
        return None
    for (start, low), (end, high) in itertools.pairwise(published_curve):
        if start <= epoch < end:
            return low + (high - low) * (epoch - start) / (end - start)
    return published_curve[-1][1]


def against_curve(published_curve: Curve, epoch: float, top1: float, tolerance: float = TOLERANCE) -> Verdict | None:
    """Whether `top1` in [0, 1] at `epoch` is on (within `tolerance`), above or below the curve.

    A recipe of which only the epochs to a target are published has a curve of that one point. Before its first
    point a curve can only be beaten: who has reached its accuracy already is above it, and for all others the
    answer is None, as it is without a curve.
    """
    if not published_curve:
        return None
    published = published_at(published_curve, epoch)
    if published is None:
        return "above" if top1 >= published_curve[0][1] else None
    if abs(top1 - published) <= tolerance:
        return "on"
    return "above" if top1 > published else "below"


def curve_text(published_curve: Curve, epoch: float, top1: float, tolerance: float = TOLERANCE) -> str:
    """A remark for the line of an evaluation, such as `below the published curve (0.547 at epoch 50)`; may be empty."""
    verdict = against_curve(published_curve, epoch, top1, tolerance)
    if verdict is None:
        return ""
    published = published_at(published_curve, epoch)
    if published is None:
        at_epoch, published = published_curve[0]
    else:
        at_epoch = min(epoch, published_curve[-1][0])
    return f"{verdict} the published curve ({published:.3f} at epoch {at_epoch:.4g})"
