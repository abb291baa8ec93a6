"""Numbers of a step on their way from the device to the host, so that no step waits for the one before."""

import torch
from torch import Tensor


class Readback:
    """A few values that are there at once on a CPU, and copied beside the computation on a GPU."""

    def __init__(self, values: Tensor) -> None:
        """`values` (n,): may be overwritten by the device's later work."""
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_late(self) -> bool:
        """Whether reading waits for the device."""
        return self._event is not None

    def read(self) -> list[float]:
        """The values; waits for the device where it has not got so far."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]
