"""Batches for evaluation, in index order."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from megabatch.data.augment import crops
from megabatch.data.augment import ops as augment
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.arguments import check_arguments, check_range
from megabatch.data.loading.base_loader import BaseLoader, DeviceImages, HostImages, Int64, Source, Undecoded, Work
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.reader import OnBadSample
from megabatch.data.sources.arrays import ArraySource


class EvalLoader(BaseLoader):
    """Batches for evaluation: samples in index order, central crops, no augmentation.

        _, source = open_folder("my_photos")
        loader = EvalLoader(source, resolution=224, pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
        count = sum(batch.count for batch in loader.batches(0, loader.num_samples, 64))

    `load` returns and `batches` yields a `Batch`, on `device`: `images` [n, image_channels, resolution, resolution] in
    `dtype`, each pixel (x / 255 - pixel_mean) / pixel_std, and `labels` [n] int64.

    Args:
        source: images and labels, as in `TrainLoader`.
        resolution: height and width of the images, in pixels, 1 or more.
        crop_ratio: in (0, 1]. The shorter side is resized to resolution / crop_ratio, then the centre is cropped. This
            holds for files, and for arrays of another size than `resolution`; arrays of that size are used whole.
        pixel_mean, pixel_std: mean and standard deviation of each channel, [image_channels] values, of pixels divided
            by 255: means in [0, 1], standard deviations in (0, 1]. Not in units of bytes.
        image_channels, device, dtype, channels_last, decode_threads, prefetch_batches, max_bad_share, on_bad_sample,
            gpu_decoder: as in `TrainLoader`.

    Raises:
        UserError: an argument is out of its range.
        DataError: the images have other channels, or, while loading, more than `max_bad_share` unreadable samples or a
            class without a readable sample.
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
        check_arguments(resolution=resolution, crop_ratio=crop_ratio)
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
        """Number of samples of the source."""
        return len(self.source)

    def load(self, indices: range) -> Batch:
        """Returns the samples at consecutive indices, from 0 to `num_samples` - 1; UserError for another range."""
        return self._load(self._read(indices))

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[Batch]:
        """Yields samples `first` .. `last - 1` in batches of `batch_size`, prefetched; the last batch may be shorter.

        Raises:
            UserError: `batch_size` below 1, or indices outside 0 .. `num_samples` - 1.
            DataError: see the class; raised where the batch would have been yielded.
        """
        check_arguments(batch_size=batch_size)
        starts = range(first, last, batch_size)
        return self._prefetched(self._read, (range(start, min(start + batch_size, last)) for start in starts))

    def _read(self, indices: range) -> Work | Undecoded:
        """Reads on the host, and decodes unless a GPU will; returns what finishes the batch on the device."""
        check_range("indices", indices, end=len(self.source))
        samples = np.asarray(indices, dtype=np.int64)
        if isinstance(self.source, ArraySource):
            return partial(self._from_arrays, self.source, samples)
        if self._read_ahead.is_supported:
            self._read_ahead.announce_from(indices.start)
        no_flips, finish = np.zeros(len(samples), dtype=np.bool_), partial(self._from_decoded, samples)
        return self._from_files(samples, self._resolution, self._boxes, no_flips, finish)

    def _from_decoded(self, indices: Int64, decoded: HostImages | DeviceImages) -> Batch:
        if isinstance(decoded, HostImages):
            images = self._normalize(self._staging.to_device(decoded.pixels))
        else:
            images = decoded.images
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
