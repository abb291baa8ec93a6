"""`megabatch plan RECIPE --cluster NAME`: step time, efficiency, time and cost on N workers, before renting them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megabatch import recipes
from megabatch.cli.bench.allreduce import parse_shape
from megabatch.cli.completion import complete_from, complete_recipe
from megabatch.cli.options import Settings, parse_settings, require_choice
from megabatch.cli.plan_output import Answer, print_answer
from megabatch.cli.plan_output import as_json as answer_as_json
from megabatch.errors import SettingsError
from megabatch.files import read_json
from megabatch.plan import CHANGES
from megabatch.recipe import Recipe, override

if TYPE_CHECKING:
    from megabatch.plan.planner import Choices

WIRES = ("fp16", "fp32", "bf16")
ALGORITHMS = ("auto", "flat", "hierarchical", "torus", "split_torus")


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name of a recipe; `megabatch recipes` lists them. Not with --calibrate.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    cluster: Annotated[str, typer.Option(help="Name of a cluster; an unknown name lists all.")] = "dgx_h100",
    workers: Annotated[str, typer.Option(help="Numbers of devices, comma-separated.")] = "8,16,64,256",
    settings: Settings = None,
    local_batch: Annotated[
        str | None,
        typer.Option(help="Images per worker, or auto: the global batch grows with the workers, and so do the epochs."),
    ] = None,
    all_reduce: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(ALGORITHMS)}; auto takes the fastest.", autocompletion=complete_from(ALGORITHMS)
        ),
    ] = "auto",
    shape: Annotated[str | None, typer.Option(help="Ranks per row x ranks per column; default: the fastest.")] = None,
    bucket_mib: Annotated[
        float | None, typer.Option(help="MiB per bucket of gradients; default: the fastest.", min=0.001)
    ] = None,
    wire: Annotated[
        str,
        typer.Option(
            help="Data type of gradients in the exchange: fp32, fp16, bf16.", autocompletion=complete_from(WIRES)
        ),
    ] = "fp16",
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
    if calibrate:
        typer.echo(_calibrated(calibrate), nl=False)
        return
    if recipe is None:
        raise SettingsError("plan needs a recipe; `megabatch plan mlperf_32768 --cluster dgx_h100` works")
    chosen = override(recipes.get(recipe), parse_settings(settings or []))
    choices = _choices(all_reduce=all_reduce, shape=shape, bucket_mib=bucket_mib, wire=wire, local_batch=local_batch)
    limits = {"price": price, "budget": budget, "deadline_s": None if deadline_min is None else 60 * deadline_min}
    answer = _answer(chosen, cluster, hardware, _counts(workers), choices, changes or [], limits)
    if plot is not None:
        _plot(answer, plot, f"{recipe} on {cluster}")
    if as_json:
        typer.echo(json.dumps({"recipe": recipe, "cluster": cluster} | answer_as_json(answer), indent=1))
        return
    print_answer(answer)
    if plot is not None:
        typer.echo(f"wrote the plot to {plot}")


def _answer(
    recipe: Recipe,
    cluster: str,
    hardware: Path | None,
    counts: Sequence[int],
    choices: "Choices",
    changes: Sequence[str],
    limits: dict[str, float | None],
) -> Answer:
    from megabatch.plan.hardware import load_hardware
    from megabatch.plan.planner import assumptions, best, within
    from megabatch.plan.predict import job_of
    from megabatch.plan.what_if import what_if

    known = load_hardware(hardware)
    place = known.find_cluster(cluster)
    price = place.price_per_device_hour if limits["price"] is None else limits["price"]
    plans = [best(job_of(recipe), count, choices, place, known) for count in counts]
    return Answer(
        plans=plans,
        kept=within(plans, price=price, budget=limits["budget"], deadline_s=limits["deadline_s"]),
        changed={change: [what_if(it, change, place, known) for it in plans] for change in changes},
        assumptions=assumptions(place, known, price=price),
        price=price,
    )


def _choices(
    *, all_reduce: str, shape: str | None, bucket_mib: float | None, wire: str, local_batch: str | None
) -> "Choices":
    from megabatch.plan.planner import Choices

    algorithm = require_choice("--all-reduce", all_reduce, ALGORITHMS)
    return Choices(
        algorithm={"auto": None, "flat": "nccl"}.get(algorithm, algorithm),
        shape=parse_shape(shape),
        bucket_mib=bucket_mib,
        wire=require_choice("--wire", wire, WIRES),
        local_batch=_local_batch(local_batch),
    )


def _plot(answer: Answer, path: Path, title: str) -> None:
    from megabatch.plan.plot import plot_plans

    plot_plans(answer.plans, answer.price, path, title=title)


def _calibrated(files: Sequence[Path]) -> str:
    """Returns entries for a hardware file from measurements of this machine."""
    from megabatch.comm.autotune.choose import read_table
    from megabatch.plan.calibrate import as_toml, fit_links, step_row

    rows, links = [], None
    for path in files:
        try:
            content = read_json(path)
            tables = content.get("tables")
            world = max(tables, key=lambda name: len(tables[name]["rows"])) if tables else ""
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"--calibrate {path}: {error}; needed a file of `megabatch bench step --output`"
            ) from error
        if world:
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
