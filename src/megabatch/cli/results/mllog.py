"""`megabatch mllog RUN`: writes the MLPerf log of a run."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from megabatch.cli.completion import complete_from
from megabatch.cli.options import require_choice
from megabatch.observe.mllog import Division, Status


def mllog(
    run: Annotated[Path, typer.Argument(help="Run folder of a run that has ended.")],
    organization: Annotated[str, typer.Option(help="Submitting organization.")],
    platform: Annotated[str, typer.Option(help="Name of the system.")],
    division: Annotated[
        str, typer.Option(help="closed, or open.", autocompletion=complete_from(get_args(Division)))
    ] = "open",
    status: Annotated[
        str, typer.Option(help="cloud, onprem, preview or research.", autocompletion=complete_from(get_args(Status)))
    ] = "research",
    output: Annotated[Path | None, typer.Option(help="File to write; default: mllog.txt in the run folder.")] = None,
) -> None:
    """Writes a run's MLPerf log. It follows the rules of MLPerf Training for ResNet; the command prints its path."""
    from megabatch.observe.mllog import Submission, write_mllog
    from megabatch.observe.run_folder import load_runs

    divisions, statuses = cast("tuple[Division, ...]", get_args(Division)), cast("tuple[Status, ...]", get_args(Status))
    submission = Submission(
        organization=organization,
        platform=platform,
        division=require_choice("--division", division, divisions),
        status=require_choice("--status", status, statuses),
    )
    typer.echo(str(write_mllog(load_runs([run])[0], submission, output or run / "mllog.txt")))
