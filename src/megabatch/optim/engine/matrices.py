"""Base class of the optimizers that transform matrices, with the matrices divided among workers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.errors import UserError
from megabatch.optim.engine.base import Group
from megabatch.optim.engine.checks import check_number
from megabatch.optim.engine.multi_tensor import Number, TensorLists, lists_of_one_dtype, wide_dtype
from megabatch.optim.engine.shards import placement, refuse_flattened
from megabatch.optim.engine.sharing import Block, Plan, Unit, compute_shares, make_plan
from megabatch.optim.momentum import MomentumOptimizer


@dataclass(frozen=True)
class MatrixCost:
    """Cost of the matrices' transformation in one step, from their shapes. Elementwise work is not counted."""

    flops: float
    """Of the worker with the largest share; a multiply-add counts as two."""
    total_flops: float
    """Of all workers."""
    bytes_received: int
    """By the worker that receives most; each result is broadcast to all workers by its owner."""


class MatrixOptimizer(MomentumOptimizer):
    """Optimizer that transforms the matrices of groups with `adapt`; other groups step by momentum SGD.

    A tensor (out, in, k, k) is the matrix out x (in k k); a grouped convolution is one matrix, too. Each worker of
    `process_group` transforms its share of the matrices and receives the others' results; momentum and update are
    computed everywhere, so all workers hold the same weights. Steps run in multi-tensor operations.
    """

    process_group: dist.ProcessGroup | None = None
    short_side_first = False

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        copies: Mapping[Tensor, Tensor] | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.process_group = process_group
        common = {"adapt": True, "foreach": None, "fused": False, "previous_lr": 0.0}
        super().__init__(params, defaults | common, copies)

    def inputs(self, group: Group, tensors: TensorLists) -> list[Tensor]:
        """Tensors to transform, from gradients and state; updates the state that all workers keep."""
        raise NotImplementedError

    def transform(self, group: Group, matrices: Tensor, homes: list[tuple[Tensor, int]]) -> Tensor:
        """Transforms matrices (b, m, n) of one shape; returns them in `result_dtype`.

        `homes` are the parameter that each is a block of, and the block's number in it.
        """
        raise NotImplementedError

    def move(self, group: Group, tensors: TensorLists, results: list[Tensor]) -> None:
        """Updates `tensors.weights` in place from the transformed tensors."""
        raise NotImplementedError

    def flops(self, group: Group) -> Any:
        """Hashable function of a matrix's shape: flops of its transformation in one step."""
        raise NotImplementedError

    def block_size(self, group: Group) -> int | None:
        """Most rows and columns of a block; None: a tensor is one block."""
        del group
        return None

    def result_dtype(self, group: Group, dtype: torch.dtype) -> torch.dtype:
        """Dtype of transformed matrices of parameters in `dtype`."""
        del group
        return wide_dtype(dtype)

    def check(self, group: Group) -> None:
        """Raises UserError for invalid values and for a vector or a sharded tensor among the matrices."""
        super().check(group)
        refuse_flattened(group["params"])
        check_number(group, "sgd_lr_factor", low=0.0, example=1.0)
        if group["fused"] or group["foreach"] is False:
            raise UserError(
                f"fused={group['fused']}, foreach={group['foreach']} were given to {type(self).__name__}, which has "
                "multi-tensor operations only; fused=False with foreach=None works"
            )
        for parameter in group["params"] if group["adapt"] else ():
            if parameter.ndim < 2:
                raise UserError(
                    f"a parameter of shape {tuple(parameter.shape)} was given in a group with adapt=True, needed: two "
                    "or more dimensions; param_groups(model, weight_decay=1e-4) puts vectors in a group with "
                    "adapt=False"
                )
            if placement(parameter) is not None:
                raise UserError(
                    f"a sharded parameter of shape {tuple(parameter.shape)} was given in a group with adapt=True, "
                    "needed: whole matrices on every worker; adapt=False works, and so does process_group=... with a "
                    "replicated model, which divides the work on the matrices among the workers"
                )

    def rates(self, group: Group, tensors: TensorLists) -> Number | Tensor:
        """The rate of a group that steps by SGD."""
        del tensors
        rate: Number = group["lr"] if group["adapt"] else group["lr"] * group["sgd_lr_factor"]
        return rate

    def cost(self, num_workers: int = 1) -> MatrixCost:
        """Counts flops and bytes of a step on `num_workers` workers, from shapes alone."""
        flops, received = [0.0] * num_workers, [0] * num_workers
        for group, members in self._matrices():
            plan = self._plan(group, members, num_workers)
            size = self.result_dtype(group, members[0].dtype).itemsize
            for rank, share in enumerate(plan.shares):
                flops[rank] += sum(unit.flops for unit in share)
                received[rank] += size * sum(unit.num_elements for s in plan.shares if s is not share for unit in s)
        return MatrixCost(flops=max(flops), total_flops=sum(flops), bytes_received=max(received))

    def _matrices(self) -> list[tuple[Group, list[Tensor]]]:
        """Parameters of one dtype and device, with their group; all workers list them in the same order."""
        groups = [group for group in self.param_groups if group["adapt"]]
        return [(group, members) for group in groups for members in lists_of_one_dtype(group["params"])]

    def _num_workers(self) -> int:
        return dist.get_world_size(self.process_group) if self.process_group is not None else 1

    def _plan(self, group: Group, members: list[Tensor], num_workers: int) -> Plan:
        return make_plan(
            tuple(p.shape for p in members),
            self.flops(group),
            num_workers,
            block_size=self.block_size(group),
            short_side_first=self.short_side_first,
        )

    def _step_in_lists(self, group: Group, parameters: list[Tensor]) -> None:
        if not group["adapt"]:
            super()._step_in_lists(group, parameters)
            return
        for members in lists_of_one_dtype(group["params"]):
            if any(p.grad is not None for p in members):
                self._step_matrices(group, members)
        self.finish(group)

    def _step_matrices(self, group: Group, members: list[Tensor]) -> None:
        positions = [position for position, p in enumerate(members) if p.grad is not None]
        parameters = [members[position] for position in positions]
        wide = wide_dtype(parameters[0].dtype)
        weights = [p.to(wide) for p in parameters]  # the parameters themselves if they are wide
        states = [self._state_of(p) for p in parameters]
        gradients = [p.grad.to(wide) for p in parameters if p.grad is not None]
        tensors = TensorLists(weights, gradients, {name: [s[name] for s in states] for name in self.state_names})
        inputs = dict(zip(positions, self.inputs(group, tensors), strict=True))
        results = self._transformed(group, members, inputs)
        self.move(group, tensors, [results[position].to(wide) for position in positions])
        if weights[0] is not parameters[0]:
            torch._foreach_copy_(parameters, weights)
        self._write_copies(parameters)

    def _transformed(self, group: Group, members: list[Tensor], inputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """The transformed inputs, by position and in the parameters' shapes."""
        plan = self._plan(group, members, self._num_workers())
        plan = plan.without(set(range(len(members))) - set(inputs))

        def compute(unit: Unit) -> Tensor:
            blocks = [plan.blocks[m] for m in unit.members]
            matrices = torch.stack([block.of(inputs[block.tensor]) for block in blocks])
            return self.transform(group, matrices, [(members[block.tensor], block.number) for block in blocks])

        example = members[0]
        dtype = self.result_dtype(group, example.dtype)
        found = compute_shares(plan, compute, self.process_group, dtype=dtype, device=example.device)
        parts: dict[int, list[tuple[Block, Tensor]]] = {}
        for position, matrix in found.items():
            block = plan.blocks[position]
            parts.setdefault(block.tensor, []).append((block, matrix))
        return {tensor: _joined(own, inputs[tensor]) for tensor, own in parts.items()}


def _joined(parts: list[tuple[Block, Tensor]], like: Tensor) -> Tensor:
    """The tensor, of the shape of `like`, that has these blocks."""
    matrices = [(block, matrix.mT if block.transposed else matrix) for block, matrix in parts]
    if len(parts) == 1:
        return matrices[0][1].reshape(like.shape)
    whole = matrices[0][1].new_empty(len(like), like[0].numel())
    for block, matrix in matrices:
        whole[block.rows, block.columns] = matrix
    return whole.view(like.shape)
