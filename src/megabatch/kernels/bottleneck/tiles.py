"""Tiling of the matrix products of 1x1 convolutions, and the arguments that their kernels need for it."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.bottleneck.handover import DeferredNormBackward
from megabatch.kernels.dispatch import load
from megabatch.kernels.layout import rows_of
from megabatch.kernels.norm.passes import Normalisation

_LARGE_TILE = 2**14
"""Values in a tile of dy from which on a tile of y beside it fits into shared memory with one stage fewer only."""


class Tiling(NamedTuple):
    """Tile sizes of y = h weight^T in rows, output and input channels, and Triton's warps and pipeline stages.

    Which tiling is fastest depends on shape and GPU, and is measured.
    """

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    def name(self) -> str:
        """Key of this tiling in the tuning table."""
        return "x".join(map(str, self))

    def with_deferred(self) -> "Tiling":
        """Tiling of a weight gradient that reads y beside dy: one stage fewer where shared memory requires it."""
        return self._replace(num_stages=self.num_stages - (self.rows * self.outputs >= _LARGE_TILE))


class RowCut(NamedTuple):
    """Rows and spans of a batch of images, in the order of the kernels' arguments; no tile has rows of two spans."""

    num_rows: int
    span_rows: int
    tiles_per_span: int
    num_row_tiles: int

    def spans(self) -> int:
        """Number of spans."""
        return self.num_row_tiles // self.tiles_per_span


def row_cut(x: Tensor, span: int, tiling: Tiling) -> RowCut:
    """Cuts the N H W rows of these images (N, C, H, W) into spans of `span` samples and those into tiles."""
    count, _, height, width = x.shape
    # A span larger than the batch is the batch; the last span may be shorter, but has as many tiles as the others.
    span_rows = min(span, count) * height * width
    tiles_per_span = -(-span_rows // tiling.rows)
    return RowCut(count * height * width, span_rows, tiles_per_span, tiles_per_span * -(-count // span))


def by_width(tilings: tuple[Tiling, ...], channels: int, *, which: str) -> Tiling:
    """The narrowest tiling that covers all channels, so that no row is normalised twice; else the widest."""
    widths = [getattr(tiling, which) for tiling in tilings]
    covering = [width for width in widths if width >= channels]
    return tilings[widths.index(min(covering) if covering else max(widths))]


class PartCut(NamedTuple):
    """Spans, and parts of them, in the order of the kernels' arguments; one program walks down one part.

    `parts` is their number in a whole span. A part of rows_per_part rows is a whole number of tiles.
    """

    num_rows: int
    span_rows: int
    rows_per_part: int
    parts: int


def part_cut(x: Tensor, span: int, tiling: Tiling, blocks_across: int) -> PartCut:
    """Cuts spans of these images into parts, with `blocks_across` programs side by side on the rows of each part.

    Each program adds up sums over all its tiles, so that few partial sums are left to add: 264 a channel on an H200,
    where one per tile would be 25,088 at batch 1,024 and 56 px.
    """
    cut = row_cut(x, span, tiling)
    tiles = _tiles_per_part(cut.tiles_per_span, cut.spans() * blocks_across, _resident_programs(x))
    return PartCut(cut.num_rows, cut.span_rows, tiles * tiling.rows, -(-cut.tiles_per_span // tiles))


@functools.cache
def _tiles_per_part(tiles: int, side_by_side: int, resident: int) -> int:
    """Tiles of a part with which the longest of `resident` queues is shortest; of equals, the most.

    There are `tiles` in a span, and `side_by_side` programs per part of it.
    """

    def longest_queue(parts: int) -> tuple[int, int]:
        return -(-parts * side_by_side // resident) * -(-tiles // parts), parts

    return -(-tiles // min(range(1, min(tiles, resident) + 1), key=longest_queue))


def _resident_programs(x: Tensor) -> int:
    """Two per multiprocessor; on a CPU (Triton's interpreter) two, so that programs loop."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def options(rows: Tensor, matrix: Tensor, tiling: Tiling) -> dict[str, Any]:
    """Keyword arguments that all three kernels share: sizes of matrices and tiles, precision, launch options."""
    return {
        "inputs": rows.shape[1],
        "outputs": matrix.shape[0],
        "block_rows": tiling.rows,
        "block_outputs": tiling.outputs,
        "block_inputs": tiling.inputs,
        # Triton multiplies float32 in tf32 by default; 16-bit products ignore this.
        "precision": "ieee" if rows.dtype == torch.float32 else "tf32",
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


def descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> Any:
    """Tensor descriptor for the GPU's copy engine (TMA), which reads blocks of the matrix and zeros outside it."""
    descriptors = load("kernels.bottleneck._conv1x1_triton").TensorDescriptor
    return descriptors.from_tensor(matrix, [block_rows, block_columns])


def channel_arguments(normalisation: Normalisation | None, unused: Tensor) -> tuple[Tensor, ...]:
    """Pointers to mean, rstd, weight and bias of a batch norm; without one, `unused` four times."""
    if normalisation is None:
        return unused, unused, unused, unused
    return normalisation.in_rows()


def deferred_arguments(deferred: DeferredNormBackward | None, dy: Tensor, tiling: Tiling) -> tuple[Any, ...]:
    """Descriptor of the convolution's output y, its batch norm's vectors and sums; without one, dy six times."""
    # A kernel compiled without `deferred` reads none of these, but Triton needs a tensor in every place.
    if deferred is None:
        return (dy,) * 6
    y = descriptor(rows_of(deferred.y), tiling.rows, tiling.outputs)
    return y, *deferred.norm.in_rows(), deferred.sums.contiguous()
