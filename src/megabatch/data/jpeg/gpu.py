"""Decodes JPEGs on a GPU with nvJPEG (through torchvision, an optional dependency).

nvJPEG's hardware engine writes its output at the time of the call, not in stream order, into memory from the caching
allocator's pool of the calling stream. It can therefore overwrite memory that was freed while kernels that read it
were still queued (pytorch/vision#9606, 2026). Two rules prevent this here:

- decoded images are allocated from the pool of a dedicated stream, which holds no other tensors;
- decoded images are kept alive until the kernels that read them have finished, so free memory in that pool has no
  pending readers, and out-of-order writes into this pool cannot corrupt other tensors.

Groups of images are released in order, and only when `max_held` of them wait to be read. So decoding runs ahead of the
kernels, which queue behind those of training, and its memory is bounded.
"""

import contextlib
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.cores import DEVICE_WAITS
from megabatch.errors import SettingsError

MAX_IMAGES = 128
"""Files that one call of the decoding function receives at most."""
Decode = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Decodes JPEGs, uint8 [bytes] in host memory, to uint8 images [channels, height, width] on the device.

RuntimeError if it cannot decode one of them."""


class Event(Protocol):
    """A point in the device's work queue, such as a CUDA event."""

    def synchronize(self) -> None:
        """Waits until the device has finished all work before this point."""


class DecodedCache:
    """Decoded images by sample index, up to `max_bytes` in total.

    Images are never evicted: an epoch visits every sample once in random order, so the image used last is the one
    needed last.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._images: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def find(self, indices: NDArray[np.int64]) -> dict[int, Tensor]:
        """Returns the cached images of the samples `indices`, by their row there."""
        if not self._images:
            return {}
        return {row: self._images[index] for row, index in enumerate(indices.tolist()) if index in self._images}

    def offer(self, images: Mapping[int, Tensor]) -> None:
        """Stores the images, by sample, for which there is room."""
        if not self._room:
            return
        with self._lock:
            for index, image in images.items():
                if index not in self._images and image.nbytes <= self._room:
                    self._images[index] = image
                    self._room -= image.nbytes


class GpuDecoder:
    """Decodes JPEGs on a device and keeps the images alive until they have been read. For use by one thread.

    Args:
        device: device of the decoded images.
        channels: 1 (grey) or 3 (RGB).
        cache_bytes: device memory for decoded images, in bytes; later epochs do not decode cached images again.
        decode: decoding function; by default nvJPEG through torchvision.
        record_event: returns an `Event` after all work dispatched so far; by default a CUDA event on the current
            stream.
        max_held: groups of images in memory, 1 or more: one being decoded, the others waiting to be read.

    Raises:
        SettingsError: `decode` is None, and torchvision or the GPU is missing.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        channels: int = 3,
        cache_bytes: int = 0,
        decode: Decode | None = None,
        record_event: Callable[[], Event] | None = None,
        max_held: int = 2,
    ) -> None:
        self.device = torch.device(device)
        self.cache = DecodedCache(cache_bytes)
        self._decode = decode or nvjpeg(self.device, channels)
        self._is_cuda = self.device.type == "cuda"
        self._record_event = record_event or (self._cuda_event if self._is_cuda else None)
        self._stream = torch.cuda.Stream(self.device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._max_held = max_held
        self._held: deque[tuple[Event, Sequence[Tensor]]] = deque()

    def decode(self, files: Sequence[Tensor]) -> list[Tensor | None]:
        """Images [channels, height, width], one per file; None for a file that cannot be decoded.

        They may be read on the current stream; callers must pass the tensors to `hold` before dropping them.
        """
        self.release(keep=self._max_held - 1)
        calls = (files[start : start + MAX_IMAGES] for start in range(0, len(files), MAX_IMAGES))
        with self._private_pool():
            return [image for call in calls for image in self._decode_call(call)]

    def _decode_call(self, files: Sequence[Tensor]) -> list[Tensor | None]:
        try:
            return list(self._decode(files))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the error does not say which file caused it, so halve the list
            if self._is_cuda:
                with DEVICE_WAITS:
                    torch.cuda.synchronize(self.device)  # the failed call may still be writing
            if len(files) == 1:
                return [None]
            middle = len(files) // 2
            return [*self._decode_call(files[:middle]), *self._decode_call(files[middle:])]

    def hold(self, images: Sequence[Tensor]) -> None:
        """Keeps these images, one group, alive until all work now queued on the current stream has finished."""
        if self._record_event is not None:
            self._held.append((self._record_event(), images))

    def release(self, *, keep: int = 0) -> None:
        """Waits until all but the last `keep` groups have been read, and releases them."""
        while len(self._held) > keep:
            event, _ = self._held[0]
            event.synchronize()
            self._held.popleft()

    @contextlib.contextmanager
    def _private_pool(self) -> Iterator[None]:
        """Allocates tensors in the dedicated stream's pool; then the current stream waits for that stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self.device).wait_event(self._stream.record_event())

    def _cuda_event(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


def nvjpeg(device: torch.device, channels: int) -> Decode:
    """torchvision's batched nvJPEG decoder.

    Raises:
        SettingsError: `device` is not a GPU, or torchvision cannot be imported.
    """
    if device.type != "cuda":
        raise SettingsError(f"GPU decoding needs a CUDA device, not {device}; --decode cpu works")
    io = _torchvision_io()
    if io is None:
        raise SettingsError("GPU decoding needs torchvision, which cannot be imported; --decode cpu works")
    mode = io.ImageReadMode.RGB if channels == 3 else io.ImageReadMode.GRAY

    def decode(files: Sequence[Tensor]) -> Sequence[Tensor]:
        images: Sequence[Tensor] = io.decode_jpeg(list(files), mode=mode, device=device)
        return images

    return decode


def has_torchvision() -> bool:
    """True if torchvision can be imported; a build for another torch version cannot."""
    return _torchvision_io() is not None


def _torchvision_io() -> Any:
    """The module `torchvision.io`, or None if it cannot be imported."""
    try:
        return importlib.import_module("torchvision.io")
    except (ImportError, OSError, RuntimeError):  # RuntimeError: its operators are those of another torch version
        return None
