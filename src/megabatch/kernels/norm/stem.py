"""Batch norm over spans, ReLU and max pooling in one: what stands behind the first convolution of a ResNet.

For 16-bit images with the channels last. Of the full-size images forward reads two (moments, pooling) and writes none,
and backward reads two and writes one; torch's own operations read 4 and write 2, and read 6 and write 3.
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

_MOST_ROWS = 2**31  # of which a pixel's place is told by 32-bit division


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
    """`(y, mean, var)`: the maxima of 3x3 windows, stride 2, border 1, of relu(batch norm of x); differentiable.

    Statistics and `sink` as in `fused_bn_act`. Of equal values in a window the first in the order of rows has the
    gradient, and a value that is not a number is the maximum, as in torch's MaxPool2d.

    Shapes: x (N, C, H, W), y (N, C, (H + 1) // 2, (W + 1) // 2), weight and bias (C,), float32.

    Raises:
        UserError: no sample, a span below 1, or tensors of other shapes.
    """
    check(x, weight, bias, None, span)
    if not use_triton(x, backend) or x.dtype not in passes.TYPES or x.numel() // x.shape[1] >= _MOST_ROWS:
        h, mean, var = batch_norm_act_reference(x, weight, bias, span=span, eps=eps)
        if sink is not None:
            keep_statistics(sink, mean, var, triton=False)
        return functional.max_pool2d(h, 3, 2, 1), mean, var
    found = passes.moments(x.detach(), span=span, eps=eps, triton=True, sink=sink)
    norm = Normalisation.of(found, weight.float(), bias.float())
    y: Tensor = _NormReluPool.apply(x, *norm, span)  # type: ignore[no-untyped-call]
    return y, found.mean, found.var


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, span: int) -> Tensor:
        rows, sizes = rows_of(x), _sizes(x)
        pooled = passes.cut(torch.Size((len(x), x.shape[1], *sizes[2:])), span)
        y = rows.new_empty(pooled.num_rows, pooled.columns)
        places = torch.empty_like(y, dtype=torch.uint8)
        norm = Normalisation(mean, rstd, weight, bias)
        with on_device(x):
            load("kernels.norm._stem_triton").pool_kernel[_grid(pooled)](
                rows, y, places, *norm.in_rows(), pooled.num_rows, pooled.span_rows, *sizes, **_tile(pooled)
            )
        ctx.span = span
        ctx.save_for_backward(x, places, *norm)
        return images_of(y, x[:, :, : sizes[2], : sizes[3]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, places, *values = ctx.saved_tensors
        norm = Normalisation(*values)
        mean, rstd, weight, bias = norm.in_rows()
        kernels = load("kernels.norm._stem_triton")
        rows, gradient, sizes, cut = rows_of(x), rows_of(dy), _sizes(x), passes.cut(x.shape, ctx.span)
        partials = rows.new_empty(cut.spans, cut.parts, 2, cut.columns, dtype=torch.float32)
        dx = torch.empty_like(rows)
        with on_device(x):
            kernels.pool_gradient_sums_kernel[cut.reductions()](
                gradient,
                places,
                rows,
                partials,
                mean,
                rstd,
                cut.num_rows,
                cut.span_rows,
                cut.rows_per_part,
                cut.parts,
                *sizes,
                **_tile(cut),
            )
            sums = passes.add_parts(partials)
            kernels.pool_input_gradient_kernel[_grid(cut)](
                gradient,
                places,
                rows,
                dx,
                sums,
                mean,
                rstd,
                weight,
                bias,
                cut.num_rows,
                cut.span_rows,
                *sizes,
                **_tile(cut),
            )
        dbias, dweight = over_spans(sums)
        return images_of(dx, x), None, None, dweight, dbias, None


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Height and width of the images, and of those pooled."""
    height, width = x.shape[2:]
    return height, width, (height + 1) // 2, (width + 1) // 2


def _tile(cut: passes.Cut) -> dict[str, int]:
    """Half as high as where nothing is gathered: each value is the work of several."""
    return {**cut.block(), "block_rows": cut.block_rows // 2}


def _grid(cut: passes.Cut) -> tuple[int, int]:
    """One program for each tile."""
    return cut.column_blocks() * -(-cut.span_rows // (cut.block_rows // 2)), cut.spans
