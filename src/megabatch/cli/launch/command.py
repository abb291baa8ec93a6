"""The command line of `megabatch train` that a job runs, and options that all launchers share."""

from collections.abc import Sequence
from typing import Annotated

import typer

from megabatch import recipes
from megabatch.errors import SettingsError

Arguments = Annotated[
    list[str], typer.Argument(metavar="-- RECIPE OPTIONS...", help="Arguments of `megabatch train`, after `--`.")
]
Nodes = Annotated[int, typer.Option(help="Number of nodes.", min=1)]
GpusPerNode = Annotated[int, typer.Option(help="GPUs per node, a worker on each; 0 trains on CPUs.", min=0)]
WorkersPerNode = Annotated[int | None, typer.Option(help="Workers per node; default one per GPU, or one.", min=1)]
CpusPerWorker = Annotated[int, typer.Option(help="CPU cores per worker, which also decode images.", min=1)]


def train_command(arguments: Sequence[str], *, cpus_per_worker: int) -> list[str]:
    """Returns `train RECIPE ...` of a job that is continued after a restart.

    Raises:
        RecipeError: there is no such recipe.
        SettingsError: the run's folder is missing.
    """
    recipe, *options = arguments
    recipes.get(recipe)
    if not any(option == "--output" or option.startswith("--output=") for option in options):
        raise SettingsError("a job that is continued needs the folder of its run; --output /shared/runs/NAME works")
    threads = ["--threads", str(cpus_per_worker), "--decode-threads", str(cpus_per_worker)]
    return ["train", recipe, "--resume", "auto", *threads, *options]


def num_workers(gpus_per_node: int, workers_per_node: int | None) -> int:
    """Returns the workers of a node; SettingsError unless each has a GPU where the node has any."""
    workers = workers_per_node or gpus_per_node or 1
    if gpus_per_node and workers != gpus_per_node:
        raise SettingsError(
            f"--workers-per-node {workers} with {gpus_per_node} GPUs: needed one worker per GPU; "
            f"--workers-per-node {gpus_per_node} works"
        )
    return workers
