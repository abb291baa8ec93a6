"""When a step goes through the kernels of `megabatch.kernels`, and what an optimizer keeps on the device for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, has_triton, interprets
from megabatch.kernels.layout import is_dense
from megabatch.optim.kernels.tables import StepGroup, StepTables

Group = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """What the step of an optimizer's groups is: the groups' kind, and the function that takes them."""

    group: type[StepGroup]
    step: Callable[..., None]


_TYPES = {torch.float32, torch.float16, torch.bfloat16}


def takes_kernel(group: Group, parameters: list[Tensor], rates: tuple[str, ...]) -> bool:
    """Whether the kernel takes these parameters: `fused=True`, or None on a GPU where nothing stands in the way.

    Raises:
        UserError: fused=True, and something does.
    """
    if group["fused"] is False or group["foreach"] is not None or not parameters:
        return False
    if group["fused"] is None and not (parameters[0].is_cuda and has_triton()):
        return False
    obstacle = _obstacle(parameters, {name: group[name] for name in rates})
    if obstacle and group["fused"]:
        raise UserError(f"fused=True was given, but {obstacle}; fused=None takes the kernel where it can")
    return obstacle is None


def _obstacle(parameters: list[Tensor], rates: Mapping[str, Any]) -> str | None:
    """What keeps the kernel from a group, in words."""
    device = parameters[0].device
    if not has_triton():
        return "Triton is not installed"
    if device.type != "cuda" and not interprets():
        return f"the parameters are on {device}, where Triton runs under TRITON_INTERPRET=1 alone"
    for parameter in parameters:
        if parameter.device != device:
            return f"a group has parameters on {device} and on {parameter.device}"
        if parameter.dtype not in _TYPES or (parameter.grad is not None and parameter.grad.dtype not in _TYPES):
            return f"a parameter is {parameter.dtype}, needed: float32, float16 or bfloat16"
        if not _lies_dense(parameter):
            return f"a parameter of shape {tuple(parameter.shape)} lies in memory with gaps"
    for name, value in rates.items():
        if isinstance(value, Tensor) and (value.dtype != torch.float32 or value.device != device):
            return f"{name} is a {value.dtype} tensor on {value.device}, needed: float32 on {device}"
    return None


def _lies_dense(tensor: Tensor) -> bool:
    usual = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return usual or is_dense(tensor)


class KernelMemory:
    """What an optimizer keeps on its devices from step to step: tables, and tensors that follow numbers."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, StepTables] = {}
        self._numbers: dict[tuple[int, str], _Follower] = {}
        self._scales: dict[tuple[str, torch.device], Tensor] = {}

    def tables(self, device: torch.device) -> StepTables:
        """What the kernels look up on `device`."""
        return self._tables.setdefault(device, StepTables())

    def values(
        self, group: int, values: Mapping[str, Any], backend: Backend, device: torch.device
    ) -> dict[str, Tensor]:
        """A group's rates as 0-d tensors: themselves, or tensors that follow its numbers."""
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                found[name] = value
            elif backend == "reference":
                found[name] = torch.tensor(value, dtype=torch.float64)  # on the host, where it acts as a number
            else:
                found[name] = self._followed(group, name, value, device)
        return found

    def _followed(self, group: int, name: str, value: float, device: torch.device) -> Tensor:
        follower = self._numbers.get((group, name))
        if follower is None or follower.tensor.device != device:
            dtype = torch.float64 if name == "step" else torch.float32
            follower = self._numbers[group, name] = _Follower(torch.zeros((), dtype=dtype, device=device))
        return follower.follow(value)

    def forget(self, group: int, name: str) -> None:
        """The tensor that follows this number has another value by now."""
        if (group, name) in self._numbers:
            self._numbers[group, name].number = None

    def scales(self, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
        """What a GradScaler left for this step, at addresses that stay: 1 / loss scale, and whether it overflowed."""
        found: dict[str, Tensor] = {}
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            found["gradient_scale"] = self._kept("scale", device).copy_(scale.reciprocal())
        if overflow is not None:
            found["found_inf"] = self._kept("overflow", device).copy_(overflow)
        return found

    def _kept(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._scales:
            self._scales[name, device] = torch.zeros((), dtype=torch.float32, device=device)
        return self._scales[name, device]


class _Follower:
    """A tensor on the device that is written only when the number it follows changes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.number: float | None = None

    def follow(self, number: float) -> Tensor:
        if number != self.number:
            self.tensor.fill_(number)
            capturing = self.tensor.is_cuda and torch.cuda.is_current_stream_capturing()
            self.number = None if capturing else number  # a captured write has not happened yet, and will again
        return self.tensor
