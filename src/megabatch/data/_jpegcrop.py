"""The compiled JPEG crop: an optional shared library, written in C beside this file, called without the GIL.

It is built when the package is installed, if there is a C compiler; `python -m megabatch.data._jpegcrop` builds it
later. It needs no headers and no other library. Where it is missing, or a file is not a plain baseline JPEG,
`megabatch.data.decode` gives nearly the same pixels from libjpeg-turbo and torch, at about 0.4 of the
speed (docs/decisions/0003-jpeg-decoding.md).
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megabatch.errors import SiteError

SOURCES = Path(__file__).parent
library_folder = SOURCES
NAME = "_jpegcrop_native"
COMPILE_FLAGS = ("-O3", "-fPIC", "-shared", "-fvisibility=hidden")


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


def build(folder: Path = SOURCES) -> Path:
    """Compile the library into `folder` and return its path. Raises SiteError without a working C compiler."""
    compiler = shutil.which(os.fspath((sysconfig.get_config_var("CC") or "cc").split()[0])) or shutil.which("cc")
    if compiler is None:
        raise SiteError(
            "no C compiler was found on PATH; install one, for example gcc, or go on without: it is optional"
        )
    target = folder / _file_name()
    sources = sorted(str(source) for source in SOURCES.glob("_jpegcrop*.c"))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *COMPILE_FLAGS, *sources, "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0:
            raise SiteError(f"{compiler} could not build the JPEG crop: {done.stderr.strip()[-2000:]}")
        built.replace(target)  # at once, so that no other process loads half a file
    _function.cache_clear()
    return target


def _file_name() -> str:
    return NAME + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


@functools.cache
def _function() -> Callable[..., int] | None:
    path = library_folder / _file_name()
    if not path.exists():
        return None
    try:
        function = ctypes.CDLL(str(path)).megabatch_jpeg_crop
    except (OSError, AttributeError):  # built for another machine: as good as missing
        return None
    number, size = ctypes.c_double, ctypes.c_int
    box, shape = [number] * 4, [size] * 3
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *box, *shape, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int
    typed: Callable[..., int] = function
    return typed


if __name__ == "__main__":
    sys.stdout.write(f"built {build()}\n")
