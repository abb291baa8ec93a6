"""Start local workers through torch's elastic launch API, and end them together."""

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import megabatch
from megabatch.comm.launcher_environment import check_open_files
from megabatch.comm.worker_errors import FOLDER_VARIABLE, find_cause, read_errors
from megabatch.comm.worker_watch import RUN_ID, WorkerWatch
from megabatch.cores import usable_cores
from megabatch.errors import STOPPED, MegabatchError, PeerError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end training with a checkpoint."""
REPEAT_S = 2.0
"""A signal within this time after the first is the same one, sent to a process and to its group."""
# -P and the appended folder: a file in the current folder shadows no module, and workers import this very package.
_START = "import sys; sys.path.append(sys.argv.pop(1)); from megabatch.cli.main import main; main()"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How local workers are started again after one was lost, with the arguments `restarted(those of the start)`.

    A restart after which `progress()` (the newest checkpoint, say) has another value than before gives back all
    `max_restarts` and all workers. From the second restart without progress on, each has one worker fewer, but at
    least `min_workers`. `announce` receives one line per restart.
    """

    max_restarts: int = 0
    min_workers: int | None = None
    progress: Callable[[], object] = lambda: None
    restarted: Callable[[Sequence[str]], Sequence[str]] = lambda arguments: [*arguments, "--resume"]
    announce: Callable[[str], None] = lambda _: None


def run_local_workers(
    num_workers: int,
    arguments: Sequence[str],
    *,
    recovery: Recovery | None = None,
    silent_s: float = 30.0,
    grace_s: float = 30.0,
) -> int:
    """Runs `megabatch ARGUMENTS` in `num_workers` local workers and returns an exit code.

    The code is 0 on success, 2 if a worker exited with 2 (invalid input), `STOPPED` after one of `STOP_SIGNALS`, else
    1. When one worker fails, or at the first of those signals, the others receive SIGTERM or that signal and have
    `grace_s` to write a last checkpoint before they are killed; a second signal kills them at once. A worker that does
    not run for `silent_s` is killed. A signal that is ignored when this function is called stays ignored, as `nohup`
    wants of SIGHUP.

    Raises:
        SettingsError: this process may open too few files.
        MegabatchError: the error that ended the workers.
    """
    check_open_files()
    recovery = recovery or Recovery()
    budget = _Budget(recovery, num_workers)
    present = arguments
    while True:
        before = recovery.progress()
        code, error, was_killed = _run_once(budget.num_workers, present, silent_s=silent_s, grace_s=grace_s)
        progressed = recovery.progress() != before
        if not budget.allows_restart(code, error, was_killed=was_killed, progressed=progressed):
            break
        present = recovery.restarted(arguments)
        recovery.announce(f"{error or 'a worker failed'}; {budget}")
    if code and error is not None:
        raise error
    return code


class _Budget:
    """The restarts that are left, and the number of workers of the next group."""

    def __init__(self, recovery: Recovery, num_workers: int) -> None:
        self.num_workers = num_workers
        self._recovery = recovery
        self._all_workers = num_workers
        self._spent = 0

    def allows_restart(self, code: int, error: MegabatchError | None, *, was_killed: bool, progressed: bool) -> bool:
        """Spends a restart after the end of a group of workers; False if none is left or none would help."""
        if progressed:
            self.num_workers, self._spent = self._all_workers, 0
        # An unknown error may be one of the program, which each restart would repeat.
        is_lost = code == 1 and (was_killed or (progressed and (error is None or isinstance(error, PeerError))))
        if not is_lost or self._spent == self._recovery.max_restarts:
            return False
        self._spent += 1
        fewest = self._recovery.min_workers or self._all_workers
        if self._spent > 1 and self.num_workers > fewest:
            self.num_workers -= 1
        return True

    def __str__(self) -> str:
        most = self._recovery.max_restarts
        return (
            f"{self.num_workers} worker(s) restart from the newest checkpoint "
            f"({self._spent} of at most {most} restarts without a new one)"
        )


def _run_once(
    num_workers: int, arguments: Sequence[str], *, silent_s: float, grace_s: float
) -> tuple[int, MegabatchError | None, bool]:
    """Runs one group of workers; returns its exit code, its error if known, and True if a worker was killed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    command = ("-P", "-c", _START, str(Path(megabatch.__file__).parent.parent), *arguments)
    code, lost = 0, ""
    with tempfile.TemporaryDirectory(prefix="megabatch-", ignore_cleanup_errors=True) as folder:
        environment = _worker_environment(num_workers) | {FOLDER_VARIABLE: folder}
        watch = WorkerWatch(Path(folder), timeout_s=silent_s)
        with _environment(environment), _quiet_agent(), watch, _stop_at_first_signal(watch.kill_all):
            try:
                elastic_launch(_launch_config(num_workers, grace_s), sys.executable)(*command)
            except ChildFailedError as failure:
                exit_codes = {rank: worker.exitcode for rank, worker in failure.failures.items()}
                code = common_code(exit_codes.values())
                lost = ", ".join(watch.silent) or _killed(exit_codes)
            except SignalException:
                return STOPPED, None, False
        error = find_cause(read_errors(Path(folder)))
    if lost and (error is None or isinstance(error, PeerError)):
        error = PeerError(f"{lost}: {error}" if error else lost)
    return code, error if code else None, bool(lost)


def common_code(exit_codes: Iterable[int]) -> int:
    """Exit code of a group: workers that end because of another one's failure exit with other codes, or a signal."""
    found = set(exit_codes)
    were_stopped = all(-code in STOP_SIGNALS for code in found)
    return next((code for code in (2, 1, STOPPED) if code in found), STOPPED if were_stopped else 1)


def _launch_config(num_workers: int, grace_s: float) -> "LaunchConfig":
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=f"{RUN_ID}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="",  # `_stop_at_first_signal` handles them
        shutdown_timeout=math.ceil(grace_s),
    )


def _killed(exit_codes: Mapping[int, int]) -> str:
    """Names the workers that a signal killed, other than the signals with which workers are stopped."""
    ended = {
        rank: signal.Signals(-code).name for rank, code in exit_codes.items() if code < 0 and -code not in STOP_SIGNALS
    }
    return ", ".join(f"worker {rank} was killed by {name}" for rank, name in ended.items())


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
def _stop_at_first_signal(kill_workers: Callable[[], None]) -> Iterator[None]:
    """Raises torch's SignalException at the first signal, which ends the workers; calls `kill_workers` at a second."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    received_at: list[float] = []

    def stop(number: int, _: FrameType | None) -> None:
        received_at.append(time.monotonic())
        if len(received_at) == 1:
            raise SignalException(f"received signal {number}", sigval=signal.Signals(number))
        if received_at[-1] - received_at[0] > REPEAT_S:
            kill_workers()

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
