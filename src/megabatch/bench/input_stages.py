"""Measures the throughput of each input stage on one core, finds the bottleneck, and advises how to speed it up."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megabatch.cores import usable_cores
from megabatch.data.augment import crops
from megabatch.data.augment import ops as augment
from megabatch.data.jpeg import library as jpeg_library
from megabatch.data.jpeg.decode import MAX_PIXELS, decode, decode_crop, image_size, resize_box
from megabatch.data.jpeg.formats import sniff
from megabatch.data.jpeg.gpu import has_torchvision
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.packing.shard import reencode
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]
_MIN_ROUNDS = 3
NUM_REDUCED = 64

READ, DECODE_CROP, AUGMENT, COPY = "read", "decode at the crop", "augment", "copy"
WHOLE, CROP = "decode whole", "crop and resize"
HOW_TO_COMPILE = (
    "`python -m megabatch.data.jpeg.library` builds the compiled decoder, which is over twice as fast; this needs a C "
    "compiler, for example gcc"
)
OnProgress = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """Times of one stage, per image, over several rounds."""

    name: str
    cpu_s: float  # processor time, median
    cpu_s_quartiles: tuple[float, float]
    wall_s: float  # wall-clock time, median

    @property
    def images_per_core_s(self) -> float:
        """Throughput of one core that runs only this stage, in images per second."""
        return 1 / max(self.cpu_s, 1e-9)


@dataclass(frozen=True)
class InputReport:
    """Times of all stages and of the whole loader, the bottleneck, and advice."""

    stages: list[Stage]
    compared: list[Stage]  # alternatives that training does not run
    loader_images_per_s: float
    num_threads: int
    bottleneck: str  # name of the slowest stage
    advice: list[str]
    image_bytes: float  # mean size of a file
    image_pixels: float  # mean number of pixels
    compiled_share: float | None
    """Share of images that the compiled decoder supports (baseline JPEGs); None if it is not built."""


@dataclass(frozen=True)
class _Sample:
    data: bytes
    height: int
    width: int


def measure_input(
    source: EncodedSource,
    *,
    resolution: int = 224,
    num_images: int = 256,
    seconds: float = 2.0,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> InputReport:
    """Times the input pipeline from stored bytes to a normalised batch, stage by stage, on this machine.

    Stages run on one core and are measured in processor time, which other work on the machine hardly affects. Each is
    repeated for about `seconds`, on `num_images` samples spread over the data set. The whole loader is measured in
    wall-clock time.

    Args:
        on_progress: receives the name of each stage before it is timed.

    Raises:
        DataError: no sample can be decoded.
    """
    report_stage = on_progress or (lambda _: None)
    indices = np.unique(np.linspace(0, len(source) - 1, min(num_images, len(source))).astype(np.int64))
    samples = list(_decodable_samples(source, indices))
    if not samples:
        raise DataError(f"none of {len(indices)} samples can be decoded; `megabatch data check` gives the reasons")
    timed = {}
    with _one_torch_thread():
        for name, (work, count) in _stage_work(source, indices, samples, resolution).items():
            report_stage(name)
            timed[name] = _measure(name, work, count, seconds)
    report_stage("loader")
    num_threads = threads or usable_cores()
    stages = [timed[name] for name in (READ, DECODE_CROP, AUGMENT, COPY)]
    # Reading may wait for the disk, which costs wall-clock time but no processor time.
    bottleneck = max(stages, key=lambda stage: stage.wall_s if stage.name == READ else stage.cpu_s).name
    return InputReport(
        stages=stages,
        compared=[timed[name] for name in (WHOLE, CROP)],
        loader_images_per_s=_loader_rate(source, resolution, len(samples), seconds, num_threads),
        num_threads=num_threads,
        bottleneck=bottleneck,
        advice=_advice(bottleneck, timed[READ], samples, source, resolution),
        image_bytes=statistics.mean(len(sample.data) for sample in samples),
        image_pixels=statistics.mean(sample.height * sample.width for sample in samples),
        compiled_share=_compiled_share(samples, resolution),
    )


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limits torch to one thread, so that a stage uses one core and no processor time is spent on waiting threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _stage_work(
    source: EncodedSource, indices: NDArray[np.int64], samples: Sequence[_Sample], resolution: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """For each stage, a function that runs one round, and its number of images. Buffers are reused as in the loader."""
    boxes = _boxes(samples)
    batch = np.empty((len(samples), resolution, resolution, 3), dtype=np.uint8)
    target = np.empty_like(batch)
    decoded = [(decode(sample.data), box) for sample, box in zip(samples[:32], boxes, strict=False)]
    return {
        READ: (lambda: _each(source.read, indices.tolist()), len(indices)),
        DECODE_CROP: (lambda: _decode_crops(samples, boxes, batch), len(samples)),
        WHOLE: (lambda: _each(lambda sample: decode(sample.data), samples), len(samples)),
        CROP: (lambda: _each(lambda pair: resize_box(*pair, batch.shape[1:3]), decoded), len(decoded)),
        AUGMENT: (_augment(batch), len(batch)),
        COPY: (lambda: np.copyto(target, batch), len(batch)),
    }


def _each(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Calls `work` for each item and drops the results: keeping them would cost more time than computing them."""
    for item in items:
        work(item)


