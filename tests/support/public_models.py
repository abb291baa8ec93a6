"""Imports timm and torchvision where torchvision's compiled operators, or torchvision itself, are missing.

The classification networks of both are plain Python. A torchvision built for another torch fails on import because its
operators do not load; without torchvision timm fails on import. Both then get stand-ins that no network calls.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def importable() -> Iterator[bool]:
    """Context in which timm can be imported if it is installed; yields True if torchvision can be too."""
    if importlib.util.find_spec("torchvision") is not None:
        library = _import_torchvision()
        yield True
        del library  # the operators' declarations end with it
        return
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield False
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in {"timm", "torchvision"}]:
            del sys.modules[name]


def _import_torchvision() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(ImportError, RuntimeError):
        importlib.import_module("torchvision")
        return library
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library


class _Anything(type):
    """A class that has every attribute: again such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below torchvision; each has every public name."""

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        is_ours = fullname.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_ours else None

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__getattr__"] = lambda name: getattr(_Anything("Anything", (), {}), name)
