"""Kernels that are compared with torch's operations once, and not used where they fail or differ."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor | None])
TOLERANCE = 2.0**-6
"""Largest norm of the difference as a share of the result's: a few roundings to bfloat16."""

_is_right: dict[tuple[object, ...], bool] = {}


def checked(
    name: str, sizes: tuple[int, ...], like: Tensor, kernel: Callable[[], Result], plain: Callable[[], Result]
) -> Result:
    """Returns kernel(), or plain() where the kernel of this name, dtype and sizes was found wrong on this GPU.

    The first call runs both and waits for the GPU. While a CUDA graph is captured nothing can wait, so a kernel that
    was not compared before is not used. Off a GPU, in Triton's interpreter, nothing is compared.
    """
    key = (name, like.device, like.dtype, *sizes)
    if not like.is_cuda or _is_right.get(key):
        return kernel()
    expected = plain()
    if key in _is_right or torch.cuda.is_current_stream_capturing():
        return expected
    found = _found(f"{name} {sizes} in {like.dtype}", kernel, expected)
    _is_right[key] = found is not None
    return expected if found is None else found


def _found(name: str, kernel: Callable[[], Result], expected: Result) -> Result | None:
    """The kernel's result, or None and a warning if it fails or differs from what is expected."""
    try:
        result = kernel()
        one, other = (out if isinstance(out, Tensor) else out[0] for out in (result, expected))
        error, size = float((one.float() - other.float()).norm()), float(other.float().norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # noqa: BLE001  # Triton's errors have no common base
        warnings.warn(f"the kernel {name} failed ({failure}): torch's operations are used instead", stacklevel=2)
        return None
    share = error / max(size, 1e-30)
    # Not finite: the run has diverged, which says nothing about the kernel.
    if share <= TOLERANCE or not size < float("inf"):
        return result
    warnings.warn(
        f"the kernel {name} differs from torch's operations by {share:.2g} of the result, more than {TOLERANCE:.2g}: "
        "torch's operations are used instead",
        stacklevel=2,
    )
    return None
