# mypy: ignore-errors
"""Triton kernel of the softmax cross entropy. Loaded by `loss` alone, when it runs on a GPU."""

import triton
import triton.language as tl

IGNORED = tl.constexpr(-100)


@triton.jit
def _share(label, weight, classes: tl.constexpr):
    """The weight of a label: 0 where torch ignores it, not a number where there is no such class."""
    exists = (label >= 0) & (label < classes)
    return tl.where(exists, weight, tl.where(label == IGNORED, 0.0, float("nan")))


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    mixed_labels,
    mix_weight,
    losses,
    gradient,
    row_stride,
    smoothing,
    scale,
    mixed: tl.constexpr,
    weight_per_row: tl.constexpr,
    classes: tl.constexpr,
    block: tl.constexpr,
):
    """One row: its loss, and its gradient (softmax - target) times `scale`, from one read of the logits."""
    row = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < classes
    values = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(values, axis=0)
    exponentials = tl.exp(values - top)
    total = tl.sum(exponentials, axis=0)
    label = tl.load(labels + row)
    weight = 1.0
    if mixed:
        weight = tl.load(mix_weight + row) if weight_per_row else tl.load(mix_weight)
    whole = _share(label, weight, classes)
    target = tl.where(column == label, whole, 0.0)
    if mixed:
        other = tl.load(mixed_labels + row)
        share = _share(other, 1.0 - weight, classes)
        target += tl.where(column == other, share, 0.0)
        whole += share
    target = (1.0 - smoothing) * target + smoothing / classes * whole
    away = tl.where(inside, values - top, 0.0)
    loss = whole * tl.log(total) - tl.sum(tl.where(inside, target * away, 0.0), axis=0)
    tl.store(losses + row, loss)
    result = (exponentials / total * whole - target) * tl.load(scale)
    tl.store(gradient + row.to(tl.int64) * classes + column, result.to(gradient.dtype.element_ty), mask=inside)
