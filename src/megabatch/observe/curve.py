"""Compares an evaluation with a published curve of top-1 by epoch: on, above or below it."""

import itertools
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["on", "above", "below"]
Curve = Sequence[tuple[float, float]]
"""Pairs `(epoch, top1)` with ascending epochs."""

TOLERANCE = 0.005
"""Half a percentage point: more than the spread over seeds, less than the accuracy lost by a wrong recipe."""


def published_at(published_curve: Curve, epoch: float) -> float | None:
    """Returns the published top-1 at `epoch`: linear between the points, constant after the last.

    Returns None before the first point.
    """
    if not published_curve or epoch < published_curve[0][0]:
        return None
    for (start, low), (end, high) in itertools.pairwise(published_curve):
        if start <= epoch < end:
            return low + (high - low) * (epoch - start) / (end - start)
    return published_curve[-1][1]


def against_curve(published_curve: Curve, epoch: float, top1: float, tolerance: float = TOLERANCE) -> Verdict | None:
    """Returns "on" (within `tolerance`), "above" or "below" for `top1` in [0, 1] at `epoch`.

    A recipe with a published number of epochs to a target has a curve of that one point. Before the first published
    point only "above" can be reported: when `top1` has already reached the accuracy of that point. Otherwise, and for
    an empty curve, the result is None.
    """
    if not published_curve:
        return None
    published = published_at(published_curve, epoch)
    if published is None:
        return "above" if top1 >= published_curve[0][1] else None
    if abs(top1 - published) <= tolerance:
        return "on"
    return "above" if top1 > published else "below"


def curve_text(published_curve: Curve, epoch: float, top1: float) -> str:
    """Returns a remark on an evaluation, such as `below the published curve (0.547 at epoch 50)`, or an empty text."""
    verdict = against_curve(published_curve, epoch, top1)
    if verdict is None:
        return ""
    published = published_at(published_curve, epoch)
    if published is None:
        at_epoch, published = published_curve[0]
    else:
        at_epoch = min(epoch, published_curve[-1][0])
    return f"{verdict} the published curve ({published:.3f} at epoch {at_epoch:.4g})"
