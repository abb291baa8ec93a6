"""Table of choices: times the candidates of a task at first use and looks the fastest up afterwards.

A task is a name, e.g. "precision of resnet50". Its candidates are functions that compute the same result, always one of
them named `PLAIN`. Candidates round differently, so two runs are bitwise equal only if they use the same choices.

Files: the default table writes $XDG_CACHE_HOME/megabatch/kernels/DEVICE.json (~/.cache/megabatch/kernels without that
environment variable, or where its path is not absolute), where DEVICE is `device_name`: the GPU's or processor's name,
the versions of torch and Triton, and `EDITION`. The file is one JSON object that maps "TASK DTYPE SIZE SIZE ..." to the
name of the chosen candidate. It is replaced atomically under an exclusive lock on DEVICE.lock beside it. If two
processes measure the same key, both use the choice that was written first. Delete the files, or call `Table.clear`, to
measure again. Compiled kernels are cached by Triton, in TRITON_CACHE_DIR.
"""

import functools
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from megabatch.cores import cpu_model
from megabatch.files import cache_folder, locked, read_json, write_text
from megabatch.kernels.dispatch import on_device

Timer = Callable[[Callable[[], object]], float]
PLAIN = "plain"
"""Name of the default candidate, used where nothing can be measured; every task has it."""
EDITION = 2
"""Version of the kernels' speed, part of the file name: raise it when a kernel becomes faster or slower."""
REPEATS = 5
"""Timed runs per candidate, of which the shortest counts."""
_LAUNCHES_CYCLES = 2_000_000  # GPU clock cycles, about 1 ms: longer than Python needs to launch what is timed


class OverdueError(Exception):
    """Measuring takes too long, as on a busy processor; nothing was decided."""


class Table:
    """Choices of the fastest candidate per device, task, dtype and sizes. Safe for several threads and processes.

    Args:
        folder: where the files are; None keeps choices in memory only.
        timer: returns the seconds that a call takes; without one nothing is measured.

    `on_first` is called once, before the first measurement, which may take minutes as it compiles the kernels.
    """

    def __init__(self, folder: Path | None = None, *, timer: Timer | None = None) -> None:
        self.folder = folder
        self.timer = timer
        self.on_first: Callable[[], None] | None = None
        self._choices: dict[str, dict[str, str]] = {}
        self._lock = threading.RLock()

    def beside(self, timer: Timer) -> "Table":
        """A table with this one's files and another timer."""
        table = Table(self.folder, timer=timer)
        table.on_first = self.announce
        return table

    def choose(
        self, task: str, sizes: tuple[int, ...], like: Tensor, candidates: Mapping[str, Callable[[], object]]
    ) -> str:
        """Returns the name of the fastest candidate. One that raises an error is never the fastest.

        Returns `PLAIN`, without recording it, without a timer, if memory runs out, as another candidate may win beside
        a smaller model, if the timer raises OverdueError, and if all raise an error, which `PLAIN` shows.
        """
        if len(candidates) == 1:
            return PLAIN
        device, key = device_name(like.device), " ".join(map(str, (task, like.dtype, *sizes)))
        with self._lock:
            # A recorded candidate may no longer exist, e.g. a tiling of an older version; then it is measured again.
            known = self._of(device).get(key)
            if known in candidates:
                return str(known)
            # Measured under the lock: two threads that time kernels at once would disturb each other.
            if self.timer is None:
                return PLAIN
            self.announce()
            try:
                with on_device(like):
                    seconds = {name: _seconds(self.timer, work) for name, work in candidates.items()}
            except (torch.OutOfMemoryError, OverdueError):
                return PLAIN
            if min(seconds.values()) == float("inf"):
                return PLAIN
            return self._record(device, key, min(seconds, key=lambda name: seconds[name]), candidates)

    def clear(self) -> None:
        """Deletes all choices, in memory and in the files."""
        with self._lock:
            self._choices.clear()
            for path in self.folder.glob("*.json") if self.folder else ():
                path.unlink(missing_ok=True)

    def announce(self) -> None:
        """Calls `on_first`, unless it has been called."""
        callback, self.on_first = self.on_first, None
        if callback is not None:
            callback()

    def _of(self, device: str) -> dict[str, str]:
        if device not in self._choices:
            self._choices[device] = _read(self._path(device))
        return self._choices[device]

    def _record(self, device: str, key: str, fastest: str, candidates: Collection[str]) -> str:
        """Records a choice and returns it; if another process was first, records and returns that one's choice."""
        choices, path = self._choices[device], self._path(device)
        choices[key] = fastest
        if path is None:
            return fastest
        with suppress(OSError):  # an unwritable folder only means that the next process measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                # Read again under the lock: the file may have grown since this process read it.
                written = _read(path)
                if written.get(key) not in candidates:
                    written[key] = fastest
                choices.update(written)
                write_text(path, json.dumps(dict(sorted(choices.items())), indent=1) + "\n")
        return choices[key]

    def _path(self, device: str) -> Path | None:
        return self.folder / f"{device}.json" if self.folder else None


def gpu_seconds(work: Callable[[], object]) -> float:
    """Returns the shortest GPU time of `REPEATS` runs on the current GPU, after two runs that compile and warm up.

    Launch overhead is excluded, since a CUDA graph has none: the GPU is kept busy until the launches are queued.
    """
    for _ in range(2):
        work()
    seconds = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The GPU idles in a spin loop while Python launches `work`, so the events enclose GPU time only.
        torch.cuda._sleep(_LAUNCHES_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(float(begin.elapsed_time(end)) / 1e3)
    return min(seconds)


@functools.cache
def device_name(device: torch.device) -> str:
    """Returns a file name, without suffix, made of the device and the versions that determine speed.

    A CPU is its model and the instruction sets that torch and oneDNN may use.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        allowed = torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
        name = " ".join((device.type, cpu_model(), *allowed))
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return re.sub(r"[^A-Za-z0-9.]+", "_", f"{name} torch {torch.__version__} triton {triton} edition {EDITION}")


_table: Table | None = None


def table() -> Table:
    """Returns the table in use; by default one with files in `cache_folder() / "kernels"`."""
    global _table  # noqa: PLW0603  # choices depend on the machine only
    if _table is None:
        _table = Table(cache_folder() / "kernels")
    return _table


def use_table(chosen: Table | None) -> None:
    """Puts the table `chosen` in use; None restores the default."""
    global _table  # noqa: PLW0603
    _table = chosen


def _seconds(timer: Timer, work: Callable[[], object]) -> float:
    """Time of one candidate; infinite if it raises, e.g. because it needs more shared memory than the GPU has."""
    try:
        return timer(work)
    except (torch.OutOfMemoryError, OverdueError):
        raise
    except Exception:  # noqa: BLE001  # Triton's errors have no common base; if all fail, running PLAIN raises its own
        return float("inf")


def _read(path: Path | None) -> dict[str, str]:
    """Returns the choices in the file; none if it is missing, unreadable or corrupt."""
    try:
        values = read_json(path) if path else {}
    except (OSError, ValueError):
        return {}
    entries = values.items() if isinstance(values, dict) else ()
    return {key: name for key, name in entries if isinstance(name, str)}
