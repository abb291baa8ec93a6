"""`megabatch recipes [NAME]`: lists the recipes, or shows one with its schedule as a table and a plot."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megabatch import recipes as registry
from megabatch.cli.completion import complete_from, complete_recipe
from megabatch.cli.options import Settings, parse_settings, require_choice
from megabatch.cli.output import make_console
from megabatch.observe.schedule_plot import plot_schedule, require_drawable
from megabatch.recipe import Recipe, override
from megabatch.recipe_file import to_toml

FORMATS = ("table", "toml")
MAX_TABLE_ROWS = 50


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Recipe, or recipe file (.toml), to show with its schedule; default: list all.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    settings: Settings = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the schedule to this .svg or .png file.")] = None,
    output_format: Annotated[
        str,
        typer.Option(
            "--format", help="table, or toml: a file to edit and to train from.", autocompletion=complete_from(FORMATS)
        ),
    ] = "table",
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True)] = False,
) -> None:
    """Lists the recipes, or shows one. One recipe is shown with every field and its schedule by epoch.

    With --format toml it is written as a file: `megabatch recipes photos --format toml > mine.toml`.
    """
    if markdown:
        from megabatch.recipes.markdown import as_markdown

        typer.echo(as_markdown(), nl=False)
        return
    chosen, console = require_choice("--format", output_format, FORMATS), make_console()
    if name is None:
        if plot or settings or chosen == "toml":
            raise typer.BadParameter(
                "--plot, --set and --format toml need the NAME of a recipe; `megabatch recipes fashion_mnist` works"
            )
        console.print(_list())
        return
    recipe = override(registry.get(name), parse_settings(settings or []))
    if plot:
        require_drawable(plot)
    if chosen == "toml":
        typer.echo(to_toml(recipe, registry.docstring(name)), nl=False)
    else:
        _show(console, recipe, name)
    if plot:
        plot_schedule(curve(recipe), plot, title=name)
        typer.echo(f"wrote the plot of the schedule to {plot}")


def _list() -> Table:
    """Returns a table with a row per recipe. Imports no torch, which would delay the list by seconds."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("recipe", "paper", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("batch", "epochs", "published", "measured"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in registry.names():
        recipe, summary = registry.get(name), registry.summary(name)
        cells = (
            name,
            summary.source.partition(", arXiv:")[0],
            recipe.model,
            _batch(recipe),
            f"{recipe.total_epochs:g}",
        )
        table.add_row(*map(Text, cells), _top1(recipe.published_top1), _top1(summary.measured_top1))
    return table


def _batch(recipe: Recipe) -> str:
    smallest, largest = recipe.smallest_batch, recipe.largest_batch
    return f"{smallest:,}" if smallest == largest else f"{smallest:,}..{largest:,}"


def _top1(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "-"


def _show(console: Console, recipe: Recipe, name: str) -> None:
    """Prints the docstring, every field and the schedule."""
    if about := registry.docstring(name):
        console.print(Text(about))
        console.print()
    console.print(_fields(recipe))
    console.print()
    console.print(_schedule_table(list(schedule(recipe))))


def _fields(recipe: Recipe) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    defaults = {field.name for field in dataclasses.fields(Recipe) if values[field.name] == field.default}
    for name in (name for name in values if name not in defaults):
        table.add_row(name, Text(registry.value_text(values[name])))
    unchanged = "  ".join(f"{name}={registry.value_text(values[name])}" for name in values if name in defaults)
    table.add_row("(default)", Text(unchanged), style="dim")
    return table


def schedule(recipe: Recipe) -> Iterator[dict[str, float]]:
    """Yields the scheduled values at the start of each epoch and at the end, with the updates of that epoch."""
    from megabatch.train.schedule import total_samples

    total = total_samples(recipe)
    for index, updates in enumerate(_updates_by_epoch(recipe, total)):
        yield {"epoch": float(index), "updates": updates} | _values_at(recipe, index * recipe.num_train_images)
    yield {"epoch": recipe.total_epochs, "updates": 0} | _values_at(recipe, total - 1)


def curve(recipe: Recipe, num_points: int = 2000) -> list[dict[str, float]]:
    """Returns the schedule at `num_points` evenly spaced points, dense enough that jumps look vertical."""
    from megabatch.train.schedule import total_samples

    last = total_samples(recipe) - 1
    samples = [round(last * index / (num_points - 1)) for index in range(num_points)]
    return [{"epoch": first / recipe.num_train_images} | _values_at(recipe, first) for first in samples]


def _values_at(recipe: Recipe, first: int) -> dict[str, float]:
    """Returns the settings of an update that starts at stream position `first`."""
    from megabatch.train.schedule import settings_at

    settings = settings_at(recipe, step=0, first=first)
    values: dict[str, float] = {
        "lr": settings.lr,
        "momentum": settings.momentum,
        "global_batch_size": recipe.batch_at(first / recipe.num_train_images),
        "resolution": settings.resolution,
        "weight_decay": recipe.weight_decay * settings.weight_decay_factor,
    }
    return values if settings.sgd_share is None else values | {"sgd_share": settings.sgd_share}


def _updates_by_epoch(recipe: Recipe, total: int) -> list[int]:
    """Returns the number of updates that start in each epoch. Batches span epochs, so neighbours can differ by one."""
    counts = [0] * math.ceil(recipe.total_epochs - 1e-9)
    first = 0
    while first < total:
        counts[first // recipe.num_train_images] += 1
        first += recipe.batch_at(first / recipe.num_train_images)
    return counts


def _schedule_table(rows: list[dict[str, float]]) -> Table:
    """Returns the schedule, thinned to about `MAX_TABLE_ROWS` rows, without columns that never change unless common."""
    stride = max(1, math.ceil(len(rows) / MAX_TABLE_ROWS))
    common = ("epoch", "updates", "lr", "momentum", "global_batch_size")
    columns = [key for key in rows[0] if key in common or len({row[key] for row in rows}) > 1]
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
