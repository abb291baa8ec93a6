"""A bounded folder of local copies of remote files, shared by all workers of a machine.

A file is fetched by one of them while the others that want it wait, appears under its name when it is whole and has
its checksum, and the one used longest ago makes room.
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

_BLOCK = 4 << 20
_ATTEMPTS = 3
_MAX_WAIT_S, _PAUSE_S = 600.0, 0.05
_LOCK_ENDING, PART_ENDING = ".lock", ".part"

T = TypeVar("T")


class FileCache:
    """Local copies of remote files, at most `max_bytes` of them, shared by processes and threads.

    Files that are being fetched count with all they will have. One that is deleted while a reader has it open takes
    its room until that reader lets go.

    Args:
        folder: where the copies lie; made if it is not there. Nothing else may be kept in it.
        fs: an fsspec file system.
    """

    def __init__(self, folder: Path | str, *, fs: Any, max_bytes: int) -> None:
        self._folder, self._fs, self._max_bytes = Path(folder).expanduser(), fs, max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, remote: "RemoteFile") -> Path:
        """Where the copy of a remote file lies, or will."""
        digest = hashlib.sha256(f"{remote.path}\n{remote.version}".encode()).hexdigest()[:16]
        return self._folder / f"{digest}-{posixpath.basename(remote.path)}"

    def fetch(self, remote: "RemoteFile", *, then: Callable[[Path], T], sha256: str | None = None) -> T:
        """What `then` makes of the local copy, which is fetched if it is not there.

        The copy stays while `then` runs; afterwards it may make room for another file at any time.

        Raises:
            FetchError: it cannot be fetched, is not of its size or checksum, or others leave it no room.
            SettingsError: it does not fit the cache.
        """
        path = self.path(remote)
        with _lock(path):
            if path.is_file() and path.stat().st_size == remote.num_bytes:
                os.utime(path)
            else:
                self._wait_for_room(remote.num_bytes, path)
                self._fetch(remote, path, sha256)
            return then(path)

    def _fetch(self, remote: "RemoteFile", path: Path, sha256: str | None) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._download(remote, path, sha256)
                return
            except Exception as error:  # every file system has errors of its own
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
            raise FetchError(f"{done} bytes came, {remote.num_bytes} were expected")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise FetchError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}; the copy there is damaged")
        with self._lock_all():  # whoever counts what lies here would meet it under neither name
            part.replace(path)

    def _wait_for_room(self, num_bytes: int, path: Path) -> None:
        """Claim room, when need be after what others are fetching has come and may be deleted."""
        if num_bytes > self._max_bytes:
            raise SettingsError(
                f"a file of {num_bytes} bytes does not fit a cache of {self._max_bytes}; "
                f"{num_bytes / (1 << 30):.3g} GiB and more work"
            )
        deadline = time.monotonic() + _MAX_WAIT_S
        while not self._make_room(num_bytes, path):
            if time.monotonic() > deadline:
                raise FetchError(
                    f"no room for {num_bytes} bytes in {self._folder}: other files are being fetched there"
                )
            time.sleep(_PAUSE_S)

    def _make_room(self, num_bytes: int, path: Path) -> bool:
        """Delete the copies used longest ago until the new one fits, then hold its place with a file of its size."""
        with self._lock_all():
            files = sorted(self._files(path))
            held = sum(size for _, size, _ in files)
            for _, size, file in files:
                if held + num_bytes > self._max_bytes and _delete(file):
                    held -= size
            if held + num_bytes > self._max_bytes:
                return False
            with path.with_name(path.name + PART_ENDING).open("wb") as claim:
                claim.truncate(num_bytes)
            return True

    def _lock_all(self) -> contextlib.AbstractContextManager[None]:
        """Whoever holds this may count the files: none comes, and none changes its name."""
        return _lock(self._folder / "cache")

    def _files(self, but: Path) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of what lies in the cache, except the file whose place is sought."""
        for file in self._folder.iterdir():
            if file.suffix == _LOCK_ENDING or file.name.removesuffix(PART_ENDING) == but.name:
                continue
            with contextlib.suppress(FileNotFoundError):  # what could not be fetched is given up at any time
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    yield status.st_mtime_ns, status.st_size, file


@dataclass(frozen=True)
class RemoteFile:
    """A file of a remote folder as it is there now; `version` changes when its content does, where that is known."""

    path: str
    num_bytes: int
    version: str


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process and thread at a time, for the files of this name. The lock of a process that dies is free."""
    with path.with_name(path.name + _LOCK_ENDING).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete(file: Path) -> bool:
    """Delete a copy, or what a dead process left of one; not what another process is fetching right now."""
    owner = file.with_name(file.name.removesuffix(PART_ENDING) + _LOCK_ENDING)
    with owner.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        file.unlink(missing_ok=True)
    return True
