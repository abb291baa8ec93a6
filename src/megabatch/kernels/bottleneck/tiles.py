"""Tiling of the matrix products of 1x1 convolutions, and the arguments that their kernels need for it."""

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


def num_programs(x: Tensor, num_tiles: int) -> int:
    """Two per multiprocessor, and at most one per tile; on a CPU (Triton's interpreter) two, so that programs loop."""
    resident = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(num_tiles, resident)


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
