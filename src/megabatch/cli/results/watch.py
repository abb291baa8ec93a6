"""`megabatch watch RUN`: follows a run from another terminal, or another machine that sees its folder."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder of a run in progress.")],
    poll_s: Annotated[float, typer.Option(help="Seconds between two looks at the run's events.", min=0.1)] = 1.0,
) -> None:
    """Follows a run that trains elsewhere. Shows progress and where an update's time goes; ends with the run."""
    from megabatch.observe.progress import Progress
    from megabatch.observe.watch import follow
    from megabatch.recipe import read
    from megabatch.train.schedule import count_steps

    recipe = read(run / "recipe.json") if (run / "recipe.json").is_file() else None
    num_steps, num_epochs = (count_steps(recipe), recipe.total_epochs) if recipe else (0, 0.0)
    with Progress(num_steps, num_epochs) as progress:
        follow(run, progress, poll_s=poll_s)
