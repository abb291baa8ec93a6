"""`megabatch report RUN...`: writes one self-contained HTML page about one or several runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that `megabatch train` wrote.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html in the first run folder.")
    ] = None,
) -> None:
    """Writes one HTML page with the curves of the runs. The page is self-contained; the command prints its path."""
    from megabatch.observe.report import write_report

    typer.echo(str(write_report(runs, output or runs[0] / "report.html")))
