"""What `pack` reads: the parts of a data set of any layout, with keys and sizes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from megabatch.cores import usable_cores
from megabatch.data.sources.dataset import open_dataset
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.labels import agree_on_classes
from megabatch.data.sources.parquet import ParquetSource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.python_dataset import open_python
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.data.sources.tar.tar_folder import TarFolderSource
from megabatch.errors import DataError
from megabatch.user_code import is_function


@dataclass(frozen=True)
class Part:
    """One part of a data set, train, val or test; one key and size per sample."""

    name: str
    source: EncodedSource
    keys: Sequence[str]  # unique
    sizes: npt.NDArray[np.int64]  # bytes of the image file; estimated for parquet
    random_access: bool  # False if reading one sample reads its neighbours too


def open_parts(path: Path) -> list[Part]:
    """The parts of the data set at `path`; see `open_dataset`, which finds, checks and opens them.

    FILE.py:FUNCTION runs the file; each of its samples is read once here, for its size and key.
    """
    if is_function(path):
        return _open_function(str(path))
    return [
        Part(name, source, _keys(source), _sizes(source), not isinstance(source, ParquetSource))
        for name, source in open_dataset(path).parts.items()
    ]


def _open_function(text: str) -> list[Part]:
    sources, parts = open_python(text), []
    agree_on_classes(sources, text, numbered=all(source.numbered for source in sources.values()))
    for name, source in sources.items():
        with ThreadPoolExecutor(usable_cores()) as threads:
            facts = list(threads.map(partial(_size_and_digest, source), range(len(source))))
        sizes = np.array([size for size, _ in facts], dtype=np.int64)
        paths = [
            PurePosixPath(source.class_names[source.labels[i]], f"{i:08d}-{digest}.img")
            for i, (_, digest) in enumerate(facts)
        ]
        parts.append(Part(name, source, [_portable_key(path) for path in paths], sizes, random_access=True))
    return parts


def _size_and_digest(source: EncodedSource, index: int) -> tuple[int, str]:
    """Bytes of a sample, and the start of their SHA-256, so that a shard of other samples is not kept; 0 if bad."""
    try:
        data = source.read(index)
    except DataError:
        return 0, "unreadable"
    return len(data), hashlib.sha256(data).hexdigest()[:12]


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
