"""Image files in one folder per class, and a quick check for damaged files before a run starts."""

import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megabatch.cores import usable_cores
from megabatch.data.jpeg.ends import check_file_ends
from megabatch.data.sources.layout import IMAGE_SUFFIXES, is_image, list_folder
from megabatch.errors import DataError


class FolderSource:
    """Images under `path`/CLASS/, at any depth, as an `EncodedSource`.

    Classes and files are sorted by the bytes of their names, so the order is the same on every machine. Files with an
    image suffix, in upper or lower case, count as images. Hidden files and folders are ignored at every depth, and
    links to folders inside a class are not followed. A file is read when its sample is requested.

    Args:
        path: the folder of class folders.
        allow_empty: a class folder without images is no class, instead of an error.

    Raises:
        DataError: no such folder, one that cannot be read, no images, a class without images, or a symbolic link to
            outside of `path`.
    """

    shard_sizes: Sequence[int] | None = None

    def __init__(self, path: Path | str, *, allow_empty: bool = False) -> None:
        self.path = Path(path).expanduser()
        by_class = _images_by_class(self.path, allow_empty=allow_empty)
        self.class_names = tuple(by_class)
        self._names = PackedStrings([name for names in by_class.values() for name in names])
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(by_class)), [len(n) for n in by_class.values()])

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        """Returns the complete file of one sample; OSError if it cannot be read."""
        return (self.path / self._names[index]).read_bytes()

    def name(self, index: int) -> str:
        """Returns the path of the sample's file."""
        return str(self.path / self._names[index])

    def probe(self, sample: int | None = None) -> None:
        """Checks the beginning and the end of each file, or of `sample` files that are spread evenly.

        Finds empty files, files that are not images, and truncated files: all of them are bad to `megabatch data
        check`, too. Damage in the middle is not found; training replaces such files when it meets them.

        Raises:
            DataError: states the first bad file, its fault, and the number of other bad files.
        """
        count = len(self) if sample is None else min(sample, len(self))
        indices = np.linspace(0, len(self) - 1, count).astype(np.int64).tolist()
        with ThreadPoolExecutor(usable_cores()) as threads:
            faults = list(threads.map(self._fault, indices))
        bad = [(index, fault) for index, fault in zip(indices, faults, strict=True) if fault]
        if bad:
            index, fault = bad[0]
            more = f" and {len(bad) - 1} more files are bad" if len(bad) > 1 else ""
            check = f"megabatch data check {shlex.quote(str(self.path))}"
            raise DataError(f"{self.name(index)}: {fault}{more}; `{check}` lists bad files, --exclude moves them away")

    def _fault(self, index: int) -> str | None:
        try:
            return check_file_ends(self.path / self._names[index])
        except OSError as error:
            return f"cannot be read ({error.strerror})"


def _class_folders(path: Path, root: str) -> list[str]:
    """Names of the visible folders in `path`, sorted."""
    folders = [entry for entry in list_folder(path) if entry.is_dir()]
    for entry in folders:
        if entry.is_symlink():
            refuse_link_outside(entry.path, root)
    return [entry.name for entry in folders]


class PackedStrings:
    """A list of strings in one block of memory: about 40 MB for a million file names instead of 110 MB."""

    def __init__(self, names: list[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._block[start : self._ends[index]])


def _images_by_class(path: Path, *, allow_empty: bool) -> dict[str, list[str]]:
    """Image paths relative to `path` by class; classes and paths are sorted."""
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; needed: a folder with one folder of images per class")
    root = os.path.realpath(path)
    classes = _class_folders(path, root)
    if not classes:
        raise DataError(
            f"{path} contains no images; needed: one folder of image files per class, for example {path}/cat/1.jpg"
        )
    by_class = {name: sorted(_images_below(path, name, root)) for name in classes}
    if not any(by_class.values()):
        raise DataError(f"{path} contains no images; needed: files that end in {_suffixes()}")
    empty = [name for name, images in by_class.items() if not images]
    if empty and not allow_empty:
        raise DataError(f"class '{empty[0]}' has no images in {path / empty[0]}; remove the folder or add images to it")
    return {name: images for name, images in by_class.items() if images}


def _images_below(path: Path, class_name: str, root: str) -> Iterator[str]:
    """Yields image paths relative to `path`, in no order; lists each folder once and opens no file."""
    folders = [class_name]
    while folders:
        folder = folders.pop()
        for entry in list_folder(path / folder):
            if entry.is_symlink():
                refuse_link_outside(entry.path, root)
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}/{entry.name}")
            elif is_image(entry.name):
                yield f"{folder}/{entry.name}"


def refuse_link_outside(link: str, root: str) -> None:
    """Refuses a link to outside of the data set, which could make any readable file a sample; others are allowed."""
    if os.path.commonpath([os.path.realpath(link), root]) != root:
        raise DataError(f"{link} is a symbolic link out of the data set; replace it by a copy of its target")


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
