"""Groups of tensors for an optimizer's kernels, and the kernels' lookup tables on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.layout import is_dense, same_layout

CHUNK = 8192
"""Number of values that one program handles."""

# Row lengths of the tables; `_optimizer_triton.py` and the files of the kernels name the columns.
NUM_POINTERS, NUM_VALUES, NUM_OPTIONS = 5, 7, 8

Types = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Dtypes of weights, gradients and copies; a kernel is compiled for one combination."""


@dataclass(frozen=True, kw_only=True)
class StepGroup:
    """Tensors that share their rates; a subclass defines the update.

    Equal indices of all lists belong together. `copies` holds 16-bit tensors, into which a step writes the new weights,
    or None. Rates are 0-d tensors, for the kernels float32 on the weights' device; they are read when the step runs.
    `gradient_scale`, also 0-d, multiplies the gradients: 1 / loss scale for gradients of a scaled loss. If `found_inf`
    is not 0, the step changes nothing.
    """

    state_fields: ClassVar[tuple[str, ...]]
    """Names of the lists of float32 state."""
    value_fields: ClassVar[tuple[str, ...]]
    """Names of the rates besides those of every step, in the order of the value table's columns."""
    carried: ClassVar[str] = ""
    """Name of the rate that a step overwrites for the next step, if there is one."""
    option_fields: ClassVar[tuple[str, ...]]
    """Names of the other fields of a group: numbers and words that are constant across replays of a CUDA graph."""

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
        """Names of the rates that a step reads and does not overwrite."""
        return ("lr", "momentum", "weight_decay", *(name for name in cls.value_fields if name != cls.carried))

    def options(self) -> list[float]:
        """Row of the option table: numbers and flags."""
        raise NotImplementedError

    def states(self) -> list[Sequence[Tensor]]:
        """Lists of state tensors."""
        return [getattr(self, name) for name in self.state_fields]

    def values(self) -> list[Tensor | None]:
        """Row of the value table; None for a missing loss scale or overflow flag."""
        common = [self.lr, self.momentum, self.weight_decay, self.gradient_scale, self.found_inf]
        return common + [getattr(self, name) for name in self.value_fields]

    def scaled(self, gradient: Tensor) -> Tensor:
        """The gradient times `gradient_scale`, if there is one."""
        return gradient if self.gradient_scale is None else self.gradient_scale * gradient

    def overflowed(self) -> bool:
        """True if the step must change nothing. Copies the flag to the host, so only references call it."""
        return self.found_inf is not None and bool(self.found_inf != 0)

    def part(self, chosen: Sequence[int], *, is_last: bool) -> Self:
        """The group with only the tensors at `chosen`.

        A step overwrites the rate named `carried`. Only the last part may do that; the other parts get a copy of it.
        """
        if len(chosen) == len(self.weights):
            return self
        lists = ("weights", "gradients", "copies", *self.state_fields)
        changes: dict[str, Any] = {name: [getattr(self, name)[i] for i in chosen] for name in lists}
        if self.carried and not is_last:
            changes[self.carried] = getattr(self, self.carried).clone()
        return replace(self, **changes)


def store(weight: Tensor, wide: Tensor) -> None:
    """Rounds the new weights to the parameter's dtype; does nothing if `wide` is the weight itself."""
    if wide is not weight:
        weight.copy_(wide)


class StepTables:
    """Lookup tables of the kernels, one for each combination of dtypes, kept on the device between steps.

    Between steps usually only the addresses of gradients change; changed addresses are sent again. A CUDA graph sends
    them from a host buffer that no other step uses, so that steps outside the graph do not change what it sends.
    """

    def __init__(self) -> None:
        self._of_types: dict[Types, Table] = {}

    def of(self, groups: Sequence[StepGroup], types: Types) -> "Table":
        """The table of these groups; a new one if the tensors' sizes and layouts or a group's options changed."""
        key = _key(groups)
        table = self._of_types.get(types)
        if table is None or table.key != key:
            if _is_capturing(groups[0].weights[0]):
                raise UserError("a CUDA graph captures a step on new tensors; take one step outside of capture first")
            table = self._of_types[types] = Table(key, groups)
        return table


