"""Writes a self-contained HTML page about one or several runs: curves, recipes, environments."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megabatch.files import printable, write_text
from megabatch.observe.curve import curve_text
from megabatch.observe.figures import NUM_COLORS, Line, chart, span_kinds, timeline_chart
from megabatch.observe.progress import duration
from megabatch.observe.run_folder import RunRecord, load_runs
from megabatch.recipe import Recipe

REQUIRED = dataclasses.MISSING
EVALUATION_COLUMNS = {"epoch": ".4g", "step": ",", "top1": ".4f", "top5": ".4f", "loss": ".4f", "num_samples": ","}


@dataclass(frozen=True)
class Figure:
    """A chart with its heading."""

    title: str
    note: str
    svg: Markup
    wide: bool = False
    kinds: tuple[tuple[int, str], ...] = ()  # colour index and label, for a chart with its own legend


@dataclass(frozen=True)
class Row:
    """A row of a table: one cell per run."""

    name: str
    cells: tuple[str, ...]
    shown: bool = True  # False if every run has the field's default
    differs: bool = False  # True if the runs have different values


def write_report(run_folders: Sequence[Path], output: Path) -> Path:
    """Writes the page about the runs in `run_folders` to `output` and returns `output`.

    Runs may be in progress, interrupted or without an evaluation.

    Raises:
        UserError: a folder contains no run, or its event file is corrupt.
    """
    runs = load_runs([folder.expanduser() for folder in run_folders])
    output = output.expanduser()
    template = _environment().get_template("report.html")
    page = template.render(
        title=" · ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        runs=[_headline(run, index) for index, run in enumerate(runs)],
        several=len(runs) > 1,
        figures=_figures(runs),
        published=any(run.recipe and len(run.recipe.published_curve) > 1 for run in runs),
        evaluation_rows=[row for run in runs for row in _evaluation_rows(run)],
        recipe_rows=_recipe_rows(runs),
        environment_rows=_environment_rows(runs),
        warnings=[(run.label, text) for run in runs for text in run.warnings],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page, errors="backslashreplace")
    return output


def _environment() -> jinja2.Environment:
    source = (files("megabatch.observe") / "report.html").read_text(encoding="utf-8")
    return jinja2.Environment(
        loader=jinja2.DictLoader({"report.html": source}),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _headline(run: RunRecord, index: int) -> dict[str, Any]:
    """Returns the values of a run's card at the top of the page."""
    last = run.steps[-1] if run.steps else {}
    facts = [
        ("images/s", f"{run.images_per_s:,.0f}" if run.images_per_s else "–"),
        ("epochs", _format(last.get("epoch"), ".4g")),
        ("updates", _format(last.get("step"), ",")),
        ("training time", duration(run.end["train_s"]) if run.end and run.end.get("train_s") else "not finished"),
        ("global batch size", _batch(run)),
        ("workers", str(run.environment.get("workers", "–"))),
    ]
    return {
        "label": run.label,
        "color": index % NUM_COLORS,
        "model": run.recipe.model if run.recipe else "",
        "top1": f"{100 * run.top1:.2f}" if run.top1 is not None else None,
        "best": f"{100 * run.best_top1:.2f}" if run.best_top1 is not None and run.best_top1 != run.top1 else None,
        "remark": _remark(run),
        "facts": facts,
    }


def _batch(run: RunRecord) -> str:
    sizes = [size for size in run.column("global_batch_size") if math.isfinite(size)]
    if not sizes:
        return f"{run.recipe.global_batch_size:,}" if run.recipe else "–"
    largest = max(sizes)
    return f"{largest:,.0f}" if sizes[0] == largest else f"{sizes[0]:,.0f} to {largest:,.0f}"


def _remark(run: RunRecord) -> str:
    """Returns a comparison of the last evaluation with the published accuracy; may be empty."""
    if run.recipe is None or run.top1 is None:
        return ""
    epoch = run.evaluation_column("epoch")[-1]
    if math.isfinite(epoch) and (text := curve_text(run.recipe.published_curve, epoch, run.top1)):
        return text
    published = run.recipe.published_top1
    return f"published: {100 * published:.2f} % after {run.recipe.total_epochs:g} epochs" if published else ""


