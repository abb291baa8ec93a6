"""1x1 convolutions that normalise their input as they read it and measure their output as they write it.

In a residual network each 1x1 convolution reads what a batch norm and a ReLU make of the convolution before. Done one
after another, that activation is written once and read twice (forward, weight gradient), and statistics are one more
read of each output. Here it is computed from the stored convolution output wherever it is needed, and moments leave
the convolution with its output. For images in 16 bit with the channels last.
"""

from typing import Any

import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels.bottleneck.handover import DeferredNormBackward
from megabatch.kernels.bottleneck.tiles import (
    Tiling,
    by_width,
    channel_arguments,
    described,
    num_programs,
    options,
    rest_arguments,
    row_cut,
)
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Moments, Normalisation
from megabatch.kernels.statistics import StatisticsSink

_WIDEST = 2**31  # rows are counted in 32 bit by the copy engine
FORWARD_TILINGS = (
    Tiling(128, 64, 64, 4, 4),
    Tiling(128, 128, 64, 8, 3),
    Tiling(128, 256, 64, 8, 3),
    Tiling(256, 64, 64, 8, 3),
)
DATA_GRADIENT_TILINGS = (
    Tiling(128, 64, 64, 4, 4),
    Tiling(64, 64, 128, 8, 4),
    Tiling(64, 64, 256, 8, 3),
    Tiling(256, 64, 64, 8, 3),
)
WEIGHT_GRADIENT_TILINGS = (
    Tiling(64, 64, 64, 4, 4),
    Tiling(64, 128, 128, 8, 4),
    Tiling(64, 256, 64, 8, 4),
    Tiling(64, 64, 256, 8, 4),
    Tiling(128, 128, 128, 8, 3),
)
"""Sizes to choose from on a Hopper GPU."""

WEIGHT_GRADIENT_PROGRAMS = 264


