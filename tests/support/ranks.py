"""Ranks for tests: `run_threads` for algorithms (up to hundreds of ranks), `run_processes` for real gloo processes.

Both call `fn(*args)` once per rank inside an initialised default process group and return the results by rank. Every
wait has a timeout, the first failure is raised with its rank, and no thread or process outlives the call.

    def total(scale):                                    # a top-level function of the test module
        value = torch.full((3,), float(dist.get_rank() * scale))
        dist.all_reduce(value)
        return value

    assert run_threads(4, total, 1)[0].tolist() == [6, 6, 6]
    assert run_processes(2, total, 1)[1].tolist() == [1, 1, 1]

Threads share memory: sending is a copy, and collectives are exact sums in rank order. A thread that a rank starts
belongs to that rank. Threads also share torch's global random generator, so each rank should use a `torch.Generator` of
its own. Results of processes are pickled.
"""

import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from limits import HANG_S
from memory_group import Wire, install_worlds
from torch.nn.parallel import DistributedDataParallel

SUPPORT = Path(__file__).resolve().parent


class RankError(AssertionError):
    """A rank failed, died or did not finish in time; the message names the rank and the reason."""


def free_port() -> str:
    """A port on which nothing listened a moment ago, for MASTER_PORT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_threads(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = HANG_S) -> list[Any]:
    """Runs `fn(*args)` on `world_size` ranks that are threads of this process; returns the results by rank."""
    wire = Wire(world_size)
    results: list[Any] = [None] * world_size
    with install_worlds() as worlds:
        threads = [
            threading.Thread(
                target=partial(_thread_rank, wire, worlds, rank, results, fn, args), name=f"rank {rank}", daemon=True
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in threads):
            wire.abort(f"not finished within {timeout_s:g} s; {wire.describe_pending()}")
            for thread in threads:
                thread.join(5.0)
        # Each DDP forward sets and restores this class attribute. Concurrent forwards may leave a model in it, which
        # makes torch.compile split the graphs of later models.
        DistributedDataParallel._active_ddp_module = None
    if wire.failure is not None:
        raise RankError(wire.failure) from wire.cause
    return results


def _thread_rank(wire: Wire, worlds: Any, rank: int, results: list[Any], fn: Callable[..., Any], args: Any) -> None:
    try:
        with worlds.enter(wire):
            dist.init_process_group("memory", store=wire.store, rank=rank, world_size=wire.world_size)
            try:
                results[rank] = fn(*args)
            finally:
                dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - run_threads raises it
        wire.abort(f"rank {rank}: {type(error).__name__}: {error}", error)


def run_processes(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = HANG_S,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Runs `fn(*args)` on `world_size` gloo processes on the loopback interface; returns the results by rank.

    `fn` must be a top-level function; each process imports its file by path. For a rank in `may_die` that ends without
    a result, the result is None; such ranks are not waited for once the others are done. `timeout_s` is also the
    default group's timeout.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = _server()
        pipes, children = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                spec = (str(inspect.getsourcefile(fn)), fn.__module__, fn.__qualname__)
                job = (theirs, spec, pickle.dumps(args), rank, world_size, folder, timeout_s)
                child = context.Process(target=_process_rank, args=job, daemon=True)
                child.start()
                theirs.close()
                pipes.append(ours)
                children.append(child)
            return _collect(pipes, timeout_s, may_die)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.join(10.0)
            for pipe in pipes:
                pipe.close()


def _server() -> Any:
    """Returns a context whose fork server has imported torch: a rank then starts in 20 ms instead of 2 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
    return context


def _collect(pipes: list[Connection], timeout_s: float, may_die: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    open_ranks = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s + 10.0  # time to start the processes
    while not set(open_ranks.values()) <= set(may_die):
        ready = wait(list(open_ranks), max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise RankError(f"ranks {sorted(open_ranks.values())} did not finish within {timeout_s:g} s")
        for pipe in ready:
            rank = open_ranks.pop(pipe)  # type: ignore[call-overload]
            results[rank] = _receive(pipe, rank, rank in may_die)  # type: ignore[arg-type]
    return results


def _receive(pipe: Connection, rank: int, may_die: bool) -> Any:
    try:
        kind, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - written by our own child
    except EOFError:
        if may_die:
            return None
        raise RankError(f"rank {rank} died without a result") from None
    if kind == "error":
        raise RankError(f"rank {rank}: {value}")
    return value


def _process_rank(
    pipe: Connection, spec: tuple[str, str, str], args: bytes, rank: int, world_size: int, folder: str, timeout_s: float
) -> None:
    """Body of a rank's process: runs the function, sends its result, then waits until the parent kills it or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.dump_traceback_later(timeout_s + 15.0, exit=True)
    warnings.simplefilter("error")
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        fn = _load(*spec)
        store = dist.FileStore(f"{folder}/store", world_size)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        answer = ("result", fn(*pickle.loads(args)))  # noqa: S301 - written by our own parent
    except BaseException:  # noqa: BLE001 - the parent raises it
        answer = ("error", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()  # do not exit yet: closed connections would fail peers that still run
    os._exit(0)


def _load(path: str, module_name: str, qualname: str) -> Callable[..., Any]:
    """Returns the function `qualname` of the file `path`, imported under the parent's name of that module."""
    if str(SUPPORT) not in sys.path:
        sys.path.insert(0, str(SUPPORT))
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function: Any = module
    for part in qualname.split("."):
        function = getattr(function, part)
    return function
