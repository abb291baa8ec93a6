"""Multi-tensor operations: one operation on a whole list of tensors.

torch's multi-tensor operations (`torch._foreach_*`) save a GPU thousands of launches. On a CPU every operation reads
all tensors from memory again, so there the lists are cut into parts that stay in cache from one operation to the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.optim.engine.shards import placement

Number = float | Tensor
"""A rate or factor: a float, or a 0-d tensor whose value may change between replays of a CUDA graph."""

PART_ELEMENTS = 2**18
"""On a CPU a part holds up to 1 MiB of fp32 and takes the whole step, norms and update, before the next part. The size
was chosen by timing ResNet-50's tensors on two EPYC cores; four times more or less made little difference."""


@dataclass(frozen=True)
class TensorLists:
    """Weights, gradients and state of one parameter group on one device, index by index, all in `wide_dtype`.

    On a CPU they are flat views where weight, gradient and state have the same memory layout, as they usually do. Of
    sharded parameters they are this rank's parts, and the other parts are on the ranks of `shard_groups`.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    states: dict[str, list[Tensor]]
    shard_groups: tuple[dist.ProcessGroup, ...] = ()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, state and update of a parameter: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parts_of_one_dtype(parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], torch.dtype]]:
    """Lists of parameters of one device, dtype and placement, each with its wide dtype.

    On a CPU lists fit in cache, except those of sharded parameters: all ranks must have the same lists.
    """
    for members in lists_of_one_dtype(parameters):
        in_cache = members[0].device.type == "cpu" and placement(members[0]) is None
        for part in _parts(members) if in_cache else [members]:
            yield part, wide_dtype(members[0].dtype)


def lists_of_one_dtype(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters, one list for each device, dtype and placement."""
    lists: dict[tuple[torch.device, torch.dtype, Any], list[Tensor]] = {}
    for parameter in parameters:
        lists.setdefault((parameter.device, parameter.dtype, placement(parameter)), []).append(parameter)
    return list(lists.values())


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of at most `PART_ELEMENTS` elements together, or one larger tensor."""
    part: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if part and filled + tensor.numel() > PART_ELEMENTS:
            yield part
            part, filled = [], 0
        part.append(tensor)
        filled += tensor.numel()
    if part:
        yield part


def is_flat(tensor: Tensor) -> bool:
    """True for a tensor of one dimension without gaps."""
    return tensor.ndim == 1 and tensor.is_contiguous()


def add_scaled_(targets: list[Tensor], others: list[Tensor], scale: Number | list[Tensor]) -> None:
    """target += scale * other, in place, with one scale for all tensors or one 0-d tensor for each."""
    if isinstance(scale, list):
        torch._foreach_addcmul_(targets, others, scale)
    elif isinstance(scale, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(others, scale))
    else:
        torch._foreach_add_(targets, others, alpha=scale)


def add_number_(targets: list[Tensor], number: Number) -> None:
    """target += number, in place. Without `alpha` torch would copy a tensor's value to the host."""
    if isinstance(number, Tensor):
        torch._foreach_add_(targets, number, alpha=1)
    else:
        torch._foreach_add_(targets, number)


def scaled(tensors: list[Tensor], scale: Number | list[Tensor]) -> list[Tensor]:
    """scale * tensor, with one scale for all tensors or one 0-d tensor for each."""
    return list(torch._foreach_mul(tensors, scale))


def plus_scaled(tensors: list[Tensor], others: list[Tensor], scale: Number) -> list[Tensor]:
    """tensor + scale * other; the same tensors, not copies, if the scale is the float 0."""
    if isinstance(scale, Tensor):
        return list(torch._foreach_add(tensors, torch._foreach_mul(others, scale)))
    return list(torch._foreach_add(tensors, others, alpha=scale)) if scale else tensors


def flattened(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    """Flat views of the tensors at each index where all of them have the same memory layout; otherwise the tensors.

    torch's CPU kernels take up to twice as long on channels_last tensors as on flat views of the same memory.
    """
    rows = [[_flat(t) for t in row] if _have_same_layout(row) else list(row) for row in zip(*columns, strict=True)]
    return [list(column) for column in zip(*rows, strict=True)]


def _have_same_layout(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    if not (channels_last or first.is_contiguous()):
        return False
    return all(_same_strides(first, other) for other in tensors[1:])


def _same_strides(one: Tensor, other: Tensor) -> bool:
    """True if the strides agree in dimensions above size 1; elsewhere, as in a 1 x 1 filter, a stride has no effect."""
    if one.stride() == other.stride():
        return True
    return all(a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).view(-1)
