"""Image files in one folder per class, and a quick check for damaged files before a run starts."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megabatch.cores import usable_cores
from megabatch.data.jpeg.decode import image_size
from megabatch.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class FolderSource:
    """Images under `path`/CLASS/, at any depth, as an `EncodedSource`.

    Classes and files are sorted by the bytes of their names, so the order is the same on every machine. Files with an
    image suffix, in upper or lower case, count as images. Hidden files are ignored, and links to folders inside a class
    are not followed. A file is read when its sample is requested.

    Raises:
        DataError: no such folder, no images, a class without images, or a symbolic link to outside of `path`.
    """

    shard_sizes: Sequence[int] | None = None

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        by_class = _images_by_class(self.path)
        self.class_names = tuple(by_class)
        self._names = _PackedStrings([name for names in by_class.values() for name in names])
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

        Finds empty files, files that are not images, and truncated files. It decodes nothing, so damage in the middle
        is not found; training replaces such files when it meets them, and `megabatch data check` finds them.

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
            raise DataError(
                f"{self.name(index)}: {fault}{more}; remove or replace what `megabatch data check {self.path}` lists"
            )

    def _fault(self, index: int) -> str | None:
        try:
            return check_file_ends(self.path / self._names[index])
        except OSError as error:
            return f"cannot be read ({error.strerror})"


def open_folder(path: Path | str) -> tuple[FolderSource, FolderSource]:
    """Returns the training and the validation images from `path`/train/CLASS/ and `path`/val/CLASS/, at any depth.

        train, val = open_folder("my_photos")
        print(len(train), train.class_names, train.labels)  # labels: [n] int64, the index of the class name
        image_file = train.read(0)  # bytes, still encoded

    Both are `FolderSource`s of the same classes, sorted by name. Reads the folders' listings, but no image.

    Raises:
        DataError: no such folder; train/ or val/ is missing (a subfolder that has both is suggested); the classes
            differ, or one has no images; or a symbolic link points out of the data set.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; needed: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise DataError(f"{path} has no folder {part}/; {_suggestion(path)}")
    train, val = FolderSource(path / "train"), FolderSource(path / "val")
    _compare_classes(train, val)
    return train, val


def check_file_ends(path: Path) -> str | None:
    """Describes a fault that an image file's first and last bytes show; None if they show none."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return "the file is empty"
        start = file.read(1 << 16)
        file.seek(max(0, size - 1024))
        end = file.read()
    if start[:3] == b"\xff\xd8\xff" and b"\xff\xd9" not in end and not _jpeg_ends(path.read_bytes()):
        return "the JPEG is truncated (it has no end marker)"
    if start[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" not in end:
        return "the PNG is truncated (it has no end chunk)"
    if start[:4] == b"RIFF" and int.from_bytes(start[4:8], "little") + 8 > size:
        return "the WebP is truncated (it is shorter than its header says)"
    try:
        image_size(start)
    except DataError:
        return _fault_of_whole(path)
    return None


def _jpeg_ends(data: bytes) -> bool:
    """True if an end marker follows the last scan; some cameras append other data after the image."""
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def _fault_of_whole(path: Path) -> str | None:
    """Checks the header of a file whose header is longer than the first bytes, or at another place (TIFF)."""
    try:
        image_size(path.read_bytes())
    except DataError as error:
        return str(error)
    return None


def _class_folders(path: Path, root: str) -> list[str]:
    """Names of the visible folders in `path`, sorted."""
    with os.scandir(path) as entries:
        folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    for entry in folders:
        if entry.is_symlink():
            _refuse_link_outside(entry.path, root)
    return sorted(entry.name for entry in folders)


class _PackedStrings:
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


def _images_by_class(path: Path) -> dict[str, list[str]]:
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
    if empty := [name for name, images in by_class.items() if not images]:
        raise DataError(f"class '{empty[0]}' has no images in {path / empty[0]}; remove the folder or add images to it")
    return by_class


def _images_below(path: Path, class_name: str, root: str) -> Iterator[str]:
    """Yields image paths relative to `path`, in no order; lists each folder once and opens no file."""
    folders = [class_name]
    while folders:
        folder = folders.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _refuse_link_outside(entry.path, root)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}/{entry.name}")
                elif not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    yield f"{folder}/{entry.name}"


def _refuse_link_outside(link: str, root: str) -> None:
    """Refuses a link to outside of the data set, which could make any readable file a sample; others are allowed."""
    if os.path.commonpath([os.path.realpath(link), root]) != root:
        raise DataError(f"{link} is a symbolic link out of the data set; replace it by a copy of its target")


def _suggestion(path: Path) -> str:
    for child in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if (child / "train").is_dir() and (child / "val").is_dir():
            return f"did you mean {child}?"
    return "needed: train/CLASS/*.jpg and val/CLASS/*.jpg"


def _compare_classes(train: FolderSource, val: FolderSource) -> None:
    if train.class_names == val.class_names:
        return
    only_train = sorted(set(train.class_names) - set(val.class_names))
    only_val = sorted(set(val.class_names) - set(train.class_names))
    where, name = ("train", only_train[0]) if only_train else ("val", only_val[0])
    raise DataError(
        f"classes of train and val differ: '{name}' is only in {where} "
        f"({len(train.class_names)} and {len(val.class_names)} classes); both need the same folders"
    )


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
