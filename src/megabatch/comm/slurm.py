"""Workers that Slurm's srun starts: its description of a task as the variables that torchrun sets.

Only in a job step of several tasks, one per worker, and only where no launcher has set RANK: nothing is changed where
one task per node starts torchrun.
"""

import os
import re
from collections.abc import Mapping

from megabatch.errors import SettingsError

_FIRST_PORT, _NUM_PORTS = 12_000, 18_000  # below the range from which systems choose ports of their own


def adopt_slurm_task() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for a task of srun.

    MASTER_ADDR and MASTER_PORT keep the values that the user has set.

    Raises:
        SettingsError: Slurm's variables contradict each other or are missing.
    """
    if os.environ.get("RANK") or int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) < 2:
        return
    try:
        described = describe_task(os.environ)
    except (KeyError, ValueError, IndexError) as error:
        raise SettingsError(
            f"srun's description of this task cannot be read ({error}); torchrun, started once per node, works"
        ) from None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.setdefault(name, described.pop(name))
    os.environ.update(described)


def describe_task(slurm: Mapping[str, str]) -> dict[str, str]:
    """Returns the launcher's variables of a task, from those of `srun`."""
    on_nodes = tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])
    step = int(slurm["SLURM_STEP_ID"]) % 1000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(on_nodes[int(slurm["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_FIRST_PORT + (int(slurm["SLURM_JOB_ID"]) * 7 + step) % _NUM_PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks on each node: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """Returns the first name of Slurm's list of nodes: `gpu[007-010,12],x` is gpu007."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ValueError(f"no node in {nodes!r}")
    return "".join(part or "" for part in found.groups())
