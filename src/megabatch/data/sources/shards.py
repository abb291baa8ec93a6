"""Images in standard tar files, in WebDataset's layout, any sample reachable at once.

A sample is two neighbouring members of a tar: `KEY.jpg` (or another image suffix) and `KEY.cls`, which holds the
class as a number or as a name. Other members of the same key, such as `KEY.json`, are passed over. Beside each
`NAME.tar` lies `NAME.tar.idx`, which says where its samples are; it is made when it is missing or does not fit the
tar, and nothing but megabatch needs it. A file `classes.txt` in the same folder names the classes of numeric labels,
one a line.

Samples are read with `pread`: all workers share the page cache, a thread that waits for the disk holds up no other,
as a fault on a memory map would, and a shard that is cut short during a run is an error, not a crash. A worker keeps
20 bytes in memory for each sample.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megabatch.data.sources.tar_index import ShardIndex, open_index
from megabatch.errors import DataError

CLASSES_FILE = "classes.txt"
_MAX_OPEN_FILES = 128
COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class IndexedShards:
    """Samples of tars whose indices are at hand; where the bytes come from is left to `_read_at`."""

    def __init__(
        self, names: Sequence[str], indices: Sequence[ShardIndex], class_names: Sequence[str] | None = None
    ) -> None:
        self._shard_names = names
        self.shard_sizes: Sequence[int] = [len(index) for index in indices]
        self._first = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._offsets = np.concatenate([index.records["offset"] for index in indices])
        self.sizes = np.concatenate([index.records["size"] for index in indices])
        self.class_names = tuple(class_names or _names_of_labels(indices))
        self.labels: npt.NDArray[np.int64] = _labels(names, indices, self.class_names)

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> bytes:
        """The image file of one sample.

        Raises:
            DataError: the shard has become shorter than it was.
        """
        return self._read_at(self.shard_of(index), int(self._offsets[index]), int(self.sizes[index]))

    def name(self, index: int) -> str:
        """Shard and member, such as `train-000003.tar:dog/0017.jpg`."""
        shard = self.shard_of(index)
        member = self._index_of(shard).name(index - int(self._first[shard]))
        return f"{self._shard_names[shard]}:{member}"

    def member_names(self) -> Iterator[str]:
        """The name that each sample's image has in its tar, in index order."""
        for shard in range(len(self.shard_sizes)):
            index = self._index_of(shard)
            yield from map(index.name, range(len(index)))

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def _index_of(self, shard: int) -> ShardIndex:
        """Read anew each time it is asked for: names are wanted rarely, and would take up much memory."""
        raise NotImplementedError


class ShardSource(IndexedShards):
    """Samples of one or more tar shards, in the order of the files given, as an `EncodedSource`.

    Args:
        paths: tar files, or one folder whose tars are taken in the order of their names.
        class_names: names of numeric labels; by default from `classes.txt` beside the shards, else the numbers.

    Raises:
        DataError: no shards, a compressed or damaged tar, a member that leaves its folder or is no plain file, a
            sample without a label, a label outside `class_names`.
    """

    def __init__(self, paths: Path | str | Iterable[Path | str], *, class_names: Sequence[str] | None = None) -> None:
        self._paths = _shard_paths(paths)
        names = [path.name for path in self._paths]
        indices = [open_index(path) for path in self._paths]
        super().__init__(names, indices, class_names or _names_beside(self._paths[0].parent))
        self._files = OpenFiles(_MAX_OPEN_FILES)

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        return self._files.read(self._paths[shard], offset, size)

    def _index_of(self, shard: int) -> ShardIndex:
        return open_index(self._paths[shard])


