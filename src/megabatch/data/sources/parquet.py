"""Parquet files in Hugging Face's layout: a column of image bytes and a column of labels.

Needs pyarrow (`pip install megabatch[parquet]`). Parquet files are read in whole row groups of some hundred images, so
random order reads far more bytes than the samples contain. `shard_sizes` are the row groups: with the loader's
shard-local order each is read once per epoch. For random order, or many epochs, pack the data set into tar shards
(`megabatch data pack`).
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megabatch.errors import DataError

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "target")
_CACHE_BYTES = 256 << 20


class ParquetSource:
    """Samples of parquet files, in the order of the given files, as an `EncodedSource`.

    The constructor reads all labels. Images are read by row group; the most recently used row groups stay in memory, up
    to `cache_bytes`, at least one.

    Raises:
        DataError: pyarrow is missing; no files, or damaged ones; no column of image bytes or of labels; a row without a
            label; or a label that is not a class.
    """

    def __init__(self, paths: Path | str | Iterable[Path | str], *, cache_bytes: int = _CACHE_BYTES) -> None:
        self._paths = _parquet_paths(paths)
        files = [_open(path) for path in self._paths]
        self._image_column, label_column = _columns(files[0], self._paths[0])
        self._groups = [(file, group) for file in range(len(files)) for group in range(files[file].num_row_groups)]
        sizes = [files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self.shard_sizes: Sequence[int] = sizes
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._first_of_file = np.concatenate([[0], np.cumsum([file.metadata.num_rows for file in files])])
        self.labels, self.class_names = _labels(files, self._paths, label_column)
        self._cache = _RowGroups(self._load, cache_bytes)
        if not len(self):
            raise DataError(f"{self._paths[0]} has no rows; at least 1 is needed")

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> bytes:
        """Returns the image file of one sample.

        Raises:
            DataError: the row has no bytes, only the path of another file, or its row group is damaged.
        """
        group = self._group_of(index)
        cell = self._cache.get(group)[index - int(self._first[group])].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise DataError(f"{self.name(index)} has no image bytes; paths of other files are not followed")
        return bytes(data)

    def name(self, index: int) -> str:
        """Returns file and row, for example `train-00000-of-00002.parquet:17`."""
        file = self._groups[self._group_of(index)][0]
        return f"{self._paths[file].name}:{index - int(self._first_of_file[file])}"

    def estimated_sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample, [n], estimated as its row group's mean without reading the images."""
        sizes = [_group_bytes(_open(path)) for path in self._paths]
        return np.repeat(np.concatenate(sizes), self.shard_sizes)

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _load(self, number: int) -> Any:
        file, group = self._groups[number]
        try:
            # a new file object for each read: pyarrow's are not thread-safe
            table = _open(self._paths[file]).read_row_group(group, columns=[self._image_column], use_threads=False)
        except (OSError, _pyarrow().ArrowException) as error:
            raise DataError(f"{self._paths[file]}: row group {group} cannot be read: {error}") from error
        return table.column(self._image_column)


def open_parquet(path: Path | str) -> tuple[ParquetSource, ParquetSource]:
    """Returns the training and the validation samples of a folder of parquet files in Hugging Face's layout.

        train, val = open_parquet("my_dataset")  # pip install 'megabatch[parquet]'
        print(len(train), train.class_names, train.labels)  # labels: [n] int64, the index of the class name
        image_file = train.read(0)  # bytes, still encoded

    Files belong to the training part if their name, or that of a folder on the way to them, starts with "train"; to the
    validation part if it starts with "val", else "test". Both results are `ParquetSource`s of the same classes. Reads
    all labels, but no image.

    Raises:
        DataError: pyarrow is missing; a part is missing; the classes differ; a file is damaged or has no column of
            image bytes or of labels; or a label is missing or not a class.
    """
    path = Path(path).expanduser()
    train, val = _part(path, ("train",)), _part(path, ("val",)) or _part(path, ("test",))
    for name, files in (("train", train), ("val", val)):
        if not files:
            raise DataError(
                f"no parquet files for '{name}' in {path}; needed: for example {name}-00000-of-00001.parquet"
            )
    sources = ParquetSource(train), ParquetSource(val)
    names = max(sources[0].class_names, sources[1].class_names, key=len)
    for source in sources:
        if not _can_have_classes(source, names):
            raise DataError(f"{path}: the classes of train and val differ; both need the same")
        source.class_names = names
    return sources


