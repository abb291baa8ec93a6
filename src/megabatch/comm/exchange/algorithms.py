"""All-reduce algorithms on a grid of ranks, as routes of stages, and as a function.

    flat          the backend's own all-reduce over all ranks
    hierarchical  reduce in the row, all-reduce among the leaders of the rows, broadcast in the row
    torus         reduce-scatter in the row, all-reduce of the shard in the column, all-gather in the row
                  (Mikami et al. 2018, arXiv:1811.05233; the same three steps in Horovod's torus)
    split_torus   half of the buffer as torus, the other half with rows and columns exchanged, both at once
                  (Ying et al. 2018, arXiv:1811.06992)

For M bytes on X ranks per row and Y per column, the torus sends 2 M (XY - 1) / XY per rank, as a ring does, but
only 2 (Y - 1) / Y * M / X of it in the column, in 2 (X - 1) + 2 (Y - 1) hops on NCCL and 4 on gloo, not 2 (XY - 1).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from megabatch.comm.exchange import primitives
from megabatch.comm.exchange.grid import Axis, Grid
from megabatch.comm.exchange.stages import (
    AllGather,
    AllReduce,
    Broadcast,
    Job,
    LeadersAllReduce,
    Reduce,
    ReduceScatter,
    Scratch,
    Stage,
)
from megabatch.comm.exchange.wire import pack, unpack, wire_dtype
from megabatch.errors import SettingsError

Algorithm = Literal["flat", "hierarchical", "torus", "split_torus"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
Route = tuple[Stage, ...]


def routes(algorithm: str, grid: Grid) -> tuple[Route, ...]:
    """The routes of `algorithm`, one per equal part of the buffer; makes their process groups.

    Must be called by all ranks of the grid in the same order, as it may make process groups.
    """
    if algorithm not in ALGORITHMS:
        raise SettingsError(
            f"all-reduce {algorithm!r} is unknown, needed one of {', '.join(ALGORITHMS)}; for example 'torus'"
        )
    made = _ROUTES[algorithm](grid)
    kept = tuple(tuple(stage for stage in route if grid.size(stage.axis) > 1) for route in made)
    for route in kept:
        for stage in route:
            _ = stage.group  # made here, in one order, and not by the stages' threads
    return kept


def _flat(grid: Grid) -> tuple[Route, ...]:
    return ((AllReduce("world", 0, grid),),)


def _hierarchical(grid: Grid) -> tuple[Route, ...]:
    return ((Reduce("row", 0, grid), LeadersAllReduce("column", 0, grid), Broadcast("row", 1, grid)),)


def _torus(grid: Grid) -> tuple[Route, ...]:
    return (_through("row", "column", 0, grid),)


def _split_torus(grid: Grid) -> tuple[Route, ...]:
    return (_through("row", "column", 0, grid), _through("column", "row", 2, grid))


def _through(first: Axis, second: Axis, lane: int, grid: Grid) -> Route:
    inner: Route = (AllReduce(second, lane, grid),)
    if grid.size(second) > 1 and not primitives.is_native(grid.group(second, lane)):
        inner = (ReduceScatter(second, lane, grid), AllGather(second, lane + 1, grid))
    return (ReduceScatter(first, lane, grid), *inner, AllGather(first, lane + 1, grid))


_ROUTES = {"flat": _flat, "hierarchical": _hierarchical, "torus": _torus, "split_torus": _split_torus}


def padded_numel(numel: int, algorithm: str, grid: Grid) -> int:
    """`numel` rounded up so that every reduce-scatter of `algorithm` divides evenly."""
    multiple = {"torus": grid.num_ranks, "split_torus": 2 * grid.num_ranks}.get(algorithm, 1)
    return -(-numel // multiple) * multiple


def sent_bytes(route: Route, region_bytes: float) -> float:
    """Bytes that this rank hands to the network for one region of that size, by the stages' formulas."""
    total = 0.0
    for stage in route:
        total += stage.sent_bytes(region_bytes)
        region_bytes = stage.next_bytes(region_bytes)
    return total


def all_reduce(
    tensor: Tensor,
    algorithm: str,
    grid: Grid,
    *,
    wire: str | None = None,
    average: bool = False,
    chunk_mib: float = 8.0,
) -> Tensor:
    """Sum `tensor` over the grid's ranks, in place; all ranks end bitwise equal. Returns `tensor`.

    The tensor is cut into chunks of about `chunk_mib` that follow each other through the stages, so that the links of
    rows and columns work at the same time. `wire` is the type sent ("fp32", "fp16", "bf16"; None: the tensor's own).
    With `average` each rank's value is divided by N before it is sent. All ranks must call it in the same order, with
    the same arguments, and not while gradients of the same grid are under way.
    """
    if grid.num_ranks == 1:
        return tensor
    flat = tensor.view(-1)
    dtype = tensor.dtype if wire is None else wire_dtype(wire)
    size = max(int(chunk_mib * 2**20) // dtype.itemsize, 1)
    made = routes(algorithm, grid)
    chunks = [flat[start : start + size] for start in range(0, flat.numel(), size)]
    packed = [torch.empty(padded_numel(len(c), algorithm, grid), dtype=dtype, device=flat.device) for c in chunks]
    for source, target in zip(chunks, packed, strict=True):
        pack(source, target, share=1 / grid.num_ranks if average else 1.0)
    run_wavefront([(route, _jobs(packed, part, len(made))) for part, route in enumerate(made)])
    for source, target in zip(packed, chunks, strict=True):
        unpack(source, target)
    return tensor


def run_wavefront(work: list[tuple[Route, list[Job]]]) -> None:
    """Take all jobs through all stages in this thread: while job i is in stage s, job i + 1 is in stage s - 1."""
    num_ticks = max(len(route) + len(jobs) for route, jobs in work)
    num_slots = max(len(route) for route, _ in work)
    for tick in range(num_ticks):
        for slot in reversed(range(-1, num_slots)):
            for route, jobs in work:
                if 0 <= tick - slot - 1 < len(jobs) and slot < len(route):
                    _advance(route, jobs[tick - slot - 1], slot)


def _advance(route: Route, job: Job, slot: int) -> None:
    if slot >= 0:
        route[slot].complete(job)
    if slot + 1 < len(route):
        route[slot + 1].start(job)


def _jobs(packed: list[Tensor], part: int, num_parts: int) -> list[Job]:
    return [Job(buffer.chunk(num_parts)[part], fresh_scratch(), number) for number, buffer in enumerate(packed)]


def fresh_scratch() -> Scratch:
    """Scratch memory that lives as long as its job."""
    kept: dict[int, Tensor] = {}
    return lambda slot, like: kept.setdefault(slot, torch.empty_like(like))
