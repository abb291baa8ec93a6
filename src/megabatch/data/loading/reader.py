"""Decodes an encoded source's images into uint8 batches in a thread pool; replaces unreadable files."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megabatch.data.jpeg import library
from megabatch.data.jpeg.decode import MAX_PIXELS, decode_crop, image_size
from megabatch.data.loading.files import read_files
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

Int64 = NDArray[np.int64]
Pixels = NDArray[np.uint8]
OnBadSample = Callable[[str, str], None]
DrawBoxes = Callable[[slice | Int64, Int64, Int64], Int64]
"""(rows of the batch, heights [n], widths [n]) -> boxes [n, 4] = (top, left, height, width)"""

CHUNK = 32  # samples per task: enough to hide the overhead of a task, few enough to keep all threads busy


class BadSamples:
    """Records unreadable samples, reports each once, and raises when their share is too large.

    A bad sample is replaced by the next readable one of its class, in index order, starting after it and wrapping
    around. Samples already known to be bad are tried again: another crop of a file that is damaged in the middle may
    decode, and a worker that has not met the damage must act as one that has. Replacements are therefore the same in
    every run and on every worker.
    """

    def __init__(self, source: EncodedSource, *, max_share: float, on_bad_sample: OnBadSample | None) -> None:
        self._source, self._max_share, self._on_bad_sample = source, max_share, on_bad_sample
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def reasons(self) -> dict[int, str]:
        """Reason by index of each sample that is known to be bad."""
        with self._lock:
            return dict(self._reasons)

    def merge(self, reasons: Mapping[int, str]) -> None:
        """Adds bad samples that other workers found; raises what `report` raises."""
        for index in sorted(reasons):
            self.report(index, reasons[index])

    def report(self, index: int, reason: str) -> None:
        """Records a bad sample; calls `on_bad_sample` if it is new. Thread-safe.

        Raises:
            DataError: bad samples exceed `max_share` of the data set.
        """
        with self._lock:
            if index in self._reasons:
                return
            self._reasons[index] = reason
            count = len(self._reasons)
        name = self._source.name(index)
        if self._on_bad_sample is not None:
            self._on_bad_sample(name, reason)
        if count > self._max_share * len(self._source):
            raise DataError(
                f"{count} of {len(self._source)} samples cannot be read, more than max_bad_share={self._max_share:g}; "
                f"the last is {name} ({reason}); `megabatch data check` lists all of them"
            )

    def substitutes(self, index: int) -> Iterator[int]:
        """Yields the samples that may replace `index`, in order of preference."""
        same_class = np.flatnonzero(self._source.labels == self._source.labels[index])
        start = int(np.searchsorted(same_class, index)) + 1
        return (int(i) for i in np.roll(same_class, -start)[:-1])


class _Opened(NamedTuple):
    data: bytes
    height: int
    width: int


class BatchReader:
    """Reads and decodes samples into batches [n, size, size, channels] of uint8."""

    def __init__(self, source: EncodedSource, *, channels: int, executor: Executor, bad_samples: BadSamples) -> None:
        self._source, self.channels, self._executor, self._bad = source, channels, executor, bad_samples

    def read(self, indices: Int64, size: int, draw_boxes: DrawBoxes, out: Pixels) -> NDArray[np.bool_]:
        """Fills `out` with crops of the samples at `indices`; returns a mask of replaced samples, [n].

        Raises:
            DataError: too many bad samples, or a class without a readable one.
        """
        replaced = np.zeros(len(indices), dtype=np.bool_)

        def fill(chunk: slice) -> None:
            replaced[chunk] = self._read_chunk(indices[chunk], size, lambda h, w: draw_boxes(chunk, h, w), out[chunk])

        in_chunks(fill, len(indices), self._executor)
        return replaced

    def _read_chunk(
        self, indices: Int64, size: int, draw_boxes: Callable[[Int64, Int64], Int64], out: Pixels
    ) -> NDArray[np.bool_]:
        files = read_files(self._source, indices)
        sizes = library.sizes(files.addresses, files.num_bytes, max_pixels=MAX_PIXELS)
        opened: dict[int, _Opened | None] = {}  # files whose size the library does not tell
        for row in np.flatnonzero(sizes[:, 0] == 0).tolist():
            opened[row] = found = self._open(int(indices[row]), files.file(row))
            # An unreadable file has size 1 x 1 here: its box is drawn again for the sample that replaces it.
            sizes[row] = found[1:] if found else (1, 1)
        heights, widths = np.ascontiguousarray(sizes.T)
        boxes = draw_boxes(heights, widths)
        done = library.crop_many(files.addresses, files.num_bytes, boxes, max_pixels=MAX_PIXELS, out=out)
        replaced = np.zeros(len(indices), dtype=np.bool_)
        for row in sorted({*np.flatnonzero(~done).tolist(), *opened}):
            index, image = int(indices[row]), opened.get(row, _Opened(files.file(row), *sizes[row].tolist()))
            if image is None or not self._decode(index, image.data, boxes[row], size, out[row]):
                self._replace(index, row, draw_boxes, heights, widths, size, out[row])
                replaced[row] = True
        return replaced

    def _open(self, index: int, data: bytes = b"") -> _Opened | None:
        """A sample's file, read if `data` is empty, with its size; None, and reported, if it is unreadable."""
        try:
            data = data or self._source.read(index)
            return _Opened(data, *image_size(data))
        except (DataError, OSError) as error:
            self._bad.report(index, str(error))
            return None

    def _decode(self, index: int, data: bytes, box: Int64, size: int, out: Pixels) -> bool:
        top, left, height, width = (int(edge) for edge in box)
        try:
            decode_crop(data, box=(top, left, height, width), size=size, channels=self.channels, out=out)
        except DataError as error:
            self._bad.report(index, str(error))
            return False
        return True

    def _replace(
        self,
        index: int,
        row: int,
        draw_boxes: Callable[[Int64, Int64], Int64],
        heights: Int64,
        widths: Int64,
        size: int,
        out: Pixels,
    ) -> None:
        """Decodes the next readable sample of the class, cropped with the random numbers of the replaced sample."""
        for substitute in self._bad.substitutes(index):
            image = self._open(substitute)
            if image is None:
                continue
            heights[row], widths[row] = image.height, image.width
            if self._decode(substitute, image.data, draw_boxes(heights, widths)[row], size, out):
                return
        class_name = self._source.class_names[self._source.labels[index]]
        raise DataError(
            f"no sample of class '{class_name}' can be read; the last tried was {self._source.name(index)}; "
            "`megabatch data check` lists every unreadable file"
        )


def in_chunks(work: Callable[[slice], None], count: int, executor: Executor) -> None:
    """Runs `work` on consecutive chunks of `count` samples, one task each; the first error cancels the rest."""
    tasks = [executor.submit(work, slice(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
