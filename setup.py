"""The parts of the package that are compiled, where there is a C compiler; all else is in pyproject.toml."""

import sys

from setuptools import Extension, setup

JPEG_NAMES = ("", "_entropy", "_header", "_idct", "_resize")
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
        ["src/megabatch/kernels/_cpu_norm.c"],
        depends=["src/megabatch/kernels/_cpu_norm_passes.h"],
        extra_compile_args=[*FLAGS, "-fopenmp"],  # not linked with: the process has torch's OpenMP, and needs no second
        libraries=["m"],
        optional=True,
    )
    return {"win32": [], "linux": [jpeg, kernels]}.get(sys.platform, [jpeg])


setup(ext_modules=extensions())
