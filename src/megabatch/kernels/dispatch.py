"""Selects the implementation of an operation: the Triton kernel or the PyTorch reference."""

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from megabatch.errors import UserError

Backend = Literal["auto", "triton", "reference"]
"""`auto` selects Triton on a GPU if Triton is installed, and the reference otherwise; the other two force one."""


@functools.cache
def has_triton() -> bool:
    """True if Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor, backend: Backend) -> bool:
    """True if `backend` selects the Triton kernel for `tensor`.

    Raises:
        UserError: an unknown backend, or `triton` without Triton installed, or for a tensor on a device that Triton
            cannot use.
    """
    if backend == "auto":
        return tensor.is_cuda and has_triton()
    if backend not in {"triton", "reference"}:
        raise UserError(f"backend={backend!r} was given, needed auto, triton or reference; backend='auto' works")
    if backend == "triton":
        _check_triton(tensor)
    return backend == "triton"


def load(name: str) -> Any:
    """Imports and returns the module `megabatch.NAME` of Triton kernels. Triton is imported through here only."""
    return importlib.import_module(f"megabatch.{name}")


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which the tensor's GPU is the current device: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interprets() -> bool:
    """True if Triton was imported with TRITON_INTERPRET=1: kernels then run on CPU tensors, slowly, for tests."""
    # Triton decides at import whether to interpret, so the environment variable itself may have changed since.
    language: Any = importlib.import_module("triton.language")
    return type(language.cdiv).__name__ == "InterpretedFunction"


def _check_triton(tensor: Tensor) -> None:
    if not has_triton():
        raise UserError("backend='triton' was given, but Triton is not installed; backend='reference' works")
    if not tensor.is_cuda and not interprets():
        raise UserError(
            f"backend='triton' was given for a tensor on {tensor.device}, needed: a GPU, or Triton's interpreter "
            "(TRITON_INTERPRET=1 before the first import); backend='reference' works"
        )
