"""Parquet files in Hugging Face's layout: a column of image bytes and a column of labels.

Needs pyarrow (`pip install megabatch[parquet]`). Parquet files are read in whole row groups of some hundred images, so
random order reads far more bytes than the samples contain. `shard_sizes` are the row groups: with the loader's
shard-local order each is read once per epoch. For random order, or many epochs, pack the data set into tar shards
(`megabatch data pack`).
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megabatch.data.sources.labels import find_classes
from megabatch.data.sources.layout import visible_files
from megabatch.errors import DataError
from megabatch.files import parse_json

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
        files = [_read_header(path) for path in self._paths]
        _refuse_different(files)
        self._image_column = files[0].image_column
        self._groups = [(file, group) for file in range(len(files)) for group in range(len(files[file].group_rows))]
        self.shard_sizes: Sequence[int] = [rows for file in files for rows in file.group_rows]
        self._mean_bytes = [num_bytes for file in files for num_bytes in file.group_mean_bytes]
        self._first = np.concatenate([[0], np.cumsum(self.shard_sizes, dtype=np.int64)])
        self._first_of_file = np.concatenate([[0], np.cumsum([len(file.labels) for file in files])])
        if not len(self):
            raise DataError(f"{self._paths[0]} has no rows; at least 1 is needed")
        places = {value: str(file.path) for file in reversed(files) for value in set(file.labels)}
        classes = find_classes(places, files[0].class_names, where=str(self._paths[0]))
        self.class_names, self.numbered = classes.names, classes.numbered
        numbers = (classes.number[value] for file in files for value in file.labels)
        self.labels: npt.NDArray[np.int64] = np.fromiter(numbers, np.int64, len(self))
        self._cache = _RowGroups(self._load, cache_bytes)

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
        return np.repeat(np.array(self._mean_bytes, dtype=np.int64), self.shard_sizes)

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _load(self, number: int) -> Any:
        file, group = self._groups[number]
        # a new file object for each read: pyarrow's are not thread-safe
        with _refusing_damage(f"{self._paths[file]}: row group {group} cannot be read"):
            with _open(self._paths[file]) as opened:
                table = opened.read_row_group(group, columns=[self._image_column], use_threads=False)
            return table.column(self._image_column)


def _parquet_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    if isinstance(paths, str | Path):
        folder = Path(paths).expanduser()
        found = [file for file in visible_files(folder) if file.suffix == ".parquet"] if folder.is_dir() else [folder]
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small parquet file, by column name; DataError if it cannot be read."""
    with _refusing_damage(f"{path} is not a readable parquet file"), _open(path) as file:
        rows: list[dict[str, Any]] = file.read().to_pylist()
    return rows


@contextlib.contextmanager
def _refusing_damage(text: str) -> Iterator[None]:
    """Raises what pyarrow raises for damaged files as a DataError that begins with `text`."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, LookupError, MemoryError, _pyarrow().ArrowException) as error:
        raise DataError(f"{text}: {error}") from error


def _open(path: Path) -> Any:
    with _refusing_damage(f"{path} is not a readable parquet file"):
        return _pyarrow().parquet.ParquetFile(path, memory_map=True)


@dataclass(frozen=True)
class _Header:
    """What one file says of itself, and its labels."""

    path: Path
    image_column: str
    label_column: str
    label_type: Any
    class_names: tuple[str, ...] | None
    group_rows: list[int]
    group_mean_bytes: list[int]
    labels: list[Any]


def _read_header(path: Path) -> _Header:
    with _refusing_damage(f"{path} is not a readable parquet file"), _open(path) as file:
        image, label = _columns(file, path)
        labels = file.read(columns=[label]).column(label).to_pylist()
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        kind, names = file.schema_arrow.field(label).type, _class_label_names(file, label)
    if None in labels:
        raise DataError(f"{path}: row {labels.index(None)} has no {label}; each image needs one")
    rows = [group.num_rows for group in groups]
    means = [group.total_byte_size // max(1, group.num_rows) for group in groups]
    return _Header(path, image, label, kind, names, rows, means, labels)


def _columns(file: Any, path: Path) -> tuple[str, str]:
    """The names of the image column and the label column."""
    types = {field.name: field.type for field in file.schema_arrow}
    images = [name for name in (*IMAGE_COLUMNS, *types) if name in types and _holds_bytes(types[name])]
    labels = [name for name in LABEL_COLUMNS if name in types and not _pyarrow().types.is_nested(types[name])]
    if not images or not labels:
        missing = "image bytes" if not images else "labels"
        raise DataError(
            f"{path} has no column of {missing} among {', '.join(types)}; needed: for example image and label"
        )
    return images[0], labels[0]


def _refuse_different(files: Sequence[_Header]) -> None:
    """Refuses files that disagree on their columns, on the kind of labels, or on names or order of the classes."""
    first = files[0]
    for file in files:
        differences = {
            "columns": (f"{first.image_column}, {first.label_column}", f"{file.image_column}, {file.label_column}"),
            "labels of type": (_kind(first.label_type), _kind(file.label_type)),
            "classes": (_shown(first.class_names), _shown(file.class_names)),
        }
        for what, (wanted, found) in differences.items():
            if wanted != found:
                raise DataError(
                    f"{file.path} has {what} {found}, but {first.path.name} has {wanted}; all files of a data set need "
                    "the same, in the same order"
                )


def _kind(label_type: Any) -> str:
    types = _pyarrow().types
    is_number = types.is_integer(label_type) or types.is_floating(label_type) or types.is_boolean(label_type)
    return "number" if is_number else "text"


def _shown(names: tuple[str, ...] | None) -> str:
    return "without names" if names is None else ", ".join(names)


def _holds_bytes(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _class_label_names(file: Any, column: str) -> tuple[str, ...] | None:
    """Class names that Hugging Face's `datasets` stores in the schema's metadata; None if there are none."""
    try:
        features = parse_json(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
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
