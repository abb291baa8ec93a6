"""Batch norm and ReLU as separate passes over the images, forward and backward, without autograd.

With h = (x - mean) rstd per span and channel, where rstd = 1 / sqrt(biased variance + eps):

    y  = relu(weight h + bias)
    dz = dy where y > 0;   dbias = sum dz;   dweight = sum dz h          over all spans
    dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)           sums over one span

(Ioffe and Szegedy 2015, arXiv:1502.03167.) n is the number of values per channel in a span: samples x pixels. Forward
is `moments`, then `normalise`; backward is `gradient_sums`, then `input_gradient`.

Each pass has two implementations: a Triton kernel, on matrices of rows (samples x pixels) and channels, and a reference
in torch's operations. Sums are float32 in a fixed order: equal inputs give equal bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.dispatch import load, on_device
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.statistics import StatisticsSink, has_kernel, keep_statistics, kernel_arguments, no_arguments

TILE = 4096
"""Values per tile of the reducing kernels; the elementwise kernels use tiles twice as high."""
MIN_PROGRAMS, MAX_PROGRAMS = 264, 1024
"""Bounds of a reduction's grid: enough to fill the 132 multiprocessors of an H200, few enough to add up cheaply."""
TILES_PER_PROGRAM = 8
"""Tiles that one program of a reduction handles, within those bounds."""
TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of images that the kernels support."""


class Moments(NamedTuple):
    """Statistics of each span: mean, unbiased variance, and rstd = 1 / sqrt(biased variance + eps).

    Each (spans, C), float32.
    """

    mean: Tensor
    var: Tensor
    rstd: Tensor


class Normalisation(NamedTuple):
    """Parameters of (x - mean) rstd weight + bias: mean and rstd (spans, C), weight and bias (C,), float32."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, moments: Moments, weight: Tensor, bias: Tensor) -> "Normalisation":
        """Batch norm with these statistics."""
        return cls(moments.mean, moments.rstd, weight, bias)

    def in_rows(self) -> tuple[Tensor, ...]:
        """The four tensors, contiguous, as the kernels ignore strides."""
        return tuple(values.contiguous() for values in self)


