"""Groups of workers that share a batch-norm span, as tiles of the 2-D grid of workers (`Runtime.bn_tile_rows`)."""

from dataclasses import dataclass

import torch.distributed as dist

from megabatch.comm.exchange.grid import choose_rows
from megabatch.comm.launch import World, all_gather_objects
from megabatch.comm.peers import host_name
from megabatch.errors import SettingsError, UserError
from megabatch.nn.batch_norm.groups import new_span_group, span_groups
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime


@dataclass(frozen=True)
class SpanTiles:
    """Span groups of `size` ranks each; `tile` and `grid` are (rows, columns), None for consecutive ranks."""

    size: int
    tile: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None

    def new_group(self) -> dist.ProcessGroup | None:
        """This rank's group, or None for groups of one rank. All ranks must call it."""
        return new_span_group(self.size, tiles=self.tile, grid=self.grid)

    def stream_rank(self, world: World) -> int:
        """Place of this rank in the order in which samples are dealt.

        Ranks of a group are neighbours in it, so that a span holds the same consecutive samples under any tiling.
        """
        groups = span_groups(world.world_size, self.size, tiles=self.tile, grid=self.grid)
        return [rank for group in groups for rank in group].index(world.rank)

    def __str__(self) -> str:
        """For the log; empty for consecutive ranks."""
        if self.tile is None or self.grid is None:
            return ""
        (height, width), (rows, columns) = self.tile, self.grid
        return f"batch-norm spans shared by tiles of {height} x {width} in the {rows} x {columns} grid of workers"


def span_tiles(recipe: Recipe, runtime: Runtime, *, world: World, micro_batch_size: int) -> SpanTiles:
    """Span groups of this run: tiles of `bn_tile_rows` rows, or consecutive ranks. All ranks must call it.

    The grid is that of the gradient exchange (`comm.exchange.grid.choose_rows`): a row is a host, or the grid of one
    host is near-square. Tiles are those of Ying et al. 2018, arXiv:1811.06992, section 2.

    Raises:
        SettingsError: tiles of `bn_tile_rows` rows do not cover the grid.
    """
    size = max(1, recipe.bn_span // micro_batch_size)
    if runtime.bn_tile_rows == 1 or world.world_size == 1:
        return SpanTiles(size)
    rows, _ = choose_rows(world.world_size, hosts=all_gather_objects(host_name(), world))
    grid, height = (len(rows), len(rows[0])), runtime.bn_tile_rows
    tiles = SpanTiles(size, (height, size // height), grid)
    try:
        tiles.stream_rank(world)
    except UserError:
        raise SettingsError(
            f"--bn-tile-rows {height}: groups of {size} workers (bn_span={recipe.bn_span} with micro-batches of "
            f"{micro_batch_size}) do not form tiles of {height} rows in a grid of {grid[0]} x {grid[1]} workers; "
            "--bn-tile-rows 1 works"
        ) from None
    return tiles
