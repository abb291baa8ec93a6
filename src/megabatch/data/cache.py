"""Tar shards kept elsewhere (s3://, gs://, https:// and whatever fsspec opens), read through a bounded local cache.

Needs fsspec (`pip install megabatch[remote]`, and what fsspec needs for the protocol). All workers of a machine share
the cache: a shard is fetched by one of them while the others that want it wait, appears under its name when it is
whole and has its checksum, and the one used longest ago makes room. With the loader's shard-local order each shard
comes once an epoch; `will_read` fetches ahead.
"""

import contextlib
import fcntl
import hashlib
import os
import posixpath
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megabatch.data.shards import CLASSES_FILE, IndexedShards, OpenFiles, read_class_names
from megabatch.data.tar_index import ShardIndex, build_index, load_index, write_index
from megabatch.errors import DataError

_BLOCK = 4 << 20
_MAX_OPEN_FILES = 4  # a deleted file takes its room until it is closed
_ATTEMPTS = 3
_MAX_WAIT_S, _PAUSE_S = 600.0, 0.05
_LOCK_ENDING, _PART_ENDING = ".lock", ".part"
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")

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
            DataError: it cannot be fetched, is not of its size or checksum, or does not fit the cache.
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
            except (OSError, DataError) as error:
                if attempt == _ATTEMPTS:
                    path.with_name(path.name + _PART_ENDING).unlink(missing_ok=True)
                    raise DataError(f"{remote.path} could not be fetched: {error}") from error

    def _download(self, remote: "RemoteFile", path: Path, sha256: str | None) -> None:
        part = path.with_name(path.name + _PART_ENDING)
        digest, done = hashlib.sha256(), 0
        with part.open("r+b") as file, self._fs.open(remote.path, "rb") as source:
            while block := source.read(_BLOCK):
                digest.update(block)
                done += file.write(block)
        if done != remote.num_bytes:
            raise DataError(f"{done} bytes came, {remote.num_bytes} were expected")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DataError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}; the copy there is damaged")
        with self._lock_all():  # whoever counts what lies here would meet it under neither name
            part.replace(path)

    def _wait_for_room(self, num_bytes: int, path: Path) -> None:
        """Claim room, when need be after what others are fetching has come and may be deleted."""
        if num_bytes > self._max_bytes:
            raise DataError(f"a file of {num_bytes} bytes does not fit a cache of {self._max_bytes}; give it more room")
        deadline = time.monotonic() + _MAX_WAIT_S
        while not self._make_room(num_bytes, path):
            if time.monotonic() > deadline:
                raise DataError(f"no room for {num_bytes} bytes in {self._folder}: other files are being fetched there")
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
            with path.with_name(path.name + _PART_ENDING).open("wb") as claim:
                claim.truncate(num_bytes)
            return True

    def _lock_all(self) -> contextlib.AbstractContextManager[None]:
        """Whoever holds this may count the files: none comes, and none changes its name."""
        return _lock(self._folder / "cache")

    def _files(self, but: Path) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of what lies in the cache, except the file whose place is sought."""
        for file in self._folder.iterdir():
            if file.suffix == _LOCK_ENDING or file.name.removesuffix(_PART_ENDING) == but.name:
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


class RemoteShards(IndexedShards):
    """Samples of tar shards in a remote folder, as an `EncodedSource`.

    The indices that `megabatch data pack` left beside the shards are fetched at once, the shards as they are read;
    where there is no index, the shard is fetched to make one.

    Args:
        url: the remote folder, for example s3://bucket/imagenet.
        part: the beginning of the shards' names, "train" or "val".
        cache: a local folder; all workers of a machine may share it.
        max_bytes: how much of the disk the shards in it may take. It must hold one shard for each worker and each
            shard that is read ahead, or they will fetch the same ones again and again.

    Raises:
        DataError: fsspec is missing, no shards there, or what `ShardSource` refuses.
    """

    def __init__(self, url: str, *, part: str, cache: Path | str, max_bytes: int, read_ahead_threads: int = 2) -> None:
        self._fs, root = _open_remote(url)
        self._cache = FileCache(cache, fs=self._fs, max_bytes=max_bytes)
        self._index_folder = Path(cache).expanduser() / "indices"
        self._index_folder.mkdir(exist_ok=True)
        self._remote = _list_shards(self._fs, root, part)
        if not self._remote:
            raise DataError(f"no shards {part}*.tar in {url}; needed: for example {part}-000000.tar")
        indices = [self._index_of(shard) for shard in range(len(self._remote))]
        self._sha256 = [index.header.get("tar_sha256") for index in indices]
        names = [posixpath.basename(remote.path) for remote in self._remote]
        super().__init__(names, indices, _class_names(self._fs, root))
        self._files = OpenFiles(_MAX_OPEN_FILES)
        self._threads = ThreadPoolExecutor(read_ahead_threads, thread_name_prefix="read-ahead")
        self._coming: set[int] = set()
        self._coming_lock = threading.Lock()

    def will_read(self, indices: Iterable[int]) -> None:
        """Begin to fetch the shards of these samples, in this order, without waiting for them."""
        for shard in dict.fromkeys(self.shard_of(int(index)) for index in indices):
            with self._coming_lock:
                if shard in self._coming:
                    continue
                self._coming.add(shard)
            self._threads.submit(self._fetch_ahead, shard)

    def close(self) -> None:
        """Give up what has not been fetched ahead yet."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fetch_ahead(self, shard: int) -> None:
        try:
            with contextlib.suppress(DataError):  # whoever reads the shard gets the error
                self._with_copy(shard, lambda _: None)
        finally:
            with self._coming_lock:
                self._coming.discard(shard)

    def _with_copy(self, shard: int, then: Callable[[Path], T]) -> T:
        return self._cache.fetch(self._remote[shard], then=then, sha256=self._sha256[shard])

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        path = self._cache.path(self._remote[shard])
        if self._files.holds(path):
            with contextlib.suppress(FileNotFoundError):  # let go since, and deleted to make room
                return self._files.read(path, offset, size)
        return self._with_copy(shard, lambda path: self._files.read(path, offset, size))

    def _index_of(self, shard: int) -> ShardIndex:
        """The shard's index: kept here, or beside the shard, or made from the shard."""
        remote = self._remote[shard]
        local = self._index_folder / f"{self._cache.path(remote).name}.idx"
        if not local.exists():
            _copy_if_there(self._fs, f"{remote.path}.idx", local)
        index = load_index(local)
        if index is None or index.header["tar_bytes"] != remote.num_bytes:
            index = self._cache.fetch(remote, then=build_index)
            write_index(index, local)
        return index