def _measure(name: str, work: Callable[[], object], num_images: int, seconds: float) -> Stage:
    """Processor time of the whole process and wall-clock time, per image, after one warm-up round."""
    work()
    cpu: list[float] = []
    wall: list[float] = []
    while sum(wall) * num_images < seconds or len(wall) < _MIN_ROUNDS:
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        work()
        cpu.append((time.process_time() - cpu_start) / num_images)
        wall.append((time.perf_counter() - wall_start) / num_images)
    first, _, third = statistics.quantiles(cpu, n=4, method="inclusive")
    return Stage(name, statistics.median(cpu), (first, third), statistics.median(wall))


def _decodable_samples(source: EncodedSource, indices: NDArray[np.int64]) -> Iterator[_Sample]:
    for index in indices.tolist():
        try:
            data = source.read(index)
            decode(data)
            yield _Sample(data, *image_size(data))
        except DataError:
            continue


def _boxes(samples: Sequence[_Sample]) -> list[tuple[int, int, int, int]]:
    heights, widths = (np.array([getattr(sample, side) for sample in samples]) for side in ("height", "width"))
    epochs, numbers = np.zeros(len(samples), dtype=np.int64), np.arange(len(samples))
    drawn = crops.random_resized_crop_boxes(heights, widths, seed=0, epochs=epochs, samples=numbers)
    return [(int(top), int(left), int(height), int(width)) for top, left, height, width in drawn.tolist()]


def _decode_crops(
    samples: Sequence[_Sample], boxes: Sequence[tuple[int, int, int, int]], batch: NDArray[np.uint8]
) -> None:
    for sample, box, out in zip(samples, boxes, batch, strict=True):
        decode_crop(sample.data, box=box, size=batch.shape[1], out=out)


def _compiled_share(samples: Sequence[_Sample], resolution: int) -> float | None:
    if not jpeg_library.is_available():
        return None
    out = np.empty((resolution, resolution, 3), dtype=np.uint8)
    supported = [
        jpeg_library.crop(sample.data, box, channels=3, max_pixels=MAX_PIXELS, out=out)
        for sample, box in zip(samples, _boxes(samples), strict=True)
    ]
    return sum(supported) / len(supported)


def _augment(batch: NDArray[np.uint8]) -> Callable[[], object]:
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2)
    out = torch.empty(pixels.shape).to(memory_format=torch.channels_last)
    every_other = list(range(0, len(batch), 2))
    return lambda: augment.normalize(augment.flip_some(pixels, every_other), _MEAN, _STD, out)


