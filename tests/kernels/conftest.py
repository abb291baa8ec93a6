"""Loads Triton in its interpreter, which runs kernels on CPU tensors, before any test imports it.

Where there is a GPU these tests are skipped, since tests/gpu runs the same kernels on it and one process can hold only
one kind; `TRITON_INTERPRET=1 pytest tests/kernels` runs them there too.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

SOURCES = ("_lars_triton", "_batch_norm_triton", "_loss_triton", "_crop_triton", "_conv1x1_triton")
VARIABLE = "TRITON_INTERPRET"


def _why_not() -> str | None:
    """Why no kernel can be interpreted here, or None: Triton decides it once, when it is imported."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton; pip install triton==3.6.0 works"
    if torch.cuda.is_available() and os.environ.get(VARIABLE) != "1":
        return f"a GPU is here, tests/gpu runs these kernels on it; {VARIABLE}=1 runs the interpreter"
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        from megabatch.kernels import dispatch

        for source in SOURCES:
            dispatch.load(source)
        importlib.import_module("triton.experimental.gluon")  # which Triton else imports at the first launch
        if not dispatch.interprets():
            return "Triton was imported before; run tests/kernels in a process of its own"
        _let_loops_count()
        return None
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _let_loops_count() -> None:
    """Triton 3.6 makes loop bounds by int(array of one element), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


REASON = _why_not()


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Asked for by tests that run a Triton kernel on the CPU."""
    if REASON is not None:
        pytest.skip(REASON)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: the tensors are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