def _open_remote(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise DataError("reading remote shards needs fsspec: pip install 'megabatch[remote]'") from error
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be opened: {error}") from error
    return fs, str(root)


def _list_shards(fs: Any, root: str, part: str) -> list[RemoteFile]:
    try:
        entries = fs.ls(root, detail=True)
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {error}") from error
    files = [RemoteFile(entry["name"], int(entry["size"] or 0), _version(entry)) for entry in entries]
    return sorted(
        (file for file in files if file.path.endswith(".tar") and posixpath.basename(file.path).startswith(part)),
        key=lambda file: file.path,
    )


def _version(entry: dict[str, Any]) -> str:
    """What the remote end tells of a file that changes with its content."""
    return " ".join(str(entry[name]) for name in _VERSION_FIELDS if name in entry)


def _class_names(fs: Any, root: str) -> Sequence[str] | None:
    try:
        return read_class_names(fs.cat_file(posixpath.join(root, CLASSES_FILE)).decode("utf-8", "surrogateescape"))
    except FileNotFoundError:
        return None


def _copy_if_there(fs: Any, remote: str, local: Path) -> None:
    try:
        content = fs.cat_file(remote)
    except FileNotFoundError:
        return
    part = local.with_name(f"{local.name}.{os.getpid()}{_PART_ENDING}")
    part.write_bytes(content)
    part.replace(local)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process and thread at a time, for the files of this name. The lock of a process that dies is free."""
    with path.with_name(path.name + _LOCK_ENDING).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete(file: Path) -> bool:
    """Delete a copy, or what a dead process left of one; not what another process is fetching right now."""
    owner = file.with_name(file.name.removesuffix(_PART_ENDING) + _LOCK_ENDING)
    with owner.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        file.unlink(missing_ok=True)
    return True
