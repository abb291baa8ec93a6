"""`megabatch plan RECIPE --cluster NAME`: step time, efficiency, time and cost on N workers, before renting them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megabatch import recipes
from megabatch.cli.bench_allreduce import parse_shape
from megabatch.cli.options import SET_HELP, parse_settings, require_choice
from megabatch.errors import SettingsError
from megabatch.recipe import override

if TYPE_CHECKING:
    from rich.table import Table

    from megabatch.plan.hardware import Cluster, Hardware
    from megabatch.plan.predict import Prediction

ALGORITHMS = ("auto", "flat", "hierarchical", "torus", "split_torus")
CHANGES = "bandwidth=2, latency=0.5, batch=0.5 (factors), wire=fp32, all-reduce=flat, bucket=4, shape=8x16, overlap=no"


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe; `megabatch recipes` lists them. Not with --calibrate.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="Name of a cluster; an unknown name lists all.")] = "dgx_h100",
    workers: Annotated[str, typer.Option(help="Numbers of devices, comma-separated.")] = "8,16,64,256",
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    local_batch: Annotated[
        str | None,
        typer.Option(help="Images per worker, or auto: the global batch grows with the workers, and so do the epochs."),
    ] = None,
    all_reduce: Annotated[str, typer.Option(help=f"One of {', '.join(ALGORITHMS)}; auto takes the fastest.")] = "auto",
    shape: Annotated[str | None, typer.Option(help="Ranks per row x ranks per column; default: the fastest.")] = None,
    bucket_mib: Annotated[
        float | None, typer.Option(help="MiB per bucket of gradients; default: the fastest.", min=0.001)
    ] = None,
    wire: Annotated[str, typer.Option(help="Data type of gradients in the exchange: fp32, fp16, bf16.")] = "fp16",
    price: Annotated[float | None, typer.Option(help="Price of a device-hour, in any currency.", min=0)] = None,
    budget: Annotated[float | None, typer.Option(help="Largest cost of the run; needs --price.", min=0)] = None,
    deadline_min: Annotated[float | None, typer.Option(help="Longest time of the run, in minutes.", min=0)] = None,
    changes: Annotated[list[str] | None, typer.Option("--what-if", help=f"One change; repeatable: {CHANGES}.")] = None,
    hardware: Annotated[Path | None, typer.Option(help="TOML file with your devices, links and clusters.")] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of `bench step --output` or `bench allreduce --tune`; repeatable. Prints TOML for --hardware."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot over the workers to this .svg or .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predicts time and cost of a recipe on N devices. Also efficiency, the fastest exchange and what limits a step."""
    from megabatch.plan.assumptions import assumptions
    from megabatch.plan.hardware import load_hardware
    from megabatch.plan.planner import Choices, best, within
    from megabatch.plan.predict import job_of

    if calibrate:
        typer.echo(_calibrated(calibrate), nl=False)
        return
    if recipe is None:
        raise SettingsError("plan needs a recipe; `megabatch plan mlperf_32768 --cluster dgx_h100` works")
    known = load_hardware(hardware)
    place = known.find_cluster(cluster)
    price = price if price is not None else place.price_per_device_hour
    algorithm = {"auto": None, "flat": "nccl"}.get(all_reduce, all_reduce)
    require_choice("--all-reduce", all_reduce, ALGORITHMS)
    choices = Choices(
        algorithm=algorithm,
        shape=parse_shape(shape),
        bucket_mib=bucket_mib,
        wire=require_choice("--wire", wire, ("fp16", "fp32", "bf16")),
        local_batch=_local_batch(local_batch),
    )
    job = job_of(override(recipes.get(recipe), parse_settings(settings or [])))
    plans = [best(job, count, choices, place, known) for count in _counts(workers)]
    kept = within(plans, price=price, budget=budget, deadline_s=None if deadline_min is None else 60 * deadline_min)
    notes = assumptions(place, known, price=price)
    differences = {change: _changed(plans, change, place, known) for change in changes or []}
    if plot is not None:
        _plot(plans, price, plot, f"{recipe} on {cluster}")
    if as_json:
        rows = [_row(it, price) | {"within_limits": it in kept} for it in plans]
        what_ifs = {change: [_row(it, price) for it in made] for change, made in differences.items()}
        content = {"recipe": recipe, "cluster": cluster, "plans": rows, "what_if": what_ifs, "assumptions": notes}
        typer.echo(json.dumps(content, indent=1))
        return
    _print(plans, kept, differences, price)
    typer.echo("\nassumptions:\n" + "\n".join(f"- {note}" for note in notes))
    if plot is not None:
        typer.echo(f"wrote the plot to {plot}")


def _calibrated(files: Sequence[Path]) -> str:
    """Returns entries for a hardware file from measurements of this machine."""
    from megabatch.comm.autotune.choose import read_table
    from megabatch.plan.calibrate import as_toml, fit_links, step_row

    rows, links = [], None
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SettingsError(
                f"--calibrate {path}: {error}; needed a file of `megabatch bench step --output`"
            ) from error
        if "tables" in content:
            world = max(content["tables"], key=lambda name: len(content["tables"][name]["rows"]))
            links = fit_links(world, read_table(path, world))
            typer.echo(f"{path}: {world}, median error of the fit {links.error:.1%}", err=True)
        else:
            rows.append(step_row(content) | _shape_of(content["recipe"]))
    return as_toml("mine", rows, links)


