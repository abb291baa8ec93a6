"""Where the images of a data set are: its parts train, val and test, the files that count, and those that do not.

`train`, `evaluate`, `check` and `pack` all find a data set here, so that they see the same samples. A part is a folder
of class folders, or tar or parquet files. A name belongs to a part by its last word among `_PART_OF_WORD`, whatever
comes before and after it: `Train`, `val2017`, `cifar10-validation-00000-of-00001.parquet`.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megabatch.data.jpeg.formats import ENDINGS
from megabatch.errors import DataError

IMAGE_SUFFIXES = frozenset(f".{ending}" for endings in ENDINGS.values() for ending in endings)
COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PARTS = ("train", "val", "test")
SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
_PART_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ENDINGS = {"tars": (".tar", *COMPRESSED_ENDINGS), "parquet": (".parquet",)}
_ALL_ENDINGS = tuple(ending for endings in _ENDINGS.values() for ending in endings)
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NEEDED = "needed: train/CLASS/1.jpg and val/CLASS/1.jpg, or tar or parquet files named train-* and val-*"


@dataclass(frozen=True)
class Layout:
    """A data set's files: `kind` is "folders", "tars", "parquet" or "metadata" (tables that list image files).

    `parts` gives for each part its folder of class folders (one path) or its files, sorted. Without a name that tells
    parts apart, everything is train. `left_out` are archives and tables that are not read.
    """

    path: Path
    kind: str
    parts: Mapping[str, Sequence[Path]]
    left_out: Sequence[Path] = field(default_factory=tuple)


def find_layout(path: Path | str, *, kind: str | None = None) -> Layout:
    """Finds the data set at `path`, a folder or one file; lists folders, but opens no file.

    Folders of images come first, then tars, then parquet files; but what is divided into train and val (or test) comes
    before what is not. So an archive beside folders is read only if it is named, or if nothing else can be trained.
    `kind` restricts the search to one of the three.

    Raises:
        DataError: nothing is found, a folder cannot be read, or names do not tell which part or file is meant.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return Layout(path, _kind_of_file(path), {"train": [path]})
    if not path.is_dir():
        what = f"{path} is neither a folder nor a plain file" if path.exists() else f"there is no {path}"
        raise DataError(f"{what}; {_NEEDED}")
    if kind is None and (tables := _metadata(path)):
        return Layout(path, "metadata", tables)
    split = _split_folders(path) if kind in {None, "folders"} else None
    if split is not None and len(split) > 1 and (kind or any(_has_image(folder) for (folder,) in split.values())):
        return Layout(path, "folders", split, [] if kind else _archives_beside(path))
    files = _data_files(path)
    if split is not None and files and not any(_has_image(folder) for (folder,) in split.values()):
        split = None  # train/ and val/ hold tars or parquet files
    return _choose(path, split, files, kind)


def _kind_of_file(path: Path) -> str:
    if path.name in METADATA_NAMES or path.suffix in {".csv", ".jsonl"}:
        return "metadata"
    return "parquet" if path.suffix == ".parquet" else "tars"


def _metadata(path: Path) -> dict[str, Sequence[Path]]:
    """Tables that list images, by part: one in `path`, or one in the folder of each part.

    Where images are in two or more class folders, a table beside these says something else of them.
    """
    folders = [("train", path), *((part, path / name) for name in subfolders(path) if (part := part_of(name)))]
    tables = {
        part: [folder / name]
        for part, folder in folders
        for name in METADATA_NAMES
        if (folder / name).is_file() and not _is_classified(folder)
    }
    return {part: tables[part] for part in PARTS if part in tables}


def _is_classified(path: Path) -> bool:
    """True if the images of a data set or part are in two or more class folders."""
    places = [path / name for name in subfolders(path) if part_of(name)] or [path]
    return all(len(subfolders(place)) > 1 and not _images_in(place) for place in places)