def _loader_rate(source: EncodedSource, resolution: int, batch_size: int, seconds: float, threads: int) -> float:
    """Throughput of the loader that training uses with `threads` decoding threads, in images per second."""
    loader = TrainLoader(
        source,
        seed=0,
        augmentation="random_resized_crop",
        pixel_mean=_MEAN,
        pixel_std=_STD,
        channels_last=True,
        decode_threads=threads,
        max_bad_share=1.0,
    )
    requests = ((range(start, start + batch_size), resolution) for start in range(0, 10**9, batch_size))
    batches = loader.batches(requests)
    try:
        next(batches)  # warm-up
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            done += batch_size
        return done / (time.perf_counter() - start)
    finally:
        batches.close()  # type: ignore[attr-defined]
        loader.close()


def _advice(
    bottleneck: str, read: Stage, samples: Sequence[_Sample], source: EncodedSource, resolution: int
) -> list[str]:
    if bottleneck == READ:
        return list(_advice_on_reading(read, source))
    if bottleneck == DECODE_CROP:
        return [*_advice_on_decoding(samples, resolution), *_advice_on_hardware()]
    if bottleneck == AUGMENT:
        return ["augment on a GPU; on a CPU, recipes without colour jitter and mixing cost less"]
    return ["memory bandwidth is the limit; smaller batches that fit into the caches may help"]


def _advice_on_reading(read: Stage, source: EncodedSource) -> Iterator[str]:
    if source.shard_sizes is None:
        yield "`megabatch data pack` packs the files into shards, which are opened once and read sequentially"
    if read.wall_s > 2 * read.cpu_s:
        yield "the disk is the limit: use a faster or local one, or enough memory to cache the data set"
        if source.shard_sizes is not None:
            yield "`--set shard_local=true` reads only a few shards at a time, sequentially"


def _advice_on_decoding(samples: Sequence[_Sample], resolution: int) -> Iterator[str]:
    if not jpeg_library.is_available():
        yield HOW_TO_COMPILE
    if target := _smaller_side(samples, resolution):
        yield f"most images are over twice as large: `megabatch data pack --max-side {target}` reduces them"
    others = sum(not _is_baseline(sample.data) for sample in samples) / len(samples)
    if others > 0.2:
        yield (
            f"{others:.0%} of the images are progressive JPEGs or other formats, which decode slowly: "
            "`megabatch data pack --quality 90` re-encodes them"
        )


def _smaller_side(samples: Sequence[_Sample], resolution: int) -> int | None:
    """Longest side that suffices for crops of `resolution`; None if half of the images are not much larger."""
    side = statistics.median(max(sample.height, sample.width) for sample in samples)
    return max(50, 50 * round(2.2 * resolution / 50)) if side > 2.5 * resolution else None


def measure_reduction(source: EncodedSource, *, resolution: int, seconds: float) -> tuple[int, float] | None:
    """Longest side to which `megabatch data pack` should reduce the images, and decoding time after it over before.

    None if they are small already. Times `NUM_REDUCED` images on one core.

    Raises:
        DataError: no sample can be decoded.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, min(NUM_REDUCED, len(source))).astype(np.int64))
    samples = list(_decodable_samples(source, indices))
    if not samples:
        raise DataError(f"none of {len(indices)} samples can be decoded; `megabatch data check` gives the reasons")
    side = _smaller_side(samples, resolution)
    if side is None:
        return None
    smaller = [reencode(sample.data, max_side=side, quality=None) for sample in samples]
    batch = np.empty((len(samples), resolution, resolution, 3), dtype=np.uint8)
    before, after = (
        _measure("", functools.partial(_decode_crops, group, _boxes(group), batch), len(group), seconds)
        for group in (samples, [_Sample(data, *image_size(data)) for data in smaller])
    )
    return side, after.cpu_s / before.cpu_s


def _advice_on_hardware() -> Iterator[str]:
    yield "use more cores: decoding scales with their number"
    if torch.cuda.is_available():
        yield "`--decode gpu` decodes on the GPU" + ("" if has_torchvision() else " once torchvision is installed")


def _is_baseline(data: bytes) -> bool:
    return sniff(data) == "jpeg" and b"\xff\xc2" not in data[:8192]
