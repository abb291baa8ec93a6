"""`megabatch mllog RUN`: writes the MLPerf log of a run."""

from pathlib import Path
from typing import Annotated

import typer


def mllog(
    run: Annotated[Path, typer.Argument(help="Run folder of a run that has ended.")],
    organization: Annotated[str, typer.Option(help="Submitting organization.")],
    platform: Annotated[str, typer.Option(help="Name of the system.")],
    division: Annotated[str, typer.Option(help="closed, or open.")] = "open",
    status: Annotated[str, typer.Option(help="cloud, onprem, preview or research.")] = "research",
    output: Annotated[Path | None, typer.Option(help="File to write; default: mllog.txt in the run folder.")] = None,
) -> None:
    """Writes a run's MLPerf log. It follows the rules of MLPerf Training for ResNet; the command prints its path."""
    import typing

    from megabatch.errors import UserError
    from megabatch.observe.mllog import Division, Status, Submission, write_mllog
    from megabatch.observe.run_folder import load_runs

    for name, given, known in (("division", division, Division), ("status", status, Status)):
        if given not in typing.get_args(known):
            choices = typing.get_args(known)
            raise UserError(f"{name}={given} was given, needed one of {', '.join(choices)}; {choices[-1]} works")
    submission = Submission(
        organization=organization,
        platform=platform,
        division=typing.cast("Division", division),
        status=typing.cast("Status", status),
    )
    typer.echo(str(write_mllog(load_runs([run])[0], submission, output or run / "mllog.txt")))
