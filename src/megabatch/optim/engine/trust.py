"""Norms of all tensors as one vector, for layer-wise trust ratios."""

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.kernels.float64 import in_float64
from megabatch.optim.engine.multi_tensor import is_flat

ROWS = 64
"""Number of rows into which a large tensor is cut for its norm: at least the number of cores that share the work."""

LARGE_ELEMENTS = 2**16
"""Tensors of at least this many elements are cut into rows."""


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, as one vector on their device (batched: Yamazaki et al. 2019, arXiv:1903.12650).

    On a CPU torch computes the norm of a whole tensor on one core. Large flat tensors are therefore viewed as rows,
    which all cores share; each core reads the part that it updates later.
    """
    if not any(map(_is_cut_into_rows, tensors)):
        return torch.stack(torch._foreach_norm(tensors))
    return torch.stack([_norm_by_rows(t) if _is_cut_into_rows(t) else torch.linalg.vector_norm(t) for t in tensors])


def whole_norms(*lists: list[Tensor], groups: tuple[dist.ProcessGroup, ...]) -> tuple[Tensor, ...]:
    """Euclidean norms of each list's whole tensors, one vector per list; the lists hold the local parts.

    Sends one all-reduce per group; none without groups.
    """
    found = torch.stack([norms(tensors) for tensors in lists])
    if groups:
        squares = in_float64(found).square()  # float32 overflows at a norm of 1.8e19
        for group in groups:
            dist.all_reduce(squares, group=group)
        found = squares.sqrt().to(found)
    return found.unbind()


def one_where_a_norm_is_zero(ratios: Tensor, weight_norms: Tensor, other_norms: Tensor) -> Tensor:
    """The ratios, replaced by 1 where either norm is 0: there the quotient of norms is 0, infinite or NaN."""
    return torch.where((weight_norms > 0) & (other_norms > 0), ratios, 1.0)


def _is_cut_into_rows(tensor: Tensor) -> bool:
    size = tensor.numel()
    return tensor.device.type == "cpu" and size >= LARGE_ELEMENTS and size % ROWS == 0 and is_flat(tensor)


def _norm_by_rows(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(tensor.view(ROWS, -1), dim=1))
    return norm
