"""`megabatch launch slurm`: a batch file that runs `megabatch train` on several nodes."""

import re
import shlex
from typing import Annotated

import typer

from megabatch.cli.launch.command import (
    Arguments,
    CpusPerWorker,
    GpusPerNode,
    GraceS,
    Nodes,
    WorkersPerNode,
    num_workers,
    train_command,
)
from megabatch.errors import SettingsError

_WORD = re.compile(r"[\w.:,@/-]+")
_END_MARGIN_S = 30  # between the run's last checkpoint and the time limit


def launch_slurm(
    arguments: Arguments,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 0,
    workers_per_node: WorkersPerNode = None,
    cpus_per_worker: CpusPerWorker = 8,
    grace_s: GraceS = 90,
    time: Annotated[str | None, typer.Option(help="Time limit in Slurm's form, as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that is charged.")] = None,
) -> None:
    """Prints a batch file for Slurm. `megabatch launch slurm --nodes 4 ... > job.sh; sbatch job.sh` runs it.

    Slurm puts a preempted job back into the queue, and the same command then continues its run.
    """
    command = train_command(arguments, cpus_per_worker=cpus_per_worker, grace_s=grace_s)
    requests = {
        "job-name": f"megabatch-{re.sub(r'[^a-zA-Z0-9_.-]', '-', command[1])}",
        "nodes": nodes,
        "ntasks-per-node": num_workers(gpus_per_node, workers_per_node),
        "cpus-per-task": cpus_per_worker,
        "gpus-per-node": gpus_per_node or None,
        "time": _checked("--time", time, "12:00:00"),
        "partition": _checked("--partition", partition, "gpu"),
        "account": _checked("--account", account, "vision"),
        "open-mode": "append",
        "signal": f"TERM@{grace_s + _END_MARGIN_S}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in requests.items() if value is not None]
    start = f"srun {_BINDING} {shlex.join(['megabatch', *command])}"
    typer.echo("\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", start]))


_BINDING = "--cpu-bind=cores --kill-on-bad-exit=1"


def _checked(option: str, value: str | None, example: str) -> str | None:
    if value is not None and not _WORD.fullmatch(value):
        raise SettingsError(f"{option} {value!r}: needed one word without spaces; {option} {example} works")
    return value
