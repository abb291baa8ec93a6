"""Images in one folder per class inside a tar, as an archive of a folder of images holds them."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from megabatch.data.sources.layout import PARTS, is_hidden, is_image, part_of
from megabatch.data.sources.tar.tar_index import LABEL_ENDING, Member, list_members, split_name
from megabatch.errors import DataError


class TarFolderSource:
    """Image files in one folder per class, inside a tar, as an `EncodedSource`.

    `members` are the tar's members, each with its path below the part's folder, which begins with the class.
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
        """Returns the complete file of one sample."""
        member = self.members[index]
        with self._tar.open("rb") as file:
            return os.pread(file.fileno(), member.size, member.offset)

    def name(self, index: int) -> str:
        """Returns tar and member, for example `photos.tar:train/dog/17.jpg`."""
        return f"{self._tar.name}:{self.members[index].name}"


def holds_labels(tar: Path) -> bool:
    """True if a tar has members `KEY.cls`, so that it is a shard in WebDataset's layout."""
    return any(_ending(member.name) == LABEL_ENDING for member in list_members(tar))


def open_folders_in_tar(tar: Path) -> dict[str, TarFolderSource]:
    """Parts from `.../train/CLASS/...` and `.../val/CLASS/...`, at any depth; without such folders, all is train.

    A class is the folder directly below that of the part, or else the first folder in which members differ.

    Raises:
        DataError: there are no images in folders, or two folders mean the same part.
    """
    images = [
        (member, PurePosixPath(member.name))
        for member in list_members(tar)
        if is_image(PurePosixPath(member.name).name) and not any(map(is_hidden, PurePosixPath(member.name).parts))
    ]
    by_part = _divided(tar, images) or {"train": _below_shared_folders(images)}
    if len(by_part) == 1:
        _refuse_unclear(tar, by_part, images)
    if not any(by_part.values()):
        raise DataError(f"{tar} holds no images in folders of classes; needed: members such as train/dog/1.jpg")
    return {part: TarFolderSource(tar, by_part[part]) for part in PARTS if part in by_part}


def _refuse_unclear(
    tar: Path,
    by_part: dict[str, list[tuple[Member, PurePosixPath]]],
    images: Sequence[tuple[Member, PurePosixPath]],
) -> None:
    """Refuses one part beside other folders of images: each of them may be a class."""
    ((part, members),) = by_part.items()
    read = {member.name for member, _ in members}
    beside = next(
        (
            path
            for m, path in images
            if m.name not in read and not part_of(path.parts[-2] if len(path.parts) > 1 else "train")
        ),
        None,
    )
    if beside is not None:
        raise DataError(
            f"{tar} holds '{part}' and also {beside}, so that it may be a part or a class; needed: train/CLASS/1.jpg "
            "and val/CLASS/1.jpg"
        )


def _divided(
    tar: Path, images: Iterable[tuple[Member, PurePosixPath]]
) -> dict[str, list[tuple[Member, PurePosixPath]]]:
    """Members below a folder that is called exactly as a part, with their paths below it."""
    found: dict[str, list[tuple[Member, PurePosixPath]]] = {}
    folders: dict[str, PurePosixPath] = {}
    for member, path in images:
        at = next((i for i, name in enumerate(path.parts[:-2]) if name.isalpha() and part_of(name.lower())), None)
        if at is None:
            continue
        part, folder = str(part_of(path.parts[at].lower())), PurePosixPath(*path.parts[: at + 1])
        if folders.setdefault(part, folder) != folder:
            raise DataError(
                f"{tar} holds {folders[part]}/ and {folder}/, which both mean '{part}'; keep one of the two"
            )
        found.setdefault(part, []).append((member, PurePosixPath(*path.parts[at + 1 :])))
    return found


def _below_shared_folders(
    images: Iterable[tuple[Member, PurePosixPath]],
) -> list[tuple[Member, PurePosixPath]]:
    """Members in folders, with their paths below the folders that all of them share; one folder stays, as the class."""
    inside = [(member, path) for member, path in images if len(path.parts) > 1]
    shared = 0
    while inside and all(len(path.parts) > shared + 2 for _, path in inside):
        if len(Counter(path.parts[shared] for _, path in inside)) > 1:
            break
        shared += 1
    return [(member, PurePosixPath(*path.parts[shared:])) for member, path in inside]


def _ending(name: str) -> str:
    parts = split_name(name)
    return parts[1].rsplit(".", 1)[-1] if parts else ""