def open_shards(path: Path | str) -> tuple[ShardSource, ShardSource]:
    """Training and validation samples from `path`/train-*.tar and val-*.tar, or from tars in train/ and val/.

    Raises:
        DataError: a part is missing, the classes differ, or what `ShardSource` refuses.
    """
    path = Path(path).expanduser()
    parts = {part: _part(path, part) for part in ("train", "val")}
    for part, paths in parts.items():
        if not paths:
            raise DataError(
                f"no shards for '{part}' in {path}; needed: {path / part}-000000.tar or {path / part}/*.tar"
            )
    train, val = ShardSource(parts["train"]), ShardSource(parts["val"])
    names = agreed_names(train.class_names, val.class_names, str(path))
    if names is None:
        return train, val
    return ShardSource(parts["train"], class_names=names), ShardSource(parts["val"], class_names=names)


def agreed_names(train: Sequence[str], val: Sequence[str], where: str) -> Sequence[str] | None:
    """The class names to open both parts with, None if theirs are equal; DataError if they contradict each other."""
    if train == val:
        return None
    if not all(name.isdecimal() for name in (*train, *val)):
        raise DataError(f"{where}: train and val name different classes; both need the same, or one {CLASSES_FILE}")
    return max(train, val, key=len)  # plain numbers: the highest one seen says how many


def _part(path: Path, part: str) -> list[Path]:
    found = _tars(path / part, "*") if (path / part).is_dir() else []
    return found or _tars(path, f"{part}-*") or _tars(path, part)


def _tars(folder: Path, stem: str) -> list[Path]:
    """Tars by name, compressed ones too, so that they are refused with the reason instead of being overlooked."""
    endings = (".tar", *COMPRESSED_ENDINGS)
    return sorted(path for ending in endings for path in folder.glob(stem + ending))


def _shard_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    if isinstance(paths, str | Path):
        folder = Path(paths).expanduser()
        found = _tars(folder, "*") if folder.is_dir() else [folder]
    else:
        found = [Path(path).expanduser() for path in paths]
    if not found:
        raise DataError(f"no tar files in {paths}; needed: for example train-000000.tar")
    return found


def read_class_names(text: str) -> list[str]:
    """The lines of a `classes.txt`."""
    return text.removesuffix("\n").split("\n")


def _names_beside(folder: Path) -> list[str] | None:
    for place in [folder, folder.parent] if folder.name in {"train", "val"} else [folder]:
        if (place / CLASSES_FILE).is_file():
            return read_class_names((place / CLASSES_FILE).read_text(encoding="utf-8", errors="surrogateescape"))
    return None


def _names_of_labels(indices: Sequence[ShardIndex]) -> list[str]:
    texts = sorted({text for index in indices for text in index.label_texts})
    if all(text.isdecimal() for text in texts):
        return [str(number) for number in range(1 + max((int(text) for text in texts), default=0))]
    return texts


def _labels(names: Sequence[str], indices: Sequence[ShardIndex], class_names: Sequence[str]) -> npt.NDArray[np.int64]:
    by_name = {name: number for number, name in enumerate(class_names)}
    parts = []
    for name, index in zip(names, indices, strict=True):
        numbers = [_class_of(text, by_name, name) for text in index.label_texts]
        parts.append(np.array(numbers, dtype=np.int64)[index.records["label"]])
    return np.concatenate(parts)


def _class_of(text: str, by_name: dict[str, int], shard: str) -> int:
    if text in by_name:
        return by_name[text]
    if text.isdecimal() and int(text) < len(by_name):
        return int(text)
    raise DataError(f"{shard}: label '{text}' is neither a class name nor a number below {len(by_name)}")


class OpenFiles:
    """The files read last, kept open; one that is let go closes when the last reader is done with it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; DataError if the file ends before.

        Raises:
            FileNotFoundError: the file is gone. One that is open is read on, even if it has been deleted since.
        """
        file = self._get(path)  # held until the read is done: letting go of it may close it
        data = os.pread(file.descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{path} ends before byte {offset + size}; it has been cut since it was indexed")
        return data

    def holds(self, path: Path) -> bool:
        """Whether the file is open."""
        with self._lock:
            return path in self._files

    def _get(self, path: Path) -> "_File":
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


class _File:
    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
