"""`megabatch bench step`: how fast the training step is on this machine, each way it can be taken."""

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megabatch import recipes
from megabatch.cli.options import SET_HELP, parse_settings, require_choice
from megabatch.errors import SettingsError
from megabatch.recipe import Recipe, override
from megabatch.runtime import Runtime

if TYPE_CHECKING:
    from megabatch.bench.synthetic_step import SyntheticStep
    from megabatch.comm.launch import World


@dataclass(frozen=True)
class Way:
    """One way to take the step: what a runtime says, and the options of `megabatch train` that say it."""

    name: str
    runtime: Runtime
    options: str


@dataclass(frozen=True)
class Measured:
    """Seconds of each step; `error` where a way does not work here."""

    way: Way
    micro_batch_size: int = 0
    seconds: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median_s(self) -> float:
        """Median step."""
        return statistics.median(self.seconds) if self.seconds else float("inf")


def bench_step(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `megabatch recipes` lists them.")] = "fashion_mnist",
    batch: Annotated[
        int | None, typer.Option(help="Images of a step; default as many as take a moment.", min=1)
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Seconds of measurement, when everything is warm.", min=0.1)] = 30.0,
    compile_model: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too: a minute or more for each.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the numbers there, as JSON.")] = None,
) -> None:
    """Times a recipe's training step. On random images: precisions, micro-batches and, if asked for, torch.compile."""
    from megabatch.bench.synthetic_step import usual_batch
    from megabatch.comm.launch import join

    chosen = override(recipes.get(recipe), parse_settings(settings or []))
    with join(device=require_choice("--device", device, ("auto", "cpu", "cuda"))) as world:
        images = usual_batch(chosen, batch, images_at_224=256 if world.device.type == "cuda" else 32)
        ways = ways_to_measure(chosen, images, device=world.device.type, compiled=compile_model)
        typer.echo(f"{chosen.name}: {chosen.model}, a step of {images} images, on {world.device.type}")
        measured = measure(chosen, images, ways, world, seconds=seconds)
    typer.echo(table(measured, images, chosen.name))
    if output is not None:
        output.write_text(json.dumps(as_json(measured, chosen, images), indent=1) + "\n")


def ways_to_measure(recipe: Recipe, images: int, *, device: str, compiled: bool) -> list[Way]:
    """Every precision as it comes; then, in 16 bit, captured or not, fused or not, in micro-batches, and compiled."""
    precisions = ["fp32", "bf16", "fp16"] if device == "cuda" else ["fp32", "bf16"]
    ways = [_way(f"{name}", precision=name) for name in precisions]
    if device == "cuda":
        ways += [_way(f"{name} without a graph", precision=name, capture="off") for name in precisions[1:]]
    ways += [_way(f"{name} in torch's own kernels", precision=name, fusion="plain") for name in precisions[1:]]
    size = images // 2
    while size >= recipe.bn_span and size >= images // 8:
        if size % recipe.bn_span == 0:
            ways.append(_way(f"bf16 in micro-batches of {size}", precision="bf16", micro_batch_size=size))
        size //= 2
    if compiled:
        ways += [_way(f"{name} compiled", precision=name, compile=True) for name in precisions]
    return ways


def measure(recipe: Recipe, images: int, ways: Sequence[Way], world: "World", *, seconds: float) -> list[Measured]:
    """Median step of each way. On a CPU all are ready together and take turns, so that a slow moment meets them all.

    On a GPU, whose memory is for one, they come one after another.
    """
    groups = [list(ways)] if world.device.type == "cpu" else [[way] for way in ways]
    share = seconds / len(ways)
    return [row for group in groups for row in _measure_group(recipe, images, group, world, share * len(group))]


def table(measured: Sequence[Measured], images: int, recipe: str) -> str:
    """Ways by speed, the fastest first, then the command that selects it."""
    ranked = sorted(measured, key=lambda row: row.median_s)
    lines = [f"{'way':34} {'images/s':>10} {'median ms':>10}  {'quartiles':>19} {'micro-batch':>11}"]
    for row in ranked:
        if not row.seconds:
            lines.append(f"{row.way.name:34} does not work here: {row.error}"[:160])
            continue
        first, third = _quartiles(row.seconds)
        spread = f"{1e3 * first:.1f} .. {1e3 * third:.1f}"
        lines.append(
            f"{row.way.name:34} {images / row.median_s:10,.0f} {1e3 * row.median_s:10.1f}  {spread:>19} "
            f"{row.micro_batch_size:>11}"
        )
    if ranked[0].seconds:
        lines.append(f"fastest: {ranked[0].way.name}; megabatch train {recipe} {ranked[0].way.options}")
    return "\n".join(lines)


def as_json(measured: Sequence[Measured], recipe: Recipe, images: int) -> dict[str, Any]:
    """Everything measured, with the machine and the versions."""
    from megabatch.observe.environment import describe

    rows = [
        {"way": row.way.name, "options": row.way.options, "micro_batch_size": row.micro_batch_size, "error": row.error}
        | {"seconds": list(row.seconds)}
        for row in measured
    ]
    return {"recipe": recipe.name, "model": recipe.model, "images": images, "ways": rows, "environment": describe()}


def _way(name: str, **changes: Any) -> Way:
    words = {"compile": "--compile"}
    options = [words.get(key) or f"--{key.replace('_', '-')} {value}" for key, value in changes.items()]
    return Way(name, Runtime(**changes), " ".join(options))


def _measure_group(
    recipe: Recipe, images: int, ways: Sequence[Way], world: "World", seconds: float
) -> Iterator[Measured]:
    with contextlib.ExitStack() as stack:
        ready: dict[str, SyntheticStep] = {}
        errors: dict[str, str] = {}
        for way in ways:
            typer.echo(f"warming up: {way.name}", err=True)
            try:
                ready[way.name] = stack.enter_context(_warm_step(recipe, images, way, world))
            except (RuntimeError, SettingsError) as error:  # of a compiler that is not there, or of memory
                errors[way.name] = " ".join(str(error).split())[:300]
        taken = _rounds(ready, seconds)
    for way in ways:
        if way.name in ready:
            yield Measured(way, ready[way.name].micro_batch_size, tuple(taken[way.name]))
        else:
            yield Measured(way, error=errors[way.name])


@contextlib.contextmanager
def _warm_step(recipe: Recipe, images: int, way: Way, world: "World") -> "Iterator[SyntheticStep]":
    from megabatch.bench.synthetic_step import synthetic_step

    with synthetic_step(recipe, way.runtime, world=world, global_batch_size=images) as step:
        for _ in range(2 if world.device.type == "cpu" else 5):  # compiled at the second, captured at the fourth
            step.take()
        yield step


def _rounds(ready: "dict[str, SyntheticStep]", seconds: float) -> dict[str, list[float]]:
    """Each step once a round, until the time is up; three rounds at least."""
    taken: dict[str, list[float]] = {name: [] for name in ready}
    end = time.perf_counter() + seconds
    while ready and (time.perf_counter() < end or len(next(iter(taken.values()))) < 3):
        for name, step in ready.items():
            started = time.perf_counter()
            step.take()
            taken[name].append(time.perf_counter() - started)
    return taken


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return first, third
