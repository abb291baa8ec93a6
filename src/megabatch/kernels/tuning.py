"""Which of several ways to compute the same is fastest on this device: measured at first use, then looked up.

Ways differ in the order of sums, so results are equal bit by bit only for equal choices. Choices are kept in a file per
device and versions; processes that share it agree on what was chosen first.
"""

import functools
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megabatch.files import cache_folder
from megabatch.kernels.dispatch import on_device

Result = TypeVar("Result")
Timer = Callable[[Callable[[], object]], float]
PLAIN = "plain"
"""The name of the way that is taken where nothing is known; every task has it."""
EDITION = 2
"""Of the kernels: raised when their speed changes, so that older choices are made anew."""
REPEATS = 5
_LAUNCHES_CYCLES = 2_000_000  # of a GPU's clock, a millisecond: longer than Python takes to launch what is timed


class Table:
    """What was chosen on one device. Safe with several threads and processes.

    `folder` holds the files; None keeps choices in memory alone. `timer` gives the seconds of a call; without one,
    tensors on a GPU are timed by its events, and other tensors take the plain way. `fixed` maps tasks to ways that are
    taken unmeasured wherever they exist. `on_first` is told before the first measurement: with the
    compiling that goes with it, it may take minutes.
    """

    def __init__(
        self, folder: Path | None = None, *, timer: Timer | None = None, fixed: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.timer = timer
        self.fixed = dict(fixed or {})
        self.on_first: Callable[[], None] | None = None
        self._choices: dict[str, dict[str, str]] = {}
        self._lock = threading.RLock()

    def take(self, task: str, sizes: tuple[int, ...], like: Tensor, ways: Mapping[str, Callable[[], Result]]) -> Result:
        """The result of the way that is fastest for `task` on tensors like this one, of these sizes."""
        return ways[self.choose(task, sizes, like, ways)]()

    def choose(self, task: str, sizes: tuple[int, ...], like: Tensor, ways: Mapping[str, Callable[[], object]]) -> str:
        """The name of that way. A way that fails is not taken; nothing is measured while a CUDA graph is captured.

        Where memory runs out it is the plain way, and none is noted: with a smaller model beside it another may win.
        """
        if self.fixed.get(task) in ways:
            return self.fixed[task]
        if len(ways) == 1:
            return PLAIN
        device, key = device_name(like.device), " ".join(map(str, (task, like.dtype, *sizes)))
        with self._lock:
            known = self._of(device).get(key)
            if known in ways:
                return str(known)
            timer = self._timer_for(like)
            if timer is None:
                return PLAIN
            self._tell()
            try:
                with on_device(like):
                    seconds = {name: _seconds(timer, work) for name, work in ways.items()}
            except torch.OutOfMemoryError:
                return PLAIN
            return self._keep(device, key, min(seconds, key=lambda name: seconds[name]), ways)

    def clear(self) -> None:
        """Forgets all, in memory and in the files."""
        with self._lock:
            self._choices.clear()
            for path in self.folder.glob("*.json") if self.folder else ():
                path.unlink(missing_ok=True)

    def _tell(self) -> None:
        told, self.on_first = self.on_first, None
        if told is not None:
            told()

    def _timer_for(self, like: Tensor) -> Timer | None:
        if self.timer is not None:
            return self.timer
        if not like.is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        return gpu_seconds

    def _of(self, device: str) -> dict[str, str]:
        if device not in self._choices:
            self._choices[device] = _read(self._path(device))
        return self._choices[device]

    def _keep(self, device: str, key: str, way: str, ways: Collection[str]) -> str:
        """Notes a choice; where another process was first, its choice. Returns what is noted."""
        choices, path = self._choices[device], self._path(device)
        choices[key] = way
        if path is None:
            return way
        with suppress(OSError):  # a folder that cannot be written costs only the measuring again
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                written = _read(path)
                if written.get(key) not in ways:
                    written[key] = way
                choices.update(written)
                _write(path, choices)
        return choices[key]

    def _path(self, device: str) -> Path | None:
        return self.folder / f"{device}.json" if self.folder else None


def gpu_seconds(work: Callable[[], object]) -> float:
    """The shortest of a few runs on the current GPU, after two that compile and warm up.

    Of the GPU's time alone: launches take as long as a small batch's kernels, and in a CUDA graph nothing. They are
    made while the GPU is kept busy otherwise.
    """
    for _ in range(2):
        work()
    seconds = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_LAUNCHES_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(float(begin.elapsed_time(end)) / 1e3)
    return min(seconds)


@functools.cache
def device_name(device: torch.device) -> str:
    """A file name for the device with the versions that decide speed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return re.sub(r"[^A-Za-z0-9.]+", "_", f"{name} torch {torch.__version__} triton {triton} edition {EDITION}")


_table: Table | None = None


def table() -> Table:
    """The table that kernels ask; by default its files are in `kernels` of the cache folder."""
    global _table  # noqa: PLW0603  # what is fastest is a fact about the machine, one for all models
    if _table is None:
        _table = Table(cache_folder() / "kernels")
    return _table


def use_table(chosen: Table | None) -> None:
    """From now on kernels ask `chosen`; None: the default again."""
    global _table  # noqa: PLW0603
    _table = chosen


def _seconds(timer: Timer, work: Callable[[], object]) -> float:
    """Infinite for a way that fails, as one that needs more shared memory than there is."""
    try:
        return timer(work)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  # Triton's errors have no common base; if all fail the plain way says why
        return float("inf")


def _read(path: Path | None) -> dict[str, str]:
    """What the file holds; nothing where there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    entries = values.items() if isinstance(values, dict) else ()
    return {key: way for key, way in entries if isinstance(way, str)}


def _write(path: Path, choices: dict[str, str]) -> None:
    """Replaces the file whole, so that nobody reads half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(dict(sorted(choices.items())), indent=1) + "\n")
    Path(temporary).replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes, where the system can lock files."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
