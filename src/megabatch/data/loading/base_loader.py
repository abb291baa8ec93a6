"""Shared base of the training and the evaluation loader: threads, transfer to the device, pixels by index."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.cores import usable_cores
from megabatch.data.augment import ops as augment
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.jpeg.gpu_reader import GpuReader, ReadSamples
from megabatch.data.loading.arguments import check_arguments, check_pixel_statistics
from megabatch.data.loading.batch import Batch, Staging, wait_on_current_stream
from megabatch.data.loading.prefetch import after, in_flight, in_order, serial_threads
from megabatch.data.loading.read_ahead import ReadAhead
from megabatch.data.loading.reader import BadSamples, BatchReader, DrawBoxes, OnBadSample
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError, UserError
from megabatch.kernels.crop_resize import crop_and_resize
from megabatch.kernels.dispatch import use_triton

Int64 = NDArray[np.int64]
Replaced = NDArray[np.bool_]
Source: TypeAlias = ArraySource | EncodedSource
Request = TypeVar("Request")

CROPPED_AHEAD = 2
"""Batches that are decoded on a GPU and cropped, or being so, before they are finished."""


class HostImages(NamedTuple):
    """Decoded images in host memory, a quarter of the size of the normalised float32 batch."""

    pixels: Tensor  # [n, channels, resolution, resolution] uint8, channels last; pinned with a GPU
    replaced: Replaced  # [n]; True where another sample replaces an unreadable one


class DeviceImages(NamedTuple):
    """Crops on the GPU."""

    images: Tensor  # [n, channels, resolution, resolution], channels last: normalised, or as `ReadSamples.flips` says
    replaced: Replaced  # [n]
    ready: torch.cuda.Event | None = None  # behind the kernel that writes `images`, on the stream of the crops


class Undecoded(NamedTuple):
    """A batch that was read on the host, and what finishes it once a GPU has decoded and cropped its images."""

    samples: ReadSamples
    finish: Callable[[DeviceImages], Batch]


Work: TypeAlias = Callable[[], Batch]
"""Finishes a batch on the device."""
Futures: TypeAlias = Generator[Future["Work | Undecoded"], None, None]


class BaseLoader:
    """Base of `TrainLoader` and `EvalLoader`: images by index, normalised on the device, prefetched by threads.

    A batch is made in two stages. Threads read and decode files to uint8 in host memory, `prefetch_batches` ahead.
    Normalisation to `dtype` on the device happens when the batch is requested; on a GPU, one batch earlier. Where a GPU
    decodes, a thread and a stream of their own decode and crop up to `CROPPED_AHEAD` batches between the two stages.
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
        padded_channels: int | None = None,
        mixes: bool = False,
    ) -> None:
        """Of images that are mixed after normalisation (`mixes`), the mixture is rounded to `dtype`, in `formatted`."""
        _check_padding(padded_channels, image_channels, channels_last)
        check_arguments(
            image_channels=image_channels,
            dtype=dtype,
            decode_threads=decode_threads,
            prefetch_batches=prefetch_batches,
            max_bad_share=max_bad_share,
        )
        _check_channels(source, image_channels)
        check_pixel_statistics(pixel_mean, pixel_std, image_channels)
        self.source: Source = source.to(device) if isinstance(source, ArraySource) else source
        self._mean, self._std, self._channels = pixel_mean, pixel_std, image_channels
        self._dtype, self._padded = dtype, padded_channels or image_channels
        self._normalized_as = (torch.float32, image_channels) if mixes else (dtype, self._padded)
        self.channels_last = channels_last
        self._prefetch = int(prefetch_batches)
        # A GPU copies and normalises while the training step runs; on a CPU a batch finished early only costs memory.
        self._finished_ahead = 2 if torch.device(device).type == "cuda" else 1
        # Buffers: prefetched + queued + being normalised (as bytes), being normalised + held by the caller (as images).
        self._staging = Staging(torch.device(device), num_buffers=self._prefetch + 4)
        self._crops = Staging(torch.device(device), num_buffers=0)
        self._batch_threads = ThreadPoolExecutor(min(self._prefetch, 4), thread_name_prefix="megabatch-batch")
        self._finish_threads = serial_threads(self._finished_ahead, "megabatch-finish")
        self._decode_threads = ThreadPoolExecutor(
            decode_threads or usable_cores(), thread_name_prefix="megabatch-decode"
        )
        self._read_ahead = ReadAhead(source)
        self._num_replaced = 0
        self._bad: BadSamples | None = None
        self._gpu_reader: GpuReader | None = None
        self._gpu_thread: ThreadPoolExecutor | None = None
        if not isinstance(source, ArraySource):
            self._bad = BadSamples(source, max_share=max_bad_share, on_bad_sample=on_bad_sample)
            self._reader = BatchReader(
                source, channels=image_channels, executor=self._decode_threads, bad_samples=self._bad
            )
            if gpu_decoder is not None:
                self._gpu_thread = serial_threads(1, "megabatch-gpu-decode")
                self._gpu_reader = GpuReader(
                    source, decoder=gpu_decoder, host=self._reader, executor=self._decode_threads
                )

    @property
    def bad_samples(self) -> dict[int, str]:
        """Reason by index of each unreadable sample found so far, by this loader or passed to `learn_bad_samples`."""
        return self._bad.reasons() if self._bad is not None else {}

    def learn_bad_samples(self, reasons: Mapping[int, str]) -> None:
        """Adds the unreadable samples that other workers' loaders over the same source found.

        `on_bad_sample` is called once for each sample that is new to this loader, and not when the loader meets it.

        Raises:
            DataError: the bad samples now exceed `max_bad_share`.
        """
        if self._bad is not None:
            self._bad.merge(reasons)

    @property
    def num_replaced(self) -> int:
        """Number of replacements so far: samples in delivered batches that stand in for unreadable ones."""
        return self._num_replaced

    def close(self) -> None:
        """Stops the threads and drops prefetched batches. The source stays open."""
        self._finish_threads.shutdown(cancel_futures=True)
        if self._gpu_thread is not None:
            self._gpu_thread.shutdown(cancel_futures=True)
        if self._gpu_reader is not None:
            self._gpu_reader.release()
        self._batch_threads.shutdown(cancel_futures=True)
        self._decode_threads.shutdown(cancel_futures=True)

    def _labels(self, indices: Int64) -> Tensor:
        if isinstance(self.source, ArraySource):
            return self.source.labels[self._staging.to_device(indices)]
        return self._staging.to_device(np.asarray(self.source.labels[indices], dtype=np.int64))

    def _from_files(
        self,
        indices: Int64,
        resolution: int,
        draw_boxes: DrawBoxes,
        flips: NDArray[np.bool_] | None,
        finish: Callable[[HostImages | DeviceImages], Batch],
    ) -> Work | Undecoded:
        """Reads files, and decodes them unless a GPU will; `flips` as in `ReadSamples`."""
        if self._gpu_reader is not None:
            return Undecoded(self._gpu_reader.read(indices, resolution, draw_boxes, flips), finish)
        pixels = self._staging.host_images(len(indices), resolution, self._channels)
        replaced = self._reader.read(indices, resolution, draw_boxes, pixels.numpy())
        return partial(finish, HostImages(pixels.permute(0, 3, 1, 2), replaced))

    def _crop(self, work: Work | Undecoded) -> Work | Undecoded:
        """Decodes and crops on the GPU; for the thread that does so."""
        assert isinstance(work, Undecoded)
        assert self._gpu_reader is not None
        # Not the stream that finishes batches: a batch would wait there for the next one to be decoded.
        with self._crops.on_stream():
            dtype, channels = self._normalized_as
            options: dict[str, Any] = {"mean": self._mean, "std": self._std, "dtype": dtype}
            images = self._gpu_reader.crop(work.samples, **options, padded_channels=channels)
            images = images if self.channels_last else images.contiguous()
            crops = DeviceImages(images, work.samples.replaced, self._crops.event())
        return partial(_when_ready, work.finish, crops)

    def _load(self, work: Work | Undecoded) -> Batch:
        """Finishes one batch, without others ahead."""
        if self._gpu_thread is not None and isinstance(work, Undecoded):
            work = self._gpu_thread.submit(self._crop, work).result()
        return self._deliver(self._finish(work))

    def _finish(self, work: Work | Undecoded) -> Batch:
        assert not isinstance(work, Undecoded)
        return self._staging.run(work)

    def _normalize(self, images: Tensor) -> Tensor:
        out = self._new_images(images, *self._normalized_as)
        augment.normalize(images, self._mean, self._std, out[:, : self._channels])
        return out

    def _flip_and_normalize(self, pixels: Tensor, flips: NDArray[np.bool_]) -> Tensor:
        """As flip_some, then `_normalize`, of uint8 images with the channels last; one kernel on a GPU with Triton."""
        if not (len(pixels) and self.channels_last and use_triton(pixels, "auto")):
            return self._normalize(augment.flip_some(pixels, np.flatnonzero(flips).tolist()))
        size, (dtype, channels) = pixels.shape[2], self._normalized_as
        return crop_and_resize(
            list(pixels.permute(0, 2, 3, 1)),
            torch.tensor([0, 0, size, size]).expand(len(pixels), 4),
            size=size,
            mean=self._mean,
            std=self._std,
            flip=torch.from_numpy(flips),
            padded_channels=channels,
            dtype=dtype,
        )

    def formatted(self, images: Tensor) -> Tensor:
        """Normalised images on the device, in the dtype, memory format and number of channels of the batches."""
        if images.dtype == self._dtype and images.shape[1] == self._padded:
            return images
        out = self._new_images(images, self._dtype, self._padded)
        out[:, : self._channels] = images
        return out

    def _new_images(self, like: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
        """Images of the size of `like`, not initialised but for the padding channels, which are 0."""
        shape = torch.Size((len(like), channels, *like.shape[2:]))
        out = self._staging.device_images(shape, dtype, channels_last=self.channels_last)
        if channels > self._channels:
            out[:, self._channels :] = 0
        return out

    def _deliver(self, batch: Batch) -> Batch:
        self._num_replaced += batch.num_replaced
        return batch.wait_on_current_stream()

    def _prefetched(self, read: Callable[[Request], Work | Undecoded], requests: Iterable[Request]) -> Iterator[Batch]:
        """Yields batches in order; `read` does a request's work on the host and returns the work on the device."""
        with contextlib.ExitStack() as stages:
            ready: Futures = in_flight(read, requests, executor=self._batch_threads, depth=self._prefetch)
            stages.callback(ready.close)
            if self._gpu_thread is not None:
                stages.callback(self._release)
                ready = in_flight(after(self._crop), ready, executor=self._gpu_thread, depth=CROPPED_AHEAD)
                stages.callback(ready.close)
            batches = in_order(after(self._finish), ready, executor=self._finish_threads, depth=self._finished_ahead)
            stages.callback(batches.close)
            for batch in batches:
                yield self._deliver(batch)

    def _release(self) -> None:
        """Frees the decoded images of the last batches once they have been read, behind what is still decoded."""
        if self._gpu_thread is not None and self._gpu_reader is not None:
            with contextlib.suppress(RuntimeError):  # the loader is closed, and has released them
                self._gpu_thread.submit(self._gpu_reader.release)


def _when_ready(finish: Callable[[DeviceImages], Batch], crops: DeviceImages) -> Batch:
    wait_on_current_stream(crops.ready, crops.images)
    return finish(crops)


def _check_padding(padded_channels: int | None, image_channels: int, channels_last: bool) -> None:
    check_arguments(padded_channels=padded_channels)
    if padded_channels is not None and (padded_channels < image_channels or not channels_last):
        raise UserError(
            f"padded_channels={padded_channels}, channels_last={channels_last} were given for {image_channels} "
            "channels, needed: at least as many, with the channels last; padded_channels=4, channels_last=True works"
        )


def _check_channels(source: Source, image_channels: int) -> None:
    if not isinstance(source, ArraySource):
        if image_channels not in {1, 3}:
            raise DataError(f"image_channels={image_channels} was given; files decode to 1 (grey) or 3 (RGB) channels")
    elif source.images.shape[1] != image_channels:
        have = source.images.shape[1]
        raise DataError(
            f"image_channels={image_channels} was given, the images have {have} channels; image_channels={have} works"
        )
