"""Augmented training batches by stream position. Re-exports `EvalLoader` and `Batch`.

A loader stores no position: `load` is a function of the requested positions. A batch therefore does not depend on the
worker's rank, on earlier batches, or on where a run was stopped and resumed.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megabatch.data.augment import ops as augment
from megabatch.data.augment.policy import AugmentationKind, AutoAugmentKind, Policy, Samples
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.arguments import check_arguments, check_range
from megabatch.data.loading.balanced import BalancedOrder
from megabatch.data.loading.base_loader import BaseLoader, DeviceImages, HostImages, Int64, Source, Undecoded, Work
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.order import shards_ahead, stream_samples
from megabatch.data.loading.reader import OnBadSample
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError, UserError

__all__ = ["Batch", "EvalLoader", "TrainLoader"]


class TrainLoader(BaseLoader):
    """Augmented training batches by stream position; position p is place p % n of epoch p // n, for n samples.

        source, _ = open_folder("my_photos")
        loader = TrainLoader(source, seed=0, pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
        batch = loader.load(range(0, 64), resolution=224)  # or loader.batches([(range(0, 64), 224), ...])

    With `local_batch_size` and `resolution` it can be iterated like a DataLoader; `state_dict` holds its position:

        loader = TrainLoader(source, local_batch_size=64, resolution=224, seed=0, ...)
        for epoch in range(90):
            for batch in loader:  # len(loader) batches; those of the next epoch follow on
                train_step(batch.images, batch.labels)

    `load` returns and `batches` yields a `Batch`, on `device`: `images` [n, image_channels, resolution, resolution] in
    `dtype`, each pixel (x / 255 - pixel_mean) / pixel_std; `labels` [n] int64; with mixup or cutmix also `mixed_labels`
    [n] int64 and `mix_weight` [n] float32 in [0, 1]: the weight of `labels`, where 1 - mix_weight is the partner's.

    Args:
        source: images and labels. An `ArraySource` is moved to `device`, and its images are resized to the requested
            resolution if theirs differs. Files are decoded at the requested resolution by threads on the host.
        seed: whole number; determines sample order and augmentation.
        augmentation: "random_resized_crop" (Szegedy et al. 2014, arXiv:1409.4842, section 6); "pad_crop", a random
            shift by up to `crop_padding` pixels, reflected at the edges; or "none", which uses whole arrays, and of
            files the central square of `center_crop_ratio`.
        crop_padding: largest shift of "pad_crop" in each direction, in pixels: 0 or more, less than the image's size.
        min_crop_area, max_crop_area: bounds of a random crop's area, as shares of the image's area in (0, 1].
        min_crop_aspect, max_crop_aspect: bounds of a random crop's width / height, above 0.
        center_crop_ratio: side of the central square over the image's shorter side, in (0, 1].
        flip: mirrors each sample left to right with probability 1/2.
        alternate_flip: with `flip`, drawn for epoch 0 only: from epoch to epoch every sample changes sides, so that two
            epochs show both (Jordan 2024, arXiv:2404.00498, section 3.6).
        cutout_size: side of the square that is set to the mean, in pixels; 0 disables cutout (DeVries and Taylor 2017,
            arXiv:1708.04552).
        mixup_alpha, cutmix_alpha: parameter of Beta(alpha, alpha), 0 or more; 0 disables mixup (Zhang et al. 2017,
            arXiv:1710.09412) or cutmix (Yun et al. 2019, arXiv:1905.04899). The partner of stream position p is
            position p XOR 1 with its own augmentation, so the result does not depend on the micro-batch; a partner
            outside the requested range is loaded as well. If both are above 0, each sample uses either with
            probability 1/2.
        color_jitter: j in [0, 1); brightness and contrast are scaled by factors drawn from [1 - j, 1 + j].
        auto_augment: "randaugment", `rand_num_ops` of 14 operations at strength `rand_magnitude` (Cubuk et al. 2019,
            arXiv:1909.13719); "trivialaugment", one operation of random strength in wide ranges (Mueller and Hutter
            2021, arXiv:2103.10158); or "none". Applied after crop and flip, drawn per sample.
        rand_num_ops: operations per image, 1 to 8.
        rand_magnitude: strength of all operations, from 0 to 30.
        random_erasing: probability, in [0, 1], that a rectangle of 2 % to a third of the image, with an aspect from 0.3
            to 3.3, is set to the mean (Zhong et al. 2017, arXiv:1708.04896).
        augmentation_ends_epoch: fractional epoch, 0 or more, from which only flips remain and crops are central; None
            for never.
        local_batch_size, resolution: images per batch and their side in pixels, for iteration.
        rank, world_size: iteration deals each global batch of local_batch_size * world_size consecutive positions
            among that many ranks; every sample is seen once per epoch by one of them.
        shuffle: False reads samples in index order.
        balanced: every class has as many positions as any other, and small classes repeat; see `BalancedOrder`.
        shard_local: shuffles within windows of a few shards, see `order.stream_samples`; needs a source in shards.
        pixel_mean, pixel_std: mean and standard deviation of each channel, [image_channels] values, of pixels divided
            by 255: means in [0, 1], standard deviations in (0, 1]. Not in units of bytes.
        image_channels: channels of the images: 1 (grey) or 3 (RGB) for files, those of the arrays otherwise.
        device: device of the batches.
        dtype: floating-point dtype of the images.
        channels_last: memory format of the images: `torch.channels_last` instead of contiguous.
        padded_channels: channels of the images in the batches, the last ones 0; None for `image_channels`. Needs
            `channels_last`. Tensor cores read 16-bit pixels of four channels; fused nets of `megabatch.nn` accept them.
        decode_threads: host threads that read and decode files, 1 or more; None for one per available core.
        prefetch_batches: batches that `batches` reads and decodes ahead, 1 or more.
        max_bad_share: share of the data set, in [0, 1], that may be unreadable; more raises DataError while loading.
        on_bad_sample: callback (name, reason), called once per unreadable sample, from any thread.
        gpu_decoder: decodes JPEGs on `device` instead of in host threads. The crops are the same; pixels differ
            slightly, as it is a different decoder, decodes whole images, and does not round to 8 bits between resizing
            and normalising.

    Raises:
        UserError: an argument is out of its range.
        DataError: the images have other channels, `shard_local` without shards, or, while loading, `crop_padding` as
            large as the image, more than `max_bad_share` unreadable samples, or a class without a readable sample.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        local_batch_size: int | None = None,
        resolution: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        augmentation: AugmentationKind = "none",
        crop_padding: int = 4,
        min_crop_area: float = 0.08,
        max_crop_area: float = 1.0,
        min_crop_aspect: float = 0.75,
        max_crop_aspect: float = 4 / 3,
        center_crop_ratio: float = 0.875,
        flip: bool = True,
        alternate_flip: bool = False,
        cutout_size: int = 0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        color_jitter: float = 0.0,
        auto_augment: AutoAugmentKind = "none",
        rand_num_ops: int = 2,
        rand_magnitude: float = 9,
        random_erasing: float = 0.0,
        augmentation_ends_epoch: float | None = None,
        shuffle: bool = True,
        balanced: bool = False,
        shard_local: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_channels: int = 3,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        padded_channels: int | None = None,
        decode_threads: int | None = None,
        prefetch_batches: int = 4,
        max_bad_share: float = 0.01,
        on_bad_sample: OnBadSample | None = None,
        gpu_decoder: GpuDecoder | None = None,
    ) -> None:
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
            alternate_flip=alternate_flip,
            cutout_size=cutout_size,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            rand_num_ops=rand_num_ops,
            rand_magnitude=rand_magnitude,
            random_erasing=random_erasing,
        )
        check_arguments(**dataclasses.asdict(self._policy), augmentation_ends_epoch=augmentation_ends_epoch)
        self._shard_sizes = shard_sizes(source) if shard_local else None
        super().__init__(
            source,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            image_channels=image_channels,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            padded_channels=padded_channels,
            mixes=self._policy.mixes,
            decode_threads=decode_threads,
            prefetch_batches=prefetch_batches,
            max_bad_share=max_bad_share,
            on_bad_sample=on_bad_sample,
            gpu_decoder=gpu_decoder,
        )
        self._seed, self._shuffle = seed, shuffle
        self._balanced: BalancedOrder | None = None
        if balanced:
            if not shuffle or shard_local:
                raise UserError("balanced=True sets the order; shuffle=True and shard_local=False work with it")
            self._balanced = BalancedOrder(np.asarray(torch.as_tensor(source.labels).cpu()), seed=seed)
        self._ends_epoch = augmentation_ends_epoch
        check_arguments(local_batch_size=local_batch_size, world_size=world_size, resolution=resolution or 1)
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank={rank} was given, needed: 0 to {world_size - 1}, as world_size={world_size}; 0 works"
            )
        self._local_batch_size, self._resolution = local_batch_size, resolution
        self._rank, self._world_size = rank, world_size
        self._samples_seen = 0

    def __len__(self) -> int:
        """Batches of one iteration: the samples of an epoch over the global batch, rounded down, at least 1."""
        return max(1, len(self.source) // (self._shape[0] * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yields the next `len(self)` batches of this rank, from where the iteration before it, or `state_dict`, ended.

        No sample is dropped: those that do not fill a batch at the end of an epoch begin the next iteration.
        """
        size, resolution = self._shape
        first, step = self._samples_seen + self._rank * size, size * self._world_size
        starts = range(first, first + len(self) * step, step)
        for batch in self.batches((range(start, start + size), resolution) for start in starts):
            self._samples_seen += step
            yield batch

    @property
    def _shape(self) -> tuple[int, int]:
        if self._local_batch_size is None or self._resolution is None:
            raise UserError(
                "iteration and len need local_batch_size and resolution; TrainLoader(..., local_batch_size=64, "
                "resolution=224) works, as does batches() without them"
            )
        return self._local_batch_size, self._resolution

    def state_dict(self) -> dict[str, int]:
        """The position: samples of all ranks in the batches that iteration has yielded. Any `world_size` may resume."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Inverse of `state_dict`: the next iteration begins there."""
        self._samples_seen = int(state["samples_seen"])

    def load(self, positions: range, *, resolution: int) -> Batch:
        """Returns the batch at consecutive stream positions; a pure function, callable from any thread.

        Args:
            positions: consecutive positions, 0 or more; an empty range gives an empty batch.
            resolution: height and width of the images, in pixels, 1 or more.

        Raises:
            UserError: another range or resolution.
            DataError: see the class.
        """
        return self._load(self._read((positions, resolution)))

    def batches(self, requests: Iterable[tuple[range, int]]) -> Iterator[Batch]:
        """Yields the batch of each request (positions, resolution), in order, prefetched by background threads.

        Requests are taken from the iterable up to `prefetch_batches` + 2 ahead. Closing the iterator, or leaving its
        loop by an exception, cancels the requests that are still in flight. Raises what `load` raises, where the
        batch would have been yielded.
        """
        return self._prefetched(self._read, requests)

    def sample_names(self, positions: range) -> list[str]:
        """Name of the sample at each stream position: its file, or its index in an `ArraySource`."""
        indices = self._samples(positions).indices.tolist()
        if isinstance(self.source, ArraySource):
            return [f"image {index}" for index in indices]
        return [self.source.name(index) for index in indices]

    def _read(self, request: tuple[range, int]) -> Work | Undecoded:
        """Reads on the host, and decodes unless a GPU will; returns what finishes the batch on the device."""
        positions, resolution = request
        check_range("positions", positions)
        check_arguments(resolution=resolution)
        loaded = with_partners(positions) if self._policy.mixes else positions
        samples = self._samples(loaded)
        if self._shard_sizes is not None and self._read_ahead.is_supported:
            self._read_ahead.announce(shards_ahead(positions.start, shard_sizes=self._shard_sizes, seed=self._seed))
        requested = slice(positions.start - loaded.start, positions.stop - loaded.start)
        if isinstance(self.source, ArraySource):
            return partial(self._from_arrays, self.source, samples, resolution, requested)
        flips = self._policy.flips(samples) if self._policy.only_flips else None
        finish = partial(self._augment, samples, requested)
        return self._from_files(samples.indices, resolution, partial(self._boxes, samples), flips, finish)

    def _from_arrays(self, source: ArraySource, samples: Samples, resolution: int, requested: slice) -> Batch:
        images = source.images.index_select(0, self._staging.to_device(samples.indices))
        if self._policy.augmentation == "random_resized_crop":
            heights, widths = (np.full(len(images), side) for side in images.shape[2:])
            boxes = self._policy.boxes(samples, heights, widths)
            images = augment.crop_and_resize(images, self._staging.to_device(boxes), resolution)
            return self._augmented(self._policy.move_and_flip(images, samples), samples, requested)
        return self._augmented(
            augment.resize(self._policy.move_and_flip(images, samples), resolution), samples, requested
        )

    def _augment(self, samples: Samples, requested: slice, decoded: HostImages | DeviceImages) -> Batch:
        on_host, num_replaced = isinstance(decoded, HostImages), int(decoded.replaced[requested].sum())
        images = self._staging.to_device(decoded.pixels) if isinstance(decoded, HostImages) else decoded.images
        if not self._policy.only_flips:
            return self._augmented(self._policy.move_and_flip(images, samples), samples, requested, num_replaced)
        if on_host:
            images = self._flip_and_normalize(images, self._policy.flips(samples))
        return self._mixed(images, samples, requested, num_replaced)

    def _augmented(self, images: Tensor, samples: Samples, requested: slice, num_replaced: int = 0) -> Batch:
        """Returns the batch made of cropped and flipped images in [0, 255]."""
        images = self._policy.recolor(self._policy.auto_augmented(images, samples), samples)
        return self._mixed(self._normalize(images), samples, requested, num_replaced)

    def _mixed(self, images: Tensor, samples: Samples, requested: slice, num_replaced: int) -> Batch:
        """Returns the batch made of normalised images: erasing, then mixup or cutmix with the partners."""
        images = self._policy.randomly_erased(self._policy.cut_out(images, samples), samples)
        labels, count = self._labels(samples.indices), requested.stop - requested.start
        if not self._policy.mixes:
            return Batch(images, labels, count, num_replaced=num_replaced)
        mixed, weight = self._policy.mix(images, swap_pairs(images), samples)
        mixed, others = self.formatted(mixed[requested]), swap_pairs(labels)[requested]
        return Batch(mixed, labels[requested], count, others, weight[requested], num_replaced)

    def _samples(self, positions: range) -> Samples:
        epochs, indices = self._stream(positions.start, len(positions))
        if self._ends_epoch is None:
            return Samples(epochs, indices, np.ones(len(positions), dtype=np.bool_))
        return Samples(epochs, indices, np.asarray(positions, dtype=np.float64) < self._ends_epoch * len(self.source))

    def _stream(self, first: int, count: int) -> tuple[Int64, Int64]:
        """Epochs (or passes of a balanced order) and indices of the samples."""
        if self._balanced is not None:
            return self._balanced.samples(first, count)
        return stream_samples(
            first,
            count,
            num_samples=len(self.source),
            seed=self._seed,
            shuffle=self._shuffle,
            shard_sizes=self._shard_sizes,
        )

    def _boxes(self, samples: Samples, chunk: slice | Int64, heights: Int64, widths: Int64) -> Int64:
        return self._policy.boxes(samples.part(chunk), heights, widths)


def with_partners(positions: range) -> range:
    """Returns `positions`, extended at both ends so that it contains p XOR 1 for each p."""
    if not positions:
        return positions
    return range(positions.start & ~1, ((positions.stop - 1) | 1) + 1)


def swap_pairs(values: Tensor) -> Tensor:
    """Returns `values` with rows 2k and 2k + 1 exchanged; the number of rows must be even."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).view_as(values) if len(values) else values


def shard_sizes(source: Source) -> Sequence[int]:
    """Returns the number of samples in each shard; DataError if the source is not in shards."""
    sizes = None if isinstance(source, ArraySource) else source.shard_sizes
    if sizes is None:
        raise DataError("shard_local order needs a data set in shards (`megabatch data pack`); shard_local=False works")
    return sizes
