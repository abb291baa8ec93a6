"""The optional shared library of compiled CPU kernels; its C sources are in csrc/.

It is built when the package is installed on Linux with a C compiler; `python -m megabatch.kernels.cpu.library` builds
it later. It is compiled for OpenMP but not linked against it, so that it uses the OpenMP library, and the threads, that
torch has already loaded. Without the library, torch's operations are used instead.
"""

from pathlib import Path
from typing import Any

import torch  # noqa: F401  (before the library, which needs torch's OpenMP when it is loaded)

from megabatch import native

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
NAME = "_native"


def function(name: str) -> Any:
    """Returns the library's function, or None if the library is missing or has no such function."""
    return native.open_function(FOLDER / native.file_name(NAME), name)


def build(folder: Path = FOLDER) -> Path:
    """Compiles the library into `folder` and returns its path. Raises SettingsError without a working C compiler."""
    return native.build_library(NAME, SOURCES.glob("*.c"), folder, flags=["-fopenmp"])


if __name__ == "__main__":
    native.report_build(build)
