"""Batch norm of a 1x1 convolution's output from the mean and covariance of its input: the output is never written.

A 1x1 convolution is linear, so the statistics of y = W h follow from those of h, which has a quarter of y's channels
behind the 3x3 convolution of a bottleneck. Per span, with N rows (samples x pixels) of w channels in h (N, w), the
filter W (K, w), batch norm's weight gamma and bias beta, a residual r (N, K), 1 a column of ones, o the elementwise
product:

    m = h^T 1 / N;   C = h^T h / N - m m^T                        mean (w) and covariance (w, w) of h, before any y
    mean_y = W m;    var_y = diag(W C W^T);   q = (var_y + eps)^(-1/2)
    V = diag(gamma q) W;   b = beta - V m;    z = relu(h V^T + b + r)

One product gives z. Backward, from dy = gamma q (g - 1^T g / N - x dgamma / N) with x = (y - mean_y) q and dh = dy W:

    g = dz where z > 0, which is also dr;   db = 1^T g = dbeta;   G = g^T h - db m^T
    dgamma = q o ((W o G) 1)
    dW = diag(gamma q) (G - diag(q o dgamma) W C)
    dh = g V - (h - 1 m^T) M - 1 (V^T db / N)^T,        M = W^T diag(gamma q^2 dgamma / N) W

dgamma, dW and M sum over one span; parameters get the sum over spans. Nothing divides by gamma, which may be 0. The
equations hold for h - c with any constant vector c, because batch norm removes constants. They are those of Ioffe and
Szegedy 2015, arXiv:1502.03167, for a linear map.

Numerics: C and dW subtract only quantities of h's own variance if h is centred first. float32 images are centred by
their mean (two more passes over h). 16-bit images are not: the cancellation in float32 sums, about 2^-24 (m / std)^2,
is no larger than the rounding of such h itself, 2^-18 / 12 (m / std)^2 in bfloat16 and 2^-22 / 12 in float16. b and dh
use the rounded V and M, so that their rounding acts on h - m and not on h.

Extra arithmetic: w / K of the convolution's each for C and for h M, and 2 K w^2 multiply-adds per span in float32 for
W C and M, which is little only if a span has many more rows than w. y is neither written, read nor kept. Counts are in
docs/decisions/0012-gram-batch-norm.md.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabatch.errors import UserError
from megabatch.kernels.bottleneck import conv1x1
from megabatch.kernels.bottleneck.products import FilterLayout
from megabatch.kernels.dispatch import Backend, use_triton
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Normalisation, wide


class GramOutput(NamedTuple):
    """Output z (N, K, H, W), and statistics of the convolution's output, without gradient.

    mean and var, the unbiased variance, are (spans, K) in float32 (float64 for float64 images). counts (spans,) holds
    the rows of each span, over all ranks that share it.
    """

    z: Tensor
    mean: Tensor
    var: Tensor
    counts: Tensor


class Group(NamedTuple):
    """Ranks that share one span; `process_group` None is the default group."""

    process_group: dist.ProcessGroup | None


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
    group: Group | None = None,
    backend: Backend = "auto",
) -> GramOutput:
    """Returns z = relu(batch norm(weight x) + residual) with statistics per `span` samples; once differentiable.

    The last span is shorter if N is not a multiple of `span`. With `group` its ranks share one span: each passes its
    samples, possibly none, all together, and `span` is not used. Then forward sends one all-reduce of
    (w + 1)(w + 2) / 2 float64 values and backward one of 2 K values; gradients of parameters, summed over the ranks,
    are those of the whole span. (A rank's own gradient of `weight` splits that sum in another way than backward
    through `normalise_shared_span` does.)

    Shapes: x (N, w, H, W), fastest in channels_last; weight (K, w, 1, 1), norm_weight and norm_bias (K,), in the dtype
    of the statistics; residual (N, K, H, W) in x's dtype.

    Raises:
        UserError: a span below 1, or tensors of shapes or dtypes that do not agree.
    """
    _check(x, weight, norm_weight, norm_bias, residual, span, group)
    span = max(1, len(x)) if group else span
    triton = use_triton(x, backend)
    parameters = (weight, norm_weight, norm_bias)
    return GramOutput(*_GramNorm.apply(x, *parameters, residual, span, eps, relu, group, triton))  # type: ignore[no-untyped-call]


class InputMoments(NamedTuple):
    """Mean (spans, w) and covariance (spans, w, w) of the rows of x, and numbers of rows (spans, 1)."""

    mean: Tensor
    covariance: Tensor
    num_rows: Tensor

    def shared(self, group: Group) -> "InputMoments":
        """Moments over all ranks of `group`; equal bits on all of them.

        Sums about 0 in float64 lose nothing that float32 moments hold, so that one all-reduce is enough.
        """
        mean, covariance, count = (values.double() for values in self)
        second = count[..., None] * (covariance + _outer(mean, mean))
        rows, columns = torch.triu_indices(*second.shape[1:], device=mean.device)
        sums = torch.cat([count, count * mean, second[:, rows, columns]], dim=1)
        dist.all_reduce(sums, group=group.process_group)
        total = sums[:, :1].clamp(min=1)
        mean = sums[:, 1 : 1 + mean.shape[1]] / total
        second[:, rows, columns] = second[:, columns, rows] = sums[:, 1 + mean.shape[1] :]
        covariance = second / total[..., None] - _outer(mean, mean)
        return InputMoments(*(values.to(self.mean.dtype) for values in (mean, covariance, sums[:, :1])))


class _GramNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        span: int,
        eps: float,
        relu: bool,
        group: Group | None,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        # The small products must stay in float32 under autocast.
        with torch.autocast(x.device.type, enabled=False):
            blocks = Blocks.of(x, span)
            found = input_moments(blocks, triton=triton)
            if group is not None:
                found = found.shared(group)
            matrix = weight.flatten(1)
            filtered = matrix @ found.covariance
            var = (filtered * matrix).sum(2).clamp(min=0)
            # NaN, not 0, on overflow, as in the other batch norms.
            rstd = torch.where(var < torch.inf, torch.rsqrt(var + eps), torch.nan)
            folded = ((gamma * rstd)[..., None] * matrix).to(x.dtype)
            bias = beta - _apply(wide(folded), found.mean)
            z, relu_mask = _output(blocks, folded, bias, residual, relu, triton)
            count = found.num_rows
            outputs = z, found.mean @ matrix.T, var * count / (count - 1).clamp(min=1), count[:, 0]
        ctx.save_for_backward(x, weight, gamma, rstd, folded, found.mean, filtered, count, relu_mask)
        ctx.span, ctx.has_residual, ctx.group, ctx.triton = span, residual is not None, group, triton
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, gamma, rstd, folded, mean, filtered, count, relu_mask = ctx.saved_tensors
        if dz is None:
            return (None,) * 10
        with torch.autocast(x.device.type, enabled=False):
            g, dbeta = _masked(dz, relu_mask, rstd, ctx.span)
            blocks, g_blocks, matrix = Blocks.of(x, ctx.span), Blocks.of(g, ctx.span), weight.flatten(1)
            centred = g_blocks.transposed_product(blocks, triton=ctx.triton) - _outer(dbeta, mean)
            dgamma = rstd * (matrix * centred).sum(2)
            slope = gamma * rstd
            dweight = slope[..., None] * (centred - (rstd * dgamma)[..., None] * filtered)
            dx = None
            if ctx.needs_input_grad[0]:
                mean_g, mean_product = _over_ranks(torch.stack([dbeta, dgamma]), ctx.group) / count.clamp(min=1)
                dh = _input_gradient(blocks, g_blocks, matrix, folded, slope * rstd * mean_product, mean_g, mean)
                dx = images_of(dh, x)
        layout = FilterLayout.of(weight)
        dr = images_of(g_blocks.rows, g) if ctx.has_residual else None
        return dx, layout.restore(dweight.sum(0)), dgamma.sum(0), dbeta.sum(0), dr, *(None,) * 5


class Blocks(NamedTuple):
    """Rows (N H W, C) of images, cut into whole spans of `span_rows` and a short one for the rest."""

    rows: Tensor
    span_rows: int
    images: Tensor
    span: int

    @classmethod
    def of(cls, images: Tensor, span: int) -> "Blocks":
        """The rows of images (N, C, H, W)."""
        span = max(1, min(span, len(images)))
        return cls(rows_of(images), span * images.shape[2] * images.shape[3], images, span)

    def like(self, columns: int) -> Tensor:
        """An empty matrix of as many rows."""
        return self.rows.new_empty(len(self.rows), columns)

    def batches(self, *others: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Whole spans as one batch (spans, rows, C), then the short span; of these rows and of other matrices alike."""
        whole = len(self.rows) // self.span_rows
        end = whole * self.span_rows
        matrices = (self.rows, *others)
        if whole or not len(self.rows):
            spans = max(1, whole)
            yield slice(0, spans), tuple(m[:end].view(spans, end // spans, m.shape[1]) for m in matrices)
        if end < len(self.rows):
            yield slice(whole, whole + 1), tuple(m[None, end:] for m in matrices)

    def counts(self) -> Tensor:
        """Number of each span's rows, (spans, 1); filled on the device, as a copy would break a graph capture."""
        counts = [m.new_full((len(m), 1), m.shape[1], dtype=_sum_type(m)) for _, (m,) in self.batches()]
        return torch.cat(counts)

    def sums(self) -> Tensor:
        """Sum of each span's rows, (spans, C), in the dtype of sums."""
        return torch.cat([rows.sum(1, dtype=_sum_type(rows)) for _, (rows,) in self.batches()])

    def transposed_product(self, other: "Blocks", *, triton: bool) -> Tensor:
        """rows^T other of each span, (spans, C, w), with sums in float32 at least, which no rounding follows."""
        is_16_bit = self.rows.element_size() == 2 and self.rows.numel() > 0
        if triton and is_16_bit and conv1x1.supports(other.images, self.rows.shape[1]):
            return torch.stack([_kernel_product(g, h) for g, h in zip(self._spans(), other._spans(), strict=True)])
        return torch.cat([wide(g).mT @ wide(h) for _, (g, h) in self.batches(other.rows)])

    def _spans(self) -> tuple[Tensor, ...]:
        return torch.split(self.images, self.span)


def _sum_type(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _kernel_product(g: Tensor, h: Tensor) -> Tensor:
    product: Tensor = conv1x1.conv1x1_weight_gradient(g, h, span=len(h), dtype=torch.float32, backend="triton")
    return product.flatten(1)


def input_moments(blocks: Blocks, *, triton: bool) -> InputMoments:
    """Mean, covariance and count of each span of rows."""
    sums, count = blocks.sums(), blocks.counts()
    mean = sums / count.clamp(min=1)
    if blocks.rows.element_size() == 2:
        # In float64, as the difference of two float32 values would round once more.
        second = blocks.transposed_product(blocks, triton=triton).double() / count[..., None].clamp(min=1)
        covariance = (second - _outer(mean.double(), mean.double())).to(mean.dtype)
    else:
        centred = (rows - mean[spans, None] for spans, (rows,) in blocks.batches())
        covariance = torch.cat([rows.mT @ rows for rows in centred]) / count[..., None].clamp(min=1)
    return InputMoments(mean, covariance, count)


def _output(
    blocks: Blocks, folded: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, triton: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns z = relu(h V^T + b + r) as images, and what `_masked` reads: None, z, or bits from the Triton pass."""
    z = blocks.like(folded.shape[1])
    # The bias is added in float32: rounded to 16 bit it would shift whole channels where h is far from 0.
    if triton and z.numel():
        for spans, (h, out) in blocks.batches(z):
            torch.bmm(h, folded[spans].mT, out=out)
        norm = _shift(-bias)
        options: Any = {"span": blocks.span, "relu": relu, "triton": True}
        if residual is not None:
            return join_passes.join(images_of(z, blocks.images), norm, residual, **options)
        output = passes.normalise(images_of(z, blocks.images), norm, **options)
    else:
        for spans, (h, out, *given) in blocks.batches(z, *([] if residual is None else [rows_of(residual)])):
            if given:
                torch.baddbmm(given[0], h, folded[spans].mT, out=out)
            else:
                torch.bmm(h, folded[spans].mT, out=out)
            out.add_(bias[spans, None])
        output = images_of(z.relu_() if relu else z, blocks.images)
    return output, output if relu else None


def _shift(mean: Tensor) -> Normalisation:
    """The batch norm that only subtracts `mean` (spans, K)."""
    return Normalisation(mean, torch.ones_like(mean), torch.ones_like(mean[0]), torch.zeros_like(mean[0]))


def _masked(dz: Tensor, relu_mask: Tensor | None, like: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Returns g and db; `like` has the shape of db, (spans, K)."""
    if relu_mask is not None and relu_mask.dtype == torch.uint8:
        # One pass. It also reads the images of a second sum, which is not needed here: dz again, found in the cache.
        g, sums = join_passes.join_gradient(dz, dz, _shift(torch.zeros_like(like)), relu_mask, span=span, triton=True)
        return g, sums[:, 0]
    g = dz if relu_mask is None else torch.ops.aten.threshold_backward(dz, relu_mask, 0)
    return g, Blocks.of(g, span).sums()


def _input_gradient(
    blocks: Blocks, g_blocks: Blocks, matrix: Tensor, folded: Tensor, scale: Tensor, mean_g: Tensor, mean: Tensor
) -> Tensor:
    """dh as rows: g V - (h - 1 m^T) M - 1 (V^T mean_g)^T, with M = W^T diag(scale) W."""
    correction = (matrix.T @ (scale[..., None] * matrix)).to(folded.dtype)
    constant = _apply(wide(correction), mean) - _apply(wide(folded).mT, mean_g)
    dh = blocks.like(matrix.shape[1])
    for spans, (h, g, out) in blocks.batches(g_blocks.rows, dh):
        torch.baddbmm(constant[spans, None].to(dh.dtype), h, correction[spans], alpha=-1, out=out)
        out.baddbmm_(g, folded[spans])
    return dh


def _over_ranks(sums: Tensor, group: Group | None) -> Tensor:
    if group is not None:
        dist.all_reduce(sums, group=group.process_group)
    return sums


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrix times vector per span: (spans, K, w), (spans, w) -> (spans, K)."""
    return (matrices @ vectors[..., None])[..., 0]


def _outer(columns: Tensor, rows: Tensor) -> Tensor:
    """columns rows^T per span."""
    return columns[:, :, None] * rows[:, None, :]


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