class Cut(NamedTuple):
    """How the kernels divide a matrix (num_rows, columns): into spans, parts of a span, and tiles of a part.

    A part, `rows_per_part` rows, is what one program of a reduction handles, block_rows x block_columns values at a
    time. `parts` is the number of parts of a whole span.
    """

    num_rows: int
    columns: int
    span_rows: int
    spans: int
    rows_per_part: int
    parts: int
    block_rows: int
    block_columns: int

    def tiles(self) -> tuple[int, int]:
        """Grid of the elementwise kernels: one program per tile of 2 block_rows rows."""
        return self.column_blocks() * -(-self.span_rows // (2 * self.block_rows)), self.spans

    def reductions(self) -> tuple[int, int]:
        """Grid of the reducing kernels: one program per part of a span."""
        return self.column_blocks() * self.parts, self.spans

    def column_blocks(self) -> int:
        """Number of programs across the channels."""
        return -(-self.columns // self.block_columns)

    def block(self, height: int = 1) -> dict[str, int]:
        """Keyword arguments that describe a tile, `height` times block_rows high, to a kernel."""
        return {
            "columns": self.columns,
            "block_rows": height * self.block_rows,
            "block_columns": self.block_columns,
            "num_warps": 8,
        }


def cut_rows(shape: torch.Size, span: int) -> Cut:
    """Returns how to divide the rows of images (N, C, H, W) into parts and tiles."""
    count, columns, height, width = shape
    span_rows = min(span, count) * height * width
    spans = -(-count // span)
    # As wide as there are channels, up to 128: neighbouring threads then read neighbouring addresses.
    block_columns = min(128, max(8, 1 << (columns - 1).bit_length()))
    block_rows = TILE // block_columns
    # -(-a // b) is a / b rounded up.
    tiles = -(-span_rows // block_rows)
    # Programs that exist without dividing spans into parts; more parts are made until the GPU is full.
    side_by_side = spans * -(-columns // block_columns)
    programs = min(MAX_PROGRAMS, max(MIN_PROGRAMS, tiles * side_by_side // TILES_PER_PROGRAM))
    rows_per_part = -(-tiles // min(tiles, max(1, programs // side_by_side))) * block_rows
    parts = -(-span_rows // rows_per_part)
    return Cut(count * height * width, columns, span_rows, spans, rows_per_part, parts, block_rows, block_columns)


def moments(x: Tensor, *, span: int, eps: float, triton: bool, sink: StatisticsSink | None = None) -> Moments:
    """Computes the moments from one read of x; with `sink`, also accumulates them there."""
    if not triton:
        found = _moments_reference(x, span, eps)
        if sink is not None:
            keep_statistics(sink, found.mean, found.var, triton=False)
        return found
    cut, rows = cut_rows(x.shape, span), rows_of(x)
    with on_device(x):
        partials = rows.new_empty(cut.spans, cut.parts, 2, cut.columns, dtype=torch.float32)
        load("kernels._statistics_triton").moments_kernel[cut.reductions()](
            rows, partials, cut.num_rows, cut.span_rows, cut.rows_per_part, cut.parts, **cut.block()
        )
        return combine_moments(partials, cut.num_rows, cut.span_rows, cut.rows_per_part, eps, sink)


def combine_moments(
    partials: Tensor, num_rows: int, span_rows: int, rows_per_part: int, eps: float, sink: StatisticsSink | None
) -> Moments:
    """Returns each span's moments from those of its parts, and accumulates them into `sink`.

    partials (spans, parts, 2, C): each part's mean and sum of squared differences from it.
    """
    spans, parts, _, columns = partials.shape
    found = Moments(*partials.new_empty(3, spans, columns))
    # With one span the same launch accumulates; with several, their sum is known only after all programs have ended.
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
    """Returns y: one read of x and one write."""
    if not triton:
        return _normalise_reference(x, norm, span, relu)
    cut, rows = cut_rows(x.shape, span), rows_of(x)
    y = torch.empty_like(rows)
    with on_device(x):
        load("kernels.norm._batch_norm_triton").normalise_kernel[cut.tiles()](
            rows, y, *norm.in_rows(), cut.num_rows, cut.span_rows, relu=relu, **cut.block(2)
        )
    return images_of(y, x)


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalisation, *, span: int, triton: bool, relu: bool = True) -> Tensor:
    """Returns the sums of dz and of dz h over each span, (spans, 2, C), float32.

    The ReLU mask is recomputed from x, and dz is not written: `input_gradient` with `relu` masks dy while reading it.
    """
    if not triton:
        return sums_over_spans(_masked(dy, x, norm, span, relu), x, norm, span)
    cut, rows = cut_rows(x.shape, span), rows_of(x)
    # Two launches: a program per part writes its sums, and add_parts adds them in a fixed order.
    partials = rows.new_empty(cut.spans, cut.parts, 2, cut.columns, dtype=torch.float32)
    with on_device(x):
        load("kernels.norm._batch_norm_triton").gradient_sums_kernel[cut.reductions()](
            rows_of(dy),
            rows,
            partials,
            *norm.in_rows(),
            cut.num_rows,
            cut.span_rows,
            cut.rows_per_part,
            cut.parts,
            relu=relu,
            **cut.block(),
        )
        return add_parts(partials)


def add_parts(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums (spans, parts, rows, C) over the parts, in a fixed order, to (spans, rows, C); rounds once, to `dtype`."""
    spans, parts, num_sums, columns = partials.shape
    # Nothing to add: saves a launch.
    if parts == 1 and dtype == partials.dtype:
        return partials[:, 0]
    sums = partials.new_empty(spans, num_sums, columns, dtype=dtype)
    block_parts = min(
        64, 1 << (parts - 1).bit_length()
    )  # few parts of a filter's gradient, or many of a channel's sums
    block_columns = 2048 // block_parts
    load("kernels.norm._batch_norm_triton").add_parts_kernel[(-(-columns // block_columns), spans, num_sums)](
        partials, sums, parts, columns=columns, block_parts=block_parts, block_columns=block_columns
    )
    return sums


def input_gradient(
    dz: Tensor, x: Tensor, norm: Normalisation, sums: Tensor, *, span: int, triton: bool, relu: bool
) -> Tensor:
    """Returns dx: one read of dz and of x, and one write. With `relu`, pass dy as `dz`: it is masked while read."""
    if not triton:
        return _input_gradient_reference(dz, x, norm, sums, span, relu)
    cut, rows = cut_rows(x.shape, span), rows_of(x)
    dx = torch.empty_like(rows)
    with on_device(x):
        load("kernels.norm._batch_norm_triton").input_gradient_kernel[cut.tiles()](
            rows_of(dz), rows, dx, sums, *norm.in_rows(), cut.num_rows, cut.span_rows, relu=relu, **cut.block(2)
        )
    return images_of(dx, x)


def _moments_reference(x: Tensor, span: int, eps: float) -> Moments:
    # The last of the parts into which torch.split divides may be shorter, as the last span.
    pairs = [torch.var_mean(part, (0, 2, 3), correction=0) for part in torch.split(wide(x), span)]
    var, mean = (torch.stack(values) for values in zip(*pairs, strict=True))
    sizes = _sizes(x, span)
    rstd = torch.where(
        var < torch.inf, torch.rsqrt(var + eps), torch.nan
    )  # NaN, not 0, on overflow: see statistics_kernel
    return Moments(mean, var * sizes / (sizes - 1).clamp(min=1), rstd)


def _normalise_reference(x: Tensor, norm: Normalisation, span: int, relu: bool) -> Tensor:
    y = affine(x, norm, span)
    return (torch.relu(y) if relu else y).to(x.dtype)


def _masked(dy: Tensor, x: Tensor, norm: Normalisation, span: int, relu: bool) -> Tensor:
    """Returns dz: dy where ReLU's output is positive or NaN, else 0."""
    return torch.where(_normalise_reference(x, norm, span, relu) <= 0, 0.0, dy) if relu else dy


def sums_over_spans(dz: Tensor, x: Tensor, norm: Normalisation, span: int) -> Tensor:
    """Sums of dz and of dz h over each span, (spans, 2, C), in torch's operations."""
    products = wide(dz) * _normalised(x, norm, span)
    sums = [torch.stack([part.sum((0, 2, 3)) for part in torch.split(t, span)]) for t in (wide(dz), products)]
    return torch.stack(sums, dim=1)


def _input_gradient_reference(
    dz: Tensor, x: Tensor, norm: Normalisation, sums: Tensor, span: int, relu: bool
) -> Tensor:
    # dx = weight rstd (dz - sum(dz) / n - h sum(dz h) / n)
    masked = wide(_masked(dz, x, norm, span, relu))
    means = sums / _sizes(x, span)[:, None]
    mean_dz, mean_dz_h, scale = (
        by_sample(values, span, len(x)) for values in (means[:, 0], means[:, 1], norm.weight * norm.rstd)
    )
    return ((masked - mean_dz - _normalised(x, norm, span) * mean_dz_h) * scale).to(x.dtype)


def affine(x: Tensor, norm: Normalisation, span: int) -> Tensor:
    """weight h + bias, not yet rounded to x's dtype, in torch's operations."""
    return _normalised(x, norm, span) * norm.weight[:, None, None] + norm.bias[:, None, None]


def by_sample(values: Tensor, span: int, count: int) -> Tensor:
    """Repeats (spans, C) per sample of a span: (N, C, 1, 1)."""
    return values.repeat_interleave(span, 0)[:count, :, None, None]


def _normalised(x: Tensor, norm: Normalisation, span: int) -> Tensor:
    """h = (x - mean) rstd."""
    mean, rstd = (by_sample(values, span, len(x)) for values in (norm.mean, norm.rstd))
    return (wide(x) - mean) * rstd


def _sizes(x: Tensor, span: int) -> Tensor:
    """n: the number of values per channel in each span, (spans, 1)."""
    sizes = [len(part) * x.shape[2] * x.shape[3] for part in torch.split(x, span)]
    return torch.tensor(sizes, device=x.device)[:, None]


def wide(x: Tensor) -> Tensor:
    """x in the dtype of sums: float64 if it is float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()
