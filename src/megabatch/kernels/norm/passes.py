"""The passes over images that batch norm and ReLU are made of, forward and backward; no autograd.

With h = (x - mean) rstd per span and channel, where rstd = 1 / sqrt(biased variance + eps):

    y  = relu(weight h + bias)
    dz = dy where y > 0;   dbias = sum dz;   dweight = sum dz h          over all spans
    dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)           sums over one span

(Ioffe and Szegedy 2015, arXiv:1502.03167.) Each pass is a Triton kernel on matrices of rows (samples x pixels) and
channels, and beside it the same in torch's operations. Sums are float32, added in one order: equal inputs give equal
bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.statistics import StatisticsSink, has_kernel, keep_statistics, kernel_arguments, no_arguments

TILE = 4096
"""Values of one tile of the reducing kernels; those that write as they read take twice as many."""
MIN_PROGRAMS, MAX_PROGRAMS = 264, 1024
"""Of a reduction: enough to fill an H200 of 132 multiprocessors, few enough that adding their sums costs little."""
TILES_PER_PROGRAM = 8
TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take."""


class Moments(NamedTuple):
    """Of each span: mean, unbiased variance and 1 / sqrt(biased variance + eps), each (spans, C), float32."""

    mean: Tensor
    var: Tensor
    rstd: Tensor


