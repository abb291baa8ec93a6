"""Curves as SVG. Colours are CSS variables of the page, so one drawing suits light and dark themes."""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

Values = NDArray[np.float64]

NUM_COLORS = 6
MAX_POINTS = 600
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0202{index:02x}" for index in range(NUM_COLORS))
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(SERIES)
}
"""Placeholder colours that matplotlib draws, and the CSS variables that replace them in the SVG."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Line:
    """One run's curve; `color` is the index of the run. Dashed lines are published curves."""

    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False
    steps: bool = False
    smooth: bool = False


def chart(
    lines: Sequence[Line],
    *,
    name: str,
    percent: bool = False,
    from_zero: bool = False,
    level: float | None = None,
) -> str | None:
    """Returns an SVG of the curves against the epoch; None if no line has a finite point.

    Args:
        name: an id, unique on the page.
        percent: show y in [0, 1] as a percentage.
        from_zero: start the y axis at 0.
        level: y of a thin horizontal line, for example a target.
    """
    if not any(_finite(line).any() for line in lines):
        return None
    with _axes(name) as (figure, axes):
        for line in lines:
            _draw(axes, line)
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        _frame(axes, percent=percent, from_zero=from_zero)
        axes.set_xlabel("epoch")
        return _svg(figure, name)


def timeline_chart(spans: Sequence[tuple[str, str, float, float]], *, name: str) -> str | None:
    """Returns an SVG of the timeline of one update; None without spans.

    Args:
        spans: lane, kind of work, start and length in milliseconds. Each lane is a row, each kind a colour.
        name: an id, unique on the page.
    """
    if not spans:
        return None
    lanes = list(dict.fromkeys(lane for lane, _, _, _ in spans))
    kinds = span_kinds(spans)
    first = min(start for _, _, start, _ in spans)
    with _axes(name, width=12.2, height=0.9 + 0.38 * len(lanes)) as (figure, axes):
        for lane, kind, start, length in spans:
            row, color = lanes.index(lane), SERIES[kinds.index(kind) % NUM_COLORS]
            axes.broken_barh([(start - first, length)], (row - 0.32, 0.64), color=color, alpha=0.85, linewidth=0)
        axes.set_yticks(range(len(lanes)), labels=lanes)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds")
        return _svg(figure, name)


def span_kinds(spans: Sequence[tuple[str, str, float, float]]) -> list[str]:
    """Returns the kinds of work in the order of their colours."""
    return list(dict.fromkeys(kind for _, kind, _, _ in spans))


@contextmanager
def _axes(name: str, *, width: float = 6.0, height: float = 2.7) -> Iterator[tuple[Figure, Axes]]:
    """Yields an empty figure in the page's style. `name` salts the SVG ids, which are unique on the page."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # logs a message when it builds its font cache
    settings: Any = STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _draw(axes: Axes, line: Line) -> None:
    color = SERIES[line.color % NUM_COLORS]
    finite = _finite(line)
    x, y = _thinned(np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float))
    with_markers = np.count_nonzero(finite) <= 40 and not line.steps
    options: dict[str, Any] = {"color": color, "linewidth": 1.7}
    if line.dashed:
        options |= {"color": MUTED, "linestyle": (0, (4, 2)), "linewidth": 1.4}
    if with_markers:
        options |= {"marker": "o", "markersize": 3.2 if not line.dashed else 2.4}
    if line.steps:
        options["drawstyle"] = "steps-post"
    if line.smooth and len(y) > 60:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)  # the raw values, faint behind their mean
        y = _running_mean(y, window=max(3, len(y) // 30))
    axes.plot(x, y, **options)


def _frame(axes: Axes, *, percent: bool, from_zero: bool) -> None:
    if from_zero:
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
    axes.margins(x=0.02)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else _plain))


def _plain(value: float, _: int | None = None) -> str:
    """Formats a tick, for example 20,000 or 0.05."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _percent(value: float, _: int | None = None) -> str:
    return f"{100 * value:.4g} %"


def _finite(line: Line) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.isfinite(np.asarray(line.x, dtype=float) + np.asarray(line.y, dtype=float))
    return finite


def _thinned(x: Values, y: Values) -> tuple[Values, Values]:
    """Returns at most `MAX_POINTS` points, each the mean of its neighbours, to bound the size of the page."""
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _running_mean(y: Values, window: int) -> Values:
    """Returns the mean over the `window` nearest points, fewer at the ends; non-finite values are ignored."""
    finite = np.isfinite(y)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, y, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG element for an HTML page: no XML header, no clashing ids, colours as variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A <style> element would apply to the whole page, so matplotlib's is removed with the metadata.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', text)
    # Group ids such as axes_1 repeat in every chart and would clash on the page.
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*|font-family: [^;\"]*;? ?", lambda found: _font_size(found[1]), text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text


def _font_size(size: str | None) -> str:
    """Returns the CSS that replaces a `font` property: its size only, so that the page sets the font family."""
    return f"font-size: {size}" if size else ""
