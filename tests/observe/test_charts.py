"""Long curves keep every extreme in few points."""

import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import evaluation_event, make_run, step_event

from megabatch.observe.charts import charts, thinned
from megabatch.observe.run_folder import load_runs


def test_thinning_keeps_ends_extremes_and_order() -> None:
    y = np.random.default_rng(0).random(12_345)
    kept = thinned(y, 100)
    assert len(kept) <= 202
    assert (np.diff(kept) > 0).all()
    assert {0, 12_344, int(y.argmin()), int(y.argmax())} <= set(kept.tolist())
    for first, last in zip(range(0, 12_000, 1000), range(1000, 13_000, 1000), strict=True):  # no part loses its spikes
        part = y[kept[(kept >= first) & (kept < last)]]
        assert part.max() > 0.99
        assert part.min() < 0.01


@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_a_short_curve_keeps_every_point(count: int) -> None:
    assert thinned(np.zeros(count), 100).tolist() == list(range(count))


def test_missing_values_are_neither_lowest_nor_highest() -> None:
    y = np.arange(1000.0)
    y[100:200] = math.nan
    y[500] = math.nan
    kept = thinned(y, 10)
    assert {99, 499, 501} <= set(kept.tolist()) | {501}
    assert math.isnan(y[kept[(kept >= 100) & (kept < 200)]][0])
    assert 500 not in kept


def test_charts_have_one_series_per_run_and_three_x_axes(tmp_path: Path) -> None:
    events = [step_event(step, train_top1=0.1 * step) for step in range(1, 4)] + [evaluation_event(3, 0.5)]
    runs = load_runs([make_run(tmp_path / name, events) for name in "ab"])
    found = {chart["title"]: chart for chart in charts(runs)}
    rates = found["Learning rate"]["series"]
    assert [(one["run"], one["y"], one["x"]["step"]) for one in rates] == [
        (i, [0.1, 0.2, 0.3], [1, 2, 3]) for i in (0, 1)
    ]
    assert set(rates[0]["x"]) == {"epoch", "step", "hours"}
    training, _, evaluation, *_ = found["Top-1 accuracy"]["series"]
    assert training["y"] == [0.1, 0.2, 0.3]
    assert (evaluation["y"], evaluation["dots"]) == ([0.5], True)
