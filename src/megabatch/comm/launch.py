"""Start local workers, and join the process group of a job.

A worker is one process of `torch.distributed`. `run_local_workers` starts workers through torch's elastic launch API.
`join` adds the calling process to the group that torchrun (or `run_local_workers`) describes in the environment;
without such a description the world has one worker. Only this module and the command line read the environment.
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

from megabatch.cores import requested_threads, usable_cores
from megabatch.errors import SettingsError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of workers, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_restarts: int = 0  # how often torchrun has restarted the workers after a failure
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0


def started_by_launcher() -> bool:
    """True if torchrun or `run_local_workers` started this process as a worker."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_local_workers(num_workers: int, arguments: Sequence[str]) -> int:
    """Runs `python -m megabatch ARGUMENTS` in `num_workers` local workers and returns an exit code.

    The code is 0 on success, 2 if a worker exited with 2 (invalid input), else 1. When one worker fails, or at Ctrl-C,
    the others receive SIGTERM or SIGINT and have 30 s to write a last checkpoint before they are killed.
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
            # Workers that end because of another one's failure exit with other codes: 2 is always a cause.
            codes = [worker.exitcode for worker in failure.failures.values()]
            return 2 if 2 in codes else 1
        except SignalException:
            return 1
    return 0


@contextlib.contextmanager
def join(*, device: str = "auto", timeout_s: float = 300.0, threads: int | None = None) -> Iterator[World]:
    """Joins the job's process group and yields this process's `World`.

    Without a launcher's environment variables the world has one worker and no process group. When the block ends the
    group is shut down, and the number of threads and the denormal mode are restored.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        timeout_s: timeout of collectives, in seconds.
        threads: CPU threads of this worker; None divides the cores among the local workers.

    Raises:
        SettingsError: `device` is "cuda" and torch finds no GPU, or there are fewer GPUs than local workers.
    """
    if not started_by_launcher():
        world = World(device=_device(device, 0, 1))
        with _threads(threads, world):
            yield world
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = _device(device, local_rank, local_world_size)
    # Before the process group: NCCL would otherwise create its communicators on GPU 0.
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
    """Waits until gloo's threads are idle, then destroys all process groups.

    Use it in place of `torch.distributed.destroy_process_group` at the end of a process. A gloo thread may release the
    tensors of its last collective while the interpreter shuts down, which aborts the process ("terminate called
    without an active exception"; torch 2.13: about 1 in 30 short DistributedDataParallel runs on busy cores).
    """
    _wait_for_threads("pt_gloo_runloop")
    dist.destroy_process_group()


def _wait_for_threads(name: str, *, tasks: Path = Path("/proc/self/task"), timeout_s: float = 5.0) -> None:
    """Waits until all threads of that name sleep, for at most `timeout_s`.

    Three samples in a row must show them asleep: a thread that waits for the GIL also counts as asleep, and acquires
    it during one of the 2 ms pauses, in which this thread releases it.
    """
    deadline = time.monotonic() + timeout_s
    times_idle = 0
    while times_idle < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
        times_idle = times_idle + 1 if all(state == "S" for state in _thread_states(name, tasks)) else 0


def _thread_states(name: str, tasks: Path) -> list[str]:
    """State letters of the threads of that name, "S" for sleeping (proc(5)); empty on a system without /proc."""
    states = []
    for task in tasks.glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended since the listing
            thread, state = re.match(r"\d+ \((.*)\) (\w)", task.read_text()).groups()  # type: ignore[union-attr]
            if thread == name:
                states.append(state)
    return states


def sum_over_workers(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sums `values` over all workers, in place; returns the same tensor."""
    if world.world_size > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_rank0(value: T, world: World) -> T:
    """Returns rank 0's `value` on every worker. It is pickled: workers of one run trust one another."""
    if world.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_objects(value: T, world: World) -> list[T]:
    """Returns every worker's `value`, in rank order, on every worker. Values are pickled."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def _device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    found = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not found:
        raise SettingsError("device=cuda was given, but torch finds no GPU; --device cpu works")
    if not found:
        return torch.device("cpu")
    if local_world_size > found:
        raise SettingsError(
            f"{local_world_size} local workers need as many GPUs, {found} found; --workers {found} works"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def _threads(threads: int | None, world: World) -> Iterator[None]:
    """Sets the number of threads and flushes denormal numbers to zero, within the block.

    Without `threads` and OMP_NUM_THREADS the cores are divided among the local workers.
    With more threads than cores the workers wait for each other. Gradients that decay to denormal numbers cost a
    quarter of the speed on x86.
    """
    num_threads, flushed = torch.get_num_threads(), _flushes_denormals()
    torch.set_num_threads(threads or requested_threads() or max(1, usable_cores() // world.local_world_size))
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_flush_denormal(flushed)


def _flushes_denormals() -> bool:
    """True if this thread's arithmetic flushes denormal results to zero."""
    # Half of the smallest normal number is denormal.
    smallest = torch.tensor(sys.float_info.min, dtype=torch.float64)
    return bool(smallest / 2 == 0)


def _worker_environment(num_workers: int) -> dict[str, str]:
    threads = str(max(1, usable_cores() // num_workers))
    # Without an interface, gloo uses the one that the host name resolves to, which other processes may not reach.
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        # Without this, restarted workers would read the addresses of the previous ones from the agent's store.
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
    """Disables logging in the launcher: a failed worker has already printed its one-line error to stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