def _shape_of(name: str) -> dict[str, int]:
    """Fields of a stack's row that describe the recipe that `bench step` timed, at its largest resolution."""
    chosen = recipes.get(name)
    pixels = int(max(side for _, side in chosen.resolution))
    counts = {"num_classes": chosen.num_classes, "in_channels": chosen.image_channels, "width": chosen.width}
    return {"resolution": pixels} | counts


def _local_batch(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "auto":
        return 0
    if not (text.isdecimal() and int(text) > 0):
        raise SettingsError(f"--local-batch {text}: needed a positive whole number, or auto; --local-batch 32 works")
    return int(text)


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in counts):
        raise SettingsError(f"--workers {text}: needed positive whole numbers, separated by commas; 8,64 works")
    return [int(part) for part in counts]


def _changed(
    plans: "Sequence[Prediction]", change: str, cluster: "Cluster", hardware: "Hardware"
) -> "list[Prediction]":
    from megabatch.plan.what_if import what_if

    return [what_if(it, change, cluster, hardware) for it in plans]


def _print(
    plans: "Sequence[Prediction]",
    kept: "Sequence[Prediction]",
    differences: "dict[str, list[Prediction]]",
    price: float | None,
) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    console.print(_table(plans, price))
    if not kept:
        typer.echo("no plan is within the budget and the deadline")
    else:
        fastest = min(kept, key=lambda it: it.total_s)
        typer.echo(f"\nfastest: {_describe(fastest, price)}")
        if price is not None:
            cheapest = min(kept, key=lambda it: it.cost(price))
            typer.echo(f"cheapest: {_describe(cheapest, price)}")
    for change, made in differences.items():
        typer.echo(f"\nwhat if {change}:")
        for before, after in zip(plans, made, strict=True):
            typer.echo(
                f"  {before.num_workers:>7,} workers: step {_ms(before)} -> {_ms(after)} ms, "
                f"time {_time(before.total_s)} -> {_time(after.total_s)} ({after.total_s / before.total_s - 1:+.1%})"
            )


def _table(plans: "Sequence[Prediction]", price: float | None) -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("workers", "batch/worker", "global", "epochs", "ms/step", "exposed ms", "images/s", "efficiency"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("time", *(() if price is None else ("cost",)), "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("exchange", "limited by"):
        table.add_column(heading, overflow="fold")
    for it in plans:
        table.add_row(
            f"{it.num_workers:,}",
            f"{it.local_batch:,}",
            f"{it.job.phases[-1].global_batch_size:,}",
            f"{it.job.total_epochs:.1f}",
            _ms(it),
            f"{1e3 * it.step.exposed_s:.2f}",
            f"{it.images_per_s:,.0f}",
            f"{it.step.efficiency:.1%}",
            _time(it.total_s),
            *(() if price is None else (f"{it.cost(price):,.2f}",)),
            f"{it.job.top1:.4f}" if it.job.top1 is not None else "-",
            _exchange(it),
            it.step.limit,
        )
    return table


def _row(it: "Prediction", price: float | None) -> dict[str, Any]:
    step = asdict(it.step) | {"total_s": it.step.total_s, "efficiency": it.step.efficiency, "limit": it.step.limit}
    return {
        "workers": it.num_workers,
        "local_batch": it.local_batch,
        "phases": [asdict(phase) for phase in it.job.phases],
        "exchange": asdict(it.job.exchange) | {"shape": it.shape},
        "updates": it.updates,
        "step": step,
        "images_per_s": it.images_per_s,
        "training_s": it.training_s,
        "evaluation_s": it.evaluation_s,
        "total_s": it.total_s,
        "cost": None if price is None else it.cost(price),
        "expected_top1": it.job.top1,
    }


def _plot(plans: "Sequence[Prediction]", price: float | None, path: Path, title: str) -> None:
    from megabatch.plan.plot import plot_plans

    plot_plans(plans, price, path, title=title)


def _describe(it: "Prediction", price: float | None) -> str:
    cost = "" if price is None else f", cost {it.cost(price):,.2f}"
    return (
        f"{it.num_workers:,} workers with {it.local_batch} images each, {_exchange(it)}: {_time(it.total_s)}{cost}; "
        f"megabatch train: --all-reduce {_algorithm(it)} --wire {it.job.exchange.wire} "
        f"--bucket-mib {it.job.exchange.bucket_mib:g}"
    )


def _exchange(it: "Prediction") -> str:
    algorithm = _algorithm(it)
    grid = "" if algorithm == "flat" else f" {it.shape[0]}x{it.shape[1]}"
    return f"{algorithm}{grid}, {it.job.exchange.wire}, {it.job.exchange.bucket_mib:g} MiB"


def _algorithm(it: "Prediction") -> str:
    """The name that `megabatch train --all-reduce` gives the algorithm: on NCCL, flat is NCCL's own."""
    return "flat" if it.job.exchange.algorithm == "nccl" else it.job.exchange.algorithm


def _ms(it: "Prediction") -> str:
    return f"{1e3 * it.step.total_s:.2f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
