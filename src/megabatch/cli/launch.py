"""`megabatch launch slurm`: a batch file that runs `megabatch train` on several nodes."""

import re
import shlex
from typing import Annotated

import typer

from megabatch import recipes
from megabatch.errors import SettingsError

_WORD = re.compile(r"[\w.:,@/-]+")


def launch_slurm(
    arguments: Annotated[
        list[str], typer.Argument(metavar="-- RECIPE OPTIONS...", help="Arguments of `megabatch train`, after `--`.")
    ],
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per node, a worker on each; 0 trains on CPUs.", min=0)] = 0,
    workers_per_node: Annotated[
        int | None, typer.Option(help="Workers per node; default one per GPU, or one.", min=1)
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(help="CPU cores per worker, which also decode images.", min=1)] = 8,
    time: Annotated[str | None, typer.Option(help="Time limit in Slurm's form, as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that is charged.")] = None,
) -> None:
    """Prints a batch file for Slurm. `megabatch launch slurm --nodes 4 ... > job.sh; sbatch job.sh` runs it.

    Slurm puts a preempted job back into the queue, and the same command then continues its run.
    """
    recipe, *options = arguments
    recipes.get(recipe)
    if not any(option == "--output" or option.startswith("--output=") for option in options):
        raise SettingsError("a job that is continued needs the folder of its run; --output /shared/runs/NAME works")
    workers = workers_per_node or gpus_per_node or 1
    if gpus_per_node and workers != gpus_per_node:
        raise SettingsError(
            f"--workers-per-node {workers} with {gpus_per_node} GPUs: needed one worker per GPU; "
            f"--workers-per-node {gpus_per_node} works"
        )
    requests = {
        "job-name": f"megabatch-{re.sub(r'[^a-zA-Z0-9_.-]', '-', recipe)}",
        "nodes": nodes,
        "ntasks-per-node": workers,
        "cpus-per-task": cpus_per_worker,
        "gpus-per-node": gpus_per_node or None,
        "time": _checked("--time", time, "12:00:00"),
        "partition": _checked("--partition", partition, "gpu"),
        "account": _checked("--account", account, "vision"),
        "open-mode": "append",
        "signal": "TERM@120",
    }
    threads = ["--threads", str(cpus_per_worker), "--decode-threads", str(cpus_per_worker)]
    command = ["megabatch", "train", recipe, "--resume", "auto", *threads, *options]
    lines = [f"#SBATCH --{name}={value}" for name, value in requests.items() if value is not None]
    typer.echo("\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", f"srun {_BINDING} {shlex.join(command)}"]))


_BINDING = "--cpu-bind=cores --kill-on-bad-exit=1"


def _checked(option: str, value: str | None, example: str) -> str | None:
    if value is not None and not _WORD.fullmatch(value):
        raise SettingsError(f"{option} {value!r}: needed one word without spaces; {option} {example} works")
    return value
