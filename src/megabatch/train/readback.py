"""Asynchronous device-to-host copy of a step's scalars, so that no step waits for the previous one."""

import torch
from torch import Tensor


class Readback:
    """A few scalars: available at once on a CPU, copied asynchronously on a GPU."""

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
    def is_asynchronous(self) -> bool:
        """True if `read` may wait for the device."""
        return self._event is not None

    def read(self) -> list[float]:
        """Returns the values, once the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]
