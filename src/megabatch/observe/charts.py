"""Curves of runs as data of the report's charts: few points, with every minimum and maximum."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabatch.observe.run_folder import RunRecord

NUM_BINS = 1000
"""Bins of a long curve; each keeps its lowest and its highest point."""

Chart = dict[str, Any]


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Returns the charts that have data: title, note, options and series, as JSON values."""
    changing = {"stepped": True, "only_if_changing": True}
    candidates = [
        _accuracy(runs),
        _chart("Loss", "lines: training, mean over the global batch; dots: evaluation", _both(runs, "loss", "loss")),
        _chart("Learning rate", "", _each(runs, "step", "lr")),
        _chart("Throughput", "images/s, all workers", _each(runs, "step", "images_per_s"), from_zero=True),
        _chart("Gradient norm", "of the mean gradient, all parameters", _each(runs, "observation", "grad_norm")),
        _chart("Global batch size", "images per update", _batches(runs), **changing),
        _chart("Resolution", "side of a training image, in pixels", _each(runs, "step", "resolution"), **changing),
        _chart("Momentum", "", _each(runs, "step", "momentum"), only_if_changing=True),
        _chart("Noise scale", "of the gradient, in images", _each(runs, "observation", "noise_scale")),
        _chart("Loss scale", "of fp16", _each(runs, "step", "loss_scale"), stepped=True),
        _chart("Wait for input", "ms per update, rank 0", _each(runs, "step", "phases_s", "input", 1e3)),
        _chart("Exposed communication", "ms per update, rank 0", _each(runs, "step", "exposed_ms"), from_zero=True),
        _chart(
            "CPU use",
            "share of the usable cores, rank 0",
            _each(runs, "observation", "cpu_utilization"),
            percent=True,
            from_zero=True,
        ),
        _chart(
            "GPU use",
            "share of time with a kernel, rank 0",
            _each(runs, "observation", "gpu_utilization"),
            percent=True,
        ),
        _chart(
            "GPU memory in use",
            "GiB, all processes of rank 0's GPU",
            _each(runs, "observation", "gpu_used_bytes", None, 2**-30),
        ),
        _chart("Peak host memory", "GiB, rank 0", _each(runs, "observation", "peak_host_bytes", None, 2**-30)),
        _chart("Peak GPU memory", "GiB, rank 0", _each(runs, "observation", "peak_device_bytes", None, 2**-30)),
    ]
    return [chart for chart in candidates if chart]


def thinned(y: NDArray[np.float64], num_bins: int = NUM_BINS) -> NDArray[np.int64]:
    """Returns ascending indices of the points to draw: the lowest and highest of each bin, the first and the last.

    A line through them has the range of the whole curve in every bin, so that no spike is lost. NaN counts as neither
    lowest nor highest; a bin of NaN only keeps its first, so that a gap stays a gap.
    """
    if len(y) <= 2 * num_bins:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), num_bins + 1).astype(np.int64)
    kept = [np.array([0, len(y) - 1])]
    for extreme, fill in ((np.argmin, math.inf), (np.argmax, -math.inf)):
        filled = np.where(np.isfinite(y), y, fill)
        kept.append(np.array([a + extreme(filled[a:b]) for a, b in itertools.pairwise(edges)]))
    return np.unique(np.concatenate(kept))


def _chart(title: str, note: str, series: list[dict[str, Any]], **options: Any) -> Chart | None:
    series = [one for one in series if any(value is not None for value in one["y"])]
    values = {value for one in series for value in one["y"] if value is not None}
    if not series or (options.pop("only_if_changing", False) and len(values) < 2):
        return None
    return {"title": title, "note": note, "series": series} | options


def _each(
    runs: Sequence[RunRecord], kind: str, field: str, key: str | None = None, factor: float = 1.0, **options: Any
) -> list[dict[str, Any]]:
    """Returns one series per run: `field` of its events, or `field[key]`, times `factor`."""
    return [
        _series(run, kind, [factor * value for value in run.column(field, kind, key)], index, **options)
        for index, run in enumerate(runs)
    ]


def _both(runs: Sequence[RunRecord], training: str, evaluation: str) -> list[dict[str, Any]]:
    return _each(runs, "step", training, name="training") + _each(
        runs, "evaluation", evaluation, name="evaluation", dots=True
    )


def _series(run: RunRecord, kind: str, values: list[float], index: int, **options: Any) -> dict[str, Any]:
    y = np.asarray(values, dtype=np.float64)
    kept = thinned(y)
    hours = [(time_s - run.started_s) / 3600 for time_s in run.column("time_s", kind)]
    x = {"epoch": run.column("epoch", kind), "step": run.column("step", kind), "hours": hours}
    columns = {name: _numbers(np.asarray(column, dtype=np.float64)[kept]) for name, column in x.items()}
    return {"run": index, "x": columns, "y": _numbers(y[kept])} | options


def _accuracy(runs: Sequence[RunRecord]) -> Chart | None:
    """Evaluations over training accuracy, with the published curves dashed and the target as a level."""
    series = _both(runs, "train_top1", "top1")
    if all(run.top1 is None for run in runs) and not any(run.column("train_top1") for run in runs):
        return None
    for curve in sorted({run.recipe.published_curve for run in runs if run.recipe and run.recipe.published_curve}):
        epochs, top1 = zip(*curve, strict=True)
        series.append({"run": None, "name": "published", "x": {"epoch": list(epochs)}, "y": list(top1)})
    levels = {run.recipe.target_top1 for run in runs if run.recipe and run.recipe.target_top1}
    note = "lines: training, on augmented images; dots: evaluation"
    level = max(levels, default=None)
    if level is not None:
        note += f"; dotted: target {100 * level:g} %"
    return _chart("Top-1 accuracy", note, series, percent=True, level=level)


def _batches(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Global batch sizes; the last update, which trains on the remaining data, repeats the value before it."""
    found = []
    for index, run in enumerate(runs):
        sizes = run.column("global_batch_size")
        if len(sizes) > 1 and sizes[-1] < sizes[-2]:
            sizes[-1] = sizes[-2]
        found.append(_series(run, "step", sizes, index))
    return found


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    """Returns JSON numbers of 6 significant digits; None for NaN and infinities."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
