"""Remote tar shards (s3://, gs://, https:// or any fsspec URL), read through a bounded local cache.

Needs fsspec (`pip install megabatch[remote]`) and fsspec's package for the protocol. With the loader's shard-local
order each shard is fetched once per epoch, and the loader announces the next shards through `will_read`.
"""

import contextlib
import os
import posixpath
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megabatch.data.sources.file_cache import PART_ENDING, FileCache, RemoteFile
from megabatch.data.sources.labels import agree_on_classes, read_class_names
from megabatch.data.sources.layout import COMPRESSED_ENDINGS, by_part, is_hidden, part_of
from megabatch.data.sources.tar.shards import CLASSES_FILE, IndexedShards, OpenFiles
from megabatch.data.sources.tar.tar_index import ShardIndex, build_index, load_index, write_index
from megabatch.errors import DataError, MegabatchError

_MAX_OPEN_FILES = 4  # an evicted file uses disk space until it is closed
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")

T = TypeVar("T")


class RemoteShards(IndexedShards):
    """Samples of tar shards in a remote folder, as an `EncodedSource`.

    The constructor fetches the indices that `megabatch data pack` wrote beside the shards; a shard without an index is
    fetched to build one. Other shards are fetched when they are read or announced.

    Args:
        url: remote folder, for example s3://bucket/imagenet.
        part: selects the shards in the folder of this name, or those named `part`-*.tar or `part`.tar.
        cache: local folder; all workers of a machine may share it.
        max_bytes: largest disk space of the cached shards, in bytes. It must hold the shards in use at a time, see
            `bytes_at_once`; otherwise the same shards are fetched again and again.
        class_names: names of numeric labels; the default is the remote `classes.txt`, else the numbers.
        read_ahead_threads: number of shards that are prefetched in parallel.

    Raises:
        DataError: fsspec is missing, there are no shards, or `ShardSource` would refuse them.
        FetchError: a shard could not be fetched to build its index.
    """

    def __init__(
        self,
        url: str,
        *,
        part: str,
        cache: Path | str,
        max_bytes: int,
        class_names: Sequence[str] | None = None,
        read_ahead_threads: int = 2,
    ) -> None:
        self._fs, root = _open_remote(url)
        self._max_bytes = max_bytes
        self._cache = FileCache(cache, fs=self._fs, max_bytes=max_bytes)
        self._index_folder = Path(cache).expanduser() / "indices"
        self._index_folder.mkdir(exist_ok=True)
        self._remote = _find_shards(self._fs, root, part)
        indices = [self._index_of(shard) for shard in range(len(self._remote))]
        self._sha256 = [index.header.get("tar_sha256") for index in indices]
        names = [posixpath.basename(remote.path) for remote in self._remote]
        folders = [posixpath.dirname(self._remote[0].path), root]
        super().__init__(names, indices, class_names or _class_names(self._fs, folders))
        self._files = OpenFiles(_MAX_OPEN_FILES)
        self._threads = ThreadPoolExecutor(read_ahead_threads, thread_name_prefix="read-ahead")
        self._in_flight: set[int] = set()
        self._in_flight_lock = threading.Lock()

    def bytes_at_once(self, num_shards: int | None) -> int:
        """Returns the total size in bytes of the `num_shards` largest shards; of all shards if None."""
        sizes = sorted((remote.num_bytes for remote in self._remote), reverse=True)
        return sum(sizes[:num_shards])

    def will_read(self, indices: Iterable[int]) -> None:
        """Prefetches the shards of these samples, in this order, in the background.

        Stops when the cache would be full: one more shard would evict the first of them.
        """
        room = self._max_bytes
        for shard in dict.fromkeys(self.shard_of(int(index)) for index in indices):
            room -= self._remote[shard].num_bytes
            if room < 0:
                return
            self._submit_fetch(shard)

    def close(self) -> None:
        """Cancels prefetches that have not started and waits for those in progress."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit_fetch(self, shard: int) -> None:
        with self._in_flight_lock:
            if shard in self._in_flight:
                return
            self._in_flight.add(shard)
        self._threads.submit(self._fetch_ahead, shard)

    def _fetch_ahead(self, shard: int) -> None:
        try:
            with contextlib.suppress(MegabatchError):  # a read of the shard tries again and raises
                self._with_local_copy(shard, lambda _: None)
        finally:
            with self._in_flight_lock:
                self._in_flight.discard(shard)

    def _with_local_copy(self, shard: int, then: Callable[[Path], T]) -> T:
        return self._cache.fetch(self._remote[shard], then=then, sha256=self._sha256[shard])

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        path = self._cache.path(self._remote[shard])
        if self._files.is_open(path):
            with contextlib.suppress(FileNotFoundError):  # closed and evicted since the check
                return self._files.read(path, offset, size)
        return self._with_local_copy(shard, lambda path: self._files.read(path, offset, size))

    def _index_of(self, shard: int) -> ShardIndex:
        """Returns a shard's index: the local copy, else the remote index, else one built from the fetched shard."""
        remote = self._remote[shard]
        local = self._index_folder / f"{self._cache.path(remote).name}.idx"
        if not local.exists():
            _copy_if_there(self._fs, f"{remote.path}.idx", local)
        index = load_index(local)
        if index is None or index.header["tar_bytes"] != remote.num_bytes:
            index = self._cache.fetch(remote, then=build_index)
            write_index(index, local)
        return index


