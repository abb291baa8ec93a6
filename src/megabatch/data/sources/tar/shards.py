"""Images in standard tar files, in WebDataset's layout, with random access to each sample.

A sample is two consecutive members of a tar: `KEY.jpg` (or another image suffix) and `KEY.cls`, which contains the
class as a number or as a name. Other members of the same key, such as `KEY.json`, are ignored. `NAME.tar.idx` beside
each `NAME.tar` contains the offsets of its samples. It is built if it is missing or does not match the tar, and only
megabatch uses it. A file `classes.txt` in the same folder names the classes of numeric labels, one per line.

Samples are read with `pread`, so all workers share the page cache. Unlike a memory map, a thread that waits for the
disk blocks no other thread, and a shard that is truncated during a run raises an error instead of crashing the process.
A worker uses 20 bytes of memory per sample.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megabatch.data.sources.labels import find_classes, read_class_names
from megabatch.data.sources.layout import COMPRESSED_ENDINGS, list_folder, part_of
from megabatch.data.sources.protocol import Files
from megabatch.data.sources.tar.tar_index import ShardIndex, open_index
from megabatch.errors import DataError
from megabatch.files import max_open_files

CLASSES_FILE = "classes.txt"
_MAX_OPEN_FILES = 128  # fewer where the system allows a process few


class IndexedShards:
    """Samples of indexed tars; subclasses implement `_read_at` and `_index_of`."""

    def __init__(
        self, names: Sequence[str], indices: Sequence[ShardIndex], class_names: Sequence[str] | None = None
    ) -> None:
        self._shard_names = names
        self.shard_sizes: Sequence[int] = [len(index) for index in indices]
        self._first = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._offsets = np.concatenate([index.records["offset"] for index in indices])
        self.sizes = np.concatenate([index.records["size"] for index in indices])
        places = {text: name for name, index in zip(names, indices, strict=True) for text in index.label_texts}
        classes = find_classes(places, class_names, where=names[0])
        self.class_names, self.numbered = classes.names, classes.numbered
        parts = [np.array([classes.number[text] for text in i.label_texts])[i.records["label"]] for i in indices]
        self.labels: npt.NDArray[np.int64] = np.concatenate(parts).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> bytes:
        """Returns the image file of one sample.

        Raises:
            DataError: the shard was truncated after it was indexed.
        """
        return self._read_at(self.shard_of(index), int(self._offsets[index]), int(self.sizes[index]))

    def name(self, index: int) -> str:
        """Returns shard and member, for example `train-000003.tar:dog/0017.jpg`."""
        shard = self.shard_of(index)
        member = self._index_of(shard).name(index - int(self._first[shard]))
        return f"{self._shard_names[shard]}:{member}"

    def member_names(self) -> Iterator[str]:
        """Yields the name of each sample's image in its tar, in index order."""
        for shard in range(len(self.shard_sizes)):
            index = self._index_of(shard)
            yield from map(index.name, range(len(index)))

    def shard_of(self, index: int) -> int:
        """Returns the number of the shard that contains a sample; IndexError if there is no such sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes of a shard from `offset`."""
        raise NotImplementedError

    def _index_of(self, shard: int) -> ShardIndex:
        """Returns a shard's index. Not kept in memory: names are needed rarely, and are large."""
        raise NotImplementedError


class ShardSource(IndexedShards):
    """Samples of one or more tar shards, in the order of the given files, as an `EncodedSource`.

    Args:
        paths: tar files, or one folder, whose tars are sorted by name.
        class_names: names of numeric labels; the default is `classes.txt` beside the shards, else the numbers.

    Raises:
        DataError: no shards; a compressed or damaged tar; a member that is not a plain file or leaves the archive's
            folder; a sample without a label; or a label outside `class_names`.
    """

    def __init__(self, paths: Path | str | Iterable[Path | str], *, class_names: Sequence[str] | None = None) -> None:
        self._paths = _shard_paths(paths)
        names = [path.name for path in self._paths]
        indices = [open_index(path) for path in self._paths]
        super().__init__(names, indices, class_names or _names_beside(self._paths[0].parent))
        self._files = OpenFiles(_MAX_OPEN_FILES)

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        return self._files.read(self._paths[shard], offset, size)

    def read_many(self, indices: npt.NDArray[np.int64]) -> Files:
        """Returns the image files of these samples in one buffer, without a copy of each; errors as `read`."""
        starts = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(self.sizes[indices], out=starts[1:])
        data: npt.NDArray[np.uint8] = np.empty(int(starts[-1]), dtype=np.uint8)
        shards = (np.searchsorted(self._first, indices, side="right") - 1).tolist()
        files = {shard: self._files.get(self._paths[shard]) for shard in set(shards)}
        view, ends = memoryview(data.data), starts.tolist()
        places = zip(shards, self._offsets[indices].tolist(), ends, ends[1:], strict=False)
        for shard, offset, start, end in places:
            if os.preadv(files[shard].descriptor, [view[start:end]], offset) != end - start:
                raise _truncated(self._paths[shard], offset + end - start)
        return data, starts

    def _index_of(self, shard: int) -> ShardIndex:
        return open_index(self._paths[shard])


def _shard_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    """Given paths, or the tars in a folder by name; compressed ones too, so that these are refused with a reason."""
    if isinstance(paths, str | Path):
        folder = Path(paths).expanduser()
        if not folder.is_dir():
            return [folder]
        found = [
            Path(entry.path) for entry in list_folder(folder) if entry.name.endswith((".tar", *COMPRESSED_ENDINGS))
        ]
    else:
        found = [Path(path).expanduser() for path in paths]
    if not found:
        raise DataError(f"no tar files in {paths}; needed: for example train-000000.tar")
    return found


def _names_beside(folder: Path) -> list[str] | None:
    """Class names in the folder of the shards, or one above if that is the folder of a part."""
    for place in [folder, folder.parent] if part_of(folder.name) else [folder]:
        if (place / CLASSES_FILE).is_file():
            return read_class_names((place / CLASSES_FILE).read_text(encoding="utf-8", errors="surrogateescape"))
    return None


class OpenFiles:
    """LRU cache of at most `limit` open files, or an eighth of the files that the system allows this process.

    An evicted file is closed when its last reader has finished.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(1, min(limit, max_open_files() // 8))
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`.

        Raises:
            DataError: the file ends before.
            FileNotFoundError: the file does not exist. A file that was deleted after it was opened can still be read.
        """
        file = self.get(path)  # this reference keeps the file open during the read
        data = os.pread(file.descriptor, size, offset)
        if len(data) != size:
            raise _truncated(path, offset + size)
        return data

    def is_open(self, path: Path) -> bool:
        """True if the file is in the cache."""
        with self._lock:
            return path in self._files

    def get(self, path: Path) -> "_File":
        """Returns the open file; it stays open as long as the result exists."""
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


def _truncated(path: Path, end: int) -> DataError:
    return DataError(f"{path} ends before byte {end}; it was truncated after it was indexed")


class _File:
    """A file descriptor that is closed when the object is freed."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