def _can_have_classes(source: ParquetSource, names: tuple[str, ...]) -> bool:
    """True if a source's classes can be `names`: equal, or all are numbers, of which a part may lack the highest."""
    return source.class_names == names or all(name.isdecimal() for name in (*names, *source.class_names))


def _part(path: Path, starts: tuple[str, ...]) -> list[Path]:
    """Files below `path` whose name, or a folder's name on the way to them, begins with one of `starts`."""
    files = sorted(path.rglob("*.parquet"))
    return [file for file in files if any(part.startswith(starts) for part in file.relative_to(path).parts)]


def _parquet_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    if isinstance(paths, str | Path):
        folder = Path(paths).expanduser()
        found = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
    else:
        found = [Path(path).expanduser() for path in paths]
    if not found:
        raise DataError(f"no parquet files in {paths}; needed: for example train-00000-of-00001.parquet")
    return found


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading parquet needs pyarrow: pip install 'megabatch[parquet]'") from error
    module: ModuleType = pyarrow
    return module


def _open(path: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _columns(file: Any, path: Path) -> tuple[str, str]:
    """The names of the image column and the label column."""
    types = {field.name: field.type for field in file.schema_arrow}
    images = [name for name in (*IMAGE_COLUMNS, *types) if name in types and _holds_bytes(types[name])]
    labels = [name for name in LABEL_COLUMNS if name in types]
    if not images or not labels:
        missing = "image bytes" if not images else "labels"
        raise DataError(
            f"{path} has no column of {missing} among {', '.join(types)}; needed: for example image and label"
        )
    return images[0], labels[0]


def _group_bytes(file: Any) -> npt.NDArray[np.int64]:
    """Mean bytes per row of each row group."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    return np.array([group.total_byte_size // max(1, group.num_rows) for group in groups], dtype=np.int64)


def _holds_bytes(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _labels(files: Sequence[Any], paths: Sequence[Path], column: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    values = [value for file in files for value in file.read(columns=[column]).column(column).to_pylist()]
    if any(value is None for value in values):
        raise DataError(f"{paths[0].parent}: row {values.index(None)} has no {column}; each image needs one")
    named = _class_label_names(files[0], column)
    if all(isinstance(value, int) for value in values):
        return _numeric(values, named, paths[0])
    names = named or tuple(sorted({str(value) for value in values}))
    by_name = {name: number for number, name in enumerate(names)}
    return np.array([by_name[str(value)] for value in values], dtype=np.int64), names


def _numeric(
    values: list[int], named: tuple[str, ...] | None, path: Path
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    labels = np.array(values, dtype=np.int64)
    names = named or tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))
    if labels.size and not (labels.min() >= 0 and labels.max() < len(names)):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{path}: label {wrong} is not one of the {len(names)} classes 0 to {len(names) - 1}")
    return labels, names


def _class_label_names(file: Any, column: str) -> tuple[str, ...] | None:
    """Class names that Hugging Face's `datasets` stores in the schema's metadata; None if there are none."""
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


class _RowGroup:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.column: Any = None


class _RowGroups:
    """LRU cache of row groups. Threads that need the same row group wait for one to load it; others do not wait."""

    def __init__(self, load: Any, max_bytes: int) -> None:
        self._load, self._max_bytes = load, max_bytes
        self._groups: OrderedDict[int, _RowGroup] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> Any:
        with self._lock:
            group = self._groups.setdefault(number, _RowGroup())
            self._groups.move_to_end(number)
        with group.lock:
            if group.column is None:
                group.column = self._load(number)
                self._evict()
            return group.column

    def _evict(self) -> None:
        with self._lock:
            while len(self._groups) > 1 and self._held_bytes() > self._max_bytes:
                self._groups.popitem(last=False)

    def _held_bytes(self) -> int:
        return sum(group.column.nbytes for group in self._groups.values() if group.column is not None)
