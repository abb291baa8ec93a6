"""The 2-D grid of ranks for the torus and hierarchical algorithms, and the process groups of its axes.

A *row* is X ranks joined by fast links, usually those of one host. A *column* is the Y ranks with the same index in
each row. The world is X * Y ranks (Mikami et al. 2018, arXiv:1811.05233, where X is the horizontal size).
"""

import contextlib
import inspect
import logging
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist

from megabatch.errors import SettingsError

Axis = Literal["row", "column", "world"]
log = logging.getLogger(__name__)


class Grid:
    """Ranks in rows and columns, as seen by one rank. Process groups are created on first use, by all ranks together.

    `rows[y][x]` is the rank at index x of row y; `why` is the reason for this shape. `group(axis, lane)` is the process
    group of this rank's row or column. Lanes are separate groups over the same ranks: collectives of one group must
    start in the same order on every rank, so collectives whose order may differ between ranks need different lanes.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        *,
        rank: int | None = None,
        timeout_s: float | None = None,
        why: str = "given",
    ) -> None:
        self.rows = tuple(tuple(row) for row in rows)
        self.why = why
        self._given_rank = rank
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._groups: dict[tuple[Axis, int], dist.ProcessGroup] = {}
        _check_rows(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(X, Y): number of ranks per row, number of ranks per column."""
        return len(self.rows[0]), len(self.rows)

    @property
    def _rank(self) -> int:
        """This process's rank; read on use, so that a grid can be made before the process group."""
        return dist.get_rank() if self._given_rank is None else self._given_rank

    @property
    def num_ranks(self) -> int:
        return self.shape[0] * self.shape[1]

    @cached_property
    def position(self) -> tuple[int, int]:
        """(x, y): this rank's index in its row and in its column."""
        for y, row in enumerate(self.rows):
            if self._rank in row:
                return row.index(self._rank), y
        raise SettingsError(f"rank {self._rank} is not in the grid of ranks {self.rows}")

    def size(self, axis: Axis) -> int:
        return {"row": self.shape[0], "column": self.shape[1], "world": self.num_ranks}[axis]

    def index(self, axis: Axis) -> int:
        """Returns this rank's index along `axis`, which is its rank in `group(axis)`."""
        return self.ranks(axis).index(self._rank)

    def ranks(self, axis: Axis) -> tuple[int, ...]:
        """Returns the global ranks of this rank's row or column, or of the world, by index."""
        x, y = self.position
        if axis == "row":
            return self.rows[y]
        if axis == "column":
            return tuple(row[x] for row in self.rows)
        return tuple(sorted(rank for row in self.rows for rank in row))

    def group(self, axis: Axis, lane: int = 0) -> dist.ProcessGroup:
        """Returns the process group along `axis`; all its ranks must create new lanes in the same order.

        Raises:
            SettingsError: the grid names ranks that the job does not have.
        """
        if (highest := max(self.ranks("world"))) >= dist.get_world_size():
            raise SettingsError(
                f"the grid holds rank {highest}, and the job has {dist.get_world_size()} ranks; "
                "make_grid() after it fits"
            )
        if (axis, lane) not in self._groups:
            self._groups[axis, lane] = self._make_group(axis)
        return self._groups[axis, lane]

    def _make_group(self, axis: Axis) -> dist.ProcessGroup:
        if axis == "world" and self.num_ranks == dist.get_world_size():
            return _default_group()
        # Only the group's own ranks take part in its creation, so that rows and columns are created concurrently.
        ranks = list(self.ranks(axis))
        options: dict[str, Any] = {"timeout": self._timeout or _world_timeout(), "use_local_synchronization": True}
        if ranks != sorted(ranks):  # otherwise the shards would be in the order of ranks, not of indices
            options["sort_ranks"] = _unsorted_or_raise(ranks)
        group = dist.new_group(ranks, **options)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def __repr__(self) -> str:
        x, y = self.shape
        return f"Grid({x} x {y}, {self.why})"


