"""Algebra on the filter of a 1x1 convolution with batch norm behind it; symbols are those of `kernels.gram`.

For 16-bit rows on a GPU three Triton kernels do it, as small batches are bound by launches; else torch's operations.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.kernels.bottleneck import products
from megabatch.kernels.dispatch import load, on_device
from megabatch.kernels.norm.passes import wide
from megabatch.kernels.statistics import StatisticsSink, has_kernel, keep_statistics, kernel_arguments, no_arguments


class Group(NamedTuple):
    """Ranks that share one span; `process_group` None is the default group."""

    process_group: dist.ProcessGroup | None


class InputMoments(NamedTuple):
    """Mean (spans, w) and covariance (spans, w, w) of the rows of h, and numbers of rows (spans, 1)."""

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


class Norm(NamedTuple):
    """A batch norm: weight gamma and bias beta (K,), eps, and the ranks that share its span."""

    gamma: Tensor
    beta: Tensor
    eps: float
    group: Group | None


class Folded(NamedTuple):
    """A filter that includes its batch norm, and what backward needs; each has one entry per span.

    filter is V (spans, K, w) in the dtype of h, bias b, rstd q, filtered W C (spans, K, w), h_mean m (spans, w); mean
    and unbiased variance of y, (spans, K). num_rows (spans, 1) is None where no rank shares the span on a GPU.
    """

    filter: Tensor
    bias: Tensor
    rstd: Tensor
    filtered: Tensor
    h_mean: Tensor
    mean: Tensor
    var: Tensor
    num_rows: Tensor | None


class Gradients(NamedTuple):
    """dW (K, w), dgamma and dbeta (K,), and -M (spans, w, w) and M m - V^T db / N (spans, w) of dh."""

    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor
    correction: Tensor
    constant: Tensor


def fold(
    rows: Tensor, weight: Tensor, norm: Norm, span_rows: int, *, sink: StatisticsSink | None, triton: bool
) -> Folded:
    """Measures h and folds batch norm into the filter; weight (K, w). With `sink`, statistics of y are kept there."""
    if triton and norm.group is None and products.supports(rows, len(weight)):
        return _fold_by_kernel(rows, weight, norm, span_rows, sink)
    gamma, beta, eps, group = norm
    found = input_moments(rows, span_rows, triton=triton)
    if group is not None:
        found = found.shared(group)
    matrix = wide(weight)
    filtered = matrix @ found.covariance
    var = (filtered * matrix).sum(2).clamp(min=0)
    # NaN, not 0, on overflow, as in the other batch norms.
    rstd = torch.where(var < torch.inf, torch.rsqrt(var + eps), torch.nan)
    folded = ((gamma * rstd)[..., None] * matrix).to(rows.dtype)
    bias = beta - _apply(wide(folded), found.mean)
    mean, unbiased = found.mean @ matrix.T, var * found.num_rows / (found.num_rows - 1).clamp(min=1)
    if sink is not None:
        keep_statistics(sink, mean, unbiased, triton=triton)
    return Folded(folded, bias, rstd, filtered, found.mean, mean, unbiased, found.num_rows)


def input_moments(rows: Tensor, span_rows: int, *, triton: bool) -> InputMoments:
    """Mean, covariance and count of each span of rows."""
    (_, width), sum_type = rows.shape, torch.promote_types(rows.dtype, torch.float32)
    # Filled on the device, as a copy would break a graph capture.
    counts = [m.new_full((len(m), 1), m.shape[1], dtype=sum_type) for _, (m,) in products.batches(span_rows, rows)]
    count = torch.cat(counts)
    size = count.clamp(min=1)
    if rows.element_size() == 2:
        sums = products.gram(rows, rows, span_rows=span_rows, triton=triton)
        # In float64, as the difference of two float32 values would round once more.
        exact = sums.double() / size
        second, mean = exact[:, : width**2].reshape(-1, width, width), exact[:, width**2 :]
        return InputMoments(mean.to(sum_type), (second - _outer(mean, mean)).to(sum_type), count)
    mean = torch.cat([h.sum(1) for _, (h,) in products.batches(span_rows, rows)]) / size
    centred = (h - mean[spans, None] for spans, (h,) in products.batches(span_rows, rows))
    return InputMoments(mean, torch.cat([h.mT @ h for h in centred]) / size[..., None], count)


def gradients(
    g_sums: Tensor, weight: Tensor, gamma: Tensor, folded: Folded, num_rows: int, span_rows: int, group: Group | None
) -> Gradients:
    """Gradients from the sums g^T h and 1^T g of each span, (spans, K (w + 1)); weight (K, w)."""
    if folded.num_rows is None:
        return _gradients_by_kernel(g_sums, weight, gamma, folded, num_rows, span_rows)
    outputs, inputs = weight.shape
    matrix, rstd = wide(weight), folded.rstd
    product, dbeta = g_sums[:, :-outputs].reshape(-1, outputs, inputs), g_sums[:, -outputs:]
    centred = product - _outer(dbeta, folded.h_mean)
    dgamma = rstd * (matrix * centred).sum(2)
    slope = gamma * rstd
    dweight = slope[..., None] * (centred - (rstd * dgamma)[..., None] * folded.filtered)
    means = torch.stack([dbeta, dgamma])
    if group is not None:
        dist.all_reduce(means, group=group.process_group)
    mean_g, mean_product = means / folded.num_rows.clamp(min=1)
    scale = slope * rstd * mean_product
    # From the rounded filters, so that their rounding acts on h - m.
    correction = -(matrix.T @ (scale[..., None] * matrix)).to(folded.filter.dtype)
    constant = -_apply(wide(correction), folded.h_mean) - _apply(wide(folded.filter).mT, mean_g)
    return Gradients(dweight.sum(0), dgamma.sum(0), dbeta.sum(0), correction, constant)


def _fold_by_kernel(rows: Tensor, weight: Tensor, norm: Norm, span_rows: int, sink: StatisticsSink | None) -> Folded:
    outputs, inputs = weight.shape
    sums = products.gram(rows, rows, span_rows=span_rows, triton=True)
    spans = len(sums)
    folded = rows.new_empty(spans, outputs, inputs)
    filtered, h_mean = sums.new_empty(spans, outputs, inputs), sums.new_empty(spans, inputs)
    bias, rstd, mean, var = sums.new_empty(4, spans, outputs)
    given = (sums, weight, norm.gamma, norm.beta, folded, bias, rstd, filtered, h_mean, mean, var)
    # With one span the same launch accumulates; with several, their sum is known only after all programs have ended.
    at_once = sink if sink is not None and spans == 1 and has_kernel(sink) else None
    kept = no_arguments(sums) if at_once is None else kernel_arguments(at_once)
    blocks = {"block_outputs": 16, "block_inputs": products.block_of(inputs)}
    _launch("fold", outputs, spans, (*given, len(rows), span_rows, norm.eps, inputs, outputs), **kept, **blocks)
    if sink is not None and at_once is None:
        keep_statistics(sink, mean, var, triton=True)
    return Folded(folded, bias, rstd, filtered, h_mean, mean, var, None)


def _gradients_by_kernel(
    g_sums: Tensor, weight: Tensor, gamma: Tensor, folded: Folded, num_rows: int, span_rows: int
) -> Gradients:
    (outputs, inputs), spans = weight.shape, len(g_sums)
    # A single span's gradient is the result, so it is rounded to the filter's dtype at once.
    dweight = g_sums.new_empty(spans, outputs, inputs, dtype=weight.dtype if spans == 1 else None)
    vectors, scale = g_sums.new_empty(2, spans, outputs), g_sums.new_empty(spans, outputs)
    correction, constant = folded.filter.new_empty(spans, inputs, inputs), g_sums.new_empty(spans, inputs)
    sizes, block = (num_rows, span_rows, inputs, outputs), products.block_of(inputs)
    given = (g_sums, weight, gamma, folded.rstd, folded.filtered, folded.h_mean, dweight, vectors, scale, *sizes)
    _launch("filter_gradient", outputs, spans, given, block_outputs=16, block_inputs=block)
    others = (g_sums, weight, folded.filter, folded.h_mean, scale, correction, constant, *sizes)
    blocks = {"block_inputs": 16, "block_rows": block, "block_outputs": products.block_of(outputs)}
    _launch("correction", inputs, spans, others, **blocks)
    dgamma, dbeta = vectors.sum(1) if spans > 1 else vectors[:, 0]
    return Gradients(dweight.sum(0) if spans > 1 else dweight[0], dgamma, dbeta, correction, constant)


def _launch(name: str, channels: int, spans: int, arguments: tuple[Any, ...], **options: Any) -> None:
    """Runs a kernel on blocks of 16 of these channels of each span."""
    with on_device(arguments[0]):
        kernel = getattr(load("kernels.bottleneck._fold_triton"), f"{name}_kernel")
        kernel[(channels // 16, spans)](*arguments, **options)


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrix times vector per span: (spans, K, w), (spans, w) -> (spans, K)."""
    return (matrices @ vectors[..., None])[..., 0]


def _outer(columns: Tensor, rows: Tensor) -> Tensor:
    """columns rows^T per span."""
    return columns[:, :, None] * rows[:, None, :]
