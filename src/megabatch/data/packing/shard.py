"""One shard of a packed data set: written with its checksum and index, or kept if it is already complete."""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megabatch.data.jpeg.decode import decode, image_size
from megabatch.data.jpeg.formats import preferred_ending, sniff
from megabatch.data.packing.input import Part
from megabatch.data.sources.tar.tar_index import build_index, index_path, open_index, write_index
from megabatch.errors import DataError
from megabatch.files import replacing, sha256_of

DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Options:
    """Re-encoding options of `pack`. Their repr is part of a shard's `plan`: renaming one invalidates old shards."""

    max_side: int | None
    quality: int | None
    skip_bad: bool


@dataclass(frozen=True)
class Shard:
    """One tar to write."""

    path: Path
    part: Part
    samples: npt.NDArray[np.int64]  # sorted by key
    plan: str  # SHA-256 of the options and of each sample's key, label and size


@dataclass(frozen=True)
class FinishedShard:
    """A shard on disk."""

    header: dict[str, Any]  # of its index
    num_bytes: int
    num_samples: int
    was_kept: bool  # written by an earlier call


def make_shard(shard: Shard, options: Options, on_samples: Callable[[int], None]) -> FinishedShard:
    """Writes a shard and its index, or keeps the one that an earlier call finished.

    `on_samples` receives the number of samples just finished.

    Raises:
        DataError: an image that must be re-encoded cannot be decoded, and `skip_bad` is False.
    """
    kept = _kept(shard)
    if kept is not None:
        on_samples(len(shard.samples))
        return kept
    index_path(shard.path).unlink(missing_ok=True)  # first, so that an old index never describes a new tar
    with replacing(shard.path) as unfinished:
        with unfinished.open("wb") as file:
            sums = _write_tar(shard, options, file, on_samples)
        index = build_index(unfinished, extra={"plan": shard.plan, **sums})
    write_index(index, index_path(shard.path))
    return FinishedShard(index.header, shard.path.stat().st_size, len(index), False)


def _kept(shard: Shard) -> FinishedShard | None:
    """The existing shard if it has the same plan and its bytes match the checksum, otherwise None."""
    if not shard.path.is_file() or not index_path(shard.path).is_file():
        return None
    with contextlib.suppress(DataError):
        index = open_index(shard.path)
        if index.header.get("plan") == shard.plan and index.header.get("tar_sha256") == sha256_of(shard.path):
            return FinishedShard(index.header, shard.path.stat().st_size, len(index), True)
    return None


class _HashingWriter(io.RawIOBase):
    """A file that computes the SHA-256 of everything written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _write_tar(shard: Shard, options: Options, file: IO[bytes], on_samples: Callable[[int], None]) -> dict[str, Any]:
    """Writes the samples; returns the fields that go into the index's header."""
    skipped, num_reencoded = [], 0
    writer = _HashingWriter(file)
    with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for i in shard.samples.tolist():
            data, reason = _stored_bytes(shard.part, i, options)
            if data is None:
                skipped.append([shard.part.source.name(i), reason])
            else:
                num_reencoded += reason == "re-encoded"
                ending = preferred_ending(data) or "jpg"
                _add(tar, f"{shard.part.keys[i]}.{ending}", data)
                _add(tar, f"{shard.part.keys[i]}.cls", str(int(shard.part.source.labels[i])).encode())
            on_samples(1)
    return {"tar_sha256": writer.digest.hexdigest(), "skipped": skipped, "reencoded": num_reencoded}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _stored_bytes(part: Part, index: int, options: Options) -> tuple[bytes | None, str]:
    """The bytes to store and "kept" or "re-encoded"; None and the reason if the sample is skipped."""
    try:
        original = part.source.read(index)
        stored = reencode(original, max_side=options.max_side, quality=options.quality)
    except DataError as error:
        if options.skip_bad:
            return None, str(error)
        name = part.source.name(index)
        raise DataError(f"{name}: {error}; remove it, or skip such files with skip_bad=True (--skip-bad)") from error
    return stored, "kept" if stored is original else "re-encoded"


def reencode(data: bytes, *, max_side: int | None, quality: int | None) -> bytes:
    """Re-encodes an image as a JPEG with no side above `max_side` pixels.

    Returns `data` itself if neither option applies, or if it is a JPEG that need not be reduced and would not shrink.

    Raises:
        DataError: the image cannot be decoded.
    """
    if max_side is None and quality is None:
        return data
    height, width = image_size(data)
    scale = 1.0 if max_side is None else min(1.0, max_side / max(height, width))
    if scale == 1.0 and quality is None:
        return data
    image = Image.fromarray(decode(data))
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality or DEFAULT_QUALITY)
    smaller = buffer.tell() < len(data) or scale < 1.0 or sniff(data) != "jpeg"
    return buffer.getvalue() if smaller else data
