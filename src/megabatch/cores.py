"""Processor of this machine and its cores, and a lock for waits on the whole device."""

import os
import platform
import re
import threading
from pathlib import Path

from megabatch.errors import SettingsError

MOST_THREADS = 4096
"""Most threads of a process."""
DEVICE_WAITS = threading.Lock()
"""Held while a thread waits for the whole GPU, and while a CUDA graph is captured, which such a wait would break."""


def requested_threads() -> int | None:
    """Threads per process that the user set in OMP_NUM_THREADS (its first level), or None.

    Raises:
        SettingsError: more than `MOST_THREADS`, which no process can start.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not first.isdecimal() or not first.strip("0"):
        return None
    if len(first) > len(str(MOST_THREADS)) or int(first) > MOST_THREADS:
        raise SettingsError(f"OMP_NUM_THREADS={first[:40]}: needed at most {MOST_THREADS:,}; OMP_NUM_THREADS=1 works")
    return int(first)


def usable_cores() -> int:
    """Processor cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """Returns the processor's name as the operating system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
