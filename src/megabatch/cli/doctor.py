"""`megabatch doctor [RUN]`: checks the installation, or names the bottleneck of a run."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    run: Annotated[Path | None, typer.Argument(help="Run folder; without it the installation is checked.")] = None,
) -> None:
    """Checks the installation, or names a run's bottleneck. Prints what to change."""
    if run is None:
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
    for change in found.changes:
        gain = f"; at most {change.gain:.2f} x the throughput" if change.gain > 1 else ""
        typer.echo(f"change: {change.text}{gain}")
