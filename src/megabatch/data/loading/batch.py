"""The batch that loaders yield, and its transfer to the device."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.loading.buffers import BufferPool


@dataclass
class Batch:
    """Images ready for the model, on its device."""

    images: Tensor  # [n, channels, resolution, resolution], normalised
    labels: Tensor  # [n] int64
    count: int  # n
    mixed_labels: Tensor | None = None  # [n] int64: the partner's label, with mixup or cutmix
    mix_weight: Tensor | None = None  # [n] float32: the weight of `labels`; the partner's is 1 - mix_weight
    num_replaced: int = 0  # samples that could not be read and were replaced
    ready: torch.cuda.Event | None = None  # recorded on the loader's stream after the batch's last kernel

    def wait_on_current_stream(self) -> "Batch":
        """Makes the current stream wait until the batch is ready, then returns it; does nothing on a CPU."""
        wait_on_current_stream(self.ready, self.images, self.labels, self.mixed_labels, self.mix_weight)
        self.ready = None
        return self


def wait_on_current_stream(ready: torch.cuda.Event | None, *tensors: Tensor | None) -> None:
    """Makes the current stream wait for an event behind the work that writes `tensors`; does nothing without one."""
    found = [tensor for tensor in tensors if tensor is not None]
    if ready is None or not found:
        return
    stream = torch.cuda.current_stream(found[0].device)
    stream.wait_event(ready)
    for tensor in found:
        tensor.record_stream(stream)


class Staging:
    """Host buffers and a separate CUDA stream, so that copies and augmentation overlap with the training step."""

    def __init__(self, device: torch.device, *, num_buffers: int) -> None:
        self.device = device
        self._buffers = BufferPool(num_buffers)
        self._is_cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def host_images(self, count: int, size: int, channels: int) -> Tensor:
        """Uninitialised [n, size, size, channels] uint8 batch in reusable host memory; pinned if there is a GPU."""
        shape = (count, size, size, channels)
        if self._is_cuda:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return self._buffers.empty(shape, torch.uint8)

    def device_images(self, shape: torch.Size, dtype: torch.dtype, *, channels_last: bool) -> Tensor:
        """Uninitialised [n, channels, height, width] batch on the device."""
        count, channels, height, width = shape
        layout = (count, height, width, channels) if channels_last else tuple(shape)
        if self.device.type == "cpu":
            images = self._buffers.empty(layout, dtype)
        else:
            images = torch.empty(layout, dtype=dtype, device=self.device)
        return images.permute(0, 3, 1, 2) if channels_last else images

    def to_device(self, values: Tensor | NDArray[np.generic]) -> Tensor:
        """Copies to the device; asynchronous from pinned memory to a GPU."""
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.to(self.device, non_blocking=tensor.is_pinned() if self._is_cuda else False)

    def run(self, work: Callable[[], Batch]) -> Batch:
        """Runs `work()` on the loader's stream and records the batch's `ready` event; on a CPU, just runs it."""
        with self.on_stream():
            batch = work()
            batch.ready = self.event()
        return batch

    def event(self) -> torch.cuda.Event | None:
        """An event behind all work on the current stream; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self._is_cuda else None

    def on_stream(self) -> AbstractContextManager[Any]:
        """Context in which the loader's stream is the current one; does nothing on a CPU."""
        if not self._is_cuda:
            return nullcontext()
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            return torch.cuda.stream(self._stream)
