"""Start local workers through torch's elastic launch API, and end them together."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import megabatch
from megabatch.comm.worker_errors import FOLDER_VARIABLE, find_cause, read_errors
from megabatch.cores import usable_cores
from megabatch.errors import PeerError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end training with a checkpoint."""
_RUN_ID = "megabatch-"
# -P and the appended folder: a file in the current folder shadows no module, and workers import this very package.
_START = "import sys; sys.path.append(sys.argv.pop(1)); from megabatch.cli.main import main; main()"


def run_local_workers(num_workers: int, arguments: Sequence[str]) -> int:
    """Runs `megabatch ARGUMENTS` in `num_workers` local workers and returns an exit code.

    The code is 0 on success, 2 if a worker exited with 2 (invalid input), else 1. When one worker fails, or at the
    first of `STOP_SIGNALS`, the others receive SIGTERM or that signal and have 30 s to write a last checkpoint before
    they are killed. A signal that is ignored when this function is called stays ignored, as `nohup` wants of SIGHUP.

    Raises:
        MegabatchError: the error that ended the workers.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    command = ("-P", "-c", _START, str(Path(megabatch.__file__).parent.parent), *arguments)
    code, killed = 0, ""
    with tempfile.TemporaryDirectory(prefix="megabatch-", ignore_cleanup_errors=True) as folder:
        environment = _worker_environment(num_workers) | {FOLDER_VARIABLE: folder}
        with _environment(environment), _quiet_agent(), _stop_at_first_signal():
            try:
                elastic_launch(_launch_config(num_workers), sys.executable)(*command)
            except ChildFailedError as failure:
                # Workers that end because of another one's failure exit with other codes: 2 is always a cause.
                code = 2 if any(worker.exitcode == 2 for worker in failure.failures.values()) else 1
                killed = _killed({rank: worker.exitcode for rank, worker in failure.failures.items()})
            except SignalException:
                code = 1
        error = find_cause(read_errors(Path(folder)))
    if killed and (error is None or isinstance(error, PeerError)):
        raise PeerError(f"{killed}: {error}" if error else killed)
    if code and error is not None:
        raise error
    return code


def _launch_config(num_workers: int) -> "LaunchConfig":
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=f"{_RUN_ID}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="",  # `_stop_at_first_signal` handles them
    )


def _killed(exit_codes: Mapping[int, int]) -> str:
    """Names the workers that a signal killed, other than the signals with which workers are stopped."""
    ended = {
        rank: signal.Signals(-code).name for rank, code in exit_codes.items() if code < 0 and -code not in STOP_SIGNALS
    }
    return ", ".join(f"worker {rank} was killed by {name}" for rank, name in ended.items())


def parent_has_died() -> bool:
    """True in a local worker whose parent has ended without ending its workers, as SIGKILL makes it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return run_id.startswith(_RUN_ID) and run_id != f"{_RUN_ID}{os.getppid()}"


@contextlib.contextmanager
def handling(handler: "signal._HANDLER") -> Iterator[None]:
    """Calls `handler` at `STOP_SIGNALS` within the block, except those that the process ignores."""
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def _stop_at_first_signal() -> Iterator[None]:
    """Raises torch's SignalException at the first signal, which ends the workers, and ignores later ones.

    A second one would leave workers behind. At a second Ctrl-C the workers, which receive it too, end at once.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise SignalException(f"received signal {number}", sigval=signal.Signals(number))

    with handling(stop):
        yield


def _worker_environment(num_workers: int) -> dict[str, str]:
    threads = str(max(1, usable_cores() // num_workers))
    # Without an interface, gloo uses the one that the host name resolves to, which other processes may not reach.
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or threads,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or loopback,
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
    """Disables logging in the launcher: its report on a failed worker has no cause in it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
