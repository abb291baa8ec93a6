"""Reads samples that a GPU decodes and crops; samples that it cannot decode are decoded on the host."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.jpeg.decode import image_size, is_gpu_decodable
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.reader import BatchReader, DrawBoxes, Int64, in_chunks
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError
from megabatch.kernels.crop_resize import crop_and_resize

_MAX_BYTES = 512 << 20
"""Bytes of decoded images that are cropped together; the decoder holds a few such groups."""


@dataclass
class ReadSamples:
    """A batch of n samples read on the host, not yet decoded on the GPU; one entry per sample."""

    indices: Int64
    size: int
    draw_boxes: DrawBoxes
    flips: NDArray[np.bool_] | None  # [n]: mirrored; None: the crops are pixels in [0, 255], float32, not mirrored
    inputs: list[bytes | Tensor]
    """A JPEG file, a cached decoded image, or a crop made on the host; images are [channels, rows, columns]."""
    boxes: Int64  # [n, 4]: crop (top, left, height, width)
    num_bytes: Int64  # [n]: size of the decoded image
    replaced: NDArray[np.bool_]  # [n]: the sample could not be read and another one took its place


class GpuReader:
    """Reads samples as bytes on the host and turns them into batches of crops on a GPU.

    Boxes are drawn from the sizes in the files' headers, as on the host, so the crops are the same. Files that are not
    YCbCr or grey JPEGs, have no end marker, or fail on the GPU are passed to `host`, the reader used without a GPU,
    which decodes them or replaces bad ones. Damage in the middle of a JPEG may be detected by one decoder and not by
    the other. `read` may be called from any thread, `crop` and `release` from one.
    """

    def __init__(self, source: EncodedSource, *, decoder: GpuDecoder, host: BatchReader, executor: Executor) -> None:
        self._source, self._decoder, self._host, self._executor = source, decoder, host, executor

    def read(
        self, indices: Int64, size: int, draw_boxes: DrawBoxes, flips: NDArray[np.bool_] | None = None
    ) -> ReadSamples:
        """Reads files and draws boxes on the host, in threads; decodes the files that the GPU cannot."""
        count = len(indices)
        boxes, num_bytes = np.zeros((count, 4), dtype=np.int64), np.zeros(count, dtype=np.int64)
        inputs: list[bytes | Tensor] = [b""] * count
        samples = ReadSamples(
            indices, size, draw_boxes, flips, inputs, boxes, num_bytes, np.zeros(count, dtype=np.bool_)
        )
        for_host: list[int] = []

        def fill(chunk: slice) -> None:
            for_host.extend(self._read_chunk(samples, chunk))

        in_chunks(fill, count, self._executor)
        self._crop_on_host(samples, sorted(for_host))
        return samples

    def crop(
        self,
        samples: ReadSamples,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
        padded_channels: int | None = None,
    ) -> Tensor:
        """Decodes, crops, flips and normalises on the GPU: (n, channels, size, size), channels last.

        One launch crops all images, or `_MAX_BYTES` of them. It runs on the current stream, after an event behind the
        decoding, which has a stream of its own and does not wait for it. `samples.replaced` is final only after this
        call, because files that fail on the GPU are read again on the host.
        """
        if samples.flips is None:
            mean, std, dtype = (0.0,) * len(mean), (1 / 255,) * len(std), torch.float32
        channels = padded_channels or len(mean)
        shape = (len(samples.indices), samples.size, samples.size, channels)
        out = torch.empty(shape, dtype=dtype, device=self._decoder.device).permute(0, 3, 1, 2)
        for part in _groups(samples.num_bytes):
            images = self._decode(samples, range(len(out))[part])
            crop_and_resize(
                images,
                torch.from_numpy(samples.boxes[part]),
                size=samples.size,
                mean=mean,
                std=std,
                flip=None if samples.flips is None else torch.from_numpy(samples.flips[part]),
                padded_channels=channels,
                dtype=dtype,
                layout="CHW",
                out=out[part],
            )
            self._decoder.hold(images)
        return out

    def release(self) -> None:
        """Waits until the decoded images have been read, and frees them."""
        self._decoder.release()

    def _read_chunk(self, samples: ReadSamples, chunk: slice) -> list[int]:
        """Reads a chunk's files and draws their boxes; returns the rows that the host must decode."""
        rows = range(len(samples.indices))[chunk]
        found = [self._read_one(int(samples.indices[row])) for row in rows]
        # Rows for the host get a box of a 1 x 1 image, which `_crop_on_host` replaces.
        heights, widths = (np.array([each[side] if each else 1 for each in found]) for side in (1, 2))
        samples.boxes[chunk] = samples.draw_boxes(chunk, heights, widths)
        for row, each in zip(rows, found, strict=True):
            if each:
                samples.inputs[row] = each[0]
                samples.num_bytes[row] = 3 * each[1] * each[2]
        return [row for row, each in zip(rows, found, strict=True) if each is None]

    def _read_one(self, index: int) -> tuple[bytes | Tensor, int, int] | None:
        """A file for the GPU or its cached image, with height and width; None if the host must decode the file."""
        image = self._decoder.cache.get(index)
        if image is not None:
            return image, image.shape[1], image.shape[2]
        try:
            data = self._source.read(index)
            return (data, *image_size(data)) if is_gpu_decodable(data) else None
        except (DataError, OSError):
            return None  # the host reader reports the error and replaces the sample

    def _crop_on_host(self, samples: ReadSamples, rows: Sequence[int]) -> None:
        """Decodes and crops these rows on the host; the crops become inputs with a box that covers all of them."""
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
            samples.inputs[row] = torch.from_numpy(crop).permute(2, 0, 1)

    def _decode(self, samples: ReadSamples, rows: range) -> list[Tensor]:
        """Images of these rows on the device."""
        encoded = {row: data for row in rows if isinstance(data := samples.inputs[row], bytes)}
        images = dict(zip(encoded, self._decoder.decode(list(encoded.values())), strict=True))
        good = {row: image for row, image in images.items() if image is not None and _has_size_of(image, encoded[row])}
        for row, image in good.items():
            self._decoder.cache.offer(int(samples.indices[row]), image)
        self._crop_on_host(samples, [row for row in encoded if row not in good])
        # Decoded images are not stored in `samples`, so that their memory is free once this group is cropped.
        return [self._on_device(good.get(row, samples.inputs[row])) for row in rows]

    def _on_device(self, image: bytes | Tensor) -> Tensor:
        assert isinstance(image, Tensor)
        return image.to(self._decoder.device)


def _has_size_of(image: Tensor, file: bytes) -> bool:
    """True if a decoded image has the size in the file's header, for which its box was drawn."""
    return tuple(image.shape[1:]) == image_size(file)


def _groups(num_bytes: Int64) -> Iterator[slice]:
    """Slices of consecutive rows of at most `_MAX_BYTES` together; a larger image is alone in its slice."""
    start, total = 0, 0
    for row, size in enumerate(num_bytes.tolist()):
        if row > start and total + size > _MAX_BYTES:
            yield slice(start, row)
            start, total = row, 0
        total += size
    if len(num_bytes):
        yield slice(start, len(num_bytes))