def is_hidden(name: str) -> bool:
    """True for names that begin with a dot, and for folders that operating systems and tools create."""
    return (name.startswith(".") and name != ".") or name in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """True if a file is visible and its extension is that of an image, in upper or lower case."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def part_of(name: str) -> str | None:
    """The part that a file or folder name states; None if it states none."""
    word = _part_word(name)
    return None if word is None else _PART_OF_WORD[word]


def by_part(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Names of files, relative to the data set, by part, in the order of `PARTS`; the key "" holds those without one.

    The file's own name decides, else that of the closest folder. Files in a folder train/ come before train-0.tar
    beside it, which then has no part.

    Raises:
        DataError: a part goes by two words, such as val and validation, or lies in two places: which may be two sets.
    """
    found: dict[str, dict[tuple[str, bool, str], list[str]]] = {}
    for name in sorted(names):
        pieces = name.split("/")
        part = next(filter(None, map(part_of, reversed(pieces))), "")
        at = next((i for i, piece in enumerate(pieces) if part_of(piece) == part), 0)  # the outermost that says so
        place = ("/".join(pieces[:at]), at == len(pieces) - 1, _part_word(pieces[at]) or "")
        found.setdefault(part, {}).setdefault(place, []).append(name)
    chosen = {part: _one_place(part, found[part], where) for part in PARTS if part in found}
    taken = {name for those in chosen.values() for name in those}
    rest = [name for places in found.values() for those in places.values() for name in those if name not in taken]
    return chosen | ({"": sorted(rest)} if rest else {})


def _one_place(part: str, places: dict[tuple[str, bool, str], list[str]], where: str) -> list[str]:
    """The files of a part, which must lie in one place and go by one word."""
    in_folders = {place for place in places if not place[1]}
    kept = [place for place in places if not place[1] or (place[0], False, place[2]) not in in_folders]
    if len(kept) > 1:
        (above, _, word), (other_above, _, other_word) = kept[:2]
        what = f"'{word}' and '{other_word}'" if word != other_word else f"{above or '.'}/ and {other_above or '.'}/"
        raise DataError(f"{where} holds images for '{part}' as {what}, maybe two data sets; name or keep one of them")
    return places[kept[0]]


