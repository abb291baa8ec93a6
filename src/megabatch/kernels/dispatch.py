"""Which of two implementations runs: the Triton kernel or the plain-PyTorch reference."""

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from megabatch.errors import UserError

Backend = Literal["auto", "triton", "reference"]
"""`auto`: Triton on a GPU where it is installed, the reference elsewhere. The other two ask for one of them."""


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor, backend: Backend) -> bool:
    """Whether the Triton kernel takes `tensor`.

    Raises:
        UserError: an unknown backend, or `triton` where it is missing or has no device to run on.
    """
    if backend == "auto":
        return tensor.is_cuda and has_triton()
    if backend not in {"triton", "reference"}:
        raise UserError(f"backend={backend!r} was given, needed auto, triton or reference; backend='auto' works")
    if backend == "triton":
        _check_triton(tensor)
    return backend == "triton"


def load(name: str) -> Any:
    """The module `megabatch.NAME` of Triton kernels; Triton is imported here only."""
    return importlib.import_module(f"megabatch.{name}")


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interprets() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1, which runs kernels on CPU tensors, slowly, for tests."""
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
