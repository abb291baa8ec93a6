"""Decodes JPEGs on a GPU with nvJPEG (through torchvision, an optional dependency).

nvJPEG's hardware engine writes its output at the time of the call, not in stream order, into memory from the caching
allocator's pool of the calling stream. It can therefore overwrite memory that was freed while kernels that read it
were still queued (pytorch/vision#9606, 2026). Two rules prevent this here:

- decoded images are allocated from the pool of a dedicated stream, which holds no other tensors;
- decoded images are kept alive until the kernels that read them have finished, so free memory in that pool has no
  pending readers, and out-of-order writes into this pool cannot corrupt other tensors.
"""

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megabatch.cores import DEVICE_WAITS
from megabatch.errors import SettingsError

Decode = Callable[[Sequence[bytes]], Sequence[Tensor]]
"""Decodes JPEGs to uint8 images [channels, height, width] on the device; RuntimeError if it cannot decode one."""


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

    def get(self, index: int) -> Tensor | None:
        return self._images.get(index)

    def offer(self, index: int, image: Tensor) -> None:
        """Stores an image if there is room for it."""
        with self._lock:
            if index not in self._images and image.nbytes <= self._room:
                self._images[index] = image
                self._room -= image.nbytes


class GpuDecoder:
    """Decodes JPEGs on a device and keeps the images alive until they have been read. Not thread-safe.

    Args:
        device: device of the decoded images.
        channels: 1 (grey) or 3 (RGB).
        cache_bytes: device memory for decoded images, in bytes; later epochs do not decode cached images again.
        decode: decoding function; by default nvJPEG through torchvision.
        record_event: returns an `Event` after all work dispatched so far; by default a CUDA event on the current
            stream.

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
    ) -> None:
        self.device = torch.device(device)
        self.cache = DecodedCache(cache_bytes)
        self._decode = decode or nvjpeg(self.device, channels)
        self._is_cuda = self.device.type == "cuda"
        self._record_event = record_event or (self._cuda_event if self._is_cuda else None)
        self._stream = torch.cuda.Stream(self.device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._held: tuple[Event, Sequence[Tensor]] | None = None

    def decode(self, files: Sequence[bytes]) -> list[Tensor | None]:
        """Images [channels, height, width], one per file; None for a file that cannot be decoded.

        They may be read on the current stream; callers must pass the tensors to `hold` before dropping them.
        """
        if not files:
            return []
        try:
            with self._private_pool():
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
            return [*self.decode(files[:middle]), *self.decode(files[middle:])]

    def hold(self, images: Sequence[Tensor]) -> None:
        """Keeps these images alive until all work now queued on the current stream has finished.

        Waits for the images of the previous call and releases them.
        """
        self._release()
        if self._record_event is not None:
            self._held = self._record_event(), images

    @contextlib.contextmanager
    def _private_pool(self) -> Iterator[None]:
        """Allocates tensors in the dedicated stream's pool, after all pending reads of that pool have finished."""
        self._release()
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _release(self) -> None:
        if self._held is not None:
            self._held[0].synchronize()
            self._held = None

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

    def decode(files: Sequence[bytes]) -> Sequence[Tensor]:
        encoded = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
        images: Sequence[Tensor] = io.decode_jpeg(encoded, mode=mode, device=device)
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
