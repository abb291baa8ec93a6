"""What the training and the evaluation loader share: threads, the way to the device, pixels by index."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.augment import ops as augment
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.jpeg.gpu_reader import GpuReader, ReadSamples
from megabatch.data.loading.batch import Batch, Staging
from megabatch.data.loading.prefetch import in_order, serial_threads, usable_cores
from megabatch.data.loading.read_ahead import ReadAhead
from megabatch.data.loading.reader import BadSamples, BatchReader, DrawBoxes, OnBadSample
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

Int64 = NDArray[np.int64]
Replaced = NDArray[np.bool_]
Source: TypeAlias = ArraySource | EncodedSource
Request = TypeVar("Request")


class HostImages(NamedTuple):
    """What reading leaves in host memory: a quarter of what the batch takes once it is normalised in float32."""

    pixels: Tensor  # [n, channels, resolution, resolution] uint8, channels last; pinned with a GPU
    replaced: Replaced  # [n]


class BaseLoader:
    """Pixels of a source by index, normalised on the device, made ahead by threads. Use its two children.

    Batches are made in two steps: files are read and decoded `prefetch_batches` ahead, as uint8 on the host; they
    become normalised images on the device when they are asked for, on a GPU one batch before.
    """

    def __init__(
        self,
        source: Source,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_channels: int,
        device: torch.device | str,
        dtype: torch.dtype,
        channels_last: bool,
        decode_threads: int | None,
        prefetch_batches: int,
        max_bad_share: float,
        on_bad_sample: OnBadSample | None,
        gpu_decoder: GpuDecoder | None,
    ) -> None:
        self.source: Source = source.to(device) if isinstance(source, ArraySource) else source
        self._mean, self._std, self._channels = pixel_mean, pixel_std, image_channels
        self._dtype = dtype
        self._channels_last = channels_last
        self._prefetch = max(1, prefetch_batches)
        # A GPU copies and normalises beside a step; on a CPU batches finished early would only take memory.
        self._finished_ahead = 2 if torch.device(device).type == "cuda" else 1
        # Bytes read ahead, handed on and being finished; images being finished and those in the hands of the caller.
        self._staging = Staging(torch.device(device), num_buffers=self._prefetch + 4)
        self._batch_threads = ThreadPoolExecutor(min(self._prefetch, 4), thread_name_prefix="megabatch-batch")
        self._finish_threads = serial_threads(self._finished_ahead, "megabatch-finish")
        self._decode_threads = ThreadPoolExecutor(
            decode_threads or usable_cores(), thread_name_prefix="megabatch-decode"
        )
        self._check_channels()
        self._ahead = ReadAhead(source)
        self._num_replaced = 0
        self._bad: BadSamples | None = None
        self._gpu_reader: GpuReader | None = None
        if not isinstance(source, ArraySource):
            self._bad = BadSamples(source, max_share=max_bad_share, on_bad_sample=on_bad_sample)
            self._reader = BatchReader(
                source, channels=image_channels, executor=self._decode_threads, bad_samples=self._bad
            )
            if gpu_decoder is not None:
                self._gpu_reader = GpuReader(
                    source, decoder=gpu_decoder, host=self._reader, executor=self._decode_threads
                )

    @property
    def num_bad(self) -> int:
        """Different samples that could not be read so far."""
        return len(self.bad_samples)

    @property
    def bad_samples(self) -> dict[int, str]:
        """Index and reason of each sample that could not be read so far, here or where `learn_bad_samples` was told."""
        return self._bad.so_far() if self._bad is not None else {}

    def learn_bad_samples(self, reasons: Mapping[int, str]) -> None:
        """Take in what other workers' loaders over the same source could not read.

        Those samples count as met: `on_bad_sample` is called for each that is new, and never for it again.

        Raises:
            DataError: with them, bad samples exceed `max_bad_share`.
        """
        if self._bad is not None:
            self._bad.learn(reasons)

    @property
    def num_replaced(self) -> int:
        """How often so far a batch that was handed out held another sample in place of one that could not be read."""
        return self._num_replaced

    def close(self) -> None:
        """Stop the threads; batches not yet handed out are dropped. The source stays open."""
        self._finish_threads.shutdown(cancel_futures=True)
        self._batch_threads.shutdown(cancel_futures=True)
        self._decode_threads.shutdown(cancel_futures=True)

    def _check_channels(self) -> None:
        if isinstance(self.source, ArraySource) and self.source.images.shape[1] != self._channels:
            have = self.source.images.shape[1]
            raise DataError(
                f"the images have {have} channels, the recipe {self._channels}; image_channels={have} works"
            )
        if not len(self._mean) == len(self._std) == self._channels:
            raise DataError(f"pixel_mean and pixel_std need one value for each of the {self._channels} channels")

    def _labels(self, indices: Int64) -> Tensor:
        if isinstance(self.source, ArraySource):
            return self.source.labels[self._staging.to_device(indices)]
        return self._staging.to_device(np.asarray(self.source.labels[indices], dtype=np.int64))

    def _decode(self, indices: Int64, resolution: int, draw_boxes: DrawBoxes) -> HostImages | ReadSamples:
        if self._gpu_reader is not None:
            return self._gpu_reader.read(indices, resolution, draw_boxes)
        pixels = self._staging.host_images(len(indices), resolution, self._channels)
        replaced = self._reader.read(indices, resolution, draw_boxes, pixels.numpy())
        return HostImages(pixels.permute(0, 3, 1, 2), replaced)

    def _crop(self, samples: ReadSamples, flips: NDArray[np.bool_] | None = None) -> Tensor:
        """Crops of what a GPU decodes, mirrored where `flips`, normalised."""
        assert self._gpu_reader is not None
        images = self._gpu_reader.crop(samples, flips, mean=self._mean, std=self._std, dtype=self._dtype)
        return images if self._channels_last else images.contiguous()

    def _crop_raw(self, samples: ReadSamples) -> Tensor:
        """Crops of what a GPU decodes, float32 in [0, 255]."""
        assert self._gpu_reader is not None
        mean, std = (0.0,) * self._channels, (1 / 255,) * self._channels
        return self._gpu_reader.crop(samples, None, mean=mean, std=std, dtype=torch.float32)

    def _normalize(self, images: Tensor) -> Tensor:
        out = self._staging.device_images(images.shape, self._dtype, channels_last=self._channels_last)
        return augment.normalize(images, self._mean, self._std, out)

    def _hand_out(self, batch: Batch) -> Batch:
        self._num_replaced += batch.num_replaced
        return batch.take()

    def _in_background(
        self, read: Callable[[Request], Callable[[], Batch]], requests: Iterable[Request]
    ) -> Iterator[Batch]:
        """`read` does the host's part of a request and returns what does the device's."""
        ready = in_order(read, requests, executor=self._batch_threads, depth=self._prefetch)
        batches = in_order(self._staging.run, ready, executor=self._finish_threads, depth=self._finished_ahead)
        try:
            for batch in batches:
                yield self._hand_out(batch)
        finally:
            batches.close()
            ready.close()
