"""Parameters whose elements are distributed over ranks: DTensor, as FSDP2's `fully_shard` makes them.

A step updates each rank's local part. Only norms need the other parts: one all-reduce of squared norms for all layers.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn

from megabatch.errors import UserError

if TYPE_CHECKING:  # importing it takes half a second
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """True for a DTensor."""
    return type(tensor) not in {nn.Parameter, Tensor} and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, which shares its memory; other tensors as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of the parameter's gradient, of the elements that `local(parameter)` holds."""
    gradient = parameter.grad
    assert gradient is not None
    if is_sharded(parameter) and is_sharded(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)  # adds partial sums, e.g.
    return local(gradient)


def placement(parameter: Tensor) -> Any:
    """Hashable description of a DTensor's distribution; None for other tensors."""
    return (parameter.device_mesh, tuple(parameter.placements)) if is_sharded(parameter) else None


def shard_groups(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Groups over which a DTensor's elements are distributed, one per sharded dimension of its mesh; () for others."""
    if not is_sharded(parameter):
        return ()
    if any(kind.is_partial() for kind in parameter.placements):
        raise UserError(
            f"a parameter with placements {tuple(parameter.placements)} was given, needed: sharded or replicated "
            "ones; fully_shard(model) works"
        )
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(i) for i, kind in enumerate(parameter.placements) if not kind.is_replicate())


def refuse_flattened(parameters: list[Any]) -> None:
    """Raises UserError for parameters that FSDP1 flattened: a flat vector tells no layers apart."""
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise UserError(
            "parameters were given that FullyShardedDataParallel has flattened, needed: parameters in their own "
            "shapes; torch.distributed.fsdp.fully_shard(model) works"
        )
