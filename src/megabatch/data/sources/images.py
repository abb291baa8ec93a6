"""Images without labels: files, folders at any depth, and the images in tars."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from megabatch.data.sources.layout import is_hidden, is_image, list_folder
from megabatch.data.sources.tar.tar_folder import TarFolderSource
from megabatch.data.sources.tar.tar_index import list_members
from megabatch.errors import DataError

Entry = tuple[str, Callable[[], bytes]]


class UnlabelledImages:
    """The images in `paths`, as an `EncodedSource` whose labels are all 0.

    A path is an image file, a folder (all images below it, sorted by name) or a tar (its images, sorted by name). A
    file that is named itself is an image whatever its extension. Images keep the order of `paths`. `change` is applied
    to the bytes of each file that is read.

    Raises:
        DataError: a path does not exist, a folder or tar holds no image, or a tar is compressed or damaged.
    """

    shard_sizes: Sequence[int] | None = None
    class_names = ("image",)

    def __init__(self, paths: Iterable[Path], *, change: Callable[[bytes], bytes] | None = None) -> None:
        self._change = change
        self._entries = [entry for path in paths for entry in _entries(path)]
        self.labels: NDArray[np.int64] = np.zeros(len(self._entries), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> bytes:
        """Returns the complete file of one image; OSError if it cannot be read."""
        data = self._entries[index][1]()
        return self._change(data) if self._change else data

    def name(self, index: int) -> str:
        """Returns the path of an image, or `TAR:MEMBER`."""
        return self._entries[index][0]


def _entries(path: Path) -> list[Entry]:
    if path.is_dir():
        found = [(str(file), file.read_bytes) for file in _files_below(path)]
    elif path.suffix == ".tar":
        found = _members(path)
    elif path.exists():
        return [(str(path), path.read_bytes)]
    else:
        raise DataError(f"there is no {path}; an image, a folder of images or a tar of images works")
    if not found:
        raise DataError(f"{path} holds no images; needed: files such as 1.jpg, at any depth")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for entry in list_folder(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        elif is_image(entry.name):
            yield Path(entry.path)


def _members(tar: Path) -> list[Entry]:
    if not tar.is_file():
        raise DataError(f"there is no file {tar}; an image, a folder of images or a tar of images works")
    paths = [(member, PurePosixPath(member.name)) for member in list_members(tar)]
    shown = [(member, path) for member, path in paths if is_image(path.name) and not any(map(is_hidden, path.parts))]
    source = TarFolderSource(tar, shown)
    return [(source.name(index), partial(source.read, index)) for index in range(len(source))]
