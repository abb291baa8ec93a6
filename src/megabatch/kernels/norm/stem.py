"""Batch norm over spans, ReLU and max pooling in one: the layers after the first convolution of a ResNet.

Fastest for 16-bit channels_last images. Accesses to full-size images: forward reads two (for moments and pooling) and
writes none, backward reads two and writes one. torch's own operations read 4 and write 2 forward, and read 6 and write
3 backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.batch_norm import batch_norm_act_reference, check, over_spans
from megabatch.kernels.norm.passes import Normalisation
from megabatch.kernels.statistics import StatisticsSink, keep_statistics

_MOST_ROWS = 2**31  # the kernels compute pixel coordinates from row numbers in 32 bits


def fused_bn_relu_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    sink: StatisticsSink | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, mean, var)`, y = 3x3 max pooling, stride 2, padding 1, of relu(batch norm of x); differentiable.

    Statistics and `sink` as in `fused_bn_act`. Of equal values of x in a window the first in row-major order receives
    the gradient, and NaN is the maximum, as in torch's MaxPool2d. torch also takes the first of values of x that batch
    norm rounds to the same; the kernel takes the largest.

    Shapes: x (N, C, H, W), y (N, C, (H + 1) // 2, (W + 1) // 2), weight and bias (C,), float32.

    Raises:
        UserError: no sample, a span below 1, or tensors of wrong shapes.
    """
    check(x, weight, bias, None, span)
    if not use_triton(x, backend) or x.dtype not in passes.TYPES or x.numel() // x.shape[1] >= _MOST_ROWS:
        h, mean, var = batch_norm_act_reference(x, weight, bias, span=span, eps=eps)
        if sink is not None:
            keep_statistics(sink, mean, var, triton=False)
        return functional.max_pool2d(h, 3, 2, 1), mean, var
    # Moments are measured outside autograd; the gradient through them is part of `_NormReluPool`'s backward.
    found = passes.moments(x.detach(), span=span, eps=eps, triton=True, sink=sink)
    norm = Normalisation.of(found, weight.float(), bias.float())
    y: Tensor = _NormReluPool.apply(x, *norm, span)  # type: ignore[no-untyped-call]
    return y, found.mean, found.var


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, span: int) -> Tensor:
        rows, sizes = rows_of(x), _sizes(x)
        # The grid covers rows of pooled images; a span is the same samples there.
        pooled = passes.cut_rows(torch.Size((len(x), x.shape[1], *sizes[2:])), span)
        y = rows.new_empty(pooled.num_rows, pooled.columns)
        positions = torch.empty_like(y, dtype=torch.uint8)
        norm = Normalisation(mean, rstd, weight, bias)
        with on_device(x):
            load("kernels.norm._stem_triton").pool_kernel[_grid(pooled)](
                rows, y, positions, *norm.in_rows(), pooled.num_rows, pooled.span_rows, *sizes, **_tile(pooled)
            )
        ctx.span = span
        ctx.save_for_backward(x, positions, *norm)
        return images_of(y, x[:, :, : sizes[2], : sizes[3]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, positions, *values = ctx.saved_tensors
        norm = Normalisation(*values)
        mean, rstd, weight, bias = norm.in_rows()
        kernels = load("kernels.norm._stem_triton")
        rows, gradient, sizes = rows_of(x), rows_of(dy), _sizes(x)
        pooled = passes.cut_rows(dy.shape, ctx.span)
        partials = rows.new_empty(pooled.spans, pooled.parts, 2, pooled.columns, dtype=torch.float32)
        dx = torch.empty_like(rows)
        # As in a plain batch norm: sums of dz and dz h first, over windows, then dx, with dz gathered from the windows.
        with on_device(x):
            kernels.pool_gradient_sums_kernel[pooled.reductions()](
                gradient,
                positions,
                rows,
                partials,
                mean,
                rstd,
                pooled.num_rows,
                pooled.span_rows,
                pooled.rows_per_part,
                pooled.parts,
                *sizes,
                **_tile(pooled),
            )
            sums = passes.add_parts(partials)
            kernels.pool_input_gradient_kernel[_grid(pooled)](
                gradient,
                positions,
                rows,
                dx,
                sums,
                mean,
                rstd,
                weight,
                bias,
                pooled.num_rows,
                pooled.span_rows,
                *sizes,
                **_tile(pooled),
            )
        dbias, dweight = over_spans(sums)
        return images_of(dx, x), None, None, dweight, dbias, None


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Height and width of the images, then of the pooled images."""
    height, width = x.shape[2:]
    return height, width, (height + 1) // 2, (width + 1) // 2


def _tile(cut: passes.Cut) -> dict[str, int]:
    """Tile, half as high as that of other kernels: each value takes the work and the registers of several."""
    return {**cut.block(), "block_rows": cut.block_rows // 2}


def _grid(cut: passes.Cut) -> tuple[int, int]:
    """Grid with one program per tile."""
    return cut.column_blocks() * -(-cut.span_rows // (cut.block_rows // 2)), cut.spans
