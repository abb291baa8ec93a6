"""Images listed in a table, as in Hugging Face's ImageFolder layout: metadata.csv, .jsonl or .parquet beside them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megabatch.data.sources.folder import FolderSource, PackedStrings, refuse_link_outside
from megabatch.data.sources.labels import find_classes
from megabatch.data.sources.layout import part_of
from megabatch.data.sources.parquet import LABEL_COLUMNS, read_rows
from megabatch.errors import DataError
from megabatch.files import parse_json

FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")


class MetadataSource(FolderSource):
    """Image files below `path` with the given names, relative to it, and labels; in the order of the table.

    Raises:
        DataError: a name leaves the folder, or a label is not a class.
    """

    def __init__(self, path: Path, names: Sequence[str], labels: Sequence[Any]) -> None:
        self.path = path
        root = str(path.resolve())
        for name in names:
            refuse_link_outside(str(path / name), root)
        self._names = PackedStrings(list(names))
        classes = find_classes({value: str(path) for value in set(labels)}, None, where=str(path))
        self.class_names, self.numbered = classes.names, classes.numbered
        self.labels = np.fromiter((classes.number[value] for value in labels), np.int64, len(labels))


def open_metadata(file: Path) -> dict[str, MetadataSource]:
    """The images that `file` lists, by part: that which the first folder of a name states, else all are train.

    Needed are a column of `FILE_COLUMNS` and one of labels, of `LABEL_COLUMNS` or the only other one.

    Raises:
        DataError: the file cannot be read, has no such columns or no rows, or `MetadataSource` refuses its rows.
    """
    rows = _rows(file)
    names, labels = _columns(rows, file)
    parts: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        part = part_of(name.split("/")[0]) if "/" in name else None
        parts.setdefault(part or "train", []).append(index)
    return {
        part: MetadataSource(file.parent, [names[i] for i in chosen], [labels[i] for i in chosen])
        for part, chosen in sorted(parts.items(), key=lambda item: ("train", "val", "test").index(item[0]))
    }


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            return read_rows(file)
        with file.open(encoding="utf-8-sig", newline="") as opened:
            if file.suffix == ".csv":
                return list(csv.DictReader(opened))
            return [parse_json(line) for line in opened if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a table: {error}; a metadata.csv with a header works") from error


def _columns(rows: list[dict[str, Any]], file: Path) -> tuple[list[str], list[Any]]:
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} lists no images; needed: rows with file_name and label")
    columns = list(rows[0])
    files = [name for name in FILE_COLUMNS if name in columns]
    others = [name for name in columns if name not in files]
    labels = [name for name in LABEL_COLUMNS if name in columns] or (others if len(others) == 1 else [])
    if not files or not labels:
        raise DataError(f"{file} has the columns {', '.join(map(str, columns))}; needed: file_name and label")
    chosen = [(row.get(files[0]), row.get(labels[0])) for row in rows]
    missing = next((number for number, (name, label) in enumerate(chosen) if not name or label is None), None)
    if missing is not None:
        raise DataError(f"{file}: row {missing} has no {files[0]} or no {labels[0]}; each image needs both")
    return [str(name) for name, _ in chosen], [label for _, label in chosen]
