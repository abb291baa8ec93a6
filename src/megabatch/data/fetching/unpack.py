"""Reads the file layouts in which the known data sets are published into arrays. Does not use pickle."""

import gzip
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megabatch.data.fetching.catalog import KnownDataSet
from megabatch.errors import DataError
from megabatch.files import read_json

_MAX_MEMBER_BYTES = 256 << 20  # against decompression bombs; the largest published file has 47 MB


class Arrays(NamedTuple):
    """One split: images [n, channels, size, size] and labels [n], both uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def extract(archive: IO[bytes], names: Iterable[str], into: Path) -> None:
    """Extracts regular files whose last path component is in `names` into `into`, whatever folder they are in.

    Only that last component is used as a file name, so no archive can write outside `into`.
    """
    wanted = set(names)
    with tarfile.open(fileobj=archive, mode="r|*") as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            if name not in wanted or not member.isreg():
                continue
            if member.size > _MAX_MEMBER_BYTES:
                raise DataError(f"{name} in the archive has {member.size} bytes, more than any published file")
            content = tar.extractfile(member)
            assert content is not None
            (into / name).write_bytes(content.read())


def file_names(known: KnownDataSet) -> list[str]:
    """File names of all layouts of the data set, each also with .gz."""
    names = [name for layout in _LAYOUTS[known.name] for name in layout.file_names()]
    return [*names, *(f"{name}.gz" for name in names)]


def read_folder(known: KnownDataSet, folder: Path) -> tuple[Arrays, Arrays]:
    """Training and test split, read from `folder` or a subfolder in any of the data set's layouts.

    Raises:
        DataError: there is no such layout, or a file is damaged.
    """
    layouts = _LAYOUTS[known.name]
    for layout in layouts:
        for candidate in [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]:
            if all(_find(candidate, name) for name in layout.file_names()):
                return _read(layout, candidate)
    needed = " or ".join(", ".join(layout.file_names()[:2]) + ", ..." for layout in layouts)
    raise DataError(f"{folder} does not hold the files of {known.name}; needed: {needed}")


def _read(layout: "_Layout", folder: Path) -> tuple[Arrays, Arrays]:
    try:
        return layout.read(folder)
    except (OSError, EOFError, zlib.error, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"the files in {folder} are damaged: {error}") from error


class _Layout:
    """A set of files in which a data set is published."""

    def file_names(self) -> list[str]:
        raise NotImplementedError

    def read(self, folder: Path) -> tuple[Arrays, Arrays]:
        raise NotImplementedError


class _Idx(_Layout):
    """MNIST's IDX files, gzipped or not: two zero bytes, type, number of dimensions, sizes, then bytes."""

    def file_names(self) -> list[str]:
        return [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

    def read(self, folder: Path) -> tuple[Arrays, Arrays]:
        train_images, train_labels, test_images, test_labels = (
            _idx(_bytes(folder, name), name) for name in self.file_names()
        )
        return Arrays(train_images[:, None], train_labels), Arrays(test_images[:, None], test_labels)


class _CifarBinary(_Layout):
    """CIFAR's binary version: records of one label byte and 3 x 32 x 32 pixels."""

    def file_names(self) -> list[str]:
        return [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

    def read(self, folder: Path) -> tuple[Arrays, Arrays]:
        batches = [self._records(_bytes(folder, name)) for name in self.file_names()]
        train = np.concatenate(batches[:-1])
        return self._split(train), self._split(batches[-1])

    @staticmethod
    def _records(data: bytes) -> NDArray[np.uint8]:
        return np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)

    @staticmethod
    def _split(records: NDArray[np.uint8]) -> Arrays:
        return Arrays(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])


class _CifarSheets(_Layout):
    """CIFAR as lossless PNG sheets and lists of labels. Each row of a sheet holds one image of 32 x 32 RGB pixels.

    "lables" is the spelling in the published package.
    """

    def file_names(self) -> list[str]:
        sheets = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
        return [*sheets, "train_lables.json", "test_lables.json"]

    def read(self, folder: Path) -> tuple[Arrays, Arrays]:
        *sheets, train_labels, test_labels = self.file_names()
        images = [self._sheet(folder / name) for name in sheets]
        train = Arrays(np.concatenate(images[:-1]), self._labels(folder / train_labels))
        return train, Arrays(images[-1], self._labels(folder / test_labels))

    @staticmethod
    def _sheet(path: Path) -> NDArray[np.uint8]:
        with Image.open(path, formats=["PNG"]) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)

    @staticmethod
    def _labels(path: Path) -> NDArray[np.uint8]:
        return np.array(read_json(path), dtype=np.uint8)


_LAYOUTS: dict[str, tuple[_Layout, ...]] = {
    "fashion_mnist": (_Idx(),),
    "cifar10": (_CifarBinary(), _CifarSheets()),
}


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _bytes(folder: Path, name: str) -> bytes:
    path = _find(folder, name)
    assert path is not None
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        data = file.read(_MAX_MEMBER_BYTES + 1)
    if len(data) > _MAX_MEMBER_BYTES:
        raise ValueError(f"{path.name} decompresses to more than {_MAX_MEMBER_BYTES} bytes")
    return data


def _idx(data: bytes, name: str) -> NDArray[np.uint8]:
    zeros, kind, num_dimensions = struct.unpack_from(">HBB", data)
    if zeros != 0 or kind != 8:
        raise ValueError(f"{name} is not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{num_dimensions}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
