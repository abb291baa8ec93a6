"""Batches for evaluation, in index order."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from megabatch.data.augment import crops
from megabatch.data.augment import ops as augment
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.jpeg.gpu_reader import ReadSamples
from megabatch.data.loading.base_loader import BaseLoader, HostImages, Int64, Source
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.reader import OnBadSample
from megabatch.data.sources.arrays import ArraySource


class EvalLoader(BaseLoader):
    """Batches for evaluation: samples in index order, central crops, no augmentation.

    Files, and arrays that are not of size `resolution`, give "resize the shorter side to resolution / crop_ratio, cut
    the centre"; arrays of that size are taken whole. Other arguments are those of `TrainLoader`.
    """

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        crop_ratio: float = 0.875,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_channels: int = 3,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        decode_threads: int | None = None,
        prefetch_batches: int = 4,
        max_bad_share: float = 0.01,
        on_bad_sample: OnBadSample | None = None,
        gpu_decoder: GpuDecoder | None = None,
    ) -> None:
        super().__init__(
            source,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            image_channels=image_channels,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            decode_threads=decode_threads,
            prefetch_batches=prefetch_batches,
            max_bad_share=max_bad_share,
            on_bad_sample=on_bad_sample,
            gpu_decoder=gpu_decoder,
        )
        self._resolution, self._crop_ratio = resolution, crop_ratio

    @property
    def num_samples(self) -> int:
        return len(self.source)

    def load(self, indices: range) -> Batch:
        """The samples at consecutive indices."""
        return self._hand_out(self._staging.run(self._read(indices)))

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[Batch]:
        """Samples `first` .. `last - 1` in batches of `batch_size`, the last one shorter, made ahead."""
        starts = range(first, last, batch_size)
        return self._in_background(self._read, (range(start, min(start + batch_size, last)) for start in starts))

    def _read(self, indices: range) -> Callable[[], Batch]:
        """Reads and decodes; what is left to do on the device."""
        wanted = np.asarray(indices, dtype=np.int64)
        if isinstance(self.source, ArraySource):
            return partial(self._from_arrays, self.source, wanted)
        if self._ahead.listens:
            self._ahead.say_from(indices.start)
        return partial(self._from_files, self._decode(wanted, self._resolution, self._boxes), wanted)

    def _from_files(self, decoded: HostImages | ReadSamples, indices: Int64) -> Batch:
        if isinstance(decoded, HostImages):
            images = self._normalize(self._staging.to_device(decoded.pixels))
        else:
            images = self._crop(decoded)
        return Batch(images, self._labels(indices), len(indices), num_replaced=int(decoded.replaced.sum()))

    def _from_arrays(self, source: ArraySource, indices: Int64) -> Batch:
        images = source.images.index_select(0, self._staging.to_device(indices))
        if images.shape[2:] != (self._resolution, self._resolution):
            heights, widths = (np.full(len(images), side) for side in images.shape[2:])
            boxes = crops.center_boxes(heights, widths, crop_ratio=self._crop_ratio)
            images = augment.crop_and_resize(images, self._staging.to_device(boxes), self._resolution)
        return Batch(self._normalize(images), self._labels(indices), len(indices))

    def _boxes(self, _chunk: slice | Int64, heights: Int64, widths: Int64) -> Int64:
        return crops.center_boxes(heights, widths, crop_ratio=self._crop_ratio)
