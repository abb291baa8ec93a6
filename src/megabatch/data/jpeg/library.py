"""The compiled JPEG crop: an optional shared library, written in C beside this file, called without the GIL.

It is built when the package is installed, if there is a C compiler; `python -m megabatch.data.jpeg.library` builds it
later. It needs no headers and no other library. Where it is missing, or a file is not a plain baseline JPEG,
`megabatch.data.jpeg.decode` gives nearly the same pixels from libjpeg-turbo and torch, at about 0.4 of the
speed (docs/decisions/0003-jpeg-decoding.md).
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megabatch import native

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
library_folder = FOLDER
NAME = "_native"


def is_available() -> bool:
    """Whether the compiled library is there and loads."""
    return _function() is not None


def crop(
    data: bytes,
    box: tuple[float, float, float, float],
    *,
    channels: int,
    max_pixels: int,
    out: npt.NDArray[np.uint8],
) -> bool:
    """Decode `box` = (top, left, height, width) of a JPEG, resized to the shape of `out`, into `out`.

    False, with `out` undefined, if the library is missing, or if the file is not a baseline JPEG, is damaged as far
    as it was read or is larger than `max_pixels`, or if the box is not inside: the caller's slower path then decides.
    """
    function = _function()
    if function is None:
        return False
    rows, columns = out.shape[:2]
    address = out.__array_interface__["data"][0]
    return function(data, len(data), *box, rows, columns, channels, max_pixels, address) == 0


def build(folder: Path = FOLDER) -> Path:
    """Compile the library into `folder` and return its path. Raises SettingsError without a working C compiler."""
    path = native.build_library(NAME, SOURCES.glob("*.c"), folder)
    _function.cache_clear()
    return path


@functools.cache
def _function() -> Callable[..., int] | None:
    function = native.open_function(library_folder / native.file_name(NAME), "megabatch_jpeg_crop")
    if function is None:
        return None
    number, size = ctypes.c_double, ctypes.c_int
    box, shape = [number] * 4, [size] * 3
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *box, *shape, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int
    typed: Callable[..., int] = function
    return typed


if __name__ == "__main__":
    sys.stdout.write(f"built {build()}\n")
