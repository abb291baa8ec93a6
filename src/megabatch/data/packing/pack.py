"""Packs a data set into indexed tar shards that any WebDataset reader can read.

The output is a function of the input and the options, byte for byte: a fixed permutation assigns samples to shards
(parquet is read by row group and keeps its order), samples within a shard are sorted by key, and no times or owners
are stored. Any number of threads therefore writes the same files, and an interrupted run is resumed: a shard that
exists, was made from the same samples with the same options and matches its checksum is kept.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megabatch.cores import usable_cores
from megabatch.data.loading.order import permute
from megabatch.data.packing.input import Part, open_parts
from megabatch.data.packing.shard import DEFAULT_QUALITY, FinishedShard, Options, Shard, make_shard
from megabatch.data.sources.tar.shards import CLASSES_FILE
from megabatch.errors import DataError
from megabatch.files import write_text

MANIFEST_FILE = "manifest.json"
DEFAULT_SHARD_BYTES = 256 << 20
OnProgress = Callable[[int, int], None]
"""Receives the number of samples done and the total; called from worker threads, one call at a time."""

_TAR_BLOCK = 512


@dataclass(frozen=True)
class PackReport:
    """Contents of the folder after packing."""

    folder: Path
    num_samples: dict[str, int]
    num_shards: int
    num_bytes: int
    num_kept_shards: int  # written by an earlier call
    num_reencoded: int
    class_names: tuple[str, ...]
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)


def pack(
    src: Path | str,
    dst: Path | str,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_side: int | None = None,
    quality: int | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Packs a folder of images, a tar or parquet files into `dst`: shards PART-000000.tar etc., indices, class names.

    By default image files are stored unchanged. With `max_side`, an image with a longer side is reduced to it (never
    enlarged) and stored as a JPEG of `quality`, 90 if not given. With `quality`, every image becomes a JPEG of that
    quality, except JPEGs that would not shrink.

    Args:
        shard_bytes: a shard is closed once its samples, as stored in `src`, reach this many bytes.
        max_side: longest side of a stored image, in pixels.
        quality: JPEG quality, 1 to 100.
        skip_bad: skip and report images that cannot be decoded; otherwise they raise `DataError` when re-encoding.
        workers: number of threads; by default one per core.

    Raises:
        DataError: `src` holds no images, `dst` holds other shards or is inside `src`, an option is out of range, or an
            image that must be re-encoded cannot be decoded.
    """
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    _check_arguments(src, dst, shard_bytes, max_side, quality)
    options = Options(max_side, quality, skip_bad)
    parts = open_parts(src)
    class_names = parts[0].source.class_names
    _check_class_names(class_names)
    shards = [shard for part in parts for shard in _plan_shards(part, dst, shard_bytes, options)]
    with _folder_for_shards(dst):
        _check_for_other_shards(dst, shards)
        progress = _Progress(sum(len(shard.samples) for shard in shards), on_progress)
        done = _make_all(shards, options, progress, workers or usable_cores())
        write_text(dst / CLASSES_FILE, "".join(f"{name}\n" for name in class_names))
        write_text(dst / MANIFEST_FILE, _manifest(shards, done, options, class_names))
    return _report(dst, shards, done, class_names)


@contextlib.contextmanager
def _folder_for_shards(dst: Path) -> Iterator[None]:
    """Creates the folder; removes it again if the block fails before there is a file in it."""
    dst.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds files
            dst.rmdir()
        raise


def _check_arguments(src: Path, dst: Path, shard_bytes: int, max_side: int | None, quality: int | None) -> None:
    if dst.resolve() == src.resolve() or src.resolve() in dst.resolve().parents:
        raise DataError(f"{dst} is inside {src} and would be read as part of it; choose a folder outside it")
    if dst.exists() and not dst.is_dir():
        raise DataError(f"{dst} is a file; needed: a folder to write shards to")
    if shard_bytes < 1:
        raise DataError(f"shard_bytes={shard_bytes} must be at least 1, for example {DEFAULT_SHARD_BYTES}")
    if max_side is not None and max_side < 1:
        raise DataError(f"max_side={max_side} must be at least 1, for example 500")
    if quality is not None and not 1 <= quality <= 100:
        raise DataError(f"quality={quality} must be from 1 to 100, for example {DEFAULT_QUALITY}")


