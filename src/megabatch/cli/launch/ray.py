"""`megabatch launch ray`: runs `megabatch train` on the nodes of a Ray cluster."""

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


def launch_ray(
    arguments: Arguments,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 0,
    workers_per_node: WorkersPerNode = None,
    cpus_per_worker: CpusPerWorker = 8,
    grace_s: GraceS = 30,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for free nodes.", min=1)] = 600.0,
) -> None:
    """Trains on a Ray cluster, that of RAY_ADDRESS or of this machine. Needs megabatch on every node.

    Paths of data and run are those of the nodes.
    """
    from megabatch.comm.ray_cluster import Placement, run_on_ray

    placement = Placement(
        nodes=nodes,
        workers_per_node=num_workers(gpus_per_node, workers_per_node),
        gpus_per_node=gpus_per_node,
        cpus_per_worker=cpus_per_worker,
    )
    command = train_command(arguments, cpus_per_worker=cpus_per_worker, grace_s=grace_s)
    if code := run_on_ray(command, placement, wait_s=wait_s, grace_s=grace_s):
        raise typer.Exit(code)
