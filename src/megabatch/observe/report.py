"""Writes a self-contained HTML page about one or several runs: curves, recipes, environments."""

import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megabatch.files import printable, write_text
from megabatch.observe.charts import charts
from megabatch.observe.curve import curve_text, published_at
from megabatch.observe.panels import PHASE_COLORS, breakdown, confusion, heat_map, mistakes, timeline
from megabatch.observe.progress import duration
from megabatch.observe.run_folder import RunRecord, load_runs
from megabatch.recipe import Recipe

NUM_COLORS = 6
PAGE = files("megabatch.observe") / "page"
REQUIRED = dataclasses.MISSING
EVALUATION_COLUMNS = {"epoch": ".4g", "step": ",", "top1": ".4f", "top5": ".4f", "loss": ".4f", "num_samples": ","}


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
    drawn, maps = charts(runs), [found for run in runs if (found := heat_map(run))]
    template = _environment().get_template("report.html")
    page = template.render(
        title=" · ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        runs=[_headline(run, index) for index, run in enumerate(runs)],
        several=len(runs) > 1,
        phases=[{"name": name, "color": color} for name, color in PHASE_COLORS.items()],
        breakdowns=[found for run in runs if (found := breakdown(run))],
        timelines=[found for run in runs if (found := timeline(run))],
        confusions=[found for run in runs if (found := confusion(run))],
        mistakes=[found for run in runs if (found := mistakes(run))],
        result_rows=_result_rows(runs),
        charts=bool(drawn),
        heat=bool(maps),
        data=_json({"runs": [run.label for run in runs], "charts": drawn, "heat": maps}),
        styles=_text_of("uPlot.min.css", "report.css"),
        scripts=_text_of("uPlot.iife.min.js", "report.js"),
        evaluation_rows=[row for run in runs for row in _evaluation_rows(run)],
        recipe_rows=_recipe_rows(runs),
        environment_rows=_environment_rows(runs),
        warnings=[(run.label, printable(text)) for run in runs for text in [*run.warnings, *_bad_samples(run)]],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page, errors="backslashreplace")
    return output


def _text_of(*names: str) -> Markup:
    """Returns files of the page, as they are: they hold no text from a run."""
    return Markup("\n".join((PAGE / name).read_text(encoding="utf-8") for name in names))  # noqa: S704


def _json(value: Any) -> Markup:
    """Returns JSON that no text in it can end: `<` is escaped, so that there is no tag."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))  # noqa: S704


def _environment() -> jinja2.Environment:
    source = (PAGE / "report.html").read_text(encoding="utf-8")
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
        "origin": _origin(run),
        "command": printable(str(run.start.get("command") or "")),
        "top1": f"{100 * run.top1:.2f}" if run.top1 is not None else None,
        "best": f"{100 * run.best_top1:.2f}" if run.best_top1 is not None and run.best_top1 != run.top1 else None,
        "remark": _remark(run),
        "facts": facts,
    }


def _origin(run: RunRecord) -> str:
    """Returns the start of the run in UTC and the commit."""
    parts = []
    if math.isfinite(run.started_s):
        parts.append(f"started {datetime.datetime.fromtimestamp(run.started_s, datetime.UTC):%d %B %Y, %H:%M} UTC")
    if commit := run.environment.get("git_commit"):
        parts.append(f"commit {commit}")
    return " · ".join(parts)


def _bad_samples(run: RunRecord) -> list[str]:
    event = run.bad_samples
    if event is None:
        return []
    return [f"{event.get('num_bad_samples')} bad samples, replaced {event.get('num_replaced_samples')} times"]


def _result_rows(runs: list[RunRecord]) -> list[Row]:
    """Returns the results of several runs, one column each."""
    cells = {
        "top-1, last": [f"{100 * run.top1:.2f} %" if run.top1 is not None else "–" for run in runs],
        "top-1, best": [f"{100 * run.best_top1:.2f} %" if run.best_top1 is not None else "–" for run in runs],
        "updates": [_format(run.steps[-1].get("step") if run.steps else None, ",") for run in runs],
        "images/s": [_format(run.images_per_s, ",.0f") for run in runs],
        "training time": [duration(run.end["train_s"]) if run.end and run.end.get("train_s") else "–" for run in runs],
    }
    return [Row(name, tuple(values)) for name, values in cells.items()]


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
    epoch = run.column("epoch", "evaluation")[-1]
    if math.isfinite(epoch) and (text := curve_text(run.recipe.published_curve, epoch, run.top1)):
        return text
    published = run.recipe.published_top1
    return f"published: {100 * published:.2f} % after {run.recipe.total_epochs:g} epochs" if published else ""


def _evaluation_rows(run: RunRecord) -> list[tuple[str, tuple[str, ...]]]:
    """Returns a row per evaluation: the run's label and the cells."""
    curve = run.recipe.published_curve if run.recipe else ()
    rows = []
    for event, top1, epoch in zip(
        run.evaluations, run.column("top1", "evaluation"), run.column("epoch", "evaluation"), strict=True
    ):
        remark = curve_text(curve, epoch, top1) if math.isfinite(top1 + epoch) else ""
        if remark and (published := published_at(curve, epoch)) is not None:
            remark += f", {100 * (top1 - published):+.2f} points"
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