def make_grid(
    world_size: int | None = None,
    *,
    shape: tuple[int, int] | None = None,
    local_world_size: int | None = None,
    hosts: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> Grid:
    """Returns the grid of this job: its rows are hosts if they are known, else the grid is near-square.

    The first of these that applies decides, and `Grid.why` names it:

        shape              (X, Y): X ranks per row, Y ranks per column
        hosts              ranks of one host form a row, or several rows if hosts differ in their number of ranks
        local_world_size   each run of that many consecutive ranks is a host
        near-square        X is the largest divisor of `world_size` up to its square root, which gives the fewest
                           hops, 2 (X - 1) + 2 (Y - 1); also used for one host and for one rank per host

    A prime number of ranks becomes one column. With both `shape` and `hosts`, rows of X ranks are cut from the ranks
    ordered by host. Rows and columns as in Mikami et al. 2018, arXiv:1811.05233. Creates no process group yet.

    Args:
        world_size: number of ranks; None takes that of `torch.distributed`'s default group or, before it is made, of
            `shape` or the launcher's WORLD_SIZE.
        shape: ranks per row and ranks per column; their product must be `world_size`.
        local_world_size: ranks per host, as torchrun's LOCAL_WORLD_SIZE.
        hosts: host name of every rank, in rank order.
        timeout_s: timeout of the grid's process groups, in seconds; None takes the default group's.

    Raises:
        SettingsError: `shape`, `hosts` or `local_world_size` do not fit the number of ranks.
    """
    world_size = _world_size(shape) if world_size is None else world_size
    rows, why = choose_rows(world_size, shape=shape, local_world_size=local_world_size, hosts=hosts)
    grid = Grid(rows, timeout_s=timeout_s, why=why)
    log.info("%r", grid)
    return grid


def _world_size(shape: tuple[int, int] | None) -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    known = math.prod(shape) if shape else os.environ.get("WORLD_SIZE")
    if known is None:
        raise SettingsError(
            "make_grid() was given no number of ranks and there is no process group; shape=(2, 2) or world_size=4 works"
        )
    return int(known)


def choose_rows(
    world_size: int,
    *,
    shape: tuple[int, int] | None = None,
    local_world_size: int | None = None,
    hosts: Sequence[str] | None = None,
) -> tuple[list[list[int]], str]:
    """Returns the rows of `make_grid` and the reason for them; needs no process group."""
    by_host = _ranks_by_host(world_size, local_world_size, hosts)
    order = [rank for ranks in by_host for rank in ranks]
    if shape is not None:
        return _cut(order, _checked_shape(world_size, shape)), "shape given"
    # One host, or hosts without a common divisor, say nothing about the rows: then the grid is near-square.
    row = math.gcd(*(len(ranks) for ranks in by_host))
    if 1 < row < world_size:
        even = all(len(ranks) == row for ranks in by_host)
        why = "rows are hosts" if even else f"hosts differ in size: rows of their common divisor {row}"
        return _cut(order, row), why
    side = max(x for x in range(1, math.isqrt(world_size) + 1) if world_size % x == 0)
    why = "near-square" if side > 1 else f"{world_size} ranks do not form rows: one column"
    return _cut(order, side), why


def _ranks_by_host(world_size: int, local_world_size: int | None, hosts: Sequence[str] | None) -> list[list[int]]:
    if hosts is not None:
        if len(hosts) != world_size:
            raise SettingsError(
                f"{len(hosts)} host names for {world_size} ranks; needed one name per rank, in rank order"
            )
        return [[rank for rank, name in enumerate(hosts) if name == host] for host in dict.fromkeys(hosts)]
    local = local_world_size or world_size
    if world_size % local:
        raise SettingsError(
            f"{world_size} ranks are not a whole number of hosts with {local} ranks each; "
            f"give the host of every rank, or a shape such as (1, {world_size})"
        )
    return _cut(list(range(world_size)), local)


def _checked_shape(world_size: int, shape: tuple[int, int]) -> int:
    x, y = shape
    if x < 1 or y < 1 or x * y != world_size:
        side = max(d for d in range(1, math.isqrt(world_size) + 1) if world_size % d == 0)
        raise SettingsError(
            f"a grid of {x} x {y} does not hold {world_size} ranks; for example ({side}, {world_size // side}) does"
        )
    return x


def _cut(ranks: list[int], size: int) -> list[list[int]]:
    return [ranks[start : start + size] for start in range(0, len(ranks), size)]


def _check_rows(rows: tuple[tuple[int, ...], ...]) -> None:
    ranks = [rank for row in rows for rank in row]
    if not ranks or len({len(row) for row in rows}) != 1 or len(set(ranks)) != len(ranks):
        raise SettingsError(
            f"rows must be equally long and hold every rank once, got {rows}; for example ((0, 1), (2, 3))"
        )


def _unsorted_or_raise(ranks: list[int]) -> bool:
    """Returns False, the value of `new_group`'s `sort_ranks`; raises SettingsError if torch has no such option."""
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise SettingsError(
            f"torch {torch.__version__} cannot create a group with ranks in the order {ranks} (2.13 can); "
            "number the ranks in block or round-robin order, for example 0 1 on the first host and 2 3 on the second"
        )
    return False


def _world_timeout() -> timedelta | None:
    """Returns the default group's timeout, or None. Without one, `new_group` uses torch's default of 30 minutes."""
    with contextlib.suppress(AttributeError, RuntimeError):
        # torch has no public way to read the timeout of a group.
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        timeout = _default_group()._get_backend(device).options._timeout
        return timeout if isinstance(timeout, timedelta) else None
    return None


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
