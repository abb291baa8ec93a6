"""Batch norm of a 1x1 convolution's output from the mean and covariance of its input: the output is never written.

A 1x1 convolution is linear, so the statistics of y = W h follow from those of h, which has a quarter of y's channels
behind the 3x3 convolution of a bottleneck. Per span, with N rows (samples x pixels) of w channels in h (N, w), the
filter W (K, w), batch norm's weight gamma and bias beta, a residual r (N, K), 1 a column of ones, o the elementwise
product:

    m = h^T 1 / N;   C = h^T h / N - m m^T                        mean (w) and covariance (w, w) of h, before any y
    mean_y = W m;    var_y = diag(W C W^T);   q = (var_y + eps)^(-1/2)
    V = diag(gamma q) W;   b = beta - V m;    z = relu(h V^T + b + r)

One product gives z, with bias, residual and ReLU in its epilogue. Backward, from dy = gamma q (g - 1^T g / N -
x dgamma / N) with x = (y - mean_y) q and dh = dy W:

    g = dz where z > 0, which is also dr;   db = 1^T g = dbeta;   G = g^T h - db m^T
    dgamma = q o ((W o G) 1)
    dW = diag(gamma q) (G - diag(q o dgamma) W C)
    dh = g V - (h - 1 m^T) M - 1 (V^T db / N)^T,        M = W^T diag(gamma q^2 dgamma / N) W

dgamma, dW and M sum over one span; parameters get the sum over spans. Nothing divides by gamma, which may be 0. The
equations hold for h - c with any constant vector c, because batch norm removes constants. They are those of Ioffe and
Szegedy 2015, arXiv:1502.03167, for a linear map.

z is read by the next block's first convolution and by its residual sum. With the filter A of the former, the function
also returns A z, and its backward adds and masks both gradients of z in the epilogue of one product:

    g = A^T dy + dr where z > 0

Numerics: C and dW subtract only quantities of h's own variance if h is centred first. float32 images are centred by
their mean (two more passes over h). 16-bit images are not: the cancellation in float32 sums, about 2^-24 (m / std)^2,
is no larger than the rounding of such h itself, 2^-18 / 12 (m / std)^2 in bfloat16 and 2^-22 / 12 in float16. b and dh
use the rounded V and M, so that their rounding acts on h - m and not on h.

Extra arithmetic: w / K of the convolution's each for C and for h M, and 2 K w^2 multiply-adds per span in float32 for
W C and M, which is little only if a span has many more rows than w. y is neither written, read nor kept. Counts are in
docs/decisions/0012-gram-batch-norm.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.bottleneck import fold, products
from megabatch.kernels.bottleneck.fold import Folded, Group
from megabatch.kernels.bottleneck.products import Epilogue, Term
from megabatch.kernels.dispatch import Backend, use_triton
from megabatch.kernels.layout import FilterLayout, images_of, rows_of
from megabatch.kernels.statistics import StatisticsSink


class GramOutput(NamedTuple):
    """Output z (N, K, H, W), next_y = A z if A was given, and statistics of y, without gradient.

    mean and var, the unbiased variance, are (spans, K) in float32 (float64 for float64 images). num_rows (1, 1) is the
    size of a span that ranks share, else None.
    """

    z: Tensor
    next_y: Tensor | None
    mean: Tensor
    var: Tensor
    num_rows: Tensor | None


class Options(NamedTuple):
    """How to compute; see `gram_conv1x1_norm`."""

    span: int
    eps: float
    relu: bool
    stride: tuple[int, int]
    group: Group | None
    sink: StatisticsSink | None
    triton: bool


def gram_conv1x1_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    span: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: tuple[int, int] = (1, 1),
    next_weight: Tensor | None = None,
    group: Group | None = None,
    sink: StatisticsSink | None = None,
    backend: Backend = "auto",
) -> GramOutput:
    """Returns z = relu(batch norm(weight x) + residual) with statistics per `span` samples; once differentiable.

    The last span is shorter if N is not a multiple of `span`. With `next_weight`, the filter of a 1x1 convolution of z,
    that convolution's output is returned too; z may be used in any other way as well. With `sink`, the statistics are
    also accumulated there. With `group` its ranks share one
    span: each passes its samples, possibly none, all together, and `span` is not used. Then forward sends one
    all-reduce of (w + 1)(w + 2) / 2 float64 values and backward one of 2 K values; gradients of parameters, summed over
    the ranks, are those of the whole span. (A rank's own gradient of `weight` splits that sum in another way than
    backward through `normalise_shared_span` does.)

    Shapes: x (N, w, H, W), fastest in channels_last; weight (K, w, 1, 1), norm_weight and norm_bias (K,), in the dtype
    of the statistics, weight also in x's; residual (N, K, H / stride, W / stride) in x's dtype; next_weight
    (L, K, 1, 1).

    Raises:
        UserError: a span below 1, or tensors of shapes or dtypes that do not agree.
    """
    _check(x[:, :, :: stride[0], :: stride[1]], weight, norm_weight, norm_bias, residual, span, group)
    options = Options(max(1, len(x)) if group else span, eps, relu, stride, group, sink, use_triton(x, backend))
    z, next_y, *statistics = _GramNorm.apply(x, weight, norm_weight, norm_bias, residual, next_weight, options)  # type: ignore[no-untyped-call]
    return GramOutput(z, next_y, *statistics)


class _GramNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        next_weight: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        images = x[:, :, :: options.stride[0], :: options.stride[1]]
        rows, triton = rows_of(images), options.triton
        span_rows = max(1, min(options.span, len(images))) * images.shape[2] * images.shape[3]
        next_y, next_cast = None, None
        # The small products must stay in float32 under autocast.
        with torch.autocast(x.device.type, enabled=False):
            matrix = weight.flatten(1)
            norm = fold.Norm(gamma, beta, options.eps, options.group)
            folded = fold.fold(rows, matrix, norm, span_rows, sink=options.sink, triton=triton)
            z_rows, relu_mask = products.product(
                Term(rows, folded.filter.mT),
                Epilogue(folded.bias, None if residual is None else rows_of(residual), options.relu),
                span_rows=span_rows,
                triton=triton,
            )
            z = images_of(z_rows, images)
            if next_weight is not None:
                next_cast = next_weight.to(z.dtype)
                next_y = functional.conv2d(z, next_cast)
        if next_y is None and relu_mask is not None:
            relu_mask = z_rows  # kept by others in any case; torch reads it faster than bits
        ctx.save_for_backward(rows, matrix, gamma, *folded, relu_mask, next_cast, None if next_y is None else z_rows)
        ctx.options, ctx.span_rows, ctx.shape, ctx.of_z = options, span_rows, x.shape, z.shape
        ctx.has_residual = residual is not None
        ctx.layouts = [None if w is None else FilterLayout.of(w) for w in (weight, next_weight)]
        statistics = folded.mean, folded.var, folded.num_rows
        ctx.mark_non_differentiable(*(values for values in statistics if values is not None))
        ctx.set_materialize_grads(False)
        return z, next_y, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        rows, matrix, gamma, *saved, relu_mask, next_cast, z_rows = ctx.saved_tensors
        if dz is None and dy is None:
            return (None,) * 7
        options, folded, (layout, next_layout) = ctx.options, Folded(*saved), ctx.layouts
        triton, span_rows = options.triton, ctx.span_rows
        with torch.autocast(rows.device.type, enabled=False):
            g, dnext = _gradient_of_sum(dz, dy, next_cast, relu_mask, z_rows, triton=triton)
            g_sums = products.gram(g, rows, span_rows=span_rows, triton=triton)
            found = fold.gradients(g_sums, matrix, gamma, folded, len(rows), span_rows, options.group)
            dx = None
            if ctx.needs_input_grad[0]:
                dh = products.product(
                    Term(g, folded.filter),
                    Epilogue(found.constant),
                    other=Term(rows, found.correction),
                    span_rows=span_rows,
                    triton=triton,
                )[0]
                dx = _images_of_stride(dh, ctx.shape, options.stride)
        dr: Tensor | None = _images_of_stride(g, ctx.of_z, (1, 1)) if ctx.has_residual else None
        if dnext is not None:
            dnext = next_layout.restore(dnext)
        return dx, layout.restore(found.dweight), found.dgamma, found.dbeta, dr, dnext, None


def _gradient_of_sum(
    dz: Tensor | None,
    dy: Tensor | None,
    next_weight: Tensor | None,
    relu_mask: Tensor | None,
    z_rows: Tensor | None,
    *,
    triton: bool,
) -> tuple[Tensor, Tensor | None]:
    """g as rows, and the gradient of the next filter, from the gradients of z and of next_y."""
    given = None if dz is None else rows_of(dz)
    if dy is None or next_weight is None or z_rows is None:
        assert given is not None, "one of both has a gradient"
        return given if relu_mask is None else products.masked(given, relu_mask), None
    dy_rows = rows_of(dy)
    # The filter is the same for all spans, so the rows are one span here.
    g, _ = products.product(
        Term(dy_rows, next_weight.flatten(1)[None]),
        Epilogue(addend=given, relu_mask=relu_mask),
        span_rows=max(1, len(dy_rows)),
        triton=triton,
    )
    _, dnext, _ = torch.ops.aten.convolution_backward(
        dy, images_of(z_rows, dy), next_weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return g, dnext


def _images_of_stride(rows: Tensor, shape: torch.Size, stride: tuple[int, int]) -> Tensor:
    """Images of this shape, whose pixels at multiples of `stride` are the rows, and else 0."""
    count, channels, height, width = shape
    if stride == (1, 1):
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)
    full = rows.new_zeros(count, height, width, channels).permute(0, 3, 1, 2)
    pixels = full[:, :, :: stride[0], :: stride[1]]
    pixels.copy_(images_of(rows, pixels))
    return full


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor | None,
    span: int,
    group: Group | None,
) -> None:
    outputs, inputs = len(weight), x.shape[1] if x.ndim == 4 else 0
    if weight.shape != (outputs, inputs, 1, 1) or {norm_weight.shape, norm_bias.shape} != {(outputs,)}:
        raise UserError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, norm weight {tuple(norm_weight.shape)} and bias "
            f"{tuple(norm_bias.shape)} were given, needed: images (N, C, H, W), (K, C, 1, 1) and two vectors of K; "
            "x (32, 64, 56, 56), weight (256, 64, 1, 1) and vectors of 256 work"
        )
    if residual is not None and (residual.dtype != x.dtype or residual.shape != (len(x), outputs, *x.shape[2:])):
        raise UserError(
            f"the residual is {residual.dtype} {tuple(residual.shape)}, needed: {x.dtype} "
            f"{(len(x), outputs, *x.shape[2:])}"
        )
    if group is None and (span < 1 or not len(x)):
        raise UserError(f"span={span} was given for {len(x)} samples, needed: 1 or more of both; span=32 works")
