"""Augmented training batches by stream position. `EvalLoader` and `Batch` are exported from here too.

A loader keeps no position. `load` is a function of the positions asked for, so what a worker gets does not depend on
which worker it is, on what it loaded before, or on where a run was stopped and continued.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megabatch.data.augment import ops as augment
from megabatch.data.augment.policy import AugmentationKind, Policy, Samples
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.jpeg.gpu_reader import ReadSamples
from megabatch.data.loading.base_loader import BaseLoader, HostImages, Int64, Source
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.order import shards_ahead, stream_samples
from megabatch.data.loading.reader import OnBadSample
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError

__all__ = ["Batch", "EvalLoader", "TrainLoader"]


class TrainLoader(BaseLoader):
    """Augmented training batches by stream position.

    Args:
        source: arrays, which move to `device`, or files, which are decoded by `decode_threads` threads (None: one
            per core). Files are decoded at the requested resolution; arrays are resized to it, if it is not theirs.
        seed: of sample order and augmentation.
        augmentation: "random_resized_crop"; "pad_crop": a random shift by up to `crop_padding` pixels, reflecting
            at the edges; or "none": arrays whole, files their central square of `center_crop_ratio`.
        cutout_size: side of the square set to the mean, in pixels; 0 is none.
        mixup_alpha, cutmix_alpha: of Beta(alpha, alpha); 0 is none. The partner of stream position p is position
            p XOR 1, augmented as it is itself, so it does not depend on the micro-batch; it is loaded as well
            where it falls outside. With both alphas a fair coin per sample decides.
        color_jitter: brightness and contrast are scaled by factors in [1 - j, 1 + j].
        augmentation_ends_epoch: from this (fractional) epoch on only flips are left; crops are central.
        shuffle, shard_local: order of samples, see `order.stream_samples`.
        prefetch_batches: batches made ahead by `batches`.
        max_bad_share: unreadable samples, as a share of the data set, beyond which loading raises.
        on_bad_sample: called once per unreadable sample with its name and the reason, from any thread.
        gpu_decoder: decodes JPEGs on `device`, instead of threads. Crops are the same, pixels not to the bit: another
            decoder, whole images, and no rounding to 8 bits between resizing and normalising.

    Raises:
        DataError: channels that do not fit, padding as large as the image.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        augmentation: AugmentationKind = "none",
        crop_padding: int = 4,
        min_crop_area: float = 0.08,
        max_crop_area: float = 1.0,
        min_crop_aspect: float = 0.75,
        max_crop_aspect: float = 4 / 3,
        center_crop_ratio: float = 0.875,
        flip: bool = True,
        cutout_size: int = 0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        color_jitter: float = 0.0,
        augmentation_ends_epoch: float | None = None,
        shuffle: bool = True,
        shard_local: bool = False,
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
        self._seed, self._shuffle = seed, shuffle
        self._ends_epoch = augmentation_ends_epoch
        self._shard_sizes = shard_sizes(source) if shard_local else None
        self._policy = Policy(
            seed=seed,
            augmentation=augmentation,
            crop_padding=crop_padding,
            min_crop_area=min_crop_area,
            max_crop_area=max_crop_area,
            min_crop_aspect=min_crop_aspect,
            max_crop_aspect=max_crop_aspect,
            center_crop_ratio=center_crop_ratio,
            flip=flip,
            cutout_size=cutout_size,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            color_jitter=color_jitter,
        )

    def load(self, positions: range, *, resolution: int) -> Batch:
        """The batch at consecutive stream positions; a function of its arguments alone. Callable from any thread."""
        return self._hand_out(self._staging.run(self._read((positions, resolution))))

    def batches(self, requests: Iterable[tuple[range, int]]) -> Iterator[Batch]:
        """The batch of each request (positions, resolution), in order, made ahead in background threads.

        Requests are drawn from the iterable up to `prefetch_batches` + 2 ahead. Close the iterator (or leave its loop
        by an exception) to cancel what was asked for ahead.
        """
        return self._in_background(self._read, requests)

    def _read(self, request: tuple[range, int]) -> Callable[[], Batch]:
        """Reads and decodes; what is left to do on the device."""
        positions, resolution = request
        loaded = with_partners(positions) if self._policy.mixes else positions
        samples = self._samples(loaded)
        if self._shard_sizes is not None and self._ahead.listens:
            self._ahead.say(shards_ahead(positions.start, shard_sizes=self._shard_sizes, seed=self._seed))
        asked = slice(positions.start - loaded.start, positions.stop - loaded.start)
        if isinstance(self.source, ArraySource):
            return partial(self._from_arrays, self.source, samples, resolution, asked)
        images = self._decode(samples.indices, resolution, partial(self._boxes, samples))
        return partial(self._from_files, images, samples, asked)

    def _from_arrays(self, source: ArraySource, samples: Samples, resolution: int, asked: slice) -> Batch:
        images = source.images.index_select(0, self._staging.to_device(samples.indices))
        if self._policy.augmentation == "random_resized_crop":
            heights, widths = (np.full(len(images), side) for side in images.shape[2:])
            boxes = self._policy.boxes(samples, heights, widths)
            images = augment.crop_and_resize(images, self._staging.to_device(boxes), resolution)
            return self._augmented(self._policy.move_and_flip(images, samples), samples, asked)
        return self._augmented(augment.resize(self._policy.move_and_flip(images, samples), resolution), samples, asked)

    def _from_files(self, decoded: HostImages | ReadSamples, samples: Samples, asked: slice) -> Batch:
        if isinstance(decoded, HostImages):
            images = self._policy.move_and_flip(self._staging.to_device(decoded.pixels), samples)
        elif self._policy.only_flips:
            images = self._crop(decoded, self._policy.flips(samples))
            return self._mixed(images, samples, asked, num_replaced=int(decoded.replaced[asked].sum()))
        else:
            images = self._policy.move_and_flip(self._crop_raw(decoded), samples)
        return self._augmented(images, samples, asked, num_replaced=int(decoded.replaced[asked].sum()))

    def _augmented(self, images: Tensor, samples: Samples, asked: slice, num_replaced: int = 0) -> Batch:
        """The batch of cropped and flipped images in [0, 255]."""
        return self._mixed(self._normalize(self._policy.recolor(images, samples)), samples, asked, num_replaced)

    def _mixed(self, images: Tensor, samples: Samples, asked: slice, num_replaced: int) -> Batch:
        """The batch of normalised images."""
        images = self._policy.cut_out(images, samples)
        labels, count = self._labels(samples.indices), asked.stop - asked.start
        if not self._policy.mixes:
            return Batch(images, labels, count, num_replaced=num_replaced)
        mixed, weight = self._policy.mix(images, swap_pairs(images), samples)
        return Batch(mixed[asked], labels[asked], count, swap_pairs(labels)[asked], weight[asked], num_replaced)

    def _samples(self, positions: range) -> Samples:
        epochs, indices = stream_samples(
            positions.start,
            len(positions),
            num_samples=len(self.source),
            seed=self._seed,
            shuffle=self._shuffle,
            shard_sizes=self._shard_sizes,
        )
        if self._ends_epoch is None:
            return Samples(epochs, indices, np.ones(len(positions), dtype=np.bool_))
        return Samples(epochs, indices, np.asarray(positions, dtype=np.float64) < self._ends_epoch * len(self.source))

    def _boxes(self, samples: Samples, chunk: slice | Int64, heights: Int64, widths: Int64) -> Int64:
        return self._policy.boxes(samples.part(chunk), heights, widths)


def with_partners(positions: range) -> range:
    """`positions`, begun and ended so that p and p XOR 1 are both inside for each p."""
    if not positions:
        return positions
    return range(positions.start & ~1, ((positions.stop - 1) | 1) + 1)


def swap_pairs(values: Tensor) -> Tensor:
    """Rows 2k and 2k + 1 exchanged; the number of rows is even."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).view_as(values) if len(values) else values


def shard_sizes(source: Source) -> Sequence[int]:
    """Shard sizes of a source that is kept in shards; DataError if it is not."""
    sizes = None if isinstance(source, ArraySource) else source.shard_sizes
    if sizes is None:
        raise DataError("shard_local order needs a data set in shards (`megabatch data pack`); shard_local=False works")
    return sizes
