"""Opens a data set (folders of classes, tars or parquet files) by its parts, which have one list of classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.labels import agree_on_classes
from megabatch.data.sources.layout import Layout, find_layout
from megabatch.data.sources.metadata import open_metadata
from megabatch.data.sources.parquet import ParquetSource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.data.sources.tar.tar_folder import holds_labels, open_folders_in_tar
from megabatch.errors import DataError

EVALUATION_PARTS = ("val", "test")
"""A run is evaluated on the first of these that the data set has."""


@dataclass(frozen=True)
class DataSet:
    """The parts of a data set, with the same classes; `notes` are facts that a user may not expect."""

    layout: Layout
    parts: dict[str, EncodedSource]
    notes: list[str]


def open_dataset(path: Path | str, *, kind: str | None = None) -> DataSet:
    """Opens all parts of the data set at `path`; `find_layout` tells how they are found.

    A class that val or test lacks is allowed and noted. Folders are listed, indices of tars and labels of parquet files
    are read; images are not.

    Raises:
        DataError: there is no data set, it is unclear which files are meant, or a part is invalid; a part has classes
            that train lacks; or labels cannot be class numbers.
    """
    layout = find_layout(path, kind=kind)
    return _opened(layout, _openers(layout))


def part_names(path: Path | str) -> tuple[str, ...]:
    """The parts of the data set at `path` that `open_dataset` opens, in the order of its parts."""
    return tuple(_openers(find_layout(path)))


def open_train_and_evaluation(
    path: Path | str,
    *,
    kind: str | None = None,
    train_needed: bool = True,
    train: str = "train",
    evaluation: str | None = None,
    only_train: bool = False,
) -> DataSet:
    """Opens the part `train`, and `evaluation` (default: val or else test), as parts of a data set, in this order.

    With `only_train` the evaluation set is not opened, and need not exist.

    Raises:
        DataError: as `open_dataset`; or a part is missing, or, with `train_needed`, there is only one class.
    """
    layout = find_layout(path, kind=kind)
    openers = _openers(layout)
    chosen = evaluation or next((part for part in EVALUATION_PARTS if part in openers), "val")
    wanted = (train,) if only_train else (train, chosen) if train_needed or train in openers else (chosen,)
    for part in wanted:
        if part not in openers:
            raise DataError(_missing(layout, part, list(openers)))
    dataset = _opened(layout, {part: openers[part] for part in wanted})
    if train_needed:
        _refuse_one_class(layout, dataset.parts[train].class_names)
    if not evaluation and not only_train and chosen != "val":
        evaluation = chosen
        dataset.notes.append(f"there is no val; {evaluation} is the evaluation set")
    return dataset


def open_folder(path: Path | str) -> tuple[EncodedSource, EncodedSource]:
    """Returns the training and the validation images from `path`/train/CLASS/ and `path`/val/CLASS/, at any depth.

        train, val = open_folder("my_photos")
        print(len(train), train.class_names, train.labels)  # labels: [n] int64, the index of the class name
        image_file = train.read(0)  # bytes, still encoded

    Both are `FolderSource`s of the classes of train, sorted by name; val may lack some. training/, validation/, valid/,
    dev/ and, if there is no val, test/ are found too, in upper or lower case. Reads listings of folders, but no image.

    Raises:
        DataError: no such folder; train/ or val/ is missing (a subfolder that has both is suggested) or has no images;
            val has a class that train lacks; or a symbolic link points out of the data set.
    """
    return _both(path, "folders")


def open_shards(path: Path | str) -> tuple[EncodedSource, EncodedSource]:
    """Returns the training and the validation samples of a folder of tar shards in WebDataset's layout.

        train, val = open_shards("my_shards")  # `megabatch data pack my_photos my_shards` makes them
        print(len(train), train.class_names, train.labels)  # labels: [n] int64, the index of the class name
        image_file = train.read(0)  # bytes, still encoded

    Shards are found by their names or that of their folder, for example train-000000.tar, set-validation-0.tar or
    val/0.tar. Both results are `ShardSource`s of the same classes, with samples in the order of the shards' names.
    Reads the indices of the shards; builds and writes those that are missing.

    Raises:
        DataError: a part is missing; val has a class that train lacks; a tar is compressed or damaged; a member is not
            a plain file or leaves the archive's folder; or a sample has no label, or one that is not a class.
    """
    return _both(path, "tars")


def open_parquet(path: Path | str) -> tuple[EncodedSource, EncodedSource]:
    """Returns the training and the validation samples of a folder of parquet files in Hugging Face's layout.

        train, val = open_parquet("my_dataset")  # pip install 'megabatch[parquet]'
        print(len(train), train.class_names, train.labels)  # labels: [n] int64, the index of the class name
        image_file = train.read(0)  # bytes, still encoded

    Files belong to the part that their name, or that of a folder on the way to them, states: train, and validation or
    else test. Both results are `ParquetSource`s of the same classes. Reads all labels, but no image.

    Raises:
        DataError: pyarrow is missing; a part is missing; files differ in columns or classes; a file is damaged or has
            no column of image bytes or of labels; or a label is missing or not a class.
    """
    return _both(path, "parquet")


def _both(path: Path | str, kind: str) -> tuple[EncodedSource, EncodedSource]:
    train, evaluation = open_train_and_evaluation(path, kind=kind).parts.values()
    return train, evaluation


def _opened(layout: Layout, openers: Mapping[str, Callable[[], EncodedSource]]) -> DataSet:
    sources = {part: opener() for part, opener in openers.items()}
    numbered = all(getattr(source, "numbered", False) for source in sources.values())
    notes = agree_on_classes(sources, str(layout.path), numbered=numbered)
    return DataSet(layout, sources, notes + _note_left_out(layout))


def _openers(layout: Layout) -> dict[str, Callable[[], EncodedSource]]:
    """A function for each part that opens it."""
    if layout.kind == "folders":
        return {
            part: partial(FolderSource, paths[0], allow_empty=part != "train") for part, paths in layout.parts.items()
        }
    if layout.kind == "metadata":
        tables = {part: open_metadata(paths[0]) for part, paths in layout.parts.items()}
        opened = (
            tables["train"] if list(tables) == ["train"] else {p: next(iter(t.values())) for p, t in tables.items()}
        )
        return {part: partial(opened.__getitem__, part) for part in opened}
    if layout.kind == "parquet":
        return {part: partial(ParquetSource, paths) for part, paths in layout.parts.items()}
    if (
        list(layout.parts) == ["train"]
        and len(layout.parts["train"]) == 1
        and not holds_labels(layout.parts["train"][0])
    ):
        inside = open_folders_in_tar(layout.parts["train"][0])
        return {part: partial(inside.__getitem__, part) for part in inside}
    return {part: partial(_open_tars, part, paths) for part, paths in layout.parts.items()}


def _open_tars(part: str, paths: Sequence[Path]) -> EncodedSource:
    """Shards, or one tar of class folders."""
    if len(paths) > 1 or holds_labels(paths[0]):
        return ShardSource(paths)
    inside = open_folders_in_tar(paths[0])
    if part not in inside and len(inside) > 1:
        raise DataError(f"{paths[0]} holds no folder {part}/, but {' and '.join(inside)}; name this file to read those")
    return inside.get(part) or next(iter(inside.values()))


def _refuse_one_class(layout: Layout, names: Sequence[str]) -> None:
    if len(names) > 1:
        return
    text = f"{layout.path} has one class, '{names[0]}'; at least 2 are needed"
    if layout.kind == "folders":
        text += ". Classes are the folders directly below train/, so train/CLASS/1.jpg works"
    raise DataError(text)


def _missing(layout: Layout, part: str, found: Sequence[str]) -> str:
    form = {"folders": f"{part}/CLASS/1.jpg", "tars": f"{part}-000000.tar or {part}/0.tar"}
    needed = form.get(layout.kind, f"{part}-00000-of-00001.parquet")
    text = f"{layout.path} has no images for '{part}', only for {', '.join(found)}; needed: {needed}"
    return f"{text}, or --val-fraction 0.1, which holds out a tenth of train" if part != "train" else text


def _note_left_out(layout: Layout) -> list[str]:
    if not layout.left_out:
        return []
    more = f" and {len(layout.left_out) - 1} more" if len(layout.left_out) > 1 else ""
    return [f"{layout.left_out[0].name}{more} beside the {layout.kind} is not read; name it as the data set to read it"]
