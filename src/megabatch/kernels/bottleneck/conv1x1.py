"""1x1 convolutions that normalise their input as they read it and measure their output as they write it.

In a residual network a 1x1 convolution reads h = relu(batch norm of x), where x is the output of the convolution
before. As separate operations h is written once and read twice (forward, weight gradient), and the statistics of the
next batch norm cost one more read of each output. Here h is computed from x in every kernel that needs it, and each
kernel computes the moments of the output it writes. For 16-bit images in channels_last format.
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
    deferred_arguments,
    descriptor,
    options,
    part_cut,
    row_cut,
)
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Moments, Normalisation
from megabatch.kernels.statistics import StatisticsSink

_MAX_ROWS = 2**31  # the copy engine counts rows in 32 bits
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
"""Candidates of each kernel, chosen for Hopper GPUs."""

WEIGHT_GRADIENT_PROGRAMS = 264
"""Programs of a weight gradient: two per multiprocessor of an H200."""


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
    """Returns y = weight h and the moments of each span of y, after y is rounded. Not differentiable.

        h = relu((x - mean) rstd scale + bias)  per span and channel, or h = x without a `normalisation`

    With `sink` the moments are also stored there.

    Shapes: x (N, C, H, W), weight (K, C) or (K, C, 1, 1) in x's dtype, y (N, K, H, W) in channels_last format, moments
    (spans, K) float32. The Triton kernel needs C and K to be multiples of 16; other sizes go to the reference.

    Raises:
        UserError: shapes that do not agree.
    """
    matrix = _check(x, weight, normalisation, span)
    if not (use_triton(x, backend) and supports(x, len(matrix))):
        return _forward_reference(x, matrix, normalisation, span, eps, sink)
    # A tile as wide as y normalises each value of x once; several tiles side by side would do so again in each.
    tiling = tiling or by_width(FORWARD_TILINGS, len(matrix), which="outputs")
    blocks_across = -(-len(matrix) // tiling.outputs)
    cut = part_cut(x, span, tiling, blocks_across)
    rows = rows_of(x)
    y = rows.new_empty(cut.num_rows, len(matrix))
    # One mean and sum of squared differences per part and channel; combine_moments reduces them to spans.
    partials = rows.new_empty(-(-len(x) // span), cut.parts, 2, len(matrix), dtype=torch.float32)
    with on_device(x):
        load("kernels.bottleneck._conv1x1_triton").forward_kernel[(len(partials) * cut.parts * blocks_across,)](
            descriptor(rows, tiling.rows, tiling.inputs),
            descriptor(matrix, tiling.outputs, tiling.inputs),
            y,
            *channel_arguments(normalisation, partials),
            partials,
            *cut,
            normalise=normalisation is not None,
            **options(rows, matrix, tiling),
        )
        return images_of(y, x), passes.combine_moments(partials, *cut[:3], eps, sink)


def conv1x1_data_gradient(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    normalisation: Normalisation,
    *,
    span: int,
    relu_mask: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: Normalisation | None = None,
    deferred: DeferredNormBackward | None = None,
    tiling: Tiling | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns dz, the gradient of the input of the ReLU that the convolution reads, and its sums.

        dz = mask (weight^T dy + addend),   sums = (sum(dz), sum(dz (x - mean) rstd))  over each span

    The mask is 1 where that ReLU passes: where the normalised x is positive, or, for a ReLU of a residual sum, where
    the bits of `relu_mask` are set (`join_passes`). sums is (spans, 2, C), as the batch norm's backward needs them.
    With `residual` and its `residual_norm` it is (spans, 4, C), with the same two sums for that batch norm behind.
    With `deferred`, dy is the gradient of a batch norm's output, and its backward is completed as dy is read.

    Shapes as in `conv1x1_forward`; dy is like y; dz, addend and residual are like x.

    Raises:
        UserError: shapes that do not agree.
    """
    matrix = _check(x, weight, normalisation, span)
    if not (use_triton(x, backend) and supports(x, len(matrix))):
        # The reference computes dy in memory, then the product, then mask and sums.
        dy = dy if deferred is None else deferred.apply(dy, span=span, triton=False)
        return _data_gradient_reference(
            dy, matrix, x, normalisation, span, relu_mask, addend, residual=residual, residual_norm=residual_norm
        )
    tiling = tiling or by_width(DATA_GRADIENT_TILINGS, matrix.shape[1], which="inputs")
    rows, gradient = rows_of(x), rows_of(dy)
    dz = torch.empty_like(rows)
    channels = rows.shape[1]
    blocks_across = -(-channels // tiling.inputs)
    cut = part_cut(x, span, tiling, blocks_across)
    # Each program stores its own sums and add_parts adds them in a fixed order: atomics would change bits per run.
    num_sums = 2 if residual_norm is None else 4
    partials = rows.new_empty(-(-len(x) // span), cut.parts, num_sums, channels, dtype=torch.float32)
    with on_device(x):
        load("kernels.bottleneck._conv1x1_triton").data_gradient_kernel[(len(partials) * cut.parts * blocks_across,)](
            descriptor(gradient, tiling.rows, tiling.outputs),
            descriptor(matrix, tiling.outputs, tiling.inputs),
            rows,  # where an argument is not used, x stands in its place
            rows if relu_mask is None else relu_mask,
            rows if addend is None else rows_of(addend),
            rows if residual is None else rows_of(residual),
            dz,
            *channel_arguments(normalisation, partials),
            *channel_arguments(residual_norm, partials)[:2],
            *deferred_arguments(deferred, gradient, tiling),
            partials,
            *cut,
            behind_residual=relu_mask is not None,
            has_addend=addend is not None,
            two_norms=residual_norm is not None,
            deferred=deferred is not None,
            deferred_relu=deferred is not None and deferred.relu,
            **options(rows, matrix, tiling),
        )
        return images_of(dz, x), passes.add_parts(partials)


def conv1x1_weight_gradient(
    dy: Tensor,
    x: Tensor,
    *,
    span: int,
    normalisation: Normalisation | None = None,
    deferred: DeferredNormBackward | None = None,
    dtype: torch.dtype = torch.float32,
    tiling: Tiling | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns dweight (K, C) = dy^T h, summed over all rows (samples x pixels), in `dtype`; h is computed from x again.

    The rows are cut into parts, whose float32 products are added in a fixed order: equal inputs give equal bits.
    `normalisation` is as in `conv1x1_forward` and `deferred` as in `conv1x1_data_gradient`.

    Raises:
        UserError: shapes that do not agree.
    """
    gradient = rows_of(dy)
    _check(x, gradient.new_empty(gradient.shape[1], x.shape[1]), normalisation, span)
    if not (use_triton(x, backend) and supports(x, gradient.shape[1])):
        gradient = gradient if deferred is None else rows_of(deferred.apply(dy, span=span, triton=False))
        return (gradient.float().T @ rows_of(_activation(x, normalisation, span)).float()).to(dtype)
    rows = rows_of(x)
    outputs, inputs = gradient.shape[1], rows.shape[1]
    tiling = tiling or by_width(WEIGHT_GRADIENT_TILINGS, inputs, which="inputs")
    cut = row_cut(x, span, tiling)
    # Few tiles of dweight would leave most of the GPU idle, so each tile's rows are cut into parts as well.
    tiles = -(-outputs // tiling.outputs) * -(-inputs // tiling.inputs)
    per_part = -(-cut.num_row_tiles // max(1, WEIGHT_GRADIENT_PROGRAMS // tiles))
    parts = -(-cut.num_row_tiles // per_part)
    # A single part is the result, so it is rounded to `dtype` at once; several are added in float32 first.
    partials = rows.new_empty(parts, outputs, inputs, dtype=torch.float32 if parts > 1 else dtype)
    with on_device(x):
        load("kernels.bottleneck._conv1x1_triton").weight_gradient_kernel[(tiles, parts)](
            descriptor(gradient, tiling.rows, tiling.outputs),
            descriptor(rows, tiling.rows, tiling.inputs),
            partials,
            *channel_arguments(normalisation, partials),
            *deferred_arguments(deferred, gradient, tiling),
            *cut,
            per_part,
            normalise=normalisation is not None,
            deferred=deferred is not None,
            deferred_relu=deferred is not None and deferred.relu,
            **options(rows, partials[0], tiling),
        )
        total = passes.add_parts(partials.view(1, parts, 1, -1), dtype)
    return total.view(outputs, inputs)


def _activation(x: Tensor, normalisation: Normalisation | None, span: int) -> Tensor:
    """h in the dtype of x, in torch's operations."""
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
    relu_mask: Tensor | None,
    addend: Tensor | None,
    **residual: Any,
) -> tuple[Tensor, Tensor]:
    # A 1x1 convolution with the transposed filter is dy weight per pixel.
    product = torch.nn.functional.conv2d(dy, matrix.T[:, :, None, None])
    relu_mask = join_passes.bits_of(_activation(x, normalisation, span)) if relu_mask is None else relu_mask
    return join_passes.join_gradient(
        product, x, normalisation, relu_mask, span=span, addend=addend, triton=False, **residual
    )


def supports(x: Tensor, outputs: int) -> bool:
    """True if the Triton kernels accept x and `outputs` channels: known dtype, channels in multiples of 16."""
    # The copy engine needs rows whose size is a multiple of 16 bytes; tl.dot needs at least 16 channels.
    known = x.dtype in {torch.float32, torch.float16, torch.bfloat16}
    return known and x.numel() // x.shape[1] < _MAX_ROWS and x.shape[1] % 16 == 0 and outputs % 16 == 0


def _check(x: Tensor, weight: Tensor, normalisation: Normalisation | None, span: int) -> Tensor:
    """Checks shapes and dtypes; returns the weight as a matrix (K, C)."""
    agree = x.ndim == 4 and x.numel() and weight.numel() == len(weight) * x.shape[1] and span >= 1
    if not agree or weight.dtype != x.dtype:
        raise UserError(
            f"x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)} and span={span} were given, "
            "needed: (N, C, H, W), (K, C, 1, 1) of one dtype, and 1 or more; (32, 64, 56, 56), (256, 64, 1, 1), 32 work"
        )
    if normalisation is not None:
        check_normalisation(x, normalisation, span)
    return weight.reshape(len(weight), x.shape[1]).contiguous()


def check_normalisation(x: Tensor, normalisation: Normalisation, span: int) -> None:
    """Raises UserError if its shapes are not those of x's spans and channels."""
    shapes = [tuple(values.shape) for values in normalisation]
    wanted = [(-(-len(x) // span), x.shape[1])] * 2 + [(x.shape[1],)] * 2
    if shapes != wanted:
        raise UserError(
            f"the normalisation has shapes {shapes}, needed for these images and span: {wanted}; "
            "Normalisation.of(measure(x, span=span, eps=eps), weight, bias) works"
        )