def _plan_shards(part: Part, dst: Path, shard_bytes: int, options: Options) -> list[Shard]:
    """Assigns the samples of a part to shards of about `shard_bytes` each."""
    order = np.arange(len(part.source))
    if part.random_access:
        order = permute(order, num_samples=len(order), seed=0, epoch=0)
    # Image rounded up to whole blocks, plus two headers and a block for the label.
    stored = -(-part.sizes[order] // _TAR_BLOCK) * _TAR_BLOCK + 3 * _TAR_BLOCK
    ends = np.cumsum(stored)
    shard_of = (ends - stored) // shard_bytes
    groups = np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)
    return [_shard(part, dst / f"{part.name}-{number:06d}.tar", group, options) for number, group in enumerate(groups)]


def _shard(part: Part, path: Path, samples: npt.NDArray[np.int64], options: Options) -> Shard:
    ordered = np.array(sorted(samples.tolist(), key=lambda i: part.keys[i]), dtype=np.int64)
    plan = hashlib.sha256(repr(options).encode())
    for i in ordered.tolist():
        plan.update(f"\n{part.keys[i]}\t{part.source.labels[i]}\t{part.sizes[i]}".encode())
    return Shard(path, part, ordered, plan.hexdigest())


def _check_for_other_shards(dst: Path, shards: Sequence[Shard]) -> None:
    """Rejects a folder with shards of another data set: they would be read as part of this one."""
    planned = {shard.path for shard in shards}
    others = sorted(path for path in dst.glob("*.tar") if path not in planned)
    if others:
        raise DataError(f"{dst} holds {others[0].name}, which is not a shard of this data set; choose an empty folder")


def _check_class_names(class_names: Sequence[str]) -> None:
    for name in class_names:
        if name != name.strip() or "\n" in name or "\r" in name:
            raise DataError(
                f"the class name {name!r} cannot be stored as a line of {CLASSES_FILE}: it contains a line break, or "
                "starts or ends with white space; rename it, for example to 'dog'"
            )


class _Progress:
    """Counts finished samples; after a failure, raises `CancelledError` in the other threads at their next sample."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress
        self._lock = threading.Lock()
        self._stopped = False

    def add(self, samples: int) -> None:
        with self._lock:
            if self._stopped:
                raise CancelledError
            self._done += samples
            try:
                if self._on_progress is not None:
                    self._on_progress(self._done, self._total)
            except BaseException:
                self._stopped = True
                raise

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


def _make_all(shards: Sequence[Shard], options: Options, progress: _Progress, workers: int) -> list[FinishedShard]:
    """Makes all shards in parallel. The first failure is raised and stops the other threads at their next sample."""
    with ThreadPoolExecutor(workers) as threads:
        tasks = [threads.submit(make_shard, shard, options, progress.add) for shard in shards]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            failures = [error for task in done if (error := task.exception()) is not None]
            # A thread that was only cancelled must not hide the cause.
            for failure in sorted(failures, key=lambda error: isinstance(error, CancelledError)):
                raise failure
        except BaseException:
            progress.stop()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        return [task.result() for task in tasks]


def _manifest(
    shards: Sequence[Shard], done: Sequence[FinishedShard], options: Options, class_names: Sequence[str]
) -> str:
    files = {
        shard.path.name: {"bytes": made.num_bytes, "samples": made.num_samples, "sha256": made.header["tar_sha256"]}
        for shard, made in zip(shards, done, strict=True)
    }
    record = {
        "format": "megabatch pack 1",
        "max_side": options.max_side,
        "quality": options.quality,
        "classes": list(class_names),
        "shards": files,
        "skipped": [skipped for made in done for skipped in made.header["skipped"]],
    }
    return json.dumps(record, indent=1, ensure_ascii=True) + "\n"


def _report(
    dst: Path, shards: Sequence[Shard], done: Sequence[FinishedShard], class_names: tuple[str, ...]
) -> PackReport:
    num_samples: dict[str, int] = {}
    for shard, made in zip(shards, done, strict=True):
        num_samples[shard.part.name] = num_samples.get(shard.part.name, 0) + made.num_samples
    return PackReport(
        folder=dst,
        num_samples=num_samples,
        num_shards=len(shards),
        num_bytes=sum(made.num_bytes for made in done),
        num_kept_shards=sum(made.was_kept for made in done),
        num_reencoded=sum(made.header["reencoded"] for made in done),
        class_names=class_names,
        skipped=[(name, reason) for made in done for name, reason in made.header["skipped"]],
    )
