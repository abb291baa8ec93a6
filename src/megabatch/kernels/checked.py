"""Kernels that are compared with torch's operations once, and not used where they fail or differ."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor | None])
TOLERANCE = 2.0**-6
"""Largest norm of the difference as a share of the result's: a few roundings to bfloat16."""

Verdicts = dict[tuple[object, ...], bool]
"""Whether the kernel of a name, dtype and sizes is right."""
_is_right: Verdicts = {}
_is_complete = False


def checked(
    name: str, sizes: tuple[int, ...], like: Tensor, kernel: Callable[[], Result], plain: Callable[[], Result]
) -> Result:
    """Returns kernel(), or plain() where the kernel of this name, dtype and sizes was found wrong on this GPU.

    The first call with a finite result other than zeros runs both and waits for the GPU. While a CUDA graph is captured
    nothing can wait, so a kernel that was not compared before is not used; nor is it after `agreed`. Off a GPU, in
    Triton's interpreter, nothing is compared.
    """
    key = (name, like.dtype, *sizes)
    if not like.is_cuda or _is_right.get(key):
        return kernel()
    expected = plain()
    if key in _is_right or _is_complete or torch.cuda.is_current_stream_capturing():
        return expected
    size = float((expected if isinstance(expected, Tensor) else expected[0]).float().norm())
    if not 0 < size < float("inf"):
        return expected  # zeros, or a run that has diverged, say nothing about the kernel
    found = _found(f"{name} {sizes} in {like.dtype}", kernel, expected, size)
    _is_right[key] = found is not None
    return expected if found is None else found


@contextlib.contextmanager
def agreed(gather: Callable[[Verdicts], list[Verdicts]]) -> Iterator[None]:
    """Ranks compare kernels within the block, and afterwards use those that all of them found right, and no other.

    Otherwise ranks could round differently, each by what its own GPU showed. `gather` returns the verdicts of all
    ranks: all must leave the block.
    """
    global _is_complete  # noqa: PLW0603  # as the verdicts, of the process
    _is_complete = False
    yield
    everywhere = gather(_is_right)
    keys = {key for verdicts in everywhere for key in verdicts}
    _is_right.update({key: all(verdicts.get(key, False) for verdicts in everywhere) for key in keys})
    _is_complete = True


def _found(name: str, kernel: Callable[[], Result], expected: Result, size: float) -> Result | None:
    """The kernel's result, or None and a warning if it fails or differs from what is expected, of norm `size`."""
    try:
        result = kernel()
        one, other = (out if isinstance(out, Tensor) else out[0] for out in (result, expected))
        error = float((one.float() - other.float()).norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # noqa: BLE001  # Triton's errors have no common base
        warnings.warn(f"the kernel {name} failed ({failure}): torch's operations are used instead", stacklevel=2)
        return None
    share = error / size
    if share <= TOLERANCE:
        return result
    warnings.warn(
        f"the kernel {name} differs from torch's operations by {share:.2g} of the result, more than {TOLERANCE:.2g}: "
        "torch's operations are used instead",
        stacklevel=2,
    )
    return None
