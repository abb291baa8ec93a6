"""Signs of life between local workers and the process that started them. No torch.

Each worker changes the time stamp of a file once per second. The starting process kills a worker whose file and CPU
time stand still: a frozen process neither trains nor reacts to a signal other than SIGKILL. A worker that imports torch
on busy cores changes no time stamp, as it holds the interpreter's lock, but uses CPU time. A worker whose parent has
ended stops training with a checkpoint (`parent_has_died`), and ends after `ORPHAN_GRACE_S` at the latest.
"""

import atexit
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megabatch.comm.worker_errors import FOLDER_VARIABLE
from megabatch.errors import STOPPED

RUN_ID = "megabatch-"
"""Start of TORCHELASTIC_RUN_ID of local workers; the process id of their parent follows."""
ORPHAN_GRACE_S = 30.0
"""Seconds that a worker whose parent has ended may take to write its last checkpoint."""
_BEAT_S = 1.0
_SUFFIX = ".beat"


def parent_has_died() -> bool:
    """True in a local worker whose parent has ended without ending its workers, as SIGKILL makes it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return run_id.startswith(RUN_ID) and run_id != f"{RUN_ID}{os.getppid()}"


def start_beating() -> None:
    """In a local worker: starts the thread that shows that it runs, and that ends it after its parent's end."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        path = Path(folder) / f"{os.environ.get('RANK', '0')}{_SUFFIX}"
        threading.Thread(target=_beat, args=[path], name="worker beat", daemon=True).start()


def _beat(path: Path) -> None:
    atexit.register(_tidy, path)
    with contextlib.suppress(OSError):  # without a file, as on a full disk, the worker is not watched
        path.write_text(str(os.getpid()))
    while not parent_has_died():
        with contextlib.suppress(OSError):
            os.utime(path)
        time.sleep(_BEAT_S)
    time.sleep(ORPHAN_GRACE_S)
    _tidy(path)
    os._exit(STOPPED)


def _tidy(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    if parent_has_died():
        shutil.rmtree(path.parent, ignore_errors=True)


class WorkerWatch:
    """Watches the local workers that beat in `folder` within a `with` block; kills one that is silent for `timeout_s`.

    `silent` describes the workers that it killed.
    """

    def __init__(self, folder: Path, *, timeout_s: float) -> None:
        self.silent: list[str] = []
        self._folder = folder
        self._timeout_s = timeout_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker watch", daemon=True)

    def __enter__(self) -> "WorkerWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def kill_all(self) -> None:
        """Ends all workers at once, without a checkpoint."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            _kill(path)

    def _run(self) -> None:
        seen: dict[Path, tuple[object, float]] = {}  # sign of life, and when it was first seen, on this clock
        looked_at = time.monotonic()
        while not self._end.wait(min(_BEAT_S, self._timeout_s / 4)):
            now = time.monotonic()
            if now - looked_at > self._timeout_s / 2:  # this process itself stood still, as Ctrl-Z makes it
                seen.clear()
            looked_at = now
            for path, beat in self._beats():
                if seen.get(path, (None, 0.0))[0] != beat:
                    seen[path] = (beat, now)
                elif now - seen[path][1] > self._timeout_s:
                    silent_s = now - seen.pop(path)[1]
                    if _kill(path):
                        self.silent.append(f"worker {path.stem} was silent for {silent_s:.0f} s")

    def _beats(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # the worker has just ended
                yield path, (path.stat().st_mtime_ns, _cpu_ticks(path.read_text()))


def _cpu_ticks(number: str) -> int:
    """CPU time of a process in the system's ticks (proc(5)); 0 where it cannot be read."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # in user and in kernel mode
    except (OSError, IndexError, ValueError):
        return 0


def _kill(path: Path) -> bool:
    """Kills the worker of a beat file; True if it was running. Removes the file: its process id may be used again."""
    with contextlib.suppress(OSError, ValueError):  # it has ended, or has not yet written its process id
        number = int(path.read_text())
        path.unlink()
        os.kill(number, signal.SIGKILL)
        return True
    return False