def conv1x1_forward(
    x: Tensor,
    weight: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    normalisation: Normalisation | None = None,
    sink: StatisticsSink | None = None,
    tiling: Tiling | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """`(y, moments)`: y = weight h, with the moments of each span of y as it is rounded. No gradient.

    h is x itself, or `normalisation` of x by the statistics of x's own spans and ReLU. With `sink` the moments are also
    kept there.

    Shapes: x (N, C, H, W), weight (K, C) or (K, C, 1, 1) of x's type, y (N, K, H, W) with the channels last, moments
    (spans, K) float32. Triton needs C and K to be multiples of 16, and the reference takes over where not.

    Raises:
        UserError: shapes that do not agree.
    """
    matrix = _check(x, weight, normalisation, span)
    if not (use_triton(x, backend) and fits(x, len(matrix))):
        return _forward_reference(x, matrix, normalisation, span, eps, sink)
    tiling = tiling or by_width(FORWARD_TILINGS, len(matrix), which="outputs")
    cut = row_cut(x, span, tiling)
    rows = rows_of(x)
    y = rows.new_empty(cut.num_rows, len(matrix))
    partials = rows.new_empty(cut.spans(), cut.tiles_per_span, 2, len(matrix), dtype=torch.float32)
    with on_device(x):
        load("kernels.bottleneck._conv1x1_triton").forward_kernel[
            (num_programs(x, cut.num_row_tiles * -(-len(matrix) // tiling.outputs)),)
        ](
            described(rows, tiling.rows, tiling.inputs),
            described(matrix, tiling.outputs, tiling.inputs),
            y,
            *channel_arguments(normalisation, partials),
            partials,
            *cut,
            normalise=normalisation is not None,
            **options(rows, matrix, tiling),
        )
        return images_of(y, x), passes.combine_moments(partials, cut.num_rows, cut.span_rows, tiling.rows, eps, sink)


def conv1x1_data_gradient(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    normalisation: Normalisation,
    *,
    span: int,
    passed: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: Normalisation | None = None,
    rest: DeferredNormBackward | None = None,
    tiling: Tiling | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`(dz, sums)`: dz = weight^T dy + addend where ReLU passes, the gradient of what went into that ReLU.

    The convolution's input is ReLU of the normalised x; behind a residual, ReLU of their sum, and `passed` says where
    it passed (`join_passes`). sums is (spans, 2, C): of dz and of dz (x - mean) rstd over each span, as batch
    norm's backward needs them; with a `residual_norm` of `residual` (spans, 4, C), those of that batch norm behind.
    With the `rest` of the backward of a batch norm of the convolution's output, that is applied to dy as it is read.

    Shapes as in `conv1x1_forward`; dy is like y; dz, addend and residual are like x.

    Raises:
        UserError: shapes that do not agree.
    """
    matrix = _check(x, weight, normalisation, span)
    if not (use_triton(x, backend) and fits(x, len(matrix))):
        dy = dy if rest is None else rest.applied(dy, span=span, triton=False)
        return _data_gradient_reference(
            dy, matrix, x, normalisation, span, passed, addend, residual=residual, residual_norm=residual_norm
        )
    tiling = tiling or by_width(DATA_GRADIENT_TILINGS, matrix.shape[1], which="inputs")
    cut = row_cut(x, span, tiling)
    rows, gradient = rows_of(x), rows_of(dy)
    dz = torch.empty_like(rows)
    channels = rows.shape[1]
    num_sums = 2 if residual_norm is None else 4
    partials = rows.new_empty(cut.spans(), cut.tiles_per_span, num_sums, channels, dtype=torch.float32)
    with on_device(x):
        programs = num_programs(x, cut.num_row_tiles * -(-channels // tiling.inputs))
        load("kernels.bottleneck._conv1x1_triton").data_gradient_kernel[(programs,)](
            described(gradient, tiling.rows, tiling.outputs),
            described(matrix, tiling.outputs, tiling.inputs),
            rows,
            rows if passed is None else passed,
            rows if addend is None else rows_of(addend),
            rows if residual is None else rows_of(residual),
            dz,
            *channel_arguments(normalisation, partials),
            *channel_arguments(residual_norm, partials)[:2],
            *rest_arguments(rest, gradient, tiling),
            partials,
            *cut,
            behind_residual=passed is not None,
            has_addend=addend is not None,
            two_norms=residual_norm is not None,
            rest=rest is not None,
            rest_relu=rest is not None and rest.relu,
            **options(rows, matrix, tiling),
        )
        return images_of(dz, x), passes.add_parts(partials)


def conv1x1_weight_gradient(
    dy: Tensor,
    x: Tensor,
    *,
    span: int,
    normalisation: Normalisation | None = None,
    rest: DeferredNormBackward | None = None,
    dtype: torch.dtype = torch.float32,
    tiling: Tiling | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """dweight (K, C) = sum over rows of dy h, in `dtype`, with h computed from x again.

    The rows are cut into parts whose products, in float32, are added in one order, so equal inputs give equal bits.
    `rest` as in `conv1x1_data_gradient`.

    Raises:
        UserError: shapes that do not agree.
    """
    gradient = rows_of(dy)
    _check(x, gradient.new_empty(gradient.shape[1], x.shape[1]), normalisation, span)
    if not (use_triton(x, backend) and fits(x, gradient.shape[1])):
        gradient = gradient if rest is None else rows_of(rest.applied(dy, span=span, triton=False))
        return (gradient.float().T @ rows_of(_activation(x, normalisation, span)).float()).to(dtype)
    rows = rows_of(x)
    outputs, inputs = gradient.shape[1], rows.shape[1]
    tiling = tiling or by_width(WEIGHT_GRADIENT_TILINGS, inputs, which="inputs")
    cut = row_cut(x, span, tiling)
    tiles = -(-outputs // tiling.outputs) * -(-inputs // tiling.inputs)
    per_part = -(-cut.num_row_tiles // max(1, WEIGHT_GRADIENT_PROGRAMS // tiles))
    parts = -(-cut.num_row_tiles // per_part)
    partials = rows.new_empty(parts, outputs, inputs, dtype=torch.float32 if parts > 1 else dtype)
    with on_device(x):
        load("kernels.bottleneck._conv1x1_triton").weight_gradient_kernel[(tiles, parts)](
            described(gradient, tiling.rows, tiling.outputs),
            described(rows, tiling.rows, tiling.inputs),
            partials,
            *channel_arguments(normalisation, partials),
            *rest_arguments(rest, gradient, tiling),
            *cut,
            per_part,
            normalise=normalisation is not None,
            rest=rest is not None,
            rest_relu=rest is not None and rest.relu,
            **options(rows, partials[0], tiling),
        )
        together = passes.add_parts(partials.view(1, parts, 1, -1), dtype)
    return together.view(outputs, inputs)


def _activation(x: Tensor, normalisation: Normalisation | None, span: int) -> Tensor:
    """h, in the type of x."""
    return x if normalisation is None else passes.normalise(x, normalisation, span=span, triton=False)


def _forward_reference(
    x: Tensor, matrix: Tensor, normalisation: Normalisation | None, span: int, eps: float, sink: StatisticsSink | None
) -> tuple[Tensor, Moments]:
    y = torch.nn.functional.conv2d(_activation(x, normalisation, span), matrix[:, :, None, None])
    return y, passes.moments(y, span=span, eps=eps, triton=False, sink=sink)


def _data_gradient_reference(
    dy: Tensor,
    matrix: Tensor,
    x: Tensor,
    normalisation: Normalisation,
    span: int,
    passed: Tensor | None,
    addend: Tensor | None,
    **residual: Any,
) -> tuple[Tensor, Tensor]:
    through = torch.nn.functional.conv2d(dy, matrix.T[:, :, None, None])
    passed = join_passes.bits_of(_activation(x, normalisation, span)) if passed is None else passed
    return join_passes.join_gradient(
        through, x, normalisation, passed, span=span, addend=addend, triton=False, **residual
    )


def fits(x: Tensor, outputs: int) -> bool:
    """Whether the kernels take it: types with matrix units or exact products, rows of whole 16 bytes."""
    known = x.dtype in {torch.float32, torch.float16, torch.bfloat16}
    return known and x.numel() // x.shape[1] < _WIDEST and x.shape[1] % 16 == 0 and outputs % 16 == 0


def _check(x: Tensor, weight: Tensor, normalisation: Normalisation | None, span: int) -> Tensor:
    """The weight as a matrix (K, C)."""
    fits = x.ndim == 4 and x.numel() and weight.numel() == len(weight) * x.shape[1] and span >= 1
    if not fits or weight.dtype != x.dtype:
        raise UserError(
            f"x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)} and span={span} were given, "
            "needed: (N, C, H, W), (K, C, 1, 1) of one type, and 1 or more; (32, 64, 56, 56), (256, 64, 1, 1), 32 work"
        )
    if normalisation is not None:
        check_normalisation(x, normalisation, span)
    return weight.reshape(len(weight), x.shape[1]).contiguous()


def check_normalisation(x: Tensor, normalisation: Normalisation, span: int) -> None:
    """Raises UserError for one that is not of these images' spans and channels."""
    shapes = [tuple(values.shape) for values in normalisation]
    wanted = [(-(-len(x) // span), x.shape[1])] * 2 + [(x.shape[1],)] * 2
    if shapes != wanted:
        raise UserError(f"the normalisation has shapes {shapes}, needed for these images and span: {wanted}")
