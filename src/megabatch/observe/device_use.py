"""Load of the processors during a run: shares of the cores' and the GPU's time, and the GPU's memory."""

import threading
import time
from typing import Any

import torch

from megabatch.cores import usable_cores

INTERVAL_S = 1.0


class DeviceUse:
    """Measures how busy cores and GPU are; a thread asks the GPU's driver, so that no step waits for it.

    Needs nvidia-ml-py for the share of a GPU's time: without it, `read` gives the memory only.
    """

    def __init__(self, device: torch.device, *, interval_s: float = INTERVAL_S) -> None:
        self._device, self._interval_s = device, interval_s
        self._since = (time.perf_counter(), time.process_time())
        self._samples: list[float] = []
        self._used_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="device-use", daemon=True)
        if device.type == "cuda":
            self._thread.start()

    def read(self) -> dict[str, Any]:
        """Shares in [0, 1] since the last call: `cpu_utilization` of this process over the usable cores and, on a GPU,
        `gpu_utilization` and `gpu_used_bytes`, the latter by all its processes.
        """
        now = (time.perf_counter(), time.process_time())
        wall_s, cpu_s = now[0] - self._since[0], now[1] - self._since[1]
        self._since = now
        found: dict[str, Any] = {"cpu_utilization": round(min(1.0, cpu_s / max(wall_s, 1e-9) / usable_cores()), 4)}
        samples, self._samples = self._samples, []
        if samples:
            found["gpu_utilization"] = round(sum(samples) / len(samples) / 100, 4)
        if self._used_bytes:
            found["gpu_used_bytes"] = self._used_bytes
        return found

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _ask(self) -> None:
        has_share = True
        while not self._ended.wait(self._interval_s):
            free, total = torch.cuda.mem_get_info(self._device)
            self._used_bytes = total - free
            if has_share:
                try:
                    self._samples.append(float(torch.cuda.utilization(self._device)))
                except (ImportError, RuntimeError):  # no nvidia-ml-py, or a driver without it
                    has_share = False
