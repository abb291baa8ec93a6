"""Known data sets reduced to a few images, in all layouts in which the real data sets are published."""

import dataclasses
import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megabatch.data.fetching.catalog import KnownDataSet, Split
from megabatch.data.fetching.fetch import content_sha256, load
from megabatch.data.fetching.unpack import Arrays


def split_of(count: int, channels: int, size: int, seed: int) -> Arrays:
    images = np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return Arrays(images, np.arange(count, dtype=np.uint8) % 10)


FASHION = split_of(20, 1, 28, 1), split_of(10, 1, 28, 2)
CIFAR = split_of(50, 3, 32, 3), split_of(10, 3, 32, 4)


def small(real: KnownDataSet, splits: tuple[Arrays, Arrays]) -> KnownDataSet:
    """The data set with a few images and no download sources, other than those that a test adds."""
    train, test = (Split(len(part.labels), content_sha256(part)) for part in splits)
    return dataclasses.replace(real, train=train, test=test, apt_package=None, npm_package=None, urls=())


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_fashion(folder: Path, splits: tuple[Arrays, Arrays] = FASHION, *, compress: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "t10k"), splits, strict=True):
        for kind, values in (("images-idx3", part.images[:, 0]), ("labels-idx1", part.labels)):
            path = folder / f"{name}-{kind}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(idx(values)) if compress else idx(values))
    return folder


def write_cifar_binary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate([*(Arrays(CIFAR[0].images[k::5], CIFAR[0].labels[k::5]) for k in range(5)), CIFAR[1]]):
        records = np.concatenate([part.labels[:, None], part.images.reshape(len(part.labels), -1)], axis=1)
        (folder / (f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin")).write_bytes(records.tobytes())
    return folder


def write_cifar_sheets(folder: Path) -> Path:
    """Ten images per sheet, in order, one image per row."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {f"data_batch_{i + 1}": CIFAR[0].images[10 * i : 10 * i + 10] for i in range(5)}
    for name, images in {**sheets, "test_batch": CIFAR[1].images}.items():
        Image.fromarray(images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)).save(folder / f"{name}.png")
    for name, part in zip(("train", "test"), CIFAR, strict=True):
        (folder / f"{name}_lables.json").write_text(json.dumps(part.labels.tolist()))
    return folder


def tar_of(folder: Path, prefix: str, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{prefix}{path.name}")
    return buffer.getvalue()


def check(name: str, cache: Path, splits: tuple[Arrays, Arrays]) -> None:
    """Asserts that the cache contains exactly these splits."""
    for source, part in zip(load(name, cache=cache), splits, strict=True):
        assert torch.equal(source.images, torch.from_numpy(part.images))
        assert source.labels.tolist() == part.labels.tolist()
        assert len(source.class_names) == 10
