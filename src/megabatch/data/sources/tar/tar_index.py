"""Index of the samples in a tar: built from the tar once, then read from a small file beside it.

`NAME.tar.idx` is a line of JSON, padded to a multiple of 64 bytes; then one little-endian record per sample (`RECORD`:
64-bit offset of the image in the tar, 64-bit offset of its name among the names, 32-bit sizes of image and name, and
64-bit index of the label in the JSON line's `labels`); then the names, without separators.
"""

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from megabatch.data.jpeg.formats import ENDINGS
from megabatch.data.sources.layout import is_hidden
from megabatch.errors import DataError
from megabatch.files import parse_json, replacing

FORMAT = "megabatch tar index 1"
IMAGE_ENDINGS = frozenset[str]().union(*ENDINGS.values())
LABEL_ENDING = "cls"
RECORD = np.dtype([("offset", "<i8"), ("name", "<i8"), ("size", "<u4"), ("name_size", "<u4"), ("label", "<i8")])
_ALIGN = 64
_MAX_LABEL_BYTES = 4096
_MAX_IMAGE_BYTES = 2**32 - 1
_KEY = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard"}


@dataclass(frozen=True)
class Member:
    """A plain file in a tar: name, offset of its content and size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar."""

    records: npt.NDArray[Any]  # [n], with the fields of `RECORD`
    names: npt.NDArray[np.uint8]  # the members' names, concatenated
    label_texts: Sequence[str]  # the distinct contents of .cls members
    header: dict[str, Any]

    def __len__(self) -> int:
        return len(self.records)

    def name(self, row: int) -> str:
        """Returns the name of a sample's image in the tar."""
        start, size = int(self.records[row]["name"]), int(self.records[row]["name_size"])
        return self.names[start : start + size].tobytes().decode("utf-8", "surrogateescape")


def index_path(tar: Path) -> Path:
    """Path of a tar's index."""
    return tar.with_name(tar.name + ".idx")


def open_index(tar: Path) -> ShardIndex:
    """Returns the index of a tar: the file beside it if it matches the tar, else a new one, which is written there.

    If the folder is read-only, the new index is not written.

    Raises:
        DataError: the tar is missing, compressed or damaged; a member is not a plain file or leaves the archive's
            folder; or a sample has no label.
    """
    if not tar.is_file():
        raise DataError(f"there is no file {tar}; needed: a tar of images, for example train-000000.tar")
    index = load_index(index_path(tar))
    if index is None or not _matches(index, tar):
        index = build_index(tar)
        with contextlib.suppress(OSError):  # read-only folder: the index is rebuilt each time
            write_index(index, index_path(tar))
    return index


def build_index(tar: Path, *, extra: dict[str, Any] | None = None) -> ShardIndex:
    """Builds an index from a tar's members. `extra` is added to the header; `pack` uses it to recognise its shards."""
    texts: dict[str, int] = {}
    rows, names = [], bytearray()
    with tar.open("rb") as file:
        for key, members in _samples(list_members(tar)):
            image, label = _pair(tar, key, members)
            _refuse_huge(tar, image)
            text = _label_text(os.pread(file.fileno(), min(label.size, _MAX_LABEL_BYTES), label.offset), tar, key)
            name = image.name.encode("utf-8", "surrogateescape")
            rows.append((image.offset, len(names), image.size, len(name), texts.setdefault(text, len(texts))))
            names += name
    if not rows:
        raise DataError(f"{tar} contains no samples; needed: pairs of members such as dog/1.jpg and dog/1.cls")
    header = {"format": FORMAT, "samples": len(rows), "labels": list(texts), **_identity(tar), **(extra or {})}
    return ShardIndex(np.array(rows, dtype=RECORD), np.frombuffer(bytes(names), np.uint8), list(texts), header)


def write_index(index: ShardIndex, path: Path) -> None:
    """Writes an index atomically; OSError if the folder is read-only."""
    line = json.dumps(index.header, ensure_ascii=True, sort_keys=True).encode()
    line += b" " * (-(len(line) + 1) % _ALIGN) + b"\n"
    with replacing(path) as part:
        part.write_bytes(line + index.records.tobytes() + index.names.tobytes())


def list_members(tar: Path) -> list[Member]:
    """Returns all plain files of a tar, in order.

    Raises:
        DataError: a compressed, damaged or truncated tar; a link or device; or a name that leaves the archive's folder.
    """
    _refuse_compressed(tar)
    size = tar.stat().st_size
    members = []
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for info in archive:
                if info.isdir():
                    continue
                _refuse_unsafe(info, tar)
                members.append(Member(info.name, info.offset_data, info.size))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{tar} is damaged or not a tar: {error}") from error
    if members and members[-1].offset + members[-1].size > size:
        raise DataError(f"{tar} is truncated: its last member, {members[-1].name}, ends after the file")
    return members


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name into WebDataset's key and ending: `a/b.c.jpg` is `a/b` and `c.jpg`. None if hidden."""
    match = None if any(map(is_hidden, name.split("/"))) else _KEY.match(name)
    return (match[1], match[2].lower()) if match else None


