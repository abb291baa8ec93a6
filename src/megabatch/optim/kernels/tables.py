"""What the kernels of an optimizer's step look up about a list of tensors, kept on the device from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.layout import is_dense, same_layout

CHUNK = 8192
"""Values that one program of a launch takes."""

# Row lengths of the tables; their columns are named in `_optimizer_triton.py` and in the kernels' own files.
NUM_POINTERS, NUM_VALUES, NUM_OPTIONS = 5, 7, 8

Types = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Of weights, gradients and copies: a kernel is compiled for one combination."""


@dataclass(frozen=True, kw_only=True)
class StepGroup:
    """Tensors that share their rates; a subclass says how they move.

    Lists go index by index. `copies` are 16-bit tensors, or None, to which the new weights are written too. Rates are
    0-d tensors, for the kernels float32 on the weights' device, read when the step runs. `gradient_scale`, one more,
    multiplies the gradients as they are read: 1 / loss scale, where they still carry one. Where `found_inf` is not 0
    the step changes nothing.
    """

    state_fields: ClassVar[tuple[str, ...]]
    """Lists of float32 state."""
    value_fields: ClassVar[tuple[str, ...]]
    """Rates, besides the four here that every step has, in the order of the value table's columns."""
    carried: ClassVar[str] = ""
    """Which of them a step overwrites for the next one."""
    option_fields: ClassVar[tuple[str, ...]]
    """What else a group may set: numbers and words that do not change between replays of a CUDA graph."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    copies: Sequence[Tensor | None]
    lr: Tensor
    momentum: Tensor
    weight_decay: Tensor
    adapt: bool = True
    gradient_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def rates(cls) -> tuple[str, ...]:
        """Names of all rates that a step reads and does not write."""
        return ("lr", "momentum", "weight_decay", *(name for name in cls.value_fields if name != cls.carried))

    def options(self) -> list[float]:
        """The row of the option table: numbers and flags."""
        raise NotImplementedError

    def states(self) -> list[Sequence[Tensor]]:
        """The lists of state."""
        return [getattr(self, name) for name in self.state_fields]

    def values(self) -> list[Tensor | None]:
        """The row of the value table."""
        common = [self.lr, self.momentum, self.weight_decay, self.gradient_scale, self.found_inf]
        return common + [getattr(self, name) for name in self.value_fields]

    def scaled(self, gradient: Tensor) -> Tensor:
        """The gradient without its loss scale."""
        return gradient if self.gradient_scale is None else self.gradient_scale * gradient

    def overflowed(self) -> bool:
        """Whether the step is to be left out; reads the device, so it is for references alone."""
        return self.found_inf is not None and bool(self.found_inf != 0)

    def part(self, chosen: Sequence[int], *, is_last: bool) -> Self:
        """The tensors at `chosen`. Only the last part may overwrite what the step carries on; others get a copy."""
        if len(chosen) == len(self.weights):
            return self
        lists = ("weights", "gradients", "copies", *self.state_fields)
        changes: dict[str, Any] = {name: [getattr(self, name)[i] for i in chosen] for name in lists}
        if self.carried and not is_last:
            changes[self.carried] = getattr(self, self.carried).clone()
        return replace(self, **changes)


def store(weight: Tensor, wide: Tensor) -> None:
    """Rounds the new weights to the parameter's type; nothing is left to do where `wide` is the weight itself."""
    if wide is not weight:
        weight.copy_(wide)


class StepTables:
    """What the kernels look up about a list of tensors, kept on the device from step to step.

    Only the addresses of gradients change between steps, and are sent again where they did. Inside a CUDA graph they
    are sent from a host buffer that belongs to that graph alone, so that later steps outside do not disturb it.
    """

    def __init__(self) -> None:
        self._of_types: dict[Types, Table] = {}

    def of(self, groups: Sequence[StepGroup], types: Types) -> "Table":
        """The table of these groups; made anew where the set of tensors or a group's options changed."""
        key = _key(groups)
        table = self._of_types.get(types)
        if table is None or table.key != key:
            if _is_capturing(groups[0].weights[0]):
                raise UserError("a CUDA graph captures a step on tensors not seen before; take one step outside first")
            table = self._of_types[types] = Table(key, groups)
        return table


