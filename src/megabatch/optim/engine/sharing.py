"""Work on matrices, divided among workers: units of equal shape, shares of similar cost, results broadcast.

Units depend on the shapes alone, so a matrix is computed in the same batched product on any number of workers, with the
same bits on equal devices with equal numbers of threads. Only the owner of a unit differs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, int]

MOST_UNITS = 64
"""A unit holds one matrix, or several that take at most 1/64 of all flops together, so that shares can be balanced."""


PART_ELEMENTS = 2**20
"""Smaller results wait for the next ones, since a broadcast of less than some MB takes as long as one of that size."""


@dataclass(frozen=True)
class Block:
    """A part of a tensor (out, in, k, k), taken as a matrix out x (in k k)."""

    tensor: int  # position in the list of tensors
    number: int  # among the tensor's blocks
    rows: slice
    columns: slice
    transposed: bool

    @property
    def shape(self) -> Shape:
        """Rows and columns of the matrix that is computed."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return (columns, rows) if self.transposed else (rows, columns)

    def of(self, tensor: Tensor) -> Tensor:
        """The block of `tensor`, as a matrix of `shape`; a view where the memory layout allows it."""
        matrix = tensor.reshape(len(tensor), -1)[self.rows, self.columns]
        return matrix.mT if self.transposed else matrix


@dataclass(frozen=True)
class Unit:
    """Matrices of one shape that one worker computes in one batched product."""

    members: tuple[int, ...]  # positions in the list of blocks
    shape: Shape
    flops: float

    @property
    def num_elements(self) -> int:
        """Elements of all members."""
        return len(self.members) * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Plan:
    """Blocks of a list of tensors, and the units of each worker."""

    blocks: tuple[Block, ...]
    shares: tuple[tuple[Unit, ...], ...]

    def without(self, missing: set[int]) -> "Plan":
        """The plan with the same owners, without the blocks of the tensors at these positions."""
        if not missing:
            return self

        def left(unit: Unit) -> Unit:
            return replace(unit, members=tuple(m for m in unit.members if self.blocks[m].tensor not in missing))

        shares = ([left(unit) for unit in share] for share in self.shares)
        return replace(self, shares=tuple(tuple(unit for unit in share if unit.members) for share in shares))


@functools.lru_cache(maxsize=64)
def make_plan(
    shapes: tuple[tuple[int, ...], ...],
    flops: Callable[[Shape], float],
    num_workers: int,
    *,
    block_size: int | None = None,
    short_side_first: bool = False,
) -> Plan:
    """Divides tensors of these shapes among workers.

    Args:
        flops: cost of one matrix; hashable.
        block_size: most rows and columns of a block; None: a tensor is one block.
        short_side_first: transpose blocks with more rows than columns.
    """
    blocks: list[Block] = []
    for tensor, shape in enumerate(shapes):
        rows, columns = (_cuts(side, block_size or side) for side in (shape[0], torch.Size(shape[1:]).numel()))
        for number, (down, across) in enumerate(itertools.product(rows, columns)):
            tall = down.stop - down.start > across.stop - across.start
            blocks.append(Block(tensor, number, down, across, transposed=short_side_first and tall))
    units = make_units([block.shape for block in blocks], flops)
    return Plan(tuple(blocks), tuple(map(tuple, divide(units, num_workers))))


def _cuts(side: int, most: int) -> list[slice]:
    """Slices of nearly equal length, at most `most`, that cover `side`."""
    parts = -(-side // most)
    ends = [side * part // parts for part in range(parts + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(ends)]


def make_units(shapes: Sequence[Shape], flops: Callable[[Shape], float]) -> list[Unit]:
    """Units of equal shapes; a function of the shapes, independent of the number of workers."""
    of_shape: dict[Shape, list[int]] = {}
    for position, shape in enumerate(shapes):
        of_shape.setdefault(shape, []).append(position)
    limit = sum(map(flops, shapes)) / MOST_UNITS
    units = []
    for shape, members in of_shape.items():
        size = max(1, int(limit / flops(shape)))
        parts = [tuple(members[first : first + size]) for first in range(0, len(members), size)]
        units += [Unit(part, shape, flops(shape) * len(part)) for part in parts]
    return units


def divide(units: Sequence[Unit], num_workers: int) -> list[list[Unit]]:
    """Shares of similar cost: the most expensive unit first, each to the worker that has least to do (Graham 1969)."""
    shares: list[list[Unit]] = [[] for _ in range(num_workers)]
    costs = [0.0] * num_workers
    for unit in sorted(units, key=lambda unit: -unit.flops):
        owner = costs.index(min(costs))
        shares[owner].append(unit)
        costs[owner] += unit.flops
    return shares


def compute_shares(
    plan: Plan,
    compute: Callable[[Unit], Tensor],
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int, Tensor]:
    """Results of all blocks, by position: this worker computes its own units and receives the others.

    `compute` returns (members, rows, columns), in `dtype` on `device`. A part of a share is broadcast while the next
    one is computed; nothing is sent twice or padded. All workers of `group` must call this; None: there is one worker.
    """
    if group is None:
        return {m: r for unit in plan.shares[0] for m, r in zip(unit.members, compute(unit), strict=True)}
    rank = dist.get_rank(group)
    started = []
    for parts in itertools.zip_longest(*map(_parts, plan.shares), fillvalue=()):
        own = [compute(unit).flatten() for unit in parts[rank]]
        for owner, units in enumerate(parts):
            if units:
                sizes = [unit.num_elements for unit in units]
                buffer = torch.cat(own) if owner == rank else torch.empty(sum(sizes), dtype=dtype, device=device)
                # as bytes, since a backend may lack a 16-bit type
                work = dist.broadcast(buffer.view(torch.uint8), group=group, group_src=owner, async_op=True)
                started.append((units, torch.split(buffer, sizes), work))
    results: dict[int, Tensor] = {}
    for units, values, work in started:
        work.wait()
        for unit, value in zip(units, values, strict=True):
            results.update(zip(unit.members, value.view(-1, *unit.shape), strict=True))
    return results


def _parts(share: Sequence[Unit]) -> list[list[Unit]]:
    """Consecutive units that are broadcast together: at least `PART_ELEMENTS` elements, but for the last part."""
    parts: list[list[Unit]] = [[]]
    for unit in share:
        if sum(other.num_elements for other in parts[-1]) >= PART_ELEMENTS:
            parts.append([])
        parts[-1].append(unit)
    return parts
