"""Conditions for using an optimizer's Triton kernels, and the device memory that the kernels need between steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, has_triton, interprets
from megabatch.kernels.layout import is_dense
from megabatch.optim.engine.shards import is_sharded
from megabatch.optim.kernels.tables import StepGroup, StepTables

Group = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """An optimizer's kernel: the class of its groups, and the function that updates a list of them."""

    group: type[StepGroup]
    step: Callable[..., None]


_TYPES = {torch.float32, torch.float16, torch.bfloat16}


def uses_kernel(group: Group, parameters: list[Tensor], rates: tuple[str, ...]) -> bool:
    """True if the kernel updates these parameters: with `fused=True`, or with None on a GPU where it can run.

    Raises:
        UserError: fused=True where the kernel cannot run.
    """
    if group["fused"] is False or group["foreach"] is not None or not parameters:
        return False
    if group["fused"] is None and not (parameters[0].is_cuda and has_triton()):
        return False
    reason = _reason_against(parameters, {name: group[name] for name in rates})
    if reason and group["fused"]:
        raise UserError(f"fused=True was given, but {reason}; fused=None works: it uses the kernel only where it can")
    return reason is None


def _reason_against(parameters: list[Tensor], rates: Mapping[str, Any]) -> str | None:
    """Reason why the kernel cannot be used for a group, or None."""
    device = parameters[0].device
    if not has_triton():
        return "Triton is not installed"
    if device.type != "cuda" and not interprets():
        return f"the parameters are on {device}, where Triton runs only under TRITON_INTERPRET=1"
    for parameter in parameters:
        if is_sharded(parameter):
            return "a parameter is sharded (DTensor)"
        if parameter.device != device:
            return f"a group has parameters on {device} and on {parameter.device}"
        if parameter.dtype not in _TYPES or (parameter.grad is not None and parameter.grad.dtype not in _TYPES):
            return f"a parameter is {parameter.dtype}, needed: float32, float16 or bfloat16"
        if not _is_dense(parameter):
            return f"a parameter of shape {tuple(parameter.shape)} has gaps in memory"
    for name, value in rates.items():
        if isinstance(value, Tensor) and (value.dtype != torch.float32 or value.device != device):
            return f"{name} is a {value.dtype} tensor on {value.device}, needed: float32 on {device}"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """True if the tensor has no gaps in memory; the two common layouts are tested first, since that is faster."""
    usual = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return usual or is_dense(tensor)


class KernelMemory:
    """Device memory that an optimizer's kernels use at every step: tables, and rates as 0-d tensors."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, StepTables] = {}
        self._numbers: dict[tuple[int, str], _DeviceNumber] = {}
        self._scales: dict[tuple[str, torch.device], Tensor] = {}

    def tables(self, device: torch.device) -> StepTables:
        """Tables of the kernels on `device`."""
        return self._tables.setdefault(device, StepTables())

    def values(
        self, group: int, values: Mapping[str, Any], backend: Backend, device: torch.device
    ) -> dict[str, Tensor]:
        """A group's rates as 0-d tensors: the tensors given, or device tensors that hold the numbers given."""
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                found[name] = value
            elif backend == "reference":
                found[name] = torch.tensor(value, dtype=torch.float64)  # 0-d on the host: acts as a number
            else:
                found[name] = self._device_number(group, name, value, device)
        return found

    def _device_number(self, group: int, name: str, value: float, device: torch.device) -> Tensor:
        number = self._numbers.get((group, name))
        if number is None or number.tensor.device != device:
            dtype = torch.float64 if name == "step" else torch.float32
            number = self._numbers[group, name] = _DeviceNumber(torch.zeros((), dtype=dtype, device=device))
        return number.set(value)

    def forget(self, group: int, name: str) -> None:
        """Declares the tensor of this number overwritten, so that the next step writes the number again."""
        if (group, name) in self._numbers:
            self._numbers[group, name].number = None

    def scales(self, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
        """1 / loss scale and the overflow flag that a GradScaler set for this step, in tensors of constant address."""
        found: dict[str, Tensor] = {}
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            found["gradient_scale"] = self._scale_tensor("scale", device).copy_(scale.reciprocal())
        if overflow is not None:
            found["found_inf"] = self._scale_tensor("overflow", device).copy_(overflow)
        return found

    def _scale_tensor(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._scales:
            self._scales[name, device] = torch.zeros((), dtype=torch.float32, device=device)
        return self._scales[name, device]


class _DeviceNumber:
    """A number in a tensor on the device, which is written only when the number changes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.number: float | None = None

    def set(self, number: float) -> Tensor:
        """The tensor, holding `number`."""
        if number != self.number:
            self.tensor.fill_(number)
            capturing = self.tensor.is_cuda and torch.cuda.is_current_stream_capturing()
            self.number = None if capturing else number  # a captured write runs at every replay, but not now
        return self.tensor
