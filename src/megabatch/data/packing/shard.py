"""One shard of a packed data set: written with its checksum and index, or kept if it is there already."""

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
from megabatch.data.sources.tar_index import build_index, index_path, open_index, write_index
from megabatch.errors import DataError

DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Options:
    max_side: int | None
    quality: int | None
    skip_bad: bool


@dataclass(frozen=True)
class Shard:
    """One tar to be written: which samples, in the order of their keys, and a checksum of that plan."""

    path: Path
    part: Part
    samples: npt.NDArray[np.int64]
    plan: str


@dataclass(frozen=True)
class Made:
    """A finished shard; `header` is that of its index."""

    header: dict[str, Any]
    num_bytes: int
    num_samples: int
    was_there: bool


def make_shard(shard: Shard, options: Options, on_samples: Callable[[int], None]) -> Made:
    """Write a shard and its index, or keep the one that an earlier call finished.

    Raises:
        DataError: an image that is to be re-encoded cannot be decoded, unless such are skipped.
    """
    kept = _kept(shard)
    if kept is not None:
        on_samples(len(shard.samples))
        return kept
    index_path(shard.path).unlink(missing_ok=True)
    unfinished = shard.path.with_name(shard.path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            sums = _write_tar(shard, options, file, on_samples)
        extra = {"plan": shard.plan, **sums}
        index = build_index(unfinished, extra=extra)
        unfinished.replace(shard.path)
    finally:
        unfinished.unlink(missing_ok=True)
    write_index(index, index_path(shard.path))
    return Made(index.header, shard.path.stat().st_size, len(index), False)


def _kept(shard: Shard) -> Made | None:
    """The shard, if it is already there, of the same plan, with the bytes that were written then."""
    if not shard.path.is_file() or not index_path(shard.path).is_file():
        return None
    with contextlib.suppress(DataError):
        index = open_index(shard.path)
        if index.header.get("plan") == shard.plan and index.header.get("tar_sha256") == file_sha256(shard.path):
            return Made(index.header, shard.path.stat().st_size, len(index), True)
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Summed(io.RawIOBase):
    """A file that sums what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _write_tar(shard: Shard, options: Options, file: IO[bytes], on_samples: Callable[[int], None]) -> dict[str, Any]:
    """Write the samples; what the index's header shall remember of it."""
    skipped, num_reencoded = [], 0
    summed = _Summed(file)
    with tarfile.open(fileobj=summed, mode="w|", format=tarfile.PAX_FORMAT) as tar:
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
    return {"tar_sha256": summed.digest.hexdigest(), "skipped": skipped, "reencoded": num_reencoded}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _stored_bytes(part: Part, index: int, options: Options) -> tuple[bytes | None, str]:
    """The bytes to store and what was done, or None and why not."""
    try:
        original = part.source.read(index)
        stored = reencode(original, max_side=options.max_side, quality=options.quality)
    except DataError as error:
        if options.skip_bad:
            return None, str(error)
        name = part.source.name(index)
        raise DataError(f"{name}: {error}; remove it, or leave out such files with skip_bad=True") from error
    return stored, "kept" if stored is original else "re-encoded"


def reencode(data: bytes, *, max_side: int | None, quality: int | None) -> bytes:
    """A JPEG of at most `max_side` pixels a side; `data` itself where nothing is asked or nothing gained.

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
