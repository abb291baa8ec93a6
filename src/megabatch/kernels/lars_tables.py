"""What the kernels of the LARS step look up about a list of tensors, kept on the device from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.layout import is_dense, same_layout

CHUNK = 8192
"""Values that one program of a launch takes."""
VALUES = 5
"""Numbers of a group that a step reads on the device: lr, momentum, weight decay, previous lr, gradient scale."""

Types = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Of weights, gradients and copies: a kernel is compiled for one combination."""


@dataclass(frozen=True, kw_only=True)
class LarsGroup:
    """Tensors that share their rates, and how they move; the equations are those of `lars_step_reference`.

    `copies` are 16-bit tensors, or None, to which the new weights are written too. `lr`, `momentum`, `weight_decay`
    and `previous_lr` are 0-d float32 tensors on the weights' device, read when the step runs; `previous_lr` is
    overwritten by `lr` under `inside_corrected`. `gradient_scale`, one more of them, multiplies the gradients as they
    are read: 1 / loss scale, where they still carry one.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    buffers: Sequence[Tensor]
    copies: Sequence[Tensor | None]
    lr: Tensor
    momentum: Tensor
    weight_decay: Tensor
    previous_lr: Tensor
    trust_coefficient: float = 0.001
    eps: float = 0.0
    momentum_form: Literal["outside", "inside", "inside_corrected"] = "outside"
    denominator: Literal["sum", "update", "gradient"] = "sum"
    trust_clip: bool = False
    nesterov: bool = False
    adapt: bool = True
    gradient_scale: Tensor | None = None

    def options(self) -> list[float]:
        """The row of the option table; its columns are named in `_lars_triton.py`."""
        form, denominator = self.momentum_form, self.denominator
        flags = (form != "outside", form == "inside_corrected", denominator == "sum", denominator == "update")
        return [self.trust_coefficient, self.eps, *map(float, (*flags, self.trust_clip, self.nesterov))]


class LarsTables:
    """What the kernels look up about a list of tensors, kept on the device from step to step.

    Only the addresses of gradients change between steps, and are sent again where they did. Inside a CUDA graph they
    are sent from a host buffer that belongs to that graph alone, so that later steps outside do not disturb it.
    """

    def __init__(self) -> None:
        self._of_types: dict[Types, _Table] = {}

    def of(self, groups: Sequence[LarsGroup], types: Types) -> "_Table":
        """The table of these groups; made anew where the set of tensors or a group's options changed."""
        key = _key(groups)
        table = self._of_types.get(types)
        if table is None or table.key != key:
            if _is_capturing(groups[0].weights[0]):
                raise UserError("a CUDA graph captures a step on tensors not seen before; take one step outside first")
            table = self._of_types[types] = _Table(key, groups)
        return table


class _Table:
    """Device tables for one list of tensors; columns as in `_lars_triton.py`."""

    def __init__(self, key: object, groups: Sequence[LarsGroup]) -> None:
        _check_layouts(groups)
        weights = [w for group in groups for w in group.weights]
        device = weights[0].device
        self.key = key
        facts, owners, self.num_norm_chunks = _layout(groups)
        self.num_chunks, self.num_groups = len(owners), len(groups)
        self.facts = torch.tensor(facts, dtype=torch.int64, device=device)
        self.owners = torch.tensor(owners, dtype=torch.int32, device=device)
        self.options = torch.tensor([group.options() for group in groups], dtype=torch.float32, device=device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.scratch = torch.empty(len(groups), VALUES, dtype=torch.float32, device=device)
        self.partials = torch.empty(2, max(1, self.num_norm_chunks), dtype=torch.float32, device=device)
        self._sent: list[int] | None = None
        self._count = 4 * len(weights) + VALUES * len(groups)
        self._device_rows = torch.empty(self._count, dtype=torch.int64, device=device)
        self._spare = self._new_pair()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def addresses(self, rows: list[int]) -> Tensor:
        """`rows` of the pointer and value tables, on the device."""
        if _is_capturing(self._device_rows):
            return self._addresses_of_a_graph(rows)
        if self._spare is None:
            self._spare = self._new_pair()
        if rows != self._sent:
            host = torch.tensor(rows, dtype=torch.int64)
            host = host.pin_memory() if self._device_rows.is_cuda else host
            self._device_rows.copy_(host, non_blocking=True)
            self._sent = rows
        return self._device_rows

    def _addresses_of_a_graph(self, rows: list[int]) -> Tensor:
        if self._spare is None:
            raise UserError("a second CUDA graph captures this step; take one step outside of capture before each")
        host, device = self._spare
        self._captured.append(self._spare)
        self._spare = None
        host.copy_(torch.tensor(rows, dtype=torch.int64))
        return device.copy_(host, non_blocking=True)

    def _new_pair(self) -> tuple[Tensor, Tensor] | None:
        if not self._device_rows.is_cuda:
            return None
        host = torch.empty(self._count, dtype=torch.int64, pin_memory=True)
        return host, torch.empty_like(self._device_rows)


def _layout(groups: Sequence[LarsGroup]) -> tuple[list[list[int]], list[int], int]:
    """Fact rows, each chunk's tensor, and how many chunks have norms: those of adapting tensors, which come first."""
    tensors = [(number, group.adapt, w.numel()) for number, group in enumerate(groups) for w in group.weights]
    facts = [[size, number, 0, 0] for number, _, size in tensors]
    owners: list[int] = []
    for index in sorted(range(len(tensors)), key=lambda index: not tensors[index][1]):
        _, adapt, size = tensors[index]
        chunks = -(-size // CHUNK)
        facts[index][2:] = [len(owners), chunks if adapt else 0]
        owners += [index] * chunks
    return facts, owners, sum(fact[3] for fact in facts)


def _check_layouts(groups: Sequence[LarsGroup]) -> None:
    for group in groups:
        for w, v, copy in zip(group.weights, group.buffers, group.copies, strict=True):
            if not (is_dense(w) and same_layout(w, v) and (copy is None or same_layout(w, copy))):
                raise UserError(
                    f"weight, momentum buffer and copy of shape {tuple(w.shape)} lie in memory in different orders or "
                    "with gaps; torch.zeros_like(weight, memory_format=torch.preserve_format) works"
                )
            if v.device != groups[0].weights[0].device or group.lr.dtype != torch.float32:
                raise UserError("a step works on one device, with rates in float32; one step per device works")


def _key(groups: Sequence[LarsGroup]) -> object:
    return tuple((tuple(group.options()), group.adapt, tuple(w.numel() for w in group.weights)) for group in groups)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
