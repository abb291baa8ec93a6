"""Builds and opens the optional shared libraries in C, each in the folder of the module that calls it.

They are built when the package is installed, if there is a C compiler. They need no headers of Python or torch, and are
called through ctypes, which releases the GIL.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError

COMPILE_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden")


def file_name(name: str) -> str:
    """File name of the library `name` on this platform."""
    return name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def open_function(path: Path, name: str) -> Any:
    """Returns the library's function, or None if the library is missing, too old, or built for another machine."""
    if not path.exists():
        return None
    try:
        return getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError):
        return None


def build_library(name: str, sources: Iterable[Path], folder: Path, *, flags: Iterable[str] = ()) -> Path:
    """Compiles `sources` into a library in `folder` and returns its path.

    Raises:
        SettingsError: there is no C compiler, or it fails.
    """
    compiler = shutil.which(os.fspath((sysconfig.get_config_var("CC") or "cc").split()[0])) or shutil.which("cc")
    if compiler is None:
        raise SettingsError(
            "no C compiler was found on PATH; install one, for example gcc, or continue without; it is optional"
        )
    target = folder / file_name(name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects, built = _objects(compiler, sources, Path(scratch), flags), Path(scratch) / target.name
        _run([compiler, "-shared", *map(str, objects), "-o", str(built), "-lm"])
        built.replace(target)  # atomic: no other process can load a partial file
    return target


def report_build(build: Callable[[], Path]) -> None:
    """Builds a library and prints its path; exits with one line on stderr if that fails."""
    try:
        sys.stdout.write(f"built {build()}\n")
    except SettingsError as error:
        sys.exit(f"megabatch: {error}")


def _objects(compiler: str, sources: Iterable[Path], folder: Path, flags: Iterable[str]) -> list[Path]:
    """Compiles each source to an object; linking is separate, so that -fopenmp does not link OpenMP's library."""
    objects = []
    for source in sorted(sources):
        objects.append(folder / f"{source.stem}.o")
        _run([compiler, *COMPILE_FLAGS, *flags, "-c", str(source), "-o", str(objects[-1])])
    return objects


def _run(command: list[str]) -> None:
    """Runs the compiler; SettingsError with the end of its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=300)
    if done.returncode != 0:
        raise SettingsError(f"{command[0]} could not build {Path(command[-1]).stem}: {done.stderr.strip()[-2000:]}")
