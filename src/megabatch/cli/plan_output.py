"""Output of `megabatch plan`: the table of plans, the best ones, and everything as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from megabatch.plan.predict import Prediction


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Plans, those within the user's limits, the same plans after each change, assumptions, price of a device-hour."""

    plans: "Sequence[Prediction]"
    kept: "Sequence[Prediction]"
    changed: "Mapping[str, Sequence[Prediction]]"
    assumptions: Sequence[str]
    price: float | None


def print_answer(answer: Answer) -> None:
    """Prints the table of plans, the best ones, the changes and the assumptions."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    price = answer.price
    console.print(_table(answer.plans, price))
    if not answer.kept:
        typer.echo("no plan is within the budget and the deadline")
    else:
        typer.echo(f"\nfastest: {_describe(min(answer.kept, key=lambda it: it.total_s), price)}")
        if price is not None:
            typer.echo(f"cheapest: {_describe(min(answer.kept, key=lambda it: it.cost(price)), price)}")
    for change, made in answer.changed.items():
        typer.echo(f"\nwhat if {change}:")
        for before, after in zip(answer.plans, made, strict=True):
            typer.echo(
                f"  {before.num_workers:>7,} workers: step {_ms(before)} -> {_ms(after)} ms, "
                f"time {_time(before.total_s)} -> {_time(after.total_s)} ({after.total_s / before.total_s - 1:+.1%})"
            )
    typer.echo("\nassumptions:\n" + "\n".join(f"- {note}" for note in answer.assumptions))


def as_json(answer: Answer) -> dict[str, Any]:
    """Returns the answer as JSON values, with the parts of every step."""
    return {
        "plans": [_row(it, answer.price) | {"within_limits": it in answer.kept} for it in answer.plans],
        "what_if": {change: [_row(it, answer.price) for it in made] for change, made in answer.changed.items()},
        "assumptions": answer.assumptions,
    }


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
            _epochs(it),
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
        "epochs_range": it.job.epochs_range,
        "updates": it.updates,
        "step": step,
        "images_per_s": it.images_per_s,
        "training_s": it.training_s,
        "evaluation_s": it.evaluation_s,
        "total_s": it.total_s,
        "cost": None if price is None else it.cost(price),
        "expected_top1": it.job.top1,
    }


def _describe(it: "Prediction", price: float | None) -> str:
    cost = "" if price is None else f", cost {it.cost(price):,.2f}"
    return (
        f"{it.num_workers:,} workers with {it.local_batch} images each, {_exchange(it)}: {_time(it.total_s)}{cost}; "
        f"megabatch train: --all-reduce {_algorithm(it)} --wire {it.job.exchange.wire} "
        f"--bucket-mib {it.job.exchange.bucket_mib:g}"
    )


def _epochs(it: "Prediction") -> str:
    between = it.job.epochs_range
    return f"{it.job.total_epochs:.1f}" + (f" ({between[0]:.0f}-{between[1]:.0f})" if between else "")


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
