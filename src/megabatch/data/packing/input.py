"""Input formats of `pack`: folders of classes, tars of any layout, parquet; each as parts with keys and sizes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.parquet import ParquetSource
from megabatch.data.sources.parquet import open_parquet as open_parquet_parts
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.shards import ShardSource, open_shards
from megabatch.data.sources.tar_index import IMAGE_ENDINGS, LABEL_ENDING, Member, list_members, split_name
from megabatch.errors import DataError

PARTS = ("train", "val")


@dataclass(frozen=True)
class Part:
    """One part of a data set, train or val; one key and size per sample."""

    name: str
    source: EncodedSource
    keys: Sequence[str]  # unique
    sizes: npt.NDArray[np.int64]  # bytes of the image file; estimated for parquet
    random_access: bool  # False if reading one sample reads its neighbours too


def open_parts(path: Path) -> list[Part]:
    """The parts train and val if the data set has both, otherwise one part named train.

    Raises:
        DataError: there is no data set at `path`, it is invalid, or train and val have different classes.
    """
    sources = _sources(path)
    names = [source.class_names for source in sources.values()]
    if any(other != names[0] for other in names):
        raise DataError(f"{path}: train and val have different classes; both need the same ones")
    return [
        Part(name, source, _keys(source), _sizes(source), not isinstance(source, ParquetSource))
        for name, source in sources.items()
    ]


def _sources(path: Path) -> dict[str, EncodedSource]:
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise DataError(f"there is no {path}; needed: a folder of images, a tar or parquet files")
    if any(path.rglob("*.tar")) or any(path.rglob("*.tar.*")):
        return _open_tars(path)
    if any(path.rglob("*.parquet")):
        return _open_both_or_one(path, open_parquet_parts, ParquetSource, list(path.rglob("*.parquet")))
    if all((path / part).is_dir() for part in PARTS):
        return {part: FolderSource(path / part) for part in PARTS}
    return {"train": FolderSource(path)}


def _open_file(path: Path) -> dict[str, EncodedSource]:
    if path.suffix == ".parquet":
        return {"train": ParquetSource(path)}
    members = list_members(path)
    if any(_ending(member.name) == LABEL_ENDING for member in members):
        return {"train": ShardSource(path)}
    return _open_folders_in_tar(path, members)


def _open_tars(path: Path) -> dict[str, EncodedSource]:
    tars = list(path.rglob("*.tar"))
    if len(tars) == 1 and not tars[0].name.startswith(PARTS):
        return _open_file(tars[0])
    return _open_both_or_one(path, open_shards, ShardSource, tars)


def _open_both_or_one(
    path: Path,
    open_both: Callable[[Path], tuple[EncodedSource, EncodedSource]],
    open_one: Callable[[Path], EncodedSource],
    files: Sequence[Path],
) -> dict[str, EncodedSource]:
    """Opens train and val if a file or folder name begins with val, otherwise all files as train."""
    has_val = any(part.startswith("val") for file in files for part in file.relative_to(path).parts)
    return dict(zip(PARTS, open_both(path), strict=True)) if has_val else {"train": open_one(path)}


def _ending(name: str) -> str:
    parts = split_name(name)
    return parts[1].rsplit(".", 1)[-1] if parts else ""


class TarFolderSource:
    """Image files in one folder per class, inside a tar.

    `members` are the tar's members, each with its path below the part's folder.
    """

    shard_sizes: Sequence[int] | None = None

    def __init__(self, tar: Path, members: Sequence[tuple[Member, PurePosixPath]]) -> None:
        ordered = sorted(members, key=lambda pair: os.fsencode(str(pair[1])))
        self.members = [member for member, _ in ordered]
        self.paths = [path for _, path in ordered]
        self.class_names = tuple(sorted({path.parts[0] for path in self.paths}, key=os.fsencode))
        number = {name: i for i, name in enumerate(self.class_names)}
        self.labels: npt.NDArray[np.int64] = np.array([number[path.parts[0]] for path in self.paths], dtype=np.int64)
        self._tar = tar

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> bytes:
        member = self.members[index]
        with self._tar.open("rb") as file:
            return os.pread(file.fileno(), member.size, member.offset)

    def name(self, index: int) -> str:
        return f"{self._tar.name}:{self.members[index].name}"


def _open_folders_in_tar(tar: Path, members: Iterable[Member]) -> dict[str, EncodedSource]:
    """Parts from `.../train/CLASS/...` and `.../val/CLASS/...`; without such folders, everything is train."""
    images = [(member, PurePosixPath(member.name)) for member in members if _ending(member.name) in IMAGE_ENDINGS]
    by_part: dict[str, list[tuple[Member, PurePosixPath]]] = {}
    for member, path in images:
        part = next((name for name in path.parts[:-2] if name in PARTS), None)
        if part is not None:
            below = PurePosixPath(*path.parts[path.parts.index(part) + 1 :])
            by_part.setdefault(part, []).append((member, below))
    if not by_part:
        by_part = {
            "train": [(member, PurePosixPath(*path.parts[-2:])) for member, path in images if len(path.parts) > 1]
        }
    if not any(by_part.values()):
        raise DataError(f"{tar} holds no images in folders of classes; needed: members such as train/dog/1.jpg")
    return {part: TarFolderSource(tar, by_part[part]) for part in PARTS if part in by_part}


def _sizes(source: EncodedSource) -> npt.NDArray[np.int64]:
    if isinstance(source, ShardSource):
        return source.sizes.astype(np.int64)
    if isinstance(source, TarFolderSource):
        return np.array([member.size for member in source.members], dtype=np.int64)
    if isinstance(source, FolderSource):
        return np.array([os.stat(source.name(i)).st_size for i in range(len(source))], dtype=np.int64)
    assert isinstance(source, ParquetSource)
    return source.estimated_sizes()


def _keys(source: EncodedSource) -> list[str]:
    """One unique key per sample: its path without extension and without characters that tar readers misinterpret."""
    counts: dict[str, int] = {}
    keys = []
    for path in _paths(source):
        key = _portable_key(path)
        count = counts[key] = counts.get(key, 0) + 1
        keys.append(key if count == 1 else f"{key}-{count}")
    if len(set(keys)) == len(keys):
        return keys
    return [f"{i:08d}" for i in range(len(source))]  # a numbered key equals the name of another file


def _paths(source: EncodedSource) -> Iterator[PurePosixPath]:
    if isinstance(source, TarFolderSource):
        yield from source.paths
    elif isinstance(source, ShardSource):
        yield from map(PurePosixPath, source.member_names())
    elif isinstance(source, FolderSource):
        for i in range(len(source)):
            yield PurePosixPath(Path(source.name(i)).relative_to(source.path).as_posix())
    else:
        for i in range(len(source)):
            yield PurePosixPath(source.class_names[source.labels[i]], f"{i:08d}.img")


def _portable_key(path: PurePosixPath) -> str:
    # WebDataset splits a name at its first dot, so the key must not contain one.
    stem = path.name.rsplit(".", 1)[0].replace(".", "_") or "_"
    text = "/".join([*path.parts[:-1], stem])
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() and char not in "\\:" else "_" for char in text)
