"""Starting local workers, and joining the workers that are there.

A worker is one process of `torch.distributed`. `run_local_workers` starts them through torch's elastic launch API;
`join` makes the calling process a member of the group that torchrun (or `run_local_workers`) described in the
environment, or a world of one where there is none. This module and the command line alone read the environment.
"""

import contextlib
import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megabatch.errors import SettingsError

T = TypeVar("T")
_LOCAL_WORKER = "MEGABATCH_LOCAL_WORKER"


@dataclass(frozen=True)
class World:
    """This process's place among the workers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_restarts: int = 0  # by torchrun, after a worker failed
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this worker writes files and talks to people."""
        return self.rank == 0


def started_by_launcher() -> bool:
    """Whether torchrun, or `run_local_workers`, started this process as a worker."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def started_locally() -> bool:
    """Whether `run_local_workers` started this process."""
    return _LOCAL_WORKER in os.environ


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def run_local_workers(num_workers: int, arguments: Sequence[str]) -> int:
    """Runs `python -m megabatch ARGUMENTS` as `num_workers` local workers; the exit code of the first that failed.

    All end together: when one fails, or at Ctrl-C, the others receive the signal too, and have 30 s to write a last
    checkpoint before they are killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=f"megabatch-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    with _environment(_worker_environment(num_workers)), _quiet_agent():
        try:
            elastic_launch(config, sys.executable)("-m", "megabatch", *arguments)
        except ChildFailedError as failure:
            codes = [worker.exitcode for worker in failure.failures.values()]
            return 2 if 2 in codes else 1
        except SignalException:
            return 1
    return 0


@contextlib.contextmanager
def join(*, device: str = "auto", timeout_s: float = 300.0, threads: int | None = None) -> Iterator[World]:
    """The world this process belongs to; when the block ends the process group is left, and threads are as before.

    Raises:
        SettingsError: `device` is "cuda" and there is none, or fewer GPUs than local workers.
    """
    if not started_by_launcher():
        world = World(device=_device(device, 0, 1))
        with _threads(threads, world):
            yield world
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = _device(device, local_rank, local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, num_restarts, chosen)
    try:
        with _threads(threads, world):
            yield world
    finally:
        shutdown_process_group()


def shutdown_process_group() -> None:
    """Leave all process groups, after which the process may end; instead of `torch.distributed.destroy_process_group`.

    A thread of gloo may let go of its last collective's tensors late, when the interpreter is ending already, and
    aborts the process then ("terminate called without an active exception"; torch 2.13: about one of thirty short
    DistributedDataParallel runs on busy cores). This waits until those threads are idle.
    """
    _wait_for_threads("pt_gloo_runloop")
    dist.destroy_process_group()


def _wait_for_threads(name: str, *, tasks: Path = Path("/proc/self/task"), timeout_s: float = 5.0) -> None:
    """Until all threads of that name sleep. One that wants Python's lock gets it while this waits between two looks."""
    deadline = time.monotonic() + timeout_s
    times_idle = 0
    while times_idle < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
        times_idle = times_idle + 1 if all(state == "S" for state in _thread_states(name, tasks)) else 0


def _thread_states(name: str, tasks: Path) -> list[str]:
    """The kernel's letters for what these threads do, "S" for sleeping; none on a system without /proc."""
    states = []
    for task in tasks.glob("*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            thread, state = re.match(r"\d+ \((.*)\) (\w)", task.read_text()).groups()  # type: ignore[union-attr]
            if thread == name:
                states.append(state)
    return states


def sum_over_workers(values: torch.Tensor, world: World) -> torch.Tensor:
    """`values` summed over all workers, in place; the same tensor."""
    if world.world_size > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_rank0(value: T, world: World) -> T:
    """What the first worker holds as `value`, on every worker (workers of one run trust one another)."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_objects(value: T, world: World) -> list[T]:
    """What each worker holds as `value`, in rank order, on every worker."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def _device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    found = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not found:
        raise SettingsError("device=cuda was asked for, but torch finds no GPU; --device cpu works")
    if not found:
        return torch.device("cpu")
    if local_world_size > found:
        raise SettingsError(
            f"{local_world_size} local workers need as many GPUs, {found} found; --workers {found} works"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def _threads(threads: int | None, world: World) -> Iterator[None]:
    """Within the block the cores are divided among the local workers, and denormal numbers are zero.

    More threads than cores make every worker wait for another; gradients that fade to denormals cost a quarter of the
    speed on x86.
    """
    num_threads, flushed = torch.get_num_threads(), _flushes_denormals()
    torch.set_num_threads(threads or max(1, available_cores() // world.local_world_size))
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_flush_denormal(flushed)


def _flushes_denormals() -> bool:
    """Whether this thread's arithmetic makes zero of what is below the smallest normal number."""
    smallest = torch.tensor(sys.float_info.min, dtype=torch.float64)
    return bool(smallest / 2 == 0)


def _worker_environment(num_workers: int) -> dict[str, str]:
    threads = str(max(1, available_cores() // num_workers))
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    return {
        _LOCAL_WORKER: "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        # A worker that is started again must not meet the addresses its predecessor left in the agent's store.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Silences the agent's own log: what a failed worker said stands on stderr already, one clear line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
