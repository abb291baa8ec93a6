"""Processor cores of this machine, and a lock for waits on the whole device."""

import os
import threading

DEVICE_WAITS = threading.Lock()
"""Held while a thread waits for the whole GPU, and while a CUDA graph is captured, which such a wait would break."""


def usable_cores() -> int:
    """Processor cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
