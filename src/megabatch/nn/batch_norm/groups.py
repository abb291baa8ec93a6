"""Groups of ranks that share a batch-norm span."""

import torch.distributed as dist

from megabatch.errors import UserError


def span_groups(
    world_size: int,
    group_size: int,
    *,
    tiles: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> list[list[int]]:
    """Ranks of each group; every rank is in exactly one group.

    Without `tiles` a group consists of consecutive ranks. With `tiles=(rows, columns)`, the ranks are laid out row by
    row on `grid=(rows, columns)` and each tile of that shape is a group, so that on a torus its members are neighbours
    on both axes (Ying et al. 2018, arXiv:1811.06992, section 2).

    Raises:
        UserError: group_size does not divide world_size, or tiles and grid do not fit them.
    """
    if group_size < 1 or world_size % group_size:
        raise UserError(
            f"{world_size} ranks do not divide into groups of group_size={group_size}; "
            f"group_size={_largest_divisor(world_size, group_size)} works"
        )
    if tiles is None:
        return [list(range(start, start + group_size)) for start in range(0, world_size, group_size)]
    return _tiled(world_size, group_size, tiles, grid)


def new_span_group(
    group_size: int, *, tiles: tuple[int, int] | None = None, grid: tuple[int, int] | None = None
) -> dist.ProcessGroup | None:
    """Process group of this rank among `span_groups`, or None for groups of one rank. All ranks must call it."""
    if group_size == 1:
        return None
    groups = span_groups(dist.get_world_size(), group_size, tiles=tiles, grid=grid)
    group: dist.ProcessGroup = dist.new_subgroups_by_enumeration(groups)[0]  # type: ignore[no-untyped-call]
    return group


def _tiled(world_size: int, group_size: int, tiles: tuple[int, int], grid: tuple[int, int] | None) -> list[list[int]]:
    rows, columns = grid if grid else (0, 0)
    height, width = tiles
    if height * width != group_size or rows * columns != world_size or rows % height or columns % width:
        raise UserError(
            f"tiles={tiles} of {group_size} ranks do not cover grid={grid} of {world_size} ranks; "
            f"tiles=(1, {group_size}), grid=({world_size // group_size}, {group_size}) works"
        )
    return [
        [(top + y) * columns + left + x for y in range(height) for x in range(width)]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, max(1, min(limit, number)) + 1) if number % d == 0)