class Normalisation(NamedTuple):
    """What batch norm does to images: (x - mean) rstd weight + bias. (spans, C) twice and (C,) twice, float32."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, moments: Moments, weight: Tensor, bias: Tensor) -> "Normalisation":
        """Batch norm by these statistics."""
        return cls(moments.mean, moments.rstd, weight, bias)

    def in_rows(self) -> tuple[Tensor, ...]:
        """The four as kernels walk them, which know no strides."""
        return tuple(values.contiguous() for values in self)


class Cut(NamedTuple):
    """How a matrix of rows is cut into programs."""

    num_rows: int
    columns: int
    span_rows: int
    spans: int
    rows_per_part: int
    parts: int
    block_rows: int
    block_columns: int

    def tiles(self) -> tuple[int, int]:
        """Grid of the kernels that take one tile, twice as high, each."""
        return self.column_blocks() * -(-self.span_rows // (2 * self.block_rows)), self.spans

    def reductions(self) -> tuple[int, int]:
        """Grid of the kernels that walk over one part of a span."""
        return self.column_blocks() * self.parts, self.spans

    def column_blocks(self) -> int:
        """Programs next to each other."""
        return -(-self.columns // self.block_columns)

    def block(self, height: int = 1) -> dict[str, int]:
        """What every kernel wants to know of its tile."""
        return {
            "columns": self.columns,
            "block_rows": height * self.block_rows,
            "block_columns": self.block_columns,
            "num_warps": 8,
        }


def cut(shape: torch.Size, span: int) -> Cut:
    """Parts and tiles for images of this shape."""
    count, columns, height, width = shape
    span_rows = min(span, count) * height * width
    spans = -(-count // span)
    block_columns = min(128, max(8, 1 << (columns - 1).bit_length()))
    block_rows = TILE // block_columns
    tiles = -(-span_rows // block_rows)
    side_by_side = spans * -(-columns // block_columns)
    programs = min(MAX_PROGRAMS, max(MIN_PROGRAMS, tiles * side_by_side // TILES_PER_PROGRAM))
    rows_per_part = -(-tiles // min(tiles, max(1, programs // side_by_side))) * block_rows
    parts = -(-span_rows // rows_per_part)
    return Cut(count * height * width, columns, span_rows, spans, rows_per_part, parts, block_rows, block_columns)


def moments(x: Tensor, *, span: int, eps: float, triton: bool, sink: StatisticsSink | None = None) -> Moments:
    """One read of x. With `sink` they are also kept there."""
    if not triton:
        found = _moments_reference(x, span, eps)
        if sink is not None:
            keep_statistics(sink, found.mean, found.var, triton=False)
        return found
    own, rows = cut(x.shape, span), rows_of(x)
    with on_device(x):
        partials = rows.new_empty(own.spans, own.parts, 2, own.columns, dtype=torch.float32)
        load("kernels._statistics_triton").moments_kernel[own.reductions()](
            rows, partials, own.num_rows, own.span_rows, own.rows_per_part, own.parts, **own.block()
        )
        return combine_moments(partials, own.num_rows, own.span_rows, own.rows_per_part, eps, sink)


def measure(
    x: Tensor, *, span: int, eps: float, sink: StatisticsSink | None = None, backend: Backend = "auto"
) -> Moments:
    """`moments` by the kernel or by the reference, as `backend` says."""
    return moments(x, span=span, eps=eps, triton=use_triton(x, backend), sink=sink)


def combine_moments(
    partials: Tensor, num_rows: int, span_rows: int, rows_per_part: int, eps: float, sink: StatisticsSink | None
) -> Moments:
    """Each span's moments from (spans, parts, 2, C): mean and sum of squared differences from it of each part."""
    spans, parts, _, columns = partials.shape
    found = Moments(*partials.new_empty(3, spans, columns))
    at_once = sink if sink is not None and spans == 1 and has_kernel(sink) else None
    load("kernels._statistics_triton").statistics_kernel[(-(-columns // 32), spans)](
        partials,
        *found,
        num_rows,
        span_rows,
        rows_per_part,
        parts,
        eps,
        **(no_arguments(partials) if at_once is None else kernel_arguments(at_once)),
        columns=columns,
        block_parts=64,
        block_columns=32,
    )
    if sink is not None and at_once is None:
        keep_statistics(sink, found.mean, found.var, triton=True)
    return found


def normalise(x: Tensor, norm: Normalisation, *, span: int, triton: bool, relu: bool = True) -> Tensor:
    """y: one read of x, one write."""
    if not triton:
        return _normalise_reference(x, norm, span, relu)
    own, rows = cut(x.shape, span), rows_of(x)
    y = torch.empty_like(rows)
    with on_device(x):
        load("kernels.norm._batch_norm_triton").normalise_kernel[own.tiles()](
            rows, y, *norm.in_rows(), own.num_rows, own.span_rows, relu=relu, **own.block(2)
        )
    return images_of(y, x)


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalisation, *, span: int, triton: bool, relu: bool = True) -> Tensor:
    """The sums of dz and of dz h over each span, (spans, 2, C).

    ReLU's mask is computed from x again, and dz is not written: `input_gradient` with `relu` masks dy as it reads.
    """
    if not triton:
        return sums_over_spans(_masked(dy, x, norm, span, relu), x, norm, span)
    own, rows = cut(x.shape, span), rows_of(x)
    partials = rows.new_empty(own.spans, own.parts, 2, own.columns, dtype=torch.float32)
    with on_device(x):
        load("kernels.norm._batch_norm_triton").gradient_sums_kernel[own.reductions()](
            rows_of(dy),
            rows,
            partials,
            *norm.in_rows(),
            own.num_rows,
            own.span_rows,
            own.rows_per_part,
            own.parts,
            relu=relu,
            **own.block(),
        )
        return add_parts(partials)


def add_parts(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(spans, rows, C) from (spans, parts, rows, C), added in one order and rounded once."""
    spans, parts, num_sums, columns = partials.shape
    if parts == 1 and dtype == partials.dtype:
        return partials[:, 0]
    sums = partials.new_empty(spans, num_sums, columns, dtype=dtype)
    load("kernels.norm._batch_norm_triton").add_parts_kernel[(-(-columns // 32), spans, num_sums)](
        partials, sums, parts, columns=columns, block_parts=64, block_columns=32
    )
    return sums


def input_gradient(
    dz: Tensor, x: Tensor, norm: Normalisation, sums: Tensor, *, span: int, triton: bool, relu: bool
) -> Tensor:
    """dx: one read of dz and x, one write. With `relu` dz is dy still, and is masked as it is read."""
    if not triton:
        return _input_gradient_reference(dz, x, norm, sums, span, relu)
    own, rows = cut(x.shape, span), rows_of(x)
    dx = torch.empty_like(rows)
    with on_device(x):
        load("kernels.norm._batch_norm_triton").input_gradient_kernel[own.tiles()](
            rows_of(dz), rows, dx, sums, *norm.in_rows(), own.num_rows, own.span_rows, relu=relu, **own.block(2)
        )
    return images_of(dx, x)


def _moments_reference(x: Tensor, span: int, eps: float) -> Moments:
    pairs = [torch.var_mean(part, (0, 2, 3), correction=0) for part in torch.split(wide(x), span)]
    var, mean = (torch.stack(values) for values in zip(*pairs, strict=True))
    sizes = _sizes(x, span)
    rstd = torch.where(var < torch.inf, torch.rsqrt(var + eps), torch.nan)  # not 0: see the kernel
    return Moments(mean, var * sizes / (sizes - 1).clamp(min=1), rstd)


def _normalise_reference(x: Tensor, norm: Normalisation, span: int, relu: bool) -> Tensor:
    y = affine(x, norm, span)
    return (torch.relu(y) if relu else y).to(x.dtype)


def _masked(dy: Tensor, x: Tensor, norm: Normalisation, span: int, relu: bool) -> Tensor:
    """dz."""
    return torch.where(_normalise_reference(x, norm, span, relu) <= 0, 0.0, dy) if relu else dy


def sums_over_spans(dz: Tensor, x: Tensor, norm: Normalisation, span: int) -> Tensor:
    """Those of dz and of dz h, (spans, 2, C), in torch's operations."""
    products = wide(dz) * _hat(x, norm, span)
    sums = [torch.stack([part.sum((0, 2, 3)) for part in torch.split(t, span)]) for t in (wide(dz), products)]
    return torch.stack(sums, dim=1)


def _input_gradient_reference(
    dz: Tensor, x: Tensor, norm: Normalisation, sums: Tensor, span: int, relu: bool
) -> Tensor:
    masked = wide(_masked(dz, x, norm, span, relu))
    means = sums / _sizes(x, span)[:, None]
    of_gradient, of_product, slope = (
        by_sample(values, span, len(x)) for values in (means[:, 0], means[:, 1], norm.weight * norm.rstd)
    )
    return ((masked - of_gradient - _hat(x, norm, span) * of_product) * slope).to(x.dtype)


def affine(x: Tensor, norm: Normalisation, span: int) -> Tensor:
    """weight h + bias, unrounded, in torch's operations."""
    return _hat(x, norm, span) * norm.weight[:, None, None] + norm.bias[:, None, None]


def by_sample(values: Tensor, span: int, count: int) -> Tensor:
    """(N, C, 1, 1) from (spans, C)."""
    return values.repeat_interleave(span, 0)[:count, :, None, None]


def _hat(x: Tensor, norm: Normalisation, span: int) -> Tensor:
    mean, rstd = (by_sample(values, span, len(x)) for values in (norm.mean, norm.rstd))
    return (wide(x) - mean) * rstd


def _sizes(x: Tensor, span: int) -> Tensor:
    """Values per channel in each span, (spans, 1)."""
    sizes = [len(part) * x.shape[2] * x.shape[3] for part in torch.split(x, span)]
    return torch.tensor(sizes, device=x.device)[:, None]


def wide(x: Tensor) -> Tensor:
    """In which sums are added: float32, or float64 as it came."""
    return x if x.dtype == torch.float64 else x.float()
