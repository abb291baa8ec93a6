"""Preparation of a launch of an optimizer's kernels: grouping by dtype, addresses, tables, options."""

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
"""Values that a program loads at once; a chunk holds several blocks."""

NORM_BLOCK = 512
"""Partial sums that a program loads at once for a norm."""

_ALIGNMENT = 16  # bytes, for the widest loads and stores

G = TypeVar("G", bound=StepGroup)


@dataclass(frozen=True)
class Launch:
    """Kernels and their arguments for tensors of one combination of dtypes."""

    kernels: Any
    table: Table
    pointers: Tensor
    values: Tensor
    options: dict[str, Any]
    copy_type: Any

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """First arguments of every kernel."""
        return self.pointers, self.table.facts, self.table.chunk_tensors, self.table.options, self.values


def run(
    groups: Sequence[G],
    *,
    tables: StepTables | None,
    backend: Backend,
    reference: Callable[[Sequence[G]], None],
    module: str,
    launch: Callable[[Launch], None],
) -> None:
    """Runs the reference, or calls `launch` once for each combination of dtypes with the kernels of `module`."""
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
        del kept  # the kernels read these gradients by address, so copies of them must exist until the launch


def _prepared(groups: Sequence[StepGroup], types: Types, table: Table, module: str) -> tuple[Launch, list[Tensor]]:
    gradients = [_in_layout_of(w, g) for group in groups for w, g in zip(group.weights, group.gradients, strict=True)]
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
    """Rows of the pointer table, flat: weight, gradient, copy or 0, state, padded with 0."""
    remaining = iter(gradients)
    rows: list[int] = []
    for group in groups:
        for w, copy, *states in zip(group.weights, group.copies, *group.states(), strict=True):
            row = [w.data_ptr(), next(remaining).data_ptr(), 0 if copy is None else copy.data_ptr()]
            row += [state.data_ptr() for state in states]
            rows += row + [0] * (NUM_POINTERS - len(row))
    return rows


def _by_types(groups: Sequence[G]) -> dict[Types, list[G]]:
    """The groups, split by combination of dtypes, since a kernel is compiled for one combination."""
    # Tensors without a copy use the dtype of the other copies, so that both run in one launch.
    copy_dtype = next((copy.dtype for group in groups for copy in group.copies if copy is not None), torch.bfloat16)
    members: dict[Types, list[G]] = {}
    for group in groups:
        indices: dict[Types, list[int]] = {}
        for index, tensors in enumerate(
            zip(group.weights, group.gradients, group.copies, *group.states(), strict=True)
        ):
            indices.setdefault(_types(copy_dtype, *tensors), []).append(index)
        last = list(indices)[-1]
        for types, chosen in indices.items():
            members.setdefault(types, []).append(group.part(chosen, is_last=types is last))
    return members


def _types(copy_dtype: torch.dtype, weight: Tensor, gradient: Tensor, copy: Tensor | None, *states: Tensor) -> Types:
    types = weight.dtype, gradient.dtype, copy_dtype if copy is None else copy.dtype
    wide = {state.dtype for state in states} <= {torch.float32}
    if not wide or not {*types} <= {torch.float32, torch.float16, torch.bfloat16}:
        raise UserError(
            f"the kernel was given {types[0]} weights, {types[1]} gradients and {states[0].dtype} state, needed: "
            "weights and gradients in float32, float16 or bfloat16 and state in float32; backend='reference' works"
        )
    return types


def _in_layout_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the weight's memory layout; the gradient itself if it has that layout, as it usually does."""
    if same_layout(weight, gradient):
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _triton_type(language: Any, dtype: torch.dtype) -> Any:
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return getattr(language, names[dtype])
