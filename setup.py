"""The one part of the package that is compiled, where there is a C compiler; all else is in pyproject.toml."""

import sys

from setuptools import Extension, setup

NAMES = ("", "_entropy", "_header", "_idct", "_resize")

setup(
    ext_modules=[
        Extension(
            "megabatch.data._jpegcrop_native",
            [f"src/megabatch/data/_jpegcrop{name}.c" for name in NAMES],
            depends=["src/megabatch/data/_jpegcrop.h", "src/megabatch/data/_jpegcrop_entropy.h"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            libraries=["m"],
            optional=True,
        )
    ]
    if sys.platform != "win32"
    else []
)
