"""JPEGs decoded on a GPU by nvJPEG (through torchvision, which is optional), in an order that its faults cannot break.

nvJPEG's hardware engine writes its results when it is called, not when the stream it was given gets there, and the
memory for them comes from PyTorch's pool of the calling stream: memory that was freed while kernels still waited to
read it is overwritten under them (pytorch/vision#9606, 2026). Here, therefore,

- memory for decoded images comes from the pool of a stream that does nothing else, so no tensor of others is in it;
- decoded images are held until the work that reads them is known to be done, so what is free in that pool has no
  reader waiting, and whoever writes there when he likes harms no one.
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
"""JPEGs to uint8 images [channels, height, width] on the device; RuntimeError if one of them is beyond it."""


class Mark(Protocol):
    """A place in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has come past it."""


class DecodedCache:
    """Decoded images by sample, until `max_bytes` are full. None makes room for another: in a random order without
    repetition, what was used last is what is wanted last."""

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._images: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int) -> Tensor | None:
        return self._images.get(index)

    def offer(self, index: int, image: Tensor) -> None:
        """Keep an image if there is room."""
        with self._lock:
            if index not in self._images and image.nbytes <= self._room:
                self._images[index] = image
                self._room -= image.nbytes


class GpuDecoder:
    """Decodes JPEGs on a device, and keeps what it decoded as long as it must be kept. For one thread at a time.

    Args:
        device: where the images are decoded to.
        channels: 1 (grey) or 3 (RGB).
        cache_bytes: of the device's memory for decoded images, so that later epochs need not decode them again.
        decode: what decodes; by default nvJPEG through torchvision.
        mark: makes a `Mark` behind all work that the device was given so far; by default an event of the current
            stream.

    Raises:
        SettingsError: torchvision or the GPU is missing, if `decode` is not given.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        channels: int = 3,
        cache_bytes: int = 0,
        decode: Decode | None = None,
        mark: Callable[[], Mark] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.cache = DecodedCache(cache_bytes)
        self._decode = decode or nvjpeg(self.device, channels)
        self._is_cuda = self.device.type == "cuda"
        self._mark = mark or (self._event if self._is_cuda else None)
        self._stream = torch.cuda.Stream(self.device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._held: tuple[Mark, Sequence[Tensor]] | None = None

    def decode(self, files: Sequence[bytes]) -> list[Tensor | None]:
        """The images, [channels, height, width] each; None for a file that is beyond this decoder.

        They may be used on the current stream; whoever does calls `hold` with them before he lets go of them.
        """
        if not files:
            return []
        try:
            with self._own_memory():
                return list(self._decode(files))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it does not say which file it was
            if self._is_cuda:
                with DEVICE_WAITS:
                    torch.cuda.synchronize(self.device)  # what was begun may still be written
            if len(files) == 1:
                return [None]
            middle = len(files) // 2
            return [*self.decode(files[:middle]), *self.decode(files[middle:])]

    def hold(self, images: Sequence[Tensor]) -> None:
        """Keep these images until all work that the current stream has been given is done; waits for those before."""
        self._release()
        if self._mark is not None:
            self._held = self._mark(), images

    @contextlib.contextmanager
    def _own_memory(self) -> Iterator[None]:
        """A block whose tensors lie in memory that nothing else uses, or waits to read."""
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

    def _event(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


def nvjpeg(device: torch.device, channels: int) -> Decode:
    """torchvision's batched nvJPEG decoder.

    Raises:
        SettingsError: there is no GPU, or no torchvision that can be imported.
    """
    if device.type != "cuda":
        raise SettingsError(f"decoding on a GPU was asked for on {device}; --decode cpu works")
    io = _torchvision_io()
    if io is None:
        raise SettingsError("decoding on a GPU needs torchvision, which cannot be imported; --decode cpu works")
    mode = io.ImageReadMode.RGB if channels == 3 else io.ImageReadMode.GRAY

    def decode(files: Sequence[bytes]) -> Sequence[Tensor]:
        encoded = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
        images: Sequence[Tensor] = io.decode_jpeg(encoded, mode=mode, device=device)
        return images

    return decode


def has_torchvision() -> bool:
    """Whether torchvision can be imported; one built for another torch cannot."""
    return _torchvision_io() is not None


def _torchvision_io() -> Any:
    """The module; None without one that can be imported."""
    try:
        return importlib.import_module("torchvision.io")
    except (ImportError, OSError, RuntimeError):  # RuntimeError: operators of another torch version
        return None
