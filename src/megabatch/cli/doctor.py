"""`megabatch doctor [RUN]`: checks the installation, or names the bottleneck of a run or, with --probe, of a recipe."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megabatch import recipes
from megabatch.cli.completion import complete_recipe
from megabatch.cli.options import Settings, parse_settings, runtime_options
from megabatch.errors import SettingsError
from megabatch.recipe import Recipe, override
from megabatch.runtime import Runtime

if TYPE_CHECKING:
    from megabatch.bench.probe import Parts
    from megabatch.comm.launch import World
    from megabatch.observe.bottleneck import Change

MOST_CHANGES, LEAST_GAIN = 3, 1.01


@runtime_options("workers", "data", "device", "wire", "all_reduce", "decode_threads", "cache")
def doctor(
    runtime: Runtime,
    run: Annotated[Path | None, typer.Argument(help="Run folder; without it the installation is checked.")] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help="Measure this recipe's input, computation and exchange here; the other options are for it.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    settings: Settings = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.", min=0.01)] = 2.0,
) -> None:
    """Checks the installation. Or names the bottleneck of a run, or of a recipe, and prints what to change."""
    if probe is not None:
        if run is not None:
            raise SettingsError(f"{run} was given with --probe {probe}; --probe {probe} alone works")
        _probe(override(recipes.get(probe), parse_settings(settings or [])), runtime, seconds)
    elif settings or runtime != Runtime():
        raise SettingsError("options of a recipe were given without one; --probe fashion_mnist works")
    elif run is None:
        _installation()
    else:
        _bottleneck(run)


def _installation() -> None:
    from megabatch.observe.installation import check_installation

    for finding in check_installation():
        typer.echo(f"{finding.part:16} {finding.state}")
        if finding.advice:
            typer.echo(f"{'':16} change: {finding.advice}")


def _bottleneck(folder: Path) -> None:
    from megabatch.observe.bottleneck import diagnose
    from megabatch.observe.run_folder import load_runs

    found = diagnose(load_runs([folder])[0])
    typer.echo(f"an update takes {1e3 * found.step_s:,.1f} ms (median)")
    for cause, seconds in found.seconds.items():
        rank = f", rank {found.slowest}" if cause == "slow worker" and found.slowest is not None else ""
        typer.echo(f"  {cause + rank:22}{1e3 * seconds:10,.1f} ms {seconds / found.step_s:6.0%}")
    typer.echo(f"bottleneck: {found.cause}")
    _print_changes(found.changes, "at most ")


def _print_changes(changes: "Sequence[Change]", at_most: str = "") -> None:
    for change in changes:
        gain = f"; {at_most}{change.gain:.2f} x the throughput" if change.gain > 1 else ""
        typer.echo(f"change: {change.text}{gain}")


def _probe(recipe: Recipe, runtime: Runtime, seconds: float) -> None:
    from megabatch.app.dry_run import open_dry_data
    from megabatch.app.resolve import default_workers
    from megabatch.cli.options import find_device
    from megabatch.comm.launch import join
    from megabatch.comm.launcher_environment import started_by_launcher
    from megabatch.comm.local_workers import run_local_workers

    if not started_by_launcher(runtime.workers):
        find_device(runtime.device)
        open_dry_data(recipe, runtime).close()  # fail here, once, rather than in every worker
        workers = runtime.workers or default_workers(recipe, runtime)
        if workers > 1:
            if code := run_local_workers(workers, sys.argv[1:]):
                raise typer.Exit(code)
            return
    with join(device=runtime.device) as world:
        _measure(recipe, runtime, world, seconds)


def _measure(recipe: Recipe, runtime: Runtime, world: "World", seconds: float) -> None:
    from megabatch.app.data import fit_to_data
    from megabatch.app.dry_run import open_dry_data
    from megabatch.bench.probe import probe
    from megabatch.bench.synthetic_step import measured_batch_size

    with contextlib.closing(open_dry_data(recipe, runtime)) as data:
        fitted = fit_to_data(recipe, data)
        images = measured_batch_size(fitted, None, images_at_224=256 if world.device.type == "cuda" else 32)
        images = max(images, fitted.bn_span * world.world_size)
        if world.is_first:
            typer.echo(f"measuring updates of {images:,} images, from {data.origin}", err=True)
        parts, changes = probe(fitted, runtime, data, world=world, num_images=images, seconds=seconds)
    if world.is_first:
        _print_parts(parts, f"{recipe.name}, {world.world_size} worker(s) on {world.device.type}")
        helpful = [change for change in changes if change.gain >= LEAST_GAIN][:MOST_CHANGES]
        _print_changes(helpful)
        if len(helpful) < MOST_CHANGES:
            others = "; ".join(f"{change.text} {change.gain:.2f} x" for change in changes[len(helpful) :])
            typer.echo(f"no gain: {others}")


def _print_parts(parts: "Parts", title: str) -> None:
    total_s = parts.seconds()
    typer.echo(
        f"{title}: an update of {parts.num_images:,} images takes {1e3 * total_s:,.1f} ms, "
        f"{parts.num_images / total_s:,.0f} images/s"
    )
    alone = {
        "input alone": parts.input_s,
        "computation alone": parts.gradients_s + parts.update_s,
        "exchange alone": parts.exchange_s,
        "  of it not hidden": parts.exposed_s,
        "competition, waits": parts.contention_s,
    }
    for name, seconds in alone.items():
        rate = f"{parts.num_images / seconds:12,.0f} images/s" if "alone" in name and seconds else ""
        typer.echo(f"  {name:22}{1e3 * seconds:10,.1f} ms{rate}")
    typer.echo(f"bottleneck: {parts.bottleneck()}")