def _samples(members: Sequence[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yields (key, members by ending) for each run of consecutive members with the same key."""
    current, group = None, dict[str, Member]()
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != current and group:
            yield str(current), group
            group = {}
        current = parts[0]
        group[parts[1]] = member
    if group:
        yield str(current), group


def _pair(tar: Path, key: str, members: dict[str, Member]) -> tuple[Member, Member]:
    """Image and label of a sample; DataError if one is missing."""
    image = next((member for ending, member in members.items() if ending in IMAGE_ENDINGS), None)
    label = members.get(LABEL_ENDING)
    if image is None or label is None:
        raise DataError(_incomplete(tar, key, members, "image" if image is None else "label"))
    return image, label


def _incomplete(tar: Path, key: str, members: dict[str, Member], what: str) -> str:
    shown = ", ".join(sorted(members)[:3]) + (", ..." if len(members) > 3 else "")
    text = (
        f"{tar}: sample '{key}' has no {what} (its members end in {shown}); needed: {key}.jpg and {key}.cls next to "
        "each other"
    )
    if any("." in ending for ending in members):
        return f"{text}. The ending begins at the first dot of a name, as in WebDataset: use names without other dots"
    return f"{text}; `megabatch data pack` makes such shards from folders of classes"


def _refuse_huge(tar: Path, image: Member) -> None:
    if image.size > _MAX_IMAGE_BYTES:
        raise DataError(f"{tar}: '{image.name}' has {image.size} bytes; at most {_MAX_IMAGE_BYTES} are supported")


def _label_text(content: bytes, tar: Path, key: str) -> str:
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text:
        raise DataError(f"{tar}: the label of '{key}' is {content[:20]!r}; needed: a number or a name, for example 7")
    return text


def _refuse_compressed(tar: Path) -> None:
    with tar.open("rb") as file:
        start = file.read(2)
    if start in _COMPRESSED:
        raise DataError(
            f"{tar} is compressed with {_COMPRESSED[start]}, which allows no random access and hardly shrinks images; "
            "unpack it to a plain .tar"
        )


def _refuse_unsafe(info: tarfile.TarInfo, tar: Path) -> None:
    if not info.isreg() or info.issparse():
        raise DataError(
            f"{tar}: '{info.name}' is a link, a device or another special file; only plain files are allowed"
        )
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\\" in info.name or "\0" in info.name:
        raise DataError(f"{tar}: the name '{info.name}' leaves the archive's folder; names such as dog/1.jpg work")


def _identity(tar: Path) -> dict[str, Any]:
    """Size, and hash of three blocks: enough to detect another tar, and fast for a thousand shards."""
    size = tar.stat().st_size
    digest = hashlib.sha256()
    with tar.open("rb") as file:
        for place in (0, size // 2, max(0, size - 4096)):
            digest.update(os.pread(file.fileno(), 4096, place))
    return {"tar_bytes": size, "tar_fingerprint": digest.hexdigest()}


def _matches(index: ShardIndex, tar: Path) -> bool:
    """True if the index is not older than the tar and was built for its size and fingerprint."""
    if index_path(tar).stat().st_mtime_ns < tar.stat().st_mtime_ns:
        return False
    return all(index.header.get(name) == value for name, value in _identity(tar).items())


def load_index(path: Path) -> ShardIndex | None:
    """Reads an index file; None if it is missing, damaged or of another format."""
    try:
        whole = path.read_bytes()
        start = whole.index(b"\n") + 1
        header = parse_json(whole[:start])
        if header["format"] != FORMAT:
            return None
        records = np.frombuffer(whole, RECORD, count=header["samples"], offset=start)
        names = np.frombuffer(whole, np.uint8, offset=start + records.nbytes)
        return _checked(ShardIndex(records, names, header["labels"], header))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _checked(index: ShardIndex) -> ShardIndex | None:
    """Returns the index if all its numbers are in bounds, else None: the file may be truncated or untrusted."""
    records, tar_bytes = index.records, index.header["tar_bytes"]
    if len(records) != index.header["samples"] or len(records) == 0:
        return None
    inside = (
        (records["offset"] >= 0).all()
        and (records["offset"] <= tar_bytes - records["size"].astype(np.int64)).all()
        and (records["name"] >= 0).all()
        and (records["name"] <= len(index.names) - records["name_size"].astype(np.int64)).all()
        and (records["label"] >= 0).all()
        and (records["label"] < len(index.label_texts)).all()
        and all(isinstance(text, str) for text in index.label_texts)
    )
    return index if inside else None
