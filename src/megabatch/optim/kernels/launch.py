"""What every launch of an optimizer's kernels takes: groups of equal types, addresses, tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.layout import same_layout
from megabatch.optim.kernels.tables import CHUNK, NUM_POINTERS, StepGroup, StepTables, Table, Types

BLOCK = 2048
NORM_BLOCK = 512
_ALIGNMENT = 16

G = TypeVar("G", bound=StepGroup)


@dataclass(frozen=True)
class Launch:
    """One list of tensors of equal types, ready for kernels."""

    kernels: Any
    table: Table
    pointers: Tensor
    values: Tensor
    options: dict[str, Any]
    copy_type: Any

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The first arguments of every kernel."""
        return self.pointers, self.table.facts, self.table.owners, self.table.options, self.values


def run(
    groups: Sequence[G],
    *,
    tables: StepTables | None,
    backend: Backend,
    reference: Callable[[Sequence[G]], None],
    module: str,
    launch: Callable[[Launch], None],
) -> None:
    """The reference, or for each combination of element types the launches of `module`'s kernels."""
    groups = [group for group in groups if group.weights]
    if not groups:
        return
    if not use_triton(groups[0].weights[0], backend):
        reference(groups)
        return
    tables = StepTables() if tables is None else tables
    for types, members in _by_types(groups).items():
        table = tables.of(members, types)
        prepared, kept = _prepared(members, types, table, module)
        if table.num_chunks:
            with on_device(prepared.pointers):
                launch(prepared)
        del kept  # gradients laid out anew had to live until here


def _prepared(groups: Sequence[StepGroup], types: Types, table: Table, module: str) -> tuple[Launch, list[Tensor]]:
    gradients = [_laid_out_as(w, g) for group in groups for w, g in zip(group.weights, group.gradients, strict=True)]
    rows = _pointer_rows(groups, gradients)
    pointers, values = table.send(rows, groups)
    kernels = load(module)
    weight_type, gradient_type, copy_type = (_triton_type(kernels.tl, dtype) for dtype in types)
    options = {
        "chunk": CHUNK,
        "block": BLOCK,
        "weight_type": weight_type,
        "gradient_type": gradient_type,
        "aligned": not any(address % _ALIGNMENT for address in rows),
        "num_warps": 8,
    }
    return Launch(kernels, table, pointers, values, options, copy_type), gradients


def _pointer_rows(groups: Sequence[StepGroup], gradients: list[Tensor]) -> list[int]:
    rest = iter(gradients)
    rows: list[int] = []
    for group in groups:
        for w, copy, *states in zip(group.weights, group.copies, *group.states(), strict=True):
            row = [w.data_ptr(), next(rest).data_ptr(), 0 if copy is None else copy.data_ptr()]
            row += [state.data_ptr() for state in states]
            rows += row + [0] * (NUM_POINTERS - len(row))
    return rows


def _by_types(groups: Sequence[G]) -> dict[Types, list[G]]:
    """The groups once for each combination of element types: kernels are compiled for one."""
    written = next((copy.dtype for group in groups for copy in group.copies if copy is not None), torch.bfloat16)
    members: dict[Types, list[G]] = {}
    for group in groups:
        indices: dict[Types, list[int]] = {}
        for index, tensors in enumerate(
            zip(group.weights, group.gradients, group.copies, *group.states(), strict=True)
        ):
            indices.setdefault(_types(written, *tensors), []).append(index)
        last = list(indices)[-1]
        for types, chosen in indices.items():
            members.setdefault(types, []).append(group.part(chosen, is_last=types is last))
    return members


def _types(written: torch.dtype, weight: Tensor, gradient: Tensor, copy: Tensor | None, *states: Tensor) -> Types:
    types = weight.dtype, gradient.dtype, written if copy is None else copy.dtype
    wide = {state.dtype for state in states} <= {torch.float32}
    if not wide or not {*types} <= {torch.float32, torch.float16, torch.bfloat16}:
        raise UserError(
            f"the kernel was given {types[0]} weights, {types[1]} gradients and state in {states[0].dtype}, needed: "
            "float32, float16 or bfloat16, and state in float32; backend='reference' works"
        )
    return types


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its elements in memory in the order of the weight's; itself as a rule."""
    if same_layout(weight, gradient):
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _triton_type(language: Any, dtype: torch.dtype) -> Any:
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return getattr(language, names[dtype])
