"""A map-style data set of the user's own Python file, as an `EncodedSource`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megabatch.data.sources.labels import find_classes
from megabatch.errors import DataError
from megabatch.user_code import load_function


class PythonSource:
    """Samples of `dataset`: `len(dataset)`, and `dataset[i]` = (image, label), thread-safe.

    An image is the bytes or the path of an image file, a Pillow image, or uint8 pixels (height, width, 3), (height,
    width) or, of a torch tensor, (channels, height, width). A label is a class number from 0 or a name. All labels are
    needed at the start: `dataset.targets` or `dataset.labels` if it has them, else each sample is read once. Names of
    classes are `dataset.classes` if it has them.

    Raises:
        DataError: the data set is empty, or a label is not a class.
    """

    shard_sizes: Sequence[int] | None = None

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name
        given = next(
            (found for key in ("targets", "labels") if (found := getattr(dataset, key, None)) is not None), None
        )
        labels = [
            _plain(label) for label in (given if given is not None else (dataset[i][1] for i in range(len(self))))
        ]
        if not labels or len(labels) != len(self):
            raise DataError(f"{name} has {len(self)} samples and {len(labels)} labels; needed: one label per sample")
        classes = find_classes(dict.fromkeys(labels, name), getattr(dataset, "classes", None), where=name)
        self.class_names, self.numbered = classes.names, classes.numbered
        self.labels: NDArray[np.int64] = np.array([classes.number[label] for label in labels], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> bytes:
        """Returns the image file of one sample; pixels become a file without compression.

        Raises:
            DataError: the data set raised an exception, or the sample is no image.
        """
        try:
            return _encoded(self._dataset[index][0])
        except Exception as error:  # any code of the user: a bad sample, which is reported and replaced
            raise DataError(f"{self.name(index)}: {type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """Returns function, part and index, for example `photos.py:dataset train[17]`."""
        return f"{self._name}[{index}]"


def open_python(text: str) -> dict[str, PythonSource]:
    """Runs FILE.py:FUNCTION with "train" and with "val"; each result is a data set, or None where there is none.

    Raises:
        SettingsError: the function cannot be loaded.
        DataError: it raised an exception or returned something else.
    """
    function, parts = load_function("--data", text), dict[str, PythonSource]()
    for part in ("train", "val"):
        try:
            dataset = function(part)
        except Exception as error:
            raise DataError(f"--data {text}: {part!r} raised {type(error).__name__}: {error}") from error
        if dataset is None:
            continue
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise DataError(f"--data {text}: {part!r} gave {kind}, needed: a data set with len() and [index], or None")
        parts[part] = PythonSource(dataset, f"{Path(text).name} {part}")
    if "train" not in parts:
        raise DataError(f"--data {text}: 'train' gave None, needed: a data set with len() and [index]")
    return parts


def _plain(label: Any) -> Any:
    """A label as a plain number or text; arrays and tensors of one value have `item`."""
    return label.item() if hasattr(label, "item") else label


def _encoded(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_rows_first(image))
    file = io.BytesIO()
    (image if image.mode in {"L", "RGB"} else image.convert("RGB")).save(file, format="PPM")
    return file.getvalue()


def _rows_first(image: Any) -> NDArray[np.uint8]:
    """Pixels (height, width) or (height, width, 3) of an array, or of a torch tensor with channels first."""
    pixels = np.asarray(image)
    if hasattr(image, "permute") and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels are {pixels.dtype}, needed: uint8 in 0..255")
    return np.ascontiguousarray(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
