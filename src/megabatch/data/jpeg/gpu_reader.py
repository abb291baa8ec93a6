"""Reads samples that a GPU decodes and crops; samples that it cannot decode are decoded on the host."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.jpeg import library
from megabatch.data.jpeg.decode import MAX_PIXELS, image_size
from megabatch.data.jpeg.ends import is_gpu_decodable
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.files import read_files
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
    inputs: list[Tensor]
    """A JPEG file [bytes] if `encoded`, else a cached image or a crop made on the host, [channels, rows, columns]."""
    encoded: NDArray[np.bool_]  # [n]
    sizes: Int64  # [n, 2]: height and width of the decoded image
    boxes: Int64  # [n, 4]: crop (top, left, height, width)
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
        boxes, sizes = np.zeros((count, 4), dtype=np.int64), np.zeros((count, 2), dtype=np.int64)
        inputs, encoded = [torch.empty(0)] * count, np.zeros(count, dtype=np.bool_)
        replaced = np.zeros(count, dtype=np.bool_)
        samples = ReadSamples(indices, size, draw_boxes, flips, inputs, encoded, sizes, boxes, replaced)
        for row, image in self._decoder.cache.find(indices).items():
            inputs[row], sizes[row] = image, image.shape[1:]
        to_read = np.flatnonzero(sizes[:, 0] == 0)
        in_chunks(lambda chunk: self._read_chunk(samples, to_read[chunk]), len(to_read), self._executor)
        for_host = np.flatnonzero(sizes[:, 0] == 0)
        sizes[for_host] = 1  # a box of a 1 x 1 image, which `_crop_on_host` replaces
        samples.boxes[:] = draw_boxes(slice(0, count), *np.ascontiguousarray(sizes.T))
        self._crop_on_host(samples, for_host)
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
            padded_channels = None
        channels = padded_channels or len(mean)
        shape = (len(samples.indices), samples.size, samples.size, channels)
        out = torch.empty(shape, dtype=dtype, device=self._decoder.device).permute(0, 3, 1, 2)
        for part in _groups(channels * samples.sizes.prod(axis=1)):
            images = self._decode(samples, part)
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

    def _read_chunk(self, samples: ReadSamples, rows: Int64) -> None:
        """Reads the files of these rows; a size of 0 x 0 remains where the host must decode."""
        files = read_files(self._source, samples.indices[rows])
        sizes = library.sizes(files.addresses, files.num_bytes, max_pixels=MAX_PIXELS, complete=True)
        for row in np.flatnonzero(sizes[:, 0] == 0).tolist():  # the library knows plain JPEGs only
            sizes[row] = _decodable_size(files.file(row)) or (0, 0)
        for row, file in zip(rows.tolist(), files.tensors(), strict=True):
            samples.inputs[row] = file
        samples.sizes[rows] = sizes
        samples.encoded[rows] = sizes[:, 0] > 0

    def _crop_on_host(self, samples: ReadSamples, rows: Int64) -> None:
        """Decodes and crops these rows on the host; the crops become inputs with a box that covers all of them."""
        if not len(rows):
            return
        pixels = np.empty((len(rows), samples.size, samples.size, self._host.channels), dtype=np.uint8)
        samples.replaced[rows] = self._host.read(
            samples.indices[rows],
            samples.size,
            lambda chunk, heights, widths: samples.draw_boxes(rows[chunk], heights, widths),
            pixels,
        )
        samples.boxes[rows] = (0, 0, samples.size, samples.size)
        samples.sizes[rows], samples.encoded[rows] = samples.size, False
        for row, crop in zip(rows.tolist(), pixels, strict=True):
            samples.inputs[row] = torch.from_numpy(crop).permute(2, 0, 1)

    def _decode(self, samples: ReadSamples, rows: slice) -> list[Tensor]:
        """Images of these rows on the device."""
        encoded = np.flatnonzero(samples.encoded[rows]) + rows.start
        images = self._decoder.decode([samples.inputs[row] for row in encoded])
        # A size that is not the one in the file's header, for which the box was drawn, is that of a turned image.
        expected = map(tuple, samples.sizes[encoded].tolist())
        pairs = zip(encoded.tolist(), images, expected, strict=True)
        good = {row: image for row, image, size in pairs if image is not None and image.shape[1:] == size}
        self._decoder.cache.offer({int(samples.indices[row]): image for row, image in good.items()})
        self._crop_on_host(samples, np.array([row for row in encoded.tolist() if row not in good], dtype=np.int64))
        # Decoded images are not stored in `samples`, so that their memory is free once this group is cropped.
        inputs = samples.inputs
        return [good[row] if row in good else self._on_device(inputs[row]) for row in range(rows.start, rows.stop)]

    def _on_device(self, image: Tensor) -> Tensor:
        return image.to(self._decoder.device)


def _decodable_size(file: bytes) -> tuple[int, int] | None:
    """Height and width of a file that a GPU decodes as the host does; None for others."""
    try:
        return image_size(file) if is_gpu_decodable(file) else None
    except DataError:
        return None  # the host reader reports the error and replaces the sample


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
