"""Bounded folder of local copies of remote files, shared by all workers of a machine.

One worker fetches a file while others that need it wait. A file gets its name once it is complete and its checksum is
verified. The least recently used files are evicted.
"""

import contextlib
import fcntl
import hashlib
import os
import posixpath
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megabatch.errors import FetchError, SettingsError
from megabatch.files import locked

_BLOCK = 4 << 20
_ATTEMPTS = 3
_MAX_WAIT_S, _PAUSE_S = 600.0, 0.05
_LOCK_ENDING, PART_ENDING = ".lock", ".part"

T = TypeVar("T")


class FileCache:
    """LRU cache of remote files on the local disk, shared by processes and threads.

    A file in flight counts with its full size. A file that is evicted while a reader has it open uses disk space until
    the reader closes it.

    Args:
        folder: folder of the copies; created if it does not exist. It must not contain other files.
        fs: an fsspec file system.
        max_bytes: largest total size of the copies, in bytes.
    """

    def __init__(self, folder: Path | str, *, fs: Any, max_bytes: int) -> None:
        self._folder, self._fs, self._max_bytes = Path(folder).expanduser(), fs, max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, remote: "RemoteFile") -> Path:
        """Returns the path of a remote file's copy, which need not exist."""
        digest = hashlib.sha256(f"{remote.path}\n{remote.version}".encode()).hexdigest()[:16]
        return self._folder / f"{digest}-{posixpath.basename(remote.path)}"

    def fetch(self, remote: "RemoteFile", *, then: Callable[[Path], T], sha256: str | None = None) -> T:
        """Returns `then(path)` for the local copy, which is fetched if it is not in the cache.

        The copy is not evicted while `then` runs, but may be at any time afterwards.

        Raises:
            FetchError: the file cannot be fetched in three attempts, has another size or checksum, or files in flight
                left no space for ten minutes.
            SettingsError: the file is larger than the cache.
        """
        path = self.path(remote)
        with locked(_lock_of(path)):
            if path.is_file() and path.stat().st_size == remote.num_bytes:
                os.utime(path)
            else:
                self._wait_for_space(remote.num_bytes, path)
                self._fetch(remote, path, sha256)
            return then(path)

    def _fetch(self, remote: "RemoteFile", path: Path, sha256: str | None) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._download(remote, path, sha256)
                return
            except Exception as error:  # each fsspec file system raises its own errors
                if attempt == _ATTEMPTS:
                    path.with_name(path.name + PART_ENDING).unlink(missing_ok=True)
                    raise FetchError(f"{remote.path} could not be fetched: {error}") from error

    def _download(self, remote: "RemoteFile", path: Path, sha256: str | None) -> None:
        part = path.with_name(path.name + PART_ENDING)
        digest, done = hashlib.sha256(), 0
        with part.open("r+b") as file, self._fs.open(remote.path, "rb") as source:
            while block := source.read(_BLOCK):
                digest.update(block)
                done += file.write(block)
        if done != remote.num_bytes:
            raise FetchError(f"received {done} bytes, expected {remote.num_bytes}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise FetchError(f"its SHA-256 is {digest.hexdigest()}, expected {sha256}; the remote copy is corrupt")
        with self._lock_listing():  # a concurrent count of the folder could miss the file under both names
            part.replace(path)

    def _wait_for_space(self, num_bytes: int, path: Path) -> None:
        """Reserves disk space; waits if only files that are in flight could be evicted."""
        if num_bytes > self._max_bytes:
            raise SettingsError(
                f"a file of {num_bytes} bytes does not fit a cache of {self._max_bytes} bytes; "
                f"{num_bytes / (1 << 30):.3g} GiB or more works"
            )
        deadline = time.monotonic() + _MAX_WAIT_S
        while not self._make_space(num_bytes, path):
            if time.monotonic() > deadline:
                raise FetchError(
                    f"no space for {num_bytes} bytes in {self._folder}: files in flight use it; a larger cache works"
                )
            time.sleep(_PAUSE_S)

    def _make_space(self, num_bytes: int, path: Path) -> bool:
        """Evicts least recently used copies until the new one fits, then reserves space with a file of its size."""
        with self._lock_listing():
            files = sorted(self._list_files(path))
            used = sum(size for _, size, _ in files)
            for _, size, file in files:
                if used + num_bytes > self._max_bytes and _delete(file):
                    used -= size
            if used + num_bytes > self._max_bytes:
                return False
            with path.with_name(path.name + PART_ENDING).open("wb") as claim:
                claim.truncate(num_bytes)
            return True

    def _lock_listing(self) -> contextlib.AbstractContextManager[None]:
        """Lock under which no file is added to the folder or renamed, so that its files can be counted."""
        return locked(_lock_of(self._folder / "cache"))

    def _list_files(self, excluded: Path) -> Iterator[tuple[int, int, Path]]:
        """Yields (time of last use in ns, bytes, path) of each file in the cache, except those of the new file."""
        for file in self._folder.iterdir():
            if file.suffix == _LOCK_ENDING or file.name.removesuffix(PART_ENDING) == excluded.name:
                continue
            with contextlib.suppress(FileNotFoundError):  # a failed fetch may delete its file at any time
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    yield status.st_mtime_ns, status.st_size, file


@dataclass(frozen=True)
class RemoteFile:
    """A remote file in its present version; `version` changes with the content, if the server reports such a value."""

    path: str
    num_bytes: int
    version: str


def _delete(file: Path) -> bool:
    """Deletes a copy, or the partial file of a dead process; returns False if another process is fetching it."""
    owner = file.with_name(file.name.removesuffix(PART_ENDING) + _LOCK_ENDING)
    with owner.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        file.unlink(missing_ok=True)
    return True


def _lock_of(path: Path) -> Path:
    """Lock file of the cached file `path`."""
    return path.with_name(path.name + _LOCK_ENDING)
