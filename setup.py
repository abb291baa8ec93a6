"""The parts of the package that are compiled, where there is a C compiler; all else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

JPEG_NAMES = ("", "_entropy", "_header", "_idct", "_resize")
KERNELS = Path("src/megabatch/kernels")
FLAGS = ["-O3", "-fvisibility=hidden"]


def extensions() -> list[Extension]:
    """None on Windows; the kernels want GNU's OpenMP, which torch brings on Linux alone."""
    jpeg = Extension(
        "megabatch.data._jpegcrop_native",
        [f"src/megabatch/data/_jpegcrop{name}.c" for name in JPEG_NAMES],
        depends=["src/megabatch/data/_jpegcrop.h", "src/megabatch/data/_jpegcrop_entropy.h"],
        extra_compile_args=FLAGS,
        libraries=["m"],
        optional=True,
    )
    kernels = Extension(
        "megabatch.kernels._cpu_native",
        sorted(map(str, KERNELS.glob("_cpu_*.c"))),
        depends=sorted(map(str, KERNELS.glob("_cpu_*.h"))),
        extra_compile_args=[*FLAGS, "-fopenmp"],  # not linked with: the process has torch's OpenMP, and needs no second
        libraries=["m"],
        optional=True,
    )
    return {"win32": [], "linux": [jpeg, kernels]}.get(sys.platform, [jpeg])


setup(ext_modules=extensions())
