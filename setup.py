"""The parts of the package that are compiled, where there is a C compiler; all else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup


def extension(package: str, *flags: str) -> Extension:
    """The library `_native` of a package, from the C files in its folder csrc."""
    sources = Path("src", *package.split("."), "csrc")
    return Extension(
        f"{package}._native",
        sorted(map(str, sources.glob("*.c"))),
        depends=sorted(map(str, sources.glob("*.h"))),
        extra_compile_args=["-O3", "-fvisibility=hidden", *flags],
        libraries=["m"],
        optional=True,
    )


def extensions() -> list[Extension]:
    """None on Windows; the CPU kernels need GNU OpenMP, which torch ships on Linux only."""
    jpeg = extension("megabatch.data.jpeg")
    # Compiled with OpenMP but not linked with it: the process already has torch's OpenMP runtime.
    kernels = extension("megabatch.kernels.cpu", "-fopenmp")
    return {"win32": [], "linux": [jpeg, kernels]}.get(sys.platform, [jpeg])


setup(ext_modules=extensions())
