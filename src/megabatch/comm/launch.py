"""Join the process group of a job, and exchange objects within it.

A worker is one process of `torch.distributed`. `join` adds the calling process to the group that torchrun (or
`run_local_workers`) describes in the environment; without such a description the world has one worker.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megabatch.comm.launcher_environment import check_interface, check_open_files, read_launcher, started_by_launcher
from megabatch.comm.rendezvous import open_store
from megabatch.cores import requested_threads, usable_cores
from megabatch.errors import MegabatchError, PeerError, SettingsError

T = TypeVar("T")
_PEER_IS_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of workers, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0


@contextlib.contextmanager
def join(*, device: str = "auto", timeout_s: float = 300.0, threads: int | None = None) -> Iterator[World]:
    """Joins the job's process group and yields this process's `World`.

    Without a launcher's environment variables the world has one worker and no process group. When the block ends the
    group is shut down, and the number of threads and the denormal mode are restored.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", or "mps", an Apple GPU, which trains as the only worker.
        timeout_s: timeout of collectives, in seconds.
        threads: CPU threads of this worker; None divides the cores among the local workers.

    Raises:
        SettingsError: `device` is "cuda" or "mps" and torch finds no such GPU, there are fewer GPUs than local workers,
            or the launcher's environment variables or the network interface in the environment are wrong.
        PeerError: not all workers joined in time, or the block lost the connection to one.
    """
    if not started_by_launcher():
        world = World(device=_device(device, 0, 1, 1))
        with _threads(threads, world):
            yield world
        return
    launched = read_launcher()
    chosen = _device(device, launched.local_rank, launched.world_size, launched.local_world_size)
    # Before the process group: NCCL would otherwise create its communicators on GPU 0.
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world = World(**dataclasses.asdict(launched), device=chosen)
    _start_process_group(world, timeout_s)
    try:
        with _threads(threads, world):
            yield world
    except RuntimeError as error:
        if isinstance(error, MegabatchError) or not _PEER_IS_GONE.search(str(error)):
            raise
        raise PeerError(f"the connection to another worker was lost: {str(error).splitlines()[0]}") from error
    finally:
        shutdown_process_group()


def _start_process_group(world: World, timeout_s: float) -> None:
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    check_interface(backend)
    check_open_files()
    try:
        dist.init_process_group(
            backend,
            store=open_store(rank=world.rank, world_size=world.world_size, timeout_s=timeout_s),
            rank=world.rank,
            world_size=world.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=world.device if world.device.type == "cuda" else None,
        )
    except (dist.DistError, RuntimeError) as error:
        raise _joining_failed(error, timeout_s) from error


def _joining_failed(error: Exception, timeout_s: float) -> MegabatchError:
    """The reason for which torch could not start the process group."""
    address, text = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return SettingsError(f"MASTER_PORT of {address} is in use by another program; choose another port")
    if "timeout" in text.lower() or "timed out" in text.lower():
        return PeerError(f"not all workers joined at {address} within {timeout_s:g} s: {text.splitlines()[0]}")
    return SettingsError(f"the workers cannot connect at {address}: {text.splitlines()[0]}")


def shutdown_process_group() -> None:
    """Waits until gloo's threads are idle, then destroys all process groups.

    Use it in place of `torch.distributed.destroy_process_group` at the end of a process, see `wait_for_gloo`.
    """
    wait_for_gloo()
    dist.destroy_process_group()


def wait_for_gloo() -> None:
    """Waits until gloo's threads are idle. Call it after the last collective of a process.

    A gloo thread may release the tensors of its last collective while the interpreter shuts down, which aborts the
    process ("terminate called without an active exception"; torch 2.13: about 1 in 30 short DistributedDataParallel
    runs on busy cores).
    """
    _wait_for_threads("pt_gloo_runloop")


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
    return broadcast_from(0, value, world)


def broadcast_from(rank: int, value: T, world: World) -> T:
    """Returns the `value` of `rank` on every worker. It is pickled: workers of one run trust one another."""
    if world.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=rank)
    return values[0]


def on_rank0(work: Callable[[], T], world: World) -> T:
    """Runs `work` on rank 0 alone and returns its result on every worker, or raises its error on every worker."""
    result: T | None = None
    error: Exception | None = None
    if world.is_first:
        try:
            result = work()
        except (MegabatchError, OSError) as caught:
            error = caught
    result, error = broadcast_from_rank0((result, error), world)
    if error is not None:
        raise error
    return cast("T", result)


def all_gather_objects(value: T, world: World) -> list[T]:
    """Returns every worker's `value`, in rank order, on every worker. Values are pickled."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def has_apple_gpu(wanted: str) -> bool:
    """True if `wanted`, a value of --device, lets a worker use an Apple GPU that torch finds."""
    return wanted in {"auto", "mps"} and torch.backends.mps.is_available()


def _device(wanted: str, local_rank: int, world_size: int, local_world_size: int) -> torch.device:
    if wanted == "mps" and not has_apple_gpu(wanted):
        raise SettingsError("device=mps was given, but torch finds no Apple GPU; --device cpu works")
    if wanted == "mps" and world_size > 1:
        raise SettingsError(f"device=mps trains one worker, {world_size} were started; --workers 1 works")
    if has_apple_gpu(wanted) and world_size == 1:
        return torch.device("mps")
    found = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not found:
        raise SettingsError("device=cuda was given, but torch finds no GPU; --device cpu works")
    if not found:
        return torch.device("cpu")
    if max(local_world_size, local_rank + 1) > found:
        needed = max(local_world_size, local_rank + 1)
        raise SettingsError(f"{needed} local workers need as many GPUs, {found} found; --workers {found} works")
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
