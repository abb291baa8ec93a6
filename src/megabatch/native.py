"""Optional shared libraries in C, each beside the module that calls it: built with the package where a compiler is.

They need no headers, neither Python's nor torch's, and are called through ctypes, so without the interpreter's lock.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError

COMPILE_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden")


def file_name(name: str) -> str:
    """What the library `name` is called on this platform."""
    return name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def open_function(path: Path, name: str) -> Any:
    """The library's function, or None where the library is missing, older than it, or built for another machine."""
    if not path.exists():
        return None
    try:
        return getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError):
        return None


def build_library(name: str, sources: Iterable[Path], folder: Path, *, flags: Iterable[str] = ()) -> Path:
    """Compiles `sources` into `folder` and returns the library's path.

    Raises:
        SettingsError: no C compiler, or one that cannot build this.
    """
    compiler = shutil.which(os.fspath((sysconfig.get_config_var("CC") or "cc").split()[0])) or shutil.which("cc")
    if compiler is None:
        raise SettingsError(
            "no C compiler was found on PATH; install one, for example gcc, or go on without: it is optional"
        )
    target = folder / file_name(name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects, built = _objects(compiler, sources, Path(scratch), flags), Path(scratch) / target.name
        _run([compiler, "-shared", *map(str, objects), "-o", str(built), "-lm"])
        built.replace(target)  # at once, so that no other process loads half a file
    return target


def _objects(compiler: str, sources: Iterable[Path], folder: Path, flags: Iterable[str]) -> list[Path]:
    """Compiled apart from linking, so that what a flag would link (OpenMP's library) stays out."""
    objects = []
    for source in sorted(sources):
        objects.append(folder / f"{source.stem}.o")
        _run([compiler, *COMPILE_FLAGS, *flags, "-c", str(source), "-o", str(objects[-1])])
    return objects


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise SettingsError(f"{command[0]} could not build {Path(command[-1]).stem}: {done.stderr.strip()[-2000:]}")
