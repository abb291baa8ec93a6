"""Workers on a Ray cluster: one Ray task per node runs torchrun there, with all GPUs of its placement.

A task per node, not per worker: local ranks, shared memory and the grouping of workers by host are those of torchrun.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megabatch.comm.local_workers import common_code
from megabatch.comm.torchrun import run_torchrun
from megabatch.errors import STOPPED, PeerError, SettingsError

_MARGIN_S = 30  # between a run's grace time and the end of its tasks


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What a run asks of the cluster."""

    nodes: int
    workers_per_node: int
    gpus_per_node: int
    cpus_per_worker: int

    def bundle(self) -> dict[str, float]:
        """Resources of one node, in Ray's names."""
        resources: dict[str, float] = {"CPU": self.cpus_per_worker * self.workers_per_node}
        return resources | ({"GPU": self.gpus_per_node} if self.gpus_per_node else {})


def run_on_ray(command: Sequence[str], placement: Placement, *, wait_s: float, grace_s: int) -> int:
    """Runs `megabatch COMMAND` on the nodes of a placement; returns the workers' common exit code, `STOPPED` after a
    signal.

    Connects to the cluster of RAY_ADDRESS or of this machine, or starts one here, unless Ray is connected. SIGINT and
    SIGTERM reach the workers, which then have `grace_s` to write a checkpoint.

    Raises:
        SettingsError: Ray is missing, or the cluster has no such placement within `wait_s`.
        PeerError: a node or its task was lost.
    """
    try:
        import ray
        from ray.util import placement_group, remove_placement_group
    except ImportError:
        raise SettingsError("Ray is not installed; `pip install 'megabatch[ray]'` installs it") from None
    if not ray.is_initialized():
        ray.init()
    group = placement_group([placement.bundle()] * placement.nodes, strategy="SPREAD")
    try:
        if not group.wait(wait_s):
            found = {name: int(ray.cluster_resources().get(name, 0)) for name in placement.bundle()}
            raise SettingsError(
                f"{placement.nodes} nodes with {placement.bundle()} each were not free within {wait_s:g} s; the whole "
                f"cluster has {found}; fewer --nodes or --cpus-per-worker may work"
            )
        return _run_in(group, command, placement, grace_s=grace_s)
    finally:
        remove_placement_group(group)


def _run_in(group: Any, command: Sequence[str], placement: Placement, *, grace_s: int) -> int:
    import ray

    address, port = ray.get(_task(_free_address, group, 0, placement).remote())
    common = [f"--nnodes={placement.nodes}", f"--nproc-per-node={placement.workers_per_node}"]
    common += [f"--master-addr={address}", f"--master-port={port}", f"--shutdown-timeout={grace_s}"]
    tasks = [
        _task(run_torchrun, group, rank, placement).remote(
            [*common, f"--node-rank={rank}", "-m", "megabatch", *command]
        )
        for rank in range(placement.nodes)
    ]
    try:
        failed = {code for code in ray.get(tasks) if code}
    except ray.exceptions.RayError as error:
        raise PeerError(f"a node of the Ray cluster was lost: {str(error).splitlines()[0]}") from error
    except (KeyboardInterrupt, SystemExit):
        for task in tasks:
            ray.cancel(task)  # torchrun receives it as SIGINT
        ray.wait(tasks, num_returns=len(tasks), timeout=grace_s + _MARGIN_S)
        return STOPPED
    return common_code(failed) if failed else 0


def _task(function: Any, group: Any, rank: int, placement: Placement) -> Any:
    """`function` as a task in a node's place; it is not repeated, since a restart needs all nodes."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = placement.bundle()
    return ray.remote(function).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        max_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
    )


def _free_address() -> tuple[str, int]:
    """This node's address and a port that is free there."""
    from ray.util import get_node_ip_address

    with socket.socket() as probe:
        probe.bind(("", 0))
        return get_node_ip_address(), probe.getsockname()[1]
