"""How matrix products of 1x1 convolutions are cut into tiles, and what their kernels are told of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.bottleneck.handover import DeferredNormBackward
from megabatch.kernels.dispatch import load
from megabatch.kernels.layout import rows_of
from megabatch.kernels.norm.passes import Normalisation

_WIDE_TILE = 2**14
"""Values of a tile of dy beside which one of y has no room in as many stages."""


class Tiling(NamedTuple):
    """How a matrix product is cut into tiles; which is fastest depends on shape and GPU: time those below."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    def name(self) -> str:
        """Under which a choice of it is kept."""
        return "x".join(map(str, self))

    def beside_rest(self) -> "Tiling":
        """For a weight gradient that reads y like dy: a stage fewer where both would not fit into shared memory."""
        return self._replace(num_stages=self.num_stages - (self.rows * self.outputs >= _WIDE_TILE))


class RowCut(NamedTuple):
    """Rows and spans as every kernel takes them, in this order."""

    num_rows: int
    span_rows: int
    tiles_per_span: int
    num_row_tiles: int

    def spans(self) -> int:
        """How many there are."""
        return self.num_row_tiles // self.tiles_per_span


def row_cut(x: Tensor, span: int, tiling: Tiling) -> RowCut:
    """Of the rows of these images; no tile holds rows of two spans."""
    count, _, height, width = x.shape
    span_rows = min(span, count) * height * width
    tiles_per_span = -(-span_rows // tiling.rows)
    return RowCut(count * height * width, span_rows, tiles_per_span, tiles_per_span * -(-count // span))


def by_width(tilings: tuple[Tiling, ...], channels: int, *, which: str) -> Tiling:
    """The first tiling that spans all channels in one tile, so that no row is normalised twice; else the widest."""
    widths = [getattr(tiling, which) for tiling in tilings]
    spanning = [width for width in widths if width >= channels]
    return tilings[widths.index(min(spanning) if spanning else max(widths))]


def num_programs(x: Tensor, num_tiles: int) -> int:
    """As many as can be resident where two fit on a multiprocessor; on a CPU two, so that each takes several tiles."""
    resident = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(num_tiles, resident)


def options(rows: Tensor, matrix: Tensor, tiling: Tiling) -> dict[str, Any]:
    """What every kernel is told of its matrices and tiles."""
    return {
        "inputs": rows.shape[1],
        "outputs": matrix.shape[0],
        "block_rows": tiling.rows,
        "block_outputs": tiling.outputs,
        "block_inputs": tiling.inputs,
        "precision": "ieee" if rows.dtype == torch.float32 else "tf32",
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


def described(matrix: Tensor, block_rows: int, block_columns: int) -> Any:
    """The matrix for the copy engine, which fetches blocks of it and gives zeros outside."""
    tools = load("kernels.bottleneck._conv1x1_triton").TensorDescriptor
    return tools.from_tensor(matrix, [block_rows, block_columns])


def channel_arguments(normalisation: Normalisation | None, unused: Tensor) -> tuple[Tensor, ...]:
    """Statistics, weight and bias of a batch norm, where there is one."""
    if normalisation is None:
        return unused, unused, unused, unused
    return normalisation.in_rows()


def rest_arguments(rest: DeferredNormBackward | None, gradient: Tensor, tiling: Tiling) -> tuple[Any, ...]:
    """The output of the convolution, described as its gradient is, and what is left of its batch norm's backward."""
    if rest is None:
        return (gradient,) * 6
    y = described(rows_of(rest.y), tiling.rows, tiling.outputs)
    return y, *rest.norm.in_rows(), rest.sums.contiguous()