class Table:
    """Device tables for one list of tensors."""

    def __init__(self, key: object, groups: Sequence[StepGroup]) -> None:
        _check_layouts(groups)
        num_tensors = sum(len(group.weights) for group in groups)
        device = groups[0].weights[0].device
        self.key = key
        facts, owners, self.num_norm_chunks = _layout(groups)
        self.num_chunks, self.num_groups = len(owners), len(groups)
        self.facts = torch.tensor(facts, dtype=torch.int64, device=device)
        self.owners = torch.tensor(owners, dtype=torch.int32, device=device)
        self.options = _options(groups).to(device)
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)
        self.scratch = torch.empty(len(groups), NUM_VALUES, dtype=torch.float32, device=device)
        self.partials = torch.empty(2, self.num_chunks, dtype=torch.float32, device=device)
        self._sent: list[int] | None = None
        self._num_pointers = NUM_POINTERS * num_tensors
        self._count = self._num_pointers + NUM_VALUES * len(groups)
        self._device_rows = torch.empty(self._count, dtype=torch.int64, device=device)
        self._spare = self._new_pair()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def send(self, pointers: list[int], groups: Sequence[StepGroup]) -> tuple[Tensor, Tensor]:
        """Rows of addresses: of each tensor's data, and of each group's rates; on the device."""
        rows = self._send(pointers + [address for group in groups for address in self._value_row(group)])
        return rows[: self._num_pointers], rows[self._num_pointers :]

    def _value_row(self, group: StepGroup) -> list[int]:
        defaults = {3: self._one, 4: self._zero}  # no loss scale; no overflow
        values = [defaults[i] if value is None else value for i, value in enumerate(group.values())]
        return [value.data_ptr() for value in values] + [0] * (NUM_VALUES - len(values))

    def _send(self, rows: list[int]) -> Tensor:
        if _is_capturing(self._device_rows):
            return self._send_in_a_graph(rows)
        if self._spare is None:
            self._spare = self._new_pair()
        if rows != self._sent:
            host = torch.tensor(rows, dtype=torch.int64)
            host = host.pin_memory() if self._device_rows.is_cuda else host
            self._device_rows.copy_(host, non_blocking=True)
            self._sent = rows
        return self._device_rows

    def _send_in_a_graph(self, rows: list[int]) -> Tensor:
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


def _layout(groups: Sequence[StepGroup]) -> tuple[list[list[int]], list[int], int]:
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


def _options(groups: Sequence[StepGroup]) -> Tensor:
    table = torch.zeros(len(groups), NUM_OPTIONS)
    for row, group in zip(table, groups, strict=True):
        row[: len(group.options())] = torch.tensor(group.options())
    return table


def _check_layouts(groups: Sequence[StepGroup]) -> None:
    device = groups[0].weights[0].device
    for group in groups:
        for w, copy, *states in zip(group.weights, group.copies, *group.states(), strict=True):
            beside = states if copy is None else [copy, *states]
            if not (is_dense(w) and all(same_layout(w, other) for other in beside)):
                raise UserError(
                    f"weight, state and copy of shape {tuple(w.shape)} lie in memory in different orders or with gaps; "
                    "torch.zeros_like(weight, memory_format=torch.preserve_format) works"
                )
            if any(other.device != device for other in beside) or group.lr.dtype != torch.float32:
                raise UserError("a step works on one device, with rates in float32; one step per device works")


def _key(groups: Sequence[StepGroup]) -> object:
    """What the table and its checks depend on; the layouts too, since a model may be given another one in mid-run."""
    return tuple(
        (tuple(group.options()), group.adapt, *((w.numel(), w.stride()) for w in group.weights)) for group in groups
    )


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
