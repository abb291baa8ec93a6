"""Batch norm over spans, a residual and ReLU, each tensor read and written as few times as the arithmetic allows.

For 16-bit images with the channels last. Passes over the images, with the plain operations' in brackets: forward reads
2 and writes 1 (with a residual 3 and 1; plain 4 and 2, 6 and 3); backward reads 4 and writes 1 (with a residual 5 and
2; plain 6 and 2, 6 and 2). Statistics and sums are float32, added in one fixed order: equal inputs give equal bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, load, on_device, use_triton
from megabatch.kernels.layout import images_of, rows_of

TILE = 4096
"""Values of one tile of the reducing kernels; those that write as they read take twice as many."""
MIN_PROGRAMS, MAX_PROGRAMS = 264, 1024
"""Of a reduction: enough to fill an H200 of 132 multiprocessors, few enough that adding their sums costs little."""
TILES_PER_PROGRAM = 8
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean, var)`: each `span` samples by their own statistics, plus a residual, through ReLU; differentiable.

        h = (x - mean) / sqrt(biased variance + eps);   y = relu(weight h + bias + residual)      per span and channel
        dz = dy where y > 0;   dresidual = dz;   dbias = sum dz;   dweight = sum dz h             over all spans
        dx = weight / sqrt(biased variance + eps) (dz - sum(dz) / n - h sum(dz h) / n)            sums over one span

    (Ioffe and Szegedy 2015, arXiv:1502.03167.) `mean` and `var` are (spans, C), in float32 and without gradient; `var`
    is the unbiased variance, which running averages want. The last span is short where N is no multiple of `span`.
    torch rounds between the three operations, the kernels only once.

    Shapes: x and residual (N, C, H, W), float32, float16 or bfloat16, fastest with the channels last, in which y comes
    back from a GPU; weight and bias (C,), float32.

    Raises:
        UserError: no sample, a span below 1, or tensors of other shapes or types.
    """
    _check(x, weight, bias, residual, span)
    if not use_triton(x, backend) or x.dtype not in _TYPES:
        return batch_norm_act_reference(x, weight, bias, span=span, eps=eps, residual=residual, relu=relu)
    y, mean, var = _FusedBatchNorm.apply(
        x, weight.float().contiguous(), bias.float().contiguous(), residual, span, eps, relu
    )  # type: ignore[no-untyped-call]
    return y, mean, var


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch's own operations, one batch norm per span; any floating-point type."""
    wide = weight.dtype
    statistics = torch.zeros(-(-len(x) // span), 2, len(weight), dtype=wide, device=x.device)
    outputs = [
        _reference_of_span(part, weight, bias, rows, eps)
        for part, rows in zip(torch.split(x, span), statistics, strict=True)
    ]
    y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    y = y if residual is None else y + residual
    return functional.relu(y) if relu else y, statistics[:, 0], statistics[:, 1]


def _reference_of_span(x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float) -> Tensor:
    mean, variance = statistics
    if x.numel() == len(weight):  # one value per channel, which torch refuses: its variance is 0
        mean.copy_(x.detach().flatten())
        return ((x - x) * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
    return functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps)


class _Cut(NamedTuple):
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
        """The compile-time arguments of every kernel."""
        return {
            "columns": self.columns,
            "block_rows": height * self.block_rows,
            "block_columns": self.block_columns,
            "num_warps": 8,
        }


def _cut(shape: torch.Size, span: int) -> _Cut:
    count, columns, height, width = shape
    span_rows = min(span, count) * height * width
    spans = -(-count // span)
    block_columns = min(128, max(8, _power_of_2(columns)))
    block_rows = TILE // block_columns
    tiles = -(-span_rows // block_rows)
    side_by_side = spans * -(-columns // block_columns)
    programs = min(MAX_PROGRAMS, max(MIN_PROGRAMS, tiles * side_by_side // TILES_PER_PROGRAM))
    rows_per_part = -(-tiles // min(tiles, max(1, programs // side_by_side))) * block_rows
    parts = -(-span_rows // rows_per_part)
    return _Cut(count * height * width, columns, span_rows, spans, rows_per_part, parts, block_rows, block_columns)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        span: int,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cut = _cut(x.shape, span)
        rows = rows_of(x)
        added = rows if residual is None else rows_of(residual)
        with on_device(x):
            mean, var, deviation = _statistics(rows, cut, eps)
            y = torch.empty_like(rows)
            load("_batch_norm_triton").normalise_kernel[cut.tiles()](
                rows,
                added,
                y,
                mean,
                deviation,
                weight,
                bias,
                cut.num_rows,
                cut.span_rows,
                has_residual=residual is not None,
                relu=relu,
                **cut.block(2),
            )
        ctx.cut, ctx.relu, ctx.has_residual = cut, relu, residual is not None
        ctx.save_for_backward(x, weight, bias, mean, deviation, *([y] if relu and ctx.has_residual else []))
        ctx.mark_non_differentiable(mean, var)
        return images_of(y, x), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, deviation, *output = ctx.saved_tensors
        rows, dy = rows_of(x), rows_of(grad)
        with on_device(x):
            dz, sums = _gradient_sums(dy, rows, output, (mean, deviation, weight, bias), ctx.cut, relu=ctx.relu)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = torch.empty_like(rows)
                load("_batch_norm_triton").input_gradient_kernel[ctx.cut.tiles()](
                    dz,
                    rows,
                    dx,
                    sums,
                    mean,
                    deviation,
                    weight,
                    bias,
                    ctx.cut.num_rows,
                    ctx.cut.span_rows,
                    relu=ctx.relu and not output,
                    **ctx.cut.block(2),
                )
        dbias, dweight = sums.sum(0) if len(sums) > 1 else sums[0]
        of_residual = images_of(dz, x) if ctx.has_residual else None
        return None if dx is None else images_of(dx, x), dweight, dbias, of_residual, None, None, None


def _statistics(rows: Tensor, cut: _Cut, eps: float) -> Tensor:
    """Rows of (3, spans, C): mean, unbiased variance, 1 / sqrt(biased variance + eps)."""
    kernels = load("_batch_norm_triton")
    partials = rows.new_empty(cut.spans, cut.parts, 2, cut.columns, dtype=torch.float32)
    statistics = rows.new_empty(3, cut.spans, cut.columns, dtype=torch.float32)
    kernels.moments_kernel[cut.reductions()](
        rows, partials, cut.num_rows, cut.span_rows, cut.rows_per_part, cut.parts, **cut.block()
    )
    kernels.statistics_kernel[(-(-cut.columns // 32), cut.spans)](
        partials,
        *statistics,
        cut.num_rows,
        cut.span_rows,
        cut.rows_per_part,
        cut.parts,
        eps,
        columns=cut.columns,
        block_parts=64,
        block_columns=32,
    )
    return statistics


def _gradient_sums(
    dy: Tensor, rows: Tensor, output: list[Tensor], channels: tuple[Tensor, ...], cut: _Cut, *, relu: bool
) -> tuple[Tensor, Tensor]:
    """dz, which is dy itself where it need not be written, and (spans, 2, C): sums of dz and of dz h."""
    kernels = load("_batch_norm_triton")
    partials = rows.new_empty(cut.spans, cut.parts, 2, cut.columns, dtype=torch.float32)
    sums = rows.new_empty(cut.spans, 2, cut.columns, dtype=torch.float32)
    dz = torch.empty_like(dy) if output else dy
    kernels.gradient_sums_kernel[cut.reductions()](
        dy,
        rows,
        output[0] if output else rows,
        dz,
        partials,
        *channels,
        cut.num_rows,
        cut.span_rows,
        cut.rows_per_part,
        cut.parts,
        from_output=bool(output),
        relu=relu,
        **cut.block(),
    )
    kernels.add_parts_kernel[(-(-cut.columns // 32), cut.spans, 2)](
        partials, sums, cut.parts, columns=cut.columns, block_parts=64, block_columns=32
    )
    return dz, sums


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, span: int) -> None:
    channels = x.shape[1] if x.ndim == 4 else None
    if channels is None or weight.shape != (channels,) or bias.shape != (channels,) or not x.numel():
        raise UserError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} were given, needed: images "
            "(N, C, H, W), at least one, and two vectors of C; x (32, 64, 56, 56) and vectors of 64 work"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise UserError(
            f"the residual is {residual.dtype} {tuple(residual.shape)}, needed: as x, {x.dtype} {tuple(x.shape)}"
        )
    if span < 1:
        raise UserError(f"span={span} was given, needed: 1 or more; span=32 works")
