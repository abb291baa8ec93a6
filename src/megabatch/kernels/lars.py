"""One step of LARS or momentum SGD for all tensors of all groups, in two kernel launches.

The first launch reads weights and gradients and writes the squared norms of chunks of `CHUNK` values; the second adds
each tensor's partial sums in a fixed order, forms its trust ratio and moves its momentum and weights. No atomic
operation is used, so equal inputs give equal bits. Reads w, g twice and v once, writes w and v: 28 bytes a parameter
in float32.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.lars_tables import CHUNK, LarsGroup, LarsTables, Types
from megabatch.kernels.layout import same_layout

BLOCK = 2048
NORM_BLOCK = 512
_ALIGNMENT = 16


def lars_step(groups: Sequence[LarsGroup], *, tables: LarsTables | None = None, backend: Backend = "auto") -> None:
    """Moves weights, momentum buffers and 16-bit copies of all groups by one step, in place.

    Weights are float32, float16 or bfloat16, buffers float32, gradients any of the three; all are computed with in
    float32. `tables` holds what the kernels look up; pass the same object at every step, and one that has seen a step
    outside when a CUDA graph is captured.

    Raises:
        UserError: tensors of other types or layouts, of several devices, or a capture without a step before.
    """
    groups = [group for group in groups if group.weights]
    if not groups:
        return
    if not use_triton(groups[0].weights[0], backend):
        lars_step_reference(groups)
        return
    tables = LarsTables() if tables is None else tables
    for types, members in _by_types(groups).items():
        _launch(members, types, tables)


@torch.no_grad()
def lars_step_reference(groups: Sequence[LarsGroup]) -> None:
    """The same step, one tensor after another, as the equations stand (You et al. 2017, arXiv:1708.03888).

    u = g + beta w;   rate = lr eta |w| / denominator, or lr where a norm is 0 or the group does not adapt
    outside            v = m v + u                          w -= rate v
    inside             v = m v + rate u                     w -= v
    inside_corrected   v = m lr_t/lr_(t-1) v + rate u       w -= v
    denominator        sum: |g| + beta |w| + eps   update: |u| + eps   gradient: |g| + eps
    """
    for group in groups:
        momentum = group.momentum
        if group.momentum_form == "inside_corrected":
            corrected = torch.where(group.previous_lr > 0, group.lr / group.previous_lr, 1.0)
            momentum = momentum * corrected
        for w, g, v, copy in zip(group.weights, group.gradients, group.buffers, group.copies, strict=True):
            wide = g.to(v.dtype)
            scaled = wide if group.gradient_scale is None else group.gradient_scale * wide
            _reference_of_one(group, w, scaled, v, momentum)
            if copy is not None:
                copy.copy_(w)
        if group.momentum_form == "inside_corrected":
            group.previous_lr.copy_(group.lr)


def _reference_of_one(group: LarsGroup, weight: Tensor, g: Tensor, v: Tensor, momentum: Tensor) -> None:
    w = weight.to(v.dtype)
    u = g + group.weight_decay * w
    rate = _reference_rate(group, w, g, u) if group.adapt else group.lr
    inside = group.momentum_form != "outside"
    scaled = rate * u if inside else u
    v.mul_(momentum).add_(scaled)
    direction = scaled + momentum * v if group.nesterov else v
    weight.copy_(w - (direction if inside else rate * direction))


def _reference_rate(group: LarsGroup, w: Tensor, g: Tensor, u: Tensor) -> Tensor:
    weight_norm = torch.linalg.vector_norm(w)
    other_norm = torch.linalg.vector_norm(u if group.denominator == "update" else g)
    decay = group.weight_decay if group.denominator == "sum" else 0.0
    ratio = group.trust_coefficient * weight_norm / (other_norm + decay * weight_norm + group.eps)
    if group.trust_clip:
        ratio = torch.clamp(ratio / group.lr, max=1.0)
    return group.lr * torch.where((weight_norm > 0) & (other_norm > 0), ratio, 1.0)


def _launch(groups: list[LarsGroup], types: Types, tables: LarsTables) -> None:
    table = tables.of(groups, types)
    gradients = [[_laid_out_as(w, g) for w, g in zip(group.weights, group.gradients, strict=True)] for group in groups]
    rows = _pointer_rows(groups, gradients)
    aligned = not any(address % _ALIGNMENT for address in rows)
    addresses = table.addresses(rows + _value_rows(groups, table.one))
    kernels = load("_lars_triton")
    weight_type, gradient_type, copy_type = (_triton_type(kernels.tl, dtype) for dtype in types)
    same = {"chunk": CHUNK, "block": BLOCK, "aligned": aligned, "num_warps": 8}
    same |= {"weight_type": weight_type, "gradient_type": gradient_type}
    looked_up = (addresses, table.facts, table.owners, table.options)
    with on_device(addresses):
        kernels.norms_kernel[(table.num_norm_chunks + len(groups),)](
            *looked_up, addresses[len(rows) :], table.scratch, table.partials, table.num_norm_chunks, **same
        )
        kernels.update_kernel[(table.num_chunks,)](
            *looked_up,
            table.scratch,
            table.partials,
            table.num_norm_chunks,
            norm_block=NORM_BLOCK,
            copy_type=copy_type,
            **same,
        )


def _pointer_rows(groups: list[LarsGroup], gradients: list[list[Tensor]]) -> list[int]:
    return [
        address
        for group, own in zip(groups, gradients, strict=True)
        for w, g, v, copy in zip(group.weights, own, group.buffers, group.copies, strict=True)
        for address in (w.data_ptr(), g.data_ptr(), v.data_ptr(), 0 if copy is None else copy.data_ptr())
    ]


def _value_rows(groups: list[LarsGroup], one: Tensor) -> list[int]:
    values = (
        (group.lr, group.momentum, group.weight_decay, group.previous_lr, group.gradient_scale) for group in groups
    )
    return [(one if value is None else value).data_ptr() for row in values for value in row]


def _by_types(groups: Sequence[LarsGroup]) -> dict[Types, list[LarsGroup]]:
    """The groups once for each combination of element types: kernels are compiled for one.

    Only the last launch may overwrite a previous lr, so the launches before it get one of their own.
    """
    written = next((copy.dtype for group in groups for copy in group.copies if copy is not None), torch.bfloat16)
    indices: dict[Types, list[list[int]]] = {}
    for number, group in enumerate(groups):
        for index, tensors in enumerate(zip(group.weights, group.gradients, group.buffers, group.copies, strict=True)):
            members = indices.setdefault(_types(*tensors, written), [[] for _ in groups])
            members[number].append(index)
    last = list(indices)[-1]
    return {
        types: [_part(group, chosen, types is last) for group, chosen in zip(groups, members, strict=True) if chosen]
        for types, members in indices.items()
    }


def _part(group: LarsGroup, chosen: list[int], is_last: bool) -> LarsGroup:
    if len(chosen) == len(group.weights):
        return group
    shares_lr = is_last or group.momentum_form != "inside_corrected"
    return replace(
        group,
        weights=[group.weights[i] for i in chosen],
        gradients=[group.gradients[i] for i in chosen],
        buffers=[group.buffers[i] for i in chosen],
        copies=[group.copies[i] for i in chosen],
        previous_lr=group.previous_lr if shares_lr else group.previous_lr.clone(),
    )


def _types(weight: Tensor, gradient: Tensor, buffer: Tensor, copy: Tensor | None, written: torch.dtype) -> Types:
    types = weight.dtype, gradient.dtype, written if copy is None else copy.dtype
    if buffer.dtype != torch.float32 or not {*types} <= {torch.float32, torch.float16, torch.bfloat16}:
        raise UserError(
            f"the kernel was given {types[0]} weights, {types[1]} gradients and {buffer.dtype} momentum, needed: "
            "float32, float16 or bfloat16, and float32 momentum; backend='reference' works"
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