def open_remote_shards(url: str, *, cache: Path | str, max_bytes: int) -> tuple[RemoteShards, RemoteShards, list[str]]:
    """Returns training and evaluation samples of a remote folder, which share one cache, and notes on their classes.

    Evaluation samples are those of val, or of test if there is no val. Errors as `RemoteShards`.
    """

    def opened(part: str) -> RemoteShards:
        return RemoteShards(url, part=part, cache=cache, max_bytes=max_bytes)

    fs, root = _open_remote(url)
    parts = [part for part in ("train", "val", "test") if part in _remote_parts(fs, root)]
    evaluation = next((part for part in ("val", "test") if part in parts), "val")
    sources = {part: opened(part) for part in ("train", evaluation)}
    numbered = all(source.numbered for source in sources.values())
    notes = agree_on_classes(sources, url, numbered=numbered)
    return sources["train"], sources[evaluation], notes


def _open_remote(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"reading {url} needs fsspec: pip install 'megabatch[remote]'") from error
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be opened: {error}; s3://, gs://, https:// and file:// URLs work") from error
    return fs, str(root)


def _find_shards(fs: Any, root: str, part: str) -> list[RemoteFile]:
    """Tars in the folder of a part or named after it, by the rules for local folders (`layout.by_part`)."""
    found = _remote_parts(fs, root).get(part, {})
    if compressed := [name for name in found if name.endswith(COMPRESSED_ENDINGS)]:
        raise DataError(f"{compressed[0]} is compressed, which allows no random access; a plain .tar works")
    if not found:
        raise DataError(f"no shards for '{part}' in {root}; needed: {part}-000000.tar or {part}/*.tar there")
    return [_remote_file(fs, entry) for entry in found.values()]


def _remote_parts(fs: Any, root: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Listing entries of the tars in `root` and in its folders of parts, by part and path."""
    entries = _listed(fs, root)
    for folder in [entry for entry in entries.values() if entry.get("type") == "directory" and part_of(_base(entry))]:
        entries |= _listed(fs, folder["name"])
    start = len(root.rstrip("/")) + 1
    tars = {name[start:]: name for name in entries if name.endswith((".tar", *COMPRESSED_ENDINGS))}
    parts = by_part(tars, root)
    return {part: {tars[name]: entries[tars[name]] for name in names} for part, names in parts.items()}


def _base(entry: dict[str, Any]) -> str:
    return posixpath.basename(str(entry["name"]).rstrip("/"))


def _listed(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Visible entries of a folder by path."""
    try:
        entries = fs.ls(folder, detail=True)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} does not exist; needed: a folder with train-000000.tar and val-000000.tar"
        ) from error
    except Exception as error:  # each fsspec file system raises its own errors
        raise DataError(f"{folder} cannot be listed: {error}") from error
    return {entry["name"]: entry for entry in entries if not is_hidden(_base(entry))}


def _remote_file(fs: Any, entry: dict[str, Any]) -> RemoteFile:
    if entry.get("size") is None:  # web servers do not list sizes
        entry = {**entry, **fs.info(entry["name"])}
    if entry["size"] is None:
        raise DataError(
            f"the server does not report the size of {entry['name']}; a server that sends Content-Length works"
        )
    return RemoteFile(entry["name"], int(entry["size"]), _version(entry))


def _version(entry: dict[str, Any]) -> str:
    """Text that changes when the file's content does, from the metadata that the file system reports."""
    return " ".join(str(entry[name]) for name in _VERSION_FIELDS if name in entry)


def _class_names(fs: Any, folders: Iterable[str]) -> Sequence[str] | None:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            text = fs.cat_file(posixpath.join(folder, CLASSES_FILE)).decode("utf-8", "surrogateescape")
            return read_class_names(text)
    return None


def _copy_if_there(fs: Any, remote: str, local: Path) -> None:
    try:
        content = fs.cat_file(remote)
    except FileNotFoundError:
        return
    part = local.with_name(f"{local.name}.{os.getpid()}{PART_ENDING}")
    part.write_bytes(content)
    part.replace(local)
