"""`megabatch recipes [NAME]`: the list of recipes; or one with its whole schedule, as a table and a plot."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megabatch import recipes as shelf
from megabatch.cli.options import SET_HELP, parse_settings
from megabatch.observe.schedule_plot import plot_schedule, require_drawable
from megabatch.recipe import Recipe, override, value_at

WIDTH_OF_FILES = 118
MAX_TABLE_ROWS = 50


def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe, with its schedule; without it, all of them.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the schedule to this .svg or .png file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True)] = False,
) -> None:
    """Lists the recipes, or shows one. With every field, and its schedule epoch by epoch."""
    if markdown:
        from megabatch.recipes.markdown import as_markdown

        typer.echo(as_markdown(), nl=False)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_FILES)
    if name is None:
        if plot or settings:
            raise typer.BadParameter("needs the NAME of a recipe, for example `megabatch recipes fashion_mnist`")
        console.print(_list())
        return
    recipe = override(shelf.get(name), parse_settings(settings or []))
    if plot:
        require_drawable(plot)
    _show(console, recipe, name)
    if plot:
        plot_schedule(curve(recipe), plot, title=name)
        typer.echo(f"schedule drawn to {plot}")


def _list() -> Table:
    """One row per recipe. Imports no torch: the list must come at once."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("recipe", "paper", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("batch", "epochs", "published", "measured"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in shelf.names():
        recipe, told = shelf.get(name), shelf.summary(name)
        cells = (name, told.source.partition(", arXiv:")[0], recipe.model, _batch(recipe), f"{recipe.total_epochs:g}")
        table.add_row(*map(Text, cells), _top1(recipe.published_top1), _top1(told.measured_top1))
    return table


def _batch(recipe: Recipe) -> str:
    sizes = [int(size) for _, size in recipe.batch_sizes] or [recipe.global_batch_size]
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{min(sizes):,}..{max(sizes):,}"


def _top1(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "-"


def _show(console: Console, recipe: Recipe, name: str) -> None:
    """The docstring, every field, and the schedule."""
    console.print(Text(shelf.docstring(name)))
    console.print()
    console.print(_fields(recipe))
    console.print()
    console.print(_schedule_table(list(schedule(recipe))))


def _fields(recipe: Recipe) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    usual = {field.name for field in dataclasses.fields(Recipe) if values[field.name] == field.default}
    for name in (name for name in values if name not in usual):
        table.add_row(name, Text(shelf.value_text(values[name])))
    kept = "  ".join(f"{name}={shelf.value_text(values[name])}" for name in values if name in usual)
    table.add_row("(default)", Text(kept), style="dim")
    return table


def schedule(recipe: Recipe) -> Iterator[dict[str, float]]:
    """What holds at the start of each epoch, and at the end: rates, batch, pixels, and the epoch's updates."""
    from megabatch.train.schedule import total_samples

    total = total_samples(recipe)
    for index, updates in enumerate(_updates_by_epoch(recipe, total)):
        yield {"epoch": float(index), "updates": updates} | _moment(recipe, index * recipe.num_train_images)
    yield {"epoch": recipe.total_epochs, "updates": 0} | _moment(recipe, total - 1)


def curve(recipe: Recipe, num_points: int = 2000) -> list[dict[str, float]]:
    """The schedule at `num_points` moments, evenly spaced: fine enough to draw jumps as jumps."""
    from megabatch.train.schedule import total_samples

    last = total_samples(recipe) - 1
    samples = [round(last * index / (num_points - 1)) for index in range(num_points)]
    return [{"epoch": first / recipe.num_train_images} | _moment(recipe, first) for first in samples]


def _moment(recipe: Recipe, first: int) -> dict[str, float]:
    """What an update that starts at stream position `first` uses."""
    from megabatch.train.schedule import settings_at

    settings = settings_at(recipe, step=0, first=first)
    values: dict[str, float] = {
        "lr": settings.lr,
        "momentum": settings.momentum,
        "global_batch_size": _batch_at(recipe, first / recipe.num_train_images),
        "resolution": settings.resolution,
        "weight_decay": recipe.weight_decay * settings.weight_decay_factor,
    }
    return values if settings.sgd_share is None else values | {"sgd_share": settings.sgd_share}


def _batch_at(recipe: Recipe, epoch: float) -> int:
    return int(value_at(recipe.batch_sizes, epoch)) if recipe.batch_sizes else recipe.global_batch_size


def _updates_by_epoch(recipe: Recipe, total: int) -> list[int]:
    """Updates that start in each epoch. A batch may straddle two epochs, so neighbours can differ by one."""
    counts = [0] * math.ceil(recipe.total_epochs - 1e-9)
    first = 0
    while first < total:
        counts[first // recipe.num_train_images] += 1
        first += _batch_at(recipe, first / recipe.num_train_images)
    return counts


def _schedule_table(rows: list[dict[str, float]]) -> Table:
    """The schedule's columns that move, and those that everybody asks for; long runs show every so many epochs."""
    stride = max(1, math.ceil(len(rows) / MAX_TABLE_ROWS))
    always = ("epoch", "updates", "lr", "momentum", "global_batch_size")
    columns = [key for key in rows[0] if key in always or len({row[key] for row in rows}) > 1]
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for key in columns:
        table.add_column(key, justify="right")
    shown = [row for index, row in enumerate(rows) if index % stride == 0 or index == len(rows) - 1]
    for row in shown:
        table.add_row(*(_cell(key, row[key]) for key in columns))
    return table


def _cell(key: str, value: Any) -> str:
    if key == "updates":
        return f"{value:,}" if value else "end"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
