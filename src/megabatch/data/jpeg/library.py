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
from typing import Any

import numpy as np
import numpy.typing as npt

from megabatch import native

UInt64 = npt.NDArray[np.uint64]

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
library_folder = FOLDER
NAME = "_native"


def is_available() -> bool:
    """True if the compiled library exists and can be loaded."""
    return _function("megabatch_jpeg_crop") is not None


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
    function = _function("megabatch_jpeg_crop")
    if function is None:
        return False
    rows, columns = out.shape[:2]
    return function(data, len(data), *box, rows, columns, channels, max_pixels, _address(out)) == 0


def crop_many(
    addresses: UInt64,
    num_bytes: UInt64,
    boxes: npt.NDArray[np.integer],
    *,
    max_pixels: int,
    out: npt.NDArray[np.uint8],
) -> npt.NDArray[np.bool_]:
    """As `crop` for n files in memory, in one call: `out` is contiguous, n x rows x columns x channels.

    Returns the mask [n] of the files that it decoded: all False if the library is missing.
    """
    done = np.zeros(len(addresses), dtype=np.bool_)
    function = _function("megabatch_jpeg_crop_many")
    if function is None or not len(addresses):
        return done
    count, rows, columns, channels = out.shape
    edges = boxes.astype(np.float64)
    assert len(edges) == len(num_bytes) == len(addresses) == count
    shape = (rows, columns, channels, max_pixels)
    function(_address(addresses), _address(num_bytes), count, _address(edges), *shape, _address(out), _address(done))
    return done


def sizes(addresses: UInt64, num_bytes: UInt64, *, max_pixels: int, complete: bool = False) -> npt.NDArray[np.int64]:
    """Height and width [n, 2] of n JPEGs in memory, read from their headers in one call.

    Both are 0 for a file that is not a plain JPEG (8 bits, grey or YCbCr, usual sampling factors, intact header) of at
    most `max_pixels` pixels; with `complete` also for a file whose scans are not followed by an end marker. They are 0
    for all files if the library is missing. `decode.py` then decides.
    """
    found = np.zeros((len(addresses), 2), dtype=np.int64)
    function = _function("megabatch_jpeg_sizes")
    if function is not None and len(addresses):
        assert len(addresses) == len(num_bytes)
        places = (_address(addresses), _address(num_bytes), len(addresses))
        function(*places, max_pixels, complete, _address(found))
    return found


def build(folder: Path = FOLDER) -> Path:
    """Compiles the library into `folder` and returns its path.

    Raises:
        SettingsError: there is no C compiler, or it fails.
    """
    path = native.build_library(NAME, SOURCES.glob("*.c"), folder)
    _function.cache_clear()
    return path


def _address(array: npt.NDArray[np.generic]) -> int:
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address


_INT, _LONG, _DOUBLE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SHAPE = [_INT, _INT, _INT, _LONG]  # rows, columns, channels, max_pixels
_FILES = [_POINTER, _POINTER, _LONG]  # addresses, sizes in bytes, count
_ARGUMENTS: dict[str, list[Any]] = {
    "megabatch_jpeg_crop": [ctypes.c_char_p, ctypes.c_size_t, *[_DOUBLE] * 4, *_SHAPE, _POINTER],
    "megabatch_jpeg_crop_many": [*_FILES, _POINTER, *_SHAPE, _POINTER, _POINTER],
    "megabatch_jpeg_sizes": [*_FILES, _LONG, _INT, _POINTER],
}


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    function = native.open_function(library_folder / native.file_name(NAME), name)
    if function is None:
        return None
    function.argtypes = _ARGUMENTS[name]
    function.restype = _INT if name == "megabatch_jpeg_crop" else None
    typed: Callable[..., int] = function
    return typed


if __name__ == "__main__":
    native.report_build(build)
