"""Panels of the report that need no chart: time of an update, its timeline, layers, confusion matrix."""

import math
import re
import statistics
from typing import Any

from megabatch.observe.run_folder import RunRecord

PHASES = ("input", "forward", "backward", "exchange", "update", "other")
PHASE_COLORS = {phase: index for index, phase in enumerate(PHASES)}
THUMBNAIL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")
MAX_THUMBNAIL = 64_000
"""Characters of a thumbnail; longer ones, and texts of another form, are not shown."""
MAX_COLUMNS = 60
"""Columns of a heat map: observations of a longer run are left out evenly."""


def median_phases(run: RunRecord) -> dict[str, float]:
    """Returns the median seconds of each phase over all updates but the first; empty without them.

    "graph", a replayed CUDA graph, counts as backward. "other" is the rest of the median update.
    """
    steps = [event for event in run.steps[1:] or run.steps if event.get("phases_s") and event.get("step_s")]
    if not steps:
        return {}
    names = dict.fromkeys(name for event in steps for name in event["phases_s"])
    found = {name: statistics.median(event["phases_s"].get(name, 0.0) for event in steps) for name in names}
    found["backward"] = found.get("backward", 0.0) + found.pop("graph", 0.0)
    rest = statistics.median(event["step_s"] for event in steps) - sum(found.values())
    return found | {"other": max(0.0, rest)}


def breakdown(run: RunRecord) -> dict[str, Any] | None:
    """Returns the bar of a median update: a part per phase, and the same in words."""
    phases = median_phases(run)
    total = sum(phases.values())
    if total <= 0:
        return None
    texts = {name: f"{name} {1e3 * seconds:.3g} ms ({seconds / total:.0%})" for name, seconds in phases.items()}
    parts = [
        {"share": round(1000 * seconds / total, 1), "color": PHASE_COLORS.get(name, 5), "title": texts[name]}
        for name, seconds in phases.items()
    ]
    return {"label": run.label, "text": f"{1e3 * total:.4g} ms; " + ", ".join(texts.values()), "parts": parts}


def timeline(run: RunRecord) -> dict[str, Any] | None:
    """Returns the lanes of one update with the place of each span in percent; None without spans."""
    spans = [span for span in run.timeline if math.isfinite(span.start_ms + span.length_ms)]
    if not spans:
        return None
    first = min(span.start_ms for span in spans)
    length = max(span.start_ms + span.length_ms for span in spans) - first or 1.0
    kinds = list(dict.fromkeys(span.name for span in spans))
    colors = {kind: PHASE_COLORS.get(kind, 5) for kind in kinds}
    lanes: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        lanes.setdefault(span.lane, []).append(
            {
                "left": round(100 * (span.start_ms - first) / length, 3),
                "width": round(100 * span.length_ms / length, 3),
                "color": colors[span.name],
                "title": f"{span.name}: {span.start_ms - first:.2f} to {span.start_ms - first + span.length_ms:.2f} ms",
            }
        )
    return {
        "label": run.label,
        "length": f"{length:.4g}",
        "kinds": [{"name": kind, "color": color} for kind, color in colors.items()],
        "lanes": [{"name": name, "spans": placed} for name, placed in lanes.items()],
    }


def heat_map(run: RunRecord) -> dict[str, Any] | None:
    """Returns the trust ratio of each layer over the run; of gradient to weight norm where there is none."""
    events = [event for event in run.observations if isinstance(event.get("layers"), dict)]
    events = events[:: -(-len(events) // MAX_COLUMNS) or 1]
    names = list(dict.fromkeys(name for event in events for name in event["layers"]))
    if not names:
        return None
    has_ratio = any("trust_ratio" in layer for event in events for layer in event["layers"].values())
    rows = [
        {"name": name, "values": [_heat(event["layers"].get(name, {}), has_ratio) for event in events]}
        for name in names
    ]
    title = "Trust ratio" if has_ratio else "Gradient norm / weight norm"
    return {"title": f"{title}, {run.label}", "epochs": [event.get("epoch") for event in events], "rows": rows}


def _heat(layer: dict[str, Any], has_ratio: bool) -> float | None:
    if has_ratio:
        return layer.get("trust_ratio")
    weight, grad = layer.get("weight_norm"), layer.get("grad_norm")
    return grad / weight if weight and grad is not None else None


def confusion(run: RunRecord) -> dict[str, Any] | None:
    """Returns the confusion matrix of the last evaluation that has one, with the most frequent confusions in words."""
    matrix = next((event["confusion"] for event in reversed(run.evaluations) if event.get("confusion")), None)
    if matrix is None:
        return None
    known = run.start.get("class_names") or []
    names = [str(known[index]) if index < len(known) else str(index) for index in range(len(matrix))]
    rows = [
        {"name": name, "cells": [{"count": count, "share": round(count / max(1, sum(row)), 3)} for count in row]}
        for name, row in zip(names, matrix, strict=True)
    ]
    pairs = [
        (count, f"{names[label]} taken for {names[predicted]} ({count:,})")
        for label, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if label != predicted and count
    ]
    most = [text for _, text in sorted(pairs, reverse=True)[:3]]
    return {"label": run.label, "names": names, "rows": rows, "most": "; ".join(most) or "none"}


def mistakes(run: RunRecord) -> dict[str, Any] | None:
    """Returns the images of the last evaluation about which the model is most surely wrong; None without any."""
    found = (run.mistakes or {}).get("images")
    images = [
        {key: str(image.get(key, "")) for key in ("name", "label", "predicted", "thumbnail")}
        | {"probability": f"{100 * image['probability']:.1f} %"}
        for image in (found if isinstance(found, list) else [])
        if isinstance(image, dict) and _has_thumbnail(image) and isinstance(image.get("probability"), int | float)
    ]
    return {"label": run.label, "images": images} if images else None


def _has_thumbnail(image: dict[str, Any]) -> bool:
    text = str(image.get("thumbnail", ""))
    return len(text) <= MAX_THUMBNAIL and THUMBNAIL.fullmatch(text) is not None
