"""`megabatch report RUN...`: one self-contained HTML page with the curves of one or several runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, as `megabatch train` named them.")],
    output: Annotated[Path | None, typer.Option(help="The page; default report.html in the first run folder.")] = None,
) -> None:
    """Draws runs' curves on one HTML page. It stands alone; says where it is."""
    from megabatch.observe.report import write_report

    typer.echo(str(write_report(runs, output or runs[0] / "report.html")))