class Table:
    """Device tables for one list of tensors: facts, chunks, options, addresses and scratch memory."""

    def __init__(self, key: object, groups: Sequence[StepGroup]) -> None:
        _check_layouts(groups)
        num_tensors = sum(len(group.weights) for group in groups)
        device = groups[0].weights[0].device
        self.key = key
        facts, chunk_tensors, self.num_norm_chunks = _layout(groups)
        self.num_chunks, self.num_groups = len(chunk_tensors), len(groups)
        self.facts = torch.tensor(facts, dtype=torch.int64, device=device)
        self.chunk_tensors = torch.tensor(chunk_tensors, dtype=torch.int32, device=device)
        self.options = _options(groups).to(device)
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)
        # Results of the first launch for the second: numbers of each group, and squared norms of each chunk.
        self.scratch = torch.empty(len(groups), NUM_VALUES, dtype=torch.float32, device=device)
        self.partials = torch.empty(2, self.num_chunks, dtype=torch.float32, device=device)
        self._sent: list[int] | None = None
        self._num_pointers = NUM_POINTERS * num_tensors
        self._count = self._num_pointers + NUM_VALUES * len(groups)
        self._device_rows = torch.empty(self._count, dtype=torch.int64, device=device)
        self._spare = self._new_pair()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def send(self, pointers: list[int], groups: Sequence[StepGroup]) -> tuple[Tensor, Tensor]:
        """Sends addresses; returns the pointer table (of each tensor) and the value table (of each group's rates)."""
        rows = self._send(pointers + [address for group in groups for address in self._value_row(group)])
        return rows[: self._num_pointers], rows[self._num_pointers :]

    def _value_row(self, group: StepGroup) -> list[int]:
        defaults = {3: self._one, 4: self._zero}  # columns of the loss scale and of the overflow flag
        values = [defaults[i] if value is None else value for i, value in enumerate(group.values())]
        return [value.data_ptr() for value in values] + [0] * (NUM_VALUES - len(values))

    def _send(self, rows: list[int]) -> Tensor:
        """Copies addresses to the device if they changed since they were last sent."""
        if _is_capturing(self._device_rows):
            return self._send_in_a_graph(rows)
        if self._spare is None:
            self._spare = self._new_pair()
        if rows != self._sent:
            # A new pinned buffer for each copy: a buffer that is reused might change while a copy is in flight.
            host = torch.tensor(rows, dtype=torch.int64)
            host = host.pin_memory() if self._device_rows.is_cuda else host
            self._device_rows.copy_(host, non_blocking=True)
            self._sent = rows
        return self._device_rows

    def _send_in_a_graph(self, rows: list[int]) -> Tensor:
        """Captures a copy from a host buffer that only this graph uses, allocated before the capture."""
        if self._spare is None:
            raise UserError(
                "a second CUDA graph captures this step without a step between the captures; one step outside of "
                "capture before each of them works"
            )
        host, device = self._spare
        self._captured.append(self._spare)
        self._spare = None  # the next step outside of a capture allocates another pair
        host.copy_(torch.tensor(rows, dtype=torch.int64))
        return device.copy_(host, non_blocking=True)

    def _new_pair(self) -> tuple[Tensor, Tensor] | None:
        if not self._device_rows.is_cuda:
            return None
        host = torch.empty(self._count, dtype=torch.int64, pin_memory=True)
        return host, torch.empty_like(self._device_rows)


def _layout(groups: Sequence[StepGroup]) -> tuple[list[list[int]], list[int], int]:
    """Rows of facts, the tensor of each chunk, and the number of chunks with norms.

    Chunks with norms, those of tensors that adapt, come first, so that the first launch covers a prefix of all chunks.
    """
    tensors = [(number, group.adapt, w.numel()) for number, group in enumerate(groups) for w in group.weights]
    facts = [[size, number, 0, 0] for number, _, size in tensors]
    chunk_tensors: list[int] = []
    for index in sorted(range(len(tensors)), key=lambda index: not tensors[index][1]):
        _, adapt, size = tensors[index]
        chunks = -(-size // CHUNK)
        facts[index][2:] = [len(chunk_tensors), chunks if adapt else 0]
        chunk_tensors += [index] * chunks
    return facts, chunk_tensors, sum(fact[3] for fact in facts)


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
                    f"weight, state and copy of shape {tuple(w.shape)} have different memory layouts or gaps; "
                    "torch.zeros_like(weight, memory_format=torch.preserve_format) works"
                )
            if any(other.device != device for other in beside) or group.lr.dtype != torch.float32:
                raise UserError(
                    f"tensors on several devices or a {group.lr.dtype} lr were given, needed: one device and float32 "
                    "rates; one step per device works"
                )


def _key(groups: Sequence[StepGroup]) -> object:
    """Everything that a table depends on. Layouts are part of it, since a model's memory format may change in a run."""
    return tuple(
        (tuple(group.options()), group.adapt, *((w.numel(), w.stride()) for w in group.weights)) for group in groups
    )


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
