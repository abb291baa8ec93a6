"""Samples decoded on a GPU and cut there; those that it cannot decode come from the host, as they do without a GPU."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.jpeg.decode import image_size, suits_a_gpu
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.reader import BatchReader, DrawBoxes, Int64, in_chunks
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError
from megabatch.kernels.crop_resize import crop_and_resize

_MAX_IMAGES = 128
_MAX_BYTES = 256 << 20  # of decoded images at a time


@dataclass
class ReadSamples:
    """What is read of a batch before the GPU has its turn; one entry a sample."""

    indices: Int64
    size: int
    draw_boxes: DrawBoxes
    parts: list[bytes | Tensor]
    """A JPEG, an image that was decoded before, or a crop made by the host; images are [channels, rows, columns]."""
    boxes: Int64  # [n, 4]: what is cut out of each
    num_bytes: Int64  # [n]: what each takes when it is decoded
    replaced: NDArray[np.bool_]  # [n]


class GpuReader:
    """Reads samples as bytes on the host, and makes batches of crops of them on a GPU.

    Boxes are drawn from the sizes in the files' headers, as on the host, so crops are the same. What is no JPEG in
    YCbCr or grey, what has no end, and what the GPU refuses is decoded and, where it is bad, replaced by `host`, the
    reader that a CPU uses. Damage in the middle of a JPEG may be seen by one and not by the other.
    """

    def __init__(self, source: EncodedSource, *, decoder: GpuDecoder, host: BatchReader, executor: Executor) -> None:
        self._source, self._decoder, self._host, self._executor = source, decoder, host, executor
        self._lock = threading.Lock()

    def read(self, indices: Int64, size: int, draw_boxes: DrawBoxes) -> ReadSamples:
        """The host's part, in threads."""
        count = len(indices)
        boxes, num_bytes = np.zeros((count, 4), dtype=np.int64), np.zeros(count, dtype=np.int64)
        parts: list[bytes | Tensor] = [b""] * count
        samples = ReadSamples(indices, size, draw_boxes, parts, boxes, num_bytes, np.zeros(count, dtype=np.bool_))
        for_host: list[int] = []

        def fill(chunk: slice) -> None:
            for_host.extend(self._open(samples, chunk))

        in_chunks(fill, count, self._executor)
        self._make_on_host(samples, sorted(for_host))
        return samples

    def crop(
        self,
        samples: ReadSamples,
        flips: NDArray[np.bool_] | None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
        padded_channels: int | None = None,
    ) -> Tensor:
        """The GPU's part: (n, channels, size, size), channels last, mirrored where `flips`, normalised.

        `samples.replaced` is complete afterwards.
        """
        channels = padded_channels or len(mean)
        shape = (len(samples.indices), samples.size, samples.size, channels)
        out = torch.empty(shape, dtype=dtype, device=self._decoder.device).permute(0, 3, 1, 2)
        flip = torch.zeros(len(out), dtype=torch.bool) if flips is None else torch.from_numpy(flips)
        for part in _parts(samples.num_bytes):
            with self._lock:
                images = self._decode(samples, range(len(out))[part])
                crop_and_resize(
                    images,
                    torch.from_numpy(samples.boxes[part]),
                    size=samples.size,
                    mean=mean,
                    std=std,
                    flip=flip[part],
                    padded_channels=channels,
                    dtype=dtype,
                    layout="CHW",
                    out=out[part],
                )
                self._decoder.hold(images)
        return out

    def _open(self, samples: ReadSamples, chunk: slice) -> list[int]:
        """Reads a chunk's files and draws their boxes; the rows that are not for the GPU."""
        rows = range(len(samples.indices))[chunk]
        found = [self._find(int(samples.indices[row])) for row in rows]
        heights, widths = (np.array([part[side] if part else 1 for part in found]) for side in (1, 2))
        samples.boxes[chunk] = samples.draw_boxes(chunk, heights, widths)
        for row, part in zip(rows, found, strict=True):
            if part:
                samples.parts[row] = part[0]
                samples.num_bytes[row] = 3 * part[1] * part[2]
        return [row for row, part in zip(rows, found, strict=True) if part is None]

    def _find(self, index: int) -> tuple[bytes | Tensor, int, int] | None:
        """A file for the GPU or an image it has decoded before, with height and width; None for the host's files."""
        image = self._decoder.cache.get(index)
        if image is not None:
            return image, image.shape[1], image.shape[2]
        try:
            data = self._source.read(index)
            return (data, *image_size(data)) if suits_a_gpu(data) else None
        except (DataError, OSError):
            return None  # the host reports it, and finds another

    def _make_on_host(self, samples: ReadSamples, rows: Sequence[int]) -> None:
        """The finished crops of these rows."""
        if not rows:
            return
        where = np.array(rows)
        pixels = np.empty((len(rows), samples.size, samples.size, self._host.channels), dtype=np.uint8)
        samples.replaced[where] = self._host.read(
            samples.indices[where],
            samples.size,
            lambda chunk, heights, widths: samples.draw_boxes(where[chunk], heights, widths),
            pixels,
        )
        samples.boxes[where] = (0, 0, samples.size, samples.size)
        samples.num_bytes[where] = pixels[0].nbytes
        for row, crop in zip(rows, pixels, strict=True):
            samples.parts[row] = torch.from_numpy(crop).permute(2, 0, 1)

    def _decode(self, samples: ReadSamples, rows: range) -> list[Tensor]:
        """The images of these rows on the device."""
        encoded = {row: part for row in rows if isinstance(part := samples.parts[row], bytes)}
        images = dict(zip(encoded, self._decoder.decode(list(encoded.values())), strict=True))
        good = {row: image for row, image in images.items() if image is not None and _fits(image, encoded[row])}
        for row, image in good.items():
            self._decoder.cache.offer(int(samples.indices[row]), image)
        self._make_on_host(samples, [row for row in encoded if row not in good])
        # Not put into `samples`: what was decoded is let go of with the part that it was decoded in.
        return [self._on_device(good.get(row, samples.parts[row])) for row in rows]

    def _on_device(self, image: bytes | Tensor) -> Tensor:
        assert isinstance(image, Tensor)
        return image.to(self._decoder.device)


def _fits(image: Tensor, file: bytes) -> bool:
    """Whether an image has the size that its box was drawn for."""
    return tuple(image.shape[1:]) == image_size(file)


def _parts(num_bytes: Int64) -> Iterator[slice]:
    """Neighbouring rows that are decoded together: so many, and so large, as the GPU's memory is given for."""
    start, taken = 0, 0
    for row, size in enumerate(num_bytes.tolist()):
        if row > start and (row - start >= _MAX_IMAGES or taken + size > _MAX_BYTES):
            yield slice(start, row)
            start, taken = row, 0
        taken += size
    if len(num_bytes):
        yield slice(start, len(num_bytes))