def _figures(runs: list[RunRecord]) -> list[Figure]:
    """Returns every chart that has data, followed by one timeline per run."""
    candidates = [
        ("Top-1 accuracy", "share of evaluation images whose most likely class is correct", _accuracy(runs)),
        ("Training loss", "mean over the global batch; thin line: every update", _curve(runs, "loss", smooth=True)),
        ("Learning rate", "per update", _curve(runs, "lr", from_zero=True)),
        ("Momentum", "per update", _curve(runs, "momentum", only_if_changing=True)),
        ("Global batch size", "images per update", _batches(runs)),
        (
            "Resolution",
            "side of a training image in pixels",
            _curve(runs, "resolution", steps=True, only_if_changing=True),
        ),
        ("Throughput", "images/s, all workers combined", _curve(runs, "images_per_s", smooth=True, from_zero=True)),
        (
            "Exposed communication",
            "ms per update that do not overlap with computation",
            _curve(runs, "exposed_ms", smooth=True, from_zero=True),
        ),
    ]
    drawn = [Figure(title, note, Markup(svg)) for title, note, svg in candidates if svg]  # noqa: S704  (our own SVG)
    return drawn + [figure for index, run in enumerate(runs) if (figure := _timeline(run, index))]


def _timeline(run: RunRecord, index: int) -> Figure | None:
    """Returns the timeline of one update, with its own legend; None without spans."""
    spans = [dataclasses.astuple(span) for span in run.timeline]
    svg = timeline_chart(spans, name=f"timeline-{index}")
    if svg is None:
        return None
    kinds = tuple(enumerate(span_kinds(spans)[:NUM_COLORS]))
    return Figure(f"One update of {run.label}", "", Markup(svg), wide=True, kinds=kinds)  # noqa: S704


def _curve(
    runs: list[RunRecord],
    field: str,
    *,
    smooth: bool = False,
    steps: bool = False,
    from_zero: bool = False,
    only_if_changing: bool = False,
) -> str | None:
    lines = [
        Line(run.column("epoch"), run.column(field), index, steps=steps, smooth=smooth)
        for index, run in enumerate(runs)
    ]
    changing = any(len({value for value in line.y if math.isfinite(value)}) > 1 for line in lines)
    if only_if_changing and not changing:
        return None
    return chart(lines, name=field, from_zero=from_zero)


def _batches(runs: list[RunRecord]) -> str | None:
    """Draws the global batch size; the last update, which trains on the remaining data, repeats the value before it."""
    lines = []
    for index, run in enumerate(runs):
        x, y = run.column("epoch"), run.column("global_batch_size")
        shorter = len(y) > 1 and y[-1] < y[-2]
        lines.append(Line(x, [*y[:-1], y[-2]] if shorter else y, index, steps=True))
    return chart(lines, name="global_batch_size", from_zero=True)


def _accuracy(runs: list[RunRecord]) -> str | None:
    """Draws each run's evaluations over the published curves, with the target as a horizontal line."""
    curves = {run.recipe.published_curve for run in runs if run.recipe and len(run.recipe.published_curve) > 1}
    lines = [
        Line([epoch for epoch, _ in curve], [top1 for _, top1 in curve], 0, dashed=True) for curve in sorted(curves)
    ]
    lines += [
        Line(run.evaluation_column("epoch"), run.evaluation_column("top1"), index) for index, run in enumerate(runs)
    ]
    if all(run.top1 is None for run in runs):
        return None
    targets = {run.recipe.target_top1 for run in runs if run.recipe and run.recipe.target_top1}
    return chart(lines, name="top1", percent=True, level=max(targets, default=None))


def _evaluation_rows(run: RunRecord) -> list[tuple[str, tuple[str, ...]]]:
    """Returns a row per evaluation: the run's label and the cells."""
    curve = run.recipe.published_curve if run.recipe else ()
    rows = []
    for event, top1, epoch in zip(
        run.evaluations, run.evaluation_column("top1"), run.evaluation_column("epoch"), strict=True
    ):
        remark = curve_text(curve, epoch, top1) if math.isfinite(top1 + epoch) else ""
        cells = [_format(event.get(field), form) for field, form in EVALUATION_COLUMNS.items()]
        rows.append((run.label, (*cells, remark)))
    return rows


def _format(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _recipe_rows(runs: list[RunRecord]) -> list[Row]:
    recipes = [run.recipe for run in runs]
    if not any(recipes):
        return []
    rows = []
    for field in dataclasses.fields(Recipe):
        values = [getattr(recipe, field.name) if recipe else None for recipe in recipes]
        cells = tuple(_text(value) for value in values)
        default = field.default is not REQUIRED and all(value == field.default for value in values)
        rows.append(Row(field.name, cells, shown=not default, differs=len(set(map(repr, values))) > 1))
    return rows


def _environment_rows(runs: list[RunRecord]) -> list[Row]:
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = []
    for name in names:
        cells = tuple(_text(run.environment.get(name)) for run in runs)
        rows.append(Row(name.replace("_", " "), cells, differs=len(set(cells)) > 1))
    return rows


def _text(value: Any) -> str:
    """Formats a value for a table."""
    if value is None or value in ((), []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        pairs = [":".join(map(_plain, x)) if isinstance(x, list | tuple) else _text(x) for x in value]
        return ", ".join(pairs) if len(pairs) <= 12 else ", ".join([*pairs[:5], "…", *pairs[-3:]])
    return str(value)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
