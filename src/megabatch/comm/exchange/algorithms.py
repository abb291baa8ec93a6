"""All-reduce algorithms on a grid of ranks, as routes of stages.

    flat          the backend's own all-reduce over all ranks
    hierarchical  reduce in the row, all-reduce among the leaders of the rows, broadcast in the row
    torus         reduce-scatter in the row, all-reduce of the shard in the column, all-gather in the row
                  (Mikami et al. 2018, arXiv:1811.05233; the same three steps in Horovod's torus)
    split_torus   half of the buffer as torus, the other half with rows and columns exchanged, both at once
                  (Ying et al. 2018, arXiv:1811.06992)

For M bytes on X ranks per row and Y per column, a rank sends 2 M (XY - 1) / XY bytes in the torus, as in a ring, but
only 2 (Y - 1) / Y * M / X of them in its column. The torus takes 2 (X - 1) + 2 (Y - 1) hops on NCCL and 4 on gloo; a
ring takes 2 (XY - 1).
"""

from megabatch.comm.exchange import primitives
from megabatch.comm.exchange.grid import Axis, Grid
from megabatch.comm.exchange.stages import (
    AllGather,
    AllReduce,
    Broadcast,
    LeadersAllReduce,
    Reduce,
    ReduceScatter,
    Stage,
)
from megabatch.errors import SettingsError

ALGORITHMS = ("flat", "hierarchical", "torus", "split_torus")
Route = tuple[Stage, ...]


def routes(algorithm: str, grid: Grid) -> tuple[Route, ...]:
    """Returns the routes of `algorithm`, one per equal part of the buffer. Creates their process groups.

    Stages along an axis with one rank are left out. All ranks of the grid must call it in the same order, because
    creating a process group is a collective operation.

    Raises SettingsError if `algorithm` is unknown.
    """
    if algorithm not in ALGORITHMS:
        raise SettingsError(
            f"all-reduce {algorithm!r} is unknown, needed one of {', '.join(ALGORITHMS)}; for example 'torus'"
        )
    made = _ROUTES[algorithm](grid)
    kept = tuple(tuple(stage for stage in route if grid.size(stage.axis) > 1) for route in made)
    for route in kept:
        for stage in route:
            _ = stage.group  # created here: the stages' threads would create groups in an order that differs by rank
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
    # On gloo the all-reduce of the second axis is a direct reduce-scatter and all-gather: fewer hops, sums in fp32.
    inner: Route = (AllReduce(second, lane, grid),)
    if grid.size(second) > 1 and not primitives.is_native(grid.group(second, lane)):
        inner = (ReduceScatter(second, lane, grid), AllGather(second, lane + 1, grid))
    return (ReduceScatter(first, lane, grid), *inner, AllGather(first, lane + 1, grid))


_ROUTES = {"flat": _flat, "hierarchical": _hierarchical, "torus": _torus, "split_torus": _split_torus}


def padded_numel(numel: int, algorithm: str, grid: Grid) -> int:
    """Returns `numel` rounded up to a length that every reduce-scatter of `algorithm` divides evenly."""
    multiple = {"torus": grid.num_ranks, "split_torus": 2 * grid.num_ranks}.get(algorithm, 1)
    return -(-numel // multiple) * multiple


def sent_bytes(route: Route, region_bytes: float) -> float:
    """Returns the bytes that this rank sends for one region of that size, by the stages' formulas."""
    total = 0.0
    for stage in route:
        total += stage.sent_bytes(region_bytes)
        region_bytes = stage.next_bytes(region_bytes)
    return total