def list_folder(path: Path | str) -> list[os.DirEntry[str]]:
    """Entries of a folder that are not hidden, sorted by name; DataError if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        _refuse_unreadable(error)


def subfolders(path: Path | str) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    return [entry.name for entry in list_folder(path) if entry.is_dir()]


def _choose(path: Path, folders: dict[str, Sequence[Path]] | None, files: Sequence[Path], kind: str | None) -> Layout:
    """The layout of a folder that is not divided into parts by its folders."""
    found = _parts_of_files(path, files, kind)
    divided = [name for name, parts in found.items() if "train" in parts and len(parts.keys() - {""}) > 1]
    has_folders = folders is not None or _class_folders(path)
    if len(divided or found) > 1 and not has_folders:
        raise DataError(f"{path} holds both tar and parquet files; name one of them, or move one kind elsewhere")
    if not divided and kind in {None, "folders"} and has_folders:
        if folders is None:
            _refuse_parts_below(path)
        return Layout(path, "folders", folders or {"train": [path]}, [] if kind else _archives_beside(path))
    if not found:
        what = {"tars": "tar files", "parquet": "parquet files"}.get(str(kind), "images")
        raise DataError(f"{path} contains no {what}; {_NEEDED}")
    name = next(iter(divided or found))
    parts = {part: those for part, those in found[name].items() if part} or {"train": found[name][""]}
    read = {file for those in parts.values() for file in those}
    return Layout(path, name, parts, [file for file in files if file not in read])


def _parts_of_files(path: Path, files: Sequence[Path], kind: str | None) -> dict[str, dict[str, Sequence[Path]]]:
    """Tars and parquet files by kind and part."""
    found: dict[str, dict[str, Sequence[Path]]] = {}
    for name, endings in _ENDINGS.items():
        those = [file.relative_to(path).as_posix() for file in files if file.name.lower().endswith(endings)]
        if those and kind in {None, name}:
            parts = by_part(those, str(path))
            found[name] = {part: [path / file for file in names] for part, names in parts.items()}
    return found


def _part_word(name: str) -> str | None:
    words = [word.lower() for word in _WORD.findall(name)]
    return next((word for word in reversed(words) if word in _PART_OF_WORD), None)


def _split_folders(path: Path) -> dict[str, Sequence[Path]] | None:
    """The folders of the parts; None if `path` holds class folders instead, or no folder.

    A folder that is called exactly train or validation comes before val2017 or old_train. It is a class instead if it
    holds images but no folders, and stands beside other classes.
    """
    names = subfolders(path)
    exact = [name for name in names if name.lower() in _PART_OF_WORD]
    others = [name for name in names if name not in exact]
    if exact and not (others and all(_holds_images_only(path / name) for name in exact)):
        _refuse_unclear(path, exact, others)
        return _one_folder_each(path, exact)
    composite = [name for name in names if part_of(name) and _has_classes(path / name)]
    if composite and not any(_has_image(path / name) for name in names if name not in composite):
        return _one_folder_each(path, composite)
    return None


def _one_folder_each(path: Path, names: Sequence[str]) -> dict[str, Sequence[Path]]:
    found: dict[str, str] = {}
    for name in names:
        part = str(part_of(name))
        if part == "test" and not _class_folders(path / name):  # images of a contest, without classes
            continue
        if part in found:
            raise DataError(f"{path} holds {found[part]}/ and {name}/, which both mean '{part}'; keep one of the two")
        found[part] = name
    return {part: [path / found[part]] for part in PARTS if part in found}


def _refuse_unclear(path: Path, exact: Sequence[str], others: Sequence[str]) -> None:
    """Refuses one part beside folders of images: each of them may be a class."""
    beside = next((name for name in others if _has_image(path / name)), None) if len(exact) == 1 else None
    if beside is not None:
        raise DataError(
            f"{path} holds {exact[0]}/ beside {beside}/, so that {exact[0]} may be a part or a class; needed: folders "
            f"train/ and val/, or name {path / exact[0]} itself"
        )


def _refuse_parts_below(path: Path) -> None:
    """Refuses a folder that is one above the data set, or whose classes are each divided into parts."""
    for name in subfolders(path):
        parts = {part_of(below): below for below in subfolders(path / name) if below.lower() in _PART_OF_WORD}
        if "train" in parts and len(parts) > 1:
            raise DataError(
                f"{path} has no folder train/, but {path / name} has; did you mean {path / name}? Else needed: "
                f"train/{name} instead of {name}/train"
            )


def _class_folders(path: Path) -> bool:
    return any(_has_image(path / name) for name in subfolders(path))


def _has_classes(path: Path) -> bool:
    return not _images_in(path) and _class_folders(path)


def _holds_images_only(path: Path) -> bool:
    return _images_in(path) and not subfolders(path)


def _images_in(path: Path) -> bool:
    return any(is_image(entry.name) for entry in list_folder(path) if not entry.is_dir())


def _has_image(path: Path) -> bool:
    """True if there is an image at any depth."""
    return any(is_image(file.name) for file in visible_files(path))


def visible_files(path: Path) -> Iterator[Path]:
    """Visible files at any depth, outside of hidden folders."""
    for parent, folders, files in os.walk(path, onerror=_refuse_unreadable):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(parent, file) for file in sorted(files) if not is_hidden(file))


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename} cannot be read ({error.strerror}); needed: permission to read and enter it (chmod u+rx)"
    ) from error


def _data_files(path: Path) -> list[Path]:
    """Tars and parquet files at any depth; folders that are links, to another disk for example, are followed once."""
    linked = [path / name for name in subfolders(path) if (path / name).is_symlink()]
    return [
        file for root in (path, *linked) for file in visible_files(root) if file.name.lower().endswith(_ALL_ENDINGS)
    ]


def _archives_beside(path: Path) -> list[Path]:
    """Tars and parquet files in the folder itself."""
    return [Path(entry.path) for entry in list_folder(path) if entry.name.lower().endswith(_ALL_ENDINGS)]
