"""The compiled JPEG decoder: an optional shared library with C sources in csrc/, called without the GIL.

It is built when the package is installed, if there is a C compiler; `python -m megabatch.data.jpeg.library` builds it
later. It needs no headers and no other library. If it is missing, or a file is not a plain baseline JPEG,
`megabatch.data.jpeg.decode` computes nearly the same pixels with libjpeg-turbo and torch, at about 0.4 of the
speed (docs/decisions/0003-jpeg-decoding.md).
"""

import ctypes
import functools
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
    """True if the compiled library exists and can be loaded."""
    return _function() is not None


def crop(
    data: bytes,
    box: tuple[float, float, float, float],
    *,
    channels: int,
    max_pixels: int,
    out: npt.NDArray[np.uint8],
) -> bool:
    """Decodes `box` = (top, left, height, width) of a JPEG, resized to rows and columns of `out`, into `out`.

    `out` is contiguous, rows x columns x `channels`. Returns True on success. Returns False, and leaves `out`
    undefined, if the library is missing, the file is not a baseline JPEG, the part that was read is damaged, the image
    has more than `max_pixels` pixels, or the box is not inside the image. The caller then falls back to `decode.py`,
    which raises the error if there is one.
    """
    function = _function()
    if function is None:
        return False
    rows, columns = out.shape[:2]
    address = out.__array_interface__["data"][0]
    return function(data, len(data), *box, rows, columns, channels, max_pixels, address) == 0


def build(folder: Path = FOLDER) -> Path:
    """Compiles the library into `folder` and returns its path.

    Raises:
        SettingsError: there is no C compiler, or it fails.
    """
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
    native.report_build(build)
