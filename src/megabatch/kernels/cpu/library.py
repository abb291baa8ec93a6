"""The compiled CPU kernels: an optional shared library, written in C beside this file, with torch's own threads.

Built when the package is installed, where there is a C compiler on Linux; `python -m megabatch.kernels.cpu.library`
builds it later. It is compiled with OpenMP but not linked with it: its threads are those of the OpenMP that torch has
in the process already. Where it is missing, torch's operations do the work.
"""

import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (before the library: torch's OpenMP must be there when it is loaded)

from megabatch import native

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
NAME = "_native"


def function(name: str) -> Any:
    """The library's function, or None where the library is missing."""
    return native.open_function(FOLDER / native.file_name(NAME), name)


def build(folder: Path = FOLDER) -> Path:
    """Compiles the library into `folder` and returns its path. Raises SettingsError without a working C compiler."""
    return native.build_library(NAME, SOURCES.glob("*.c"), folder, flags=["-fopenmp"])


if __name__ == "__main__":
    sys.stdout.write(f"built {build()}\n")
