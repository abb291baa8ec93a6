"""Curves: unbiased thinning, smoothing, and gaps for missing values."""

import math
import re

import numpy as np
import pytest

from megabatch.observe.figures import MAX_POINTS, Line, _running_mean, _thinned, chart


def test_a_long_run_is_thinned_to_the_means_of_neighbours() -> None:
    x = np.arange(10 * MAX_POINTS, dtype=float)
    thin_x, thin_y = _thinned(x, 3 * x)
    assert len(thin_x) == MAX_POINTS
    assert thin_x[0] == pytest.approx(4.5)  # the mean of 0..9
    assert thin_y == pytest.approx(3 * thin_x)


@pytest.mark.parametrize("count", [1, MAX_POINTS, MAX_POINTS + 1, 2 * MAX_POINTS - 1, 12_345])
def test_thinning_gives_every_point_the_same_weight(count: int) -> None:
    y = np.random.default_rng(0).random(count)
    edges = np.linspace(0, count, MAX_POINTS + 1).astype(int) if count > MAX_POINTS else np.arange(count + 1)
    _, thin = _thinned(np.arange(count, dtype=float), y)
    assert (thin * np.diff(edges)).sum() == pytest.approx(y.sum())


def test_the_running_mean_is_the_mean_of_finite_neighbours() -> None:
    y = np.array([1.0, 2.0, math.nan, 4.0, 5.0])
    assert _running_mean(y, 3) == pytest.approx([1.5, 1.5, math.nan, 4.5, 4.5], nan_ok=True)


def test_a_constant_stays_constant_when_smoothed() -> None:
    assert _running_mean(np.full(100, 7.0), 9) == pytest.approx(np.full(100, 7.0))


def test_without_finite_points_no_chart_is_drawn() -> None:
    assert chart([Line([0.0, 1.0], [math.nan, math.nan], 0)], name="x") is None
    assert chart([], name="x") is None


def test_a_gap_in_the_data_is_a_gap_in_the_line() -> None:
    def num_strokes(y: list[float]) -> int:
        svg = chart([Line([0.0, 1.0, 2.0, 3.0, 4.0], y, 0)], name="x")
        assert svg is not None
        path = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--series-0\)', svg)
        assert path is not None
        return path[1].count("M ")

    assert num_strokes([1, 2, 3, 4, 5]) == 1
    assert num_strokes([1, 2, math.nan, 4, 5]) == 2
